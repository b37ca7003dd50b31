"""Which layers a pipeline stage holds. No torch.

Stages may be uneven, may hold no layer of experts, and may hold no layer at all.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Layers of one stage; the first embeds tokens, the last has norm, head and MTP modules."""

    layers: range
    first: bool
    last: bool


def split(num_layers: int, num_stages: int) -> tuple[Part, ...]:
    """Layers in order, shared out evenly; what is left goes to the first stages: the last has the head."""
    even, left = divmod(num_layers, num_stages)
    begins = [stage * even + min(stage, left) for stage in range(num_stages + 1)]
    return tuple(
        Part(range(begins[stage], begins[stage + 1]), stage == 0, stage == num_stages - 1)
        for stage in range(num_stages)
    )


def whole(num_layers: int) -> Part:
    """All of a model on one stage."""
    return split(num_layers, 1)[0]
