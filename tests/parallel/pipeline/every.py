"""Every schedule that a number of ranks and microbatches allows."""

from collections.abc import Iterator

from parallel.pipeline.action import Schedule
from parallel.pipeline.dualpipe import dualpipe
from parallel.pipeline.dualpipev import dualpipev
from parallel.pipeline.gpipe import gpipe
from parallel.pipeline.interleaved import interleaved
from parallel.pipeline.one_f_one_b import one_f_one_b
from parallel.pipeline.zb_h1 import zb_h1


def schedules(ranks: int, microbatches: int) -> Iterator[Schedule]:
    yield gpipe(ranks, microbatches)
    yield one_f_one_b(ranks, microbatches)
    yield one_f_one_b(ranks, microbatches, overlap=True)
    yield zb_h1(ranks, microbatches)
    if microbatches % ranks == 0:
        yield from (interleaved(ranks, microbatches, each) for each in (1, 2, 3))
    if microbatches >= 2 * ranks:
        yield from (dualpipev(ranks, microbatches), dualpipev(ranks, microbatches).serial())
        if ranks % 2 == 0 and microbatches % 2 == 0:
            yield from (dualpipe(ranks, microbatches), dualpipe(ranks, microbatches).serial())
