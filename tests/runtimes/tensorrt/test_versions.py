"""The version logic against what each version's own bindings offer, as recorded in ``surfaces``."""

import ast
import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from packaging.version import Version

import scconv_deploy
from scconv_deploy.errors import IntegrityError, MissingRuntimeError, UsageError
from scconv_deploy.exporters.tensorrt import builder as tensorrt
from scconv_deploy.exporters.tensorrt import network as tensorrt_network
from scconv_deploy.exporters.tensorrt.builder import check_options
from scconv_deploy.exporters.tensorrt.network import form_for
from scconv_deploy.exporters.tensorrt.onnx_source import OnnxSource, graph_facts
from scconv_deploy.exporters.tensorrt.options import BuildOptions
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from scconv_deploy.runtimes.tensorrt import versions as tensorrt_versions
from scconv_deploy.runtimes.tensorrt.versions import FEATURES, has, require
from tests.exporters.tensorrt.engines import VERSIONS, elf_library, recorded, sru_model, surface

PACKAGE = Path(scconv_deploy.__file__).parent
SOURCES = [
    PACKAGE / "verification/engine/sru_alone.py",
    *PACKAGE.glob("exporters/tensorrt/*.py"),
    *PACKAGE.glob("runtimes/tensorrt/*.py"),
]
TENSORRT = [name for name in VERSIONS if "rtx" not in name]
# what only TensorRT-RTX's path touches, and not every TensorRT has
RTX_ONLY = {
    "num_compute_capabilities", "set_compute_capability", "get_compute_capability", "ComputeCapability", "CURRENT",
    "create_runtime_config", "cuda_graph_strategy", "CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE",
    "dynamic_shapes_kernel_specialization_strategy", "DynamicShapesKernelSpecializationStrategy", "EAGER",
}  # fmt: skip


def backend_of(name):
    return "tensorrt-rtx" if "rtx" in name else "tensorrt"


def names_of(name):
    classes = surface(name)["classes"]
    return set(classes) | {a for names in classes.values() for a in names} | set(surface(name)["functions"])


def used_names():
    trees = (ast.parse(path.read_text()) for path in SOURCES)
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("name", VERSIONS)
def test_every_name_that_the_code_uses_unconditionally_is_in_every_version(name):
    known_anywhere = set().union(*map(names_of, VERSIONS))
    conditional = {part for f in FEATURES.values() for dotted in f.attributes for part in dotted.split(".")}
    wanted = (used_names() & known_anywhere) - RTX_ONLY - (conditional - {"IBuilderConfig", "BuilderFlag"})
    assert {"build_serialized_network", "STRONGLY_TYPED", "progress_monitor", "execute_async_v3"} <= wanted
    assert wanted - names_of(name) == set()


def test_the_rtx_path_finds_what_only_it_uses():
    assert RTX_ONLY - names_of("tensorrt-rtx-1.7") == set()


@pytest.mark.parametrize("name", VERSIONS)
def test_every_version_refits_from_onnx_and_times_layers(name):
    classes = surface(name)["classes"]
    assert classes["IProfiler"] == ["report_layer_time"]
    assert {"profiler", "set_optimization_profile_async"} <= set(classes["IExecutionContext"])
    assert {"refit_cuda_engine", "get_missing_weights"} <= set(classes["Refitter"])
    assert {"refit_from_bytes", "num_errors", "get_error"} <= set(classes["OnnxParserRefitter"])
    assert {"clear_flag", "set_flag"} <= set(classes["ISerializationConfig"])
    flags = classes["SerializationFlag"]
    assert "EXCLUDE_WEIGHTS" in flags
    lacks = name in ("tensorrt-10.3", "tensorrt-10.7", "tensorrt-10.9", "tensorrt-10.13")
    assert ("INCLUDE_REFIT" in flags) is not lacks  # docs/engines.md says so


@pytest.mark.parametrize("name", TENSORRT)
def test_versions_that_have_same_cc_are_those_that_the_error_names(name):
    module = recorded(name)
    if Version(module.__version__) >= Version("10.9"):
        require(module, "tensorrt", "same-cc")
    else:
        with pytest.raises(UsageError, match=rf"{module.__version__} has no .*same-cc.*10\.9 and later"):
            require(module, "tensorrt", "same-cc")


@pytest.mark.parametrize("feature", [f for f in FEATURES if f not in ("same-cc", "compute_capabilities")])
@pytest.mark.parametrize("name", TENSORRT)
def test_every_other_option_is_in_every_version_of_tensorrt(name, feature):
    assert has(recorded(name), FEATURES[feature])


