"""Adding up what the layers did with a step's microbatches: once, exactly, the same on every rank.

A layer returns what it did with one microbatch; nothing is accumulated while it runs, so recomputation
counts nothing twice. Counts are integers, added in any order; what is measured or averaged is fp64.
Rows are those that go to the ranks of an expert group; where experts are cut, these share them further.
A row goes from the rank that holds its token to the rank that holds its expert, whichever way it takes; where
rows make two hops (`layout.dispatch`), what the links carried is what was sent in each hop: a row over the
network for each node that a token reaches, and inside that node, from the rank where it arrives, one for
each expert, which stays there or takes a fast link.
Legend: L layers of experts, E experts, P expert-parallel ranks, D domains, T tokens, K chosen experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.config import RunConfig, TelemetryConfig
from moe.data.loader import Batch
from moe.model.transformer import Outcome, expert_layers, positions_of
from parallel.collectives import all_reduce, group_ranks
from parallel.groups import Groups
from parallel.pipeline.tape import seconds


@dataclass(frozen=True)
class Sampling:
    """What is taken down of a step beside its counts."""

    domains: bool = False
    pairs: bool = False
    times: bool = False
    routing: bool = False

    @staticmethod
    def of(telemetry: TelemetryConfig, step: int) -> "Sampling":
        """As the settings want it of a step (1-based)."""
        periods = (
            telemetry.domains_every,
            telemetry.pairs_every,
            telemetry.times_every,
            telemetry.routing_every,
        )
        return Sampling(*(bool(every) and step % every == 0 for every in periods))


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """One layer's global batch, and its bias."""

    counts: Tensor  # [E] int64: assignments of valid tokens
    rank_rows: Tensor  # [P, P] int64: rows from an expert-parallel rank to another, over all expert groups
    links: Tensor  # [3] int64: rows that were kept on a rank, went over a node's links, and over the network
    gates: Tensor  # [E] fp64: the sum of the weights by which valid tokens chose each expert
    max_vio_microbatch: tuple[float, float]  # MaxVio of single microbatches: mean and greatest
    logit_rms: float
    logit_max: float
    margin: float | None  # mean distance of the last chosen score to the first not chosen
    group_limited: float  # share of the assignments that go elsewhere for the group limit
    bias: Tensor  # [E] fp32, after the update
    domains: Tensor | None  # [D, E] int64
    pairs: (
        Tensor | None
    )  # [E (E - 1) / 2] int64: tokens that chose both, in the order of `torch.triu_indices`
    expert_seconds: Tensor | None  # [P] fp64: forward of the experts of each rank, of its slowest copy


@dataclass(frozen=True, kw_only=True)
class Totals:
    """All layers' global batch, in the order of `expert_layers`; see `LayerCounts`."""

    counts: Tensor  # [L, E]
    rank_rows: Tensor  # [L, P, P]
    links: Tensor  # [L, 3]
    gates: Tensor  # [L, E]
    signals: Tensor  # [L, 4]: see `Signals`
    max_vio: Tensor  # [L, 2]: the sum over microbatches, and how many these are
    greatest: Tensor  # [L, 2 + P]: logit, MaxVio of a microbatch, seconds of each rank's experts
    domains: Tensor | None  # [L, D, E]
    pairs: Tensor | None  # [L, E (E - 1) / 2]

    def on_host(self) -> "Totals":
        """The same where reading a number waits for no device."""
        held: dict[str, Any] = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: value.cpu() for name, value in held.items()})

    def layer(self, index: int, bias: Tensor, top_k: int, *, times: bool) -> LayerCounts:
        """One layer of them."""
        square, margin, num_margins, moved = self.signals[index].tolist()
        logit_max, max_vio_greatest, *_ = self.greatest[index].tolist()
        max_vio, num_microbatches = self.max_vio[index].tolist()
        assignments = max(1, int(self.counts[index].sum()))
        return LayerCounts(
            counts=self.counts[index],
            rank_rows=self.rank_rows[index],
            links=self.links[index],
            gates=self.gates[index],
            max_vio_microbatch=(max_vio / max(1.0, num_microbatches), max_vio_greatest),
            logit_rms=(square * top_k / assignments) ** 0.5,
            logit_max=logit_max,
            margin=margin / num_margins if num_margins else None,
            group_limited=moved / assignments,
            bias=bias,
            domains=None if self.domains is None else self.domains[index],
            pairs=None if self.pairs is None else self.pairs[index],
            expert_seconds=self.greatest[index, 2:] if times else None,
        )


