"""Rows of benchmarks/gpu_step.py without a GPU: what a plan is, and what a failing row costs."""

import json
import sys
from argparse import Namespace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu_step(importable):
    import gpu_step

    return gpu_step


@pytest.fixture
def row(importable):
    from gpu_day.plan import Row

    return Row


class Engine:
    """Stands in for the engine: a row fails as `faults` says by model and micro-batch."""

    faults: ClassVar[dict] = {}
    built: ClassVar[list] = []
    seen: ClassVar[list] = []

    def __init__(self, row, plan, device):
        self.model = row.model
        Engine.built.append(row.model)

    def serves(self, row):
        return row.model == self.model

    def set(self, row):
        self.row = row

    def step(self):
        raise RuntimeError("no kernel was recorded")

    def measure(self):
        Engine.seen.append((self.row.model, self.row.micro_batch))
        fault = Engine.faults.get((self.row.model, self.row.micro_batch))
        if fault:
            raise fault.pop(0) if len(fault) > 1 else fault[0]
        return {"seconds": 1.0, "tokens_per_second": 1.0, "tflops": 98.9}


@pytest.fixture
def measure(gpu_step, monkeypatch, tmp_path):
    """Measures rows on the engine that stands in; exit code, entries and the file they are in."""
    from gpu_day.plan import Plan
    from gpu_day.results import Results

    steps = SimpleNamespace(Steps=Engine, release=lambda device: None)
    monkeypatch.setitem(sys.modules, "gpu_day.steps", steps)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)
    for name, empty in (("faults", {}), ("built", []), ("seen", [])):
        monkeypatch.setattr(Engine, name, empty)
    path = tmp_path / "rows.json"

    def run(rows, faults=(), device=CPU, seconds=float("inf")):
        Engine.faults.update(faults)
        results = Results(path, Results.read(path))
        options = Namespace(seconds=seconds, kernels=None, row_seconds=None)
        code = gpu_step.measure_rows(Plan(rows), device, results, options)
        assert json.loads(path.read_text())["rows"] == results.rows
        return code, results.rows

    return run


def test_one_engine_serves_the_rows_of_a_model(measure, row):
    rows = [row("a", "masked", 1), row("a", "uniform", 2), row("b", "masked", 1)]
    code, entries = measure(rows)
    assert code == 0 and Engine.built == ["a", "b"]
    assert [(e["model"], e["micro_batch"], e["seconds"]) for e in entries] == [
        ("a", 1, 1.0), ("a", 2, 1.0), ("b", 1, 1.0),
    ]  # fmt: skip


def test_a_row_that_raises_is_recorded_and_does_not_stop_the_others(measure, row):
    rows = [row("a", "masked", 1), row("a", "masked", 2), row("a", "uniform", 4)]
    code, entries = measure(rows, {("a", 2): [ValueError("no such thing")]})
    assert code == 0
    assert [entry.get("error") for entry in entries] == [None, "ValueError: no such thing", None]
    assert Engine.built == ["a", "a"], "a new engine after a failure"


def test_the_exit_code_says_that_nothing_was_measured(measure, row, gpu_step):
    assert measure([row("a", "masked", 1)], {("a", 1): [ValueError()]})[0] == gpu_step.NOTHING


def test_what_does_not_fit_is_halved_and_nothing_larger_is_tried(measure, row):
    full = torch.OutOfMemoryError("CUDA out of memory")
    rows = [row("a", "masked", 8), row("a", "masked", 16), row("a", "masked", 16, "full")]
    _, entries = measure(rows, {("a", 8): [full]})
    found = [(e["micro_batch"], e["accumulate"], "seconds" in e, "skipped" in e) for e in entries]
    assert found == [
        (8, 1, False, False), (4, 2, True, False), (16, 1, False, True), (16, 1, True, False),
    ]  # fmt: skip


def test_an_ascending_search_ends_where_memory_does(measure, row):
    full = torch.OutOfMemoryError("CUDA out of memory")
    rows = [row("a", "masked", size) for size in (4, 8, 16)]
    _, entries = measure(rows, {("a", 8): [full]})
    assert [("error" in e, "skipped" in e) for e in entries] == [
        (False, False), (True, False), (False, True),
    ]  # fmt: skip


def test_after_a_fault_on_a_gpu_attention_of_cudnn_is_switched_off_once(measure, row):
    fault = RuntimeError("cuDNN Frontend error")
    rows = [row("a", "masked", 1), row("a", "masked", 2)]
    code, entries = measure(rows, {("a", 1): [fault], ("a", 2): [fault]}, CUDA)
    assert [(e["micro_batch"], e["cudnn"]) for e in entries] == [(1, True), (1, False), (2, False)]
    assert code != 0 and all("error" in entry for entry in entries)


