"""DeepSpeed takes the steps of our own engine, keeps experts apart, and exchanges checkpoints with it."""

import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.config import LayoutConfig, OptimConfig, RunConfig
from moe.data.corpus import prepare
from moe.data.loader import Loader
from moe.rules import validate
from moe.train import deepspeed as adapter
from moe.train import state
from moe.train.state import Position
from moe.train.step import Trainer, make_trainer, read_batches
from parallel.checkpoint import open_checkpoint
from parallel.errors import UserError
from parallel.groups import build_groups
from parallel.saving import Saver
from parallel.shards import Piece
from tests.ranks import run_ranks
from tests.small import small_run

installed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install 'switchyard[deepspeed]'",
)


@dataclass(frozen=True)
class Facts:
    """What is the same on all ranks after some steps, and the pieces that one rank owns."""

    every: dict[str, Tensor]
    pieces: list[Piece]


def begin(config: RunConfig) -> tuple[Trainer, Loader]:
    corpus = prepare(config.data, config.model.vocab_size)
    loader = Loader(corpus.train, sequence_length=32, seed=1, mask_documents=False)
    groups = build_groups(validate(config, dist.get_world_size() if dist.is_initialized() else 1))
    return make_trainer(config, groups, len(corpus.domains), torch.device("cpu")), loader


def go_on(trainer: Trainer, loader: Loader, first: int, end: int) -> Facts:
    """Train the steps `first` to `end` - 1."""
    config, results = trainer.config, []
    for step in range(first, end):
        batches = read_batches(loader, config, trainer.groups, step * config.train.batch_size)
        results.append(trainer.step(step, batches))
        trainer.engine.forward([trainer._microbatch(batches[0], [1, 1], 1)])  # must leave no trace
    names = ("loss", "mtp_loss", "auxiliary_loss", "grad_norm")
    every = {name: torch.tensor([getattr(result, name) for result in results]) for name in names}
    every |= {f"{name} bias": router.bias.clone() for name, router in trainer.model.routers()}
    return Facts(every, [replace(p, tensor=p.tensor.clone()) for p in trainer.engine.owned()])


def whole(parts: Iterable[Facts]) -> dict[str, Tensor]:
    """Canonical tensors from the pieces of all ranks."""
    found: dict[str, Tensor] = {}
    for piece in (piece for part in parts for piece in part.pieces):
        empty = torch.full(piece.shape, torch.nan, dtype=piece.tensor.dtype)
        found.setdefault(piece.name, empty)[piece.place] = piece.tensor
    return found


def by_deepspeed(config: RunConfig, stage: int, *, offload: bool = False) -> RunConfig:
    adapter.KEPT_WHOLE = 0  # no parameter of so small a model would be partitioned otherwise
    optim = replace(config.optim, engine="deepspeed", zero_stage=stage, offload=offload)
    return replace(config, optim=optim)


def forget() -> None:
    """DeepSpeed keeps groups and numbers of parameters; the next test has others."""
    library = sys.modules["deepspeed"]
    library.utils.groups._release_process_group_references()
    library.zero.partition_parameters.Init.param_id = 0


def settings(folder: Path, layout: dict[str, int], **train: Any) -> RunConfig:
    config = small_run(folder, num_mtp_layers=1, kv_lora_rank=15)  # odd: shares are padded
    return replace(
        config,
        layout=LayoutConfig(microbatches=2, **layout),
        optim=replace(config.optim, clip_norm=0.1),
        train=replace(config.train, **train),
    )


def three_steps(
    rank: int, world_size: int, config: RunConfig, stage: int, offload: bool, grouped: bool = True
) -> tuple[Facts, Facts]:
    """By our engine and by DeepSpeed; not `grouped`: without torch's process group, as one rank starts."""
    if not grouped:
        dist.destroy_process_group()
    expected = go_on(*begin(config), 0, 3)
    found = go_on(*begin(by_deepspeed(config, stage, offload=offload)), 0, 3)
    forget()
    return expected, found


def assert_same(answers: list[tuple[Facts, Facts]]) -> dict[str, Tensor]:
    """Compare on all ranks; the canonical tensors that DeepSpeed ends with."""
    for expected, found in answers:
        assert (expected.every["grad_norm"] > 0.1).all(), "every step must clip"
        torch.testing.assert_close(found.every, expected.every, rtol=1e-5, atol=1e-7)
    tensors = whole(found for _, found in answers)
    torch.testing.assert_close(tensors, whole(expected for expected, _ in answers), rtol=1e-5, atol=1e-5)
    return tensors


