"""The verdict on engines. ONNX Runtime stands for the library, so what is tested is the judging, faults planted."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from scconv_deploy.errors import BuildError, IntegrityError, MissingRuntimeError, ModelError, UsageError
from scconv_deploy.graph import instrument
from scconv_deploy.model.replay import run_disturbed
from scconv_deploy.records import tolerances
from scconv_deploy.records.parity import Link
from scconv_deploy.records.stage import StageLog
from scconv_deploy.report.load import from_json
from scconv_deploy.report.rejudge import check_report, rejudge
from scconv_deploy.runtimes.tensorrt.engine import EngineLayer
from scconv_deploy.system import gpu
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.engine.srus import LoneSRUs
from scconv_deploy.verification.engine.verdict import judge_engine, try_to_judge, with_engine
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.samples import Sample, noise_samples
from tests.verification.engine_cases import copy_of, engine_of, judge, ort_builder, ort_opener
from tests.verification.judging import Calls, check_of, damage_weight, edit_body, export_of

SITES = ["a.SRU", "b.SRU", "c", "a.SRU#2"]


@pytest.fixture(params=["fp32", "fp16", "bf16"])
def healthy(request, tiny_reference, tiny_bytes, tiny_fp16, tiny_bf16):
    """(reference, artifact) in each precision."""
    float32_model = onnx.load_model_from_string(tiny_bytes[0])
    return tiny_reference[0], {"fp32": float32_model, "fp16": tiny_fp16[1], "bf16": tiny_bf16[1]}[request.param]


def reason_of(report, name):
    found = check_of(report, name)
    assert found.status == "failed", found
    return found.reason


def test_a_healthy_engine_passes_in_every_precision(healthy, tmp_path):
    report = judge(*healthy, tmp_path)
    assert report, report.failures
    (link,) = report.links
    assert (link.name, link.status) == ("tensorrt", "passed")
    assert [c.name for c in link.checks] == [
        "teacher-forced gates", "values of SRUs", "end to end", "end to end", "top-1",
    ]  # fmt: skip
    assert [s.site for s in report.srus] == SITES
    for sru in report.srus:
        assert sru.teacher_forced.unexplained == 0
        assert sru.teacher_forced.gates + sru.teacher_forced.undecidable == 2048
        assert sru.teacher_forced.gates > 900
        assert sru.static.status == "not run"
    (engine,) = report.engines
    assert [o.name for o in engine.outputs] == ["logits", "features"]
    assert all(o.noise_measured for o in engine.outputs)
    assert from_json(report.as_json()) == report  # it can be stored, read and judged again
    assert not rejudge(report, {"engine_multiple": 1e-9})


# --- faults of the library: in the whole engine and in each SRU alone ---------------------------------------------


def invert(model):
    edit_body(model, "GreaterOrEqual (sru__signed, sru__threshold)", "Less (sru__signed, sru__threshold)")


def not_crossed(model):
    edit_body(model, "value_ints = [1, 0]", "value_ints = [0, 1]")


def larger_eps(model):
    edit_body(model, "sru__s = Add (sru__deviation, sru__eps_std)", LARGER_EPS)


LARGER_EPS = """sru__eps_more = Constant <value_float = 1e-3> ()
    sru__s = Add (sru__deviation, sru__eps_more)"""


def moved_cut(model):
    """tau off by 1e-3: of every cut of SRU a, the difference that makes in q = (tau - beta * w) / (gamma * w)."""
    for site in ("a.SRU", "a.SRU#2"):
        node = instrument.sites(model).get(site)
        for tensor in model.graph.initializer:
            if node is not None and tensor.name == node.input[1]:
                value = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array((value + 1e-3 * 16).astype(np.float32), tensor.name))


@pytest.mark.parametrize(
    ("damage", "check", "said"),
    [
        (invert, "teacher-forced gates", "worst a.SRU"),
        (moved_cut, "teacher-forced gates", "worst a.SRU"),
        (not_crossed, "teacher-forced gates", "worst a.SRU"),
        (larger_eps, "teacher-forced gates", "worst a.SRU"),
    ],
)
def test_a_fault_of_the_library_is_named_by_the_sru(healthy, tmp_path, damage, check, said):
    report = judge(*healthy, tmp_path, damage=damage)
    assert said in reason_of(report, check)
    assert "unexplained" in reason_of(report, check)
    flips = {s.site: s.teacher_forced.unexplained for s in report.srus}
    assert flips["a.SRU"] > 0
    assert flips["b.SRU"] == flips["c"] == 0  # SRUNorm and SRUSoft have bodies of their own


def test_values_that_no_gates_explain_fail_by_the_sru(healthy, tmp_path):
    def damage(model):
        edit_body(model, "sru__r_f = Sigmoid (sru__affine)", SCALED, "SRUSoft")

    report = judge(*healthy, tmp_path, damage=damage)
    assert "c alone is" in reason_of(report, "values of SRUs")
    assert "pairs of outputs that no gates explain" in reason_of(report, "values of SRUs")


SCALED = """sru__r_1 = Sigmoid (sru__affine)
    sru__more = Constant <value_float = 1.05> ()
    sru__r_f = Mul (sru__r_1, sru__more)"""


# --- faults that the whole engine has alone -----------------------------------------------------------------------


@pytest.mark.parametrize("damage", [invert, not_crossed])
def test_a_fault_in_the_whole_engine_alone_shows_end_to_end(healthy, tmp_path, damage):
    report = judge(*healthy, tmp_path, damage=damage, whole_only=True)
    assert "the noise of explained gate changes" in reason_of(report, "end to end")
    assert check_of(report, "teacher-forced gates").status == "passed"


@pytest.mark.parametrize(("precision", "factor"), [("fp32", 1.01), ("fp16", 1.01), ("bf16", 1.1)])
def test_a_layer_whose_weights_are_off_fails_end_to_end(
    precision, factor, tiny_reference, model, tiny_fp16, tiny_bf16, tmp_path
):
    """bfloat16 has no finer than 3e-2 end to end, float16 4e-3: what is smaller than rounding cannot be seen."""

    def damage(model):
        tensor = next(t for t in model.graph.initializer if t.name == "head.weight")
        value = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((value * factor).astype(value.dtype), tensor.name))

    artifact = {"fp32": model, "fp16": tiny_fp16[1], "bf16": tiny_bf16[1]}[precision]
    report = judge(tiny_reference[0], artifact, tmp_path, damage=damage, whole_only=True)
    assert "logits: relative L2" in reason_of(report, "end to end")
    features = next(o for o in report.engines[0].outputs if o.name == "features")
    assert features.metrics.relative_l2 < 4 * features.noise  # it does not depend on that layer


def test_one_weight_of_a_float32_engine_off_by_a_hundredth_of_its_layer_fails(tiny_reference, model, tmp_path):
    report = judge(tiny_reference[0], model, tmp_path, damage=lambda m: damage_weight(m, 1e-2), whole_only=True)
    assert "the noise of explained gate changes" in reason_of(report, "end to end")


def test_a_biased_deviation_shows_in_the_values(tiny_reference, model, tmp_path):
    """By a thousandth: in gates alone it need not show, in data that it divides it does."""

    def damage(model):
        biased = "sru__var = Div (sru__squares, sru__group_size_f)"
        edit_body(model, "sru__var = Div (sru__squares, sru__freedom)", biased, "SRUNorm")

    assert "b.SRU alone is" in reason_of(judge(tiny_reference[0], model, tmp_path, damage=damage), "values of SRUs")


def test_outputs_that_changed_places_are_refused(healthy, tmp_path):
    def damage(model):
        outputs = list(model.graph.output)
        del model.graph.output[:]
        model.graph.output.extend(outputs[::-1])

    with pytest.raises(UsageError, match="The engine's outputs are features, logits; the reference's logits, features"):
        judge(*healthy, tmp_path, damage=damage, whole_only=True)


def test_outputs_under_each_others_names_break_the_contract(healthy, tmp_path):
    def swapped(engine, plugin):
        return Edited(ort_opener(engine, plugin), lambda y: {"logits": y["features"], "features": y["logits"]})

    report = judge(*healthy, tmp_path, opener=swapped)
    assert "output logits is float32[2, 16, 8, 8], PyTorch's float32[2, 5]" in reason_of(report, "contract")


def test_rows_that_changed_places_change_the_answers(healthy, tmp_path):
    def rolled(engine, plugin):
        return Edited(ort_opener(engine, plugin), lambda y: y | {"logits": np.roll(y["logits"], 1, axis=1)})

    report = judge(*healthy, tmp_path, opener=rolled)
    assert "logits [0] on seeded noise answers" in reason_of(report, "top-1")


def test_nan_is_named_by_its_output(healthy, tmp_path):
    def poisoned(engine, plugin):
        return Edited(ort_opener(engine, plugin), lambda y: y | {"logits": y["logits"] * np.float32(np.nan)})

    report = judge(*healthy, tmp_path, opener=poisoned)
    assert "NaN or Inf in the engine's output logits on seeded noise" in reason_of(report, "finite")
    assert [o.name for o in report.engines[0].outputs] == ["features"]


class Edited:
    """A runner whose outputs are changed."""

    def __init__(self, runner, edit):
        self._runner, self._edit = runner, edit
        self.inputs, self.outputs = runner.inputs, runner.outputs

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._runner.__exit__(*exc)

    def run(self, tensors):
        return self._edit(self._runner.run(tensors))


class Disturbed:
    """PyTorch with gates that see their inputs through noise: what an engine with more or less rounding computes."""

    def __init__(self, reference, relative, seed):
        self._reference, self._relative, self._seed = reference, relative, seed
        self.inputs, self.outputs = ("image",), ("output",)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def run(self, tensors):
        reference, given = self._reference, {n: torch.from_numpy(v) for n, v in tensors.items()}
        found = run_disturbed(reference.swapped, reference.signature, given, self._relative, self._seed)
        return {name: value.numpy() for name, value in found.items()}


def test_gates_that_rounding_changes_do_not_fail_a_healthy_engine(tmp_path):
    """Noise that is drawn anew: its changes are not those that the reference drew. 256 times as much fails."""
    torch.manual_seed(0)
    reference, model = export_of(Calls(lambda net, x: net.a(x)).eval())

    def judged(relative, seed):
        report = judge(
            reference, model, tmp_path, opener=lambda engine, plugin: Disturbed(reference, relative, seed),
            layers=(EngineLayer("conv", "CONVOLUTION", ("HALF",)),),
        )  # fmt: skip
        return bool(report), report.engines[0].outputs[0]

    healthy = [judged(2.0**-10, seed) for seed in range(1000, 1012)]
    assert all(good for good, _ in healthy)
    changed = [o for _, o in healthy if o.metrics.relative_l2 > 4 * 2.0**-10]
    assert changed  # gates that changed moved it further than the smallest limit,
    assert all(o.noise > 2.0**-10 for o in changed)  # and the reference's own noise allowed for that
    assert not any(good for good, _ in (judged(2.0**-2, seed) for seed in range(1000, 1003)))


# --- what has no verdict ------------------------------------------------------------------------------------------


def test_an_sru_that_cannot_be_built_alone_is_not_run_and_said(tiny_reference, model, tmp_path):
    @contextmanager
    def refusing(engine, site, models):
        if site == "b.SRU":
            raise BuildError("TensorRT cannot build the SRU b.SRU alone: out of tactics", "Change it.")
        with ort_builder()(engine, site, models) as runner:
            yield runner

    source = TorchReference(tiny_reference[0])
    report = judge_engine(
        source, engine_of(model, tmp_path), noise_samples(tiny_reference[0].signature, 0), StageLog(),
        sru_models=lambda site, shape: {} if site.name == "c" else {"function": lone(model, site, shape)},
        opener=ort_opener, build_sru=refusing,
    )  # fmt: skip
    assert report
    caveats = " / ".join(report.caveats)
    assert "tensorrt: b.SRU: TensorRT cannot build the SRU b.SRU alone: out of tactics" in caveats
    assert "tensorrt: c: there is no ONNX model of it alone" in caveats
    assert [s.teacher_forced is None for s in report.srus] == [False, True, True, False]


class WithoutInputs(TorchReference):
    """A reference whose SRUs' inputs were not kept, as in a bundle that has reached its size."""

    def run(self, sample):
        run = super().run(sample)
        return replace(run, sites={name: replace(site, x=None) for name, site in run.sites.items()})


