import itertools
import time

import numpy as np
import pytest

from moe.data.packing import (
    BucketPacking,
    Packing,
    Span,
    StreamPacking,
    WholePacking,
    plan_packs,
    sequence_count,
)

LENGTHS = np.array([5, 1, 12, 3, 7])  # 28 tokens


def sequences(epoch: int = 0, sequence_length: int = 6, seed: int = 7) -> list[list[Span]]:
    packing = StreamPacking(LENGTHS, epoch, sequence_length=sequence_length, seed=seed)
    return [packing.spans(n) for n in range(sequence_count(int(LENGTHS.sum()), sequence_length))]


def positions(spans: list[Span]) -> list[tuple[int, int]]:
    return [(span.document, place) for span in spans for place in range(span.start, span.stop)]


def test_windows_overlap_by_the_label_of_the_last_input() -> None:
    """Every sequence but the first of the stream begins with the label that ends another."""
    found = [positions(spans) for spans in sequences()]
    assert sorted(len(places) for places in found) == [4, 7, 7, 7, 7]
    firsts = {places[0] for places in found}
    labels = {places[-1] for places in found if len(places) == 7}
    assert len(firsts - labels) == 1 and labels < firsts


@pytest.mark.parametrize("sequence_length", [1, 3, 4, 7, 28, 40])
def test_every_token_is_an_input_once(sequence_length: int) -> None:
    found = sequences(sequence_length=sequence_length)
    inputs = [place for spans in found for place in positions(spans)[:sequence_length]]
    assert sorted(inputs) == [(d, place) for d, length in enumerate(LENGTHS) for place in range(length)]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert sequences(epoch=3) == sequences(epoch=3)
    assert sequences(epoch=3) != sequences(epoch=4)
    assert sequences(epoch=3) != sequences(epoch=3, seed=8)
    assert sequences(seed=-1) != sequences(seed=-2)  # any integer is a seed


def test_sequences_of_a_long_document_are_spread() -> None:
    lengths = np.array([1000] + [10] * 900)
    packing = StreamPacking(lengths, 0, sequence_length=10, seed=0)
    long = [n for n in range(1000) if any(span.document == 0 for span in packing.spans(n))]
    assert len(long) in (100, 101, 102)
    assert max(np.diff(long)) < 100 and min(long) < 100 and max(long) > 900


def test_documents_are_laid_out_in_a_drawn_order() -> None:
    neighbours = {
        (a.document, b.document)
        for spans in sequences(sequence_length=28)
        for a, b in itertools.pairwise(spans)
    }
    assert neighbours != {(0, 1), (1, 2), (2, 3), (3, 4)} and len(neighbours) == 4


def lognormal(count: int, longest: int) -> np.ndarray:
    """Lengths of conversations as they come."""
    drawn = np.random.default_rng(0).lognormal(6, 0.9, count)
    return np.clip(drawn, 4, longest).astype(np.int64)


def documents(packing: Packing, count: int) -> list[list[int]]:
    return [[span.document for span in packing.spans(n)] for n in range(count)]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """One document after another."""
    packs: list[list[int]] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [pack for pack in packs if sum(pack) + length <= capacity]
        if fitting:
            min(fitting, key=lambda pack: capacity - sum(pack)).append(length)
        else:
            packs.append([length])
    return packs


def test_whole_documents_fit_best() -> None:
    """Many of one length at once are placed as one by one; every document has one place, uncut."""
    for count, capacity in [(3000, 4097), (300, 50), (40, 9), (1, 9), (0, 9)]:
        lengths = lognormal(count, capacity)
        plan = plan_packs(lengths, capacity)
        if count < 3000:
            packs = [
                sorted(n for n, each in parts for _ in range(each)) for c, parts in plan for _ in range(c)
            ]
            spaces = sorted(capacity - sum(pack) for pack in packs)
            assert spaces == sorted(capacity - sum(pack) for pack in best_fit_decreasing(lengths, capacity))
    lengths = lognormal(3000, 4097)
    plan = plan_packs(lengths, 4097)
    number = sum(pack.copies for pack in plan)
    packing = WholePacking(plan, lengths, 0, seed=1)
    spans = [packing.spans(n) for n in range(number)]
    assert all(span.start == 0 and span.stop == lengths[span.document] for each in spans for span in each)
    assert sorted(span.document for each in spans for span in each) == list(range(3000))
    held = [sum(span.stop for span in each) for each in spans]
    assert max(held) <= 4097 and sum(held) / (number * 4097) > 0.99


def test_whole_packing_depends_on_seed_and_epoch_alone() -> None:
    lengths = lognormal(500, 200)
    plan = plan_packs(lengths, 200)
    number = sum(pack.copies for pack in plan)

    def drawn(epoch: int, seed: int) -> list[list[int]]:
        return documents(WholePacking(plan_packs(lengths, 200), lengths, epoch, seed=seed), number)

    assert drawn(3, 7) == drawn(3, 7)
    assert drawn(3, 7) != drawn(4, 7) != drawn(4, 8)
    assert sorted(map(len, drawn(3, 7))) == sorted(map(len, drawn(4, 7)))
    assert {frozenset(pack) for pack in drawn(3, 7)} != {frozenset(pack) for pack in drawn(4, 7)}


def test_a_million_documents_take_seconds() -> None:
    lengths = lognormal(1_000_000, 4097)
    began = time.process_time()
    plan = plan_packs(lengths, 4097)
    WholePacking(plan, lengths, 0, seed=0)
    assert time.process_time() - began < 20
    assert lengths.sum() / (sum(pack.copies for pack in plan) * 4097) > 0.999


def test_buckets_hold_similar_lengths_and_every_document() -> None:
    lengths, batch = lognormal(5000, 4097), 8
    drawn = [documents(BucketPacking(lengths, epoch, batch_size=batch, seed=1), 5000) for epoch in range(3)]
    for each in drawn:
        assert sorted(document for (document,) in each) == list(range(5000))
    assert drawn[0] != drawn[1]
    flat = np.array([document for epoch in drawn for (document,) in epoch])
    batches = lengths[flat[: len(flat) // batch * batch]].reshape(-1, batch)
    assert batches.mean() / batches.max(1).mean() > 0.9  # of what rows as long as the longest would hold
    # Batches are those of the whole training, and do not come in the order of their lengths.
    odd = lognormal(5003, 4097)
    second = documents(BucketPacking(odd, 1, batch_size=batch, seed=1), 5003)
    first = -5003 % batch
    inner = odd[[document for (document,) in second[first : first + 4992]]].reshape(-1, batch)
    assert inner.mean() / inner.max(1).mean() > 0.9
    assert abs(np.corrcoef(inner[:-1, 0], inner[1:, 0])[0, 1]) < 0.2
    assert documents(BucketPacking(odd[:3], 1, batch_size=batch, seed=1), 3)
