"""How the documents of one epoch become sequences: permute, lay end to end, cut, permute again. No torch.

The stream of an epoch is every document once, in an order drawn from (seed, epoch). Sequence n holds
inputs n S to (n+1) S of it and one token more, the label of its last input. The sequences are then
permuted too: otherwise one long file would fill whole batches. Nothing is materialised: a sequence is
found by bisecting the cumulative lengths, so any place in training is one integer.
"""

from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of a document."""

    document: int
    start: int
    stop: int


def sequence_count(num_tokens: int, sequence_length: int) -> int:
    """Sequences in one epoch: every token is an input once, the last sequence may be short."""
    return -(-num_tokens // sequence_length)


class Packing:
    """One epoch's sequences, drawn from (seed, epoch). `lengths` [N] tokens per document."""

    def __init__(self, lengths: np.ndarray, epoch: int, *, sequence_length: int, seed: int) -> None:
        num_sequences = sequence_count(int(lengths.sum()), sequence_length)
        self._sequence_length = sequence_length
        self._documents = np.arange(len(lengths))
        self._sequences = np.arange(num_sequences)
        key = np.array([seed % 2**64, epoch], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
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
