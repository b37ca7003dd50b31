"""One attention layer, whole and cut over ranks: every kind of attention must be the same either way."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.model.attention import document_mask
from moe.model.attention_layer import AttentionLayer
from moe.model.gqa import GroupedQueryAttention
from moe.model.mla import MultiHeadLatentAttention
from moe.model.rope import rotation
from parallel.collectives import ALONE, ModelGroups, Splits
from parallel.groups import Groups, build_groups
from parallel.layout import Layout
from parallel.pipeline.tape import Arrival, Tape, run
from parallel.sequence import Positions
from parallel.shards import Piece, parameter_pieces
from tests.ranks import run_ranks
from tests.reduced import assemble, assert_same, buffers, owned_gradients

WIDTH = 12  # hidden size of every configuration


class Variant(NamedTuple):
    """An attention, whether LONG_DOCUMENTS mask it, and whether its forward runs again."""

    config: ModelConfig
    masked: bool
    recompute: bool


def make(config: ModelConfig, groups: ModelGroups = ALONE) -> AttentionLayer:
    """The attention of a configuration, as a block picks it."""
    kind = MultiHeadLatentAttention if config.attention == "mla" else GroupedQueryAttention
    return kind(config, groups)


def build(config: ModelConfig, length: int = 8) -> tuple[AttentionLayer, Tensor]:
    """A layer of random weights and gains, and hidden states [2, length, D]."""
    torch.manual_seed(0)
    layer = make(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.5)
    return layer, torch.randn(2, length, config.hidden_size)


def attend(layer: AttentionLayer, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """The layer's output on sequences that begin at position 0."""
    config = layer.config
    turn = rotation(config.rope, config.rotated_dims, torch.arange(hidden.shape[1]), hidden.device)
    return layer(hidden, turn, mask)


LONG_DOCUMENTS = torch.tensor([[0] * 3 + [1] * 6 + [2] * 7, [0] * 12 + [-1] * 4])  # across every stretch
LENGTH = LONG_DOCUMENTS.shape[1]


def upstream() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(7))


def place(layout: Layout, rank: int) -> Positions:
    at = layout.coordinates(rank)
    return Positions(length=LENGTH, cp=layout.cp, cp_rank=at["cp"], tp=layout.tp, tp_rank=at["tp"])


class Telling(Tape):
    """A tape that writes down what happens, in order."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__(recompute=recompute)
        self.log: list[str] = []
        self.sent: list[tuple[int, ...]] = []

    def compute(self, function: Any, *inputs: Any) -> Any:
        self.log.append("compute")
        return super().compute(function, *inputs)

    def exchange(self, rows: Tensor, splits: Splits) -> Arrival:
        self.log.append("send")
        self.sent.append(tuple(rows.shape))
        return TellingArrival(super().exchange(rows, splits), self.log)


class TellingArrival(NamedTuple):
    arrival: Arrival
    log: list[str]

    def wait(self) -> Tensor:
        self.log.append("wait")
        return self.arrival.wait()


class Stretch(NamedTuple):
    """Of one rank."""

    output: Tensor
    grad_hidden: Tensor
    owned: list[Piece]
    log: list[str]
    sent: list[tuple[int, ...]]


def cut(variant: Variant, groups: Groups) -> Stretch:
    config, positions = variant.config, place(groups.layout, groups.rank)
    whole, hidden = build(config, LENGTH)
    weights = dict(whole.named_parameters())
    layer = make(config, groups)
    for piece in parameter_pieces(layer):
        piece.tensor.copy_(weights[piece.name].detach()[piece.place])
    zero, tape = buffers(layer, groups), Telling(recompute=variant.recompute)
    hidden = positions.sequence(hidden).requires_grad_()
    turn = rotation(config.rope, config.rotated_dims, positions.numbers(), hidden.device)
    documents = LONG_DOCUMENTS if variant.masked else None
    if positions.cp == 1:
        mask = None if documents is None else document_mask(documents)
        output = tape.compute(layer, hidden, turn, mask)
    else:
        phases = layer.ring_phases(tape, hidden, turn, positions, documents)
        while True:
            try:
                next(phases)
                tape.log.append("yield")
            except StopIteration as stop:
                output = stop.value
                break
    log = tape.log.copy()
    wanted = positions.sequence(upstream())
    tape.root(tape.compute(lambda value: (value * wanted).sum(), output), 1.0)
    run(tape.backward())
    tape.weights()
    assert hidden.grad is not None
    return Stretch(output.detach(), hidden.grad, owned_gradients(zero), log, tape.sent)


def cut_variants(rank: int, world_size: int, layout: Layout, variants: Sequence[Variant]) -> list[Stretch]:
    """Every variant on this rank."""
    groups = build_groups(layout)
    return [cut(variant, groups) for variant in variants]


def assert_the_same_attention(layout: Layout, variants: Sequence[Variant]) -> None:
    """Output, input gradient and every weight's gradient: heads over tp, the sequence over tp and cp."""
    by_rank = run_ranks(layout.world_size, cut_variants, layout, variants)
    for variant, *stretches in zip(variants, *by_rank, strict=True):
        layer, hidden = build(variant.config, LENGTH)
        output = attend(
            layer, hidden.requires_grad_(), document_mask(LONG_DOCUMENTS) if variant.masked else None
        )
        output.backward(upstream())
        assert hidden.grad is not None
        for rank, stretch in enumerate(stretches):
            positions = place(layout, rank)
            assert_same(stretch.output, positions.sequence(output.detach()), f"{variant}: output")
            assert_same(stretch.grad_hidden, positions.sequence(hidden.grad), f"{variant}: input gradient")
        gradients = assemble(piece for stretch in stretches for piece in stretch.owned)
        assert gradients.keys() == dict(layer.named_parameters()).keys()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.any()
            assert_same(gradients[name], parameter.grad, f"{variant}: {name}")
