"""Tiny random DeepSeek models of transformers: the oracle that moe/hf and moe/model are compared with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from moe.hf import names
from tests.reduced import canonical

V2_LITE_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
V3_YARN = {**V2_LITE_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}

_SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 10,
    "max_position_embeddings": 163840,
}
_V2_LITE = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "q_lora_rank": None,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_parameters": V2_LITE_YARN,
}
_V2 = {
    **_V2_LITE,
    "n_routed_experts": 16,
    "q_lora_rank": 28,
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
    "routed_scaling_factor": 16.0,
}
_V3 = {
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "q_lora_rank": 28,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "rope_parameters": V3_YARN,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2-lite": ("v2", _V2_LITE),
    "v2": ("v2", _V2),
    "v3": ("v3", _V3),
    # With an epsilon that is seen: the release keeps 1e-6 in the latents' norms.
    "v3-plain": ("v3", {**_V3, "rope_parameters": PLAIN, "rms_norm_eps": 1e-2}),
}


def oracle(kind: str, **changes: Any) -> nn.Module:
    """A model of transformers with every weight, gain and bias random; eager throughout."""
    family, settings = KINDS[kind]
    config_class, model_class = {
        "v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
        "v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    }[family]
    config = config_class(**{**_SHAPE, **settings, **changes})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = model_class(config).eval()
    stream = torch.Generator().manual_seed(len(kind))
    with torch.no_grad():
        for tensor in model.parameters():
            noise = torch.randn(tensor.shape, generator=stream)
            tensor.copy_(1 + 0.2 * noise if tensor.dim() == 1 else noise * 1.5 * tensor.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # far below 0: score + bias is negative for most
                buffer.copy_(torch.randn(buffer.shape, generator=stream) * 0.3 - 0.8)
    return model


def saved(model: nn.Module, folder: Path, **options: Any) -> Path:
    """The folder that transformers writes."""
    model.save_pretrained(folder, **options)
    return folder


def token_ids(seed: int, rows: int = 2, length: int = 24) -> Tensor:
    """Random tokens [rows, length]."""
    return torch.randint(_SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def released_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of transformers' model under released names, experts one by one."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        head, stack, which = name.rpartition(".experts.")
        if not stack:
            found[name] = grad
            continue
        for expert, part in enumerate(grad):
            pieces = part.chunk(2) if which == "gate_up_proj" else [part]
            labels = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
            for label, piece in zip(labels, pieces, strict=True):
                found[f"{head}.experts.{expert}.{label}.weight"] = piece
    return found


def our_gradients(model: nn.Module, num_layers: int) -> Iterator[tuple[str, Tensor]]:
    """(released name, gradient) of our model, the fused rows taken apart."""
    for name, parameter in model.named_parameters():
        for full_name, grad in canonical(name, parameter, parameter.grad):
            parts = names.to_hf(full_name, num_layers)
            yield from zip(parts, grad.chunk(len(parts)), strict=True)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
