"""Chats: rows of JSON in three known forms -> messages -> token ids and which of them are learnt. No torch.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"instruction": "...", "input": "...", "output": "..."}                   (Alpaca; input may be missing)
    {"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."}    (ShareGPT; so may system)

A line that will not do is an item of the stream like a good one: counted by its reason, named by file
and line, written down, never dropped in silence. One row is in memory at a time.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moe.config import DataConfig
from moe.data.docstrings import read_pairs
from moe.data.sources import Document, SourceFile, refuse_file, without_surrogates
from moe.data.template import BadChat, ChatTemplate, Message
from parallel.errors import UserError
from parallel.files import durable_file

SHOWN = 10  # bad lines of each reason that are told; the file has all
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Chat:
    """One conversation, with an answer in it. `name` as a document's."""

    messages: list[Message]
    domain: str
    name: str
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that cannot be learnt, and why."""

    file: str
    line: int
    reason: str
    detail: str


def read_chats(files: Sequence[SourceFile], config: DataConfig) -> Iterator[Chat | BadLine]:
    """The conversations of the files in order; empty lines are passed over."""
    for file in files:
        try:
            with file.path.open(encoding="utf-8-sig", errors="replace") as stream:
                if file.docstrings:
                    yield from _pairs(stream.read(), file, config.sequence_length)
                    continue
                for number, line in enumerate(stream, start=1):
                    if line.isspace():
                        continue
                    try:
                        messages, domain = _parse(line, file, config)
                    except BadChat as bad:
                        yield BadLine(str(file.path), number, bad.reason, bad.detail)
                    else:
                        yield Chat(messages, domain, f"{file.name}:{number}", str(file.path), number)
        except OSError as error:
            refuse_file(error)


def texts(chats: Iterable[Chat | BadLine]) -> Iterator[Document]:
    """What is said in the good ones, for a tokenizer to learn from."""
    for chat in chats:
        if isinstance(chat, Chat):
            said = "\n\n".join(message["content"] for message in chat.messages)
            yield Document(said, chat.domain, chat.name)


def encode_chats(
    chats: Iterable[Chat | BadLine],
    template: ChatTemplate,
    *,
    skipped: Path,
    longest: int,
    max_bad: float,
    echo: Callable[[str], None],
) -> Iterator[tuple[Document, list[int], list[bool]]]:
    """Good conversations of at most `longest` tokens, each with its ids and mask; the rest goes to a file.

    Raises `UserError` at the end when more than the share `max_bad` was bad, or nothing good.
    """
    with durable_file(skipped) as file:
        ledger = Ledger(file, echo)
        for chat in chats:
            if isinstance(chat, BadLine):
                ledger.enter(chat)
                continue
            try:
                ids, learnt = template.encode(chat.messages)
                if len(ids) > longest:
                    raise BadChat("too long", f"{len(ids)} tokens, of at most {longest}")
            except BadChat as bad:
                ledger.enter(BadLine(chat.file, chat.line, bad.reason, bad.detail))
            else:
                ledger.good += 1
                yield Document("", chat.domain, chat.name), ids, learnt
    ledger.settle(max_bad)


class Ledger:
    """The bad lines of a corpus: all in a file, some told, and too many an error."""

    def __init__(self, file: BinaryIO, echo: Callable[[str], None]) -> None:
        self.good = 0
        self._file, self._echo = file, echo
        self._counts: Counter[str] = Counter()
        self._first: BadLine | None = None

    def enter(self, bad: BadLine) -> None:
        """Count, tell and write down."""
        self._first = self._first or bad
        self._counts[bad.reason] += 1
        if self._counts[bad.reason] <= SHOWN:
            self._echo(f"left out, {bad.reason}: line {bad.line} of {bad.file} ({bad.detail})")
        self._file.write(json.dumps(asdict(bad)).encode() + b"\n")

    def settle(self, max_bad: float) -> None:
        """Tell the counts. Raises `UserError` where too much was bad, or nothing good."""
        first, bad = self._first, self._counts.total()
        total = self.good + bad
        if first is None and not self.good:
            raise UserError(
                "`data.paths` must lead to some chats, but holds none: name .jsonl files, or folders of them"
            )
        if first is not None and (bad > max_bad * total or not self.good):
            raise UserError(
                f"`data.max_bad` must not be less than the share of bad lines, but {bad} of {total} are bad, "
                f"first line {first.line} of {first.file} ({first.reason}: {first.detail}): correct them, or "
                "raise it where some are good"
            )
        if bad:
            counts = ", ".join(f"{count:,} {reason}" for reason, count in self._counts.most_common())
            self._echo(f"{bad:,} of {total:,} lines were left out: {counts}")


def _pairs(source: str, file: SourceFile, sequence_length: int) -> Iterator[Chat]:
    for line, function, docstring in read_pairs(source, sequence_length):
        said = [{"role": "user", "content": function}, {"role": "assistant", "content": docstring}]
        yield Chat(said, file.domain, f"{file.name}:{line}", str(file.path), line)


def _parse(line: str, file: SourceFile, config: DataConfig) -> tuple[list[Message], str]:
    """Messages and domain of one row. Raises `BadChat`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # the latter from brackets without end
        raise BadChat("not JSON", str(error)) from error
    if not isinstance(row, dict):
        raise BadChat("wrong type", f"a {type(row).__name__} instead of an object")
    messages = [_checked(message) for message in _messages(row)]
    if not any(message["role"] == "assistant" for message in messages):
        raise BadChat("no assistant turn", f"only {', '.join(message['role'] for message in messages)}")
    domain = row.get(config.domain_key)
    if not isinstance(domain, str | int | None):
        raise BadChat("wrong type", f"{type(domain).__name__} under {config.domain_key!r}")
    return messages, without_surrogates(file.path.stem if domain in (None, "") else str(domain))


def _messages(row: dict[str, Any]) -> list[Message]:
    """The messages of a row in any of the three forms."""
    if "messages" in row:
        found = row["messages"]
    elif "conversations" in row:
        found = row["conversations"]
        if isinstance(found, list):
            system = [{"from": "system", "value": row["system"]}] if row.get("system") else []
            found = [_from_sharegpt(message) for message in [*system, *found]]
    elif "output" in row:
        asked = [row.get("instruction"), *([row["input"]] if row.get("input") else [])]
        if not all(isinstance(part, str) for part in asked):
            raise BadChat("wrong type", "`instruction` and `input` must be text")
        found = [
            {"role": "user", "content": "\n\n".join(asked)},
            {"role": "assistant", "content": row["output"]},
        ]
    else:
        raise BadChat("no messages", f"keys {sorted(row)}")
    if not isinstance(found, list):
        raise BadChat("wrong type", f"a {type(found).__name__} instead of a list of messages")
    if not found:
        raise BadChat("no messages", "the list is empty")
    return found


def _from_sharegpt(message: object) -> object:
    if not isinstance(message, dict):
        return message
    role = message.get("from")
    named = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": named, "content": message.get("value")}


def _checked(message: object) -> Message:
    """A message with a known role and text; keys without a value are dropped, as `transformers` does."""
    if not isinstance(message, dict):
        raise BadChat("wrong type", f"a {type(message).__name__} instead of a message")
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, str):
        raise BadChat("wrong type", f"a {type(content).__name__} instead of a message's text")
    if role not in ROLES:
        raise BadChat("unknown role", repr(role))
    if role == "assistant" and not content.strip():
        raise BadChat("empty answer", "the assistant says nothing")
    kept = {key: value for key, value in message.items() if value is not None}
    return kept | {"content": without_surrogates(content)}
