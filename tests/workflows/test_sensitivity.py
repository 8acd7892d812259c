"""sensitivity: each site's cost by hand, the planted site first, shares that are complete, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import pytest

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.graph import instrument
from scconv_deploy.precision.placement import PlacementOptions
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.workflows.calibrate import CalibrationOptions
from scconv_deploy.workflows.quantize import QuantizeOptions, quantize_onnx
from scconv_deploy.workflows.sensitivity import _shares, sensitivity_onnx
from tests import costly, int8
from tests.command_line import failed, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensitivity")
    model = costly.network()
    onnx.save(model, folder / "net.onnx")
    images, labels = costly.data(model)
    np.savez(folder / "data.npz", x=images, labels=labels)
    np.savez(folder / "plain.npz", x=images)
    np.savez(folder / "wrong.npz", x=images, labels=labels + 5)
    images = images.copy()
    images[3, 0, 0, 0] = np.nan
    np.savez(folder / "nan.npz", x=images)
    return folder


@pytest.fixture(scope="module")
def measured(folder):
    return sensitivity_onnx(folder / "net.onnx", CalibrationOptions(str(folder / "data.npz")))


def test_the_planted_site_is_first_and_the_order_is_that_of_the_noise(measured):
    assert measured.sites[0].site == costly.BAD
    assert measured.sites[0].noise_share > 0.9
    ratios = [one.cost.snr_db for one in measured.sites]
    assert ratios == sorted(ratios)
    assert {one.site for one in measured.sites} == set(costly.SITES)


def test_without_the_outlier_it_is_not(folder, tmp_path):
    """So that the test above can fail: the same weights, evenly scaled."""
    onnx.save(costly.network(1.0), tmp_path / "even.onnx")
    found = sensitivity_onnx(tmp_path / "even.onnx", CalibrationOptions(str(folder / "data.npz")))
    assert max(one.noise_share for one in found.sites) < 0.7


def test_shares_are_complete(measured):
    adds, weights = measured.in_float
    assert sum(one.noise_share for one in measured.sites) == pytest.approx(1)
    assert sum(one.multiply_adds_share for one in measured.sites) + adds == pytest.approx(1)
    assert sum(one.weight_bytes_share for one in measured.sites) + weights == pytest.approx(1)
    stem, classifier = 8 * 27 * 64, 512 * 5
    assert adds == pytest.approx((stem + classifier) / measured.multiply_adds)
    assert measured.multiply_adds == stem + classifier + (8 * 8 * 9 + 8 * 8 + 8 * 8) * 64
    # boost is a constant too
    assert weights == pytest.approx(4 * (8 * 27 + 512 * 5 + 8) / measured.weight_bytes)
    document = measured.as_json()
    assert document["in_float"]["multiply_adds_share"] == adds


def test_weights_of_7_bits_cost_more(folder, measured):
    found = run("sensitivity", folder / "net.onnx", "--data", folder / "data.npz", "--reduce-range", "--json")
    assert found.exit_code == 0, found.output
    coarse = {one["site"]: one["cost"]["snr_db"] for one in json.loads(found.stdout)["sites"]}
    fine = {one.site: one.cost.snr_db for one in measured.sites}
    assert coarse["w3"] < fine["w3"] - 1
    assert coarse["block"] == pytest.approx(fine["block"]), "a skip has no weights"


@pytest.mark.parametrize("site", ["w1", "bad"])
def test_a_cost_is_that_of_the_file_with_this_site_alone(folder, tmp_path, measured, site):
    options = QuantizeOptions(CalibrationOptions(str(folder / "data.npz")), PlacementOptions(only=(site,)))
    made = quantize_onnx(folder / "net.onnx", tmp_path / "q.onnx", options)
    stored = np.load(folder / "data.npz")
    expected, found = (costly.logits(onnx.load(path), stored["x"]) for path in (folder / "net.onnx", made.path))
    cost = next(one.cost for one in measured.sites if one.site == site)
    assert cost.rows == 20
    assert cost.snr_db == pytest.approx(costly.snr_db(found, expected), abs=1e-3)
    assert cost.changed == np.sum(found.argmax(1) != expected.argmax(1))
    right = [np.mean(one.argmax(1) == stored["labels"]) for one in (expected, found)]
    assert cost.drop == pytest.approx(right[0] - right[1])
    assert (cost.changed > 0) == (site == costly.BAD)


def test_together_is_the_cost_of_the_whole_plan(folder, tmp_path, measured):
    made = quantize_onnx(
        folder / "net.onnx", tmp_path / "q.onnx", QuantizeOptions(CalibrationOptions(str(folder / "data.npz")))
    )
    images = np.load(folder / "data.npz")["x"]
    expected, found = (costly.logits(onnx.load(path), images) for path in (folder / "net.onnx", made.path))
    assert measured.together.snr_db == pytest.approx(costly.snr_db(found, expected), abs=1e-3)


def test_it_is_the_same_again_and_labels_change_nothing_else(folder, measured):
    again = sensitivity_onnx(folder / "net.onnx", CalibrationOptions(str(folder / "data.npz")))
    assert again == measured
    plain = sensitivity_onnx(folder / "net.onnx", CalibrationOptions(str(folder / "plain.npz")))
    assert [one.site for one in plain.sites] == [one.site for one in measured.sites]
    assert {one.cost.drop for one in plain.sites} == {None}
    assert plain.sites[0].cost.changed == measured.sites[0].cost.changed


def test_sites_are_chosen_by_keep_and_only(folder):
    options = CalibrationOptions(str(folder / "plain.npz"), samples=3)
    kept = sensitivity_onnx(folder / "net.onnx", options, PlacementOptions(keep=("bad",)))
    assert {one.site for one in kept.sites} == {"w1", "block", "w3"}
    assert kept.together.rows == 3
    only = sensitivity_onnx(folder / "net.onnx", options, PlacementOptions(only=("stem", "fc")))
    assert {one.site for one in only.sites} == {"stem", "fc"}
    assert only.sites[0].cost.snr_db < math.inf


def test_gates_are_counted_running_free(exported, tmp_path):
    """Against ONNX Runtime's own gates of both files."""
    (tmp_path / "net.onnx").write_bytes(exported[1])
    images = int8.image(5, rows=2).numpy()
    np.savez(tmp_path / "data.npz", image=images)
    site = PlacementOptions(only=("net.layer1.0.conv1",))
    calibration = CalibrationOptions(str(tmp_path / "data.npz"))
    found = sensitivity_onnx(tmp_path / "net.onnx", calibration, site)
    made = quantize_onnx(tmp_path / "net.onnx", tmp_path / "q.onnx", QuantizeOptions(calibration, site))
    masks = []
    for path in (tmp_path / "net.onnx", made.path):
        model = onnx.load(path)
        names = list(instrument.sites(model))
        runner = OnnxRuntimeRunner(instrument.expose_gates(model, names), RuntimeOptions(optimization="none"))
        values = runner.run({"image": images})
        masks.append([values[instrument.gate_output(name)] for name in names])
    changed = sum(int((a != b).sum()) for a, b in zip(*masks, strict=True))
    (only,) = found.sites
    assert (only.cost.gates_changed, only.cost.gates) == (changed, sum(mask.size for mask in masks[0]))
    assert changed > 0


