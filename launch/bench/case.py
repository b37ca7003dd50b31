"""What every contestant of `bench layer` computes: one shape, the same weights, and a routing that is forced.

No library is patched for it. The first E numbers of a hidden state are +1 where an expert is wanted and
-1 elsewhere, and the router's weight leads on its diagonal, so that every router chooses just those. Beside
forced balance and forced skew stands what a fresh router chooses by itself from random hidden states.
Legend: T tokens, K chosen experts, E experts, D hidden size, F expert width, s shared experts.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from moe.config import BalanceConfig, ModelConfig
from parallel.errors import UserError

FORCED = ("balanced", "zipf")
AS_ROUTED = "as routed"
PLAIN_GATE = BalanceConfig(bias="none")  # and no auxiliary loss: not every contestant has them
_LEAD = 8.0  # a wanted expert's logit is about this, another's about minus this


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a layer and of its input; DeepSeek-V2-Lite's ratios unless told otherwise."""

    tokens: int = 4096
    hidden: int = 1024
    experts: int = 64
    width: int = 512
    top_k: int = 6
    shared: int = 2

    def __post_init__(self) -> None:
        if self.top_k > self.experts:
            raise UserError(
                f"`--top-k` must be at most `--experts`, but {self.top_k} is more than {self.experts}: "
                f"use at most {self.experts}"
            )
        if self.experts > self.hidden:
            raise UserError(
                "`--hidden` must be at least `--experts`, since hidden states say whom to choose, but "
                f"{self.hidden} is less than {self.experts}: use at least {self.experts}"
            )

    @property
    def model(self) -> ModelConfig:
        """A model of such layers, with V2-Lite's gate: softmax, greedy, weights as they are."""
        return ModelConfig(
            hidden_size=self.hidden,
            num_experts=self.experts,
            moe_intermediate_size=self.width,
            top_k=self.top_k,
            num_shared_experts=self.shared,
            score_function="softmax",
            group_score="max",
            normalize_top_k=False,
        )

    @property
    def flops(self) -> int:
        """Of a forward and backward: the products with weights and nothing else."""
        per_token = self.experts + 3 * self.width * (self.top_k + self.shared)
        return 3 * 2 * self.tokens * self.hidden * per_token


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A layer's weights, or their gradients. All shared experts are one of width s F; gate rows first."""

    router: Tensor  # [E, D]
    gate_up: Tensor  # [E, 2F, D]
    down: Tensor  # [E, D, F]
    shared_gate_up: Tensor  # [2sF, D]
    shared_down: Tensor  # [D, sF]

    def zeros(self) -> "Weights":
        """The same shapes in fp32, all 0."""
        return Weights(
            **{
                each.name: torch.zeros_like(getattr(self, each.name), dtype=torch.float32)
                for each in fields(self)
            }
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer's input and weights in one dtype."""

    shape: Shape
    routing: str
    weights: Weights
    hidden: Tensor  # [1, T, D], wants a gradient
    grad: Tensor  # [1, T, D], of the layer's output

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and hidden states; every router computes in fp32."""
        return self.hidden.dtype

    @cached_property
    def experts_TK(self) -> Tensor:
        """Whom a router chooses, in no order."""
        logits_TE = self.hidden.detach()[0].float() @ self.weights.router.float().t()
        return logits_TE.topk(self.shape.top_k, dim=-1).indices

    @cached_property
    def counts(self) -> list[int]:
        """Rows of each expert."""
        return torch.bincount(self.experts_TK.flatten(), minlength=self.shape.experts).tolist()

    @property
    def load(self) -> float:
        """Rows of the busiest expert over the mean."""
        return max(self.counts) * self.shape.experts / sum(self.counts)


def make_case(shape: Shape, routing: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Case:
    """Random weights of such size that every product keeps that of its rows; the same for every dtype."""
    stream = torch.Generator().manual_seed(seed)
    num_experts, hidden, width = shape.experts, shape.hidden, shape.width

    def draw(*sizes: int, std: float = 1.0) -> Tensor:
        return torch.randn(*sizes, generator=stream) * std

    router, states = draw(num_experts, hidden, std=0.02), draw(1, shape.tokens, hidden)
    if routing != AS_ROUTED:
        wanted_TK = assignment(shape.tokens, num_experts, shape.top_k, routing, stream)
        router[:, :num_experts] += _LEAD * torch.eye(num_experts)
        states[0, :, :num_experts] = -1.0
        states[0, :, :num_experts].scatter_(1, wanted_TK, 1.0)
    weights = Weights(
        router=router,
        gate_up=draw(num_experts, 2 * width, hidden, std=hidden**-0.5),
        down=draw(num_experts, hidden, width, std=width**-0.5),
        shared_gate_up=draw(2 * shape.shared * width, hidden, std=hidden**-0.5),
        shared_down=draw(hidden, shape.shared * width, std=(shape.shared * width) ** -0.5),
    )
    moved = {each.name: getattr(weights, each.name).to(device, dtype) for each in fields(weights)}
    case = Case(
        shape=shape,
        routing=routing,
        weights=replace(weights, **moved),
        hidden=states.to(device, dtype).requires_grad_(),
        grad=draw(1, shape.tokens, hidden).to(device, dtype),
    )
    if routing != AS_ROUTED:
        assert torch.equal(case.experts_TK.sort().values.cpu(), wanted_TK.sort().values), "routing not forced"
    return case


def assignment(tokens: int, num_experts: int, top_k: int, routing: str, stream: torch.Generator) -> Tensor:
    """The experts [T, K] of every token, all different: in turn, or drawn with weights 1, 1/2, 1/3, ..."""
    seats = torch.randperm(num_experts, generator=stream)
    if routing == "balanced":
        slots = torch.randperm(tokens, generator=stream)[:, None] * top_k
        return seats[(slots + torch.arange(top_k)) % num_experts]
    assert routing == "zipf", routing
    uniform = torch.rand(tokens, num_experts, generator=stream, dtype=torch.float64)
    gumbel = -(-uniform.clamp_min(1e-300).log()).log()  # the K greatest are K draws without putting back
    keys = gumbel - torch.arange(1, num_experts + 1, dtype=torch.float64).log()
    return seats[keys.topk(top_k).indices]
