"""The launch: what is started, who is signalled, what is believed, what is left behind.

Stand-ins replace the ranks (and, but for one test, DeepSpeed's launcher), so that every way of
ending can be played in a second or two.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from pretrain import launch as module
from pretrain.config.compose import compose, load_config
from pretrain.config.run import Config
from pretrain.errors import ConfigError, LaunchError
from pretrain.hosts import read_hostfile
from pretrain.launch import exclusive, judge, plan_launch, write_run

DATA = ["data.train=train.json", "data.validation=val.json", "data.tokenizer=sp.model"]

RANK = """
import json, os, signal, sys, time
from pathlib import Path
run = Path(sys.argv[2]).parent
rank = os.environ.get("RANK", "0")
def end(state, code):
    if rank == "0":
        (run / "status.json").write_text(
            json.dumps({"state": state, "step": 7, "message": "", "exit_code": code}))
    sys.exit(code)
def on_term(number, frame):
    (run / f"signal-{rank}").write_text(signal.Signals(number).name)
    time.sleep(0.3)  # saving
    end("preempted", 75)
behaviour = (run / "behaviour").read_text()
signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "stubborn" else on_term)
(run / f"ready-{rank}").write_text(str(os.getpid()))
if behaviour == "finish":
    end("finished", 0)
if behaviour == "silent":
    sys.exit(0)
time.sleep(600)
"""
LAUNCHER = """#!{python}
import os, subprocess, sys
config = sys.argv[sys.argv.index("--module") + 1 :]
count = int(sys.argv[sys.argv.index("--num_gpus") + 1])
ranks = [
    subprocess.Popen([sys.executable, "-u", "-m", *config], env={{**os.environ, "RANK": str(r)}})
    for r in range(count)
]
codes = [rank.wait() for rank in ranks]
sys.exit(max(codes))
"""
PARENT = """
import sys
from pathlib import Path
import pretrain.launch as launch
from pretrain.config.compose import load_config
if len(sys.argv) > 2:
    launch._deepspeed = lambda: sys.argv[2]
outcome = launch.launch(load_config(Path(sys.argv[1])))
print(outcome, flush=True)
sys.exit(outcome.exit_code)
"""


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"timed out waiting for {what}"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class Stage:
    """A run folder whose ranks are stand-ins."""

    folder: Path
    config: Config
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.config.run.path

    def start(self, behaviour: str, *, real_launcher: bool = False) -> subprocess.Popen[str]:
        self.run.mkdir(parents=True, exist_ok=True)
        for old in self.run.glob("ready-*"):
            old.unlink()
        (self.run / "behaviour").write_text(behaviour)
        path = write_run(self.config)
        launcher = [] if real_launcher else [str(self.folder / "launcher")]
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", PARENT, str(path), *launcher],
            cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def rank_pids(self) -> list[int]:
        """Process ids once all ranks have their handlers."""
        count = self.config.world_size
        wait_for(lambda: all((self.run / f"ready-{r}").exists() for r in range(count)), "the ranks")
        wait_for(lambda: all((self.run / f"ready-{r}").read_text() for r in range(count)), "pids")
        return [int((self.run / f"ready-{r}").read_text()) for r in range(count)]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    package = tmp_path / "pretrain"  # found before the installed one by `python -m` in this folder
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text(RANK)
    launcher = tmp_path / "launcher"
    launcher.write_text(LAUNCHER.format(python=sys.executable))
    launcher.chmod(0o755)
    config = compose(
        ["model=tiny", "tracking=jsonl", f"run.root={tmp_path / 'runs'}", "run.device=cpu",
         "parallel.data_parallel_size=2", *DATA]
    )  # fmt: skip
    made = Stage(tmp_path, config)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
        process.communicate()
    for file in made.run.glob("ready-*"):
        if is_running(int(file.read_text() or 0)):
            os.kill(int(file.read_text()), signal.SIGKILL)


def test_a_finished_run(stage: Stage) -> None:
    process = stage.start("finish")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "--num_gpus 2" in out
    assert str(stage.run / "config.yaml") in out


def test_exit_code_zero_without_a_word_is_a_failure(stage: Stage) -> None:
    process = stage.start("silent")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == LaunchError.exit_code, out


def test_a_statement_of_an_earlier_attempt_is_not_believed(stage: Stage) -> None:
    assert stage.start("finish").wait(60) == 0
    assert stage.start("silent").wait(60) == LaunchError.exit_code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_as_sigterm(stage: Stage, number: signal.Signals) -> None:
    process = stage.start("train")
    pids = stage.rank_pids()
    process.send_signal(number)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 75, out
    assert [(stage.run / f"signal-{r}").read_text() for r in range(2)] == ["SIGTERM", "SIGTERM"]
    assert not any(map(is_running, pids))


def test_a_second_signal_kills_what_does_not_listen(stage: Stage) -> None:
    process = stage.start("stubborn")
    pids = stage.rank_pids()
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert all(map(is_running, pids))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode not in (0, 75)
    wait_for(lambda: not any(map(is_running, pids)), "the ranks' end")


def test_a_killed_launcher_leaves_no_rank_behind(stage: Stage) -> None:
    process = stage.start("train")
    pids = stage.rank_pids()
    (launcher,) = psutil.Process(process.pid).children()
    launcher.kill()
    for pid in pids:  # what `end_with_launcher` does in a real rank
        os.kill(pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 75, out
    assert not any(map(is_running, pids))


def is_free(run: Path) -> bool:
    try:
        with exclusive(run):
            return True
    except ConfigError:
        return False


def test_one_process_trains_in_a_folder_even_when_its_parent_was_killed(stage: Stage) -> None:
    first = stage.start("train")
    pids = stage.rank_pids()
    with (
        pytest.raises(ConfigError, match=f"in use by process {first.pid} on "),
        exclusive(stage.run),
    ):
        pass
    first.kill()
    first.wait()
    with pytest.raises(ConfigError, match="in use"), exclusive(stage.run):
        pass
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: is_free(stage.run), "the folder's release")


def test_with_the_real_launcher(stage: Stage) -> None:
    """DeepSpeed's own two processes stand between us and the ranks, and never see the signal."""
    process = stage.start("train", real_launcher=True)
    pids = stage.rank_pids()
    process.terminate()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 75, out
    assert (stage.run / "signal-0").read_text() == "SIGTERM"
    assert not any(map(is_running, pids))


