"""Work of many small operators, on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's operators on one thread during the block.

    Small operators gain nothing from more, and between them the other threads spin: beside other load, recognition and
    export took two to six times their processor time with two threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