@pytest.mark.parametrize("why", ["no library builds one", "no input was kept", "there is no model"])
def test_an_engine_of_whose_gates_none_was_seen_is_not_signed(tiny_reference, model, tmp_path, why):
    """It passes end to end, the check of its gates was not run, and whoever requires the engine is told."""

    @contextmanager
    def refusing(engine, site, models):
        raise BuildError(f"TensorRT cannot build the SRU {site} alone: out of tactics", "Change it.")
        yield

    kind = WithoutInputs if why == "no input was kept" else TorchReference
    report = judge_engine(
        kind(tiny_reference[0]), engine_of(model, tmp_path), noise_samples(tiny_reference[0].signature, 0), StageLog(),
        sru_models=lambda s, shape: {} if why == "there is no model" else {"function": lone(model, s, shape)},
        opener=ort_opener, build_sru=refusing,
    )  # fmt: skip
    (link,) = report.links
    assert link.status == "passed"
    gates = check_of(report, "teacher-forced gates")
    assert (gates.status, gates.reason) == ("not run", "none of the 4 SRUs was compared alone: no gate was seen")
    stored = tmp_path / "report.json"
    stored.write_bytes(report.as_bytes())
    assert check_report(stored)
    for name in ("tensorrt", "engine"):
        judged = check_report(stored, [name])
        assert judged.failures == (f"{name} is required and passed end to end only: {gates.reason}",)
    before = replace(link, checks=tuple(c for c in link.checks if c is not gates))  # a report of before, without it
    stored.write_bytes(replace(report, links=(before,)).as_bytes())
    assert (
        check_report(stored, ["tensorrt"])
        .failures[0]
        .startswith("tensorrt is required and passed end to end only: a.SRU")
    )


