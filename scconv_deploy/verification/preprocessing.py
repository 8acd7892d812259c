"""Preprocessing of images: given, a zoo model's, or what a model says of itself."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from scconv_deploy import zoo
from scconv_deploy.errors import UsageError
from scconv_deploy.verification.data.images import Affine

_METADATA = ("pretrained_cfg", "default_cfg")
_LARGEST_SIDE = 16384  # pixels; a larger photograph takes gigabytes


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of images: ``(value - mean) / std`` per channel, for values in [0, 1]. The default changes nothing.

    Attributes:
        resize: shorter side before a centre crop to the input's size, in pixels; None resizes to the input's size.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    resize: int | None = None

    @property
    def affine(self) -> Affine:
        """As :func:`.data.sources.open_source` takes it."""
        return self.mean, self.std, self.resize

    @classmethod
    def of(cls, source: str, model: nn.Module | None = None) -> Preprocessing:
        """Preprocessing of a zoo model, or from a model's ``pretrained_cfg`` (as in timm); else the default."""
        entry = zoo.MODELS.get(source)
        if entry:
            return cls(entry.mean, entry.std)
        for name in _METADATA:
            config = getattr(model, name, None)
            if isinstance(config, Mapping) and "mean" in config and "std" in config:
                given = {key: np.ravel(config[key]).tolist() for key in ("mean", "std")}
                return cls._checked(given, f"The model's {name}", "Give --preprocessing in its place.")
        return cls()

    @classmethod
    def parse(cls, text: str) -> Preprocessing:
        """Read ``--preprocessing JSON``: an object with ``mean``, ``std`` and ``resize`` (UsageError otherwise)."""
        example = '--preprocessing \'{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "resize": 256}\''
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--preprocessing {text!r} is not JSON.", f"Write {example}.") from error
        if not isinstance(given, dict):
            raise UsageError(f"--preprocessing {text!r} is no JSON object.", f"Write {example}.")
        if unknown := sorted(set(given) - {"mean", "std", "resize"}):
            raise UsageError(f"--preprocessing has no {unknown[0]!r}.", f"Write {example}.")
        return cls._checked(given, "--preprocessing", f"Write {example}.")

    @classmethod
    def _checked(cls, given: Mapping[str, Any], where: str, remedy: str) -> Preprocessing:
        """Check the values (UsageError if one would divide by zero or give NaN or infinity)."""
        lists = {}
        for name, default in (("mean", 0.0), ("std", 1.0)):
            values = given.get(name, [default])
            if not isinstance(values, list) or not values:
                raise UsageError(f"{where}: {name} is {values!r}, expected a list with a number per channel.", remedy)
            for index, value in enumerate(values):
                number = _float32(value) if type(value) in (int, float) else math.nan
                if not math.isfinite(number) or (name == "std" and number <= 0):
                    wanted = "a finite number above 0" if name == "std" else "a finite number"
                    raise UsageError(f"{where}: {name}[{index}] is {value!r}, expected {wanted}.", remedy)
            lists[name] = tuple(map(float, values))
        resize = given.get("resize")
        if resize is not None and not (type(resize) is int and 0 < resize <= _LARGEST_SIDE):
            raise UsageError(f"{where}: resize is {resize!r}, expected 1 to {_LARGEST_SIDE} pixels.", remedy)
        return cls(lists["mean"], lists["std"], resize)


def _float32(value: float) -> float:
    """Round to float32, in which the value is used: 1e-60 is 0, 1e60 is infinite, and so is any larger integer."""
    try:
        with np.errstate(over="ignore", under="ignore"):
            return float(np.float32(value))
    except OverflowError:
        return math.inf
