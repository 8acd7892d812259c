"""Syntax of ``--embed``. No torch: a mistake is reported before anything is loaded."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scconv_deploy.errors import UsageError

PAPER = "paper"
"""The one rule that is no pattern."""

SCCONV_OPTIONS: Mapping[str, tuple[type, ...]] = {
    "num_groups": (int,),
    "gate_threshold": (int, float),
    "alpha": (int, float),
    "squeeze_ratio": (int,),
    "group_size": (int,),
    "group_kernel_size": (int,),
    "torch_gn": (bool,),
    "variant": (str,),
    "fusion": (str,),
}
"""Arguments of :class:`~scconv_deploy.nn.ScConv` that JSON can hold, and their types."""

_EXAMPLE = 'Write for example --embed \'{"rule": "paper", "alpha": 0.75}\'.'


@dataclass(frozen=True)
class EmbedSpec:
    """Arguments of :func:`scconv_deploy.embed`: the rule and ScConv's settings.

    Attributes:
        rule: ``paper``, or patterns over module paths, separated by commas.
        calibrate: take the statistics of the norms behind ScConv from the example inputs.
        scconv: arguments of :class:`~scconv_deploy.nn.ScConv`.
    """

    rule: str = PAPER
    calibrate: bool = False
    scconv: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> EmbedSpec:
        """Read ``RULE``, or a JSON object with ``rule``, ``calibrate`` and ScConv's arguments, all optional.

        Raises:
            UsageError: it is written in another way.
        """
        if not text.lstrip().startswith("{"):
            if not text.strip(" ,"):
                raise UsageError("--embed is empty.", "Write --embed paper, or a pattern such as 'layer[34].*.conv2'.")
            return cls(text)
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UsageError(f"--embed {text!r} is not JSON: {error}.", _EXAMPLE) from error
        types = {"rule": (str,), "calibrate": (bool,), **SCCONV_OPTIONS}
        for name, given in value.items():
            if name not in types:
                near = difflib.get_close_matches(name, types, n=1)
                hint = f"Did you mean {near[0]}?" if near else f"It takes {', '.join(types)}."
                raise UsageError(f"--embed has no argument {name!r}.", hint)
            if not isinstance(given, types[name]) or (isinstance(given, bool) and bool not in types[name]):
                wanted = " or ".join(t.__name__ for t in types[name])
                raise UsageError(f"--embed: {name} is {given!r}, expected {wanted}.", _EXAMPLE)
        scconv = {name: given for name, given in value.items() if name in SCCONV_OPTIONS}
        return cls(value.get("rule", PAPER), value.get("calibrate", False), scconv)

    def __str__(self) -> str:
        if not self.scconv and not self.calibrate:
            return self.rule
        return json.dumps({"rule": self.rule, "calibrate": self.calibrate, **self.scconv})
