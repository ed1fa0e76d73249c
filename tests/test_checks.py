"""The checks before a job is queued: each finds its mistake and says what to do, and all of them come at once."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from images import image_folder
from jobs import checks, submit
from jobs.scheduler import minutes

SINFO = """\
#!/bin/sh
case "$*" in
*%P*) printf 'gpu*\\nold\\n' ;;
*) printf 'gpu|up|1-00:00:00|4|16|64000|gpu:h100:8(S:0-1)\\nold|down|infinite|9|8|32000|(null)\\n' ;;
esac
"""
SACCTMGR = "#!/bin/sh\nprintf 'lab|normal,high\\nother|normal\\n'\n"
SQUEUE = "#!/bin/sh\nprintf '41|PENDING|Priority||N/A\\n'\n"
SBATCH = '#!/bin/sh\n[ ! -e "$(dirname "$0")/refuse" ] || { echo "sbatch: error: too much" >&2; exit 1; }\n'

Desk = Callable[..., str]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Desk:
    """Calls --check on a login node with a cluster of 4 nodes; returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    programs = {"sinfo": SINFO, "sacctmgr": SACCTMGR, "squeue": SQUEUE, "sbatch": SBATCH}
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "site.yaml").write_text("cluster: {launcher: slurm, shared: [/], gpu_memory_gigabytes: 80}")

    def check(*words: str, expected: int = 2, task: str = "pretrain") -> str:
        usual = ["vit_tiny", "--data", "digits", "--config", "site.yaml", "--nodes", "2", "--gpus-per-node", "8"]
        assert submit.main([task, *usual, *words, "--check"]) == expected
        return capsys.readouterr().out

    return check


