"""torchtitan's MoE layer (0.3.0), as a contestant of `bench layer`.

Its experts compute in bf16 whatever the weights are, so an fp32 row of it is no fp32 result. It has three
weights for an expert, of which gate and up are copies of the case's.
"""

import torch
from torch import Tensor
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

from launch.bench.case import Case, Weights
from launch.bench.peers import Layer, Place, halves, unfilled


def torchtitan(case: Case) -> Layer:
    """The layer without its selection bias."""
    module = unfilled(lambda: MoE(_config(case)), case)
    assert isinstance(module, MoE)
    module.tokens_per_expert_E = torch.zeros(case.shape.experts, device=case.hidden.device)
    experts, shared, width = module.routed_experts.inner_experts, module.shared_experts, case.shape.width

    def gates(weights: Weights) -> Tensor:
        return weights.gate_up[:, :width]

    def ups(weights: Weights) -> Tensor:
        return weights.gate_up[:, width:]

    places: list[Place] = [
        (module.router.gate.weight, lambda w: w.router),
        (experts.w1_EFD, gates),
        (experts.w3_EFD, ups),
        (experts.w2_EDF, lambda w: w.down),
        *halves(shared.w1, shared.w3, shared.w2),
    ]
    return Layer("torchtitan", module, places, case)


def _config(case: Case) -> MoE.Config:
    shape = case.shape
    width = shape.shared * shape.width

    def product(inputs: int, outputs: int) -> Linear.Config:
        return Linear.Config(in_features=inputs, out_features=outputs)

    return MoE.Config(
        num_experts=shape.experts,
        load_balance_coeff=None,
        router=TokenChoiceTopKRouter.Config(
            num_experts=shape.experts,
            gate=product(shape.hidden, shape.experts),
            top_k=shape.top_k,
            score_func="softmax",
        ),
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(
                dim=shape.hidden, hidden_dim=shape.width, num_experts=shape.experts
            ),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=shape.experts, top_k=shape.top_k),
        ),
        shared_experts=FeedForward.Config(
            w1=product(shape.hidden, width), w2=product(width, shape.hidden), w3=product(shape.hidden, width)
        ),
    )
