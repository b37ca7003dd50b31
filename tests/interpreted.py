"""Tests of kernels: in a process of their own, where Triton is loaded so that it interprets them on the CPU.

Triton reads `TRITON_INTERPRET` when a kernel is defined, and other tests want it otherwise. The process is
forked from the server of tests/ranks.py and kept. Where the variable is set, tests run where they are:

    TRITON_INTERPRET=1 python -m pytest tests/parallel/test_kernels.py
"""

import functools
import importlib
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tests.ranks import CONTEXT


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """A test whose arguments can be pickled, run under the interpreter."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        if os.environ.get("TRITON_INTERPRET") == "1":
            test(*args, **kwargs)
        else:
            _process().submit(_call, test.__module__, test.__qualname__, args, kwargs).result()

    return run


@functools.cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=CONTEXT, initializer=_prepare)


def _prepare() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("torch").set_num_threads(1)


def _call(module: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    getattr(importlib.import_module(module), name)(*args, **kwargs)
