"""``verify F.engine`` and engines judged by ``deploy``: the whole way through runner, CUDA and builder.

ONNX Runtime stands behind TensorRT's names and the host behind CUDA's (:mod:`.ort_behind_tensorrt`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import onnx
import pytest

from scconv_deploy.bundle.manifest import MANIFEST, manifest_bytes
from scconv_deploy.bundle.reference import EngineInputs, read_reference, write_reference
from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.exporters.tensorrt.targets import DEVICES
from scconv_deploy.graph import instrument
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.records.parity import Check, Link, ParityReport
from scconv_deploy.report.rejudge import check_report
from scconv_deploy.runtimes.tensorrt import runner as runners
from scconv_deploy.runtimes.tensorrt import versions as tensorrt_versions
from scconv_deploy.runtimes.tensorrt.engine import EngineSRU, load_engine, sidecar
from scconv_deploy.system.gpu import Gpu, gpus
from scconv_deploy.verification import sru_models
from scconv_deploy.verification.engine import sru_alone as lone_sru
from scconv_deploy.verification.engine import verdict as engines
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.samples import noise_samples
from scconv_deploy.workflows import build as building
from scconv_deploy.workflows.build import EngineBuilder
from tests import int8
from tests.command_line import failed, run
from tests.exporters.tensorrt.engines import elf_library
from tests.runtimes.tensorrt.ort_behind_tensorrt import Module, marked
from tests.verification.engine_cases import QUANTIZED, copy_of, ends_of, engine_of
from tests.verification.judging import damage_weight, edit_body

MODEL = f"{Path(__file__).parents[1] / 'conftest.py'}:tiny_net"
REFERENCE = ("--reference", MODEL, "--input", "2x3x16x16")


@pytest.fixture
def module(host_cuda, monkeypatch):
    """A machine with a GPU and TensorRT 10.9, as far as the code can tell."""
    found = Module(host_cuda)
    for place in (runners, lone_sru):
        monkeypatch.setattr(place, "load_module", lambda backend: found)
        monkeypatch.setattr(place, "load_cuda", lambda: host_cuda.cuda)
    for place in (tensorrt_versions, engines, building):
        monkeypatch.setattr(place, "gpus", lambda: (Gpu("a GPU", "8.9"),))
    return found


@pytest.fixture(scope="module")
def recorded(tiny_reference, tiny_bytes, tiny_fp16, tmp_path_factory):
    """(bundle, its model) by precision."""
    made = {}
    for precision, content in (("fp32", tiny_bytes[0]), ("fp16", tiny_fp16[1].SerializeToString(deterministic=True))):
        folder = tmp_path_factory.mktemp("engines") / precision
        folder.mkdir()
        (folder / "model.onnx").write_bytes(content)
        model = onnx.load_model_from_string(content)
        source = TorchReference(tiny_reference[0])
        engine_inputs = EngineInputs(
            {"fp32": "float32", "fp16": "float16"}[precision],
            lambda site, shape, model=model: sru_models.of_artifact(model, site, shape),
        )
        samples = noise_samples(tiny_reference[0].signature, 0)[1::-1]
        write_reference(folder, source, map(source.run, samples), instrument.sites(model), engines=engine_inputs)
        (folder / MANIFEST).write_bytes(manifest_bytes(folder, {}))
        made[precision] = folder, model
    return made


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_against_what_a_bundle_recorded(module, recorded, tmp_path, precision):
    bundle, model = recorded[precision]
    engine = engine_of(model, tmp_path)
    result = run("verify", engine.path, "--reference", bundle, "--json", "--report", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [(link["name"], link["status"]) for link in report["links"]] == [("tensorrt", "passed")]
    assert [sru["teacher_forced"]["unexplained"] for sru in report["srus"]] == [0] * 4
    assert sum(sru["teacher_forced"]["gates"] for sru in report["srus"]) > 3000  # of 4,096
    assert all(output["noise_measured"] for output in report["engines"][0]["outputs"])
    assert "SRUs alone" not in report["provenance"]  # the engine was built from the bundle's own model
    # the whole engine, and four SRUs, with the functions that TensorRT expands; TF32 off
    assert [len(onnx.load_model_from_string(data).functions) for data in module.parsed] == [1] * 4
    assert module.cleared == ["TF32"] * 4
    assert check_report(tmp_path / "r.json", ["tensorrt"])


def test_a_fault_is_exit_6_and_names_its_place(module, recorded, tmp_path):
    bundle, model = recorded["fp32"]
    damaged = copy_of(model)
    damage_weight(damaged, 1e-2)
    failed_engine = engine_of(damaged, tmp_path)
    result = run("verify", failed_engine.path, "--reference", bundle, "--quiet")
    failed(result, 6, "tensorrt: logits: relative L2")
    inverted = copy_of(model)
    edit_body(inverted, "GreaterOrEqual (sru__signed", "Less (sru__signed")
    module.expand = lambda given: with_body_of(given, inverted)  # as the library would expand it wrongly
    result = run("verify", engine_of(model, tmp_path).path, "--reference", bundle, "--quiet")
    failed(result, 6, "tensorrt: 4 SRUs alone, same input, gates changed")
    assert "worst a.SRU#2 (a.SRU) with" in result.stderr


def with_body_of(model, other):
    copy = copy_of(model)
    for function in copy.functions:
        function.CopyFrom(next(f for f in other.functions if f.name == function.name))
    return copy


def test_the_plugin_is_given_the_node_alone(module, recorded, tmp_path):
    """An SRU that the engine fused is built without its function: only the plugin can compute it."""
    bundle, model = recorded["fp32"]
    plugin = tmp_path / "libplugin.so"
    plugin.write_bytes(elf_library())
    srus = tuple(
        EngineSRU(site, "plugin" if site == "a.SRU" else "expanded", "why") for site in instrument.sites(model)
    )
    digest = hashlib.sha256(elf_library()).hexdigest()
    engine = engine_of(model, tmp_path, srus=srus, plugin_sha256=digest)

    def the_plugin(given):
        if given.functions or not any(node.domain == "scconv" for node in given.graph.node):
            return given
        copy = copy_of(given)
        copy.functions.extend(f for f in model.functions if f.name == given.graph.node[0].op_type)
        return copy

    module.expand = the_plugin
    result = run("verify", engine.path, "--reference", bundle, "--plugin", plugin, "--json")
    assert result.exit_code == 0, result.output
    assert module.loaded == [str(plugin)]
    parsed = [onnx.load_model_from_string(data) for data in module.parsed]
    assert [(len(m.graph.node) == 1, len(m.functions)) for m in parsed] == [(True, 0)] + [(False, 0)] * 3  # inlined
    beside = run("verify", engine.path, "--reference", bundle, "--json")
    assert beside.exit_code == 0, beside.output  # the plugin lies beside the engine, which names it by its hash
    plugin.write_bytes(b"another")
    failed(run("verify", engine.path, "--reference", bundle), 3, "was built with a plugin, which was not given")
    failed(run("verify", engine.path, "--reference", bundle, "--plugin", plugin), 7, "is not the plugin that")


def test_inspect_shows_the_layers_of_an_engine_with_the_plugin(module, recorded, tmp_path):
    _, model = recorded["fp32"]
    plugin = tmp_path / "libplugin.so"
    plugin.write_bytes(elf_library())
    settings = {"optimization_level": 3, "plugins_to_serialize": []}
    facts = {"settings": settings, "warnings": ("weights are shared",)}
    engine = engine_of(model, tmp_path, plugin_sha256=hashlib.sha256(elf_library()).hexdigest(), **facts)
    shown = run("inspect", engine.path, "--plugin", plugin)
    assert shown.exit_code == 0, shown.output
    assert module.loaded == [str(plugin)]
    assert '{"JSON": "SRU a.SRU"}' in shown.stdout
    assert "settings optimization_level 3, plugins_to_serialize none\n" in shown.stdout
    assert "warning  weights are shared\n" in shown.stdout
    assert run("inspect", engine.path).stdout == shown.stdout  # it lies beside the engine
    plugin.write_bytes(b"another")
    without = run("inspect", engine.path)
    assert without.exit_code == 0
    assert "its own layers are not shown" in without.stdout
    assert "was built with a plugin, which was not given and does not lie beside it" in without.stdout
    failed(run("inspect", engine.path, "--plugin", plugin), 7, "is not the plugin that")
    failed(run("inspect", engine.path, "--plugin", tmp_path / "nope.so"), 2, "nope.so does not exist")


def test_a_plugin_for_what_has_none_is_refused(module, recorded, tmp_path):
    bundle, model = recorded["fp32"]
    engine = engine_of(model, tmp_path)
    for command in (("inspect", engine.path), ("verify", engine.path, "--reference", bundle)):
        failed(run(*command, "--plugin", "p.so"), 2, "m.engine was built without a plugin. Leave it out.")
    failed(run("inspect", bundle, "--plugin", "p.so"), 2, "--plugin belongs to an engine")
    failed(run("inspect", "scconv_resnet20", "--plugin", "p.so"), 2, "--plugin belongs to an engine")


def test_a_library_that_refuses_an_sru_leaves_the_engine_judged(module, recorded, tmp_path):
    bundle, model = recorded["fp32"]
    module.refuse = "no tactic\nfor it"
    result = run("verify", engine_of(model, tmp_path).path, "--reference", bundle, "--json")
    assert result.exit_code == 0, result.output
    (link,) = json.loads(result.stdout)["links"]
    (alone,) = [check for check in link["checks"] if check["name"] == "SRUs alone"][:1]
    assert alone["status"] == "not run"
    assert "TensorRT cannot build the SRU a.SRU alone: no tactic for it" in alone["reason"]


def test_an_engine_against_a_model_and_against_an_onnx_file(module, recorded, tmp_path):
    _, model = recorded["fp32"]
    static = copy_of(model)
    engine = engine_of(static, tmp_path)
    result = run("verify", engine.path, *REFERENCE, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["provenance"]["SRUs alone"].startswith("made from the reference; the ONNX file")
    assert [sru["teacher_forced"]["unexplained"] for sru in report["srus"]] == [0] * 4
    onnx.save(static, tmp_path / "net.onnx")
    (tmp_path / "net.onnx").write_bytes(static.SerializeToString(deterministic=True))
    report = json.loads(run("verify", engine.path, *REFERENCE, "--json").stdout)
    assert report["provenance"]["SRUs alone"] == "out of net.onnx"
    result = run("verify", engine.path, "--reference", tmp_path / "net.onnx", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {output["noise_measured"] for output in report["engines"][0]["outputs"]} == {False}


def marked_engine(model, folder):
    """The model as an engine that ``build --debug-tensors srus`` made."""
    ends = ends_of(model)
    inner = dict.fromkeys(end.name for end in ends if end.name not in {v.name for v in model.graph.output})
    return engine_of(marked(model, inner), folder, debug_tensors=ends)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_inside_of_an_engine_through_its_debug_tensors(module, recorded, tmp_path, precision):
    """The runner's listener copies what the library shows; a model in PyTorch judges the segments as well."""
    bundle, model = recorded[precision]
    engine = marked_engine(model, tmp_path)

    def checks(*reference):
        result = run("verify", engine.path, *reference, "--json")
        assert result.exit_code == 0, result.output
        (link,) = json.loads(result.stdout)["links"]
        return {check["name"]: (check["status"], check["reason"]) for check in link["checks"]}

    against_model, against_bundle = checks(*REFERENCE), checks("--reference", bundle)
    for found in (against_model, against_bundle):
        assert found["gates inside"][0] == found["values inside"][0] == found["teacher-forced gates"][0] == "passed"
        assert found["gates inside"][1].startswith("4 SRUs inside the engine, same input, gates changed: ")
    assert against_model["segments"][1].startswith("6 segments from its own tensors")
    assert against_bundle["segments"] == (
        "not run", "the reference is no model in PyTorch, so it cannot start from an engine's tensor",
    )  # fmt: skip


