"""The user's Python code: imported by name, and run with every exception turned into a ModelError."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from scconv_deploy.errors import ModelError, ScconvDeployError, UsageError, first_line

_MISSING = object()


def import_factory(source: str) -> Any:
    """The object behind ``package.module:name`` or ``path/file.py:name``; the name may have dots.

    Raises:
        UsageError: the file, the module or the name does not exist, or the file trains on import.
        ModelError: its code raises.
    """
    where, _, name = source.rpartition(":")
    module = _import_file(Path(where), name) if where.endswith(".py") else _import_module(where)
    target: Any = module
    for part in name.split("."):
        with running_user_code(f"Looking up {source}"):  # a package may import what is asked for only now
            found = getattr(target, part, _MISSING)
        if found is _MISSING:
            near = difflib.get_close_matches(part, [n for n in dir(target) if not n.startswith("_")], n=1)
            raise UsageError(f"{where} has no {name!r}.", f"Did you mean {near[0]}?" if near else "Check the name.")
        target = found
    return target


def import_object(source: str) -> Any:
    """The object at ``package.module:name`` or ``path/file.py:name`` (UsageError if there is none, ModelError)."""
    where, _, name = source.rpartition(":")
    if where.endswith(".py") and not Path(where).is_file():
        raise UsageError(f"{where} does not exist.", "Check the path.")
    if not where or not name:
        raise UsageError(f"{source!r} is not file.py:name or package.module:name.", "Check the name.")
    return import_factory(source)


def _import_module(where: str) -> ModuleType:
    missing = UsageError(
        f"No module {where!r} can be imported.", "Check the name, or give the file: path/file.py:factory."
    )
    if where.startswith("."):
        raise missing
    add_to_path(Path.cwd())
    with running_user_code(f"Importing {where}"):
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is not None and (where == error.name or where.startswith(error.name + ".")):
                raise missing from error
            raise


def _import_file(path: Path, name: str) -> ModuleType:
    refuse_training_on_import(path)
    module_spec = importlib.util.spec_from_file_location(_free_module_name(path), path)
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"{path} cannot be imported.", "Give path/file.py:factory.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickles of the file look it up
    add_to_path(path.parent.resolve())
    try:
        with running_user_code(f"Importing {path}"):
            module_spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(module_spec.name, None)
        if "relative import" not in str(error):
            raise
        root = path.resolve().parent
        while (root / "__init__.py").is_file():
            root = root.parent
        dotted = ".".join(path.resolve().relative_to(root).with_suffix("").parts)
        raise UsageError(
            f"{path} imports from the package that it is part of.", f"From {root}, name it {dotted}:{name}."
        ) from error
    return module


def _free_module_name(path: Path) -> str:
    """The file's own name, so that files that import each other find one module; another if that one is taken."""
    name = path.stem.replace(".", "_")
    if name not in sys.modules:
        found = importlib.util.find_spec(name)
        if found is None or found.origin == str(path.resolve()):
            return name
    return f"_user_file_{name}"


def add_to_path(folder: Path) -> None:
    """Put a folder first on ``sys.path``, as Python does for a script. It stays there: factories import lazily."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@contextlib.contextmanager
def running_user_code(doing: str, remedy: str = "Correct that code.") -> Iterator[None]:
    """Turn exceptions of the user's code into ModelError; hide this program's command line from it.

    Args:
        doing: what the line begins with, such as the code's name.
        remedy: what it ends with.
    """
    argv = sys.argv
    sys.argv = argv[:1]
    try:
        yield
    except ScconvDeployError:
        raise
    except SystemExit as error:
        raise ModelError(
            f"{doing} called sys.exit({error.code!r}).", "Put its command line under if __name__ == '__main__':"
        ) from error
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name:
            missing = f"{doing} needs the module {error.name!r}, which is missing."
            raise ModelError(missing, "Install it, or set PYTHONPATH.") from error
        raise ModelError(f"{doing} raised {type(error).__name__}: {first_line(error)}", remedy) from error
    finally:
        sys.argv = argv


def refuse_training_on_import(path: Path) -> None:
    """Refuse a training script without a main guard, which would train when it is imported."""
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
