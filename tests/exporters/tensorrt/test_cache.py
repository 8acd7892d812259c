"""The cache of engines: atomic, lock-free, and never trusted."""

import os
import shutil
import threading
import time

import pytest

from scconv_deploy.errors import UsageError
from scconv_deploy.exporters.tensorrt.cache import EngineCache, entry_key
from tests.runtimes.tensorrt.test_engine import DATA, manifest_of


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "cache", chosen=True)


def left_over(cache):
    return [p.name for p in (cache.folder / "engines").iterdir() if p.name.startswith(".")]


def test_an_entry_is_found_again_and_only_by_its_key(cache):
    assert cache.find("k") == (None, "")
    assert cache.store("k", DATA, manifest_of(DATA)) == ""
    found, note = cache.find("k")
    assert found.verified_bytes() == DATA
    assert note == ""
    assert cache.find("other")[0] is None
    assert left_over(cache) == []


def test_a_damaged_entry_is_dropped(cache):
    cache.store("k", DATA, manifest_of(DATA))
    (cache.folder / "engines" / "k" / "model.engine").write_bytes(DATA[:-1])
    found, note = cache.find("k")
    assert found is None
    assert "a damaged entry of the cache was dropped" in note
    assert cache.store("k", DATA, manifest_of(DATA)) == ""
    assert cache.find("k")[0] is not None


@pytest.mark.parametrize("moved", ["the entry", "the engine", "no key"])
def test_what_was_stored_under_another_key_is_dropped(cache, moved):
    cache.store("k", DATA, manifest_of(DATA))
    cache.store("other", DATA + b"2", manifest_of(DATA + b"2"))
    place, other = (cache.folder / "engines" / name for name in ("k", "other"))
    if moved == "the entry":
        shutil.rmtree(place)
        shutil.copytree(other, place)
    elif moved == "the engine":
        for path in other.glob("model.engine*"):
            shutil.copy(path, place)
    else:  # as it was before keys were kept
        (place / "entry.json").unlink()
    found, note = cache.find("k")
    assert found is None
    assert "holds the engine of another build" in note
    assert cache.find("k") == (None, "")  # said once
    cache.store("k", DATA, manifest_of(DATA))
    assert cache.find("k")[0].verified_bytes() == DATA
    assert cache.find("other")[0].verified_bytes() == DATA + b"2"


def test_of_many_that_race_one_wins_whole(cache):
    plans = [DATA + bytes([i]) * 1000 for i in range(8)]
    barrier, notes = threading.Barrier(8), []

    def store(plan):
        barrier.wait()
        notes.append(cache.store("k", plan, manifest_of(plan)))

    threads = [threading.Thread(target=store, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert notes == [""] * 8
    assert cache.find("k")[0].verified_bytes() in plans
    assert left_over(cache) == []


def test_a_full_disk_leaves_no_entry_and_is_said(cache, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in cache.store("k", DATA, manifest_of(DATA))
    assert cache.find("k") == (None, "")
    assert left_over(cache) == []


def test_a_folder_that_cannot_be_made_is_an_error_where_it_was_chosen(tmp_path):
    (tmp_path / "file").write_text("")
    chosen = EngineCache(tmp_path / "file" / "cache", chosen=True)
    with pytest.raises(UsageError, match="cannot be written"):
        chosen.check()
    usual = EngineCache(tmp_path / "file" / "cache")
    assert "cannot be written" in usual.check()
    assert "not kept in the cache" in usual.store("k", DATA, manifest_of(DATA))


def test_what_killed_processes_left_is_removed_after_a_day(cache):
    cache.store("k", DATA, manifest_of(DATA))
    old, new = (cache.folder / "engines" / f".scconv-deploy.{n}" for n in ("old", "new"))
    old.mkdir()
    new.mkdir()
    os.utime(old, (time.time() - 90_000,) * 2)
    cache.store("k2", DATA, manifest_of(DATA))
    assert left_over(cache) == [new.name]


def test_the_key_depends_on_every_fact():
    facts = {"onnx": "a", "options": {"tf32": False}, "library": "1"}
    keys = {entry_key(facts), entry_key(facts | {"onnx": "b"}), entry_key(facts | {"options": {"tf32": True}})}
    assert len(keys) == 3
    assert entry_key(dict(reversed(facts.items()))) == entry_key(facts)


def test_the_default_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert EngineCache.default().folder == tmp_path / "scconv-deploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert EngineCache.default().folder.parts[-2:] == (".cache", "scconv-deploy")


def test_a_folder_that_cannot_be_read_holds_nothing_and_is_said(cache, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("scconv_deploy.exporters.tensorrt.cache.Path.is_dir", refused)
    assert cache.find("k") == (None, f"the cache {cache.folder} cannot be read: Permission denied")
