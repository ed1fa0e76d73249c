"""Data preparation through the launcher: here, as SLURM jobs that are only shown, with a stand-in for sbatch, and for real."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import cli
from images import image_folder
from jobs import cluster, doctor, prepare, submit
from nepa_dist.data.open import open_container

SCRIPT = cluster.REPO_ROOT / "jobs" / "submit.py"
FAST = ("--container", "mds", "--policy", "short32", "--split", "train", "--quiet", "--shards", "3")

GOLDEN = """\
#!/bin/bash
set -eu
PYTHONPATH='/app/nepa dist'${PYTHONPATH:+:$PYTHONPATH} /app/bin/python -P -m data_prep plan \
--split=train --shards=64 --name=set1 '/data/raw set' /scratch/out
mkdir -p /scratch/out/logs
cd /scratch/out/logs
unset SBATCH_JOB_NAME SBATCH_ARRAY_INX SBATCH_OUTPUT SBATCH_NODES SBATCH_NTASKS SBATCH_CPUS_PER_TASK \
SBATCH_PARTITION SBATCH_ACCOUNT SBATCH_TIMELIMIT SBATCH_MEM_PER_NODE SBATCH_OPEN_MODE SBATCH_REQUEUE
job=$(sbatch --parsable <<'END'
#!/bin/bash
#SBATCH --job-name=nepa-prepare
#SBATCH --array=0-15
#SBATCH --output=write-%A_%a.txt
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --partition=cpu,long
#SBATCH --account=lab-1
#SBATCH --time=1-00:00:00
#SBATCH --mem=16G
#SBATCH --open-mode=append
#SBATCH --requeue
export PYTHONPATH='/app/nepa dist'${PYTHONPATH:+:$PYTHONPATH}
exec /app/bin/python -P -m data_prep write --split=train '/data/raw set' /scratch/out --workers "$SLURM_CPUS_PER_TASK"
END
)
sbatch --parsable --dependency=afterok:"${job%%;*}" --kill-on-invalid-dep=yes <<'END'
#!/bin/bash
#SBATCH --job-name=nepa-verify
#SBATCH --output=verify-%j.txt
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --partition=cpu,long
#SBATCH --account=lab-1
#SBATCH --time=1-00:00:00
#SBATCH --mem=16G
#SBATCH --open-mode=append
#SBATCH --requeue
export PYTHONPATH='/app/nepa dist'${PYTHONPATH:+:$PYTHONPATH}
exec /app/bin/python -P -m data_prep verify --level=hash /scratch/out --workers "$SLURM_CPUS_PER_TASK"
END
"""

# Keeps its words, variables and script, then runs the script as SLURM would, but for the tasks in $SKIP.
STAND_IN = """\
#!/bin/bash
set -eu
number=$(( $(cat "$RECORD/number" 2>/dev/null || echo 40) + 1 ))
echo "$number" > "$RECORD/number"
[ ! -e "$RECORD/refuse-$number" ] || { echo "sbatch: error: no" >&2; exit 1; }
printf '%s\\0' "$@" > "$RECORD/$number.words"
env > "$RECORD/$number.env"
cat > "$RECORD/$number.script"
export SLURM_CPUS_PER_TASK=1
case "$*" in
*afterok*) [ -e "$RECORD/failed" ] || bash "$RECORD/$number.script" > "verify-$number.txt" 2>&1 ;;
*)
  rm -f "$RECORD/failed"
  export SLURM_ARRAY_TASK_COUNT=3 SLURM_ARRAY_TASK_MIN=0 SLURM_ARRAY_TASK_MAX=2 SLURM_ARRAY_TASK_STEP=1
  for SLURM_ARRAY_TASK_ID in 0 1 2; do
    export SLURM_ARRAY_TASK_ID
    case " ${SKIP:-} " in *" $SLURM_ARRAY_TASK_ID "*) touch "$RECORD/failed"; continue ;; esac
    bash "$RECORD/$number.script" > "write-${number}_$SLURM_ARRAY_TASK_ID.txt" 2>&1 || touch "$RECORD/failed"
  done ;;
esac
echo "$number;sim"
"""

Run = Callable[..., int]


@pytest.fixture(autouse=True)
def _no_job_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF":
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw") / "tiny"
    image_folder(root / "train", num_classes=3, per_class=5)
    return root


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for sbatch on PATH; the folder of what it notes."""
    _executable(tmp_path / "bin" / "sbatch", STAND_IN)
    (tmp_path / "record").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    return tmp_path / "record"


def _executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run(*words: object) -> int:
    return submit.main(["prepare", *map(str, words)])


def test_the_commands_are_dispatched_and_named_by_the_help(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "main", lambda rest: 40 + len(rest))
    assert submit.main(["doctor", "--data", "x"]) == 42
    monkeypatch.setattr(cli, "main", lambda rest: print(*rest) or 7)  # type: ignore[func-returns-value]
    assert run(source, "out", "--shards", "3", "--workers", "2") == 7
    assert capsys.readouterr().out == f"prepare {source} out --shards 3 --workers 2\n"
    assert submit.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "submit.py prepare SOURCE OUT" in text
    assert "submit.py doctor --data" in text


