"""Threads of PyTorch's operators during a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch's operators on so many threads during the block; 0 leaves their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> AbstractContextManager[None]:
    """Run torch's operators on one thread during the block.

    Small operators gain nothing from more, and between them the other threads spin: beside other load, recognition and
    export took two to six times their processor time with two threads.
    """
    return threads(1)
