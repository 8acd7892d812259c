"""run.py as it lies in a bundle: by itself, without this package."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from scconv_deploy.bundle.manifest import read_manifest
from tests.finished import copied


@pytest.fixture
def bundle(device_bundle, tmp_path):
    return copied(device_bundle, tmp_path)


def run(bundle, *arguments, blocked=("scconv_deploy", "torch", "onnx")):
    code = (
        "import runpy, sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name.partition('.')[0] in {blocked!r}: raise ImportError('No module named ' + name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, bundle / "run.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=bundle.parent, check=False)


def test_it_runs_the_bundles_own_sample_and_says_how_far_it_is_from_pytorch(bundle):
    done = run(bundle)
    assert done.returncode == 0, done.stderr
    name, _, rest = done.stdout.strip().partition(": ")
    assert name == "output"
    assert rest.startswith("float32[1, 8], relative L2 against PyTorch ")
    assert float(rest.rpartition(" ")[2]) < 1e-6
    assert "run.py" in read_manifest(bundle)["files"]


def test_it_runs_arrays_and_writes_what_comes_out(bundle, tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype("float32")
    np.savez(tmp_path / "in.npz", x=x)
    done = run(bundle, tmp_path / "in.npz", "-o", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "output: float32[3, 8]\n"
    import onnxruntime

    expected = onnxruntime.InferenceSession(str(bundle / "model.onnx")).run(None, {"x": x})[0]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["output"], expected)


@pytest.mark.parametrize(
    ("manifest", "plugin", "code", "message"),
    [
        ({"sha256": "0" * 64, "plugin_sha256": ""}, None, 7, "is not the engine that m.engine.json describes"),
        ({"plugin_sha256": "0" * 64}, None, 3, "was built with a plugin: add --plugin FILE"),
        ({"plugin_sha256": "0" * 64}, b"x", 7, "is not the plugin that"),
    ],
)
def test_an_engine_or_plugin_that_differs_is_never_loaded(bundle, tmp_path, manifest, plugin, code, message):
    (tmp_path / "m.engine").write_bytes(b"engine")
    document = {"sha256": hashlib.sha256(b"engine").hexdigest()} | manifest
    (tmp_path / "m.engine.json").write_text(json.dumps(document))
    more = []
    if plugin is not None:
        (tmp_path / "p.so").write_bytes(plugin)
        more = ["--plugin", tmp_path / "p.so"]
    done = run(bundle, "--engine", tmp_path / "m.engine", *more)
    assert message in one_line(done, code)
    assert os.path.exists(tmp_path / "m.engine")


def one_line(done, code):
    """The line on stderr, which is all that there is."""
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith("run.py: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("module", "remedy"),
    [("numpy", "sudo apt install python3-numpy, or "), ("onnxruntime", "-m pip install onnxruntime.")],
)
def test_a_missing_library_is_one_line_with_the_remedy(bundle, module, remedy):
    said = one_line(run(bundle, blocked=(module,)), 3)
    assert said.startswith(f"run.py: {module} cannot be imported: No module named {module}. ")
    assert remedy in said
    assert sys.executable in said


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_a_missing_tensorrt_and_missing_files_are_one_line_too(bundle, tmp_path):
    engine, beside = tmp_path / "m.engine", tmp_path / "m.engine.json"
    assert "m.engine does not exist." in one_line(run(bundle, "--engine", engine), 2)
    engine.write_bytes(b"engine")
    assert "has no manifest m.engine.json beside it" in one_line(run(bundle, "--engine", engine), 7)
    beside.write_text(json.dumps({"sha256": hashlib.sha256(b"engine").hexdigest(), "plugin_sha256": ""}))
    said = one_line(run(bundle, "--engine", engine), 3)
    assert said.startswith("run.py: tensorrt cannot be imported: No module named 'tensorrt'. ")
    assert "--extra-index-url https://pypi.nvidia.com" in said
    assert "in.npz does not exist." in one_line(run(bundle, tmp_path / "in.npz"), 2)


def test_tensorrt_is_asked_in_the_order_that_it_needs(bundle, tmp_path, monkeypatch, capsys):
    """A stand-in of the bindings and of the CUDA runtime that doubles its input, host memory in place of a device's."""
    import ctypes
    import runpy
    from types import SimpleNamespace

    memory, told = {}, []

    class Context:
        def set_input_shape(self, name, shape):
            told.append(("shape", name, tuple(shape)))
            return tuple(shape) == (2, 3)

        def get_tensor_shape(self, name):
            return (2, 3)

        def set_tensor_address(self, name, address):
            memory[name] = address

        def execute_async_v3(self, stream):
            told.append("run")
            x = np.frombuffer((ctypes.c_char * 24).from_address(memory["x"]), "float32")
            ctypes.memmove(memory["y"], (x * 2).astype("float32").tobytes(), 24)
            return True

    engine = SimpleNamespace(
        num_io_tensors=2, get_tensor_name=("x", "y").__getitem__, get_tensor_dtype=lambda name: "float",
        get_tensor_mode=lambda name: SimpleNamespace(name="INPUT" if name == "x" else "OUTPUT"),
        create_execution_context=Context,
    )  # fmt: skip
    loaded = []
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: engine)
    trt = SimpleNamespace(
        __name__="tensorrt",
        Logger=type("Logger", (), {"WARNING": 2, "__init__": lambda self, level: None}),
        Runtime=lambda logger: runtime,
        get_plugin_registry=lambda: SimpleNamespace(load_library=loaded.append), nptype=lambda kind: np.float32,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    buffers = []

    class Cuda:
        def cudaStreamCreate(self, stream):
            return 0

        def cudaMalloc(self, pointer, size):
            buffers.append(ctypes.create_string_buffer(size.value))
            pointer._obj.value = ctypes.addressof(buffers[-1])
            return 0

        def cudaMemcpy(self, to, source, size, kind):
            ctypes.memmove(to, source, size.value)
            return 0

        def cudaStreamSynchronize(self, stream):
            return 0

        def cudaFree(self, pointer):
            told.append("free")

    def cuda_runtime(name):
        if not there:
            raise OSError(f"{name}: cannot open shared object file")
        return Cuda()

    there = [True]
    monkeypatch.setattr(ctypes, "CDLL", cuda_runtime)
    (tmp_path / "m.engine").write_bytes(b"engine")
    (tmp_path / "p.so").write_bytes(b"plugin")
    digests = {"sha256": hashlib.sha256(b"engine").hexdigest(), "plugin_sha256": hashlib.sha256(b"plugin").hexdigest()}
    (tmp_path / "m.engine.json").write_text(json.dumps(digests))
    script = runpy.run_path(str(bundle / "run.py"))
    x = np.arange(6, dtype="float32").reshape(2, 3)

    def refused(code, plugin, **given):
        with pytest.raises(SystemExit) as left:
            script["run_engine"](tmp_path / "m.engine", plugin, given or {"x": x})
        assert left.value.code == code
        return capsys.readouterr().err

    found = script["run_engine"](tmp_path / "m.engine", tmp_path / "p.so", {"x": x})
    np.testing.assert_array_equal(found["y"], x * 2)
    assert told == [("shape", "x", (2, 3)), "run", "free", "free"]
    assert loaded == [str(tmp_path / "p.so")]
    plugin = tmp_path / "p.so"
    assert "The engine takes x; given were input." in refused(4, plugin, input=x)
    assert "does not take x of shape (1, 3)" in refused(4, plugin, x=x[:1])
    del loaded[1:]
    assert not hasattr(runtime, "engine_host_code_allowed")

    # an engine that holds its plugin, which is code for the host, needs no other; only a version-compatible one does
    inside = digests | {"settings": {"plugins_to_serialize": ["p.so"]}}
    (tmp_path / "m.engine.json").write_text(json.dumps(inside))
    assert "was built with a plugin" in refused(3, None)
    (tmp_path / "m.engine.json").write_text(json.dumps(inside | {"flags": ["VERSION_COMPATIBLE"]}))
    for plugin in (None, tmp_path / "p.so"):
        found = script["run_engine"](tmp_path / "m.engine", plugin, {"x": x})
        np.testing.assert_array_equal(found["y"], x * 2)
    assert len(loaded) == 1
    assert runtime.engine_host_code_allowed is True

    # every engine of TensorRT-RTX holds a plugin that was put into it
    with monkeypatch.context() as only_rtx:
        only_rtx.delitem(sys.modules, "tensorrt")
        only_rtx.setitem(sys.modules, "tensorrt_rtx", trt)
        del runtime.engine_host_code_allowed
        (tmp_path / "m.engine.json").write_text(json.dumps(inside | {"backend": "tensorrt-rtx"}))
        np.testing.assert_array_equal(script["run_engine"](tmp_path / "m.engine", None, {"x": x})["y"], x * 2)
        assert runtime.engine_host_code_allowed is True
    (tmp_path / "m.engine.json").write_text(json.dumps(inside | {"flags": ["VERSION_COMPATIBLE"]}))

    def no_numpy_type(kind):
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")

    there.clear()
    assert "The CUDA runtime does not load: " in refused(3, None)
    trt.nptype = no_numpy_type
    assert "x is float, which NumPy does not have" in refused(4, None)
    runtime.deserialize_cuda_engine = lambda data: None
    assert "tensorrt cannot open" in refused(3, None)


@pytest.fixture
def fused(bundle, cpu_path):
    """The bundle with the fused SRU for CPUs, as ``deploy --plugin-cpu`` writes it."""
    library = bundle / "libscconv_sru_cpu.so"
    library.write_bytes(cpu_path.read_bytes())
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][library.name] = {"sha256": hashlib.sha256(library.read_bytes()).hexdigest(), "bytes": 0}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return library


def test_it_registers_the_fused_sru_where_it_lies_in_the_bundle(bundle, fused):
    """Without the function the node runs in the library or not at all."""
    import onnx

    model = onnx.load(bundle / "model.onnx")
    del model.functions[:]
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    done = run(bundle)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.rpartition(" ")[2]) < 1e-6
    fused.unlink()
    assert run(bundle).returncode != 0


def test_another_library_is_not_loaded(bundle, fused):
    fused.write_bytes(fused.read_bytes() + b"x")
    done = run(bundle)
    assert (done.returncode, "is not the library that manifest.json describes" in done.stderr) == (7, True)


def test_a_library_that_does_not_load_leaves_the_function(bundle, fused):
    fused.write_bytes(b"of another processor")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][fused.name]["sha256"] = hashlib.sha256(b"of another processor").hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    done = run(bundle)
    assert done.returncode == 0, done.stderr
    assert "does not load here, its function runs instead" in done.stderr
    assert float(done.stdout.rpartition(" ")[2]) < 1e-6