def test_it_prepares_here(source: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), "prepare", str(source), "out", *FAST, "--workers", "1"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "good (level hash)" in done.stdout
    assert run(source / "nothing", tmp_path / "other", *FAST) == 2


def test_print_shows_both_scripts_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/app/bin/python")
    monkeypatch.setattr(prepare, "REPO_ROOT", Path("/app/nepa dist"))
    monkeypatch.setenv("PATH", "")  # works without SLURM
    monkeypatch.chdir(tmp_path)
    options = "--array 16 --cpus-per-task 8 --partition cpu,long --account lab-1 --time 1-00:00:00 --mem 16G --print"
    assert run("/data/raw set", "/scratch/out", *options.split(), "--split", "train", "--shards", 64, "--name", "set1") == 0
    assert capsys.readouterr().out == GOLDEN
    assert list(tmp_path.iterdir()) == []


def test_relative_paths_hold_in_the_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = ("--val-labels", "labels.txt", "--skip-bad-list", "bad.jsonl")
    assert run("raw", "../out", *files, "--array", 1, "--print") == 0
    text = capsys.readouterr().out
    for path in ("raw", "labels.txt", "bad.jsonl"):
        assert f"{tmp_path}/{path}" in text
    assert f" {tmp_path.parent}/out --workers" in text


