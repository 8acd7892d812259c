"""``trtexec.txt``: command lines to build and time engines with NVIDIA's trtexec instead of ``finish``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scconv_deploy.bundle.contents import DEVICE, FINISH
from scconv_deploy.bundle.device.plan import DevicePlan
from scconv_deploy.exporters.tensorrt.network import form_for
from scconv_deploy.exporters.tensorrt.targets import DeviceTarget
from scconv_deploy.runtimes.tensorrt.engine import EngineProfile
from scconv_deploy.trt_plugins.build import LIBRARY

_ENGINE = "../model.engine"
"""Path beside the bundle, because a bundle with an added file no longer matches its manifest."""


def trtexec_text(plan: DevicePlan) -> str:
    """The lines of every target: build and time, with the plugin and without.

    The network is strongly typed and TF32 is off, as in the builder. The plugin is loaded through the registry
    (``--dynamicPlugins``), which is how it registers; ``--staticPlugins`` would only open it.
    """
    lines = [
        "# trtexec is TensorRT's own tool (on a Jetson /usr/src/tensorrt/bin/trtexec). Run the lines in this folder.",
        f"# They build what python3 {FINISH} builds, without its checks: it alone compares the engine with PyTorch.",
    ]
    for target in plan.targets:
        lines += ["", f"# {target.name}: TensorRT {target.tensorrt} or later of JetPack {target.jetpack[0]}"]
        for plugin in (True, False) if plan.facts.srus else (False,):
            lines += _pair(plan, target, plugin)
    return "\n".join(lines) + "\n"


def _pair(plan: DevicePlan, target: DeviceTarget, plugin: bool) -> Iterator[str]:
    library = (f"--dynamicPlugins={DEVICE}/{LIBRARY}",) if plugin else ()
    if plugin:
        yield f"# with the fused SRU ({DEVICE}/{LIBRARY} is what python3 {FINISH} makes; plugin/ builds with cmake too)"
    else:
        yield "# without a plugin"
    model = plan.file_of(form_for(target.tensorrt, "tensorrt", plugin))
    shapes = _ranges(plan.profiles)
    build = ("trtexec", f"--onnx={model}", "--stronglyTyped", "--noTF32", *library, *shapes, f"--saveEngine={_ENGINE}")
    yield " ".join((*build, "--skipInference"))
    optimum = (f"--shapes={_shapes(plan.profiles, 'optimum')}",) if shapes else ()
    yield " ".join(("trtexec", f"--loadEngine={_ENGINE}", *library, *optimum))


def _ranges(profiles: Sequence[EngineProfile]) -> tuple[str, ...]:
    """Shape options of a build; none if every input is static, for which trtexec takes the model's own shapes."""
    if all(p.minimum == p.maximum for p in profiles):
        return ()
    sides = {"--minShapes": "minimum", "--optShapes": "optimum", "--maxShapes": "maximum"}
    return tuple(f"{option}={_shapes(profiles, side)}" for option, side in sides.items())


def _shapes(profiles: Sequence[EngineProfile], side: str) -> str:
    return ",".join(f"{_quoted(p.input)}:{'x'.join(map(str, getattr(p, side)))}" for p in profiles)


def _quoted(name: str) -> str:
    """An input's name for trtexec, which splits at colons outside quotes; outer quotes protect these in the shell."""
    return name if name.replace("_", "").replace(".", "").isalnum() else f"\"'{name}'\""
