"""Every option against the real TensorRT-RTX: read back from its configuration, from the plan, or as its refusal."""

import dataclasses
import math
import os
import signal
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from onnx import TensorProto

from scconv_deploy.errors import BuildError, MissingRuntimeError, UsageError
from scconv_deploy.exporters.tensorrt import builder as tensorrt
from scconv_deploy.exporters.tensorrt.builder import _attach_timing, _keep_timing, build_plan, check_options
from scconv_deploy.exporters.tensorrt.onnx_source import OnnxSource, graph_facts
from scconv_deploy.exporters.tensorrt.options import BuildOptions
from scconv_deploy.exporters.tensorrt.profiles import ShapeRange, parse_profile, resolve_profiles
from scconv_deploy.graph.contract import FunctionKey
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.runtimes.tensorrt import log as logs
from scconv_deploy.system import gpu
from tests.exporters.tensorrt.engines import conv_model, sru_model
from tests.graph.test_functions import case, single

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops.*"),
]
BATCH = (DynamicAxis(1, 2, 8),)
without_gpu = pytest.mark.skipif(bool(gpu.gpus()), reason="this machine has a GPU")


def plan_of(model=None, **changes):
    model = model or conv_model()
    options = BuildOptions("tensorrt-rtx", **{"target": "sm89", "axes": BATCH} | changes)
    check_options(trt, options)
    return build(model, options)


def build(model, options, *more, profiles=None):
    source = OnnxSource(model)
    profiles = profiles or resolve_profiles(source.facts.shapes, options.shapes, options.axes, options.profiles)
    return build_plan(trt, source, options, profiles, *more)


@pytest.fixture(scope="module")
def plain():
    return plan_of()


def test_tf32_is_off_unless_asked_for(plain):
    config = trt.Builder(logger()).create_builder_config()
    assert config.get_flag(trt.BuilderFlag.TF32)  # what the library would do
    assert plain.flags == ()
    assert plan_of(tf32=True).flags == ("TF32",)


def logger():
    from scconv_deploy.runtimes.tensorrt.log import library_log

    return library_log(trt).logger


_CAPABILITY_BITS = {"sm75": 1, "sm80": 2, "sm86": 4, "sm89": 8, "sm120": 16, "sm121": 32}
"""Of an undocumented bit set in a plan's header; measured with TensorRT-RTX 1.7.1 by building for one at a time."""


def capabilities_in(plan):
    """What the plan's own header says that it is for."""
    assert plan[:4] == plan[28:32] == b"vtrt"
    bits = int.from_bytes(plan[32:36], "little")
    return tuple(name for name, bit in _CAPABILITY_BITS.items() if bits & bit)


@pytest.mark.parametrize(
    ("target", "names", "header"),
    [
        ("sm89", ("sm89",), ("sm89",)),
        ("sm120", ("sm120",), ("sm120",)),
        ("sm120,SM89, sm89", ("sm120", "sm89"), ("sm89", "sm120")),
        ("sm75", ("sm75",), ("sm75",)),
        ("sm121", ("sm121",), ("sm121",)),
        ("portable", (), ("sm80", "sm86", "sm89", "sm120", "sm121")),
        ("", (), ("sm80", "sm86", "sm89", "sm120", "sm121")),
    ],
)
def test_the_plan_says_for_which_gpus_it_is(target, names, header):
    plan = plan_of(target=target)
    assert plan.compute_capabilities == names
    assert capabilities_in(plan.data) == header


def test_more_targets_make_a_larger_plan(plain):
    assert len(plan_of(target="sm75,sm80,sm86,sm89,sm120,sm121").data) > len(plain.data)


def test_unknown_targets_name_the_known_ones():
    with pytest.raises(UsageError, match="sm42") as refused:
        plan_of(target="sm89,sm42")
    assert "portable, local, sm75, sm80, sm86, sm89, sm120, sm121" in refused.value.remedy
    with pytest.raises(UsageError, match="'local' is not known"):
        plan_of(target="local,sm89")


@without_gpu
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "local"}, "--target local is this machine's GPU"),
        ({"refit": True}, "--refit: refitting compiles"),
        ({"strip": True}, "--strip: stripping implies refitting"),
    ],
)
def test_what_needs_a_gpu_says_so_before_it_starts(changes, message, monkeypatch):
    monkeypatch.setattr(trt, "Builder", None)  # would fail if anything started
    with pytest.raises(MissingRuntimeError, match=message):
        plan_of(**changes)


