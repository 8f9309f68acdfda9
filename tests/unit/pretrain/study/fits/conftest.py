"""Published measurements, where this machine has them, and a synthetic study."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pretrain.study.fits.published import published_law

DATA = Path(__file__).resolve().parents[6] / "shared" / "data" / "scaling"


@pytest.fixture(scope="session")
def measured():
    """Reader of a file of published measurements, its loss column named `loss`."""
    if not DATA.is_dir():
        pytest.skip(f"published measurements are not in {DATA}")

    def read(name):
        table = pd.read_csv(DATA / name, comment="#")
        table = table.rename(columns={"val_loss": "loss", "train_loss": "loss"})
        if "params_millions" in table:
            table["params"] = table["params_millions"] * 1e6
            table["tokens"] = table["epochs"] * table["unique_tokens"]
            table["configuration"] = table.groupby(["params", "unique_tokens"]).ngroup()
        return table

    return read


@pytest.fixture(scope="session")
def chinchilla(measured):
    """All 245 digitised points."""
    table = measured("chinchilla_besiroglu245.csv")
    tokens = table["flops"] / (6 * table["params"])
    return table.assign(tokens=tokens, unique_tokens=tokens)


@pytest.fixture
def synthetic():
    """Table of a grid of runs that follow the reconstructed autoregressive law, with an error."""

    def draw(error=0.0, seed=0, law="prabhudesai_autoregressive"):
        rows = [
            (size, budget * epochs, budget)
            for budget in (1e7, 3e7, 1e8)
            for size in np.geomspace(5e6, 5e8, 6)
            for epochs in (1, 3, 10, 40)
        ]
        table = pd.DataFrame(rows, columns=["params", "tokens", "unique_tokens"])
        exact = published_law(law).loss(table["params"], table["tokens"], table["unique_tokens"])
        noise = np.random.default_rng(seed).normal(0, error, len(table))
        return table.assign(loss=exact * np.exp(noise))

    return draw
