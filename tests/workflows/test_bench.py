"""``bench``: turns, percentiles and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from scconv_deploy import cli
from scconv_deploy.errors import UsageError
from scconv_deploy.exporters.tensorrt.profiles import parse_profile, resolve_profiles
from scconv_deploy.runtimes.tensorrt import runner as runners
from scconv_deploy.runtimes.tensorrt import versions as tensorrt_versions
from scconv_deploy.system.gpu import Gpu
from scconv_deploy.workflows import bench as benchmarking
from scconv_deploy.workflows.bench import _measure, _row, _Subject
from scconv_deploy.workflows.bench_options import BenchOptions, shapes_of
from tests.command_line import failed, run
from tests.exporters.tensorrt.engines import conv_model, save, sru_model
from tests.runtimes.tensorrt.ort_behind_tensorrt import Context, Module
from tests.verification.engine_cases import engine_of


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(conv_model(), tmp_path / "m.onnx")
    Path("bench_net.py").write_text(
        "from torch import nn\n\ndef make(channels=4):\n    return nn.Conv2d(3, channels, 3)\n"
    )
    return tmp_path


def subject(name, calls, device=None):
    def run():
        calls.append(name)
        return device

    return _Subject(name, "x", 4, run, None, "process", 0.0)


def test_subjects_take_turns_and_warm_up_is_not_counted():
    calls = []
    subjects = [subject("a", calls), subject("b", calls, 0.002)]
    host, device = _measure(subjects, BenchOptions(rounds=20, warmup=3), lambda message: None)
    rounds = [tuple(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert len(calls) == 46
    assert set(rounds) == {("a", "b"), ("b", "a")}  # each once a round, in both orders
    assert [len(times) for times in host.values()] == [20, 20]
    assert device == {"a": [], "b": [0.002] * 20}


def test_percentiles_throughput_and_device_time():
    seconds = [i / 1000 for i in range(1, 101)]
    row = _row(subject("a", []), seconds, [0.001, 0.002, 0.009])
    assert (row.p50_ms, row.p90_ms, row.p99_ms) == pytest.approx((50.5, 90.1, 99.01))
    assert row.items_per_s == pytest.approx(4 / 0.0505)
    assert row.device_p50_ms == pytest.approx(2.0)
    assert _row(subject("a", []), seconds, []).device_p50_ms is None


def test_a_file_and_models_on_the_command_line(workplace):
    result = CliRunner().invoke(
        cli.app,
        ["bench", "m.onnx", "bench_net.py:make", "--input", "2x3x8x8", "--rounds", "4", "--json", "-o", "times.json"],
    )
    assert result.exit_code == 4  # the shape of one is not the other's
    assert "Got: 3 Expected: 16" in result.stderr
    assert not Path("times.json").exists()

    result = CliRunner().invoke(cli.app, ["bench", "m.onnx", "--batch", "3", "--rounds", "4", "--json", "-o", "t.json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document == json.loads(Path("t.json").read_text())
    (row,) = document["rows"]
    assert (row["name"], row["precision"]) == ("m.onnx (ONNX Runtime)", "fp32")
    assert row["items_per_s"] == pytest.approx(3e3 / row["mean_ms"])
    assert row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
    assert row["device_p50_ms"] is None
    assert document["environment"]["seed"] == "0"


def test_a_model_runs_in_pytorch(workplace):
    options = BenchOptions(inputs=("2x3x8x8",), rounds=3, device="cpu")
    result = benchmarking.bench_artifacts(["bench_net.py:make"], options)
    (row,) = result.rows
    assert row.name == "bench_net.py:make (PyTorch)"
    assert row.items_per_s == pytest.approx(2e3 / row.mean_ms)


def test_a_models_memory_on_the_device_holds_its_weights(workplace, monkeypatch):
    """A stand-in of torch's CUDA: what is allocated counts from before the model is there."""
    device = {"bytes": 1000, "peak": 0}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def elapsed_time(self, last):
            return 3.0

    def moved(thing, *_):
        device["bytes"] += 500 if isinstance(thing, torch.nn.Module) else 20
        device["peak"] = device["bytes"] + 7
        return thing

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {"init": None, "synchronize": None, "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: device["bytes"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: device["peak"])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.nn.Module, "to", moved)
    monkeypatch.setattr(torch.Tensor, "to", moved)
    options = BenchOptions(inputs=("2x3x8x8",), rounds=3, device="cuda")
    (row,) = benchmarking.bench_artifacts(["bench_net.py:make"], options).rows
    assert (row.memory_of, row.memory_bytes, row.device_p50_ms) == ("device", 500 + 20 + 7, pytest.approx(3.0))


def test_another_provider_of_onnx_runtime_is_refused_where_it_is_not_installed(workplace):
    result = CliRunner().invoke(cli.app, ["bench", "m.onnx", "--rounds", "3", "--provider", "rocm"])
    assert result.exit_code == 3
    assert "ONNX Runtime has no rocm here" in result.stderr


def test_engines_take_turns_with_the_rest(workplace, host_cuda, monkeypatch):
    """Through the real runner, with and without a CUDA graph; ONNX Runtime and the host behind it."""
    model = conv_model()
    module = Module(host_cuda)
    monkeypatch.setattr(runners, "load_module", lambda backend: module)
    monkeypatch.setattr(runners, "load_cuda", lambda: host_cuda.cuda)
    monkeypatch.setattr(tensorrt_versions, "gpus", lambda: (Gpu("a GPU", "8.9"),))
    engine = engine_of(model, workplace)
    options = BenchOptions(batch=3, rounds=4, warmup=2, cuda_graph=True)
    result = benchmarking.bench_artifacts(["m.onnx", str(engine.path)], options)
    whole, plain, graph = result.rows
    assert whole.name == "m.onnx (ONNX Runtime)"
    assert [row.name.rsplit("/")[-1] for row in (plain, graph)] == [
        "m.engine (tensorrt)",
        "m.engine (tensorrt, CUDA graph)",
    ]
    for row in (plain, graph):
        assert row.device_p50_ms == pytest.approx(2.0)  # of the host's clock, see test_tensorrt_runner
        assert row.items_per_s == pytest.approx(3e3 / row.mean_ms)
        values = 3 * 16 * 8 * 8 * 4
        assert (row.memory_of, row.memory_bytes) == ("device", 1000 + 2 * values + engine.manifest.file_bytes)
    calls = host_cuda.calls()
    assert calls.count("cudaGraphLaunch") == 1 + 2 + 4
    assert calls.count("cudaEventCreate") == 4


def test_an_engine_of_two_profiles_runs_in_the_one_that_takes_the_batch(workplace, host_cuda, monkeypatch):
    module = Module(host_cuda)
    monkeypatch.setattr(runners, "load_module", lambda backend: module)
    monkeypatch.setattr(runners, "load_cuda", lambda: host_cuda.cuda)
    monkeypatch.setattr(tensorrt_versions, "gpus", lambda: (Gpu("a GPU", "8.9"),))
    first, second = ("x:1x16x8x8:2x16x8x8", "x:8x16x8x8:16x16x8x8:32x16x8x8")
    profiles = resolve_profiles({"x": (-1, 16, 8, 8)}, (), (), tuple(map(parse_profile, (f"{first}:4x16x8x8", second))))
    engine_of(conv_model(), workplace, profiles=profiles)
    switched = []
    switch = Context.set_optimization_profile_async
    monkeypatch.setattr(
        Context, "set_optimization_profile_async",
        lambda self, index, stream: switched.append(index) or switch(self, index, stream),
    )  # fmt: skip
    for batch, used in ((2, []), (20, [1])):
        assert bench("m.engine", "--batch", str(batch)).exit_code == 0
        assert switched == used
    failed(bench("m.engine", "--batch", "6"), 2, "Input 'x' is (6, 16, 8, 8), the engine takes (1, 16, 8, 8) to (4,")


def test_layers_of_engines_and_of_files(workplace, host_cuda, monkeypatch):
    monkeypatch.setattr(runners, "load_module", lambda backend, module=Module(host_cuda): module)
    monkeypatch.setattr(runners, "load_cuda", lambda: host_cuda.cuda)
    monkeypatch.setattr(tensorrt_versions, "gpus", lambda: (Gpu("a GPU", "8.9"),))
    engine_of(sru_model(), workplace)
    save(sru_model(), Path("sru.onnx"))
    result = bench("sru.onnx", "m.engine", "--cuda-graph", "--batch", "2", "--layers", "--json")
    assert result.exit_code == 0, result.output
    file, plain, graph = json.loads(result.stdout)["rows"]
    assert {"ReduceMean", "Sqrt", "Where"} <= {layer["kind"] for layer in file["layers"]}
    assert [layer["name"] for layer in plain["layers"]] == ["block.sru"]
    assert graph["layers"] == []
    for layers in (file["layers"], plain["layers"]):
        assert sum(layer["share"] for layer in layers) == pytest.approx(1)
        assert layers == sorted(layers, key=lambda layer: -layer["p50_ms"])
    shown = bench("sru.onnx", "--batch", "2", "--layers").stdout
    assert f"Layers of sru.onnx (ONNX Runtime), under the profiler: {len(file['layers'])}, together" in shown
    assert f"{len(file['layers']) - 20} more" in shown
    assert json.loads(bench("sru.onnx", "--json").stdout)["rows"][0]["layers"] == []


def test_layers_in_another_provider_are_refused(workplace):
    failed(bench("m.onnx", "--layers", "--provider", "cuda"), 2, "ONNX Runtime says when kernels are launched")


def test_an_open_axis_needs_a_size():
    with pytest.raises(UsageError, match=r"Input 'x' is -1x3x-1x-1\. Add --input x:SHAPE"):
        shapes_of({"x": (-1, 3, -1, -1)}, BenchOptions())
    assert shapes_of({"x": (-1, 3)}, BenchOptions(batch=7)) == {"x": (7, 3)}
    assert shapes_of({"x": (-1, 3, -1)}, BenchOptions(inputs=("x:1x3x9",))) == {"x": (1, 3, 9)}


def test_inputs_go_by_name_and_then_in_order():
    inputs = {"a": (-1, 2), "b": (-1, 3), "c": (-1, 4)}
    given = BenchOptions(batch=5, inputs=("7x2", "b:8x3"))
    assert shapes_of(inputs, given) == {"a": (7, 2), "b": (8, 3), "c": (5, 4)}


def bench(*arguments):
    return run("bench", *arguments, "--rounds", 3, "--warmup", 0)


def test_a_model_takes_the_options_of_a_model(workplace):
    """A factory with an argument, its trained weights in a pickle: the net that is timed is that one."""
    torch.manual_seed(3)
    weights = {"weight": torch.randn(6, 3, 3, 3), "bias": torch.randn(6)}
    torch.save(weights, "w.pt")
    Path("seen.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Net(nn.Conv2d):\n    def forward(self, x):\n"
        "        torch.save(dict(self.state_dict()), 'seen.pt')\n        return super().forward(x)\n\n"
        "def make(channels=4):\n    return Net(3, channels, 3)\n"
    )
    given = ("--kwargs", '{"channels": 6}', "--weights", "w.pt", "--input", "2x3x8x8")
    result = bench("seen.py:make", *given, "--json")
    assert result.exit_code == 0, result.output
    seen = torch.load("seen.pt", weights_only=True)
    assert all(torch.equal(seen[name], value) for name, value in weights.items())
    failed(bench("seen.py:make", *given[2:]), 4, "weight is 6x3x3x3, expected 4x3x3x3")


def test_a_pickled_module_and_scconv_in_a_plain_network(workplace):
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1)), "net.pt")
    given = ("net.pt", "--input", "2x16x8x8")
    failed(bench(*given), 7, "--trust-checkpoint")
    result = bench(*given, "--trust-checkpoint", "--embed", '["0"]', "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"][0]["name"] == """net.pt --embed '["0"]' (PyTorch)"""


