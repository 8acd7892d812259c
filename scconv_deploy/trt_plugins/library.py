"""The fused SRU for PyTorch: the compiled library bound with ctypes, and the operator ``torch.ops.scconv.sru``.

On a GPU the operator runs the kernels of the library that :func:`load` opened, on the current stream, without
synchronising; on a CPU those of the library that :func:`load_cpu` opened or that is in the build cache, and without one
the contract in plain PyTorch. Inference only: it has no gradient.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scconv_deploy.errors import ConfigurationError, IntegrityError, MissingRuntimeError
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.planes import as_planes, from_planes
from scconv_deploy.gate.recognize import Recognition, RecognizedSRU
from scconv_deploy.gate.swap import replace_modules
from scconv_deploy.gate.variant import GateVariant, check_groups, check_halves, cross_reconstruct
from scconv_deploy.graph.contract import OPERATORS
from scconv_deploy.trt_plugins.build import built_libraries
from scconv_deploy.trt_plugins.cpu.library import TYPES, SruCpuLibrary, cached_library
from scconv_deploy.trt_plugins.elf import read_library

ABI_VERSION = 2
ALGORITHMS = ("auto", "on_chip", "split")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class SruSettings:
    """Operator of the domain ``scconv`` and its attributes.

    Attributes:
        operator: ``SRU``, ``SRUNorm`` or ``SRUSoft``.
        num_groups, ddof, eps_var, eps_std: of ``s = sqrt(SS / (L - ddof) + eps_var) + eps_std``, as on an ONNX node.
        algorithm: of the kernels; ``auto`` leaves it to them.
    """

    operator: str
    num_groups: int
    ddof: int
    eps_var: float
    eps_std: float
    algorithm: str = "auto"

    @classmethod
    def of(cls, variant: GateVariant, algorithm: str = "auto") -> SruSettings:
        """The settings that compute a variant."""
        v = variant
        return cls(v.operator, v.num_groups, v.ddof, v.eps_var, v.eps_std, algorithm)


class SruParams(ctypes.Structure):
    """``ScconvSruParams`` of ``sru/kernel/sru.h``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "cut", "sign", "first", "second", "workspace")),
        ("workspace_bytes", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "pixels")),
        *((name, ctypes.c_int32) for name in ("num_groups", "ddof")),
        *((name, ctypes.c_float) for name in ("eps_var", "eps_std")),
        *((name, ctypes.c_int32) for name in ("op", "type", "layout", "algorithm")),
    )


