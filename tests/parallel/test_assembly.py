"""A folder made of planned files: continued after any end, never half there, one tensor held at a time."""

import hashlib
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from parallel.assembly import Assembly, Part, PlannedFile
from parallel.errors import UserError
from parallel.files import new_folder
from tests.ranks import run_ranks

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2, 2)}


def value(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plan(names: str = "xyz", origin: str = "one", read: Any = value) -> list[PlannedFile]:
    """Files of three tensors, the odd one in bf16 first: fp32 must still be aligned."""
    files = []
    for name in names:
        parts = [
            Part(f"{name}.{key}", dtype, shape, lambda k=f"{name}.{key}", s=shape, d=dtype: read(k, s, d))
            for (key, shape), dtype in zip(
                SHAPES.items(), (torch.bfloat16, torch.float32, torch.float16), strict=True
            )
        ]
        files.append(PlannedFile(f"in/{name}.safetensors", parts, origin, {"of": name}, lambda: None))
    return files


def make(target: Path, files: list[PlannedFile]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    with Assembly(target) as assembly:
        assembly.begin(files)
        assembly.write(files)
        assembly.publish(files, lambda folder, known: entries.update(known))
    return entries


def check(target: Path, names: str = "xyz") -> None:
    files = {path.name: path for path in (target / "in").iterdir()}
    assert files.keys() == {f"{name}.safetensors" for name in names}
    for file in plan(names):
        stored = load_file(target / file.name)
        assert stored.keys() == {part.key for part in file.parts}
        assert all(
            torch.equal(stored[part.key], value(part.key, part.shape, part.dtype)) for part in file.parts
        )
    assert list(target.parent.iterdir()) == [target]


def identities(target: Path) -> dict[str, tuple[int, int]]:
    folder = target.with_name(f".{target.name}.partial") / "new" / "in"
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_another_maker_of_the_same_folder_leaves_the_unfinished_one(tmp_path: Path) -> None:
    with Assembly(tmp_path / "out") as assembly:
        assembly.begin(plan())
        assembly.write(plan()[:1])
    before = identities(tmp_path / "out")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out"):
        raise RuntimeError
    assert before and identities(tmp_path / "out") == before


def test_a_folder_and_what_is_known_of_it(tmp_path: Path) -> None:
    entries = make(tmp_path / "out", plan())
    check(tmp_path / "out")
    for name, entry in entries.items():
        content = (tmp_path / "out" / name).read_bytes()
        assert entry == {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "of": Path(name).stem,
        }


def killed_in(rank: int, world_size: int, target: Path, key: str) -> None:
    """A child of this rank is killed as it comes to a tensor."""

    def read(asked: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if asked == key:
            os.kill(os.getpid(), signal.SIGKILL)
        return value(asked, shape, dtype)

    child = os.fork()
    if child == 0:
        make(target, plan(read=read))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_killed_call_is_continued(tmp_path: Path) -> None:
    """Finished files are not written again, the one cut short is."""
    target = tmp_path / "out"
    run_ranks(1, killed_in, target, "y.b")
    assert not target.exists()
    before = identities(target)
    assert before.keys() == {"x.safetensors", "y.safetensors"}
    with Assembly(target) as assembly:
        assembly.begin(plan())
        assembly.write(plan())
        after = identities(target)
        assembly.publish(plan(), lambda folder, known: None)
    assert after["x.safetensors"] == before["x.safetensors"]
    assert after["y.safetensors"] != before["y.safetensors"]
    check(target)


def interrupted(target: Path, files: list[PlannedFile]) -> None:
    with Assembly(target) as assembly:
        assembly.begin(files)
        assembly.write(files)


@pytest.mark.parametrize("spoilt", ["content", "length", "entry"])
def test_a_finished_file_that_was_spoilt_is_written_again(spoilt: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    interrupted(target, plan())
    partial = tmp_path / ".out.partial"
    path = partial / "new" / "in" / "y.safetensors"
    if spoilt == "content":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    elif spoilt == "length":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        (partial / "entries" / "in--y.safetensors.json").unlink()
    make(target, plan())
    check(target)


def test_another_plan_or_origin_keeps_nothing_of_the_old(tmp_path: Path) -> None:
    target = tmp_path / "out"
    interrupted(target, plan("wx", read=lambda key, shape, dtype: torch.zeros(shape, dtype=dtype)))
    make(target, plan(origin="two"))
    check(target)


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    alive: set[int] = set()
    most = 0

    def read(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nonlocal most
        tensor = value(key, shape, dtype)
        alive.add(number := len(alive) + 1000 * most)
        weakref.finalize(tensor, alive.discard, number)
        most = max(most, len(alive))
        return tensor

    make(tmp_path / "out", plan(read=read))
    assert most == 1


def test_one_command_at_a_time_whoever_writes(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with Assembly(target) as first:
        first.begin(plan())
        with Assembly(target) as writer:
            writer.join()
            with pytest.raises(UserError, match="made by one command at a time"), Assembly(target) as second:
                second.begin(plan())
    make(target, plan())
    check(target)


def test_a_folder_in_use_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out", plan())  # empty: fine
    with pytest.raises(UserError, match="must be new or empty"):
        make(tmp_path / "out", plan(origin="two"))
    check(tmp_path / "out")


def test_a_full_disk_is_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    def read(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if key == "z.a":
            raise OSError(28, "No space left on device")
        return value(key, shape, dtype)

    target = tmp_path / "out"
    with pytest.raises(UserError, match=r"z\.safetensors` must be written.*No space left.*again"):
        make(target, plan(read=read))
    before = identities(target)
    interrupted(target, plan())
    assert before.items() <= identities(target).items() | {("z.safetensors", before["z.safetensors"])}
    make(target, plan())
    check(target)
