"""Ranks on one machine: environment, exit codes, failures, signals, orphans; and what a rank does around the training."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from jobs.cluster import LAUNCHER_PID, REPO_ROOT, describe_exit, environment_from_srun, first_host, free_port, rank_environment
from nepa_dist.config_load import load_config

LAUNCHER = """
import signal, sys
if sys.argv[5] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
else:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
from jobs.cluster import run_local
command = [sys.executable, "-c", sys.argv[3]]
sys.exit(run_local(sys.argv[1], int(sys.argv[2]), command=command, grace_seconds=float(sys.argv[4])))
"""
PRELUDE = """
import json, os, pathlib, signal, sys, time
from jobs.runner import die_with_launcher
die_with_launcher()
rank = int(os.environ["RANK"])
folder = pathlib.Path(os.environ["TEST_FOLDER"])
def note(name, text):
    with (folder / f"{name}-{rank}").open("a") as file:
        file.write(str(text))
def sleep():
    time.sleep(120)
    os._exit(99)
"""
RECORD_SIGNALS = """
def handler(number, frame):
    note("signals", f"{signal.Signals(number).name} ")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, handler)
note("ready", os.getpid())
deadline = time.monotonic() + 60
while not (folder / f"signals-{rank}").exists() and time.monotonic() < deadline:
    time.sleep(0.02)
time.sleep(0.3)  # a second delivery would arrive by now
os._exit(75)
"""


class Launcher:
    """A launcher process whose ranks execute a piece of Python."""

    def __init__(self, folder: Path, world_size: int, code: str, *, grace: float = 60.0, mode: str = "plain") -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(folder / "run"), str(world_size), PRELUDE + code, str(grace), mode],
            env={**os.environ, "TEST_FOLDER": str(folder), "PYTHONPATH": str(REPO_ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def read(self, name: str, rank: int) -> str:
        """What the rank has noted, once it is there."""
        path = self.folder / f"{name}-{rank}"
        wait_for(lambda: path.exists() and path.read_text() != "", f"{path.name} to appear")
        return path.read_text()


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def by_rank(actions: Sequence[str]) -> str:
    return f"exec({list(actions)!r}[rank])"


def test_each_rank_gets_its_environment_and_its_place_for_output(tmp_path: Path) -> None:
    code = """
note("env", json.dumps({**os.environ, "sid": os.getsid(0), "pid": os.getpid()}))
print("out of", rank)
print("err of", rank, file=sys.stderr)
"""
    status, out, err = Launcher(tmp_path, 3, code).finish()
    assert status == 0
    envs = [json.loads((tmp_path / f"env-{rank}").read_text()) for rank in range(3)]
    assert [env["RANK"] for env in envs] == [env["LOCAL_RANK"] for env in envs] == ["0", "1", "2"]
    assert {env["WORLD_SIZE"] for env in envs} == {env["LOCAL_WORLD_SIZE"] for env in envs} == {"3"}
    assert {env["MASTER_ADDR"] for env in envs} == {"127.0.0.1"}
    assert len({int(env["MASTER_PORT"]) for env in envs}) == 1
    assert all(env["sid"] == env["pid"] for env in envs), "each rank leads a session of its own"
    assert (out, err) == ("out of 0\n", "err of 0\n")
    for rank in (1, 2):
        log = (tmp_path / "run" / "logs" / f"rank-{rank}.txt").read_text().splitlines()
        assert sorted(log[1:]) == [f"err of {rank}", f"out of {rank}"]


def test_the_environment_of_the_caller_is_kept() -> None:
    base = {"OMP_NUM_THREADS": "5", "PYTHONPATH": "/elsewhere", "RANK": "7", "OTHER": "x"}
    env = rank_environment(1, 2, 1234, base)
    assert (env["OMP_NUM_THREADS"], env["OTHER"], env["RANK"], env["MASTER_PORT"]) == ("5", "x", "1", "1234")
    assert env["PYTHONPATH"].split(os.pathsep) == [str(REPO_ROOT), "/elsewhere"]


@pytest.mark.parametrize("world_size", [1, 2, 1000])
def test_threads_share_the_cores(world_size: int) -> None:
    threads = int(rank_environment(0, world_size, 1, {})["OMP_NUM_THREADS"])
    assert threads == max(1, len(os.sched_getaffinity(0)) // world_size)


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((0, 75), 75), ((75, 75), 75), ((0, 3), 3), ((2, 0), 2)])
def test_exit_codes_become_one(tmp_path: Path, codes: tuple[int, ...], expected: int) -> None:
    assert Launcher(tmp_path, len(codes), f"os._exit({codes!r}[rank])").finish()[0] == expected


def test_a_failing_rank_is_named_and_the_others_are_asked_to_stop(tmp_path: Path) -> None:
    waits = """
def stop(number, frame):
    note("stopped", signal.Signals(number).name)
    os._exit(75)
signal.signal(signal.SIGTERM, stop)
note("ready", 1)
sleep()
"""
    fails = """
