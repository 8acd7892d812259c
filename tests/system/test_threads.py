"""Threads of the command line sleep between operators; those of ``bench`` and of the user's own choice do not."""

from __future__ import annotations

import os
import sys

import pytest

from scconv_deploy import __main__, cli
from scconv_deploy.system.signals import Signals


@pytest.mark.parametrize(
    ("arguments", "before", "after"),
    [
        (["deploy", "m"], None, "PASSIVE"),
        (["deploy", "m"], "ACTIVE", "ACTIVE"),
        (["bench", "m.onnx"], None, None),
        ([], None, "PASSIVE"),
    ],
)
def test_how_threads_wait_is_set_before_the_command_line_is_imported(monkeypatch, arguments, before, after):
    monkeypatch.setattr(sys, "argv", ["scconv-deploy", *arguments])
    monkeypatch.setenv("OMP_WAIT_POLICY", before or "")
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    seen = []
    monkeypatch.setattr(cli, "main", lambda: seen.append(os.environ.get("OMP_WAIT_POLICY")))
    monkeypatch.setattr(Signals, "install", lambda name: None)
    monkeypatch.setattr(__main__, "open_standard_streams", lambda: None)
    __main__.main()
    assert seen == [after]
