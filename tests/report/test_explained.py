"""Every check that the code can put into a report is explained, in the code and on docs/report.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from scconv_deploy.records.tolerances import ALL
from scconv_deploy.report.explained import CHECKS, LINKS, STEPS, TERMS, markdown_rows, meanings_of
from scconv_deploy.report.rejudge import ENGINES
from scconv_deploy.verification.engine.verdict import ENGINE_LINK
from scconv_deploy.verification.onnx.chain import BUDGET_LINK, ONNX_LINK, PRECISION_LINK, SWAPPED_LINK
from scconv_deploy.verification.onnx.fused import FUSED_LINK
from scconv_deploy.verification.rewrite_guard import REWRITE_LINK
from tests.report.made import full_report

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "report.md").read_text()
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text().splitlines()
JUDGING = ROOT / "scconv_deploy"
COPIES = {"report"}  # makes checks of checks, under the names that they have


def modules() -> dict[Path, ast.Module]:
    paths = [path for path in JUDGING.rglob("*.py") if path.relative_to(JUDGING).parts[0] not in COPIES]
    return {path: ast.parse(path.read_text()) for path in paths if "Check" in path.read_text()}


def constants(body: list[ast.stmt]) -> dict[str, str]:
    return {
        target.id: node.value.value
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def imported(tree: ast.Module) -> dict[str, Path]:
    """Modules of the package that a module imports, by the name that they have in it."""
    return {
        alias.asname or alias.name: ROOT.joinpath(*node.module.split("."), f"{alias.name}.py")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("scconv_deploy")
        for alias in node.names
    }


def names_in_code() -> Iterator[str]:
    """The first argument of each ``Check(...)``, also where a function passes its own first argument on."""
    trees = modules()
    makers, before = {"Check"}, set()
    found: set[str] = set()
    while makers != before:
        before, found = set(makers), set()
        for tree in trees.values():
            for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
                parameters = [argument.arg for argument in function.args.args]
                local = constants(function.body)
                for call in ast.walk(function):
                    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in makers):
                        continue
                    name = call.args[0]
                    match name:
                        case ast.Constant(value=str(text)):
                            found.add(text)
                        case ast.Attribute(value=ast.Name(id=module), attr=attribute):
                            found.add(constants(trees[imported(tree)[module]].body)[attribute])
                        case ast.Name(id=text) if text in local:
                            found.add(local[text])
                        case ast.Name(id=text) if parameters[:1] == [text]:
                            makers.add(function.name)
                        case ast.Name(id=text):
                            found.add(constants(tree.body)[text])
                        case _:
                            raise AssertionError(f"{function.name}: what check is {ast.unparse(name)}?")
    yield from sorted(found)


def test_every_check_in_code_is_explained_and_no_other():
    names = list(names_in_code())
    assert {"static", "weights", "second opinion", "teacher-forced gates", "top-1", "replay"} <= set(names)
    assert names == sorted(CHECKS)


def test_the_page_says_the_same_and_each_check_once():
    rows = [line for line in PAGE.splitlines() if line.startswith("| **")]
    assert rows == [row for link in LINKS for row in markdown_rows(link)]
    steps = [line for line in PAGE[: PAGE.index("## Words")].splitlines() if line.startswith("| `")]
    assert steps == [f"| `{name}` | {step} |" for name, step in STEPS.items()]
    links = [REWRITE_LINK, SWAPPED_LINK, ONNX_LINK, BUDGET_LINK, PRECISION_LINK, FUSED_LINK, *ENGINES, ENGINE_LINK]
    assert list(STEPS) == links


def test_the_glossary_says_the_same_and_each_word_once():
    words = [line.split("**")[1] for line in GLOSSARY if line.startswith("- **")]
    assert len(words) == len(set(words)) > len(TERMS)
    assert [f"- **{term}**: {meaning}" for term, meaning in TERMS.items()] == [
        line for line in GLOSSARY if line.startswith("- **") and line.split("**")[1] in TERMS
    ]


def test_named_tolerances_exist_and_nothing_is_empty():
    families = {name.split(".")[0] for name in ALL}
    named = {word for m in CHECKS.values() for word in m.fails.split("`")[1::2]}
    assert (
        {"replay_multiple", "swapped_values", "second_opinion", "weight_ulps", "engine_multiple"} <= named <= families
    )
    assert all(m.link in LINKS and m.compares and m.remedy for m in CHECKS.values())


def test_a_report_is_explained_by_what_it_holds(real_report):
    held = {check.name for link in real_report.links for check in link.checks}
    assert held == set(meanings_of(real_report))
    assert list(meanings_of(full_report())) == ["gates", "static", "teacher-forced gates", "replay"]
