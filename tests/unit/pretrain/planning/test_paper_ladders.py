"""Ladders of the two papers: shapes and parameter counts as the papers have them."""

from __future__ import annotations

import csv
import re

import pytest
import yaml

from pretrain.config.groups import CONFIG_ROOT, groups
from pretrain.config.run import ModelConfig
from pretrain.model.size import parameter_count
from pretrain.planning.ladder import PAPERS, tabled_models

FAMILY = CONFIG_ROOT.parent.parent / "shared/data/scaling/model_family.csv"
GPT2, SIZES = 50_257, (7, 14, 44, 74, 117, 140, 217, 278, 425, 552, 632, 724, 1143, 2283)
STUDY_2026 = {  # total parameters in millions with noise conditioning, biases, 32,001 tokens
    "6m": 22.45, "19m": 41.31, "34m": 61.35, "48m": 76.98, "66m": 95.36, "85m": 111.6,
    "113m": 141.6, "142m": 164.6, "170m": 187.6, "206m": 223.0, "231m": 243.7, "268m": 280.0,
    "302m": 306.8, "336m": 333.5, "472m": 454.2, "666m": 613.2, "831m": 748.0, "944m": 836.6,
    "1233m": 1073.7, "1476m": 1274.2, "2121m": 1778.5,
}  # fmt: skip


def text(name: str) -> str:
    return (CONFIG_ROOT / "model" / f"{name}.yaml").read_text()


def model(name: str) -> ModelConfig:
    return ModelConfig(**yaml.safe_load(text(name)))


def published(m: ModelConfig) -> int:
    """N of arXiv 2507.15857: 4 l d^2 + 3 l d f + 6 l d + V d."""
    layers, d = m.num_layers, m.hidden_size
    return layers * (4 * d * d + 3 * d * m.ffn_size + 6 * d) + GPT2 * d


@pytest.mark.parametrize("size", SIZES)
def test_the_data_constrained_ladder_has_the_published_n(size: int) -> None:
    """Its N has 6 l d for vectors of GPT-2, of which these models have 2 l d; ours counts the final
    norm too."""
    m = model(f"chinchilla_{size}m")
    ours = parameter_count(m.model_copy(update={"vocab_multiple": 1}), GPT2)
    assert published(m) - ours == 4 * m.num_layers * m.hidden_size - m.hidden_size
    stated = re.search(r"is ([\d.,]+) M with a vocabulary of 50,257", text(f"chinchilla_{size}m"))
    assert stated is not None
    assert float(stated[1].replace(",", "")) == pytest.approx(published(m) / 1e6, abs=0.006)


@pytest.mark.skipif(not FAMILY.exists(), reason="the published table of sizes is not here")
def test_the_published_table_of_sizes() -> None:
    """T15: the formula gives every N of the table; each packaged size is a row of it."""
    lines = [line for line in FAMILY.read_text().splitlines() if not line.startswith("#")]
    rows = {int(row["name_M"]): row for row in csv.DictReader(lines)}
    assert len(rows) == 54
    for name, row in rows.items():
        layers, d, f = (int(row[key]) for key in ("n_layers", "d_model", "ffw_swiglu"))
        n = 4 * layers * d**2 + 3 * layers * d * f + 6 * layers * d + GPT2 * d
        assert n == int(row["params_total"])
        assert n - GPT2 * d == int(row["params_non_embedding"])
        assert f == 8 * d // 3 // 64 * 64
        if name in SIZES:
            m = model(f"chinchilla_{name}m")
            assert published(m) == n
            assert (m.head_size, m.num_attention_heads) == (
                int(row["kv_size"]),
                int(row["n_heads"]),
            )


@pytest.mark.parametrize("name", STUDY_2026)
def test_the_2026_ladder_has_the_published_totals(name: str) -> None:
    """The paper's network also has biases in MLP (5 d a layer) and head (V)."""
    m = model(f"smdm_{name}").model_copy(update={"time_conditioning": True, "vocab_multiple": 1})
    total = parameter_count(m, 32_001) + 5 * m.hidden_size * m.num_layers + 32_001
    assert total / 1e6 == pytest.approx(STUDY_2026[name], abs=0.06)
    assert m.ffn_size == 4 * m.hidden_size


def test_every_file_of_a_ladder_is_tested_and_no_other_is_left_out_of_the_table() -> None:
    want = {f"chinchilla_{size}m" for size in SIZES} | {f"smdm_{name}" for name in STUDY_2026}
    assert {name for name in groups()["model"] if name.startswith(PAPERS)} == want
    assert {*tabled_models()} == {*groups()["model"]} - want


def test_packaged_shapes_of_the_papers_are_those_of_the_ladders() -> None:
    same = {"25m": "chinchilla_44m", "48m": "chinchilla_74m", "224m": "chinchilla_278m",
            "470m": "chinchilla_552m", "1b": "chinchilla_1143m", "2.1b": "chinchilla_2283m",
            "1.7b": "smdm_2121m"}  # fmt: skip
    for ours, theirs in same.items():
        assert model(ours) == model(theirs)