def add_up(
    outcomes: Sequence[Outcome],
    batches: Sequence[Batch],
    config: RunConfig,
    groups: Groups,
    num_domains: int,
    sampling: Sampling,
) -> Totals:
    """The totals of a step from this rank's outcomes, in the order of its microbatches. Every rank calls."""
    names, device = expert_layers(config.model), batches[0].tokens.device
    num_experts, num_ranks = config.model.num_experts, groups.layout.ep
    integers = torch.zeros(
        len(names), num_experts + num_ranks * num_ranks + 3, dtype=torch.int64, device=device
    )
    floats = torch.zeros(len(names), num_experts + 4 + 2, dtype=torch.float64, device=device)
    greatest = torch.zeros(len(names), 2 + num_ranks, dtype=torch.float64, device=device)
    counts, rows, links = integers.split([num_experts, num_ranks * num_ranks, 3], dim=1)
    gates, signals, max_vio = floats.split([num_experts, 4, 2], dim=1)
    rank_rows, rank = rows.unflatten(1, (num_ranks, num_ranks)), groups.index("ep")
    kinds = _links(groups, config.cluster.gpus_per_node, device)
    for outcome in outcomes:
        for name, load in outcome.loads.items():
            index = names.index(name)
            sent = load.rows_E.view(num_ranks, -1).sum(-1)
            counts[index] += load.counts_E
            rank_rows[index, rank] += sent
            links[index].index_add_(0, kinds, sent)
            if load.rows_M is not None:
                links[index, 2] += load.rows_M.sum() - load.rows_M[groups.index("ep_rail")]
            gates[index] += load.gates_E
            signals[index] += load.signals.sums
            greatest[index, 0] = torch.maximum(greatest[index, 0], load.signals.logit_max.double())
            if sampling.times:
                greatest[index, 2 + rank] += seconds(*load.span)
    each = _microbatch_max_vio(outcomes, names, num_experts, groups, device)
    for found in each:
        max_vio += found
        greatest[:, 1] = torch.maximum(greatest[:, 1], found[:, 0])
    all_reduce(integers, groups.world)
    all_reduce(floats, groups.world)
    all_reduce(greatest, groups.world, op=dist.ReduceOp.MAX)
    domains = pairs = None
    if sampling.domains:
        domains = _domains(outcomes, batches, names, num_experts, num_domains, groups)
        all_reduce(domains, groups.world)
    if sampling.pairs:
        pairs = all_reduce(_pairs(outcomes, names, num_experts, device), groups.world)
    return Totals(
        counts=counts,
        rank_rows=rank_rows,
        links=links,
        gates=gates,
        signals=signals,
        max_vio=max_vio,
        greatest=greatest,
        domains=domains,
        pairs=pairs,
    )


