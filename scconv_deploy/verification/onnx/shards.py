"""Samples that run free, in other processes: a shard is a run of rows, and what it gives are counts and sums.

The reference and the artifact travel as one file by its SHA-256, once to each machine. A shard does not depend on the
others, so a lost one runs again. Tallies are merged in the order of the rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cloudpickle

from scconv_deploy.errors import ModelError, ScconvDeployError, first_line
from scconv_deploy.gate.other_gates import Found
from scconv_deploy.records.stage import Progress, silent
from scconv_deploy.system.inputs import code_modules
from scconv_deploy.verification.checks.tally import Tally
from scconv_deploy.verification.onnx.chain import Artifact, Judging, checks_of
from scconv_deploy.verification.reference.run import ReferenceSource
from scconv_deploy.verification.samples import Samples
from scconv_deploy.workers.tasks import Parcel, Task, Workers

PARTS_PER_JOB = 2
"""Shards for each process: a lost one costs less, and slow ones even out."""
ROWS_PER_PART = 64
"""Fewest rows of a shard, about: each opens the sessions again, which takes as long as some dozens of rows."""


def most_parts(rows: int, jobs: int) -> int:
    """Number of shards for this many rows and processes, at least 1."""
    return max(1, min(PARTS_PER_JOB * jobs, rows // ROWS_PER_PART))


@dataclass(frozen=True)
class DataShards:
    """Parts of the data for other processes; see :class:`.chain.Shards`."""

    parts: Sequence[Samples]
    workers: Workers
    progress: Progress = silent

    def measure(
        self, source: ReferenceSource, artifact: Artifact, judging: Judging, fixed: Sequence[list[Found]]
    ) -> Iterator[Sequence[Tally]]:
        """See :meth:`.chain.Shards.measure`.

        Raises:
            ModelError: the model cannot be sent to another process, or a process was lost too often.
            ScconvDeployError: what a shard raised.
        """
        with self.workers.sharing(_packed((source, artifact, judging, list(fixed)))) as parcel:
            parts = (part.carried() if self.workers.elsewhere else part for part in self.parts)
            tasks = [
                Task(f"shard {number:04d}", _measure, (parcel, cloudpickle.dumps(part)))
                for number, part in enumerate(parts)
            ]
            found: dict[str, Sequence[Tally]] = {}

            def tell(name: str, text: str) -> None:
                self.progress(f"verifying on {len(tasks)} shards of the data ({len(found)} done)")

            with closing(self.workers.run(tasks, tell)) as outcomes:
                for outcome in outcomes:
                    if outcome.failure is not None:
                        raise ShardError(outcome.name, outcome.failure)
                    found[outcome.name] = outcome.value
        for task in tasks:
            yield found[task.name]


class ShardError(ScconvDeployError):
    """What a shard failed with, as it would have failed in this process."""

    def __init__(self, name: str, failure: Any) -> None:
        super().__init__(failure.message, failure.remedy)
        self.exit_code, self.details = failure.exit_code, failure.details
        self.shard = name


def _packed(values: Any) -> bytes:
    """Pickle values with the user's own code in them, which other processes cannot import (ModelError)."""
    # by name: a module may have an alias
    own = {module.__name__: module for module in code_modules() if sys.modules.get(module.__name__) is module}
    modules = list(own.values())
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(values)
    except Exception as error:  # pickle has no exception of its own for what it cannot pickle
        raise ModelError(
            f"The model cannot be sent to other processes: {first_line(error)}.", "Leave --jobs and --engine out."
        ) from error
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


@lru_cache(maxsize=1)
def _unpacked(parcel: Parcel) -> Any:
    """What a parcel holds, once for all shards of a process."""
    return cloudpickle.loads(parcel.content())  # the process that sent it made it


def _measure(parcel: Parcel, part: bytes, progress: Progress) -> Sequence[Tally]:
    """Run the samples of a shard; runs in a process of its own."""
    source, artifact, judging, fixed = _unpacked(parcel)
    with checks_of(source, artifact, judging) as all_checks:
        for one, gates in zip(all_checks, fixed, strict=True):
            one.fixed = gates
        samples: Samples = cloudpickle.loads(part)
        for sample in samples:
            run = source.run(sample)
            for one in all_checks:
                one.add(run)
        return [one.tally for one in all_checks]
