"""Exact load statistics against hand-computed values, and the window against a plain sum."""

import math

import numpy as np
import pytest

from moe.telemetry.load import LoadWindow, dead, entropy, max_vio


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([5, 5, 5, 5], 0.0), ([8, 0, 0, 0], 3.0), ([6, 2, 2, 2], 1.0), ([0, 0, 0], 0.0), ([7], 0.0)],
)
def test_max_vio_is_the_excess_of_the_largest_over_the_mean(counts: list[int], expected: float) -> None:
    assert max_vio(counts) == expected


def test_max_vio_stays_exact_where_floats_cannot_count() -> None:
    big = 2**53  # big + 1 has no float64
    assert max_vio([big + 1, big, big, big]) == 3 / (4 * big + 1)


def test_entropy_is_normalised() -> None:
    assert entropy([3, 3, 3, 3, 3]) == pytest.approx(1.0)
    assert entropy([9, 0, 0]) == 0.0
    assert entropy([1, 1, 0, 0]) == pytest.approx(math.log(2) / math.log(4))
    assert entropy([3, 1]) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2))
    assert entropy([0, 0]) == entropy([4]) == 1.0


def test_dead_counts_experts_without_a_token() -> None:
    assert dead([0, 3, 0, 1]) == 2


@pytest.mark.parametrize("counts", [[1.0, 2.0], np.ones(3, dtype=np.float32), [], [[1, 2]]])
def test_counts_that_are_not_a_row_of_integers_are_refused(counts: object) -> None:
    with pytest.raises(AssertionError, match="counts must be"):
        max_vio(counts)  # type: ignore[arg-type]


def test_the_window_sums_counts_of_the_last_steps() -> None:
    window = LoadWindow(2)
    window.add(1, [100, 0])
    window.add(1, [0, 4])
    window.add(1, [4, 0])
    window.add("mtp0", [3, 1])
    assert window.layers == [1, "mtp0"]
    assert window.counts(1).tolist() == [4, 4]
    assert window.max_vio(1) == 0.0  # although each batch alone is as uneven as can be
    assert window.max_vio("mtp0") == 0.5


def test_a_window_holds_the_last_steps_of_each_layer() -> None:
    counts, window = np.random.default_rng(0).integers(0, 50, (9, 3, 8)), LoadWindow(4)
    for step in counts:
        for layer, row in zip((1, 2, "mtp0"), step.tolist(), strict=True):
            window.add(layer, row)
    for number, layer in enumerate((1, 2, "mtp0")):
        assert window.counts(layer).tolist() == counts[-4:, number].sum(0).tolist()


def test_a_window_does_not_keep_the_callers_array() -> None:
    window, counts = LoadWindow(3), np.array([1, 1])
    window.add(0, counts)
    counts[0] = 9
    assert window.counts(0).tolist() == [1, 1]