def test_a_healthy_engine_and_one_without_srus_are_signed(tiny_reference, model, tmp_path):
    stored = tmp_path / "report.json"
    report = judge(tiny_reference[0], model, tmp_path)
    stored.write_bytes(report.as_bytes())
    assert check_report(stored, ["tensorrt"])
    plain = replace(report.links[0], checks=tuple(c for c in report.links[0].checks if c.name == "end to end"))
    stored.write_bytes(replace(report, links=(plain,)).as_bytes())
    assert check_report(stored, ["tensorrt"])


def test_gates_that_all_hide_in_the_output_were_not_seen(tiny_reference, model, tmp_path):
    """Over zeros every way that the gates can stand gives the same output."""
    source = TorchReference(tiny_reference[0])
    run = source.run(next(iter(noise_samples(tiny_reference[0].signature, 0))))
    shared = Shared(tolerances.table({}))
    shared.sites.add(run)
    srus = LoneSRUs(
        engine_of(model, tmp_path), lambda s, shape: {"function": lone(model, s, shape)}, ort_builder(), shared
    )
    site = run.sites["a.SRU"]
    srus.judge(replace(site, x=np.zeros_like(site.x)))
    gates, values = srus.checks()
    hidden = f"{site.mask.size:,} gates do not show in the output"
    assert (gates.status, gates.reason) == ("not run", f"1 of 1 SRUs alone; {hidden}: no gate was seen")
    assert values.status == "passed"


