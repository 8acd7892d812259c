"""Whether a release of TensorRT-RTX takes plugins, found out in a child process.

A release whose parser does not find the plugin interface ends its process (measured in 1.7.1 without
:mod:`scconv_deploy.runtimes.tensorrt.rtx_library`). So a child parses the model with the plugin first. That it lives is
kept for the release; that it ended is asked again, for it takes a second. Standard library and the bindings only: it
also runs on the device.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.runtimes.tensorrt.plugin_library import load_once
from scconv_deploy.runtimes.tensorrt.versions import load_module
from scconv_deploy.system.atomic import write_file
from scconv_deploy.system.backends import BACKENDS
from scconv_deploy.system.environment import cache_folder, platform_facts, sha256_of
from scconv_deploy.version import __version__

_SURVIVED, _NOT_TRIED = "the parser came back", "the registry refuses the library"
_TIMEOUT_S = 300
_CHILD = (
    f"import sys; sys.path[:0] = {{path!r}}; from {__name__} import parse_with_plugin; "
    "parse_with_plugin({plugin!r}, {model!r})"
)


def require_plugins(module: ModuleType, plugin: Path, model: Callable[[], bytes]) -> None:
    """Refuse a release of TensorRT-RTX whose parser would end this process.

    Args:
        plugin: a library that can be loaded.
        model: gives an ONNX model with at least one node that the plugin is for.

    Raises:
        MissingRuntimeError: with what the child said.
    """
    known = _answer_file(module)
    if known.is_file():
        return
    reason = _ask_child(plugin, model())
    if reason == _NOT_TRIED:
        return
    if reason:
        raise MissingRuntimeError(
            f"{BACKENDS['tensorrt-rtx'].title} {module.__version__} takes no plugins here: {reason}.",
            f"Build without --plugin, or install another release: {BACKENDS['tensorrt-rtx'].install}.",
        )
    with suppress(Exception):  # an answer that cannot be kept is asked for again
        write_file(known, f"{module.__version__} takes plugins\n".encode())


def _answer_file(module: ModuleType) -> Path:
    """One file for each release, copy of it, and version of this package; it is there if the release takes plugins."""
    facts = (module.__version__, module.__file__, platform_facts()["machine"], __version__)
    return cache_folder() / "plugin-probes" / sha256_of(json.dumps(facts).encode())[:16]


def _ask_child(plugin: Path, model: bytes) -> str:
    """ "" if a child that parses the model with the plugin lives on, else what became of it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(model)
        code = _CHILD.format(path=sys.path, plugin=str(plugin.resolve()), model=str(file))
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"a process that tries it cannot be asked ({error})"
    if done.returncode == 0 and done.stdout in (_SURVIVED, _NOT_TRIED):
        return "" if done.stdout == _SURVIVED else _NOT_TRIED
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    return f"a process that tries it ends with {ended} ({last})"


def parse_with_plugin(plugin: str, model: str) -> None:
    """The child: load the plugin and parse the model; that it gets to its end is the answer."""
    module = load_module("tensorrt-rtx")
    logger = module.Logger(module.Logger.ERROR)
    if load_once(module, Path(plugin)):
        sys.stdout.write(_NOT_TRIED)  # the caller is told why when it loads the library
        return
    builder = module.Builder(logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, logger)
    parser.parse(Path(model).read_bytes())
    sys.stdout.write(_SURVIVED)
    sys.stdout.flush()
