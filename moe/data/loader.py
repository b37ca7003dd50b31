"""Batches of packed sequences, addressed by one integer.

The cursor n names sequence n of a training that never ends: it lies in epoch n // sequences_per_epoch.
Reading needs no state, so resuming at n gives what reading through to n would have given.

B sequences of a batch, S inputs of a sequence.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from moe.data.packing import Packing, sequence_count
from moe.data.shards import TokenShards

IGNORED = -100  # the label where nothing is to be predicted


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
    ) -> None:
        self.sequences_per_epoch = sequence_count(shards.num_tokens, sequence_length)
        self._shards = shards
        self._sequence_length = sequence_length
        self._mask_documents = mask_documents
        pack = partial(Packing, shards.lengths, sequence_length=sequence_length, seed=seed)
        self._packing = lru_cache(maxsize=2)(pack)  # a batch may begin in one epoch and end in the next

    def batch(self, first: int, count: int) -> Batch:
        """Sequences `first` to `first` + `count` (exclusive) of the endless training, B = `count`."""
        assert self.sequences_per_epoch, "a split without tokens has no batches"
        rows = [self._row(number) for number in range(first, first + count)]
        tokens, documents, domains = (np.stack(arrays) for arrays in zip(*rows, strict=True))
        labels = np.where(documents[:, 1:] < 0, IGNORED, tokens[:, 1:])
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

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, document numbers and domain ids of one sequence, [S + 1] each with the last label."""
        epoch, sequence = divmod(number, self.sequences_per_epoch)
        tokens = np.zeros(self._sequence_length + 1, np.int64)
        documents = np.full(self._sequence_length + 1, -1, np.int32)
        domains = np.zeros(self._sequence_length + 1, np.int64)
        position = 0
        for order, (document, start, stop) in enumerate(self._packing(epoch).spans(sequence)):
            place = slice(position, position + stop - start)
            tokens[place] = self._shards.read(document, start, stop)
            documents[place] = order
            domains[place] = self._shards.domains[document]
            position = place.stop
        return tokens, documents, domains
