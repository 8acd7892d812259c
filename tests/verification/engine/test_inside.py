"""The inside of engines with debug tensors: SRUs on the engine's own input, and segments. ONNX Runtime stands for the
library, faults planted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from scconv_deploy.graph import instrument
from scconv_deploy.records.parity import Check, Link
from scconv_deploy.report.load import from_json
from scconv_deploy.report.rejudge import check_report, rejudge
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.samples import noise_samples
from tests.verification.engine_cases import Watched, ends_of, judge, watched_opener
from tests.verification.judging import Calls, check_of, export_of

INSIDE = ["gates inside", "values inside", "segments"]
SITES = ["a.SRU", "b.SRU", "c", "a.SRU#2"]


@pytest.fixture(params=["fp32", "fp16", "bf16"])
def healthy(request, tiny_reference, tiny_bytes, tiny_fp16, tiny_bf16):
    """(reference, artifact) in each precision."""
    float32_model = onnx.load_model_from_string(tiny_bytes[0])
    return tiny_reference[0], {"fp32": float32_model, "fp16": tiny_fp16[1], "bf16": tiny_bf16[1]}[request.param]


def judged(reference, model, folder, damage=None, **changes):
    """Judge the inside of the whole engine; its SRUs alone are healthy."""
    built = {"opener": watched_opener, "debug_tensors": ends_of(model)} | changes
    return judge(reference, model, folder, damage=damage, whole_only=True, **built)


def scaled(name, factor):
    """A fault in one layer: its weights are off by a factor."""

    def damage(model):
        tensor = next(t for t in model.graph.initializer if t.name == name)
        value = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((value * factor).astype(value.dtype), name))

    return damage


def moved_cut(site, by=0.05):
    """A fault in one SRU: its thresholds are off."""

    def damage(model):
        node = instrument.sites(model)[site]
        tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
        value = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((value + by).astype(value.dtype), tensor.name))

    return damage


def statuses(report):
    return {name: check_of(report, name).status for name in INSIDE}


def test_a_healthy_engine_passes_inside_in_every_precision(healthy, tmp_path):
    report = judged(*healthy, tmp_path)
    assert report, report.failures
    (link,) = report.links
    assert [check.name for check in link.checks][2:5] == INSIDE
    assert statuses(report) == dict.fromkeys(INSIDE, "passed")
    gates = check_of(report, "gates inside").reason
    assert gates.startswith("4 SRUs inside the engine, same input, gates changed: ")
    assert "(0 unexplained)" in gates
    assert check_of(report, "segments").reason.startswith("6 segments from its own tensors: the worst, before")
    assert from_json(report.as_json()) == report
    assert not rejudge(report, {"engine_multiple": 1e-9})


def test_an_engine_without_debug_tensors_has_none_of_these_checks(healthy, tmp_path):
    report = judge(*healthy, tmp_path)
    assert report
    assert not set(INSIDE) & {check.name for check in report.links[0].checks}


@pytest.mark.parametrize("site", SITES[:3])
def test_a_fault_in_one_sru_of_the_whole_engine_is_named_and_no_segment_is_blamed(healthy, tmp_path, site):
    """What lies after the SRU goes on from its wrong output, in PyTorch too."""
    report = judged(*healthy, tmp_path, moved_cut(site))
    assert check_of(report, "teacher-forced gates").status == "passed"  # of each SRU built alone
    found = check_of(report, "gates inside")
    assert found.status == "failed"
    assert f"; worst {site} with" in found.reason or site == "a.SRU"  # its cut is that of its second call too
    assert check_of(report, "segments").status == "passed"


def test_a_wrong_data_path_of_one_sru_shows_in_its_values(tiny_reference, model, tmp_path):
    report = judged(tiny_reference[0], model, tmp_path, scaled("b.SRU.gamma", 1.01))
    assert "b.SRU inside the engine is" in check_of(report, "values inside").reason
    assert statuses(report) == {"gates inside": "passed", "values inside": "failed", "segments": "passed"}


@pytest.mark.parametrize(
    ("layer", "place"),
    [
        ("stem.weight", "before a.SRU"),
        ("b.CRU.PWC1.weight", "before c"),
        ("b.CRU.squeeze2.weight", "before c"),
        ("head.weight", "before output logits"),
    ],
)
def test_a_fault_in_one_segment_is_named_and_no_sru_is_blamed(healthy, tmp_path, layer, place):
    report = judged(*healthy, tmp_path, scaled(layer, 1.5))
    assert statuses(report) == {"gates inside": "passed", "values inside": "passed", "segments": "failed"}
    assert check_of(report, "segments").reason.startswith(f"the segment {place} departs first: relative L2")


def test_a_layer_that_is_used_in_two_segments_departs_first_in_the_earlier_one(tiny_reference, model, tmp_path):
    report = judged(tiny_reference[0], model, tmp_path, scaled("a.CRU.PWC1.weight", 1.01))
    reason = check_of(report, "segments").reason
    assert reason.startswith("the segment before b.SRU departs first: ")
    assert reason.endswith("; so do 2 more")  # of the second call: both outputs


def test_faults_that_hide_in_half_end_to_end_show_inside(tiny_reference, tiny_fp16, tmp_path):
    report = judged(tiny_reference[0], tiny_fp16[1], tmp_path, moved_cut("b.SRU", 0.01))
    assert check_of(report, "end to end").status == "passed"
    assert "; worst b.SRU with" in check_of(report, "gates inside").reason


def test_nan_inside_is_named(tiny_reference, model, tmp_path):
    class Poisoned(Watched):
        def run_watched(self, tensors, watched):
            outputs, shown = super().run_watched(tensors, watched)
            name = next(end.name for end in ends_of(model) if (end.site, end.side) == ("b.SRU", "x"))
            return outputs, shown | ({name: shown[name] * np.float32(np.nan)} if name in shown else {})

    def opener(engine, plugin):
        names = {end.name for end in ends_of(model)} - {"features"}
        return Poisoned(onnx.load_model_from_string(engine.verified_bytes()), sorted(names))

    report = judged(tiny_reference[0], model, tmp_path, opener=opener)
    assert "NaN or Inf in the engine's input of b.SRU on seeded noise" in check_of(report, "finite").reason
    assert "the segment before b.SRU departs first: relative L2 inf" in check_of(report, "segments").reason
    assert check_of(report, "gates inside").reason.startswith("3 SRUs inside the engine")


# --- what is not judged -------------------------------------------------------------------------------------------


def test_ends_that_were_not_marked_or_not_shown_are_said(tiny_reference, model, tmp_path):
    ends = ends_of(model)
    shown_not = next(end.name for end in ends if (end.site, end.side) == ("c", "y"))
    report = judged(
        tiny_reference[0], model, tmp_path,
        debug_tensors=tuple(end for end in ends if (end.site, end.side) != ("a.SRU", "x")),
        opener=partial(watched_opener, hidden=[shown_not]),
    )  # fmt: skip
    assert report
    caveats = " / ".join(report.caveats)
    assert "a.SRU: the library did not mark its ends when it built the engine" in caveats
    assert "c: the library did not show its ends when it ran the engine" in caveats
    assert check_of(report, "gates inside").reason.startswith("2 SRUs inside the engine")
    segments = check_of(report, "segments")
    assert (segments.status, segments.reason) == ("not run", "the ends of a.SRU cannot be read")


def test_an_engine_whose_input_is_an_srus_input_is_read_there(tmp_path):
    """It has no mark; the values are those that the engine rounds its input to."""
    torch.manual_seed(0)
    reference, model = export_of(Calls(lambda net, x: net.b(net.a(x))).eval())
    report = judged(reference, model, tmp_path)
    assert statuses(report) == dict.fromkeys(INSIDE, "passed")
    assert check_of(report, "segments").reason.startswith("3 segments")


def test_gates_of_no_known_sru_leave_the_segments_unjudged(tmp_path):
    torch.manual_seed(0)
    reference, model = export_of(Calls(lambda net, x: net.b(torch.where(net.a(x) > 0.1, x, -x))).eval())
    report = judged(reference, model, tmp_path)
    assert check_of(report, "gates inside").status == "passed"
    found = check_of(report, "segments")
    assert (found.status, "gates of no known SRU" in found.reason) == ("not run", True)


class WithoutPyTorch(TorchReference):
    """A reference that cannot start from an engine's tensors, as a bundle's."""

    def between(self, run, outputs):
        return None


def test_without_pytorch_the_segments_are_not_run(tiny_reference, model, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.verification.engine_cases.TorchReference", WithoutPyTorch)
    report = judged(tiny_reference[0], model, tmp_path)
    assert report
    found = check_of(report, "segments")
    assert (found.status, "is no model in PyTorch" in found.reason) == ("not run", True)
    assert check_of(report, "gates inside").status == "passed"


def test_gates_that_were_seen_inside_alone_are_enough_to_sign(tiny_reference, model, tmp_path):
    report = judged(tiny_reference[0], model, tmp_path)
    (link,) = report.links
    stored = tmp_path / "report.json"

    def signed(*left_out):
        checks = [check for check in link.checks if check.name not in left_out]
        checks.append(Check("teacher-forced gates", "not run", "no SRU was built"))
        stored.write_bytes(replace(report, links=(Link.of("tensorrt", checks),)).as_bytes())
        return bool(check_report(stored, ["tensorrt"]))

    assert signed("teacher-forced gates")
    assert not signed("teacher-forced gates", "gates inside")


def test_the_light_samples_run_without_a_listener(tiny_reference, model, tmp_path):
    """With data, most inputs are compared end to end only."""
    watched = []

    class Counted(Watched):
        def run_watched(self, tensors, names):
            watched.extend(names)
            return super().run_watched(tensors, names)

    light = [replace(sample, deep=False) for sample in noise_samples(tiny_reference[0].signature, 0)]
    inner = sorted({end.name for end in ends_of(model)} - {"features"})

    def opener(engine, plugin):
        return Counted(onnx.load_model_from_string(engine.verified_bytes()), inner)

    report = judged(tiny_reference[0], model, tmp_path, samples=light, opener=opener)
    assert watched == []
    assert check_of(report, "segments").reason == "no sample was run in full"
