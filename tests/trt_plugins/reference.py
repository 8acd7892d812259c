"""The kernels' arithmetic on the CPU (sru/reference), compiled with g++ and bound with ctypes."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scconv_deploy.graph.contract import OPERATORS

SOURCES = Path(__file__).parents[2] / "scconv_deploy" / "trt_plugins" / "sru"
TYPES = (torch.float32, torch.float16, torch.bfloat16)
AUTO, ON_CHIP, SPLIT = range(3)
LINEAR, CHANNELS_LAST = range(2)
H200 = (132, 227 << 10, True)
L4 = (58, 99 << 10, False)
"""Multiprocessors, shared memory that a block may use, clusters."""
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")


class _Params(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "open", "cut", "sign", "first", "second")),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "pixels")),
        *((name, ctypes.c_int32) for name in ("num_groups", "ddof")),
        *((name, ctypes.c_float) for name in ("eps_var", "eps_std")),
        *((n, ctypes.c_int32) for n in ("op", "type", "layout", "algorithm")),
        *((n, ctypes.c_int32) for n in ("multiprocessors", "shared_bytes", "clusters")),
    )


@dataclass(frozen=True)
class Plan:
    algorithm: int
    vector: int
    run: int
    pieces: int
    threads: int
    blocks: int
    cluster: int
    pieces_per_block: int
    shared_bytes: int


class Reference:
    """What the kernels would compute, and how they would be launched."""

    def __init__(self, folder: Path) -> None:
        file = folder / "libsru_reference.so"
        command = ["g++", *FLAGS, str(SOURCES / "reference" / "sru_reference.cpp"), "-o", str(file)]
        subprocess.run(command, check=True, capture_output=True)
        self._library = ctypes.CDLL(str(file))
        self._library.reference_refusal.restype = ctypes.c_char_p
        self._library.reference_workspace_bytes.restype = ctypes.c_uint64
        self._library.reference_differences.restype = ctypes.c_int64
        self.quotient = self._library.reference_quotient
        self.quotient.restype = ctypes.c_uint32
        self.quotient.argtypes = [ctypes.c_uint32, ctypes.c_uint32]

    def plan(self, shape, num_groups, dtype=torch.float32, algorithm=AUTO, layout=LINEAR, limits=H200) -> Plan:
        params = self._params(shape, num_groups, dtype, algorithm, layout, limits)
        found = (ctypes.c_int64 * 9)()
        self._library.reference_plan(ctypes.byref(params), found)
        return Plan(*found)

    def refusal(self, shape, num_groups, ddof=1, layout=LINEAR, dtype=torch.float32) -> str | None:
        params = self._params(shape, num_groups, dtype, AUTO, layout, H200)
        params.ddof = ddof
        found = self._library.reference_refusal(ctypes.byref(params))
        return found.decode() if found else None

    def workspace_bytes(self, shape, num_groups, dtype=torch.float32, layout=LINEAR) -> int:
        params = self._params(shape, num_groups, dtype, AUTO, layout, H200)
        return self._library.reference_workspace_bytes(ctypes.byref(params))

    def sru(self, x: Tensor, inputs, variant, layout=LINEAR) -> tuple[Tensor, Tensor]:
        """y, of x's type, and the open gates, bool ``[N, C, H, W]``; layout: in whose order sums are added up."""
        data, y = x.float().contiguous(), torch.empty(x.shape)
        opened = torch.empty(x.shape, dtype=torch.bool)
        params = self._params(x.shape, variant.num_groups, x.dtype, AUTO, layout, H200)
        params.x, params.y, params.open = data.data_ptr(), y.data_ptr(), opened.data_ptr()
        for name, value in zip(("cut", "sign", "first", "second"), inputs.values(), strict=False):
            setattr(params, name, value.data_ptr())
        params.ddof, params.eps_var, params.eps_std = variant.ddof, variant.eps_var, variant.eps_std
        params.op = OPERATORS.index(variant.operator)
        self._library.reference_sru(ctypes.byref(params))
        return y.to(x.dtype), opened

    def differences(self, values: Tensor) -> int:
        """How often the cheap arithmetic of sru_math.h differs from the plain one, over all triples of float32."""
        count = ctypes.c_int64(values.numel())
        return self._library.reference_differences(ctypes.c_void_p(values.data_ptr()), count)

    @staticmethod
    def _params(shape, num_groups, dtype, algorithm, layout, limits) -> _Params:
        batch, channels, height, width = shape
        sizes = {"batch": batch, "channels": channels, "pixels": height * width, "num_groups": num_groups, "ddof": 1}
        return _Params(**sizes, type=TYPES.index(dtype), layout=layout, algorithm=algorithm,
                       multiprocessors=limits[0], shared_bytes=limits[1], clusters=limits[2])  # fmt: skip
