"""Records to JSON and back; what does not fit is refused by its key."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from scconv_deploy.records.codec import DecodeError, decode, encode, entries_of, parse


@dataclass(frozen=True)
class Inner:
    name: str
    pair: tuple[str, int] = ("", 0)


@dataclass(frozen=True)
class Outer:
    version: Literal[1]
    inner: tuple[Inner, ...]
    numbers: dict[str, float]
    attributes: Mapping[str, int | str | float]
    flag: bool = False
    count: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


FULL = Outer(
    1,
    (Inner("a", ("b", 2)), Inner("c")),
    {"one": 1.5, "far": math.inf, "back": -math.inf},
    {"groups": 16, "eps": 1e-5, "norm": "bn"},
    True,
    3,
    {"any": [None, {"deep": 1}]},
)


def document(**changes):
    return json.loads(json.dumps(encode(FULL), allow_nan=False)) | changes


def test_a_record_is_plain_json_and_comes_back_equal():
    assert document() == {
        "version": 1,
        "inner": [{"name": "a", "pair": ["b", 2]}, {"name": "c", "pair": ["", 0]}],
        "numbers": {"one": 1.5, "far": "inf", "back": "-inf"},
        "attributes": {"groups": 16, "eps": 1e-5, "norm": "bn"},
        "flag": True,
        "count": 3,
        "settings": {"any": [None, {"deep": 1}]},
    }
    assert decode(Outer, document()) == FULL
    assert math.isnan(decode(Outer, document(numbers={"x": encode(math.nan)})).numbers["x"])
    found = decode(Outer, document()).attributes
    assert {name: type(value) for name, value in found.items()} == {"groups": int, "eps": float, "norm": str}


def test_what_has_a_default_may_be_missing_and_nothing_else():
    assert [entry.name for entry in entries_of(Outer) if entry.required] == [
        "version", "inner", "numbers", "attributes",
    ]  # fmt: skip
    short = {name: value for name, value in document().items() if name not in ("flag", "count", "settings")}
    assert decode(Outer, short) == Outer(1, FULL.inner, FULL.numbers, FULL.attributes)
    for name in ("version", "inner", "numbers", "attributes"):
        with pytest.raises(DecodeError, match=f"^{name} is missing$"):
            decode(Outer, {key: value for key, value in short.items() if key != name})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": "blue"}, "colour is not known here"),
        ({"inner": [{"name": "a"}, {"name": "b", "size": 1}]}, "inner[1].size is not known here"),
        ({"inner": [{}]}, "inner[0].name is missing"),
        ({"inner": [{"name": 1}]}, "inner[0].name is 1, expected str"),
        ({"inner": {}}, "inner is {}, expected a list"),
        ({"inner": ["a"]}, 'inner[0] is "a", expected an object'),
        ({"inner": [{"name": "a", "pair": ["b"]}]}, 'inner[0].pair is ["b"], expected 2 entries'),
        ({"inner": [{"name": "a", "pair": ["b", True]}]}, "inner[0].pair[1] is true, expected int"),
        ({"numbers": {"x": "much"}}, "numbers['x'] is \"much\", expected a number"),
        ({"numbers": {"x": True}}, "numbers['x'] is true, expected a number"),
        ({"numbers": [1.0]}, "numbers is [1.0], expected an object"),
        ({"attributes": {"x": None}}, "attributes['x'] is null, expected int or str or float"),
        ({"version": 2}, "version is 2, expected 1"),
        ({"version": True}, "version is true, expected 1"),
        ({"flag": 1}, "flag is 1, expected bool"),
        ({"count": "3"}, 'count is "3", expected int'),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(changes, words):
    with pytest.raises(DecodeError) as refused:
        decode(Outer, document(**changes))
    assert str(refused.value) == words


def test_unknown_keys_are_ignored_where_that_is_asked_for():
    changed = document(colour="blue", inner=[{"name": "a", "pair": ["b", 2], "size": 1}, {"name": "c"}])
    assert decode(Outer, changed, unknown="ignore") == FULL


@pytest.mark.parametrize("value", [None, [], 3, "text"])
def test_a_document_that_is_no_object_is_refused(value):
    with pytest.raises(DecodeError, match=r"^the document is .*, expected an object$"):
        decode(Outer, value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, b"\xff\xfe\x00"])
def test_text_that_is_not_json_is_refused(text):
    with pytest.raises(DecodeError, match=r"^not JSON: "):
        parse(text)


def test_a_type_without_json_is_an_error_of_the_record():
    with pytest.raises(TypeError, match="the codec does not support the type"):
        decode(set[str], [])  # type: ignore[arg-type]


def test_the_codec_needs_the_standard_library_alone():
    code = (
        "import sys; import scconv_deploy.records.codec; print(sorted({'numpy', 'torch', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
