"""Every error names a remedy."""

import ast
import inspect
from pathlib import Path

import pytest

from scconv_deploy import errors

PACKAGE = Path(errors.__file__).parent
CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, errors.ScconvDeployError)
}


def remedies(call: ast.Call) -> list[ast.expr]:
    """The expressions that a construction may take its remedy from; none where it gives none."""
    given = call.args[1:2] or [keyword.value for keyword in call.keywords if keyword.arg == "remedy"]
    return [
        each for value in given for each in ([value.body, value.orelse] if isinstance(value, ast.IfExp) else [value])
    ]


def lacks(call: ast.Call) -> bool:
    texts = remedies(call)
    return not texts or any(isinstance(text, ast.Constant) and not text.value for text in texts)


def constructions(source: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES
    ]


@pytest.mark.parametrize("name", CLASSES)
def test_a_remedy_is_required(name):
    with pytest.raises(TypeError, match="remedy"):
        CLASSES[name]("message")
    assert str(CLASSES[name]("It is so.", "Do this.")) == "It is so. Do this."


def test_each_error_of_the_package_gives_one():
    sources = {path.relative_to(PACKAGE): path.read_text() for path in PACKAGE.rglob("*.py")}
    found = [(path, call) for path, source in sources.items() for call in constructions(source)]
    assert len(found) > 300
    assert [f"{path}:{call.lineno}" for path, call in found if lacks(call)] == []


@pytest.mark.parametrize(
    "source",
    ['UsageError("x")', 'UsageError("x", "")', 'UsageError("x", "y" if z else "")', 'ModelError("x", remedy="")'],
)
def test_the_search_finds_what_lacks_one(source):
    assert [lacks(call) for call in constructions(source)] == [True]
