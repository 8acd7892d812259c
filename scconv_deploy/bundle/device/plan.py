"""``device.json``: what a bundle leaves for the device, and what the builder there must know. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scconv_deploy.bundle.contents import DEVICE_PLAN, FINISH, INLINED_MODEL, MODEL, PLUGIN_MODEL
from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.exporters.tensorrt.source import FileSource, Form, GraphFacts
from scconv_deploy.exporters.tensorrt.targets import DEVICES, DeviceTarget
from scconv_deploy.runtimes.tensorrt.engine import EngineProfile

SCHEMA_VERSION = 1
FORM_FILES: dict[Form, str] = {"whole": MODEL, "plugin": PLUGIN_MODEL, "inlined": INLINED_MODEL}


@dataclass(frozen=True)
class Unfinished:
    """What is left for one target, in the order in which it is done there.

    Attributes:
        needs: what the device must have.
        command: to be run there, in the bundle's folder.
    """

    target: str
    left: tuple[str, ...]
    needs: str
    command: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"left": list(self.left)}

    def __str__(self) -> str:
        return f"{self.target}: {', '.join(self.left)} are left for the device ({self.needs}): {self.command}"


@dataclass(frozen=True)
class DevicePlan:
    """What a device builds from a bundle.

    Attributes:
        targets: the devices that it was made for.
        facts: of the graph.
        profiles: the shapes that the engine shall take.
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
        """The name of a form's file; a model without SRUs has no function, so that its forms are all the same."""
        return FORM_FILES[form] if self.facts.srus else MODEL

    def source(self, bundle: Path) -> FileSource:
        """The model in a bundle."""
        return FileSource(self.facts, {form: bundle / self.file_of(form) for form in FORM_FILES})

    def unfinished(self) -> tuple[Unfinished, ...]:
        """What is left, target by target."""
        left = (*(("plugin",) if self.facts.srus else ()), "engine", "parity", "latency")
        return tuple(
            Unfinished(t.name, left, f"JetPack {t.jetpack} or later of {t.jetpack[0]}", f"python3 {FINISH}")
            for t in self.targets
        )

    def as_bytes(self) -> bytes:
        """``device.json``."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "targets": [target.name for target in self.targets],
            "network": self.facts.as_json(),
            "profiles": [asdict(profile) for profile in self.profiles],
            "unfinished": [entry.as_json() for entry in self.unfinished()],
        }
        return (json.dumps(document, indent=1) + "\n").encode()


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
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {document['schema_version']}")
        return DevicePlan(
            tuple(DEVICES[name] for name in document["targets"]),
            GraphFacts.from_json(document["network"]),
            _profiles(document["profiles"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{path} is damaged or not ours.", "Make the bundle again.") from error


def _profiles(entries: Sequence[Mapping[str, Any]]) -> tuple[EngineProfile, ...]:
    sides = ("minimum", "optimum", "maximum")
    return tuple(EngineProfile(str(e["input"]), *(tuple(map(int, e[side])) for side in sides)) for e in entries)
