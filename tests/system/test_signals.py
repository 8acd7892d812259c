"""Signals, closed pipes and closed streams, as a shell gives them: one line or none, and the code that shells know."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from scconv_deploy.system.signals import BROKEN_PIPE, Signals, interrupted
from tests.report.made import full_report
from tests.trt_plugins.test_build import NVCC

COMMAND = [sys.executable, "-m", "scconv_deploy"]
LINE = "scconv-deploy: Interrupted. No half-written file is left.\n"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*command, instead=None, **options):
    """A process; ``instead`` is a folder whose modules take the place of installed ones."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    if instead is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(instead), os.environ.get("PYTHONPATH", "")])
    kinds = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([*map(str, command)], env=environment, text=True, **kinds)


def wait_for(path, process, seconds=100):
    deadline = time.monotonic() + seconds
    while not Path(path).exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def module(name, body):
    """A module in the place of an installed one, which first of all says that it is being imported."""
    folder = Path("instead")
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(f"import pathlib, time\npathlib.Path('importing').touch()\n{body}")
    return folder.absolute()


# --- interrupts -------------------------------------------------------------------------------------------------

SLEEPS = "time.sleep(60)\n"
CONVERTS = "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    raise ImportError('as pybind11 and numpy do')\n"


@pytest.mark.parametrize(
    ("name", "body", "command"),
    [
        ("typer", SLEEPS, ["models"]),
        ("torch", SLEEPS, ["inspect", "scconv_resnet20"]),
        ("torch", CONVERTS, ["inspect", "scconv_resnet20"]),
        ("onnx", SLEEPS, ["inspect", "net.onnx"]),
    ],
)
def test_an_interrupt_while_something_is_imported(name, body, command):
    Path("net.onnx").write_bytes(b"x")
    for as_json in (False, True) if name == "typer" else (body == CONVERTS,):
        Path("importing").unlink(missing_ok=True)
        process = start(*COMMAND, *command, *(["--json"] if as_json else []), instead=module(name, body))
        wait_for("importing", process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (130, LINE)
        assert (json.loads(out)["error"] if as_json else out) == (
            {"exit_code": 130, "message": "Interrupted.", "remedy": "No half-written file is left."} if as_json else ""
        )


FACTORY = """
    import pathlib, time
    def make():
        pathlib.Path("made").touch()
        try:
            time.sleep(60)
        except BaseException:
            pass  # as careless code does
        from torch import nn
        return nn.Conv2d(3, 4, 1)
"""


@pytest.mark.parametrize(
    ("name", "code", "by", "command"),
    [
        ("SIGINT", 130, "", ["export", "net.py:make", "-o", "out.onnx", "--quiet"]),
        ("SIGHUP", 129, " by SIGHUP", ["inspect", "net.py:make"]),
    ],
)
def test_an_interrupt_that_the_users_code_swallows_is_not_lost(name, code, by, command):
    Path("net.py").write_text(textwrap.dedent(FACTORY))
    process = start(*COMMAND, *command, "--input", "1x3x32x32")
    wait_for("made", process)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=100)
    assert err == LINE.replace("Interrupted", f"Interrupted{by}")
    assert process.returncode == code
    assert not Path("out.onnx").exists()


def test_what_nohup_ignores_stays_ignored():
    code = (
        "import signal; from scconv_deploy.system.signals import Signals; Signals.install('x'); signal.raise_signal(1)"
    )
    ignoring = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); exec({code!r}); print('goes on')"
    assert start(sys.executable, "-c", ignoring).communicate(timeout=30) == ("goes on\n", "")


def begun(monkeypatch, clock):
    signals = Signals("scconv-deploy")
    signals.begin()
    monkeypatch.setattr("scconv_deploy.system.signals.time.monotonic", lambda: clock[0])
    return signals


def test_where_sigterm_is_ignored_ctrl_c_still_leaves_nothing(workplace):
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from scconv_deploy.system.signals import Signals\n"
        "from scconv_deploy.commands.session import run_session\n"
        "from scconv_deploy.bundle.folder import new_folder\n"
        "Signals.install('x')\n"
        "with run_session(False, True), new_folder(Path('out')) as folder:\n"
        "    (folder / 'half').touch()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    process = start("sh", "-c", 'trap "" TERM; exec "$0" "$@"', sys.executable, "-c", code)
    _, said = process.communicate(timeout=60)
    assert "Interrupted. No half-written file is left." in said
    assert list(workplace.iterdir()) == []


def test_one_wish_given_twice_interrupts_once_and_a_later_one_again(monkeypatch):
    clock = [100.0]
    signals = begun(monkeypatch, clock)
    with pytest.raises(KeyboardInterrupt):
        signals(signal.SIGTERM, None)
    clock[0] += 0.1
    signals(signal.SIGINT, None)  # a terminal tells the process, and so does what forwards signals to it
    clock[0] += 1
    with pytest.raises(KeyboardInterrupt):
        signals(signal.SIGINT, None)
    assert signals.failure[0] == 143  # the first one says why


