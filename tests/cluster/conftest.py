"""A SLURM of one node, started for the session on free ports with its own munge key.

Needs root and Debian's slurm-wlm and munge; without them the tests are skipped and say why. It has
no cgroups, no database and no network beyond the loopback interface.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "munge")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
CryptoType=crypto/munge
# The expiry of credentials is also the time a requeued job waits (default 120 s).
AuthInfo=socket={folder}/munge/socket,cred_expire=10
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
JobRequeue=1
AccountingStorageType=accounting_storage/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 CoresPerSocket=8 RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=24:00:00 State=UP
"""


def wait_for(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Poll until the condition holds; fails the test after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"timed out waiting for {what}"
        time.sleep(0.25)


@dataclass
class Slurm:
    """A running SLURM; commands find it through SLURM_CONF."""

    folder: Path

    def command(self, *arguments: str, cwd: Path | None = None) -> str:
        """Standard output of a client command; raises when it fails."""
        environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        done = subprocess.run(
            arguments, cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says about a job."""
        words = self.command("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """SLURM for the whole session."""
    if os.geteuid() != 0:
        pytest.skip("starting slurmd needs root")
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: slurm-wlm munge)")
    folder = tmp_path_factory.mktemp("slurm")
    for inner in ("munge", "state", "spool"):
        (folder / inner).mkdir(mode=0o755)
    folder.chmod(0o755)
    _write_configuration(folder)
    started = [_munge(folder)]
    try:
        for daemon in ("slurmctld", "slurmd"):
            with (folder / f"{daemon}.out").open("w") as out:
                started.append(
                    subprocess.Popen(
                        [daemon, "-D", "-f", str(folder / "slurm.conf")],
                        stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                    )
                )  # fmt: skip
        cluster = Slurm(folder)
        wait_for(lambda: _is_idle(cluster), f"an idle node; logs in {folder}", 60)
        yield cluster
        # What a failed test left behind would outlive the daemons.
        cluster.command("scancel", "--user=root")
        wait_for(lambda: not cluster.command("squeue", "-h"), "cancelled jobs to end", 60)
    finally:
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_idle(cluster: Slurm) -> bool:
    environment = {**os.environ, "SLURM_CONF": str(cluster.folder / "slurm.conf")}
    done = subprocess.run(
        ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() == "idle"


def _write_configuration(folder: Path) -> None:
    ports = []
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    for listener in listeners:
        ports.append(listener.getsockname()[1])
        listener.close()
    text = CONFIGURATION.format(
        host=socket.gethostname().split(".")[0],
        folder=folder,
        controller_port=ports[0],
        node_port=ports[1],
    )
    (folder / "slurm.conf").write_text(text)
    # slurmd 22.05 always loads a cgroup plugin, used or not, and fails where it cannot guess which.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")


def _munge(folder: Path) -> subprocess.Popen[bytes]:
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log",
             "seed-file": "seed"}  # fmt: skip
    options = [f"--{option}={folder / 'munge' / name}" for option, name in files.items()]
    process = subprocess.Popen(
        ["munged", "--foreground", "--force", *options], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    wait_for((folder / "munge" / "socket").exists, "munged", 20)
    return process
