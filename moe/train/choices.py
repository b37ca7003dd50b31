"""Multiple-choice questions, answered by the likelihood that a model gives each choice after its context.

A row of a JSONL file is `{"context": "...", "choices": ["...", ...], "answer": 0}`, with `domain` if wanted.
A choice's score is the sum of its tokens' log-likelihoods; `accuracy` counts questions whose answer scores
best, `per_byte` those whose answer scores best per byte of text, which does not prefer short choices.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from moe.data.tokenizer import end_of_document
from moe.model.mtp import IGNORE
from moe.model.transformer import Outcome
from moe.train.engine import Engine
from moe.train.evaluate import forward
from parallel.collectives import all_reduce
from parallel.errors import UserError
from parallel.layout import length_multiple

ALL = "all"


@dataclass(frozen=True)
class Question:
    """A context, the texts that may follow it, and the number of the one that should."""

    context: str
    choices: tuple[str, ...]
    answer: int
    domain: str


@dataclass(frozen=True)
class Grade:
    """How many of a domain's questions were answered rightly, by either score."""

    questions: int
    accuracy: float
    per_byte: float

    @property
    def standard_error(self) -> float:
        """Of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.questions)


def read_questions(path: Path) -> list[Question]:
    """The questions of a file. UserError naming the line where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`--choices` must be a JSONL file, but {path} cannot be read ({error})") from None
    found = [
        _question(line, f"line {number} of {path}", path.stem)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise UserError(f"`--choices` must hold questions, but {path} is empty: name another file")
    return found


def _question(line: str, where: str, domain: str) -> Question:
    try:
        row: dict[str, Any] = json.loads(line)
        context, choices, answer = row["context"], row["choices"], row["answer"]
        texts = isinstance(context, str) and isinstance(choices, list) and all(map(_is_text, choices))
        if texts and type(answer) is int and 0 <= answer < len(choices):
            return Question(context, tuple(choices), answer, str(row.get("domain", domain)))
        reason = "`choices` are texts and `answer` is the number of one of them, from 0"
    except (ValueError, TypeError, LookupError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise UserError(
        f'`--choices` must hold rows {{"context", "choices", "answer"}}, but {where} does not ({reason}): '
        "mend or remove the line"
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def grade(
    engine: Engine,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    context: int,
    batch_size: int,
    start: Sequence[int] = (),
) -> dict[str, Grade]:
    """Grades by domain, `ALL` first. Every rank must call, with the same questions.

    `context`: inputs at most; of a longer row the beginning is left out. `start`: tokens before every text.
    """
    rows = [_row(tokenizer, q.context, choice, start, context) for q in questions for choice in q.choices]
    scores = iter(score(engine, rows, batch_size))
    right: dict[str, list[tuple[bool, bool]]] = {ALL: []}
    for question in questions:
        sums = [next(scores) for _ in question.choices]
        means = [total / len(c.encode()) for total, c in zip(sums, question.choices, strict=True)]
        answered = _best(sums) == question.answer, _best(means) == question.answer
        for domain in {ALL, question.domain}:  # one, where a domain is called that
            right.setdefault(domain, []).append(answered)
    return {
        domain: Grade(len(each), *(sum(column) / len(each) for column in zip(*each, strict=True)))
        for domain, each in right.items()
    }


def _best(scores: list[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _row(
    tokenizer: Tokenizer, context: str, choice: str, start: Sequence[int], limit: int
) -> tuple[list[int], int]:
    """Tokens of context and choice, and how many of the last belong to the choice.

    They are tokenized together, since a word's space belongs to its token, and blanks at the end of a
    context to the choice. Where nothing is before it, the end of a document is.
    """
    encoded = tokenizer.encode(context + choice, add_special_tokens=False)
    given = len(context.rstrip())
    begin = next((i for i, (_, end) in enumerate(encoded.offsets) if end > given), 0)
    before = list(start) if start or begin else [end_of_document(tokenizer)]
    begin, tokens = begin + len(before), [*before, *encoded.ids]
    return tokens[-(limit + 1) :], min(len(tokens) - begin, limit)


def score(engine: Engine, rows: Sequence[tuple[list[int], int]], batch_size: int) -> list[float]:
    """Log-likelihood of the last so many tokens of each row, given those before. Every rank must call.

    A row's first token is given, never predicted.
    """
    groups, device = engine.groups, engine.device
    ranks, rank = groups.layout.dp, groups.index("dp")
    found = torch.zeros(len(rows), dtype=torch.float64, device=device)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number][0]))  # little padding
    for numbers in _shares(order, ranks * batch_size):
        mine = numbers[rank::ranks]
        # A rank without rows runs on padding, because exchanges need every rank.
        outcome = _run(engine, [rows[number] for number in mine] or [([0, 0], 0)])
        if outcome.losses is not None and groups.index("tp") == 0:
            for number, losses in zip(mine, outcome.losses, strict=False):
                found[number] -= losses.double().sum()
    return all_reduce(found, groups.world).tolist()


def _shares(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for begin in range(0, len(numbers), size):
        yield numbers[begin : begin + size]


def _run(engine: Engine, rows: Sequence[tuple[list[int], int]]) -> Outcome:
    multiple = length_multiple(engine.groups.layout.cp, engine.groups.layout.tp)
    width = -(-max(len(tokens) - 1 for tokens, _ in rows) // multiple) * multiple
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    labels, valid = torch.full_like(tokens, IGNORE), torch.zeros_like(tokens, dtype=torch.bool)
    for index, (row, scored) in enumerate(rows):
        length = len(row) - 1
        tokens[index, :length] = torch.tensor(row[:-1])
        valid[index, :length] = scored > 0
        labels[index, length - scored : length] = torch.tensor(row[len(row) - scored :])
    return forward(engine, *(tensor.to(engine.device) for tensor in (tokens, labels, valid)))
