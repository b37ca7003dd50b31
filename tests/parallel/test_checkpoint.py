"""Checkpoints: any layout reads any other, nothing half-written is ever used, what is broken is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from moe.model.transformer import Transformer
from parallel.checkpoint import open_checkpoint, open_latest, save, steps
from parallel.collectives import Group
from parallel.errors import UserError
from parallel.groups import build_groups
from parallel.layout import Layout
from parallel.shards import canonical_parameters
from tests.ranks import run_ranks
from tests.small import SMALL_MODEL


def save_one(root: Path, step: int, keep: int = 9, group: Group = None) -> Path:
    tensors = {"a": torch.full((2, 3), float(step)), "b": torch.tensor([step])}
    return save(root, step, tensors, {"step": step}, group, keep)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def forget(path: Path) -> None:
    path.unlink()


def spoil_index(path: Path) -> None:
    (path.parent / "index.json").write_text('{"files": {')


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4).t(),
        "b": torch.tensor(7, dtype=torch.int64),
        "c": torch.ones(2).bfloat16(),
    }
    folder = save(tmp_path, 5, tensors, {"step": 5, "note": "x"}, None, keep=1)
    saved = open_checkpoint(folder)
    assert saved.state == {"step": 5, "note": "x"} and set(saved.files) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(saved.read(name), tensor) and saved.read(name).dtype == tensor.dtype
    target = torch.zeros(6, 4)
    saved.read_into("a", target[:4, :3])
    assert torch.equal(target[:4, :3], tensors["a"]) and not target[4:].any()


def model_tensors(layout: Layout, seed: int) -> tuple[dict[str, Tensor], Group]:
    groups = build_groups(layout)
    model = Transformer(SMALL_MODEL, group=groups.ep, seed=seed)
    return dict(canonical_parameters(model)), groups.dp


def save_cut(rank: int, world_size: int, root: Path) -> list[str]:
    tensors, group = model_tensors(Layout(dp=world_size, ep=world_size), 3)
    owned = {name: t for name, t in tensors.items() if rank == 0 or ".experts." in name}
    save(root, 1, owned, {"step": 1}, group, keep=2)
    return list(owned)


def read_cut(rank: int, world_size: int, root: Path) -> bool:
    """Whether what this rank reads is what a model of the saved seed holds here."""
    layout = Layout(dp=world_size, ep=world_size)
    (tensors, _), (expected, _) = model_tensors(layout, 0), model_tensors(layout, 3)
    saved = open_checkpoint(root / "step-1", verify=rank == 0)
    for name, tensor in tensors.items():
        assert tensor.dim() < 2 or not torch.equal(tensor, expected[name])
        saved.read_into(name, tensor)
    return all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_four_ranks_save_and_one_two_and_four_read(tmp_path: Path) -> None:
    owned = run_ranks(4, save_cut, tmp_path)
    names = [name for rank in owned for name in rank]
    assert len(names) == len(set(names))  # every tensor is written once
    assert read_cut(0, 1, tmp_path)
    assert run_ranks(2, read_cut, tmp_path) == [True] * 2
    assert run_ranks(4, read_cut, tmp_path) == [True] * 4
    files = {path.name for path in (tmp_path / "step-1").iterdir()}
    assert files == {"index.json", *(f"rank-{rank:05d}.safetensors" for rank in range(4))}


def test_nothing_is_pickled(tmp_path: Path) -> None:
    save_one(tmp_path, 1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix or path.name for path in files} == {".safetensors", ".json", "latest"}
    assert not any(path.read_bytes().startswith((b"\x80", b"PK")) for path in files)


def fail(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "where", ["parallel.checkpoint.save_file", "hashlib.file_digest", "os.fsync", "pathlib.Path.rename"]
)
def test_an_interrupted_save_leaves_the_last_good_one(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_one(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(where, fail)
        save_one(tmp_path, 2)
    assert steps(tmp_path) == [1] and (tmp_path / "latest").read_text() == "step-1\n"
    saved = open_latest(tmp_path, pytest.fail)
    assert saved is not None and saved.state == {"step": 1} and saved.read("b").item() == 1
    save_one(tmp_path, 2)  # over what the interruption left
    assert steps(tmp_path) == [1, 2] and (tmp_path / "latest").read_text() == "step-2\n"
    assert not list(tmp_path.glob(".*"))


def save_with_a_failing_rank(rank: int, world_size: int, root: Path) -> None:
    """Rank 0 is stopped after every rank's file is there, before the folder gets its name."""
    group = dist.group.WORLD
    save(root, 1, {f"t{rank}": torch.ones(1)}, {"step": 1}, group, keep=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        if rank == 0:
            with pytest.raises(KeyboardInterrupt):
                save(root, 2, {"t0": torch.zeros(1)}, {"step": 2}, group, keep=2)
            dist.barrier(group)  # the one that the stopped save did not reach
        else:
            save(root, 2, {f"t{rank}": torch.zeros(1)}, {"step": 2}, group, keep=2)


def test_a_stop_between_rank_files_and_rename(tmp_path: Path) -> None:
    run_ranks(2, save_with_a_failing_rank, tmp_path)
    saved = open_latest(tmp_path, pytest.fail)
    assert saved is not None and saved.state == {"step": 1}
    assert [saved.read(f"t{rank}").item() for rank in range(2)] == [1, 1]
    assert (tmp_path / "latest").read_text() == "step-1\n"


def test_the_newest_is_found_without_the_pointer(tmp_path: Path) -> None:
    """Stopped after the folder has its name, before `latest` says so."""
    for step in (1, 2):
        save_one(tmp_path, step)
    (tmp_path / "latest").write_text("step-1\n")
    saved = open_latest(tmp_path, pytest.fail)
    assert saved is not None and saved.state == {"step": 2}


@pytest.mark.parametrize("harm", [flip_a_bit, truncate, forget, spoil_index])
def test_a_broken_checkpoint_is_named_and_an_earlier_one_used(harm: Any, tmp_path: Path) -> None:
    for step in (1, 2):
        save_one(tmp_path, step)
    harm(tmp_path / "step-2" / "rank-00000.safetensors")
    warnings: list[str] = []
    saved = open_latest(tmp_path, warnings.append)
    assert saved is not None and saved.state == {"step": 1}
    (warning,) = warnings
    assert f"checkpoint {tmp_path / 'step-2'} is broken (" in warning and "using an earlier one" in warning
    harm(tmp_path / "step-1" / "rank-00000.safetensors")
    with pytest.raises(UserError, match=r"step-1 is broken \("):
        open_latest(tmp_path, warnings.append)


def test_a_flipped_bit_names_the_file(tmp_path: Path) -> None:
    flip_a_bit(save_one(tmp_path, 1) / "rank-00000.safetensors")
    with pytest.raises(UserError, match=r"rank-00000\.safetensors does not match its checksum"):
        open_checkpoint(tmp_path / "step-1")
    open_checkpoint(tmp_path / "step-1", verify=False)  # another rank has looked


def test_no_checkpoint_is_no_mistake(tmp_path: Path) -> None:
    assert open_latest(tmp_path, pytest.fail) is None
    assert open_latest(tmp_path / "absent", pytest.fail) is None
    (tmp_path / "step-old").mkdir()
    assert steps(tmp_path) == []


def test_another_models_checkpoint(tmp_path: Path) -> None:
    saved = open_checkpoint(save_one(tmp_path, 1))
    with pytest.raises(
        UserError, match=r"tensor `a` .*must have the model's shape \[3, 2\], but has \[2, 3\]: "
    ):
        saved.read_into("a", torch.zeros(3, 2))
    with pytest.raises(UserError, match="has no tensor `c`: it was made by another model"):
        saved.read("c")


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):
        save_one(tmp_path, step, keep=2)
    assert steps(tmp_path) == [10, 100]
    assert (tmp_path / "latest").read_text() == "step-100\n"


