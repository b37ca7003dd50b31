"""The layer of experts beside its own products: forward and backward in bf16, as it is trained.

Each shape and routing is measured in turn with two floors of the same floating-point work: bare products
expert by expert, and one product over all rows, which is what no routing can beat. Both leave out all but the
products; the layer routes, permutes, activates, combines, and adds weight gradients to fp32 buffers. On a
card these gradients are also measured by themselves, by our kernel and by torch's grouped product.
Legend: N rows, D hidden size, F expert width, e experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.bench.gpu.ceilings import RATE, SHARE, share_of_ceiling
from launch.bench.gpu.exact import with_buffers
from launch.bench.gpu.parts import Bench, Row
from launch.bench.gpu.shapes import (
    EXPERT_SHAPES,
    ROUTINGS,
    TINY_SHAPES,
    ExpertShape,
    balanced_counts,
    choices,
)
from launch.bench.gpu.timer import Lap, Work
from moe.model.layer import LayerLoad, MoELayer
from parallel.pipeline.tape import Tape, run

BF16 = torch.bfloat16


def rows(bench: Bench) -> Iterator[Row]:
    """One row for each shape and routing."""
    for shape in TINY_SHAPES if bench.tiny else EXPERT_SHAPES:
        layer = make(shape, bench.device)
        for routing in ROUTINGS:
            yield _row(bench, shape, layer, routing)
        if bench.device.type == "cuda":
            yield weight_gradients(bench, shape)


def fill(module: nn.Module, std: float) -> None:
    """Normal weights and gains of 1, drawn where the module is: on the host that takes long."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std) if parameter.dim() > 1 else parameter.fill_(1.0)


def make(shape: ExpertShape, device: torch.device) -> MoELayer:
    """A layer of that shape in bf16, with buffers for its gradients."""
    with torch.device(device):
        layer = MoELayer(shape.config, dtype=BF16, seed=None)
    fill(layer, shape.config.init_std)
    with_buffers(layer)
    return layer


def weight_gradients(bench: Bench, shape: ExpertShape) -> Row:
    """Gate and up's weight gradients added to an fp32 buffer, by one kernel and by two of torch, balanced."""
    from parallel.kernels.weight_gradient import add_weight_gradients  # needs Triton, as the layer on CUDA

    def made(*dims: int) -> Tensor:
        return torch.randn(dims, device=bench.device).to(BF16)

    grad, inputs = made(shape.rows, 2 * shape.width), made(shape.rows, shape.hidden)
    target = torch.zeros(shape.experts, 2 * shape.width, shape.hidden, device=bench.device)
    counts = torch.tensor((0, *balanced_counts(shape.rows, shape.experts)), device=bench.device)
    offsets = counts.cumsum(0).to(torch.int32)
    taken = bench.timer.compare(
        {
            "kernel": lambda lap: add_weight_gradients(target, grad, inputs, offsets),
            "torch": lambda lap: target.add_(F.grouped_mm(grad.mT, inputs, offs=offsets[1:])),
        }
    )
    (kernel,), (torchs,) = taken["kernel"], taken["torch"]
    rate = 2e-12 * target[0].numel() * shape.rows / kernel
    return Row(
        name=f"{shape.name}, weight gradients",
        values={
            "backward ms": 1e3 * kernel,
            RATE: rate,
            SHARE: share_of_ceiling(bench, rate),
            "/ grouped_mm and add_": kernel / torchs,
        },
        note="of gate and up, balanced",
    )


def forward_and_backward(layer: MoELayer, tokens: int, device: torch.device) -> Work:
    """Of so many tokens, as a pipeline steps them; returns the layer's load."""
    hidden = torch.randn(1, tokens, layer.config.hidden_size, device=device).to(BF16).requires_grad_()
    valid = torch.ones(1, tokens, dtype=torch.bool, device=device)
    grad = torch.randn_like(hidden, requires_grad=False)

    def work(lap: Lap) -> LayerLoad:
        tape, hidden.grad = Tape(), None
        output, load = run(layer.phases(tape, hidden, valid))
        lap()
        tape.root(output, grad)
        run(tape.backward())
        tape.weights()
        assert isinstance(load, LayerLoad)
        return load

    return work