def test_a_rank_ends_when_its_launcher_dies(tmp_path: Path) -> None:
    code = (
        "import signal, sys\n"
        "from pretrain.resilience import orphan\n"
        "orphan._POLL_SECONDS = 0.05\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "orphan.end_with_launcher()\n"
        "print('watching', flush=True)\n"
        "while True: signal.pause()\n"
    )
    with subprocess.Popen(["sleep", "60"]) as launcher:
        environment = {**os.environ, module.LAUNCHER_PID: str(launcher.pid)}
        rank = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert rank.stdout is not None
        assert rank.stdout.readline() == "watching\n"
        assert rank.poll() is None
        launcher.kill()  # stays a zombie until it is waited for: a pid alone would look alive
        assert rank.wait(30) == 75
        rank.stdout.close()


class TestJudgement:
    def test_the_ranks_statement_wins_over_the_launchers_code(self) -> None:
        said = {"state": "finished", "step": 5, "message": "", "exit_code": 0}
        assert judge(said, 241, None).exit_code == 0
        said = {"state": "failed", "step": 5, "message": "disk full", "exit_code": 5}
        assert judge(said, 0, None).exit_code == 5

    @pytest.mark.parametrize("code", [0, 1, -9, 247])
    def test_a_run_that_died_has_failed_whatever_the_code(self, code: int) -> None:
        said = {"state": "running", "step": 1234, "message": "", "exit_code": 1}
        outcome = judge(said, code, None)
        assert (outcome.state, outcome.exit_code) == ("failed", LaunchError.exit_code)
        assert "1,234" in outcome.message

    def test_a_killed_rank_is_named_although_the_others_only_saw_a_lost_connection(self) -> None:
        said = {"state": "failed", "step": 5, "message": "connection closed", "exit_code": 1}
        outcome = judge(said, 247, None)
        assert outcome.exit_code == LaunchError.exit_code
        assert "killed by signal 9" in outcome.message
        assert judge(said, 1, None).exit_code == 1

    def test_errors_before_training_keep_their_code(self) -> None:
        assert judge(None, 4, None).exit_code == 4

    def test_a_stop_before_training_loses_nothing(self) -> None:
        assert judge(None, 241, "SIGTERM").exit_code == 75


