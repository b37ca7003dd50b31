"""Saving checkpoints while training goes on.

`Saver.save` copies the pieces that a rank owns to host memory and returns; a thread writes them.
Only main threads meet in collectives: in the save itself, and in the `wait` that ends it. In between
the ranks speak through files in the unfinished folder. Each leaves the entry of its file, or why
there is none, as `rank-00003.json`; rank 0 makes an index of them and gives the folder its name:

    checkpoints/.step-40.partial/{rank-00000.safetensors, rank-00000.json, ...}

That happens only when the files of all ranks are on the disk and together hold every element of
every tensor exactly once. A stop at any moment leaves the last good checkpoint as it was.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.checkpoint import INDEX, index_digest, steps
from parallel.collectives import Group, all_reduce, group_rank, group_size
from parallel.errors import UserError
from parallel.files import durable_file, sync, write_json
from parallel.rectangles import Rectangle, tile
from parallel.shards import Piece
from parallel.staging import Staged, Staging

_POLL_S = 0.05
_MESSAGE_BYTES = 1024


class Saver:
    """Saves checkpoints under a folder, one at a time, in the background.

    The last `keep_last` are kept, and every one whose step is a multiple of `keep_every` (0: none).
    `patience_s`: how long rank 0 waits for a further rank to finish before it gives a save up.
    """

    def __init__(
        self, root: Path, group: Group, *, keep_last: int, keep_every: int = 0, patience_s: float = 300.0
    ) -> None:
        assert keep_last > 0, "the save just made is kept"
        self._root, self._group = root, group
        self._rank, self._ranks = group_rank(group), group_size(group)
        self._keep_last, self._keep_every, self._patience_s = keep_last, keep_every, patience_s
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[Path] | None = None

    def save(self, step: int, pieces: Iterable[Piece], state: Mapping[str, Any]) -> None:
        """Begin to write `root/step-N`: what the pieces and the JSON values of `state` hold now.

        Collective: every rank passes the pieces it owns, rank 0's state is written. Waits for the
        save before and raises, as `wait` does, what went wrong with it.
        """
        self.wait()
        state_now = json.loads(json.dumps(dict(state)))
        staged = self._staging.copy(pieces)
        self._settle(self._prepare(step))
        self._under_way = self._thread.submit(self._write, step, staged, state_now)

    def wait(self) -> Path | None:
        """The folder of the save under way, once it has its name; None where none is under way.

        Collective. Raises what went wrong on this rank; UserError says what did on another one.
        """
        if self._under_way is None:
            return None
        error = self._under_way.exception()
        saving, self._under_way = self._under_way, None
        self._settle(error)
        return saving.result()

    def _settle(self, error: BaseException | None) -> None:
        """Raise this rank's error, or else what rank 0 says, which hears of every failure. Collective."""
        said = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
        if error is not None and self._rank == 0:
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            content = text.encode()[:_MESSAGE_BYTES]
            said[: len(content)] = torch.tensor(list(content))
        if self._group is not None:
            on_device = dist.get_backend(self._group) == "nccl"
            said = all_reduce(said.cuda() if on_device else said, self._group).cpu()
        if error is not None:
            raise error
        if said.any():
            raise UserError(bytes(said.tolist()).rstrip(b"\0").decode(errors="ignore"))

    def _prepare(self, step: int) -> UserError | None:
        """Rank 0 makes the folder that all ranks write to; what went wrong with that."""
        if self._rank > 0:
            return None
        try:
            for leftover in self._root.glob(".step-*.partial"):  # of saves that were interrupted
                shutil.rmtree(leftover)
            self._partial(step).mkdir(parents=True)
        except OSError as error:
            return self._not_written(step, error)
        return None

    def _write(self, step: int, staged: Staged, state: dict[str, Any]) -> Path:
        """This rank's part of a save, in the background: no collectives here."""
        partial, final = self._partial(step), self._folder(step)
        try:
            _write_rank(partial, self._rank, staged)
            if self._rank == 0:
                _publish(partial, final, make_index(self._collect(partial), state))
                self._prune(step)
        except OSError as error:
            raise self._not_written(step, error) from error
        return final

    def _collect(self, partial: Path) -> dict[str, dict[str, Any]]:
        """The entry of every rank's file, by file name, once all are there."""
        entries: dict[str, dict[str, Any]] = {}
        expected = [_rank_name(rank) for rank in range(self._ranks)]
        deadline = time.monotonic() + self._patience_s
        while missing := [name for name in expected if name not in entries]:
            arrived = {path.stem for path in partial.glob("rank-*.json")}.intersection(missing)
            for name in arrived:
                entries[name] = json.loads((partial / f"{name}.json").read_text())
                if "failed" in entries[name]:
                    raise OSError(f"{name}: {entries[name]['failed']}")
            if arrived:
                deadline = time.monotonic() + self._patience_s
            elif time.monotonic() > deadline:
                raise OSError(f"no sign of {missing[0]} for {self._patience_s:g} s")
            else:
                time.sleep(_POLL_S)
        return {f"{name}.safetensors": entries[name] for name in expected}

    def _prune(self, step: int) -> None:
        """Remove what need not be kept, and what is later: a future that the run went back from."""
        found = steps(self._root)
        past = [each for each in found if each <= step]
        kept = {each for each in past if self._keep_every and each % self._keep_every == 0}
        kept.update(past[-self._keep_last :])
        for each in set(found) - kept:
            shutil.rmtree(_hide(self._folder(each)))

    def _folder(self, step: int) -> Path:
        return self._root / f"step-{step}"

    def _partial(self, step: int) -> Path:
        return self._root / f".step-{step}.partial"

    def _not_written(self, step: int, error: OSError) -> UserError:
        return UserError(
            f"checkpoint {self._folder(step)} must be written by every rank, but was not ({error}): "
            "make room on the disk or have all ranks share it, and resume from the checkpoint before"
        )


