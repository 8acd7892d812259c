"""Real data: labels, loaders, preprocessing, and memory that does not grow with it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.records.stage import StageLog
from scconv_deploy.verification.onnx.parity import Artifact, verify_onnx
from scconv_deploy.verification.preprocessing import Preprocessing
from scconv_deploy.verification.samples import Sample, load_samples, with_progress
from tests.verification.judging import Calls, export_of
from tests.verification.test_samples import PLAIN, RNG, by_pillow, save_image, signature


def loaded(source, signed, preprocessing=PLAIN):
    return list(load_samples(str(source), signed, preprocessing))


# --- labels ------------------------------------------------------------------------------------------------------


def test_labels_of_an_npz_and_of_what_is_filled_up(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.arange(5.0)[:, None], labels=np.array([4, 3, 2, 1, 0], dtype=np.int16))
    samples = loaded(tmp_path / "data.npz", signature(x=(2, 1)))
    assert [s.tensors["x"][:, 0].tolist() for s in samples] == [[0, 1], [2, 3], [4, 0]]
    assert [s.labels.tolist() for s in samples] == [[4, 3], [2, 1], [0, -1]]  # a repeated row is no answer
    assert [s.count for s in samples] == [2, 2, 1]


def test_class_subfolders_are_labels(tmp_path):
    for name in ("cat", "dog", "empty"):
        (tmp_path / name).mkdir()
    images = [save_image(tmp_path / name, size=(6, 6)) for name in ("dog/a.png", "cat/z.png", "cat/y.jpg")]
    (sample,) = loaded(tmp_path, signature(x=(3, 3, 6, 6)))
    assert sample.labels.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(sample.tensors["x"][2].numpy(), by_pillow(images[0], "RGB", 6, 6))


def test_hidden_folders_are_no_classes_and_a_mixture_is_refused(tmp_path):
    for name in (".ipynb_checkpoints", "a", "b"):
        (tmp_path / name).mkdir()
        save_image(tmp_path / name / "0.png", size=(8, 8))
    (sample,) = loaded(tmp_path, signature(x=(2, 3, 8, 8)), PLAIN)
    assert sample.labels.tolist() == [0, 1]
    save_image(tmp_path / "stray.png", size=(8, 8))
    with pytest.raises(UsageError, match=r"holds images \(stray\.png\) and folders of images"):
        loaded(tmp_path, signature(x=(2, 3, 8, 8)), PLAIN)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(2), "labels is float64[2], expected integers [N]"),
        (np.zeros((4, 1), dtype=int), "labels is int64[4, 1]"),
        (np.zeros(3, dtype=int), "x 4, labels 3; expected as many of each"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, labels, words):
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 1)), labels=labels)
    with pytest.raises(UsageError) as caught:
        loaded(tmp_path / "data.npz", signature(x=(2, 1)))
    assert words in str(caught.value)


def test_an_input_may_be_called_labels(tmp_path):
    np.savez(tmp_path / "data.npz", labels=np.arange(4.0))
    samples = loaded(tmp_path / "data.npz", signature(labels=(2,)))
    assert [s.labels for s in samples] == [None, None]


def test_accuracy_of_both_and_worst_inputs(tiny_reference, tiny_bytes, tmp_path):
    reference = tiny_reference[0]
    images = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        answers = reference.model(images)["logits"].argmax(1).numpy()
    labels = answers.copy()
    labels[0] = (labels[0] + 1) % 5  # both are wrong once
    np.savez(tmp_path / "data.npz", image=images.numpy(), labels=labels)
    samples = load_samples(str(tmp_path / "data.npz"), reference.signature, PLAIN)
    model = onnx.load_model_from_string(tiny_bytes[0])
    report = verify_onnx(reference, Artifact(model, "model.onnx", tiny_bytes[0]), samples, StageLog())
    assert report, report.failures
    found = report.accuracy
    assert (found.samples, found.reference, found.artifact, found.difference) == (7, 6 / 7, 6 / 7, 0.0)
    assert found.low < 0 < found.high
    assert found.confidence == 0.95
    assert report.samples == ("data.npz: image 2x3x16x16, 3 batches", "data.npz: image 1x3x16x16")
    assert {w.sample for w in report.worst_inputs} <= {f"data.npz {i}" for i in ("0-1", "2-3", "4-5", "6-6")}
    bias = next(t for t in model.graph.initializer if t.name == "head.bias")
    shifted = onnx.numpy_helper.to_array(bias).copy()
    shifted[2] += 100
    bias.CopyFrom(onnx.numpy_helper.from_array(shifted, bias.name))
    report = verify_onnx(reference, Artifact(model, "model.onnx", b""), samples, StageLog())
    assert report.accuracy.artifact == np.mean(labels == 2)
    assert report.accuracy.difference == report.accuracy.artifact - report.accuracy.reference
    assert report.accuracy.high < 0


@pytest.mark.parametrize("deep", [0, None])
@pytest.mark.parametrize("label", [5, -2, 1000])
def test_a_label_that_no_answer_can_be_right_for_is_refused(tiny_reference, model, tmp_path, label, deep):
    labels = np.array([0, 4, -1, 2, label, 1])
    np.savez(tmp_path / "data.npz", image=np.zeros((6, 3, 16, 16), np.float32), labels=labels)
    samples = load_samples(str(tmp_path / "data.npz"), tiny_reference[0].signature, PLAIN, deep)
    words = rf"Label {label} of row 0 in data\.npz 4-5 is outside 0 to 4: the model has 5 classes\. Number the classes"
    with pytest.raises(UsageError, match=words) as caught:
        verify_onnx(tiny_reference[0], Artifact(model, "model.onnx", b""), samples, StageLog())
    assert caught.value.exit_code == 2


def test_labels_without_logits_are_said(tmp_path):
    torch.manual_seed(0)
    reference, model = export_of(Calls(lambda net, x: net.a(x)).eval())
    np.savez(tmp_path / "data.npz", image=np.ones((2, 3, 10, 10), np.float32), labels=np.array([3, 9]))
    samples = load_samples(str(tmp_path / "data.npz"), reference.signature, PLAIN)
    report = verify_onnx(reference, Artifact(model, "model.onnx", b""), samples, StageLog())
    assert report, report.failures
    assert report.accuracy is None
    reason = (
        "the data have labels, but no output looks like logits (float [N, K], K of at least 2): there is no accuracy"
    )
    assert f"onnxruntime: {reason}" in report.caveats


# --- loaders -----------------------------------------------------------------------------------------------------

LOADERS = """
import numpy as np, torch
rows = np.arange(10.0)[:, None]

