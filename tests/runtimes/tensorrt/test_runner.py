"""What the runner of engines refuses before the library sees a byte. Running needs a GPU."""

import hashlib
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from scconv_deploy.errors import IntegrityError, MissingRuntimeError, ModelError, UsageError
from scconv_deploy.runtimes.tensorrt import runner as runners
from scconv_deploy.runtimes.tensorrt.cuda import CudaError
from scconv_deploy.runtimes.tensorrt.engine import (
    EngineArtifact,
    EngineProfile,
    EngineTensor,
    choose_profile,
    write_engine,
)
from scconv_deploy.runtimes.tensorrt.runner import (
    Plan,
    TensorRTRunner,
    as_stored,
    from_bfloat16,
    holds_host_code,
    to_bfloat16,
)
from scconv_deploy.system import gpu
from tests.exporters.tensorrt.engines import Recorded, elf_library
from tests.runtimes.tensorrt.ort_behind_tensorrt import NAMES, Module, marked
from tests.runtimes.tensorrt.test_engine import DATA, manifest_of


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
    assert no.value.remedy == "Build it again here, or pip install tensorrt-rtx==1.7.1.116."
    other = manifest_of(DATA, backend="tensorrt", library_version="10.3.0")
    with pytest.raises(MissingRuntimeError, match=r"built by TensorRT 10\.3\.0, installed is 1\.8\.0\.3") as no:
        TensorRTRunner(write_engine(tmp_path / "t.engine", DATA, other))
    assert no.value.remedy == (
        "Build it again here, or pip install tensorrt==10.3.0 --extra-index-url https://pypi.nvidia.com."
    )


@pytest.mark.skipif(bool(gpu.gpus()), reason="this machine has a GPU")
def test_without_a_gpu_it_is_exit_3(tmp_path, installed):
    built = write_engine(tmp_path / "m.engine", DATA, manifest_of(DATA))
    with pytest.raises(MissingRuntimeError, match="needs a GPU here: an engine runs on nothing else") as refused:
        TensorRTRunner(built)
    assert refused.value.exit_code == 3


def test_an_engine_without_weights_is_not_run(tmp_path, installed):
    built = write_engine(tmp_path / "m.engine", DATA, manifest_of(DATA, flags=("REFIT", "STRIP_PLAN")))
    with pytest.raises(MissingRuntimeError, match=r"holds no weights: it was built with --strip\. Refit it"):
        TensorRTRunner(built)


def test_the_plugin_must_be_the_one_it_was_built_with(tmp_path):
    plugin = tmp_path / "plugin.so"
    plugin.write_bytes(elf_library())
    loaded = []
    module = Recorded(
        get_plugin_registry=lambda: SimpleNamespace(
            load_library=lambda path: None if loaded else loaded.append(path) or path,  # the real one takes one as well
            all_creators=[SimpleNamespace(name="SRU", plugin_namespace="scconv")] if loaded else [],
        )
    )
    artifact = EngineArtifact(tmp_path / "m.engine", manifest_of(DATA, plugin_sha256="0" * 64))
    with pytest.raises(MissingRuntimeError, match="built with a plugin"):
        runners.load_plugin_of(module, artifact, None)
    with pytest.raises(IntegrityError, match="is not the plugin that"):
        runners.load_plugin_of(module, artifact, plugin)
    assert loaded == []
    digest = hashlib.sha256(elf_library()).hexdigest()
    runners.load_plugin_of(module, EngineArtifact(artifact.path, manifest_of(DATA, plugin_sha256=digest)), plugin)
    assert loaded == [str(plugin)]
    runners.load_plugin_of(module, EngineArtifact(artifact.path, manifest_of(DATA, plugin_sha256=digest)), plugin)
    assert loaded == [str(plugin)]  # it is there already: a second time the registry would refuse it
    plugin.write_bytes(elf_library(b"another build"))
    other = manifest_of(DATA, plugin_sha256=hashlib.sha256(elf_library(b"another build")).hexdigest())
    with pytest.raises(MissingRuntimeError, match="another library of this plugin is loaded in this process"):
        runners.load_plugin_of(module, EngineArtifact(artifact.path, other), plugin)


def test_a_plugin_that_is_not_there_is_exit_2(tmp_path):
    artifact = EngineArtifact(tmp_path / "m.engine", manifest_of(DATA, plugin_sha256="0" * 64))
    with pytest.raises(UsageError, match=r"gone\.so does not exist"):
        runners.load_plugin_of(SimpleNamespace(), artifact, tmp_path / "gone.so")