def _write_rank(partial: Path, rank: int, staged: Staged) -> None:
    """Write a rank's file and then its entry. Where that fails, the entry says why."""
    path, entry_path = (partial / f"{_rank_name(rank)}.{kind}" for kind in ("safetensors", "json"))
    digest = hashlib.sha256()
    try:
        with durable_file(path) as file:
            for chunk in staged.chunks():
                digest.update(chunk)
                file.write(chunk)
        size = path.stat().st_size
    except Exception as error:
        path.unlink(missing_ok=True)  # makes room for the entry on a full disk
        write_json(entry_path, {"failed": str(error)})
        raise
    write_json(entry_path, {"sha256": digest.hexdigest(), "bytes": size, "pieces": staged.pieces})


def make_index(files: dict[str, dict[str, Any]], state: dict[str, Any]) -> dict[str, Any]:
    """The index of all of a checkpoint's files. Their pieces must hold every element of every tensor once."""
    tensors: dict[str, dict[str, Any]] = {}
    rectangles: dict[str, list[Rectangle]] = {}
    for file in files.values():
        for name, dtype, shape, offset, extent in file["pieces"]:
            facts = {"dtype": dtype, "shape": shape}
            known = tensors.setdefault(name, facts)
            assert known == facts, f"two pieces of tensor `{name}` say that it is {known} and {facts}"
            rectangles.setdefault(name, []).append(Rectangle(tuple(offset), tuple(extent)))
        file["pieces"] = [[name, offset, extent] for name, _, _, offset, extent in file["pieces"]]
    for name, facts in tensors.items():
        once = tile(rectangles[name], tuple(facts["shape"]))
        assert once, f"the ranks' pieces must hold every element of tensor `{name}` exactly once"
    index = {"state": state, "tensors": tensors, "files": files}
    return {**index, "sha256": index_digest(index)}


def _publish(partial: Path, final: Path, index: dict[str, Any]) -> None:
    """Give the folder its name, once everything in it is on the disk."""
    for entry in partial.glob("rank-*.json"):
        entry.unlink()
    write_json(partial / INDEX, index)
    sync(partial)
    replaced = _hide(final) if final.exists() else None  # the same step, of a run that went back
    partial.rename(final)
    if replaced:
        shutil.rmtree(replaced)
    latest = final.parent / ".latest.partial"
    with durable_file(latest) as file:
        file.write(f"{final.name}\n".encode())
    latest.rename(final.parent / "latest")
    sync(final.parent)


def _hide(folder: Path) -> Path:
    """Rename a checkpoint that is to be removed: half of it must not be taken for one."""
    return folder.rename(folder.with_name(f".{folder.name}.removed.partial"))


def _rank_name(rank: int) -> str:
    return f"rank-{rank:05d}"
