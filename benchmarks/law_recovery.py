"""Coverage of the intervals of fitted laws and of critical compute, on synthetic studies.

    python benchmarks/law_recovery.py [--replicas 200] [--resamples 200] [--first 0] [--out FILE]

Each replica is a pair of studies, autoregressive and masked, whose losses follow known laws: a grid
of sizes, budgets and epochs under a limit of compute, an error that all runs of a configuration
share, and an error of each run (a third of the configurations has a second seed). The laws are
fitted and bootstrapped as those of real studies, and 90 % intervals are compared with the truth
inside the range of the data. No crossing counts as an infinite critical compute.

FILE gets one line a replica, so that the command goes on where it was stopped, and several with
another `--first` may share it. Its first line, with `#`, names command, machine and commit.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from record import commit, hardware

from pretrain.study.critical import crossing
from pretrain.study.fits.bootstrap import bootstrap, interval
from pretrain.study.fits.fit import fit_law
from pretrain.study.fits.fitted import Fitted
from pretrain.study.fits.published import published_law

SHARED_ERROR = 0.005
"""Standard deviation, in log loss, of what all runs of a configuration share."""
RUN_ERROR = 0.002
"""Standard deviation of each run beside it."""
BUDGETS = (1e7, 3e7, 1e8)
SIZES = np.geomspace(5e6, 1e9, 8)


@dataclass(frozen=True)
class Study:
    """Truth and grid of one family."""

    law: Fitted
    epochs: tuple[float, ...]
    most_flops: float

    def grid(self) -> pd.DataFrame:
        """One row for each configuration within the limit of compute."""
        rows = [
            (size, budget * epochs, budget, f"{size:.3g}/{budget:.3g}/{epochs}")
            for budget in BUDGETS
            for size in SIZES
            for epochs in self.epochs
            if 6 * size * budget * epochs <= self.most_flops
        ]
        return pd.DataFrame(rows, columns=["params", "tokens", "unique_tokens", "configuration"])

    def draw(self, rng: np.random.Generator) -> pd.DataFrame:
        """Table of one study."""
        grid = self.grid()
        shared = rng.normal(0, SHARED_ERROR, len(grid))
        second = rng.choice(len(grid), len(grid) // 3, replace=False)
        chosen = np.concatenate([np.arange(len(grid)), second])
        table = grid.iloc[chosen].reset_index(drop=True)
        exact = self.law.loss(table["params"], table["tokens"], table["unique_tokens"])
        error = shared[chosen] + rng.normal(0, RUN_ERROR, len(table))
        return table.assign(loss=exact * np.exp(error), family=self.law.family)


STUDIES = (
    Study(published_law("prabhudesai_autoregressive"), (1, 2, 4, 10, 25, 60), 5e19),
    Study(published_law("prabhudesai_masked"), (1, 4, 20, 60, 150, 400), 1e20),
)
POINTS = [
    (size, budget * epochs, budget)
    for budget in (2e7, 6e7)
    for size in (1.2e7, 5e7, 2e8)
    for epochs in (3, 15)
]
"""N, D and U of the predicted losses, between the points of the grid."""
CRITICAL = (2e7, 4e7, 7e7)
"""Unique tokens of the critical computes; their optimal runs lie inside both grids."""


def main() -> None:
    """Run what is missing, then print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--replicas", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="replica to begin with")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/law_recovery.csv"))
    arguments = parser.parse_args()
    done = read(arguments.out)
    for number in range(arguments.first, arguments.replicas):
        if number not in set(done.get("replica", ())):
            append(arguments.out, replica(number, arguments.resamples), arguments)
    print(summary(read(arguments.out)))


def replica(number: int, resamples: int = 200) -> dict[str, object]:
    """One pair of studies: covered losses as digits, covered critical computes and their bounds."""
    began = time.process_time()
    rng = np.random.default_rng([number, 2026])
    at = [np.array(column, float) for column in zip(*POINTS, strict=True)]
    row: dict[str, object] = {"replica": number}
    fits = []
    for study in STUDIES:
        table = study.draw(rng)
        fitted = fit_law(table, "data_constrained", tied={"beta": "alpha"}, check=False)
        fits.append(bootstrap(fitted, table, resamples=resamples, seed=number))
        low, high = interval(fits[-1].resampled_loss(*at))
        truth = study.law.loss(*at)
        inside = (low <= truth) & (truth <= high)
        row[f"loss_{study.law.family}"] = "p" + "".join("01"[int(hit)] for hit in inside)
        row[f"width_{study.law.family}"] = f"{np.mean((high - low) / truth):.5f}"
    reference, challenger = fits
    unique = np.array(CRITICAL)
    truth = crossing(STUDIES[1].law, STUDIES[0].law, unique)
    low, high = interval(crossing(challenger, reference, unique, resampled=True))
    inside = (low <= truth) & (truth <= high)
    row["critical"] = "p" + "".join("01"[int(hit)] for hit in inside)
    for name, values in (("low", low), ("high", high)):
        for budget, value in zip(CRITICAL, values, strict=True):
            row[f"{name}_{budget:.0e}"] = f"{value:.4g}"
    row["seconds"] = f"{time.process_time() - began:.1f}"
    return row


def read(path: Path) -> pd.DataFrame:
    """Replicas that are done."""
    return pd.read_csv(path, comment="#") if path.is_file() else pd.DataFrame()


def append(path: Path, row: dict[str, object], arguments: argparse.Namespace) -> None:
    """Add a line, after the head where the file is new."""
    new = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        if new:
            command = f"python benchmarks/law_recovery.py --resamples {arguments.resamples}"
            file.write(f"# {command}; {hardware()}; commit {commit()}\n")
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def coverage(done: pd.DataFrame) -> dict[str, np.ndarray]:
    """Share of the replicas whose interval holds the truth, for each point of each quantity."""
    names = [name for name in done if name.startswith("loss_") or name == "critical"]
    return {
        name: np.array([[int(digit) for digit in text[1:]] for text in done[name]]).mean(axis=0)
        for name in names
    }


def summary(done: pd.DataFrame) -> str:
    """Table of the coverage of 90 % intervals."""
    lines = [f"{len(done)} replicas, {done['seconds'].sum() / 60:.0f} CPU minutes"]
    for name, shares in coverage(done).items():
        each = " ".join(f"{share:.2f}" for share in shares)
        lines.append(f"{name:22} {shares.mean():.3f}   by point: {each}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
