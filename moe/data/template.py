"""A chat template: messages -> token ids, and which of them are learnt. No torch.

A template is a Jinja program out of a file of strangers, so it runs in Jinja's sandbox; its surroundings are
those that `transformers` gives it, and so are the ids. Learnt are the assistant's turns, each with the token
that ends it, and nothing else. Where a turn lies in the text is found without the template's help:
it begins where the messages before it end when the assistant is asked for a turn, and ends where the
messages up to it end. A template that marks turns itself (`{% generation %}`) is taken at its word.
A template that writes a turn in another way once more messages follow, and marks none, is not understood.

Text of a message that reads like a special token would become that token. The assistant may write them (a
call of a tool is made of them); in what others say they would be forged turns, and are refused.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from moe.data.tokenizer import END_TOKENS, START_TOKENS, first_token, tokenizer_file
from parallel.errors import UserError

Message = dict[str, Any]  # "role" and "content", and what else a template may read

# DeepSeek-V2's, for tokenizers that bring none.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ 'User: ' + message.content + '\\n\\n' }}"
    "{% elif message.role == 'assistant' %}{{ 'Assistant: ' + message.content + eos_token }}"
    "{% else %}{{ message.content + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
BEGIN, END = "\ufdd0", "\ufdd1"  # stand around a marked turn; Unicode keeps them free of meaning


class BadChat(Exception):
    """A conversation that cannot be learnt: `reason`, a few words to count it by, and `detail`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class TemplateText:
    """A template as it was found, and the special tokens by the names that a configuration gives them."""

    source: str
    names: dict[str, str]


def read_template(path: str | None, tokenizer_path: str | None) -> TemplateText:
    """The template of a file, else the one beside the tokenizer's file, else the plain one.

    Special tokens have the names of a tokenizer_config.json: the given one, or the tokenizer's.
    """
    folder = tokenizer_file(tokenizer_path).parent if tokenizer_path else None
    given = Path(path).expanduser() if path else None
    config: dict[str, Any] = {}
    if given and given.suffix == ".json":
        config = _read_config(given)
    elif folder and (folder / CONFIG).is_file():
        config = _read_config(folder / CONFIG)
    source = _template_in(config)
    if given and given.suffix != ".json":
        source = _read(given)
    elif given and source is None:
        raise _no_template(given, "there is no `chat_template` in it")
    elif not given and folder and (folder / TEMPLATE).is_file():  # stands above the configuration's
        source = _read(folder / TEMPLATE)
    return TemplateText(PLAIN if source is None else source, _names_in(config))