def test_shares_of_noise_that_is_nothing_or_infinite():
    assert _shares([1.0, 3.0]) == [0.25, 0.75]
    assert _shares([0.0, 0.0]) == [0.0, 0.0]
    assert _shares([1.0, math.inf, math.inf]) == [0.0, 0.5, 0.5]


def test_the_command_prints_a_table_and_writes_a_page(folder, tmp_path):
    page = tmp_path / "costs.html"
    found = run("sensitivity", folder / "net.onnx", "--data", folder / "data.npz", "--report", page)
    assert found.exit_code == 0, found.output
    rows = [line.split() for line in found.stdout.splitlines()]
    assert rows[2][:2] == [costly.BAD, "Conv"]
    assert ["all", "sites", "together"] in [row[:3] for row in rows]
    text = page.read_text()
    assert "<svg" in text
    assert text.index(">bad<") < text.index(">w3<")
    failed(run("sensitivity", folder / "net.onnx", "--data", folder / "data.npz", "--report", page), 2, "exists")
    failed(
        run("sensitivity", folder / "net.onnx", "--data", folder / "data.npz", "--report", tmp_path / "a.md"), 2,
        "costs of sites are not written as .md. Use .html or .json.",
    )  # fmt: skip
    as_json = run("sensitivity", folder / "net.onnx", "--data", folder / "data.npz", "--json")
    assert json.loads(as_json.stdout)["sites"][0]["site"] == costly.BAD


REFUSED = {
    "NaN": ("nan.npz", {}, UsageError, "row 3 of x holds NaN or an infinity"),
    "nothing there": ("none.npz", {}, UsageError, "none.npz does not exist"),
    "a label that is no class": ("wrong.npz", {}, UsageError, "is outside 0 to 4"),
    "a pattern that matches nothing": ("data.npz", {"keep": ("w9",)}, UsageError, "--keep 'w9' matches no node"),
    "all kept": ("data.npz", {"keep": ("*",)}, UsageError, "No layer is left to quantise"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_refused_in_one_line(folder, name):
    data, patterns, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message) as caught:
        sensitivity_onnx(folder / "net.onnx", CalibrationOptions(str(folder / data)), PlacementOptions(**patterns))
    assert "\n" not in str(caught.value)


def test_a_quantised_file_is_refused(folder, tmp_path):
    calibration = CalibrationOptions(str(folder / "data.npz"))
    quantize_onnx(folder / "net.onnx", tmp_path / "q.onnx", QuantizeOptions(calibration))
    with pytest.raises(ModelError, match=r"int8 \(Q/DQ\) already"):
        sensitivity_onnx(tmp_path / "q.onnx", calibration)
