"""Plugin libraries in TensorRT's registry. Standard library and the bindings only: it also runs on the device.

The registry refuses a library if one of its plugins is registered already, even from the same file
(``IPluginRegistry`` in NvInferRuntimeCommon.h; measured in TensorRT-RTX 1.7). One process builds, verifies and times an
engine, so it remembers the libraries that it loaded, by SHA-256.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

from scconv_deploy.graph.contract import OPERATORS, PLUGIN_NAMESPACE
from scconv_deploy.runtimes.tensorrt import rtx_library
from scconv_deploy.system.backends import BACKENDS
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.trt_plugins.elf import read_library


@functools.cache
def _loaded(module: ModuleType) -> set[str]:
    """SHA-256 of each library that this process loaded into a module's registry."""
    return set()


def load_once(module: ModuleType, path: Path) -> str:
    """Load a library unless its bytes are loaded; return the reason if it cannot be used, else "".

    For TensorRT-RTX the name is made to resolve first under which its parser reaches plugins: with a plugin in the
    registry and without that name, the parser ends the process.

    Raises:
        IntegrityError: the file is no shared library, or truncated (the system's loader would end the process).
    """
    digest, loaded = sha256_of(path), _loaded(module)
    if digest in loaded:
        return ""
    read_library(path)
    if module.__name__ == BACKENDS["tensorrt-rtx"].module and (reason := rtx_library.resolve()):
        return reason
    there = is_registered(module)
    if module.get_plugin_registry().load_library(str(path.resolve())) is None:
        return "another library of this plugin is loaded in this process" if there else "the registry refuses it"
    loaded.add(digest)
    return ""


def is_registered(module: ModuleType) -> bool:
    """Whether the module's registry has a creator for an SRU, whoever put it there."""
    creators = module.get_plugin_registry().all_creators  # get_creator() logs an error where there is none
    return any(c.name in OPERATORS and c.plugin_namespace == PLUGIN_NAMESPACE for c in creators)
