"""Pipelines: what their stages are, what reaches each of them, what is done again, and what the report says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest

from images import image_folder
from jobs import cluster, options, submit
from nepa_dist.data.containers import Container
from nepa_dist.data.open import open_container
from trainer import Trainer

RECIPE = "vit_tiny"
SHORT = (
    "--data",
    "digits",
    "--set",
    "steps=4",
    "--set",
    "optim.warmup_steps=1",
    "--set",
    "segment:segment.stride=64",
    "--name",
    "p",
)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trainer:
    monkeypatch.chdir(tmp_path)
    stand_in = Trainer()
    monkeypatch.setattr(cluster, "run_local", stand_in)
    monkeypatch.setattr(submit.pipeline, "draw_samples", stand_in.drawn.append)
    return stand_in


def pipeline(*args: str) -> int:
    return submit.main(["pipeline", RECIPE, *SHORT, *args])


def test_stages_run_in_order_and_start_with_what_pretraining_left(trainer: Trainer, tmp_path: Path) -> None:
    assert pipeline() == 0
    root = tmp_path / "runs" / "p"
    assert [(run.task, run.run_dir) for run in trainer.runs] == [(task, root / task) for task in options.TASKS]
    assert [run.init.path for run in trainer.runs] == [None, str(root / "pretrain"), str(root / "finetune")]
    assert [run.init.load for run in trainer.runs] == ["weights", "ema", "ema"], "the recipes' choice"
    assert trainer.drawn == [root / task for task in options.TASKS]


def test_options_are_for_all_stages_or_for_one(trainer: Trainer) -> None:
    """The own option of a stage wins, wherever it stands."""
    assert pipeline("--set", "finetune:seed=5", "--set", "seed=3", "--gpus-per-node", "pretrain:2") == 0
    assert [run.seed for run in trainer.runs] == [3, 5, 3]
    assert [run.cluster.gpus_per_node for run in trainer.runs] == [2, 1, 1]


def test_the_same_command_goes_on_with_the_first_stage_that_is_not_finished(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.codes["finetune"] = 2
    assert pipeline() == 2
    assert "stage 2 of 3, finetune: ended with exit code 2" in capsys.readouterr().err
    assert [run.task for run in trainer.runs] == ["pretrain", "finetune"]
    report = (tmp_path / "runs" / "p" / "report.md").read_text()
    assert "| finetune | mistake |" in report
    assert "why it ended" in report
    assert "| segment | not begun |" in report

    trainer.codes.clear()
    assert pipeline() == 0
    assert [run.task for run in trainer.runs[2:]] == ["finetune", "segment"]
    assert "stage 1 of 3, pretrain: finished before" in capsys.readouterr().out
    assert pipeline() == 0
    assert len(trainer.runs) == 4


def test_a_stage_that_was_stopped_or_is_to_be_longer_is_not_finished(trainer: Trainer) -> None:
    trainer.codes["pretrain"] = 75
    assert pipeline() == 75
    trainer.codes.clear()
    assert pipeline("--stages", "pretrain") == 0
    assert pipeline("--stages", "pretrain") == 0
    assert len(trainer.runs) == 2
    assert pipeline("--stages", "pretrain", "--set", "steps=9", "--allow", "steps") == 0
    assert len(trainer.runs) == 3


def test_the_report_has_a_table_and_links(trainer: Trainer, tmp_path: Path) -> None:
    assert pipeline("--stages", "pretrain,finetune") == 0
    root = tmp_path / "runs" / "p"
    (root / "finetune" / "best").mkdir()
    (root / "finetune" / "best" / "results.json").write_text('{"step": 4, "top1": 0.8375, "top5": 0.9}')
    layers = [{"layer": 0, "top1": {"knn_20": 0.1}}, {"layer": "final", "top1": {"knn_20": 0.2, "linear": 0.5}}]
    (root / "pretrain" / "evaluation.json").write_text(json.dumps({"trained": layers}))
    assert pipeline("--stages", "pretrain,finetune") == 0
    report = (root / "report.md").read_text()
    assert "| pretrain | finished | 4 of 4 | 0.2500 | knn_20 20.00 %, linear 50.00 % | 9 |" in report
    assert "top1 83.75 %, top5 90.00 %" in report
    for name in ("pretrain/figures/loss.png", "finetune/best/results.json", "pretrain/evaluation.json"):
        assert f"]({name})" in report
        assert (root / name).exists()


def test_all_problems_of_all_stages_come_at_once(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline("--set", "finetune:foo=1", "--set", "seed=-1", "--data", "segment:/nonexistent/images") == 2
    text = capsys.readouterr().err
    assert text.startswith("3 problems, nothing was started")
    assert "pretrain, finetune, segment: seed" in text
    assert "finetune: --set foo=1: unknown key 'foo'" in text
    assert "segment: data.source /nonexistent/images" in text
    assert trainer.runs == []


def test_a_stage_that_is_another_model_than_the_one_it_starts_with_is_refused(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline("--set", "finetune:model.depth=6") == 2
    assert (
        "finetune: another model than pretrain, which it starts with: model.depth: 12 there, 6 here" in capsys.readouterr().err
    )
    assert trainer.runs == []


def test_a_data_set_that_stages_share_is_opened_once(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To open a folder of a million images takes minutes."""
    opened: list[tuple[str, str]] = []

    def counting(source: str, split: Literal["train", "val"], **more: int) -> Container:
        opened.append((source, split))
        return open_container(source, split, **more)

    monkeypatch.setattr("nepa_dist.data.open.open_container", counting)
    for split in ("train", "val"):
        image_folder(tmp_path / "images" / split, num_classes=2, per_class=2, size=(20, 20))
    assert pipeline("--data", "images", "--stages", "pretrain,finetune", "--dry-run") == 0
    assert sorted(opened) == [(str(tmp_path / "images"), "train"), (str(tmp_path / "images"), "val")]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["vit_tny"], "did you mean 'vit_tiny'"),
        (["vit_tiny", "--stages", "pretrian"], "did you mean 'pretrain'"),
        (["vit_tiny", *SHORT, "--stages", "finetune"], "runs/p/pretrain does not exist"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused(
    args: list[str], words: str, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main(["pipeline", *args]) == 2
    assert words in capsys.readouterr().err


FILE = """
stages:
  pretrain: {recipe: vit_tiny, options: "--gpus-per-node 2 --set seed=8"}
  segment: {recipe: vit_tiny, from: pretrain}
"""


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of configs/ to write into."""
    import shutil

    shutil.copytree(options.CONFIGS, tmp_path / "configs")
    (tmp_path / "configs" / "pipeline").mkdir(exist_ok=True)
    for module in (options, submit.pipeline):
        monkeypatch.setattr(module, "CONFIGS", tmp_path / "configs")
    return tmp_path / "configs"


def test_a_file_says_what_the_stages_are_and_the_command_line_wins(trainer: Trainer, configs: Path) -> None:
    (configs / "pipeline" / "mine.yaml").write_text(FILE)
    assert submit.main(["pipeline", "mine", *SHORT, "--set", "pretrain:seed=9"]) == 0
    assert [run.task for run in trainer.runs] == ["pretrain", "segment"]
    assert (trainer.runs[0].seed, trainer.runs[0].cluster.gpus_per_node) == (9, 2)
    assert trainer.runs[1].init.path == str(trainer.runs[0].run_dir)


def test_a_stage_may_have_a_name_of_its_own(trainer: Trainer, configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (configs / "pipeline" / "mine.yaml").write_text(
        "stages: {pretrain: {recipe: vit_tiny}, finetune: {recipe: vit_tiny, from: pretrain}, "
        "scratch: {task: finetune, recipe: vit_tiny}}"
    )
    assert submit.main(["pipeline", "mine", *SHORT, "--set", "finetune:seed=5", "--set", "scratch:seed=7", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "finetune: " in out
    assert "scratch: " in out
    assert "starts with pretrain" in out.split("finetune: ")[1].split("\n")[0]
    assert "starts with" not in out.split("scratch: ")[1].split("\n")[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: 3", "expected stages"),
        ("- 1", "expected stages"),
        ("stages: {pretrain: {receipt: x}}", "unknown key 'receipt'"),
        ("stages: {finetune: {from: pretrain}, pretrain: {}}", "from 'pretrain' is no earlier stage"),
        ("stages: {train: {}}", "unknown task 'train'"),
        ("stages: [", "expected stages"),
        ('stages: {pretrain: {options: "--set \'x"}}', "No closing quotation"),
    ],
)
def test_mistakes_in_a_file_are_named(
    text: str, words: str, trainer: Trainer, configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (configs / "pipeline" / "mine.yaml").write_text(text)
    assert submit.main(["pipeline", "mine", *SHORT]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "mine.yaml" in err


def test_a_dry_run_describes_all_stages_and_touches_nothing(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline("--dry-run", "--gpus-per-node", "finetune:4") == 0
    out = capsys.readouterr().out
    assert "finetune: 4 steps on 4 ranks, starts with pretrain" in out
    assert list(tmp_path.iterdir()) == []
