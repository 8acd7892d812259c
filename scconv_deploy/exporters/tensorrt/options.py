"""Options of an engine build."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scconv_deploy.exporters.tensorrt.profiles import ShapeRange
from scconv_deploy.exporters.tensorrt.targets import target_parts
from scconv_deploy.system.backends import BACKENDS, Backend

if TYPE_CHECKING:  # this module also runs on the device, without the model package
    from scconv_deploy.model.inputs import DynamicAxis

AUTO = "auto"
HardwareCompatibility = Literal["ampere+", "same-cc"]
DebugTensors = Literal["srus"]


@dataclass(frozen=True)
class BuildOptions:
    """Options of one engine build.

    Attributes:
        target: ``portable`` (TensorRT-RTX: its default, every GPU from compute capability 8.0 on), ``local`` (this
            machine's GPU), or compute capabilities such as ``sm89,sm120``; "" is ``portable`` for TensorRT-RTX and
            ``local`` for TensorRT.
        shapes, axes, profiles: see :func:`scconv_deploy.exporters.tensorrt.profiles.resolve_profiles`.
        optimization_level: 0 to 5; the library's default where None.
        plugin: the library with the fused SRU.
        auto_plugin: take it from the cache or compile it, see :mod:`.plugin_choice`.
        debug_tensors: ``srus`` marks the input and the output of each SRU, so that ``verify`` can read them.
        timing_cache: where to read and keep tactic timings; None for none.
    """

    backend: Backend
    target: str = ""
    shapes: tuple[ShapeRange, ...] = ()
    axes: tuple[DynamicAxis, ...] = ()
    profiles: tuple[tuple[ShapeRange, ...], ...] = ()
    tf32: bool = False
    strip: bool = False
    refit: bool = False
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    hardware_compatibility: HardwareCompatibility | None = None
    version_compatible: bool = False
    plugin: Path | None = None
    auto_plugin: bool = False
    serialize_plugin: bool = False
    require_plugin: bool = False
    debug_tensors: DebugTensors | None = None
    timing_cache: Path | None = None

    def with_plugin(self, given: str | Path | None) -> BuildOptions:
        """The options with what ``--plugin`` says: ``auto`` or a file."""
        if given is None or given == AUTO:
            return replace(self, plugin=None, auto_plugin=given == AUTO)
        return replace(self, plugin=Path(given), auto_plugin=False)

    @property
    def resolved_target(self) -> str:
        return ",".join(target_parts(self.target)) or BACKENDS[self.backend].targets[0]
