"""Saving checkpoints: in the background, all or nothing whatever stops or fails, and what is kept."""

import errno
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from parallel import saving
from parallel.checkpoint import open_checkpoint, open_latest, steps
from parallel.errors import UserError
from parallel.saving import Saver
from parallel.shards import Piece
from parallel.staging import Staging
from tests.ranks import run_ranks


def piece(name: str, tensor: Tensor) -> Piece:
    return Piece(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def tensors(step: int) -> list[Piece]:
    return [piece("a", torch.full((2, 3), float(step))), piece("b", torch.tensor([step]))]


def save_one(root: Path, step: int, *, keep_last: int = 9, keep_every: int = 0) -> Path:
    saver = Saver(root, None, keep_last=keep_last, keep_every=keep_every)
    saver.save(step, tensors(step), {"step": step})
    folder = saver.wait()
    assert folder == root / f"step-{step}"
    return folder


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Files are written only once this event is set."""
    event, durable_file = threading.Event(), saving.durable_file

    def wait_for_it(path: Path) -> Any:
        assert event.wait(20)
        return durable_file(path)

    monkeypatch.setattr(saving, "durable_file", wait_for_it)
    yield event
    event.set()


def test_what_is_saved_is_what_was_there_at_the_call(tmp_path: Path, gate: threading.Event) -> None:
    weight, step, state = torch.arange(12.0).view(3, 4).t(), torch.tensor(7), {"step": 7, "list": [1]}
    expected = weight.clone()
    saver = Saver(tmp_path, None, keep_last=1)
    saver.save(7, [piece("weight", weight), piece("step", step)], state)
    weight.zero_()
    step.zero_()
    state["list"].append(2)  # type: ignore[attr-defined]
    assert steps(tmp_path) == []  # nothing is written yet
    gate.set()
    folder = saver.wait()
    assert folder == tmp_path / "step-7" and saver.wait() is None
    saved = open_checkpoint(folder)
    assert torch.equal(saved.read("weight"), expected) and saved.read("step").item() == 7
    assert saved.state == {"step": 7, "list": [1]}


def test_a_save_waits_for_the_one_before(tmp_path: Path, gate: threading.Event) -> None:
    saver = Saver(tmp_path, None, keep_last=2)
    saver.save(1, tensors(1), {"step": 1})
    threading.Timer(0.2, gate.set).start()
    saver.save(2, tensors(2), {"step": 2})
    assert steps(tmp_path)[0] == 1
    saver.wait()
    for step in (1, 2):
        assert open_checkpoint(tmp_path / f"step-{step}").read("b").item() == step


def test_a_parameter_is_saved_like_any_tensor(tmp_path: Path) -> None:
    saver = Saver(tmp_path, None, keep_last=1)
    saver.save(1, [piece("p", torch.nn.Parameter(torch.ones(2)))], {})
    assert saver.wait() is not None


def test_the_host_buffer_is_used_again() -> None:
    staging = Staging()
    first = staging.copy([piece("a", torch.ones(6)), piece("b", torch.ones(2))])
    address = first.content.data_ptr()
    smaller = staging.copy([piece("a", torch.zeros(4))])
    assert smaller.content.data_ptr() == address and smaller.content.numel() == 16
    assert not smaller.content.any()
    assert staging.copy([piece("a", torch.ones(9))]).content.numel() == 36


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    """Of every width, the widest first, so that each lies where its elements are aligned."""
    saver = Saver(tmp_path, None, keep_last=1)
    made = [torch.ones(3, dtype=t) for t in (torch.uint8, torch.bfloat16, torch.int64, torch.float32)]
    made.append(torch.zeros(0, 2))
    saver.save(1, [piece(f"t{index}", tensor) for index, tensor in enumerate(made)], {})
    saver.wait()
    path = tmp_path / "step-1" / "rank-00000.safetensors"
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == [f"t{index}[0:3]" for index in range(4)]
        for index in range(4):
            assert torch.equal(file.get_tensor(f"t{index}[0:3]"), made[index])
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


HALF = Piece("a", (2, 4), (0, 0), torch.zeros(2, 2))
OTHER_HALF = Piece("a", (2, 4), (0, 2), torch.zeros(2, 2))


@pytest.mark.parametrize(
    "wrong",
    [
        [HALF],
        [HALF, HALF],
        [HALF, OTHER_HALF, HALF],
        [HALF, Piece("a", (2, 4), (0, 1), torch.zeros(2, 2))],
        [HALF, OTHER_HALF, Piece("a", (2, 4), (0, 4), torch.zeros(2, 2))],
    ],
    ids=["a hole", "the same twice", "one too many", "overlapping", "outside"],
)
def test_pieces_that_do_not_tile_are_not_published(wrong: list[Piece], tmp_path: Path) -> None:
    saver = Saver(tmp_path, None, keep_last=1)
    saver.save(1, [*wrong, *tensors(1)[1:]], {})
    with pytest.raises(AssertionError, match="every element of tensor `a` exactly once"):
        saver.wait()
    assert steps(tmp_path) == []
    saver.save(1, [HALF, OTHER_HALF], {})
    assert saver.wait() is not None


@pytest.mark.parametrize(
    "other", [Piece("a", (2, 5), (0, 2), torch.zeros(2, 2)), piece("a", torch.zeros(2, 4, dtype=torch.uint8))]
)
def test_pieces_that_contradict_each_other_are_not_published(other: Piece, tmp_path: Path) -> None:
    saver = Saver(tmp_path, None, keep_last=1)
    saver.save(1, [HALF, other], {})
    with pytest.raises(AssertionError, match="two pieces of tensor `a` say that it is"):
        saver.wait()
    assert steps(tmp_path) == []


# What stops: the process, at any operation on files.


def stop_before(number: int, action: Callable[[], Any]) -> bool:
    """Whether a copy of this process, killed before its nth operation on files, was done before that."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) in (0, 9)
        return os.waitstatus_to_exitcode(status) == 0
    try:
        left = iter(range(number))
        for owner, name in (
            (os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "rename"), (os, "mkdir"), (Path, "open"),
        ):  # fmt: skip
            operation = getattr(owner, name)

            def counted(*args: Any, operation: Any = operation, **options: Any) -> Any:
                if next(left, None) is None:
                    os._exit(9)
                return operation(*args, **options)

            setattr(owner, name, counted)
        action()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("step", [2, 3], ids=["the same step again", "a new step"])
def test_a_stop_at_any_moment_leaves_a_good_checkpoint(step: int, tmp_path: Path) -> None:
    done, number, found = False, 0, set()
    while not done:
        root = tmp_path / str(number)
        for each in (1, 2):
            save_one(root, each)
        done = stop_before(number, lambda root=root: save_one(root, step, keep_last=2))
        number += 1
        saved = open_latest(root, pytest.fail)
        assert saved is not None
        found.add(saved.state["step"])
        assert saved.read("b").item() == saved.state["step"]
        for each in steps(root):
            open_checkpoint(root / f"step-{each}")  # nothing half-removed either
        named = (root / "latest").read_text().strip()
        assert named in ("step-2", f"step-{step}")
        save_one(root, 4, keep_last=2)  # over whatever the stop left
        assert {path.name for path in root.iterdir()} <= {"latest", "step-2", "step-3", "step-1", "step-4"}
        assert len(steps(root)) == 2 and (root / "latest").read_text() == "step-4\n"
        shutil.rmtree(root)
    assert number > 15 and found == ({2, 3} if step == 3 else {1, 2})


def test_all_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()  # inodes
    fsync, rename = os.fsync, Path.rename

    def note(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def check(path: Path, target: Path) -> Path:
        if target.name == "step-1":
            assert synced >= {each.stat().st_ino for each in (path, *path.iterdir())}
        assert path.is_dir() or path.stat().st_ino in synced
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", check)
    save_one(tmp_path, 1)
    assert tmp_path.stat().st_ino in synced


# What fails: one rank's writing, while the others succeed.


def outcomes_of_a_failing_rank(rank: int, world_size: int, root: Path, failing: int) -> list[Any]:
    """Saves 1 to 3, of which `failing` may write no more than a few kilobytes in the second."""
    saver = Saver(root, dist.group.WORLD, keep_last=3, patience_s=20)
    outcomes: list[Any] = []
    for step in (1, 2, 3):
        if rank == failing and step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
        try:
            saver.save(step, [piece(f"t{rank}", torch.full((100_000,), float(step)))], {"step": step})
            outcomes.append(str(saver.wait()))
        except UserError as error:
            outcomes.append(str(error))
            left = root / f".step-{step}.partial" / f"rank-{rank:05d}.safetensors"
            assert rank != failing or not left.exists()  # a full disk is not kept full
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return outcomes


@pytest.mark.parametrize("failing", [0, 2])
def test_every_rank_learns_that_one_could_not_write(failing: int, tmp_path: Path) -> None:
    for first, second, third in run_ranks(3, outcomes_of_a_failing_rank, tmp_path, failing):
        assert first == str(tmp_path / "step-1") and third == str(tmp_path / "step-3")
        assert second.startswith(
            f"checkpoint {tmp_path / 'step-2'} must be written by every rank, but was not"
        )
        assert os.strerror(errno.EFBIG) in second
    assert steps(tmp_path) == [1, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1", "step-3"]
    assert all(open_checkpoint(tmp_path / "step-3").read(f"t{rank}")[0] == 3 for rank in range(3))


def outcome_without_a_rank(rank: int, world_size: int, root: Path) -> str:
    """Rank 1's thread is never heard of again."""
    saver = Saver(root, dist.group.WORLD, keep_last=1, patience_s=0.3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
        if rank == 1:
            patch.setattr(saving, "_write_rank", lambda *_: None)
        saver.save(1, [piece(f"t{rank}", torch.ones(1))], {})
        saver.wait()
    return str(caught.value)


def test_a_rank_that_died_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    for message in run_ranks(2, outcome_without_a_rank, tmp_path, timeout=30):
        assert "but was not (no sign of rank-00001 for 0.3 s): " in message
    assert steps(tmp_path) == []


def outcome_in_a_bad_place(rank: int, world_size: int, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        Saver(root, dist.group.WORLD, keep_last=1).save(1, [], {})
    return str(caught.value)


def test_every_rank_learns_that_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for message in run_ranks(2, outcome_in_a_bad_place, tmp_path / "file" / "checkpoints"):
        assert os.strerror(errno.ENOTDIR) in message


def test_a_failure_is_raised_by_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, None, keep_last=2)

    def full(path: Path) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(saving, "durable_file", full)
        saver.save(1, tensors(1), {})
        with pytest.raises(UserError, match="No space left on device"):
            saver.save(2, tensors(2), {})
    assert steps(tmp_path) == [] and saver.wait() is None
    saver.save(3, tensors(3), {})
    saver.wait()
    assert steps(tmp_path) == [3]


def save_and_watch_collectives(rank: int, world_size: int, root: Path) -> set[str]:
    """Names of the threads that met other ranks."""
    threads: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        for name in dist.distributed_c10d.__all__:
            operation = getattr(dist, name, None)
            if callable(operation) and name.startswith(("all_", "barrier", "broadcast", "gather", "reduce")):

                def watched(*args: Any, operation: Any = operation, **options: Any) -> Any:
                    threads.add(threading.current_thread().name)
                    return operation(*args, **options)

                patch.setattr(dist, name, watched)
        saver = Saver(root, dist.group.WORLD, keep_last=1)
        saver.save(1, [piece(f"t{rank}", torch.ones(1))], {})
        saver.wait()
    return threads


def test_the_background_meets_no_rank(tmp_path: Path) -> None:
    assert run_ranks(2, save_and_watch_collectives, tmp_path) == [{"MainThread"}] * 2


# What is kept.


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):
        save_one(tmp_path, step, keep_last=2)
    assert steps(tmp_path) == [10, 100]
    assert (tmp_path / "latest").read_text() == "step-100\n"


def test_round_steps_are_kept_too(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25, 30):
        save_one(tmp_path, step, keep_last=1, keep_every=10)
    assert steps(tmp_path) == [10, 20, 30]
    save_one(tmp_path, 35, keep_last=2, keep_every=20)
    assert steps(tmp_path) == [20, 30, 35]


def test_a_step_is_saved_anew(tmp_path: Path) -> None:
    save_one(tmp_path, 4)
    saver = Saver(tmp_path, None, keep_last=2)
    saver.save(4, [piece("a", torch.zeros(1))], {"step": 4})
    saver.wait()
    assert list(open_checkpoint(tmp_path / "step-4").names) == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-4"]


def test_going_back_keeps_what_was_just_saved(tmp_path: Path) -> None:
    """Step 40 is broken, the run resumes at 20 and is stopped at 30; 40 is of no future any more."""
    for step in (20, 40):
        save_one(tmp_path, step)
    (tmp_path / "step-40" / "rank-00000.safetensors").write_bytes(b"")
    save_one(tmp_path, 30, keep_last=1, keep_every=20)
    assert steps(tmp_path) == [20, 30]
    saved = open_latest(tmp_path, pytest.fail)
    assert saved is not None and saved.state == {"step": 30}
