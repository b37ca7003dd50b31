"""How the documents of one epoch become sequences, in three ways, each drawn from (seed, epoch). No torch.

`StreamPacking`: permute the documents, lay them end to end, cut, permute again. Sequence n holds inputs
n S to (n+1) S of the stream and one token more, the label of its last input. The sequences are permuted
because otherwise one long file would fill whole batches. Nothing is materialised: a sequence is found by
bisecting the cumulative lengths.

`WholePacking`: documents are laid whole into as few sequences as best fit decreasing finds. Which lengths
go together depends on how often each length occurs, not on the documents, so it is planned once on the
counts, in a time that does not grow with them; an epoch draws which document has which place.

`BucketPacking`: a document is a sequence. Windows of an epoch's order are sorted by length and cut into
batches, which are then permuted: a batch's rows are about as long as each other, and meet others next time.

In all of them any place in training is one integer.
"""

import bisect
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

WINDOW = 64  # batches whose documents are sorted by length together


class Span(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of a document."""

    document: int
    start: int
    stop: int


class Packing(Protocol):
    """One epoch's sequences."""

    def spans(self, sequence: int) -> list[Span]:
        """What a sequence holds, in reading order."""
        ...


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)))


def sequence_count(num_tokens: int, sequence_length: int) -> int:
    """Sequences in one epoch: every token is an input once, the last sequence may be short."""
    return -(-num_tokens // sequence_length)


class StreamPacking:
    """Documents end to end, cut into sequences. `lengths` [N] tokens per document."""

    def __init__(self, lengths: np.ndarray, epoch: int, *, sequence_length: int, seed: int) -> None:
        num_sequences = sequence_count(int(lengths.sum()), sequence_length)
        self._sequence_length = sequence_length
        self._documents = np.arange(len(lengths))
        self._sequences = np.arange(num_sequences)
        generator = _generator(seed, epoch)
        generator.shuffle(self._documents)
        generator.shuffle(self._sequences)
        self._ends = np.cumsum(lengths[self._documents])

    def spans(self, sequence: int) -> list[Span]:
        """The document spans of a sequence in reading order, `sequence_length` + 1 tokens together.

        The sequence at the end of the stream has fewer.
        """
        position = int(self._sequences[sequence]) * self._sequence_length
        stop = min(position + self._sequence_length + 1, int(self._ends[-1]))
        slot = int(np.searchsorted(self._ends, position, side="right"))
        spans = []
        while position < stop:
            begin = int(self._ends[slot - 1]) if slot else 0
            end = min(stop, int(self._ends[slot]))
            spans.append(Span(int(self._documents[slot]), position - begin, end - begin))
            position, slot = end, slot + 1
        return spans


class Pack(NamedTuple):
    """`copies` sequences that hold the same: of each length so many documents, [(length, documents)]."""

    copies: int
    parts: tuple[tuple[int, int], ...]


def plan_packs(lengths: np.ndarray, capacity: int) -> list[Pack]:
    """Best fit decreasing: each document, longest first, goes where least space is left over.

    `lengths` [N], none above `capacity` (both in tokens). Documents of one length are placed together:
    the first of them to enter a sequence leaves it the fullest that takes the next one, so each sequence
    is filled with all it can hold of them. O(capacity) distinct packs.
    """
    spaces: list[int] = []  # that some sequences have left, ascending
    packs: dict[int, list[Pack]] = defaultdict(list)

    def put(space: int, pack: Pack) -> None:
        if pack.copies:
            if not packs[space]:
                bisect.insort(spaces, space)
            packs[space].append(pack)

    counts = np.bincount(lengths, minlength=capacity + 1)
    assert len(counts) == capacity + 1, "a document longer than a sequence"
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            place = bisect.bisect_left(spaces, length)
            if place < len(spaces):
                space = spaces[place]
                available, parts = packs[space].pop()
                if not packs[space]:
                    del spaces[place]
            else:
                space, parts = capacity, ()
                available = -(-left // (capacity // length))
            each = space // length
            full = min(available, left // each)
            left -= full * each
            put(space - each * length, Pack(full, (*parts, (length, each))))
            if left and full < available:  # fewer than `each` remain
                put(space - left * length, Pack(1, (*parts, (length, left))))
                full, left = full + 1, 0
            put(space, Pack(available - full, parts))
    return [pack for space in spaces for pack in packs[space]]


class WholePacking:
    """Whole documents laid together as planned. `lengths` [N] tokens per document."""

    def __init__(self, plan: Sequence[Pack], lengths: np.ndarray, epoch: int, *, seed: int) -> None:
        generator = _generator(seed, epoch)
        drawn = generator.permutation(len(lengths))
        drawn = drawn[np.argsort(lengths[drawn], kind="stable")]  # by length, and drawn within one
        counts = np.bincount(lengths)
        nexts = np.cumsum(counts) - counts  # by length: the place in `drawn` of the next document
        documents, sizes = [], []
        for copies, parts in plan:
            columns = []
            for length, each in parts:
                taken = slice(nexts[length], nexts[length] + copies * each)
                columns.append(drawn[taken].reshape(copies, each))
                nexts[length] = taken.stop
            sizes += [sum(each for _, each in parts)] * copies
            documents.append(np.concatenate(columns, axis=1).ravel())
        self._lengths = lengths
        self._documents = np.concatenate(documents)
        self._ends = np.cumsum(sizes)
        self._sizes = np.array(sizes)
        self._sequences = generator.permutation(len(sizes))

    def spans(self, sequence: int) -> list[Span]:
        """The documents of a sequence, each whole."""
        pack = self._sequences[sequence]
        end = self._ends[pack]
        documents = self._documents[end - self._sizes[pack] : end].tolist()
        return [Span(document, 0, int(self._lengths[document])) for document in documents]


class BucketPacking:
    """A document in every sequence, in batches of similar lengths. `lengths` [N] tokens per document.

    Batches are those of the whole training: where an epoch's end does not end one, the next epoch's
    first documents complete it.
    """

    def __init__(self, lengths: np.ndarray, epoch: int, *, batch_size: int, seed: int) -> None:
        generator = _generator(seed, epoch)
        drawn = generator.permutation(len(lengths))
        first = min(-epoch * len(lengths) % batch_size, len(lengths))
        last = first + (len(lengths) - first) // batch_size * batch_size
        inner = drawn[first:last]
        windows = np.arange(len(inner)) // (WINDOW * batch_size)
        batches = inner[np.lexsort((lengths[inner], windows))].reshape(-1, batch_size)
        generator.shuffle(batches)
        self._lengths = lengths
        self._documents = np.concatenate((drawn[:first], batches.ravel(), drawn[last:]))

    def spans(self, sequence: int) -> list[Span]:
        """The one document of a sequence."""
        document = int(self._documents[sequence])
        return [Span(document, 0, int(self._lengths[document]))]
