"""Commands as a user gives them."""

from __future__ import annotations

from typer.testing import CliRunner

from scconv_deploy import cli


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def failed(result, code, message):
    """One line on stderr, the right code."""
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
