"""PyTorch in float64 with the gates of the float32 run. It measures noise and judges no gate.

It runs a few rows of a sample at a time where the rows do not depend on one another, which is tried out and not taken
for granted: tensors then stay in the cache and in the allocator's pool. Measured on ScConv-ResNet-50 with 8 images:
two at a time take 0.97 s, all at once 1.65 s, and float32 takes 0.55 s.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from scconv_deploy.errors import ModelError
from scconv_deploy.gate.other_gates import is_other
from scconv_deploy.model import steps
from scconv_deploy.model.replay import RecordedGate, all_finite, replay
from scconv_deploy.model.signature import Signature

_ELEMENTS_AT_ONCE = 2**19
"""Size of the largest input or gate in one part: two rows of ScConv-ResNet-50, 32 of a network on CIFAR's images."""
_SAME = 1e-10
"""Relative L2 between a row run alone and beside others: float64's sums in another order are at 1e-15, and nothing
below this moves a floor, of which the smallest is 6e-8."""


@dataclass
class Noise:
    """Distances of float32 from float64 with the same gates.

    Attributes:
        outputs: in float64, by name.
        squares: of each gate's input by site: ``|x32 - x64|**2`` and ``|x64|**2``, summed over the rows.
        last_row: of every gate's input and every output, in float64.
        largest: of each other gate's margin: the largest ``|x32 - x64|`` of each channel.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, tuple[float, float]] = field(default_factory=dict)
    last_row: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[str, Tensor] = field(default_factory=dict)

    @property
    def at_gates(self) -> dict[str, float]:
        """Relative L2 of each gate's input; without those that are NaN."""
        return {site: (error / max(size, 1e-300)) ** 0.5 for site, (error, size) in self.squares.items()}

    def add(self, site: str, x: Tensor, exact: Tensor) -> None:
        """Add rows of a gate's input, in float32 and in float64."""
        difference = exact - x
        if is_other(site):  # beside infinities, as masks in the wild have them, there are numbers to compare
            difference = difference.nan_to_num(0.0, 0.0, 0.0)
            largest = steps.largest_of_channel(difference.abs())
            before = self.largest.get(site)
            self.largest[site] = largest if before is None else torch.maximum(before, largest)
        off = difference.flatten()
        error, size = self.squares.get(site, (0.0, 0.0))
        flat = exact.flatten()
        self.squares[site] = error + float(off.dot(off)), size + float(flat.dot(flat))


class Float64Replay:
    """The swapped model in float64.

    Attributes:
        model: the copy that runs.
    """

    def __init__(self, swapped: nn.Module, signature: Signature) -> None:
        self.model = copy.deepcopy(swapped).double()
        self._signature = signature
        self._by_rows: bool | None = None  # whether rows may run apart; None until it has been tried

    @property
    def rows_apart(self) -> bool:
        """Whether a run showed that rows do not depend on one another."""
        return bool(self._by_rows)

    def run(
        self,
        tensors: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        watch: Callable[[str, Tensor], None] = lambda site, x: None,
    ) -> dict[str, Tensor]:
        """Run with masks by site; outputs by name, in float64. ``watch`` as for :func:`.replay.replay`."""
        doubled = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
        return replay(self.model, self._signature, doubled, masks, watch)

    def noise(
        self,
        tensors: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        gates: Mapping[str, RecordedGate],
        others: steps.Steps | None = None,
    ) -> Noise:
        """Compare a float32 run with float64.

        Args:
            tensors: the inputs by name.
            outputs: of the float32 run.
            gates: of it, by site.
            others: of it, where there are gates of no SRU.

        Raises:
            RuntimeError: the model does not run in float64.
        """
        run = _Single(tensors, {n: g.mask for n, g in gates.items()}, {n: g.x for n, g in gates.items()})
        if others is not None:
            run = _Single(tensors, run.masks | others.decided, run.inputs | others.margins)
        parts = rows_together([*tensors.values(), *run.masks.values()], list(outputs.values()), _ELEMENTS_AT_ONCE)
        if len(parts) > 1 and self._by_rows is not False:
            try:
                found = self._noise(run, parts)
                if self._by_rows is None:
                    self._by_rows = self._alike(found.last_row, run, parts[-1])
                if self._by_rows:
                    return found
            except (RuntimeError, ModelError):  # a fixed shape in the user's forward, or what the whole raises too
                self._by_rows = False
        return self._noise(run, [slice(None)])

    def _noise(self, run: _Single, parts: Sequence[slice]) -> Noise:
        found, made = Noise(), []
        finite = {site for site, x in run.inputs.items() if all_finite(x)}
        for rows in parts:

            def watch(site: str, exact: Tensor, rows: slice = rows) -> None:
                if site in finite or is_other(site):
                    found.add(site, run.inputs[site][rows] if exact.dim() else run.inputs[site], exact)
                found.last_row[site] = exact[-1:].clone() if exact.dim() else exact

            made.append(self.run(rows_of(run.tensors, rows), rows_of(run.masks, rows), watch))
        found.last_row |= {f"output {name}": y[-1:] for name, y in made[-1].items() if y.dim()}
        found.outputs |= made[0] if len(parts) == 1 else {n: torch.cat([m[n] for m in made]) for n in made[0]}
        return found

    def _alike(self, last_row: Mapping[str, Tensor], run: _Single, part: slice) -> bool:
        """Whether the last row gives the same at every gate and output, whatever rows run beside it.

        Its place among the rows is another one too, so that parameters that belong to a place show as well.
        """
        end = part.stop
        other = slice(end - 1, end) if end - part.start > 1 else slice(end - 2, end)
        alone = self._noise(run, [other]).last_row
        return last_row.keys() == alone.keys() and all(_same(last_row[name], value) for name, value in alone.items())


@dataclass(frozen=True, eq=False)
class _Single:
    """A run in float32: inputs by name, and by site the gates and their inputs."""

    tensors: Mapping[str, Tensor]
    masks: dict[str, Tensor]
    inputs: dict[str, Tensor]


def rows_together(tensors: Sequence[Tensor], outputs: Sequence[Tensor], elements: int) -> list[slice]:
    """Rows to run together; all of them where the tensors or outputs do not have the same number.

    Args:
        elements: of the largest tensor, that may run at once.
    """
    lengths = {len(t) if t.dim() else 0 for t in (*tensors, *outputs)}
    rows = min(lengths)
    if len(lengths) > 1 or rows < 2:
        return [slice(None)]
    widest = max(t.numel() // rows for t in tensors)
    count = -(-rows // max(elements // max(widest, 1), 1))
    edges = [rows * part // count for part in range(count + 1)]
    return [slice(*pair) for pair in pairwise(edges)]


def rows_of(tensors: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Rows of tensors by name."""
    return {name: tensor[rows] for name, tensor in tensors.items()} if rows != slice(None) else dict(tensors)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    finite = torch.isfinite(other)
    if not torch.equal(finite, torch.isfinite(one)):
        return False
    return bool((one - other)[finite].norm() <= _SAME * other[finite].norm())
