"""Batches of packed sequences, addressed by one integer.

The cursor n names sequence n of a training that never ends: it lies in epoch n // sequences_per_epoch.
Reading needs no state, so resuming at n gives what reading through to n would have given.

B sequences of a batch, S inputs of a sequence: `sequence_length`, but with bucket packing as many as the
longest sequence of the batch needs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from moe.config import PackingName
from moe.data.packing import (
    BucketPacking,
    Packing,
    Span,
    StreamPacking,
    WholePacking,
    plan_packs,
    sequence_count,
)
from moe.data.shards import TokenShards

IGNORED = -100  # the label where nothing is to be predicted
TRIMMED = 64  # bucketed lengths are multiples of this: few shapes for kernels and allocator


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences side by side; padding stands only at the end of a row."""

    tokens: Tensor  # [B, S] int64, 0 on padding
    labels: Tensor  # [B, S] int64, the next token or `IGNORED`
    valid: Tensor  # [B, S] bool, false on padding
    documents: Tensor  # [B, S] int32, number of the document within the row, -1 on padding
    domains: Tensor  # [B, S] int64, domain id of the input token, 0 on padding

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class Loader:
    """Random access to the batches of a split, epoch after epoch in a fresh order."""

    def __init__(
        self,
        shards: TokenShards,
        *,
        sequence_length: int,
        seed: int,
        mask_documents: bool,
        packing: PackingName = "stream",
        batch_size: int = 1,
        length_multiple: int = 1,
    ) -> None:
        """`batch_size`: sequences that bucket packing keeps of similar length, those of a step.

        `length_multiple`: what trimmed lengths are rounded up to; it divides `sequence_length`.
        """
        self._shards = shards
        self._sequence_length = sequence_length
        self._mask_documents = mask_documents
        self._trimmed = math.lcm(TRIMMED, length_multiple) if packing == "bucket" else None
        draw: Callable[[int], Packing]
        if packing == "stream":
            self.sequences_per_epoch = sequence_count(shards.num_tokens, sequence_length)
            draw = partial(StreamPacking, shards.lengths, sequence_length=sequence_length, seed=seed)
        elif packing == "whole":
            plan = plan_packs(shards.lengths, sequence_length + 1)
            self.sequences_per_epoch = sum(pack.copies for pack in plan)
            draw = partial(WholePacking, plan, shards.lengths, seed=seed)
        else:
            self.sequences_per_epoch = len(shards.lengths)
            draw = partial(BucketPacking, shards.lengths, batch_size=batch_size, seed=seed)

        @lru_cache(maxsize=2)  # a batch may begin in one epoch and end in the next
        def packing_of(epoch: int) -> Packing:
            return draw(epoch)

        self._packing = packing_of

    def batch(self, first: int, count: int) -> Batch:
        """Sequences `first` to `first` + `count` (exclusive) of the endless training, B = `count`."""
        assert self.sequences_per_epoch, "a split without tokens has no batches"
        rows = [self._spans(number) for number in range(first, first + count)]
        tokens, documents, domains, learnt = self._read(rows, self._length(rows))
        labels = np.where(learnt[:, 1:], tokens[:, 1:], IGNORED)
        if self._mask_documents:
            labels[documents[:, 1:] != documents[:, :-1]] = IGNORED
        inputs = [
            torch.from_numpy(np.ascontiguousarray(array[:, :-1])) for array in (tokens, documents, domains)
        ]
        return Batch(
            tokens=inputs[0],
            labels=torch.from_numpy(labels),
            valid=inputs[1] >= 0,
            documents=inputs[1],
            domains=inputs[2],
        )

    def _spans(self, number: int) -> list[Span]:
        epoch, sequence = divmod(number, self.sequences_per_epoch)
        return self._packing(epoch).spans(sequence)

    def _length(self, rows: list[list[Span]]) -> int:
        """The inputs of every row."""
        if self._trimmed is None:
            return self._sequence_length
        longest = max(sum(span.stop - span.start for span in spans) for spans in rows) - 1
        return min(-(-longest // self._trimmed) * self._trimmed, self._sequence_length)

    def _read(
        self, rows: list[list[Span]], length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, document numbers, domain ids and learnt labels, [B, S + 1] each with the last label."""
        shape = len(rows), length + 1
        tokens, domains = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        documents, learnt = np.full(shape, -1, np.int32), np.zeros(shape, np.bool_)
        for row, spans in enumerate(rows):
            position = 0
            for order, span in enumerate(spans):
                place = row, slice(position, position + span.stop - span.start)
                tokens[place] = self._shards.read(*span)
                learnt[place] = self._shards.read_mask(*span)
                documents[place] = order
                domains[place] = self._shards.domains[span.document]
                position = place[1].stop
        return tokens, documents, domains, learnt
