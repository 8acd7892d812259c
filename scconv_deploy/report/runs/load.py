"""Reader of ``run.json``."""

from __future__ import annotations

from pathlib import Path

from scconv_deploy.errors import IntegrityError, MissingRuntimeError, UsageError
from scconv_deploy.records.codec import DecodeError, decode, parse
from scconv_deploy.records.run import SCHEMA_VERSION, RunRecord

RUN = "run.json"


def is_run(path: Path) -> bool:
    """Whether a path is a run's folder, or the ``run.json`` in one."""
    return (path / RUN).is_file() if path.is_dir() else path.name == RUN


def load_run(path: Path) -> RunRecord:
    """Read the records of a run.

    Args:
        path: a run's folder, or its ``run.json``.

    Raises:
        UsageError: there is no such file.
        IntegrityError: the file is not what ``scconv-deploy run`` wrote.
        MissingRuntimeError: a newer scconv-deploy wrote it.
    """
    file = path / RUN if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file} does not exist.", f"Name the folder of a run, which holds {RUN}.")
    remedy = f"Delete it to make every cell again, or name another output than {file.parent}."
    try:
        document = parse(file.read_bytes())
        schema = document.get("schema_version") if isinstance(document, dict) else None
        if type(schema) is int and schema > SCHEMA_VERSION:
            raise MissingRuntimeError(
                f"{file} has schema version {schema}; this scconv-deploy reads up to {SCHEMA_VERSION}.",
                "Install the scconv-deploy that wrote it, or a newer one.",
            )
        return decode(RunRecord, document, unknown="ignore")
    except DecodeError as error:
        raise IntegrityError(f"{file} is not the record of a run: {error}.", remedy) from error
