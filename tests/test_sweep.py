"""Sweeps: what their variants are, that they go on, and the table and pictures at the end."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from jobs import cluster, options, probe, submit, sweep
from trainer import Trainer

SPEC = """\
task: pretrain
recipe: vit_tiny
options: "--data digits --set steps=4 --set optim.warmup_steps=1"
score: linear
probe: "--num-train 40"
variants:
  baseline: {published: 76.8}
  no_shift: {options: "--config ablate/no_shift", published: 10}
  seed: {options: "--set seed=5"}
"""


TOP1 = {"linear": 0.5, "knn_20": 0.25}


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trainer:
    """Nothing trains; a probe finds 50 % and what is in its options is noted."""
    monkeypatch.chdir(tmp_path)
    stand_in = Trainer()
    monkeypatch.setattr(cluster, "run_local", stand_in)

    def probe_here(run: Path, words: list[str]) -> int:
        (run / "evaluation.json").write_text(json.dumps({"step": 4, "trained": [{"top1": TOP1}], "words": words}))
        return 0

    monkeypatch.setattr(sweep, "probe_here", probe_here)
    (tmp_path / "mine.yaml").write_text(SPEC)
    return stand_in


def run_sweep(*words: str) -> int:
    return submit.main(["sweep", "mine.yaml", "--name", "s", *words])


def test_all_variants_run_and_end_in_a_table_and_pictures(trainer: Trainer, tmp_path: Path) -> None:
    assert run_sweep() == 0
    root = tmp_path / "runs" / "s"
    assert [run.run_dir for run in trainer.runs] == [root / name for name in ("baseline", "no_shift", "seed")]
    assert [(run.seed, run.objective.shift) for run in trainer.runs] == [(1337, True), (1337, False), (5, True)]
    assert json.loads((root / "seed" / "evaluation.json").read_text())["words"] == ["--num-train", "40"]
    rows = list(csv.DictReader((root / "table.csv").open()))
    assert [row["variant"] for row in rows] == ["baseline", "no_shift", "seed"]
    assert rows[0] == {
        "variant": "baseline",
        "state": "finished",
        "step": "4",
        "loss": "0.2500",
        "linear": "50.00",
        "knn_20": "25.00",
        "published": "76.80",
        "difference": "-26.80",
    }
    assert (rows[2]["published"], rows[2]["difference"]) == ("", "")
    text = (root / "table.md").read_text()
    assert "Compared by linear, percent." in text
    assert "| no_shift | finished | 4 | 0.2500 | 50.00 | 25.00 | 10.00 | +40.00 |" in text
    for name in ("figures/loss.png", "figures/scores.png"):
        assert f"]({name})" in text
        assert (root / name).stat().st_size > 1000


def test_options_of_the_command_line_reach_all_variants(trainer: Trainer) -> None:
    assert run_sweep("--set", "model.depth=2", "--only", "seed,baseline") == 0
    assert [(run.name, run.model.depth) for run in trainer.runs] == [("seed", 2), ("baseline", 2)]


def test_a_failing_variant_does_not_end_the_others_and_is_done_again(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.codes["pretrain"] = 2
    assert run_sweep() == 2
    assert len(trainer.runs) == 3
    assert "| seed | mistake |" in (tmp_path / "runs" / "s" / "table.md").read_text()
    trainer.codes.clear()
    assert run_sweep("--only", "baseline,seed") == 0
    assert run_sweep() == 0
    assert [run.name for run in trainer.runs[3:]] == ["baseline", "seed", "no_shift"]
    assert capsys.readouterr().out.count("finished before") == 2


def test_a_stop_ends_the_sweep(trainer: Trainer) -> None:
    trainer.codes["pretrain"] = 75
    assert run_sweep() == 75
    assert len(trainer.runs) == 1


def test_all_problems_of_all_variants_come_at_once(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sweep("--set", "seed=-1", "--set", "foo=1") == 2
    err = capsys.readouterr().err
    assert err.startswith("2 problems, nothing was started")
    assert "all: seed" in err
    assert trainer.runs == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "mine.yaml"),
        ("variants: 3", "expected task, recipe and variants"),
        ("task: pretrain\nrecipe: vit_tiny\nvariants: {a: {optoins: x}}", "a: unknown key 'optoins'; did you mean 'options'?"),
        ("task: train\nrecipe: vit_tiny\nvariants: {a: {}}", "task 'train' is none of"),
        ("task: pretrain\nvariants: {a: {}}", "recipe is missing"),
        ("task: pretrain\nrecipe: x\nprobe: true\nvariants: {a: {}}", "probe must be a text"),
        ("task: pretrain\nrecipe: x\nvariants: {a: {published: yes}}", "published must be a number"),
        ("task: pretrain\nrecipe: x\nvariants: {'a/b': {}}", "'a/b' must be a name of letters"),
    ],
)
def test_mistakes_in_a_file_are_named(
    text: str, words: str, trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert run_sweep("--data", "digits") == 2
    assert words in capsys.readouterr().err


def test_unknown_names_are_answered_with_near_ones(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["sweep", "ablate_digit"]) == 2
    assert "did you mean 'ablate_digits'?" in capsys.readouterr().err
    assert run_sweep("--only", "base") == 2
    assert "no variant 'base'" in capsys.readouterr().err


@pytest.mark.parametrize("name", options.recipe_names("sweep"))
def test_every_sweep_of_the_project_passes_its_checks(name: str, trainer: Trainer) -> None:
    assert submit.main(["sweep", name, "--dry-run"]) == 0


def test_on_slurm_the_variants_are_one_array(
    trainer: Trainer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/local/nowhere")
    assert run_sweep("--cluster", "slurm", "--gpus-per-node", "2", "--array-parallelism", "2", "--print") == 0
    out = capsys.readouterr().out
    assert "#SBATCH --array=0-2%2\n" in out
    assert "job/log-%A_%a.txt" in out
    assert "run=${runs[SLURM_ARRAY_TASK_ID]}" in out
    assert run_sweep("--cluster", "slurm", "--set", "cluster.nodes=2", "--print") == 0


def test_probing_a_run_without_a_checkpoint_is_a_mistake(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["probe", "runs/nothing"]) == 2
    assert "runs/nothing has no checkpoint to probe" in capsys.readouterr().err
    assert submit.main(["probe", "runs/nothing", "--cluster", "moon"]) == 2
    assert probe.RECORD == "probe"
