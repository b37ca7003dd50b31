"""A tiny Megatron-Core GPT, and what Megatron takes for granted of a GPU, stood in for on the CPU.

Only Megatron's own modules, optimizer and schedule need the stand-ins; our layer runs without them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from queue import Queue
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Tensors asked for on "cuda" are made on the CPU, and say that they are on a GPU, as optimizers want."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        if func is torch.Tensor.type and len(args) == 1:
            return func(*args, **kwargs).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


THREADS = SimpleNamespace(
    Process=Thread, Queue=Queue, JoinableQueue=Queue, Manager=lambda: SimpleNamespace(Queue=Queue)
)


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Megatron builds, trains and steps on the CPU inside; outside everything is as it was."""
    # Compiling its small fused functions would take longer than all tests.
    eager = torch.compiler.set_stance("force_eager")
    with pytest.MonkeyPatch.context() as patch, _CudaMeansCpu(), eager:
        patch.setattr(torch.cuda, "current_device", lambda: CPU)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        # Its random streams are states of the GPU's generator; here every draw takes the CPU's.
        patch.setattr(random.CudaRNGStatesTracker, "fork", lambda *_: nullcontext())
        patch.setattr(random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state())
        patch.setattr(random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state))
        # Its router asks for this function of an absent library, and does without when it is None.
        patch.setattr(moe_utils, "te_general_gemm", None, raising=False)
        # It writes checkpoints from forks of itself, which ranks of a test may not make, and measures them.
        patch.setattr(filesystem_async.mp, "get_context", lambda _: THREADS)
        patch.setattr(filesystem_async, "_process_memory", lambda: 0)
        patch.setattr(filesystem_async, "_results_queue", None)
        yield


def transformer_config(**changes: Any) -> TransformerConfig:
    """A tiny model of SwiGLU experts with softmax weights, as far as nothing is changed."""
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "ffn_hidden_size": 32,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 12,
        "moe_shared_expert_intermediate_size": 24,
        "moe_router_dtype": "fp32",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.3,
        "use_cpu_initialization": True,
    }
    return TransformerConfig(**(settings | changes))


class Norm(torch.nn.RMSNorm):
    """Megatron's local norm refuses the sequence parallelism that it demands of tensor-parallel experts."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[assignment]


def layer_spec() -> ModuleSpec:
    """A layer of the local spec, with a norm that tensor parallelism can use."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    return replace(spec, submodules=replace(spec.submodules, input_layernorm=Norm, pre_mlp_layernorm=Norm))


VOCABULARY, LENGTH = 64, 8


def gpt_model(config: TransformerConfig, layer: ModuleSpec) -> GPTModel:
    """A GPT of Megatron-Core whose layers are all made from a spec."""
    return GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=Norm),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def batches(number: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Microbatches of two sequences: tokens, positions, the causal mask (true: may not look), labels."""
    stream = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (number, 2, LENGTH + 1), generator=stream)
    positions = torch.arange(LENGTH).expand(2, LENGTH).contiguous()
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    return [(each[:, :-1].contiguous(), positions, mask, each[:, 1:].contiguous()) for each in tokens]
