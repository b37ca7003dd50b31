"""Continuing a prompt, to see what a model has learnt. Every rank computes the same text."""

import torch
from torch import Tensor

from moe.model.transformer import Transformer
from parallel.collectives import all_reduce
from parallel.groups import Groups


@torch.no_grad()
def sample(
    model: Transformer,
    prompt: list[int],
    num_tokens: int,
    groups: Groups,
    *,
    context: int,
    seed: int,
    temperature: float = 0.7,
) -> list[int]:
    """Prompt ids followed by `num_tokens` more. Every rank must call, with the same arguments."""
    device = model.embedding.weight.device
    stream = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        window = torch.tensor([tokens[-context:]], device=device)
        chances = (model(window)[0, -1].float().cpu() / temperature).softmax(-1)
        chosen = torch.multinomial(chances, 1, generator=stream).to(device)
        tokens.append(int(_from_first_rank(chosen, groups)))
    return tokens


def _from_first_rank(value: Tensor, groups: Groups) -> Tensor:
    """Ranks must not part ways over a rounding."""
    return all_reduce(value if groups.rank == 0 else torch.zeros_like(value), groups.dp)