class SruLibrary:
    """A compiled library, bound with ctypes.

    Args:
        path: what ``scconv-deploy plugin build`` wrote.

    Raises:
        IntegrityError: it cannot be loaded, or is not this package's, or of another version of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            read_library(path)  # dlopen of a truncated one ends the process
            self._library = ctypes.CDLL(str(path.absolute()))
            version = self._library.scconv_sru_abi_version()
        except (OSError, AttributeError) as error:
            raise IntegrityError(f"{path} is no library of the fused SRU: {error}.", _BUILD) from error
        if version != ABI_VERSION:
            raise IntegrityError(f"{path} has interface version {version}, expected {ABI_VERSION}.", _BUILD)
        params = ctypes.POINTER(SruParams)
        self._library.scconv_sru_refusal.restype = ctypes.c_char_p
        self._library.scconv_sru_refusal.argtypes = [params]
        self._library.scconv_sru_workspace_bytes.restype = ctypes.c_uint64
        self._library.scconv_sru_workspace_bytes.argtypes = [params]
        self._library.scconv_sru_choose.argtypes = [params, ctypes.POINTER(ctypes.c_int32)]
        self._library.scconv_sru_enqueue.argtypes = [params, ctypes.c_void_p]

    def refusal(self, params: SruParams) -> str | None:
        """The reason why the kernels refuse sizes or types, or None."""
        reason = self._library.scconv_sru_refusal(ctypes.byref(params))
        return reason.decode() if reason else None

    def workspace_bytes(self, params: SruParams) -> int:
        return self._library.scconv_sru_workspace_bytes(ctypes.byref(params))

    def chosen_algorithm(self, params: SruParams) -> str:
        """The algorithm that the current GPU would run (torch.cuda.CudaError without a GPU)."""
        chosen = ctypes.c_int32()
        if status := self._library.scconv_sru_choose(ctypes.byref(params), ctypes.byref(chosen)):
            raise torch.cuda.CudaError(status)
        return ALGORITHMS[chosen.value]

    def sru(self, x: Tensor, parameters: Sequence[Tensor], settings: SruSettings) -> Tensor:
        """Enqueue the operator on x's GPU and its current stream.

        Args:
            x: ``[N, C, H, W]``, float32, float16 or bfloat16, on a GPU. The kernels read x as it is if it is contiguous
                or channels-last, and aligned to 16 bytes, as every tensor is that PyTorch allocates. A view that is
                not, another layout, and a channels-last x whose groups straddle channels are copied first.
            parameters: cut, sign and what the operator takes more, ``[C]`` each, float32.

        Returns:
            ``[N, C, H, W]``, x's type; channels-last if x is, else contiguous.

        Raises:
            ConfigurationError: sizes, types or devices that the kernels refuse.
            torch.cuda.CudaError: CUDA's own error.
        """
        if not x.is_cuda or any(p.device != x.device for p in parameters):
            devices = sorted({str(tensor.device) for tensor in (x, *parameters)})
            raise ConfigurationError(
                f"Fused SRU: x and its parameters are on {', '.join(devices)}, expected one GPU.",
                "Move them to one GPU.",
            )
        promised = memory_format(x)
        x, parameters = kernel_input(x, promised), [p.contiguous() for p in parameters]
        params = sru_params(x, parameters, settings)
        if promised is torch.channels_last and self.refusal(params):
            x = kernel_input(x, torch.contiguous_format)
            params = sru_params(x, parameters, settings)
        if reason := self.refusal(params):
            raise ConfigurationError(
                f"Fused SRU on {list(x.shape)}, num_groups {settings.num_groups}: {reason}.",
                "Change these, or use scconv_deploy.SRU.",
            )
        y = torch.empty_like(x)
        with torch.cuda.device(x.device):
            workspace = torch.empty(self.workspace_bytes(params), dtype=torch.uint8, device=x.device)
            params.y, params.workspace, params.workspace_bytes = y.data_ptr(), workspace.data_ptr(), workspace.numel()
            stream = torch.cuda.current_stream().cuda_stream
            if status := self._library.scconv_sru_enqueue(ctypes.byref(params), stream):
                raise torch.cuda.CudaError(status)
        return y.contiguous(memory_format=promised)


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of the operator's output for x: channels-last if x is, and not contiguous too."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def kernel_input(x: Tensor, layout: torch.memory_format) -> Tensor:
    """x in a layout and aligned to 16 bytes: itself where it is, else a copy."""
    x = x.contiguous(memory_format=layout)
    return x.clone(memory_format=layout) if x.data_ptr() % _ALIGNMENT_BYTES else x


def sru_params(x: Tensor, parameters: Sequence[Tensor], settings: SruSettings) -> SruParams:
    """The struct for these tensors, without output and workspace (ConfigurationError for shapes that do not fit)."""
    _check_arguments(x, parameters, settings)
    batch, channels, height, width = x.shape
    params = SruParams(
        batch=batch, channels=channels, pixels=height * width, num_groups=settings.num_groups, ddof=settings.ddof,
        eps_var=settings.eps_var, eps_std=settings.eps_std, op=OPERATORS.index(settings.operator),
        type=TYPES.index(x.dtype), layout=LAYOUTS.index(memory_format(x)),
        algorithm=ALGORITHMS.index(settings.algorithm),
    )  # fmt: skip
    params.x = x.data_ptr()
    for name, value in zip(("cut", "sign", "first", "second"), parameters, strict=False):
        setattr(params, name, value.data_ptr())
    return params


def _check_arguments(x: Tensor, parameters: Sequence[Tensor], settings: SruSettings) -> None:
    operator = settings.operator
    if settings.algorithm not in ALGORITHMS:
        raise ConfigurationError(
            f"Fused SRU: algorithm {settings.algorithm!r} is unknown.", f"Use one of {', '.join(ALGORITHMS)}."
        )
    if operator not in OPERATORS:
        raise ConfigurationError(f"Fused SRU: operator {operator!r} is unknown.", f"Use one of {', '.join(OPERATORS)}.")
    if x.dim() != 4 or x.dtype not in TYPES:
        raise ConfigurationError(
            f"Fused SRU: x is {x.dtype} {list(x.shape)}, expected [N, C, H, W] in float32, float16 or bfloat16.",
            "Cast or reshape x, or use scconv_deploy.SRU.",
        )
    count = 2 if operator == "SRU" else 4
    shapes = [tuple(p.shape) for p in parameters]
    if shapes != [(x.shape[1],)] * count:
        raise ConfigurationError(
            f"Fused SRU: parameters have shapes {shapes}, expected {count} times ({x.shape[1]},) for {operator}.",
            "Pass one value per channel: cut and sign, then what the operator takes more.",
        )
    if any(p.dtype is not torch.float32 for p in parameters):
        raise ConfigurationError(
            f"Fused SRU: parameters are {', '.join(sorted({str(p.dtype) for p in parameters}))}, expected "
            "torch.float32: rounded to 16 bits a cut is another cut, and gates change.",
            "Compute them from the model's float32 gamma and beta, and leave them out of half() and to().",
        )


_BUILD = "Build it: scconv-deploy plugin build"
_loaded: list[SruLibrary] = []
_loaded_cpu: list[SruCpuLibrary] = []


def load(path: Path | None = None) -> SruLibrary:
    """Open a library for ``torch.ops.scconv.sru``; without a path the newest one in the build cache.

    Raises:
        MissingRuntimeError: there is none in the cache.
        IntegrityError: it is not this package's library.
    """
    if path is None:
        found = built_libraries()
        if not found:
            raise MissingRuntimeError("No library of the fused SRU has been built.", _BUILD)
        path = found[0]
    library = SruLibrary(path)
    _loaded[:] = [library]
    return library


def load_cpu(path: Path) -> SruCpuLibrary:
    """Open a library for ``torch.ops.scconv.sru`` on the CPU; without this call it takes the newest in the build cache.

    Raises:
        IntegrityError: it is not this package's library.
    """
    library = SruCpuLibrary(path)
    _loaded_cpu[:] = [library]
    return library


@torch.library.custom_op("scconv::sru", mutates_args=(), device_types="cuda")
def sru(
    x: Tensor,
    parameters: Sequence[Tensor],
    operator: str,
    num_groups: int,
    ddof: int,
    eps_var: float,
    eps_std: float,
) -> Tensor:
    """The operator of the domain ``scconv`` on ``[N, C, H, W]``; see :class:`SruLibrary` for the arguments."""
    library = _loaded[0] if _loaded else load()
    return library.sru(x, parameters, SruSettings(operator, num_groups, ddof, eps_var, eps_std))


@sru.register_kernel("cpu")
def _sru_on_cpu(
    x: Tensor,
    parameters: Sequence[Tensor],
    operator: str,
    num_groups: int,
    ddof: int,
    eps_var: float,
    eps_std: float,
) -> Tensor:
    """The CPU library's kernels, or the contract in plain PyTorch; y has x's memory format, as the fake promises."""
    settings = SruSettings(operator, num_groups, ddof, eps_var, eps_std)
    _check_arguments(x, parameters, settings)
    channels, elements = x.shape[1], math.prod(x.shape[1:])
    check_halves(channels, "Fused SRU")
    check_groups(channels, num_groups, elements, "Fused SRU")
    y = torch.empty_like(x, memory_format=memory_format(x))
    if x.shape[0] == 0:
        return y
    library = _loaded_cpu[0] if _loaded_cpu else cached_library()
    if library is None:
        return y.copy_(_in_pytorch(x.contiguous(), parameters, settings))
    found = library.sru(
        x, parameters,
        op=OPERATORS.index(operator), num_groups=num_groups, ddof=ddof, eps_var=eps_var, eps_std=eps_std,
    )  # fmt: skip
    return found if y.is_contiguous() else y.copy_(found)


def _in_pytorch(x: Tensor, parameters: Sequence[Tensor], settings: SruSettings) -> Tensor:
    """The contract in PyTorch: statistics, comparison and affine map in float32, data in x's type."""
    wide = x.float()
    groups = wide.reshape(x.shape[0], settings.num_groups, -1)
    mean = groups.mean(dim=2, keepdim=True)
    s = torch.sqrt(groups.var(dim=2, correction=settings.ddof, keepdim=True) + settings.eps_var) + settings.eps_std
    centred = (groups - mean).reshape(x.shape)
    spread = s.expand_as(groups).reshape(x.shape)
    cut, sign, *affine = (p.reshape(1, -1, 1, 1) for p in parameters)
    opened = sign * centred >= spread * cut
    data = x
    if affine:
        normalized = centred / spread * affine[0] + affine[1]
        if settings.operator == "SRUSoft":
            r = torch.sigmoid(normalized)
            x1, x2 = (torch.where(opened, fixed, r) * wide for fixed in (1.0, 0.0))
            return cross_reconstruct(x1, x2)
        data = normalized.to(x.dtype)
    return cross_reconstruct(opened * data, (~opened) * data)


