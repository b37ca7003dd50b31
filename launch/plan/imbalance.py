"""How unevenly a rank's experts are loaded: a number that is assumed, or what a run measured.

Measured are the rows of the busiest expert-parallel rank over the mean, in each layer of each step that is
recorded by itself. They are added up anew from every expert's count for the ranks and the placement of the
settings, so a run of one rank foretells any other. A microbatch is less even than its step.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.recorded import read_single_steps
from moe.config import RunConfig
from moe.placement import rank_rows
from moe.telemetry.history import History
from moe.train.tuning import placements
from parallel.errors import UserError

QUANTILE = 0.99  # that is reckoned with


@dataclass(frozen=True, kw_only=True)
class Found:
    """The imbalance of settings; with the median and the greatest where a run measured it."""

    reckoned: float
    median: float | None = None
    greatest: float | None = None
    run: str | None = None

    def json(self) -> dict[str, Any]:
        """For machines."""
        measured = {"run": self.run, "50%": self.median, "99%": self.reckoned, "max": self.greatest}
        return {"imbalance": self.reckoned} | ({"measured_imbalance": measured} if self.run else {})

    def lines(self) -> Iterator[str]:
        """What is reckoned with, and why."""
        yield f"experts of a rank receive {self.reckoned:g} times the mean rows in every layer (--imbalance)"
        if self.run:
            yield (
                f"in {self.run} the busiest rank's rows, were experts spread like this, over the mean: "
                f"{self.median:.3f} in half of all steps and layers, {self.reckoned:.3f} in 99 %, at most "
                f"{self.greatest:.3f}"
            )


@dataclass(frozen=True)
class Measured:
    """What a run measured."""

    run: str
    history: History

    def __call__(self, config: RunConfig) -> Found:
        """Its quantiles; UserError where the run's experts are not those of the settings."""
        num_experts, ep = config.model.num_experts, config.layout.ep
        counts = self.history.counts
        if counts.shape[2] != num_experts:
            raise UserError(
                f"`--imbalance` must name a run with {num_experts} experts as `model.num_experts` says, but "
                f"{self.run} has {counts.shape[2]}: name another, or give a number"
            )
        placed, ratios = placements(config, ep), []
        for index, layer in enumerate(map(str, self.history.layers)):
            order = placed[layer].order if layer in placed else range(num_experts)
            rows = rank_rows(counts[:, index], order, ep)
            ratios.append(rows.max(1) / np.maximum(1, rows.sum(1)) * ep)
        quantiles = np.quantile(np.stack(ratios), (0.5, QUANTILE, 1.0), method="higher")
        median, reckoned, greatest = (max(1.0, float(each)) for each in quantiles)
        return Found(reckoned=reckoned, median=median, greatest=greatest, run=self.run)


def imbalance_of(word: str) -> Callable[[RunConfig], Found]:
    """What `--imbalance` says of any settings: a number for all, or the folder of a run that measured it."""
    try:
        number = float(word)
    except ValueError:
        if not Path(word).is_dir():
            raise UserError(
                f"`--imbalance` must be a number or the folder of a run, but is {word}: use 1.5"
            ) from None
        return Measured(word, read_single_steps(Path(word))[1])
    if not (number >= 1 and math.isfinite(number)):
        raise UserError(f"`--imbalance` must be at least 1, which is balanced, but is {number:g}: use 1.5")
    return lambda config: Found(reckoned=number)