def plain():
    yield rows[:3]
    yield torch.from_numpy(rows[3:10])

def labelled():
    for start in (0, 4):
        yield [torch.tensor(rows[start:start + 4]), torch.arange(start, start + 4)]

listed = [{"x": rows[:2]}, {"x": rows[2:4]}]

def named(): yield {"y": rows}
def wide(): yield np.zeros((2, 3))
def labels(): yield rows[:2], np.zeros(2)
def nothing(): return []
def ragged(): yield [[1.0], [2.0, 3.0], [4.0]]
def brain(): yield torch.zeros(2, 1, dtype=torch.bfloat16)
def learnt(): yield torch.from_numpy(rows[:4]).requires_grad_()
def crash():
    yield rows[:2]
    raise RuntimeError("disk on fire")
"""


@pytest.fixture
def loader(tmp_path):
    path = tmp_path / "loaders_of_a_test.py"
    path.write_text(LOADERS)
    return lambda name: f"{path}:{name}"


@pytest.mark.parametrize(
    ("name", "batches", "labels"),
    [
        ("plain", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]], None),
        ("labelled", [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("listed", [[0, 1, 2, 3]], None),
        ("learnt", [[0, 1, 2, 3]], None),
    ],
)
def test_loaders_of_any_batch_are_cut_into_the_models(loader, name, batches, labels):
    stream = load_samples(loader(name), signature(x=(4, 1)), PLAIN)
    assert stream.total is None
    for _ in range(2):  # read again from the start
        samples = list(stream)
        assert [s.tensors["x"][:, 0].tolist() for s in samples] == batches
        assert [s.labels if s.labels is None else s.labels.tolist() for s in samples] == (
            labels or [None] * len(batches)
        )
    assert samples[0].tensors["x"].dtype == torch.float32
    assert samples[0].name == f"loaders_of_a_test.py:{name} 0-3"


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("named", UsageError, "yields y; the inputs are x"),
        ("wide", UsageError, "yields float64[2, 3] for x, expected numbers [N, 1]"),
        ("labels", UsageError, "yields labels float64[2], expected integers [2]"),
        ("nothing", UsageError, "yields nothing"),
        ("ragged", UsageError, "something for x that NumPy cannot hold"),
        ("brain", UsageError, "something for x that NumPy cannot hold"),
        ("crash", ModelError, "raised RuntimeError: disk on fire"),
        ("missing", UsageError, "has no 'missing'"),
    ],
)
def test_loaders_that_do_not_fit(loader, name, kind, words):
    with pytest.raises(kind) as caught:
        loaded(loader(name), signature(x=(2, 1)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loader_whose_file_is_missing(tmp_path):
    with pytest.raises(UsageError, match=r"none\.py does not exist"):
        loaded(f"{tmp_path}/none.py:make", signature(x=(2, 1)))


# --- preprocessing -----------------------------------------------------------------------------------------------


def test_resize_and_centre_crop(tmp_path):
    image = save_image(tmp_path / "a.png", size=(40, 20))
    (sample,) = loaded(tmp_path, signature(x=(1, 3, 8, 8)), Preprocessing(resize=10))
    resized = np.asarray(image.resize((20, 10), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    np.testing.assert_array_equal(sample.tensors["x"][0].numpy(), resized[1:9, 6:14].transpose(2, 0, 1))


def test_preprocessing_from_the_option_the_model_and_the_zoo():
    parsed = Preprocessing.parse('{"mean": [0.5], "std": [0.25, 0.5, 1], "resize": 256}')
    assert parsed == Preprocessing((0.5,), (0.25, 0.5, 1.0), 256)
    model = torch.nn.Identity()
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (1, 2, 3), "crop_pct": 0.9}
    assert Preprocessing.of("net.py:make", model) == Preprocessing((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert Preprocessing.of("scconv_resnet20", model).std == (0.2470, 0.2435, 0.2616)
    for bad in ("", "[]", "{", '{"mean": 1}', '{"std": [0]}', '{"size": 3}', '{"resize": -1}', '{"resize": 2.5}'):
        with pytest.raises(UsageError, match="--preprocessing"):
            Preprocessing.parse(bad)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"std": [1, 0, 1]}', "std[1] is 0, expected a finite number above 0"),
        ('{"std": [1, 1, -2]}', "std[2] is -2, expected a finite number above 0"),
        ('{"std": [1e-60]}', "std[0] is 1e-60, expected a finite number above 0"),  # 0 in float32
        ('{"std": [NaN]}', "std[0] is nan, expected a finite number above 0"),
        ('{"std": [Infinity]}', "std[0] is inf, expected a finite number above 0"),
        ('{"mean": [0, NaN]}', "mean[1] is nan, expected a finite number"),
        ('{"mean": [-Infinity]}', "mean[0] is -inf, expected a finite number"),
        ('{"mean": [1e60]}', "mean[0] is 1e+60, expected a finite number"),
        ('{"mean": [true]}', "mean[0] is True, expected a finite number"),
        ('{"mean": ["0.5"]}', "mean[0] is '0.5', expected a finite number"),
        ('{"mean": [[0.5]]}', "mean[0] is [0.5], expected a finite number"),
        ('{"mean": []}', "mean is [], expected a list with a number per channel"),
        ('{"mean": {"r": 1}}', "mean is {'r': 1}, expected a list with a number per channel"),
        ('{"resize": 1000000000}', "resize is 1000000000, expected 1 to 16384 pixels"),
        ('{"resize": true}', "resize is True, expected 1 to 16384 pixels"),
    ],
)
def test_preprocessing_that_gives_no_numbers(text, found):
    with pytest.raises(UsageError) as refused:
        Preprocessing.parse(text)
    assert refused.value.message == f"--preprocessing: {found}."
    assert refused.value.remedy.startswith("Write --preprocessing '{")
    assert len(str(refused.value).splitlines()) == 1


def test_preprocessing_that_the_model_notes_wrongly():
    model = torch.nn.Identity()
    model.pretrained_cfg = {"mean": 0.5, "std": np.array([0.0])}
    with pytest.raises(UsageError, match=r"The model's pretrained_cfg: std\[0\] is 0.0, .* Give --preprocessing"):
        Preprocessing.of("net.py:make", model)


def test_preprocessing_of_other_channels(tmp_path):
    save_image(tmp_path / "a.png")
    with pytest.raises(UsageError, match="2 means and 1 deviations; x has 3 channels"):
        loaded(tmp_path, signature(x=(1, 3, 8, 8)), Preprocessing((0.0, 0.0), (1.0,)))


# --- memory and progress -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_is_read_once_and_not_copied_whole(tmp_path, compressed):
    path = tmp_path / "data.npz"
    (np.savez_compressed if compressed else np.savez)(path, x=RNG.integers(0, 9, (40_000, 128)).astype(np.float32))
    tracemalloc.start()
    stream = load_samples(str(path), signature(x=(16, 128)), PLAIN)
    assert stream.total == 2500
    total = 0.0
    for sample in stream:
        total += float(sample.tensors["x"].sum())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == float(np.load(path)["x"].astype(np.float64).sum())
    assert peak < 23 * 2**20  # of 20 MB


def test_fortran_order_is_read_right(tmp_path):
    x = RNG.normal(size=(150, 3, 2))
    np.savez(tmp_path / "data.npz", x=np.asfortranarray(x))
    rows = torch.cat(
        [s.tensors["x"] for s in loaded(tmp_path / "data.npz", signature((DynamicAxis(1, 7, 9),), x=(7, 3, 2)))]
    )
    np.testing.assert_array_equal(rows.numpy(), x.astype(np.float32))


def test_progress_counts_and_estimates(monkeypatch):
    from scconv_deploy.verification import samples as progress

    clock = iter(range(0, 1000, 30))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    said = []
    samples = [Sample(f"s{i}", {"x": torch.zeros(2)}) for i in range(3)]
    assert list(with_progress([samples[:2], samples[2:]], said.append)) == samples
    assert said == [
        "verifying on s0: x 2 (1 of 3)",
        "verifying on s1: x 2 (2 of 3, 33%, 2:00 left)",
        "verifying on s2: x 2 (3 of 3, 67%, 0:45 left)",
    ]
