"""Writing down what a step gave: rows of `metrics.jsonl` and `expert_load.jsonl` (rank 0)."""

import resource
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch

from moe.config import Component, RunConfig
from moe.model.costs import train_flops_per_token
from moe.telemetry.load import LoadWindow, dead, entropy, max_vio
from moe.telemetry.rows import JsonLines, read_rows, trim_after
from moe.train.evaluate import perplexity
from moe.train.step import LayerCounts, StepResult

METRICS, EXPERT_LOAD = "metrics.jsonl", "expert_load.jsonl"


class Recorder:
    """The two files of a run; rows after `step`, left by an attempt that was killed, are removed first."""

    def __init__(
        self, run: Path, config: RunConfig, domains: tuple[str, ...], step: int, world_size: int
    ) -> None:
        for name in (METRICS, EXPERT_LOAD):
            trim_after(run / name, step)
        self._config, self._domains, self._world_size = config, domains, world_size
        self._window = LoadWindow(config.telemetry.window)
        self._window.replay(
            r for r in read_rows(run / EXPERT_LOAD) if r["step"] > step - config.telemetry.window
        )
        self._metrics, self._loads = JsonLines(run / METRICS), JsonLines(run / EXPERT_LOAD)

    def step(self, step: int, tokens: int, result: StepResult) -> float:
        """Write the rows of a step (1-based); `tokens` read so far. Returns MaxVio, the mean over layers."""
        loads = [self._load(step, name, layer) for name, layer in result.layers.items()]
        mean_max_vio = fmean([row["max_vio"] for row in loads]) if loads else 0.0
        self._metrics.write(
            {
                "step": step,
                "tokens": tokens,
                "loss": result.loss,
                "mtp_loss": result.mtp_loss,
                "lr": result.learning_rate,
                "grad_norm": result.grad_norm,
                "tokens_per_second": result.tokens / result.seconds,
                "step_seconds": result.seconds,
                "mfu": self._mfu(result.tokens / result.seconds),
                "max_vio": mean_max_vio,
                "aux_loss": result.auxiliary_loss,
                "memory_peak_bytes": _memory_peak(),
            }
        )
        for row in loads:
            self._loads.write(row)
        return mean_max_vio

    def _load(self, step: int, name: str, layer: LayerCounts) -> dict[str, Any]:
        counts, model = layer.counts.tolist(), self._config.model
        number = int(name) if name.isdigit() else name
        self._window.add(number, counts)
        ranks = len(layer.rows)
        row: dict[str, Any] = {
            "step": step,
            "layer": number,
            "counts": counts,
            "max_vio": max_vio(counts),
            "max_vio_window": self._window.max_vio(number),
            "entropy": entropy(counts),
            "dead": dead(counts),
            "dropped": sum(counts) - int(layer.rows.sum()),
            "gate": [total * model.top_k / max(1, sum(counts)) for total in layer.gates.tolist()],
            "bias": layer.bias.tolist(),
            "rank_rows": layer.rows.view(ranks, ranks, -1).sum(-1).tolist(),
            "row_bytes": model.hidden_size * (2 if self._config.train.precision == "bf16" else 4),
        }
        if layer.domains is not None:
            counted = zip(self._domains, layer.domains.tolist(), strict=True)
            row["domains"] = {domain: counts for domain, counts in counted if any(counts)}
        return row

    def _mfu(self, tokens_per_second: float) -> float | None:
        """The model's own work over what all ranks could do at their peak; None where that is not known.

        Frozen weights have no gradients; nor count those of adapters and chosen experts, which are few.
        """
        peak, length = self._config.cluster.peak_tflops, self._config.data.sequence_length
        if peak is None:
            return None
        tune = self._config.tune
        frozen = tune.frozen if tune.method == "full" else get_args(Component)
        flops = train_flops_per_token(self._config.model, length, frozen)
        return tokens_per_second * flops / (self._world_size * peak * 1e12)

    def evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Write the validation losses and perplexities after a step, by domain."""
        for domain, loss in losses.items():
            facts = {"eval_loss": loss, "perplexity": perplexity(loss), "domain": domain}
            self._metrics.write({"step": step, **facts})

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._loads.close()


def _memory_peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
