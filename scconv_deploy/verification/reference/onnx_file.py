"""ONNX file as the reference, such as the original of a rewrite or a conversion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import numpy_helper

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.gate.margins import GateForm
from scconv_deploy.gate.other_gates import JUMP_DISTURBANCE
from scconv_deploy.graph import gates as onnx_gates
from scconv_deploy.graph import inputs, instrument
from scconv_deploy.graph.contract import STRADDLE
from scconv_deploy.records import tolerances
from scconv_deploy.records.gates import Refusal
from scconv_deploy.runtimes.half import float_arithmetic
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.verification.metrics import distance
from scconv_deploy.verification.reference.onnx_noise import OnnxNoise
from scconv_deploy.verification.reference.run import Arrays, ReferenceRun, RoundedRun, Site, SiteRun

_JUMP_DRAWS = 8
_NO_FLOAT64 = "the reference is an ONNX file, which has no float64 form"


@dataclass(frozen=True, eq=False)
class NamedArrays:
    """Sample of arrays.

    Attributes:
        name: origin of the inputs.
        inputs: arrays by name.
        labels: of the rows, see :class:`.data.blocks.Block`; None without labels.
        count: number of rows that count; None for all (a padded last batch has fewer).
        deep: whether the sample is judged in full, as in :class:`.run.ReferenceRun`.
        kind: name for all samples of this kind; "" if the sample has its own.
    """

    name: str
    inputs: Arrays
    labels: np.ndarray | None = None
    count: int | None = None
    deep: bool = True
    kind: str = ""

    def __str__(self) -> str:
        return self.name


class OnnxReference:
    """:class:`.run.ReferenceSource` of an ONNX file, run in ONNX Runtime, whose gates are the reference's.

    The noise is that of runs whose values move in their last place (:mod:`.onnx_noise`), because a file has no float64
    form. The scale of a cut's rounding error needs PyTorch's parameters; the cut itself is used instead.

    Args:
        measured: whether noise is measured; gates on the same input and costs need none.

    Raises:
        ModelError: an output is no tensor, or ONNX Runtime refuses the file.
    """

    rounds_to_codes = False  # a file of codes cannot be disturbed
    swapped_link = "the reference is an ONNX file; PyTorch was not run"
    is_float32_form = True
    left_alone: tuple[Refusal, ...] = ()

    def __init__(
        self, name: str, proto: onnx.ModelProto, options: RuntimeOptions = RuntimeOptions(), measured: bool = True
    ) -> None:
        for value in proto.graph.output:
            if not value.type.HasField("tensor_type"):
                raise ModelError(
                    f"{name}: the output {value.name!r} is no tensor, so it cannot be compared.",
                    "Give out its tensors one by one.",
                )
        self.name = name
        self._proto = proto
        self._sites = {name: _site(self._proto, name, node) for name, node in instrument.sites(self._proto).items()}
        self._options = options = float_arithmetic(proto, options)
        self._wanted = onnx_gates.candidates(self._proto)
        self._noise = OnnxNoise(self._proto, self._sites, self._wanted, options) if measured else None
        exposed = instrument.expose_gates(self._proto, list(self._sites))
        self._exposed = onnx_gates.shown(exposed, self._wanted)
        self._runner = OnnxRuntimeRunner(self._exposed, options)

    @property
    def recognised(self) -> bool:
        return bool(self._sites)

    @property
    def weights(self) -> Arrays:
        return {tensor.name: numpy_helper.to_array(tensor) for tensor in self._proto.graph.initializer}

    def samples(self, seed: int) -> list[NamedArrays]:
        """Seeded noise of several sizes for the file's inputs; ModelError as in :func:`.inputs.samples`."""
        draws = inputs.samples(self._proto, seed, self._runner.run)
        return [NamedArrays(name, arrays) for name, arrays in draws.items()]

    def run(self, sample: object) -> ReferenceRun:
        """Run a :class:`NamedArrays` sample."""
        if not isinstance(sample, NamedArrays):
            raise TypeError(f"expected NamedArrays, found {type(sample).__name__}")
        found, exact, why = self._values(sample)
        outputs = {value.name: found[value.name] for value in self._proto.graph.output}
        sites = {
            name: SiteRun(site, found[instrument.gate_input(name)], found[instrument.gate_output(name)])
            for name, site in self._sites.items()
            if instrument.gate_output(name) in found
        }
        rows = max((len(value) for value in sample.inputs.values() if value.ndim), default=1)
        if not sample.deep:
            return ReferenceRun(
                sample.name, sample.inputs, outputs, outputs, outputs, dict.fromkeys(outputs), sites,
                labels=sample.labels, count=rows if sample.count is None else sample.count, kind=sample.kind,
                deep=False,
            )  # fmt: skip
        floats = onnx_gates.of_floats(self._wanted, found)
        others = onnx_gates.gates_of(floats, found, tolerances.ALL["assumed_floor"].value)
        run = ReferenceRun(
            sample.name, sample.inputs, outputs, outputs, outputs, dict.fromkeys(outputs), sites,
            float64_refusal=why, labels=sample.labels, count=rows if sample.count is None else sample.count,
            kind=sample.kind, others=others,
        )  # fmt: skip
        if self._noise is None:
            return run
        noise = self._noise.floors(run, exact)
        sites = {name: replace(site, floor=noise.sites.get(name)) for name, site in sites.items()}
        return replace(run, floors=noise.outputs, sites=sites, spread=noise.spread, part_floors=noise.parts)

    def _values(self, sample: NamedArrays) -> tuple[Arrays, bool, str]:
        """Values of a sample by name, whether they are float64's, and why not."""
        return self._runner.run(sample.inputs), False, _NO_FLOAT64

    def redundant(self, run: ReferenceRun, missing: Sequence[str], present: Sequence[str]) -> dict[str, str]:
        """No site is known to be redundant in a file."""
        return {}

    def sru(self, site: Site, x: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """None: the second opinion would compare a file with itself."""
        return None

    def free_noise(self, run: ReferenceRun, rounding: str) -> dict[str, float]:
        """Empty: the gates of a file are not disturbed."""
        return {}

    def jumps(self, run: ReferenceRun, free: Sequence[str], data: str) -> dict[str, float]:
        """Run the file on inputs moved by rounding, with all gates fixed except those named."""
        wanted = [one for one in self._wanted if one.value in run.others and one.value not in free]
        fixed = [onnx_gates.as_found(one) for one in wanted]
        model = instrument.inject_gates(self._proto, [name for name in self._sites if name not in free])
        onnx_gates.inject(model, fixed)
        expected = dict(run.outputs) | {n: site.x for n, site in run.sites.items() if site.x is not None}
        found = dict.fromkeys(expected, 0.0)
        with OnnxRuntimeRunner(model, self._options) as runner:
            for seed in range(_JUMP_DRAWS):
                rng = np.random.default_rng(seed)
                inputs = {n: _disturbed(x, rng, JUMP_DISTURBANCE[data]) for n, x in run.inputs.items()}
                values = runner.run(replace(run, inputs=inputs).feeds(runner.inputs))
                for name, value in expected.items():
                    seen = values.get(name if name in run.outputs else instrument.gate_input(name))
                    if seen is None or seen.shape != value.shape:
                        continue
                    apart = distance(seen, value)  # an infinite jump would excuse any error
                    found[name] = max(found[name], apart if np.isfinite(apart) else 0.0)
        return found

    def between(self, run: ReferenceRun, outputs: Arrays) -> None:
        """None: a file has no modules to start from."""

    def between_noise(self, run: ReferenceRun, outputs: Arrays, rounding: str) -> None:
        """None: a file has no modules to start from."""

    def rounded(self, run: ReferenceRun, artifact: onnx.ModelProto | None, data: str) -> RoundedRun | None:
        """Run the file with the values rounded that the artifact holds in half, see :mod:`.onnx_noise`.

        None if the inner values of the two files have different names.
        """
        if artifact is None or self._noise is None:
            return None
        return self._noise.rounded(run, artifact, data)

    def modules(self, run: ReferenceRun, paths: Sequence[str]) -> Iterator[tuple[str, int, np.ndarray, float | None]]:
        """Nothing: a file has no modules."""
        return iter(())


def _site(proto: onnx.ModelProto, name: str, node: onnx.NodeProto) -> Site:
    attributes = {k: v for k, v in instrument.attributes(node).items() if isinstance(v, (int, float, str))}
    stored = instrument.parameters(proto, node)
    if any(name not in stored for name in node.input[1:]):
        raise UsageError(f"The reference's node {name} has parameters that are not constants.", "Name another file.")
    values = [numpy_helper.to_array(stored[parameter]) for parameter in node.input[1:]]
    known = {"SRUNorm": ("gamma", "beta"), "SRUSoft": ("scale", "shift")}.get(node.op_type, ())
    parameters = dict(zip(("cut", "sign", *known), values, strict=True))
    groups, ddof = int(attributes["num_groups"]), int(attributes["ddof"])
    eps_var, eps_std = float(attributes["eps_var"]), float(attributes["eps_std"])
    cut_scale = np.where(np.isfinite(values[0]), np.abs(values[0].astype(np.float64)), 0.0)
    form = GateForm(groups, ddof, eps_var, eps_std, False, values[0], values[1], cut_scale)
    variant = f"{node.op_type} (G={groups})"
    return Site(name, name, variant, node.op_type, parameters, attributes, node.overload == STRADDLE, form)


def _disturbed(x: np.ndarray, rng: np.random.Generator, relative: float) -> np.ndarray:
    """Move a floating array by rounding; other dtypes are not changed."""
    return (x * (1 + relative * rng.normal(size=x.shape))).astype(x.dtype) if x.dtype.kind == "f" else x
