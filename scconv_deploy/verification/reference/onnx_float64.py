"""An ONNX file as its own reference: its graph in float64, and PyTorch's formula at the gates.

Where only a file is at hand, ONNX Runtime must not be compared with itself. ``onnx.reference``, the specification's
interpreter in NumPy, shares no code with it and runs the graph in float64. The gates of an SRU are decided by
:meth:`.Gate.mask` on its input rounded to float32, where the rewrite read gamma and beta from the graph. A file that
had SRU nodes before holds cut and sign alone, which decide then (:func:`.margins.decide`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference.op_run import OpRun

from scconv_deploy.errors import ModelError
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.margins import decide
from scconv_deploy.graph.contract import FORMULA, FORMULA_DOMAIN
from scconv_deploy.graph.float64 import as_float64, with_formulas
from scconv_deploy.runtimes.onnx_reference import OnnxReferenceRunner
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.verification.reference.onnx_file import NamedArrays, OnnxReference
from scconv_deploy.verification.reference.run import Arrays, Site

Formula = Callable[[np.ndarray], np.ndarray]
"""Function from a gate's input, float32 ``[N, C, H, W]``, to its mask, bool of the same shape."""


class OnnxFloat64Reference(OnnxReference):
    """:class:`.run.ReferenceSource` of a float32 file in float64.

    Samples that are not judged in full run in ONNX Runtime, and so does a file with an operator that the interpreter
    lacks; the run then says so (:attr:`.run.ReferenceRun.float64_refusal`).

    Args:
        proto: rewritten float32 file, with its functions.
        gates: of its SRUs, by site, as far as gamma and beta are known.

    Raises:
        ModelError: as :class:`.onnx_file.OnnxReference`.
    """

    swapped_link = "the reference is the file itself in float64, with PyTorch's formula at its gates; no module was run"
    is_float32_form = False

    def __init__(
        self, name: str, proto: onnx.ModelProto, gates: Mapping[str, Gate], options: RuntimeOptions = RuntimeOptions()
    ) -> None:
        super().__init__(name, proto, options)
        self._gates = dict(gates)
        formulas = {n: _formula(gates[n]) if n in gates else _decided(site.form) for n, site in self._sites.items()}
        wide = as_float64(with_formulas(self._exposed, formulas))
        self._float64, self._refusal = None, ""
        try:
            self._float64 = OnnxReferenceRunner(wide, [_operator(formulas)])
        except ModelError as error:
            self._refusal = error.message

    def sru(self, site: Site, x: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Output and mask in PyTorch, float32; None for a site whose gamma and beta are not known."""
        if (gate := self._gates.get(site.name)) is None:
            return None
        rows = torch.from_numpy(x)
        return gate.apply(rows).numpy(), gate.mask(rows).numpy()

    def _values(self, sample: NamedArrays) -> tuple[Arrays, bool, str]:
        if self._float64 is None or not sample.deep:
            return self._runner.run(sample.inputs), False, self._refusal
        try:
            found = self._float64.run({n: _as(np.float64, value) for n, value in sample.inputs.items()})
        except ModelError as error:
            self._float64, self._refusal = None, error.message
            return self._values(sample)
        return {name: _as(np.float32, value) for name, value in found.items()}, True, ""


def _as(kind: type[np.floating], value: np.ndarray) -> np.ndarray:
    return value.astype(kind) if value.dtype.kind == "f" else value


def _formula(gate: Gate) -> Formula:
    return lambda x: gate.mask(torch.from_numpy(x)).numpy()


def _decided(form: Any) -> Formula:
    return lambda x: decide(x, form)


def _operator(formulas: Mapping[str, Formula]) -> type[OpRun]:
    """The operator that decides the gates of a site by its formula."""

    class _Gates(OpRun):
        op_domain = FORMULA_DOMAIN

        def _run(self, x: np.ndarray, site: str = "") -> tuple[np.ndarray]:
            return (formulas[site](x.astype(np.float32)),)

    _Gates.__name__ = FORMULA
    return _Gates
