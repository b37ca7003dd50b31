"""Layouts that agree with one rank, and what is said of those that are broken on purpose."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.config import LayoutConfig, RunConfig
from moe.data.corpus import prepare
from moe.data.loader import Loader
from moe.model.transformer import Outcome
from moe.rules import validate
from moe.train import proof
from moe.train import step as step_module
from moe.train.step import StepResult, Trainer
from moe.train.world import groups_of
from parallel.shards import Piece
from parallel.zero import Zero, _Bucket
from tests.ranks import run_ranks
from tests.small import small_run

CPU = torch.device("cpu")
STEPS, PARTS = 2, 4


def loader_of(config: RunConfig) -> Loader:
    corpus = prepare(config.data, config.model.vocab_size)
    return Loader(corpus.train, sequence_length=32, seed=1, mask_documents=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_run(tmp_path_factory.mktemp("proof"), num_mtp_layers=1)


@pytest.fixture(scope="module")
def alone(base: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank did."""
    folder = tmp_path_factory.mktemp("alone") / "steps"
    proof.record(base, loader_of(base), STEPS, PARTS, folder, CPU)
    return folder


def on_ranks(
    rank: int, world_size: int, config: RunConfig, folder: Path, breakage: str
) -> list[proof.Difference]:
    layout = validate(config, world_size)
    with BREAKAGES[breakage](rank), groups_of(layout) as groups:
        return list(proof.compare(config, groups, loader_of(config), STEPS, folder, CPU))