@without_gpu
@pytest.mark.parametrize("changes", [{"refit": True}, {"strip": True}, {"target": "local"}])
def test_and_the_library_would_indeed_refuse(changes):
    options = BuildOptions("tensorrt-rtx", axes=BATCH, **changes)
    with pytest.raises(BuildError, match="TensorRT-RTX cannot build the engine"):
        build(conv_model(), options)


def test_the_optimization_level_is_the_librarys(plain):
    assert plain.settings["optimization_level"] == 3
    assert plan_of(optimization_level=5).settings["optimization_level"] == 5
    with pytest.raises(UsageError, match="expected 0 to 5"):
        plan_of(optimization_level=6)


def test_a_small_workspace_is_refused_by_the_library_with_a_remedy():
    assert plan_of(workspace_bytes=1 << 28).settings["workspace_bytes"] == 1 << 28
    with pytest.raises(BuildError, match="within workspace limit") as refused:
        plan_of(workspace_bytes=1 << 10)
    assert refused.value.remedy == "Give it more --workspace, or leave that out."


@pytest.mark.parametrize(
    "changes",
    [
        {"version_compatible": True}, {"hardware_compatibility": "ampere+"}, {"hardware_compatibility": "same-cc"},
        {"timing_cache": "t.cache"},
    ],
)  # fmt: skip
def test_what_rtx_cannot_do_is_refused(changes):
    with pytest.raises(UsageError, match="TensorRT-RTX has no --") as refused:
        plan_of(**changes)
    assert "Versions that have it: tensorrt 10." in refused.value.remedy


@pytest.mark.parametrize(
    ("shapes", "axes", "more", "expected"),
    [
        ((), ("batch 1:2:8",), (), [(1, 2, 8)]),
        ((), ("x:0=2:3:4",), (), [(2, 3, 4)]),
        (("x:1x16x8x8:5x16x8x8:6x16x8x8",), (), (), [(1, 5, 6)]),
        (("x:3x16x8x8",), (), (), [(3, 3, 3)]),
        ((), (), ("x:1x16x8x8", "x:2x16x8x8:8x16x8x8:32x16x8x8"), [(1, 1, 1), (2, 8, 32)]),
    ],
)
def test_the_library_has_the_profiles_that_were_asked_for(shapes, axes, more, expected):
    model, builder, kept = conv_model(), trt.Builder(logger()), []
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger())
    assert parser.parse(model.SerializeToString())
    config = builder.create_builder_config()

    class Keeping:
        def create_optimization_profile(self):
            kept.append(builder.create_optimization_profile())
            return kept[-1]

    ranges = [
        DynamicAxis.parse_batch(a.removeprefix("batch ")) if a.startswith("batch") else DynamicAxis.parse(a)
        for a in axes
    ]
    given = [ShapeRange.parse(s) for s in shapes]
    profiles = resolve_profiles(graph_facts(model).shapes, given, ranges, [parse_profile(text) for text in more])
    tensorrt._add_profiles(Keeping(), config, network, profiles, [])
    assert config.num_optimization_profiles == len(expected)
    assert [[tuple(dims) for dims in one.get_shape("x")] for one in kept] == [
        [(rows, 16, 8, 8) for rows in rows_of] for rows_of in expected
    ]


def test_the_compiled_plan_of_two_profiles_is_that_of_the_first():
    """The kernels of both are in the builder's log."""
    first, second = "x:1x8x8x8:2x8x8x8:4x8x8x8", "x:8x8x8x8:16x8x8x8:32x8x8x8"
    one, two = (
        plan_of(sru_model(), axes=(), profiles=tuple(map(parse_profile, texts))).compiled
        for texts in ((first,), (first, second))
    )
    assert two == one
    assert (two.batch, two.launches >= 2, two.bytes_moved > 2 * 2 * 8 * 8 * 8 * 4) == (2, True, True)


def test_a_static_model_needs_no_profile_and_a_profile_is_in_the_plan(plain):
    static = conv_model(batch=2)
    options = BuildOptions("tensorrt-rtx", "sm89")
    plan = build(static, options)
    assert plan.inputs[0].shape == (2, 16, 8, 8)
    assert plain.inputs[0].shape == (-1, 16, 8, 8)
    assert plan.data != plain.data


def test_the_librarys_own_refusal_of_a_profile_is_reported():
    profile = resolve_profiles(graph_facts(conv_model()).shapes, (), BATCH)[0]
    wrong = dataclasses.replace(profile, minimum=(4, 16, 8, 8))
    with pytest.raises(BuildError, match=r"refuses the profile: .*MIN<=OPT<=MAX"):
        build(conv_model(), BuildOptions("tensorrt-rtx"), profiles=(wrong,))


