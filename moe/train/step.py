"""One optimizer step: microbatches forward and backward, gradients reduced, weights and bias moved.

Losses are sums over tokens divided by the tokens of the *global* batch, so the result does not depend
on how sequences are shared out. Counts are assigned per (layer, microbatch) and summed after the last one.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe.config import RunConfig
from moe.data.loader import Batch, Loader
from moe.data.shards import TokenShards
from moe.model.balance import bias_rate
from moe.model.mtp import IGNORE, mtp_targets
from moe.model.stages import split
from moe.model.transformer import Microbatch, Outcome, Transformer, expert_layers
from moe.train import compiling, precision, tuning
from moe.train.counting import LayerCounts, Sampling, add_up, routing_of
from moe.train.deepspeed import DeepSpeed
from moe.train.engine import Engine, Switchyard
from moe.train.guard import fp8_errors
from moe.train.optim import DTYPES, learning_rate
from moe.train.runner import make_schedule
from moe.train.start import Start, new
from parallel.collectives import all_reduce
from parallel.groups import Groups
from parallel.layout import length_multiple
from parallel.pipeline.timeline import Timeline

CPU = torch.device("cpu")
NOTHING_MORE = Sampling()
ENGINES: dict[str, type[Switchyard] | type[DeepSpeed]] = {"switchyard": Switchyard, "deepspeed": DeepSpeed}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step gave, the same on every rank. Losses are means over the global batch."""

    loss: float
    mtp_loss: float
    auxiliary_loss: float
    grad_norm: float
    learning_rate: float
    tokens: int  # real tokens read
    seconds: float
    layers: dict[str, LayerCounts]
    timeline: Timeline | None  # of this rank's pipeline, where asked for
    routing: dict[str, Tensor]  # this rank's, where asked for: see `routing_of`
    fp8_errors: dict[str, float] = field(default_factory=dict)  # by layer, where compared: see guard.py


class Trainer:
    """One rank's stages of the model, and the engine that runs and moves them."""

    def __init__(
        self,
        model: Transformer,
        config: RunConfig,
        groups: Groups,
        num_domains: int,
        device: torch.device = CPU,
    ) -> None:
        """The engine takes the model to the device."""
        self.model, self.config, self.groups = model, config, groups
        self._in_fp8 = precision.take_up(model, config.train, device)
        compiling.take_up(model, config.train, device)
        self.engine: Engine = ENGINES[config.optim.engine](model, config, groups, device)
        self._num_domains = num_domains

    def step(self, step: int, batches: Sequence[Batch], sampling: Sampling = NOTHING_MORE) -> StepResult:
        """Train on this rank's microbatches of a step (0-based). Every rank must call."""
        begin, config = time.perf_counter(), self.config
        labels, tokens = self._count_labels(batches)
        microbatches = [self._microbatch(batch, labels, len(batches)) for batch in batches]
        fp8_errors = self._compare_fp8(step, microbatches[:1])
        outcomes = self.engine.train(microbatches, timed=sampling.times)
        rate = learning_rate(config.optim, step, config.train.steps)
        norm = self.engine.update(rate)
        layers = self._settle_load(step, outcomes, batches, sampling)
        losses = self._mean_losses(outcomes, labels)
        return StepResult(
            loss=losses[0],
            mtp_loss=losses[1],
            auxiliary_loss=losses[2],
            grad_norm=norm,
            learning_rate=rate,
            tokens=tokens,
            seconds=time.perf_counter() - begin,
            layers=layers,
            timeline=self.engine.timeline() if sampling.times else None,
            routing=routing_of(outcomes, batches, self.groups) if sampling.routing else {},
            fp8_errors=fp8_errors,
        )

    def _compare_fp8(self, step: int, microbatches: Sequence[Microbatch]) -> dict[str, float]:
        every = self.config.train.fp8.guard_every
        if not self._in_fp8 or not every or (step + 1) % every:
            return {}
        return fp8_errors(self.model, lambda: self.engine.forward(microbatches), self.groups.world)

    def _count_labels(self, batches: Sequence[Batch]) -> tuple[list[int], int]:
        """Labels of the global batch for the next token and for each MTP module, and its real tokens."""
        counts = [
            sum(int((mtp_targets(b.labels, self._documents(b), depth) != IGNORE).sum()) for b in batches)
            for depth in range(1 + self.config.model.num_mtp_layers)
        ]
        counts.append(sum(int(batch.valid.sum()) for batch in batches))
        *labels, tokens = all_reduce(
            torch.tensor(counts, device=batches[0].tokens.device), self.groups.dp
        ).tolist()
        return labels, tokens

    def _microbatch(self, batch: Batch, labels: list[int], num_local: int) -> Microbatch:
        num_mtp = self.config.model.num_mtp_layers
        weights = [1.0] + [self.config.train.mtp_weight / max(1, num_mtp)] * num_mtp
        return Microbatch(
            tokens=batch.tokens,
            labels=batch.labels,
            valid=batch.valid,
            documents=self._documents(batch),
            loss_weights=tuple(weight / max(1, count) for weight, count in zip(weights, labels, strict=True)),
            auxiliary_share=1.0 / (num_local * self.groups.layout.dp),
        )

    def _documents(self, batch: Batch) -> Tensor | None:
        return batch.documents if self.config.data.separate_documents else None

    def _mean_losses(self, outcomes: Sequence[Outcome], labels: list[int]) -> list[float]:
        """Global means: next-token loss, mean MTP loss, auxiliary loss summed over layers."""
        num_sums = 2 + self.config.model.num_mtp_layers
        sums = torch.zeros(num_sums, dtype=torch.float64, device=self.engine.device)
        share = 1.0 / (len(outcomes) * self.groups.layout.dp)
        has_losses = self.groups.index("tp") == 0  # every rank of a TP group has the same
        for outcome in outcomes:
            for load in outcome.loads.values():
                sums[-1] += share * load.auxiliary_loss
            if outcome.losses is not None and has_losses:
                for place, losses in enumerate((outcome.losses, *outcome.mtp_losses)):
                    sums[place] += losses.double().sum()
        loss, *mtp, auxiliary = all_reduce(sums, self.groups.world).tolist()
        means = [value / max(1, count) for value, count in zip(mtp, labels[1:], strict=True)]
        return [loss / max(1, labels[0]), sum(means) / max(1, len(means)), auxiliary]

    def _settle_load(
        self, step: int, outcomes: Sequence[Outcome], batches: Sequence[Batch], sampling: Sampling
    ) -> dict[str, LayerCounts]:
        """Sum every layer's counts, move the biases by them, and gather what all ranks are to know."""
        model = self.config.model
        names = expert_layers(model)
        if not names:
            return {}
        totals = add_up(outcomes, batches, self.config, self.groups, self._num_domains, sampling)
        rate = bias_rate(self.config.balance, step, self.config.train.steps)
        biases = torch.zeros(len(names), model.num_experts, device=totals.counts.device)
        for name, router in self.model.routers():
            index = names.index(name)
            router.update(totals.counts[index], rate)
            if self.groups.is_first_copy:
                biases[index] = router.bias
        all_reduce(biases, self.groups.pp)  # one rank speaks for each layer: what is added is 0
        totals, biases = totals.on_host(), biases.cpu()
        return {
            name: totals.layer(index, biases[index], model.top_k, times=sampling.times)
            for index, name in enumerate(names)
        }


