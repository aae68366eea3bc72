"""A SLURM cluster of one node in a folder: munged, slurmctld and slurmd as plain processes, no systemd.

python tests/slurm_here.py <new folder>     runs it until Ctrl-C and prints SLURM_CONF, which clients need
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
CONF = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={other}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
ReturnToService=2
MpiDefault=none
KillWait=5
MinJobAge=3600
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return why there can be no cluster here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge)"
    return None if os.geteuid() == 0 else "a cluster in a folder is started by root"


class Cluster:
    """The daemons, their folder and the commands that talk to them."""

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.folder, self.cpus, self.host = folder, cpus, socket.gethostname().partition(".")[0]
        self.conf = folder / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start the daemons and wait until the node is idle."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 * 9 // 10
        ports = {"port": _free_port(), "other": _free_port()}
        self.conf.write_text(
            CONF.format(folder=self.folder, host=self.host, cpus=self.cpus, memory=memory, **ports)
        )
        key = self.folder / "munge.key-file"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.begin("munged")
        until((self.folder / "munge.socket").exists, "munged has no socket")
        self.begin("slurmctld")
        self.begin("slurmd")
        until(lambda: self.state() == "idle", "the node is not idle")

    def begin(self, name: str) -> None:
        """Start a daemon that stays in the foreground of its process."""
        options = ["-D", "-f", str(self.conf), *(["-N", self.host] if name == "slurmd" else [])]
        if name == "munged":
            files = ("key-file", "socket", "pid-file", "log-file", "seed-file")
            options = [
                "--foreground",
                "--force",
                *(f"--{file}={self.folder / 'munge'}.{file}" for file in files),
            ]
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                [name, *options], stdout=out, stderr=out, env=self.environment()
            )

    def end(self, name: str) -> None:
        """Stop a daemon."""
        daemon = self.daemons.pop(name)
        daemon.terminate()
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def stop(self) -> None:
        """Cancel all jobs and stop the daemons."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self.say("scancel", "--user=root")
            until(lambda: not self.say("squeue", "-h"), "jobs do not end")
        for name in reversed(list(self.daemons)):
            self.end(name)

    def environment(self) -> dict[str, str]:
        """Return the environment of clients."""
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def say(self, *command: str) -> str:
        """Return what a client prints."""
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def state(self) -> str:
        """Return the node's state."""
        try:
            return self.say("sinfo", "-h", "-o", "%T")
        except subprocess.CalledProcessError:
            return "unknown"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def until(holds: Callable[[], bool], problem: str, seconds: float = 60.0) -> None:
    """Wait until `holds()`; raise TimeoutError with the problem if it never does."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(problem)
        time.sleep(0.2)


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: sys.exit())
    cluster = Cluster(Path(sys.argv[1]).absolute())
    try:
        cluster.start()
        print(f"export SLURM_CONF={cluster.conf}", flush=True)
        signal.pause()
    finally:
        cluster.stop()
