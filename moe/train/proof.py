"""Proving a layout: the same steps on one rank and under it, compared tensor by tensor.

One rank alone trains a few steps and leaves every gradient, loss, count and bias in a folder; then all
ranks train the same global batches under the layout, cut into the same microbatches, and each compares
what it owns. ZeRO's shards hold every element of the model once, so the sums of squared differences over
all ranks are those of whole canonical tensors. A gradient's difference is |found - expected| / |expected|
(2-norms over one canonical tensor), a number's is relative, counts and biases must be equal.
"""

import json
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moe.config import LayoutConfig, RunConfig
from moe.data.loader import Loader
from moe.train.engine import Switchyard
from moe.train.step import StepResult, Trainer, make_trainer, read_batches
from moe.train.ties import Following, Recording, tap
from parallel.collectives import all_reduce
from parallel.groups import Groups, single
from parallel.shards import Piece, pieces

BOUND = 1e-5  # of losses and norms at any step, and of gradients after the first
LATER_BOUND = 1e-3  # of gradients after later steps
BOUNDS = (
    f"losses and norm within {BOUND:g}; gradients within {BOUND:g} after step 1 and {LATER_BOUND:g} later, "
    "because AdamW makes whole updates of gradients that are nothing but rounding; counts and bias equal, "
    "where tokens whose scores agree within the same bounds take the experts that one rank chose (ties)"
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a layout is from one rank after a step (1-based). Same on every rank."""

    step: int
    loss_diff: float
    auxiliary_loss_diff: float
    grad_norm_diff: float
    worst_gradient_diff: float  # infinite where ranks together do not hold every element exactly once
    worst_gradient_name: str
    counts_equal: bool
    bias_equal: bool
    ties: int  # choices that rounding decided, and that were made as on one rank
    first_beyond: str  # the first tensor, in the model's order, beyond the bound; "" where there is none
    first_beyond_rank: int  # the rank that holds most of that difference; -1 where none does
    first_unequal_layer: str  # the first layer whose counts or bias differ; "" where none does

    @property
    def passed(self) -> bool:
        """Whether everything is within its bound, and what must be equal is."""
        return not list(self.failures())

    def failures(self) -> Iterator[str]:
        """What is wrong, a phrase each; where it can be told with the tensor, layer and rank."""
        numbers = {
            "loss": self.loss_diff,
            "auxiliary loss": self.auxiliary_loss_diff,
            "gradient norm": self.grad_norm_diff,
        }
        for name, value in numbers.items():
            if not value <= BOUND:  # what is no number is beyond
                yield f"the {name} differs by {value:.1e}"
        if self.first_beyond:
            how = f"differs, most of it on rank {self.first_beyond_rank}"
            if self.first_beyond_rank < 0:
                how = "is not held exactly once"
            yield f"the gradient of {self.first_beyond} ({place_of(self.first_beyond)}) {how}"
        unequal = [
            name for name, equal in (("counts", self.counts_equal), ("bias", self.bias_equal)) if not equal
        ]
        if unequal:
            yield f"the {' and '.join(unequal)} of layer {self.first_unequal_layer} differ"


def gradient_bound(step: int) -> float:
    """The greatest relative difference of a gradient after a step (1-based)."""
    return BOUND if step == 1 else LATER_BOUND


def place_of(name: str) -> str:
    """Where in the model a canonical tensor is: `layer 3`, `MTP module 0`, or `outside the layers`."""
    kind, number, *_ = f"{name}..".split(".")
    return {"layers": f"layer {number}", "mtp": f"MTP module {number}"}.get(kind, "outside the layers")


def record(
    config: RunConfig, loader: Loader, num_steps: int, parts: int, folder: Path, device: torch.device
) -> None:
    """Train on this rank alone, the global batch in `parts` microbatches; leave what happened in a folder."""
    layout = LayoutConfig(microbatches=parts)
    alone = replace(config, layout=layout, train=replace(config.train, recompute="none"))
    trainer = make_trainer(alone, single(), 1, device)
    recording = Recording()
    tap(trainer.model, recording)
    folder.mkdir(parents=True)
    for step in range(1, num_steps + 1):
        result = _step(trainer, loader, step)
        factor = _clipping(trainer, result)
        gradients = {piece.name: piece.tensor / factor for piece in _gradients(trainer)}
        tensors = gradients | {f"choice/{key}": choice for key, choice in recording.take().items()}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, _file(folder, step))
        facts = _facts(result) | {"order": list(gradients)}
        (folder / f"step-{step}.json").write_text(json.dumps(facts))


def compare(
    config: RunConfig, groups: Groups, loader: Loader, num_steps: int, folder: Path, device: torch.device
) -> Generator[Difference, None, None]:
    """Train the same steps under a layout; its difference after each. Every rank must call."""
    trainer = make_trainer(config, groups, 1, device)
    count = config.layout.microbatches
    own = range(groups.index("dp") * count, (groups.index("dp") + 1) * count)
    following = Following(groups, own, config.data.sequence_length)
    tap(trainer.model, following)
    try:
        for step in range(1, num_steps + 1):
            with safe_open(_file(folder, step), framework="pt") as stored:
                choices = [name for name in stored.keys() if name.startswith("choice/")]  # noqa: SIM118
                recorded = {name.removeprefix("choice/"): stored.get_tensor(name) for name in choices}
            following.begin(recorded, gradient_bound(step))
            result = _step(trainer, loader, step)
            yield _difference(trainer, result, following.ties, step, folder)
    finally:
        _own(trainer).close()


def _difference(trainer: Trainer, result: StepResult, ties: int, step: int, folder: Path) -> Difference:
    expected, found = json.loads((folder / f"step-{step}.json").read_text()), _facts(result)
    unequal = [
        layer
        for layer in expected["counts"]
        if any(expected[kind][layer] != found[kind][layer] for kind in ("counts", "bias"))
    ]
    all_ties = all_reduce(torch.tensor(ties, device=trainer.engine.device), trainer.groups.world)
    return Difference(
        step=step,
        loss_diff=max((_relative(found[key], expected[key]) for key in ("loss", "mtp_loss")), key=_badness),
        auxiliary_loss_diff=_relative(found["auxiliary_loss"], expected["auxiliary_loss"]),
        grad_norm_diff=_relative(found["grad_norm"], expected["grad_norm"]),
        counts_equal=found["counts"] == expected["counts"],
        bias_equal=found["bias"] == expected["bias"],
        ties=int(all_ties),
        first_unequal_layer=unequal[0] if unequal else "",
        **_compare_gradients(trainer, _clipping(trainer, result), expected["order"], step, folder),
    )


def _compare_gradients(
    trainer: Trainer, factor: float, order: list[str], step: int, folder: Path
) -> dict[str, Any]:
    """Squared distances and sizes of canonical tensors, summed over ranks, and what they say."""
    groups, device = trainer.groups, trainer.engine.device
    places = {name: index for index, name in enumerate(order)}
    sums = torch.zeros(3, groups.layout.world_size, len(order), dtype=torch.float64, device=device)
    with safe_open(_file(folder, step), framework="pt") as stored:
        for piece in _gradients(trainer):
            expected = stored.get_slice(piece.name)[piece.place].to(device).double()
            cell = groups.rank, places[piece.name]
            sums[0, *cell] += (piece.tensor.double() / factor - expected).square().sum()
            sums[1, *cell] += expected.square().sum()
            sums[2, *cell] += piece.tensor.numel()
        whole = [math.prod(stored.get_slice(name).get_shape()) for name in order]
    distances, sizes, held = all_reduce(sums, groups.world).cpu()
    differences = (distances.sum(0) / sizes.sum(0)).sqrt()
    differences[distances.sum(0) == 0] = 0.0  # also where nothing was expected, and nothing found
    differences[held.sum(0) != torch.tensor(whole)] = torch.inf
    worst = int(differences.argmax())  # what is no number counts as greatest
    beyond = (~(differences <= gradient_bound(step))).nonzero().flatten().tolist()
    off = distances[:, beyond[0]] if beyond else distances.new_zeros(1)
    return {
        "worst_gradient_diff": float(differences[worst]),
        "worst_gradient_name": order[worst],
        "first_beyond": order[beyond[0]] if beyond else "",
        "first_beyond_rank": int(off.argmax()) if off.any() else -1,
    }


def _step(trainer: Trainer, loader: Loader, step: int) -> StepResult:
    config = trainer.config
    first = (step - 1) * config.train.batch_size
    batches = [
        batch.to(trainer.engine.device) for batch in read_batches(loader, config, trainer.groups, first)
    ]
    return trainer.step(step - 1, batches)


def _clipping(trainer: Trainer, result: StepResult) -> float:
    """What the gradients were scaled by; undone, so that one wrong gradient does not make all differ."""
    limit = trainer.config.optim.clip_norm
    return limit / result.grad_norm if 0 < limit < result.grad_norm else 1.0


def _gradients(trainer: Trainer) -> Iterator[Piece]:
    """The reduced gradient of what this rank owns."""
    for segment in _own(trainer).zero.segments():
        yield from pieces(segment.name, segment.parameter, segment.grad, segment.begin)


def _own(trainer: Trainer) -> Switchyard:
    assert isinstance(trainer.engine, Switchyard), "another engine keeps no gradients to compare"
    return trainer.engine


def _facts(result: StepResult) -> dict[str, Any]:
    facts = {name: value for name, value in vars(result).items() if name != "layers"}
    facts["counts"] = {name: layer.counts.tolist() for name, layer in result.layers.items()}
    facts["bias"] = {name: layer.bias.tolist() for name, layer in result.layers.items()}
    return facts


def _relative(found: float, expected: float) -> float:
    return 0.0 if found == expected else abs(found - expected) / max(abs(expected), 1e-30)


def _badness(difference: float) -> float:
    return math.inf if math.isnan(difference) else difference


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step}.safetensors"