def test_torch_compile_is_timed_beside_the_model(workplace, monkeypatch):
    """Without what takes the compiler longest: headers compiled for later, and whether it knows vector instructions."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler, and there is none")
    monkeypatch.setattr("torch._inductor.config.cpp_cache_precompile_headers", False, raising=False)
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", False)
    result = bench("bench_net.py:make", "--compile", "--input", "2x3x8x8", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["name"], row["kind"]) for row in rows] == [
        ("bench_net.py:make (PyTorch)", "PyTorch"),
        ("bench_net.py:make (torch.compile)", "torch.compile"),
    ]
    assert rows[1]["load_s"] > rows[0]["load_s"]  # it was compiled
    assert all(row["items_per_s"] == pytest.approx(2e3 / row["mean_ms"]) for row in rows)


def test_a_model_runs_on_the_threads_that_are_given_and_the_process_keeps_its_own(workplace):
    Path("bench_net.py").write_text(
        "import pathlib, torch\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
        "        pathlib.Path('threads').write_text(str(torch.get_num_threads()))\n        return x\n"
    )
    before = torch.get_num_threads()
    result = bench("bench_net.py:Net", "--input", "2x3x8x8", "--threads", str(before + 1), "--rounds", "1")
    assert result.exit_code == 0, result.output
    assert (Path("threads").read_text(), torch.get_num_threads()) == (str(before + 1), before)


def test_what_torch_compile_cannot_compile_is_exit_3(workplace, monkeypatch):
    def no_compiler(model):
        def called(*_):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore of it")

        return called

    monkeypatch.setattr(torch, "compile", no_compiler)
    result = bench("bench_net.py:make", "--compile", "--input", "2x3x8x8")
    failed(result, 3, "torch.compile cannot compile bench_net.py:make: InvalidCxxCompiler: No working C++ compiler")
    assert "Leave --compile out" in result.stderr


def test_a_shape_that_the_model_refuses_is_exit_4(workplace):
    failed(bench("bench_net.py:make", "--input", "2x5x8x8"), 4, "bench_net.py:make refuses its inputs (2x5x8x8)")


@pytest.mark.parametrize(
    ("artifact", "given", "message"),
    [
        ("m.onnx", ("--input", "nope:3x3"), "--input nope:3x3: no artifact has an input 'nope'. Inputs: x."),
        ("m.onnx", ("--input", "2x16x8x8", "--input", "3x3"), "--input 3x3: no artifact has an input left for it."),
        ("m.onnx", ("--device", "cuda"), "--device belongs to models, and none is among the artifacts."),
        ("m.onnx", ("--compile",), "--compile belongs to models"),
        ("bench_net.py:make", ("--layers",), "--layers belongs to engines and ONNX files"),
        ("m.onnx", ("--weights", "w.pt"), "--weights belongs to models"),
        ("m.onnx", ("--kwargs", '{"a": 1}'), "--kwargs belongs to models"),
        ("m.onnx", ("--non-strict",), "--non-strict belongs to models"),
        ("m.onnx", ("--trust-checkpoint",), "--trust-checkpoint belongs to models"),
        ("m.onnx", ("--embed", "paper"), "--embed belongs to models"),
        ("m.onnx", ("--cuda-graph", "--plugin", "nope.so"), "--cuda-graph belongs to engines"),
        ("m.onnx", ("--plugin", "nope.so"), "--plugin belongs to engines"),
        ("bench_net.py:make", ("--provider", "cuda"), "--provider belongs to ONNX files"),
        (
            "bench_net.py:make",
            ("--input", "2x3x8x8", "--batch", "8"),
            "--batch 8: no artifact has an axis 0 that is open",
        ),
        ("m.onnx", ("--input", "x:2x16x8x8", "--batch", "8"), "--batch 8: no artifact has an axis 0 that is open"),
        ("m.engine", ("--threads", "2"), "--threads belongs to ONNX files and models"),
        ("m.engine", ("--plugin", "nope.so"), "--plugin: none of the engines was built with a plugin."),
    ],
)
def test_what_no_artifact_uses_is_refused(workplace, artifact, given, message):
    engine_of(conv_model(), workplace)
    failed(bench(artifact, *given), 2, message)
