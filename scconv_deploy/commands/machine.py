"""Command that examines the machine: doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from scconv_deploy.commands.options import Json, Quiet
from scconv_deploy.commands.session import run_session
from scconv_deploy.errors import MissingRuntimeError, UsageError


def doctor(
    require: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Exit 3 if this is missing, for example nvcc; repeatable."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List what this machine has, what is missing and how to get it; exit 3 if something required is missing."""
    from scconv_deploy.commands.printing import print_diagnosis

    with run_session(as_json, quiet) as session:
        from scconv_deploy.workflows.doctor import diagnose

        session.progress("looking at runtimes, GPUs and compilers")
        result = diagnose()
        session.show(result, print_diagnosis)
        known = {finding.name for finding in result.findings}
        for name in require or ():
            if name not in known:
                raise UsageError(f"--require {name!r} is not known.", f"Known: {', '.join(sorted(known))}.")
        lacking = result.lacking(require or ())
        if lacking:
            first = lacking[0]
            raise MissingRuntimeError(f"{first.name}: {first.found}.", first.remedy)
