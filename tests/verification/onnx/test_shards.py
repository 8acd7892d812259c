"""Samples that run free in other processes give the bytes that one process gives."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import pickle
import shutil
import sys
from dataclasses import replace

import cloudpickle
import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from scconv_deploy.errors import IntegrityError, ScconvDeployError
from scconv_deploy.records.stage import StageLog
from scconv_deploy.verification.checks.contract import Finite
from scconv_deploy.verification.metrics import MetricsTally, compare
from scconv_deploy.verification.onnx.parity import Artifact, verify_onnx
from scconv_deploy.verification.onnx.shards import _packed, most_parts
from scconv_deploy.verification.options import Checks
from scconv_deploy.verification.reference.run import ReferenceRun
from scconv_deploy.workers.local import LocalWorkers
from tests.workers.here import Here

ROWS, DEEP = 23, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """23 labelled rows for TinyNet: an .npz, one of which is not finite, and a folder of images of three classes."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    images = generator.standard_normal((ROWS, 3, 16, 16)).astype(np.float32)
    images[17, 0, 3, 3] = np.inf
    np.savez(folder / "rows.npz", image=images, labels=generator.integers(0, 5, ROWS))
    for index in range(ROWS):
        place = folder / "images" / "abc"[index % 3] / f"{index:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(place)
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As many threads as the processes that shards run in; shards of a row."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scconv_deploy.verification.onnx.shards.ROWS_PER_PART", 1)
        yield
    torch.set_num_threads(threads)


def judged(reference, artifact, source, workers=None, deep=DEEP):
    """The report of an artifact on data, as JSON values without seconds."""
    checks = Checks(str(source), deep=deep, workers=workers)
    here, shards = checks.shared_out(checks.samples(reference, 0), print)
    assert (shards is not None) == (workers is not None)
    samples = [*here[0][:1], *(sample for source in here[1:] for sample in source)]  # one of noise is enough
    report = verify_onnx(reference, artifact, samples, StageLog(), judging=checks.judging, shards=shards).as_json()
    for stage in report["stages"]:
        del stage["seconds"]
    return report


@pytest.fixture(scope="module")
def tiny(tiny_reference, tiny_bytes):
    """(reference, artifact): TinyNet in float32 with a moved cut, so that gates change and answers differ."""
    model = onnx.load_model_from_string(tiny_bytes[0])
    for tensor in model.graph.initializer:
        if tensor.name.endswith("cut"):
            value = onnx.numpy_helper.to_array(tensor) + np.float32(1e-3)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    data = model.SerializeToString()
    return tiny_reference[0], Artifact(model, "model.onnx", data)


@pytest.fixture(scope="module")
def in_one_process(tiny, data):
    """The report made in this process, by the name of the data and the rows judged in full."""
    return functools.cache(lambda source, deep=DEEP: judged(*tiny, data / source, deep=deep))


