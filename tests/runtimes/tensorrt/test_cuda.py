"""The CUDA runtime through ctypes, against one whose device is the host; on a GPU against the real one."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.runtimes.tensorrt import cuda as module
from scconv_deploy.runtimes.tensorrt.cuda import Buffer, Cuda, CudaError, Event, Stream, candidates, load_cuda
from scconv_deploy.system import gpu

X = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_there_and_back_in_order(host_cuda):
    cuda, back = host_cuda.cuda, np.full_like(X, -1)
    with Stream(cuda) as stream, Buffer(cuda, X.nbytes) as buffer:
        buffer.upload(X, stream)
        buffer.download(back, stream)
        assert (back == -1).all()  # nobody has waited yet
        stream.synchronize()
        np.testing.assert_array_equal(back, X)
    assert host_cuda.calls() == [
        "cudaStreamCreateWithFlags", "cudaMalloc", "cudaMemcpyAsync", "cudaMemcpyAsync", "cudaStreamSynchronize",
        "cudaFree", "cudaStreamDestroy",
    ]  # fmt: skip


def test_sizes_and_layouts_are_held_against_the_buffer(host_cuda):
    cuda = host_cuda.cuda
    with Stream(cuda) as stream, Buffer(cuda, X.nbytes) as buffer:
        for wrong in (X[:2], X.T, X.astype(np.float64)):
            with pytest.raises(ValueError, match="expected 48 bytes in a row"):
                buffer.upload(wrong, stream)
            with pytest.raises(ValueError, match="expected 48 bytes in a row"):
                buffer.download(wrong, stream)
    with Stream(cuda) as stream, Buffer(cuda, 0) as empty:
        assert empty.address
        empty.upload(X[:0], stream)
    assert "cudaMemcpyAsync" not in host_cuda.calls()


def test_a_handle_is_given_back_once(host_cuda):
    buffer = Buffer(host_cuda.cuda, 8)
    buffer.close()
    buffer.close()
    assert buffer.address == 0
    assert host_cuda.calls() == ["cudaMalloc", "cudaFree"]


def test_a_failing_call_names_itself_its_reason_and_what_to_do(host_cuda):
    host_cuda.fail("cudaMalloc", 2)
    with pytest.raises(
        CudaError, match=r"cudaMalloc failed: out of memory \(error 2\)\. Give smaller inputs"
    ) as failed:
        Buffer(host_cuda.cuda, 8)
    assert (failed.value.code, failed.value.exit_code) == (2, 3)
    host_cuda.fail("cudaStreamCreateWithFlags", 100)
    with pytest.raises(CudaError, match=r"no CUDA-capable device is detected.*Run this on a machine with an NVIDIA"):
        Stream(host_cuda.cuda)


def test_what_fails_while_giving_back_does_not_hide_the_first_error(host_cuda):
    cuda = host_cuda.cuda
    buffer = Buffer(cuda, 8)
    address = ctypes.c_void_p(buffer.address)
    host_cuda.fail("cudaFree", 700)
    with pytest.raises(KeyError, match="first"), buffer:
        raise KeyError("first")
    other = Buffer(cuda, 8)
    other_address = ctypes.c_void_p(other.address)
    with pytest.raises(CudaError, match="error 700"), other:
        pass
    host_cuda.fail()
    for kept in (address, other_address):  # the failure was planted, so the memory is still there
        cuda.call("cudaFree", kept)


def test_close_all_gives_back_everything_whatever_fails(host_cuda):
    cuda = host_cuda.cuda
    stream, buffer = Stream(cuda), Buffer(cuda, 8)
    kept = ctypes.c_void_p(buffer.address)
    host_cuda.fail("cudaFree", 1)
    with pytest.raises(CudaError, match=r"cudaFree failed"):
        module.close_all([buffer, stream])
    host_cuda.fail()
    assert host_cuda.calls()[-1] == "cudaStreamDestroy"
    cuda.call("cudaFree", kept)


def test_events_measure_the_time_between_them(host_cuda):
    cuda = host_cuda.cuda
    with Stream(cuda) as stream, Event(cuda) as before, Event(cuda) as after:
        before.record(stream)
        host_cuda.launch(stream.address, lambda: None)
        after.record(stream)
        with pytest.raises(CudaError, match="error 600"):  # not reached: nobody has waited
            after.seconds_since(before)
        stream.synchronize()
        assert after.seconds_since(before) == pytest.approx(2e-3)  # the host's clock ticks once for each piece of work


def test_a_graph_replays_what_was_captured_and_nothing_ran_meanwhile(host_cuda):
    cuda, ran = host_cuda.cuda, []
    with Stream(cuda) as stream:
        graph = stream.capture(lambda: host_cuda.launch(stream.address, lambda: ran.append(1)))
        assert ran == []
        with graph:
            graph.launch(stream)
            graph.launch(stream)
            stream.synchronize()
        assert ran == [1, 1]
    assert host_cuda.calls() == [
        "cudaStreamCreateWithFlags", "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiateWithFlags",
        "cudaGraphDestroy", "cudaGraphLaunch", "cudaGraphLaunch", "cudaStreamSynchronize", "cudaGraphExecDestroy",
        "cudaStreamDestroy",
    ]  # fmt: skip


def test_a_capture_that_fails_leaves_the_stream_usable(host_cuda):
    cuda, ran = host_cuda.cuda, []
    with Stream(cuda) as stream:
        with pytest.raises(CudaError, match=r"cudaMalloc failed.*900"):
            stream.capture(lambda: Buffer(cuda, 8))
        host_cuda.launch(stream.address, lambda: ran.append(1))
        stream.synchronize()
    assert ran == [1]


def test_an_error_of_a_kernel_shows_where_it_is_waited_for(host_cuda):
    with Stream(host_cuda.cuda) as stream:
        host_cuda.launch(stream.address, lambda: 700)
        with pytest.raises(CudaError, match=r"cudaStreamSynchronize failed.*error 700.*The GPU's state may be lost"):
            stream.synchronize()


def test_version_and_memory(host_cuda):
    assert host_cuda.cuda.version == "12.6"
    assert host_cuda.cuda.memory_bytes() == (3000, 4000)


def test_a_library_that_is_no_cuda_runtime_is_refused():
    with pytest.raises(MissingRuntimeError, match=r"has no cudaMalloc: expected the CUDA runtime 11\.4"):
        Cuda(ctypes.CDLL(None))


@pytest.fixture
def unloaded():
    """No runtime was found yet, and none is remembered afterwards."""
    load_cuda.cache_clear()
    yield
    load_cuda.cache_clear()


def test_it_is_found_below_cuda_home(unloaded, host_cuda_library, tmp_path, monkeypatch):
    target = tmp_path / "targets" / "x" / "lib" / "libcudart.so.12"
    target.parent.mkdir(parents=True)
    target.write_bytes(host_cuda_library.read_bytes())
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert str(target) in list(candidates())
    monkeypatch.setattr(module, "candidates", lambda: ["not-there.so", str(tmp_path), str(target)])
    assert load_cuda().version == "12.6"


@pytest.mark.parametrize(
    ("known", "expected"), [((12, 2), "12.6"), ((13, 0), "13.0"), (None, "13.0"), ((11, 8), "13.0")]
)
def test_of_several_runtimes_the_first_that_the_driver_knows(
    unloaded, host_cuda_library, tmp_path, monkeypatch, known, expected
):
    """CUDA's wheels of two versions may stand side by side. Where none will do, the first says what is missing."""
    for name in ("libcudart.so.13", "libcudart.so.12"):
        (tmp_path / name).write_bytes(host_cuda_library.read_bytes())
    newer = property(lambda cuda: (13, 0) if cuda._library._name.endswith("13") else (12, 6))
    monkeypatch.setattr(Cuda, "release", newer)
    monkeypatch.setattr(module, "driver_cuda", lambda: known)
    monkeypatch.setattr(module, "candidates", lambda: [str(tmp_path / f"libcudart.so.{n}") for n in (13, 12)])
    assert load_cuda().version == expected


