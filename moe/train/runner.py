"""Running microbatches through this rank's stage: to train by the run's schedule, or forward alone."""

from collections.abc import Sequence
from functools import lru_cache

from moe.config import LayoutConfig, RunConfig
from moe.model.transformer import Microbatch, Outcome, Transformer, positions_of
from parallel.groups import Groups
from parallel.pipeline.action import Schedule
from parallel.pipeline.executor import execute
from parallel.pipeline.gpipe import forward_only, gpipe
from parallel.pipeline.link import Boundary, connect, disconnect
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.zero import Zero


class Runner:
    """A stage, its place in the pipeline, and the buffers whose traffic its walk sets off."""

    def __init__(self, model: Transformer, config: RunConfig, groups: Groups, zero: Zero) -> None:
        self.model, self.groups, self.device = model, groups, zero.device
        self._zero, self._dtype = zero, next(model.parameters()).dtype
        self._layout, self._recompute = config.layout, config.train.recompute == "full"
        schedule = make_schedule(config.layout, config.layout.microbatches)
        self._link = connect(schedule, groups.pp, self.device)

    def train(self, microbatches: Sequence[Microbatch]) -> list[Outcome]:
        """Forward and backward; weights arrive when needed, reductions begin as gradients are whole."""
        return execute(
            make_schedule(self._layout, len(microbatches)),
            {self._link.rank: self.model},
            microbatches,
            link=self._link,
            boundary=self._boundary(microbatches[0]),
            recompute=self._recompute,
            on_enter=self._zero.arrive,
            on_leave=self._zero.start_reduce,
        )

    def forward(self, microbatches: Sequence[Microbatch]) -> list[Outcome]:
        """Forward alone: nothing is recorded or moved."""
        return execute(
            forward_only(self._layout.pp, len(microbatches)),
            {self._link.rank: self.model},
            microbatches,
            link=self._link,
            boundary=self._boundary(microbatches[0]),
            on_enter=self._zero.arrive,
        )

    def close(self) -> None:
        """Give the pipeline's connections back."""
        disconnect(self._link)

    def _boundary(self, microbatch: Microbatch) -> Boundary:
        size, length = microbatch.tokens.shape
        held = positions_of(length, self.groups)
        shape = (size, length // (held.cp * held.tp), self.model.config.hidden_size)
        return Boundary(shape, self._dtype, self.device)


@lru_cache(maxsize=8)
def make_schedule(layout: LayoutConfig, num_microbatches: int) -> Schedule:
    """The schedule that the settings name."""
    if layout.schedule == "gpipe":
        return gpipe(layout.pp, num_microbatches)
    return one_f_one_b(layout.pp, num_microbatches, overlap=layout.overlap)
