"""Threads of the command line sleep between operators; those of ``bench`` and of the user's own choice do not."""

from __future__ import annotations

import os
import sys

import pytest

from scconv_deploy import __main__, cli
from scconv_deploy.system.signals import Signals


@pytest.mark.parametrize(
    ("variable", "arguments", "before", "after"),
    [
        ("OMP_WAIT_POLICY", ["deploy", "m"], None, "PASSIVE"),
        ("OMP_WAIT_POLICY", ["deploy", "m"], "ACTIVE", "ACTIVE"),
        ("OMP_WAIT_POLICY", ["bench", "m.onnx"], None, None),
        ("OMP_WAIT_POLICY", [], None, "PASSIVE"),
        ("OPENBLAS_THREAD_TIMEOUT", ["deploy", "m"], None, "4"),
        ("OPENBLAS_THREAD_TIMEOUT", ["deploy", "m"], "26", "26"),
        ("OPENBLAS_THREAD_TIMEOUT", ["bench", "m.onnx"], None, None),
    ],
)
def test_how_threads_wait_is_set_before_the_command_line_is_imported(monkeypatch, variable, arguments, before, after):
    monkeypatch.setattr(sys, "argv", ["scconv-deploy", *arguments])
    monkeypatch.setenv(variable, before or "")
    if before is None:
        monkeypatch.delenv(variable)
    seen = []
    monkeypatch.setattr(cli, "main", lambda: seen.append(os.environ.get(variable)))
    monkeypatch.setattr(Signals, "install", lambda name: None)
    monkeypatch.setattr(__main__, "open_standard_streams", lambda: None)
    __main__.main()
    assert seen == [after]