def lone(model, site, shape):
    from scconv_deploy.verification.sru_models import of_artifact

    return of_artifact(model, site, shape)["function"]


def test_samples_outside_the_profile_are_left_out_and_said(tiny_reference, model, tmp_path):
    reference = tiny_reference[0]
    large = Sample("large", {"image": torch.randn(9, 3, 16, 16)})
    samples = [*noise_samples(reference.signature, 0), large]
    report = judge(reference, model, tmp_path, samples=samples)
    assert report
    assert any("1 outside the engine's profile: Input 'image' is (9, 3, 16, 16)" in c for c in report.caveats)
    with pytest.raises(UsageError, match=r"No sample fits the engine: Input 'image' is \(9, 3, 16, 16\)"):
        judge(reference, model, tmp_path, samples=[large])


def test_another_models_engine_is_a_usage_error(tiny_reference, model, tmp_path):
    other = copy_of(model)
    for node in other.graph.node:
        for index, name in enumerate(node.input):
            if name == "image":
                node.input[index] = "picture"
    other.graph.input[0].name = "picture"
    with pytest.raises(UsageError, match="The engine's inputs are picture; the reference's image"):
        judge(tiny_reference[0], other, tmp_path)


def test_what_cannot_be_opened_or_run_is_no_parity_failure(tiny_reference, model, tmp_path):
    engine = engine_of(model, tmp_path)
    for error in (
        MissingRuntimeError("TensorRT cannot open it on this GPU: x", "Build it."),
        ModelError("it crashed", "Run it."),
    ):

        def failing(error=error):
            raise error

        link, report = try_to_judge(engine, failing)
        assert (link.name, link.status, report) == ("tensorrt", "not run", None)
        assert error.message in link.reason
        assert "sha256" in link.reason

    def refused():
        raise IntegrityError("tampered", "Copy it again.")

    with pytest.raises(IntegrityError):
        try_to_judge(engine, refused)