def test_layers_before_fusion_and_srus_expanded():
    plan = plan_of(sru_model(("first.sru", "second.sru")))
    assert [(s.site, s.form) for s in plan.srus] == [("first.sru", "expanded"), ("second.sru", "expanded")]
    assert plan.srus[0].layers == plan.srus[1].layers > 20
    assert sum(s.layers for s in plan.srus) <= len(plan.layers)
    kinds = {layer.type for layer in plan.layers}
    assert {"SELECT", "REDUCE"} <= kinds  # the masks are selected, not multiplied
    assert {t for layer in plan.layers for t in layer.dtypes} >= {"FLOAT", "BOOL"}
    again = plan_of(sru_model(("first.sru", "second.sru")))
    assert plan.warnings == again.warnings == ()  # whatever was built in this process before


def test_the_ends_of_srus_are_marked_and_the_manifest_can_say_which():
    """x of the first SRU is the engine's input, y of the last its output: those are read without a mark."""
    names = ("first.sru", "second.sru", "third.sru")
    marked, plain = plan_of(sru_model(names), debug_tensors="srus"), plan_of(sru_model(names))
    assert [(t.site, t.side, t.name) for t in marked.debug_tensors] == [
        (site, side, name)
        for i, site in enumerate(names)
        for side, name in (("x", f"x{i}" if i else "x"), ("y", f"x{i + 1}"))
    ]
    assert plain.debug_tensors == ()
    assert marked.data != plain.data
    assert [layer.name for layer in marked.layers] == [layer.name for layer in plain.layers]


def test_what_the_parser_dropped_or_the_library_refuses_is_left_out():
    source = OnnxSource(sru_model(("a", "b", "c")))
    log = logger()
    network = trt.Builder(log).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    options = BuildOptions("tensorrt-rtx")
    parser = tensorrt.parse(trt, network, log, source.read("whole"), source.facts, options)
    assert len(tensorrt.mark_srus(network, source.facts)) == 6
    tensors = [network.get_layer(i).get_output(0) for i in range(network.num_layers)]
    assert {t.name for t in tensors if network.is_debug_tensor(t)} == {"x1", "x2"}
    assert not network.is_debug_tensor(network.get_input(0))
    gone = dataclasses.replace(source.facts, srus=(dataclasses.replace(source.facts.srus[0], y="gone"),))
    assert [(t.name, t.side) for t in tensorrt.mark_srus(network, gone)] == [("x", "x")]
    del parser  # the network depends on it until here


def test_require_plugin_fails_before_anything_is_built():
    with pytest.raises(BuildError, match=r"1 of 1 SRUs were expanded, the first is block\.sru: no plugin was given"):
        plan_of(sru_model(), require_plugin=True)


@pytest.mark.parametrize(
    ("domain", "message"), [("", r"has no operator Foo \(node conv0\)"), ("my.ops", r"has no operator my\.ops::Foo")]
)
def test_an_unsupported_operator_is_named_with_a_remedy(domain, message):
    with pytest.raises(BuildError, match=message) as refused:
        plan_of(conv_model("Foo", domain))
    assert ("model-local function" in refused.value.remedy) == bool(domain)
    assert "plugin not found" not in str(refused.value).lower()


def test_a_plugin_that_others_registered_is_refused_before_the_parser_aborts_the_process(monkeypatch):
    class Registry:
        all_creators = (SimpleNamespace(name="Conv", plugin_namespace="theirs"),)

    monkeypatch.setattr(trt, "get_plugin_registry", Registry)
    with pytest.raises(UsageError, match="A plugin named 'Conv' is registered"):
        plan_of(conv_model())
    plan_of(sru_model())  # nothing of that name in it


def test_without_a_plugin_an_engine_gets_none_whatever_the_process_has_loaded(monkeypatch):
    """The parser would take a registered SRU; its function is inlined instead."""

    class Registry:
        all_creators = (SimpleNamespace(name="SRU", plugin_namespace="scconv"),)

    expanded = plan_of(sru_model())
    monkeypatch.setattr(trt, "get_plugin_registry", Registry)
    inlined = plan_of(sru_model())
    assert [sru.form for sru in (*expanded.srus, *inlined.srus)] == ["expanded", "expanded"]
    kinds = [Counter(layer.type for layer in plan.layers) for plan in (expanded, inlined)]
    assert kinds[0] == kinds[1]


def test_progress_ends_at_one_and_names_phases():
    told = []
    model = conv_model()
    build(model, BuildOptions("tensorrt-rtx", "sm89", axes=BATCH), lambda *said: told.append(said))
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert 0.5 < fractions[-1] <= 1
    assert "Optimizing graph" in {phase for _, phase in told}


