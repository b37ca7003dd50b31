"""What kind of part a parameter belongs to: what may be frozen, adapted or clipped by itself. No torch."""

from moe.config import Component

# a part of a parameter's name, and what it belongs to; the first that fits
_WITHIN: tuple[tuple[str, Component], ...] = (
    ("norm", "norm"),
    ("attention.", "attention"),
    ("moe.router.", "router"),
    ("moe.experts.", "experts"),
    ("moe.shared.", "shared"),
    ("mlp.", "dense"),
)


def component_of(name: str) -> Component:
    """The component of a parameter by its name in the model; an MTP module's own projection is `mtp`."""
    if name in ("head", "embedding.weight"):
        return "head" if name == "head" else "embedding"
    for part, component in _WITHIN:
        if part in name:
            return component
    return "mtp"
