"""The fused SRU's CPU library bound with ctypes, for PyTorch's tensors on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from scconv_deploy.errors import ConfigurationError, IntegrityError
from scconv_deploy.trt_plugins.cpu.build import built_cpu_library
from scconv_deploy.trt_plugins.elf import read_library

ABI_VERSION = 1
LANES = (4, 8, 16)
"""Floats in a vector, of the widths that the library has code for."""
TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Data types, in the order of their numbers in the C interface."""
_BUILD = "Build it again: scconv-deploy plugin build --cpu"


class CpuParams(ctypes.Structure):
    """``ScconvSruCpuParams`` of ``sru/cpu/sru_cpu.h``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "cut", "sign", "first", "second")),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "pixels")),
        *((name, ctypes.c_int32) for name in ("num_groups", "ddof")),
        *((name, ctypes.c_float) for name in ("eps_var", "eps_std")),
        *((name, ctypes.c_int32) for name in ("op", "type", "threads", "lanes")),
    )


class SruCpuLibrary:
    """A compiled library, bound with ctypes.

    Args:
        path: what ``scconv-deploy plugin build --cpu`` wrote.

    Raises:
        IntegrityError: it cannot be loaded, or is not this package's, or of another version of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            read_library(path)  # dlopen of a truncated one ends the process
            library = ctypes.CDLL(str(path.absolute()))
            version = library.scconv_sru_cpu_abi_version()
            self.lanes: int = library.scconv_sru_cpu_lanes()
            """Floats in the widest vector that the processor has."""
            self._run = library.scconv_sru_cpu_run
        except (OSError, AttributeError) as error:
            raise IntegrityError(f"{path} is no library of the fused SRU for CPUs: {error}.", _BUILD) from error
        if version != ABI_VERSION:
            raise IntegrityError(f"{path} has interface version {version}, expected {ABI_VERSION}.", _BUILD)
        self._run.restype = ctypes.c_char_p
        self._run.argtypes = [ctypes.POINTER(CpuParams)]

    def sru(
        self,
        x: Tensor,
        parameters: Sequence[Tensor],
        *,
        op: int,
        num_groups: int,
        ddof: int,
        eps_var: float,
        eps_std: float,
        threads: int | None = None,
        lanes: int = 0,
    ) -> Tensor:
        """Run the operator. The result's bytes do not depend on ``threads`` and ``lanes``.

        Args:
            x: ``[N, C, H, W]``, float32, float16 or bfloat16.
            parameters: cut, sign and what the operator takes more, ``[C]`` each, float32.
            op: number of the operator (0 SRU, 1 SRUNorm, 2 SRUSoft).
            num_groups, ddof, eps_var, eps_std: of ``s = sqrt(SS / (L - ddof) + eps_var) + eps_std``.
            threads: at most so many; None for PyTorch's number.
            lanes: floats in a vector, one of :data:`LANES` that the processor has; 0 for the most.

        Returns:
            ``[N, C, H, W]``, x's type, contiguous.

        Raises:
            ConfigurationError: sizes that the library refuses.
        """
        x, parameters = x.contiguous(), [p.contiguous() for p in parameters]
        y = torch.empty_like(x)
        batch, channels, height, width = x.shape
        params = CpuParams(
            batch=batch, channels=channels, pixels=height * width, num_groups=num_groups, ddof=ddof, eps_var=eps_var,
            eps_std=eps_std, op=op, type=TYPES.index(x.dtype), lanes=lanes,
            threads=torch.get_num_threads() if threads is None else threads,
        )  # fmt: skip
        for name, tensor in zip(("x", "y", "cut", "sign", "first", "second"), (x, y, *parameters), strict=False):
            setattr(params, name, tensor.data_ptr())
        if reason := self._run(ctypes.byref(params)):
            raise ConfigurationError(
                f"Fused SRU on {list(x.shape)}, num_groups {num_groups}: {reason.decode()}.",
                "Change these, or use scconv_deploy.SRU.",
            )
        return y


@cache
def cached_library() -> SruCpuLibrary | None:
    """The newest library in the cache, looked for once a process; None where none has been built."""
    path = built_cpu_library()
    return None if path is None else SruCpuLibrary(path)
