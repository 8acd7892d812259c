"""PyTorch rounded to half as a half file is, and the noise of the rounded run.

A half file is judged twice. Against PyTorch with every value rounded (:mod:`.model.rounded`), which rounds at nearly
the same places, its error is judged in multiples of the noise. Against PyTorch in float32, it shows what half costs,
within a budget. The noise is the largest distance of other right roundings: BatchNorms not folded, and random
roundings, twice. The cost is one rounded pass, and three passes of the first rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scconv_deploy.errors import ModelError
from scconv_deploy.gate.other_gates import OtherGate, View, channel_axes, is_other
from scconv_deploy.model.replay import replay
from scconv_deploy.model.rounded import DTYPES, Rounded
from scconv_deploy.model.signature import Signature
from scconv_deploy.model.steps import margin_name
from scconv_deploy.verification import metrics
from scconv_deploy.verification.reference.noise import (
    FULL_SAMPLES,
    Rows,
    Value,
    followed,
    of_kind,
    outputs_apart,
    right_runs,
    spread_of,
)
from scconv_deploy.verification.reference.run import ReferenceRun, RoundedRun


class RoundedRuns:
    """Runs of a swapped model rounded to half, with the gates of the float32 run."""

    def __init__(self, swapped: nn.Module, signature: Signature) -> None:
        self._swapped, self._signature = swapped, signature
        self._samples = 0

    def measure(self, run: ReferenceRun, data: str, rows_apart: bool) -> RoundedRun | None:
        """Run one sample and measure its noise; None if the rounded model's shapes do not fit the gates.

        Args:
            data: ``float16`` or ``bfloat16``.
            rows_apart: whether rows are known to be independent.
        """
        tensors = {name: _rounded(torch.from_numpy(value), data) for name, value in run.inputs.items()}
        masks = {name: torch.from_numpy(mask) for name, mask in run.masks.items()}
        inputs: dict[str, Tensor] = {}
        mode = Rounded(followed(tensors, masks), data)
        try:
            outputs = self._run(tensors, masks, mode, lambda site, x: inputs.__setitem__(site, x.clone()))
        except (RuntimeError, ModelError):  # for example, another number of rows
            return None
        margins = _Margins(run, inputs)
        full = self._samples < FULL_SAMPLES
        self._samples += 1
        parts = metrics.parts_of(run.outputs, {name: y.detach().numpy() for name, y in outputs.items()})
        tried, found = right_runs(
            Rows(tensors, outputs, masks, inputs, parts).tried(rows_apart),
            lambda few: self._modes(few, data, full),
            lambda few, mode: self._distances(few, mode, margins),
        )
        for value, distance in self._stepwise(tried, data).items():
            found.setdefault(value, []).append(distance)
        floors = {value: max(distances) for value, distances in found.items()}
        return RoundedRun(
            {name: y.detach().numpy() for name, y in outputs.items()},
            {name: floors.get(("output", name)) for name in outputs},
            {name: x.detach().numpy() for name, x in inputs.items() if name in run.sites},
            of_kind("site", floors),
            spread_of(found),
            margins.gates(),
            of_kind("part", floors),
        )

    def _modes(self, few: Rows, data: str, full: bool) -> list[Rounded]:
        inputs = few.followed
        if not full:
            return [Rounded(inputs, data, seed=self._samples)]
        return [Rounded(inputs, data, fold=False), Rounded(inputs, data, seed=1), Rounded(inputs, data, seed=2)]

    def _stepwise(self, few: Rows, data: str) -> dict[Value, float]:
        """Distances of parts of outputs where an activation is rounded after each of its nodes, as in the file.

        Small results are then what the rounding of larger numbers leaves: silu(-10) is off by a tenth of a percent,
        gelu(-3) by a fifth. That counts for parts alone: a whole output of which half leaves so little is wrong.
        """
        if not few.parts:
            return {}
        try:
            outputs = self._run(
                few.tensors, few.masks, Rounded(few.followed, data, stepwise=True), lambda site, x: None
            )
        except (RuntimeError, ModelError):  # as for the other runs
            return {}
        apart = outputs_apart(outputs, few.outputs, few.parts)
        return {value: d for value, d in apart.items() if value[0] == "part" and math.isfinite(d)}

    def _run(
        self,
        tensors: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        mode: Rounded,
        watch: Callable[[str, Tensor], None],
    ) -> dict[str, Tensor]:
        with _in_steps(self._swapped), mode.whole_srus(self._swapped), mode:
            outputs = replay(self._swapped, self._signature, tensors, masks, watch)
        return {name: mode.nearest(y) for name, y in outputs.items()}

    def _distances(self, few: Rows, mode: Rounded, margins: _Margins) -> dict[Value, float]:
        found: dict[Value, float] = {}

        def watch(site: str, x: Tensor) -> None:
            if is_other(site):
                margins.add(site, x.detach().numpy(), few.inputs[site].numpy())
            elif x.shape == few.inputs[site].shape:
                found["site", site] = metrics.relative_l2(x.detach().numpy(), few.inputs[site].numpy())

        found |= outputs_apart(self._run(few.tensors, few.masks, mode, watch), few.outputs, few.parts)
        return {value: d for value, d in found.items() if math.isfinite(d)}


class _Margins:
    """Margins of gates of no known SRU in a rounded run, and their noise.

    Args:
        run: float32 run; it counts as a right run, because a file may keep the layers before a gate in float32.
        inputs: margins of the rounded run by name.
    """

    def __init__(self, run: ReferenceRun, inputs: Mapping[str, Tensor]) -> None:
        self._run = run
        self._views = {margin_name(n, i): v for n, gate in run.others.items() for i, v in enumerate(gate.views)}
        self._margins = {name: x.numpy() for name, x in inputs.items() if name in self._views}
        self._noise: dict[str, np.ndarray] = {}
        self._errors: dict[str, float] = {}
        for name, margin in self._margins.items():
            self.add(name, self._views[name].margin, margin)

    def add(self, name: str, margin: np.ndarray, usual: np.ndarray) -> None:
        """Add the margin of another right run, and the rounded run's margin of the same rows."""
        if name not in self._margins or margin.shape != usual.shape or not margin.size:
            return
        with np.errstate(invalid="ignore"):
            off = np.abs(margin.astype(np.float64) - usual)
        off = np.where(np.isfinite(off), off, 0.0)
        noise = off.max(axis=channel_axes(off.ndim), keepdims=True)
        size = float(np.linalg.norm(np.broadcast_to(self._views[name].scale, off.shape).astype(np.float64)))
        self._noise[name] = np.maximum(self._noise.get(name, 0.0), noise)
        self._errors[name] = max(self._errors.get(name, 0.0), float(np.linalg.norm(off)) / size if size else 0.0)

    def gates(self) -> dict[str, OtherGate]:
        """Gates of the float32 run with rounded margins and their noise; gates without a margin are left out."""
        found = {}
        for name, gate in self._run.others.items():
            names = [margin_name(name, index) for index in range(len(gate.views))]
            if names and all(n in self._noise and self._margins[n].shape == gate.decided.shape for n in names):
                views = (
                    View(view.kind, self._margins[n], view.scale, self._noise[n].astype(np.float32), self._errors[n])
                    for n, view in zip(names, gate.views, strict=True)
                )
                found[name] = replace(gate, views=tuple(views))
        return found


def _rounded(tensor: Tensor, data: str) -> Tensor:
    return tensor.to(DTYPES[data]).float() if tensor.dtype == torch.float32 else tensor


@contextmanager
def _in_steps(model: nn.Module) -> Iterator[None]:
    """Context in which attention and recurrent layers run as single operators, as in an export."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(isinstance(m, nn.RNNBase) for m in model.modules()):
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
