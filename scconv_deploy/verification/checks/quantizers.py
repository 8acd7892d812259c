"""Static checks of a quantised file: scales, zero points and int8 weights, bit for bit.

Only these checks are sure to find a scale that is off by one unit in the last place, or a weight that is off by one
code where its neighbours hide it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from scconv_deploy.graph.quantization import LayerSite
from scconv_deploy.records.parity import Check, Quantity
from scconv_deploy.records.quantization import Levels
from scconv_deploy.records.tolerances import FOLDED_ULPS, Table
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck
from scconv_deploy.verification.reference.expected import ExpectedQuantization, ExpectedWeights

SCALES = "scales"
WEIGHTS = "weight codes"
_NO_RECORD = "the file does not say by what rule its scales were made"
_ROUNDING = 2.0**-22
"""Relative error of ``w / s``: a quotient, or a product with a reciprocal."""


class Quantizers(ArtifactCheck):
    """Static checks of the quantisers.

    Args:
        expected: quantisers of the file, and the weights that it must hold; without weights, only the record in the
            file's metadata is compared.
    """

    def __init__(self, expected: ExpectedQuantization, limits: Table) -> None:
        self._found, self._expected, self._limits = expected.found, expected.weights, limits

    def checks(self) -> list[Check]:
        return [self._scales(), self._codes()] if self._expected else self._recorded()

    def _recorded(self) -> list[Check]:
        """Check of the record alone; without one, of what holds for any scale."""
        problems = [*self._unsound(), *self._misplaced(), *self._wrong_activations()]
        if problems:
            return [Check(SCALES, "failed", first_of(problems))]
        if self._found.record is None:
            why = f"{_NO_RECORD}, and nothing of PyTorch was run with them"
            return [Check(SCALES, "not run", f"{why}; all are positive and finite")]
        count = len(self._found.record.activations)
        return [Check(SCALES, "passed", f"scales of {count} inputs are those of the record, bit for bit")]

    def _scales(self) -> Check:
        problems = [*self._unsound(), *self._misplaced(), *self._wrong_activations(), *self._wrong_scales()]
        if problems:
            return Check(SCALES, "failed", first_of(problems))
        activations, layers = len(self._found.quantizers), len(self._weights())
        if self._found.record is None:
            ours = sum(site.weights.scales.tobytes() == self._expected[site.path].scales.tobytes()
                       for site in self._weights())  # fmt: skip
            return Check(
                SCALES, "not run",
                f"{_NO_RECORD}: PyTorch was run with those of {activations} inputs and {layers} weights as they are; "
                f"{ours} of the weights' are those of PyTorch's largest magnitudes, bit for bit",
            )  # fmt: skip
        text = f"scales of {activations} inputs are those of the record, of {layers} weights PyTorch's, bit for bit"
        return Check(SCALES, "passed", text)

    def _unsound(self) -> Iterator[str]:
        for node, reason in self._found.unsound.items():
            yield f"{node}: {reason}"

    def _misplaced(self) -> Iterator[str]:
        if self._found.record is not None:
            for node, reason in self._found.misplaced.items():
                yield f"a quantiser stands where none was put: {node}: {reason}"

    def _wrong_activations(self) -> Iterator[str]:
        record = self._found.record
        if record is None:
            return
        # one value may have several quantisers, each of which must be the record's
        found = [(one.value, one.levels) for one in self._found.quantizers.values()] + [*self._found.joined.items()]
        for value in record.activations.keys() - {value for value, _ in found}:
            yield f"{value} is not quantised, and the record names it"
        for value, count in record.reads.items():
            if self._found.reads[value] != count:
                yield f"{value} is read quantised by {self._found.reads[value]} inputs, in the record by {count}"
        for value, levels in found:
            expected = record.activations.get(value)
            if expected is None:
                yield f"{value} is quantised, and the record of the scales does not name it"
            elif levels != expected:
                yield f"{value} has {_words(levels)}, the record {_words(expected)}"

    def _wrong_scales(self) -> Iterator[str]:
        for site in self._weights():
            path, scales, expected = site.path, site.weights.scales, self._expected[site.path].scales
            if self._found.record is None:
                continue
            if len(scales) != len(expected):
                yield f"{path} has {len(scales)} scale for {len(expected)} output channels"
            elif scales.tobytes() != expected.tobytes():
                differs = np.flatnonzero(scales.view(np.uint32) != expected.view(np.uint32))
                channel = int(differs[0])
                yield (
                    f"scales of {path} differ in {len(differs)} of {len(scales)} channels: channel {channel} has "
                    f"{scales[channel]:.9g}, PyTorch {expected[channel]:.9g}"
                )

    def _codes(self) -> Check:
        total = explained = wrong = 0
        problems = []
        for site in self._weights():
            path, expected, codes = site.path, self._expected[site.path], site.weights.codes.astype(np.float32)
            if codes.shape != expected.codes.shape:
                if codes.size != expected.codes.size:
                    problems.append(
                        f"weights of {path} are {list(codes.shape)}, PyTorch's {list(expected.codes.shape)}"
                    )
                    continue
                codes = codes.reshape(expected.codes.shape)
            differs = codes != expected.codes
            near = differs & _explained(expected, site.weights.scales, codes)
            total, explained = total + codes.size, explained + int(near.sum())
            if off := int((differs & ~near).sum()):
                wrong += off
                problems.append(f"{path} differs from PyTorch's in {off:,} of {codes.size:,}")
        quantity = Quantity("unexplained_flips", wrong, self._limits["unexplained_flips"].value)
        if problems:
            return Check(WEIGHTS, "failed", f"int8 weights: {first_of(problems)}", (quantity,))
        ties = f", {explained:,} off by one within rounding of a tie" if explained else ""
        return Check(WEIGHTS, "passed", f"{total:,} int8 weights are PyTorch's, code for code{ties}", (quantity,))

    def _weights(self) -> list[LayerSite]:
        """A site for each stored weight of each module: calls may share one, or have copies of their own."""
        sites = {(site.path, site.weights.name): site for site in reversed(self._found.layers)}
        return list(sites.values())[::-1]


def _explained(expected: ExpectedWeights, scales: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Whether a code is one off because the weight lies within rounding of the boundary between the two."""
    each = (-1, *[1] * (expected.weight.ndim - 1))
    place = expected.weight.astype(np.float64) / scales.astype(np.float64).reshape(each)
    between = (codes + expected.codes) / 2
    rounding = _ROUNDING + (FOLDED_ULPS * 2.0**-23 if expected.folded else 0.0)
    near = np.abs(place - between) <= rounding * np.maximum(np.abs(place), 1.0)
    return (np.abs(codes - expected.codes) == 1) & near


def _words(levels: Levels) -> str:
    return f"scale {levels.scale:.9g}, zero point {levels.zero_point}, {'int8' if levels.signed else 'uint8'}"


def first_of(problems: Sequence[str]) -> str:
    """The first of several problems, and how many more there are."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0] + more
