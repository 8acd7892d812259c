"""The table of a bundle's files against real bundles."""

import json
from pathlib import Path

import pytest

from scconv_deploy.bundle import contents
from scconv_deploy.bundle.device.plan import DevicePlan, read_device_plan
from scconv_deploy.bundle.manifest import check_bundle, read_manifest
from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.exporters.tensorrt.onnx_source import graph_facts
from scconv_deploy.exporters.tensorrt.source import GraphFacts, GraphInput, SRUNode
from scconv_deploy.exporters.tensorrt.targets import DEVICES
from scconv_deploy.graph.file import read_onnx
from scconv_deploy.runtimes.tensorrt.engine import EngineProfile
from tests.finished import copied, make_bundle


def top(bundle):
    return {path.name for path in bundle.iterdir()}


def test_a_bundle_for_an_old_tensorrt_holds_the_whole_table(device_bundle):
    assert top(device_bundle) == {*contents.ALWAYS, *contents.FOR_DEVICE, *contents.FOR_OLD_TENSORRT}
    assert check_bundle(device_bundle)


def test_adapted_files_are_there_only_where_a_target_needs_them(tmp_path):
    bundle = make_bundle(tmp_path, "thor-jp7,orin-jp7")
    assert top(bundle) == {*contents.ALWAYS, *contents.FOR_DEVICE}


def test_the_adapted_files_are_the_model_without_and_with_its_functions_expanded(device_bundle):
    whole, plugin, inlined = (
        read_onnx(device_bundle / name) for name in (contents.MODEL, contents.PLUGIN_MODEL, contents.INLINED_MODEL)
    )
    assert (len(whole.functions), len(plugin.functions), len(inlined.functions)) == (1, 0, 0)
    assert [n.op_type for n in plugin.graph.node] == [n.op_type for n in whole.graph.node]
    assert all(node.domain == "" for node in inlined.graph.node)
    assert [v.name for v in inlined.graph.output] == [v.name for v in whole.graph.output]


def test_the_plugins_sources_are_the_packages(device_bundle):
    from scconv_deploy.trt_plugins.build import SOURCES, source_digest

    assert source_digest(device_bundle / contents.PLUGIN_SOURCES) == source_digest(SOURCES)
    assert (device_bundle / contents.PLUGIN_SOURCES / "CMakeLists.txt").is_file()


def test_manifest_and_plan_say_what_is_left(device_bundle):
    plan = read_device_plan(device_bundle)
    assert plan.targets == (DEVICES["orin-jp6"], DEVICES["thor-jp7"])
    assert plan.facts == graph_facts(read_onnx(device_bundle / contents.MODEL))
    assert plan.facts.srus == (SRUNode("sru", "SRU", "conv2d", "_symbolic"),)
    assert plan.profiles == (EngineProfile("x", (1, 3, 8, 8), (2, 3, 8, 8), (8, 3, 8, 8)),)
    left = read_manifest(device_bundle)["unfinished"]
    assert left == json.loads((device_bundle / contents.DEVICE_PLAN).read_text())["unfinished"]
    assert left[0] == {
        "target": "orin-jp6",
        "left": ["plugin", "engine", "parity", "latency"],
        "needs": "JetPack 6.1 or later of 6",
        "command": "python3 finish.pyz",
    }
    assert [entry["target"] for entry in left] == ["orin-jp6", "thor-jp7"]


def test_a_model_without_srus_leaves_no_plugin_and_needs_no_adapted_file():
    facts = GraphFacts((GraphInput("x", (1, 3)),), (), (("", "Relu"),))
    plan = DevicePlan((DEVICES["orin-jp6"],), facts, (EngineProfile("x", (1, 3), (1, 3), (1, 3)),))
    assert plan.forms == ("whole",)
    assert plan.source(Path("b")).files["inlined"] == Path("b/model.onnx")
    assert plan.unfinished()[0].left == ("engine", "parity", "latency")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(schema_version=2),
        lambda d: d.update(targets=["orin-jp9"]),
        lambda d: d.pop("network"),
        lambda d: d["network"]["inputs"][0].pop("shape"),
        lambda d: d["profiles"][0].update(minimum=["one"]),
    ],
)
def test_a_damaged_plan_is_refused(device_bundle, tmp_path, change):
    bundle = copied(device_bundle, tmp_path)
    document = json.loads((bundle / contents.DEVICE_PLAN).read_text())
    change(document)
    (bundle / contents.DEVICE_PLAN).write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match=r"device\.json is damaged or not ours"):
        read_device_plan(bundle)


def test_a_form_that_is_missing_names_the_target_that_would_have_it(device_bundle, tmp_path):
    source = read_device_plan(device_bundle).source(device_bundle)
    assert source.read("plugin") == (device_bundle / contents.PLUGIN_MODEL).read_bytes()
    with pytest.raises(IntegrityError, match="'inlined'") as refused:
        read_device_plan(device_bundle).source(tmp_path).read("inlined")
    assert "--target orin-jp6" in refused.value.remedy
    with pytest.raises(UsageError, match="for no device"):
        read_device_plan(Path("/absent"))