def make_model(config: RunConfig, groups: Groups, start: Start | None = None) -> Transformer:
    """This rank's stages with fresh weights, the same under every layout, or with those of `train.init`.

    What is not trained is frozen.
    """
    start = start or new(config.train)
    model = build_model(config, groups, config.train.seed if start is None else None)
    if start is not None:
        start.fill(model, config.train.seed)
    tuning.prepare(model, config, start.saved if start else ())
    return model


def build_model(config: RunConfig, groups: Groups, seed: int | None) -> Transformer:
    """This rank's stages; with `seed` None their weights are uninitialised."""
    schedule = make_schedule(config.layout, config.layout.microbatches)
    stages = split(config.model, schedule.num_stages, config.data.sequence_length)
    parts = [stages[stage] for stage in sorted(schedule.stages[groups.index("pp")])]
    dtype = DTYPES[config.train.dtype]
    placements = tuning.placements(config, groups.layout.ep)
    return Transformer(config.model, config.balance, groups, dtype, seed, parts, placements)


def make_trainer(
    config: RunConfig, groups: Groups, num_domains: int, device: torch.device, start: Start | None = None
) -> Trainer:
    """This rank's stages, and what trains them."""
    return Trainer(make_model(config, groups, start), config, groups, num_domains, device)


def make_reader(config: RunConfig, groups: Groups, device: torch.device) -> Switchyard:
    """This rank's stages to be run forward alone: nothing has a gradient or moments."""
    return Switchyard(make_model(config, groups).requires_grad_(False), config, groups, device)


def open_loader(shards: TokenShards, config: RunConfig) -> Loader:
    """The sequences of a split as a run reads them."""
    return Loader(
        shards,
        sequence_length=config.data.sequence_length,
        seed=config.train.seed,
        mask_documents=config.data.separate_documents,
        packing=config.data.packing,
        batch_size=config.train.batch_size,
        length_multiple=length_multiple(config.layout.cp, config.layout.tp),
    )


def read_batches(loader: Loader, config: RunConfig, groups: Groups, first: int) -> list[Batch]:
    """This rank's microbatches of the global batch that begins at sequence `first`, on the CPU."""
    parts, size = config.layout.microbatches, local_batch_size(config, groups)
    first += groups.index("dp") * parts * size
    return [loader.batch(first + index * size, size) for index in range(parts)]


def local_batch_size(config: RunConfig, groups: Groups) -> int:
    """Sequences of one microbatch of a rank."""
    return config.train.batch_size // groups.layout.dp // config.layout.microbatches
