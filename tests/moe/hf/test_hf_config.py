"""Released and transformers' `config.json` become our configuration and back; nothing is lost in silence."""

import dataclasses
import math
from typing import Any

import pytest
from transformers import DeepseekV3Config

from moe.config import BalanceConfig, ModelConfig, RopeConfig
from moe.hf.config import from_hf, lost_from_hf, lost_to_hf, to_hf
from moe.model.rope import rotation_scale, softmax_scale
from parallel.errors import UserError
from tests import released
from tests.moe.hf.released_json import MIXTRAL, OLMOE, QWEN3_MOE, RELEASED, V2_LITE, V3


def without(config_json: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config_json.items() if key not in keys}


OURS = {
    "v2-lite": released.V2_LITE,
    "v3": dataclasses.replace(released.V3, init_std=0.02),
    "moonlight": released.MOONLIGHT,
    "mixtral": released.MIXTRAL,
    "qwen3-moe": released.QWEN3_MOE,
    "olmoe": released.OLMOE,
}
BALANCE = {
    "v2-lite": BalanceConfig(bias="none", sequence_aux=0.001),
    "v3": BalanceConfig(bias="update"),
    "moonlight": BalanceConfig(bias="update", sequence_aux=0.001),
    "mixtral": BalanceConfig(bias="none", microbatch_aux=0.02),
    "qwen3-moe": BalanceConfig(bias="none", microbatch_aux=0.001),
    "olmoe": BalanceConfig(bias="none", microbatch_aux=0.01),
}


@pytest.mark.parametrize("name", OURS)
def test_released_models(name: str) -> None:
    assert from_hf(RELEASED[name]) == (OURS[name], BALANCE[name])


@pytest.mark.parametrize("name", RELEASED)
def test_of_a_release_nothing_is_lost_in_silence(name: str) -> None:
    """What is read otherwise, or computed otherwise by transformers, is told; exports keep special tokens."""
    others = [sentence.split("`")[1] for sentence in lost_from_hf(RELEASED[name])]
    expected = {"v3": ["quantization_config", "aux_loss_alpha"]}
    grouped = ["router_aux_loss_coef"] if name in ("mixtral", "qwen3-moe", "olmoe") else []
    assert others == expected.get(name, grouped)


def test_v2_groups_and_microbatch_loss() -> None:
    changes = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "seq_aux": False}
    model, balance = from_hf({**V2_LITE, **changes, "routed_scaling_factor": 16.0})
    assert (model.num_groups, model.top_groups, model.group_score) == (8, 3, "max")
    assert model.routed_scaling_factor == 16.0
    assert (balance.sequence_aux, balance.microbatch_aux) == (0.0, 0.001)


def test_greedy_knows_no_groups() -> None:
    model, _ = from_hf({**V2_LITE, "n_group": None, "topk_group": None})
    assert (model.num_groups, model.top_groups) == (1, 1)
    assert not any("group" in sentence for sentence in lost_from_hf({**V2_LITE, "n_group": None}))


def test_v3_without_coefficient_is_announced() -> None:
    """Others set it to 0 here without a word."""
    assert from_hf(V3)[1].sequence_aux == 0.0
    assert any("`balance.sequence_aux` stays 0" in sentence for sentence in lost_from_hf(V3))
    mixtral = without(MIXTRAL, "router_aux_loss_coef")
    assert any("`balance.microbatch_aux` stays 0" in sentence for sentence in lost_from_hf(mixtral))


