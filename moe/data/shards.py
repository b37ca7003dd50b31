"""A tokenized corpus on disk: one long stream of tokens in memory-mapped files. No torch.

Every document lies in the stream once, end token included, in corpus order; training and validation
are two views of it. Files are cut at a fixed number of tokens, so a position needs no index:
token p is item p % shard_tokens of file p // shard_tokens. The manifest is written last and records
the size of everything else: a folder without a manifest, or that disagrees with it, is no corpus.

    tokens-00000.bin ...   uint16, or uint32 for vocabularies above 65535
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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moe.data.sources import Document
from parallel.files import durable_file

SHARD_TOKENS = 1 << 26
MANIFEST = "manifest.json"


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
    encoded: Iterable[tuple[Document, Sequence[int]]],
    *,
    vocab_size: int,
    eos: int,
    validation_fraction: float,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Write documents (their tokens end with `eos`) into an existing folder, the manifest last.

    Beside the stream, about 20 bytes per document are held in memory. Files already in the folder
    become part of the manifest.
    """
    dtype = np.dtype(np.uint16 if vocab_size <= 65535 else np.uint32)
    lengths, domains, draws = array("q"), array("i"), array("d")
    domain_ids: dict[str, int] = {}

    def stream() -> Iterator[np.ndarray]:
        for document, tokens in encoded:
            lengths.append(len(tokens))
            domains.append(domain_ids.setdefault(document.domain, len(domain_ids)))
            draws.append(_draw(document.name))
            yield np.array(tokens, dtype)

    _write_stream(folder, stream(), shard_tokens)
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


def _write_stream(folder: Path, chunks: Iterable[np.ndarray], shard_tokens: int) -> None:
    """Chunks end to end, in files of exactly `shard_tokens` tokens (the last one shorter)."""

    def numbered_pieces() -> Iterator[tuple[int, np.ndarray]]:
        position = 0
        for chunk in chunks:
            while len(chunk):
                number, used = divmod(position, shard_tokens)
                piece, chunk = np.split(chunk, [shard_tokens - used])
                position += len(piece)
                yield number, piece

    for number, pieces in itertools.groupby(numbered_pieces(), key=lambda pair: pair[0]):
        with durable_file(folder / f"tokens-{number:05d}.bin") as file:
            for _, piece in pieces:
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
        names = sorted(name for name in manifest.files if name.startswith("tokens-"))
        self._files = [np.memmap(folder / name, np.dtype(manifest.dtype), mode="r") for name in names]

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` (exclusive) of a document, [stop - start] in the dtype on disk."""
        assert 0 <= start < stop <= self.lengths[document], (document, start, stop)
        size = self._shard_tokens
        begin, end = int(self._begins[document]) + start, int(self._begins[document]) + stop
        parts = [
            self._files[number][max(begin - number * size, 0) : end - number * size]
            for number in range(begin // size, (end - 1) // size + 1)
        ]
        return np.concatenate(parts)
