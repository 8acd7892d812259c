"""quantize: the file, the budget, the cache, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from scconv_deploy import cli
from scconv_deploy.errors import IntegrityError, ModelError, ParityError, UsageError
from scconv_deploy.graph.quantization import read_quantization, record_of
from scconv_deploy.graph.types import quantization_of
from scconv_deploy.precision.calibration import Method
from scconv_deploy.precision.placement import PlacementOptions
from scconv_deploy.records.quantization import METADATA, REDUCED_CODE
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.verification.options import Checks
from scconv_deploy.workflows.calibrate import CalibrationOptions
from scconv_deploy.workflows.quantize import QuantizeOptions, quantize_model, quantize_onnx
from tests import int8
from tests.mutations import SITE


@pytest.fixture(scope="module")
def folder(exported, tmp_path_factory):
    """The float file, and data for it: labelled with what the float model answers, but for one row in eight."""
    folder = tmp_path_factory.mktemp("quantize")
    (folder / "net.onnx").write_bytes(exported[1])
    images = int8.image(5, rows=16).numpy()
    runner = OnnxRuntimeRunner(onnx.load(folder / "net.onnx"))
    labels = np.concatenate([runner.run({"image": images[i : i + 2]})["first"].argmax(1) for i in range(0, 16, 2)])
    labels[::8] = (labels[::8] + 1) % 10
    np.savez(folder / "data.npz", image=images, labels=labels)
    np.savez(folder / "plain.npz", image=images)
    np.savez(folder / "one.npz", image=images[:1])
    np.savez(folder / "shape.npz", image=images[:, :, :8])
    images[3, 0, 0, 0] = np.nan
    np.savez(folder / "nan.npz", image=images)
    return folder


def options(folder, data="data.npz", **settings) -> QuantizeOptions:
    given = data if data == "random" else str(folder / data)
    placement = PlacementOptions(settings.pop("keep", ()), settings.pop("only", ()))
    return QuantizeOptions(CalibrationOptions(given, **settings), placement)


def checks_of(result):
    return {check.name: check for link in result.report.links for check in link.checks}


def test_the_file_says_how_it_was_made_and_costs_are_paired(folder, tmp_path):
    result = quantize_onnx(folder / "net.onnx", tmp_path / "q.onnx", options(folder, samples=7))
    model = onnx.load(result.path)
    assert (result.precision, quantization_of(model)) == ("int8", "int8 (Q/DQ)")
    record = record_of(model)
    assert (record.method, record.samples, record.data, record.target) == ("max", 7, "data.npz", "gpu")
    assert record.model_sha256 == result.calibration.model_sha256
    assert len(record.activations) == len({q.value for q in read_quantization(model).quantizers.values()})
    assert result.multiply_adds[0] > 0.9 * result.multiply_adds[1]
    assert {reason for _, reason in result.kept} >= {"Conv: a first layer: the input in full"}
    found = checks_of(result)
    assert found["scales"].status == found["teacher-forced gates"].status == "passed"
    assert found["budget"].status == "not run"
    assert "accuracy" in found["budget"].reason
    assert "16 rows" in found["budget"].reason
    assert result.report.verdict == "not run", "without the model nothing proves it"
    assert (
        "not judged: fake-quantised PyTorch would prove it, and was not run (name the model with --reference MODEL)"
        in (found["quantization"].reason)
    )
    assert "judged and right: scales, weight codes, static, teacher-forced gates" in found["quantization"].reason
    assert found["weight codes"].reason == "int8 weights of 18 layers are the reference's, rounded to their scales"
    again = quantize_onnx(folder / "net.onnx", tmp_path / "again.onnx", options(folder, samples=7))
    assert again.sha256 == result.sha256


def test_the_optimised_file_computes_the_same(folder, tmp_path):
    """Quantisers survive ONNX Runtime's own graph passes; on this CPU its integer kernels may saturate, not crash."""
    result = quantize_onnx(folder / "net.onnx", tmp_path / "q.onnx", options(folder))
    x = {"image": int8.image(6).numpy()}
    model = onnx.load(result.path)
    plain, fast = (OnnxRuntimeRunner(model, RuntimeOptions(optimization=level)).run(x) for level in ("none", "all"))
    assert np.linalg.norm(fast["first"] - plain["first"]) < 0.5 * np.linalg.norm(plain["first"])