def test_no_option_of_the_preparation_is_forgotten() -> None:
    parser = argparse.ArgumentParser()
    cli.add_prepare_options(parser)
    known = {*prepare._SOURCE_OPTIONS, *prepare._PLAN_OPTIONS, "source", "out", "workers", "quiet"}
    assert set(vars(parser.parse_args(["a", "b"]))) == known


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--array", "0"], ["--array 0", "at least 1"]),
        (["--array", "2", "--cpus-per-task", "0"], ["--cpus-per-task 0"]),
        (["--array", "2", "--workers", "4"], ["--workers", "--cpus-per-task"]),
        (["--partition", "gpu", "--print"], ["--partition is about jobs", "--print is about jobs", "--array"]),
        (["--array", "2", "--partition", "a b"], ["--partition 'a b'", "letters"]),
        (["--array", "2", "--partition", "gpu\n#SBATCH --wrap=x"], ["--partition 'gpu\\n#SBATCH"]),
        (
            ["--array", "2", "--account", "$(id)", "--qos=-x", "--time", "soon", "--mem", "1 G"],
            ["(id)", "-x", "soon", "1 G"],
        ),
        (["--array", "2", "--time", "10\n"], ["--time '10\\n'"]),
        (["--array", "2", "--time", "\u0661\u0660"], ["--time"]),
        (["--array", "2", "--name", "a\nb"], ["a\\nb", "line break"]),
        (["--array", "2", "--val-labels", "a\x1b[2Kb"], ["a\\x1b[2Kb", "control character"]),
        (["--array", "2", "--image-column", "a\u2028b"], ["line break"]),
        (["--array", "2", "--label-column", "a\udcffb"], ["UTF-8"]),
    ],
)
@pytest.mark.parametrize("shown", [True, False])
def test_mistakes_are_refused_before_anything_happens(
    options: list[str],
    words: list[str],
    shown: bool,
    source: Path,
    tmp_path: Path,
    record: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(source, tmp_path / "out", *options, *(["--print"] if shown and "--print" not in options else [])) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nothing was submitted:")
    for word in words:
        assert word in captured.err
    assert not (tmp_path / "out").exists()
    assert list(record.iterdir()) == []


@pytest.mark.parametrize("name", ["50%", "a\\b"])
def test_a_path_that_slurm_would_change_is_refused(name: str, source: Path, tmp_path: Path, record: Path) -> None:
    """Also behind a link, for a job's working folder is the real one."""
    (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / name)
    for out in (tmp_path / name, tmp_path / "link"):
        assert run(source, out, *FAST, "--array", 2) == 2
    assert list((tmp_path / name).iterdir()) == []


def test_without_sbatch_it_says_what_else_can_be_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(source, tmp_path / "out", *FAST, "--array", 2) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 2
    for word in ("sbatch is not on PATH", "--print", "no --array"):
        assert word in text
    assert not (tmp_path / "out").exists()


def test_mistakes_of_the_plan_come_before_the_jobs(
    source: Path, tmp_path: Path, record: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SKIP", "0 1 2")
    assert run(source, tmp_path / "out", *FAST[:-1], "99", "--array", 2) == 2
    assert "the number of shards must be 1 to 15" in capsys.readouterr().err
    assert run(source, tmp_path / "out", *FAST, "--array", 2) == 0
    assert run(source, tmp_path / "out", *FAST, "--seed", 1, "--array", 2) == 2
    assert "holds another plan" in capsys.readouterr().err
    assert (record / "number").read_text() == "42\n"


def test_jobs_do_what_preparing_here_does_and_the_same_command_goes_on(
    source: Path, tmp_path: Path, record: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("SBATCH_PARTITION", "SBATCH_ARRAY_INX", "SBATCH_TIMELIMIT", "SBATCH_OUTPUT", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "9")
    out = tmp_path / "it's $HOME"
    command = (source, out.name, *FAST, "--array", 3, "--partition", "cpu", "--time", "60")
    monkeypatch.setenv("SKIP", "1")  # as if it had been killed
    assert run(*command) == 0
    assert "job 41 writes the shards, then job 42 verifies them" in capsys.readouterr().out
    assert (record / "41.words").read_bytes().split(b"\0") == [b"--parsable", b""]
    after = [b"--parsable", b"--dependency=afterok:41", b"--kill-on-invalid-dep=yes", b""]
    assert (record / "42.words").read_bytes().split(b"\0") == after
    variables = [line for line in (record / "41.env").read_text().splitlines() if line.startswith("SBATCH_")]
    assert variables == ["SBATCH_ACCOUNT=9"], "the others would win over what was asked for; this was left to the cluster"
    assert len(list((out / "train").glob("shard*"))) == 2
    assert not (out / "train" / "manifest.json").exists()

    monkeypatch.setenv("SKIP", "")
    assert run(*command) == 0
    logs = {path.name: path.read_text() for path in (out / "logs").iterdir()}
    assert "0 shards written, 1 were there; 1 shards are missing, of other tasks" in logs["write-43_0.txt"]
    assert "1 shards written, 0 were there; finished" in logs["write-43_1.txt"]
    assert "good (level hash)" in logs["verify-44.txt"]
    assert cli.main(["prepare", str(source), "here", *FAST, "--workers", "1"]) == 0
    assert _content(out) == _content(tmp_path / "here")
    assert len(open_container(str(out), "train", image_size=32)) == 15


def _content(out: Path) -> dict[str, bytes]:
    """The files of the training split."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in (out / "train").rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", [41, 42])
def test_a_refusal_by_sbatch_says_what_runs_and_what_does_not(
    number: int,
    source: Path,
    tmp_path: Path,
    record: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SKIP", "0 1 2")
    (record / f"refuse-{number}").touch()
    assert run(source, tmp_path / "out", *FAST, "--array", 3) == 1
    text = capfd.readouterr().err
    assert "sbatch: error: no\n" in text
    assert ("nothing was submitted" in text) == (number == 41)
    assert ("job 41 writes the shards, but nothing verifies them" in text) == (number == 42)


def _why_no_cluster() -> str:
    """ "" if a SLURM cluster answers."""
    if not shutil.which("sbatch"):
        return "sbatch is not on PATH"
    try:
        done = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"sinfo does not answer: {error}"
    return (
        ""
        if done.returncode == 0 and done.stdout.strip()
        else f"no cluster answers sinfo: {' '.join(done.stderr.split())[:100]}"
    )


def _wait_for(*jobs: str) -> None:
    """Until these jobs are no longer queued."""
    end = time.monotonic() + 120
    while subprocess.run(["squeue", "-h", "-j", ",".join(jobs)], capture_output=True, text=True).stdout.strip():
        if time.monotonic() > end:
            subprocess.run(["scancel", *jobs], check=True)
            pytest.fail(f"the cluster did not finish jobs {jobs} in 2 minutes")
        time.sleep(0.2)


def test_a_real_cluster_goes_on_after_a_cancelled_task(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of temporary files must be in reach of the nodes: --basetemp."""
    if reason := _why_no_cluster():
        pytest.skip(reason)
    out = tmp_path / "it's $(touch hit) é ;#"
    command = (source, out, *FAST, "--array", 3, "--cpus-per-task", 1, "--time", 10)

    def jobs() -> tuple[str, str]:
        assert run(*command) == 0
        words = capsys.readouterr().out.rpartition("squeue -j ")[2].strip().split(",")
        return words[0], words[1]

    array, verify = jobs()
    subprocess.run(["scancel", f"{array}_1"], check=True)
    _wait_for(array, verify)
    assert len(list((out / "train").glob("shard*"))) == 2
    assert not (out / "train" / "manifest.json").exists()
    assert not (out / "logs" / f"verify-{verify}.txt").exists(), "it was cancelled with the task it waited for"
    array, verify = jobs()
    _wait_for(array, verify)
    logs = out / "logs"
    assert "1 shards written, 0 were there; finished" in (logs / f"write-{array}_1.txt").read_text()
    assert "good (level hash)" in (logs / f"verify-{verify}.txt").read_text()
    assert cli.main(["prepare", str(source), str(tmp_path / "here"), *FAST, "--workers", "1"]) == 0
    assert _content(out) == _content(tmp_path / "here")
    assert not list(tmp_path.rglob("hit"))
