"""FP8 products beside bf16 ones: speed, and error against fp64; by DeepSeek-V3's recipe (2412.19437, 3.3).

Rows are scaled in tiles of 1 x 128, weights in blocks of 128 x 128, so that the greatest value of each
becomes 448, the greatest of E4M3. Measured are torch's own scaled product, Transformer Engine's layer where
it is installed, what training makes products by, and a layer of experts as training in FP8 runs it. Needs
compute capability 9.0; on the CPU training emulates.
Legend: N rows, I inputs, O outputs.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.bench.gpu.ceilings import LARGEST, RATE
from launch.bench.gpu.exact import normal, relative
from launch.bench.gpu.layers import forward_and_backward, make
from launch.bench.gpu.parts import Bench, Missing, Row, last_line
from launch.bench.gpu.shapes import EXPERT_SHAPES, TINY_SHAPES, ExpertShape
from moe.train.precision import backend_of, fp8_layers
from parallel.errors import UserError
from parallel.fp8 import Backend, Products

BLOCK, GREATEST = 128, 448.0
SHAPES = {
    "V2-Lite, dense": (4096, 2048, 10944 * 2),
    "V3, gate and up": (8192, 7168, 4096),
    "8192": (8192,) * 3,
}
E4M3 = torch.float8_e4m3fn
ERROR = "error"
NEEDS = "FP8 products need a card of compute capability 9.0 or later"

Product = Callable[[Tensor, Tensor], Callable[[], Tensor]]  # from rows and weight to what is timed


def rows(bench: Bench) -> Iterator[Row]:
    """For each shape of a product all that make it; then layers of experts, forward and backward."""
    shapes = {"tiny": (32, 256, 128)} if bench.tiny else SHAPES
    for name, (num_rows, num_inputs, num_outputs) in shapes.items():
        left, right = normal(num_rows, num_inputs), normal(num_outputs, num_inputs, seed=1)
        held = [each.to(bench.device, torch.bfloat16) for each in (left, right)]
        some = slice(0, min(64, num_rows))  # of the rows: fp64 on the host takes long
        exact = held[0][some].double().cpu() @ held[1].double().cpu().T
        for kind, product in PRODUCTS.items():
            yield _row(bench, f"{name}, {kind}", product, held, exact)
    for each in TINY_SHAPES if bench.tiny else EXPERT_SHAPES:
        yield _layer(bench, each)


def _row(bench: Bench, name: str, product: Product, held: list[Tensor], exact: Tensor) -> Row:
    flops = 2 * held[0].numel() * len(held[1])
    try:
        work = product(*held)
        error = relative(work()[: len(exact)], exact)
        taken = bench.timer.seconds(work)
    except Missing as missing:
        return Row(name=name, note=f"skipped: {missing}")
    except Exception as error:  # a kernel may refuse a card or a shape; the others go on
        return Row(name=name, note=f"did not run: {last_line(error)}")
    rate, ceiling = 1e-12 * flops / taken, bench.value("ceilings", LARGEST, RATE)
    values = {RATE: rate, "/ largest bf16 product": rate / ceiling if ceiling else None, ERROR: error}
    return Row(name=name, values=values)


def _layer(bench: Bench, shape: ExpertShape) -> Row:
    """A layer of experts, all its products in FP8, in turn with the same layer in bf16."""
    name = f"{shape.name}, layer"
    try:
        products = Products(backend(bench.device))
        layer, plain = (make(shape, bench.device) for _ in range(2))
        for each in fp8_layers(layer):
            each.fp8 = products
        both = {"FP8": layer, "bf16": plain}
        works = {kind: forward_and_backward(each, shape.tokens, bench.device) for kind, each in both.items()}
        taken = {kind: sum(times) for kind, times in bench.timer.compare(works).items()}
    except Missing as missing:
        return Row(name=name, note=f"skipped: {missing}")
    except Exception as error:  # as above
        return Row(name=name, note=f"did not run: {last_line(error)}")
    rate = 3e-12 * shape.forward_flops / taken["FP8"]
    return Row(name=name, values={RATE: rate, "/ layer in bf16": taken["bf16"] / taken["FP8"]})


def backend(device: torch.device) -> Backend:
    """Who makes products in FP8 when training on this device."""
    try:
        found = backend_of(device)
    except UserError as error:
        raise Missing(str(error)) from error
    if found is None:
        raise Missing(NEEDS)
    return found


def ours(rows: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """The product as training makes it; quantising both is part of it."""
    makes = backend(rows.device)
    return lambda: makes.product(rows, (len(rows),), weight[None])


def bf16(rows: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """The product that FP8 replaces."""
    return lambda: rows @ weight.T


def quantised(values: Tensor, tall: int) -> tuple[Tensor, Tensor]:
    """[N, I] in E4M3, and the scales [N / tall, I / 128] in fp32 that undo it, of blocks of tall x 128."""
    blocks = (
        values.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, tall))
    )  # [N / tall, tall, I / 128, 128]
    greatest = blocks.abs().amax((1, 3), keepdim=True)
    scale = torch.where(greatest > 0, greatest / GREATEST, 1.0)
    small = (blocks / scale).clamp(-GREATEST, GREATEST).to(E4M3)
    return small.flatten(2).flatten(0, 1), scale[:, 0, :, 0]


def scaled(rows: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """torch's product of quantised values; quantising is not part of it."""
    product, kinds = getattr(F, "scaled_mm", None), getattr(F, "ScalingType", None)
    if product is None or kinds is None:
        raise Missing(f"torch {torch.__version__} has no block-scaled product")
    _needs_hopper(rows.device)
    small_rows, row_scales = quantised(rows, 1)
    small_weight, weight_scales = quantised(weight, BLOCK)
    padding = -weight_scales.shape[1] % 4  # cuBLAS wants columns of scales in fours
    arguments: dict[str, Any] = {
        "scale_a": row_scales.T.contiguous().T,  # rows of it lie next to each other
        "scale_recipe_a": kinds.BlockWise1x128,
        "scale_b": F.pad(weight_scales, (0, padding)).contiguous().T,
        "scale_recipe_b": kinds.BlockWise128x128,
        "output_dtype": torch.bfloat16,
    }
    return lambda: product(small_rows, small_weight.T, **arguments)


def engine(rows: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """Transformer Engine's linear layer under its block-scaling recipe; quantising the rows is part of it."""
    _needs_hopper(rows.device)
    try:
        te = importlib.import_module("transformer_engine.pytorch")
        recipe = importlib.import_module("transformer_engine.common.recipe").Float8BlockScaling()
    except (ImportError, OSError, AttributeError) as error:
        raise Missing(f"transformer_engine cannot be used ({last_line(error)})") from error
    layer = te.Linear(
        weight.shape[1], weight.shape[0], bias=False, params_dtype=weight.dtype, device=rows.device
    )
    with torch.no_grad():
        layer.weight.copy_(weight)

    def work() -> Tensor:
        with torch.no_grad(), te.fp8_autocast(enabled=True, fp8_recipe=recipe):
            out: Tensor = layer(rows)
        return out

    return work


def _needs_hopper(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        raise Missing(NEEDS)


PRODUCTS: dict[str, Product] = {
    "bf16": bf16,
    "FP8, torch": scaled,
    "FP8, Transformer Engine": engine,
    "FP8, Switchyard": ours,
}
