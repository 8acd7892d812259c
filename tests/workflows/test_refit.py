"""``refit`` on ONNX Runtime behind TensorRT's names: what it writes computes what the new weights compute."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.exporters.tensorrt.onnx_source import OnnxSource
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.runtimes.tensorrt import runner as runners
from scconv_deploy.runtimes.tensorrt import versions as tensorrt_versions
from scconv_deploy.runtimes.tensorrt.engine import load_engine, sidecar
from scconv_deploy.runtimes.tensorrt.runner import TensorRTRunner
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.system.gpu import Gpu
from tests.command_line import failed, run
from tests.exporters.tensorrt.engines import conv_model, save
from tests.runtimes.tensorrt.ort_behind_tensorrt import Module
from tests.verification.engine_cases import engine_of

BASIC = RuntimeOptions(optimization="basic")  # as behind the engine
X = np.random.default_rng(3).standard_normal((2, 16, 8, 8)).astype(np.float32)
REFIT = ("refit", "m.engine", "--from", "new.onnx", "-o", "out.engine")


def other_weights(model, seed=5):
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    rng = np.random.default_rng(seed)
    for tensor in changed.graph.initializer:
        values = rng.standard_normal(tuple(tensor.dims)).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return changed


def stripped(model):
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        tensor.ClearField("raw_data")
    return bare


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(other_weights(conv_model()), tmp_path / "new.onnx")
    return tmp_path


@pytest.fixture
def module(host_cuda, monkeypatch):
    module = Module(host_cuda)
    monkeypatch.setattr(runners, "load_module", lambda backend: module)
    monkeypatch.setattr(runners, "load_cuda", lambda: host_cuda.cuda)
    monkeypatch.setattr(tensorrt_versions, "gpus", lambda: (Gpu("a GPU", "8.9"),))
    return module


def refittable(folder, model=None, content=None, **changes):
    """An engine of a model; ``content`` is what its bytes hold, if that is not the model."""
    model = model or conv_model()
    values = {"flags": ("REFIT",), "structure_sha256": OnnxSource(model).structure_sha256}
    return engine_of(content or model, folder, **values | changes)


def test_the_refitted_engine_computes_with_the_new_weights_and_says_so(workplace, module):
    old = refittable(workplace)
    before = old.verified_bytes()
    result = run(*REFIT, "--json")
    assert result.exit_code == 0, result.output
    new = load_engine(Path("out.engine"))
    assert json.loads(result.stdout)["manifest"]["refitted_from"] == old.manifest.sha256 == new.manifest.refitted_from
    assert new.manifest.onnx_sha256 == sha256_of(Path("new.onnx")) != old.manifest.onnx_sha256
    assert new.manifest.command.startswith("scconv-deploy")
    assert (new.manifest.flags, new.manifest.profiles) == (("REFIT",), old.manifest.profiles)
    assert load_engine(old.path).verified_bytes() == before
    with TensorRTRunner(new) as runner, OnnxRuntimeRunner(onnx.load("new.onnx"), BASIC) as expected:
        np.testing.assert_array_equal(runner.run({"x": X})["y"], expected.run({"x": X})["y"])
    assert f"refitted from the engine with sha256 {old.manifest.sha256}" in run("inspect", "out.engine").stdout
    assert run("refit", "out.engine", "--from", "new.onnx", "-o", "again.engine").exit_code == 0


def test_a_stripped_engine_has_weights_afterwards_and_runs(workplace, module):
    engine = refittable(workplace, content=stripped(conv_model()), flags=("REFIT", "STRIP_PLAN"))
    with pytest.raises(MissingRuntimeError, match=r"holds no weights: .* Refit it \(scconv-deploy refit"):
        TensorRTRunner(engine)
    shown = run(*REFIT)
    assert shown.exit_code == 0
    assert "out.engine: refitted in" in shown.stdout
    refitted = load_engine(Path("out.engine"))
    assert refitted.manifest.flags == ("REFIT",)
    with TensorRTRunner(refitted) as runner:
        assert np.abs(runner.run({"x": X})["y"]).max() > 1


def test_a_library_that_cannot_keep_an_engine_refittable_is_believed(workplace, module, monkeypatch):
    monkeypatch.delattr(Module.SerializationFlag, "INCLUDE_REFIT")
    refittable(workplace)
    assert run(*REFIT).exit_code == 0
    assert load_engine(Path("out.engine")).manifest.flags == ()
    failed(
        run("refit", "out.engine", "--from", "new.onnx", "-o", "b.engine"), 2, "was not built with --refit or --strip"
    )


@pytest.mark.parametrize("flags", [(), ("TF32",)])
def test_an_engine_that_is_not_refittable_is_refused(workplace, flags):
    refittable(workplace, flags=flags)
    failed(run(*REFIT), 2, "m.engine was not built with --refit or --strip, so its weights cannot be replaced.")


def test_another_network_is_refused_before_the_library_is_loaded(workplace):
    refittable(workplace)
    save(conv_model(channels=8), Path("new.onnx"))
    failed(run(*REFIT), 2, "new.onnx differs from the network that m.engine was built from in more than its weights")
    refittable(workplace, structure_sha256="")
    failed(run(*REFIT), 2, "The manifest of m.engine does not say which network it is")
    assert not Path("out.engine").exists()


def test_changed_bytes_are_refused_before_the_library_is_loaded(workplace):
    engine = refittable(workplace)
    engine.path.write_bytes(engine.path.read_bytes()[:-1] + b"x")
    failed(run(*REFIT), 7, "its SHA-256 is")


def test_without_a_gpu_it_is_exit_3(workplace, monkeypatch, host_cuda):
    monkeypatch.setattr(runners, "load_module", lambda backend: Module(host_cuda))
    monkeypatch.setattr(tensorrt_versions, "gpus", lambda: ())
    refittable(workplace)
    failed(run(*REFIT), 3, "TensorRT needs a GPU here: refitting deserialises the engine. NVIDIA's driver lists none.")


def test_missing_weights_are_named(workplace, module):
    """Of the same structure by its hash, and the library still finds none of its name: the library is believed."""
    renamed = stripped(conv_model())
    renamed.graph.initializer[0].name = renamed.graph.node[0].input[1] = "kernel"
    refittable(workplace, content=renamed, flags=("STRIP_PLAN",))
    failed(run(*REFIT), 5, "The ONNX file lacks weights of the engine: kernel.")
    assert not Path("out.engine").exists()
    assert not sidecar(Path("out.engine")).exists()


def test_the_librarys_refusal_and_an_engine_that_does_not_open(workplace, module):
    refittable(workplace)
    module.refuse = "no weights\nof this type"
    failed(run(*REFIT), 5, "The library cannot refit the engine: no weights of this type")
    module.open = False
    failed(run(*REFIT), 3, "The engine cannot be opened on this GPU")


def test_outputs_are_not_overwritten_nor_named_like_models(workplace):
    refittable(workplace)
    Path("out.engine.json").write_text("{}")
    failed(run(*REFIT), 2, "out.engine.json exists")
    failed(run(*REFIT[:-1], "out.onnx"), 2, "out.onnx would be an engine under an ONNX file's name")
