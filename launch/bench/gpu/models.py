"""Training steps of a few layers of DeepSeek-V2-Lite, one sequence of 4,096 tokens, all of it on one card.

MFU sets the model's own work (moe/model/costs.py) against the largest product of this run, and against the
data sheet. Routing is the model's own, not forced. What telemetry costs is the difference between steps that
are taken in turn.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from launch.bench.gpu.card import card_name, peak_tflops
from launch.bench.gpu.ceilings import RATE, share_of_ceiling
from launch.bench.gpu.layers import fill
from launch.bench.gpu.parts import Bench, Row, release
from launch.bench.gpu.shapes import TOKENS, V2_LITE
from launch.bench.gpu.timer import Lap
from moe.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from moe.data.loader import Batch
from moe.model import router
from moe.model.costs import train_flops_per_token
from moe.model.router import Signals
from moe.model.transformer import Microbatch, Transformer
from moe.train.counting import Sampling
from moe.train.step import Trainer
from parallel.groups import single
from parallel.pipeline.tape import Tape, moment, run, seconds

NUM_LAYERS = 4  # the first of them dense; with more, weights, masters and moments would not fit into 80 GB
STEP = "step"
TINY = ModelConfig(
    vocab_size=256, hidden_size=32, num_layers=2, intermediate_size=64, moe_intermediate_size=16
)
EVERYTHING = Sampling(domains=True, pairs=True, times=True)

# The first that fits a kernel's name says what it is for. Those that begin with _ are of parallel/kernels.
FAMILIES = (
    ("attention", r"flash|fmha|attention|sdpa|cudnn_generated"),
    ("products", r"gemm|nvjet|cutlass|cublas|splitk|wgmma|grouped_mm|^_add$"),
    ("optimizer", r"adam|foreach|multi_tensor"),
    ("sorting and counting", r"sort|topk|bincount|scan|histogram|^_choose$"),
    ("moving rows", r"index|permute|gather|scatter|copy|cat|memcpy|memset|embedding"),
    ("softmax, norms, sums", r"softmax|norm|reduce|nll"),
    ("elementwise", r"elementwise|triton|silu|mul|add|fill|^_(forward|backward)$"),
)


def rows(bench: Bench) -> Iterator[Row]:
    """Steps without and with recomputation; of the former its phases, its kernels, telemetry's cost."""
    for recompute in ("none", "full"):
        trainer = _make(bench, recompute)
        yield _step_row(bench, trainer, STEP if recompute == "none" else "step with recomputation")
        if recompute == "none":
            yield from _parts(bench, trainer)
            yield from _phases(bench, trainer)
            yield from _kernels(bench, trainer)
            yield from _telemetry(bench, trainer)
        del trainer
        release(bench.device)  # the next one would not fit beside it


def _make(bench: Bench, recompute: str) -> Trainer:
    model = TINY if bench.tiny else replace(V2_LITE, num_layers=NUM_LAYERS)
    config = RunConfig(
        model=model,
        data=DataConfig(sequence_length=32 if bench.tiny else TOKENS),
        train=TrainConfig(
            batch_size=1, precision="bf16", recompute="full" if recompute == "full" else "none"
        ),
        optim=OptimConfig(lr=1e-4),
    )
    with torch.device(bench.device):
        module = Transformer(model, config.balance, dtype=torch.bfloat16, seed=None)
    fill(module, model.init_std)
    return Trainer(module, config, single(), 1, bench.device)


def _batch(bench: Bench, trainer: Trainer) -> Batch:
    config = trainer.config
    shape = 1, config.data.sequence_length
    text = torch.randint(config.model.vocab_size, (1, shape[1] + 1), device=bench.device)
    return Batch(
        tokens=text[:, :-1],
        labels=text[:, 1:],
        valid=torch.ones(shape, dtype=torch.bool, device=bench.device),
        documents=torch.zeros(shape, dtype=torch.int32, device=bench.device),
        domains=torch.zeros(shape, dtype=torch.int64, device=bench.device),
    )


def _microbatch(bench: Bench, trainer: Trainer) -> Microbatch:
    batch = _batch(bench, trainer)
    weights = (1 / batch.tokens.numel(),)
    return Microbatch(tokens=batch.tokens, labels=batch.labels, valid=batch.valid, loss_weights=weights)