@installed
@pytest.mark.parametrize(
    ("stage", "layout", "offload", "recompute"),
    [
        (1, {"ep": 2}, True, "none"),
        (2, {"ep": 1}, False, "none"),
        (2, {"ep": 2}, False, "full"),
        (3, {"ep": 1}, False, "none"),
        (3, {"ep": 2}, False, "full"),
        (3, {"tp": 2, "etp": 2}, True, "none"),
    ],
    ids=str,
)
def test_takes_the_same_steps(
    tmp_path: Path, stage: int, layout: dict[str, int], offload: bool, recompute: str
) -> None:
    """Losses, norm and bias on both ranks, and every element of weights and moments."""
    config = settings(tmp_path, layout, recompute=recompute)
    tensors = assert_same(run_ranks(2, three_steps, config, stage, offload))
    first, last = (tensors[f"model/layers.1.moe.experts.{expert}.down.weight"] for expert in (0, 7))
    assert (first - last).abs().max() > 1e-2, "experts have become one"


@installed
def test_one_rank_needs_no_process_group(tmp_path: Path) -> None:
    assert_same(run_ranks(1, three_steps, settings(tmp_path, {}), 2, True, False))


def bytes_saved(rank: int, world_size: int, config: RunConfig) -> int:
    """What the forward of a step keeps for its backward."""
    found = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal found
        found += tensor.nbytes
        return tensor

    trainer, loader = begin(by_deepspeed(config, 2))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        go_on(trainer, loader, 0, 1)
    forget()
    return found


@installed
def test_recomputation_keeps_little(tmp_path: Path) -> None:
    plain, little = (
        run_ranks(1, bytes_saved, settings(tmp_path, {}, recompute=recompute))[0]
        for recompute in ("none", "full")
    )
    assert little < plain / 3


def exchange(rank: int, world_size: int, config: RunConfig, stage: int, folder: Path) -> list[Facts]:
    """Two steps by each engine, saved, and a third by the other."""
    facts = []
    ours, theirs = config, by_deepspeed(config, stage)
    for name, writer, reader in (("ours", ours, theirs), ("theirs", theirs, ours)):
        trainer, loader = begin(writer)
        go_on(trainer, loader, 0, 2)
        saver = Saver(folder / name, trainer.groups.world, keep_last=1)
        saver.save(2, state.owned(trainer), asdict(Position(2, 16, 500)))
        saver.wait()
        other, loader = begin(reader)
        state.load(other, open_checkpoint(folder / name / "step-2"))
        facts += [go_on(trainer, loader, 2, 2), go_on(other, loader, 2, 2)]
        facts += [go_on(trainer, loader, 2, 3), go_on(other, loader, 2, 3)]
        forget()
    return facts


@installed
@pytest.mark.parametrize(("stage", "precision"), [(2, "bf16"), (3, "fp32")])
def test_engines_exchange_checkpoints(tmp_path: Path, stage: int, precision: str) -> None:
    """Weights, masters, moments and count of steps: what one saved the other goes on from."""
    config = settings(tmp_path, {"ep": 2}, precision=precision)
    answers = run_ranks(2, exchange, config, stage, tmp_path)
    bound = 1e-5 if precision == "fp32" else 1e-2
    for first in (0, 4):
        saved, loaded = (whole(answer[first + which] for answer in answers) for which in (0, 1))
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
        for answer in answers:
            on, other = answer[first + 2].every, answer[first + 3].every
            torch.testing.assert_close(other, on, rtol=bound, atol=1e-7)
        on, other = (whole(answer[first + which] for answer in answers) for which in (2, 3))
        if precision == "fp32":
            torch.testing.assert_close(other, on, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "optim", "message"),
    [
        ({}, {"zero_stage": 2}, r"`optim.zero_stage` must be 1 with `optim.engine=switchyard`, but is 2"),
        ({}, {"offload": True}, r"`optim.offload` must be false .* but is true: set `optim.offload=false`"),
        ({"pp": 2}, {"engine": "deepspeed"}, r"`layout.pp` must be 1 .* set .* or `optim.engine=switchyard`"),
        ({}, {"engine": "deepspeed", "moments": "bf16"}, r"`optim.moments` must be fp32"),
        ({}, {"engine": "deepspeed", "fused": "apex"}, r"`optim.fused` must be torch"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(
    layout: dict[str, Any], optim: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        validate(RunConfig(layout=LayoutConfig(**layout), optim=OptimConfig(**optim)))


def test_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # put back what the adapter sets
    with pytest.raises(UserError, match=r"install switchyard\[deepspeed\] or set `optim.engine=switchyard`"):
        begin(by_deepspeed(settings(tmp_path, {}), 2))
