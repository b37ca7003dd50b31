"""From settings to a tokenized corpus, once: later starts find it in the cache by its fingerprint. No torch.

A corpus is built in a temporary folder and renamed into place when complete, so a cache entry is whole
or absent. Of two processes that build the same corpus at once the slower drops its own and opens the other's.
"""

import contextlib
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from moe.config import DataConfig
from moe.data.chat import encode_chats, read_chats, texts
from moe.data.shards import Encoded, TokenShards, read_manifest, write_shards
from moe.data.sources import CHAT_SUFFIXES, SUFFIXES, SourceFile, list_files, read_documents
from moe.data.template import ChatTemplate, read_template
from moe.data.tokenizer import (
    TOKENIZER,
    check_tokenizer,
    encode,
    end_of_document,
    open_tokenizer,
    read_tokenizer,
    sample,
    train_tokenizer,
)
from parallel.errors import UserError
from parallel.files import durable_file, sync

FORMAT = 1  # raise it when the same settings would give other files
CHAT_FORMAT = 1  # the same for chats alone
SAMPLE_BYTES = 1 << 26  # of text that a tokenizer is trained on
SKIPPED = "skipped.jsonl"  # of chats: the lines that were left out, and why

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A tokenized corpus: two splits, the domain names by id, and the id that ends a document."""

    train: TokenShards
    validation: TokenShards
    domains: tuple[str, ...]
    eos: int
    tokenizer_path: Path

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, opened on first use: training never needs it."""
        return open_tokenizer(str(self.tokenizer_path))


def prepare(config: DataConfig, vocab_size: int, echo: Callable[[str], None] = logger.info) -> Corpus:
    """The corpus of these settings, from `config.cache` or built now; `echo` is told what is being done.

    Raises `UserError` for paths, rows, tokenizers or a cache that will not do; nothing is left behind then.
    """
    files = list_files(config.paths, CHAT_SUFFIXES if config.format == "chat" else SUFFIXES)
    cache = Path(config.cache).expanduser()
    folder = cache / _fingerprint(files, config, vocab_size)
    corpus = _open(folder)
    if corpus is None:
        with _scratch(cache) as scratch:
            with contextlib.suppress(FileNotFoundError):  # a broken entry is moved away in one step
                folder.rename(scratch / "broken")
            _build(scratch / "corpus", files, config, vocab_size, echo)
            _install(scratch / "corpus", folder)
        corpus = _open(folder)
        assert corpus is not None, folder
    return corpus


def _fingerprint(files: Sequence[SourceFile], config: DataConfig, vocab_size: int) -> str:
    """A hash over everything that decides what a corpus holds."""
    facts: dict[str, object] = {
        "format": FORMAT,
        "files": [(str(file.path), file.name, file.domain, file.size, file.modified) for file in files],
        "tokenizer": config.tokenizer and hashlib.sha256(read_tokenizer(config.tokenizer)).hexdigest(),
        "vocab_size": vocab_size,
        "validation_fraction": config.validation_fraction,
        "keys": (config.text_key, config.domain_key),
    }
    if config.format == "chat":  # texts keep the entries that they have
        facts["chat"] = {
            "format": CHAT_FORMAT,
            "template": asdict(read_template(config.template, config.tokenizer)),
            "sequence_length": config.sequence_length,
            "max_bad": config.max_bad,
        }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _open(folder: Path) -> Corpus | None:
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    return Corpus(
        train=TokenShards(folder, manifest, validation=False),
        validation=TokenShards(folder, manifest, validation=True),
        domains=manifest.domains,
        eos=manifest.eos,
        tokenizer_path=folder / TOKENIZER,
    )


@contextlib.contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    """A folder beside the entries of the cache, removed in any case."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=cache, prefix=".building-")
    except OSError as error:
        raise UserError(
            f"`data.cache` must be a folder that can be written, but {cache} is not ({error.strerror}): "
            "change its permissions or name another"
        ) from error
    with scratch as name:
        yield Path(name)


def _build(
    folder: Path,
    files: Sequence[SourceFile],
    config: DataConfig,
    vocab_size: int,
    echo: Callable[[str], None],
) -> None:
    """Write a whole corpus into a new folder."""
    began = time.perf_counter()
    num_bytes = sum(file.size for file in files)
    echo(f"reading {len(files)} files, {num_bytes / 1e6:.1f} MB")
    if config.tokenizer is None:
        share = min(1.0, SAMPLE_BYTES / max(1, num_bytes))
        is_chat = config.format == "chat"
        documents = texts(read_chats(files, config)) if is_chat else read_documents(files, config)
        tokenizer = train_tokenizer(sample(documents, share), vocab_size)
    else:
        tokenizer = open_tokenizer(config.tokenizer)
        check_tokenizer(tokenizer, vocab_size)
    folder.mkdir()
    with durable_file(folder / TOKENIZER) as file:
        file.write(tokenizer.to_str().encode())
    encoded, eos = _encode(files, config, tokenizer, folder, echo)
    manifest = write_shards(
        folder, encoded, vocab_size=vocab_size, eos=eos, validation_fraction=config.validation_fraction
    )
    echo(
        f"{manifest.num_tokens:,} tokens in {manifest.num_documents:,} documents "
        f"({manifest.num_validation:,} for validation) of {len(manifest.domains)} domains, "
        f"ready after {time.perf_counter() - began:.1f} s"
    )


def _encode(
    files: Sequence[SourceFile],
    config: DataConfig,
    tokenizer: Tokenizer,
    folder: Path,
    echo: Callable[[str], None],
) -> tuple[Iterable[Encoded], int]:
    """The documents or chats as they are to be written, and the id that ends one."""
    if config.format == "text":
        return encode(tokenizer, read_documents(files, config)), end_of_document(tokenizer)
    template = ChatTemplate(read_template(config.template, config.tokenizer), tokenizer)
    encoded = encode_chats(
        read_chats(files, config),
        template,
        skipped=folder / SKIPPED,
        longest=config.sequence_length + 1,
        max_bad=config.max_bad,
        echo=echo,
    )
    return encoded, template.eos


def _install(built: Path, folder: Path) -> None:
    """Rename a whole corpus to its entry of the cache, unless another process was first."""
    sync(built)
    try:
        built.rename(folder)
    except OSError:
        if read_manifest(folder) is None:
            raise
    sync(folder.parent)
