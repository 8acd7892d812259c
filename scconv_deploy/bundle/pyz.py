"""Write ``finish.pyz``: all modules that :mod:`.device.finish` needs, in one file that Python runs (PEP 441).

The modules are found by their import statements, without those for type checkers. They may import nothing but each
other, the standard library, NumPy and TensorRT.
"""

from __future__ import annotations

import ast
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

from scconv_deploy.bundle.contents import FINISH

PACKAGE_FOLDER = Path(__file__).parents[1]
ENTRY = "scconv_deploy.bundle.device.entry"
_PACKAGE = PACKAGE_FOLDER.name
_DATE = (1980, 1, 1, 0, 0, 0)  # fixed, so that identical modules give identical bytes; the format's earliest
_MAIN = f"""import sys

if sys.version_info < (3, 10):
    message = "Python 3.10 or later is needed, found " + sys.version.split()[0] + "."
    remedy = "Run it with the python3 of the device's system, or python3.10."
    if "--json" in sys.argv:
        import json

        print(json.dumps({{"error": {{"exit_code": 3, "message": message, "remedy": remedy}}}}, indent=2))
    sys.stderr.write("{FINISH}: " + message + " " + remedy + "\\n")
    sys.exit(3)
from {ENTRY} import main

main()
"""


def pyz_bytes() -> bytes:
    """Bytes of ``finish.pyz``; uncompressed, because versions of zlib compress differently."""
    buffer = io.BytesIO(b"#!/usr/bin/env python3\n")
    buffer.seek(0, io.SEEK_END)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_STORED) as archive:
        _add(archive, "__main__.py", _MAIN.encode())
        for path in module_files():
            _add(archive, path.relative_to(PACKAGE_FOLDER.parent).as_posix(), path.read_bytes())
    return buffer.getvalue()


def module_files() -> list[Path]:
    """Every file of this package that the entry imports, directly or not, in alphabetical order."""
    found: set[str] = set()
    waiting = [ENTRY]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        waiting += imported_modules(_file(name).read_text(encoding="utf-8"))
        if "." in name:
            waiting.append(name.rpartition(".")[0])  # its package runs first
    return sorted(_file(name) for name in found)


def imported_modules(source: str) -> list[str]:
    """Modules of this package that a source imports anywhere, except for type checkers."""
    names = []
    for node in _runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [node.module, *filter(_is_module, members)]
    return [name for name in names if name.split(".")[0] == _PACKAGE]


def _runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        children: list[ast.AST] = list(node.orelse)
    else:
        children = list(ast.iter_child_nodes(node))
    for child in children:
        yield from _runtime_nodes(child)


def _is_module(name: str) -> bool:
    return name.split(".")[0] == _PACKAGE and _file(name).is_file()


def _file(name: str) -> Path:
    path = PACKAGE_FOLDER.parent.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.create_system = 3  # Unix, on every system
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, data)
