"""``scconv-deploy deploy`` of each ScConv network of the zoo: verdict, flips, seconds of the whole command by stage.

Each network is deployed once, at its default input, by the command line in a process of its own: what a user waits
for, imports included. A network whose command does not exit with 0 ends the run, after its row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, write
from scconv_deploy.zoo import MODELS

_COLUMNS = {
    "network": "network",
    "exit": "exit_code",
    "verdict": "verdict",
    "SRUs": "srus",
    "gates": "gates",
    "flips": "flips",
    "unexplained": "unexplained",
    "replay error / floor": "replay_ratio",
    "top-1 agrees": "top1_agreement",
    "model.onnx, bytes": "file_bytes",
    "command": "command_s",
    "stages": "stages",
}
_NETWORKS = tuple(name for name in MODELS if name.startswith("scconv_"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", choices=_NETWORKS, default=_NETWORKS, metavar="NAME")


def run(options: argparse.Namespace) -> None:
    rows: list[Row] = []
    for name in options.networks:
        rows.append(_deploy(name, options.seed))
        print(json.dumps(rows[-1]), flush=True)
        if rows[-1]["exit_code"]:
            break
    write(options.results, rows, _COLUMNS, seed=options.seed)
    if rows[-1]["exit_code"]:
        raise SystemExit(f"{rows[-1]['network']} exited with {rows[-1]['exit_code']}: {rows[-1]['verdict']}")


def _deploy(name: str, seed: int) -> Row:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "bundle"
        command = [
            sys.executable,
            "-m",
            "scconv_deploy",
            "deploy",
            name,
            "-o",
            str(folder),
            "--seed",
            str(seed),
            "--json",
        ]
        start = time.perf_counter()
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        seconds = time.perf_counter() - start
        row = {"network": name, "exit_code": result.returncode, "command_s": seconds}
        found = json.loads(result.stdout)
        if "error" in found:
            return row | {"verdict": found["error"]["message"]}
        return row | _facts(found["report"]) | {"file_bytes": Path(found["artifact"]).stat().st_size}


def _facts(report: dict[str, Any]) -> Row:
    agreements = [output["end_to_end"]["top1_agreement"] for output in report["outputs"]]
    ranked = [agreement for agreement in agreements if agreement is not None]
    fed = [sru["teacher_forced"] for sru in report["srus"] if sru["teacher_forced"]]
    return {
        "verdict": report["verdict"],
        "srus": len(report["srus"]),
        **{key: sum(count[key] for count in fed) for key in ("gates", "flips", "unexplained")},
        "replay_ratio": max(output["replay_ratio"] for output in report["outputs"]),
        "top1_agreement": min(ranked, default=None),
        "samples": report["samples"],
        "stages": ", ".join(f"{stage['name']} {stage['seconds']:.1f}" for stage in report["stages"]),
    }