class ChatTemplate:
    """A compiled template and the tokenizer that it was written for. `eos`: the id that ends an answer."""

    def __init__(self, text: TemplateText, tokenizer: Tokenizer) -> None:
        self._names = _complete(text.names, tokenizer)
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = False  # of the template, unlike those of a text
        eos = tokenizer.token_to_id(self._names["eos_token"])
        assert eos is not None
        self.eos: int = eos
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = tuple(token.content for token in added if token.special)
        try:
            self._template = _environment().from_string(text.source)
        except TemplateSyntaxError as error:
            raise UserError(
                f"`data.template` must be a chat template in Jinja, but has an error in line {error.lineno} "
                f"({error.message}): correct it, or name another"
            ) from error

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The text of a conversation; `ask`: with what asks the assistant for its turn."""
        return re.sub(f"[{BEGIN}{END}]", "", self._render(messages, ask))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation in which the assistant is asked for its turn."""
        return list(self._tokenizer.encode(self.render(messages, ask=True), add_special_tokens=False).ids)

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Token ids, and which are learnt as labels. Raises `BadChat`."""
        self._refuse_forged(messages)
        text, spans = _unmark(self._render(messages, ask=False))
        spans = [self._with_end(text, *span) for span in spans] or self._turns(messages, text)
        ends_open = messages[-1]["role"] == "assistant" and not text.rstrip().endswith(
            self._names["eos_token"]
        )
        if ends_open:  # all that is to come before the end token must be foreseen too
            spans[-1] = spans[-1][0], len(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids, learnt = list(encoding.ids), _inside(encoding.offsets, spans)
        return ([*ids, self.eos], [*learnt, True]) if ends_open else (ids, learnt)

    def _render(self, messages: Sequence[Message], ask: bool) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=ask, **self._names)
        except Exception as error:  # whatever a stranger's program may raise
            raise BadChat("template error", str(error) or type(error).__name__) from error

    def _refuse_forged(self, messages: Sequence[Message]) -> None:
        for message in messages:
            forged = (BEGIN, END) if message["role"] == "assistant" else (BEGIN, END, *self._special)
            for token in forged:
                if token in message["content"]:
                    raise BadChat("special token", f"{token!r} in what the {message['role']} says")

    def _turns(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Where the assistant's turns lie in the text of all messages, from its text after each of them."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], ask=True)
            upto = text if number + 1 == len(messages) else self._render(messages[: number + 1], ask=False)
            begin, stop = len(before), len(self._without_gap(upto))
            if not (upto.startswith(before) and text.startswith(upto[:stop]) and begin < stop):
                raise BadChat(
                    "turn not found",
                    f"the template rewrites message {number + 1}, and has no generation marks",
                )
            spans.append((begin, stop))
        return spans

    def _without_gap(self, text: str) -> str:
        """Without the white space between the token that ends a turn and the next turn."""
        ended = text.rstrip()
        return ended if ended.endswith(self._special) else text

    def _with_end(self, text: str, begin: int, stop: int) -> tuple[int, int]:
        """A marked turn with the end token that may stand just behind the mark."""
        eos = self._names["eos_token"]
        return begin, stop + len(eos) if text.startswith(eos, stop) else stop


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates find around them, as in `transformers`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment.filters["tojson"] = tojson  # Jinja's own is for HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  (as the base class has it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


def _unmark(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the stretches that they enclosed."""
    places: list[int] = []
    pieces = re.split(f"[{BEGIN}{END}]", marked)
    for piece in pieces[:-1]:
        places.append((places[-1] if places else 0) + len(piece))
    return "".join(pieces), list(zip(places[::2], places[1::2], strict=True))


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens, given the characters of each, have one inside a span.

    Some tokenizers leave white space out of a token's characters; one that is nothing else has none.
    """
    return [
        any((begin < stop or begin == end <= stop) and end > start for start, stop in spans)
        for begin, end in offsets
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _no_template(path, error) from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        raise _no_template(path, error) from error
    if not isinstance(config, dict):
        raise _no_template(path, f"it is a {type(config).__name__}")
    return config


def _no_template(path: Path, reason: object) -> UserError:
    return UserError(
        f"`data.template` must be a {TEMPLATE} or a {CONFIG}, but {path} cannot be read as one ({reason}): "
        "correct the file or the path"
    )


def _template_in(config: Mapping[str, Any]) -> str | None:
    """`chat_template` of a configuration: a template, or several with names."""
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {each["name"]: each["template"] for each in found}.get("default")
    return found


def _names_in(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like: the token's text, or an object that holds it."""
    given = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in given.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _complete(names: Mapping[str, str], tokenizer: Tokenizer) -> dict[str, str]:
    """The names, with the tokenizer's own begin and end where no configuration speaks of them."""
    start = {} if names else {"bos_token": first_token(tokenizer, START_TOKENS) or ""}
    complete = {"eos_token": first_token(tokenizer, END_TOKENS) or ""} | start | dict(names)
    end = complete["eos_token"]
    if tokenizer.token_to_id(end) is None:
        raise UserError(
            f"`data.tokenizer` must have the token that ends an answer, but has no "
            f"{end or ' or '.join(END_TOKENS)}: add it to its `added_tokens`"
        )
    return complete
