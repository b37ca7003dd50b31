"""Between a released `config.json` (model_type deepseek_v2 or deepseek_v3) and our configuration. No torch.

The two released gates are `deepseek_v2`: softmax with greedy or group_limited_greedy, and
`deepseek_v3`: sigmoid with noaux_tc. What a file cannot say, or we cannot hold, is never dropped in
silence: `lost_from_hf` and `lost_to_hf` convert there and back and name every value that changed.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from moe.config import BalanceConfig, ModelConfig, RopeConfig
from moe.rules import build
from parallel.errors import UserError

_FIELDS = {  # ours: theirs
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_dense_layers": "first_k_dense_replace",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "top_k": "num_experts_per_tok",
    "normalize_top_k": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor",
    "num_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "max_context": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
}
_OPTIONAL = {  # absent from some files; there our default is theirs
    "num_mtp_layers": "num_nextn_predict_layers",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
_YARN = {
    "factor": "factor",
    "original_context": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
_YARN_NEUTRAL = {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0}
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
_TOPK_METHODS = {"deepseek_v2": ("greedy", "group_limited_greedy"), "deepseek_v3": ("noaux_tc",)}
_SCORE_FUNCTIONS = {"deepseek_v2": "softmax", "deepseek_v3": "sigmoid"}
_ABOUT_FILES = {"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}
_ABOUT_SERVING = {"use_cache", "output_router_logits", "pretraining_tp", "ep_size"}
_READ_OTHERWISE = {"head_dim", "qk_head_dim", "rope_theta", "rope_scaling", "rope_parameters"}
_ELSEWHERE = _ABOUT_FILES | _ABOUT_SERVING | _READ_OTHERWISE  # nothing is lost where these differ


def from_hf(config_json: Mapping[str, Any]) -> tuple[ModelConfig, BalanceConfig]:
    """Our configuration of a released or exported model; UserError where we have no such model."""
    family = config_json.get("model_type")
    if family not in _TOPK_METHODS:
        raise UserError(
            "`model_type` in config.json must be deepseek_v2 or deepseek_v3, "
            f"but is {family!r}: use a model of these families"
        )
    _check_fixed(config_json)
    method = _topk_method(family, config_json)
    values = {ours: _required(config_json, theirs) for ours, theirs in _FIELDS.items()}
    given = {ours: config_json.get(theirs) for ours, theirs in _OPTIONAL.items()}
    values |= {ours: value for ours, value in given.items() if value is not None}
    if method != "greedy":
        values |= {
            "num_groups": _required(config_json, "n_group"),
            "top_groups": _required(config_json, "topk_group"),
        }
    values["score_function"] = _SCORE_FUNCTIONS[family]
    values["group_score"] = "top2_sum" if method == "noaux_tc" else "max"
    values["rope"] = dataclasses.asdict(_rope_from_hf(config_json))
    alpha, by_sequence = config_json.get("aux_loss_alpha") or 0.0, config_json.get("seq_aux", True)
    balance = {
        "bias": "update" if method == "noaux_tc" else "none",
        "sequence_aux" if by_sequence else "microbatch_aux": alpha,
    }
    return build(ModelConfig, values, "model."), build(BalanceConfig, balance, "balance.")


def to_hf(model: ModelConfig, balance: BalanceConfig, *, eos_token_id: int | None = None) -> dict[str, Any]:
    """A `config.json` in the released form; UserError where neither released gate is ours.

    The end-of-sequence token is the tokenizer's business; without it the file says that there is none.
    """
    family = "deepseek_v3" if model.score_function == "sigmoid" else "deepseek_v2"
    group_score = "top2_sum" if family == "deepseek_v3" else "max"
    if model.num_groups > 1 and model.group_score != group_score:
        raise UserError(
            f"`model.group_score` must be {group_score!r} for a {family} file, but is {model.group_score!r}: "
            f"train with `model.group_score={group_score}` or without groups"
        )
    limited = "noaux_tc" if family == "deepseek_v3" else "group_limited_greedy"
    return {
        "architectures": ["DeepseekV3ForCausalLM" if family == "deepseek_v3" else "DeepseekV2ForCausalLM"],
        "model_type": family,
        **{theirs: getattr(model, ours) for ours, theirs in (_FIELDS | _OPTIONAL).items()},
        "num_key_value_heads": model.num_heads,
        "n_group": model.num_groups,
        "topk_group": model.top_groups,
        "scoring_func": model.score_function,
        "topk_method": limited if family == "deepseek_v3" or model.num_groups > 1 else "greedy",
        "aux_loss_alpha": balance.sequence_aux or balance.microbatch_aux,
        "seq_aux": bool(balance.sequence_aux) or not balance.microbatch_aux,
        **_rope_to_hf(model),
        **_FIXED,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
    }


def lost_from_hf(config_json: Mapping[str, Any]) -> list[str]:
    """One sentence for each value of a `config.json` that we do not hold or had to assume."""
    model, balance = from_hf(config_json)
    again = to_hf(model, balance)
    sentences = [
        f"`{key}` is {value!r} in config.json and is not kept: "
        + (f"{again[key]!r} is used" if key in again else "this model knows no such setting")
        for key, value in config_json.items()
        if key not in _ELSEWHERE and value is not None and again.get(key) != value
    ]
    if config_json.get("aux_loss_alpha") is None:
        sentences.append(
            "config.json has no `aux_loss_alpha`, so `balance.sequence_aux` stays 0: "
            "set it to go on training (V2 was trained with 0.001, V3 with 0.0001)"
        )
    return sentences + list(_departures(model))


def lost_to_hf(model: ModelConfig, balance: BalanceConfig) -> list[str]:
    """One sentence for each setting that a reader of the exported `config.json` will not find."""
    there = to_hf(model, balance)
    sentences = [
        f"`{name}` is {ours!r}, but a reader of the {there['model_type']} config.json gets {theirs!r}"
        for name, ours, theirs in _differences((_plain(model), balance), from_hf(there))
        if (name, theirs) != ("balance.bias", "none")
    ]
    if balance.bias != "none" and model.score_function == "softmax":
        sentences.append(
            f"`balance.bias` is {balance.bias!r}, but a deepseek_v2 file has no selection bias: it is left "
            "out, which changes who is chosen; train with `balance.bias=none` to export what was trained"
        )
    if model.rope.kind == "ntk":
        sentences.append(
            "NTK-aware RoPE is written as plain RoPE with a larger `rope_theta`: the same frequencies"
        )
    return sentences + list(_departures(model))


def _departures(model: ModelConfig) -> Iterator[str]:
    """Where transformers computes something else from the same `config.json`."""
    if model.score_function == "softmax" and model.normalize_top_k:
        yield (
            "`norm_topk_prob` is true: here, as in DeepSeek's release, weights are then normalised "
            "and not scaled, but transformers' deepseek_v2 only scales"
        )
    rope = model.rope
    if (
        rope.kind == "yarn"
        and not (rope.mscale and rope.mscale_all_dim)
        and (rope.mscale, rope.mscale_all_dim) != (1, 0)
    ):
        yield (
            f"`mscale` is {rope.mscale} and `mscale_all_dim` {rope.mscale_all_dim}: here, as in DeepSeek's "
            "release, both scale the rotation, but transformers ignores both there when one is 0"
        )


def _plain(model: ModelConfig) -> ModelConfig:
    """The same model with what means nothing, or is written in another form, as `from_hf` would give it."""
    group_score = model.group_score
    if model.num_groups == 1:
        group_score = "top2_sum" if model.score_function == "sigmoid" else "max"
    rope = model.rope if model.rope.kind == "yarn" else RopeConfig(theta=_theta(model))
    return dataclasses.replace(model, group_score=group_score, rope=rope)


def _differences(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, our value, theirs) of every setting that differs."""
    for group, mine, yours in zip(("model", "balance"), ours, theirs, strict=True):
        for field in dataclasses.fields(mine):
            before, after = getattr(mine, field.name), getattr(yours, field.name)
            if before != after:
                yield f"{group}.{field.name}", before, after


