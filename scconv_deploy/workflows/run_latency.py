"""Latency of a run's bundles in ONNX Runtime on this machine: the variants of one model take turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from scconv_deploy.bundle.contents import MODEL
from scconv_deploy.errors import ScconvDeployError
from scconv_deploy.records.run import CellFacts, CellRecord
from scconv_deploy.records.stage import Progress
from scconv_deploy.system.progress_lines import Notice

HERE = "onnxruntime"
"""Key of the latency of ``model.onnx`` on the machine of the run, beside those of engines on devices."""


def kept_latency(before: CellFacts | None) -> dict[str, float]:
    """What an earlier run measured of a bundle that did not change."""
    return {} if before is None else {name: value for name, value in before.latency_ms.items() if name == HERE}


def timed(output: Path, records: Mapping[str, CellRecord], progress: Progress) -> Iterator[tuple[str, CellRecord]]:
    """Time the ONNX files of each model that has an untimed one; yield their records with the latency.

    A rejected artifact is not timed. A model that ``bench`` refuses is told of and left out.
    """
    for model in dict.fromkeys(record.model for record in records.values()):
        found = {
            name: (record, record.facts) for name, record in records.items()
            if record.model == model and record.facts is not None and record.facts.artifact == MODEL
        }  # fmt: skip
        if all(HERE in facts.latency_ms for _, facts in found.values()):
            continue
        from scconv_deploy.workflows.bench import BenchOptions, bench_artifacts

        folders = [str(output / record.folder) for record, _ in found.values()]
        try:
            rows = bench_artifacts(folders, BenchOptions(), progress=progress).rows
        except ScconvDeployError as error:
            progress(Notice(f"{model} was not timed: {error.message}"))
            continue
        for (name, (record, facts)), row in zip(found.items(), rows, strict=True):
            yield name, replace(record, facts=replace(facts, latency_ms=facts.latency_ms | {HERE: row.p50_ms}))
