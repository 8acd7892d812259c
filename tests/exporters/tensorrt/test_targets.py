"""Which backend takes which part of --target, and what each JetPack brings."""

from pathlib import Path

import pytest

from scconv_deploy.errors import UsageError
from scconv_deploy.exporters.tensorrt import build as engine_build
from scconv_deploy.exporters.tensorrt.builder import check_options
from scconv_deploy.exporters.tensorrt.options import BuildOptions
from scconv_deploy.exporters.tensorrt.targets import DEVICES, jetpack_of, split_targets
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.workflows.build import EngineRequest
from tests.exporters.tensorrt.engines import recorded

BOTH = ("tensorrt-rtx", "tensorrt")


def test_the_table_of_devices():
    assert {d.name: (d.tensorrt, d.cuda, d.python, d.compute_capability) for d in DEVICES.values()} == {
        "orin-jp6": ("10.3", "12.6", "3.10", "87"),
        "orin-jp7": ("10.16", "13.2", "3.12", "87"),
        "thor-jp7": ("10.13", "13.0", "3.12", "110"),
    }
    assert [name for name, device in DEVICES.items() if device.needs_adapted_files] == ["orin-jp6"]
    assert [jetpack_of(linux) for linux in ("36.4", "38.2", "39.2", "35.1")] == [
        "JetPack 6", "JetPack 7", "JetPack 7", None
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("backends", "target", "expected"),
    [
        (BOTH, "sm89, ORIN-JP6", {"tensorrt-rtx": ("sm89",), "tensorrt": ("orin-jp6",)}),
        (BOTH, "", {"tensorrt-rtx": (), "tensorrt": ()}),
        (BOTH, "local", {"tensorrt-rtx": ("local",), "tensorrt": ("local",)}),
        (("tensorrt",), "orin-jp6,thor-jp7,orin-jp6", {"tensorrt": ("orin-jp6", "thor-jp7")}),
        (("tensorrt-rtx",), "sm89,sm120", {"tensorrt-rtx": ("sm89", "sm120")}),
    ],
)
def test_each_part_goes_to_the_backend_that_takes_it(backends, target, expected):
    assert split_targets(backends, target) == expected


@pytest.mark.parametrize(
    ("backends", "target", "message", "remedy"),
    [
        (BOTH, "orin-jp8", "'orin-jp8' is not known", "portable, local, smNN, orin-jp6, orin-jp7, thor-jp7"),
        (BOTH, "sm89,", "'sm89,': its part 2 is empty", "Leave out the comma"),
        (("tensorrt-rtx",), "orin-jp6", "none of the backends (tensorrt-rtx) builds", "Add --backend tensorrt,"),
        (("tensorrt",), "sm89,orin-jp6", "--target sm89: none of the backends", "Add --backend tensorrt-rtx,"),
        (BOTH, "sm89", "sm89 names nothing that tensorrt builds for", "local, orin-jp6"),
        (BOTH, "orin-jp6", "orin-jp6 names nothing that tensorrt-rtx builds for", "portable, local, smNN"),
    ],
)
def test_what_no_backend_takes_or_leaves_one_idle_is_refused(backends, target, message, remedy):
    with pytest.raises(UsageError) as refused:
        split_targets(backends, target)
    assert message in refused.value.message
    assert remedy in refused.value.remedy


def test_a_request_has_what_is_built_here_and_what_is_left():
    axes = (DynamicAxis(1, 2, 8),)
    request = EngineRequest.of(BOTH, "sm89,sm120,orin-jp6,local", axes)
    assert request.here == (
        BuildOptions("tensorrt-rtx", "sm89,sm120,local", axes=axes),
        BuildOptions("tensorrt", "local", axes=axes),
    )
    assert request.devices == (DEVICES["orin-jp6"],)
    assert EngineRequest.of(("tensorrt",), "thor-jp7", axes).here == ()
    assert [options.target for options in EngineRequest.of(BOTH, "", axes).here] == ["", ""]


def test_a_plugin_is_for_what_is_built_here():
    path = Path("p.so")
    both = EngineRequest.of(BOTH, "sm89,local,orin-jp6", (), path, require_plugin=True)
    assert [(o.backend, o.plugin, o.require_plugin) for o in both.here] == [
        ("tensorrt-rtx", path, True), ("tensorrt", path, True),
    ]  # fmt: skip
    for backends, target in ((("tensorrt",), "orin-jp6"), ((), "")):
        with pytest.raises(UsageError, match="--plugin is for an engine that is built on this machine"):
            EngineRequest.of(backends, target, (), path)
        with pytest.raises(UsageError, match="--require-plugin is for an engine"):
            EngineRequest.of(backends, target, (), None, require_plugin=True)
        with pytest.raises(UsageError, match="--debug-tensors is for an engine"):
            EngineRequest.of(backends, target, (), debug_tensors="srus")


@pytest.mark.parametrize(
    ("backend", "target", "message", "remedy"),
    [
        (
            "tensorrt",
            "orin-jp6",
            "built on the device",
            "deploy MODEL --backend tensorrt --target orin-jp6 makes a bundle",
        ),
        ("tensorrt-rtx", "sm89,thor-jp7", "built on the device", "--backend tensorrt --target thor-jp7 makes a bundle"),
        ("tensorrt-rtx", "sm89,LOCAL", "--target sm89,LOCAL: local cannot be combined", "Give local, or the others"),
        ("tensorrt-rtx", "portable,sm89", "portable cannot be combined", "Give portable, or the others"),
        ("tensorrt-rtx", ",sm89", "',sm89': its part 1 is empty", "Leave out the comma"),
        ("tensorrt", "sm89", "builds for the GPU of this machine", "--hardware-compatibility ampere+"),
    ],
)
def test_what_cannot_be_built_for_is_refused_before_the_library_is_looked_for(
    monkeypatch, backend, target, message, remedy
):
    monkeypatch.setattr(engine_build, "load_module", None)
    with pytest.raises(UsageError) as refused:
        engine_build.prepare(BuildOptions(backend, target), None)
    assert message in refused.value.message
    assert remedy in refused.value.remedy


def test_build_does_not_build_for_a_device_and_says_what_does():
    with pytest.raises(UsageError, match="GPU of this machine") as refused:
        check_options(recorded("tensorrt-10.3"), BuildOptions("tensorrt", "orin-jp6"))
    assert "deploy MODEL --backend tensorrt --target orin-jp6 makes a bundle" in refused.value.remedy
