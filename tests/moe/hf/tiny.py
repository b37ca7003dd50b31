"""Tiny random models of transformers of every family: the oracle of moe/hf and moe/model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moe.hf import names
from moe.model.transformer import Transformer
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
_GROUPED = {
    **{key: _SHAPE[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    "intermediate_size": 24,
    "num_experts_per_tok": 3,
    "rms_norm_eps": 1e-5,
    "router_aux_loss_coef": 0.0,  # transformers leaves it out of its loss, too
    "pad_token_id": None,  # transformers keeps the gradient of this row of OLMoE's embedding at 0
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2-lite": ("deepseek_v2", _SHAPE | _V2_LITE),
    "v2": ("deepseek_v2", _SHAPE | _V2),
    "v3": ("deepseek_v3", _SHAPE | _V3),
    # With an epsilon that is seen: the release keeps 1e-6 in the latents' norms.
    "v3-plain": ("deepseek_v3", {**_SHAPE, **_V3, "rope_parameters": PLAIN, "rms_norm_eps": 1e-2}),
    "moonlight": (
        "deepseek_v3",
        {
            **_SHAPE,
            **_V3,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "routed_scaling_factor": 2.446,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        },
    ),
    "mixtral": ("mixtral", {**_GROUPED, "num_key_value_heads": 2, "num_local_experts": 8}),
    "qwen3-moe": (
        "qwen3_moe",
        {
            **_GROUPED,
            "num_key_value_heads": 1,
            "head_dim": 24,
            "moe_intermediate_size": 16,
            "num_experts": 16,
            "norm_topk_prob": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "olmoe": ("olmoe", {**_GROUPED, "num_key_value_heads": 2, "num_experts": 8, "norm_topk_prob": False}),
}


def oracle(kind: str, **changes: Any) -> nn.Module:
    """A model of transformers with every weight, gain and bias random; eager throughout."""
    model_type, settings = KINDS[kind]
    config = CONFIG_MAPPING[model_type](**{**settings, **changes})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
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
    mixtral = model.config.model_type == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        name = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
        head, stack, which = name.rpartition(".experts.")
        if not stack:
            found[name] = grad
            continue
        for expert, part in enumerate(grad):
            pieces = part.chunk(2) if which == "gate_up_proj" else [part]
            labels = (gate, up) if which == "gate_up_proj" else (down,)
            for label, piece in zip(labels, pieces, strict=True):
                found[f"{head}.experts.{expert}.{label}.weight"] = piece
    return found


def our_gradients(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(released name, gradient) of our model, the fused rows taken apart."""
    for name, parameter in model.named_parameters():
        for full_name, grad in canonical(name, parameter, parameter.grad):
            parts = names.to_hf(full_name, model.config)
            yield from zip(parts, grad.chunk(len(parts)), strict=True)


def worst_gradient(model: Transformer, reference: nn.Module) -> tuple[float, str]:
    """The largest relative difference of a gradient, and which it is."""
    theirs = released_gradients(reference)
    ours = dict(our_gradients(model))
    assert ours.keys() == theirs.keys()
    return max((relative_error(grad, theirs[name]), name) for name, grad in ours.items())


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
