"""What of a model is trained: which experts get stacks of their own, and what is frozen."""

from pathlib import Path

from moe.config import RunConfig
from moe.model.experts import Placement
from moe.model.transformer import Transformer, expert_layers
from moe.selection import Selection, read_selection, spread
from parallel.shards import pieces


def selection_of(config: RunConfig) -> Selection | None:
    """The experts that the settings train, where they train some only."""
    if config.tune.method != "esft":
        return None
    assert config.tune.selection is not None, "rules.py asks for one"
    return read_selection(Path(config.tune.selection), config.model)


def placements(config: RunConfig, ep: int) -> dict[str, Placement]:
    """Which experts live where, by layer; needed to make a model. Chosen ones are spread over the ranks."""
    selection = selection_of(config)
    if selection is None:
        return {}
    orders = spread(selection, expert_layers(config.model), config.model.num_experts, ep)
    return {
        layer: Placement(tuple(order), frozenset(selection.experts.get(layer, ())))
        for layer, order in orders.items()
    }


def prepare(model: Transformer, config: RunConfig) -> None:
    """Freeze what the settings do not train: it gets no gradient and no optimizer state."""
    selection = selection_of(config)
    if selection is not None:
        for name, parameter in model.named_parameters():
            held = pieces(name, parameter, parameter.detach().view(-1))
            trained = {selection.trains(piece.name) for piece in held}
            assert len(trained) <= 1, f"{name} is trained in part"
            parameter.requires_grad_(True in trained)