def test_a_build_that_takes_long_says_why_it_may(monkeypatch):
    told = []
    monkeypatch.setattr("scconv_deploy.exporters.tensorrt.builder._SLOW_S", 0.0)
    build(sru_model(), BuildOptions("tensorrt-rtx", "sm89", axes=BATCH), lambda fraction, phase: told.append(phase))
    remark = "slow: consecutive SRUs on 4x4 pixels or fewer? See Known in docs/engines.md"
    assert remark in told
    assert told[-1].endswith(f" ({remark})")


def test_an_interrupt_stops_the_build():
    model = sru_model(tuple("abcdef"))
    phases = []

    def report(fraction, phase):
        phases.append(phase)
        if len(phases) == 3:
            os.kill(os.getpid(), signal.SIGINT)  # what Ctrl-C does

    with pytest.raises(KeyboardInterrupt):
        build(model, BuildOptions("tensorrt-rtx", axes=BATCH), report)
    assert "Optimizing graph" not in phases  # it stopped early
    assert "engine build" not in {thread.name for thread in threading.enumerate()}
    assert plan_of().data  # and the next build is not cancelled


@pytest.fixture
def stuck(monkeypatch):
    """(interrupt it after these delays in seconds -> seconds it took, messages): a library that does not stop."""
    released = threading.Event()
    monkeypatch.setattr(tensorrt, "_SILENT_S", 0.1)

    def interrupted(grace_s, *delays_s):
        monkeypatch.setattr(tensorrt, "_GRACE_S", grace_s)
        said = []
        progress = logs.Progress(lambda *told: said.append(told))
        progress.start("phase", 2)
        timers = [threading.Timer(d, os.kill, (os.getpid(), signal.SIGINT)) for d in delays_s]
        for timer in timers:
            timer.start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            tensorrt._interruptible(released.wait, progress)
        assert "engine build" in {thread.name for thread in threading.enumerate()}
        assert not progress.step("phase", 0)  # it is asked to stop, and its progress is nobody's any more
        return time.monotonic() - start, [message for _, message in said]

    yield interrupted
    released.set()


def test_a_library_that_does_not_stop_is_left_behind_and_that_is_said_once(stuck):
    seconds, said = stuck(0.5, 0.2)
    assert 0.7 <= seconds < 5
    assert said == ["phase", "stopping: waits up to 0 s for the library; Ctrl-C again ends at once"]


def test_a_second_interrupt_does_not_wait(stuck):
    seconds, _ = stuck(60.0, 0.2, 1.0)
    assert 1.0 <= seconds < 30


def test_a_timing_cache_is_read_attached_and_written(tmp_path):
    config = trt.Builder(logger()).create_builder_config()
    place = tmp_path / "timing" / "t.cache"
    timing = _attach_timing(config, place)
    assert timing is not None
    _keep_timing(timing, place)
    assert place.read_bytes() == bytes(timing.serialize())
    assert _attach_timing(config, None) is None


@pytest.mark.parametrize(("dims", "size"), [(3, (4, 6, 8)), (1, (40,))])
def test_srus_of_volumes_and_signals_are_built(dims, size):
    """As [N, C, H, W] behind a Reshape; the profile's batch stays open."""
    from tests.workflows.test_ranks import exported, net, noise, wild_ranks

    _, model = exported(net(dims, wild_ranks.SoftSRU), noise(dims), BATCH, mask_form="where")
    plan = plan_of(model)
    assert [(sru.site, sru.form) for sru in plan.srus] == [("a", "expanded"), ("b", "expanded")]
    assert [tuple(tensor.shape) for tensor in plan.inputs] == [(-1, 1, *size)]


@pytest.mark.parametrize(
    ("operator", "straddle", "shape"),
    [
        ("SRU", False, (8, 256, 56, 56)),
        ("SRU", True, (8, 24, 56, 56)),
        ("SRU", False, (1, 64, 200, 200)),
        ("SRUNorm", False, (8, 256, 28, 28)),
        ("SRUSoft", False, (8, 256, 28, 28)),
    ],
)
def test_an_expanded_sru_in_half_reads_x_twice_and_writes_y_once(operator, straddle, shape):
    """Statistics and gate have a kernel each; a third, of statistics alone, may join the moments of pieces."""
    gate, _ = case(operator, straddle, shape=(1, shape[1], 1, 1))
    model = single(FunctionKey(operator, straddle, "where", 18), gate, TensorProto.FLOAT16)
    text = "x:" + "x".join(map(str, shape))
    plan = build(model, BuildOptions("tensorrt-rtx", "sm89", shapes=(ShapeRange.parse(text),))).compiled
    assert plan.launches <= 3
    assert plan.bytes_moved < 3.1 * 2 * math.prod(shape)
