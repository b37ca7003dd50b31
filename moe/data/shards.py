"""A tokenized corpus on disk: one long stream of tokens in memory-mapped files. No torch.

Every document lies in the stream once, end token included, in corpus order; training and validation
are two views of it. Files are cut at a fixed number of tokens, so a position needs no index:
token p is item p % shard_tokens of file p // shard_tokens. The manifest is written last and records
the size of everything else: a folder without a manifest, or that disagrees with it, is no corpus.

    tokens-00000.bin ...   uint16, or uint32 for vocabularies above 65535
    masks-00000.bin ...    uint8, of chats alone: 1 where the token is learnt as a label
    lengths.npy            [N] int64, tokens of each document
    domains.npy            [N] int32, index into the manifest's `domains`
    validation.npy         [N] bool
    manifest.json
"""

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moe.data.sources import Document
from parallel.files import durable_file

# A document and its tokens; of chats also whether each of them is learnt as a label.
Encoded = tuple[Document, Sequence[int]] | tuple[Document, Sequence[int], Sequence[bool]]

SHARD_TOKENS = 1 << 26
MANIFEST = "manifest.json"
STREAMS = ("tokens", "masks")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of shards holds; `files` maps the name of every other file to its bytes."""

    dtype: str
    eos: int
    domains: tuple[str, ...]
    num_documents: int
    num_validation: int
    num_tokens: int
    shard_tokens: int
    files: dict[str, int]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None unless every file it names is there with its full size."""
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest = Manifest(**{**values, "domains": tuple(values["domains"])})
        whole = all((folder / name).stat().st_size == size for name, size in manifest.files.items())
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return manifest if whole else None


def write_shards(
    folder: Path,
    encoded: Iterable[Encoded],
    *,
    vocab_size: int,
    eos: int,
    validation_fraction: float,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Write documents into an existing folder, the manifest last; either all or none of them have masks.

    `eos` ends a text; a chat ends as its template has it. Beside the stream, about 20 bytes per document
    are held in memory. Files already in the folder become part of the manifest.
    """
    dtype = np.dtype(np.uint16 if vocab_size <= 65535 else np.uint32)
    lengths, domains, draws = array("q"), array("i"), array("d")
    domain_ids: dict[str, int] = {}

    def stream() -> Iterator[list[np.ndarray]]:
        for document, tokens, *masks in encoded:
            lengths.append(len(tokens))
            domains.append(domain_ids.setdefault(document.domain, len(domain_ids)))
            draws.append(_draw(document.name))
            yield [np.array(tokens, dtype), *(np.array(mask, np.uint8) for mask in masks)]

    _write_streams(folder, stream(), shard_tokens)
    validation = _held_out(np.array(draws), np.array(lengths), validation_fraction)
    arrays: dict[str, np.ndarray] = {
        "lengths": np.array(lengths, np.int64),
        "domains": np.array(domains, np.int32),
        "validation": validation,
    }
    for name, values in arrays.items():
        with durable_file(folder / f"{name}.npy") as file:
            np.save(file, values)
    manifest = Manifest(
        dtype=dtype.name,
        eos=eos,
        domains=tuple(domain_ids),
        num_documents=len(lengths),
        num_validation=int(validation.sum()),
        num_tokens=sum(lengths),
        shard_tokens=shard_tokens,
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    )
    with durable_file(folder / MANIFEST) as file:
        file.write(json.dumps(asdict(manifest), indent=1).encode())
    return manifest


def _write_streams(folder: Path, chunks: Iterable[Sequence[np.ndarray]], shard_tokens: int) -> None:
    """Tokens (and masks) end to end, in files of exactly `shard_tokens` tokens (the last one shorter)."""

    def numbered_pieces() -> Iterator[tuple[int, list[np.ndarray]]]:
        position = 0
        for chunk in chunks:
            while len(chunk[0]):
                number, used = divmod(position, shard_tokens)
                pieces = [array[: shard_tokens - used] for array in chunk]
                chunk = [array[shard_tokens - used :] for array in chunk]
                position += len(pieces[0])
                yield number, pieces

    for number, group in itertools.groupby(numbered_pieces(), key=lambda pair: pair[0]):
        with ExitStack() as stack:
            files: list[BinaryIO] = []
            for _, pieces in group:
                for name in STREAMS[len(files) : len(pieces)]:
                    files.append(stack.enter_context(durable_file(folder / f"{name}-{number:05d}.bin")))
                for file, piece in zip(files, pieces, strict=True):
                    file.write(piece.tobytes())


def _draw(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _held_out(draws: np.ndarray, lengths: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are for validation, [N] bool.

    Where chance leaves one side empty, it is given the document whose share of the tokens comes
    nearest to what was asked for; a lone document is for training.
    """
    shares = lengths / lengths.sum()
    chosen = draws < fraction
    if chosen.all():
        chosen[np.abs(shares - (1 - fraction)).argmin()] = False
    elif not chosen.any() and fraction > 0 and len(draws) > 1:
        chosen[np.abs(shares - fraction).argmin()] = True
    return chosen


class TokenShards:
    """The documents of one split, read by memory map; document numbers count within the split.

    `lengths` [N] int64 tokens (end token included), `domains` [N] int32 domain ids.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, validation: bool) -> None:
        lengths = np.load(folder / "lengths.npy")
        chosen = np.load(folder / "validation.npy") == validation
        self.lengths: np.ndarray = lengths[chosen]
        self.domains: np.ndarray = np.load(folder / "domains.npy")[chosen]
        self.num_tokens = int(self.lengths.sum())
        self._begins = (np.cumsum(lengths) - lengths)[chosen]
        self._shard_tokens = manifest.shard_tokens
        kinds = (np.dtype(manifest.dtype), np.dtype(np.uint8))
        self._tokens, self._masks = (
            [
                np.memmap(folder / file, kind, mode="r")
                for file in sorted(manifest.files)
                if file.startswith(name)
            ]
            for name, kind in zip(STREAMS, kinds, strict=True)
        )

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` (exclusive) of a document, [stop - start] in the dtype on disk."""
        return self._cut(self._tokens, document, start, stop)

    def read_mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """Which of these tokens are learnt as labels, [stop - start] bool: all of them, but for chats."""
        if not self._masks:
            return np.ones(stop - start, np.bool_)
        return self._cut(self._masks, document, start, stop).astype(np.bool_)

    def _cut(self, files: Sequence[np.ndarray], document: int, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.lengths[document], (document, start, stop)
        size = self._shard_tokens
        begin, end = int(self._begins[document]) + start, int(self._begins[document]) + stop
        parts = [
            files[number][max(begin - number * size, 0) : end - number * size]
            for number in range(begin // size, (end - 1) // size + 1)
        ]
        return np.concatenate(parts)