def test_shapes_are_held_against_the_profile():
    profiles = manifest_of(DATA).profiles
    choose_profile(profiles, {"x": (8, 3)})
    for shape in ((9, 3), (0, 3), (2, 4), (2,)):
        with pytest.raises(UsageError, match="the engine takes"):
            choose_profile(profiles, {"x": shape})
    with pytest.raises(UsageError, match="'x' was not given"):
        choose_profile(profiles, {})


def ranges(*profiles, name="x"):
    return tuple(EngineProfile(name, *shapes, index=index) for index, shapes in enumerate(profiles))


SMALL, LARGE = ((1, 3), (2, 3), (8, 3)), ((4, 3), (16, 3), (32, 3))


@pytest.mark.parametrize(
    ("rows", "index"),
    [
        (1, 0), (3, 0), (32, 1),
        (8, 0),  # both take it, 6 from the first one's optimum and 8 from the other's
        (9, 1),  # both would be as near, but the first does not take it
    ],
)  # fmt: skip
def test_shapes_choose_the_profile_whose_optimum_is_nearest(rows, index):
    assert choose_profile(ranges(SMALL, LARGE), {"x": (rows, 3)}) == index
    swapped = choose_profile(ranges(LARGE, SMALL), {"x": (rows, 3)})
    assert swapped == 1 - index


def test_of_equally_near_profiles_it_is_the_first():
    assert choose_profile(ranges(SMALL, SMALL), {"x": (3, 3)}) == 0
    assert choose_profile((), {}) == 0  # an engine without inputs


def test_a_profile_takes_all_inputs_or_none():
    profiles = ranges(SMALL, LARGE, name="a") + ranges(SMALL, LARGE, name="b")
    assert choose_profile(profiles, {"a": (2, 3), "b": (2, 3)}) == 0
    assert choose_profile(profiles, {"a": (9, 3), "b": (4, 3)}) == 1  # the first takes b alone
    with pytest.raises(UsageError, match=r"No optimization profile .* takes a \(1, 3\), b \(32, 3\) together"):
        choose_profile(profiles, {"a": (1, 3), "b": (32, 3)})
    with pytest.raises(UsageError, match=r"'b' is \(33, 3\), .* \(1, 3\) to \(8, 3\) or \(4, 3\) to \(32, 3\)"):
        choose_profile(profiles, {"a": (1, 3), "b": (33, 3)})
    with pytest.raises(UsageError, match=r"'b' was not given\. Inputs: a, b\."):
        choose_profile(profiles, {"a": (1, 3)})


# --- through the whole runner, ONNX Runtime behind TensorRT's names and the host behind CUDA's --------------------


def two_inputs(element=TensorProto.FLOAT):
    """y = a * 2 + b, z = shape-independent copy of b."""
    two = helper.make_tensor("two", element, [], [2.0])
    nodes = [
        helper.make_node("Mul", ["a", "two"], ["t"]), helper.make_node("Add", ["t", "b"], ["y"]),
        helper.make_node("Neg", ["b"], ["z"]),
    ]  # fmt: skip
    info = [helper.make_tensor_value_info(n, element, ["N", 3]) for n in ("a", "b", "y", "z")]
    graph = helper.make_graph(nodes, "g", info[:2], info[2:], [two])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def opened(
    host_cuda,
    element=TensorProto.FLOAT,
    graph=False,
    module=None,
    backend="tensorrt",
    host_code=False,
    large=False,
    debug=(),
):
    kind = NAMES[element]
    tensors = [EngineTensor(name, kind, (-1, 3)) for name in ("a", "b", "y", "z")]
    taken = (SMALL, LARGE) if large else (SMALL,)
    profiles = ranges(*taken, name="a") + ranges(*taken, name="b")
    data = two_inputs(element)
    if debug:
        data = marked(onnx.load_model_from_string(data), debug).SerializeToString()
    plan = Plan("m.engine", backend, data, tuple(tensors[:2]), tuple(tensors[2:]), profiles, host_code)
    return TensorRTRunner.of_plan(module or Module(host_cuda), plan, host_cuda.cuda, graph)


def feed(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(rows, 3)).astype(np.float32) for name in ("b", "a")}  # in another order


