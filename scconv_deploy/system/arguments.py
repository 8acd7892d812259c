"""Empty command-line arguments, as an unset shell variable gives them. Standard library only."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def empty_argument(arguments: Sequence[str]) -> str:
    """The complaint about an empty argument, as ``--digest "$UNSET"`` gives it; "" if none is empty.

    No option means anything then, and one that is taken for not given would leave a check out in silence.
    """
    for index, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if argument == "" or (option.startswith("-") and "=" in argument and not value):
            before = option if option else " ".join(arguments[max(index - 1, 0) : index])
            return f"Argument {index + 1}{f' ({before})' if before else ''} is empty, expected a value."
    return ""


EMPTY_REMEDY = "Set the shell variable that it comes from, or leave the option out."
