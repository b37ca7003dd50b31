"""Writing down what a step gave (rank 0), telling the sinks, and raising alarms: the files of a run."""

import json
import resource
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import numpy as np
import torch

from moe.config import Component, LayoutConfig, RunConfig
from moe.model.costs import train_flops_per_token
from moe.model.transformer import expert_layers
from moe.telemetry.alarms import Alarm, Watch
from moe.telemetry.archive import EXPERT_LOAD, Archive
from moe.telemetry.load import Layer, LoadWindow, collapsing, dead, entropy, max_vio
from moe.telemetry.rows import JsonLines, finite, read_rows, replace_file, trim_after
from moe.telemetry.sinks.outlet import open_outlets
from moe.train.counting import LayerCounts
from moe.train.evaluate import perplexity
from moe.train.step import StepResult
from moe.train.tuning import placements
from parallel.fp8 import BLOCK
from parallel.pipeline.timeline import Timeline

METRICS, ALARMS, TIMELINE, FP8 = "metrics.jsonl", "alarms.jsonl", "timeline.json", "fp8.jsonl"
ROUTING = "routing"  # a folder of the run


class Recorder:
    """A run's files, alarms and sinks; rows after `step`, left by an attempt that was killed, go first."""

    def __init__(
        self, run: Path, config: RunConfig, domains: tuple[str, ...], step: int, world_size: int
    ) -> None:
        self._run, self._config, self._domains, self._world_size = run, config, domains, world_size
        telemetry = config.telemetry
        for name in (METRICS, ALARMS, FP8):
            trim_after(run / name, step)
        self._loads = Archive(run, telemetry.full_steps, telemetry.thin_steps, step)
        self._window = LoadWindow(telemetry.window)
        self._watch = Watch(asdict(telemetry.alarms), telemetry.window, _ranks_of_experts(config))
        self._watch.replay(read_rows(run / METRICS), self._replayed(step), read_rows(run / FP8))
        self._forget_after(step)
        self._metrics, self._alarms = JsonLines(run / METRICS), JsonLines(run / ALARMS)
        self._fp8 = JsonLines(run / FP8) if config.train.precision == "fp8" else None
        self._outlets = open_outlets(
            telemetry.sinks,
            run,
            project=telemetry.project,
            host=telemetry.host,
            port=telemetry.port,
            config=asdict(config),
        )

    def _replayed(self, step: int) -> Iterator[dict[str, Any]]:
        """The rows of expert load that are kept, which can be many: the window takes its own as they pass."""
        for row in read_rows(self._run / EXPERT_LOAD):
            if row["step"] > step - self._config.telemetry.window:
                self._window.add(row["layer"], row["counts"])
            yield row

    def _forget_after(self, step: int) -> None:
        """Remove what a killed attempt wrote of later steps beside its rows."""
        for folder in (self._run / ROUTING).glob("step-*"):
            if int(folder.name.removeprefix("step-")) > step:
                shutil.rmtree(folder)
        timeline = self._run / TIMELINE
        if timeline.exists() and json.loads(timeline.read_text(encoding="utf-8"))["step"] > step:
            timeline.unlink()

    def step(self, step: int, tokens: int, result: StepResult) -> tuple[float, list[Alarm]]:
        """Write the rows of a step (1-based); `tokens` read so far.

        Returns MaxVio, the mean over layers, and the alarms that begin.
        """
        loads = [self._load(step, name, layer) for name, layer in result.layers.items()]
        mean_max_vio = fmean([row["max_vio"] for row in loads]) if loads else 0.0
        metrics = {
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
        errors = [
            {"step": step, "layer": _number(name), "error": error}
            for name, error in result.fp8_errors.items()
        ]
        if self._fp8 and errors:
            metrics["fp8_error"] = max(result.fp8_errors.values())
            self._fp8.write(*errors)
        alarms = self._watch.step(metrics, loads, [finite(row) for row in errors])
        self._alarms.write(*(alarm.row() for alarm in alarms))  # before the step that readers wait for
        self._metrics.write(metrics)
        self._loads.write(loads)
        self._outlets.step(metrics, loads)
        for alarm in alarms:
            self._outlets.alarm(alarm.row())
        if result.timeline is not None:
            content = json.dumps(_spans(step, self._config.layout, result.timeline))
            replace_file(self._run / TIMELINE, content.encode())
        return mean_max_vio, alarms

    def _load(self, step: int, name: str, layer: LayerCounts) -> dict[str, Any]:
        counts, model = layer.counts.tolist(), self._config.model
        number = _number(name)
        self._window.add(number, counts)
        window = self._window.counts(number)
        row: dict[str, Any] = {
            "step": step,
            "layer": number,
            "counts": counts,
            "max_vio": max_vio(counts),
            "max_vio_window": max_vio(window),
            "max_vio_microbatch": layer.max_vio_microbatch[0],
            "max_vio_microbatch_max": layer.max_vio_microbatch[1],
            "entropy": entropy(counts),
            "dead": dead(counts),
            "collapsing": collapsing(window),
            "dropped": sum(counts) - int(layer.rank_rows.sum()),
            "gate": _short(layer.gates * (model.top_k / max(1, sum(counts)))),
            "bias": _short(layer.bias),
            "logit_rms": layer.logit_rms,
            "logit_max": layer.logit_max,
            "margin": layer.margin,
            "group_limited": layer.group_limited,
            "rank_rows": layer.rank_rows.tolist(),
            "row_bytes": _row_bytes(self._config),
            "links": layer.links.tolist(),
        }
        if layer.domains is not None:
            counted = zip(self._domains, layer.domains.tolist(), strict=True)
            row["domains"] = {domain: counts for domain, counts in counted if any(counts)}
        if layer.pairs is not None:
            row["pairs"] = layer.pairs.tolist()
        if layer.expert_seconds is not None:
            row["expert_seconds"] = _short(layer.expert_seconds)
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
            row = {"step": step, **facts}
            self._metrics.write(row)
            self._outlets.evaluation(row)

    def close(self) -> None:
        """Close the files, and the sinks once they have sent what waits."""
        self._metrics.close()
        self._alarms.close()
        self._loads.close()
        if self._fp8:
            self._fp8.close()
        self._outlets.close()


def _ranks_of_experts(config: RunConfig) -> dict[Layer, list[int]]:
    """Which expert-parallel rank holds each expert [E], by layer."""
    ep, num_experts = config.layout.ep, config.model.num_experts
    placed, each = placements(config, ep), num_experts // ep
    in_order = [expert // each for expert in range(num_experts)]
    return {
        _number(name): [seat // each for seat in placed[name].seats] if name in placed else in_order
        for name in expert_layers(config.model)
    }


def _row_bytes(config: RunConfig) -> int:
    """Bytes of a row on its way to an expert."""
    width, train = config.model.hidden_size, config.train
    if train.fp8.dispatch:
        return width + 4 * -(-width // BLOCK)  # a factor for each block
    return width * (4 if train.dtype == "fp32" else 2)


def _number(layer: str) -> Layer:
    return int(layer) if layer.isdigit() else layer


def _spans(step: int, layout: LayoutConfig, timeline: Timeline) -> dict[str, Any]:
    spans = [
        [rank, word, span.begin - timeline.begin, span.end - timeline.begin]
        for rank, mine in enumerate(timeline.spans)
        for word, span in zip(timeline.schedule.words(rank), mine, strict=True)
    ]
    return {
        "step": step,
        "schedule": layout.schedule,
        "microbatches": timeline.schedule.num_microbatches,
        "ranks": len(timeline.spans),
        "spans": spans,
    }


def _short(values: torch.Tensor) -> list[float]:
    """With eight decimals: more would only be the noise of fp32, and half of a row."""
    return np.round(values.double().cpu().numpy(), 8).tolist()


def _memory_peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