def differences(base: RunConfig, folder: Path, layout: LayoutConfig, breakage: str = "none") -> Any:
    """What every rank found, which is the same."""
    dp = layout.dp or 1
    config = replace(base, layout=replace(layout, microbatches=PARTS // dp))
    first, *others = run_ranks(dp * layout.tp * layout.cp, on_ranks, config, folder, breakage)
    assert all(str(other) == str(first) for other in others)  # as text: what is no number equals nothing
    return first


@contextmanager
def changed(owner: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    with patch.object(owner, name, change(getattr(owner, name))):
        yield


def scale_experts(rank: int) -> Any:
    """As in a well-known defect: expert gradients are divided by the ranks of their group."""

    def change(finish: Callable[[Zero], None]) -> Callable[[Zero], None]:
        def broken(self: Zero) -> None:
            finish(self)
            for segment in self.segments():
                if "experts." in segment.name:
                    segment.grad.div_(2)

        return broken

    return changed(Zero, "finish_reduce", change)


def skip_a_reduction(rank: int) -> Any:
    """The whole parameters of layer 2 keep each rank's own gradient."""

    def change(start: Callable[[_Bucket], None]) -> Callable[[_Bucket], None]:
        def broken(self: _Bucket) -> None:
            name = self._named[0][0]
            if name.startswith("layers.2.") and "experts." not in name:
                replicas, self._replicas = self._replicas, None
                start(self)
                self._replicas = replicas
                assert self._reduction is not None
                self._reduction = replace(self._reduction, received=self.grad)
            else:
                start(self)

        return broken

    return changed(_Bucket, "start_reduce", change)


def spoil_on_rank_1(rank: int) -> Any:
    """Rank 1 alone adds a little to what it owns of the embedding."""

    def change(finish: Callable[[Zero], None]) -> Callable[[Zero], None]:
        def broken(self: Zero) -> None:
            finish(self)
            for segment in self.segments():
                if rank == 1 and segment.name == "embedding.weight":
                    segment.grad.mul_(1 + 1e-4)

        return broken

    return changed(Zero, "finish_reduce", change)


def no_number(rank: int) -> Any:
    """A gradient that is no number, which every comparison calls neither greater nor less."""

    def change(finish: Callable[[Zero], None]) -> Callable[[Zero], None]:
        def broken(self: Zero) -> None:
            finish(self)
            for segment in self.segments():
                if rank == 1 and segment.name.startswith("layers.0."):
                    segment.grad[0] = torch.nan

        return broken

    return changed(Zero, "finish_reduce", change)


def change_results(**settings: Callable[[float], float]) -> Callable[[int], Any]:
    def change(step: Callable[..., StepResult]) -> Callable[..., StepResult]:
        def broken(*args: Any, **named: Any) -> StepResult:
            result = step(*args, **named)
            return replace(result, **{name: new(getattr(result, name)) for name, new in settings.items()})

        return broken

    return lambda rank: changed(Trainer, "step", change)


def count_twice(rank: int) -> Any:
    """The norm is of twice the gradients, and all are clipped by it."""
    return changed(
        Zero,
        "norms",
        lambda norms: lambda *given: {kind: 2 * norm for kind, norm in norms(*given).items()},
    )


def forget_counts(rank: int) -> Any:
    """Rank 1 does not count its tokens in the MTP module."""

    def change(add_up: Callable[..., Any]) -> Callable[..., Any]:
        def broken(outcomes: list[Outcome], *rest: Any) -> Any:
            if rank == 1:
                outcomes = [
                    replace(each, loads={name: load for name, load in each.loads.items() if name != "mtp0"})
                    for each in outcomes
                ]
            return add_up(outcomes, *rest)

        return broken

    return changed(step_module, "add_up", change)


def hold_less(rank: int) -> Any:
    """A tensor that no rank owns has no difference anywhere."""

    def change(gradients: Callable[..., Iterator[Piece]]) -> Callable[..., Iterator[Piece]]:
        return lambda trainer: (p for p in gradients(trainer) if p.name != "layers.1.mlp_norm.weight")

    return changed(proof, "_gradients", change)


def forget_to_move_the_bias(rank: int) -> Any:
    return changed(Trainer, "_settle_load", lambda settle: frozen(settle))


def frozen(settle: Callable[..., Any]) -> Callable[..., Any]:
    def broken(self: Trainer, *args: Any) -> Any:
        with patch("moe.train.step.bias_rate", lambda *_: 0.0):
            return settle(self, *args)

    return broken


@contextmanager
def nothing(rank: int) -> Iterator[None]:
    yield


BREAKAGES: dict[str, Callable[[int], Any]] = {
    "none": nothing,
    "scale experts": scale_experts,
    "skip a reduction": skip_a_reduction,
    "spoil on rank 1": spoil_on_rank_1,
    "no number": no_number,
    "loss": change_results(loss=lambda value: value * (1 + 2e-5)),
    "mtp loss": change_results(mtp_loss=lambda value: value * 2),
    "auxiliary loss": change_results(auxiliary_loss=lambda value: value * 2),
    "norm": count_twice,
    "forget counts": forget_counts,
    "forget the bias": forget_to_move_the_bias,
    "hold less": hold_less,
}


@pytest.mark.parametrize(
    "layout",
    [LayoutConfig(dp=2, ep=2), LayoutConfig(tp=2, dp=2, ep=2, etp=2), LayoutConfig(cp=2, tp=2, ep=4)],
    ids=["ep", "tp etp", "cp tp ep"],
)
def test_layouts_agree(base: RunConfig, alone: Path, layout: LayoutConfig) -> None:
    found = differences(base, alone, layout)
    assert [difference.step for difference in found] == [1, 2]
    for difference in found:
        assert difference.passed and list(difference.failures()) == []
        assert difference.counts_equal and difference.bias_equal
    assert 0 < found[0].worst_gradient_diff < 5e-6  # another order of adding, and no more


@pytest.mark.parametrize(
    ("breakage", "sentences"),
    [
        (
            "scale experts",
            [
                r"the gradient norm differs by \d.\de-\d\d",
                r"the gradient of layers.1.moe.experts.0.gate_up.weight \(layer 1\) differs, "
                r"most of it on rank 0",
            ],
        ),
        (
            "skip a reduction",
            [
                r"the gradient norm differs by \d.\de-\d\d",
                r"the gradient of layers.2.\w+.* \(layer 2\) differs, most of it on rank [01]",
            ],
        ),
        (
            "spoil on rank 1",
            [
                r"the gradient norm differs by \d.\de-\d\d",
                r"the gradient of embedding.weight \(outside the layers\) differs, most of it on rank 1",
            ],
        ),
        ("loss", [r"the loss differs by 2.0e-05"]),
        ("mtp loss", [r"the loss differs by 1.0e\+00"]),
        ("auxiliary loss", [r"the auxiliary loss differs by 1.0e\+00"]),
        ("norm", [r"the gradient norm differs by 1.0e\+00"]),
        ("forget counts", [r"the counts( and bias)? of layer mtp0 differ"]),
        ("forget the bias", [r"the bias of layer 1 differ"]),
        (
            "hold less",
            [r"the gradient of layers.1.mlp_norm.weight \(layer 1\) is not held exactly once"],
        ),
    ],
)
def test_a_defect_is_found_and_named(
    base: RunConfig, alone: Path, breakage: str, sentences: list[str]
) -> None:
    first = differences(base, alone, LayoutConfig(dp=2, ep=2), breakage)[0]
    assert not first.passed
    found = list(first.failures())
    assert len(found) == len(sentences), found
    for sentence, expected in zip(found, sentences, strict=True):
        assert re.fullmatch(expected, sentence), sentence


def test_what_is_no_number_agrees_with_nothing(base: RunConfig, alone: Path) -> None:
    first = differences(base, alone, LayoutConfig(dp=2), "no number")[0]
    assert not first.passed
    assert first.first_beyond_rank == 1
    assert str(first.worst_gradient_diff) == str(first.grad_norm_diff) == "nan"


def test_gradients_may_part_after_the_first_step_and_nothing_else() -> None:
    kept = {
        "loss_diff": 1e-6,
        "auxiliary_loss_diff": 1e-6,
        "grad_norm_diff": 1e-6,
        "worst_gradient_name": "head",
        "counts_equal": True,
        "bias_equal": True,
        "ties": 3,
        "first_beyond": "",
        "first_beyond_rank": -1,
        "first_unequal_layer": "",
    }
    difference = proof.Difference(step=2, worst_gradient_diff=5e-4, **kept)
    assert difference.passed
    assert [proof.gradient_bound(step) for step in (1, 2, 3)] == [1e-5, 1e-3, 1e-3]
    for name in ("loss_diff", "auxiliary_loss_diff", "grad_norm_diff"):
        assert not replace(difference, **{name: 2e-5}).passed
        assert not replace(difference, **{name: float("nan")}).passed


def test_a_choice_that_was_recorded_is_followed_where_it_was_made(
    base: RunConfig, alone: Path, tmp_path: Path
) -> None:
    """One token's recorded experts are others, as if there had been a tie: whoever holds it takes them."""
    for step in (1, 2):
        tensors = load_file(alone / f"step-{step}.safetensors")
        experts = tensors["choice/2/choose/3/experts"]
        token = 2 * 32 - 5 if step == 1 else 7  # the second sequence of the last microbatch, near its end
        experts[token, 0] = next(e for e in range(8) if e not in experts[token])
        save_file(tensors, tmp_path / f"step-{step}.safetensors")
        (tmp_path / f"step-{step}.json").write_text((alone / f"step-{step}.json").read_text())
    for layout in (LayoutConfig(dp=2, tp=2), LayoutConfig(cp=2, ep=2)):
        first = differences(base, tmp_path, layout)[0]
        assert first.ties == 1
        assert not first.counts_equal and first.first_unequal_layer == "2"


def test_place_of() -> None:
    names = ("layers.12.mlp.down.weight", "mtp.0.norm.weight", "head", "embedding.weight")
    assert list(map(proof.place_of, names)) == ["layer 12", "MTP module 0", *["outside the layers"] * 2]
