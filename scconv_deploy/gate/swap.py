"""Replace recognised SRUs in a model, so that their gates can be watched, injected and exported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from scconv_deploy.gate import variant as pytorch_gate
from scconv_deploy.gate.recognize import Recognition, RecognizedSRU


class SwappedSRU(nn.Module):
    """An SRU whose gate can be watched and injected; otherwise it computes what the module computed.

    Attributes:
        path: the site's name.
        on_gate: if set, called with the path and the gate's input; a mask that it returns is used instead of the
            computed one.
    """

    def __init__(self, found: RecognizedSRU) -> None:
        super().__init__()
        self.path = found.path
        self.variant = found.variant
        self.parameters_of_gate = found.parameters
        self.gamma = found.gamma
        self.beta = found.beta
        self.conv = found.conv
        self.conv_place = found.conv_place
        self.on_gate: Callable[[str, Tensor], Tensor | None] | None = None

    def gate(self, x: Tensor) -> Tensor:
        mask = self.on_gate(self.path, x) if self.on_gate is not None else None
        return pytorch_gate.sru(x, self.gamma, self.beta, self.variant, mask)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None and self.conv_place == "before":
            return self.gate(self.conv(x))
        y = self.gate(x)
        return self.conv(y) if self.conv is not None and self.conv_place == "after" else y


def swap(model: nn.Module, recognition: Recognition) -> nn.Module:
    """A copy of the model that shares its tensors, with each recognised SRU replaced by a :class:`SwappedSRU`."""
    return replace_modules(model, {id(found.module): SwappedSRU(found) for found in recognition.srus})


def replace_modules(model: nn.Module, replacements: dict[int, nn.Module]) -> nn.Module:
    """A copy of the model that shares its tensors, with modules replaced by identity wherever they are registered."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    # deepcopy takes what the memo holds for an object as its copy: this is the replacement, at every place at once
    memo.update(replacements)
    return copy.deepcopy(model, memo)
