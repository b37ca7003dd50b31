"""`switchyard evaluate` and `switchyard generate`: on a run, a checkpoint, folders, adapters, ranks."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch import compose, together, train
from launch.__main__ import main
from launch.output import write_json
from launch.ranks import ROOT
from moe.config import RunConfig, TuneConfig
from moe.data.tokenizer import open_tokenizer
from moe.hf.convert import plan_from_hf, plan_to_hf
from moe.hf.load import open_model
from moe.hf.places import SETTINGS
from moe.rules import validate
from moe.train import loop
from tests.moe.hf.test_convert import make
from tests.small import small_run

PROMPT = "expert router token"
PLAIN = ["--temperature", "0", "--tokens", "12"]
Say = Callable[..., str]


def trained(folder: Path, config: RunConfig) -> Path:
    """A run's folder as `switchyard train` leaves it."""
    plan = train.Plan(config=config, layout=validate(config), recipe="small", folder=folder, resumes=False)
    assert loop.train(train._begin(plan), folder) == 0
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`, which saw all of its validation data at the end, and folders made of it."""
    folder = tmp_path_factory.mktemp("use")
    config = small_run(folder)
    config = replace(
        config, train=replace(config.train, eval_sequences=10_000), optim=replace(config.optim, lr=0.01)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_report", lambda folder: None)  # pictures take long
        run = trained(folder / "run", config)
    make(folder / "hf", plan_to_hf(run, folder / "hf", None))
    make(folder / "converted", plan_from_hf(folder / "hf"))
    swapped(folder / "hf", folder / "varied", 0, 0, draw=True)
    return folder


def swapped(source: Path, target: Path, one: int, other: int, *, draw: bool = False) -> Path:
    """A Hugging Face folder with two words renamed; `draw`: with words drawn so that no text is alike."""
    shutil.copytree(source, target)
    file, stream = target / "model.safetensors", torch.Generator().manual_seed(0)
    tensors = load_file(file)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if draw:
            tensors[name] = torch.randn(tensors[name].shape, generator=stream)
            tensors[name][:3] = 0.0  # special tokens, which are never likeliest
        tensors[name][[one, other]] = tensors[name][[other, one]]
    save_file(tensors, file, metadata={"format": "pt"})
    (target / "SHA256SUMS").unlink(missing_ok=True)
    return target


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command whose one rank is this process; what it prints."""

    def start_here(world_size: int, command: list[str], threads: int | None) -> int:
        assert world_size == 1
        return main(command[command.index("launch") + 1 :])

    class Alone:
        def is_first(self, sentence: str) -> bool:
            return True

        def part(self, patience: object) -> None:
            pass

    monkeypatch.setattr("launch.local.start_ranks", start_here)
    monkeypatch.setattr(together, "Meeting", Alone)
    monkeypatch.setattr(together, "_die_of_signals", lambda: None)

    def command(*words: object) -> str:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return command


def evaluated(say: Say, folder: Path, *words: object) -> dict[str, Any]:
    """What `evaluate --json` writes; its table says the same."""
    file = folder / "found.json"
    table = say("evaluate", *words, "--json", file)
    found: dict[str, Any] = json.loads(file.read_text())
    for domain, each in found.get("losses", {}).items():
        row = [domain, f"{each['loss']:.4f}", f"{each['perplexity']:.2f}"]
        assert row in [line.split() for line in table.splitlines()]
    return found


def last_evaluation(run: Path) -> dict[str, float]:
    """The losses by domain that training found at its end."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    end = max(row["step"] for row in rows)
    return {row["domain"]: row["eval_loss"] for row in rows if row["step"] == end and "eval_loss" in row}


def losses(found: dict[str, Any]) -> dict[str, float]:
    return {domain: each["loss"] for domain, each in found["losses"].items()}


def likeliest(model: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy ids by the model itself."""
    opened, tokens = open_model(model), list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(opened(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens


def data_of(run: Path) -> list[str]:
    """The settings by which a folder reads what a run reads."""
    config = compose.read_yaml(run / SETTINGS)
    values = {"paths": json.dumps(config.data.paths), "cache": config.data.cache, "sequence_length": 32}
    return [*(f"data.{key}={value}" for key, value in values.items()), "data.validation_fraction=0.2"]


def test_losses_are_those_that_training_found(place: Path, say: Say) -> None:
    """Of a run, of its checkpoint, and by the run's data of what it was exported and converted to."""
    expected = pytest.approx(last_evaluation(place / "run"), rel=1e-5)
    assert losses(evaluated(say, place, place / "run")) == expected
    assert losses(evaluated(say, place, place / "run" / "checkpoints" / "step-6")) == expected
    for folder in (place / "hf", place / "converted"):
        assert losses(evaluated(say, place, folder, *data_of(place / "run"))) == expected


def test_all_reads_the_training_documents_too(place: Path, say: Say) -> None:
    """The mean over both splits, weighed by their labels; a corpus of one document holds none out."""
    held_out = losses(evaluated(say, place, place / "run"))["all"]
    every = losses(evaluated(say, place, place / "run", "--all"))["all"]
    learnt = losses(evaluated(say, place, place / "run", "--all", "data.validation_fraction=0"))["all"]
    assert every == pytest.approx(learnt, rel=2e-3) and abs(every - held_out) > 1e-4
    lone = place / "lone.txt"
    lone.write_text("expert router token layer\n" * 20)
    assert main(["evaluate", str(place / "run"), f"data.paths=[{lone}]"]) == 2
    assert set(losses(evaluated(say, place, place / "run", f"data.paths=[{lone}]", "--all"))) == {
        "all",
        "lone",
    }


def test_choices_are_graded(place: Path, say: Say, capsys: pytest.CaptureFixture[str]) -> None:
    """A line of a text may end within a row; without `data.` or `--all` nothing else is measured."""
    file = place / "choices.jsonl"
    rows = [
        {"context": "expert\u2028router ", "choices": ["token", "zzzzzzzz"], "answer": 0},
        {"context": "gate bias ", "choices": ["load", "@@@@@@@@"], "answer": 1, "domain": "all"},
    ]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    found = evaluated(say, place, place / "run", "--choices", file)
    assert set(found) == {"choices"}
    assert found["choices"]["choices"] == {"questions": 1, "accuracy": 1.0, "per_byte": 1.0}
    assert found["choices"]["all"] == {"questions": 2, "accuracy": 0.5, "per_byte": 0.5}
    assert set(evaluated(say, place, place / "run", "--choices", file, "--all")) == {"choices", "losses"}


def test_bad_questions_are_one_sentence(place: Path, say: Say, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a weight is read."""
    file = place / "bad.jsonl"
    file.write_text(json.dumps({"context": "", "choices": "abc", "answer": 0}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.using.make_reader", None)
        assert main(["evaluate", str(place / "run"), "--choices", str(file)]) == 2
    said = capsys.readouterr().err
    assert f"line 1 of {file} does not" in said and said.count("\n") == 1


def test_a_prompt_is_continued_by_what_is_likeliest(place: Path, say: Say) -> None:
    """Token by token as the model itself says, from every kind of place; drawn, as the seed says."""
    tokenizer = open_tokenizer(str(place / "hf"))
    ids = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    for model in (place / "run", place / "hf", place / "converted", place / "varied"):
        said = likeliest(model, ids, 12)
        assert say("generate", model, PROMPT, *PLAIN) == tokenizer.decode(said) + "\n"
    assert len(set(said)) > 6
    drawn = [say("generate", place / "run", PROMPT, f"train.seed={seed}") for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_chat_uses_the_template(place: Path, say: Say, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the folder, else a plain one; the answer alone is printed. One that refuses is said so."""
    template = place / "template.jinja"
    template.write_text("{{ messages[0].content }} layer{% if add_generation_prompt %} norm{% endif %}")
    tokenizer = open_tokenizer(str(place / "hf"))
    for words, text in (
        ([f"data.template={template}"], f"{PROMPT} layer norm"),
        ([], f"<bos>User: {PROMPT}\n\nAssistant:"),
    ):
        tokenizer.encode_special_tokens = False
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        answer = tokenizer.decode(likeliest(place / "varied", ids, 12)[len(ids) :])
        assert say("generate", place / "varied", PROMPT, "--chat", *PLAIN, *words) == answer + "\n"
    template.write_text("{{ raise_exception('no users') }}")
    refused = ["generate", str(place / "varied"), PROMPT, "--chat", f"data.template={template}"]
    assert main(refused) == 2
    said = capsys.readouterr().err
    assert "no users" in said and said.count("\n") == 1


def test_a_tokenizer_must_fit_the_model(place: Path, say: Say, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = open_tokenizer(str(place / "hf"))
    tokenizer.add_tokens(["expert-router-token"])
    tokenizer.save(str(place / "larger.json"))
    larger = f"data.tokenizer={place / 'larger.json'}"
    assert main(["generate", str(place / "run"), PROMPT, *PLAIN, larger]) == 2
    assert "`model.vocab_size` must hold every token of `data.tokenizer`" in capsys.readouterr().err


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    """The perplexity of a run that went wrong."""
    write_json(tmp_path / "found.json", {"losses": {"all": {"loss": math.nan, "perplexity": math.inf}}})
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {"losses": {"all": {"loss": None, "perplexity": None}}}


def test_generation_stops_at_the_end(place: Path, say: Say) -> None:
    """A word that would be said, and others after it, becomes the end (1): nothing of these is said."""
    tokenizer = open_tokenizer(str(place / "hf"))
    ids = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    said = likeliest(place / "varied", ids, 12)[len(ids) :]
    at = next(i for i in range(3, 12) if said[i] not in (*ids, *said[:i]))
    ended = swapped(place / "varied", place / "ended", 1, said[at])
    assert {*said[at + 1 :]} - {0, 1, 2, said[at]}
    assert say("generate", ended, PROMPT, *PLAIN) == tokenizer.decode([*ids, *said[:at]]) + "\n"


@pytest.mark.parametrize("method", ["lora", "esft"])
def test_tuned_runs(method: str, place: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters, or trained experts, count together with what the run began from."""
    monkeypatch.setattr(loop, "write_report", lambda folder: None)
    selection = place / "selection.json"
    selection.write_text(json.dumps({"experts": {"1": [1, 2], "2": [0, 5]}}))
    tune = {
        "lora": TuneConfig(method="lora", lora_rank=4),
        "esft": TuneConfig(method="esft", selection=str(selection)),
    }[method]
    config = compose.read_yaml(place / "run" / SETTINGS)
    config = replace(
        config,
        tune=tune,
        balance=replace(config.balance, bias="frozen"),
        data=replace(config.data, tokenizer=str(place / "hf" / "tokenizer.json")),
        train=replace(config.train, init=str(place / "hf"), steps=2),
        optim=replace(config.optim, lr=0.02, warmup_steps=0),
    )
    run = trained(place / method, config)
    found = last_evaluation(run)
    assert losses(evaluated(say, place, run)) == pytest.approx(found, rel=1e-5)
    assert found["all"] != pytest.approx(last_evaluation(place / "run")["all"], rel=1e-4)
    ids = open_tokenizer(str(place / "hf")).encode(PROMPT, add_special_tokens=False).ids
    text = open_tokenizer(str(place / "hf")).decode(likeliest(run, ids, 12))
    assert say("generate", run, PROMPT, *PLAIN) == text + "\n"


def test_two_ranks_find_the_same(place: Path, say: Say) -> None:
    """As real processes, with the experts cut over both."""
    file = place / "choices-of-two.jsonl"
    file.write_text(json.dumps({"context": PROMPT, "choices": [" layer", " norm", " @"], "answer": 0}))
    alone = evaluated(say, place, place / "run", "--all", "--choices", file)
    words = ["evaluate", place / "run", "layout.ep=2", "--all", "--choices", file, "--json", place / "two"]
    done = subprocess.run(
        [sys.executable, "-m", "launch", *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    both = json.loads((place / "two").read_text())
    assert losses(both) == pytest.approx(losses(alone), rel=1e-5) and both["choices"] == alone["choices"]
    assert done.stdout.count("perplexity") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["evaluate", "nowhere"], "`nowhere` has neither"),
        (["generate", "nowhere", "x"], "`nowhere` has neither"),
        (["generate", "RUN"], "the following arguments are required: prompt"),
        (["generate", "RUN", "x", "--tokens", "0"], "`--tokens` must be at least 1, but is 0"),
        (["generate", "RUN", "x", "--tokens", "many"], "invalid int value: 'many'"),
        (["generate", "RUN", "x", "--temperature", "-1"], "`--temperature` must be at least 0, but is -1.0"),
        (["generate", "RUN", "x", "--temperature", "nan"], "`--temperature` must be at least 0, but is nan"),
        (["generate", "RUN", "x", "--tokenz", "3"], "there is no option `--tokenz`"),
        (["generate", "RUN", "x", "layout.eq=2"], "did you mean `layout.ep`"),
        (["evaluate", "RUN", "layout.ep=3"], "must divide"),
        (["evaluate", "RUN", "model.num_layers=2"], "`model.num_layers` must be 3 as in"),
        (["evaluate", "RUN", "--choices", "nowhere"], "`--choices` must be a JSONL file, but nowhere"),
        (["evaluate", "RUN", "--json", "no/where"], "`--json` must lie in an existing folder"),
        (["evaluate", "RUN", "--all", "data.paths=[nowhere]"], "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], sentence: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(place / "run") if word == "RUN" else word for word in words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
