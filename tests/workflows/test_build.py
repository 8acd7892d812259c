"""``build``, ``deploy --backend`` and ``inspect`` of engines on the command line, with the real TensorRT-RTX."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch

import scconv_deploy
from scconv_deploy.errors import BuildError
from scconv_deploy.exporters.tensorrt import build as engine_build
from scconv_deploy.exporters.tensorrt.build import prepare
from scconv_deploy.exporters.tensorrt.cache import EngineCache
from scconv_deploy.exporters.tensorrt.onnx_source import OnnxSource
from scconv_deploy.exporters.tensorrt.options import BuildOptions
from scconv_deploy.graph.contract import FunctionKey
from scconv_deploy.graph.functions import function_proto
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.runtimes.tensorrt.engine import load_engine
from scconv_deploy.system import gpu
from scconv_deploy.workflows import build as building
from scconv_deploy.workflows.build import EngineBuilder, EngineRequest, build_file
from scconv_deploy.workflows.export import ExportOptions
from tests import wild
from tests.command_line import failed, run
from tests.exporters.tensorrt.engines import conv_model, save, sru_model
from tests.finished import NET
from tests.report.made import full_report

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
pytestmark = pytest.mark.tensorrt
BUILD = ("--backend", "tensorrt-rtx", "--target", "sm89", "--batch", "1:2:8")
OPTIONS = BuildOptions("tensorrt-rtx", "sm89", axes=(DynamicAxis(1, 2, 8),))


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    save(conv_model(), tmp_path / "m.onnx")
    return tmp_path


def test_a_second_identical_build_comes_from_the_cache(workplace):
    first = run("build", "m.onnx", "-o", "a.engine", *BUILD, "--json")
    second = run("build", "m.onnx", "-o", "b.engine", *BUILD, "--json")
    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    made, again = json.loads(first.stdout), json.loads(second.stdout)
    assert (made["from_cache"], again["from_cache"]) == (False, True)
    assert again["manifest"]["sha256"] == made["manifest"]["sha256"]
    assert load_engine(Path("b.engine")).verified_bytes() == load_engine(Path("a.engine")).verified_bytes()
    third = json.loads(run("build", "m.onnx", "-o", "c.engine", *BUILD, "--tf32", "--json").stdout)
    assert third["from_cache"] is False
    assert third["manifest"]["flags"] == ["TF32"]
    without = run("build", "m.onnx", "-o", "d.engine", *BUILD, "--no-cache", "--json")
    assert json.loads(without.stdout)["from_cache"] is False


def test_the_sidecar_says_what_the_engine_is(workplace):
    save(sru_model(), workplace / "sru.onnx")
    assert run("build", "sru.onnx", "-o", "s.engine", *BUILD).exit_code == 0
    manifest = json.loads(Path("s.engine.json").read_text())
    assert manifest["profiles"] == [
        {"input": "x", "minimum": [1, 8, 8, 8], "optimum": [2, 8, 8, 8], "maximum": [8, 8, 8, 8], "index": 0}
    ]
    assert manifest["compute_capabilities"] == ["sm89"]
    assert (manifest["structure_sha256"], manifest["refitted_from"]) == (OnnxSource(sru_model()).structure_sha256, "")
    assert [s["form"] for s in manifest["srus"]] == ["expanded"]
    assert manifest["file_bytes"] == Path("s.engine").stat().st_size
    assert len(manifest["layers"]) > 20
    shown = run("inspect", "s.engine")
    assert shown.exit_code == 0
    assert "profile  x: 1x8x8x8 to 2x8x8x8 to 8x8x8x8" in shown.stdout
    assert "expanded block.sru: no plugin was given (--plugin)" in shown.stdout
    plan = json.loads(run("inspect", "s.engine", "--json").stdout)["plan"]
    assert plan["batch"] == 2
    assert plan["launches"] == len(plan["layers"]) >= 2
    assert plan["bytes_moved"] == sum(layer["bytes_moved"] for layer in plan["layers"])
    assert plan["bytes_moved"] >= 2 * 2 * 8 * 8 * 8 * 4  # x is read and y is written
    assert f"plan     moves {plan['bytes_moved'] / 1e6:.1f} MB at batch 2 in {plan['launches']} kernels" in shown.stdout
    if not gpu.gpus():
        assert "its own layers are not shown: TensorRT-RTX needs a GPU here" in shown.stdout


def test_an_engine_of_the_body_for_onnx_runtime_is_told_of_the_other(workplace):
    model = sru_model()
    save(model, workplace / "where.onnx")
    model.functions[0].CopyFrom(function_proto(FunctionKey("SRU", False, "multiply", 18)))
    save(model, workplace / "multiply.onnx")
    told = {form: run("build", f"{form}.onnx", "-o", f"{form}.engine", *BUILD) for form in ("where", "multiply")}
    note = "rewrite multiply.onnx --mask-form where --cru merged -o FILE"
    assert note in " ".join(told["multiply"].stdout.split())
    assert "note" not in told["where"].stdout
    rewritten = run(
        "rewrite", "multiply.onnx", "--mask-form", "where", "--cru", "merged", "-o", "again.onnx", "--quiet"
    )
    assert rewritten.exit_code == 0, rewritten.output
    assert onnx.load("again.onnx").functions == onnx.load("where.onnx").functions


def test_a_scconv_builds_in_both_half_types(workplace):
    """The types stand in the ONNX file; the sidecar shows that the library kept them."""
    net = ("scconv_deploy.nn:ScConv", "--kwargs", '{"channels": 16}', "--input", "1x16x16x16")
    single = ("export", *net, "--opset", "22", "--mask-form", "where", "-o", "net.onnx", "--quiet")
    assert run(*single).exit_code == 0
    convolutions = sum(node.op_type == "Conv" for node in onnx.load("net.onnx").graph.node)
    assert convolutions == 5
    for precision, dtype in (("fp16", "HALF"), ("bf16", "BF16")):
        name = f"{precision}.onnx"
        converted = run("convert", "net.onnx", "-o", name, "--precision", precision, "--quiet")
        assert converted.exit_code == 0, converted.output
        built = run("build", name, "-o", f"{precision}.engine", "--backend", "tensorrt-rtx", "--target", "sm89")
        assert built.exit_code == 0, built.output
        manifest = json.loads(Path(f"{precision}.engine.json").read_text())
        assert {tensor["dtype"] for tensor in (*manifest["inputs"], *manifest["outputs"])} == {"FLOAT"}
        types = Counter((layer["type"], *layer["dtypes"]) for layer in manifest["layers"])
        assert types["CONVOLUTION", dtype] == convolutions
        assert not types["CONVOLUTION", "FLOAT"]
        assert types["REDUCE", "FLOAT"] > 3  # the statistics of an SRU
        assert not types["REDUCE", dtype]
        assert types["SOFTMAX", "FLOAT"] == 1
        assert len(manifest["srus"]) == 1


@pytest.mark.parametrize(
    "shape",
    [("--shape", "x:2x16x8x8"), ("--batch", "2:2:2"), ("--dynamic", "x:0=2:2:2")],
)
def test_one_size_of_an_open_axis_gives_an_engine_for_it(workplace, shape):
    made = run("build", "m.onnx", "-o", "m.engine", "--backend", "tensorrt-rtx", "--target", "sm89", *shape)
    assert made.exit_code == 0, made.output
    (profile,) = load_engine(Path("m.engine")).manifest.profiles
    assert (profile.minimum, profile.maximum) == ((2, 16, 8, 8), (2, 16, 8, 8))


def test_several_profiles_are_in_the_sidecar_in_inspect_and_in_the_cache_key(workplace):
    first, second = "x:1x16x8x8:2x16x8x8:4x16x8x8", "x:8x16x8x8:8x16x8x8:32x16x8x8"
    build = ("build", "m.onnx", "--backend", "tensorrt-rtx", "--target", "sm89")
    made = run(*build, "-o", "m.engine", "--profile", first, "--profile", second)
    assert made.exit_code == 0, made.output
    assert [(p.index, p.optimum[0]) for p in load_engine(Path("m.engine")).manifest.profiles] == [(0, 2), (1, 8)]
    shown = run("inspect", "m.engine").stdout
    assert "profile  0, x: 1x16x8x8 to 2x16x8x8 to 4x16x8x8\nprofile  1, x: 8x16x8x8 to 32x16x8x8" in shown
    again = json.loads(run(*build, "-o", "n.engine", "--profile", first, "--profile", second, "--json").stdout)
    swapped = json.loads(run(*build, "-o", "o.engine", "--profile", second, "--profile", first, "--json").stdout)
    alone = json.loads(run(*build, "-o", "p.engine", "--profile", first, "--json").stdout)
    assert [r["from_cache"] for r in (again, swapped, alone)] == [True, False, False]
    assert run(*build, "-o", "q.engine", "--shape", first, "--json").exit_code == 0
    refused = run(*build, "-o", "r.engine", "--profile", first, "--batch", "1:2:8")
    assert refused.exit_code == 2
    assert "--profile excludes --shape, --batch and --dynamic" in refused.stderr
    assert not Path("r.engine").exists()


def test_targets_given_one_by_one_are_all_built_for(workplace):
    assert run("build", "m.onnx", "-o", "m.engine", *BUILD, "--target", "sm120").exit_code == 0
    assert load_engine(Path("m.engine")).manifest.compute_capabilities == ("sm89", "sm120")
    assert run("build", "m.onnx", "-o", "p.engine", *BUILD[:2], "--target", "Portable", *BUILD[4:]).exit_code == 0
    rejected = Path("m.engine").rename("m.engine.rejected")
    Path("m.engine.json").rename("m.engine.rejected.json")
    shown = run("inspect", rejected)
    assert shown.exit_code == 0, shown.output
    assert "for sm89, sm120" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--backend", "tensorrt-rtx"), 2, "the range of axis 0 is not known. Add --batch 1:8:32"),
        ((*BUILD, "--shape", "x:8x16x8x8:2x16x8x8:9x16x8x8"), 2, "expected 1 <= MIN <= OPT <= MAX"),
        ((*BUILD, "--target", "sm42"), 2, "Known: portable, local, sm75"),
        ((*BUILD, "--workspace", "lots"), 2, "is not a size"),
        ((*BUILD, "--workspace", "1K"), 5, "within workspace limit"),
        ((*BUILD, "--cache", "m.onnx/cache"), 2, "cannot be written"),
        ((*BUILD, "--cache", "c", "--no-cache"), 2, "exclude each other"),
        ((*BUILD, "--version-compatible"), 2, "Versions that have it: tensorrt 10.3"),
        ((*BUILD, "--plugin", "p.so"), 2, "--plugin p.so is not a file"),
        ((*BUILD, "--serialize-plugin"), 2, "--serialize-plugin needs a plugin"),
        (("--backend", "tensorrt", "--batch", "1:2:8"), 3, "pip install tensorrt"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(workplace, arguments, code, message):
    failed(run("build", "m.onnx", "-o", "m.engine", *arguments), code, message)
    assert not list(workplace.glob("m.engine*"))


def test_bad_files_are_one_line(workplace):
    whole = Path("m.onnx").read_bytes()
    Path("half.onnx").write_bytes(whole[: len(whole) // 2])
    failed(run("build", "half.onnx", "-o", "h.engine", *BUILD), 7, "truncated or not ONNX")
    save(conv_model("Foo", "my.ops"), workplace / "foo.onnx")
    failed(run("build", "foo.onnx", "-o", "f.engine", *BUILD), 5, "has no operator my.ops::Foo")
    save(conv_model("Conv", "my.ops"), workplace / "namesake.onnx")  # the parser would take ONNX's Conv
    failed(run("build", "namesake.onnx", "-o", "n.engine", *BUILD), 5, "has no operator my.ops::Conv")
    save(sru_model(), workplace / "sru.onnx")
    failed(run("build", "sru.onnx", "-o", "s.engine", *BUILD, "--require-plugin"), 5, "1 of 1 SRUs were expanded")
    assert run("build", "sru.onnx", "-o", "s.engine", *BUILD).exit_code == 0  # and now it is in the cache
    again = run("build", "sru.onnx", "-o", "t.engine", *BUILD, "--require-plugin")
    failed(again, 5, "1 of 1 SRUs were expanded")
    failed(run("build", "m.onnx", "-o", "m.onnx", *BUILD, "--force"), 2, "under an ONNX file's name")
    assert Path("m.onnx").read_bytes() == whole
    run("build", "m.onnx", "-o", "m.engine", *BUILD)
    failed(run("build", "m.onnx", "-o", "m.engine", *BUILD), 2, "m.engine exists")


def test_an_output_without_a_shape_builds(workplace):
    model = conv_model()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    save(model, workplace / "open.onnx")
    built = run("build", "open.onnx", "-o", "open.engine", *BUILD, "--json")
    assert built.exit_code == 0, built.output
    (output,) = json.loads(built.stdout)["manifest"]["outputs"]
    assert (output["name"], output["shape"]) == ("y", [-1, 16, 8, 8])


def test_a_tampered_and_a_truncated_engine_are_refused(workplace):
    run("build", "m.onnx", "-o", "m.engine", *BUILD)
    data = Path("m.engine").read_bytes()
    Path("m.engine").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for command in ("inspect", "bench"):
        failed(run(command, "m.engine"), 7, "its SHA-256 is")
    Path("m.engine").write_bytes(data[:1000])
    failed(run("inspect", "m.engine"), 7, "has 1000 bytes")


@pytest.mark.skipif(bool(gpu.gpus()), reason="this machine has a GPU")
def test_running_an_engine_without_a_gpu_is_exit_3(workplace):
    run("build", "m.onnx", "-o", "m.engine", *BUILD)
    failed(run("bench", "m.engine"), 3, "TensorRT-RTX needs a GPU here")


def test_an_entry_moved_to_another_key_is_built_anew(workplace):
    """What was asked for is what is built, not what lies where it should lie."""
    cache, one, two = EngineCache(workplace / "cache"), Path("a.engine"), Path("b.engine")
    small = replace(OPTIONS, axes=(DynamicAxis(1, 2, 6),))
    build_file(Path("m.onnx"), one, small, cache=cache)
    (entry,) = (workplace / "cache" / "engines").iterdir()
    kept = entry.rename(workplace / "kept")
    build_file(Path("m.onnx"), two, replace(OPTIONS, axes=(DynamicAxis(1, 3, 9),)), cache=cache)
    (place,) = (workplace / "cache" / "engines").iterdir()
    shutil.rmtree(place)
    kept.rename(place)
    again = build_file(Path("m.onnx"), two, replace(OPTIONS, axes=(DynamicAxis(1, 3, 9),)), cache=cache, force=True)
    assert not again.from_cache
    assert again.engine.manifest.profiles[0].maximum[0] == 9
    assert "holds the engine of another build" in again.notes[0]


def test_a_damaged_entry_of_the_cache_is_built_again_with_a_note(workplace):
    cache = EngineCache(workplace / "cache")
    build_file(Path("m.onnx"), Path("a.engine"), OPTIONS, cache=cache)
    entry = next((workplace / "cache" / "engines").iterdir()) / "model.engine"
    entry.write_bytes(entry.read_bytes()[:-5])
    again = build_file(Path("m.onnx"), Path("b.engine"), OPTIONS, cache=cache)
    assert not again.from_cache
    assert "a damaged entry of the cache was dropped" in again.notes[0]
    assert build_file(Path("m.onnx"), Path("c.engine"), OPTIONS, cache=cache).from_cache


def test_a_default_cache_that_cannot_be_written_is_said_once_and_not_written_to(workplace, monkeypatch):
    (workplace / "xdg").write_text("a file")
    built = run("build", "m.onnx", "-o", "a.engine", *BUILD, "--json")
    assert built.exit_code == 0, built.output
    (note,) = json.loads(built.stdout)["notes"]
    assert note == f"the cache {workplace}/xdg/scconv-deploy cannot be written: Not a directory"
    cache = EngineCache.default()
    prepared = engine_build.prepare(OPTIONS, cache)
    two = EngineBuilder([(OPTIONS, prepared), (OPTIONS, prepared)], cache=cache)  # as two backends share it
    assert two.build(conv_model(), b"", workplace, full_report()).notes == (note,)

    def tell(module, source, options, *_):
        raise BuildError(f"timing cache: {options.timing_cache}", "Try again.")

    monkeypatch.setattr(engine_build, "build_plan", tell)  # TensorRT would keep timings there
    tensorrt = BuildOptions("tensorrt", axes=OPTIONS.axes)
    source = OnnxSource(conv_model())
    for notes, found in ((("cannot be written",), "None"), ((), str(cache.folder / "timing"))):
        with pytest.raises(BuildError, match=f"timing cache: {found}"):
            engine_build.build_network(
                source, "", Path("t.engine"), tensorrt, (SimpleNamespace(__version__="10.3.0"), notes),
                cache=cache, command="", progress=lambda _: None,
            )  # fmt: skip


def test_a_full_disk_leaves_no_engine(workplace, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    failed(run("build", "m.onnx", "-o", "m.engine", *BUILD), 2, "No space left on device")
    assert sorted(p.name for p in workplace.glob("*")) == ["m.onnx", "xdg"]


def command_line(output, cache, code="from scconv_deploy.cli import main; main()"):
    return [sys.executable, "-c", code, "build", "m.onnx", "-o", output, *BUILD, "--cache", cache]


def test_two_builds_race_and_one_is_killed_in_the_middle(workplace):
    save(sru_model(tuple("abcd")), workplace / "m.onnx")
    killed = subprocess.Popen(command_line("k.engine", "cache"), stderr=subprocess.PIPE, start_new_session=True)
    racing = [
        subprocess.Popen(command_line(f"{i}.engine", "cache"), stdout=subprocess.DEVNULL, start_new_session=True)
        for i in range(2)
    ]
    deadline = time.time() + 60
    while not (workplace / "cache").exists() and time.time() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)  # somewhere in its build
    killed.wait()
    assert [process.wait(120) for process in racing] == [0, 0]
    assert not Path("k.engine.json").exists() or load_engine(Path("k.engine"))
    for i in range(2):
        load_engine(Path(f"{i}.engine"))
    entries = [p for p in (workplace / "cache" / "engines").iterdir() if not p.name.startswith(".")]
    assert len(entries) == 1
    load_engine(entries[0] / "model.engine")


def test_mask_form_is_where_as_soon_as_a_tensorrt_backend_is_asked_for():
    assert ExportOptions().resolved_mask_form == "multiply"
    assert ExportOptions(backends=("onnx", "tensorrt-rtx")).resolved_mask_form == "where"
    assert ExportOptions(mask_form="multiply", backends=("onnx", "tensorrt")).resolved_mask_form == "multiply"


def test_deploy_puts_engines_into_the_bundle_and_says_that_they_did_not_run(workplace):
    Path("engine_net.py").write_text(NET)
    deploy = ("deploy", "engine_net.py:Net", "--input", "2x3x8x8", "--batch", "1:2:8", "-o", "bundle", "--json")
    result = run(*deploy, "--backend", "onnx", "--backend", "tensorrt-rtx", "--target", "sm89,sm120")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    link = next(link for link in document["report"]["links"] if link["name"] == "tensorrt-rtx")
    assert link["status"] == "not run"
    assert "sm89, sm120" in link["reason"]
    if not gpu.gpus():
        assert "no GPU here can run it" in link["reason"]
    engine = load_engine(Path("bundle/model.tensorrt-rtx.engine"))
    assert engine.manifest.sha256 == document["engines"][0]["sha256"]
    assert engine.manifest.profiles[0].maximum == (8, 3, 8, 8)
    assert "SELECT" in {layer.type for layer in engine.manifest.layers}
    build = next(stage for stage in document["report"]["stages"] if stage["name"] == "build")
    assert [
        "tensorrt-rtx: sru",
        "no plugin was given (--plugin)",
    ] in build["skipped"]
    sealed = json.loads(Path("bundle/manifest.json").read_text())["files"]
    assert {"model.tensorrt-rtx.engine", "model.tensorrt-rtx.engine.json"} <= set(sealed)


def test_deploy_compares_the_plan_with_a_baselines(workplace):
    """The baseline is the same network here, so the ratio is 1; it leaves nothing in the bundle but its numbers."""
    Path("engine_net.py").write_text(NET)
    deploy = ("deploy", "engine_net.py:Net", "--input", "2x3x8x8", "--batch", "1:2:8", "-o", "bundle", "--json")
    result = run(*deploy, "--backend", "tensorrt-rtx", "--target", "sm89", "--baseline", "engine_net.py:Net")
    assert result.exit_code == 0, result.output
    ours, theirs = json.loads(result.stdout)["report"]["plans"]
    assert (ours["name"], ours["baseline"]) == ("model.tensorrt-rtx.engine", False)
    assert (theirs["name"], theirs["baseline"]) == ("engine_net.py:Net", True)
    assert ours["kernels"] == theirs["kernels"]
    assert ours["bytes_moved"] == sum(ours["kernels"]) > 0
    assert ours["srus"]
    assert len(list(Path("bundle").glob("*.engine"))) == 1
    failed(run(*deploy, "--force", "--baseline", "resnet20"), 2, "--baseline resnet20 is compared with an engine")


def test_deploy_gives_tensorrt_the_plugin_and_ships_it(workplace, monkeypatch):
    """TensorRT's part is TensorRT-RTX's here: the request, the file in the bundle and its seal are what is tested."""
    Path("engine_net.py").write_text(NET)
    Path("p.so").write_bytes(b"a plugin library")
    asked = []

    def instead(source, digest, path, options, prepared, **rest):
        asked.append(options)
        options = replace(options, backend="tensorrt-rtx", plugin=None, require_plugin=False)
        return build_network(source, digest, path, options, prepared, **rest)

    build_network = building.build_network
    monkeypatch.setattr(building, "build_network", instead)
    monkeypatch.setattr("scconv_deploy.workflows.build.prepare", lambda options, cache: prepare(OPTIONS, cache))
    arguments = ("--backend", "tensorrt", "--plugin", "p.so", "--require-plugin", "--debug-tensors", "srus")
    result = run("deploy", "engine_net.py:Net", "--input", "2x3x8x8", "--batch", "1:2:8", "-o", "bundle", *arguments)
    assert result.exit_code == 0, result.output
    (options,) = asked
    assert (options.backend, options.plugin, options.require_plugin) == ("tensorrt", Path("p.so"), True)
    manifest = load_engine(Path("bundle/model.tensorrt.engine")).manifest
    assert (
        {(end.site, end.side) for end in manifest.debug_tensors}
        == {(sru.site, side) for sru in manifest.srus for side in ("x", "y")}
        != set()
    )
    sealed = json.loads(Path("bundle/manifest.json").read_text())["files"]
    assert Path("bundle/libscconv_sru.so").read_bytes() == b"a plugin library"
    assert "libscconv_sru.so" in sealed
    assert "model.tensorrt.engine" in sealed


def test_the_python_api_builds_engines_too(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), wild.randomize(wild.OriginalSRU(8, 4))).eval()
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    static = EngineRequest.of(("tensorrt-rtx",), "sm89", ())
    result = scconv_deploy.deploy(model, image, tmp_path / "bundle", engines=static)
    assert result, result.report.failures
    assert [(e.backend, e.compute_capabilities) for e in result.engines] == [("tensorrt-rtx", ("sm89",))]
    # the form of masks that TensorRT's compiler fuses, without being asked for
    assert "SELECT" in {layer.type for layer in result.engines[0].layers}
    again = scconv_deploy.build_file(
        result.artifact, tmp_path / "again.engine", scconv_deploy.BuildOptions("tensorrt-rtx", "sm89")
    )
    manifest = again.engine.manifest  # not the plan's bytes: two builds of one model may differ in them
    assert (manifest.onnx_sha256, manifest.layers) == (result.engines[0].onnx_sha256, result.engines[0].layers)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--plugin", "p.so"), 2, "--plugin is for an engine that is built on this machine"),
        (("--batch", "4:4:4"), 2, "leaves nothing open"),
        (("--backend", "tensorrt-rtx", "--target", "orin"), 2, "'orin' is not known"),
        (("--target", "sm89"), 2, "none is asked for"),
        (("--backend", "tensorrt", "--target", "orin-jp9"), 2, "Known: portable, local, smNN, orin-jp6"),
        (("--backend", "tensorrt-rtx", "--target", "thor-jp7"), 2, "Add --backend tensorrt, or leave thor-jp7 out"),
        (("--backend", "openvino"), 2, "Known: onnx, tensorrt, tensorrt-rtx"),
        (("--backend", "tensorrt"), 3, "TensorRT"),
    ],
)
def test_deploy_refuses_before_it_exports(arguments, code, message, monkeypatch):
    monkeypatch.setattr("scconv_deploy.workflows.deploy.export_to_ir", None)
    failed(run("deploy", "resnet20", "-o", "bundle", *arguments), code, message)
    assert not Path("bundle").exists()


def test_no_engine_is_built_from_a_model_that_failed(tiny_reference, monkeypatch, tmp_path):
    class Failed:
        stages, links = (), ()

        def __bool__(self):
            return False

    monkeypatch.setattr(building, "build_network", None)
    monkeypatch.setattr(building, "replace", lambda report, **changes: changes)
    builder = EngineBuilder([(OPTIONS, (None, ()))])
    built = builder.build(conv_model(), b"", tmp_path, Failed())
    assert built.manifests == ()
    assert built.report["stages"][-1].skipped == (("tensorrt-rtx", "the ONNX model failed parity"),)


HELD = """
import time
from pathlib import Path
from scconv_deploy.cli import main
from scconv_deploy.runtimes.tensorrt import log

