"""Proving a layout: the same steps on one rank and under it, compared tensor by tensor.

One rank alone trains a few steps and leaves every gradient, loss, count and bias in a folder; then all
ranks train the same global batches under the layout, cut into the same microbatches, and each compares
what it owns. ZeRO's shards hold every element of the model once, so the sums of squared differences over
all ranks are those of whole canonical tensors. A gradient's difference is |found - expected| / |expected|
(2-norms over one canonical tensor), a number's is relative, counts and biases must be equal.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moe.config import LayoutConfig, RunConfig
from moe.data.loader import Loader
from moe.train.step import StepResult, Trainer, make_trainer, read_batches
from parallel.collectives import all_reduce
from parallel.groups import Groups, single
from parallel.shards import Piece, pieces


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a layout is from one rank after a step (1-based). Same on every rank."""

    step: int
    loss_diff: float
    auxiliary_loss_diff: float
    grad_norm_diff: float
    worst_gradient_diff: float
    worst_gradient_name: str
    counts_equal: bool
    bias_equal: bool
    first_beyond: str  # the first tensor, in the model's order, beyond the bound; "" where there is none
    first_beyond_rank: int  # the rank that holds most of that difference; -1 where there is none
    first_unequal_layer: str  # the first layer whose counts or bias differ; "" where none does

    def passes(self, bound: float) -> bool:
        """Whether everything is within the bound, and what must be equal is."""
        worst = max(self.loss_diff, self.auxiliary_loss_diff, self.grad_norm_diff, self.worst_gradient_diff)
        return worst <= bound and self.counts_equal and self.bias_equal


def record(config: RunConfig, loader: Loader, num_steps: int, parts: int, folder: Path) -> None:
    """Train on this rank alone, the global batch in `parts` microbatches; leave what happened in a folder."""
    layout = LayoutConfig(microbatches=parts, overlap=config.layout.overlap)
    alone = replace(config, layout=layout, train=replace(config.train, recompute="none"))
    for step, trainer, result in _train(alone, single(), loader, num_steps):
        folder.mkdir(parents=True, exist_ok=True)
        gradients = {piece.name: piece.tensor for piece in _gradients(trainer)}
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in gradients.items()}, _file(folder, step)
        )
        (folder / f"step-{step}.json").write_text(json.dumps(_facts(result) | {"order": list(gradients)}))


def compare(
    config: RunConfig, groups: Groups, loader: Loader, num_steps: int, bound: float, folder: Path
) -> Iterator[Difference]:
    """Train the same steps under a layout; its difference after each. Every rank must call."""
    for step, trainer, result in _train(config, groups, loader, num_steps):
        expected = json.loads((folder / f"step-{step}.json").read_text())
        found = _facts(result)
        unequal = [
            layer
            for layer in expected["counts"]
            if any(expected[kind][layer] != found[kind][layer] for kind in ("counts", "bias"))
        ]
        order: list[str] = expected["order"]
        yield Difference(
            step=step,
            loss_diff=max(_relative(found[key], expected[key]) for key in ("loss", "mtp_loss")),
            auxiliary_loss_diff=_relative(found["auxiliary_loss"], expected["auxiliary_loss"]),
            grad_norm_diff=_relative(found["grad_norm"], expected["grad_norm"]),
            counts_equal=found["counts"] == expected["counts"],
            bias_equal=found["bias"] == expected["bias"],
            first_unequal_layer=unequal[0] if unequal else "",
            **_compare_gradients(trainer, order, bound, _file(folder, step)),
        )


def _compare_gradients(trainer: Trainer, order: list[str], bound: float, file: Path) -> dict[str, Any]:
    """Squared distances and sizes of canonical tensors, summed over ranks, and what they say."""
    groups, device = trainer.groups, trainer.zero.device
    places = {name: index for index, name in enumerate(order)}
    squares = torch.zeros(2, groups.layout.world_size, len(order), dtype=torch.float64, device=device)
    with safe_open(file, framework="pt") as stored:
        for piece in _gradients(trainer):
            expected = stored.get_slice(piece.name)[piece.place].to(device).double()
            cell = groups.rank, places[piece.name]
            squares[0, *cell] += (piece.tensor.double() - expected).square().sum()
            squares[1, *cell] += expected.square().sum()
    distances, sizes = all_reduce(squares, groups.world).cpu()
    differences = (distances.sum(0) / sizes.sum(0)).sqrt()
    differences[distances.sum(0) == 0] = 0.0  # also where nothing was expected, and nothing found
    worst = int(differences.argmax())
    beyond = (~(differences <= bound)).nonzero().flatten().tolist()  # what is no number is beyond
    return {
        "worst_gradient_diff": float(differences[worst]),
        "worst_gradient_name": order[worst],
        "first_beyond": order[beyond[0]] if beyond else "",
        "first_beyond_rank": int(distances[:, beyond[0]].argmax()) if beyond else -1,
    }


def _train(
    config: RunConfig, groups: Groups, loader: Loader, num_steps: int
) -> Iterator[tuple[int, Trainer, StepResult]]:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    trainer = make_trainer(config, groups, 1, torch.device(device))
    for step in range(num_steps):
        first = step * config.train.batch_size
        batches = [batch.to(trainer.zero.device) for batch in read_batches(loader, config, groups, first)]
        yield step + 1, trainer, trainer.step(step, batches, count_domains=False)
    trainer.zero.arrive_all()


def _gradients(trainer: Trainer) -> Iterator[Piece]:
    """The reduced gradient of what this rank owns."""
    for segment in trainer.zero.segments():
        yield from pieces(segment.name, segment.parameter, segment.grad, segment.begin)


def _facts(result: StepResult) -> dict[str, Any]:
    facts = {name: value for name, value in vars(result).items() if name != "layers"}
    facts["counts"] = {name: layer.counts.tolist() for name, layer in result.layers.items()}
    facts["bias"] = {name: layer.bias.tolist() for name, layer in result.layers.items()}
    return facts


def _relative(found: float, expected: float) -> float:
    return 0.0 if found == expected else abs(found - expected) / max(abs(expected), 1e-30)


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step}.safetensors"
