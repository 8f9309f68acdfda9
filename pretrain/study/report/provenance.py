"""Origin of a report: study file, commit, versions, machine, commands."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

import pandas as pd

from pretrain.study.report.html import paragraph, table

PACKAGES = ("epochal", "numpy", "scipy", "pandas", "matplotlib", "plotly", "torch")


def provenance(folder: Path, data: pd.DataFrame, resamples: int) -> tuple[list[str], str]:
    """Parts of the page, and the text of the study file ("" where there is none)."""
    from pretrain.tracking.mlflow_facts import git_commit

    text = data.to_csv(index=False, lineterminator="\n", float_format="%.10g")
    digest = hashlib.sha256(text.encode()).hexdigest()
    rows = [
        ("study", ", ".join(sorted(set(data["study"].astype(str)))) or "no run"),
        ("folder", folder.name),
        ("rows of the table", f"{len(data)}, SHA-256 of its CSV {digest[:16]}"),
        ("commit of the code", git_commit(Path(__file__).parent) or "not a checkout"),
        ("versions", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)),
        ("Python", platform.python_version()),
        ("machine of the report", f"{platform.machine()}, {os.cpu_count()} CPUs"),
    ]
    study = folder / "study.yaml"
    commands = [
        f"epochal study run {folder.name}/study.yaml --dir {folder.name}",
        f"epochal study collect {folder.name}",
        f"epochal study report {folder.name} --resamples {resamples}",
    ]
    parts = [
        table(("fact", "value"), rows),
        paragraph("The runs may have been made on another machine: their folders have its facts."),
        paragraph("Commands that make this report again:"),
        f"<pre>{chr(10).join(commands)}</pre>",
    ]
    return parts, study.read_text() if study.exists() else ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
