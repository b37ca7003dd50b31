"""Choosing each token's experts: every gate DeepSeek released, in fp32.

V2: softmax over all experts, optionally the best groups by their *max*, top-k, weights as they are.
V3: sigmoid, groups by the *sum of their two best*, top-k of score + bias, weights of the unbiased
scores normalised to 1, times a factor (arXiv 2405.04434 and 2412.19437, as released). The bias
(2408.15664) decides only who is chosen, never the weight, and works with both.

What scores look like is told beside whom they choose: logits that grow without end, or a margin between
the chosen and the rest that shrinks to nothing, announce a router that will collapse.
Legend: T tokens, E experts, K chosen experts, G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.config import BalanceConfig, ModelConfig
from moe.model.balance import auxiliary_loss, update_bias
from parallel.collectives import Group
from parallel.linear import Linear, linear


@dataclass(frozen=True)
class Signals:
    """Of one microbatch. `sums` [4] in fp64, `logit_max` a scalar.

    The sums are of each token's mean squared logit; of its margin, the distance of its last chosen
    expert's score to the best one that it could have chosen too; of the tokens that have a margin; and of
    the assignments that go elsewhere than without the group limit.
    """

    sums: Tensor
    logit_max: Tensor


@dataclass(frozen=True)
class Routing:
    """Which experts were chosen. `experts_TK` is int64 and holds E where a token is padding."""

    experts_TK: Tensor
    counts_E: Tensor  # int64: assignments of valid tokens
    signals: Signals


class Router(nn.Module):
    """The gate of one layer, with the selection bias and the last global batch's counts."""

    bias: Tensor
    last_counts: Tensor

    def __init__(
        self,
        config: ModelConfig,
        balance: BalanceConfig,
        dtype: torch.dtype = torch.float32,
        group: Group = None,
    ) -> None:
        """`group`: the ranks that together hold whole sequences."""
        super().__init__()
        self.config, self.balance, self.group = config, balance, group
        self.projection = Linear(config.hidden_size, config.num_experts, dtype)
        self.register_buffer("bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.register_buffer("last_counts", torch.zeros(config.num_experts, dtype=torch.int64))

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Casting a model must not round the bias: it moves with the module but stays fp32."""
        bias = self.bias
        super()._apply(fn, recurse)
        self.bias = bias.to(self.bias.device)
        return self

    def forward(self, hidden: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """Route hidden states [B, S, D]; `valid` [B, S] is false on padding, which goes nowhere.

        Returns weights [T, K] in fp32, the auxiliary loss (a mean over the microbatch's sequences,
        coefficients applied; a summand where they are cut over `group`) and the routing.
        """
        config = self.config
        valid_T = valid.flatten()
        logits_TE = linear(hidden.flatten(0, 1).float(), self.projection.weight.float())
        scores_TE = logits_TE.softmax(-1) if config.score_function == "softmax" else logits_TE.sigmoid()
        with torch.no_grad():
            choice_TE = scores_TE if self.balance.bias == "none" else scores_TE + self.bias
            experts_TK = self.choose(choice_TE)
            limited_TE = self._group_limited(choice_TE)
        weights_TK = self._weights(scores_TE.gather(1, experts_TK))
        loss = self._auxiliary_loss(scores_TE.unflatten(0, valid.shape), valid)
        routed_TK = experts_TK.masked_fill(~valid_T[:, None], config.num_experts)
        counts_E = torch.bincount(routed_TK.flatten(), minlength=config.num_experts + 1)[:-1]
        signals = _observe(config, logits_TE, choice_TE, limited_TE, experts_TK, valid_T)
        return weights_TK, loss, Routing(routed_TK, counts_E, signals)

    def choose(self, choice_TE: Tensor) -> Tensor:
        """The chosen experts [T, K], in no order, by scores [T, E] that hold the bias where there is one."""
        config = self.config
        if choice_TE.is_cuda:
            from parallel.kernels.top_k import top_k_in_groups  # needs Triton

            best = 1 if config.group_score == "max" else 2
            return top_k_in_groups(choice_TE, config.top_k, config.num_groups, config.top_groups, best)
        return self._group_limited(choice_TE).topk(config.top_k, dim=-1, sorted=False).indices

    def _weights(self, chosen_TK: Tensor) -> Tensor:
        config = self.config
        if config.normalize_top_k:
            chosen_TK = chosen_TK / (chosen_TK.sum(-1, keepdim=True) + 1e-20)
            if (
                config.score_function == "softmax"
            ):  # V2's released gate scales only what it does not normalise
                return chosen_TK
        return chosen_TK * config.routed_scaling_factor

    def _group_limited(self, choice_TE: Tensor) -> Tensor:
        """Scores with every expert outside the best groups at -inf (biased scores go below 0)."""
        config = self.config
        if config.num_groups == 1:
            return choice_TE
        choice_TGe = choice_TE.unflatten(1, (config.num_groups, -1))
        if config.group_score == "max":
            group_TG = choice_TGe.amax(-1)
        else:
            group_TG = choice_TGe.topk(2, dim=-1).values.sum(-1)
        kept_Tg = group_TG.topk(config.top_groups, dim=-1, sorted=False).indices
        dropped_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, kept_Tg, False)
        return choice_TGe.masked_fill(dropped_TG[:, :, None], -torch.inf).flatten(1)

    def _auxiliary_loss(self, scores: Tensor, valid: Tensor) -> Tensor:
        balance = self.balance
        if not (balance.sequence_aux or balance.microbatch_aux or balance.global_aux):
            return scores.new_zeros(())
        chosen = self.unbiased_choice(scores)
        return auxiliary_loss(balance, scores, chosen, valid, self.last_counts, self.group)

    def update(self, counts: Tensor, rate: float) -> None:
        """Take a global batch's counts [E]: the bias moves at this rate, the global loss uses them next."""
        self.last_counts.copy_(counts)
        update_bias(self.balance, self.bias, counts, rate)

    def unbiased_choice(self, scores: Tensor) -> Tensor:
        """Top-k experts [B, S, K] of scores [B, S, E] as the auxiliary losses count them.

        V3's report takes the top-k of the bare scores over all experts; V2's released code counts
        the selection itself, group limit included.
        """
        flat_TE = scores.flatten(0, 1)
        if self.config.score_function == "softmax":
            flat_TE = self._group_limited(flat_TE)
        return flat_TE.topk(self.config.top_k, dim=-1, sorted=False).indices.unflatten(0, scores.shape[:2])


@torch.no_grad()
def _observe(
    config: ModelConfig,
    logits_TE: Tensor,
    choice_TE: Tensor,
    limited_TE: Tensor,
    experts_TK: Tensor,
    valid_T: Tensor,
) -> Signals:
    """`choice_TE` are the scores that choose, `limited_TE` the same with -inf outside the best groups."""
    logits_TE = logits_TE * valid_T[:, None]
    square_T = logits_TE.square().mean(-1)
    last_T = limited_TE.gather(1, experts_TK).amin(-1)
    margin_T = last_T - limited_TE.scatter(1, experts_TK, -torch.inf).amax(-1)
    has_margin_T = margin_T.isfinite() & valid_T
    moved = torch.zeros_like(square_T)
    if config.num_groups > 1:
        free_TK = choice_TE.topk(config.top_k, dim=-1, sorted=False).indices
        chosen_TE = torch.zeros_like(choice_TE, dtype=torch.bool).scatter_(1, experts_TK, True)
        moved = (~chosen_TE.gather(1, free_TK)).sum(-1) * valid_T
    sums = (square_T, margin_T.where(has_margin_T, 0.0), has_margin_T, moved)
    return Signals(
        torch.stack([each.sum(dtype=torch.float64) for each in sums]),
        logits_TE.abs().amax() if logits_TE.numel() else logits_TE.new_zeros(()),
    )
