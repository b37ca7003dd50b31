"""Local ranks and joined ranks, as processes: exit codes, what is printed, signals.

The training loop is stood in for by one that does what the test says, so that a rank costs little.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import local
from launch.ranks import slurm_environment

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """
import os, sys, types
module = types.ModuleType("moe.train.loop")
exec(os.environ["STAND_IN"], module.__dict__)
sys.modules["moe.train.loop"] = module
"""
LOOP = """
import os, signal, time
def train(config, run):
    from parallel.errors import UserError
    rank = int(os.environ["RANK"])
"""


@pytest.fixture
def start(tmp_path: Path):
    """Start `train` with a stand-in loop of the given body; `rank`, `config` and `run` are at hand."""
    (tmp_path / "sitecustomize.py").write_text(STAND_IN)
    (tmp_path / "text.txt").write_text("a few words of text, and some more\n" * 200)
    (tmp_path / "two.yaml").write_text(
        "defaults: [base, _self_]\nlayout: {ep: 2}\nmodel: {vocab_size: 300}\ndata: {paths: [text.txt]}\n"
    )
    started = []

    def begin(body: str, *arguments: str, **environment: str) -> subprocess.Popen:
        outer = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "launch", "train", "recipe=two.yaml", *arguments],
            cwd=tmp_path,
            env=outer | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "STAND_IN": f"{LOOP}    {body}"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_a_user_error_on_all_ranks_is_printed_once(start) -> None:
    process = start("raise UserError('this will not do: mend it')")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, "switchyard: this will not do: mend it\n")


def test_a_crash_keeps_its_traceback_and_names_its_rank(start) -> None:
    process = start("rank == 1 and 1 / 0; time.sleep(20); return 0")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.count("ZeroDivisionError") == 1
    assert err.endswith("switchyard: rank 1 ended with exit code 1\n")


def test_every_rank_runs_the_folder_and_the_first_ctrl_c_lets_it_save(start, tmp_path: Path) -> None:
    process = start(
        "stop = []; signal.signal(signal.SIGINT, lambda *_: stop.append(1)); print('waits', flush=True)\n"
        "    while not stop: time.sleep(0.05)\n"
        "    time.sleep(rank)\n"
        "    print(rank, os.environ['WORLD_SIZE'], run, os.environ['OMP_NUM_THREADS'], flush=True)\n"
        "    return 130",
        "launch.threads=3",
    )
    until_all_wait(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert out.splitlines()[-2:] == ["0 2 runs/two 3", "1 2 runs/two 3"]
    assert (tmp_path / "runs" / "two" / "config.yaml").is_file()


@pytest.fixture
def stubborn():
    """An agent with one rank, which takes no notice of Ctrl-C."""
    ignore = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    )
    rank = subprocess.Popen([sys.executable, "-c", ignore], stdout=subprocess.PIPE, start_new_session=True)
    rank.stdout.readline()
    group = SimpleNamespace(workers=[SimpleNamespace(id=rank.pid)])
    yield SimpleNamespace(get_worker_group=lambda: group, rank=rank)
    rank.kill()
    rank.communicate()


def test_the_second_ctrl_c_kills(stubborn) -> None:
    with local._Signals(stubborn) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            stubborn.rank.wait(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        assert stubborn.rank.wait(10) == -signal.SIGKILL
    assert signals.received == 2


def test_the_end_of_the_grace_time_kills(stubborn, monkeypatch) -> None:
    monkeypatch.setattr(local, "GRACE_SECONDS", 1)
    with local._Signals(stubborn):
        os.kill(os.getpid(), signal.SIGINT)
        assert stubborn.rank.wait(10) == -signal.SIGKILL


def test_handlers_are_given_back(stubborn) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    with local._Signals(stubborn):
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_ranks_that_are_there_already_agree_on_one_run(start, tmp_path: Path) -> None:
    (tmp_path / "runs" / "two").mkdir(parents=True)
    body = "print(rank, run, config.train.steps); return 0"
    done = join(start, body, "train.steps=7")
    assert [process.returncode for process, _, _ in done] == [0, 0]
    assert [out.splitlines()[-1] for _, out, _ in done] == ["0 runs/two-2 7", "1 runs/two-2 7"]


def test_too_few_ranks_are_told_once(start, tmp_path: Path) -> None:
    done = join(start, "return 0", "layout.dp=4")
    assert [process.returncode for process, _, _ in done] == [2, 2]
    assert "the layout needs 4 and 2 were started" in done[0][2]
    assert done[1][2] == ""
    assert not (tmp_path / "runs").exists()


def join(start, body: str, *arguments: str) -> list[tuple[subprocess.Popen, str, str]]:
    port = str(20000 + os.getpid() % 20000)
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start(body, *arguments, RANK=str(rank), **meet) for rank in range(2)]
    return [(process, *process.communicate(timeout=60)) for process in processes]


def until_all_wait(process: subprocess.Popen) -> None:
    seen = 0
    while seen < 2:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        seen += line.count("waits")


@pytest.mark.parametrize(
    ("codes", "signals", "verdict", "named"),
    [
        ({}, 0, 0, ""),
        ({}, 1, 0, ""),
        ({0: 130, 1: -15}, 0, 130, ""),
        ({0: -2, 1: -15}, 1, 130, ""),
        ({0: -15, 1: 2}, 0, 2, ""),
        ({0: -15, 1: 7}, 0, 1, "rank 1 ended with exit code 7"),
        ({0: 1, 1: -9}, 0, 1, "rank 1 ended with SIGKILL"),
        ({0: 130, 1: 1}, 1, 1, "rank 1 ended with exit code 1"),
        ({3: -15}, 0, 1, "rank 3 ended with SIGTERM"),
    ],
)
def test_verdict(codes: dict[int, int], signals: int, verdict: int, named: str, capsys) -> None:
    failures = {rank: SimpleNamespace(exitcode=code) for rank, code in codes.items()}
    assert local._verdict(failures, signals) == verdict
    assert capsys.readouterr().err == (f"switchyard: {named}\n" if named else "")


def test_threads_are_given_kept_or_shared_out(monkeypatch) -> None:
    monkeypatch.setattr(local, "_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert local._environment(2, None)["OMP_NUM_THREADS"] == "4"
    assert local._environment(16, None)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in local._environment(2, None)
    assert local._environment(2, 3)["OMP_NUM_THREADS"] == "3"


def test_slurm_step_stands_for_torchrun() -> None:
    task = {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "2",
        "MASTER_ADDR": "node1",
    }
    assert slurm_environment(task) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "22077",
    }
    assert slurm_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == {}  # a batch script, not a step
    assert slurm_environment(task | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