@pytest.mark.parametrize("feature", [f for f in FEATURES if FEATURES[f].in_rtx])
def test_what_rtx_lacks_is_refused_with_the_reason_and_the_versions(feature):
    with pytest.raises(UsageError) as refused:
        require(recorded("tensorrt-rtx-1.7"), "tensorrt-rtx", feature)
    assert FEATURES[feature].in_rtx in refused.value.message
    assert FEATURES[feature].versions in refused.value.remedy


def test_tensorrt_takes_no_compute_capabilities():
    with pytest.raises(UsageError, match="GPU of this machine"):
        check_options(recorded("tensorrt-11.4"), BuildOptions("tensorrt", "sm89"))


def test_tensorrt_needs_a_gpu_and_says_so(monkeypatch):
    monkeypatch.setattr(tensorrt_versions, "gpus", lambda: ())
    with pytest.raises(MissingRuntimeError, match="TensorRT needs a GPU here"):
        check_options(recorded("tensorrt-10.3"), BuildOptions("tensorrt"))


def test_an_older_tensorrt_and_a_missing_one_are_refused(monkeypatch):
    monkeypatch.setattr(tensorrt_versions.importlib, "import_module", lambda name: SimpleNamespace(__version__="8.6.1"))
    with pytest.raises(MissingRuntimeError, match=r"8\.6\.1 is older than 10\.3"):
        tensorrt_versions.load_module("tensorrt")

    def broken(name):
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(tensorrt_versions.importlib, "import_module", broken)
    with pytest.raises(MissingRuntimeError, match=r"does not load: libnvinfer") as refused:
        tensorrt_versions.load_module("tensorrt")
    assert "pypi.nvidia.com" in refused.value.remedy


class StrictConfig:
    """A builder config that takes the recorded names only, and keeps what it is told."""

    def __init__(self, name):
        object.__setattr__(self, "told", {})
        object.__setattr__(self, "_names", set(surface(name)["classes"]["IBuilderConfig"]))

    def __setattr__(self, key, value):
        if key not in self._names:
            raise AttributeError(key)
        self.told[key] = value

    def __getattr__(self, key):
        if key not in self._names:
            raise AttributeError(key)
        return lambda *args: self.told.setdefault(key, []).append(args)


@pytest.mark.parametrize("name", TENSORRT)
def test_a_plugin_goes_into_version_compatible_engines_only(name, tmp_path):
    options = BuildOptions("tensorrt", plugin=tmp_path / "plugin.so", serialize_plugin=True)
    with pytest.raises(UsageError, match="version-compatible engines only"):
        tensorrt.check_options(recorded(name), options)


@pytest.mark.parametrize("name", TENSORRT)
def test_a_plugin_that_is_not_there_is_refused_first(name, tmp_path):
    for path in (tmp_path / "plugin.so", tmp_path):
        with pytest.raises(UsageError, match="is not a file"):
            tensorrt.check_options(recorded(name), BuildOptions("tensorrt", plugin=path))


@pytest.mark.parametrize("name", TENSORRT)
def test_the_configuration_uses_the_names_of_each_version(name, tmp_path):
    module, config = recorded(name), StrictConfig(name)
    for flag in ("TF32", "STRIP_PLAN", "REFIT", "VERSION_COMPATIBLE"):
        setattr(module.BuilderFlag, flag, flag)
    module.MemoryPoolType.WORKSPACE = "WORKSPACE"
    module.HardwareCompatibilityLevel.AMPERE_PLUS = "AMPERE_PLUS"
    plugin = tmp_path / "plugin.so"
    options = BuildOptions(
        "tensorrt", strip=True, optimization_level=4, workspace_bytes=1 << 20, hardware_compatibility="ampere+",
        plugin=plugin, serialize_plugin=True,
    )  # fmt: skip
    assert tensorrt._configure(module, config, options) == ()
    assert config.told["set_flag"] == [("STRIP_PLAN",)]
    assert config.told["clear_flag"] == [("TF32",), ("REFIT",), ("VERSION_COMPATIBLE",)]
    assert config.told["builder_optimization_level"] == 4
    assert config.told["set_memory_pool_limit"] == [("WORKSPACE", 1 << 20)]
    assert config.told["hardware_compatibility_level"] == "AMPERE_PLUS"
    assert config.told["plugins_to_serialize"] == [str(plugin.resolve())]