@sru.register_fake
def _sru_fake(
    x: Tensor,
    parameters: Sequence[Tensor],
    operator: str,
    num_groups: int,
    ddof: int,
    eps_var: float,
    eps_std: float,
) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


class FusedSRU(nn.Module):
    """An SRU whose gate is the fused operator, for inference.

    Args:
        gate: which SRU it is, with its parameters; see :func:`scconv_deploy.gate.recognize.recognize`.

    Shape: ``[N, C, *]`` to the same.
    """

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.variant = gate.variant
        for name, value in gate.operator_inputs().items():
            self.register_buffer(name, value)
        self._names = tuple(name for name, _ in self.named_buffers())

    def _apply(self, fn, recurse=True):
        """Move the parameters to the module's device, but keep them in float32 (half precision would move the cut)."""
        kept = {name: getattr(self, name) for name in self._names}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def forward(self, x: Tensor) -> Tensor:
        v = self.variant
        parameters = [getattr(self, name) for name in self._names]
        # its schema is flat
        y = sru(as_planes(x), parameters, v.operator, v.num_groups, v.ddof, v.eps_var, v.eps_std)
        return from_planes(y, x)


class _FusedSite(nn.Module):
    """Replacement of a recognised SRU: the fused gate, and a 1x1 convolution before or after it where it has one."""

    def __init__(self, found: RecognizedSRU) -> None:
        super().__init__()
        self.gate = FusedSRU(found.gate)
        before, after = found.conv_place == "before", found.conv_place == "after"
        self.before = found.conv if before and found.conv is not None else nn.Identity()
        self.after = found.conv if after and found.conv is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.gate(self.before(x)))


def fuse(model: nn.Module, recognition: Recognition) -> nn.Module:
    """A copy of a model for inference that shares its tensors, with each recognised SRU fused.

    Args:
        recognition: of the same model, from :func:`scconv_deploy.gate.recognize`; what it refused stays as it is.

    Raises:
        ModelError: something in the model cannot be copied.
    """
    return replace_modules(model, {id(found.module): _FusedSite(found) for found in recognition.srus})
