import itertools

import pytest
import torch

from moe.config import PackingName
from moe.data import loader as module
from moe.data.loader import Batch, Loader
from moe.data.shards import TokenShards, read_manifest, write_shards
from moe.data.sources import Document

TEXTS = {"a": [10, 11, 12, 13, 1], "b": [20, 1], "c": [30, 31, 32, 33, 34, 35, 36, 37, 1]}  # 16 tokens


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    folder = tmp_path_factory.mktemp("shards")
    documents = ((Document("", domain, domain), tokens) for domain, tokens in TEXTS.items())
    manifest = write_shards(folder, documents, vocab_size=100, eos=1, validation_fraction=0)
    assert manifest == read_manifest(folder)
    return TokenShards(folder, manifest, validation=False)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    """Of every chat the last two thirds are learnt."""
    folder = tmp_path_factory.mktemp("chats")
    documents = (
        (Document("", domain, domain), tokens, [3 * place >= len(tokens) for place in range(len(tokens))])
        for domain, tokens in TEXTS.items()
    )
    manifest = write_shards(folder, documents, vocab_size=100, eos=1, validation_fraction=0)
    return TokenShards(folder, manifest, validation=False)


IN_ORDER = 1  # a seed that draws documents and sequences of 6 in corpus order


def make_loader(shards: TokenShards, sequence_length: int, *, mask: bool = False, seed: int = 3) -> Loader:
    return Loader(shards, sequence_length=sequence_length, seed=seed, mask_documents=mask)


def fields(batch: Batch) -> list[torch.Tensor]:
    return [batch.tokens, batch.labels, batch.valid, batch.documents, batch.domains]


def join(batches: list[Batch]) -> list[torch.Tensor]:
    return [torch.cat(tensors) for tensors in zip(*map(fields, batches), strict=True)]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_an_epoch_in_full(shards: TokenShards) -> None:
    loader = make_loader(shards, 6, seed=IN_ORDER)
    assert loader.sequences_per_epoch == 3
    batch = loader.batch(0, 3)
    assert batch.tokens.tolist() == [[10, 11, 12, 13, 1, 20], [1, 30, 31, 32, 33, 34], [35, 36, 37, 1, 0, 0]]
    assert batch.labels.tolist() == [
        [11, 12, 13, 1, 20, 1],
        [30, 31, 32, 33, 34, 35],
        [36, 37, 1, -100, -100, -100],
    ]
    assert batch.valid.tolist() == [[True] * 6, [True] * 6, [True] * 4 + [False] * 2]
    assert batch.documents.tolist() == [[0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, -1, -1]]
    assert batch.domains.tolist() == [[0, 0, 0, 0, 0, 1], [1, 2, 2, 2, 2, 2], [2, 2, 2, 2, 0, 0]]
    kinds = [tensor.dtype for tensor in fields(batch)]
    assert kinds == [torch.int64, torch.int64, torch.bool, torch.int32, torch.int64]


def test_masked_documents_do_not_predict_each_other(shards: TokenShards) -> None:
    masked = make_loader(shards, 6, mask=True, seed=IN_ORDER).batch(0, 3)
    assert masked.labels.tolist() == [
        [11, 12, 13, 1, -100, 1],
        [-100, 31, 32, 33, 34, 35],
        [36, 37, 1, -100, -100, -100],
    ]
    # The first token of the next document may be the label just past the end of a row.
    rows = make_loader(shards, 5, mask=True, seed=IN_ORDER).batch(0, 4)
    assert [11, 12, 13, 1, -100] in rows.labels.tolist()


@pytest.mark.parametrize("sequence_length", [1, 5, 6, 16, 20])
def test_an_epoch_holds_every_token_once_and_every_label_but_the_last(
    shards: TokenShards, sequence_length: int
) -> None:
    loader = make_loader(shards, sequence_length)
    batch = loader.batch(loader.sequences_per_epoch, loader.sequences_per_epoch)  # the second epoch
    assert sorted(batch.tokens[batch.valid].tolist()) == sorted(itertools.chain(*TEXTS.values()))
    assert int((batch.labels != -100).sum()) == 15
    assert not batch.valid[batch.documents < 0].any()


