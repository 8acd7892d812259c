"""Timing the fused SRU on a GPU, rehearsed without one: rows on emulated kernels and given seconds, and the timer."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks import cuda_timing, sru_sweep, sru_times
from benchmarks.cuda_timing import GraphTimer
from benchmarks.sru_aims import HEADLINE
from benchmarks.sru_times import BATCHES, LAYOUTS, SIZES, TYPES, Case, cases, compile_cases, compile_error, times

CASE = Case((2, 32, 4, 4), "fp32", "NCHW")
FAST = {"copy": 9e-4, "PyTorch eager": 2e-2, "torch.compile": 3e-3}


class FakeTimer:
    """Runs every variant but torch.compile's once, and answers with given seconds."""

    def __init__(self, seconds, errors=None):
        self.seconds, self.errors = seconds, errors or {}

    def measure(self, calls, x):
        for name, call in calls.items():
            if name != sru_times.COMPILED:
                assert call(x).shape == x.shape
        known = {name: self.seconds.get(name, 1e-3) for name in calls if name not in self.errors}
        return {name: [each, each * 1.1] for name, each in known.items()}, self.errors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TYPES)
def test_rows_have_times_ratios_gates_and_algorithms(emulated, name, layout):
    case = Case((2, 32, 4, 4), name, layout)
    rows = {row["variant"]: row for row in times(emulated, FakeTimer(FAST), case, 0, "cpu")}
    fused = [row for variant, row in rows.items() if variant.startswith("fused")]
    assert {"copy", "PyTorch eager", "torch.compile"} < set(rows)
    assert {row["unexplained"] for row in fused} == {0}
    assert all(row["relative_l2"] <= row["tolerance"] for row in fused)
    assert "auto" not in (algorithms := [row["algorithm"] for row in fused])
    assert len(set(algorithms)) == len(algorithms) >= 2  # each once, by whatever name
    one = rows["fused, auto"]
    assert (one["shape"], one["type"], one["layout"]) == ("2x32x4x4", name, layout)
    assert one["bytes"] == 2 * 32 * 16 * (4 if name == "fp32" else 2) == case.bytes
    assert (one["median_us"], one["of_copy"], one["speedup_eager"], one["speedup_compile"]) == (1050, 0.9, 20.0, 3.0)
    assert one["gb_per_s"] == pytest.approx(2 * case.bytes / 1.05e-3 / 1e9, abs=0.1)


def test_without_torch_compile_the_others_are_timed_and_compared_with_nothing_of_its(emulated):
    broken = FakeTimer(FAST, {"torch.compile": "out of memory"})
    for timer, given in ((broken, ""), (FakeTimer(FAST), "was not compiled in the time for it")):
        rows = list(times(emulated, timer, CASE, 0, "cpu", given))
        errors = {row["variant"]: row["error"] for row in rows if "error" in row}
        assert errors == {"torch.compile": given or "out of memory"}
        assert not any("speedup_compile" in row for row in rows)
        assert all("speedup_eager" in row for row in rows if "error" not in row)


def test_wrong_values_wrong_layouts_and_errors_are_told(emulated):
    def fused(change):
        library = SimpleNamespace(chosen_algorithm=emulated.chosen_algorithm,
                                  sru=lambda *arguments: change(emulated.sru(*arguments)))  # fmt: skip
        rows = times(library, FakeTimer(FAST), CASE, 0, "cpu", "no")
        return next(row for row in rows if row["variant"] == "fused, auto")

    assert fused(lambda y: y * 1.01)["relative_l2"] == pytest.approx(0.01, rel=1e-2)
    assert fused(lambda y: y * torch.nan)["relative_l2"] is None  # JSON has no NaN
    turned = fused(lambda y: y.contiguous(memory_format=torch.channels_last))
    assert turned["error"] == "y is not in x's layout: strides (512, 1, 128, 32), of x (512, 16, 4, 1)"

    def fails(*arguments):
        raise RuntimeError("an illegal address\nmore")

    library = SimpleNamespace(chosen_algorithm=emulated.chosen_algorithm, sru=fails)
    timer = SimpleNamespace(measure=lambda calls, x: ({}, dict.fromkeys(calls, "cannot be captured")))
    rows = list(times(library, timer, CASE, 0, "cpu", "no"))
    assert [row["error"] for row in rows if row["variant"] == "fused, auto"] == ["an illegal address"]


def test_the_headline_comes_first_and_no_case_twice():
    found = cases()
    assert len(set(found)) == len(found) == len(SIZES) * len(BATCHES) * len(TYPES) * len(LAYOUTS)
    assert {case.size for case in found[:8]} == set(HEADLINE)
    assert [case.layout for case in found[:8]] == ["NCHW"] * 4 + ["NHWC"] * 4
    assert {case.shape[0] for case in found[8 : 8 + 2 * len(SIZES)]} == {1}
    assert str(found[0]) == "64x256x56x56 fp16 NCHW"


