"""Multiple choice by log-likelihood: against logits row by row, and the same on any ranks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from moe.config import LayoutConfig, RunConfig
from moe.data.corpus import prepare
from moe.data.tokenizer import begin_of_text
from moe.train.choices import Grade, Question, _row, grade, read_questions, score
from moe.train.step import Trainer
from parallel.errors import UserError
from tests.moe.train.test_step import steps
from tests.ranks import run_ranks
from tests.small import small_run

QUESTIONS = [
    Question("expert router ", ("token", "shard stage batch norm"), 0, "short"),
    Question("gate bias load:", (" rank", " layer", " token token"), 2, "long"),
    Question("", ("plan mesh rope", "router"), 1, "long"),
]


def pieces(tokenizer: Tokenizer, question: Question, choice: str) -> tuple[list[int], int]:
    """The row's tokens, and where the choice begins."""
    tokens = tokenizer.encode(question.context + choice, add_special_tokens=False)
    blank = len(question.context.rstrip())
    begin = next(i for i, (_, end) in enumerate(tokens.offsets) if end > blank)
    return (tokens.ids, begin) if begin else ([tokenizer.token_to_id("<eos>"), *tokens.ids], 1)


@torch.no_grad()
def likelihoods(trainer: Trainer, tokenizer: Tokenizer) -> list[float]:
    found = []
    for question in QUESTIONS:
        for choice in question.choices:
            ids, begin = pieces(tokenizer, question, choice)
            chances = trainer.model(torch.tensor([ids]))[0].log_softmax(-1)
            found.append(float(sum(chances[i - 1, ids[i]] for i in range(begin, len(ids)))))
    return found


def on_ranks(rank: int, world_size: int, config: RunConfig) -> tuple[dict[str, Grade], list[float]]:
    trainer, _ = steps(config, world_size, rank, 2)
    tokenizer = prepare(config.data, config.model.vocab_size).tokenizer
    rows = []
    for question in QUESTIONS:
        for choice in question.choices:
            ids, begin = pieces(tokenizer, question, choice)
            rows.append((ids, len(ids) - begin))
    scores = score(trainer.engine, rows, 2)
    if world_size == 1:
        assert scores == pytest.approx(likelihoods(trainer, tokenizer), rel=1e-5)
    return grade(trainer.engine, tokenizer, QUESTIONS, context=32, batch_size=2), scores


def test_scores_are_log_likelihoods_under_any_layout(tmp_path: Path) -> None:
    config = small_run(tmp_path, num_mtp_layers=1)
    grades, scores = on_ranks(0, 1, config)
    best = [scores[:2], scores[2:5], scores[5:]]
    right = [max(range(len(s)), key=s.__getitem__) == q.answer for s, q in zip(best, QUESTIONS, strict=True)]
    assert grades["all"].accuracy == sum(right) / 3 and list(grades) == ["all", "short", "long"]
    assert grades["long"].questions == 2
    for layout in (LayoutConfig(dp=2, ep=2), LayoutConfig(tp=2), LayoutConfig(pp=2)):
        for found, others in run_ranks(2, on_ranks, replace(config, layout=replace(layout, microbatches=2))):
            assert others == pytest.approx(scores, rel=1e-4) and found == grades


def test_a_released_model_sees_its_first_token(tmp_path: Path) -> None:
    """Where the tokenizer_config.json beside a tokenizer asks for it."""
    tokenizer = prepare(small_run(tmp_path).data, 320).tokenizer
    beside, path = tmp_path / "tokenizer_config.json", str(tmp_path / "tokenizer.json")
    assert begin_of_text(path, tokenizer) is None
    for says, found in ((True, 0), (False, None)):
        beside.write_text(json.dumps({"add_bos_token": says, "bos_token": {"content": "<bos>"}}))
        assert begin_of_text(path, tokenizer) == found
    tokens = tokenizer.encode("token", add_special_tokens=False).ids
    assert _row(tokenizer, "", "token", [0], 9) == ([0, *tokens], len(tokens))
    assert _row(tokenizer, "", "token", [], 9) == ([1, *tokens], len(tokens))


def test_a_short_choice_is_not_preferred_per_byte() -> None:
    assert Grade(4, 0.5, 0.75).standard_error == pytest.approx(0.25)


@pytest.mark.parametrize(
    "row",
    ["[]", "{", '{"context": "a", "choices": ["b"]}', '{"context": "a", "choices": ["b"], "answer": 1}'],
)
def test_bad_rows_are_named(tmp_path: Path, row: str) -> None:
    good = json.dumps({"context": "a", "choices": ["b", "c"], "answer": 1, "domain": "d"})
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{good}\n\n")
    assert read_questions(path) == [Question("a", ("b", "c"), 1, "d")]
    path.write_text(f"{good}\n{row}\n")
    with pytest.raises(UserError, match="line 2 of"):
        read_questions(path)