def _check_fixed(config_json: Mapping[str, Any]) -> None:
    for key, value in _FIXED.items():
        if config_json.get(key, value) != value:
            raise UserError(
                f"`{key}` in config.json must be {value!r}, but is {config_json[key]!r}: "
                "use a model without it, since this one has no other form"
            )
    if config_json.get("quantization_config"):
        raise UserError(
            "`quantization_config` in config.json must be absent, but the weights are quantized with "
            f"{config_json['quantization_config'].get('quant_method')!r}: convert them to bf16 first"
        )


def _topk_method(family: str, config_json: Mapping[str, Any]) -> str:
    methods, score_function = _TOPK_METHODS[family], _SCORE_FUNCTIONS[family]
    method = config_json.get("topk_method", methods[0])
    given = config_json.get("scoring_func", score_function)
    if method not in methods or given != score_function:
        raise UserError(
            f"`topk_method` of {family} must be {' or '.join(methods)} with `scoring_func` {score_function}, "
            f"but config.json has {method!r} with {given!r}: use a model with a released gate"
        )
    return method


def _required(config_json: Mapping[str, Any], key: str) -> Any:
    if key not in config_json:
        raise UserError(f"config.json must have `{key}`, but it is missing: add it as the model was trained")
    return config_json[key]


def _rope_from_hf(config_json: Mapping[str, Any]) -> RopeConfig:
    """From the released `rope_theta` and `rope_scaling`, or from transformers 5's `rope_parameters`."""
    given = dict(config_json.get("rope_parameters") or config_json.get("rope_scaling") or {})
    theta = given.pop("rope_theta", None) or _required(config_json, "rope_theta")
    kinds = (given.pop("rope_type", None), given.pop("type", None))
    kind = next((k for k in kinds if k), "default")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "yarn":
        raise UserError(
            f"the RoPE in config.json must be of type default or yarn, but is {kind!r}: use such a model"
        )
    for key in given.keys() - _YARN.values():
        if key not in _YARN_NEUTRAL or given[key] != _YARN_NEUTRAL[key]:
            raise UserError(
                f"YaRN in config.json must be DeepSeek's, but has `{key}` {given[key]!r}: use a model without"
            )
    for key in ("factor", "original_max_position_embeddings"):
        _required(given, key)
    values = {ours: given[theirs] for ours, theirs in _YARN.items() if given.get(theirs) is not None}
    return build(RopeConfig, {"kind": "yarn", "theta": theta, **values}, "model.rope.")


def _rope_to_hf(model: ModelConfig) -> dict[str, Any]:
    rope = model.rope
    if rope.kind != "yarn":
        return {"rope_theta": _theta(model), "rope_scaling": None}
    scaling = {"type": "yarn", **{theirs: getattr(rope, ours) for ours, theirs in _YARN.items()}}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _theta(model: ModelConfig) -> float:
    """The base of plain RoPE with the same frequencies (YaRN aside)."""
    rope, num_dims = model.rope, model.qk_rope_head_dim
    return rope.theta * rope.factor ** (num_dims / (num_dims - 2)) if rope.kind == "ntk" else rope.theta
