"""`switchyard convert`: between Hugging Face folders and ours, file by file, in one process or several.

This process plans, which finds whatever is wrong before a byte is written; ranks plan the same for
themselves and share the files out. They need no process group: what each has finished lies in the
unfinished folder, for this process, which makes the index, and for the next call, should this one be killed.
"""

import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launch.handover import hand_over, take_over
from launch.options import Parser
from launch.ranks import AS_RANK, rank_command, started_ranks
from moe.telemetry.transfer import Transfer
from parallel.errors import UserError

if TYPE_CHECKING:
    from moe.hf.save import Conversion


Command = Literal["from-hf", "to-hf", "merge-esft"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every process is told."""

    command: Command
    source: str
    target: str
    adapter: str | None = None
    dtype: Literal["bf16", "fp32"] | None = None
    shard_bytes: int = 0


def from_hf(arguments: Sequence[str]) -> int:
    """`convert from-hf`: the exit code."""
    return _main("from-hf", arguments)


def to_hf(arguments: Sequence[str]) -> int:
    """`convert to-hf`: the exit code."""
    return _main("to-hf", arguments)


def merge_esft(arguments: Sequence[str]) -> int:
    """`convert merge-esft`: the exit code."""
    return _main("merge-esft", arguments)


def _main(command: Command, arguments: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if arguments[:1] == [AS_RANK]:
        _be_rank(Path(arguments[1]))
        return 0
    job, processes = _parse(command, arguments)
    return _convert(job, processes)


def _parse(command: Command, arguments: Sequence[str]) -> tuple[Job, int]:
    parser = Parser(f"convert {command}")
    parser.add_argument("source", type=Path)
    if command == "merge-esft":
        parser.add_argument("adapter", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    if command != "from-hf":
        parser.add_argument("--shard-gb", type=float, default=5.0)
        parser.add_argument("--dtype", choices=("bf16", "fp32"))
    options = parser.parse_args(arguments)
    shard_gb = getattr(options, "shard_gb", 5.0)
    for name, value in (("processes", options.processes), ("shard-gb", shard_gb)):
        if not value > 0:
            raise UserError(f"`--{name}` must be greater than 0, but is {value}: use 1 or more")
    job = Job(
        command=command,
        source=str(options.source.expanduser().resolve()),
        target=str(options.target.expanduser().resolve()),
        adapter=str(options.adapter.expanduser().resolve()) if command == "merge-esft" else None,
        dtype=getattr(options, "dtype", None),
        shard_bytes=int(shard_gb * 10**9),
    )
    return job, options.processes


def _convert(job: Job, processes: int) -> int:
    """Plan, have the files written, and give the folder its name."""
    from moe.hf.convert import verified
    from parallel.assembly import Assembly

    if job.command != "from-hf":
        job = replace(job, source=str(verified(Path(job.source))))
    plan = _plan(job)
    with Assembly(Path(job.target)) as assembly:
        assembly.begin(plan.files)
        with Transfer(plan.nbytes, assembly.written):
            if processes == 1:
                assembly.write(plan.files)
            elif code := _write_on_ranks(job, processes):
                return code
        assembly.publish(plan.files, plan.finish)
    print(f"wrote {job.target}", flush=True)
    return 0


def _write_on_ranks(job: Job, processes: int) -> int:
    from launch.local import start_ranks

    with hand_over(job) as folder:
        return start_ranks(processes, rank_command(f"convert {job.command}", folder), 1)


def _be_rank(folder: Path) -> None:
    from parallel.assembly import Assembly

    ranks = started_ranks()
    assert ranks is not None
    job = take_over(Job, folder)
    logging.disable(logging.WARNING)  # the process that planned first has said it
    with Assembly(Path(job.target)) as assembly:
        assembly.join()
        assembly.write(_plan(job).files[ranks.rank :: ranks.world_size])


def _plan(job: Job) -> "Conversion":
    import torch

    from moe.hf.convert import plan_from_hf, plan_to_hf

    if job.command == "from-hf":
        return plan_from_hf(Path(job.source))
    dtypes = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}
    adapter = None if job.adapter is None else Path(job.adapter)
    return plan_to_hf(Path(job.source), Path(job.target), dtypes[job.dtype], job.shard_bytes, adapter)
