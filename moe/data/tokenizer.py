"""A byte-level BPE tokenizer: trained on a sample of the corpus, or opened from a file. No torch.

Text is always taken literally: `<eos>` written inside a document is five characters, never the
token, so that only the end of a document looks like one.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe.data.sources import Document
from parallel.errors import UserError

TOKENIZER = "tokenizer.json"
SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")  # ids 0, 1, 2
DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"  # its bars and spaces are not the ASCII ones
END_TOKENS = ("<eos>", "<|end_of_text|>", DEEPSEEK_END, "</s>", "<|endoftext|>")
START_TOKENS = ("<bos>", "<|begin_of_text|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<s>")
BATCH_CHARACTERS = 1 << 20


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens (fewer when the text has no more pairs to merge)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise UserError(
            f"`model.vocab_size` must hold the {len(alphabet)} bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens of a trained tokenizer, but is {vocab_size}: use {smallest} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _literal(tokenizer)


def open_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of the folder that holds one."""
    try:
        return _literal(Tokenizer.from_buffer(read_tokenizer(path)))
    except UserError:
        raise
    except Exception as error:  # the library raises plain `Exception` for a malformed file
        raise _no_tokenizer(path, error) from error


def read_tokenizer(path: str) -> bytes:
    """The content of a `tokenizer.json`."""
    try:
        return tokenizer_file(path).read_bytes()
    except OSError as error:
        raise _no_tokenizer(path, error.strerror) from error


def tokenizer_file(path: str) -> Path:
    """The file itself, where its folder may be named instead."""
    given = Path(path).expanduser()
    return given / TOKENIZER if given.is_dir() else given


def begin_of_text(path: str, tokenizer: Tokenizer) -> int | None:
    """The id that a released model expects before a text, if the tokenizer_config.json beside it says so."""
    try:
        beside = tokenizer_file(path).with_name("tokenizer_config.json")
        config = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    token = config.get("bos_token")
    content = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(content) if config.get("add_bos_token") and content else None


def _no_tokenizer(path: str, reason: object) -> UserError:
    return UserError(
        f"`data.tokenizer` must be a tokenizer.json, but {path} cannot be opened as one ({reason}): "
        "correct the path, or leave it out to train a tokenizer"
    )


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise `UserError` unless every id fits the model and some token ends a document."""
    needed = max(tokenizer.get_vocab().values()) + 1  # ids may leave gaps
    if needed > vocab_size:
        raise UserError(
            f"`model.vocab_size` must hold every token of `data.tokenizer`, but is {vocab_size} for "
            f"{needed} tokens: use {needed} or more"
        )
    end_of_document(tokenizer)


def end_of_document(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a document."""
    ids = (tokenizer.token_to_id(token) for token in END_TOKENS)
    found = next((number for number in ids if number is not None), None)
    if found is None:
        raise UserError(
            "`data.tokenizer` must have a token that ends a document, but has none of "
            f"{', '.join(END_TOKENS)}: add one to its `added_tokens`"
        )
    return found


def first_token(tokenizer: Tokenizer, tokens: Iterable[str]) -> str | None:
    """The first of these tokens that a tokenizer has."""
    return next((token for token in tokens if tokenizer.token_to_id(token) is not None), None)


def sample(documents: Iterable[Document], share: float) -> Iterator[str]:
    """About `share` of the text, spread evenly over the documents and beginning with the first."""
    seen = taken = 0
    for document in documents:
        if taken <= share * seen:
            taken += len(document.text)
            yield document.text
        seen += len(document.text)


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its token ids, the end token last; memory is bounded by `BATCH_CHARACTERS`."""
    end = end_of_document(tokenizer)
    for batch in _batches(documents):
        encodings = tokenizer.encode_batch_fast(
            [document.text for document in batch], add_special_tokens=False
        )
        for document, encoding in zip(batch, encodings, strict=True):
            yield document, [*encoding.ids, end]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _literal(tokenizer: Tokenizer) -> Tokenizer:
    """Take text as it is: no special tokens out of it, and none of the cutting a file may ask for."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
