"""Report of a study folder: reads its table, fits, draws, writes the page, logs it to MLflow."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd

from pretrain.errors import ConfigError
from pretrain.study.early_stopping import Outcome, outcomes, reference_arm
from pretrain.study.figures.chart import Chart, Drawn, Written
from pretrain.study.figures.drawing import write_chart
from pretrain.study.report.charts import draw_all
from pretrain.study.report.crossing import crossing_tables
from pretrain.study.report.html import paragraph, section
from pretrain.study.report.laws import Laws, fit_arms
from pretrain.study.report.optima import optima_table
from pretrain.study.report.page import figure_block, omitted_block, page
from pretrain.study.report.provenance import provenance
from pretrain.study.report.tables import fit_tables, outcome_table, trend_table
from pretrain.study.table import COLUMNS

PLACES = {
    "loss": "outcome", "gap": "outcome", "frontier": "outcome", "isoflop": "laws",
    "contour": "laws", "residuals": "laws", "critical_compute": "critical",
    "data_value": "value",
}  # fmt: skip
"""Section of each figure."""


@dataclass(frozen=True)
class Report:
    """Files of a report."""

    page: Path
    figures: tuple[Path, ...]
    omitted: tuple[str, ...]
    """Figures that the data do not support, with reasons."""
    bytes: int
    """Size of the page."""

    @property
    def fits(self) -> Path:
        """Chosen law of each arm, as `epochal study advise` reads them."""
        return self.page.parent / "fits.json"


def read_table(folder: Path) -> pd.DataFrame:
    """Table of a study: collected anew from its runs, or the stored one; raises ConfigError."""
    if (folder / "study.json").exists():
        from pretrain.study.runner.collect import collect

        table = collect(folder)
    elif (folder / "table.parquet").exists():
        table = pd.read_parquet(folder / "table.parquet")
    elif (folder / "table.csv").exists():
        table = pd.read_csv(folder / "table.csv")
    else:
        raise ConfigError(
            f"{folder} has neither a study (study.json) nor a table (table.parquet, table.csv); "
            "`epochal study collect` writes one"
        )
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise ConfigError(f"the table of {folder} lacks the columns {', '.join(missing)}")
    return table


def stated_reference(folder: Path, table: pd.DataFrame) -> str | None:
    """Reference that the study file names under `compare`; None where it names none."""
    import yaml

    path = folder / "study.yaml"
    given = yaml.safe_load(path.read_text()) if path.exists() else None
    compare = given.get("compare") if isinstance(given, Mapping) else None
    named = compare.get("reference") if isinstance(compare, Mapping) else None
    return named if named in set(table["arm"]) else None


def write_report(folder: Path, *, resamples: int = 100) -> Report:
    """Write `DIR/report/`: `index.html`, `fits.json` and `figures/`; raises ConfigError."""
    table = read_table(folder)
    found = outcomes(table)
    reference = stated_reference(folder, table) or reference_arm(found)
    laws = fit_arms(table, resamples)
    drawn = draw_all(table, found, laws, reference)
    target = folder / "report"
    shutil.rmtree(target / "figures", ignore_errors=True)
    blocks: dict[str, str] = {}
    files: list[Path] = []
    for item in drawn:
        blocks[item.name] = _block(item, target, files)
    (target / "figures").mkdir(parents=True, exist_ok=True)
    text = _page(folder, table, found, laws, reference, blocks, resamples)
    path = target / "index.html"
    path.write_text(text, "utf-8")
    stored = [fitted.to_dict() for fitted in laws.chosen]
    (target / "fits.json").write_text(json.dumps(stored, indent=1, default=float) + "\n")
    omitted = [f"{i.title}: {i.reason}" for i in drawn if not isinstance(i, Chart)]
    return Report(path, tuple(files), tuple(omitted), path.stat().st_size)


def _block(item: Drawn, target: Path, files: list[Path]) -> str:
    if not isinstance(item, Chart):
        return omitted_block(item)
    written: Written = write_chart(item, target / "figures")
    files += written.files.values()
    return figure_block(written)


def _page(
    folder: Path,
    table: pd.DataFrame,
    found: list[Outcome],
    laws: Laws,
    reference: str | None,
    blocks: Mapping[str, str],
    resamples: int,
) -> str:
    name = ", ".join(sorted(set(table["study"].astype(str)))) or folder.name
    figures = {
        place: "".join(blocks[key] for key in blocks if PLACES[key] == place)
        for place in dict.fromkeys(PLACES.values())
    }
    budgets = sorted({item.unique_tokens for item in found})
    facts, study = provenance(folder, table, resamples)
    if study:
        facts.append(f"<details><summary>study.yaml</summary><pre>{escape(study)}</pre></details>")
    bodies = {
        "outcome": ("Outcome", outcome_table(found, reference), trend_table(found, reference)),
        "laws": ("Scaling laws", fit_tables(laws), optima_table(table)),
        "critical": ("Critical compute", crossing_tables(laws.chosen, budgets)),
        "value": ("Value of data",),
        "provenance": ("Provenance", *facts),
    }
    sections = [
        (key, title, section(key, title, *parts, figures.get(key, "")))
        for key, (title, *parts) in bodies.items()
    ]
    ended = table.groupby("run")["final"].any() if len(table) else pd.Series(dtype=bool)
    introduction = paragraph(
        f"{len(ended)} runs, {int(ended.sum())} of them whole, {len(table)} evaluations, "
        f"{table['arm'].nunique()} arms, {len(budgets)} unique budgets. Everything is inside this "
        "file; nothing is loaded from a network."
    )
    return page(f"Study {name}", introduction, sections)


def log_report(folder: Path, report: Report) -> str | None:
    """Store the report with the study's run in MLflow; None, or the reason of a failure."""
    if not (folder / "study.json").exists():
        return None
    from pretrain.study.runner.publish import publish

    failed = publish(folder, [report.page, report.fits], "report")
    return failed or publish(folder, report.figures, "report/figures")
