"""The compilers' products, made once a session; each skips with its reason where it cannot be made."""

from __future__ import annotations

import shutil

import pytest

from tests.trt_plugins.reference import Reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Reference:
    """The kernels' arithmetic on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return Reference(tmp_path_factory.mktemp("reference"))
