"""Report page: whole, without a network, the same for the same table, and for poor tables too."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from study_tables import curves, row
from typer.testing import CliRunner

from pretrain.errors import ConfigError
from pretrain.study.fits.laws import LAWS
from pretrain.study.report.build import write_report

pytestmark = pytest.mark.filterwarnings("error::UserWarning")
"""matplotlib warns where a layout does not fit."""

VOID = {"meta", "img", "br", "hr", "link", "input"}
FIGURES = ("loss", "gap", "frontier", "isoflop", "contour", "critical_compute", "residuals",
           "data_value")  # fmt: skip


class Page(HTMLParser):
    """Elements of a page; a tag that is closed in the wrong place raises."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag in {"script", "img", "link", "iframe", "source"}:
            self.loaded += [given[key] or "" for key in ("src", "href") if key in given]
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def report(folder: Path, table: pd.DataFrame, **options: int) -> str:
    folder.mkdir(exist_ok=True)
    table.to_csv(folder / "table.csv", index=False)
    return write_report(folder, **{"resamples": 0, **options}).page.read_text()


def law_table() -> pd.DataFrame:
    """Ends of schedules of two families over three sizes, two budgets and four lengths."""
    common = {"alpha": 0.31, "beta": 0.31}
    laws = {
        "autoregressive": {"A": 290.0, "B": 790.0, "E": 1.83, "R_D": 20.0, "R_N": 50.0} | common,
        "masked": {"A": 250.0, "B": 1120.0, "E": 1.9, "R_D": 400.0, "R_N": 900.0} | common,
    }
    rng, rows = np.random.default_rng(0), []
    for family, values in laws.items():
        for unique in (1e7, 1e8):
            for params in (1e7, 4e7, 1.6e8):
                for epochs in (1.0, 4.0, 16.0, 64.0):
                    loss = LAWS["data_constrained"].loss(values, params, unique * epochs, unique)
                    noisy = float(loss) * float(np.exp(rng.normal(0, 0.002)))
                    rows.append(row(family, family, unique, epochs, noisy, params=params,
                                    length=epochs, planned_epochs=epochs, final=True))  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.slow
def test_a_study_with_laws_has_every_figure_inside_one_page(tmp_path: Path) -> None:
    text = report(tmp_path / "study", law_table(), resamples=3)
    page = Page(text)
    assert all(f"figure-{name}" in page.ids for name in FIGURES)
    assert all(source.startswith("data:") for source in page.loaded)
    drawn = {path.stem for path in (tmp_path / "study/report/figures").glob("*.png")}
    assert {"loss", "gap", "frontier", "contour", "residuals", "critical_compute"} <= drawn
    for name in drawn:
        assert f"plot-{name}" in page.ids
        assert (tmp_path / f"study/report/figures/{name}.svg").exists()
    fits = json.loads((tmp_path / "study/report/fits.json").read_text())
    assert {fit["family"] for fit in fits} == {"autoregressive", "masked"}
    assert [fit["law_name"] for fit in fits] == ["data_constrained"] * 2  # that of the table
    for part in ("held-out error", "chosen", "90 % interval of the slope", "measured runs"):
        assert part in text
    advice = ["study", "advise", "--unique-tokens", "30M", "--flops", "1e18", "--json", "--fits"]
    from pretrain.cli.main import app

    result = CliRunner().invoke(app, [*advice, str(tmp_path / "study/report/fits.json")])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["options"]) == 2


def test_the_same_table_makes_the_same_page(tmp_path: Path) -> None:
    assert report(tmp_path / "study", curves()) == report(tmp_path / "study", curves())


def poor_tables() -> dict[str, pd.DataFrame]:
    table = curves()
    unfinished = table[(table["family"] != "masked") | (table["epochs"] < 30)]
    return {
        "one arm": table[table["arm"] == "ar"],
        "no reference": table[table["arm"] == "mdm"],
        "one size and budget": curves(budgets=(1e5,)),
        "no noise error": table.assign(noise_error=np.nan),
        "no error at all": table.assign(noise_error=np.nan, standard_error=np.nan),
        "an unfinished run": unfinished,
        "nothing finished": table.assign(final=False),
        "a lost loss": table.assign(loss=table["loss"].where(table["epochs"] > 2)),
        "one evaluation": table.iloc[:1],
        "no run": table.iloc[:0],
    }


@pytest.mark.parametrize("name", sorted(poor_tables()))
def test_poor_tables_make_a_page_that_says_what_is_missing(name: str, tmp_path: Path) -> None:
    text = report(tmp_path / "study", poor_tables()[name])
    page = Page(text)
    assert all(f"figure-{figure}" in page.ids for figure in FIGURES)
    assert "Not drawn: " in text
    assert ("(unfinished)" in text) == (
        name in {"an unfinished run", "nothing finished", "one evaluation"}
    )


def test_names_of_arms_are_escaped(tmp_path: Path) -> None:
    table = curves()
    table["arm"] = table["arm"].replace("ar", "</script><b>ar & co")
    Page(report(tmp_path / "study", table))


def test_a_folder_without_a_table_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a study"):
        write_report(tmp_path)
    curves().drop(columns="flops").to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(ConfigError, match="lacks the columns flops"):
        write_report(tmp_path)


def test_reference_of_the_study_file(tmp_path: Path) -> None:
    table = pd.concat([curves(), curves().query("arm == 'ar'").assign(arm="ar, worse")])
    table.loc[table["arm"] == "ar, worse", "loss"] += 0.5
    (tmp_path / "study.yaml").write_text("compare: {reference: 'ar, worse'}\n")
    assert "Reference: ar, worse." in report(tmp_path, table)


def test_command(tmp_path: Path) -> None:
    from pretrain.cli.main import app

    curves().to_csv(tmp_path / "table.csv", index=False)
    arguments = ["study", "report", str(tmp_path), "--resamples", "0", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert Path(value["page"]).stat().st_size == value["bytes"]
    assert len(value["figures"]) % 3 == 0
    assert any("isoflop".lower() in text.lower() for text in value["omitted"])
