"""What the runner of engines refuses before the library sees a byte. Running needs a GPU."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest

from scconv_deploy.errors import IntegrityError, MissingRuntimeError, UsageError
from scconv_deploy.exporters import gpu
from scconv_deploy.exporters.engine import EngineArtifact, write_engine
from scconv_deploy.verification.runners import tensorrt as runners
from scconv_deploy.verification.runners.tensorrt import TensorRTRunner
from tests.exporters.test_engine import DATA, manifest_of


@pytest.fixture
def installed(monkeypatch):
    """A library that fails as soon as it is given something."""
    module = SimpleNamespace(__version__="1.7.1.116")
    monkeypatch.setattr(runners, "load_module", lambda backend: module)
    return module


def test_bytes_are_checked_before_the_library_is_loaded(tmp_path, monkeypatch):
    built = write_engine(tmp_path / "m.engine", DATA, manifest_of(DATA))
    built.path.write_bytes(DATA[:-1] + b"x")
    monkeypatch.setattr(runners, "load_module", None)
    with pytest.raises(IntegrityError, match="its SHA-256 is"):
        TensorRTRunner(built)


def test_an_engine_of_another_release_is_refused_with_the_one_to_install(tmp_path, installed):
    built = write_engine(tmp_path / "m.engine", DATA, manifest_of(DATA))
    installed.__version__ = "1.8.0.3"
    with pytest.raises(MissingRuntimeError, match=r"built by TensorRT-RTX 1\.7\.1\.116, installed is 1\.8\.0\.3") as no:
        TensorRTRunner(built)
    assert "pip install tensorrt-rtx==1.7.1.116" in no.value.remedy


@pytest.mark.skipif(bool(gpu.gpus()), reason="this machine has a GPU")
def test_without_a_gpu_it_is_exit_3(tmp_path, installed):
    built = write_engine(tmp_path / "m.engine", DATA, manifest_of(DATA))
    with pytest.raises(MissingRuntimeError, match="needs a GPU here: an engine runs on nothing else") as refused:
        TensorRTRunner(built)
    assert refused.value.exit_code == 3


def test_the_plugin_must_be_the_one_it_was_built_with(tmp_path):
    plugin = tmp_path / "plugin.so"
    plugin.write_bytes(b"library")
    loaded = []
    registry = SimpleNamespace(load_library=lambda path: loaded.append(path) or path)
    module = SimpleNamespace(get_plugin_registry=lambda: registry)
    artifact = EngineArtifact(tmp_path / "m.engine", manifest_of(DATA, plugin_sha256="0" * 64))
    with pytest.raises(MissingRuntimeError, match="built with a plugin"):
        runners._load_plugin(module, artifact, None)
    with pytest.raises(IntegrityError, match="is not the plugin that"):
        runners._load_plugin(module, artifact, plugin)
    assert loaded == []
    digest = hashlib.sha256(b"library").hexdigest()
    runners._load_plugin(module, EngineArtifact(artifact.path, manifest_of(DATA, plugin_sha256=digest)), plugin)
    assert loaded == [str(plugin)]


def test_shapes_are_held_against_the_profile():
    runner = TensorRTRunner.__new__(TensorRTRunner)  # no device is needed to refuse
    runner._manifest, runner.inputs = manifest_of(DATA), ("x",)
    runner._check_inputs({"x": np.zeros((8, 3))})
    for shape in ((9, 3), (0, 3), (2, 4), (2,)):
        with pytest.raises(UsageError, match="the engine takes"):
            runner._check_inputs({"x": np.zeros(shape)})
    with pytest.raises(UsageError, match="'x' was not given"):
        runner._check_inputs({})
