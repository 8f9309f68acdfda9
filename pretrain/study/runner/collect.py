"""Tidy table of a study: one row for each evaluation of each run, always in the same order.

Rows come from the run folders or from MLflow and are the same from both. Neither times nor speeds
are in the table, so that a study that was interrupted has the table of one that was not.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pretrain.study.runner.cells import FLOPS
from pretrain.study.runner.planned import Facts
from pretrain.study.runner.record import Record, read_record
from pretrain.study.table import COLUMNS
from pretrain.tracking.jsonl import read_metrics

if TYPE_CHECKING:
    import pandas as pd

Source = Literal["folders", "mlflow"]
LOSS = "validation/nats_per_token"
Row = dict[str, Any]


def collect(folder: Path, source: Source = "folders") -> pd.DataFrame:
    """Table of the study in a folder; runs without an evaluation have no row.

    Raises ConfigError where the folder holds no study, or MLflow does not have it.
    """
    import pandas as pd

    record = read_record(folder)
    if source == "mlflow":
        from pretrain.study.runner.publish import evaluations

        found = evaluations(record)
    else:
        found = {facts.run: _evaluations(folder / "runs" / facts.run) for facts in record.runs}
    rows = [
        row
        for facts in sorted(record.runs, key=lambda facts: facts.run)
        if not facts.trunk
        for row in rows_of(record.name, facts, found.get(facts.run, []))
    ]
    columns = [*COLUMNS, *axis_columns(record)]
    return pd.DataFrame(rows, columns=columns).astype(_types(columns))


def axis_columns(record: Record) -> list[str]:
    """Columns of the axes, in the order of the study."""
    keys = dict.fromkeys(key for facts in record.runs for key in facts.axes)
    return [column(key) for key in keys if column(key) not in COLUMNS]


def column(key: str) -> str:
    """Column of an axis: its key, and `flops_budget` for training budgets."""
    return "flops_budget" if key == FLOPS else key


def rows_of(study: str, facts: Facts, evaluations: Iterable[dict[str, float]]) -> list[Row]:
    """Rows of one run in the order of training."""
    by_step = {int(found["step"]): found for found in evaluations}
    return [_row(study, facts, step, by_step[step]) for step in sorted(by_step)]


def _row(study: str, facts: Facts, step: int, found: dict[str, float]) -> Row:
    tokens = round(found["train/tokens"])
    noise_error = found.get("validation/noise_error")
    row: Row = {
        "study": study,
        "run": facts.run,
        "arm": facts.arm,
        "family": facts.family,
        "likelihood": "exact" if noise_error == 0 else "bound",
        "seed": facts.seed,
        "configuration": facts.configuration,
        "params": facts.params,
        "params_non_embedding": facts.params_non_embedding,
        "unique_tokens": facts.unique_tokens,
        "tokens": tokens,
        "epochs": tokens / facts.unique_tokens,
        "planned_epochs": facts.planned_epochs,
        "final": step >= facts.total_steps,
        "step": step,
        "flops": found["train/flops"],
        "flops_6nd": 6.0 * facts.params * tokens,
        "loss": found[LOSS],
        "noise_error": noise_error,
        "standard_error": found.get("validation/standard_error"),
        "bits_per_byte": found.get("validation/bits_per_byte"),
    }
    return row | {column(key): _cell(value) for key, value in facts.axes.items()}


def _cell(value: Any) -> Any:
    """Value of an axis in a table: a list as text."""
    return str(value) if isinstance(value, list | tuple | dict) else value


def _types(columns: list[str]) -> dict[str, str]:
    """Types that do not depend on which rows there are."""
    texts = ("study", "run", "arm", "family", "likelihood", "configuration")
    counts = ("seed", "params", "params_non_embedding", "unique_tokens", "tokens", "step")
    kinds = dict.fromkeys(texts, "str") | dict.fromkeys(counts, "int64")
    return {
        name: kinds.get(name, "bool" if name == "final" else "float64")
        for name in columns
        if name in COLUMNS
    }


def _evaluations(run: Path) -> list[dict[str, float]]:
    """Evaluations in `RUN/metrics.jsonl`; none where the run has not begun."""
    path = run / "metrics.jsonl"
    return [row for row in read_metrics(path) if LOSS in row] if path.exists() else []


def write_table(table: pd.DataFrame, out: Path) -> list[Path]:
    """Write `OUT.csv` and `OUT.parquet`, each as a whole; their paths."""
    from io import BytesIO

    from pretrain.tracking.guard import restore

    paths = [out.with_name(f"{out.name}.csv"), out.with_name(f"{out.name}.parquet")]
    restore(paths[0], table.to_csv(index=False, lineterminator="\n").encode())
    buffer = BytesIO()
    table.to_parquet(buffer, index=False)
    restore(paths[1], buffer.getvalue())
    return paths
