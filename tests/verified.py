"""A bundle judged by its own reference, for tests."""

from __future__ import annotations

from pathlib import Path

from scconv_deploy.records.parity import ParityReport
from scconv_deploy.workflows.subject import Bundle
from scconv_deploy.workflows.verify import verify_subject


def verify_bundle(folder: Path) -> ParityReport:
    return verify_subject(Bundle(folder), Bundle(folder))