while not all((folder / f"ready-{other}").exists() for other in (0, 2)):
    time.sleep(0.02)
print("the disk is on fire")
os._exit(7)
"""
    status, _, err = Launcher(tmp_path, 3, by_rank([waits, fails, waits])).finish()
    assert status == 7
    assert "rank 1 ended with exit code 7" in err
    assert "the disk is on fire" in err
    assert "rank-1.txt" in err
    assert err.splitlines()[-1] == "the run failed: rank 1 ended with exit code 7"
    assert (tmp_path / "stopped-0").read_text() == (tmp_path / "stopped-2").read_text() == "SIGTERM"


def test_a_rank_that_will_not_stop_is_killed_after_the_grace(tmp_path: Path) -> None:
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN); note('ready', os.getpid()); sleep()"
    fails = "\nwhile not (folder / 'ready-0').exists():\n    time.sleep(0.02)\nos._exit(4)"
    launcher = Launcher(tmp_path, 2, by_rank([stubborn, fails]), grace=0.2)
    assert launcher.finish()[0] == 4
    assert not is_running(int(launcher.read("ready", 0)))


def test_a_rank_ended_by_a_signal_is_a_failure_with_its_name(tmp_path: Path) -> None:
    status, _, err = Launcher(tmp_path, 2, by_rank(["sleep()", "os.kill(os.getpid(), signal.SIGKILL)"])).finish()
    assert status == 1
    assert "rank 1 was ended by SIGKILL" in err
    assert "memory" in err


def test_the_report_shows_this_start_only_and_the_log_keeps_both(tmp_path: Path) -> None:
    for word in ("first", "second"):
        _, _, err = Launcher(tmp_path, 2, by_rank(["sleep()", f"print('the {word} failure'); sys.exit(1)"])).finish()
    log = (tmp_path / "run" / "logs" / "rank-1.txt").read_text()
    assert "the first failure" in log
    assert "the second failure" in log
    assert "the second failure" in err
    assert "the first failure" not in err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_each_signal_reaches_each_rank_once(tmp_path: Path, name: str) -> None:
    launcher = Launcher(tmp_path, 2, RECORD_SIGNALS)
    for rank in range(2):
        launcher.read("ready", rank)
    # To the whole process group, as a terminal does with Ctrl-C.
    os.killpg(launcher.process.pid, getattr(signal, name))
    assert launcher.finish()[0] == 75
    assert [launcher.read("signals", rank) for rank in range(2)] == [f"{name} "] * 2


def test_a_closed_terminal_asks_the_ranks_to_stop(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, 1, RECORD_SIGNALS)
    launcher.read("ready", 0)
    launcher.process.send_signal(signal.SIGHUP)
    assert launcher.finish()[0] == 75
    assert launcher.read("signals", 0) == "SIGTERM "


def test_under_nohup_a_closed_terminal_changes_nothing(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, 1, RECORD_SIGNALS, mode="nohup")
    launcher.read("ready", 0)
    launcher.process.send_signal(signal.SIGHUP)
    launcher.process.send_signal(signal.SIGUSR1)
    assert launcher.finish()[0] == 75
    assert launcher.read("signals", 0) == "SIGUSR1 "


def test_kill_9_of_the_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, 2, "signal.signal(signal.SIGTERM, signal.SIG_IGN); note('ready', os.getpid()); sleep()")
    pids = [int(launcher.read("ready", rank)) for rank in range(2)]
    assert all(map(is_running, pids))
    launcher.process.kill()
    launcher.process.communicate(timeout=60)
    wait_for(lambda: not any(map(is_running, pids)), "the ranks to end")


def test_a_rank_whose_launcher_is_already_gone_ends_at_once() -> None:
    code = "from jobs.runner import die_with_launcher; die_with_launcher(); print('alive')"
    for launcher, expected in ((os.getpid(), "alive\n"), (os.getppid(), "")):
        env = {**os.environ, LAUNCHER_PID: str(launcher), "PYTHONPATH": str(REPO_ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout == expected
        assert (done.returncode == 0) == bool(expected)


def test_a_command_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    from jobs.cluster import run_local

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        run_local(tmp_path, 2, command=["/no-such-program"])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("code", "words"), [(3, "exit code 3"), (-15, "SIGTERM"), (-9, "memory"), (-63, "signal 63")])
def test_an_exit_is_described(code: int, words: str) -> None:
    assert words in describe_exit(code)


RUNNER = """
import sys, types
train = types.ModuleType("nepa_dist.train")
exec(sys.argv[2], train.__dict__)
sys.modules["nepa_dist.train"] = train
from jobs.runner import main
sys.exit(main(sys.argv[1:2]))
"""


def run_rank(run_dir: Path, training: str, *, rank: int = 0, config: str | None = None) -> subprocess.CompletedProcess[str]:
    """One rank with a training of our own."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(load_config().to_yaml() if config is None else config)
    env = {key: value for key, value in os.environ.items() if key != LAUNCHER_PID}
    env |= {"RANK": str(rank), "PYTHONPATH": str(REPO_ROOT)}
    command = [sys.executable, "-c", RUNNER, str(run_dir), training]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_code_of_the_training_is_the_code_of_the_rank(tmp_path: Path, code: int) -> None:
    done = run_rank(
        tmp_path / "run", f"def main(config):\n    print('steps', config.steps)\n    return {code}", config="steps: 12"
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "steps 12\n", "")