@pytest.mark.parametrize("graph", [False, True])
def test_every_input_and_output_is_bound_to_its_own_memory(host_cuda, graph):
    with opened(host_cuda, graph=graph) as runner:
        assert (runner.inputs, runner.outputs, runner.name) == (("a", "b"), ("y", "z"), "tensorrt")
        for rows, seed in ((2, 0), (2, 1), (5, 2), (1, 3)):  # the same shape again, a larger and a smaller one
            given = feed(rows, seed)
            found = runner.run(given)
            assert list(found) == ["y", "z"]
            np.testing.assert_array_equal(found["y"], given["a"] * np.float32(2) + given["b"])
            np.testing.assert_array_equal(found["z"], -given["b"])
        assert runner.device_memory_bytes == 1000 + 4 * 3 * 4


def test_buffers_are_kept_while_the_shape_stays_and_given_back_when_it_changes(host_cuda):
    with opened(host_cuda) as runner:
        runner.run(feed(2))
        host_cuda.calls()
        runner.run(feed(2, 1))
        assert {"cudaMalloc", "cudaFree"}.isdisjoint(host_cuda.calls())
        runner.run(feed(3))
        calls = host_cuda.calls()
        assert (calls.count("cudaMalloc"), calls.count("cudaFree")) == (4, 4)


@pytest.mark.parametrize("graph", [False, True])
def test_shapes_of_another_profile_switch_to_it_before_they_are_set(host_cuda, graph):
    """The stand-in drops the shapes at a switch, so shapes set before it would be missing."""
    with opened(host_cuda, graph=graph, large=True) as runner:
        for rows, used in ((2, [0]), (20, [0, 1]), (21, [0, 1]), (21, [0, 1]), (1, [0, 1, 0])):
            given = feed(rows)
            found = runner.run(given)
            np.testing.assert_array_equal(found["y"], given["a"] * np.float32(2) + given["b"])
            assert runner._context.profiles == used
        with pytest.raises(UsageError, match=r"\(33, 3\), the engine takes \(1, 3\) to \(8, 3\) or \(4, 3\) to"):
            runner.run(feed(33))


def test_a_profile_that_the_library_refuses_is_an_error(host_cuda):
    module = Module(host_cuda)
    module.num_profiles = 1
    with opened(host_cuda, module=module, large=True) as runner:
        with pytest.raises(ModelError, match="TensorRT refuses the optimization profile 1"):
            runner.run(feed(20))
        np.testing.assert_array_equal(runner.run(feed(2))["z"], -feed(2)["b"])


def test_a_graph_is_captured_once_for_a_shape_and_replayed(host_cuda):
    with opened(host_cuda, graph=True) as runner:
        runner.run(feed(2))
        calls = host_cuda.calls()
        assert calls.count("cudaStreamBeginCapture") == calls.count("cudaGraphLaunch") == 1
        runner.run(feed(2, 1))
        calls = host_cuda.calls()
        assert calls.count("cudaGraphLaunch") == 1
        assert "cudaStreamBeginCapture" not in calls
        runner.run(feed(4))
        assert host_cuda.calls().count("cudaStreamBeginCapture") == 1
    assert "cudaGraphExecDestroy" in host_cuda.calls()


def test_device_time_is_that_of_one_run(host_cuda):
    with opened(host_cuda) as runner:
        runner.bind(feed(2))
        assert runner.timed() == pytest.approx(2e-3)  # of the host's clock: the run and the event after it
        assert runner.timed() == pytest.approx(2e-3)


def test_layers_are_timed_by_the_librarys_profiler_after_the_warm_up(host_cuda):
    with opened(host_cuda) as runner:
        layers = runner.profile_layers(feed(2), rounds=3, warmup=2)
        assert runner._context.executions == 2 + 3
        assert [(layer.name, layer.p50_ms) for layer in layers] == [("Neg", 6.0), ("Add", 5.0), ("Mul", 4.0)]
        assert [layer.share for layer in layers] == [6 / 15, 5 / 15, 4 / 15]
        given = feed(4, 1)
        np.testing.assert_array_equal(runner.run(given)["z"], -given["b"])


def test_a_captured_graph_is_not_what_is_profiled(host_cuda):
    with opened(host_cuda, graph=True) as runner:
        runner.run(feed(2))
        host_cuda.calls()
        assert len(runner.profile_layers(feed(2), rounds=3, warmup=0)) == 3
        assert "cudaGraphLaunch" not in host_cuda.calls()


