"""The command line as a user meets it: what starts, what is refused and in which words, and that it answers without torch."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from jobs import cluster, launch, options, submit
from nepa_dist.config import Config
from nepa_dist.config_load import load_config


class Started:
    """Records what would have been started."""

    def __init__(self) -> None:
        self.calls: list[tuple[Path, int, Config]] = []
        self.code = 0

    def __call__(self, run_dir: Path, world_size: int) -> int:
        self.calls.append((run_dir, world_size, load_config([run_dir / "config.yaml"])))
        return self.code

    def save(self) -> None:
        """As if the last run had saved a checkpoint."""
        (self.calls[-1][0] / "checkpoints" / "step-00000001").mkdir(parents=True)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Started:
    """Nothing really starts; the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/local/nowhere")  # this machine may have SLURM
    record = Started()
    monkeypatch.setattr(cluster, "run_local", record)
    return record


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with three images."""
    for name in ("a", "b", "c"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "images" / "train" / name / "x.png")
    return tmp_path / "images"


def submit_ok(*args: str) -> None:
    assert submit.main(["pretrain", *args]) == 0


Refused = Callable[..., str]


@pytest.fixture
def refused(started: Started, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Submit, expect a refusal, return its text."""

    def run(*args: str) -> str:
        before = len(started.calls)
        capsys.readouterr()
        assert submit.main(["pretrain", *args]) == 2
        assert len(started.calls) == before
        return capsys.readouterr().err

    return run


def test_a_local_run_starts_in_its_own_folder_with_its_configuration(started: Started, tmp_path: Path) -> None:
    submit_ok("vit_tiny", "--cluster", "local", "--data", "digits")
    ((run_dir, world_size, config),) = started.calls
    assert run_dir == tmp_path / "runs" / "pretrain-vit_tiny-digits"
    assert world_size == 1
    assert (config.model.preset, config.data.source, config.model.image_size) == ("vit_tiny", "digits", 64)
    assert config.run_dir == run_dir
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700


def test_options_reach_the_configuration(started: Started, tmp_path: Path) -> None:
    submit_ok("vit_tiny", "--data", "digits", "--gpus-per-node", "2", "--engine", "ddp", "--name", "mine", "--set", "steps=7")
    ((run_dir, world_size, config),) = started.calls
    assert (run_dir.name, world_size, config.cluster.gpus_per_node, config.engine.name, config.steps) == (
        "mine",
        2,
        2,
        "ddp",
        7,
    )


def test_run_dir_is_the_folder_itself(started: Started, tmp_path: Path) -> None:
    submit_ok("vit_tiny", "--data", "digits", "--run-dir", "deep/er/place")
    assert started.calls[0][0] == tmp_path / "deep" / "er" / "place"
    assert started.calls[0][2].name == "place"


def test_a_data_folder_is_made_absolute_and_names_the_run(started: Started, images: Path) -> None:
    submit_ok("vit_tiny", "--data", "images")
    ((run_dir, _, config),) = started.calls
    assert config.data.source == str(images)
    assert run_dir.name == "pretrain-vit_tiny-images"


