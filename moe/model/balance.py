"""Keeping expert load even: the selection bias (2408.15664) and three auxiliary losses (2412.19437).

Bias, once per global batch: b_i <- b_i + rate * sign(mean(c) - c_i). Losses: alpha * sum_i f_i P_i
with f_i the share of assignments (times E) and P_i the mean normalised score, over each sequence,
over the microbatch, or with f of the whole global batch. The last takes the counts of the *previous*
global batch, which the bias update has summed already: no collective in the forward, and the same
value under every layout and schedule.
Legend: B sequences, S positions, E experts, K chosen experts.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe.config import BalanceConfig

if TYPE_CHECKING:
    from moe.model.router import Router


def auxiliary_loss(router: "Router", scores: Tensor, chosen: Tensor, valid: Tensor) -> Tensor:
    """The weighted sum of the losses switched on, a scalar in fp32; 0 when none is.

    `scores` [B, S, E], `chosen` [B, S, K] as selected, `valid` [B, S]. Padding is left out.
    """
    balance, config = router.balance, router.config
    if not (balance.sequence_aux or balance.microbatch_aux or balance.global_aux):
        return scores.new_zeros(())
    if balance.bias != "none" or config.score_function == "sigmoid":
        chosen = router.unbiased_choice(scores)
    tokens_B = valid.sum(1).clamp_min(1)
    hits = torch.zeros_like(scores).scatter_(2, chosen, 1.0) * valid[..., None]
    hits_BE = hits.detach().sum(1)
    share = scores / scores.sum(-1, keepdim=True)
    share_BE = (share * valid[..., None]).sum(1)
    per_hit = config.num_experts / config.top_k
    total = scores.new_zeros(())
    if balance.sequence_aux:
        f_BE, p_BE = hits_BE * per_hit / tokens_B[:, None], share_BE / tokens_B[:, None]
        total = total + balance.sequence_aux * (f_BE * p_BE).sum(-1).mean()
    tokens = valid.sum().clamp_min(1)
    mean_E = share_BE.sum(0) / tokens
    if balance.microbatch_aux:
        f_E = hits_BE.sum(0) * per_hit / tokens
        total = total + balance.microbatch_aux * (f_E * mean_E).sum()
    if balance.global_aux:
        last_E = router.last_counts
        f_E = (
            last_E * config.num_experts / last_E.sum().clamp_min(1)
            if last_E.any()
            else torch.ones_like(mean_E)
        )
        total = total + balance.global_aux * (f_E * mean_E).sum()
    return total


def bias_rate(balance: BalanceConfig, step: int, steps: int) -> float:
    """The update rate at a step (0-based) of a run of `steps`; 0 when frozen."""
    frozen = balance.bias_freeze_step is not None and step >= balance.bias_freeze_step
    if balance.bias != "update" or frozen:
        return 0.0
    left = 1.0 - step / steps
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    return balance.bias_rate * factor[balance.bias_schedule]


@torch.no_grad()
def update_bias(router: "Router", counts_E: Tensor, rate: float) -> None:
    """Move the bias by the counts [E] of the global batch, summed over every rank with distinct tokens."""
    router.last_counts.copy_(counts_E)
    if rate == 0.0:
        return
    # E times the distance from the mean, in integers: its sign without rounding.
    above_E = counts_E * len(counts_E) - counts_E.sum()
    router.bias.sub_(rate * above_E.sign().float())
    if router.balance.bias_center:
        router.bias.sub_(router.bias.mean())
    if router.balance.bias_clamp is not None:
        router.bias.clamp_(-router.balance.bias_clamp, router.balance.bias_clamp)