def test_a_good_job_passes_them_all(desk: Desk) -> None:
    text = desk("--account", "lab", "--qos", "high", "--time", "12:00:00", "--cpus-per-gpu", "2", "--mem", "32G", expected=0)
    assert "no problems" in text
    assert "WRONG" not in text
    seen = {line[9:].split("  ")[0].strip() for line in text.splitlines()[:-1]}
    assert len(seen) >= 20
    for line in (
        "64 = 2 nodes x 8 GPUs x micro-batch 4 x accumulation 1",
        "64 pixels = 8 patches of 8",
        "gpu: 2 of 4 nodes, limit 1440 minutes",
        "lab, high",
        "sbatch --test-only takes it",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["--partition", "gqu"], "partition", "no partition 'gqu': --partition, one of gpu, old"),
        (["--partition", "old"], "partition", "partition old is down"),
        (["--time", "2-00:00:00"], "partition", "more than the 1440 minutes of partition gpu: --time 1440"),
        (["--nodes", "8", "--gpus-per-node", "4"], "partition", "8 nodes, partition gpu has 4 of that kind: --nodes 4"),
        (["--gpus-per-node", "16"], "partition", "16 GPUs per node, partition gpu has nodes with 8: lower --gpus-per-node"),
        (["--cpus-per-gpu", "4"], "partition", "32 cores per node, partition gpu has nodes with 16: lower --cpus-per-gpu"),
        (["--mem", "100G"], "partition", "102400 MB of memory per node, partition gpu has nodes with 64000: lower --mem"),
        (["--account", "labb"], "account", "you may charge lab, other"),
        (["--account", "other", "--qos", "high"], "account", "--qos high: you may ask for normal"),
        (["--time", "3"], "signal", "--set cluster.signal_seconds=30"),
        (["--set", "cluster.source=/nonexistent/site.sh"], "site", "/nonexistent/site.sh is no file"),
        (["--set", "cluster.container=/nonexistent/x.sqsh"], "container", "/nonexistent/x.sqsh does not exist"),
        (["--set", "cluster.secrets=[TOKEN]"], "secrets", "write lines NAME=VALUE into it and chmod 600"),
        (["--set", "cluster.inherit=[HF_TOKEN]"], "secrets", "HF_TOKEN looks like a secret"),
        (["--set", "cluster.gpu_memory_gigabytes=0.01"], "memory", "--set micro_batch_size=2"),
        (["--init", "/nonexistent/run"], "init", "/nonexistent/run does not exist"),
        (["--include", "*.nothing"], "snapshot", "--include *.nothing: no such file"),
        (["--include", "/etc/passwd"], "snapshot", "name files below"),
        (["--run-dir", "50%/x"], "paths", "SLURM does not take % and \\ of a path"),
        (["--gpus-per-node", "7"], "settings", "nearest global_batch_size: 56 or 70"),
        (["--data", "/nonexistent/images"], "data", "--skip-check data"),
        (["--skip-check", "dta"], "options", "did you mean 'data'?"),
        (["--set", "model.patch_size=7"], "settings", "patch_size"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(desk: Desk, words: list[str], name: str, expected: str) -> None:
    text = desk(*words)
    lines = [line for line in text.splitlines() if line.startswith(f"WRONG    {name}")]
    assert any(expected in line for line in lines), text


def test_data_that_nearest_neighbours_cannot_be_measured_on_is_found(desk: Desk, tmp_path: Path) -> None:
    one, flat = image_folder(tmp_path / "one" / "train", num_classes=1, per_class=3).parent, tmp_path / "flat"
    image_folder(one / "val", num_classes=1, per_class=3)
    flat.mkdir()
    next(one.rglob("*.jpg")).rename(flat / "x.jpg")
    every = ("--set", "metrics.knn_every=5")
    for folder, reason in ((one, f"the train split of {one} has 1"), (flat, "there is no validation split")):
        text = desk("--data", str(folder), *every, "--set", "cluster.gpu_memory_gigabytes=0.01")
        lines = [line for line in text.splitlines() if line.startswith("WRONG    data")]
        assert len(lines) == 1, text
        assert "metrics.knn_every needs" in lines[0]
        assert reason in lines[0]
        assert "null trains without" in lines[0]
        assert "WRONG    memory" in text, "all at once"
        assert "null trains without" not in desk("--data", str(folder), expected=0)
    assert submit.main(["pretrain", "vit_tiny", "--cluster", "local", "--data", str(one), *every, "--name", "one"]) == 2
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_asked_is_skipped(desk: Desk, tmp_path: Path) -> None:
    for name in ("sinfo", "sacctmgr", "squeue"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\necho no answer >&2\nexit 1\n")
    text = desk(expected=0)
    assert "skipped  partition" in text
    assert "sinfo: no answer" in text
    assert "skipped  account" in text


def test_what_a_container_does_not_see_is_found(desk: Desk, tmp_path: Path) -> None:
    image_folder(tmp_path / "images" / "train", num_classes=1, per_class=3)
    (tmp_path / "x.sqsh").touch()
    words = ("--data", "images", "--init", "old", "--set", "cluster.secrets=[TOKEN]")
    box = ("--set", f"cluster.container={tmp_path}/x.sqsh")
    text = desk(*words, *box)
    for what, place in (("data", "images"), ("--init", "old"), ("file of secrets", ".config/nepa-dist/secrets")):
        assert f"the {what} {tmp_path}/{place} is in no folder of cluster.container_mounts: add it" in text
    assert "file of secrets" not in desk(*words, *box, "--set", "cluster.container_runtime=apptainer")
    text = desk(*words, *box, "--set", f"cluster.container_mounts=[{tmp_path}]")
    assert f"{tmp_path}/x.sqsh with pyxis" in text


def test_slurm_has_the_last_word(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "bin" / "refuse").touch()
    assert "sbatch refused the job: sbatch: error: too much" in desk()


def test_many_problems_come_at_once(desk: Desk) -> None:
    text = desk(
        "--partition",
        "x",
        "--account",
        "y",
        "--init",
        "/nonexistent",
        "--set",
        "cluster.source=/nonexistent",
        "--include",
        "no",
    )
    assert "5 problems, nothing was started" in text


def test_data_that_is_missing_hides_no_other_problem(desk: Desk) -> None:
    text = desk("--data", "/nonexistent/images", "--partition", "gqu", "--account", "labb", "--include", "no")
    for line in (
        "data.source /nonexistent/images",
        "no partition 'gqu'",
        "you may charge lab, other",
        "--include no: no such file",
    ):
        assert line in text
    assert "4 problems, nothing was started" in text


def test_what_follows_from_missing_data_is_not_reported_twice(desk: Desk) -> None:
    text = desk("--data", "/nonexistent/images", "--set", "epochs=1", "--set", "optim.warmup_steps=1000000")
    assert "1 problem, nothing was started" in text
    assert "the others need settings that are in order" in desk("--set", "model.patch_size=7")


def test_a_check_can_be_skipped_by_its_name(desk: Desk) -> None:
    assert "skipped  account" in desk("--account", "y", "--skip-check", "account", expected=0)
    text = desk("--data", "/nonexistent/images", "--skip-check", "data", "--set", "data.expected_num_samples=1000", expected=0)
    assert "WARNING: data.source /nonexistent/images" in text


def test_a_folder_that_one_node_sees_is_refused(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("cluster: {launcher: slurm}")
    text = desk()
    assert "name" in text
    assert "in cluster.shared if they do" in text
    assert "the data" not in desk("--data", "/nonexistent/images"), "that it is missing is said once"


def test_a_job_that_waits_or_a_trainer_that_runs_is_found(desk: Desk, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "busy"
    (run / "job").mkdir(parents=True)
    (run / "job" / "job.json").write_text(json.dumps({"id": "41"}))
    text = desk("--name", "busy")
    assert "job 41 of this run is pending" in text
    (run / "job" / "job.json").write_text(json.dumps({"id": "40"}))
    assert "job 40 of this run is over" in desk("--name", "busy", expected=0)


def test_a_trainer_of_this_machine_is_found(desk: Desk, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "busy"
    run.mkdir(parents=True)
    with (run / ".lock").open("w") as lock:
        lock.write("pid 1 on vm\n")
        lock.flush()
        if (child := os.fork()) == 0:  # a process does not see its own locks
            fcntl.lockf(lock, fcntl.LOCK_EX)
            os.write(1, b"")
            import time

            time.sleep(60)
            os._exit(0)
        try:
            for _ in range(200):
                text = submit_text(desk)
                if "a run is going on" in text:
                    break
            assert "a run is going on" in text
            assert "pid 1 on vm" in text
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)


def submit_text(desk: Desk) -> str:
    try:
        return desk("--name", "busy")
    except AssertionError:  # the child has no lock yet
        return ""


def test_the_time_of_a_step_and_a_checkpoint_is_compared_with_the_warning(desk: Desk, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "slow"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 3, "step_seconds": 60.0, "checkpoint_seconds": 100.0, "eta_seconds": 1.0}\n')
    text = desk("--name", "slow")
    assert "need 330 s, the warning comes 180 s before the limit: --set cluster.signal_seconds=330" in text
    text = desk("--name", "slow", "--set", "cluster.signal_seconds=400", "--set", "checkpoint.every=500", expected=0)
    assert "a node that fails costs half of that; checkpoint.every=30" in text


def test_an_init_of_another_model_is_found(desk: Desk, tmp_path: Path) -> None:
    folder = tmp_path / "other" / "checkpoints" / "step-00000009"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"meta": {"config": {"model": {"embed_dim": 384, "depth": 12}}}}))
    assert "holds another model (embed_dim: 384 there, 192 here" in desk("--init", "other")


def test_data_must_fit_the_task(desk: Desk, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "flat" / "train", num_classes=1, per_class=3)
    assert folder.exists()
    text = desk("--data", "flat", task="finetune")
    assert "fine-tuning needs train/<class>/ folders" in text


def test_a_disk_that_is_too_small_is_found(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    text = desk()
    assert re.search(r"4 checkpoints of 0.08\d+ GB, 1e-06 GB free", text)
    assert "--set checkpoint.keep_last=1" in text
    for step in (2, 4, 6):
        Path(f"runs/pretrain-vit_tiny-digits/checkpoints/step-{step:08d}").mkdir(parents=True)
    assert re.search(r"1 more checkpoints of 0.08\d+ GB", desk()), "what is there already takes no more room"


def test_a_lock_that_cannot_be_opened_is_no_run(desk: Desk) -> None:
    Path("runs/pretrain-vit_tiny-digits/.lock").mkdir(parents=True)
    text = desk()
    assert ".lock cannot be opened" in text
    assert "a run is going on" not in text


@pytest.mark.parametrize("setting", ["engine.device=cuda", "engine.kernels=triton"])
def test_a_gpu_that_is_asked_for_must_be_there(desk: Desk, tmp_path: Path, setting: str) -> None:
    (tmp_path / "one.yaml").write_text("cluster: {launcher: local}")
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    text = desk("--cluster", "local", "--config", "one.yaml", "--nodes", "1", "--set", setting)
    assert f"{setting.replace('=', ' is ')}, but this machine has no GPU" in text


def test_a_patch_embedding_is_not_frozen_as_it_is_drawn(desk: Desk) -> None:
    assert "frozen and would stay as it is drawn: pass --init RUN" in desk(task="finetune")
    assert "random weights" in desk("--set", "finetune.freeze_patch_embed=false", task="finetune", expected=0)


def test_the_files_that_protect_the_endpoint_must_be_there(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    token, cert = ("--set", "metrics.prometheus_token_file=token"), ("--set", "metrics.prometheus_tls_cert=cert.pem")
    assert "metrics.prometheus_tls_cert cert.pem cannot be read" in desk(*token, *cert)
    assert "prometheus_token_file: readable" in desk(*token, expected=0)


@pytest.mark.parametrize("name", ["prometheus", "best", "logs"])
def test_names_of_other_things_are_no_names_of_runs(desk: Desk, name: str) -> None:
    assert f"'{name}' cannot name a run" in desk("--name", name)


@pytest.mark.parametrize("kind", ["a line", "a name", "a value"])
def test_secrets_in_the_code_are_found_and_not_shown(
    desk: Desk, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from jobs import snapshot

    key = "AKIA" + "Q" * 16
    files = {
        "a line": {"x.py": f"a\nkey = '{key}'\n".encode()},
        "a name": {".env": b""},
        "a value": {"y.py": b"x = 'canary-7531'"},
    }
    monkeypatch.setenv("MY_API_KEY", "canary-7531")
    tree = snapshot.Snapshot(tmp_path, files[kind], frozenset())
    monkeypatch.setattr(snapshot, "read_code", lambda include: tree)
    text = desk()
    said = {
        "a line": "x.py, line 2, looks like a key",
        "a name": ".env has the name of a file of secrets",
        "a value": "y.py holds the value of $MY_API_KEY",
    }
    assert said[kind] in text
    assert key not in text
    assert "canary-7531" not in text


def test_a_file_of_secrets_must_be_private_and_complete(desk: Desk, tmp_path: Path) -> None:
    file = tmp_path / ".config" / "nepa-dist" / "secrets"
    file.parent.mkdir(parents=True)
    file.write_text("OTHER=1\n")
    file.chmod(0o644)
    assert f"chmod 600 {file}" in desk("--set", "cluster.secrets=[TOKEN]")
    file.chmod(0o600)
    assert "has no TOKEN" in desk("--set", "cluster.secrets=[TOKEN]")
    file.write_text("TOKEN=canary-7531\n")
    text = desk("--set", "cluster.secrets=[TOKEN]", expected=0)
    assert "canary-7531" not in text


def test_there_are_enough_checks() -> None:
    assert len(checks.CHECKS) + 3 >= 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30),
        ("30:30", 30.5),
        ("1:00:00", 60),
        ("2-00", 2880),
        ("1-01:30", 1530),
        ("1-00:00:30", 1440.5),
        ("infinite", float("inf")),
        ("UNLIMITED", float("inf")),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, expected: float) -> None:
    assert minutes(text) == expected