def _step_row(bench: Bench, trainer: Trainer, name: str) -> Row:
    batch, is_card = _batch(bench, trainer), bench.device.type == "cuda"
    if is_card:
        torch.cuda.reset_peak_memory_stats(bench.device)
    taken = bench.timer.seconds(lambda: trainer.step(0, [batch]))
    tokens = batch.tokens.numel()
    rate = 1e-12 * train_flops_per_token(trainer.config.model, tokens) * tokens / taken
    sheet = peak_tflops(card_name(bench.device))
    return Row(
        name=name,
        values={
            "ms": 1e3 * taken,
            "tokens/s": tokens / taken,
            RATE: rate,
            "MFU, of ceiling": share_of_ceiling(bench, rate),
            "MFU, of data sheet": rate / sheet if sheet else None,
            "peak memory GB": torch.cuda.max_memory_allocated(bench.device) / 1e9 if is_card else None,
        },
        note=f"{trainer.config.model.num_layers} layers of the model; random tokens, routing as it comes",
    )


def _parts(bench: Bench, trainer: Trainer) -> Iterator[Row]:
    """Forward and backward, and the rest of a step."""
    batch, engine = _microbatch(bench, trainer), trainer.engine

    def step(lap: Lap) -> None:
        engine.train([batch])
        lap()
        engine.update(1e-4)

    train, update = bench.timer.compare({STEP: step})[STEP]
    for name, part in (("forward and backward", train), ("clipping and AdamW", update)):
        yield Row(name=name, values={"ms": 1e3 * part, "share": part / (train + update)})


class _PhaseTape(Tape):
    """Takes down when each phase of the forward begins and ends."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.spans: list[tuple[str, Any, Any]] = []

    def compute(self, function: Callable[..., Any], *inputs: Any) -> Any:
        begin = moment(self._device)
        returned = super().compute(function, *inputs)
        name = getattr(function, "__qualname__", type(function).__name__)
        name = name.removeprefix("_VariableFunctionsClass.")  # of torch.add
        self.spans.append((name, begin, moment(self._device)))
        return returned


def _phases(bench: Bench, trainer: Trainer) -> Iterator[Row]:
    """The forward by phase, each summed over the layers; the rest is what lies between phases."""
    batch = _microbatch(bench, trainer)
    for _ in range(2):  # the first one warms up
        tape, begin = _PhaseTape(bench.device), moment(bench.device)
        run(trainer.model.phases(tape, batch))
        whole = seconds(begin, moment(bench.device))
    sums: dict[str, float] = defaultdict(float)
    for name, begin, end in tape.spans:
        sums[name] += seconds(begin, end)
    sums["between phases"] = whole - sum(sums.values())
    for name, part in sums.items():
        yield Row(name=f"forward: {name}", values={"ms": 1e3 * part, "share": part / whole})


def family(kernel: str) -> str:
    """What a CUDA kernel is for, by its name."""
    fits = (name for name, pattern in FAMILIES if re.search(pattern, kernel.lower()))
    return next(fits, "other")


def _kernels(bench: Bench, trainer: Trainer) -> Iterator[Row]:
    """Which kernels a step's time goes to, and how much of it the card waits for the host."""
    if bench.device.type != "cuda":
        yield Row(name="kernels", note="skipped: they are the card's")
        return
    batch = _batch(bench, trainer)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        trainer.step(0, [batch])
        torch.cuda.synchronize(bench.device)
    sums: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        if event.self_device_time_total > 0:
            sums[family(event.key)] += event.self_device_time_total
    if not sums:
        yield Row(name="kernels", note="skipped: the profiler is not told of any")
        return
    busy, step = 1e-6 * sum(sums.values()), bench.value("model", STEP, "ms")
    for name, part in sorted(sums.items(), key=lambda pair: -pair[1]):
        yield Row(name=f"kernels: {name}", values={"ms": 1e-3 * part, "share": 1e-6 * part / busy})
    if step:
        idle = max(0.0, step - 1e3 * busy)
        yield Row(
            name="kernels: none runs", values={"ms": idle, "share": idle / step}, note="share of the step"
        )


def _telemetry(bench: Bench, trainer: Trainer) -> Iterator[Row]:
    """Steps with every sample, as they are, and without the router's signals, in turn."""
    batch = _batch(bench, trainer)

    def without_signals(lap: Lap) -> None:
        with patch.object(router, "_observe", _no_signals):
            trainer.step(0, [batch])

    taken = bench.timer.compare(
        {
            "sampled": lambda lap: trainer.step(0, [batch], EVERYTHING),
            "plain": lambda lap: trainer.step(0, [batch]),
            "unseen": without_signals,
        }
    )
    (sampled,), (plain,), (unseen,) = taken["sampled"], taken["plain"], taken["unseen"]
    often = 1 / trainer.config.telemetry.domains_every
    for name, part in (
        ("telemetry: router signals", plain - unseen),
        ("telemetry: samples, as often as they are taken", often * (sampled - plain)),
    ):
        yield Row(name=name, values={"ms": 1e3 * part, "share": part / plain})


def _no_signals(config: ModelConfig, logits_TE: Tensor, *rest: Tensor) -> Signals:
    return Signals(logits_TE.new_zeros(4, dtype=torch.float64), logits_TE.new_zeros(()))
