"""The verdict on the fused SRU's times: each aim fails alone, and what was not measured never passes."""

from __future__ import annotations

import pytest

from benchmarks.sru_aims import HEADLINE, Step, judge

SINGLE = ("1x256x56x56", "1x64x56x56")
TYPES = ("fp16", "fp32")
ROW = {"layout": "NCHW", "variant": "fused, auto", "algorithm": "on_chip", "of_copy": 0.9, "speedup_eager": 13.0,
       "speedup_compile": 2.5, "unexplained": 0, "relative_l2": 1e-7, "tolerance": 1e-6}  # fmt: skip
SLOWER = {"of_copy": 0.2, "speedup_eager": 3.0, "speedup_compile": 1.2}
CLEAN = [Step("memcheck", "passed", "0 errors"), Step("racecheck", "passed", "0 hazards")]


def every_row():
    headline = [ROW | {"shape": shape, "type": name} for shape in HEADLINE for name in TYPES]
    single = [ROW | SLOWER | {"shape": shape, "type": name} for shape in SINGLE for name in TYPES]
    return headline + single


def verdicts(rows, steps=CLEAN):
    return judge(rows, steps, SINGLE, TYPES)


def test_all_aims_pass_together():
    found = verdicts(every_row())
    assert [each.verdict for each in found] == ["passed"] * 6
    assert found[1].found == "0.90 at least, 64x256x56x56 fp16 NCHW (fused, auto); 0 of 4 below"


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"unexplained": 1}, "no gate"),
        ({"relative_l2": 2e-6}, "no gate"),
        ({"relative_l2": None}, "no gate"),
        ({"error": "an illegal memory access"}, "no gate"),
        ({"of_copy": 0.84}, "at least 85%"),
        ({"speedup_compile": 1.99}, "at least 2x torch.compile"),
        ({"speedup_eager": 11.9}, "at least 12x eager"),
    ],
)
def test_each_aim_fails_alone_at_every_headline(place, change, failed):
    rows = every_row()
    rows[place] = rows[place] | change
    found = [each.aim for each in verdicts(rows) if each.verdict == "failed"]
    assert len(found) == 1
    assert found[0].startswith(failed)


def test_batch_1_is_held_against_torch_compile_everywhere():
    rows = every_row()
    rows[-1] = rows[-1] | {"speedup_compile": 0.9}
    assert verdicts(rows)[4].verdict == "failed"
    assert verdicts(rows)[4].found == "0.90 at least, 1x64x56x56 fp32 NCHW (fused, auto); 1 of 4 below"
    assert verdicts(every_row()[:-1])[4].verdict == "not run"
    assert verdicts(every_row()[:-1])[4].found.endswith(", 1 not compared")


def test_speed_is_judged_in_nchw_and_by_the_planned_algorithm_and_gates_everywhere():
    slow = [ROW | SLOWER | {"shape": HEADLINE[0], "type": "fp16", "layout": "NHWC"},
            ROW | SLOWER | {"shape": HEADLINE[0], "type": "fp16", "variant": "fused, split"}]  # fmt: skip
    assert [each.verdict for each in verdicts(every_row() + slow)] == ["passed"] * 6
    wrong = [row | {"unexplained": 3} for row in slow]
    assert verdicts(every_row() + wrong)[0].found == (
        "3 gates, relative L2 1e-07 in 64x256x56x56 fp16 NHWC (fused, auto); 2 wrong"
    )


@pytest.mark.parametrize("kept", range(4))
def test_a_headline_that_is_missing_is_not_run(kept):
    rows = every_row()
    del rows[kept]
    assert [each.verdict for each in verdicts(rows)][1:4] == ["not run"] * 3
    without = [{key: value for key, value in row.items() if key != "speedup_compile"} for row in every_row()]
    assert [each.verdict for each in verdicts(without)] == [
        "passed",
        "passed",
        "not run",
        "passed",
        "not run",
        "passed",
    ]


def test_nothing_measured_is_not_run():
    assert [each.verdict for each in verdicts([], [])] == ["not run"] * 6


@pytest.mark.parametrize(
    ("steps", "verdict", "found"),
    [
        ([Step("racecheck", "not run", "Device not supported"), Step("memcheck", "failed", "2 errors")], "failed",
         "memcheck: 2 errors"),
        ([CLEAN[0], Step("racecheck", "not run", "no device")], "not run", "racecheck: no device"),
        ([CLEAN[0], Step("synccheck", "failed", "1 error")], "not run", "racecheck did not run"),
        (CLEAN, "passed", "memcheck: 0 errors; racecheck: 0 hazards"),
    ],
)  # fmt: skip
def test_the_sanitizers_are_an_aim(steps, verdict, found):
    last = verdicts(every_row(), steps)[-1]
    assert (last.verdict, last.found) == (verdict, found)
