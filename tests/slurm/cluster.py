"""A real SLURM on this machine, for tests: a controller, several nodes, accounting; all on 127.0.0.1, all in one folder.

``python tests/slurm/cluster.py start FOLDER`` starts it and prints how to use it, ``stop FOLDER`` ends it. It needs root and
Debian's packages (``apt-get install munge slurmctld slurmd slurm-client slurmdbd mariadb-server-core mariadb-client-core``).
Nothing outside of the folder is touched, and only processes that it started itself are ended.

The nodes ``node1``, ``node2``, ... are daemons of this machine that claim 4 cores and 8 GPUs each. Their GPUs are device files
that nobody opens.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "sbatch", "mariadbd", "mariadb-install-db")
PACKAGES = "munge slurmctld slurmd slurm-client slurmdbd mariadb-server-core mariadb-client-core"
CORES, GPUS, MEMORY_MB = 4, 8, 8000

# Times are short: a dead node is seen after 15 s, a requeued job starts again after 5 s, TERM and KILL are 5 s apart.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
DefMemPerCPU=100
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=15
MinJobAge=600
KillWait=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=UsePss,OverMemoryKill
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge.sock
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations
GresTypes=gpu
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_port}-{last_node_port}] CPUs={cores} \
RealMemory={memory} Gres=gpu:h100:{gpus} State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=2-00:00:00 DefaultTime=10
PartitionName=urgent Nodes=ALL Default=NO PriorityTier=10 PreemptMode=OFF MaxTime=60 DefaultTime=10
"""
GRES_CONF = """\
AutoDetect=off
NodeName=node[1-{nodes}] Name=gpu Type=h100 File={folder}/gpu/nvidia[0-{last_gpu}]
"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""
SQL = """
create database if not exists slurm;
create user if not exists 'slurm'@'127.0.0.1' identified by 'slurm';
create user if not exists 'slurm'@'localhost' identified by 'slurm';
grant all on slurm.* to 'slurm'@'127.0.0.1';
grant all on slurm.* to 'slurm'@'localhost';
"""


def why_not() -> str:
    """Why no cluster can be started here; empty if one can."""
    if os.geteuid() != 0:
        return "a SLURM of our own needs root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"{', '.join(missing)} not installed (apt-get install {PACKAGES})" if missing else ""


class Cluster:
    """A cluster in a folder.

    Args:
        folder: made if missing; short, because sockets lie in it.
        nodes: how many.
    """

    def __init__(self, folder: Path, nodes: int = 4) -> None:
        self.folder, self.nodes = folder.absolute(), nodes
        self.conf = self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make SLURM's commands talk to this cluster."""
        return {"SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        """Start everything and wait until all nodes are idle."""
        for name in ("state", "spool", "gpu"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        self._write_files()
        socket_path = self.folder / "munge.sock"
        places = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._run("munged", "--force", f"--socket={socket_path}", *places)
        self._start_database()
        self._run("slurmdbd")
        wait_for(lambda: self.ask("sacctmgr", "-n", "show", "cluster") is not None, 60, "slurmdbd")
        for what in (["cluster", "test"], ["account", "lab", "cluster=test"], ["user", "root", "account=lab", "cluster=test"]):
            self.ask("sacctmgr", "-i", "add", *what)
        self._run("slurmctld", "-f", str(self.conf))
        wait_for(lambda: self.ask("scontrol", "ping") is not None, 30, "slurmctld")
        for number in range(1, self.nodes + 1):
            self.start_node(f"node{number}")
        wait_for(lambda: self._count_idle() == self.nodes, 60, "idle nodes")

    def stop(self) -> None:
        """End all jobs and all processes of the cluster, the controller first."""
        for name in [f"node{number}" for number in range(1, self.nodes + 1)]:
            self.kill_node(name)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munge"):
            self._end(self.folder / f"{name}.pid", signal.SIGKILL)

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        self._run("slurmd", "-f", str(self.conf), "-N", name)

    def kill_node(self, name: str) -> None:
        """As a power failure: the daemon of a node and all processes of its jobs are killed at once."""
        daemon = self._end(self.folder / f"slurmd-{name}.pid", signal.SIGKILL)
        kill([*job_processes(name, self.conf), *([daemon] if daemon else [])])

    def ask(self, *command: str) -> str | None:
        """Output of one of SLURM's commands; None if it fails."""
        environment = {**os.environ, **self.environment}
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
            return done.stdout if done.returncode == 0 else None
        return None

    def _count_idle(self) -> int:
        found = self.ask("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %t") or ""
        return sum(line.endswith(" idle") for line in found.splitlines())

    def _write_files(self) -> None:
        if self.conf.exists():  # the same ports again
            return
        base = free_ports(4 + self.nodes)
        values = {
            "folder": self.folder,
            "host": socket.gethostname().split(".")[0],
            "port": base,
            "dbd_port": base + 1,
            "sql_port": base + 2,
            "node_port": base + 3,
            "last_node_port": base + 2 + self.nodes,
            "nodes": self.nodes,
            "cores": CORES,
            "gpus": GPUS,
            "last_gpu": GPUS - 1,
            "memory": MEMORY_MB,
        }
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for number in range(GPUS):
            device = self.folder / "gpu" / f"nvidia{number}"
            if not device.exists():
                os.mknod(device, 0o20666, os.makedev(195, number))
        (self.folder / "gres.conf").write_text(GRES_CONF.format(**values))
        database = self.folder / "slurmdbd.conf"
        database.touch(mode=0o600)
        database.write_text(SLURMDBD_CONF.format(**values))
        (self.folder / "sql-port").write_text(str(values["sql_port"]))
        self.conf.write_text(SLURM_CONF.format(**values))

    def _start_database(self) -> None:
        data = self.folder / "mysql"
        place = f"--socket={self.folder}/mysql.sock"
        if not (data / "mysql").exists():
            how = "--auth-root-authentication-method=normal"
            self._run("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", how, "--skip-test-db")
        options = ["--user=root", f"--datadir={data}", place, f"--pid-file={self.folder}/mariadbd.pid"]
        options += ["--bind-address=127.0.0.1", f"--port={(self.folder / 'sql-port').read_text()}", "--skip-log-bin"]
        options += ["--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0"]
        with (self.folder / "mariadbd.log").open("ab") as log:
            subprocess.Popen(["mariadbd", "--no-defaults", *options], stdout=log, stderr=log, start_new_session=True)
        client = ["mariadb", "--no-defaults", place, "--user=root"]
        wait_for(lambda: self.ask(*client, "--execute=select 1") is not None, 60, "mariadbd")
        self._run(*client, f"--execute={SQL}")

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed ({done.returncode}): {done.stderr or done.stdout}; logs: {self.folder}")

    @staticmethod
    def _end(pid_file: Path, number: signal.Signals) -> int | None:
        try:
            pid = int(pid_file.read_text())
        except (OSError, ValueError):
            return None
        pid_file.unlink()
        kill([pid], number)
        return pid


def job_processes(node: str, conf: Path) -> list[int]:
    """Processes that belong to jobs on one node of one cluster: by their environment, and the daemons that watch over them."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
            ours = f"SLURM_CONF={conf}".encode() in variables
            is_job = ours and f"SLURMD_NODENAME={node}".encode() in variables
            is_step = words[0].startswith(b"slurmstepd") and _step_is_of(int(entry.name), node, conf)
            if is_job or is_step:
                found.append(int(entry.name))
    return found


def _step_is_of(pid: int, node: str, conf: Path) -> bool:
    """Whether a step daemon has its socket in the spool folder of a node."""
    spool = f"{conf.parent}/spool/{node}/"
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            target = os.readlink(link)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    for line in Path("/proc/net/unix").read_text().splitlines():
        fields = line.split()
        if len(fields) >= 8 and fields[6] in inodes and fields[7].startswith(spool):
            return True
    return False


def kill(pids: Iterable[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to processes and wait until they are gone."""
    pids = list(pids)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    wait_for(lambda: not any(_is_running(pid) for pid in pids), 20, f"processes {pids} to end")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def free_ports(count: int) -> int:
    """First of some neighbouring TCP ports of 127.0.0.1 that nobody listens on."""
    for base in range(17000, 19000, 20):
        with suppress(OSError):
            for port in range(base, base + count):
                with socket.socket() as server:
                    server.bind(("127.0.0.1", port))
            return base
    raise RuntimeError("no free ports")


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it did not in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(0.1)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["start", "stop", "kill-node", "start-node"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("node", nargs="?")
    parser.add_argument("--nodes", type=int, default=4)
    args = parser.parse_args()
    if args.action == "start" and (reason := why_not()):
        print(reason, file=sys.stderr)
        return 1
    cluster = Cluster(args.folder, args.nodes)
    if args.action == "start":
        cluster.start()
        print(f"export SLURM_CONF={cluster.conf}")
    elif args.action == "stop":
        cluster.stop()
    else:
        {"kill-node": cluster.kill_node, "start-node": cluster.start_node}[args.action](args.node)
    return 0


if __name__ == "__main__":
    sys.exit(main())
