"""Tracking: complete records, one MLflow run over resumes, and no failure that reaches the run."""

from __future__ import annotations

import io
import json
import math
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pretrain.config.compose import compose, save_config
from pretrain.config.run import Config
from pretrain.tracking import Tracking, open_tracking, queue
from pretrain.tracking.console import ConsoleSink
from pretrain.tracking.jsonl import JsonlSink, read_metrics
from pretrain.tracking.mlflow_store import tracking_uri
from pretrain.tracking.points import Point, once
from pretrain.tracking.queue import QueuedSink

DATA = ["data.train=train.json", "data.validation=val.json", "data.tokenizer=sp.model"]


def configuration(root: Path, *overrides: str) -> Config:
    config = compose(["model=tiny", f"run.root={root}", *DATA, *overrides])
    save_config(config, config.run.path / "config.yaml")
    return config


def begin(config: Config, start_step: int | None = None) -> Tracking:
    return open_tracking(
        config,
        config.run.path,
        rank=0,
        total_steps=100,
        resumed=start_step is not None,
        start_step=start_step or 0,
    )


class TestJsonl:
    def test_an_interrupted_record_equals_an_uninterrupted_one(self, tmp_path: Path) -> None:
        def take(path: Path, keep: int, steps: range) -> None:
            sink = JsonlSink(path, keep)
            for step in steps:
                sink.log({"loss": 1 / (step + 1)}, step, time_s=step)
            sink.close("failed")

        take(tmp_path / "whole", -1, range(40))
        parts = tmp_path / "parts"
        take(parts, -1, range(17))
        with parts.open("ab") as file:
            file.write(b'{"step": 17, "lo')  # killed in the middle of a line
        take(parts, 10, range(11, 25))  # resumed from the checkpoint of step 10, killed again
        take(parts, 20, range(21, 40))
        assert parts.read_bytes() == (tmp_path / "whole").read_bytes()

    def test_a_first_start_begins_an_empty_file(self, tmp_path: Path) -> None:
        config = configuration(tmp_path, "tracking=jsonl")
        for loss in (2.0, 1.0):
            tracking = begin(config)
            tracking.log({"loss": loss}, 0)
            tracking.close("finished")
        assert [r["loss"] for r in read_metrics(config.run.path / "metrics.jsonl")] == [1.0]

    def test_values_that_json_cannot_write_survive(self, tmp_path: Path) -> None:
        sink = JsonlSink(tmp_path / "m", -1)
        sink.log({"a": math.nan, "b": -math.inf}, 3, 0.0)
        json.loads((tmp_path / "m").read_text(), parse_constant=pytest.fail)
        row = read_metrics(tmp_path / "m")[0]
        assert math.isnan(row["a"])
        assert row["b"] == -math.inf

    def test_lines_are_readable_before_close(self, tmp_path: Path) -> None:
        JsonlSink(tmp_path / "m", -1).log({"loss": 1.5}, 1, 0.0)
        assert read_metrics(tmp_path / "m")[0]["loss"] == 1.5


class TestConsole:
    def lines(self, *reports: tuple[dict[str, float], int]) -> list[str]:
        stream = io.StringIO()
        sink = ConsoleSink(total_steps=1000, start_step=0, stream=stream)
        for metrics, step in reports:
            sink.log(metrics, step, 0.0)
        return stream.getvalue().splitlines()

    def test_a_log_gets_one_plain_line_a_report(self) -> None:
        (line,) = self.lines(
            ({"epoch": 1.5, "loss": 2.25, "grad_norm": 0.5, "lr": 3e-4,
              "tokens_per_second": 12345.0, "mfu": 0.314}, 10)
        )  # fmt: skip
        assert line == (
            "step 10/1,000  epoch 1.50  loss 2.2500  grad 0.5  lr 0.0003  12.3k tok/s  MFU 31.4 %"
        )

    def test_validation_gets_its_own_line_and_no_bar_escapes_reach_a_log(self) -> None:
        assert self.lines(({"validation/nll": 3.25, "validation/stderr": 0.01}, 1200)) == [
            "step 1,200  validation/nll 3.2500  validation/stderr 0.0100"
        ]

    def test_time_left_appears_from_the_second_report_on(self) -> None:
        first, second = self.lines(({"loss": 1.0}, 10), ({"loss": 1.0}, 20))
        assert "left" not in first
        assert "left" in second

    def test_messages_with_square_brackets_are_printed_as_they_are(self) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        stream = Terminal()
        sink = ConsoleSink(total_steps=10, start_step=0, stream=stream)
        sink.message("weights [b, s] and [/red]")
        sink.close("finished")
        assert "weights [b, s] and [/red]" in stream.getvalue()


