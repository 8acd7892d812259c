"""Another ONNX file as the reference: what a rewrite or a conversion started from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from scconv_deploy.bundle.artifact import artifact_file
from scconv_deploy.errors import UsageError
from scconv_deploy.margins import GateForm
from scconv_deploy.outcomes import Refusal
from scconv_deploy.report.records import ParityReport, StageLog
from scconv_deploy.rewrite.functions import STRADDLE
from scconv_deploy.verification import instrument
from scconv_deploy.verification.chain import Artifact, Judging, verify_artifact
from scconv_deploy.verification.onnx_file import read_onnx
from scconv_deploy.verification.onnx_noise import OnnxNoise
from scconv_deploy.verification.reference_run import Arrays, ReferenceRun, RoundedRun, Site, SiteRun
from scconv_deploy.verification.runners.onnxruntime import OnnxRuntimeRunner, RuntimeOptions

_OPEN_AXIS = 2
_NO_FLOAT64 = "the reference is an ONNX file, which has no float64 form"


@dataclass(frozen=True, eq=False)
class NamedArrays:
    """One sample: a name and the inputs."""

    name: str
    inputs: Arrays


class OnnxReference:
    """A :class:`.reference_run.ReferenceSource`: gates are those that ONNX Runtime decides in the reference file.

    It has no float64 form: its noise is that of runs whose values move in their last place (:mod:`.onnx_noise`). The
    reach of a cut, which only the parameters of PyTorch give, is taken as the cut itself.
    """

    swapped_link = "the reference is an ONNX file; PyTorch was not run"
    left_alone: tuple[Refusal, ...] = ()

    def __init__(self, name: str, proto: onnx.ModelProto, options: RuntimeOptions = RuntimeOptions()) -> None:
        self.name = name
        self._proto = proto
        self._sites = {name: _site(self._proto, name, node) for name, node in instrument.sites(self._proto).items()}
        self._noise = OnnxNoise(self._proto, self._sites, options)
        self._runner = OnnxRuntimeRunner(instrument.laid_open(self._proto, list(self._sites), inject=False), options)

    @property
    def recognised(self) -> bool:
        return bool(self._sites)

    @property
    def weights(self) -> Arrays:
        return {tensor.name: numpy_helper.to_array(tensor) for tensor in self._proto.graph.initializer}

    def samples(self, seed: int) -> list[NamedArrays]:
        """Two draws of seeded noise for the file's inputs; an open axis has size 2 (UsageError for other types)."""
        known = {tensor.name for tensor in self._proto.graph.initializer}
        inputs = [value for value in self._proto.graph.input if value.name not in known]
        rng = np.random.default_rng(seed)
        return [
            NamedArrays(name, {value.name: _noise(value, rng) for value in inputs})
            for name in ("seeded noise", "more seeded noise")
        ]

    def run(self, sample: object) -> ReferenceRun:
        """Run a :class:`NamedArrays`."""
        if not isinstance(sample, NamedArrays):
            raise TypeError(f"expected NamedArrays, found {type(sample).__name__}")
        found = self._runner.run(sample.inputs)
        outputs = {value.name: found[value.name] for value in self._proto.graph.output}
        sites = {
            name: SiteRun(site, found[instrument.gate_input(name)], found[instrument.gate_output(name)])
            for name, site in self._sites.items()
            if instrument.gate_output(name) in found
        }
        rows = max((len(value) for value in sample.inputs.values() if value.ndim), default=1)
        run = ReferenceRun(
            sample.name, sample.inputs, outputs, outputs, outputs, dict.fromkeys(outputs), sites,
            float64_refusal=_NO_FLOAT64, count=rows,
        )  # fmt: skip
        noise = self._noise.floors(run)
        sites = {name: replace(site, floor=noise.sites.get(name)) for name, site in sites.items()}
        return replace(run, floors=noise.outputs, sites=sites, spread=noise.spread)

    def redundant(self, run: ReferenceRun, missing: Sequence[str], present: Sequence[str]) -> dict[str, str]:
        """None is known to be."""
        return {}

    def sru(self, site: Site, x: np.ndarray) -> None:
        """Nothing: onnx.reference would be asked for its opinion on itself."""

    def free_noise(self, run: ReferenceRun, rounding: str) -> dict[str, float]:
        """Nothing: the gates of a file are not disturbed."""
        return {}

    def rounded(self, run: ReferenceRun, artifact: onnx.ModelProto | None, data: str) -> RoundedRun | None:
        """The reference file with those values rounded that the artifact holds in half, see :mod:`.onnx_noise`."""
        return None if artifact is None else self._noise.rounded(run, artifact, data)

    def modules(self, run: ReferenceRun, paths: Sequence[str]) -> Iterator[tuple[str, int, np.ndarray, float | None]]:
        """Nothing: a file has values, not modules."""
        return iter(())


def verify_against_onnx(
    artifact: Path, reference: Path, *, seed: int = 0, judging: Judging = Judging(), command: str = ""
) -> ParityReport:
    """``scconv-deploy verify ARTIFACT --reference REF.onnx``.

    Raises:
        UsageError, IntegrityError: a file is missing or damaged.
        ModelError: ONNX Runtime refuses one.
    """
    path, notes = artifact_file(artifact)
    source = OnnxReference(str(reference), read_onnx(reference), judging.runtime)
    proto = read_onnx(path)
    provenance: Mapping[str, str] = {"command": command, "seed": str(seed), "reference": str(reference)} | notes
    return verify_artifact(
        source, Artifact(proto, str(path), path.read_bytes()), source.samples(seed), StageLog(),
        judging=judging, provenance=provenance,
    )  # fmt: skip


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
    reach = np.where(np.isfinite(values[0]), np.abs(values[0].astype(np.float64)), 0.0)
    form = GateForm(groups, ddof, eps_var, eps_std, False, values[0], values[1], reach)
    variant = f"{node.op_type} (G={groups})"
    return Site(name, name, variant, node.op_type, parameters, attributes, node.overload == STRADDLE, form)


def _noise(value: onnx.ValueInfoProto, rng: np.random.Generator) -> np.ndarray:
    shape = [d.dim_value if d.HasField("dim_value") else _OPEN_AXIS for d in value.type.tensor_type.shape.dim]
    dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    if dtype.kind == "f":
        return rng.normal(size=shape).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype)