@pytest.mark.parametrize(
    ("source", "jobs", "deep"), [("rows.npz", 1, DEEP), ("rows.npz", 5, DEEP), ("images", 3, 0), ("images", 5, 5)]
)
def test_the_report_is_the_same_however_the_data_are_split(tiny, data, in_one_process, source, jobs, deep):
    workers = Here(jobs, elsewhere=source == "images")
    expected = in_one_process(source, deep)
    assert judged(*tiny, data / source, workers, deep) == expected
    assert len(workers.ran) == min(2 * jobs, (ROWS - deep + 1) // 2)
    flips = [sru["free_running"]["flips"] for sru in expected["srus"]]
    assert sum(flips) > 0
    assert expected["accuracy"]["samples"] == ROWS
    assert ("NaN or Inf" in json.dumps(expected)) == (source == "rows.npz")


def test_a_half_artifact_and_the_model_it_was_made_from_are_the_same_too(tiny_reference, tiny_fp16, data):
    float32, half, _ = tiny_fp16
    artifact = Artifact(half, "model.onnx", half.SerializeToString(), float32_model=float32)
    expected = judged(tiny_reference[0], artifact, data / "rows.npz", deep=0)
    assert judged(tiny_reference[0], artifact, data / "rows.npz", Here(2), deep=0) == expected


def test_processes_of_this_machine_give_it_too(tiny, data, in_one_process):
    workers = LocalWorkers(2, ["scconv_deploy.verification.onnx.shards"])
    assert judged(*tiny, data / "rows.npz", workers) == in_one_process("rows.npz")


def test_shards_for_other_machines_bring_their_images(tiny, data, in_one_process, tmp_path):
    shutil.copytree(data / "images", tmp_path / "images")

    class Away(Here):
        def run(self, tasks, tell):
            shutil.rmtree(tmp_path / "images")
            yield from super().run(tasks, tell)

    assert judged(*tiny, tmp_path / "images", Away(2, elsewhere=True), deep=5) == in_one_process("images", 5)


def test_a_damaged_image_fails_as_in_this_process(tiny, data, tmp_path):
    shutil.copytree(data / "images", tmp_path / "images")
    (tmp_path / "images" / "c" / "20.png").write_bytes(b"no image")
    with pytest.raises(ScconvDeployError, match=r"20.png is damaged or not an image. Remove it") as caught:
        judged(*tiny, tmp_path / "images", Here(2), deep=0)
    assert caught.value.exit_code == IntegrityError.exit_code


def test_a_module_of_two_names_is_sent_once(monkeypatch):
    module = sys.modules[Here.__module__]
    monkeypatch.setitem(sys.modules, "another_name", module)
    workers = pickle.loads(_packed(Here(2)))  # noqa: S301  (made in the same line)
    assert workers.jobs == 2
    assert not cloudpickle.list_registry_pickle_by_value()


@pytest.mark.parametrize(("rows", "jobs", "parts"), [(0, 4, 1), (100, 4, 1), (200, 4, 3), (2000, 4, 8)])
def test_shards_are_not_too_small(monkeypatch, rows, jobs, parts):
    monkeypatch.setattr("scconv_deploy.verification.onnx.shards.ROWS_PER_PART", 64)
    assert most_parts(rows, jobs) == parts


def test_data_that_can_only_be_read_from_their_start_stay_in_this_process(tiny, data, tmp_path):
    loader = tmp_path / "batches.py"
    loader.write_text(
        f"import numpy as np\n\ndef rows():\n    a = np.load({str(data / 'rows.npz')!r})\n"
        "    yield a['image'], a['labels']\n"
    )
    checks = Checks(f"{loader}:rows", deep=DEEP, workers=Here())
    here, shards = checks.shared_out(checks.samples(tiny[0], 0), print)
    assert shards is None
    assert sum(sample.count for sample in here[-1]) == ROWS


def test_agreements_do_not_depend_on_how_batches_are_split():
    generator = np.random.default_rng(1)
    y, expected = (generator.standard_normal((7, 6)).astype(np.float32) for _ in range(2))
    found = []
    for borders in ([0, 7], [0, 1, 4, 7], [0, 3, 6, 7]):
        tally = MetricsTally()
        for start, stop in itertools.pairwise(borders):
            part = MetricsTally()
            part.add("y", compare(y[start:stop], expected[start:stop]), stop - start)
            tally.merge(copy.deepcopy(part))
        found.append(tally.metrics["y"])
    assert [m.top1_agreement for m in found] == [np.mean(y.argmax(1) == expected.argmax(1))] * 3
    assert len({m.top5_agreement for m in found}) == 1


@pytest.mark.parametrize("borders", [[0, 20], [0, 3, 20], [0, 9, 12, 20]])
def test_what_is_not_finite_is_named_as_in_one_process(borders):
    runs = [ReferenceRun(f"d {i}", {}, {}, {}, {}, {}, {}, kind="d") for i in range(20)]
    whole, merged = Finite(), Finite()
    for run in runs:
        whole.note("y", run)
    for start, stop in itertools.pairwise(borders):
        part = Finite()
        for run in runs[start:stop]:
            part.note("y", replace(run))
        merged.merge(part)
    assert list(merged.found.items()) == list(whole.found.items())
