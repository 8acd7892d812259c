"""Options on where work is done: processes of this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scconv_deploy.errors import UsageError

if TYPE_CHECKING:
    from scconv_deploy.workers.tasks import Workers

_PANEL = "Processes"
Engine = Annotated[
    Literal["local", "ray"] | None,
    typer.Option(help="Processes of this machine (default), or a Ray cluster.", rich_help_panel=_PANEL),
]
Address = Annotated[
    str, typer.Option(metavar="HOST:PORT", help="The Ray cluster; default: Ray's own choice.", rich_help_panel=_PANEL)
]
Jobs = Annotated[int | None, typer.Option(metavar="N", min=1, help="Most processes at a time.", rich_help_panel=_PANEL)]


@dataclass(frozen=True)
class WorkerOptions:
    """Options of processes."""

    engine: Engine = None
    address: Address = ""
    jobs: Jobs = None

    @property
    def given(self) -> tuple[str, ...]:
        """Options that were given, for a message."""
        return tuple(f"--{name}" for name, value in vars(self).items() if value)

    def workers(self, preload: Sequence[str]) -> Workers:
        """Processes as chosen.

        Args:
            preload: modules that every process of this machine needs.

        Raises:
            UsageError: an address without Ray, or one that is none.
            MissingRuntimeError: Ray is not installed, no cluster answers, or a machine of it lacks this package.
        """
        if self.engine == "ray":
            from scconv_deploy.workers.cluster import ClusterWorkers

            return ClusterWorkers(self.address, self.jobs)
        if self.address:
            raise UsageError(f"The address {self.address} is a Ray cluster's.", "Add --engine ray, or leave it out.")
        from scconv_deploy.workers.local import LocalWorkers

        return LocalWorkers(self.jobs, preload)
