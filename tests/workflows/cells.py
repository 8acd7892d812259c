"""Makers of cells that need no model: what a run does with bundles and failures does not depend on how they come."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from scconv_deploy.bundle.contents import MANIFEST, MODEL, REJECTED, REPORT
from scconv_deploy.bundle.folder import new_folder
from scconv_deploy.bundle.manifest import manifest_bytes
from scconv_deploy.errors import ModelError
from tests.report.made import full_report


def make(arguments, folder, command, progress, workers):
    """Write a bundle as the first argument says; every call leaves a mark in ``made/``."""
    how, *files = arguments
    Path("made").mkdir(exist_ok=True)
    with Path("made", folder.name).open("a") as marks:
        marks.write(f"{command}\n")
    progress(f"making {how}")
    if how == "refused":
        raise ModelError("The graph is odd.", "Even it.")
    content = b"".join(Path(file).read_bytes() for file in files)
    with new_folder(folder) as temporary:
        (temporary / MODEL).write_bytes(how.encode() + content)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        report = full_report(unexplained=int(how == "wrong"))
        (temporary / REPORT).write_bytes(report.as_bytes())
        if how == "wrong":
            shutil.move(temporary / MODEL, temporary / (MODEL + REJECTED))
        (temporary / MANIFEST).write_bytes(manifest_bytes(temporary, {"command": command}))
