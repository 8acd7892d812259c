"""A Ray cluster of two machines on this one: lost workers, a lost machine, the same results as here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from scconv_deploy.commands.workers import WorkerOptions
from scconv_deploy.errors import MissingRuntimeError, UsageError
from scconv_deploy.verification.onnx.parity import Artifact
from scconv_deploy.version import __version__
from scconv_deploy.workers.cluster import ClusterWorkers, check_versions
from scconv_deploy.workers.tasks import Task
from tests.command_line import failed, run
from tests.verification.onnx.test_shards import data, judged, one_thread  # noqa: F401  (fixtures)
from tests.workers import tasks
from tests.workers.here import Here

PYTHON = ".".join(map(str, sys.version_info[:2]))


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster with one core on each of two machines, and this process connected to it."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    from ray.cluster_utils import Cluster

    root = str(Path(__file__).parents[2])  # what workers import the tests from
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", root)
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.second = made.add_node(num_cpus=1)
        yield made
        ray.shutdown()
        made.shutdown()


def by_name(outcomes):
    return {outcome.name: outcome for outcome in outcomes}


def test_a_lost_workers_task_runs_again(cluster, tmp_path):
    workers = ClusterWorkers(cluster.address)
    assert workers.jobs == 2
    wanted = [Task(str(n), tasks.first_kills_its_machine, (str(tmp_path), n)) for n in range(3)]
    more = [Task("fails", tasks.fails), Task("large", tasks.square, (3,), memory_bytes=1 << 60)]
    found = by_name(workers.run([*wanted, *more], lambda name, text: None))
    assert found["large"].value == 9  # as much memory as a machine has
    assert [found[str(n)].value for n in range(3)] == [0, 1, 2]
    assert len(list(tmp_path.glob("0.*"))) == 2
    assert (found["fails"].failure.exit_code, found["fails"].failure.message) == (4, "The model is odd.")


NET = """
import torch
from layers import make_layer

def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(make_layer(), torch.nn.ReLU()).eval()
"""
LAYERS = "from torch import nn\n\ndef make_layer():\n    return nn.Conv2d(3, 4, 1)\n"
RUN = """
[run]
output = "{}"

[[models]]
name = "net"
model = "net.py:make"
input = "1x3x4x4"
data = "rows.npz"

[[variants]]
name = "single"
"""


def test_a_cell_is_the_same_bundle_wherever_it_is_made(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    Path("layers.py").write_text(LAYERS)
    rows = np.random.default_rng(0).standard_normal((200, 3, 4, 4), dtype=np.float32)  # more than is judged in full
    np.savez("rows.npz", input=rows)
    for name in ("near", "far"):
        Path(f"{name}.toml").write_text(RUN.format(name))
    result = run("run", "far.toml", "--quiet", "--engine", "ray", "--address", cluster.address)
    assert result.exit_code == 0, result.output
    with monkeypatch.context() as patch:  # in this process, which forgets the modules afterwards
        patch.setattr(WorkerOptions, "workers", lambda self, preload: Here())
        result = run("run", "near.toml", "--quiet")
    for module in ("net", "layers"):
        sys.modules.pop(module, None)
    assert result.exit_code == 0, result.output
    near, far = (sorted(p.relative_to(n) for p in Path(n).rglob("*") if p.is_file()) for n in ("near", "far"))
    assert near == far
    model = "net/single/model.onnx"
    assert Path("far", model).read_bytes() == Path("near", model).read_bytes()
    found = json.loads(run("report", "diff", "near/net/single", "far/net/single", "--json").output)
    assert [change["what"] for change in found["changes"]] == ["command"]
    again = run("run", "far.toml", "--dry-run")  # what it was made from is known as if it had been made here
    assert "net/single: unchanged" in again.output
    Path("layers.py").write_text(LAYERS.replace("4, 1", "5, 1"))
    assert "unchanged" not in run("run", "far.toml", "--dry-run").output


def test_losing_a_machine_loses_no_rows(cluster, tiny_reference, tiny_bytes, data):  # noqa: F811
    artifact = Artifact(onnx.load_model_from_string(tiny_bytes[0]), "model.onnx", tiny_bytes[0])
    expected = judged(tiny_reference[0], artifact, data / "images")
    workers = ClusterWorkers(cluster.address)

    class LosesOne(ClusterWorkers):
        """After the first shard, a machine is lost."""

        def __init__(self):
            self.jobs = workers.jobs

        def run(self, wanted, tell):
            for number, outcome in enumerate(super().run(wanted, tell)):
                if not number:
                    cluster.remove_node(cluster.second, allow_graceful=False)
                yield outcome

    assert judged(tiny_reference[0], artifact, data / "images", LosesOne()) == expected


def test_an_address_where_no_cluster_is(monkeypatch, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    Path("run.toml").write_text(RUN.format("out"))
    result = run("run", "run.toml", "--engine", "ray", "--address", "127.0.0.1:9")
    failed(result, 3, "No Ray cluster answers at 127.0.0.1:9")
    assert not Path("out").exists()


@pytest.mark.parametrize("address", ["here", "host:", ":1", "host:70000", "ray://host:port"])
def test_an_address_that_is_none(address):
    with pytest.raises(UsageError, match="is not HOST:PORT"):
        ClusterWorkers(address)


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingRuntimeError, match=r"--engine ray needs Ray. pip install 'scconv-deploy\[ray\]'"):
        ClusterWorkers()


def test_machines_of_other_versions_are_named():
    check_versions({"10.0.0.1": (PYTHON, __version__)})
    for found, words in (
        ((PYTHON, ""), f"10.0.0.2 of the Ray cluster has no scconv-deploy, expected {__version__}. Install it there"),
        ((PYTHON, "9.9"), "10.0.0.2 of the Ray cluster has scconv-deploy 9.9, expected"),
        (("3.4", __version__), f"10.0.0.2 of the Ray cluster has Python 3.4, expected {PYTHON} as here"),
    ):
        with pytest.raises(MissingRuntimeError) as caught:
            check_versions({"10.0.0.1": (PYTHON, __version__), "10.0.0.2": found})
        assert words in str(caught.value)
