"""Megatron's settings of a layer in our words, and what is refused."""

from typing import Any

import pytest
import torch.nn.functional as F

from moe.config import BalanceConfig, ModelConfig
from moe.megatron_config import balance_config, model_config
from parallel.errors import UserError
from tests.megatron_cpu import transformer_config

SIGMOID = {"moe_router_score_function": "sigmoid"}


def test_a_layer_of_deepseek_v3() -> None:
    config = transformer_config(
        **SIGMOID,
        hidden_size=7168,
        num_attention_heads=128,
        num_moe_experts=256,
        moe_ffn_hidden_size=2048,
        moe_shared_expert_intermediate_size=2048,
        moe_router_topk=8,
        moe_router_num_groups=8,
        moe_router_group_topk=4,
        moe_router_topk_scaling_factor=2.5,
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=1e-4,
        expert_model_parallel_size=64,
    )
    assert model_config(config) == ModelConfig(
        hidden_size=7168,
        num_experts=256,
        moe_intermediate_size=2048,
        top_k=8,
        num_groups=8,
        top_groups=4,
        routed_scaling_factor=2.5,
    )
    assert balance_config(config) == BalanceConfig(bias="update", sequence_aux=1e-4)


def test_a_layer_of_deepseek_v2() -> None:
    config = transformer_config(
        moe_router_pre_softmax=True,
        num_moe_experts=64,
        moe_router_topk=6,
        moe_router_num_groups=8,
        moe_router_group_topk=6,
        moe_router_topk_scaling_factor=16.0,
        moe_expert_capacity_factor=1.5,
        moe_router_load_balancing_type=["none", "aux_loss"],
        moe_aux_loss_coeff=[1.0, 1e-3],
    )
    assert model_config(config) == ModelConfig(
        hidden_size=16,
        num_experts=64,
        moe_intermediate_size=12,
        num_shared_experts=2,
        top_k=6,
        num_groups=8,
        top_groups=6,
        group_score="max",
        score_function="softmax",
        normalize_top_k=False,
        routed_scaling_factor=16.0,
        capacity_factor=1.5,
    )
    assert balance_config(config) == BalanceConfig(bias="none", microbatch_aux=1e-3)


@pytest.mark.parametrize(
    ("settings", "normalize"),
    [
        ({}, True),
        ({"moe_router_pre_softmax": True}, False),
        (SIGMOID, True),
        (SIGMOID | {"moe_router_topk": 1}, False),
    ],
)
def test_which_weights_are_normalised(settings: dict[str, Any], normalize: bool) -> None:
    assert model_config(transformer_config(**settings)).normalize_top_k is normalize


def test_the_bias_works_with_softmax_although_megatron_has_no_such_setting() -> None:
    config = transformer_config(**SIGMOID, moe_router_enable_expert_bias=True)
    assert model_config(config, "softmax").score_function == "softmax"
    assert balance_config(config).bias == "update"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"activation_func": F.gelu}, "`activation_func` must be silu .* SwiGLU, but is gelu: change it or"),
        ({"gated_linear_unit": False}, "`gated_linear_unit` must be True .* but is False"),
        ({"add_bias_linear": True}, "`add_bias_linear` must be False"),
        ({"overlap_moe_expert_parallel_comm": True}, "`overlap_moe_expert_parallel_comm` must be False"),
        ({"moe_z_loss_coeff": 1e-3}, "`moe_z_loss_coeff` must be None or 0.0 .* no z-loss, but is 0.001"),
        ({"moe_router_dtype": "fp64"}, "`moe_router_dtype` must be None or 'fp32'"),
        ({"moe_token_drop_policy": "position"}, "`moe_token_drop_policy` must be 'probs'"),
        ({"fp8": "hybrid"}, "`fp8` must be None"),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe_act"]},
            "`recompute_modules` must not hold moe_act .* name `moe` instead",
        ),
        ({"num_moe_experts": None}, "`num_moe_experts` must be a multiple .* is None with 1: use 1"),
        ({"expert_model_parallel_size": 3}, "is 8 with 3: use 6"),
        ({"tensor_model_parallel_size": 2}, "`sequence_parallel` must be True"),
        ({"moe_shared_expert_intermediate_size": 30}, "30 is not one of 12: use 24"),
        ({"moe_router_topk_scaling_factor": 2.5}, "`moe_router_topk_scaling_factor` must be 1 .* is 2.5"),
        (
            {"moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
            "must be 1, or 2 with scores before top-k, .* but is 2",
        ),
        (
            SIGMOID | {"moe_router_topk": 6, "moe_router_num_groups": 2, "moe_router_group_topk": 2},
            "must be 1, or 2 .* but is 3",
        ),
    ],
)
def test_what_the_layer_cannot_honour_is_refused(settings: dict[str, Any], sentence: str) -> None:
    config = transformer_config()
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=sentence):
        model_config(config)


@pytest.mark.parametrize(
    ("kinds", "coefficients"),
    [("sinkhorn", 0.0), (["aux_loss", "seq_aux_loss"], [1e-2, 1e-3])],
)
def test_other_ways_of_balancing_are_refused(kinds: Any, coefficients: Any) -> None:
    config = transformer_config(moe_router_load_balancing_type=kinds, moe_aux_loss_coeff=coefficients)
    with pytest.raises(UserError, match=r"`moe_router_load_balancing_type` must be .*: keep one"):
        balance_config(config)