@pytest.fixture
def silent_server() -> Iterator[tuple[str, threading.Event]]:
    """A server that accepts every connection and never answers, like a stopped process."""
    listener = socket.create_server(("127.0.0.1", 0))
    reached, kept = threading.Event(), []

    def accept() -> None:
        while True:
            try:
                kept.append(listener.accept())
            except OSError:
                return
            reached.set()

    thread = threading.Thread(target=accept)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", reached
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for connection, _ in kept:
        connection.close()
    thread.join()


class TestMlflowFailures:
    def test_a_server_that_hangs_is_never_waited_for(
        self,
        tmp_path: Path,
        silent_server: tuple[str, threading.Event],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        uri, reached = silent_server
        monkeypatch.setitem(queue._FLUSH_SECONDS, "finished", 0.2)
        config = configuration(tmp_path, f"tracking.uri={uri}")
        tracking = begin(config)
        tracking.params({"parameters": 10})
        tracking.log({"lr": 0.1, "loss": 1.0}, 0)
        assert reached.wait(60), "the worker thread never called the server"
        for step in range(1, 500):
            tracking.log({"loss": 1.0, "lr": 0.1}, step)
        tracking.close("finished")
        assert "1,000 measurements did not reach mlflow" in capsys.readouterr().out
        assert len(read_metrics(config.run.path / "metrics.jsonl")) == 500

    def test_a_dead_server_costs_the_oldest_measurements_counted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        config = configuration(
            tmp_path, f"tracking.uri=http://127.0.0.1:{port}", "tracking.queue_size=30"
        )
        tracking = begin(config)
        for step in range(100):
            tracking.log({"loss": 1.0}, step)
        sink = tracking._sinks["mlflow"]
        assert isinstance(sink, QueuedSink)
        with sink._lock:
            assert sink._dropped + len(sink._points) == 100
            assert [p[3] for p in sink._points][-30:] == list(range(70, 100))
        tracking.close("finished")
        out = capsys.readouterr().out
        assert out.count("training goes on") == 1
        assert "100 measurements did not reach mlflow" in out

    def test_an_unusable_database_file(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "mlflow.db").mkdir()
        config = configuration(tmp_path)
        tracking = begin(config)
        tracking.log({"loss": 1.0}, 1)
        tracking.close("finished")
        assert "1 measurements did not reach mlflow" in capsys.readouterr().out
        assert len(read_metrics(config.run.path / "metrics.jsonl")) == 1

    def test_a_broken_sink_is_reported_once_and_the_others_go_on(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = configuration(tmp_path, "tracking=jsonl")
        tracking = begin(config)
        monkeypatch.setattr(tracking._sinks["metrics.jsonl"], "log", lambda *_: 1 / 0)
        for step in range(3):
            tracking.log({"loss": 1.0}, step)
        tracking.close("finished")
        out = capsys.readouterr().out
        assert out.count("tracking to metrics.jsonl fails") == 1
        assert out.count("loss 1.0000") == 3


def test_one_mlflow_run_over_a_locked_database_and_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every point arrives although the database was locked in between; a resume adds to the run."""
    from mlflow.tracking import MlflowClient

    config = configuration(tmp_path)
    tracking = begin(config)
    tracking.params({"parameters": 1234})
    tracking.log({"loss": 3.0}, 0)
    sink = tracking._sinks["mlflow"]
    assert isinstance(sink, QueuedSink)
    while sink._points or sink._calls or not sink._connected:
        assert sink._thread.is_alive()
        time.sleep(0.05)
    lock = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None, timeout=30)
    lock.execute("BEGIN EXCLUSIVE")
    for step in range(1, 50):
        tracking.log({"loss": 3.0 - step / 50}, step)
    lock.execute("ROLLBACK")
    lock.close()
    tracking.close("preempted")

    longer = configuration(tmp_path, "data.epochs=2")
    tracking = begin(longer, start_step=49)
    tracking.log({"loss": 1.0}, 50)
    tracking.log_artifact(config.run.path / "metrics.jsonl", "logs")
    tracking.close("finished")

    client = MlflowClient(tracking_uri(config.run.root, None))
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["parameters"] == "1234"
    assert run.data.params["data.epochs"] == "1.0"
    assert run.data.tags["changed.data.epochs"] == "2.0"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [
        *((s, 3.0 - s / 50) for s in range(50)),
        (50, 1.0),
    ]
    stored = {
        p.relative_to(tmp_path / "mlartifacts").name for p in tmp_path.rglob("mlartifacts/**/*")
    }
    assert {"config.yaml", "metrics.jsonl"} <= stored
    assert not Path("mlruns").exists()


class Notebook:
    """A service in memory that can be made to fail; `kept` survives a restart of the run."""

    def __init__(self, kept: list[Point]) -> None:
        self.address, self.kept = "a notebook", kept
        self.down = False
        self.asked = threading.Event()

    def connect(self) -> None: ...

    def lacking(self, recorded: Sequence[Point]) -> list[Point]:
        return [p for p in once(recorded) if p not in self.kept]

    def log_points(self, points: list[Point]) -> None:
        self.asked.set()
        if self.down:
            raise OSError("down")
        self.kept += points

    def log_params(self, values: object) -> None: ...
    def log_artifact(self, path: Path, folder: str) -> None: ...
    def end(self, status: str, time_ms: int) -> None: ...
    def is_final(self, error: Exception) -> bool:
        return False


@pytest.mark.parametrize("same", [True, False], ids=["same service", "new service"])
def test_what_a_killed_process_had_queued_is_delivered_by_the_next_start(
    tmp_path: Path, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 0-4 arrive, 5-9 are queued when the process dies; 8 and 9 lie behind the checkpoint
    and are taken again. A service that goes on has every step once, a new one the whole curve."""
    monkeypatch.setitem(queue._FLUSH_SECONDS, "failed", 0.0)
    said: list[str] = []
    kept: list[Point] = []

    def start(keep_to_step: int, client: Notebook) -> tuple[JsonlSink, QueuedSink]:
        record = JsonlSink(tmp_path / "metrics.jsonl", keep_to_step)
        return record, QueuedSink("book", client, tmp_path, capacity=99, report=said.append)

    def take(sinks: tuple[JsonlSink, QueuedSink], steps: range) -> None:
        for step in steps:
            for sink in sinks:
                sink.log({"loss": 1 / (step + 1), "lr": 0.1}, step, 1e9 + step)

    first = Notebook(kept)
    sinks = start(-1, first)
    take(sinks, range(5))
    while len(kept) < 10:
        time.sleep(0.01)
    first.down = True
    first.asked.clear()
    take(sinks, range(5, 10))
    assert first.asked.wait(30)
    sinks[1].close("failed")  # as good as killed: nothing is sent any more

    second = kept if same else []
    sinks = start(7, Notebook(second))
    take(sinks, range(8, 12))
    sinks[1].close("finished")
    assert [(p.step, p.value) for p in second if p.name == "loss"] == [
        (step, 1 / (step + 1)) for step in range(12)
    ]


def test_measurements_that_a_full_queue_dropped_come_from_the_record(tmp_path: Path) -> None:
    """Once each and none missing, although the queue holds 7 and a failed call had stored some."""

    class Half(Notebook):
        def log_points(self, points: list[Point]) -> None:
            if self.down:
                self.kept += points[: len(points) // 2]  # stored, but the answer was lost
            super().log_points(points)

    client = Half([])
    record = JsonlSink(tmp_path / "metrics.jsonl", -1)
    sink = QueuedSink("book", client, tmp_path, capacity=7, report=lambda text: None)
    client.down = True
    for step in range(40):
        for each in (record, sink):
            each.log({"loss": float(step), "lr": 0.1}, step, 1e9 + step)
            each.log({"validation": 1.0, "lr": 0.1}, step, 1e9 + step + 0.5)
        if step == 20:
            assert client.asked.wait(30)
    client.down = False
    sink.close("finished")
    assert sorted((p.name, p.step) for p in client.kept) == sorted(
        (name, step) for name in ("loss", "lr", "validation") for step in range(40)
    )
    assert all(p.time_ms == 1000 * (10**9 + p.step) for p in client.kept if p.name == "lr")


def test_one_refused_measurement_does_not_cost_its_batch(tmp_path: Path) -> None:
    class Strict(Notebook):
        def log_points(self, points: list[Point]) -> None:
            if any(p.name == "bad" for p in points):
                raise ValueError("bad name")
            super().log_points(points)

        def is_final(self, error: Exception) -> bool:
            return isinstance(error, ValueError)

    said: list[str] = []
    client = Strict([])
    sink = QueuedSink("book", client, tmp_path, capacity=99, report=said.append)
    sink.log({"a": 1.0, "b": 1.0, "bad": 1.0, "c": 1.0, "d": 1.0}, 3, 1e9)
    sink.close("finished")
    assert [p.name for p in client.kept] == ["a", "b", "c", "d"]
    (line,) = said
    assert "refused bad of step 3" in line


def test_other_ranks_track_nothing(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    tracking = open_tracking(
        config, config.run.path, rank=1, total_steps=1, resumed=False, start_step=0
    )
    tracking.log({"loss": 1.0}, 1)
    tracking.close("finished")
    assert not (config.run.path / "metrics.jsonl").exists()
    assert not (tmp_path / "mlflow.db").exists()
