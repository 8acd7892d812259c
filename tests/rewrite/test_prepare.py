"""What is made of a file before its rules are applied."""

import onnx
import onnx_ir as ir
import pytest

from scconv_deploy.records.stage import StageLog
from scconv_deploy.rewrite.prepare import prepare
from tests.rewrite import naive


@pytest.mark.parametrize("noop", [1, 0])
def test_a_sum_over_no_axes_is_the_identity_where_the_node_says_so(noop):
    proto = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 18]>
        graph (float[2, 3] x) => (float[2, 3] y)
        <float[3] values = {{1, 2, 3}}, int64[0] none = {{}}>
        {{
            total = ReduceSum <noop_with_empty_axes = {noop}> (values, none)
            y = Mul (x, total)
        }}
    """)
    with StageLog().stage("prepare") as stage:
        prepared = ir.to_proto(prepare(proto, 18, stage))
    x = naive.noise(2, 3)
    expected = x.numpy() * ([1, 2, 3] if noop else 6)
    assert (naive.run(prepared, x) == expected.astype("float32")).all()
