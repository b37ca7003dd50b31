"""Which products of a model are FP8's, and who makes them on this device.

All linear layers of the blocks and of the MTP modules, experts included, except what DeepSeek-V3 keeps high
(2412.19437, section 3.3): routers, and, which are no such layers, embedding, head and norms. Adapters stay
high too: they are small, and all that LoRA trains. Whoever reads a model's weights outside training
(evaluate, generate, convert) finds bf16 and computes in it.
"""

import logging

import torch
from torch import nn

from moe.config import TrainConfig
from moe.model.layer import MoELayer
from moe.model.router import Router
from parallel import transformer_engine
from parallel.fp8 import Backend, Emulated, Packed, Products
from parallel.linear import GroupedLinear, Linear
from parallel.lora import Lora

BLOCK_SCALING = (9, 0)  # the least compute capability that has it: 8.9 multiplies FP8, but with one scale

logger = logging.getLogger(__name__)


def take_up(model: nn.Module, config: TrainConfig, device: torch.device) -> bool:
    """Let a model's products be made in the precision of a training; whether they are FP8's then.

    UserError where the device could, but who makes them is not installed.
    """
    if config.precision != "fp8":
        return False
    backend = backend_of(device)
    if backend is None:
        major, minor = torch.cuda.get_device_capability(device)
        logger.warning(
            "`train.precision` is fp8, but this GPU (compute capability %d.%d) has no units for FP8 in "
            "blocks, as 9.0 has: products are made in bf16",
            *(major, minor),
        )
        return False
    how = ", emulated: exact, and slower than bf16" if isinstance(backend, Emulated) else ""
    products = Products(backend)
    chosen = fp8_layers(model)
    for layer in chosen:
        layer.fp8 = products
    for each in model.modules() if config.fp8.dispatch else ():
        if isinstance(each, MoELayer):
            each.packing = Packed()
    logger.warning(
        "%d linear layers compute in FP8%s; router, embedding, head, norms and adapters do not",
        *(len(chosen), how),
    )
    return True


def backend_of(device: torch.device) -> Backend | None:
    """Who makes products in FP8 on a device; None where it has no units for them.

    UserError, with what to install, where it has but Transformer Engine is not there.
    """
    if device.type != "cuda":
        return Emulated()
    if torch.cuda.get_device_capability(device) < BLOCK_SCALING:
        return None
    return transformer_engine.backend()


def fp8_layers(model: nn.Module) -> list[Linear | GroupedLinear]:
    """The layers whose products are FP8's."""
    high = {
        id(part) for each in model.modules() if isinstance(each, Router | Lora) for part in each.modules()
    }
    layers = (each for each in model.modules() if isinstance(each, Linear | GroupedLinear))
    return [layer for layer in layers if id(layer) not in high]
