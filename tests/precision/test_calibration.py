"""Observed ranges, and the levels that follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scconv_deploy.errors import IntegrityError, ModelError, UsageError
from scconv_deploy.precision.calibration import (
    Calibration,
    Method,
    Observer,
    Range,
    levels_of,
    rounded_scales,
    weight_codes,
    weight_scales,
)
from scconv_deploy.records.quantization import Levels

RNG = np.random.default_rng(0)


def observed(method: str, *batches: np.ndarray) -> Range:
    observer = Observer(Method.parse(method))
    for number, batch in enumerate(batches):
        observer.add({"v": batch.astype(np.float32)}, f"batch {number}")
    return observer.ranges()["v"]


def test_the_largest_magnitude_over_all_batches():
    found = observed("max", np.array([-1.0, 0.5]), np.array([0.25, 3.0]))
    assert (found.low, found.high, found.magnitude) == (-1.0, 3.0, 3.0)


@pytest.mark.parametrize("method", ["percentile:99", "entropy"])
def test_an_outlier_is_cut_off(method):
    values = RNG.normal(size=100_000)
    values[7] = 100.0
    found = observed(method, values[:50_000], values[50_000:])
    assert found.magnitude < 20
    assert observed("max", values).magnitude == 100


def test_a_percentile_is_that_of_the_magnitudes():
    values = np.linspace(-1, 1, 100_001)
    assert observed("percentile:90", values).magnitude == pytest.approx(0.9, abs=0.002)


@pytest.mark.parametrize("text", ["max", "entropy", "percentile:99", "percentile:99.99", "percentile:99.99999"])
def test_a_method_is_written_as_it_is_read(text):
    assert str(Method.parse(text)) == text


@pytest.mark.parametrize("method", ["max", "entropy", "percentile:99.9"])
@pytest.mark.parametrize("value", [0.75, -2.0])
def test_an_activation_that_never_moves_has_a_scale(method, value):
    """A bias behind dead channels: one value on all data; only 0 has no scale."""
    found = observed(method, np.full(1000, value), np.full(1000, value))
    assert found.magnitude == pytest.approx(abs(value), rel=0.01)
    for target in ("gpu", "cpu"):
        levels = levels_of([found], target, np.dtype(np.float32))
        code = np.clip(np.rint(value / levels.scale) + levels.zero_point, levels.low, levels.high)
        assert (code - levels.zero_point) * levels.scale == pytest.approx(value, rel=0.02)


@pytest.mark.parametrize("text", ["least", "max:3", "percentile:x", "percentile:20"])
def test_an_unknown_method_is_refused(text):
    with pytest.raises(UsageError, match="--calibration"):
        Method.parse(text)


def test_values_that_are_not_finite_and_values_that_are_zero_are_refused():
    observer = Observer(Method())
    with pytest.raises(ModelError, match="v holds NaN on batch 3"):
        observer.add({"v": np.array([1.0, np.nan], np.float32)}, "batch 3")
    observer.add({"w": np.zeros(4, np.float32)}, "batch 0")
    with pytest.raises(UsageError, match="w is 0 on all of the calibration data, so it has no scale"):
        observer.ranges()


def test_levels_are_symmetric_for_gpus_and_unsigned_for_cpus():
    ranges = [Range(-1.0, 3.0), Range(-2.0, 0.5)]
    assert levels_of(ranges, "gpu", np.dtype(np.float32)) == Levels(float(np.float32(3.0) / np.float32(127)))
    cpu = levels_of(ranges, "cpu", np.dtype(np.float32))
    assert (cpu.zero_point, cpu.signed, cpu.scale) == (102, False, float(np.float32(5 / 255)))
    relu = levels_of([Range(0.0, 2.55)], "cpu", np.dtype(np.float32))
    assert (relu.zero_point, relu.low, relu.high) == (0, 0, 255)


def test_a_scale_of_half_data_is_a_value_of_half():
    scale = levels_of([Range(-1.0, 1.0)], "gpu", np.dtype(np.float16)).scale
    assert scale == float(np.float16(1 / 127))


def test_weights_are_quantised_as_pytorch_does_it():
    weight = RNG.normal(size=(16, 8, 3, 3)).astype(np.float32)
    weight[3] = 0
    scales = weight_scales(weight)
    tensor = torch.from_numpy(weight)
    theirs = tensor.abs().amax((1, 2, 3)) / 127
    theirs[3] = 1
    assert np.array_equal(scales, theirs.numpy())
    zeros = torch.zeros(16, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(tensor, theirs, zeros, 0, -128, 127)
    dequantized = weight_codes(weight, scales).astype(np.float32) * scales.reshape(-1, 1, 1, 1)
    assert np.array_equal(dequantized, expected.numpy())


def test_the_cache_is_read_back_and_fits_its_model_and_data_alone(tmp_path):
    made = Calibration("max", 4, "d.npz", "ab", "cd", {"v": Range(-1.0, 2.5)})
    file = tmp_path / "cache.json"
    file.write_bytes(made.as_bytes())
    found = Calibration.read(file)
    assert found == made
    assert found.fits(Calibration("max", 4, "other name", "ab", "cd", {}), ["v"])
    assert not found.fits(made, ["w"])
    for other in (
        ("entropy", 4, "", "ab", "cd"),
        ("max", 5, "", "ab", "cd"),
        ("max", 4, "", "x", "cd"),
        ("max", 4, "", "ab", "x"),
    ):
        assert not found.fits(Calibration(*other, {}), ["v"])
    file.write_text("{}")
    with pytest.raises(IntegrityError, match="no calibration cache"):
        Calibration.read(file)


@pytest.mark.parametrize(("low", "high"), [(0.0, -5.0), (0.0, 0.0), (0.0, float("nan")), (0.0, float("inf"))])
def test_a_cache_of_ranges_that_nobody_observes_is_refused(tmp_path, low, high):
    file = tmp_path / "cache.json"
    file.write_bytes(Calibration("max", 4, "d.npz", "ab", "cd", {"v": Range(low, high)}).as_bytes())
    with pytest.raises(IntegrityError, match=r"cache\.json is damaged"):
        Calibration.read(file)


def test_a_scale_that_half_would_round_to_zero_is_none():
    dead = np.stack([np.full(4, 2e-6), np.ones(4)]).astype(np.float16).astype(np.float32)
    scales = rounded_scales(weight_scales(dead), np.dtype(np.float16))
    assert scales[0] == 1
    assert scales[1] == np.float32(np.float16(1 / 127))
    assert weight_codes(dead, scales)[0].tolist() == [0] * 4
    assert levels_of([Range(0.0, 3e-6)], "gpu", np.dtype(np.float16)).scale > 0
