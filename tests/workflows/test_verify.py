"""The reference that travels: a bundle is judged without a model and without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from scconv_deploy.bundle.manifest import MANIFEST, differing_files, manifest_bytes, read_manifest
from scconv_deploy.bundle.reference import LARGEST_BYTES, read_reference, write_reference
from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.gate.margins import margins
from scconv_deploy.graph import instrument
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.samples import noise_samples
from tests.verified import verify_bundle

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # any import of it fails
from scconv_deploy.cli import app
app(sys.argv[1:])
"""


def seal(folder):
    (folder / MANIFEST).write_bytes(manifest_bytes(folder, {}))


def make_bundle(folder, reference, content, largest_bytes=LARGEST_BYTES):
    folder.mkdir()
    (folder / "model.onnx").write_bytes(content)
    samples = noise_samples(reference.signature, 0)[1::-1]
    nodes = instrument.sites(onnx.load_model_from_string(content))
    source = TorchReference(reference)
    write_reference(folder, source, map(source.run, samples), nodes, largest_bytes)
    seal(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tiny_reference, tiny_bytes, tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("recorded") / "out", tiny_reference[0], tiny_bytes[0])


@pytest.fixture
def copied(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "out")


def without_torch(*arguments):
    return subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)], capture_output=True, text=True)


def test_what_is_recorded_is_what_pytorch_computed(bundle, tiny_reference):
    source = read_reference(bundle)
    expected = TorchReference(tiny_reference[0])
    samples = noise_samples(tiny_reference[0].signature, 0)[1::-1]
    assert (source.name, list(source.samples)) == (expected.name, [0, 1])
    for number, sample in enumerate(samples):
        found, wanted = source.run(number), expected.run(sample)
        for arrays, others in (
            (found.inputs, wanted.inputs),
            (found.given, wanted.given),
            (found.outputs, wanted.outputs),
        ):
            assert list(arrays) == list(others)
            for name, array in arrays.items():
                np.testing.assert_array_equal(array, others[name])
        assert found.floors == wanted.floors
        assert list(found.sites) == list(wanted.sites)
        for name, site in found.sites.items():
            np.testing.assert_array_equal(site.mask, wanted.sites[name].mask)
            assert (site.x is None) == (number > 0)  # the inputs of one sample
            if site.x is not None:
                np.testing.assert_array_equal(site.x, wanted.sites[name].x)
            assert site.site.attributes == wanted.sites[name].site.attributes


def test_margins_are_in_units_of_the_bound(bundle):
    run = read_reference(bundle).run(0)
    stored = np.load(bundle / "reference" / "sample-0.npz")
    for index, site in enumerate(run.sites.values()):
        found = margins(site.x, site.site.form)
        expected = np.clip(found.margin / found.bound, -6e4, 6e4)
        np.testing.assert_allclose(stored[f"margin:{index}"], expected, rtol=1e-3)
        opened = stored[f"margin:{index}"] >= 0
        assert np.all((opened == site.mask) | (np.abs(stored[f"margin:{index}"]) <= 1))


def test_the_seal_covers_the_reference(bundle):
    manifest = read_manifest(bundle)
    assert {"reference/reference.json", "reference/sample-0.npz", "reference/sites.npz"} <= set(manifest["files"])
    assert differing_files(bundle, manifest) == ()


def test_equal_references_give_equal_bytes(bundle, tiny_reference, tiny_bytes, tmp_path):
    again = make_bundle(tmp_path / "again", tiny_reference[0], tiny_bytes[0])
    for path in (bundle / "reference").iterdir():
        assert path.read_bytes() == (again / "reference" / path.name).read_bytes()