def test_a_budget_that_holds_passes_and_one_that_does_not_writes_nothing(folder, tmp_path):
    kept = quantize_onnx(
        folder / "net.onnx", tmp_path / "q.onnx", options(folder), checks=Checks(tolerances={"max_drop": 0.5})
    )
    assert checks_of(kept)["budget"].status == "passed"
    # scales of tiny numbers cut everything off
    small = options(folder, method=Method("percentile", 50.0))
    page = tmp_path / "costs.html"
    with pytest.raises(ParityError, match=r"budget: quantisation costs: accuracy .* \(budget 0.00%\)") as error:
        quantize_onnx(folder / "net.onnx", tmp_path / "r.onnx", small, checks=Checks(tolerances={"max_drop": 0.0}),
                      report=page)  # fmt: skip
    assert not (tmp_path / "r.onnx").exists()
    assert f"Nothing but {page} was written" in str(error.value)
    assert "(budget 0.00%)" in page.read_text(), "the report of a file that failed says why"


def test_an_interval_beyond_the_budget_is_said_with_the_rows_that_would_do(folder, tmp_path):
    """The estimate decides; sixteen rows cannot show that a budget of 10 % holds."""
    result = quantize_onnx(
        folder / "net.onnx", tmp_path / "q.onnx", options(folder), checks=Checks(tolerances={"max_drop": 0.1})
    )
    found = checks_of(result)
    assert found["budget"].status == "passed"
    interval = found["budget interval"]
    assert interval.status == "not run"
    (beyond,) = interval.quantities
    assert beyond.value > beyond.limit == 0.1
    assert (
        "too few rows to show that the budget of 10.00% holds: the 95% interval of the drop goes to" in interval.reason
    )
    assert "rows would show it" in interval.reason
    link = next(link for link in result.report.links if link.name == "budget")
    assert link.status == "passed"
    wide = quantize_onnx(
        folder / "net.onnx", tmp_path / "r.onnx", options(folder), checks=Checks(tolerances={"max_drop": 0.9})
    )
    assert "budget interval" not in checks_of(wide), "the interval lies within the budget"


def test_without_labels_the_changed_answers_bound_the_drop(folder, tmp_path):
    result = quantize_onnx(
        folder / "net.onnx", tmp_path / "q.onnx", options(folder, "plain.npz"),
        checks=Checks(tolerances={"max_drop": 0.5}),
    )  # fmt: skip
    reason = checks_of(result)["budget"].reason
    assert "without labels the share of changed answers bounds the drop" in reason
    assert "SNR" in reason


def test_with_the_model_it_is_proved(folder, tmp_path):
    factory = f"{__file__}:net"
    found = CliRunner().invoke(cli.app, [
        "quantize", str(folder / "net.onnx"), "-o", str(tmp_path / "q.onnx"), "--data", str(folder / "data.npz"),
        "--reference", factory, "--input", "2x3x16x16", "--deep", "2", "--target", "cpu", "--reduce-range", "--json",
    ])  # fmt: skip
    assert found.exit_code == 0, found.stderr
    document = json.loads(found.stdout)
    assert document["report"]["verdict"] == "passed"
    checks = {c["name"]: c for link in document["report"]["links"] for c in link["checks"]}
    assert checks["integer kernels"]["status"] == "passed"
    assert checks["integer kernels"]["quantities"][0]["value"] < 1
    record = record_of(onnx.load(tmp_path / "q.onnx"))
    assert (record.target, record.largest_code) == ("cpu", REDUCED_CODE)
    assert document["calibration"]["samples"] == 16
    assert "ranges" not in document["calibration"]


def net():
    """A factory."""
    return int8.two_heads(1, int8.SIDE)


def test_the_cache_is_used_where_it_fits(folder, tmp_path):
    cache, said = tmp_path / "ranges.json", []
    first = quantize_onnx(folder / "net.onnx", tmp_path / "a.onnx", options(folder, cache=cache))
    second = quantize_onnx(folder / "net.onnx", tmp_path / "b.onnx", options(folder, cache=cache), progress=said.append)
    assert first.sha256 == second.sha256
    assert f"ranges from {cache}" in said
    said.clear()
    quantize_onnx(
        folder / "net.onnx", tmp_path / "c.onnx", options(folder, samples=4, cache=cache), progress=said.append
    )
    assert f"{cache} is of another model, data or method" in said
    cache.write_text("[]")
    with pytest.raises(IntegrityError, match="no calibration cache"):
        quantize_onnx(folder / "net.onnx", tmp_path / "d.onnx", options(folder, cache=cache))


