"""What a user does with jobs on a real SLURM: cancel, stop, resume; the code and the secrets of a job."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path
from secrets import token_hex

from conftest import Desk

from jobs.cluster import REPO_ROOT

LONG = ("--set", "steps=100000", "--set", "metrics.every=1", "--set", "checkpoint.every=100000")
SHORT = ("--set", "steps=3", "--set", "metrics.every=1")


def test_cancel_is_final_and_resume_goes_on(desk: Desk) -> None:
    job = desk.train("c", *LONG, nodes=1)
    desk.wait_for_step("c", 2)
    assert f"job {job} is cancelled" in desk.submit("cancel", "runs/c")
    desk.wait_for_end(job, seconds=120)
    assert desk.state(job) == "CANCELLED"
    assert "ended: cancelled" in desk.submit("status", "runs/c")
    assert "nothing runs" in desk.submit("cancel", "runs/c", code=2)

    text = desk.submit("resume", "runs/c")
    again = text.partition("submitted job ")[2].partition(":")[0]
    desk.wait_for_start("c", 2)
    desk.wait(lambda: desk.state(again) == "RUNNING", "the job to run")
    assert f"job {again} of" in desk.submit("resume", "runs/c", code=2)
    desk.wait_for_step("c", desk.rows("c")[-1]["step"] + 1)
    status = desk.submit("status")
    assert "running on node" in status
    assert again in status
    text = desk.submit("stop", "--save", "runs/c")
    assert "told to save and end" in text
    desk.wait_for_end(again, seconds=120)
    last = desk.record("c")[-1]
    assert (last["why"], last["again"]) == ("stopped", False)
    assert int(last["checkpoint"]) >= 2
    assert "ended: stopped" in desk.submit("status", "runs/c")


def test_scancel_without_us_is_final_too(desk: Desk) -> None:
    """The ranks save and say that they would go on, but the user has said otherwise."""
    job = desk.train("s", *LONG, nodes=1)
    desk.wait_for_step("s", 2)
    desk.ask("scancel", job)
    desk.wait_for_end(job, seconds=120)
    assert desk.state(job) == "CANCELLED"
    assert "ended: cancelled" in desk.submit("status", "runs/s")


def test_a_waiting_job_is_cancelled_and_a_second_submission_refused(desk: Desk) -> None:
    blocker = desk.ask("sbatch", "--parsable", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 600").strip()
    job = desk.train("w", *SHORT)
    text = desk.submit(*command("w", *SHORT), code=2)
    assert f"job {job} of this run is pending" in text
    assert "waiting (" in desk.submit("status")
    desk.submit("stop", "runs/w")
    desk.wait_for_end(job, seconds=60)
    desk.ask("scancel", blocker)
    assert desk.record("w") == []


def command(name: str, *words: str) -> tuple[str, ...]:
    options = ("--name", name, "--config", "site.yaml", "--nodes", "2", "--data", "digits", "--gpus-per-node", "1")
    return ("pretrain", "vit_tiny", *options, "--set", "model.depth=1", "--set", "optim.warmup_steps=1", *words)


def copy_of_the_project(folder: Path) -> Path:
    """The working tree as another repository, which may be edited."""
    root = folder / "project"
    everything = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(everything, cwd=REPO_ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (REPO_ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO_ROOT / name, root / name)
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=root, check=True, env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"})
    return root


def test_edited_code_does_not_change_a_job_that_waits_nor_one_that_comes_back(desk: Desk) -> None:
    root = copy_of_the_project(desk.folder)
    train = root / "nepa_dist" / "train.py"
    train.write_text(train.read_text() + "\n# submitted like this\n")
    blocker = desk.ask("sbatch", "--parsable", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 600").strip()
    job = desk.train("e", *LONG, nodes=1, root=root)
    train.write_text("raise SystemExit('edited while it waited')\n")
    (root / "jobs" / "attempt.sh").write_text("exit 3\n")
    desk.ask("scancel", blocker)
    desk.wait_for_step("e", 2)
    desk.ask("scancel", "--signal=USR2", job)
    desk.wait_for_start("e", 2)
    desk.wait_for_step("e", desk.rows("e")[-1]["step"] + 1)
    desk.submit("stop", "runs/e")
    desk.wait_for_end(job, seconds=120)
    assert [row["why"] for row in desk.record("e") if row["event"] == "end"] == ["stopped", "stopped"]
    (code,) = (desk.run("e") / "code").iterdir()
    assert "# submitted like this" in (code / "nepa_dist" / "train.py").read_text()
    assert "+# submitted like this" in (code / "SNAPSHOT.diff").read_text()
    assert "torch==" in (code / "packages.txt").read_text()

    # Code that was changed in the snapshot itself is refused.
    (code / "nepa_dist" / "guard.py").chmod(0o600)
    (code / "nepa_dist" / "guard.py").write_text((code / "nepa_dist" / "guard.py").read_text() + "\n")
    again = desk.submit("resume", "runs/e").partition("submitted job ")[2].partition(":")[0]
    desk.wait_for_end(again)
    assert desk.record("e")[-1]["why"] == "mistake"
    assert "is not what was submitted" in desk.submit("logs", "runs/e")


def test_a_secret_of_the_shell_is_in_no_artefact_and_one_from_the_file_reaches_the_ranks(desk: Desk) -> None:
    canary, other = f"canary-{token_hex(8)}", f"canary-{token_hex(8)}"  # not in this file, which is part of the code
    file = desk.folder / "secrets"
    file.write_text(f"MY_TOKEN={other}\n")
    file.chmod(0o600)
    desk.site.write_text(desk.site.read_text() + f"  secrets: [MY_TOKEN]\n  secrets_file: {file}\n")
    job = desk.train("k", *LONG, nodes=1, env={"WANDB_API_KEY": canary, "MY_TOKEN": canary})
    desk.wait_for_step("k", 2)
    environments = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/environ") if _mine(path, "SLURM_JOB_ID=" + job)]
    assert environments
    assert not any(canary.encode() in environment for environment in environments)
    arguments = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _exists(path)]
    assert not any(canary.encode() in words or other.encode() in words for words in arguments)
    desk.submit("stop", "runs/k")
    desk.wait_for_end(job, seconds=120)
    places = [path for folder in (desk.run("k"), desk.cluster.folder) for path in folder.rglob("*") if path.is_file()]
    assert len(places) > 300
    holding = [path for path in places if canary.encode() in path.read_bytes() or other.encode() in path.read_bytes()]
    assert holding == []
    folder = desk.run("k")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_payload_that_another_user_owns_is_not_run(desk: Desk) -> None:
    blocker = desk.ask("sbatch", "--parsable", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 600").strip()
    job = desk.train("f", *SHORT, nodes=1)
    os.chown(desk.run("f") / "config.yaml", 12345, 12345)
    desk.ask("scancel", blocker)
    desk.wait_for_end(job)
    assert desk.record("f")[-1]["why"] == "mistake"
    assert "belongs to user 12345" in desk.submit("logs", "runs/f")


def test_a_path_with_odd_characters_is_one_word_for_sbatch_and_the_ranks(desk: Desk) -> None:
    folder = desk.folder / 'it\'s $(touch hit) é;# "x"'
    words = list(command("x", *SHORT))
    words[words.index("--name") : words.index("--name") + 2] = ["--run-dir", str(folder / "run")]
    job = desk.submit(*words).partition("submitted job ")[2].partition(":")[0]
    desk.wait_for_end(job)
    assert (folder / "run" / "job" / "attempts.jsonl").read_text().count('"why": "finished"') == 1
    assert not list(desk.folder.rglob("hit"))


def test_the_doctor_looks_at_nodes(desk: Desk) -> None:
    text = desk.submit("doctor", "--nodes", "2", "--gpus-per-node", "1", "--config", str(desk.site))
    rows = [line.split() for line in text.splitlines()[1:3]]
    assert [row[0] for row in rows] == ["0", "1"]
    assert len({row[1] for row in rows}) == 2
    assert "All nodes are fit" in text
    assert list((desk.folder / "runs").iterdir()) == []


def _mine(path: Path, mark: str) -> bool:
    return _exists(path) and mark.encode() in path.read_bytes().split(b"\0")


def _exists(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True
