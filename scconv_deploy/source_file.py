"""The user's Python file, read without running it."""

from __future__ import annotations

import ast
from pathlib import Path

from scconv_deploy.errors import ModelError, UsageError


def refuse_training_on_import(path: Path) -> None:
    """A training script without a main guard would train before we get its factory."""
    pending: list[ast.AST] = [n for n in parse_source(path).body if not _is_main_guard(n)]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward":
            raise UsageError(
                f"{path} trains when it is imported: line {node.lineno} calls .backward() at the top level.",
                "Put the training under if __name__ == '__main__':",
            )
        pending.extend(ast.iter_child_nodes(node))


def parse_source(path: Path) -> ast.Module:
    """The syntax tree of a file (ModelError if it is not Python)."""
    try:
        return ast.parse(path.read_bytes(), filename=str(path))  # bytes: the file may declare its encoding
    except (SyntaxError, ValueError) as error:
        number = getattr(error, "lineno", None)  # null bytes have none
        line = f" (line {number})" if number else ""
        raise ModelError(f"{path} is not Python: {error.args[0]}{line}.", "Correct the file.") from error


def _is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test))
