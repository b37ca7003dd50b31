"""The numbers by which schedules are compared. No torch.

Schedules cut a model into more or fewer stages. What is compared fairly is counted in a rank's *share*,
the model over the ranks, of which every rank computes as much as any other.
"""

from dataclasses import dataclass, replace

from parallel.pipeline.action import Schedule
from parallel.pipeline.check import peak_in_flight
from parallel.pipeline.simulate import Costs
from parallel.pipeline.timeline import Timeline


def stage_share(schedule: Schedule) -> float:
    """One stage in a rank's share of the model: 1/2 where the model is cut into two stages per rank."""
    return schedule.num_ranks / schedule.num_stages


def stage_costs(share: Costs, schedule: Schedule) -> Costs:
    """The costs of one stage, from those of a rank's share; what goes from rank to rank does not shrink."""
    scale = stage_share(schedule)
    return replace(share, f=share.f * scale, b=share.b * scale, w=share.w * scale, a2a=share.a2a * scale)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A timeline in numbers; times are in its unit.

    `bubble` and `exposed` are those of the rank that stands idle, or waits for the wire, the longest.
    `peak_activations`: per rank, in microbatches on a stage. `peak_share`: of the rank with most, in
    microbatches on a rank's share. `weights_held`: of the rank with most, in a rank's share.
    """

    makespan: float
    bubble: float
    exposed: float
    peak_activations: tuple[int, ...]
    peak_share: float
    weights_held: float

    def __str__(self) -> str:
        parts = [f"makespan {self.makespan:.4g}", f"bubble {self.part(self.bubble)}"]
        if self.exposed:
            parts.append(f"exposed communication {self.part(self.exposed)}")
        parts.append(f"peak activations {self.peak_share:g} microbatches")
        return ", ".join([*parts, f"weights held {self.weights_held:g}x"])

    def part(self, time: float) -> str:
        """A time, and how much of the whole it is: ``6 (9.1%)``."""
        return f"{time:.4g} ({time / self.makespan:.1%})" if self.makespan else f"{time:.4g}"


def summarize(timeline: Timeline) -> Summary:
    """The numbers of a simulated or a measured timeline."""
    schedule = timeline.schedule
    peaks, share = peak_in_flight(schedule), stage_share(schedule)
    return Summary(
        makespan=timeline.makespan,
        bubble=max(timeline.bubbles),
        exposed=max(timeline.exposed),
        peak_activations=peaks,
        peak_share=max(peaks) * share,
        weights_held=max(map(len, schedule.stages)) * share,
    )
