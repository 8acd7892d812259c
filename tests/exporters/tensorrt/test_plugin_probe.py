"""Whether a release takes plugins: a child's fate is the answer; a good one is kept for the release."""

from __future__ import annotations

import pytest

from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.exporters.tensorrt import plugin_probe
from tests.exporters.tensorrt.engines import recorded

LIVES, NOT_TRIED = (
    f"print('[TRT] [E] on stdout'); open({{answer!r}}, 'w').write({word!r})"
    for word in (plugin_probe._TAKEN, plugin_probe._NOT_TRIED)
)


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module = recorded("tensorrt-rtx-1.7")
    module.__file__ = str(tmp_path / "tensorrt_rtx.py")
    return module


def ask(module, tmp_path):
    plugin_probe.require_plugins(module, tmp_path / "p.so", lambda: b"a model")


@pytest.mark.parametrize(
    ("child", "reason"),
    [
        ("import os; os.abort()", r"ends with signal 6 \(no word\)"),
        ("raise SystemExit('the registry refuses it')", r"ends with exit status 1 \(the registry refuses it\)"),
        ("print('something else')", r"ends with exit status 0 \(no word\)"),
    ],
)
def test_a_child_that_does_not_come_back_is_exit_3_with_its_fate(module, tmp_path, monkeypatch, child, reason):
    monkeypatch.setattr(plugin_probe, "_CHILD", child)
    with pytest.raises(
        MissingRuntimeError, match=f"takes no plugins here: a process that tries it {reason}"
    ) as refused:
        ask(module, tmp_path)
    assert refused.value.exit_code == 3
    assert module.__version__ in refused.value.message
    monkeypatch.setattr(plugin_probe, "_CHILD", LIVES)
    ask(module, tmp_path)  # what did not work once is tried again


def test_a_model_that_is_refused_before_its_first_sru_says_nothing_of_the_release(module, tmp_path, monkeypatch):
    monkeypatch.setattr(plugin_probe, "_CHILD", NOT_TRIED)
    ask(module, tmp_path)
    monkeypatch.setattr(plugin_probe, "_CHILD", "import os; os.abort()")
    with pytest.raises(MissingRuntimeError, match="signal 6"):
        ask(module, tmp_path)


def test_a_release_that_takes_plugins_is_asked_once(module, tmp_path, monkeypatch):
    monkeypatch.setattr(plugin_probe, "_CHILD", LIVES)
    ask(module, tmp_path)
    monkeypatch.setattr(plugin_probe, "_CHILD", "import os; os.abort()")
    ask(module, tmp_path)
    module.__version__ = "99.0"
    with pytest.raises(MissingRuntimeError, match="signal 6"):
        ask(module, tmp_path)


def test_a_cache_that_cannot_be_written_costs_the_keeping_alone(module, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder would be")
    monkeypatch.setattr(plugin_probe, "_CHILD", LIVES)
    ask(module, tmp_path)
    monkeypatch.setattr(plugin_probe, "_CHILD", "import os; os.abort()")
    with pytest.raises(MissingRuntimeError, match="signal 6"):
        ask(module, tmp_path)