def test_noise_is_taken_where_it_is_asked_for(folder, tmp_path):
    result = quantize_onnx(folder / "net.onnx", tmp_path / "q.onnx", options(folder, "random", samples=6))
    assert (result.calibration.data, result.calibration.samples) == ("random", 6)


NOTED = {
    "one row": (int8.image(5, rows=1).numpy(), ["calibrated on one row alone: other inputs may be cut off"]),
    "the same row four times": (
        np.repeat(int8.image(5, rows=1).numpy(), 4, 0), ["only 1 of the 4 rows of the calibration differ"],
    ),
    "one constant row among others": (
        np.concatenate([int8.image(5, rows=5).numpy(), np.full((1, 3, 16, 16), 0.5, np.float32)]),
        ["1 of 6 rows of the calibration hold one value throughout"],
    ),
    "zeros alone": (
        np.zeros((4, 3, 16, 16), np.float32),
        ["only 1 of the 4 rows of the calibration differ", "4 of 4 rows of the calibration hold one value"],
    ),
    "photographs": (int8.image(5, rows=4).numpy(), []),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTED)
def test_rows_that_say_little_are_noted(exported, tmp_path, name):
    images, notes = NOTED[name]
    np.savez(tmp_path / "rows.npz", image=images)
    log = StageLog()
    made = quantize_model(onnx.load_model_from_string(exported[1]), "", options(tmp_path, "rows.npz"), log)
    assert len(made.notes) == len(notes)
    assert all(found.startswith(expected) for found, expected in zip(made.notes, notes, strict=True))
    assert [line for line in log.records[-1].applied if line.startswith("note: ")] == [f"note: {n}" for n in made.notes]


@pytest.mark.parametrize("inside", ["export", "deploy"])
def test_a_cache_that_is_the_output_is_refused(folder, tmp_path, inside):
    with pytest.raises(UsageError, match="is the output itself, or in it"):
        quantize_onnx(folder / "net.onnx", tmp_path / "q.onnx", options(folder, cache=tmp_path / "x" / ".." / "q.onnx"))
    cache = tmp_path / "out" / "ranges.json" if inside == "deploy" else tmp_path / "out"
    found = CliRunner().invoke(cli.app, [
        inside, f"{__file__}:net", "--input", "2x3x16x16", "-o", str(tmp_path / "out"), "--precision", "int8",
        "--data", str(folder / "data.npz"), "--calibration-cache", str(cache),
    ])  # fmt: skip
    assert found.exit_code == 2
    assert "is the output itself, or in it" in found.stderr
    assert not (tmp_path / "out").exists()


REFUSED = {
    "another shape": ("shape.npz", {}, UsageError, r"image is float32\[16, 3, 8, 16\], expected numbers \[N, 3, 16"),
    "NaN": ("nan.npz", {}, UsageError, "row 3 of image holds NaN or an infinity"),
    "nothing there": ("none.npz", {}, UsageError, "none.npz does not exist"),
    "a pattern that matches nothing": ("data.npz", {"keep": ("nt.conv1",)}, UsageError, "--keep 'nt.conv1' matches no"),
    "only the first layer is kept": ("data.npz", {"keep": ("net.*",)}, UsageError, "No layer is left to quantise"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_calibrated_is_refused_in_one_line(folder, tmp_path, name):
    data, settings, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message) as caught:
        quantize_onnx(folder / "net.onnx", tmp_path / "q.onnx", options(folder, data, **settings))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "q.onnx").exists()


def test_activations_that_are_zero_throughout_are_refused(folder, tmp_path):
    """A layer whose weights and biases are 0 gives what has no scale."""
    model = onnx.load(folder / "net.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.startswith("net.layer1.0.conv1.weight"):
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))
    onnx.save(model, tmp_path / "dead.onnx")
    with pytest.raises(UsageError, match=r"is 0 on all of the calibration data, so it has no scale"):
        quantize_onnx(tmp_path / "dead.onnx", tmp_path / "q.onnx", options(folder))


