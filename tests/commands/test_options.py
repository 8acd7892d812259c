"""Groups of options: what the command line gives reaches the command, the group's own defaults included."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from scconv_deploy.commands.options import CheckOptions, Force, GraphOptions, ModelOptions, grouped
from scconv_deploy.errors import UsageError
from scconv_deploy.model.inputs import DynamicAxis, InputSpec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.verification.options import DEEP, Checks
from scconv_deploy.zoo.embed_spec import EmbedSpec


@pytest.fixture
def seen():
    """Runs a command that takes two groups among options of its own; gives what it was called with."""
    calls = []
    app = typer.Typer()

    @app.command()
    @grouped
    def command(
        name: Annotated[str, typer.Argument()],
        of_model: ModelOptions = ModelOptions(),
        judged: CheckOptions = CheckOptions(),
        force: Force = False,
    ) -> None:
        """What it does."""
        calls.append((name, of_model, judged, force))

    def run(*arguments):
        result = CliRunner().invoke(app, [*arguments])
        assert result.exit_code == 0, result.output
        return calls[-1] if calls else result.stdout

    return run


def test_nothing_given_is_the_groups_defaults(seen):
    assert seen("net") == ("net", ModelOptions(), CheckOptions(), False)


def test_what_is_given_reaches_its_group(seen):
    name, of_model, judged, force = seen(
        "net", "--seed", "3", "--input", "x:1x3x8x8", "--input", "y:1", "--non-strict", "--deep", "2", "--force"
    )
    assert (name, force) == ("net", True)
    assert of_model == ModelOptions(seed=3, inputs=["x:1x3x8x8", "y:1"], non_strict=True)
    assert judged == CheckOptions(deep=2)


def test_the_help_shows_the_options_of_groups_in_their_place(seen):
    text = seen("--help")
    places = [text.index(word) for word in ("--kwargs", "--embed", "--tolerance", "--force")]
    assert "What it does." in text
    assert all(f"--{f.name.replace('_', '-').replace('inputs', 'input')}" in text for f in fields(ModelOptions))
    assert places[2] < places[3]


def test_a_group_becomes_what_the_pipeline_takes():
    options = ModelOptions(
        '{"a": 1}', None, "ema", True, False, "paper", [Path(".")], True, ["x:1x3x8x8"], "1:2:8", ["x:2=8:8:16"], 5
    )
    spec = options.spec("net.py:make")
    assert spec == ModelSpec(
        "net.py:make", {"a": 1}, None, (InputSpec.parse("x:1x3x8x8"),),
        (DynamicAxis(1, 2, 8), DynamicAxis.parse("x:2=8:8:16")), 5, False, embed=EmbedSpec.parse("paper"),
        weights_key="ema", paths=(Path.cwd(),), raw_outputs=True,
    )  # fmt: skip
    assert CheckOptions(provider="cuda").checks() == Checks(provider="cuda", deep=DEEP)
    graph = GraphOptions(22, "where", "bf16", "half", ["head*"]).export(("onnx", "tensorrt"))
    assert (graph.opset, graph.mask_form, graph.backends, graph.io) == (22, "where", ("onnx", "tensorrt"), "half")
    assert (graph.precision, graph.keep) == ("bf16", ("head*",))
    with pytest.raises(UsageError, match="MIN:OPT:MAX"):
        ModelOptions(batch="4").spec("net")


def test_what_counts_as_given():
    assert not ModelOptions(seed=7).given  # verify F.onnx --reference REF.onnx takes one too
    assert ModelOptions(embed="paper").given
    assert not CheckOptions(tolerance=["replay_multiple=9"], provider="cuda").of_model
    assert CheckOptions(deep=0).of_model
