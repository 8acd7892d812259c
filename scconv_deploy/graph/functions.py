"""The operators of the domain ``scconv`` and their meaning: one ONNX model-local function each.

A runtime with the plugin binds the node; every other one expands the function. Formal names start with ``sru__``,
because TensorRT before 10.7 binds inputs wrongly when one equals an outer tensor's name. Bodies are generated per
opset, because the checker refuses a function whose opset is not the model's.

The body, for x of type T and statistics in float32::

    c      = x - mean0(x)                                    centred but for the rounding of the mean,
    rest   = mean(c)                                         which a second pass finds: mean_g = mean0 + rest
    s_g    = sqrt(max(SS(c) - L * rest^2, 0) / (L - ddof) + eps_var) + eps_std     sums of parts, then of parts of parts
    open   = sign_c * c >= s_g * cut_c + sign_c * rest       sign_c * (x - mean_g) >= s_g * cut_c, one pass less
    x1     = open ? data : 0             or  cast(open) * data           (the two mask forms)
    x2     = data - x1
    y      = x1 + gather(x2, halves [1, 0])                  concat(x1[:C/2] + x2[C/2:], x1[C/2:] + x2[:C/2])

``x2 = data - x1`` is exact and saves the second mask. Gathering the halves of one tensor moves half as much data as
splitting two and concatenating.

``multiply`` is the body for ONNX Runtime, ``where`` the one for TensorRT's compilers. They sum in different orders, so
they may differ in gates that lie within rounding of their threshold. In half, ``where`` reads x twice and writes y
once, in two or three kernels (measured with TensorRT-RTX 1.7.1: docs/engines.md). That needs:

- moments of pieces that stay on chip, so that two passes over a piece are one reading of x;
- x converted to float32 twice, for the statistics and for the gate: a converted x that two kernels share is written;
- data and gate of one conversion. Data of SRU and SRUSoft are multiplied, selected and added in float32 and rounded to
  x's type where the type's own arithmetic would round, which gives the same bits.

Measured in ONNX Runtime against a naive export: ``python -m benchmarks sru_ort``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import onnx
import onnx.parser

from scconv_deploy.graph.contract import ATTRIBUTES, DOMAIN, PARAMETERS, FunctionKey, check_opset

_ATTRIBUTES_TO_TENSORS = """
    sru__xf = Cast <to = 1> (sru__x)
    sru__zero = Constant <value_ints = [0]> ()
    sru__one = Constant <value_ints = [1]> ()
    sru__all = Constant <value_ints = [-1]> ()
    sru__group_axis = Constant <value_ints = [2]> ()
    sru__num_groups = Constant <value_int: int = @num_groups> ()
    sru__groups = Reshape (sru__num_groups, sru__one)
    sru__grouped = Concat <axis = 0> (sru__zero, sru__groups, sru__all)
    sru__ddof = Constant <value_int: int = @ddof> ()
    sru__eps_var = Constant <value_float: float = @eps_var> ()
    sru__eps_std = Constant <value_float: float = @eps_std> ()
    sru__sample_shape = Shape <start = 1> (sru__x)
    sru__sample_size = ReduceProd <keepdims = 1> (sru__sample_shape)
    sru__group_size = Div (sru__sample_size, sru__groups)
    sru__group_size_f = Cast <to = 1> (sru__group_size)
    sru__freedom_int = Sub (sru__group_size, sru__ddof)
    sru__freedom = Cast <to = 1> (sru__freedom_int)
