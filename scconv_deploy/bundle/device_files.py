"""Write the files that a bundle carries for a device, see :mod:`.contents`."""

from __future__ import annotations

from pathlib import Path

from scconv_deploy.bundle.contents import DEVICE_PLAN, FINISH, MODEL, PLUGIN_SOURCES, RUN_SCRIPT, TRTEXEC
from scconv_deploy.bundle.device.plan import DevicePlan
from scconv_deploy.bundle.pyz import pyz_bytes
from scconv_deploy.bundle.trtexec import trtexec_text
from scconv_deploy.exporters.tensorrt.source import NetworkSource
from scconv_deploy.system.atomic import write_file
from scconv_deploy.trt_plugins.build import SOURCES

_RUN = Path(__file__).with_name("run.py")


def write_run_script(folder: Path) -> None:
    """Write ``run.py``, a copy of this package's own file."""
    write_file(folder / RUN_SCRIPT, _RUN.read_bytes())


def write_device_files(folder: Path, source: NetworkSource, plan: DevicePlan) -> None:
    """Write all files that the targets of a plan need besides ``model.onnx``.

    Raises:
        ModelError: the model cannot be converted to a form that a target needs.
    """
    for form in plan.forms:
        if plan.file_of(form) != MODEL:
            write_file(folder / plan.file_of(form), source.read(form))
    if plan.facts.srus:
        for path in sorted(p for p in SOURCES.rglob("*") if p.is_file()):
            write_file(folder / PLUGIN_SOURCES / path.relative_to(SOURCES), path.read_bytes())
    write_file(folder / DEVICE_PLAN, plan.as_bytes())
    write_file(folder / TRTEXEC, trtexec_text(plan).encode())
    write_file(folder / FINISH, pyz_bytes())
