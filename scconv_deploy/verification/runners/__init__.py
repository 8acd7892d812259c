"""What runs a model: one file a backend, each a context manager with ``run(tensors) -> tensors`` by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np


class Runner(Protocol):
    """A loaded model. ``name`` is the backend's; ``run`` takes and returns arrays by name."""

    name: str

    def __enter__(self) -> Runner: ...

    def __exit__(self, *exc: object) -> None: ...

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...
