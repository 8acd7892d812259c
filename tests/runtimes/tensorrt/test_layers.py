"""The profiler against TensorRT-RTX's own base class, which makes it without a GPU."""

import pytest

from scconv_deploy.runtimes.tensorrt.layers import layer_profiler

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")


@pytest.mark.tensorrt
def test_the_library_takes_the_profiler_and_its_reports_arrive_in_order():
    reported = []
    profiler = layer_profiler(trt, reported)
    assert isinstance(profiler, trt.IProfiler)
    for name, milliseconds in (("conv", 0.5), ("sru", 0.25), ("conv", 0.125)):
        trt.IProfiler.report_layer_time(profiler, layer_name=name, ms=milliseconds)
    assert reported == [("conv", "", 0.5), ("sru", "", 0.25), ("conv", "", 0.125)]