def _row(bench: Bench, shape: ExpertShape, layer: MoELayer, routing: str) -> Row:
    config, tokens = shape.config, shape.tokens
    ours = forward_and_backward(layer, tokens, bench.device)
    chosen = choices(routing, tokens, config.top_k, config.num_experts).to(bench.device)
    pinned = patch.object(layer.router, "choose", lambda scores: chosen)
    with nullcontext() if routing == "as routed" else pinned:
        counts = ours(lambda: None).rows_E.tolist()
        loop = Products(shape, counts, bench.device)
        whole = Products(_one_expert(shape), [sum(counts) + _shared_rows(shape)], bench.device)
        taken = bench.timer.compare({"ours": ours, "loop": loop.work, "whole": whole.work})
    forward, backward = taken["ours"]
    floor, one = sum(taken["loop"]), sum(taken["whole"])
    rate = 3e-12 * shape.forward_flops / (forward + backward)
    return Row(
        name=f"{shape.name}, {routing}",
        values={
            "busiest expert / mean": max(counts) * len(counts) / sum(counts),
            "forward ms": 1e3 * forward,
            "backward ms": 1e3 * backward,
            RATE: rate,
            SHARE: share_of_ceiling(bench, rate),
            "/ expert by expert": (forward + backward) / floor,
            "/ one product": (forward + backward) / one,
        },
    )


def _shared_rows(shape: ExpertShape) -> int:
    return shape.tokens * shape.config.num_shared_experts


def _one_expert(shape: ExpertShape) -> ExpertShape:
    """The same shape with a single expert and none beside it."""
    return replace(shape, config=replace(shape.config, num_experts=1, num_shared_experts=0))


class Products:
    """The bare products of a layer, written into buffers that are there already: its floor."""

    def __init__(self, shape: ExpertShape, counts: Sequence[int], device: torch.device) -> None:
        hidden, width, shared = shape.hidden, shape.width, shape.config.num_shared_experts

        def made(*dims: int) -> Tensor:
            return torch.randn(dims, device=device, dtype=BF16)

        sections = [(count, width) for count in counts if count]
        if shared:
            sections.append((shape.tokens, shared * width))
        # rows, both weights, both outputs and gradients of all of these; the largest expert's serve for all
        most, widest = max(count for count, _ in sections), max(each for _, each in sections)
        self._rows, self._out = made(most, hidden), made(most, hidden)
        self._wide, self._narrow = made(most, 2 * widest), made(most, widest)
        self._gate_up = [made(2 * each, hidden) for _, each in sections]
        self._down = [made(hidden, each) for _, each in sections]
        self._gate_up_grad, self._down_grad = made(2 * widest, hidden), made(hidden, widest)
        self._sections = sections

    def work(self, lap: Lap) -> None:
        """Two products forward, four back, for every expert that has rows."""
        for (count, width), gate_up, down in zip(self._sections, self._gate_up, self._down, strict=True):
            rows, out, wide, narrow = self._views(count, width)
            torch.mm(rows, gate_up.T, out=wide)
            torch.mm(narrow, down.T, out=out)
        lap()
        for (count, width), gate_up, down in zip(self._sections, self._gate_up, self._down, strict=True):
            rows, out, wide, narrow = self._views(count, width)
            torch.mm(out, down, out=narrow)
            torch.mm(wide, gate_up, out=rows)
            torch.mm(out.T, narrow, out=self._down_grad.flatten()[: down.numel()].view_as(down))
            torch.mm(wide.T, rows, out=self._gate_up_grad[: 2 * width])

    def _views(self, count: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Parts of the buffers that lie as buffers of their own would."""
        wide = self._wide.flatten()[: 2 * count * width].view(count, 2 * width)
        narrow = self._narrow.flatten()[: count * width].view(count, width)
        return self._rows[:count], self._out[:count], wide, narrow