"""

# Groups of whole channels: channel statistics first, so that no large tensor is ever reshaped. Every sum goes by rows,
# channels, groups: ONNX Runtime sums an axis naively, and over whole channels s was off by 1e-5 at 256x56x56 (measured:
# 41 unexplained flips in 3.8e8 gates on rectified input; by rows 0 in 1.1e9, the largest at 0.31 of the bound).
# Parameters are [1, G, C/G], so that the statistics of a group, [N, G, 1], reach its channels by broadcasting.
# keepdims = 0, for ONNX Runtime reduces any axis but the last on a slow path (0.28 ms against 0.02 at 8x256x56x1).
_STATISTICS_OF_CHANNELS = """
    sru__per_channel = Concat <axis = 0> (sru__one, sru__groups, sru__all)
    sru__row_axis = Constant <value_ints = [3]> ()
    sru__as_channels = Constant <value_ints = [0, -1, 1, 1]> ()
    sru__mean0_row = ReduceMean <keepdims = 0> (sru__xf, sru__row_axis)
    sru__mean0_channel = ReduceMean <keepdims = 0> (sru__mean0_row, sru__group_axis)
    sru__mean0_grouped = Reshape (sru__mean0_channel, sru__grouped)
    sru__grouped_shape = Shape (sru__mean0_grouped)
    sru__mean0 = ReduceMean <keepdims = 1> (sru__mean0_grouped, sru__group_axis)
    sru__mean0_wide = Expand (sru__mean0, sru__grouped_shape)
    sru__mean0_c = Reshape (sru__mean0_wide, sru__as_channels)
    sru__centred = Sub (sru__xf, sru__mean0_c)
    sru__rest_row = ReduceMean <keepdims = 0> (sru__centred, sru__row_axis)
    sru__rest_channel = ReduceMean <keepdims = 0> (sru__rest_row, sru__group_axis)
    sru__rest_grouped = Reshape (sru__rest_channel, sru__grouped)
    sru__rest = ReduceMean <keepdims = 1> (sru__rest_grouped, sru__group_axis)
    sru__squares_row = ReduceSumSquare <keepdims = 0> (sru__centred, sru__row_axis)
    sru__squares_channel = ReduceSum <keepdims = 0> (sru__squares_row, sru__group_axis)
    sru__squares_grouped = Reshape (sru__squares_channel, sru__grouped)
    sru__squares0 = ReduceSum <keepdims = 1> (sru__squares_grouped, sru__group_axis)
"""

# For TensorRT's compilers: moments of a group's pieces, then the group's from those. A piece is a channel's plane, or a
# row of it where planes have 16,384 elements or more: of so many the compiler keeps none on chip if pieces are few, and
# writes a float32 tensor for each pass. A whole group as a piece takes one kernel less where C > 4G, but is soon too
# long. Mean and squares of a piece are compensated: ONNX Runtime sums naively. With a piece's mean = mean0 + between,
#     mean of (x - mean0)^2 over a group = mean over its pieces of (square + between^2 - rest^2)
_STATISTICS_OF_PIECES = """
    sru__per_channel = Concat <axis = 0> (sru__one, sru__groups, sru__all)
    sru__as_channels = Constant <value_ints = [0, -1, 1, 1]> ()
    sru__channels = Shape (sru__cut)
    sru__channels_of_group = Div (sru__channels, sru__groups)
    sru__grouped_shape = Concat <axis = 0> (sru__one, sru__groups, sru__channels_of_group)
    sru__plane_shape = Shape <start = 2> (sru__x)
    sru__plane_size = ReduceProd <keepdims = 1> (sru__plane_shape)
    sru__longest = Constant <value_ints = [16384]> ()
    sru__plane_is_long = Div (sru__plane_size, sru__longest)
    sru__plane_in_rows = Min (sru__plane_is_long, sru__one)
    sru__rows = Gather <axis = 0> (sru__plane_shape, sru__zero)
    sru__rows_less_one = Sub (sru__rows, sru__one)
    sru__more_pieces = Mul (sru__plane_in_rows, sru__rows_less_one)
    sru__pieces_of_channel = Add (sru__more_pieces, sru__one)
    sru__pieces = Mul (sru__channels, sru__pieces_of_channel)
    sru__as_pieces = Concat <axis = 0> (sru__zero, sru__pieces, sru__all)
    sru__x_pieces = Reshape (sru__x_measured, sru__as_pieces)
    sru__mean0_piece = ReduceMean <keepdims = 1> (sru__x_pieces, sru__group_axis)
    sru__centred_piece = Sub (sru__x_pieces, sru__mean0_piece)
    sru__rest_piece = ReduceMean <keepdims = 1> (sru__centred_piece, sru__group_axis)
    sru__square_of_x = Mul (sru__centred_piece, sru__centred_piece)
    sru__square0 = ReduceMean <keepdims = 1> (sru__square_of_x, sru__group_axis)
    sru__square_centred = Sub (sru__square_of_x, sru__square0)
    sru__square_rest = ReduceMean <keepdims = 1> (sru__square_centred, sru__group_axis)
    sru__square_piece = Add (sru__square0, sru__square_rest)
    sru__mean0_grouped = Reshape (sru__mean0_piece, sru__grouped)
    sru__rest_grouped = Reshape (sru__rest_piece, sru__grouped)
    sru__square_grouped = Reshape (sru__square_piece, sru__grouped)
    sru__mean0 = ReduceMean <keepdims = 1> (sru__mean0_grouped, sru__group_axis)
    sru__between0 = Sub (sru__mean0_grouped, sru__mean0)
    sru__between = Add (sru__between0, sru__rest_grouped)
    sru__rest = ReduceMean <keepdims = 1> (sru__between, sru__group_axis)
    sru__between_square = Mul (sru__between, sru__between)
    sru__rest_grouped_square = Mul (sru__rest_grouped, sru__rest_grouped)
    sru__square_added = Sub (sru__between_square, sru__rest_grouped_square)
    sru__square_about = Add (sru__square_grouped, sru__square_added)
    sru__square_mean0 = ReduceMean <keepdims = 1> (sru__square_about, sru__group_axis)
    sru__square_off = Sub (sru__square_about, sru__square_mean0)
    sru__square_left = ReduceMean <keepdims = 1> (sru__square_off, sru__group_axis)
    sru__square_mean = Add (sru__square_mean0, sru__square_left)
    sru__squares0 = Mul (sru__square_mean, sru__group_size_f)
