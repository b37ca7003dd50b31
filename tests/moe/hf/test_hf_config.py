"""Released and transformers' `config.json` become our configuration and back; nothing is lost in silence."""

import dataclasses
from typing import Any

import pytest
from transformers import DeepseekV3Config

from moe.config import BalanceConfig, ModelConfig, RopeConfig
from moe.hf.config import from_hf, lost_from_hf, lost_to_hf, to_hf
from parallel.errors import UserError

V2_LITE: dict[str, Any] = {  # as released
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V3 = {
    **V2_LITE,
    "model_type": "deepseek_v3",
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "num_experts_per_tok": 8,
}


def without(config_json: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config_json.items() if key not in keys}


def test_v2_lite() -> None:
    model, balance = from_hf(V2_LITE)
    assert model == ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        num_layers=27,
        num_dense_layers=1,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_experts=64,
        num_shared_experts=2,
        top_k=6,
        score_function="softmax",
        group_score="max",
        normalize_top_k=False,
        num_heads=16,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope=RopeConfig(kind="yarn", factor=40.0, mscale=0.707, mscale_all_dim=0.707),
    )
    assert balance == BalanceConfig(bias="none", sequence_aux=0.001)
    assert lost_from_hf(V2_LITE) == [
        "`bos_token_id` is 100000 in config.json and is not kept: None is used",
        "`eos_token_id` is 100001 in config.json and is not kept: None is used",
    ]


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


def test_v3() -> None:
    model, balance = from_hf(V3)
    assert (model.score_function, model.group_score, model.normalize_top_k) == ("sigmoid", "top2_sum", True)
    assert (model.num_groups, model.top_groups, model.num_mtp_layers) == (8, 4, 1)
    assert balance.bias == "update"


def test_v3_without_coefficient_is_announced() -> None:
    """Others set it to 0 here without a word."""
    config_json = without(V3, "aux_loss_alpha", "seq_aux")
    assert from_hf(config_json)[1].sequence_aux == 0.0
    assert any("`balance.sequence_aux` stays 0" in sentence for sentence in lost_from_hf(config_json))


def test_both_forms_of_rope_agree() -> None:
    released = V3["rope_scaling"]
    parameters = {**without(released, "type"), "rope_type": "yarn", "rope_theta": 10000.0}
    newer = {**without(V3, "rope_scaling", "rope_theta"), "rope_parameters": parameters}
    assert from_hf(newer) == from_hf(V3)
    plain = {**newer, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert from_hf(plain)[0].rope == from_hf({**V3, "rope_theta": 5e5, "rope_scaling": None})[0].rope
    assert from_hf(plain)[0].rope == RopeConfig(theta=5e5)


@pytest.mark.parametrize("config_json", [V2_LITE, V3], ids=["v2-lite", "v3"])
def test_there_and_back(config_json: dict[str, Any]) -> None:
    model, balance = from_hf(config_json)
    assert from_hf(to_hf(model, balance)) == (model, balance)
    assert lost_to_hf(model, balance) == []
    again = to_hf(model, balance, eos_token_id=100001)
    kept = without(
        config_json, "auto_map", "bos_token_id", "pretraining_tp", "torch_dtype", "transformers_version"
    )
    kept = without(kept, "use_cache", "architectures")
    assert {key: again[key] for key in kept} == kept


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
        ({"attention_dropout": 0.1}, "`attention_dropout` is 0.1"),
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
        ({"hidden_act": "gelu"}, "`hidden_act` in config.json must be 'silu'"),
        ({"moe_layer_freq": 2}, "`moe_layer_freq` in config.json must be 1"),
        ({"rope_interleave": False}, "`rope_interleave` in config.json must be True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "convert them to bf16 first"),
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


def test_a_missing_key() -> None:
    with pytest.raises(UserError, match="must have `hidden_size`"):
        from_hf(without(V2_LITE, "hidden_size"))


def test_a_gate_that_no_file_can_say() -> None:
    model = dataclasses.replace(ModelConfig(), num_groups=4, top_groups=2, group_score="max")
    with pytest.raises(UserError, match=r"`model\.group_score` must be 'top2_sum' for a deepseek_v3 file"):
        to_hf(model, BalanceConfig())