class TestPlan:
    def config(self, *overrides: str) -> Config:
        return compose(["model=tiny", *overrides, *DATA])

    def test_threads_share_the_cores_and_the_cpu_is_said_to_be_one(self) -> None:
        plan = plan_launch(self.config("run.device=cpu", "parallel.data_parallel_size=2"), {})
        assert plan.environment["DS_ACCELERATOR"] == "cpu"
        assert int(plan.environment["OMP_NUM_THREADS"]) == max(1, module._cores() // 2)
        plan = plan_launch(self.config("run.device=cpu"), {"OMP_NUM_THREADS": "3"})
        assert "OMP_NUM_THREADS" not in plan.environment
        plan = plan_launch(
            self.config("run.device=cpu", "parallel.threads_per_rank=5"), {"OMP_NUM_THREADS": "3"}
        )
        assert plan.environment["OMP_NUM_THREADS"] == "5"

    def test_the_printed_command_can_be_pasted(self) -> None:
        assert module.LAUNCHER_PID not in str(plan_launch(self.config("run.device=cpu"), {}))

    def test_chosen_gpus_are_kept(self) -> None:
        """--num_gpus would make DeepSpeed take GPUs 0 and 1 instead."""
        config = self.config("run.device=cuda", "parallel.data_parallel_size=2")
        plan = plan_launch(config, {"CUDA_VISIBLE_DEVICES": "3,5,7"})
        assert "--num_gpus" not in plan.command
        assert plan.environment["CUDA_VISIBLE_DEVICES"] == "3,5"
        with pytest.raises(ConfigError, match="shows 1 GPUs, the layout needs 2"):
            plan_launch(config, {"CUDA_VISIBLE_DEVICES": "3"})
        with pytest.raises(ConfigError, match="numbers only"):
            plan_launch(config, {"CUDA_VISIBLE_DEVICES": "GPU-abc,GPU-def"})

    def test_hosts_get_a_keep_alive_and_an_environment_file(self, tmp_path: Path) -> None:
        hostfile = tmp_path / "hosts"
        hostfile.write_text("n1 slots=2\nn2 slots=2\n")
        plan = plan_launch(self.config(f"parallel.hostfile={hostfile}", "run.device=cpu"), {})
        assert plan.hosts == ("n1", "n2")
        assert "ServerAliveInterval" in plan.environment["PDSH_SSH_ARGS_APPEND"]
        module._write_environment_file(plan, tmp_path / "env")
        lines = (tmp_path / "env").read_text().splitlines()
        assert "DS_ACCELERATOR=cpu" in lines
        assert all("=" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("n1 slots=2\nn1 slots=2", ":2: host n1 is named twice"),
        ("n1", ":1: 'n1'; write NAME slots=RANKS"),
        ("# hosts\nn1 slots=0", ":2:"),
        ("n1 slots=2 slots=3", ":1:"),
    ],
)
def test_hostfiles_that_deepspeed_would_misread(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_a_missing_hostfile_is_an_error_not_a_local_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read parallel\.hostfile"):
        read_hostfile(tmp_path / "nowhere")


def test_hostfile_with_comments(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two machines\n\nn1 slots=2\n n2   slots=4 # the big one\n")
    assert read_hostfile(tmp_path / "hosts") == {"n1": 2, "n2": 4}


def test_earlier_configurations_of_a_run_are_kept(tmp_path: Path) -> None:
    config = compose(["model=tiny", f"run.root={tmp_path}", *DATA])
    for epochs in (1, 1, 2, 3):
        path = write_run(compose([f"data.epochs={epochs}"], write_run(config)))
        config = load_config(path)
    assert config.data.epochs == 3
    kept = [load_config(path.parent / f"config.{n}.yaml").data.epochs for n in (1, 2)]
    assert kept == [1, 2]
    assert len(list(path.parent.glob("config*.yaml"))) == 3


def test_an_unwritable_place_for_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="cannot use the run folder"),
        exclusive(tmp_path / "file" / "run"),
    ):
        pass
    assert json.dumps(judge(None, 0, None).to_dict())