"""

_CONVERTED_AGAIN = """
    sru__x_measured = Cast <to = 1> (sru__x)
"""
# x again, not the pieces or groups centred: those would be written to memory for the gate's kernel
_CENTRED_OF_X = """
    sru__mean0_wide = Expand (sru__mean0, sru__grouped_shape)
    sru__mean0_c = Reshape (sru__mean0_wide, sru__as_channels)
    sru__centred = Sub (sru__xf, sru__mean0_c)
"""

# Groups that straddle channels: over the flattened tensor; the sum of squares is compensated like the mean.
_STATISTICS_OF_GROUPS = """
    sru__per_channel = Constant <value_ints = [1, -1, 1, 1]> ()
    sru__as_channels = Shape (sru__x)
    sru__x_grouped = Reshape ({x}, sru__grouped)
    sru__grouped_shape = Shape (sru__x_grouped)
    sru__mean0 = ReduceMean <keepdims = 1> (sru__x_grouped, sru__group_axis)
    sru__centred_grouped = Sub (sru__x_grouped, sru__mean0)
{centred}    sru__rest = ReduceMean <keepdims = 1> (sru__centred_grouped, sru__group_axis)
    sru__square = Mul (sru__centred_grouped, sru__centred_grouped)
    sru__square0 = ReduceMean <keepdims = 1> (sru__square, sru__group_axis)
    sru__square_centred = Sub (sru__square, sru__square0)
    sru__square_rest = ReduceMean <keepdims = 1> (sru__square_centred, sru__group_axis)
    sru__square_mean = Add (sru__square0, sru__square_rest)
    sru__squares0 = Mul (sru__square_mean, sru__group_size_f)
"""
_CENTRED_GROUPS = "    sru__centred = Reshape (sru__centred_grouped, sru__as_channels)\n"

_DEVIATION = """
    sru__rest_sum = Mul (sru__rest, sru__group_size_f)
    sru__rest_square = Mul (sru__rest_sum, sru__rest)
    sru__squares_less = Sub (sru__squares0, sru__rest_square)
    sru__squares = Relu (sru__squares_less)
    sru__var = Div (sru__squares, sru__freedom)
    sru__var_eps = Add (sru__var, sru__eps_var)
    sru__deviation = Sqrt (sru__var_eps)
    sru__s = Add (sru__deviation, sru__eps_std)
