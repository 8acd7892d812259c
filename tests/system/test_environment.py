"""Versions, SHA-256 and the cache folder."""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import pytest

from scconv_deploy.system.environment import (
    bound_of_threads,
    cache_folder,
    environment_facts,
    installed_version,
    platform_facts,
    sha256_of,
)
from scconv_deploy.version import __version__


def test_sha256_of_bytes_and_of_a_file_longer_than_a_piece(tmp_path):
    data = bytes(range(256)) * 8193
    (tmp_path / "f").write_bytes(data)
    assert sha256_of(tmp_path / "f") == sha256_of(data) == hashlib.sha256(data).hexdigest()
    assert sha256_of(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_the_cache_folder_follows_xdg_and_an_empty_one_counts_as_none():
    assert cache_folder({"XDG_CACHE_HOME": "/somewhere"}) == Path("/somewhere/scconv-deploy")
    for environ in ({}, {"XDG_CACHE_HOME": ""}):
        assert cache_folder(environ) == Path.home() / ".cache" / "scconv-deploy"


def test_versions_and_platform():
    assert installed_version("numpy") == version("numpy")
    assert installed_version("scconv-deploy-has-no-such-package") is None
    facts = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    assert platform_facts() == facts
    assert environment_facts() == {"scconv_deploy": __version__, **facts}


@pytest.mark.parametrize(("text", "threads"), [(None, 0), ("", 0), ("3", 3), ("4,2", 4), ("many", 0)])
def test_the_bound_of_threads(text, threads):
    assert bound_of_threads({} if text is None else {"OMP_NUM_THREADS": text}) == threads
