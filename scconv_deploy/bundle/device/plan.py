"""``device.json``: steps left for the device, and facts that its builder needs. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scconv_deploy.bundle.contents import DEVICE_PLAN, FINISH, INLINED_MODEL, MODEL, PLUGIN_MODEL
from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.exporters.tensorrt.source import FileSource, Form, GraphFacts
from scconv_deploy.exporters.tensorrt.targets import DEVICES, DeviceTarget
from scconv_deploy.records.codec import DecodeError, decode, encode, parse
from scconv_deploy.runtimes.tensorrt.engine import EngineProfile

FORM_FILES: dict[Form, str] = {"whole": MODEL, "plugin": PLUGIN_MODEL, "inlined": INLINED_MODEL}


@dataclass(frozen=True)
class Unfinished:
    """Steps left for one target.

    Attributes:
        left: the steps in their order.
        needs: what the device must have.
        command: to be run on the device, in the bundle's folder.
    """

    target: str
    left: tuple[str, ...]
    needs: str
    command: str

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = encode(self)
        return found

    def __str__(self) -> str:
        return f"{self.target}: {', '.join(self.left)} are left for the device ({self.needs}): {self.command}"


@dataclass(frozen=True)
class DevicePlan:
    """Plan of the engine that a device builds from a bundle.

    Attributes:
        targets: the devices that the bundle was made for.
        facts: of the graph.
        profiles: the shapes that the engine takes.
    """

    targets: tuple[DeviceTarget, ...]
    facts: GraphFacts
    profiles: tuple[EngineProfile, ...]

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms of the model that the targets need."""
        adapted = any(target.needs_adapted_files for target in self.targets) and self.facts.srus
        return ("whole", "plugin", "inlined") if adapted else ("whole",)

    def file_of(self, form: Form) -> str:
        """File name of a form; a model without SRUs has no functions, so all its forms are one file."""
        return FORM_FILES[form] if self.facts.srus else MODEL

    def source(self, bundle: Path) -> FileSource:
        """The bundle's model files as the source of an engine build."""
        return FileSource(self.facts, {form: bundle / self.file_of(form) for form in FORM_FILES})

    def unfinished(self) -> tuple[Unfinished, ...]:
        """Steps left for each target."""
        left = (*(("plugin",) if self.facts.srus else ()), "engine", "parity", "latency")
        return tuple(
            Unfinished(t.name, left, f"JetPack {t.jetpack} or later of {t.jetpack[0]}", f"python3 {FINISH}")
            for t in self.targets
        )

    def as_bytes(self) -> bytes:
        """Encode as the content of ``device.json``."""
        names = tuple(target.name for target in self.targets)
        content = _Content(1, names, self.facts, self.profiles, self.unfinished())
        return (json.dumps(encode(content), indent=1) + "\n").encode()


@dataclass(frozen=True)
class _Content:
    """Keys of ``device.json``."""

    schema_version: Literal[1]
    targets: tuple[str, ...]
    network: GraphFacts
    profiles: tuple[EngineProfile, ...]
    unfinished: tuple[Unfinished, ...]


def read_device_plan(bundle: Path) -> DevicePlan:
    """Read ``device.json`` of a bundle.

    Raises:
        UsageError: the bundle was made for no device.
        IntegrityError: the file is damaged, or of another version.
    """
    path = bundle / DEVICE_PLAN
    if not path.is_file():
        raise UsageError(
            f"{bundle} was made for no device: it has no {DEVICE_PLAN}.",
            f"Make it with: scconv-deploy deploy MODEL --backend tensorrt --target {next(iter(DEVICES))} -o DIR.",
        )
    try:
        content = decode(_Content, parse(path.read_bytes()))
        if unknown := [name for name in content.targets if name not in DEVICES]:
            raise DecodeError(f"its target is {unknown[0]!r}, expected one of {', '.join(DEVICES)}")
    except DecodeError as error:
        raise IntegrityError(f"{path} is damaged or not ours: {error}.", "Make the bundle again.") from error
    return DevicePlan(tuple(DEVICES[name] for name in content.targets), content.network, content.profiles)
