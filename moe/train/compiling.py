"""What torch's compiler makes of a model for training on the CPU: its activations, each as one loop.

On CUDA there are kernels for these. The compiler is imported only here: it takes as long as torch.
"""

import os
import shutil
import sys

import torch
from torch import nn

from moe.config import TrainConfig
from moe.model.experts import Experts
from moe.model.mlp import SwiGLU
from parallel.activation import Activation
from parallel.errors import UserError


def take_up(model: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Let a model's activations be compiled, if the settings say so. UserError where nothing compiles C++."""
    if not config.compile or device.type != "cpu":
        return
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # what torch looks for
    if shutil.which(name) is None:
        raise UserError(
            f"`train.compile` needs a compiler of C++, but there is no {name}: install it, for example with "
            "`apt install g++`, name another in the environment variable CXX, or set `train.compile=false`"
        )
    compiled = Activation(compiled=True)
    for each in model.modules():
        if isinstance(each, Experts | SwiGLU):
            each.activation = compiled