def held(self, *step, step_of=log.Progress.step):
    Path("building").touch()
    while not self.cancelled:
        time.sleep(0.01)
    return step_of(self, *step)

log.Progress.step = held
main()
"""
"""The command; the library's first step ends when the build is interrupted."""


def test_interrupting_the_command_leaves_no_half_file(workplace):
    save(sru_model(tuple("abcdef")), workplace / "m.onnx")
    process = subprocess.Popen(command_line("m.engine", "cache", HELD), stderr=subprocess.PIPE, text=True)
    while not (workplace / "building").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Interrupted" in said
    assert not list(workplace.glob("m.engine*"))


DEVICES = ("deploy", "engine_net.py:Net", "--input", "2x3x8x8", "--batch", "1:2:8", "-o", "bundle", "--json")


def test_deploy_for_a_device_exits_0_unfinished_and_says_what_is_left(workplace):
    Path("engine_net.py").write_text(NET)
    backends = ("--backend", "onnx", "--backend", "tensorrt-rtx", "--backend", "tensorrt")
    result = run(*DEVICES, *backends, "--target", "sm89,orin-jp6")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    (left,) = document["unfinished"]
    assert (left["target"], left["left"]) == ("orin-jp6", ["plugin", "engine", "parity", "latency"])
    assert json.loads(Path("bundle/manifest.json").read_text())["unfinished"] == document["unfinished"]
    assert [engine["backend"] for engine in document["engines"]] == ["tensorrt-rtx"]
    assert document["engines"][0]["compute_capabilities"] == ["sm89"]
    link = next(link for link in document["report"]["links"] if link["name"] == "engine")
    assert link["status"] == "not run"
    assert "orin-jp6: plugin, engine, parity, latency are left for the device" in link["reason"]
    build = next(stage for stage in document["report"]["stages"] if stage["name"] == "build")
    assert ["tensorrt: orin-jp6", "built on the device, from this bundle"] in build["skipped"]
    again = run(*DEVICES[:-1], "--backend", "tensorrt", "--target", "orin-jp6", "--force")
    assert again.exit_code == 0, again.output
    (line,) = [line for line in again.stdout.splitlines() if line.startswith("left ")]
    assert line.endswith("(JetPack 6.1 or later of 6): python3 finish.pyz")


def test_verify_holds_a_bundle_against_its_digest(device_bundle):
    digest = hashlib.sha256((device_bundle / "manifest.json").read_bytes()).hexdigest()
    assert run("verify", device_bundle, "--digest", digest, "--quiet").exit_code == 0
    failed(run("verify", device_bundle, "--digest", "0" * 64), 7, "is not the bundle of digest 000000000000")
    failed(run("verify", device_bundle / "model.onnx", "--digest", digest), 2, "is not a bundle")


def test_debug_tensors_that_mark_nothing_are_told_from_the_cache_too(workplace):
    build = ("build", "m.onnx", *BUILD, "--debug-tensors", "srus", "--json")
    for name in ("a", "b"):
        made = json.loads(run(*build, "-o", f"{name}.engine").stdout)
        assert made["from_cache"] == (name == "b")
        assert "--debug-tensors marked nothing" in made["notes"][-1]
