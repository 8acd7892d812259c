"""quantize --budget: what stays in float, how the plan is repeated, and what no plan meets."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from scconv_deploy.errors import ParityError, UsageError
from scconv_deploy.graph.quantization import read_quantization, record_of
from scconv_deploy.nn import SRU
from scconv_deploy.precision.placement import PlacementOptions
from scconv_deploy.records.sensitivity import Cost
from scconv_deploy.report.load import load_report
from scconv_deploy.report.render import render
from scconv_deploy.workflows.budget import Budget
from scconv_deploy.workflows.calibrate import CalibrationOptions
from scconv_deploy.workflows.quantize import QuantizeOptions, quantize_onnx
from tests import costly, wild
from tests.command_line import failed, run
from tests.precision.made import parsed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    model = costly.network()
    onnx.save(model, folder / "net.onnx")
    images, labels = costly.data(model)
    np.savez(folder / "data.npz", x=images, labels=labels)
    np.savez(folder / "plain.npz", x=images)
    return folder


def quantized(folder, output, budget="", data="data.npz", **placement):
    chosen = Budget.parse(budget) if budget else None
    options = QuantizeOptions(CalibrationOptions(str(folder / data)), PlacementOptions(**placement), budget=chosen)
    return quantize_onnx(folder / "net.onnx", output, options)


def search_of(result):
    return next(stage.search for stage in result.report.stages if stage.name == "quantize")


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [("0.5%", "share", 0.005), ("0.005", "share", 0.005), ("0", "share", 0.0), ("40dB", "snr_db", 40.0),
     ("6.5 db", "snr_db", 6.5)],
)  # fmt: skip
def test_a_budget_is_a_share_or_decibels(text, kind, limit):
    found = Budget.parse(text)
    assert (found.kind, found.limit) == (kind, pytest.approx(limit))


@pytest.mark.parametrize("text", ["half", "-1%", "101%", "0dB", "nan", "infdB", "dB", "40dBm", "5"])
def test_what_is_neither_is_refused(text):
    with pytest.raises(UsageError, match="is neither a share nor decibels"):
        Budget.parse(text)


def test_labels_go_before_answers_and_the_worst_output_counts():
    labelled = Cost(100, 30.0, 0.01, 5, 100)
    plain = Cost(100, 30.0, None, 5, 100)
    silent = Cost(100, 30.0)
    verdicts = {text: [Budget.parse(text).meets(cost) for cost in (labelled, plain, silent)]
                for text in ("1%", "0.9%", "5%", "30dB", "31dB")}  # fmt: skip
    assert verdicts == {
        "1%": [True, False, False], "0.9%": [False, False, False], "5%": [True, True, False],
        "30dB": [True, True, True], "31dB": [False, False, False],
    }  # fmt: skip


def test_the_planted_site_is_left_in_float_and_nothing_else(folder, tmp_path):
    result = quantized(folder, tmp_path / "q.onnx", "20dB")
    search = search_of(result)
    assert search.keep == (costly.BAD,)
    assert [step.within for step in search.steps[:2]] == [False, True]
    assert (search.found.kept, search.found.within) == (1, True)
    assert search.sensitivity.sites[0].site == costly.BAD
    assert record_of(onnx.load(result.path)).keep == (costly.BAD,)
    # the file that was written is the one that was measured
    images = np.load(folder / "data.npz")["x"]
    expected, found = (costly.logits(onnx.load(path), images) for path in (folder / "net.onnx", result.path))
    assert search.found.cost.snr_db == pytest.approx(costly.snr_db(found, expected), abs=1e-3)
    assert search.found.multiply_adds_share == pytest.approx(result.multiply_adds[0] / result.multiply_adds[1])


def test_the_keep_list_repeats_the_file_byte_for_byte(folder, tmp_path):
    searched = quantized(folder, tmp_path / "a.onnx", "40dB", keep=("w3",))
    search = search_of(searched)
    assert "w3" not in search.keep
    repeated = quantized(folder, tmp_path / "b.onnx", keep=("w3", *search.keep))
    assert repeated.path.read_bytes() == searched.path.read_bytes()
    again = quantized(folder, tmp_path / "c.onnx", "40dB", keep=("w3",))
    assert search_of(again) == search


def test_a_share_is_judged_as_a_whole_and_by_the_report(folder, tmp_path):
    found = run(
        "quantize", folder / "net.onnx", "-o", tmp_path / "q.onnx", "--data", folder / "data.npz", "--budget", "5%",
        "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)["report"]
    search = next(stage["search"] for stage in report["stages"] if stage["name"] == "quantize")
    assert search["keep"] == [costly.BAD]
    assert search["steps"][0]["cost"]["drop"] > 0.05
    check = next(c for link in report["links"] for c in link["checks"] if c["name"] == "budget")
    assert (check["status"], check["quantities"][0]["limit"]) == ("passed", 0.05)
    taken = search["steps"][search["result"]]["cost"]
    assert check["quantities"][0]["value"] == pytest.approx(taken["drop"])


def test_without_labels_it_is_the_share_of_changed_answers(folder, tmp_path):
    search = search_of(quantized(folder, tmp_path / "q.onnx", "5%", "plain.npz"))
    assert search.keep == (costly.BAD,)
    assert search.steps[0].cost.answers_changed > 0.05 >= search.found.cost.answers_changed


def test_what_holds_as_it_is_needs_no_search(folder, tmp_path):
    search = search_of(quantized(folder, tmp_path / "q.onnx", "100%"))
    assert (search.keep, len(search.steps), search.sensitivity) == ((), 1, None)
    whole = quantized(folder, tmp_path / "whole.onnx")
    assert whole.path.read_bytes() == (tmp_path / "q.onnx").read_bytes()


def test_a_tighter_budget_leaves_no_more_in_int8(folder, tmp_path):
    shares = [
        search_of(quantized(folder, tmp_path / f"{budget}.onnx", f"{budget}dB")).found.multiply_adds_share
        for budget in (5, 30, 45)
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]


def test_no_site_can_be_put_back(folder, tmp_path):
    """The plan is the largest: any of the sites in float breaks the budget."""
    budget = Budget.parse("45dB")
    search = search_of(quantized(folder, tmp_path / "q.onnx", "45dB"))
    assert len(search.keep) > 1
    images = np.load(folder / "data.npz")["x"]
    expected = costly.logits(onnx.load(folder / "net.onnx"), images)
    for site in search.keep:
        fewer = tuple(name for name in search.keep if name != site)
        made = quantized(folder, tmp_path / f"{site}.onnx", keep=fewer)
        snr_db = costly.snr_db(costly.logits(onnx.load(made.path), images), expected)
        assert not budget.meets(Cost(20, snr_db))


def test_a_budget_that_nothing_meets_names_the_nearest_plan(folder, tmp_path):
    found = run(
        "quantize", folder / "net.onnx", "-o", tmp_path / "q.onnx", "--data", folder / "data.npz", "--budget", "120dB"
    )
    failed(found, 6, "no plan of 2 meets --budget 120dB. Nearest: 1 of 4 sites in int8 (")
    assert not (tmp_path / "q.onnx").exists()
    option, site = found.stderr.split("It is quantize ")[1].split(".")[0].split()
    assert option == "--only"
    said = float(found.stderr.split("SNR ")[1].split(" dB")[0])
    made = quantized(folder, tmp_path / "only.onnx", only=(site,))
    images = np.load(folder / "data.npz")["x"]
    expected, got = (costly.logits(onnx.load(path), images) for path in (folder / "net.onnx", made.path))
    assert costly.snr_db(got, expected) == pytest.approx(said, abs=0.06)


def test_one_site_that_is_too_costly_leaves_no_plan(folder, tmp_path):
    with pytest.raises(
        ParityError, match=r"no plan of 1 meets --budget 30dB. Nearest: 1 of 1 sites .* without --budget"
    ):
        quantized(folder, tmp_path / "q.onnx", "30dB", only=(costly.BAD,))


def test_a_share_needs_logits(tmp_path):
    model = parsed(
        "g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) { s = Conv(x, a) t = Conv(s, b) y = Conv(t, c) }",
        a=np.ones((4, 3, 1, 1), np.float32), b=np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1) / 3,
        c=np.ones((4, 4, 1, 1), np.float32),
    )  # fmt: skip
    onnx.save(model, tmp_path / "net.onnx")
    np.savez(tmp_path / "plain.npz", x=np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32))
    with pytest.raises(UsageError, match=r"is about answers, and no output of net\.onnx looks like logits"):
        quantized(tmp_path, tmp_path / "q.onnx", "1%", "plain.npz")


def test_the_plan_stands_in_every_report(folder, tmp_path):
    result = quantized(folder, tmp_path / "q.onnx", "20dB")
    (tmp_path / "report.json").write_bytes(result.report.as_bytes())
    read = load_report(tmp_path / "report.json")
    assert search_of(result) == next(stage.search for stage in read.stages if stage.search)
    page = render(read, "html")
    assert "Plans within the budget 20dB" in page
    assert "<code>--keep bad</code>" in page
    assert page.count("Noise of each int8 site, and its share of the work") == 1
    text = render(read, "text")
    assert "the worst site in float" in text
    assert "the same without a search: --keep bad" in text
    (stage,) = [stage for stage in read.stages if stage.search]
    assert "budget 20dB: taken is the worst site in float; the same without a search: --keep bad" in stage.applied


class Costly(nn.Module):
    """A 1x1 convolution that int8 ruins, as in :mod:`tests.costly`, and an SRU before a harmless one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = (nn.Conv2d(c, 8, 3, padding=1, bias=False) for c in (3, 8))
        self.bad, self.after = (nn.Conv2d(8, 8, 1, bias=False) for _ in range(2))
        self.sru, self.fc = SRU(8, 4), nn.Linear(512, 5, bias=False)
        with torch.no_grad():  # an outlier channel, which the next weights undo
            self.first.weight[0] *= costly.OUTLIER
            self.bad.weight[:, 0] /= costly.OUTLIER

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(self.stem(x)))
        return self.fc(torch.relu(self.after(self.sru(self.bad(x)))).flatten(1))


