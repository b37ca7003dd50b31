from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe.data.shards import TokenShards, read_manifest, write_shards
from moe.data.sources import Document


def write(
    folder: Path, texts: Sequence[Sequence[int]], fraction: float = 0.0, **settings: Any
) -> tuple[TokenShards, TokenShards]:
    folder.mkdir(exist_ok=True)
    documents = ((Document("", f"domain {n % 2}", f"name {n}"), tokens) for n, tokens in enumerate(texts))
    write_shards(folder, documents, **{"vocab_size": 100, "eos": 1} | settings, validation_fraction=fraction)
    manifest = read_manifest(folder)
    assert manifest is not None
    return (
        TokenShards(folder, manifest, validation=False),
        TokenShards(folder, manifest, validation=True),
    )


def contents(shards: TokenShards) -> list[list[int]]:
    return [shards.read(number, 0, int(length)).tolist() for number, length in enumerate(shards.lengths)]


def test_documents_come_back_across_file_borders(tmp_path: Path) -> None:
    texts = [list(range(start, start + length)) for start, length in [(3, 4), (10, 9), (30, 1), (40, 2)]]
    shards, validation = write(tmp_path, texts, shard_tokens=4)
    assert [f.stat().st_size for f in sorted(tmp_path.glob("*.bin"))] == [8, 8, 8, 8]
    assert contents(shards) == texts
    assert shards.read(1, 1, 8).tolist() == texts[1][1:8]
    assert shards.domains.tolist() == [0, 1, 0, 1]
    assert shards.num_tokens == 16 and validation.num_tokens == 0


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65535, np.uint16), (65536, np.uint32)])
def test_largest_token_survives(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    shards, _ = write(tmp_path, [[vocab_size - 1, 1]], vocab_size=vocab_size)
    assert contents(shards) == [[vocab_size - 1, 1]]
    assert shards.read(0, 0, 1).dtype == dtype


def test_split_is_by_name_and_complete(tmp_path: Path) -> None:
    texts = [[number, 1] for number in range(400)]
    train, validation = write(tmp_path / "all", texts, 0.25)
    assert sorted(contents(train) + contents(validation)) == texts
    assert 60 < len(validation.lengths) < 140
    _, fewer_validation = write(tmp_path / "half", texts[:200], 0.25)
    assert contents(validation)[: len(fewer_validation.lengths)] == contents(fewer_validation)
    assert set(validation.domains.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("num_documents", "fraction", "held_out"),
    [(1, 0.999, []), (3, 0.0, []), (3, 1e-6, [[3, 1]]), (3, 0.999, [[2, 2, 2, 1], [4] * 9])],
)
def test_no_side_is_left_empty(
    tmp_path: Path, num_documents: int, fraction: float, held_out: list[list[int]]
) -> None:
    texts = [[2, 2, 2, 1], [3, 1], [4] * 9][:num_documents]
    train, validation = write(tmp_path, texts, fraction)
    assert contents(validation) == held_out
    assert len(train.lengths) + len(held_out) == num_documents


def test_missing_or_short_files_are_seen(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    write(tmp_path, [[5, 6, 1]])
    for name in ("tokens-00000.bin", "lengths.npy", "domains.npy", "validation.npy", "manifest.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-1])
        assert read_manifest(tmp_path) is None, name
        (tmp_path / name).unlink()
        assert read_manifest(tmp_path) is None, name
        (tmp_path / name).write_bytes(content)
    assert read_manifest(tmp_path) is not None


def test_a_crash_while_writing_leaves_no_manifest(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[Document, list[int]]]:
        yield Document("", "d", "a"), [5, 1]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shards(tmp_path, failing(), vocab_size=100, eos=1, validation_fraction=0.5)
    assert read_manifest(tmp_path) is None


def test_masks_lie_beside_the_tokens(tmp_path: Path) -> None:
    texts = [([5, 6, 7], [False, True, True]), ([8, 9, 3, 1], [True, False, False, True])]
    documents = ((Document("", "d", str(n)), *text) for n, text in enumerate(texts))
    write_shards(tmp_path, documents, vocab_size=99_999, eos=1, validation_fraction=0, shard_tokens=5)
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    shards = TokenShards(tmp_path, manifest, validation=False)
    assert contents(shards) == [tokens for tokens, _ in texts]
    masks = [shards.read_mask(n, 0, int(length)) for n, length in enumerate(shards.lengths)]
    assert [mask.tolist() for mask in masks] == [mask for _, mask in texts]
    assert shards.read_mask(1, 1, 4).tolist() == [False, False, True] and masks[0].dtype == np.bool_
    assert [f.stat().st_size for f in sorted(tmp_path.glob("masks-*"))] == [5, 2]
    plain, _ = write(tmp_path / "text", [[5, 6, 1]])
    assert plain.read_mask(0, 0, 3).tolist() == [True] * 3
    assert not list((tmp_path / "text").glob("masks-*"))