def test_a_failure_has_a_traceback_in_the_log_and_one_clear_last_line(tmp_path: Path) -> None:
    training = "def main(config):\n    inner()\ndef inner():\n    raise RuntimeError('shapes differ')"
    for rank in (0, 3):
        done = run_rank(tmp_path / "run", training, rank=rank)
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert done.stderr.splitlines()[-1] == f"rank {rank} failed: RuntimeError: shapes differ"
    log = (tmp_path / "run" / "logs" / "rank-0.txt").read_text()
    assert "in inner" in log
    assert log.splitlines()[-1] == "rank 0 failed: RuntimeError: shapes differ"


def test_a_failure_does_not_wait_for_threads(tmp_path: Path) -> None:
    training = """
import threading
def main(config):
    threading.Thread(target=threading.Event().wait).start()
    raise RuntimeError('over')
"""
    assert run_rank(tmp_path / "run", training).returncode == 1


@pytest.mark.parametrize(
    "kind", [f"nepa_dist.{kind}" for kind in ("config.ConfigError(['it does not fit'])", "guard.RunInUse('it does not fit')")]
)
def test_a_users_mistake_is_told_without_a_traceback(tmp_path: Path, kind: str) -> None:
    module = kind.rpartition("(")[0].rpartition(".")[0]
    done = run_rank(tmp_path / "run", f"import {module}\ndef main(config):\n    raise {kind}")
    assert done.returncode == 2
    assert "it does not fit" in done.stderr
    assert "Traceback" not in done.stderr
    # Who finds another trainer there says nothing of how the run ends.
    assert (tmp_path / "run" / "job" / "outcome.json").exists() == ("RunInUse" not in kind)


def test_a_value_error_of_a_library_is_not_taken_for_a_users_mistake(tmp_path: Path) -> None:
    done = run_rank(tmp_path / "run", "def main(config):\n    raise ValueError('bad dtype')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_broken_configuration_is_told(tmp_path: Path) -> None:
    done = run_rank(tmp_path / "run", "def main(config):\n    return 0", config="stepz: 3")
    assert done.returncode == 2
    assert "stepz" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_signal_before_the_training_listens_is_a_stopped_run(tmp_path: Path) -> None:
    training = """
import os, signal, time
def main(config):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    done = run_rank(tmp_path / "run", training)
    assert done.returncode == 75
    assert "SIGTERM" in done.stderr


def test_a_rank_that_stopped_alone_ends_the_others_and_asks_to_be_run_again(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, 2, "rank or os._exit(75)\ntime.sleep(60)", grace=0.2)
    assert launcher.finish()[0] == 75


def test_errors_of_ranks_that_lost_a_stopped_one_are_no_failure(tmp_path: Path) -> None:
    stops = "note('pid', os.getpid())\nos._exit(75)"
    fails = """
while not (folder / "pid-0").exists() or not (folder / "pid-0").read_text():
    time.sleep(0.02)
try:
    while True:  # until the launcher has seen how it ended
        os.kill(int((folder / "pid-0").read_text()), 0)
        time.sleep(0.02)
except ProcessLookupError:
    os._exit(1)
"""
    assert Launcher(tmp_path, 2, by_rank([stops, fails])).finish()[0] == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGALRM])
def test_a_rank_ended_by_the_default_action_of_a_stop_signal_asks_to_be_run_again(tmp_path: Path, number: int) -> None:
    assert Launcher(tmp_path, 1, f"os.kill(os.getpid(), {int(number)})").finish()[0] == 75


def test_ranks_of_srun_find_each_other() -> None:
    env = {
        "SLURM_PROCID": "9",
        "SLURM_NTASKS": "11",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
        "SLURM_STEP_NODELIST": "gpu[007-008,020]",
        "SLURM_JOB_ID": "1234567",
        "SLURM_STEP_ID": "0",
    }
    found = environment_from_srun(env)
    assert found == {
        "RANK": "9",
        "WORLD_SIZE": "11",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": found["MASTER_PORT"],
    }
    assert 20000 <= int(found["MASTER_PORT"]) < 32000
    assert environment_from_srun(env | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})["MASTER_PORT"] == found["MASTER_PORT"]
    assert environment_from_srun(env | {"RANK": "0"}) == {}
    assert environment_from_srun({"SLURM_JOB_ID": "1"}) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[007-012,020],login1", "gpu007"), ("n1,n2", "n1"), ("n[3,5]-ib", "n3-ib"), ("", "127.0.0.1"), ("solo", "solo")],
)
def test_first_host_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
