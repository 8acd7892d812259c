"""Sites of a placement: each name is a pattern for its site alone."""

from __future__ import annotations

import numpy as np
import pytest

from scconv_deploy.errors import UsageError
from scconv_deploy.graph.contract import LAYER, MODULE
from scconv_deploy.precision.int8 import prepared
from scconv_deploy.precision.placement import PlacementOptions
from scconv_deploy.precision.sites import sites_of
from tests import costly
from tests.precision.made import parsed
from tests.precision.test_placement import HEAD, RESIDUAL, STEM, W, graph


def sites(model, **options):
    return sites_of(prepared(model, PlacementOptions(**options)))


def test_layers_and_skips_in_the_graphs_order_with_their_work():
    found = sites(costly.network())
    assert [(one.name, one.kind) for one in found] == [
        ("w1", "Conv"),
        ("bad", "Conv"),
        ("block", "Add"),
        ("w3", "Conv"),
    ]
    assert [one.multiply_adds for one in found] == [8 * 8 * 9 * 64, 8 * 8 * 64, 0, 8 * 8 * 64]
    assert [one.weight_bytes for one in found] == [4 * 8 * 8 * 9, 4 * 64, 0, 4 * 64]


@pytest.mark.parametrize("index", range(4))
def test_a_name_keeps_its_own_site_and_alone_it_is_the_only_one(index):
    model = costly.network()
    name = costly.SITES[index]
    others = [site for site in costly.SITES if site != name]
    assert [one.name for one in sites(model, keep=(name,))] == others
    assert [one.name for one in sites(model, only=(name,), skips_alone=True)] == [name]


def test_a_skip_alone_is_no_plan_for_a_file():
    with pytest.raises(UsageError, match="No layer is left to quantise"):
        prepared(costly.network(), PlacementOptions(only=("block",)))


def test_a_weight_that_several_calls_share_is_one_site():
    found = sites(graph(RESIDUAL.replace("Conv(r, w2)", "Conv(r, w1)")))
    assert [(one.name, one.kind) for one in found] == [("w1", "Conv"), ("t", "Add")]
    assert found[0].multiply_adds == 2 * 4 * 4 * 64


def test_a_skip_has_its_modules_name_unless_it_is_not_alone_in_it():
    model = graph(RESIDUAL)
    for node in model.graph.node:
        if node.op_type == "Conv":
            node.metadata_props.add(key=LAYER, value=node.input[1])
    add = next(node for node in model.graph.node if node.op_type == "Add")
    add.metadata_props.add(key=MODULE, value="layer1.0")
    assert [one.name for one in sites(model)] == ["w1", "w2", "layer1.0"]
    layer = next(node for node in model.graph.node if node.output[0] == "b")
    layer.metadata_props.add(key=MODULE, value="layer1.0")
    assert [one.name for one in sites(model)] == ["w1", "w2", "t"]


def test_characters_of_patterns_are_escaped():
    """``a[1]`` as a pattern would be ``a1``."""
    text = RESIDUAL.replace("w1", "a1").replace("w2", "a2")
    model = parsed(f"g {text}", stem=STEM, head=HEAD, a1=W, a2=2 * W)
    for tensor in model.graph.initializer:
        tensor.name = {"a1": "a[1]", "a2": "a1"}.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [{"a1": "a[1]", "a2": "a1"}.get(name, name) for name in node.input]
    assert [one.name for one in sites(model)] == ["a[[]1]", "a1", "t"]
    assert [one.name for one in sites(model, keep=("a[[]1]",))] == ["a1", "t"]


def test_an_unknown_shape_leaves_the_work_unknown():
    model = costly.network()
    for axis in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        axis.ClearField("dim_value")
    fc = next(tensor for tensor in model.graph.initializer if tensor.name == "fc.weight")
    assert np.prod(fc.dims) == 2560
    assert {one.multiply_adds for one in sites(model)} == {None, 0}