"""

# s and rest as one value per element, because a channel can lie in several groups
_SPREAD_OVER_ELEMENTS = """
    sru__s_wide = Expand (sru__s, sru__grouped_shape)
    sru__s_c = Reshape (sru__s_wide, sru__as_channels)
    sru__rest_wide = Expand (sru__rest, sru__grouped_shape)
    sru__rest_c = Reshape (sru__rest_wide, sru__as_channels)
"""

_GATE = """
    sru__cut_c = Reshape (sru__cut, sru__per_channel)
    sru__sign_c = Reshape (sru__sign, sru__per_channel)
    sru__cut_s = Mul ({s}, sru__cut_c)
    sru__rest_signed = Mul (sru__sign_c, {rest})
    sru__threshold_c = Add (sru__cut_s, sru__rest_signed)
    sru__threshold = Reshape (sru__threshold_c, sru__as_channels)
    sru__sign_wide = Constant <value_ints = [1, -1, 1, 1]> ()
    sru__sign_of_channel = Reshape (sru__sign, sru__sign_wide)
    sru__signed = Mul (sru__sign_of_channel, sru__centred)
    sru__open = GreaterOrEqual (sru__signed, sru__threshold)
"""

# n * first + second with n = (centred - rest) / s, as one factor and one offset per channel
_AFFINE = """
    sru__first_c = Reshape ({first}, sru__per_channel)
    sru__second_c = Reshape ({second}, sru__per_channel)
    sru__factor_c = Div (sru__first_c, {s})
    sru__rest_scaled = Mul ({rest}, sru__factor_c)
    sru__offset_c = Sub (sru__second_c, sru__rest_scaled)
    sru__factor = Reshape (sru__factor_c, sru__as_channels)
    sru__offset = Reshape (sru__offset_c, sru__as_channels)
    sru__scaled = Mul (sru__centred, sru__factor)
    sru__affine = Add (sru__scaled, sru__offset)
"""

_NORMALIZED_DATA = """
    sru__data = CastLike (sru__affine, sru__x)
"""

_SOFT_WEIGHT = """
    sru__r_f = Sigmoid (sru__affine)
    sru__r = CastLike (sru__r_f, sru__x)
"""

_MASK = {
    ("hard", "where"): """
    sru__closed_f = Constant <value_float = 0.0> ()
    sru__closed = CastLike (sru__closed_f, {data})
    sru__x1 = Where (sru__open, {data}, sru__closed)
    sru__x2 = Sub ({data}, sru__x1)
""",
    ("hard", "multiply"): """
    sru__mask = CastLike (sru__open, sru__x)
    sru__x1 = Mul (sru__mask, {data})
    sru__x2 = Sub ({data}, sru__x1)
""",
    ("soft", "where"): """
    sru__one_f = Constant <value_float = 1.0> ()
    sru__zero_f = Constant <value_float = 0.0> ()
    sru__weight = Cast <to = 1> (sru__r)
    sru__w1 = Where (sru__open, sru__one_f, sru__weight)
    sru__w2 = Where (sru__open, sru__zero_f, sru__weight)
    sru__x1_f = Mul (sru__w1, sru__xf)
    sru__x2_f = Mul (sru__w2, sru__xf)
    sru__x1 = CastLike (sru__x1_f, sru__x)
    sru__x2 = CastLike (sru__x2_f, sru__x)
""",
    ("soft", "multiply"): """
    sru__mask = CastLike (sru__open, sru__x)
    sru__shut = Not (sru__open)
    sru__rest_mask = CastLike (sru__shut, sru__x)
    sru__w2 = Mul (sru__rest_mask, sru__r)
    sru__w1 = Add (sru__mask, sru__w2)
    sru__x1 = Mul (sru__w1, sru__x)
    sru__x2 = Mul (sru__w2, sru__x)