@pytest.fixture
def quick_compiler():
    """One process, and no program for each instruction set and for headers. By torch's own means: what pytest's would
    take back, it would take away."""
    settings = {"compile_threads": 1, "cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
    with torch._inductor.config.patch(settings):
        yield


def test_a_compiled_case_is_found_in_the_cache_by_the_process_that_times_it(
    emulated, quick_compiler, monkeypatch, tmp_path
):
    """With the C++ compiler in triton's place. The first process compiles beside others, so it leaves no tuning."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    counters.clear()
    assert compile_error(tmp_path, CASE) == "was not compiled in the time for it"
    compile_cases([CASE], 0, "cpu", tmp_path)
    if error := compile_error(tmp_path, CASE):
        pytest.skip(f"torch.compile does not work here: {error}")
    assert (counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]) == (1, 0)

    class OnceTimer(FakeTimer):
        def measure(self, calls, x):
            with torch.inference_mode():
                torch.testing.assert_close(calls["torch.compile"](x), calls["PyTorch eager"](x))
            return super().measure(calls, x)

    rows = list(times(emulated, OnceTimer(FAST), CASE, 0, "cpu", ""))
    assert any("speedup_compile" in row for row in rows)
    assert (counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]) == (1, 1)


def test_a_case_that_cannot_be_compiled_leaves_its_reason(monkeypatch, tmp_path):
    def fails(eager):
        raise RuntimeError("Cannot find a working triton installation\nmore")

    monkeypatch.setattr(sru_times, "compile_call", fails)
    compile_cases([CASE], 0, "cpu", tmp_path)
    assert compile_error(tmp_path, CASE) == "Cannot find a working triton installation"


# --- the process ---


def test_the_process_prints_rows_as_json_and_all_else_as_text(monkeypatch, capsys, tmp_path):
    def rows(library, timer, case, seed, device, error):
        yield {"library": library, "rounds": timer, "case": str(case), "seed": seed, "device": device, "error": error}

    (tmp_path / f"{CASE}.txt").write_text("no triton")
    for name, stand_in in (("SruLibrary", str), ("GraphTimer", int), ("times", rows), ("cases", lambda: [CASE] * 2),
                           ("_device", lambda: {"l2_bytes": 7}), ("_clocks", lambda: "1980 MHz")):  # fmt: skip
        monkeypatch.setattr(sru_times, name, stand_in)
    sru_times.main(["--library", "kernels.so", "--notes", str(tmp_path), "--seed", "3", "--rounds", "5"])
    lines = capsys.readouterr().out.splitlines()
    row = {"library": "kernels.so", "rounds": 5, "case": str(CASE), "seed": 3, "device": "cuda", "error": "no triton"}
    assert [json.loads(line) for line in lines if line.startswith("{")] == [
        {"device": {"l2_bytes": 7}}, row, {"device": {"clocks_after_the_first_case": "1980 MHz"}}, row,
        {"device": {"clocks_after_the_first_case": "1980 MHz"}},
    ]  # fmt: skip
    assert lines[2].startswith(f"{CASE}: ")


def test_the_compiling_processes_share_all_cases(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(sru_times, "compile_cases", lambda chosen, *rest: seen.append((chosen, rest)))
    for number in range(3):
        sru_times.main(["--library", "x", "--notes", str(tmp_path), "--compile", f"{number}/3"])
    assert [chosen[0] for chosen, _ in seen] == cases()[:3]  # the headline at once
    assert sorted(str(case) for chosen, _ in seen for case in chosen) == sorted(map(str, cases()))
    assert {rest for _, rest in seen} == {(0, "cuda", tmp_path)}


# --- the sweep of the sanitizers ---


def test_the_sweep_judges_every_call(emulated, monkeypatch):
    monkeypatch.setattr(sru_sweep, "SIZES", ((2, 16, 6, 6, 4), (2, 24, 5, 8, 16)))
    right, count = sru_sweep.sweep(emulated, "cpu")
    algorithms = len(sru_sweep.ALGORITHMS) - 1
    # operators, types, layouts; groups that straddle channels: without GroupNorm, and in NCHW alone
    assert right == count == algorithms * (3 * 3 * 2 + 2 * 3)
    wrong = SimpleNamespace(sru=lambda x, *rest: emulated.sru(x, *rest) * 1.1)
    assert sru_sweep.sweep(wrong, "cpu") == (0, count)


def test_the_profiled_cases_are_the_headline():
    assert [str(case) for case in sru_sweep.profiled()] == [str(case) for case in cases()[:8]]


# --- the timer, on a CUDA that only counts ---


class FakeGraph:
    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def cuda(monkeypatch):
    graphs = []
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)

    def graph():
        graphs.append(FakeGraph())
        return graphs[-1]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 40.0  # milliseconds

    fakes = {
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=4096),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": graph,
        "graph": lambda graph: contextlib.nullcontext(),
        "Event": Event,
        "synchronize": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return graphs


def test_the_timer_divides_by_the_calls_of_a_graph_and_skips_what_cannot_run(cuda):
    x, seen = torch.zeros(256), []  # 1 KB: sixteen of them exceed an L2 of 4 KB four times

    def fails(data):
        raise RuntimeError("no compiler\nmore")

    seconds, errors = GraphTimer(rounds=3).measure({"one": lambda data: seen.append(data), "two": fails}, x)
    assert GraphTimer(3).inputs(x) == 16
    assert GraphTimer(3).inputs(torch.zeros(1 << 20)) == 1
    assert seconds == {"one": [40e-3 / 32] * 3}
    assert errors == {"two": "no compiler"}
    assert len(seen) == 3 + 32  # warm-up, and 16 inputs twice
    assert len({data.data_ptr() for data in seen}) == 16
    assert cuda[0].replays == 6


def test_a_device_that_no_longer_answers_ends_the_run(cuda, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)

    def fails(data):
        raise RuntimeError("illegal")

    assert not cuda_timing.usable()
    with pytest.raises(RuntimeError, match="illegal"):
        GraphTimer(1).measure({"one": fails}, torch.zeros(4))
