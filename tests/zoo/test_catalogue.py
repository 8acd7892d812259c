"""The zoo counted, and the table beside the paper's numbers."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from scconv_deploy import cli, zoo
from scconv_deploy.model.prepare import reference_from_spec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.workflows import inspect as inspection
from scconv_deploy.zoo import catalogue
from scconv_deploy.zoo.paper import PAPER, Published

DOCUMENT = Path(__file__).parents[2] / "docs" / "zoo.md"

# name -> parameters and FLOPs as the issue and the paper print them
PRINTED = {
    "resnet56": ("0.86 M", "126.84 M"),
    "scconv_resnet56": ("0.52 M", "79.55 M"),
    "cifar_resnet50": ("23.52 M", "1.30 G"),
    "scconv_cifar_resnet50": ("14.69 M", "831.18 M"),
    "resnext29": ("28.27 M", "4.55 G"),
    "scconv_resnext29": ("22.31 M", "3.57 G"),
    "wrn28_10": ("36.55 M", "5.96 G"),
    "scconv_wrn28_10": ("21.12 M", "3.75 G"),
    "densenet121": ("7.05 M", "898.23 M"),
    "scconv_densenet121": ("5.45 M", "594.34 M"),
    "resnet50": ("25.56 M", "4.09 G"),
    "scconv_resnet50": ("16.78 M", "2.70 G"),
    "scconv_resnet50_alpha34": ("17.69 M", "2.87 G"),
    "resnet101": ("44.55 M", "7.83 G"),
    "scconv_resnet101": ("28.00 M", "4.90 G"),
    "retinanet_r50": ("-", "63.09 G"),
    "scconv_retinanet_r50": ("-", "41.36 G"),
}
SHARE_OF_C2 = {  # what the paper's parameters leave for each ScConv, in C^2; the notes quote it
    ("scconv_resnet50", "resnet50"): 2.01,
    ("scconv_resnet50_alpha34", "resnet50"): 2.73,
    ("scconv_resnet101", "resnet101"): 2.01,
    ("scconv_cifar_resnet50", "cifar_resnet50"): 1.82,
    ("scconv_wrn28_10", "wrn28_10"): 1.82,
}


@pytest.fixture
def entries(listing):
    return {entry.name: entry for entry in listing.entries}


def row_of(markdown, name):
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| `{name}` |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_the_papers_numbers(listing):
    table = catalogue.table(listing)
    found = {name: row_of(table, name) for name in PAPER}
    assert {name: (row[2], row[6]) for name, row in found.items()} == PRINTED


def test_baselines_recompute_to_the_digit(entries):
    """So they fix what the paper counts, its shortcuts, strides, biases and classes."""
    for name, flops in {
        "resnet56": 126.84e6,
        "resnet101": 7.83e9,
        "wrn28_10": 5.96e9,
        "cifar_resnet50": 1.30e9,
    }.items():
        assert float(f"{entries[name].counts.flops:.{5 if flops < 1e9 else 3}g}") == pytest.approx(flops, rel=1e-9)
    for name in ("resnet56", "wrn28_10", "densenet121", "resnet50", "resnet101"):
        assert round(entries[name].counts.parameters / 1e6, 2) == PAPER[name].parameters_m
    assert entries["resnet50"].counts.multiply_adds == 4_089_184_256
    assert entries["densenet121"].counts.flops == pytest.approx(898.23e6, rel=1e-4)


def test_every_difference_over_two_percent_is_explained(entries):
    unexplained = {
        name: catalogue.differences(entries[name])
        for name, published in PAPER.items()
        if max(abs(d) for d in catalogue.differences(entries[name]) if d is not None) > catalogue.LARGE_DIFFERENCE
        and not published.note
    }
    assert not unexplained
    assert catalogue.differences(entries["scconv_resnet56"]) == pytest.approx((-0.006, -0.045), abs=5e-4)


@pytest.mark.parametrize("pair", SHARE_OF_C2, ids=lambda pair: pair[0])
def test_the_arithmetic_of_the_notes(pair, entries):
    name, baseline = pair
    with torch.device("meta"):
        model = zoo.MODELS[name].build()
        plain = zoo.MODELS[baseline].build()
    widths = [m.SRU.gn.gamma.numel() for m in model.modules() if isinstance(m, catalogue.ScConv)]
    squares, extra = sum(c * c for c in widths), 3 * sum(widths)
    if name == "scconv_wrn28_10":
        extra += sum(widths)  # two of the BatchNorm that follows, less the bias of the convolution that is gone
    rest = sum(p.numel() for p in plain.parameters()) - 9 * squares
    share = (PAPER[name].parameters_m * 1e6 - rest - extra) / squares
    assert share == pytest.approx(SHARE_OF_C2[pair], abs=0.006)


def test_counts_agree_with_a_real_call():
    """The meta device and values give the same; FLOPs add two for each element after a BatchNorm."""
    spec = ModelSpec("scconv_resnet20")
    reference, _ = reference_from_spec(spec)
    (entry,) = catalogue.list_models(["scconv_resnet20"]).entries
    assert entry.counts.multiply_adds == inspection.multiply_adds(reference)
    normalized = 16 * 1024 * 7 + 32 * 256 * 6 + 64 * 64 * 6
    assert entry.counts.flops == entry.counts.multiply_adds + 2 * normalized


def test_one_convolution_is_counted_for_one_sample():
    counts = catalogue.count(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (5, 3, 8, 8))
    assert counts == catalogue.Counts(3 * 4 * 9 + 4 + 8, 3 * 4 * 9 * 36, 3 * 4 * 9 * 36 + 2 * 4 * 36, 0)


def test_the_committed_page_is_what_the_command_writes(listing):
    committed = DOCUMENT.read_text()
    assert catalogue.table(listing) in committed
    for entry in listing.entries:
        assert catalogue._model_row(entry) in committed.splitlines()
    first, after, kept = (line for line in committed.splitlines() if "ScConv (the zoo's)" in line or " after Sc" in line
                          or "stays as it is" in line)  # fmt: skip
    assert [cell.strip() for cell in first.split("|")[2:6]] == ["16.53 M", "-1.5%", "2.63 G", "-2.4%"]
    assert after.split("|")[2:4] == first.split("|")[2:4]  # pooling has no parameters
    assert kept.split("|")[2].strip() == "19.00 M"


def test_a_network_whose_parameters_the_paper_does_not_give(monkeypatch):
    monkeypatch.setitem(catalogue.PAPER, "resnet20", Published(None, 41.0, "counted otherwise"))
    table = catalogue.table(catalogue.list_models(["resnet20"]))
    assert row_of(table, "resnet20")[1:] == ["0.27 M", "-", "-", "40.55 M", "40.93 M", "41.00 M", "-0.2%"]
    assert table.endswith("- `resnet20`: counted otherwise\n")


@pytest.fixture
def two_models(monkeypatch):
    names = ("scconv_resnet20", "resnet56")
    monkeypatch.setattr(catalogue, "MODELS", {name: zoo.MODELS[name] for name in names})
    monkeypatch.setattr(catalogue, "strides_table", lambda: "strides\n")  # three ResNet-50s


def test_models_prints_a_table(two_models):
    result = CliRunner().invoke(cli.app, ["models"])
    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if line.startswith("scconv_resnet20"))
    assert row.split()[:5] == ["scconv_resnet20", "1x3x32x32", "9", "154,810", "23,593,600"]
    assert row.rstrip().endswith("ResNet-20 (He et al. 2016) with ScConv")


def test_models_as_json(two_models):
    result = CliRunner().invoke(cli.app, ["models", "--json"])
    document = json.loads(result.stdout)
    assert document["kind"] == "models"
    first, second = document["models"]
    assert first["name"] == "scconv_resnet20"
    assert (first["parameters"], first["scconvs"], first["paper"]) == (154_810, 9, None)
    assert second["paper"] == {"parameters_m": 0.86, "flops_m": 126.84, "note": ""}


def test_models_writes_the_page_and_overwrites_only_when_told(two_models, tmp_path):
    page = tmp_path / "zoo.md"
    arguments = ["models", "--quiet", "--table", str(page)]
    first = CliRunner().invoke(cli.app, arguments)
    assert (first.exit_code, first.stdout) == (0, "")
    written = page.read_text()
    assert row_of(written.partition("## Beside")[2], "resnet56")[-2:] == ["126.84 M", "+0.0%"]
    assert written.endswith("strides\n")
    refused = CliRunner().invoke(cli.app, arguments)
    assert refused.exit_code == 2
    assert f"{page} exists. Add --force" in refused.stderr
    assert CliRunner().invoke(cli.app, [*arguments, "--force"]).exit_code == 0
    assert page.read_text() == written
