"""From Megatron's `TransformerConfig` to our settings of one MoE layer.

A setting that decides what is computed is translated, or refused with a sentence; one that decides
only how fast Megatron's own layer computes (dispatcher, fusions, grouped products) is left out.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from moe.config import BalanceConfig, ModelConfig
from parallel.errors import UserError

ScoreFunction = Literal["softmax", "sigmoid"]

_MUST_BE: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("gated_linear_unit", (True,), "the experts are SwiGLU"),
    ("activation_func", (F.silu,), "the experts are SwiGLU"),
    ("activation_func_clamp_value", (None,), "the experts do not clamp"),
    ("glu_linear_offset", (0.0,), "the experts are plain SwiGLU"),
    ("add_bias_linear", (False,), "the layer has no biases"),
    ("moe_latent_size", (None,), "the experts see the hidden size"),
    ("moe_shared_expert_gate", (False,), "shared experts have no gate"),
    ("moe_apply_probs_on_input", (False,), "the experts' outputs are weighted, not their inputs"),
    ("moe_router_dtype", (None, "fp32"), "the router computes in fp32"),
    ("moe_z_loss_coeff", (None, 0.0), "the router has no z-loss"),
    ("moe_input_jitter_eps", (None, 0.0), "the router has no jitter"),
    ("moe_router_force_load_balancing", (False,), "the router chooses by score"),
    ("moe_enable_routing_replay", (False,), "the router chooses by score"),
    ("moe_pad_expert_input_to_capacity", (False,), "no rows are padded"),
    ("moe_token_drop_policy", ("probs",), "the least weights are dropped first"),
    ("overlap_moe_expert_parallel_comm", (False,), "that schedule drives Megatron's own dispatcher"),
    ("cuda_graph_impl", ("none",), "row counts are read on the host"),
    ("fp8", (None,), "products keep the precision of the parameters"),
    ("fp4", (None,), "products keep the precision of the parameters"),
)


@dataclass(frozen=True)
class AuxiliaryLoss:
    """The auxiliary loss that is on: our coefficient's name, its value, its name in Megatron's log."""

    field: str
    coefficient: float
    logged_as: str


_LOSSES = {
    "aux_loss": ("microbatch_aux", "load_balancing_loss"),
    "seq_aux_loss": ("sequence_aux", "seq_load_balancing_loss"),
    "global_aux_loss": ("global_aux", "global_load_balancing_loss"),
}


def model_config(config: TransformerConfig, score_function: ScoreFunction | None = None) -> ModelConfig:
    """The shape of a layer; `score_function` stands over the config's. `UserError` where ours differs."""
    _check(config)
    score = score_function or config.moe_router_score_function
    normalize = config.moe_router_topk > 1 if score == "sigmoid" else not config.moe_router_pre_softmax
    scaling = config.moe_router_topk_scaling_factor or 1.0
    if score == "softmax" and normalize and scaling != 1.0:
        raise UserError(
            "`moe_router_topk_scaling_factor` must be 1 for softmax weights that are normalised, but is "
            f"{scaling}: set `moe_router_pre_softmax` or unset the factor"
        )
    return ModelConfig(
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.moe_ffn_hidden_size,
        num_experts=config.num_moe_experts,
        num_shared_experts=_num_shared_experts(config),
        top_k=config.moe_router_topk,
        score_function=score,
        normalize_top_k=normalize,
        routed_scaling_factor=scaling,
        capacity_factor=config.moe_expert_capacity_factor,
        **_group_limit(config, score),
    )


def balance_config(config: TransformerConfig) -> BalanceConfig:
    """Bias and auxiliary loss of a layer; Megatron moves the bias itself, at its own rate."""
    loss = auxiliary_loss(config)
    coefficients: dict[str, Any] = {loss.field: loss.coefficient} if loss else {}
    return BalanceConfig(bias="update" if config.moe_router_enable_expert_bias else "none", **coefficients)


def auxiliary_loss(config: TransformerConfig) -> AuxiliaryLoss | None:
    """The auxiliary loss that is on; a `UserError` for several, or for another way of balancing."""
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(kinds, str):
        kinds, coefficients = [kinds], [coefficients]
    losses = [(kind, each) for kind, each in zip(kinds, coefficients, strict=True) if kind != "none" and each]
    if len(losses) > 1 or not {*_LOSSES, "none"}.issuperset(kinds):
        raise UserError(
            f"`moe_router_load_balancing_type` must be {', '.join(_LOSSES)} or none, and one with a "
            f"coefficient, because the layer gives one sum to Megatron's log, but is {kinds}: keep one"
        )
    if not losses:
        return None
    kind, coefficient = losses[0]
    field, logged_as = _LOSSES[kind]
    return AuxiliaryLoss(field, coefficient, logged_as)


def _check(config: TransformerConfig) -> None:
    for name, accepted, reason in _MUST_BE:
        value = getattr(config, name)
        if value not in accepted:
            wanted = " or ".join(_written(each) for each in accepted)
            raise UserError(
                f"`{name}` must be {wanted} with Switchyard's layer, because {reason}, but is "
                f"{_written(value)}: change it or keep Megatron's own layer"
            )
    if config.recompute_granularity == "selective":
        parts = {"moe_act", "shared_experts"}.intersection(config.recompute_modules)
        if parts:
            raise UserError(
                f"`recompute_modules` must not hold {' or '.join(sorted(parts))} with Switchyard's layer, "
                "which is recomputed as a whole: name `moe` instead"
            )
    experts, ep = config.num_moe_experts, config.expert_model_parallel_size
    if not experts or experts % ep:
        raise UserError(
            "`num_moe_experts` must be a multiple of `expert_model_parallel_size`, but is "
            f"{experts} with {ep}: use {max(1, (experts or 0) // ep) * ep}"
        )
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        raise UserError(
            "`sequence_parallel` must be True where `tensor_model_parallel_size` is above 1, because the "
            "layer takes distinct tokens on every rank, but is False: set it"
        )


def _written(value: Any) -> str:
    return getattr(value, "__name__", repr(value))


def _num_shared_experts(config: TransformerConfig) -> int:
    width, one = config.moe_shared_expert_intermediate_size or 0, config.moe_ffn_hidden_size
    if width % one:
        raise UserError(
            "`moe_shared_expert_intermediate_size` must be a multiple of `moe_ffn_hidden_size`, but "
            f"{width} is not one of {one}: use {max(1, width // one) * one}"
        )
    return width // one


def _group_limit(config: TransformerConfig, score: ScoreFunction) -> dict[str, Any]:
    """A group counts by the sum of its `topk // group_topk` best, logits where softmax follows top-k."""
    if not config.moe_router_group_topk:
        return {}
    best = config.moe_router_topk // config.moe_router_group_topk
    of_logits = score == "softmax" and not config.moe_router_pre_softmax
    if best not in (1, 2) or (best == 2 and of_logits):
        raise UserError(
            "`moe_router_topk` // `moe_router_group_topk` must be 1, or 2 with scores before top-k, "
            f"because a group counts by its best or its two best scores, but is {best}: change one of them"
        )
    return {
        "num_groups": config.moe_router_num_groups,
        "top_groups": config.moe_router_group_topk,
        "group_score": "max" if best == 1 else "top2_sum",
    }
