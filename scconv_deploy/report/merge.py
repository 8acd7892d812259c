"""Merge of a bundle's report with the device's: one chain that ends in the engine judged on the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from scconv_deploy.bundle.contents import DEVICE, MANIFEST, REPORT
from scconv_deploy.bundle.manifest import bundle_digest, check_bundle, read_manifest
from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.report.load import load_report
from scconv_deploy.verification.engine.verdict import ENGINE_LINK, with_engine


def merge_files(first: Path, second: Path | None = None) -> ParityReport:
    """Merge the reports of a bundle and of a device that finished it; ``scconv-deploy report merge``.

    Args:
        first: a bundle, or its ``report.json``.
        second: ``device/`` as written by ``finish``, or the ``report.json`` in it; None for the one in the bundle.

    Returns:
        The first report, with its link "engine" replaced by the device's link.

    Raises:
        UsageError: a report has no manifest beside it.
        IntegrityError: a file changed, or the device finished another bundle.
    """
    bundle = _sealed_folder(first)
    device = bundle / DEVICE if second is None else _sealed_folder(second)
    if not (device / MANIFEST).is_file():
        raise UsageError(
            f"{device} holds no {MANIFEST}: this bundle was not finished on a device.",
            "Run python3 finish.pyz there and copy its device/ back, or name it as the second argument.",
        )
    report = load_report(bundle)
    check_bundle(device)
    named, digest = read_manifest(device).get("bundle_digest"), bundle_digest(bundle)
    if named is None:
        raise IntegrityError(f"{device} names no bundle that it finished.", f"Name the {DEVICE}/ that finish wrote.")
    if named != digest:
        raise IntegrityError(
            f"{device} was made from the bundle {str(named)[:12]}..., and {bundle} is {digest[:12]}....",
            "Merge it with the bundle that was on the device.",
        )
    return merge_reports(report, load_report(device))


def merge_reports(report: ParityReport, device: ParityReport) -> ParityReport:
    """Merge a bundle's report with the device's report.

    The device's stages are appended with "device: " before their names; its provenance goes to its engine.
    """
    (link,) = device.links
    engines = tuple(replace(engine, provenance=dict(device.provenance)) for engine in device.engines)
    others = tuple(engine for engine in report.engines if engine.backend != link.name)
    stages = tuple(replace(stage, name=f"device: {stage.name}") for stage in device.stages)
    links = tuple(old for old in report.links if old.name != ENGINE_LINK)
    return with_engine(
        replace(report, links=links, engines=others), link, replace(device, engines=engines, stages=stages)
    )


def _sealed_folder(path: Path) -> Path:
    """Folder of a bundle or of ``device/``, from the path of the folder or of its report."""
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise UsageError(f"{path} does not exist.", f"Name a bundle, or the {REPORT} in one.")
    if path != folder and (path.name != REPORT or not (folder / MANIFEST).is_file()):
        raise UsageError(
            f"{path} lies beside no {MANIFEST} that says which bundle it belongs to.",
            f"Name the bundle, or the {REPORT} in it.",
        )
    return folder
