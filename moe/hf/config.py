"""Between a released `config.json` of a family (`moe/hf/families.py`) and our configuration. No torch.

What a file cannot say, or we cannot hold, is never dropped in silence: `lost_from_hf` and `lost_to_hf`
convert there and back and name every value that changed. Mixtral's softmax over the chosen logits is
ours over all of them, normalised over the chosen.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from moe.config import BalanceConfig, ModelConfig, RopeConfig
from moe.hf.families import FAMILIES, Family, family
from moe.rules import build
from parallel.errors import UserError

_YARN = {
    "factor": "factor",
    "original_context": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
_YARN_NEUTRAL = {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0}
_TOPK_METHODS = {"deepseek_v2": ("greedy", "group_limited_greedy"), "deepseek_v3": ("noaux_tc",)}
_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
_ABOUT_FILES = {"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}
_ABOUT_SERVING = {"use_cache", "output_router_logits", "pretraining_tp", "ep_size"}
_ABOUT_TEXT = {"bos_token_id", "eos_token_id", "pad_token_id"}  # `convert to-hf` puts them back
_READ_OTHERWISE = {
    *("head_dim", "qk_head_dim", "rope_theta", "rope_scaling", "rope_parameters", "quantization_config"),
    "max_window_layers",  # of the sliding window, which must be off
}
_ELSEWHERE = (
    _ABOUT_FILES | _ABOUT_SERVING | _ABOUT_TEXT | _READ_OTHERWISE
)  # nothing is lost where these differ
_OF_LATENTS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def from_hf(config_json: Mapping[str, Any]) -> tuple[ModelConfig, BalanceConfig]:
    """Our configuration of a released or exported model; UserError where we have no such model."""
    theirs = _family_of(config_json)
    config_json = _spelt(config_json, theirs)
    _check_fixed(config_json, theirs)
    values = {ours: _required(config_json, key) for ours, key in theirs.fields.items()}
    given = {ours: config_json.get(key) for ours, key in theirs.optional.items()}
    values |= {**{ours: value for ours, value in given.items() if value is not None}, **theirs.always}
    aux, bias = theirs.coefficient_of, "none"
    if theirs.name in _TOPK_METHODS:
        method = _topk_method(config_json, theirs)
        if method != "greedy":
            values |= {
                "num_groups": _required(config_json, "n_group"),
                "top_groups": _required(config_json, "topk_group"),
            }
        bias = "update" if method == "noaux_tc" else "none"
        aux = aux if config_json.get("seq_aux", True) else "microbatch_aux"
    rope = dataclasses.replace(_rope_from_hf(config_json), pairs=theirs.pairs)
    model = build(ModelConfig, {**values, "rope": dataclasses.asdict(rope)}, "model.")
    balance = {"bias": bias, aux: config_json.get(theirs.coefficient) or 0.0}
    return _plain(model), build(BalanceConfig, balance, "balance.")


def to_hf(model: ModelConfig, balance: BalanceConfig, *, eos_token_id: int | None = None) -> dict[str, Any]:
    """A `config.json` in the released form; UserError where no family has such a model.

    The end-of-sequence token is the tokenizer's business; without it the file says that there is none.
    """
    model, theirs = _plain(model), FAMILIES[family(model)]
    for name, value in {**theirs.always, "rope.pairs": theirs.pairs}.items():
        ours = functools.reduce(getattr, name.split("."), model)
        if ours != value:
            raise UserError(
                f"`model.{name}` must be {value!r} for a {theirs.name} file, but is {ours!r}: "
                f"train with `model.{name}={str(value).lower()}`, since no other file has such a model"
            )
    return {
        "architectures": [theirs.architecture],
        "model_type": theirs.name,
        **{key: getattr(model, ours) for ours, key in {**theirs.fields, **theirs.optional}.items()},
        **(_deepseek_to_hf(model, balance, theirs) if theirs.name in _TOPK_METHODS else {}),
        theirs.coefficient: getattr(balance, theirs.coefficient_of) or balance.microbatch_aux,
        **_rope_to_hf(model.rope),
        **theirs.fixed,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
    }


def lost_from_hf(config_json: Mapping[str, Any]) -> list[str]:
    """One sentence for each value of a `config.json` that we do not hold or had to assume."""
    model, balance = from_hf(config_json)
    theirs, again = _family_of(config_json), to_hf(model, balance)
    sentences = [
        f"`{key}` is {value!r} in config.json and is not kept: "
        + (f"{again[key]!r} is used" if key in again else "this model knows no such setting")
        for key, value in _spelt(config_json, theirs).items()
        if key not in _ELSEWHERE and value is not None and again.get(key) != value
    ]
    if config_json.get("quantization_config"):
        sentences.append(
            "`quantization_config` is fp8 in config.json and is not kept: the weights are read as what "
            "their blocks of numbers and scales stand for, and trained and written in a wider type"
        )
    if config_json.get(theirs.coefficient) is None:
        sentences.append(
            f"config.json has no `{theirs.coefficient}`, so `balance.{theirs.coefficient_of}` stays 0: "
            f"set it to go on training ({theirs.trained_with})"
        )
    return sentences + list(_departures(model, balance))


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
            f"`balance.bias` is {balance.bias!r}, but a {there['model_type']} file has no selection bias: it "
            "is left out, which changes who is chosen; train with `balance.bias=none` to export what was "
            "trained"
        )
    if model.rope.kind == "ntk":
        sentences.append(
            "NTK-aware RoPE is written as plain RoPE with a larger `rope_theta`: the same frequencies"
        )
    return sentences + list(_departures(model, balance))


def _departures(model: ModelConfig, balance: BalanceConfig) -> Iterator[str]:
    """Where transformers computes something else from the same `config.json`."""
    if family(model) == "deepseek_v2" and model.normalize_top_k:
        yield (
            "`norm_topk_prob` is true: here, as in DeepSeek's release, weights are then normalised "
            "and not scaled, but transformers' deepseek_v2 only scales"
        )
    if model.attention == "gqa" and balance.microbatch_aux:
        yield (
            f"`router_aux_loss_coef` is {balance.microbatch_aux}: here each layer has a loss of its own, "
            "1 where load is even, but transformers takes one over all layers together, there "
            f"{model.top_k} (`num_experts_per_tok`), and only with `output_router_logits`"
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
    """The same model with what means nothing, or is written in another form, as `from_hf` gives it."""
    theirs, changes = FAMILIES[family(model)], dict[str, Any]()
    if model.num_groups == 1:
        changes["group_score"] = theirs.always.get("group_score", ModelConfig.group_score)
    if model.attention == "gqa":
        changes |= {name: getattr(ModelConfig, name) for name in _OF_LATENTS}
        changes |= {"num_kv_heads": model.kv_heads, "head_dim": model.qk_head_dim}
        if model.normalize_top_k:
            changes["routed_scaling_factor"] = 1.0  # softmax that is normalised is not scaled
        if theirs.fields["intermediate_size"] == theirs.fields["moe_intermediate_size"]:
            changes["intermediate_size"] = model.moe_intermediate_size  # no layer is dense
    if model.rope.kind != "yarn":
        changes["rope"] = RopeConfig(theta=_theta(model), pairs=model.rope.pairs)
    return dataclasses.replace(model, **changes)


def _differences(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, our value, theirs) of every setting that differs."""
    for group, mine, yours in zip(("model", "balance"), ours, theirs, strict=True):
        for field in dataclasses.fields(mine):
            before, after = getattr(mine, field.name), getattr(yours, field.name)
            if before != after:
                yield f"{group}.{field.name}", before, after


