"""The families whose files we read and write: which words their `config.json` has for what. No torch.

A setting of ours is a key of theirs, or always the same in a family, and a key of theirs that is nothing
of ours has but one value that we can compute. `moe/hf/config.py` translates by these tables, and
`moe/hf/names.py` names the tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moe.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the files of one `model_type` say."""

    name: str  # its `model_type`
    architecture: str
    fields: Mapping[str, str]  # ours: theirs
    optional: Mapping[str, str]  # absent from some files; there our default is theirs
    always: Mapping[str, Any]  # ours: the only value that these files can mean
    fixed: Mapping[str, Any]  # theirs: the only value that we have
    pairs: Literal["interleaved", "halves"]
    coefficient: str  # theirs: of the auxiliary loss
    coefficient_of: str  # ours
    trained_with: str
    renamed: Mapping[str, str] = field(default_factory=dict)  # another spelling of theirs: the released one


_SHARED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "top_k": "num_experts_per_tok",
    "num_heads": "num_attention_heads",
    "max_context": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
}
_OPTIONAL = {"tie_embeddings": "tie_word_embeddings", "init_std": "initializer_range"}
_FIXED = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}

_LATENT = {
    **_SHARED,
    "num_dense_layers": "first_k_dense_replace",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "normalize_top_k": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
_GROUPED = {**_SHARED, "num_kv_heads": "num_key_value_heads"}
_ONLY_EXPERTS = {  # softmax over routed experts in every layer, and nothing beside them
    "attention": "gqa",
    "score_function": "softmax",
    "num_dense_layers": 0,
    "num_mtp_layers": 0,
    "num_shared_experts": 0,
    "num_groups": 1,
    "top_groups": 1,
    "routed_scaling_factor": 1.0,
}


def _deepseek(version: str, score_function: str, group_score: str) -> Family:
    return Family(
        name=f"deepseek_{version.lower()}",
        architecture=f"Deepseek{version}ForCausalLM",
        fields=_LATENT,
        optional={"num_mtp_layers": "num_nextn_predict_layers", **_OPTIONAL},
        always={"attention": "mla", "score_function": score_function, "group_score": group_score},
        fixed={**_FIXED, "mlp_bias": False, "moe_layer_freq": 1, "rope_interleave": True},
        pairs="interleaved",
        coefficient="aux_loss_alpha",
        coefficient_of="sequence_aux",
        trained_with="V2 was trained with 0.001, V3 with 0.0001",
    )


def _grouped(
    name: str,
    architecture: str,
    fields: Mapping[str, str],
    always: Mapping[str, Any],
    fixed: Mapping[str, Any],
    coefficient: float,
    renamed: Mapping[str, str] | None = None,
) -> Family:
    return Family(
        name=name,
        architecture=architecture,
        fields={**_GROUPED, **fields},
        optional={"head_dim": "head_dim", **_OPTIONAL},
        always={**_ONLY_EXPERTS, **always},
        fixed={**_FIXED, **fixed},
        pairs="halves",
        coefficient="router_aux_loss_coef",
        coefficient_of="microbatch_aux",
        trained_with=f"the release has {coefficient}",
        renamed=renamed or {},
    )


_ALL = (
    _deepseek("V2", "softmax", "max"),
    _deepseek("V3", "sigmoid", "top2_sum"),
    _grouped(
        "mixtral",
        "MixtralForCausalLM",
        # Softmax over the chosen logits is softmax over all of them, normalised over the chosen.
        {
            "intermediate_size": "intermediate_size",
            "moe_intermediate_size": "intermediate_size",
            "num_experts": "num_local_experts",
        },
        {"qk_norm": "none", "normalize_top_k": True},
        {"sliding_window": None, "router_jitter_noise": 0.0},
        0.02,
    ),
    _grouped(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            "intermediate_size": "intermediate_size",
            "moe_intermediate_size": "moe_intermediate_size",
            "num_experts": "num_experts",
            "normalize_top_k": "norm_topk_prob",
        },
        {"qk_norm": "head"},
        {"use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        0.001,
        {"num_local_experts": "num_experts"},  # so since transformers 5
    ),
    _grouped(
        "olmoe",
        "OlmoeForCausalLM",
        {
            "intermediate_size": "intermediate_size",
            "moe_intermediate_size": "intermediate_size",
            "num_experts": "num_experts",
            "normalize_top_k": "norm_topk_prob",
        },
        {"qk_norm": "full"},
        {"sliding_window": None, "clip_qkv": None},
        0.01,
    ),
)
FAMILIES = {each.name: each for each in _ALL}
_BY_NORM = {"none": "mixtral", "head": "qwen3_moe", "full": "olmoe"}


def family(config: ModelConfig) -> str:
    """The `model_type` of the files that hold such a model; Moonlight's is deepseek_v3."""
    if config.attention == "gqa":
        return _BY_NORM[config.qk_norm]
    return "deepseek_v3" if config.score_function == "sigmoid" else "deepseek_v2"