def net() -> nn.Module:
    """A factory."""
    torch.manual_seed(0)
    return wild.randomize(Costly()).eval()


def test_export_and_deploy_leave_the_same_sites_in_float(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("scconv_deploy.workflows.deploy._write_page", lambda *_: ())  # pages are tested elsewhere
    np.savez(tmp_path / "few.npz", x=np.load(folder / "plain.npz")["x"][:4])
    given = [f"{__file__}:net", "--input", "4x3x8x8", "--precision", "int8", "--budget", "20dB", "--data",
             tmp_path / "few.npz"]  # fmt: skip
    exported = run("export", *given, "-o", tmp_path / "net.onnx", "--json")
    assert exported.exit_code == 0, exported.output
    deployed = run("deploy", *given, "-o", tmp_path / "bundle", "--deep", "1", "--json")
    assert deployed.exit_code == 0, deployed.output
    report = json.loads(deployed.stdout)["report"]
    assert report["verdict"] == "passed"
    for stages in (json.loads(exported.stdout)["stages"], report["stages"]):
        search = next(stage["search"] for stage in stages if stage["name"] == "quantize")
        assert search["keep"] == [costly.BAD]
        assert [step["within"] for step in search["steps"][:2]] == [False, True]
    written, shipped = (onnx.load(path) for path in (tmp_path / "net.onnx", tmp_path / "bundle" / "model.onnx"))
    assert written.SerializeToString(deterministic=True) == shipped.SerializeToString(deterministic=True)
    assert [site.path for site in read_quantization(shipped).layers] == ["first", "after"]
    checks = {check["name"]: check for link in report["links"] for check in link["checks"]}
    assert checks["weight codes"]["reason"].startswith("640 int8 weights are PyTorch's")
