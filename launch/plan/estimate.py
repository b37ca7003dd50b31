"""Every byte of a run's ranks before there are any, and what would make a run fit that does not.

A rank's peak is what it holds all the time (static.py), the most that its microbatches take (peaks.py), and
an allowance for what no tensor of ours accounts for. Ranks of one pipeline stage are alike.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from launch.plan.activations import Microbatch, phases
from launch.plan.peaks import peak, stage_of
from launch.plan.static import static_bytes
from moe.config import RunConfig
from moe.model.stages import split
from moe.rules import validate
from moe.train.runner import make_schedule
from parallel.errors import UserError
from parallel.layout import divisors

Imbalance = Callable[[RunConfig], float]  # of settings: another `layout.ep` spreads the same load otherwise
ALLOWANCE = 2_500_000_000  # assumed, not measured: CUDA context, NCCL's buffers, fragments of the allocator


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """One rank. Buffers: exchanged rows, the pipeline's boundaries, gradients that travel, the allowance."""

    rank: int
    in_flight: int  # microbatches on a stage at the peak
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    buffers_bytes: int
    kept: Mapping[str, int]  # by a microbatch on the rank's stages, from forward to backward, by phase

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(value for key, value in asdict(self).items() if key.endswith("_bytes"))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The first rank of each pipeline stage, and the memory that each rank has."""

    config: RunConfig
    world_size: int
    ranks: tuple[RankBytes, ...]
    memory: int

    @property
    def fullest(self) -> RankBytes:
        """The rank with most."""
        return max(self.ranks, key=lambda rank: rank.total_bytes)

    @property
    def fits(self) -> bool:
        """Whether every rank has room."""
        return self.fullest.total_bytes <= self.memory

    def json(self) -> dict[str, Any]:
        """For machines, as the contract of the command says; `per_rank` is of the fullest."""
        rows = [{**asdict(rank), "total_bytes": rank.total_bytes} for rank in self.ranks]
        fullest = next(row for row in rows if row["rank"] == self.fullest.rank)
        kept = {key: value for key, value in fullest.items() if key.endswith("_bytes")}
        return {
            "fits": self.fits,
            "ranks": self.world_size,
            "memory_bytes": self.memory,
            "allowance_bytes": ALLOWANCE,
            "fullest_rank": self.fullest.rank,
            "per_rank": kept,
            "stages": rows,
        }


def estimate(config: RunConfig, imbalance: float) -> Estimate:
    """Add up a run's ranks. `imbalance`: rows that a rank's experts receive in every layer, over the mean."""
    layout = validate(config)
    if config.optim.engine != "switchyard":
        raise UserError(
            f"`plan` reckons with `optim.engine=switchyard`, but it is {config.optim.engine}: leave it out"
        )
    schedule = make_schedule(config.layout, config.layout.microbatches)
    micro = Microbatch(config, layout, imbalance)
    recompute = config.train.recompute == "full"
    stages = {
        number: stage_of(phases(micro, part), recompute=recompute)
        for number, part in enumerate(split(config.model, schedule.num_stages, config.data.sequence_length))
    }
    ranks = []
    for place in range(layout.pp):
        rank = place * layout.stage_size
        static, most = static_bytes(config, layout, rank), peak(schedule, place, stages)
        kept = sum((Counter(stages[stage].by_phase) for stage in schedule.stages[place]), Counter[str]())
        ranks.append(
            RankBytes(
                rank=rank,
                in_flight=most.in_flight,
                weights_bytes=static.weights,
                gradients_bytes=static.gradients,
                optimizer_bytes=static.optimizer,
                activations_bytes=most.bytes - most.rows,
                buffers_bytes=most.rows + micro.boundaries + static.travelling + ALLOWANCE,
                kept=dict(kept),
            )
        )
    memory = round(config.cluster.memory_gb * 1e9)
    return Estimate(config=config, world_size=layout.world_size, ranks=tuple(ranks), memory=memory)


def with_ep(config: RunConfig, ep: int) -> RunConfig:
    """The same ranks with the experts spread differently."""
    dp = validate(config).dp
    layout = config.layout
    placement = layout.placement if ep == layout.ep else None  # which is for so many ranks
    return replace(config, layout=replace(layout, ep=ep, dp=dp, placement=placement))


def possible_ep(config: RunConfig) -> list[int]:
    """Every degree of expert parallelism that the ranks of a stage and the experts allow."""
    each = validate(config).stage_size // config.layout.etp
    return [ep for ep in divisors(each) if config.model.num_experts % ep == 0]


def remedies(config: RunConfig, imbalance: Imbalance, most: int = 3) -> list[tuple[str, Estimate]]:
    """The smallest changes, on as many ranks, with which the run fits: each is reckoned, and fits."""
    found: list[tuple[str, Estimate]] = []
    for words, changed in _changes(config):
        if len(found) < most and not any(set(said.split()) <= set(words.split()) for said, _ in found):
            tried = estimate(changed, imbalance(changed))
            found += [(words, tried)] if tried.fits else []
    return found


def _changes(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Changes with the words that make them, those of few settings first."""
    layout = validate(config)
    each = config.train.batch_size // layout.dp
    finest = max(each, config.layout.microbatches)  # one sequence at a time
    parts = list(dict.fromkeys((config.layout.microbatches, finest)))
    eps = [ep for ep in possible_ep(config) if ep >= layout.ep]
    options = product(eps, parts, dict.fromkeys((config.train.recompute, "full")))
    for ep, count, recompute in sorted(
        options,
        key=lambda option: (
            (option[0] != layout.ep) + (option[1] != parts[0]) + (option[2] != config.train.recompute)
        ),
    ):
        words = [
            *([f"layout.ep={ep}"] if ep != layout.ep else []),
            *([f"layout.microbatches={count}"] if count != parts[0] else []),
            *([f"train.recompute={recompute}"] if recompute != config.train.recompute else []),
        ]
        changed = with_ep(config, ep)
        changed = replace(
            changed,
            layout=replace(changed.layout, microbatches=count),
            train=replace(changed.train, recompute=recompute),
        )
        if words and _is_lawful(changed):
            yield " ".join(words), changed


def _is_lawful(config: RunConfig) -> bool:
    try:
        validate(config)
    except UserError:
        return False
    return True
