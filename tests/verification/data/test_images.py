"""Images as inputs: the letterbox of ultralytics against known numbers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from scconv_deploy.errors import IntegrityError
from scconv_deploy.verification.data.images import ImageInput
from scconv_deploy.verification.vision.targets import Task

PLAIN = ((0.0,), (1.0,), None)
DETECT = Task("detect", {0: "thing"})


def image_input(height, width, task=DETECT, affine=PLAIN, channels=3):
    return ImageInput.of({"images": np.zeros((1, channels, height, width), np.float32)}, affine, task)


@pytest.mark.parametrize(
    ("size", "scale", "offset", "inner"),
    [
        ((1280, 720), 0.5, (0, 140), (640, 360)),
        ((810, 1080), 640 / 1080, (80, 0), (480, 640)),  # bus.jpg of ultralytics
        ((320, 320), 2.0, (0, 0), (640, 640)),
        ((640, 427), 1.0, (0, 106), (640, 427)),  # 213 rows of grey: 106 above, 107 below
    ],
)
def test_letterbox_places(size, scale, offset, inner):
    placement, inside = image_input(640, 640).place(size)
    assert placement.scale == pytest.approx((scale, scale))
    assert (placement.offset, inside) == (offset, inner)


def test_letterbox_pixels(tmp_path):
    pixels = np.array([[[0, 10, 20], [100, 110, 120]]], np.uint8)  # one row of two pixels
    Image.fromarray(pixels).save(tmp_path / "a.png")
    values, placement = image_input(4, 4).read(tmp_path / "a.png")
    assert placement.offset == (0, 1)
    red = (values[0] * 255).round(3)
    np.testing.assert_array_equal(red[[0, 3]], np.full((2, 4), 114))
    # bilinear between the centres of pixels, as OpenCV: 0, 25, 75, 100
    np.testing.assert_array_equal(red[[1, 2]], [[0, 25, 75, 100]] * 2)
    assert values[2, 1, 0] == pytest.approx(20 / 255)  # RGB


def test_boxes_go_back_into_the_image():
    placement, _ = image_input(640, 640).place((1280, 720))
    boxes = np.array([[0, 140, 640, 500], [100, 0, 200, 640]], dtype=float)
    np.testing.assert_allclose(placement.in_image(boxes), [[0, 0, 1280, 720], [200, 0, 400, 720]])


def test_a_crop_has_a_place_too():
    placement, inside = image_input(8, 8, None, ((0.0,), (1.0,), 16)).place((64, 32))
    assert (inside, placement.offset, placement.scale) == ((32, 16), (-12, -4), (0.5, 0.5))
    np.testing.assert_allclose(placement.in_image(np.array([[0.0, 0, 8, 8]])), [[24, 8, 40, 24]])


def test_images_to_classify_are_cropped():
    found = image_input(8, 8, Task("classify", {0: "a", 1: "b"}))
    assert (found.letterboxed, found.resize) == (False, 8)


def test_an_image_is_turned_as_the_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    _, placement = image_input(32, 32).read(tmp_path / "a.jpg")
    assert placement.size == (20, 40)


def test_a_file_that_is_no_image(tmp_path):
    (tmp_path / "a.jpg").write_text("hello")
    with pytest.raises(IntegrityError, match=r"a\.jpg is damaged or not an image"):
        image_input(8, 8).read(tmp_path / "a.jpg")
