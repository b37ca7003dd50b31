"""Keeping expert load even: the selection bias (2408.15664) and three auxiliary losses (2412.19437).

Bias, once per global batch: b_i <- b_i + rate * sign(mean(c) - c_i). Losses: alpha * sum_i f_i P_i
with f_i the share of assignments (times E) and P_i the mean normalised score, over each sequence,
over the microbatch, or with f of the whole global batch. The last takes the counts of the *previous*
global batch, which the bias update has summed already: no collective in the forward, and the same
value under every layout and schedule.
Legend: B sequences, S positions, E experts, K chosen experts.
"""

import math

import torch
from torch import Tensor

from moe.config import BalanceConfig
from parallel.collectives import Group, all_reduce


def auxiliary_loss(
    balance: BalanceConfig,
    scores: Tensor,
    chosen: Tensor,
    valid: Tensor,
    last_counts: Tensor,
    group: Group = None,
) -> Tensor:
    """The weighted sum of the losses switched on, a scalar in fp32; 0 when none is.

    `scores` [B, S, E], `chosen` [B, S, K] without the bias, `valid` [B, S], `last_counts` [E] of the
    global batch before. Padding is left out. Where sequences are cut over `group`, the results of its
    ranks are summands: f is of whole sequences, P of this rank's positions.
    """
    num_experts, top_k = scores.shape[-1], chosen.shape[-1]
    hits = torch.zeros_like(scores).scatter_(2, chosen, 1.0) * valid[..., None]
    counted = torch.cat((hits.detach().sum(1), valid.sum(1, keepdim=True)), 1)
    counted = all_reduce(counted, group)  # small integers: exact in fp32
    hits_BE, tokens_B = counted[:, :-1], counted[:, -1].clamp_min(1)
    share = scores / scores.sum(-1, keepdim=True)
    share_BE = (share * valid[..., None]).sum(1)
    per_hit = num_experts / top_k
    total = scores.new_zeros(())
    if balance.sequence_aux:
        f_BE, p_BE = hits_BE * per_hit / tokens_B[:, None], share_BE / tokens_B[:, None]
        total = total + balance.sequence_aux * (f_BE * p_BE).sum(-1).mean()
    tokens = counted[:, -1].sum().clamp_min(1)
    mean_E = share_BE.sum(0) / tokens
    if balance.microbatch_aux:
        f_E = hits_BE.sum(0) * per_hit / tokens
        total = total + balance.microbatch_aux * (f_E * mean_E).sum()
    if balance.global_aux:
        f_E = torch.ones_like(mean_E)
        if last_counts.any():
            f_E = last_counts * num_experts / last_counts.sum()
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
def update_bias(balance: BalanceConfig, bias: Tensor, counts: Tensor, rate: float) -> None:
    """Move the bias [E] by the counts [E] of the global batch, over every rank with distinct tokens."""
    if rate == 0.0:
        return
    # E times the distance from the mean, in integers: its sign without rounding.
    above = counts * len(counts) - counts.sum()
    bias.sub_(rate * above.sign().float())
    if balance.bias_center:
        bias.sub_(bias.mean())
    if balance.bias_clamp is not None:
        bias.clamp_(-balance.bias_clamp, balance.bias_clamp)