@pytest.mark.parametrize(("element", "dtype"), [(TensorProto.FLOAT16, np.float16), (TensorProto.BFLOAT16, np.float32)])
def test_half_inputs_are_rounded_and_half_outputs_read(host_cuda, element, dtype):
    given = feed(2)
    with opened(host_cuda, element) as runner:
        found = runner.run(given)
    roundoff = 2.0**-11 if element == TensorProto.FLOAT16 else 2.0**-8
    assert found["z"].dtype == dtype
    if element == TensorProto.FLOAT16:
        np.testing.assert_array_equal(found["z"], -given["b"].astype(np.float16))
    else:
        np.testing.assert_array_equal(found["z"], -given["b"].astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_allclose(found["y"], given["a"] * 2 + given["b"], atol=8 * roundoff)


# --- debug tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
@pytest.mark.parametrize("graph", [False, True])
def test_a_debug_tensor_is_copied_while_it_is_there_and_only_where_it_is_watched(host_cuda, element, graph):
    """Its memory is given back as soon as the listener returns; a replayed graph calls no listener."""
    given = feed(2)
    with opened(host_cuda, element, graph, debug=("t",)) as runner:
        plain = runner.run(given)
        outputs, shown = runner.run_watched(given, ["t"])
        assert list(shown) == ["t"]
        assert runner._context.watched == set()
        listener = runner._context.listener
        again, shown_again = runner.run_watched(feed(3, 1), ["t"])
        assert runner._context.listener is listener
        np.testing.assert_array_equal(runner.run(given)["y"], plain["y"])
        assert runner.run_watched(given, [])[1] == {}
    for name, value in plain.items():
        np.testing.assert_array_equal(outputs[name], value)
    assert (again["y"].shape, shown_again["t"].shape) == ((3, 3), (3, 3))
    kind = {TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16}.get(element, np.float32)
    np.testing.assert_array_equal(shown["t"], (given["a"].astype(kind) * kind(2)).astype(shown["t"].dtype))


def test_what_an_engine_does_not_show_is_missing_and_a_failing_copy_is_raised(host_cuda, monkeypatch):
    with opened(host_cuda, debug=("t",)) as runner:
        with pytest.raises(ModelError, match="TensorRT has no debug tensor 'u' in the engine"):
            runner.run_watched(feed(2), ["t", "u"])
        assert runner._context.watched == set()
        runner._engine.hidden.add("t")
        assert runner.run_watched(feed(2), ["t"])[1] == {}
        runner._engine.hidden.clear()

        def lost(*_):
            raise CudaError("cudaMemcpyAsync failed: illegal address (error 700).", "Start again.", 700)

        with monkeypatch.context() as patch:
            patch.setattr(type(host_cuda.cuda), "read", lost)
            with pytest.raises(CudaError, match="illegal address"):
                runner.run_watched(feed(2), ["t"])
        assert runner._context.watched == set()
        assert list(runner.run_watched(feed(2), ["t"])[1]) == ["t"]
    with opened(host_cuda, debug=("t",)) as runner:
        runner._context.set_debug_listener = lambda listener: False
        with pytest.raises(ModelError, match="TensorRT takes no listener for debug tensors"):
            runner.run_watched(feed(2), ["t"])


def test_errors_leave_nothing_behind(host_cuda):
    with opened(host_cuda) as runner:
        with pytest.raises(UsageError, match=r"'a' is \(9, 3\), the engine takes \(1, 3\) to \(8, 3\)"):
            runner.run(feed(9))
        with pytest.raises(UsageError, match="The engine takes FLOAT, found an array of int64"):
            runner.run({n: v.astype(np.int64) for n, v in feed(2).items()})
        host_cuda.fail("cudaMalloc", 2)
        with pytest.raises(CudaError, match="out of memory"):
            runner.run(feed(4))
        host_cuda.fail()
        given = feed(4)  # and it runs again afterwards
        np.testing.assert_array_equal(runner.run(given)["z"], -given["b"])
        host_cuda.fail("cudaStreamSynchronize", 700)
        with pytest.raises(CudaError, match="The GPU's state may be lost"):
            runner.run(given)
        host_cuda.fail()


def test_a_library_that_refuses_to_open_or_to_run(host_cuda):
    module = Module(host_cuda)
    module.open = False
    with pytest.raises(MissingRuntimeError, match=r"TensorRT cannot open m\.engine on this GPU: no reason given"):
        opened(host_cuda, module=module)
    with opened(host_cuda) as runner:
        runner._context.execute_async_v3 = lambda stream: False
        with pytest.raises(ModelError, match="TensorRT cannot run the engine: no reason given"):
            runner.run(feed(2))
        runner._context.get_tensor_shape = lambda name: (-1, 3)
        with pytest.raises(ModelError, match="The size of output 'y' depends on the data"):
            runner.run(feed(3))


def test_memory_that_is_refused_and_a_shape_on_the_host_are_errors(host_cuda):
    with opened(host_cuda) as runner:
        runner._context.set_tensor_address = lambda name, address: name != "y"
        with pytest.raises(ModelError, match="TensorRT refuses memory for 'y'"):
            runner.run(feed(2))
        runner._engine.get_tensor_location = lambda name: SimpleNamespace(name="HOST" if name == "b" else "DEVICE")
        with pytest.raises(ModelError, match="'b' is a shape, which TensorRT reads on the host"):
            runner.run(feed(2))


@pytest.mark.parametrize("graph", [False, True])
def test_rtx_compiles_for_a_shape_before_it_runs_and_captures_by_itself(host_cuda, graph):
    module = Module(host_cuda)
    with opened(host_cuda, graph=graph, module=module, backend="tensorrt-rtx") as runner:
        (config,) = runner._engine.configured
        expected = {"dynamic_shapes_kernel_specialization_strategy": "EAGER"}
        assert vars(config) == expected | ({"cuda_graph_strategy": "WHOLE_GRAPH_CAPTURE"} if graph else {})
        runner.run(feed(2))
    assert "cudaStreamBeginCapture" not in host_cuda.calls()


@pytest.mark.tensorrt
def test_the_settings_of_rtx_can_be_set_in_the_real_library():
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    for name in ("dynamic_shapes_kernel_specialization_strategy", "cuda_graph_strategy"):
        assert getattr(trt.IRuntimeConfig, name).fset is not None


def test_code_for_the_host_is_allowed_where_the_engine_holds_some_and_nowhere_else(host_cuda):
    """TensorRT refuses version-compatible engines, with plugins inside or without, unless it is told."""
    for host_code in (False, True):
        module = Module(host_cuda)
        with opened(host_cuda, module=module, host_code=host_code):
            assert getattr(module.runtime, "engine_host_code_allowed", False) is host_code
    assert not holds_host_code(manifest_of(DATA))
    assert holds_host_code(manifest_of(DATA, flags=("VERSION_COMPATIBLE",)))


def test_of_tensorrts_engines_only_a_version_compatible_one_carries_its_plugin(tmp_path):
    """What another one was told to serialize is not in it, so it must be given."""
    plugin = {"settings": {"plugins_to_serialize": ["libscconv_sru.so"]}, "plugin_sha256": "0" * 64}
    assert holds_host_code(manifest_of(DATA, backend="tensorrt-rtx", **plugin))  # every one of TensorRT-RTX's
    inside = {"backend": "tensorrt", **plugin}
    compatible = EngineArtifact(tmp_path / "m.engine", manifest_of(DATA, flags=("VERSION_COMPATIBLE",), **inside))
    runners.load_plugin_of(SimpleNamespace(), compatible, None)
    other = EngineArtifact(tmp_path / "m.engine", manifest_of(DATA, **inside))
    assert not holds_host_code(other.manifest)
    with pytest.raises(MissingRuntimeError, match="built with a plugin, which was not given"):
        runners.load_plugin_of(SimpleNamespace(), other, None)


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_bfloat16_is_rounded_like_ml_dtypes(values):
    array = np.array(values, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = array.astype(ml_dtypes.bfloat16)
    found = to_bfloat16(array)
    nan = np.isnan(array)
    np.testing.assert_array_equal(found[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(from_bfloat16(found)[nan]).all()
    np.testing.assert_array_equal(from_bfloat16(found)[~nan], expected.astype(np.float32)[~nan])


def test_arrays_of_ml_dtypes_are_taken_too():
    values = np.array([1.5, -3.25], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(from_bfloat16(as_stored(values, "BF16")), [1.5, -3.25])
    assert as_stored(np.float32(7).reshape(()), "HALF").shape == ()
    with pytest.raises(UsageError, match="The engine takes INT64, found an array of int32"):
        as_stored(np.zeros(2, np.int32), "INT64")
