"""Semantic segmentation: masks go where their images go, and mIoU against numbers made by hand."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.verification.accuracy import PairedMetric
from scconv_deploy.verification.data.sources import open_source
from scconv_deploy.verification.vision.mask_metric import MaskMetric
from scconv_deploy.verification.vision.targets import Mask, Task, labels_of

EXAMPLES = {"x": np.zeros((1, 3, 4, 4), np.float32)}


def write(folder, mask, image_size=None):
    for part in ("images", "masks"):
        (folder / part).mkdir()
    mask = np.array(mask, np.uint8)
    Image.new("RGB", image_size or mask.shape[1::-1]).save(folder / "images" / "a.jpg")
    Image.fromarray(mask).save(folder / "masks" / "a.png")


def opened(folder, task=None):
    return [
        block.labels[0] for block in open_source(str(folder), EXAMPLES, ((0.0,), (1.0,), None), task).blocks()
    ]  # fmt: skip


def test_a_mask_is_resized_as_its_image(tmp_path):
    write(tmp_path, np.kron([[0, 1], [2, 255]], np.ones((4, 4))))
    (target,) = opened(tmp_path)
    np.testing.assert_array_equal(target.classes, np.kron([[0, 1], [2, -1]], np.ones((2, 2))))


def test_a_part_travels_with_the_content_of_its_files(tmp_path):
    write(tmp_path, np.arange(16).reshape(4, 4))
    for part, suffix in (("images", "jpg"), ("masks", "png")):
        shutil.copy(tmp_path / part / f"a.{suffix}", tmp_path / part / f"b.{suffix}")
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "masks" / "b.png")
    source = open_source(str(tmp_path), EXAMPLES, ((0.0,), (1.0,), None))
    first, second = source.blocks()
    carried = source.part(1, 2).carried()
    shutil.rmtree(tmp_path)
    (found,) = carried.blocks()
    assert (found.labels[0].classes == 7).all()
    assert not np.array_equal(found.labels[0].classes, first.labels[0].classes)
    assert found.labels[0].file == second.labels[0].file == str(tmp_path / "masks" / "b.png")
    np.testing.assert_array_equal(found.arrays["x"], second.arrays["x"])


def test_a_letterbox_does_not_count(tmp_path):
    write(tmp_path, [[1, 1, 2, 2], [1, 1, 2, 2]])
    (target,) = opened(tmp_path, Task("segment", {0: "a"}))
    np.testing.assert_array_equal(target.classes, [[-1] * 4, [1, 1, 2, 2], [1, 1, 2, 2], [-1] * 4])


def scores(classes, kinds=3):
    return {"y": np.moveaxis(np.eye(kinds)[np.array(classes)], -1, 0)[None]}


def metric(*rows):
    found = PairedMetric()
    for truth, reference, artifact in rows:
        target = Mask("a.png", np.array(truth), MaskMetric)
        found.add(scores(reference), scores(artifact), labels_of(target))
    return found


def test_by_hand():
    truth = [[0, 0, 1], [1, 1, -1]]
    found = metric((truth, [[0, 0, 1], [1, 1, 2]], [[0, 1, 1], [1, 2, 0]])).accuracy()
    # the artifact: class 0 has 1 of 2, class 1 has 2 of 4, class 2 has 0 of 1
    assert (found.metric, found.samples, found.reference) == ("mIoU", 1, 1.0)
    assert found.artifact == pytest.approx((1 / 2 + 2 / 4 + 0) / 3)
    assert found.low == found.high == pytest.approx(found.difference)  # one image has one resample


def test_the_interval_is_seeded_and_about_the_difference():
    good, bad = ([[0, 1]], [[0, 1]], [[0, 1]]), ([[0, 1]], [[0, 1]], [[1, 0]])
    found = metric(*[good] * 6, *[bad] * 2).accuracy()
    assert found.artifact == pytest.approx(6 / 10)
    assert found.low < found.difference < found.high <= 0
    assert metric(*[good] * 6, *[bad] * 2).accuracy() == found


def test_parts_of_the_data_merge_to_the_same():
    rows = [([[0, 1]], [[0, 1]], [[0, 1]]), ([[0, 1]], [[1, 1]], [[1, 0]]), ([[2, 1]], [[2, 1]], [[2, 2]])]
    parts = metric(*rows[:1])
    parts.merge(metric(*rows[1:]))
    assert parts.accuracy() == metric(*rows).accuracy()


def test_outputs_of_a_quarter_of_the_size():
    target = Mask("a.png", np.kron([[0, 1], [2, 1]], np.ones((4, 4), int)), MaskMetric)
    found = PairedMetric()
    found.add(scores([[0, 1], [2, 1]]), scores([[0, 1], [2, 2]]), labels_of(target))
    assert (found.accuracy().reference, found.accuracy().artifact) == (1.0, pytest.approx((1 + 1 / 2 + 1 / 2) / 3))


def test_a_class_that_the_model_has_not():
    with pytest.raises(UsageError, match=r"a\.png holds class 3; the model has 3 classes"):
        metric(([[3]], [[0]], [[0]]))


def test_outputs_that_are_no_masks():
    found = PairedMetric()
    found.add({"y": np.zeros((1, 3))}, {"y": np.zeros((1, 3))}, labels_of(Mask("a.png", np.zeros((2, 2)), MaskMetric)))
    assert "no output holds a score for each class and pixel" in found.reason


def test_masks_that_are_wrong(tmp_path):
    write(tmp_path, [[0, 1], [1, 1]], image_size=(3, 2))
    with pytest.raises(IntegrityError, match=r"a\.png is 2x2, expected height x width of its image, 2x3"):
        opened(tmp_path)
    (tmp_path / "masks" / "a.png").write_text("no image")
    with pytest.raises(IntegrityError, match=r"a\.png is damaged or not an image"):
        opened(tmp_path)
    (tmp_path / "masks" / "a.png").unlink()
    with pytest.raises(UsageError, match=r"1 of 1 masks are missing, the first is .*masks/a\.png"):
        opened(tmp_path)
    (tmp_path / "images" / "a.jpg").unlink()
    with pytest.raises(UsageError, match="no image in images/"):
        opened(tmp_path)
