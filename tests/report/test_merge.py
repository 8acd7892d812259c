"""The device's report brought home, and every way in which it is another's."""

from __future__ import annotations

import json
import shutil
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from scconv_deploy.bundle.device.finish import FinishOptions, finish_bundle
from scconv_deploy.bundle.manifest import bundle_digest, manifest_bytes
from scconv_deploy.cli import app
from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.report.load import load_report
from scconv_deploy.report.merge import merge_files
from tests.finished import InOnnxRuntime, copied

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
pytestmark = pytest.mark.tensorrt
OPTIONS = FinishOptions(plugin=False, rounds=5, warmup=1)


@pytest.fixture(scope="module")
def finished(device_bundle, tmp_path_factory):
    """A bundle with its device/; copy it before changing it."""
    bundle = copied(device_bundle, tmp_path_factory.mktemp("finished"))
    finish_bundle(bundle, OPTIONS, command="finish", device=InOnnxRuntime().device())
    return bundle


@pytest.fixture
def bundle(finished, tmp_path):
    return copied(finished, tmp_path)


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_links_are_the_first_ones_with_the_devices_engine(finished):
    first, device = load_report(finished), load_report(finished / "device")
    merged = merge_files(finished)
    assert [link.name for link in first.links][-1] == "engine"
    assert merged.links == (*first.links[:-1], *device.links)
    assert merged.links[-1].name == "tensorrt-rtx"
    assert (merged.artifact, merged.srus, merged.outputs) == (first.artifact, first.srus, first.outputs)
    (engine,) = merged.engines
    assert engine.latency == device.engines[0].latency
    assert engine.srus[0].teacher_forced.gates == 512
    assert engine.provenance == device.provenance
    assert engine.provenance["bundle"] == bundle_digest(finished)
    assert merged.provenance == first.provenance
    assert [s.name for s in merged.stages[-4:]] == [
        "device: plugin", "device: build", "device: verify tensorrt-rtx", "device: latency"
    ]  # fmt: skip
    assert merged


def test_merged_reports_can_be_required_judged_and_read_in_every_format(finished, tmp_path):
    bundle, out = finished, tmp_path / "merged.json"
    assert run("merge", bundle, "-o", out).exit_code == 0
    assert load_report(out) == merge_files(bundle)
    assert run("check", out, "--require", "onnxruntime,tensorrt-rtx").exit_code == 0
    lacking = run("check", out, "--require", "onnxruntime,tensorrt")
    assert lacking.exit_code == 6
    assert "tensorrt is required and not run" in lacking.stderr
    before = run("check", bundle, "--require", "tensorrt-rtx")
    assert before.exit_code == 6
    assert "left for the device" in before.stderr
    again = run("check", out, "--tolerance", "engine_multiple=0")
    assert again.exit_code == 6
    assert "tensorrt-rtx: " in again.stderr
    text = run("merge", bundle).stdout
    assert "engine latency: p50 " in text
    assert "engine gates: 1 of 1 SRUs compared alone, same input, gates changed: 0 of 512 (0 unexplained)" in text
    assert "engine latency" in run("merge", bundle, "--format", "markdown").stdout
    assert "engine latency" in run("merge", bundle, "--format", "html").stdout
    suites = ElementTree.fromstring(run("merge", bundle, "--format", "junit").stdout)
    suite = next(s for s in suites if s.get("name") == "tensorrt-rtx")
    properties = {p.get("name"): p.get("value") for p in suite.iter("property")}
    assert properties["engine latency"].startswith("p50 ")
    assert properties["engine bundle"] == bundle_digest(bundle)
    assert (suite.get("failures"), int(suite.get("tests")) > 1) == ("0", True)
    other = next(s for s in suites if s.get("name") == "onnxruntime")
    assert "engine latency" not in {p.get("name") for p in other.iter("property")}
    document = json.loads(run("merge", bundle, "--format", "json").stdout)
    assert document["engines"][0]["latency"]["rounds"] == 5


def test_a_device_folder_that_was_copied_home_by_itself(finished, device_bundle, tmp_path):
    home = copied(device_bundle, tmp_path)
    device = shutil.copytree(finished / "device", tmp_path / "from-orin")
    assert merge_files(home, device) == merge_files(finished)
    assert merge_files(home / "report.json", device / "report.json") == merge_files(finished)
    assert run("merge", home, device, "-o", tmp_path / "m.md").exit_code == 0
    assert (tmp_path / "m.md").read_text().startswith("### Parity passed")


def test_the_report_of_another_bundle_is_refused(finished, bundle, tmp_path):
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"command": "another"}))
    with pytest.raises(IntegrityError, match=f"was made from the bundle {bundle_digest(finished)[:12]}"):
        merge_files(bundle)
    assert run("merge", bundle).exit_code == 7
    assert run("merge", bundle, "-o", tmp_path / "m.json").exit_code == 7
    assert not (tmp_path / "m.json").exists()
    (bundle / "device" / "manifest.json").write_bytes(manifest_bytes(bundle / "device", {}))  # names none
    with pytest.raises(IntegrityError, match=r"device names no bundle that it finished"):
        merge_files(bundle)


@pytest.mark.parametrize("name", ["report.json", "model.tensorrt-rtx.engine", "model.tensorrt-rtx.engine.json"])
def test_what_changed_on_the_way_is_refused(bundle, name):
    path = bundle / "device" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=rf"{name} is not the (file|report)"):
        merge_files(bundle)


def test_the_first_report_must_be_the_sealed_one(bundle):
    (bundle / "report.json").write_bytes((bundle / "report.json").read_bytes() + b"\n")
    with pytest.raises(IntegrityError, match=r"report\.json is not the report that the bundle was sealed with"):
        merge_files(bundle)


def test_what_is_missing_is_named(device_bundle, finished, tmp_path):
    with pytest.raises(UsageError, match="was not finished on a device") as refused:
        merge_files(device_bundle)
    assert "finish.pyz" in refused.value.remedy
    with pytest.raises(UsageError, match=r"absent does not exist"):
        merge_files(tmp_path / "absent")
    shutil.copy(finished / "device" / "report.json", tmp_path / "report.json")
    with pytest.raises(UsageError, match=r"lies beside no manifest\.json"):
        merge_files(device_bundle, tmp_path / "report.json")
    with pytest.raises(UsageError, match=r"lies beside no manifest\.json"):
        merge_files(finished / "model.onnx")


def test_a_failed_engine_fails_the_merged_report(device_bundle, tmp_path):
    bundle = copied(device_bundle, tmp_path)
    finish_bundle(bundle, OPTIONS, device=InOnnxRuntime(wrong=1.5).device())
    merged = merge_files(bundle)
    assert isinstance(merged, ParityReport)
    assert not merged
    assert any(failure.startswith("tensorrt-rtx: output: relative L2 ") for failure in merged.failures)
    assert run("merge", bundle).exit_code == 0  # merging is not judging
    assert run("merge", bundle, "-o", tmp_path / "m.json").exit_code == 0
    assert run("check", tmp_path / "m.json").exit_code == 6
