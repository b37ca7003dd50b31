"""Megatron-Core's MoE layer with its sequential experts, as a contestant of `bench layer`.

Its dispatchers want process groups of one rank, which are made in this process. What it takes for granted
of a GPU is stood in for where there is none: a device, streams that nothing waits for, and the absent
Transformer Engine's product, which its router asks for by name. No arithmetic is touched.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock, patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from launch.bench.case import Case, Weights
from launch.bench.peers import Layer, Place

_GROUPS = ("tp", "cp", "ep", "pp", "dp", "expt_tp", "tp_ep", "tp_cp", "expt_dp", "dp_cp", "tp_dp_cp")


class MegatronLayer(Layer):
    """The same, but it takes [T, 1, D] and returns its bias beside the output."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, T, D] -> [1, T, D]."""
        output: Tensor = self._module(hidden.transpose(0, 1))[0]
        return output.transpose(0, 1)


@contextmanager
def world() -> Iterator[None]:
    """What its layers need around them while they are made and run."""
    began = not dist.is_initialized()
    if began:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with nullcontext() if torch.cuda.is_available() else _cpu_as_gpu():
            yield
    finally:
        if began:
            dist.destroy_process_group()


@contextmanager
def _cpu_as_gpu() -> Iterator[None]:
    with (
        patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        patch.object(torch.cuda, "Stream", MagicMock()),
        patch.object(torch.cuda, "current_stream", MagicMock()),
        patch.object(torch.cuda, "stream", lambda _: nullcontext()),
        patch.object(moe_utils, "te_general_gemm", None, create=True),
    ):
        yield


def megatron(case: Case, dispatcher: str) -> Layer:
    """Inside `world`, the layer with one of its dispatchers."""
    module = build_module(
        get_moe_module_spec(use_te=False, num_experts=case.shape.experts),
        config=_config(case, dispatcher),
        layer_number=1,
        pg_collection=ProcessGroupCollection(**dict.fromkeys(_GROUPS, dist.group.WORLD)),
    ).to(case.hidden.device, case.dtype)
    shared = module.shared_experts
    places: list[Place] = [
        (module.router.weight, lambda w: w.router),
        (shared.linear_fc1.weight, lambda w: w.shared_gate_up),
        (shared.linear_fc2.weight, lambda w: w.shared_down),
    ]
    for number, expert in enumerate(module.experts.local_experts):
        places += [(expert.linear_fc1.weight, _gate_up(number)), (expert.linear_fc2.weight, _down(number))]
    return MegatronLayer(f"Megatron-Core {dispatcher}", module, places, case)


def _gate_up(number: int) -> Callable[[Weights], Tensor]:
    return lambda weights: weights.gate_up[number]


def _down(number: int) -> Callable[[Weights], Tensor]:
    return lambda weights: weights.down[number]


def _config(case: Case, dispatcher: str) -> TransformerConfig:
    shape = case.shape
    return TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=1,
        ffn_hidden_size=shape.width,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.top_k,
        moe_ffn_hidden_size=shape.width,
        moe_shared_expert_intermediate_size=shape.shared * shape.width,
        moe_router_dtype="fp32",
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type=dispatcher,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        use_cpu_initialization=case.hidden.device.type == "cpu",
        perform_initialization=False,
        params_dtype=case.dtype,
        bf16=case.dtype == torch.bfloat16,
    )
