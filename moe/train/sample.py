"""Continuing a prompt, to see what a model has learnt. Every rank computes the same text."""

import torch
from torch import Tensor

from moe.model.transformer import Microbatch, positions_of
from moe.train.engine import Engine
from parallel.collectives import all_reduce
from parallel.layout import length_multiple


def sample(
    engine: Engine,
    prompt: list[int],
    num_tokens: int,
    *,
    context: int,
    seed: int,
    temperature: float = 0.7,
    stop: int | None = None,
) -> list[int]:
    """Prompt ids followed by `num_tokens` more, or fewer where `stop` comes, which is left out.

    Temperature 0 takes the likeliest. Every rank must call, with the same arguments.
    """
    stream = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        logits = next_logits(engine, tokens[-context:]).cpu()
        if temperature == 0:
            chosen = int(logits.argmax())
        else:
            chosen = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=stream))
        if chosen == stop:
            break
        tokens.append(chosen)
    return tokens


def next_logits(engine: Engine, tokens: list[int]) -> Tensor:
    """Logits [V] in fp32 of the token after these, the same on every rank. Every rank must call."""
    groups, config = engine.groups, engine.model.config
    multiple = length_multiple(groups.layout.cp, groups.layout.tp)
    length = -(-len(tokens) // multiple) * multiple
    padded = torch.tensor([tokens + [0] * (length - len(tokens))], device=engine.device)
    valid = torch.arange(length, device=engine.device)[None] < len(tokens)
    (outcome,) = engine.forward([Microbatch(tokens=padded, labels=None, valid=valid)])
    found = torch.zeros(config.vocab_size, device=engine.device)
    if outcome.logits is not None and groups.index("dp") == 0:
        here = positions_of(length, groups).numbers() == len(tokens) - 1
        rows = outcome.logits[0, here].float()  # one row, or none where another rank holds the position
        width = rows.shape[1]
        found[groups.index("tp") * width :][:width] += rows.sum(0)
    return all_reduce(found, groups.world)
