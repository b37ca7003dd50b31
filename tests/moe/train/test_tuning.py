"""Training a part of a model: the same under every layout, nothing else moved, and nothing else paid for."""

from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

from moe.components import component_of
from moe.config import Component, LayoutConfig, RunConfig, TuneConfig
from moe.data.corpus import prepare
from moe.data.loader import Loader
from moe.hf.inventory import is_adapter
from moe.model import init
from moe.rules import validate
from moe.train import proof, state
from moe.train.state import Position
from moe.train.step import Trainer
from moe.train.tuning import trained_share
from moe.train.world import groups_of
from parallel.checkpoint import open_checkpoint
from parallel.saving import Saver
from parallel.shards import parameter_pieces
from tests.moe.train.test_step import steps, steps_from
from tests.ranks import run_ranks
from tests.reduced import ranks_of
from tests.small import small_run

CPU = torch.device("cpu")
PARTS = 4
LORA = TuneConfig(
    method="lora", lora_rank=4, lora_targets=("attention", "dense", "shared", "experts", "head")
)


def settings(folder: Path, tune: TuneConfig, **model: object) -> RunConfig:
    config = small_run(folder, **model)
    return replace(config, tune=tune, balance=replace(config.balance, bias="frozen"))


def random_adapters(module: nn.Module, seed: int) -> None:
    """Ways up that are not 0, so that all gradients are there from the first step on."""
    with torch.no_grad():
        adapters = (piece for piece in parameter_pieces(module) if is_adapter(piece.name))
        init._fill(adapters, seed, lambda shape, stream: torch.randn(shape, generator=stream) * 0.03)


def loader_of(config: RunConfig) -> Loader:
    corpus = prepare(config.data, config.model.vocab_size)
    return Loader(corpus.train, sequence_length=32, seed=1, mask_documents=False)


def compare(rank: int, world_size: int, config: RunConfig, folder: Path) -> list[proof.Difference]:
    with (
        patch("moe.train.tuning.init_adapters", random_adapters),
        groups_of(validate(config, world_size)) as groups,
    ):
        return list(proof.compare(config, groups, loader_of(config), 1, folder, CPU))


