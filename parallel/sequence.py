"""Which positions of a sequence a rank holds, and what its queries may see of another rank's keys.

Context parallelism cuts a sequence into 2 x cp stretches and gives rank r the stretches r and
2 x cp - 1 - r, joined: under a causal mask every rank then has the same work, and of another rank's
keys a query sees either a whole stretch or nothing of it. Sequence parallelism cuts what a context
rank holds into tp contiguous parts. Index arithmetic only: nothing is sent from here.
Legend: B sequences, S positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.layout import length_multiple


@dataclass(frozen=True)
class Sight:
    """Of what two context ranks hold: the queries that see any of the keys, and the keys they see.

    `causal`: both are the same positions, and a query sees itself and what is before it; otherwise
    each of these queries sees each of these keys.
    """

    queries: slice
    keys: slice
    causal: bool


@dataclass(frozen=True, kw_only=True)
class Positions:
    """The positions that one rank holds of sequences of `length`."""

    length: int
    cp: int = 1
    cp_rank: int = 0
    tp: int = 1
    tp_rank: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.cp_rank < self.cp and 0 <= self.tp_rank < self.tp, self
        assert self.length % length_multiple(self.cp, self.tp) == 0, self

    def context(self, whole: Tensor) -> Tensor:
        """[B, S, ...] -> [B, S / cp, ...]: what this context rank holds, in ascending order."""
        assert whole.shape[1] == self.length, (whole.shape, self.length)
        if self.cp == 1:
            return whole
        stretches = whole.chunk(2 * self.cp, 1)
        return torch.cat((stretches[self.cp_rank], stretches[-1 - self.cp_rank]), 1)

    def sequence(self, whole: Tensor) -> Tensor:
        """[B, S, ...] -> [B, S / (cp x tp), ...]: this rank's part of what its context rank holds."""
        return self.context(whole).chunk(self.tp, 1)[self.tp_rank]

    def numbers(self) -> Tensor:
        """The positions [S / cp] that this context rank holds, counted from the sequence's first."""
        return self.context(torch.arange(self.length)[None])[0]

    def sight(self, cp_rank: int) -> Sight:
        """What the queries of this context rank see of the keys of another, or of its own."""
        whole, half = slice(0, self.length // self.cp), self.length // self.cp // 2
        if cp_rank == self.cp_rank:
            return Sight(whole, whole, causal=True)
        if cp_rank < self.cp_rank:  # its first stretch is before both of ours, its second after them
            return Sight(whole, slice(0, half), causal=False)
        return Sight(slice(half, whole.stop), whole, causal=False)  # both are between ours


def assemble(contexts: Sequence[Tensor]) -> Tensor:
    """Whole sequences [B, S, ...] from what every context rank holds of them, in the order of ranks."""
    if len(contexts) == 1:
        return contexts[0]
    first, second = zip(*(context.chunk(2, 1) for context in contexts), strict=True)
    return torch.cat((*first, *reversed(second)), 1)