def test_both_forms_of_rope_agree() -> None:
    released = V3["rope_scaling"]
    parameters = {**without(released, "type"), "rope_type": "yarn", "rope_theta": 10000.0}
    newer = {**without(V3, "rope_scaling", "rope_theta"), "rope_parameters": parameters}
    assert from_hf(newer) == from_hf(V3)
    plain = {**newer, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert from_hf(plain)[0].rope == from_hf({**V3, "rope_theta": 5e5, "rope_scaling": None})[0].rope
    assert from_hf(plain)[0].rope == RopeConfig(theta=5e5)


@pytest.mark.parametrize("name", RELEASED)
def test_there_and_back(name: str) -> None:
    config_json = RELEASED[name]
    model, balance = from_hf(config_json)
    assert from_hf(to_hf(model, balance)) == (model, balance)
    assert [s for s in lost_to_hf(model, balance) if "router_aux_loss_coef" not in s] == []
    again = to_hf(model, balance, eos_token_id=config_json["eos_token_id"])
    not_ours = ("auto_map", "torch_dtype", "transformers_version", "use_cache", "output_router_logits")
    not_ours += ("bos_token_id", "pad_token_id", "pretraining_tp", "ep_size", "quantization_config")
    kept = without(config_json, *not_ours, "max_window_layers", "sliding_window")
    assert {key: again[key] for key in kept} == kept


def test_the_spelling_of_later_transformers() -> None:
    """It writes Qwen3's `num_experts` as `num_local_experts`."""
    config_json = without(QWEN3_MOE, "num_experts") | {"num_local_experts": 128}
    assert from_hf(config_json) == from_hf(QWEN3_MOE)
    assert lost_from_hf(config_json) == lost_from_hf(QWEN3_MOE)


def test_heads_that_a_file_leaves_out() -> None:
    model, _ = from_hf({**OLMOE, "num_key_value_heads": None})
    assert (model.num_kv_heads, model.head_dim) == (16, 128)
    assert from_hf({**MIXTRAL, "head_dim": 64})[0].head_dim == 64


def test_yarn_without_mscale_is_that_of_transformers() -> None:
    """Qwen3's, whose rotation alone is scaled, by 0.1 ln(factor) + 1."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    model, balance = from_hf({**QWEN3_MOE, "rope_scaling": scaling})
    assert rotation_scale(model.rope) == pytest.approx(0.1 * math.log(4.0) + 1)
    assert softmax_scale(model.rope, 128) == 128**-0.5
    assert from_hf(to_hf(model, balance)) == (model, balance)


def test_transformers_reads_what_is_written() -> None:
    model, balance = from_hf(V3)
    config = DeepseekV3Config(**to_hf(model, balance))
    assert from_hf(config.to_dict()) == (model, balance)
    assert (config.bos_token_id, config.eos_token_id) == (None, None)


def test_ntk_is_plain_with_a_larger_base() -> None:
    model = ModelConfig(rope=RopeConfig(kind="ntk", factor=4.0), qk_rope_head_dim=16)
    written = to_hf(model, BalanceConfig())
    assert written["rope_scaling"] is None
    assert written["rope_theta"] == pytest.approx(10000.0 * 4.0 ** (16 / 14))
    (sentence,) = lost_to_hf(model, BalanceConfig())
    assert "NTK" in sentence


@pytest.mark.parametrize(
    ("model_changes", "balance_changes", "word"),
    [
        ({"capacity_factor": 1.25}, {}, "`model.capacity_factor` is 1.25"),
        ({}, {"bias_rate": 0.01}, "`balance.bias_rate` is 0.01"),
        ({}, {"bias": "frozen"}, "`balance.bias` is 'frozen'"),
        ({}, {"global_aux": 0.1}, "`balance.global_aux` is 0.1"),
        ({}, {"sequence_aux": 0.1, "microbatch_aux": 0.2}, "`balance.microbatch_aux` is 0.2"),
        ({"score_function": "softmax", "normalize_top_k": False}, {}, "selection bias: it is left out"),
        ({"score_function": "softmax"}, {"bias": "none"}, "`norm_topk_prob` is true"),
        ({"rope": RopeConfig(kind="yarn", factor=40.0, mscale=0.707)}, {}, "`mscale` is 0.707"),
    ],
)
def test_every_loss_on_export_is_named(
    model_changes: dict[str, Any], balance_changes: dict[str, Any], word: str
) -> None:
    (sentence,) = lost_to_hf(ModelConfig(**model_changes), BalanceConfig(**balance_changes))
    assert word in sentence


def test_a_default_model_loses_nothing() -> None:
    assert lost_to_hf(ModelConfig(), BalanceConfig()) == []
    softmax = ModelConfig(score_function="softmax", normalize_top_k=False)  # one group: its score is moot
    assert lost_to_hf(softmax, BalanceConfig(bias="none")) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"sliding_window": 512}, "`sliding_window` is 512 in config.json and is not kept: this model knows"),
        ({"num_key_value_heads": 128}, "16 is used"),
        ({"norm_topk_prob": True}, "`norm_topk_prob` is true"),
    ],
)
def test_every_loss_on_import_is_named(change: dict[str, Any], word: str) -> None:
    before = lost_from_hf(V2_LITE)
    (sentence,) = [s for s in lost_from_hf({**V2_LITE, **change}) if s not in before]
    assert word in sentence


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "llama"}, "`model_type` in config.json must be"),
        ({"attention_bias": True}, "`attention_bias` in config.json must be False"),
        ({"attention_dropout": 0.1}, "`attention_dropout` in config.json must be 0.0, but is 0.1"),
        ({"hidden_act": "gelu"}, "`hidden_act` in config.json must be 'silu'"),
        ({"moe_layer_freq": 2}, "`moe_layer_freq` in config.json must be 1"),
        ({"rope_interleave": False}, "`rope_interleave` in config.json must be True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "'fp8' in blocks of None: convert them to bf16"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq' in blocks of None"),
        ({"quantization_config": {**V3["quantization_config"], "weight_block_size": [64, 64]}}, "[64, 64]"),
        ({"quantization_config": {**V3["quantization_config"], "fmt": "e5m2"}}, "fp8 (e4m3)"),
        ({"topk_method": "noaux_tc"}, "`topk_method` of deepseek_v2 must be greedy or group_limited_greedy"),
        ({"scoring_func": "sigmoid"}, "with `scoring_func` softmax"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "must be of type default or yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "`original_max_position_embeddings`"),
        ({"rope_scaling": {**V2_LITE["rope_scaling"], "truncate": False}}, "has `truncate` False"),
        ({"num_experts_per_tok": None}, "`model.top_k` must be an integer"),
    ],
)
def test_what_cannot_be_read(change: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError) as caught:
        from_hf({**V2_LITE, **change})
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("config_json", "change"),
    [
        (MIXTRAL, {"sliding_window": 4096}),
        (MIXTRAL, {"router_jitter_noise": 0.1}),
        (OLMOE, {"sliding_window": 4096}),
        (OLMOE, {"clip_qkv": 8.0}),
        (OLMOE, {"attention_bias": True}),
        (QWEN3_MOE, {"use_sliding_window": True}),
        (QWEN3_MOE, {"decoder_sparse_step": 2}),
        (QWEN3_MOE, {"mlp_only_layers": [0]}),
        (QWEN3_MOE, {"attention_dropout": 0.1}),
    ],
)
def test_what_cannot_be_computed(config_json: dict[str, Any], change: dict[str, Any]) -> None:
    (key,) = change
    with pytest.raises(UserError, match=f"`{key}` in config.json must be "):
        from_hf({**config_json, **change})


def test_a_window_that_is_off() -> None:
    assert from_hf({**QWEN3_MOE, "sliding_window": 4096}) == from_hf(QWEN3_MOE)
    assert any("`sliding_window` is 4096" in s for s in lost_from_hf({**QWEN3_MOE, "sliding_window": 4096}))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_shared_experts": 1}, "`model.num_shared_experts` must be 0 for a mixtral file, but is 1"),
        ({"num_dense_layers": 1}, "`model.num_dense_layers` must be 0 for a mixtral file"),
        ({"num_mtp_layers": 1}, "`model.num_mtp_layers` must be 0 for a mixtral file"),
        ({"normalize_top_k": False}, "`model.normalize_top_k` must be True for a mixtral file"),
        ({"score_function": "sigmoid"}, "`model.score_function` must be 'softmax' for a mixtral file"),
        ({"num_groups": 2}, "`model.num_groups` must be 1 for a mixtral file"),
        ({"rope": RopeConfig()}, "`model.rope.pairs` must be 'halves' for a mixtral file"),
        (
            {"qk_norm": "head", "normalize_top_k": False, "routed_scaling_factor": 2.0},
            "`model.routed_scaling_factor` must be 1.0 for a qwen3_moe file",
        ),
    ],
)
def test_a_model_that_no_file_can_say(change: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError) as caught:
        to_hf(dataclasses.replace(released.MIXTRAL, **change), BalanceConfig())
    assert word in str(caught.value)


def test_what_means_nothing_is_not_lost() -> None:
    """No layer is dense, there are no latents, normalised weights are not scaled."""
    changes = {"intermediate_size": 7, "kv_lora_rank": 7, "routed_scaling_factor": 2.0, "head_dim": None}
    model = dataclasses.replace(released.MIXTRAL, **changes)
    assert lost_to_hf(model, BalanceConfig(bias="none")) == []
    (sentence,) = lost_to_hf(model, BalanceConfig(bias="none", sequence_aux=0.1))
    assert "`balance.sequence_aux` is 0.1" in sentence


def test_a_missing_key() -> None:
    with pytest.raises(UserError, match="must have `hidden_size`"):
        from_hf(without(V2_LITE, "hidden_size"))


def test_a_gate_that_no_file_can_say() -> None:
    model = dataclasses.replace(ModelConfig(), num_groups=4, top_groups=2, group_score="max")
    with pytest.raises(UserError, match=r"`model\.group_score` must be 'top2_sum' for a deepseek_v3 file"):
        to_hf(model, BalanceConfig())
