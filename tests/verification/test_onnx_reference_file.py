"""An ONNX file against another."""

from __future__ import annotations

import onnx
import pytest

from scconv_deploy.errors import UsageError
from scconv_deploy.verification.onnx_reference_file import verify_against_onnx
from tests.verification.judging import damage_weight, edit_body


@pytest.fixture
def files(tiny_bytes, tmp_path):
    for name in ("reference.onnx", "artifact.onnx"):
        (tmp_path / name).write_bytes(tiny_bytes[0])
    return tmp_path / "artifact.onnx", tmp_path / "reference.onnx"


def damaged(path, damage):
    model = onnx.load(path)
    damage(model)
    onnx.save(model, path)


def test_equal_files_pass(files):
    report = verify_against_onnx(*files)
    assert report, report.failures
    assert report.links[0].status == "not run"
    assert [sru.free_running.flips for sru in report.srus] == [0] * 4
    assert [sru.teacher_forced.gates for sru in report.srus] == [(2 + 67) * 16 * 8 * 8] * 4  # batches of 2 and 67
    assert all(output.floor_measured for output in report.outputs)
    assert all(2**-24 <= output.noise_floor < 1e-6 for output in report.outputs)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: damage_weight(m, 1e-3), "replay error"),
        (lambda m: edit_body(m, "GreaterOrEqual (", "Less ("), "unexplained"),
    ],
)
def test_damage_is_caught(files, damage, words):
    damaged(files[0], damage)
    report = verify_against_onnx(*files)
    assert not report
    assert words in " ".join(report.failures)


def test_a_missing_reference(files, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        verify_against_onnx(files[0], tmp_path / "none.onnx")


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_file_is_the_users(files, missing):
    files[missing].unlink()
    with pytest.raises(UsageError, match=f"{files[missing].name} does not exist"):
        verify_against_onnx(*files)
