"""The fused SRU for CPUs in deploy, verify and bench: which library is taken, shipped, judged, timed and refused."""

from __future__ import annotations

import json

import pytest
import torch

import scconv_deploy
from scconv_deploy.bundle import contents
from scconv_deploy.bundle.manifest import check_bundle, read_manifest
from scconv_deploy.errors import BuildError, IntegrityError, MissingRuntimeError, UsageError
from scconv_deploy.trt_plugins.cpu.build import CPU_LIBRARY, CpuBuild
from scconv_deploy.verification.onnx.fused import FUSED_LINK
from scconv_deploy.verification.options import Checks
from scconv_deploy.workflows import fused_cpu
from scconv_deploy.workflows.bench import bench_artifacts
from scconv_deploy.workflows.bench_options import BenchOptions
from scconv_deploy.workflows.subject import Bundle
from scconv_deploy.workflows.verify import verify_subject
from tests.conftest import tiny_net
from tests.exporters.tensorrt.engines import elf_library


@pytest.fixture
def built(monkeypatch, cpu_path):
    """What a compiler would give: the library of this run."""
    monkeypatch.setattr(fused_cpu, "build_cpu", lambda: CpuBuild(cpu_path, "g++", True, 0.0, ""))
    return cpu_path


def without_compiler(*_):
    raise MissingRuntimeError("No C++ compiler was found (CXX, g++, clang++).", "apt install g++, or name one in CXX.")


def deployed(folder, **how):
    return scconv_deploy.deploy(tiny_net(), torch.randn(2, 3, 16, 16), folder, **how)


@pytest.fixture(scope="module")
def bundle(cpu_path, tmp_path_factory):
    """(result, folder) of ``deploy --plugin-cpu FILE``."""
    folder = tmp_path_factory.mktemp("fused") / "out"
    return deployed(folder, plugin_cpu=str(cpu_path)), folder


def test_deploy_judges_the_library_and_ships_it(bundle, cpu_path):
    result, folder = bundle
    assert result, result.report.failures
    assert next(link.status for link in result.report.links if link.name == FUSED_LINK) == "passed"
    assert (folder / CPU_LIBRARY).read_bytes() == cpu_path.read_bytes()
    assert {path.name for path in folder.iterdir()} == {*contents.ALWAYS, *contents.WITH_CPU_PLUGIN}
    assert CPU_LIBRARY in read_manifest(folder)["files"]
    assert check_bundle(folder)


def test_verify_judges_the_bundles_own_library(bundle, monkeypatch):
    monkeypatch.setattr(fused_cpu, "build_cpu", without_compiler)
    report = verify_subject(Bundle(bundle[1]), Bundle(bundle[1]), Checks(provider="cpu+fused"))
    assert report, report.failures
    (link,) = (link for link in report.links if link.name == FUSED_LINK)
    passed = {check.name for check in link.checks if check.status == "passed"}
    assert {"teacher-forced gates", "gates inside", "end to end"} <= passed


def test_a_bundles_library_that_was_changed_is_not_loaded(bundle, tmp_path):
    from tests.finished import copied

    folder = copied(bundle[1], tmp_path)
    (folder / CPU_LIBRARY).write_bytes(b"changed")
    with pytest.raises(IntegrityError, match="is not loaded"):
        verify_subject(Bundle(folder), Bundle(folder), Checks(provider="CPU+fused"))


def test_bench_shows_it_without_and_with_the_library(bundle):
    result = bench_artifacts([str(bundle[1])], BenchOptions(rounds=3, warmup=0, provider="cpu+fused", threads=1))
    assert [row.name.removeprefix(str(bundle[1])) for row in result.rows] == [
        " (ONNX Runtime)", " (ONNX Runtime, fused SRU)"
    ]  # fmt: skip
    assert json.dumps(result.as_json())
    with pytest.raises(UsageError, match="--provider belongs to ONNX files"):
        bench_artifacts(["resnet20"], BenchOptions(provider="cpu+fused"))


def test_auto_compiles_it_or_says_that_it_cannot(built, monkeypatch):
    assert fused_cpu.chosen("auto") == (built, "")
    monkeypatch.setattr(fused_cpu, "build_cpu", without_compiler)
    library, note = fused_cpu.chosen("auto")
    assert library is None
    assert note.startswith("the fused SRU for CPUs is left out, its function runs: No C++ compiler was found")
    assert "\n" not in note
    with pytest.raises(MissingRuntimeError):  # a provider that was asked for by name
        fused_cpu.with_operators(Checks(provider="cpu+fused"))


def test_a_compiler_that_fails_is_an_error(monkeypatch):
    def fails():
        raise BuildError("g++ could not build it.", "Look.")

    monkeypatch.setattr(fused_cpu, "build_cpu", fails)
    with pytest.raises(BuildError):
        fused_cpu.chosen("auto")


def test_without_it_nothing_changes(built):
    assert fused_cpu.chosen("") == (None, "")
    checks = Checks()
    assert fused_cpu.with_operators(checks) is checks
    assert fused_cpu.with_operators(Checks(provider="cpu+fused")).operators == built


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        fused_cpu.chosen(str(tmp_path / "none.so"))
    (tmp_path / "lib.so").write_bytes(b"text")
    with pytest.raises(IntegrityError):
        fused_cpu.chosen(str(tmp_path / "lib.so"))
    (tmp_path / "lib.so").write_bytes(elf_library())
    with pytest.raises(UsageError, match="is no library for CPUs"):
        fused_cpu.chosen(str(tmp_path / "lib.so"))


def test_a_library_of_another_processor_is_refused(cpu_path, tmp_path):
    content = bytearray(cpu_path.read_bytes())
    content[18:20] = (183).to_bytes(2, "little")  # e_machine: AArch64
    (tmp_path / "lib.so").write_bytes(bytes(content))
    with pytest.raises(UsageError, match="is for aarch64, this machine is"):
        fused_cpu.chosen(str(tmp_path / "lib.so"))
