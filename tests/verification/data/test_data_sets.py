"""Data sets of ultralytics and COCO: their images, boxes and classes, and what is wrong with them in one line."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.verification.data.sources import open_source
from scconv_deploy.verification.vision.targets import Task
from tests import data_sets

TASK = Task("detect", dict(enumerate(data_sets.NAMES)))
EXAMPLES = {"images": np.zeros((1, 3, 32, 32), np.float32)}


def opened(path, task=TASK):
    return open_source(str(path), EXAMPLES, ((0.0,), (1.0,), None), task)


def targets(path, task=TASK):
    return [block.labels[0] for block in opened(path, task).blocks()]


@pytest.mark.parametrize("make", [data_sets.ultralytics, data_sets.coco])
def test_images_and_boxes(make, tmp_path):
    source = opened(make(tmp_path))
    blocks = list(source.blocks())
    assert source.rows == len(blocks) == 3
    assert {block.arrays["images"].shape for block in blocks} == {(1, 3, 32, 32)}
    first, second, third = (block.labels[0] for block in blocks)
    assert first.classes.tolist() == [0, 2]
    np.testing.assert_allclose(first.boxes, [[12, 8, 36, 24], [0, 0, 24, 16]])
    assert first.placement.offset == (0, 5)
    assert (second.classes.tolist(), second.boxes.tolist()) == ([1], [[0, 0, 32, 32]])
    np.testing.assert_allclose(third.boxes, [[6, 4, 14, 16]])
    assert all(target.annotated and not target.crowd.any() for target in (first, second, third))


def test_a_model_that_is_no_checkpoint_of_theirs(tmp_path):
    (first, *_) = targets(data_sets.coco(tmp_path, names=("a", "b", "c")), None)
    assert (first.task, first.classes.tolist()) == (None, [0, 2])
    assert (first.placement.scale, first.placement.offset) == ((32 / 48, 1.0), (0, 0))  # resized, as folders of images


def test_a_folder_with_a_data_yaml_and_polygons(tmp_path):
    data_sets.ultralytics(tmp_path)
    (tmp_path / "labels/val/1.txt").write_text("1 0.5 0.25 1 0.5 0.5 0.75\n1 0.5 0.25 1 0.5 0.5 0.75\n")
    assert targets(tmp_path)[1].boxes.tolist() == [[16, 8, 32, 24]]  # the same line twice counts once


def test_keypoints_are_no_polygon(tmp_path):
    path = data_sets.ultralytics(tmp_path)
    (tmp_path / "labels/val/1.txt").write_text("1 0.5 0.5 0.5 1 0.1 0.1 2 0.9 0.9 0\n")
    assert targets(path, Task("pose", TASK.names))[1].boxes.tolist() == [[8, 0, 24, 32]]
    path.write_text(path.read_text() + "kpt_shape: [2, 3]\n")
    assert targets(path)[1].boxes.tolist() == [[8, 0, 24, 32]]


def test_a_missing_label_file_is_background(tmp_path):
    path = data_sets.ultralytics(tmp_path)
    (tmp_path / "labels/val/1.txt").unlink()
    (tmp_path / "labels/val/2.txt").write_text("")
    assert [(t.annotated, len(t.boxes)) for t in targets(path)] == [(True, 2), (False, 0), (True, 0)]


def test_no_label_file_at_all(tmp_path):
    path = data_sets.ultralytics(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "other")
    with pytest.raises(UsageError, match=r"none of 3 images has a label file; the first would be .*labels/val/0\.txt"):
        opened(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 0.5 0.5 0.5", "4 numbers, expected 5"),
        ("0 0.5 0.5 0.5 0.5 0.5 0.5 0.5", "8 numbers, expected 5, or a class and at least 3 points"),
        ("0 0.5 0.5 0.5 x", "is not only numbers"),
        ("3 0.5 0.5 0.5 0.5", "class 3 is outside 0 to 2"),
        ("0.5 0.5 0.5 0.5 0.5", "class 0.5 is outside"),
        ("0 1.5 0.5 0.5 0.5", "a place is outside the image"),
        ("0 nan 0.5 0.5 0.5", "a place is outside the image"),
    ],
)
def test_a_malformed_line_is_named_before_any_work(line, words, tmp_path):
    path = data_sets.ultralytics(tmp_path)
    (tmp_path / "labels/val/2.txt").write_text(f"0 0.5 0.5 0.5 0.5\n{line}\n")
    with pytest.raises(IntegrityError, match=rf"2\.txt, line 2: .*{words}"):
        opened(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path: .\nnames: [red, green, blue]\n", "has no val"),
        ("path: .\nval: images/val\nnames: [red, green]\n", r"has 2 classes \(red, green\); the model has 3"),
        ("path: .\nval: images/val\nnames: [red, green, cat]\n", "class 2 is 'cat'; the model's is 'blue'"),
        ("path: .\nval: images/val\n", "names must be a list"),
        ("path: .\nval: images/other\nnames: [red, green, blue]\n", "images/other does not exist"),
        ("path: .\nval: labels/val\nnames: [red, green, blue]\n", "holds no image"),
        ("- a\n", "holds no keys"),
    ],
)
def test_a_data_yaml_that_is_wrong(text, words, tmp_path):
    path = data_sets.ultralytics(tmp_path)
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        opened(path)


def test_a_data_yaml_that_is_none(tmp_path):
    path = data_sets.ultralytics(tmp_path)
    path.write_text("val: [")
    with pytest.raises(IntegrityError, match="is no YAML"):
        opened(path)


def test_a_list_of_images_and_one_that_is_missing(tmp_path):
    path = data_sets.ultralytics(tmp_path)
    path.write_text("path: .\nval: val.txt\nnames: {0: red, 1: green, 2: blue}\n")
    (tmp_path / "val.txt").write_text("./images/val/2.png\nimages/val/0.png\n")
    assert [target.file.name for target in targets(path)] == ["2.png", "0.png"]
    (tmp_path / "val.txt").write_text("./images/val/9.png\n")
    with pytest.raises(UsageError, match=r"the image .*9\.png does not exist"):
        opened(path)


def test_names_that_say_nothing_fit_by_number(tmp_path):
    path = data_sets.ultralytics(tmp_path)
    assert len(targets(path, Task("detect", {n: f"class{n}" for n in range(3)}))) == 3
    with pytest.raises(UsageError, match="has 3 classes"):
        opened(path, Task("detect", {n: f"class{n}" for n in range(4)}))


@pytest.mark.parametrize("kind", ["classify", "obb"])
def test_a_task_without_boxes(kind, tmp_path):
    for make in (data_sets.ultralytics, data_sets.coco):
        with pytest.raises(UsageError, match=f"the model's task is {kind}"):
            opened(make(tmp_path / make.__name__), Task(kind, TASK.names))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"names": ("red", "green", "cat")}, UsageError, "class 2 is 'cat'; the model's is 'blue'"),
        ({"names": (*data_sets.NAMES, "more")}, UsageError, "has 4 classes"),
        ({"images": []}, UsageError, "lists no image"),
        ({"images": None}, IntegrityError, "has no list images"),
        ({"images": [{"id": 7, "file_name": "far.png"}], "annotations": []}, UsageError, r"far\.png, is in none of"),
        ({"images": [{"id": 7}]}, IntegrityError, "an image has no id or file_name"),
        ({"annotations": [{"image_id": 7, "category_id": 0}]}, IntegrityError, "annotation 0 has no image_id"),
        ({"annotations": [{"image_id": 1, "category_id": 0, "bbox": [0] * 4}]}, IntegrityError, "is of image 1"),
        ({"annotations": [{"image_id": 7, "category_id": 5, "bbox": [0] * 4}]}, IntegrityError, "is of category 5"),
        ({"annotations": [{"image_id": 7, "category_id": 0, "bbox": [0, 0, -1, 1]}]}, IntegrityError, "has the bbox"),
    ],
)
def test_a_coco_file_that_is_wrong(changes, error, words, tmp_path):
    path = data_sets.coco(tmp_path, **changes)
    with pytest.raises(error, match=words):
        opened(path)


def test_a_coco_file_that_is_no_json(tmp_path):
    path = data_sets.coco(tmp_path)
    path.write_text("{")
    with pytest.raises(IntegrityError, match="is no JSON"):
        opened(path)


@pytest.mark.parametrize("make", [data_sets.ultralytics, data_sets.coco])
def test_a_part_travels_with_the_content_of_its_files(make, tmp_path):
    source = opened(make(tmp_path))
    whole = list(source.blocks())
    carried = source.part(1, 3).carried()
    shutil.rmtree(tmp_path)
    for ours, theirs in zip(carried.blocks(), whole[1:], strict=True):
        np.testing.assert_array_equal(ours.arrays["images"], theirs.arrays["images"])
        assert ours.labels[0].boxes.tolist() == theirs.labels[0].boxes.tolist()
        assert ours.labels[0].file == theirs.labels[0].file


def test_a_crowd_is_kept_as_one(tmp_path):
    crowd = {"image_id": 7, "category_id": 0, "bbox": [1, 2, 3, 4], "iscrowd": 1}
    (first, *_) = targets(data_sets.coco(tmp_path, annotations=[crowd]))
    assert (first.boxes.tolist(), first.crowd.tolist()) == ([[1, 2, 4, 6]], [True])


def test_folders_of_ultralytics_to_classify(tmp_path):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            data_sets.save_images(tmp_path / part / name)
    source = opened(tmp_path, Task("classify", {0: "cat", 1: "dog"}))
    assert [int(block.labels[0]) for block in source.blocks()] == [0, 0, 0, 1, 1, 1]
