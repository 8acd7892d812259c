"""Tasks on a Ray cluster (the extra ``ray``): a lost worker's task runs again, on another one.

Nothing is assumed of the machines but that this package, in this version, is installed on them.
"""

from __future__ import annotations

import hashlib
import platform
import signal
import socket
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from scconv_deploy.errors import MissingRuntimeError, UsageError, first_line
from scconv_deploy.system.failures import Failure
from scconv_deploy.version import __version__
from scconv_deploy.workers.tasks import Outcome, Task, Tell, attempt, bound_threads

RETRIES = 3
"""How often a task runs again after its worker was lost."""
_ANSWER_S = 5.0
_LOOK_S = 0.2  # how soon a signal is noticed
_PROBE_S = 120.0
"""How long every machine of the cluster has to say which versions it has; a worker imports nothing heavy for it."""
Versions = tuple[str, str]
"""Versions of Python (``3.11``) and of this package; "" if it is not installed."""


@dataclass(frozen=True)
class ClusterParcel:
    """Shared bytes in Ray's object store, which brings them once to each machine, with their SHA-256."""

    reference: Any
    sha256: str

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClusterParcel) and other.sha256 == self.sha256

    def content(self) -> bytes:
        import ray

        return bytes(ray.get(self.reference))


class ClusterWorkers:
    """Workers of a Ray cluster; see :class:`.tasks.Workers`.

    Args:
        address: ``host:port`` of a cluster; "" leaves the choice to Ray (``RAY_ADDRESS``, a running one, a new one).
        jobs: number of tasks at a time; None for as many as the cluster has cores.

    Raises:
        UsageError: the address is none.
        MissingRuntimeError: Ray is not installed, no cluster answers, or one of its machines lacks this package.
    """

    elsewhere = True

    def __init__(self, address: str = "", jobs: int | None = None) -> None:
        host, _, port = address.rpartition(":")
        if address and not (host and port.isdigit() and int(port) < 1 << 16):
            raise UsageError(f"The address {address!r} is not HOST:PORT.", "Write for example 10.0.0.1:6379.")
        ray = _ray()
        if not ray.is_initialized():
            _connect(ray, address)
        check_versions(_versions(ray))
        cores = int(ray.cluster_resources().get("CPU", 1))
        self.jobs = max(1, min(jobs or cores, cores))

    @property
    def within(self) -> ClusterWorkers:
        """These workers: a task that waits for others gives its core back."""
        return self

    @contextmanager
    def sharing(self, content: bytes) -> Iterator[ClusterParcel]:
        """Share bytes by Ray's object store."""
        yield ClusterParcel(_ray().put(content), hashlib.sha256(content).hexdigest())

    def run(self, tasks: Sequence[Task], tell: Tell) -> Generator[Outcome]:
        ray = _ray()
        work = {
            fresh: ray.remote(num_cpus=1, max_retries=RETRIES, max_calls=int(fresh))(_attempt)
            for fresh in (False, True)
        }
        largest = max((int(n["Resources"].get("memory", 0)) for n in ray.nodes() if n["Alive"]), default=0)
        waiting, running = list(tasks), dict[Any, Task]()
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    task = waiting.pop(0)
                    needed = min(task.memory_bytes, largest)  # Ray would wait forever for more than a machine has
                    options = {"memory": needed} if needed else {}
                    running[work[task.fresh].options(name=task.name, **options).remote(task)] = task
                    tell(task.name, "on the cluster")
                ready, _ = ray.wait(list(running), timeout=_LOOK_S)
                for reference in ready:
                    yield _outcome(ray, reference, running.pop(reference))
                tell("", "")  # a chance to notice a signal
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _attempt(task: Task) -> Outcome:
    """Run a task in a worker of the cluster, on one core."""
    bound_threads(1)
    return attempt(task, lambda name, text: None)


def _outcome(ray: Any, reference: Any, task: Task) -> Outcome:
    try:
        found: Outcome = ray.get(reference)
        return found
    except ray.exceptions.RayError as error:
        message = f"Its worker was lost {RETRIES + 1} times: {first_line(error)}"
        return Outcome(task.name, failure=Failure(MissingRuntimeError.exit_code, message, "See Ray's own logs."))


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingRuntimeError("--engine ray needs Ray.", "pip install 'scconv-deploy[ray]'") from error
    return ray


def _connect(ray: Any, address: str) -> None:
    """Connect to a cluster; an address is tried first, for Ray itself waits for minutes."""
    host, _, port = address.rpartition(":")
    remedy = "Start one there: ray start --head; or leave the address out."
    try:
        if address:
            socket.create_connection((host, int(port)), _ANSWER_S).close()
        with _kept_signals():
            ray.init(address or None, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        raise MissingRuntimeError(
            f"No Ray cluster answers at {address or 'any address'}: {first_line(error)}.", remedy
        ) from error


@contextmanager
def _kept_signals() -> Iterator[None]:
    """Keep this program's handlers of signals: Ray would replace some."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in kept.items():
                signal.signal(number, handler)


def _versions(ray: Any) -> dict[str, Versions]:
    """Versions that each machine of the cluster has, by its address."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def ask() -> Versions:  # nested, so that it travels by value
        import platform
        from importlib import metadata

        python = ".".join(platform.python_version_tuple()[:2])
        try:
            return python, metadata.version("scconv-deploy")
        except metadata.PackageNotFoundError:
            return python, ""

    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[node["NodeManagerAddress"]] = (
                ray.remote(num_cpus=0)(ask).options(scheduling_strategy=strategy).remote()
            )
    try:
        return dict(zip(asked, ray.get(list(asked.values()), timeout=_PROBE_S), strict=True))
    except ray.exceptions.RayError as error:
        raise MissingRuntimeError(
            f"The Ray cluster does not answer: {first_line(error)}.", "Look at ray status there."
        ) from error


def check_versions(found: dict[str, Versions]) -> None:
    """Refuse a cluster with a machine that lacks this package, or has another version of it or of Python
    (MissingRuntimeError)."""
    own = ".".join(platform.python_version_tuple()[:2])
    for address, (python, package) in found.items():
        what = "no scconv-deploy" if not package else f"scconv-deploy {package}"
        if package != __version__:
            raise MissingRuntimeError(
                f"The machine {address} of the Ray cluster has {what}, expected {__version__}.",
                f"Install it there: pip install scconv-deploy=={__version__}",
            )
        if python != own:
            raise MissingRuntimeError(
                f"The machine {address} of the Ray cluster has Python {python}, expected {own} as here.",
                "Use one version everywhere.",
            )
