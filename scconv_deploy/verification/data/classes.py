"""Comparison of a data set's classes with a model's."""

from __future__ import annotations

from collections.abc import Mapping

from scconv_deploy.errors import UsageError
from scconv_deploy.verification.vision.targets import Task

_SHOWN = 3


def require_same_classes(source: str, names: Mapping[int, str], task: Task) -> None:
    """Refuse a data set whose classes are not the model's, by number and name.

    Names that say nothing (``class0``, ``0``) are equal to any.

    Args:
        source: as the error names it.
        names: class number -> name in the data set.

    Raises:
        UsageError: another number of classes, or another name; the first is quoted.
    """
    remedy = "Give the data that the model was trained for."
    if len(names) != len(task.names):
        raise UsageError(
            f"{source} has {_count(len(names))} ({_shown(names)}); the model has {len(task.names)} "
            f"({_shown(task.names)}).",
            remedy,
        )
    if not task.named or not Task("", names).named:
        return
    for number, name in names.items():
        own = task.names.get(number)
        if own is None or own.casefold() != name.casefold():
            raise UsageError(f"{source}: class {number} is {name!r}; the model's is {own!r}.", remedy)


def _count(number: int) -> str:
    return "1 class" if number == 1 else f"{number} classes"


def _shown(names: Mapping[int, str]) -> str:
    shown = list(names.values())[:_SHOWN]
    return ", ".join(shown) + (" ..." if len(names) > _SHOWN else "")
