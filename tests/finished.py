"""A bundle for devices, and a device without a GPU: TensorRT-RTX builds, ONNX Runtime stands in for its engine."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path

import onnx

from scconv_deploy.bundle.device.finish import Device
from scconv_deploy.bundle.engine_verdict import judge_with_bundle
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from scconv_deploy.runtimes.tensorrt.versions import load_module
from scconv_deploy.runtimes.timing import measure

NET = """
from torch import nn
from scconv_deploy.nn import SRU

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.sru = SRU(8, 4)

    def forward(self, x):
        return self.sru(self.conv(x)).mean((2, 3))
"""


def make_bundle(folder: Path, targets: str = "orin-jp6,thor-jp7", backend: str = "tensorrt") -> Path:
    """A small network with one SRU, dynamic batch, deployed for devices."""
    from scconv_deploy.model.inputs import DynamicAxis, InputSpec
    from scconv_deploy.model.spec import ModelSpec
    from scconv_deploy.workflows.build import EngineRequest
    from scconv_deploy.workflows.deploy import deploy_spec
    from scconv_deploy.workflows.export import ExportOptions

    source = folder / "finished_net.py"
    source.write_text(NET)
    axes = (DynamicAxis(1, 2, 8),)
    spec = ModelSpec(f"{source}:Net", inputs=(InputSpec((2, 3, 8, 8)),), dynamic=axes)
    request = EngineRequest.of((backend,), targets, axes)
    result = deploy_spec(spec, folder / "bundle", ExportOptions(backends=("onnx", backend)), engines=request)
    assert result, result.report.failures
    return result.folder


def copied(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder / "copy"))


class InOnnxRuntime:
    """What opens an engine's ONNX model instead of the engine; ``wrong`` scales its outputs."""

    def __init__(self, wrong: float = 1.0) -> None:
        self.wrong = wrong

    @contextmanager
    def open(self, data: bytes):
        proto = onnx.load_model_from_string(data)
        with OnnxRuntimeRunner(proto) as runner:
            yield _Runner(runner, proto, self.wrong)

    def judge(self, bundle, engine, plugin, log, facts):
        return judge_with_bundle(
            bundle, engine, log, plugin=plugin, provenance=facts,
            opener=lambda engine, plugin: self.open((bundle / "model.onnx").read_bytes()),
            build_sru=lambda engine, site, models: self.open(models["function"]),
        )  # fmt: skip

    def time(self, engine, plugin, inputs, options):
        return measure(lambda: 0.002, inputs, options.rounds, options.warmup)

    def device(self, **changes) -> Device:
        """A :class:`Device` whose builder is TensorRT-RTX's own."""
        values = {"backend": "tensorrt-rtx", "load": load_module, "judge": self.judge, "time": self.time} | changes
        return Device(**values)


class _Runner:
    def __init__(self, runner, proto, wrong):
        self._runner, self._wrong = runner, wrong
        self.inputs = tuple(value.name for value in proto.graph.input)
        self.outputs = tuple(value.name for value in proto.graph.output)

    def run(self, tensors):
        found = self._runner.run(dict(tensors))
        return {name: found[name] * self._wrong for name in self.outputs}