def test_a_step_is_saved_anew(tmp_path: Path) -> None:
    save_one(tmp_path, 4)
    save(tmp_path, 4, {"a": torch.zeros(1)}, {"step": 4}, None, keep=2)
    assert list(open_checkpoint(tmp_path / "step-4").files) == ["a"]


def test_going_back_keeps_what_was_just_saved(tmp_path: Path) -> None:
    """Step 40 is broken, the run resumes at 20 and is stopped at 30."""
    for step in (20, 40):
        save_one(tmp_path, step, keep=2)
    truncate(tmp_path / "step-40" / "rank-00000.safetensors")
    save_one(tmp_path, 30, keep=1)
    saved = open_latest(tmp_path, lambda warning: None)
    assert saved is not None and saved.state == {"step": 30}


def test_leftovers_of_interrupted_saves_are_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", fail)
        save_one(tmp_path, 30)
    save_one(tmp_path, 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-40"]


def test_an_index_of_another_make_is_broken(tmp_path: Path) -> None:
    folder = save_one(tmp_path, 1)
    for content in ("[]", "{}", json.dumps({"files": {"x.safetensors": 3}, "state": {}}), "\xff"):
        (folder / "index.json").write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match="is broken"):
            open_checkpoint(folder)


def test_a_file_with_other_tensors_is_not_read_by_mistake(tmp_path: Path) -> None:
    folder = save_one(tmp_path, 1)
    path = folder / "rank-00000.safetensors"
    size = path.stat().st_size
    save_file({"a": torch.zeros(2, 3), "b": torch.tensor([2])}, path)
    assert path.stat().st_size == size
    with pytest.raises(UserError, match="checksum"):
        open_checkpoint(folder)
