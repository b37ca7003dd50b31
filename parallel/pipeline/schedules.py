"""Every schedule by its name, and the numbers of ranks and microbatches that it can do with. No torch."""

from parallel.pipeline.action import Schedule
from parallel.pipeline.dualpipe import dualpipe
from parallel.pipeline.dualpipev import dualpipev
from parallel.pipeline.gpipe import gpipe
from parallel.pipeline.interleaved import interleaved
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.pipeline.zb_h1 import zb_h1


def make(
    name: str, num_ranks: int, num_microbatches: int, *, overlap: bool = True, stages_per_rank: int = 2
) -> Schedule:
    if name == "1f1b":
        return one_f_one_b(num_ranks, num_microbatches, overlap=overlap)
    if name == "interleaved":
        return interleaved(num_ranks, num_microbatches, stages_per_rank)
    if name in ("dualpipe", "dualpipev"):
        made = {"dualpipe": dualpipe, "dualpipev": dualpipev}[name](num_ranks, num_microbatches)
        return made if overlap else made.serial()
    return {"gpipe": gpipe, "zb-h1": zb_h1}[name](num_ranks, num_microbatches)
