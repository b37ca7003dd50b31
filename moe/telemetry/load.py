"""How evenly one MoE layer loads its experts: exact statistics of integer token counts. No torch.

A count is the number of (token, choice) pairs an expert received. Sums stay int64 and every ratio is
one division at the end, so the same counts give the same number on any layout. MaxVio is that of
"Auxiliary-Loss-Free Load Balancing" (arXiv:2408.15664): over one batch from `max_vio`, over the last
steps from `LoadWindow`. The two differ: a batch's MaxVio also holds the noise of a small sample.

Legend: E experts.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Layer = int | str  # "mtp0" for a layer of multi-token prediction


def exact(counts: Sequence[int] | NDArray[Any]) -> Counts:
    """Counts [E] as int64; floats are refused rather than rounded."""
    array = np.asarray(counts)
    assert array.ndim == 1 and array.size > 0, f"counts must be one row of experts, not {array.shape}"
    assert np.issubdtype(array.dtype, np.integer), f"counts must be integers, not {array.dtype}"
    return array.astype(np.int64)


def max_vio(counts: Sequence[int] | NDArray[Any]) -> float:
    """Maximal violation (max - mean) / mean of counts [E]: 0 is even, E - 1 one expert takes all.

    0 when nothing was routed.
    """
    load = exact(counts)
    largest, total = int(load.max()), int(load.sum())
    return (largest * load.size - total) / total if total else 0.0


def entropy(counts: Sequence[int] | NDArray[Any]) -> float:
    """Entropy of the load over counts [E], in nats, divided by ln E: 1 is even, 0 one expert takes all.

    1 when nothing was routed or when there is a single expert.
    """
    load = exact(counts)
    total = int(load.sum())
    if total == 0 or load.size == 1:
        return 1.0
    share = load[load > 0] / total
    return max(0.0, float(-(share * np.log(share)).sum() / np.log(load.size)))


def dead(counts: Sequence[int] | NDArray[Any]) -> int:
    """Number of experts in counts [E] that received no token."""
    return int((exact(counts) == 0).sum())


def collapsing(counts: Sequence[int] | NDArray[Any]) -> int:
    """Number of experts in counts [E] that received tokens, but less than a tenth of the mean."""
    load = exact(counts)
    return int(((load > 0) & (load * load.size * 10 < load.sum())).sum())


class LoadWindow:
    """The counts of the last `size` steps of every layer, and their sum; `size` None keeps all steps."""

    def __init__(self, size: int | None) -> None:
        assert size is None or size > 0, f"a window holds at least one step, not {size}"
        self._size = size
        self._steps: dict[Layer, deque[Counts]] = {}
        self._sums: dict[Layer, Counts] = {}

    def add(self, layer: Layer, counts: Sequence[int] | NDArray[Any]) -> None:
        """Append one step's counts [E] of a layer; the oldest step leaves a full window."""
        load = exact(counts)
        steps = self._steps.setdefault(layer, deque())
        self._sums[layer] = self._sums[layer] + load if steps else load
        steps.append(load)
        if self._size is not None and len(steps) > self._size:
            self._sums[layer] = self._sums[layer] - steps.popleft()

    @property
    def layers(self) -> list[Layer]:
        """Every layer seen, in the order in which it first appeared."""
        return list(self._sums)

    def counts(self, layer: Layer) -> Counts:
        """Counts [E] of a layer summed over its window."""
        return self._sums[layer]

    def max_vio(self, layer: Layer) -> float:
        """MaxVio of the summed counts of a layer's window."""
        return max_vio(self._sums[layer])