def test_any_cursor_continues_what_came_before(shards: TokenShards) -> None:
    continuous = join([make_loader(shards, 3).batch(0, 20)])  # 6 sequences per epoch: into the fourth
    loader = make_loader(shards, 3)
    assert equal(join([loader.batch(first, 4) for first in range(0, 20, 4)]), continuous)
    for cursor in (0, 5, 11, 17):  # a fresh process, also in the middle of an epoch
        resumed = fields(make_loader(shards, 3).batch(cursor, 3))
        assert equal(resumed, [tensor[cursor : cursor + 3] for tensor in continuous])


def test_epochs_and_seeds_differ(shards: TokenShards) -> None:
    first, second = (make_loader(shards, 3).batch(cursor, 6).tokens for cursor in (0, 6))
    assert not torch.equal(first, second)
    assert not torch.equal(first, make_loader(shards, 3, seed=4).batch(0, 6).tokens)


def test_whole_chats_are_laid_together(chats: TokenShards) -> None:
    loader = Loader(chats, sequence_length=8, seed=3, mask_documents=True, packing="whole")
    assert loader.sequences_per_epoch == 2
    batch = loader.batch(0, 2)
    rows = sorted(zip(*(tensor.tolist() for tensor in fields(batch)), strict=True))
    assert rows[0] == (
        [10, 11, 12, 13, 1, 20, 1, 0],
        [-100, 12, 13, 1, -100, 1, -100, -100],
        [True] * 7 + [False],
        [0, 0, 0, 0, 0, 1, 1, -1],
        [0, 0, 0, 0, 0, 1, 1, 0],
    )
    assert rows[1][:2] == ([30, 31, 32, 33, 34, 35, 36, 37], [-100, -100, 33, 34, 35, 36, 37, 1])
    assert not torch.equal(batch.tokens, loader.batch(4, 2).tokens) or not torch.equal(
        batch.tokens, loader.batch(2, 2).tokens
    )


def test_buckets_are_trimmed_to_the_longest(chats: TokenShards, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(length: int, multiple: int = 1) -> Loader:
        return Loader(
            chats,
            sequence_length=length,
            seed=3,
            mask_documents=False,
            packing="bucket",
            batch_size=1,
            length_multiple=multiple,
        )

    monkeypatch.setattr(module, "TRIMMED", 2)
    loader = make(100)
    assert loader.sequences_per_epoch == 3
    found = {int(batch.tokens[0, 0]): batch for batch in (loader.batch(n, 1) for n in range(3))}
    assert {first: batch.tokens.shape[1] for first, batch in found.items()} == {10: 4, 20: 2, 30: 8}
    assert fields(found[20])[0].tolist() == [[20, 1]] and found[20].labels.tolist() == [[1, -100]]
    assert found[20].valid.tolist() == [[True, True]] and found[10].valid.tolist() == [[True] * 4]
    assert loader.batch(0, 3).tokens.shape == (3, 8)
    assert make(100, 3).batch(0, 3).tokens.shape == (3, 12)  # a layout asks for 3, kernels for 2
    assert make(10, 5).batch(0, 3).tokens.shape == (3, 10)  # and never more than a sequence


@pytest.mark.parametrize("packing", ["whole", "bucket"])
def test_any_cursor_continues_chats_too(chats: TokenShards, packing: PackingName) -> None:
    def read(first: int, count: int) -> list[torch.Tensor]:
        loader = Loader(chats, sequence_length=8, seed=3, mask_documents=False, packing=packing, batch_size=2)
        return fields(loader.batch(first, count))

    continuous = read(0, 13)
    for cursor in (1, 4, 8):
        assert equal(read(cursor, 5), [tensor[cursor : cursor + 5] for tensor in continuous])