def test_size_is_capped(tiny_reference, tiny_bytes, bundle, tmp_path):
    whole = sum(path.stat().st_size for path in (bundle / "reference").iterdir())
    cap = whole // 3
    small = make_bundle(tmp_path / "small", tiny_reference[0], tiny_bytes[0], cap)
    source = read_reference(small)
    kept = [site.x is not None for site in source.run(0).sites.values()]
    assert any(kept)
    assert not all(kept)
    arrays = np.load(small / "reference" / "sample-0.npz")
    assert sum(arrays[name].nbytes for name in arrays.files) <= cap
    report = verify_bundle(small)
    assert report, report.failures
    assert [sru.teacher_forced is not None for sru in report.srus] == kept


def test_verify_needs_neither_torch_nor_the_model(bundle):
    result = without_torch("verify", bundle, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["verdict"] == "passed"
    links = {link["name"]: link["status"] for link in report["links"]}
    assert links["PyTorch with SRUs swapped"] == "not run"
    assert links["onnxruntime"] == "passed"
    checks = {check["name"]: check["status"] for check in report["links"][1]["checks"]}
    for name in ("static", "teacher-forced gates", "free-running gates", "replay", "layers"):
        assert checks[name] == "passed", name
    assert [sru["teacher_forced"]["gates"] for sru in report["srus"]] == [16 * 8 * 8] * 4


def test_a_damaged_model_fails_without_torch(copied):
    model = onnx.load(copied / "model.onnx")
    bias = next(t for t in model.graph.initializer if t.name == "head.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(1e-3), bias.name))
    onnx.save(model, copied / "model.onnx")
    result = without_torch("verify", copied)
    assert result.returncode == 6
    assert "logits: replay error" in result.stderr
    seal(copied)  # a seal over it helps nothing
    assert not verify_bundle(copied)


def test_a_reference_that_is_not_the_sealed_one_judges_nothing(copied):
    path = copied / "reference" / "sample-0.npz"
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"sample-0\.npz is not the file that was sealed"):
        verify_bundle(copied)


@pytest.mark.parametrize("content", [b"", b"text", b"{}"])
@pytest.mark.parametrize("name", ["reference.json", "sample-0.npz", "sites.npz"])
def test_damage_under_a_good_seal_is_named(copied, name, content):
    (copied / "reference" / name).write_bytes(content)
    seal(copied)
    with pytest.raises(IntegrityError, match="is damaged"):
        verify_bundle(copied)


def test_a_bundle_without_a_reference(copied):
    shutil.rmtree(copied / "reference")
    seal(copied)
    with pytest.raises(UsageError, match=r"no reference/reference\.json.*--reference"):
        verify_bundle(copied)


def test_what_a_bundle_alone_cannot_judge_is_said(copied):
    """A bit of a weight: no sample shows it, and without PyTorch nobody compares it, so the seal must be heard."""
    before = verify_bundle(copied)
    assert before
    assert any("holds no weights" in caveat for caveat in before.caveats)
    assert not any("manifest" in caveat for caveat in before.caveats)
    model = onnx.load(copied / "model.onnx")
    tensor = next(t for t in model.graph.initializer if t.name == "stem.weight")
    weight = numpy_helper.to_array(tensor).copy()
    weight.view(np.uint32).flat[5] ^= 1
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    onnx.save(model, copied / "model.onnx")
    report = verify_bundle(copied)
    assert report, report.failures
    assert any("files that differ from the manifest: model.onnx" in caveat for caveat in report.caveats)


def test_srus_whose_inputs_were_not_kept_are_counted(tiny_reference, tiny_bytes, tmp_path):
    some = make_bundle(tmp_path / "some", tiny_reference[0], tiny_bytes[0], largest_bytes=22_000)
    none = make_bundle(tmp_path / "none", tiny_reference[0], tiny_bytes[0], largest_bytes=1)
    found = {}
    for folder in (some, none):
        links = verify_bundle(folder).links
        (found[folder],) = (c for link in links for c in link.checks if c.name == "teacher-forced gates")
    assert found[some].status == "passed"
    assert " of 4 SRUs: the reference kept no input of the others" in found[some].reason
    assert (found[none].status, found[none].reason) == ("not run", "the reference kept no input of an SRU")