def assert_agrees(config: RunConfig, folder: Path, layout: LayoutConfig) -> None:
    """One step's loss, norm and every gradient are those of one rank, already recorded or not."""
    if not folder.exists():
        with patch("moe.train.tuning.init_adapters", random_adapters):
            proof.record(config, loader_of(config), 1, PARTS, folder, CPU)
    layout = replace(layout, microbatches=PARTS // (layout.dp or 1))
    (difference,) = run_ranks(ranks_of(layout), compare, replace(config, layout=layout), folder)[0]
    assert list(difference.failures()) == [], difference


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return settings(tmp_path_factory.mktemp("lora"), LORA, num_mtp_layers=1, q_lora_rank=12)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone") / "steps"


@pytest.mark.parametrize(
    "layout",
    [
        LayoutConfig(dp=2, ep=2),
        LayoutConfig(tp=2, dp=2, ep=2, etp=2),
        LayoutConfig(tp=2, cp=2, etp=2),
        LayoutConfig(tp=2, pp=2, etp=2, schedule="dualpipe"),
        LayoutConfig(pp=2, schedule="zb-h1"),
    ],
    ids=["ep2", "tp2·dp2·ep2·etp2", "tp2·cp2·etp2", "tp2·pp2·etp2, both ways", "pp2, weights apart"],
)
def test_adapters_know_no_layout(lora: RunConfig, alone: Path, layout: LayoutConfig) -> None:
    """Of every kind of product, MTP's and the head's too; half of the layouts with recomputation."""
    recompute = "full" if layout.cp * layout.pp > 1 else "none"
    config = replace(lora, train=replace(lora.train, recompute=recompute))
    assert_agrees(config, alone, layout)


@pytest.mark.parametrize(
    "frozen",
    [
        ("embedding", "router", "norm", "experts"),
        ("embedding", "attention", "router", "experts", "shared", "dense"),  # one stage trains nothing
        ("norm", "head", "router", "experts", "shared"),  # neither does the other
    ],
    ids=["between", "last alone", "first alone"],
)
def test_frozen_components_know_no_layout(tmp_path: Path, frozen: tuple[Component, ...]) -> None:
    """Ranks that train nothing still make every exchange."""
    config = settings(tmp_path, TuneConfig(frozen=frozen))
    assert_agrees(config, tmp_path / "steps", LayoutConfig(tp=2, pp=2, ep=2))


@pytest.mark.parametrize("tune", [LORA, TuneConfig(frozen=("embedding", "router", "experts"))])
def test_what_is_frozen_stays_and_costs_nothing(tmp_path: Path, tune: TuneConfig) -> None:
    trainer, _ = steps(settings(tmp_path, tune), 1, 0, 0)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    steps_from(trainer, 0, 2)
    trained = 0
    for name, parameter in trainer.model.named_parameters():
        chosen = is_adapter(name) if tune.method == "lora" else component_of(name) not in tune.frozen
        assert parameter.requires_grad == chosen, name
        assert torch.equal(parameter, before[name]) != chosen, name
        assert hasattr(parameter, "main_grad") == chosen and parameter.grad is None, name
        trained += parameter.numel() if chosen else 0
    sizes: dict[str, int] = {}
    for piece in trainer.engine.owned():
        kind = piece.name.split("/")[0]
        sizes[kind] = sizes.get(kind, 0) + piece.tensor.numel()
    assert sizes == {"model": trained, "exp_avg": trained, "exp_avg_sq": trained}


def share_on_ranks(rank: int, world_size: int, config: RunConfig) -> str:
    trainer, _ = steps(config, world_size, rank, 0)
    return trained_share(trainer.model, trainer.groups, CPU)


def test_the_share_is_of_the_whole_model(lora: RunConfig) -> None:
    one, _ = steps(lora, 1, 0, 0)
    parameters = dict(one.model.named_parameters())
    trained = sum(p.numel() for name, p in parameters.items() if is_adapter(name))
    every = sum(p.numel() for p in parameters.values())
    words = f"trains {trained:,} of {every:,} parameters ({trained / every:.2%})"
    layout = LayoutConfig(tp=2, pp=2, etp=2)
    assert run_ranks(4, share_on_ranks, replace(lora, layout=layout)) == [words] * 4


def save(trainer: Trainer, folder: Path, position: Position) -> None:
    saver = Saver(folder, trainer.groups.world, keep_last=9)
    saver.save(position.step, state.owned(trainer), asdict(position))
    saver.wait()


def train_and_save(rank: int, world_size: int, config: RunConfig, folder: Path) -> list[float]:
    trainer, _ = steps(config, world_size, rank, 2)
    save(trainer, folder, Position(2, 16, 500))
    return [result.loss for result in steps_from(trainer, 2, 2)]


def resume(rank: int, world_size: int, config: RunConfig, folder: Path, copied: Path) -> list[float]:
    trainer, _ = steps(config, world_size, rank, 0)
    save(trainer, copied, state.load(trainer, open_checkpoint(folder / "step-2")))
    return [result.loss for result in steps_from(trainer, 2, 2)]


def test_another_layout_goes_on_with_the_adapters(lora: RunConfig, tmp_path: Path) -> None:
    """Bit for bit, from a checkpoint that holds nothing else."""
    before, after = LayoutConfig(tp=2, etp=2, microbatches=2), LayoutConfig(dp=2, ep=2, microbatches=1)
    undisturbed = run_ranks(2, train_and_save, replace(lora, layout=before), tmp_path / "one")[0]
    resumed = run_ranks(2, resume, replace(lora, layout=after), tmp_path / "one", tmp_path / "other")[0]
    assert resumed == pytest.approx(undisturbed, rel=1e-5)
    one, other = (open_checkpoint(tmp_path / name / "step-2") for name in ("one", "other"))
    assert set(one.names) == set(other.names)
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.names)
    assert all("lora." in name for name in one.names if name.split("/")[0] in ("model", "exp_avg"))
