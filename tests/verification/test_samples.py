"""Samples: which values reach the model, in which batches, and which files are refused."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from scconv_deploy.errors import IntegrityError, MissingRuntimeError, UsageError
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.model.signature import Signature
from scconv_deploy.verification.preprocessing import Preprocessing
from scconv_deploy.verification.samples import load_samples, noise_samples

PLAIN = Preprocessing()
RNG = np.random.default_rng(0)


def signature(dynamic=(), **shapes) -> Signature:
    tensors = {n: t if isinstance(t, torch.Tensor) else torch.zeros(*t) for n, t in shapes.items()}
    return Signature(tuple(tensors.values()), {}, tuple(tensors), tuple(dynamic))


def refuses(kind, source, signed, *words):
    with pytest.raises(kind) as caught:
        list(load_samples(str(source), signed, PLAIN))
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    for word in words:
        assert word in str(caught.value)


# --- noise ------------------------------------------------------------------------------------------------------


def test_noise_is_the_example_and_the_smallest_sizes():
    example = torch.arange(4 * 3 * 8 * 8, dtype=torch.float32).reshape(4, 3, 8, 8)
    axes = (DynamicAxis(1, 4, 8), DynamicAxis(5, 8, 16, 2, "x"))
    signed = Signature((example, torch.ones(4, 2, dtype=torch.int64)), {}, ("x", "y"), axes)
    first, smallest, *_ = noise_samples(signed, 3)
    assert torch.equal(first.tensors["x"], example)
    assert {n: tuple(t.shape) for n, t in smallest.tensors.items()} == {"x": (1, 3, 5, 8), "y": (1, 2)}
    assert smallest.tensors["y"].dtype == torch.int64
    assert torch.equal(noise_samples(signed, 3)[1].tensors["x"], smallest.tensors["x"])
    assert not torch.equal(noise_samples(signed, 4)[1].tensors["x"], smallest.tensors["x"])
    assert str(smallest) == "seeded noise at the smallest sizes: x 1x3x5x8, y 1x2"


def shapes_of(samples):
    return [str(sample).replace("seeded noise", "").strip() for sample in samples]


def test_noise_reaches_the_largest_sizes_and_odd_ones_between():
    axes = (DynamicAxis(2, 4, 8), DynamicAxis(6, 8, 16, 2, "x"))
    signed = Signature((torch.zeros(4, 3, 8, 8), torch.ones(4, 2)), {}, ("x", "y"), axes)
    samples = noise_samples(signed, 3)
    assert shapes_of(samples)[2] == "at the largest sizes: x 8x3x16x8, y 8x2"
    between = samples[3].tensors
    batch, height = between["x"].shape[0], between["x"].shape[2]
    assert (batch % 2, height % 2, between["y"].shape[0]) == (1, 1, batch)
    assert 2 < batch < 8
    assert 6 < height < 16
    assert all(sample.deep for sample in samples)


def test_noise_of_declared_steps_and_of_axes_that_are_one():
    axes = DynamicAxis.parse_all("x:2,x:3=32:64:256:32")
    samples = noise_samples(Signature((torch.zeros(1, 3, 64, 64),), {}, ("x",), axes), 0)
    sides = [tuple(sample.tensors["x"].shape[2:]) for sample in samples]
    assert sides[:3] == [(64, 64), (32, 32), (256, 256)]
    assert all(height == width and height % 32 == 0 for height, width in sides)


def test_noise_that_would_be_too_large_is_not_run_and_said():
    signed = Signature((torch.zeros(1, 3, 1024, 1024),), {}, ("x",), (DynamicAxis(1, 1, 64),))
    assert shapes_of(noise_samples(signed, 0)) == [
        ": x 1x3x1024x1024",
        "at the smallest sizes: x 1x3x1024x1024",
        "near the largest sizes (x 64x3x1024x1024 is too large to run here): x 2x3x1024x1024",
    ]


def test_noise_without_open_axes_is_the_example_and_its_values_in_another_order():
    values, index = torch.arange(40.0).reshape(2, 20), torch.arange(6)
    signed = Signature((values, index), {}, ("x", "y"))
    example, shuffled = noise_samples(signed, 3)
    assert torch.equal(example.tensors["x"], values)
    assert not torch.equal(shuffled.tensors["x"], values)
    assert torch.equal(shuffled.tensors["x"].flatten().sort().values, values.flatten())
    assert torch.equal(shuffled.tensors["y"], index)  # indices keep their meaning
    assert torch.equal(noise_samples(signed, 3)[1].tensors["x"], shuffled.tensors["x"])
    assert not torch.equal(noise_samples(signed, 4)[1].tensors["x"], shuffled.tensors["x"])


# --- arrays -----------------------------------------------------------------------------------------------------


def test_arrays_reach_the_inputs(tmp_path):
    x, y = RNG.normal(size=(4, 3)), RNG.integers(0, 9, (4, 2))
    np.savez(tmp_path / "data.npz", y=y, x=x)
    signed = signature(x=(2, 3), y=torch.zeros(2, 2, dtype=torch.int32))
    first, second = load_samples(str(tmp_path / "data.npz"), signed, PLAIN)
    assert [first.name, second.name] == ["data.npz 0-1", "data.npz 2-3"]
    assert torch.equal(second.tensors["x"], torch.from_numpy(x[2:]).float())
    assert second.tensors["y"].dtype == torch.int32
    assert second.tensors["y"].tolist() == y[2:].tolist()


def test_arrays_are_not_preprocessed(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.full((1, 3, 2, 2), 7, dtype=">f8"))  # of the other byte order
    (sample,) = load_samples(str(tmp_path / "data.npz"), signature(x=(1, 3, 2, 2)), Preprocessing((1.0,), (2.0,)))
    assert sample.tensors["x"].tolist() == np.full((1, 3, 2, 2), 7).tolist()


@pytest.mark.parametrize(
    ("dynamic", "expected"),
    [
        ((), [[0, 1, 2], [3, 4, 5], [6, 0, 1]]),  # a static batch is filled up from the start
        ((DynamicAxis(1, 3, 4),), [[0, 1, 2], [3, 4, 5], [6]]),
        ((DynamicAxis(2, 3, 4),), [[0, 1, 2], [3, 4, 5], [6, 0, 1]]),  # one is fewer than it may have
        ((DynamicAxis(1, 3, 4, 0, "x"),), [[0, 1, 2], [3, 4, 5], [6]]),
        ((DynamicAxis(2, 3, 4, 1, "x"),), [[0, 1, 2], [3, 4, 5], [6, 0, 1]]),  # another axis
    ],
)
def test_batches(tmp_path, dynamic, expected):
    np.savez(tmp_path / "data.npz", x=np.arange(7.0)[:, None].repeat(3, 1))
    samples = load_samples(str(tmp_path / "data.npz"), signature(dynamic, x=(3, 3)), PLAIN)
    assert [s.tensors["x"][:, 0].tolist() for s in samples] == expected
    assert [s.name for s in samples] == ["data.npz 0-2", "data.npz 3-5", "data.npz 6-6"]


def test_one_static_input_keeps_the_batch(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.arange(3.0), y=np.arange(3.0))
    signed = signature((DynamicAxis(1, 2, 4, 0, "x"),), x=(2,), y=(2,))
    samples = load_samples(str(tmp_path / "data.npz"), signed, PLAIN)
    assert [s.tensors["y"].tolist() for s in samples] == [[0, 1], [2, 0]]


def test_fewer_than_a_batch(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.arange(2.0))
    (sample,) = load_samples(str(tmp_path / "data.npz"), signature(x=(5,)), PLAIN)
    assert sample.tensors["x"].tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"y": np.ones((2, 3))}, ("holds y", "Save one array per input: x (and labels")),
        ({"x": np.ones((2, 3)), "y": np.ones(2)}, ("holds x, y",)),
        ({}, ("holds nothing",)),
        ({"x": np.ones((2, 4))}, ("x is float64[2, 4], expected numbers [N, 3]",)),
        ({"x": np.ones(3)}, ("x is float64[3], expected numbers [N, 3]",)),
        ({"x": np.ones((2, 3), dtype=complex)}, ("x is complex128[2, 3]",)),
        ({"x": np.full((2, 3), "text")}, ("expected numbers",)),
        ({"x": np.ones((0, 3))}, ("x 0 for batches of 2",)),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, arrays, words):
    np.savez(tmp_path / "data.npz", **arrays)
    refuses(UsageError, tmp_path / "data.npz", signature(x=(2, 3)), "data.npz", *words)


@pytest.mark.parametrize("shapes", [{"x": (2, 3), "y": (2, 3)}, {"x": (2, 3), "y": (1, 3)}, {"x": (1, 3), "y": (2, 3)}])
def test_arrays_of_different_length(tmp_path, shapes):
    np.savez(tmp_path / "data.npz", x=np.ones((4, 3)), y=np.ones((4 if shapes["x"] != shapes["y"] else 6, 3)))
    refuses(UsageError, tmp_path / "data.npz", signature(**shapes), "expected as many of each")


def test_an_input_without_a_batch(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.ones(()))
    refuses(UsageError, tmp_path / "data.npz", Signature((torch.ones(()),), {}, ("x",)), "x")


def test_damaged_archives(tmp_path):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=RNG.normal(size=(2, 3)))
    data = path.read_bytes()
    changed = bytearray(data)
    changed[60:64] = b"\0\0\0\0"
    npy = io.BytesIO()
    np.save(npy, np.ones((2, 3)))
    for bad in (b"", b"text", data[:20], data[:-30], bytes(changed), npy.getvalue()):
        path.write_bytes(bad)
        refuses(IntegrityError, path, signature(x=(2, 3)), "damaged or not an .npz", "np.savez")


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickled_array_is_not_unpickled(tmp_path, capsys):
    np.savez(tmp_path / "data.npz", x=np.array([[Evil()] * 3] * 2, dtype=object))
    refuses(IntegrityError, tmp_path / "data.npz", signature(x=(2, 3)), "damaged or not an .npz", "pickled")
    assert capsys.readouterr().out == ""


# --- images -----------------------------------------------------------------------------------------------------


def save_image(path, mode="RGB", size=(20, 30)):
    """A seeded image, size as Pillow counts it (width, height)."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    image = Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8), mode)
    image.save(path)
    return image


