"""Items in runs of limited size: parameters in buffers, tensors in files, rows in the cache. No torch."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def runs(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Items in order, in runs whose sizes add up to at most `limit`; a larger item is a run by itself."""
    run: list[Item] = []
    total = 0
    for item in items:
        if run and total + size(item) > limit:
            yield run
            run, total = [], 0
        run.append(item)
        total += size(item)
    if run:
        yield run
