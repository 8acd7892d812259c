"""The listener as a class of TensorRT-RTX's own bindings, called by hand: without a GPU no library calls it."""

import ctypes

import ml_dtypes
import numpy as np
import pytest

from scconv_deploy.runtimes.tensorrt.debug import Shown, debug_listener
from scconv_deploy.runtimes.tensorrt.runner import _STORED

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
pytestmark = pytest.mark.tensorrt


def call(listener, array, kind, address=None):
    """What the bindings pass: a capsule or an integer, their enumerations, their dimensions."""
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.argtypes, capsule.restype = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p), ctypes.py_object
    address = address or capsule(array.ctypes.data, None, None)
    return listener.process_debug_tensor(address, trt.TensorLocation.HOST, kind, trt.Dims(array.shape), "t", 0)


@pytest.mark.parametrize(("name", "dtype"), [("FLOAT", np.float32), ("HALF", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_the_bindings_own_types_are_understood(name, dtype):
    listener = debug_listener(trt, None, _STORED)
    assert isinstance(listener, trt.IDebugListener)
    given = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(dtype)
    assert call(listener, given, getattr(trt.DataType, name))
    shown = listener.shown
    assert (shown.dtypes, shown.failure) == ({"t": name}, None)
    np.testing.assert_array_equal(shown.tensors["t"].view(dtype), given)
    listener.shown = Shown()
    assert call(listener, given, getattr(trt.DataType, name), given.ctypes.data)
    np.testing.assert_array_equal(listener.shown.tensors["t"].view(dtype), given)


def test_what_fails_is_kept_for_the_runner_and_does_not_cross_the_library():
    listener = debug_listener(trt, None, _STORED)
    assert not call(listener, np.zeros((2,), np.float32), trt.DataType.FP8)
    assert isinstance(listener.shown.failure, KeyError)
    assert listener.shown.tensors == {}