def test_a_step_that_is_held_is_whole_and_the_signal_is_not_lost(monkeypatch):
    signals, done = begun(monkeypatch, [100.0]), []

    def step():
        with signals:
            signals(signal.SIGINT, None)
            done.append("whole")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert done == ["whole"]
    assert interrupted()[0] == 130  # nothing is installed here: what user code raises


def test_an_interrupt_in_a_destructor_is_given_again():
    code = """
        import os, signal, time
        from scconv_deploy.system.signals import Signals
        class Ends:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
        signals = Signals.install("x")
        signals.begin()
        try:
            Ends()
            time.sleep(20)
        except KeyboardInterrupt:
            signals.leave(signals.failure[0])
    """
    process = start(sys.executable, "-c", textwrap.dedent(code))
    assert process.communicate(timeout=15) == ("", "")
    assert process.returncode == 130


def test_a_thread_that_does_not_stop_is_not_waited_for():
    code = """
        import threading, time
        from scconv_deploy.system.signals import Signals
        signals = Signals.install("x")
        signals.begin()
        threading.Thread(target=time.sleep, args=(60,)).start()
        print("kept", end="")
        signals.number = 2
        signals.leave(130)
    """
    process = start(sys.executable, "-c", textwrap.dedent(code))
    assert process.communicate(timeout=30) == ("kept", "")
    assert process.returncode == 130


def test_sigterm_ends_the_compiler_and_its_children_and_leaves_nothing(workplace):
    tools = workplace / "cuda" / "bin"
    tools.mkdir(parents=True)
    child, temporary = tools / "child", workplace / "temporary"
    temporary.mkdir()
    slow = 'echo left > "$TMPDIR/tmpxft"; sleep 60 & echo $! > "$(dirname "$0")/child"; wait; echo "$@" >>'
    (tools / "nvcc").write_text(NVCC.replace('echo "$@" >>', slow))
    (tools / "nvcc").chmod(0o755)
    command = ["env", "-", f"PATH={tools}:/usr/bin:/bin", f"TMPDIR={temporary}", f"HOME={workplace}", *COMMAND]
    process = start(*command, "plugin", "build", "--kernels-only", "--arch", "89", "-o", "lib.so", "--quiet")
    wait_for(child, process)
    process.terminate()  # timeout(1), docker stop, systemd
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (143, "")
    assert err == "scconv-deploy: Interrupted by SIGTERM. No half-written file is left.\n"
    assert list(temporary.iterdir()) == []
    assert not Path("lib.so").exists()
    told = Path(f"/proc/{child.read_text().strip()}/cmdline")
    assert not told.exists() or not told.read_bytes()  # gone, or dead and not yet collected


# --- pipes ------------------------------------------------------------------------------------------------------


SHOWN = [["report", "show", "report.json"], ["report", "schema"], ["doctor", "--json"], ["--help"], ["--version"]]


@pytest.mark.parametrize("command", SHOWN, ids=" ".join)
def test_a_reader_that_has_gone_is_141_as_other_tools_leave_and_nothing_is_said(command):
    Path("report.json").write_bytes(full_report().as_bytes())
    reader, writer = os.pipe()
    os.close(reader)
    process = start(*COMMAND, *command, stdout=writer)
    os.close(writer)
    assert process.communicate(timeout=100)[1] == ""
    assert process.returncode == BROKEN_PIPE == 141


def test_a_verdict_is_not_lost_with_its_reader():
    """``verify ... | head -1`` with pipefail: what failed stays 6."""
    Path("report.json").write_bytes(full_report(unexplained=3).as_bytes())
    reader, writer = os.pipe()
    os.close(reader)
    process = start(*COMMAND, "report", "check", "report.json", stdout=writer)
    os.close(writer)
    (line,) = process.communicate(timeout=100)[1].splitlines()
    assert process.returncode == 6
    assert line.endswith("Do not sign it.")


def test_nobody_reads_stderr():
    reader, writer = os.pipe()
    os.close(reader)
    process = start(*COMMAND, "nonsense", stderr=writer)
    os.close(writer)
    assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == 2


def test_closed_streams_are_not_the_next_files():
    """A file that is opened would get stdout's number, and what libraries print would go into it."""
    Path("report.json").write_bytes(full_report().as_bytes())
    page = ["report", "show", "report.json", "--format", "markdown", "-o", "report.md"]
    closed = " ".join(["exec", *COMMAND, *page, "<&-", ">&-", "2>&-"])
    process = start("sh", "-c", closed)
    assert process.communicate(timeout=100) == ("", "")
    assert process.returncode == 0
    assert Path("report.md").read_text().startswith("### Parity passed")
