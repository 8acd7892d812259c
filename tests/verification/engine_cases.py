"""Engines for tests: an ONNX model under an engine's manifest, run by ONNX Runtime. The computation is real; it is no
evidence about TensorRT."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager

import onnx

from scconv_deploy.graph import instrument
from scconv_deploy.graph.types import precision_of
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.half import runner_of
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.runtimes.tensorrt.engine import (
    DebugTensor,
    EngineLayer,
    EngineProfile,
    EngineSRU,
    EngineTensor,
    write_engine,
)
from scconv_deploy.verification import sru_models
from scconv_deploy.verification.engine.verdict import judge_engine
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.samples import noise_samples
from tests.runtimes.tensorrt.ort_behind_tensorrt import NAMES
from tests.runtimes.tensorrt.test_engine import manifest_of

_LAYERS = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}


def engine_of(model, folder, **changes):
    """The model as an engine on disk; its profile takes batches of 1 to 8."""
    data = model.SerializeToString(deterministic=True)
    path = folder / "m.engine"

    def tensors(values):
        shapes = [[d.dim_value or -1 for d in v.type.tensor_type.shape.dim] for v in values]
        return tuple(
            EngineTensor(v.name, NAMES[v.type.tensor_type.elem_type], tuple(shape))
            for v, shape in zip(values, shapes, strict=True)
        )

    inputs = tensors(model.graph.input)
    profiles = tuple(
        EngineProfile(t.name, *(tuple(n if s == -1 else s for s in t.shape) for n in (1, 2, 8))) for t in inputs
    )
    values = {
        "backend": "tensorrt", "library_version": "10.9.0", "compute_capabilities": (), "flags": (),
        "inputs": inputs, "outputs": tensors(model.graph.output), "profiles": profiles,
        "layers": (EngineLayer("conv", "CONVOLUTION", (_LAYERS[precision_of(model)],)),),
        "srus": tuple(EngineSRU(site, "expanded", "no plugin was given") for site in instrument.sites(model)),
        "onnx_sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    return write_engine(path, data, manifest_of(data, **values | changes))


QUANTIZED = (EngineLayer("q", "QUANTIZE", ("INT8",)), EngineLayer("conv", "CONVOLUTION", ("FLOAT",)))
"""Layers of an int8 engine."""


def ort_opener(engine, plugin):
    """An :data:`.engine.Opener` that runs the engine's bytes in ONNX Runtime."""
    return runner_of(onnx.load_model_from_string(engine.verified_bytes()))


class Watched:
    """A runner in ONNX Runtime of a model whose inner tensors are shown where they are watched; ``hidden`` are not."""

    def __init__(self, model, watched, hidden=(), options=RuntimeOptions()):
        shown = copy_of(model)
        shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in watched)
        self._runner, self._hidden = runner_of(shown, options), set(hidden)
        self.inputs, self.outputs = self._runner.inputs, tuple(value.name for value in model.graph.output)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._runner.__exit__(*exc)

    def run(self, tensors):
        return self.run_watched(tensors, ())[0]

    def run_watched(self, tensors, watched):
        found = self._runner.run(tensors)
        shown = {name: found[name] for name in watched if name not in self._hidden}
        return {name: found[name] for name in self.outputs}, shown


def watched_opener(engine, plugin, hidden=(), options=RuntimeOptions()):
    """:func:`ort_opener` of an engine with debug tensors."""
    inner = {tensor.name for tensor in engine.manifest.debug_tensors}
    inner -= {tensor.name for tensor in (*engine.manifest.inputs, *engine.manifest.outputs)}
    return Watched(onnx.load_model_from_string(engine.verified_bytes()), sorted(inner), hidden, options)


def ends_of(model):
    """The ends of a model's SRUs, as ``build --debug-tensors srus`` writes them into a manifest."""
    return tuple(
        DebugTensor(name, site, side)
        for site, node in instrument.sites(model).items()
        for side, name in (("x", node.input[0]), ("y", node.output[0]))
    )


def ort_builder(damage=lambda model: None):
    """An :data:`.engine_srus.SRUBuilder` that does so with single SRUs, as a builder with a fault would make them."""

    @contextmanager
    def build(engine, site, models):
        model = onnx.load_model_from_string(models["function"])
        damage(model)
        with runner_of(model) as runner:
            yield runner

    return build


def copy_of(model):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def judge(
    reference, model, folder, *, damage=None, whole_only=False, samples=None, opener=ort_opener, source=None, **changes
):
    """Judge a model as an engine; ``damage`` is what the library did to it, and, unless whole_only, to SRUs alone.

    ``source`` is the reference if it is not the model in float.
    """
    built = copy_of(model)
    if damage is not None:
        damage(built)
    return judge_engine(
        source or TorchReference(reference),
        engine_of(built, folder, **changes),
        samples or noise_samples(reference.signature, 0),
        StageLog(),
        sru_models=lambda site, shape: sru_models.of_artifact(model, site, shape),
        opener=opener,
        build_sru=ort_builder(damage if damage is not None and not whole_only else lambda model: None),
    )