def test_before_10_7_functions_are_inlined_or_left_to_the_plugin():
    model = sru_model(("a", "b"))
    source = OnnxSource(model)
    assert form_for("10.3.0.30", "tensorrt", plugin=False) == "inlined"
    inlined = onnx.load_model_from_string(source.read("inlined"))
    x = np.random.default_rng(2).standard_normal((2, 8, 8, 8)).astype("float32")
    with OnnxRuntimeRunner(model) as given, OnnxRuntimeRunner(inlined) as changed:
        expected, found = given.run({"x": x})["x2"], changed.run({"x": x})["x2"]
    assert not inlined.functions
    assert all(node.domain == "" for node in inlined.graph.node)
    np.testing.assert_array_equal(found, expected)
    assert (expected == 0).any() or not np.array_equal(expected, x)  # the SRUs do something

    assert form_for("10.3.0.30", "tensorrt", plugin=True) == "plugin"
    stripped = onnx.load_model_from_string(source.read("plugin"))
    assert not stripped.functions
    assert [node.op_type for node in stripped.graph.node] == ["SRU", "SRU"]
    assert len(model.functions) == 1  # the caller's model stays

    for version in ("10.7.0", "10.16.1.2", "11.4"):
        assert {form_for(version, "tensorrt", plugin) for plugin in (True, False)} == {"whole"}
        assert (
            form_for(version, "tensorrt", plugin=False, registered=True) == "inlined"
        )  # else it would take the plugin
        assert form_for(version, "tensorrt", plugin=True, registered=True) == "whole"
    assert source.read("whole") == model.SerializeToString()


class Registry:
    """Only what the recorded surface of a registry has."""

    def __init__(self, creators, loads=True):
        self._creators, self._loads = creators, loads

    def load_library(self, path):
        return object() if self._loads else None

    @property
    def all_creators(self):
        return [SimpleNamespace(name=name, plugin_namespace=space) for name, _, space in self._creators]

    def get_creator(self, name, version, namespace):
        return (name, version, namespace) if (name, version, namespace) in self._creators else None


@pytest.mark.parametrize(
    ("registry", "message"),
    [
        (Registry([], loads=False), "cannot load the plugin"),
        (Registry([("SRU", "1", "other")]), "no creator scconv::SRU version 1"),
        (Registry([("SRUNorm", "1", "scconv")]), "no creator scconv::SRU version 1"),
    ],
)
def test_a_plugin_is_looked_up_after_it_was_loaded(registry, message, tmp_path):
    module, plugin = recorded("tensorrt-10.15"), tmp_path / "plugin.so"
    plugin.write_bytes(elf_library())
    module.get_plugin_registry = lambda: registry
    options = BuildOptions("tensorrt", plugin=plugin)
    with pytest.raises(tensorrt.BuildError, match=message):
        tensorrt_network.load_plugin(module, options, OnnxSource(sru_model()))
    module.get_plugin_registry = lambda: Registry([("SRU", "1", "scconv")])
    digest = hashlib.sha256(elf_library()).hexdigest()
    assert tensorrt_network.load_plugin(module, options, OnnxSource(sru_model())) == digest


def test_a_truncated_plugin_never_reaches_the_registry(tmp_path):
    """The loader behind load_library would end the process."""
    module, plugin = recorded("tensorrt-10.15"), tmp_path / "plugin.so"
    plugin.write_bytes(elf_library()[:64])
    loaded = []
    module.get_plugin_registry = lambda: SimpleNamespace(load_library=loaded.append, all_creators=[])
    with pytest.raises(IntegrityError, match=r"plugin\.so is damaged") as refused:
        tensorrt_network.load_plugin(module, BuildOptions("tensorrt", plugin=plugin), OnnxSource(sru_model()))
    assert (loaded, refused.value.exit_code) == ([], 7)


class Network:
    """Layers as a parser leaves them."""

    def __init__(self, layers):
        self._layers = layers
        self.num_layers = len(layers)

    def get_layer(self, index):
        name, kind, metadata = self._layers[index]
        return SimpleNamespace(name=name, type=SimpleNamespace(name=kind), metadata=metadata)


def test_which_srus_got_the_plugin_and_why_not(tmp_path):
    network = Network([
        ("a", "PLUGIN_V3", "[ONNX Layer: a]"),
        ("node_of_sru__xf", "CAST", "[ONNX Layer: node_of_sru__xf | b (SRU)]"),
        ("node_of_sru__y", "CONCATENATION", "[ONNX Layer: node_of_sru__y | b (SRU)]"),
    ])  # fmt: skip
    options = BuildOptions("tensorrt", plugin=tmp_path / "p.so", require_plugin=True)
    first, second = tensorrt_network.srus_of(graph_facts(sru_model(("a", "b"))), network, options)
    assert (first.site, first.form) == ("a", "plugin")
    assert (second.site, second.form, second.layers) == ("b", "expanded", 2)
    assert "although the plugin is registered" in second.reason
    with pytest.raises(tensorrt.BuildError, match=r"1 of 2 SRUs were expanded, the first is b") as refused:
        tensorrt._require_plugins((first, second), options)
    assert refused.value.exit_code == 5
    tensorrt._require_plugins((first,), options)