def test_it_is_found_in_a_wheel_without_importing_it(tmp_path, monkeypatch):
    for name in ("cuda_runtime/lib/libcudart.so.12", "cu13/lib/libcudart.so.13"):
        (tmp_path / "nvidia" / name).parent.mkdir(parents=True)
        (tmp_path / "nvidia" / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = [Path(c) for c in candidates() if str(tmp_path) in c]
    assert [path.name for path in found] == ["libcudart.so.12", "libcudart.so.13"]


def test_without_one_it_is_exit_3_with_the_remedy(unloaded, monkeypatch):
    monkeypatch.setattr(module, "candidates", lambda: ["not-there.so"])
    with pytest.raises(MissingRuntimeError, match=r"libcudart\) was not found\. Set CUDA_HOME, or install it") as no:
        load_cuda()
    assert no.value.exit_code == 3


@pytest.mark.skipif(bool(gpu.gpus()), reason="this machine has a GPU")
def test_the_real_runtime_without_a_gpu_says_so(unloaded):
    try:
        cuda = load_cuda()
    except MissingRuntimeError as error:
        pytest.skip(error.message)
    assert int(cuda.version.split(".")[0]) >= 11
    with pytest.raises(CudaError, match="Run this on a machine with an NVIDIA GPU") as no:
        Stream(cuda)
    assert no.value.code in (35, 100)


@pytest.mark.gpu
@pytest.mark.skipif(not gpu.gpus(), reason="needs a CUDA GPU")
def test_there_and_back_on_the_gpu(unloaded):
    cuda, back = load_cuda(), np.full_like(X, -1)
    with Stream(cuda) as stream, Buffer(cuda, X.nbytes) as buffer, Event(cuda) as before, Event(cuda) as after:
        before.record(stream)
        buffer.upload(X, stream)
        buffer.download(back, stream)
        after.record(stream)
        stream.synchronize()
        assert after.seconds_since(before) > 0
    np.testing.assert_array_equal(back, X)
    assert cuda.memory_bytes()[0] > 0