def _links(groups: Groups, gpus_per_node: int, device: torch.device) -> Tensor:
    """How rows get to each rank of the expert group: 0 they are there, 1 in a node, 2 over the network; [P].

    Of two hops this is the second, which begins at this rank's place in whichever node.
    """
    if groups.ep_rail is not None:
        places = torch.arange(groups.layout.ep, device=device) % groups.layout.ep_node
        return (places != groups.index("ep_node")).long()
    node = groups.rank // gpus_per_node
    ranks = group_ranks(groups.ep) or (groups.rank,)
    kinds = [0 if rank == groups.rank else 1 if rank // gpus_per_node == node else 2 for rank in ranks]
    return torch.tensor(kinds, device=device)


def _microbatch_max_vio(
    outcomes: Sequence[Outcome], names: list[str], num_experts: int, groups: Groups, device: torch.device
) -> Tensor:
    """MaxVio of each microbatch of this rank and layer, and 1 where it had a token; [M, L, 2] in fp64.

    Ranks that share sequences have the same ones: one of them speaks.
    """
    counts = torch.zeros(len(outcomes), len(names), num_experts, dtype=torch.int64, device=device)
    for microbatch, outcome in enumerate(outcomes):
        for name, load in outcome.loads.items():
            counts[microbatch, names.index(name)] = load.counts_E
    all_reduce(counts, groups.tp_cp)
    totals = counts.sum(-1)
    above = counts.amax(-1) * num_experts - totals
    found = torch.stack((above.double() / totals.clamp_min(1), (totals > 0).double()), dim=-1)
    return found if groups.index("tp") == groups.index("cp") == 0 else torch.zeros_like(found)


def _domains(
    outcomes: Sequence[Outcome],
    batches: Sequence[Batch],
    names: list[str],
    num_experts: int,
    num_domains: int,
    groups: Groups,
) -> Tensor:
    table = torch.zeros(
        len(names), num_domains, num_experts, dtype=torch.int64, device=batches[0].tokens.device
    )
    for batch, outcome in zip(batches, outcomes, strict=True):
        local = local_domains(batch, groups)
        for name, load in outcome.loads.items():
            table[names.index(name)] += count_by_domain(load.experts_TK, local, num_domains, num_experts)
    return table


def local_domains(batch: Batch, groups: Groups) -> Tensor:
    """The domains of the positions that this rank's layers hold, [B, s]."""
    return positions_of(batch.domains.shape[1], groups).sequence(batch.domains)


def count_by_domain(experts_TK: Tensor, domains: Tensor, num_domains: int, num_experts: int) -> Tensor:
    """Assignments by domain and expert, int64: chosen experts [T, K] (E on padding), domains [B, S]."""
    cell = domains.flatten()[:, None] * num_experts + experts_TK
    routed = cell[experts_TK < num_experts]
    return torch.bincount(routed, minlength=num_domains * num_experts).view(num_domains, num_experts)


def _pairs(outcomes: Sequence[Outcome], names: list[str], num_experts: int, device: torch.device) -> Tensor:
    upper = torch.triu_indices(num_experts, num_experts, offset=1, device=device)
    table = torch.zeros(len(names), upper.shape[1], dtype=torch.int64, device=device)
    for outcome in outcomes:
        for name, load in outcome.loads.items():
            table[names.index(name)] += count_pairs(load.experts_TK, num_experts)[upper[0], upper[1]]
    return table


def count_pairs(experts_TK: Tensor, num_experts: int) -> Tensor:
    """How many tokens chose both of two experts, int64 [E, E]: chosen experts [T, K], E on padding."""
    chosen_TE = torch.zeros(len(experts_TK), num_experts + 1, device=experts_TK.device)
    chosen_TE = chosen_TE.scatter_(1, experts_TK, 1.0)[:, :-1]
    return (chosen_TE.T @ chosen_TE).long()  # exact in fp32 up to 2^24 tokens


def routing_of(outcomes: Sequence[Outcome], batches: Sequence[Batch], groups: Groups) -> dict[str, Tensor]:
    """What this rank's layers chose: "LAYER/MICROBATCH" [T, K] in int32, E on padding; and the tokens'
    domains, "domains/MICROBATCH" [T]. Over all ranks every token of the global batch is there once."""
    found = {}
    for microbatch, (batch, outcome) in enumerate(zip(batches, outcomes, strict=True)):
        for name, load in outcome.loads.items():
            found[f"{name}/{microbatch}"] = load.experts_TK.int().cpu()
        if outcome.loads:
            domains = local_domains(batch, groups).flatten()
            found[f"domains/{microbatch}"] = domains.int().cpu().contiguous()
    return found