def _family_of(config_json: Mapping[str, Any]) -> Family:
    name = config_json.get("model_type")
    if name not in FAMILIES:
        raise UserError(
            f"`model_type` in config.json must be {', '.join(FAMILIES)}, "
            f"but is {name!r}: use a model of these families"
        )
    return FAMILIES[name]


def _spelt(config_json: Mapping[str, Any], theirs: Family) -> dict[str, Any]:
    """The file with its keys as the release spells them."""
    return {theirs.renamed.get(key, key): value for key, value in config_json.items()}


def _check_fixed(config_json: Mapping[str, Any], theirs: Family) -> None:
    for key, value in theirs.fixed.items():
        if config_json.get(key) not in (None, value):
            raise UserError(
                f"`{key}` in config.json must be {value!r}, but is {config_json[key]!r}: "
                "use a model without it, since this one has no other form"
            )
    given = {"fmt": "e4m3", **(config_json.get("quantization_config") or _FP8)}
    if any(given.get(key) != value for key, value in _FP8.items()):
        raise UserError(
            "`quantization_config` in config.json must be absent, or fp8 (e4m3) with `weight_block_size` "
            f"[128, 128], but the weights are quantized with {given.get('quant_method')!r} in blocks of "
            f"{given.get('weight_block_size')}: convert them to bf16 first"
        )


def _topk_method(config_json: Mapping[str, Any], theirs: Family) -> str:
    methods, score_function = _TOPK_METHODS[theirs.name], theirs.always["score_function"]
    method = config_json.get("topk_method", methods[0])
    given = config_json.get("scoring_func", score_function)
    if method not in methods or given != score_function:
        raise UserError(
            f"`topk_method` of {theirs.name} must be {' or '.join(methods)} with `scoring_func` "
            f"{score_function}, but config.json has {method!r} with {given!r}: use a model with a released "
            "gate"
        )
    return method


def _deepseek_to_hf(model: ModelConfig, balance: BalanceConfig, theirs: Family) -> dict[str, Any]:
    """What only DeepSeek's files say: the gate, and which of two auxiliary losses there is."""
    methods = _TOPK_METHODS[theirs.name]
    return {
        "num_key_value_heads": model.num_heads,
        "n_group": model.num_groups,
        "topk_group": model.top_groups,
        "scoring_func": model.score_function,
        "topk_method": methods[-1] if model.num_groups > 1 else methods[0],
        "seq_aux": bool(balance.sequence_aux) or not balance.microbatch_aux,
    }


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


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    if rope.kind != "yarn":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    scaling = {"type": "yarn", **{theirs: getattr(rope, ours) for ours, theirs in _YARN.items()}}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _theta(model: ModelConfig) -> float:
    """The base of plain RoPE with the same frequencies (YaRN aside)."""
    rope, num_dims = model.rope, model.rotated_dims
    return rope.theta * rope.factor ** (num_dims / (num_dims - 2)) if rope.kind == "ntk" else rope.theta
