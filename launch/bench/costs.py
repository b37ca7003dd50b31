"""What `bench model` names as lost: to telemetry, to checkpoints, and to skewed routing.

Our trainer runs steps of each kind in turn. Telemetry writes all files of a run, with the samples that a
step may take weighed by how often it does. A save is written while the next step runs and is then waited
for, and counts once in `train.save_every` steps. Routing is forced in place of the gate's own choice, even or
skewed by Zipf's law; the gate goes on computing all it does.
"""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from launch.bench.case import FORCED, assignment
from launch.bench.timing import in_turn, now
from launch.bench.trainers import Ours
from moe.data.loader import Batch
from moe.model.router import Router
from moe.train import state
from moe.train.counting import Sampling
from moe.train.record import Recorder
from parallel.saving import Saver

PLAIN, WRITTEN, SAMPLED, SAVED = "as routed", "telemetry", "telemetry with samples", "checkpoint"


def measure(
    ours: Ours, domains: tuple[str, ...], batch_at: Callable[[int], Batch], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each kind of loss, in tokens per second."""
    times: dict[str, list[float]] = {kind: [] for kind in (PLAIN, WRITTEN, SAMPLED, SAVED, *FORCED)}
    config, trainer = ours.trainer.config, ours.trainer
    with tempfile.TemporaryDirectory() as place:
        saver = Saver(Path(place) / "checkpoints", None, keep_last=1)
        recorder = Recorder(Path(place), config, domains, 0, 1)
        for step, (index, kind) in enumerate(in_turn(list(times), rounds)):
            batch = batch_at(step)
            sampling = Sampling(domains=True, pairs=True, times=True) if kind == SAMPLED else Sampling()
            with _routing(kind, ours, batch):
                begin = now(device)
                if kind == SAVED:
                    saver.save(step, state.owned(trainer), {})
                result = trainer.step(step, [batch], sampling)
                if kind in (WRITTEN, SAMPLED):
                    recorder.step(step + 1, 0, result)
                if kind == SAVED:
                    saver.wait()
                seconds = now(device) - begin
            if index > 0:
                times[kind].append(seconds)
        recorder.close()
    return rows_of(
        {kind: median(found) for kind, found in times.items()},
        result.tokens,
        save_every=config.train.save_every,
        sample_every=config.telemetry.domains_every,
    )


def rows_of(
    found: dict[str, float], tokens: int, *, save_every: int, sample_every: int
) -> list[dict[str, Any]]:
    """Seconds of a step of each kind, by how often its extra work is done, and what is lost by it."""
    plain, often = found[PLAIN], 1 / sample_every if sample_every else 0.0
    seconds = {
        "telemetry": found[WRITTEN] + often * (found[SAMPLED] - found[WRITTEN]),
        "checkpoint": plain + ((found[SAVED] - plain) / save_every if save_every else 0.0),
        **{f"routing {kind}": found[kind] for kind in FORCED},
    }
    return [
        {
            "cause": cause,
            "step_seconds": each,
            "tokens_per_second": tokens / each,
            "lost_tokens_per_second": tokens / plain - tokens / each,
            "lost_share": 1 - plain / each,
        }
        for cause, each in {"none": plain, **seconds}.items()
    ]


def _routing(kind: str, ours: Ours, batch: Batch) -> AbstractContextManager[Any]:
    """Around a step whose routers choose by a table instead of by their scores."""
    if kind not in FORCED:
        return nullcontext()
    model = ours.trainer.config.model
    stream = torch.Generator().manual_seed(0)
    table_TK = assignment(batch.tokens.numel(), model.num_experts, model.top_k, kind, stream)

    def choose(router: Router, choice_TE: Tensor) -> Tensor:
        return table_TK.to(choice_TE.device)

    return patch.object(Router, "choose", choose)