@pytest.mark.skipif(bool(gpu.gpus()), reason="this machine has a GPU")
def test_the_real_opener_without_a_gpu_or_library_is_exit_3(tiny_reference, model, tmp_path):
    engine, source = engine_of(model, tmp_path), TorchReference(tiny_reference[0])
    with pytest.raises(MissingRuntimeError) as refused:
        judge_engine(source, engine, noise_samples(tiny_reference[0].signature, 0), StageLog())
    assert refused.value.exit_code == 3


def test_a_tampered_engine_is_never_opened(tiny_reference, model, tmp_path):
    engine = engine_of(model, tmp_path)
    data = bytearray(engine.path.read_bytes())
    data[50] ^= 1
    engine.path.write_bytes(data)
    with pytest.raises(IntegrityError, match="its SHA-256 is"):
        judge_engine(
            TorchReference(tiny_reference[0]), engine, noise_samples(tiny_reference[0].signature, 0), StageLog()
        )


def test_an_override_is_kept_and_an_unknown_one_refused(tiny_reference, model, tmp_path):
    source, samples = TorchReference(tiny_reference[0]), noise_samples(tiny_reference[0].signature, 0)

    def judged(overrides):
        return judge_engine(
            source, engine_of(model, tmp_path), samples, StageLog(), overrides=overrides, opener=ort_opener
        )

    report = judged({"engine_multiple": 1e-9})
    assert not report
    assert report.overrides == {"engine_multiple": 1e-9}
    with pytest.raises(UsageError, match="No tolerance is called 'engine'"):
        judged({"engine": 1.0})


def test_tf32_is_judged_by_its_own_rounding(tiny_reference, model, tmp_path):
    report = judge(tiny_reference[0], model, tmp_path, flags=("TF32",))
    assert report
    assert all(o.noise >= 2.0**-10 for o in report.engines[0].outputs)


def test_the_link_takes_the_place_of_the_one_of_its_name(tiny_reference, model, tmp_path):
    engine = judge(tiny_reference[0], model, tmp_path)
    chain = Link("onnxruntime", "passed", "x"), Link("tensorrt", "not run", "no GPU here can run it")
    report = with_engine(replace(engine, links=chain, engines=(), stages=()), engine.links[0], engine)
    assert [(link.name, link.status) for link in report.links] == [("onnxruntime", "passed"), ("tensorrt", "passed")]
    assert report.engines == engine.engines
    assert [stage.name for stage in report.stages] == ["verify tensorrt"]
    again = with_engine(report, Link("tensorrt", "not run", "y"), None)
    assert [link.status for link in again.links] == ["passed", "not run"]