def test_a_fault_inside_is_exit_6_and_named(module, recorded, tmp_path):
    _, model = recorded["fp32"]
    damaged = copy_of(model)
    damage_weight(damaged, 1e-2)
    failed(run("verify", marked_engine(damaged, tmp_path).path, *REFERENCE, "--quiet"), 6, "departs first: relative L2")
    inverted = copy_of(model)
    edit_body(inverted, "GreaterOrEqual (sru__signed", "Less (sru__signed")
    module.expand = lambda given: with_body_of(given, inverted)
    result = run("verify", marked_engine(model, tmp_path).path, *REFERENCE, "--json")
    assert result.exit_code == 6
    (link,) = json.loads(result.stdout)["links"]
    found = {check["name"]: (check["status"], check["reason"]) for check in link["checks"]}
    assert found["gates inside"][0] == "failed"
    assert "; worst a.SRU" in found["gates inside"][1]
    assert found["segments"][0] == "passed"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "is an engine, so nothing says what it must compute. Add --reference MODEL or BUNDLE"),
        (("--reference", "BUNDLE", "--batch", "1:2:3"), 2, "These options belong to a model"),
        (("--reference", "BUNDLE", "--seed", "5"), 2, "--seed and --provider mean nothing to a bundle"),
        (("--reference", "BUNDLE", "--provider", "cuda"), 2, "--seed and --provider mean nothing to a bundle"),
        (("--reference", "."), 2, "is not a bundle"),
        (("--reference", "BUNDLE", "--tolerance", "engine=1"), 2, "No tolerance is called 'engine'"),
        (("--reference", MODEL, "--input", "9x3x16x16"), 2, "No sample fits the engine"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(module, recorded, tmp_path, arguments, code, message):
    bundle, model = recorded["fp32"]
    given = [bundle if a == "BUNDLE" else tmp_path if a == "." else a for a in arguments]
    failed(run("verify", engine_of(model, tmp_path).path, *given), code, message)


def test_a_plugin_belongs_to_an_engine(recorded):
    failed(run("verify", recorded["fp32"][0], "--plugin", "p.so"), 2, "--plugin belongs to an engine")


def test_an_engine_that_is_not_what_its_manifest_says_is_exit_7(module, recorded, tmp_path):
    bundle, model = recorded["fp32"]
    engine = engine_of(model, tmp_path)
    engine.path.write_bytes(engine.path.read_bytes() + b"x")
    failed(run("verify", engine.path, "--reference", bundle), 7, "its manifest says")
    sidecar(engine.path).unlink()
    failed(run("verify", engine.path, "--reference", bundle), 7, "has no manifest")


def test_another_release_is_exit_3(module, recorded, tmp_path):
    bundle, model = recorded["fp32"]
    module.__version__ = "10.10.0"
    failed(run("verify", engine_of(model, tmp_path).path, "--reference", bundle), 3, "installed is 10.10.0")


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_without_a_library_or_a_gpu_it_is_exit_3(recorded, tmp_path):
    bundle, model = recorded["fp32"]
    result = run("verify", engine_of(model, tmp_path).path, "--reference", bundle)
    assert result.exit_code == 3
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_reference_that_is_not_the_sealed_one_judges_nothing(module, recorded, tmp_path):
    bundle, model = recorded["fp32"]
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    (copy / "reference" / "sru-0.function.onnx").write_bytes(b"another")
    failed(
        run("verify", engine_of(model, tmp_path).path, "--reference", copy), 7, "sru-0.function.onnx is not the file"
    )


def test_an_engine_of_another_file_is_said(module, recorded, tmp_path):
    bundle, model = recorded["fp32"]
    engine = engine_of(model, tmp_path, onnx_sha256="0" * 64)
    report = json.loads(run("verify", engine.path, "--reference", bundle, "--json").stdout)
    assert "the engine was built from another ONNX file" in report["provenance"]["SRUs alone"]


def test_equal_references_have_equal_models_of_srus(recorded):
    source = read_reference(recorded["fp32"][0])
    site = source.sites["a.SRU"]
    forms = source.sru_models(site, (2, 16, 8, 8))
    assert set(forms) == set(lone_sru.FORMS)
    node = onnx.load_model_from_string(forms["plugin"]).graph.node[0]
    assert (node.op_type, node.domain, node.name) == ("SRU", "scconv", "a.SRU")
    for data in forms.values():
        onnx.checker.check_model(onnx.load_model_from_string(data)) if data != forms["plugin"] else None


# --- deploy -------------------------------------------------------------------------------------------------------


def judged(status):
    link = Link.of("tensorrt", [Check("end to end", status, "logits: relative L2 0.5")])
    return ParityReport("m", "a", "", (link,), (), (), (), (), {})


def build_with(module, monkeypatch, model, folder, judge, devices=()):
    engine = engine_of(model, folder)
    renamed = engine.path.with_name("model.tensorrt.engine")
    sidecar(engine.path).rename(sidecar(renamed))
    engine.path.rename(renamed)
    monkeypatch.setattr(
        building, "build_network", lambda *args, **kwargs: building.BuildResult(load_engine(renamed), False, 0.1)
    )
    chain = Link("onnxruntime", "passed", "x"), Link("engine", "not run", "no engine was built")
    before = ParityReport("m", "a", "", chain, (), (), (), (), {})
    wanted = [(building.BuildOptions("tensorrt"), (module, ()))]
    builder = EngineBuilder(wanted, devices, (DynamicAxis(1, 2, 8),))
    return builder.build(model, model.SerializeToString(), folder, before, judge)


def test_a_good_engine_gets_its_link_and_keeps_its_name(module, monkeypatch, recorded, tmp_path):
    asked = []
    built = build_with(
        module, monkeypatch, recorded["fp32"][1], tmp_path,
        lambda engine, plugin: asked.append(engine.path.name) or judged("passed"),
    )  # fmt: skip
    assert asked == ["model.tensorrt.engine"]
    assert [(link.name, link.status) for link in built.report.links] == [
        ("onnxruntime", "passed"), ("tensorrt", "passed"),
    ]  # fmt: skip
    assert built.report
    assert load_engine(tmp_path / "model.tensorrt.engine")


def test_a_failed_engine_is_rejected_and_the_report_fails(module, monkeypatch, recorded, tmp_path):
    built = build_with(module, monkeypatch, recorded["fp32"][1], tmp_path, lambda *_: judged("failed"))
    assert not built.report
    assert built.report.failures == ("tensorrt: logits: relative L2 0.5",)
    assert not (tmp_path / "model.tensorrt.engine").exists()
    assert load_engine(tmp_path / "model.tensorrt.engine.rejected")


def test_an_engine_that_cannot_run_here_has_no_verdict(module, monkeypatch, recorded, tmp_path):
    def judge(engine, plugin):
        raise MissingRuntimeError("TensorRT cannot open it on this GPU: it is for sm120", "Build it.")

    built = build_with(module, monkeypatch, recorded["fp32"][1], tmp_path, judge)
    link = built.report.links[-1]
    assert (link.name, link.status) == ("tensorrt", "not run")
    assert "cannot open it on this GPU: it is for sm120" in link.reason
    assert built.report
    assert load_engine(tmp_path / "model.tensorrt.engine")


def test_without_a_gpu_nothing_is_judged(module, monkeypatch, recorded, tmp_path):
    monkeypatch.setattr(building, "gpus", lambda: ())
    built = build_with(module, monkeypatch, recorded["fp32"][1], tmp_path, None)
    assert built.report.links[-1].name == "tensorrt"
    assert "built, but no GPU here can run it: tensorrt 10.9.0 engine" in built.report.links[-1].reason


def test_what_a_device_will_build_keeps_the_link_engine(module, monkeypatch, recorded, tmp_path):
    device = next(iter(DEVICES.values()))
    built = build_with(module, monkeypatch, recorded["fp32"][1], tmp_path, lambda *_: judged("passed"), [device])
    assert [link.name for link in built.report.links] == ["onnxruntime", "engine", "tensorrt"]
    assert device.name in built.report.links[1].reason


@pytest.fixture(scope="module")
def codes(tiny_bytes):
    """TinyNet in int8."""
    return int8.quantize(onnx.load_model_from_string(tiny_bytes[0]))


def test_an_int8_engine_is_judged_by_the_model_with_the_file_beside_it(module, codes, tmp_path):
    engine = engine_of(codes, tmp_path, layers=QUANTIZED)
    beside = tmp_path / "int8.onnx"
    beside.write_bytes(codes.SerializeToString(deterministic=True))
    result = run("verify", engine.path, *REFERENCE, "--json")
    assert result.exit_code == 0, result.output
    (link,) = json.loads(result.stdout)["links"]
    found = {check["name"]: check for check in link["checks"]}
    assert "the noise of explained gate and code changes" in found["end to end"]["reason"]
    assert found["teacher-forced gates"]["status"] == "passed"
    result = run("verify", engine.path, "--reference", beside, "--quiet")
    failed(result, 2, "int8.onnx is a file, of which nothing says how far rounding moves its codes. Give its bundle")


@pytest.mark.tensorrt
@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_an_int8_engine_of_tensorrt_rtx_itself_as_far_as_it_goes_without_a_gpu(codes, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    source, engine = tmp_path / "int8.onnx", tmp_path / "int8.engine"
    source.write_bytes(codes.SerializeToString(deterministic=True))
    built = run(
        "build", source, "-o", engine, "--backend", "tensorrt-rtx", "--target", "sm89", "--batch", "1:2:8", "--json"
    )
    assert built.exit_code == 0, built.output
    layers = json.loads(built.stdout)["manifest"]["quantized"]
    assert layers
    assert all(layer["operands"] == ["Int8", "Int8"] for layer in layers)
    assert "int8 engine for sm89" in run("inspect", engine).stdout
    failed(run("verify", engine, *REFERENCE, "--quiet"), 3, "GPU")
    failed(run("verify", engine, "--reference", source, "--quiet"), 2, "is a file, of which nothing says how far")