def test_a_model_that_gives_nan_is_refused(folder, tmp_path):
    model = onnx.load(folder / "net.onnx")
    bias = next(t for t in model.graph.initializer if t.name == "net.conv1.weight_bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(bias.dims, np.inf, np.float32), bias.name))
    onnx.save(model, tmp_path / "inf.onnx")
    with pytest.raises(ModelError, match="so it has no range"):
        quantize_onnx(tmp_path / "inf.onnx", tmp_path / "q.onnx", options(folder))


def test_a_quantised_file_is_refused(folder, tmp_path):
    quantize_onnx(folder / "net.onnx", tmp_path / "q.onnx", options(folder))
    with pytest.raises(ModelError, match=r"int8 \(Q/DQ\) already"):
        quantize_onnx(tmp_path / "q.onnx", tmp_path / "r.onnx", options(folder))


def test_a_damaged_fence_fails_without_the_model_too(folder, tmp_path, exported):
    """The float file's own SRUs are the reference of gates, and the metadata those of scales."""
    made = quantize_onnx(folder / "net.onnx", tmp_path / "q.onnx", options(folder))
    weights = ("scale of a weight off by one ulp", "per-tensor weights", "int8 weight off by one code")
    for name in ("quantised statistic", "scale of an input off by one ulp", "quantised cut", *weights):
        model = onnx.load(made.path)
        int8.FAULTS[name].damage(model)
        failed = int8.failed_checks(int8.judge_against_float(onnx.load(folder / "net.onnx"), model))
        assert ("scales" in failed) == (name not in weights)
        assert ("weight codes" in failed) == (name in weights)
        assert ("static" in failed) == (name in ("quantised statistic", "quantised cut"))


def test_the_metadata_are_read_strictly(folder, tmp_path):
    made = quantize_onnx(folder / "net.onnx", tmp_path / "q.onnx", options(folder))
    model = onnx.load(made.path)
    entry = next(entry for entry in model.metadata_props if entry.key == METADATA)
    entry.value = entry.value.replace('"samples"', '"sample"')
    with pytest.raises(IntegrityError, match=f"{METADATA} are damaged: samples is missing"):
        record_of(model)
    assert SITE in {node.name for node in model.graph.node}


def test_export_and_deploy_quantise_and_the_bundle_judges_itself(folder, tmp_path):
    common = [f"{__file__}:net", "--input", "2x3x16x16", "--data", str(folder / "data.npz"), "--precision", "int8"]
    exported = CliRunner().invoke(cli.app, ["export", *common, "-o", str(tmp_path / "q.onnx"), "--json"])
    assert exported.exit_code == 0, exported.stderr
    stage = next(stage for stage in json.loads(exported.stdout)["stages"] if stage["name"] == "quantize")
    assert ["net.conv1", "Conv: a first layer: the input in full"] in stage["skipped"]
    deployed = CliRunner().invoke(cli.app, ["deploy", *common, "-o", str(tmp_path / "b"), "--deep", "2", "--json"])
    assert deployed.exit_code == 0, deployed.stderr
    assert (tmp_path / "b" / "model.onnx").read_bytes() == (tmp_path / "q.onnx").read_bytes()
    judged = CliRunner().invoke(cli.app, ["verify", str(tmp_path / "b"), "--json"])
    assert judged.exit_code == 0, judged.stderr
    link = next(link for link in json.loads(judged.stdout)["links"] if link["name"] == "precision")
    assert next(c for c in link["checks"] if c["name"] == "codes")["status"] == "passed"
    model = onnx.load(tmp_path / "b" / "model.onnx")
    int8.FAULTS["per-tensor weights"].damage(model)
    onnx.save(model, tmp_path / "b" / "model.onnx")
    damaged = CliRunner().invoke(cli.app, ["verify", str(tmp_path / "b"), "--quiet"])
    assert damaged.exit_code == 6
    assert "codes of quantisers, same input" in damaged.stderr


def tied():
    """A factory."""
    return int8.tied_net()


FLOAT = {
    "once": "Conv: its module is called several times, with other weights in the graph",
    "kernel": "Conv: the file does not say which module in PyTorch has its weights",
    "standardized": "Conv: standardized is a Standardized in PyTorch, which computes more than its base class",
}


def test_modules_that_share_a_weight_are_quantised_and_proved(folder, tmp_path):
    """What PyTorch has no place for stays in float, in ``quantize --reference`` as in ``deploy``."""
    model = [f"{__file__}:tied", "--input", "2x3x16x16", "--data", str(folder / "plain.npz"), "--deep", "2", "--json"]
    found = CliRunner().invoke(cli.app, ["deploy", *model, "--precision", "int8", "-o", str(tmp_path / "b")])
    assert found.exit_code == 0, found.stderr
    report = json.loads(found.stdout)["report"]
    stage = next(stage for stage in report["stages"] if stage["name"] == "quantize")
    rewrite = next(stage for stage in report["stages"] if stage["name"] == "rewrite")
    assert any(line.startswith("--cru auto takes halves for int8") for line in rewrite["applied"])
    chosen = [line.split(":")[0] for line in stage["applied"]]
    assert {"a", "b", "e", "f"} <= set(chosen)
    assert chosen.count("twice") == 2
    assert dict(stage["skipped"]).items() >= FLOAT.items()
    quantized = read_quantization(onnx.load(tmp_path / "b" / "model.onnx"))
    norms = {site.path: site.norm for site in quantized.layers}
    assert norms["a"] == "bn"
    assert not any(norms[path] for path in ("b", "e", "f"))
    assert len({site.weights.name for site in quantized.layers if site.path in ("e", "f")}) == 1
    links = {link["name"]: link for link in report["links"]}
    codes = next(check for check in links["precision"]["checks"] if check["name"] == "codes")
    assert codes["status"] == "passed"
    assert f"at {len(quantized.quantizers)} places" in codes["reason"]


def test_a_float_file_of_modules_that_share_a_weight_is_quantised_and_proved(folder, tmp_path):
    model = [f"{__file__}:tied", "--input", "2x3x16x16"]
    assert CliRunner().invoke(cli.app, ["export", *model, "-o", str(tmp_path / "f.onnx")]).exit_code == 0
    found = CliRunner().invoke(cli.app, [
        "quantize", str(tmp_path / "f.onnx"), "-o", str(tmp_path / "q.onnx"), "--reference", *model,
        "--data", str(folder / "one.npz"), "--json",
    ])  # fmt: skip
    assert found.exit_code == 0, found.stderr
    document = json.loads(found.stdout)
    assert document["report"]["verdict"] == "passed"
    assert {"a", "b", "e", "f", "twice"} <= {node for node, _ in document["chosen"]}
    assert dict(document["kept"]).items() >= FLOAT.items()


def test_few_rows_of_the_data_are_judged_in_full_where_codes_are_gates_too():
    from scconv_deploy.commands.calibrating import Int8Options
    from scconv_deploy.commands.options import CheckOptions

    assert Int8Options().checks(CheckOptions(data="d.npz")).deep == 8
    assert Int8Options().checks(CheckOptions(data="d.npz", deep=20)).deep == 20
    assert CheckOptions(data="d.npz").checks().deep == 64


def test_int8_keeps_the_convolutions_of_a_cru_apart():
    """Merged ones have no module in PyTorch whose weights could be compared."""
    from scconv_deploy.workflows.export import ExportOptions

    engines = ("onnx", "tensorrt-rtx")
    assert ExportOptions(backends=engines).resolved_cru == "merged"
    given = QuantizeOptions(CalibrationOptions("random"))
    assert ExportOptions(backends=engines, quantization=given).resolved_cru == "halves"
    assert ExportOptions(precision="fp16", quantization=given).resolved_opset == 19
    with pytest.raises(UsageError, match=r"--precision int8\+fp16 needs opset 19 or later, found 18"):
        ExportOptions(precision="fp16", quantization=given, opset=18)
    with pytest.raises(UsageError, match="--io half is for half precision"):
        ExportOptions(quantization=given, io="half")


def test_a_file_that_cannot_run_here_needs_its_model_and_inspect_names_both_types(folder, tmp_path, exported):
    import onnx_ir as ir

    from scconv_deploy.graph.file import serialize
    from scconv_deploy.precision.half import HalfOptions, converted
    from scconv_deploy.records.stage import StageLog
    from scconv_deploy.workflows.export import ExportOptions, export_to_ir

    model = export_to_ir(exported[0], ExportOptions(opset=22), StageLog())
    for precision in ("fp16", "bf16"):
        half = ir.to_proto(converted(model, HalfOptions(precision)).model)
        (tmp_path / f"{precision}.onnx").write_bytes(serialize(ir.from_proto(half)))
    with pytest.raises(
        UsageError, match=r"cannot run .*bf16.onnx here, so without its model nothing could be compared"
    ):
        quantize_onnx(tmp_path / "bf16.onnx", tmp_path / "q.onnx", options(folder))
    made = quantize_onnx(tmp_path / "fp16.onnx", tmp_path / "q.onnx", options(folder))
    assert made.precision == "int8+fp16"
    found = CliRunner().invoke(cli.app, ["inspect", str(made.path), "--json"])
    assert json.loads(found.stdout)["precision"] == "int8 (Q/DQ) on fp16"
