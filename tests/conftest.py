"""Tests compute as ranks do, with one thread: the same sums in the same order, and no fight for cores."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes of their own take longest: begun last, one worker would end alone."""
    items.sort(key=lambda item: (item.path.name != "test_readme.py", item.path.parent.name != "launch"))