def by_pillow(image, mode, width, height):
    resized = np.asarray(image.convert(mode).resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
    return (resized.transpose(2, 0, 1) if mode == "RGB" else resized[None]) / 255


def test_images_are_resized_scaled_and_normalised_in_the_order_of_their_names(tmp_path):
    images = [save_image(tmp_path / name, size=size) for name, size in (("b.png", (20, 30)), ("a.PNG", (7, 5)))]
    (tmp_path / "notes.txt").write_text("not an image")
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    (sample,) = load_samples(str(tmp_path), signature(x=(2, 3, 8, 12)), Preprocessing(mean, std))
    channel = np.asarray(mean, dtype=np.float32)[:, None, None], np.asarray(std, dtype=np.float32)[:, None, None]
    expected = [(by_pillow(image, "RGB", 12, 8) - channel[0]) / channel[1] for image in reversed(images)]
    np.testing.assert_array_equal(sample.tensors["x"].numpy(), np.stack(expected))
    assert sample.tensors["x"].dtype == torch.float32
    assert sample.name == f"{tmp_path.name} 0-1"


def test_a_jpeg_without_preprocessing(tmp_path):
    save_image(tmp_path / "a.jpg")
    (sample,) = load_samples(str(tmp_path), signature(x=torch.zeros(1, 3, 8, 12, dtype=torch.float16)), PLAIN)
    with Image.open(tmp_path / "a.jpg") as decoded:
        expected = by_pillow(decoded, "RGB", 12, 8)
    np.testing.assert_array_equal(sample.tensors["x"].numpy(), expected[None].astype(np.float16))
    assert 0.1 < float(sample.tensors["x"].mean()) < 0.9


@pytest.mark.parametrize(("saved", "channels"), [("L", 3), ("RGB", 1), ("L", 1)])
def test_grey_and_colour(tmp_path, saved, channels):
    image = save_image(tmp_path / "a.png", saved)
    (sample,) = load_samples(str(tmp_path), signature(x=(1, channels, 6, 6)), PLAIN)
    expected = by_pillow(image, "RGB" if channels == 3 else "L", 6, 6)
    np.testing.assert_array_equal(sample.tensors["x"][0].numpy(), expected)


def test_more_images_than_a_batch(tmp_path):
    images = [save_image(tmp_path / f"{index}.png", size=(4, 4)) for index in range(5)]
    samples = load_samples(str(tmp_path), signature((DynamicAxis(1, 2, 4),), x=(2, 3, 4, 4)), PLAIN)
    assert [len(s.tensors["x"]) for s in samples] == [2, 2, 1]
    np.testing.assert_array_equal(list(samples)[2].tensors["x"][0].numpy(), by_pillow(images[4], "RGB", 4, 4))


def test_the_photos_that_are_shipped():
    pytest.importorskip("sklearn")
    (sample,) = load_samples("photos", signature(x=(2, 3, 32, 32)), PLAIN)
    assert sample.name == "photos 0-1"
    assert sample.tensors["x"].shape == (2, 3, 32, 32)
    china, flower = sample.tensors["x"].mean((1, 2, 3)).tolist()
    assert 0.2 < flower < 0.3 < 0.4 < china < 0.6  # a flower on dark ground; a bright sky


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tiff"])
def test_damaged_images(tmp_path, name):
    save_image(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for bad in (b"", b"text", data[: len(data) // 2], b"\0" * 6 + data[6:]):
        (tmp_path / name).write_bytes(bad)
        refuses(IntegrityError, tmp_path, signature(x=(1, 3, 8, 8)), name, "damaged or not an image")


def test_a_byte_that_changed(tmp_path):
    save_image(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[100] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    refuses(IntegrityError, tmp_path, signature(x=(1, 3, 8, 8)), "a.png is damaged")


def test_a_folder_named_like_an_image(tmp_path):
    (tmp_path / "a.png").mkdir()
    refuses(IntegrityError, tmp_path, signature(x=(1, 3, 8, 8)), "a.png is damaged")


def test_an_image_too_large_to_be_one(tmp_path, monkeypatch):
    save_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    refuses(IntegrityError, tmp_path, signature(x=(1, 3, 8, 8)), "a.png is damaged")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"x": (1, 3, 8, 8), "y": (1, 2)}, "the model has x, y"),
        ({"x": (1, 8)}, "x is float32[1, 8]"),
        ({"x": (1, 4, 8, 8)}, "x is float32[1, 4, 8, 8]"),
        ({"x": torch.zeros(1, 3, 8, 8, dtype=torch.int64)}, "x is int64[1, 3, 8, 8]"),
    ],
)
def test_inputs_that_are_no_images(tmp_path, inputs, words):
    save_image(tmp_path / "a.png")
    refuses(UsageError, tmp_path, signature(**inputs), words, "Give an .npz")


def test_sources_that_are_none(tmp_path):
    signed = signature(x=(1, 3, 8, 8))
    refuses(UsageError, tmp_path, signed, "no image in this folder", ".png")
    refuses(UsageError, tmp_path / "missing", signed, "does not exist", "'photos'")
    refuses(UsageError, tmp_path / "missing.npz", signed, "does not exist")
    save_image(tmp_path / "a.png")
    refuses(UsageError, tmp_path / "a.png", signed, "neither a folder nor an .npz")


@pytest.mark.parametrize(("source", "package"), [("photos", "sklearn"), ("folder", "PIL")])
def test_a_package_that_is_missing(tmp_path, monkeypatch, source, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.png").touch()
    refuses(MissingRuntimeError, source if source == "photos" else tmp_path, signature(x=(1, 3, 8, 8)), "pip install")


def test_preprocessing_of_the_zoo_and_of_others():
    assert Preprocessing.of("scconv_resnet20").mean == (0.4914, 0.4822, 0.4465)
    assert Preprocessing.of("net.py:make") == Preprocessing((0.0,), (1.0,))
