"""The shapes that are measured, and how tokens are spread over experts.

A rank of expert parallelism receives rows from all ranks: T tokens on each of R ranks choose K of E experts,
and a rank with E / R of them gets T x K rows in the mean. Alone it is measured as a layer of those experts,
to which every row arrives as a token with one choice.
Legend: T tokens, K chosen experts, E experts.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from moe.config import ModelConfig
from moe.rules import build

_MODELS = Path(__file__).resolve().parents[3] / "recipes" / "model"
TOKENS = 4096  # of a sequence, and of a microbatch

ROUTINGS = ("balanced", "zipf", "as routed")


def released(name: str) -> ModelConfig:
    """A released model's shape, from `recipes/model/NAME.yaml`."""
    return build(ModelConfig, yaml.safe_load((_MODELS / f"{name}.yaml").read_text()))


@dataclass(frozen=True)
class ExpertShape:
    """Experts of one rank, and the rows they receive; `shared` beside them sees every token."""

    name: str
    config: ModelConfig
    tokens: int

    @property
    def rows(self) -> int:
        """Rows of all experts together."""
        return self.tokens * self.config.top_k

    @property
    def experts(self) -> int:
        """Experts of the rank."""
        return self.config.num_experts

    @property
    def hidden(self) -> int:
        """Width of a row."""
        return self.config.hidden_size

    @property
    def width(self) -> int:
        """Width of an expert."""
        return self.config.moe_intermediate_size

    @property
    def forward_flops(self) -> int:
        """Of the experts' and the shared experts' products."""
        return 6 * self.hidden * self.width * (self.rows + self.tokens * self.config.num_shared_experts)


def _received(config: ModelConfig, name: str, experts: int) -> ExpertShape:
    """What a rank with so many experts receives, as a layer of its own."""
    alone = replace(config, num_experts=experts, num_shared_experts=0, top_k=1, num_groups=1, top_groups=1)
    return ExpertShape(name, alone, TOKENS * config.top_k)


V2_LITE, V3 = released("deepseek_v2_lite"), released("deepseek_v3")
EXPERT_SHAPES = (
    ExpertShape("V2-Lite", V2_LITE, TOKENS),
    _received(V3, "V3, 4 experts of a rank at ep 64", 4),
    _received(V3, "V3, 32 experts of a rank at ep 8", 32),
)
_TINY = ModelConfig(hidden_size=32, moe_intermediate_size=16, num_experts=8, top_k=2)
TINY_SHAPES = (
    ExpertShape("tiny", _TINY, 24),
    ExpertShape("tiny, received", replace(_TINY, top_k=1, num_shared_experts=0), 24),
)


def balanced_counts(rows: int, experts: int) -> tuple[int, ...]:
    """Rows of each expert where they differ by one at most."""
    return tuple(rows // experts + (expert < rows % experts) for expert in range(experts))


def choices(routing: str, tokens: int, top_k: int, experts: int) -> Tensor:
    """Distinct experts [T, K] of each token: in turn, or drawn with probabilities as 1, 1/2, 1/3, ..."""
    if routing == "balanced":
        return torch.arange(tokens * top_k).view(tokens, top_k) % experts
    stream = torch.Generator().manual_seed(0)
    popularity = -torch.arange(1, experts + 1, dtype=torch.float64).log()
    noise = -(-torch.rand(tokens, experts, dtype=torch.float64, generator=stream).log()).log()
    return (popularity + noise).topk(top_k, dim=-1).indices  # Gumbel: draws without putting back
