"""What kind of part a parameter belongs to: what may be frozen, adapted or clipped by itself. No torch."""

from moe.config import Component, ModelConfig

ADAPTABLE: tuple[Component, ...] = ("attention", "dense", "shared", "experts", "head")  # what may have LoRA

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
    if name == "head" or name.startswith("head_lora."):
        return "head"
    if name == "embedding.weight":
        return "embedding"
    for part, component in _WITHIN:
        if part in name:
            return component
    return "mtp"


def components(model: ModelConfig) -> set[Component]:
    """What a model has; a tied head is its embedding."""
    found: set[Component] = {"embedding", "attention", "norm"}
    if model.num_dense_layers:
        found.add("dense")
    if model.num_dense_layers < model.num_layers or model.num_mtp_layers:
        found |= {"router", "experts"}
        if model.num_shared_experts:
            found.add("shared")
    if model.num_mtp_layers:
        found.add("mtp")
    return found if model.tie_embeddings else found | {"head"}
