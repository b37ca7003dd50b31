"""One optimizer step: microbatches forward and backward, gradients reduced, weights and bias moved.

Losses are sums over tokens divided by the tokens of the *global* batch, so the result does not depend
on how sequences are shared out. Counts are assigned per (layer, microbatch) and summed here, once.
Legend: L layers of experts, E experts, P data-parallel ranks of one expert group.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.config import RunConfig
from moe.data.loader import Batch
from moe.model.balance import bias_rate
from moe.model.layer import LayerLoad
from moe.model.mtp import IGNORE, mtp_targets
from moe.model.transformer import Microbatch, Outcome, Transformer
from moe.train.optim import Optimizer, learning_rate
from parallel.collectives import all_reduce
from parallel.gradients import GradientBuffers, parameter_sets
from parallel.groups import Groups
from parallel.pipeline.overlap import forward_backward


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """One layer's global batch in exact integers."""

    counts: Tensor  # [E]: assignments of valid tokens
    rows: Tensor  # [source rank in the expert group, E]: rows sent
    domains: Tensor | None  # [domain, E], where asked for


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


class Trainer:
    """Model, gradient buffers and optimizer of this rank."""

    def __init__(self, model: Transformer, config: RunConfig, groups: Groups, num_domains: int) -> None:
        self.model, self.config, self.groups = model, config, groups
        self.buffers = GradientBuffers(parameter_sets(model.parameters(), groups))
        self.optimizer = Optimizer(model, config.optim)
        self._num_domains = num_domains

    def step(self, step: int, batches: Sequence[Batch], *, count_domains: bool) -> StepResult:
        """Train on this rank's microbatches of a step (0-based). Every rank must call."""
        begin, config = time.perf_counter(), self.config
        labels, tokens = self._count_labels(batches)
        microbatches = [self._microbatch(batch, labels, len(batches)) for batch in batches]
        self.buffers.zero()
        outcomes = list(
            forward_backward(
                self.model.phases,
                microbatches,
                overlap=config.layout.overlap,
                recompute=config.train.recompute == "full",
            )
        )
        self.buffers.reduce()
        norm = self.buffers.norm()
        if 0 < config.optim.clip_norm < norm:
            self.buffers.scale(config.optim.clip_norm / norm)
        rate = learning_rate(config.optim, step, config.train.steps)
        self.optimizer.step(rate)
        layers = self._count_load([o.loads for o in outcomes], batches if count_domains else None)
        for name, router in self.model.routers():
            router.update(layers[name].counts, bias_rate(config.balance, step, config.train.steps))
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
        )

    def _count_labels(self, batches: Sequence[Batch]) -> tuple[list[int], int]:
        """Labels of the global batch for the next token and for each MTP module, and its real tokens."""
        counts = [
            sum(int((mtp_targets(b.labels, self._documents(b), depth) != IGNORE).sum()) for b in batches)
            for depth in range(1 + len(self.model.mtp))
        ]
        counts.append(sum(int(batch.valid.sum()) for batch in batches))
        *labels, tokens = all_reduce(
            torch.tensor(counts, device=batches[0].tokens.device), self.groups.dp
        ).tolist()
        return labels, tokens

    def _microbatch(self, batch: Batch, labels: list[int], num_local: int) -> Microbatch:
        further = self.config.train.mtp_weight / max(1, len(self.model.mtp))
        weights = [1.0] + [further] * len(self.model.mtp)
        return Microbatch(
            tokens=batch.tokens,
            labels=batch.labels,
            valid=batch.valid,
            documents=self._documents(batch),
            loss_weights=tuple(weight / max(1, count) for weight, count in zip(weights, labels, strict=True)),
            auxiliary_share=1.0 / (num_local * self.groups.layout.dp),
        )

    def _documents(self, batch: Batch) -> Tensor | None:
        return batch.documents if self.config.data.mask_documents else None

    def _mean_losses(self, outcomes: Sequence[Outcome], labels: list[int]) -> list[float]:
        """Global means: next-token loss, mean MTP loss, auxiliary loss summed over layers."""
        auxiliary = [load.auxiliary_loss.double() for o in outcomes for load in o.loads.values()]
        zero = torch.zeros((), dtype=torch.float64, device=outcomes[0].losses.device)
        sums = [sum((o.losses.double().sum() for o in outcomes), zero)]
        for depth in range(len(self.model.mtp)):
            sums.append(sum((o.mtp_losses[depth].double().sum() for o in outcomes), zero))
        sums.append(sum(auxiliary, zero) / (len(outcomes) * self.groups.layout.dp))
        loss, *mtp, aux = all_reduce(torch.stack(sums), self.groups.dp).tolist()
        means = [value / max(1, count) for value, count in zip(mtp, labels[1:], strict=True)]
        return [loss / max(1, labels[0]), sum(means) / max(1, len(means)), aux]

    def _count_load(
        self, loads: Sequence[dict[str, LayerLoad]], batches: Sequence[Batch] | None
    ) -> dict[str, LayerCounts]:
        """Sum every layer's counts over microbatches and ranks, in one reduction of integers."""
        names = [name for name, _ in self.model.routers()]
        if not names:
            return {}
        num_experts, sources = self.model.config.num_experts, self.groups.layout.ep
        source = self.groups.rank % sources
        num_domains = self._num_domains if batches else 0
        table = torch.zeros(
            len(names),
            1 + sources + num_domains,
            num_experts,
            dtype=torch.int64,
            device=loads[0][names[0]].counts_E.device,
        )
        for index, name in enumerate(names):
            for microbatch, by_layer in enumerate(loads):
                load = by_layer[name]
                table[index, 0] += load.counts_E
                table[index, 1 + source] += load.rows_E
                if batches:
                    domains = batches[microbatch].domains
                    table[index, 1 + sources :] += count_by_domain(
                        load.experts_TK, domains, num_domains, num_experts
                    )
        all_reduce(table, self.groups.dp)
        return {
            name: LayerCounts(
                counts=table[index, 0],
                rows=table[index, 1 : 1 + sources],
                domains=table[index, 1 + sources :] if batches else None,
            )
            for index, name in enumerate(names)
        }


def count_by_domain(experts_TK: Tensor, domains: Tensor, num_domains: int, num_experts: int) -> Tensor:
    """Assignments by domain and expert, int64: chosen experts [T, K] (E on padding), domains [B, S]."""
    cell = domains.flatten()[:, None] * num_experts + experts_TK
    routed = cell[experts_TK < num_experts]
    return torch.bincount(routed, minlength=num_domains * num_experts).view(num_domains, num_experts)
