"""The plugin as finish builds it: a real nvcc, NVIDIA's headers, and the harness in place of TensorRT."""

from __future__ import annotations

import pytest

from scconv_deploy.bundle.contents import PLUGIN_SOURCES
from scconv_deploy.bundle.device import finish
from scconv_deploy.bundle.device.finish import Device, FinishOptions
from scconv_deploy.records.stage import StageLog
from scconv_deploy.system.gpu import Gpu
from scconv_deploy.trt_plugins import build
from scconv_deploy.trt_plugins.check import check_plugin
from tests.finished import copied
from tests.trt_plugins.conftest import harness, nvcc, tensorrt_headers, unoptimised  # noqa: F401
from tests.trt_plugins.emulated import ONE_KERNEL, change_kernels


@pytest.mark.nvcc
def test_a_host_takes_the_plugin_that_was_built_from_a_bundle(device_bundle, tmp_path, harness, monkeypatch):  # noqa: F811
    """Not optimised, and of all kernels one operator's for float; test_sass.py compiles some as they ship."""
    bundle = copied(device_bundle, tmp_path)
    change_kernels(bundle / PLUGIN_SOURCES, ONE_KERNEL)
    monkeypatch.setattr(build, "COMPILE_FLAGS", unoptimised(build.COMPILE_FLAGS))
    monkeypatch.setattr(finish, "gpus", lambda: (Gpu("Orin", "8.7"),))
    log = StageLog()
    path = finish._build_plugin(
        bundle, tmp_path, finish.read_device_plan(bundle), FinishOptions(), Device(), log, lambda _: None
    )
    assert path is not None
    assert log.records[0].applied[0].startswith("libscconv_sru.so for sm_87, CUDA ")
    done = harness.run("check", path)
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith("passed")] == []
    assert (done.returncode, len(lines) > 600) == (0, True)
    report = check_plugin(path)
    assert report, report.failures
    assert report.architectures == ("8.7",)