def test_a_data_folder_with_odd_characters_is_taken_literally(started: Started, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a: [b] #\U0001f600"
    images.rename(folder)
    submit_ok("vit_tiny", "--data", str(folder))
    assert started.calls[0][2].data.source == str(folder)


def test_later_layers_win(started: Started, tmp_path: Path) -> None:
    """Recipe < data < cluster < --config in order < options < --set."""
    (tmp_path / "one.yaml").write_text("global_batch_size: 32\nsteps: 1\ncluster: {gpus_per_node: 4}")
    (tmp_path / "two.yaml").write_text("steps: 2\nepochs: 3")
    files = ("--config", "one.yaml", "--config", "two.yaml")
    submit_ok("vit_tiny", "--data", "digits", *files, "--gpus-per-node", "2", "--set", "epochs=4", "--set", "epochs=5")
    config = started.calls[0][2]
    assert (config.model.preset, config.global_batch_size, config.steps, config.epochs) == ("vit_tiny", 32, 2, 5)
    assert config.cluster.gpus_per_node == 2
    assert config.optim.ema_decay == load_config([options.CONFIGS / "data" / "digits.yaml"]).optim.ema_decay


def test_the_exit_code_of_the_run_is_passed_on(started: Started, capsys: pytest.CaptureFixture[str]) -> None:
    started.code = 75
    assert submit.main(["pretrain", "vit_tiny", "--data", "digits"]) == 75
    assert "the same command continues" in capsys.readouterr().err


def test_the_same_command_resumes_and_reporting_may_change(started: Started, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("vit_tiny", "--data", "digits", "--set")
    submit_ok(*command, "metrics.every=5")
    assert "starting" in capsys.readouterr().out
    submit_ok(*command, "metrics.every=50", "--gpus-per-node", "2")
    out = capsys.readouterr().out
    assert "resuming" in out
    assert "metrics.every: 5 -> 50" in out
    first, second = started.calls
    assert first[0] == second[0]
    assert (second[1], second[2].metrics.every) == (2, 50)


def test_other_settings_in_the_same_folder_are_refused_key_by_key(started: Started, refused: Refused) -> None:
    command = ("vit_tiny", "--data", "digits")
    submit_ok(*command)
    started.save()
    saved = (started.calls[0][0] / "config.yaml").read_text()
    text = refused(*command, "--set", "optim.base_lr=1", "--set", "objective.shift=false", "--set", "metrics.every=77")
    assert "optim.base_lr: 0.008 -> 1.0" in text
    assert "objective.shift: true -> false" in text
    assert "--name" in text
    assert "metrics.every" not in text, "it may differ, so it is not part of the problem"
    assert (started.calls[0][0] / "config.yaml").read_text() == saved
    submit_ok(*command, "--set", "optim.base_lr=1", "--name", "other")


def test_a_folder_with_unreadable_settings_is_refused(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text("a_key_of_long_ago: 1")
    text = refused("vit_tiny", "--data", "digits", "--run-dir", "old")
    assert "a_key_of_long_ago" in text
    assert "--name" in text


def test_two_launchers_in_one_folder_are_refused(started: Started, refused: Refused, tmp_path: Path) -> None:
    submit_ok("vit_tiny", "--data", "digits", "--name", "busy")
    with launch.locked(tmp_path / "runs" / "busy"):
        assert "going on" in refused("vit_tiny", "--data", "digits", "--name", "busy")
    submit_ok("vit_tiny", "--data", "digits", "--name", "busy")


def test_all_problems_come_at_once(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = refused("vit_x", "--data", "nowhere", "--run-dir", "file/run", "--set", "optim.learning=1", "--set", "bad")
    assert text.startswith("5 problems")
    for words in ("'vit_x'", "nowhere", "optim.learning", "--set bad", str(tmp_path / "file")):
        assert words in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["vit_hugee", "--data", "digits"], ["vit_hugee", "vit_tiny"]),
        (["vit_bb", "--data", "digits"], ["did you mean 'vit_b'"]),
        (["vit_b"], ["data.source", "--data"]),
        (["vit_b", "--data", "nowhere"], ["nowhere"]),
        (["vit_b", "--data", "digit"], ["digit", "did you mean digits"]),
        (["vit_b", "--data", "empty"], ["empty", "no images"]),
        (["vit_b", "--data", "digits", "--cluster", "moon"], ["moon", "local, slurm"]),
        (["vit_b", "--data", "digits", "--nodes", "8"], ["no SLURM on this machine", "--print", "--cluster local"]),
        (["vit_b", "--data", "digits", "--cluster", "slurm"], ["no SLURM on this machine", "--print", "--cluster local"]),
        (["vit_b", "--data", "digits", "--nodes", "2", "--cluster", "local"], ["--gpus-per-node 2", "--cluster slurm"]),
        (["vit_b", "--data", "digits", "--nodes", "0"], ["cluster.nodes"]),
        (["vit_b", "--data", "digits", "--engine", "magic"], ["unknown engine 'magic'", "zero3"]),
        (["vit_b", "--data", "digits", "--name", "a/b"], ["name", "a/b"]),
        (["vit_b", "--data", "digits", "--config", "none.yaml"], ["none.yaml"]),
        (["vit_b", "--data", "digits", "--gpus-per-node", "3"], ["global_batch_size 64", "63 or 66"]),
        (["vit_b", "--data", "digits", "--run-dir", "/proc/x"], ["/proc"]),
    ],
)
def test_mistakes_are_named(args: list[str], words: list[str], refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    text = refused(*args)
    for word in words:
        assert word in text
    assert "Traceback" not in text


def test_a_folder_without_permission_is_refused(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write everywhere
    assert f"no permission to write in {tmp_path}" in refused("vit_b", "--data", "digits")


def test_a_dry_run_describes_the_headline_run(started: Started, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit_ok("vit_l", "--nodes", "8", "--dry-run")
    out = capsys.readouterr().out
    assert re.search(r"global batch +4096 = world size 64 x micro-batch 64 x accumulation 1\n", out)
    assert re.search(r"parameters +304,571,392", out)
    assert re.search(r"training images +1,281,167", out)
    assert re.search(r"peak learning rate +0\.0048 ", out)
    assert "476.6 GFLOP with backward" in out
    cluster_section = yaml.safe_load(out.partition("Configuration\n")[2])["cluster"]
    assert [cluster_section[key] for key in ("launcher", "nodes", "gpus_per_node")] == ["slurm", 8, 8]
    assert started.calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_counts_the_images_and_says_when_that_differs(
    started: Started, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit_ok("vit_tiny", "--data", "images", "--dry-run")
    out = capsys.readouterr().out
    assert re.search(r"training images +3\n", out)
    assert f"counted in {images}" in out
    assert "1,281,167" in out


def test_a_dry_run_for_a_cluster_accepts_data_that_is_out_of_reach(
    started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    submit_ok("vit_b", "--nodes", "2", "--data", "/on/the/cluster", "--run-dir", "/proc/also/there", "--dry-run")
    out = capsys.readouterr().out
    assert "WARNING" in out
    assert "/on/the/cluster" in out


def test_a_dry_run_tells_a_resumed_folder_and_refuses_other_settings(
    started: Started, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("vit_tiny", "--data", "digits")
    submit_ok(*command)
    submit_ok(*command, "--dry-run")
    assert "would be resumed" in capsys.readouterr().out
    started.save()
    assert "seed: 1337 -> 3" in refused(*command, "--set", "seed=3", "--dry-run")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("pretrain vit_l --nodes 8 --dry-run", 0),
        ("pretrain vit_l --nodes 8 --print", 0),
        ("pretrain vit_tiny --cluster local --data digits --check", 0),
        ("pretrain vit_tiny --nodes 2 --data digits --set cluster.shared=[/] --check", 0),
        ("pipeline vit_b --cluster slurm --print", 0),
        ("sweep objective_digits --cluster slurm --print", 0),
        ("pretrain vit_tiny --cluster local --data digits --dry-run", 0),
        ("pretrain vit_x --data nowhere --set a=1", 2),
        ("pretrain vit_b --nodes 8", 2),
        ("pipeline vit_tiny --data digits --dry-run", 0),
        ("sweep objective_digits --dry-run", 0),
        ("status", 2),
        ("cancel runs/x", 2),
    ],
)
def test_the_answer_needs_no_torch(args: str, expected: int, tmp_path: Path) -> None:
    code = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print("torch" in sys.modules, end.code)
"""
    script = str(cluster.REPO_ROOT / "jobs" / "submit.py")
    done = subprocess.run(
        [sys.executable, "-c", code, script, *args.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": "/usr/local/nowhere"},
    )
    assert done.stdout.splitlines()[-1] == f"False {expected}", done.stderr
    assert "Traceback" not in done.stderr


def test_the_script_runs_from_any_folder_and_help_shows_examples(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("raise SystemExit('the wrong jobs')")
    script = str(cluster.REPO_ROOT / "jobs" / "submit.py")
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "python jobs/submit.py pretrain vit_l --nodes 8 --dry-run" in done.stdout
    assert "vit_tiny" in done.stdout


@pytest.mark.parametrize(("words", "expected"), [([], "COMMAND"), (["pretrian", "x"], "did you mean 'pretrain'")])
def test_a_command_that_does_not_exist_is_a_mistake(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main(words) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("task", options.TASKS)
def test_each_task_has_a_command_with_its_recipes(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main([task, "no-such-recipe", "--data", "digits", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert "unknown recipe 'no-such-recipe'" in err
    for name in options.recipe_names(task):
        assert name in err