""",
}

_CROSS = """
    sru__halves = Constant <value_ints = [0, 2, -1]> ()
    sru__other_half = Constant <value_ints = [1, 0]> ()
    sru__x_shape = Shape (sru__x)
    sru__x2_halves = Reshape (sru__x2, sru__halves)
    sru__x2_swapped = Gather <axis = 1> (sru__x2_halves, sru__other_half)
    sru__x2_crossed = Reshape (sru__x2_swapped, sru__x_shape)
    {y} = Add (sru__x1, sru__x2_crossed)
"""

_TO_TYPE_OF_X = """
    sru__y = CastLike (sru__y_f, sru__x)
"""


def function_text(key: FunctionKey) -> str:
    """The function in ONNX's text format."""
    check_opset(key.opset)
    soft, where = key.operator == "SRUSoft", key.mask_form == "where"
    data_f = where and key.operator == "SRU"
    data = "sru__data" if key.operator == "SRUNorm" else "sru__xf" if data_f else "sru__x"
    suffix = "_c" if key.straddle else ""
    statistics = {"s": f"sru__s{suffix}", "rest": f"sru__rest{suffix}"}
    first, second = PARAMETERS[key.operator][2:] or ("", "")
    affine = _AFFINE.format(first=first, second=second, **statistics)
    blocks: Iterable[str] = (
        _ATTRIBUTES_TO_TENSORS,
        _statistics(key),
        _DEVIATION,
        _SPREAD_OVER_ELEMENTS if key.straddle else "",
        _GATE.format(**statistics),
        {"SRU": "", "SRUNorm": affine + _NORMALIZED_DATA, "SRUSoft": affine + _SOFT_WEIGHT}[key.operator],
        _MASK["soft" if soft else "hard", key.mask_form].format(data=data),
        _CROSS.format(y="sru__y_f" if data_f else "sru__y"),
        _TO_TYPE_OF_X if data_f else "",
    )
    body = "".join(line + "\n" for block in blocks for line in block.splitlines() if line)
    inputs = ", ".join(("sru__x", *PARAMETERS[key.operator]))
    return (
        f'<domain: "{DOMAIN}", opset_import: ["" : {key.opset}]>\n'
        f"{key.operator} <{', '.join(ATTRIBUTES)}> ({inputs}) => (sru__y)\n{{\n{body}}}\n"
    )


def _statistics(key: FunctionKey) -> str:
    """Nodes that give mean0, rest, the squares about mean0, and x centred."""
    if key.mask_form == "where":
        groups = _STATISTICS_OF_GROUPS.format(x="sru__x_measured", centred="")
        return _CONVERTED_AGAIN + (groups if key.straddle else _STATISTICS_OF_PIECES) + _CENTRED_OF_X
    return (
        _STATISTICS_OF_GROUPS.format(x="sru__xf", centred=_CENTRED_GROUPS) if key.straddle else _STATISTICS_OF_CHANNELS
    )


def function_proto(key: FunctionKey) -> onnx.FunctionProto:
    """The function of a key as a protobuf message, with the key's overload."""
    function = onnx.parser.parse_function(function_text(key))
    function.overload = key.overload
    return function


def fingerprint(function: onnx.FunctionProto) -> str:
    """SHA-256 of a function's signature and nodes, without node names, comments and metadata."""
    digest = hashlib.sha256()
    signature = (function.domain, function.name, function.overload, list(function.input), list(function.output))
    opsets = sorted((o.domain, o.version) for o in function.opset_import)
    digest.update(repr((signature, sorted(function.attribute), opsets)).encode())
    for node in function.node:
        attributes = []
        for attribute in sorted(node.attribute, key=lambda a: a.name):
            plain = onnx.AttributeProto()
            plain.CopyFrom(attribute)
            plain.doc_string = ""
            attributes.append(plain.SerializeToString(deterministic=True))
        kind = (node.domain, node.op_type, node.overload)
        digest.update(repr((kind, list(node.input), list(node.output), attributes)).encode())
    return digest.hexdigest()
