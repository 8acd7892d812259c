"""Finishing a bundle: everything but the vendor's library, with the real builder of TensorRT-RTX in its place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from scconv_deploy import cli
from scconv_deploy.bundle.device import command_line, finish
from scconv_deploy.bundle.device.finish import Device, FinishOptions, finish_bundle
from scconv_deploy.bundle.folder import check_output_folder
from scconv_deploy.bundle.manifest import bundle_digest, check_bundle, differing_files, read_manifest
from scconv_deploy.errors import IntegrityError, MissingRuntimeError, ParityError, UsageError
from scconv_deploy.report.load import load_report
from scconv_deploy.runtimes.tensorrt import versions as tensorrt_versions
from scconv_deploy.runtimes.tensorrt.engine import load_engine
from scconv_deploy.system import gpu
from scconv_deploy.system.gpu import Gpu
from scconv_deploy.system.machine import Machine
from tests.finished import InOnnxRuntime, copied
from tests.trt_plugins.test_build import machine  # noqa: F401

OPTIONS = FinishOptions(plugin=False, rounds=5, warmup=1)
needs_rtx = pytest.mark.tensorrt


@pytest.fixture
def rtx():
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")


@pytest.fixture
def bundle(device_bundle, tmp_path):
    return copied(device_bundle, tmp_path)


@needs_rtx
def test_a_finished_bundle_holds_engine_report_and_a_manifest_that_names_it(bundle, rtx):
    before = {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    result = finish_bundle(bundle, OPTIONS, command="c", device=InOnnxRuntime().device())
    assert result
    assert {p: p.read_bytes() for p in before} == before  # the laptop's seal never changes
    engine = load_engine(bundle / "device" / "model.tensorrt-rtx.engine")
    assert engine.manifest.profiles[0].maximum == (8, 3, 8, 8)
    assert engine.manifest.onnx_sha256 == read_manifest(bundle)["files"]["model.onnx"]["sha256"]
    assert [s.site for s in engine.manifest.srus] == ["sru"]
    sealed = read_manifest(bundle / "device")
    assert sealed["bundle_digest"] == bundle_digest(bundle)
    assert set(sealed["files"]) == {"model.tensorrt-rtx.engine", "model.tensorrt-rtx.engine.json", "report.json"}
    assert result.digest == bundle_digest(bundle / "device")
    report = load_report(bundle / "device")
    (link,) = report.links
    assert (link.name, link.status) == ("tensorrt-rtx", "passed")
    assert "1 SRUs alone, same input, gates changed: 0 of 512" in link.reason
    assert report.artifact == "device/model.tensorrt-rtx.engine"
    assert report.provenance["bundle"] == bundle_digest(bundle)
    (measured,) = report.engines
    assert measured.latency.device_p50_ms == pytest.approx(2.0)
    assert measured.latency.rounds == 5
    assert [stage.name for stage in report.stages] == ["plugin", "build", "verify tensorrt-rtx", "latency"]
    assert report.stages[0].skipped == (("libscconv_sru.so", "--no-plugin"),)
    assert dict(report.stages[1].skipped)["sru"] == "no plugin was given (--plugin)"
    assert check_bundle(bundle) == bundle_digest(bundle)  # device/ is no foreign file
    assert not list(bundle.glob(".scconv*"))
    assert any(line.startswith("latency      p50") for line in result.lines)


@needs_rtx
def test_twice_is_refused_without_force_and_a_failure_keeps_the_first(bundle, rtx):
    stand_in = InOnnxRuntime()
    finish_bundle(bundle, OPTIONS, device=stand_in.device())
    first = bundle_digest(bundle / "device")
    with pytest.raises(UsageError, match=r"device exists\. Add --force"):
        finish_bundle(bundle, OPTIONS, device=stand_in.device())

    def broken(*_):
        raise MissingRuntimeError("The GPU went away.", "Try again.")

    again = FinishOptions(plugin=False, rounds=5, warmup=1, force=True)
    with pytest.raises(MissingRuntimeError, match="went away"):
        finish_bundle(bundle, again, device=stand_in.device(judge=broken))
    assert bundle_digest(bundle / "device") == first
    assert finish_bundle(bundle, again, device=stand_in.device())
    assert bundle_digest(bundle / "device") != first  # other times, another report
    (bundle / "device" / "mine.txt").write_text("x")
    with pytest.raises(IntegrityError, match=r"device/mine\.txt is not named"):
        finish_bundle(bundle, again, device=stand_in.device())


@needs_rtx
def test_an_engine_that_fails_is_named_so_and_not_timed(bundle, rtx):
    result = finish_bundle(bundle, OPTIONS, device=InOnnxRuntime(wrong=1.5).device())
    assert not result
    names = {p.name for p in (bundle / "device").iterdir()}
    assert names == {
        "model.tensorrt-rtx.engine.rejected", "model.tensorrt-rtx.engine.rejected.json", "report.json", "manifest.json"
    }  # fmt: skip
    report = load_report(bundle / "device")
    assert report.verdict == "failed"
    assert report.artifact.endswith(".rejected")
    assert report.engines[0].latency is None
    assert report.stages[-1].skipped == (("latency", "the engine failed parity"),)


DAMAGES = {"flipped": "is not the file", "truncated": "is not the file that was sealed", "missing": "is missing"}


@pytest.mark.parametrize("name", ["model.onnx", "device.json", "reference/sample-0.npz", "plugin/sru_math.h", "run.py"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_is_loaded_from_a_bundle_that_differs(bundle, name, damage):
    path = bundle / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage == "flipped" else data[: len(data) // 2])

    def loaded(backend):
        raise AssertionError("the library was loaded")

    with pytest.raises(IntegrityError, match=rf"{name} {DAMAGES[damage]}"):
        finish_bundle(bundle, OPTIONS, device=Device(load=loaded))
    assert not (bundle / "device").exists()


@pytest.mark.parametrize("name", ["model.onnx", "plugin/sru_math.h", "reference/sample-0.npz"])
@pytest.mark.parametrize("command", ["finish", "verify"])
def test_a_sealed_file_that_became_a_link_is_refused_by_every_command(bundle, tmp_path, name, command):
    """Its bytes are the sealed ones now; whoever owns the place that it leads to can change them after the check."""
    (bundle / name).rename(tmp_path / "outside")
    (bundle / name).symlink_to(tmp_path / "outside")
    done = CliRunner().invoke(cli.app, [command, str(bundle)])
    assert done.exit_code == 7, done.output
    assert done.stderr.endswith(
        f"{bundle}: {name} is a symbolic link, expected a plain file. "
        "Replace it by a copy of the file, from where you trust it.\n"
    )


def test_a_foreign_manifest_and_a_wrong_digest_are_refused(bundle, device_bundle, tmp_path):
    digest = bundle_digest(bundle)
    with pytest.raises(IntegrityError, match="is not the bundle of digest 000000000000"):
        finish_bundle(bundle, FinishOptions(digest="0" * 64))
    assert check_bundle(bundle, digest.upper()) == digest
    (bundle / "more.so").write_bytes(b"\x7fELF")
    with pytest.raises(IntegrityError, match=r"more\.so is not named in manifest\.json"):
        finish_bundle(bundle, OPTIONS)
    (bundle / "more.so").unlink()
    document = json.loads((bundle / "manifest.json").read_text())
    document["files"]["model.onnx"]["sha256"] = "0" * 64  # a manifest of another bundle
    (bundle / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match=r"model\.onnx is not the file that was sealed"):
        finish_bundle(bundle, OPTIONS)


def test_what_is_no_bundle_for_a_device_is_refused(bundle, tmp_path):
    with pytest.raises(UsageError, match="absent does not exist"):
        finish_bundle(tmp_path / "absent", OPTIONS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty is not a bundle: it has no manifest"):
        finish_bundle(tmp_path / "empty", OPTIONS)
    (bundle / "device.json").unlink()
    reseal(bundle)
    with pytest.raises(UsageError, match="was made for no device") as refused:
        finish_bundle(bundle, OPTIONS)
    assert "--target orin-jp6" in refused.value.remedy
    (bundle / "model.onnx").rename(bundle / "model.onnx.rejected")
    reseal(bundle)
    with pytest.raises(ParityError, match=r"model\.onnx\.rejected failed parity"):
        finish_bundle(bundle, OPTIONS)


def reseal(folder):
    from scconv_deploy.bundle.manifest import manifest_bytes

    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_bytes(manifest_bytes(folder, {}))


def test_a_missing_library_or_gpu_is_exit_3_before_anything_is_built(bundle, monkeypatch):
    with pytest.raises(MissingRuntimeError, match="TensorRT is not installed") as refused:
        finish_bundle(bundle, OPTIONS)
    assert "apt install tensorrt" in refused.value.remedy
    from tests.exporters.tensorrt.engines import recorded

    monkeypatch.setattr(tensorrt_versions, "gpus", lambda: ())
    with pytest.raises(MissingRuntimeError, match="TensorRT needs a GPU here"):
        finish_bundle(bundle, OPTIONS, device=Device(load=lambda backend: recorded("tensorrt-10.3")))
    assert not (bundle / "device").exists()


ORIN = (Gpu("Orin", "8.7"),)


def test_the_plugin_is_built_from_the_bundles_sources_for_this_gpu(bundle, machine, monkeypatch):  # noqa: F811
    monkeypatch.setattr(finish, "gpus", lambda: ORIN)
    plan = finish.read_device_plan(bundle)
    log = finish.StageLog()
    device = Device(machine=machine)
    options = FinishOptions()
    path = finish._build_plugin(bundle, bundle, plan, options, device, log, lambda _: None)
    assert path == bundle / "libscconv_sru.so"
    (command,) = (machine.root / "cuda" / "bin" / "calls").read_text().splitlines()
    assert "arch=compute_87,code=sm_87" in command
    assert str(bundle / "plugin" / "plugin" / "creator.cpp") in command
    assert log.records[0].applied == ("libscconv_sru.so for sm_87, CUDA 13.0.88",)


def test_without_nvcc_or_headers_the_remedy_names_both_ways_out(bundle, machine, monkeypatch):  # noqa: F811
    monkeypatch.setattr(finish, "gpus", lambda: ORIN)
    plan, options = finish.read_device_plan(bundle), FinishOptions()

    def attempt(found):
        return finish._build_plugin(
            bundle, bundle, plan, options, Device(machine=found), finish.StageLog(), lambda _: None
        )

    (machine.root / "usr" / "include" / "NvInfer.h").unlink()
    with pytest.raises(MissingRuntimeError, match="headers") as refused:
        attempt(machine)
    assert "apt install libnvinfer-headers-dev" in refused.value.remedy
    assert refused.value.remedy.endswith("or build without it: --no-plugin.")
    bare = Machine(run=lambda command: None, which=lambda name: None, environ={}, root=bundle, site_packages=())
    with pytest.raises(MissingRuntimeError, match="nvcc was not found") as refused:
        attempt(bare)
    assert refused.value.remedy.endswith("or build without it: --no-plugin.")


@needs_rtx
def test_another_device_than_the_bundles_is_said(bundle, rtx, monkeypatch, machine):  # noqa: F811
    (machine.root / "etc").mkdir()
    release = machine.root / "etc" / "nv_tegra_release"
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 1")
    monkeypatch.setattr(finish, "gpus", lambda: ORIN)
    device = InOnnxRuntime().device(machine=machine)
    result = finish_bundle(bundle, OPTIONS, device=device)
    assert result.notes == ()
    assert result.report.provenance["jetson_linux"] == "36.4"
    release.write_text("# R39 (release), REVISION: 2.0")  # JetPack 7 on an Orin: not what the bundle was made for
    again = FinishOptions(plugin=False, rounds=5, warmup=1, force=True)
    (note,) = finish_bundle(bundle, again, device=device).notes
    assert note.startswith("the bundle was made for orin-jp6, thor-jp7; this is another device: compute capability 87")
    assert load_report(bundle / "device").provenance["notes"] == note


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes")
def test_a_read_only_folder_is_exit_2_before_anything_is_built(bundle):
    bundle.chmod(0o555)
    try:
        with pytest.raises(UsageError, match="cannot be written"):
            finish_bundle(bundle, OPTIONS)
    finally:
        bundle.chmod(0o755)


def test_a_folder_that_takes_no_file_is_exit_2(bundle, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("scconv_deploy.system.atomic.tempfile.TemporaryFile", refused)
    with pytest.raises(UsageError, match=r"device cannot be written: Permission denied"):
        finish_bundle(bundle, OPTIONS)


@needs_rtx
def test_an_interrupt_leaves_nothing(bundle, rtx):
    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finish_bundle(bundle, OPTIONS, device=InOnnxRuntime().device(judge=interrupted))
    assert check_bundle(bundle)
    assert not (bundle / "device").exists()
    assert not list(bundle.glob(".scconv*"))


@needs_rtx
def test_a_signal_in_the_middle_leaves_nothing(bundle, rtx, tmp_path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from scconv_deploy.bundle.device import command_line, finish\n"
        "from tests.finished import InOnnxRuntime\n"
        "def judge(*_):\n"
        "    Path('reached').touch()\n"
        "    time.sleep(60)\n"
        "finish.Device = lambda: InOnnxRuntime().device(judge=judge)\n"
        "command_line.main([sys.argv[1], '--no-plugin'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(bundle)], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env=dict(os.environ) | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    deadline = time.time() + 120
    while not (tmp_path / "reached").exists() and time.time() < deadline:
        time.sleep(0.05)
    assert list(bundle.glob(".scconv*"))  # it is in the middle
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said.strip().endswith("finish.pyz: Interrupted by SIGTERM. No half-written file is left.")
    assert check_bundle(bundle)
    assert not (bundle / "device").exists()
    assert not list(bundle.glob(".scconv*"))


@needs_rtx
def test_the_command_line_prints_what_finish_pyz_prints(bundle, rtx, monkeypatch, capsys):
    monkeypatch.setattr(finish, "Device", InOnnxRuntime().device)
    done = CliRunner().invoke(cli.app, ["finish", str(bundle), "--no-plugin", "--rounds", "3", "--warmup", "0"])
    assert done.exit_code == 0, done.output
    assert "parity       passed" in done.stdout
    assert f"digest       {bundle_digest(bundle / 'device')}" in done.stdout
    again = ["finish", str(bundle), "--no-plugin", "--rounds", "3", "--force", "--json"]
    document = json.loads(CliRunner().invoke(cli.app, again).stdout)
    assert document["report"]["verdict"] == "passed"

    assert command_line.run([str(bundle), "--no-plugin", "--rounds", "3", "--force"]) == 0
    said = capsys.readouterr().out
    assert "parity       passed" in said
    monkeypatch.setattr(finish, "Device", InOnnxRuntime(wrong=1.5).device)
    assert command_line.run([str(bundle), "--no-plugin", "--rounds", "3", "--force"]) == 6
    assert "model.tensorrt-rtx.engine.rejected: " in capsys.readouterr().err


@needs_rtx
def test_device_does_not_hide_changes_of_the_bundle_and_force_replaces_it(bundle, rtx):
    finish_bundle(bundle, OPTIONS, device=InOnnxRuntime().device())
    check_output_folder(bundle, force=True)  # a bundle with its device/ may be replaced
    (bundle / "device" / "report.json").write_text("{}")
    assert differing_files(bundle, read_manifest(bundle)) == ()  # judged by its own manifest, in merge and finish
    with pytest.raises(IntegrityError, match=r"report\.json is not the file"):
        check_bundle(bundle / "device")
    shutil.rmtree(bundle / "device")
    (bundle / "device").mkdir()
    (bundle / "device" / "engine.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"holds more than the bundle: device/engine\.bin"):
        check_output_folder(bundle, force=True)


@pytest.mark.skipif(bool(gpu.gpus()), reason="this machine has a GPU")
def test_finish_without_a_device_is_one_line(bundle):
    done = CliRunner().invoke(cli.app, ["finish", str(bundle)])
    assert done.exit_code == 3
    assert done.stderr.startswith("scconv-deploy: TensorRT is not installed. pip install tensorrt")