def test_a_new_process_goes_on_where_one_was_lost(measure, row, gpu_step):
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    rows = [row("a", "masked", size) for size in (1, 2, 4)]
    code, entries = measure(rows, {("a", 2): [lost, lost]}, CUDA)
    assert code == gpu_step.START_AGAIN and len(entries) == 2
    Engine.seen.clear()
    Engine.faults.clear()
    code, entries = measure(rows, device=CUDA)
    assert code == 0
    assert Engine.seen == [("a", 2), ("a", 4)], "the lost row without cuDNN, then the rest"
    assert [entry["cudnn"] for entry in entries] == [True, True, False, False]


def test_a_row_in_which_the_process_ends_counts_as_failed(measure, row):
    rows = [row("a", "masked", 1), row("a", "masked", 2)]
    with pytest.raises(KeyboardInterrupt):
        measure(rows, {("a", 1): [KeyboardInterrupt()]})
    _, entries = measure(rows)
    assert entries[0]["error"] == "the process ended in this row"
    assert Engine.seen == [("a", 1), ("a", 2)]


def test_rows_without_time_are_named_and_measured_by_the_next_process(measure, row):
    rows = [row("a", "masked", 1)]
    _, entries = measure(rows, seconds=0)
    assert entries[0]["skipped"] == "no time left"
    _, entries = measure(rows)
    assert len(entries) == 1 and entries[0]["seconds"] == 1.0


def test_figures_stand_where_only_the_profile_fails(measure, row):
    _, entries = measure([row("a", "masked", 1, profile=True)])
    assert entries[0]["seconds"] == 1.0 and "no kernel was recorded" in entries[0]["profile_error"]


def test_every_packaged_plan_is_well_formed(importable, root):
    from gpu_day.plan import PLANS, read_plan
    from gpu_day.steps import row_config

    names = sorted(path.stem for path in PLANS.glob("*.yaml"))
    assert names == ["cpu", "full", "smoke"]
    for name in names:
        plan = read_plan(name)
        labels = [r.label for r in plan.rows]
        assert len(set(labels)) == len(labels)
        for r in plan.rows:
            config = row_config(r, plan)
            assert config.train.global_batch_size == r.micro_batch * r.accumulate
            assert config.train.compile is r.compile


def test_a_malformed_plan_is_refused_with_what_is_allowed(importable, tmp_path):
    from gpu_day.plan import read_plan

    with pytest.raises(ValueError, match=r"no plan fuller; .* cpu, full, smoke"):
        read_plan("fuller")
    path = tmp_path / "plan.yaml"
    path.write_text("rows: [{model: tiny, objective: masked, micro_batch: 2, compiled: true}]")
    with pytest.raises(ValueError, match="compiled"):
        read_plan(str(path))


def test_the_table_names_hardware_commit_and_denominators(row):
    from gpu_day.table import table

    r = row("1.7b", "masked", 8, "selective", compile=True, accumulate=2)
    measured = {
        "label": r.label,
        **r.as_dict(),
        "seconds": 1.0,
        "tokens_per_second": 50_000.0,
        "tflops": 500.0,
        "peak_gib": 3.0,
        "corruption_seconds": 0.0012,
        "kernels": {"copy": 1.0},
    }
    failed = {"label": "another", "error": "OutOfMemoryError: 80 GiB"}
    text = table(
        {
            "device": "NVIDIA H200", "torch": "2.11.0", "commit": "abc", "length": 2048,
            "vocabulary": 32768, "burst_tflops": 800.0, "sustained_tflops": 625.0, "cudnn": False,
            "rows": [measured, failed],
        }
    )  # fmt: skip
    assert "NVIDIA H200" in text and "commit abc" in text
    assert "989 TFLOP/s dense" in text and "800.0 TFLOP/s in a burst, 625.0 sustained" in text
    assert "cuDNN's attention was switched off" in text
    expected = (
        "| 1.7b | masked | 8 x 2 | selective | layers | 50,000 | 500.0 | 50.6% | 62.5% | 80.0% | "
        "3.0 | 1.2 |"
    )
    assert expected in text.splitlines()
    assert "another: error: OutOfMemoryError: 80 GiB" in text.splitlines()


def test_without_a_gpu_it_says_what_can_be_done(gpu_step, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_step.py"])
    assert gpu_step.main() == 3
    said = capsys.readouterr().err
    assert "needs an NVIDIA GPU" in said and "--dry-run" in said
