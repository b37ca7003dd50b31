"""What the attentions of a layer share: attending, and the ring of keys and values over `cp`.

An attention says how hidden states become queries and what passes round the ring, and how that becomes
keys and values. Heads are cut over `tp`. Over `cp` what passes travels from rank to rank while each
attends to what it holds (Ring Attention, 2310.01889); the parts are merged at the end.
Legend: B sequences, S positions (of this context-parallel rank), s positions (of this rank), D hidden
size, H heads of this rank, P numbers per token that pass.
"""

from collections.abc import Generator
from dataclasses import replace

from torch import Tensor, nn

from moe.config import ModelConfig
from moe.model.attention import attend, merge, partial_attention
from moe.model.rope import Rotation, softmax_scale
from parallel.collectives import Group, ModelGroups, Splits, group_rank, group_size, scatter_sum
from parallel.linear import Linear
from parallel.pipeline.tape import Recorder
from parallel.sequence import Positions


class AttentionLayer(nn.Module):
    """Causal attention of one layer; a subclass makes `out` and the two methods that are missing here."""

    out: Linear

    def __init__(self, config: ModelConfig, groups: ModelGroups) -> None:
        super().__init__()
        self.config, self.groups = config, groups
        self.scale = softmax_scale(config.rope, config.qk_head_dim)

    def _project(self, hidden: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """[B, s, D] -> rotated queries [B, S, H, qk_head_dim] and what passes round the ring [B, S, P]."""
        raise NotImplementedError

    def _expand(self, passing: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, S, H, qk_head_dim] and values [B, S, H, value_head_dim] of what passes."""
        raise NotImplementedError

    def forward(self, hidden: Tensor, rotation: Rotation, mask: Tensor | None = None) -> Tensor:
        """[B, s, D] -> [B, s, D]. `mask` [B, 1, S, S]: where a query may look; None is causal."""
        query, passing = self._project(hidden, rotation)
        return self._leave(attend(query, *self._expand(passing), self.scale, mask))

    def ring_phases(
        self,
        tape: Recorder,
        hidden: Tensor,
        rotation: Rotation,
        positions: Positions,
        documents: Tensor | None,
    ) -> Generator[None, None, Tensor]:
        """The same over `cp`: what every rank holds passes by once. `documents` [B, S of all ranks]."""
        query, passing = tape.compute(self._ring_project, hidden, rotation)
        ring, partials = _to_next_rank(passing.shape[0], self.groups.cp), []
        for turn in range(positions.cp):
            source = (positions.cp_rank - turn) % positions.cp
            arriving = tape.exchange(passing, ring) if turn + 1 < positions.cp else None
            seen = replace(positions, cp_rank=source)
            partials += tape.compute(self._partial, query, passing, positions, seen, documents)
            if arriving is not None:
                yield
                passing = arriving.wait()
        return tape.compute(self._merge, *partials)

    def _ring_project(self, hidden: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        query, passing = self._project(hidden, rotation)
        return query, passing.flatten(0, 1)

    def _partial(
        self, query: Tensor, rows: Tensor, ours: Positions, theirs: Positions, documents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of our queries to what passed by."""
        sight = ours.sight(theirs.cp_rank)
        key, value = self._expand(rows.unflatten(0, (query.shape[0], -1))[:, sight.keys])
        numbers = None
        if documents is not None:
            of_queries, of_keys = ours.context(documents), theirs.context(documents)
            numbers = of_queries[:, sight.queries], of_keys[:, sight.keys]
        return partial_attention(
            query[:, sight.queries], key, value, self.scale, causal=sight.causal, documents=numbers
        )

    def _merge(self, *partials: Tensor) -> Tensor:
        return self._leave(merge(*partials))

    def _leave(self, mixed: Tensor) -> Tensor:
        return scatter_sum(self.out(mixed.flatten(-2)), self.groups.tp)


def _to_next_rank(rows: int, group: Group) -> Splits:
    ranks, rank = group_size(group), group_rank(group)
    send = tuple(rows if other == (rank + 1) % ranks else 0 for other in range(ranks))
    receive = tuple(rows if other == (rank - 1) % ranks else 0 for other in range(ranks))
    return Splits(send, receive, group)
