"""Several jobs on a real SLURM: pipelines whose stages wait for each other, sweeps as one array."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

from conftest import Desk

from images import image_folder
from jobs.runs import read_scores

STAGES = ("--set", "steps=3", "--set", "optim.warmup_steps=1", "--set", "model.depth=4", "--set", "evaluate.max_samples=20")
OTHER_IMAGES = (
    *("--set", "finetune:model.image_size=64", "--set", "finetune:model.patch_size=8", "--set", "finetune:data.num_workers=0"),
    *("--set", "finetune:global_batch_size=8", "--set", "finetune:engine.precision=fp32"),
)


def pipeline(desk: Desk, images: Path, *words: str) -> dict[str, str]:
    """Submit the three stages; returns the job of each, and that of the report."""
    data = ("--data", "digits", "--data", f"finetune:{images}", *OTHER_IMAGES)
    where = ("--config", str(desk.site), "--gpus-per-node", "1", "--name", "p")
    text = desk.submit("pipeline", "vit_tiny", *where, *data, *STAGES, *words)
    lines = [line.split() for line in text.splitlines() if ": job " in line]
    return {words[0].rstrip(":"): words[2].rstrip(",") for words in lines}


def starts(desk: Desk, stage: str) -> int:
    return sum(row["event"] == "start" for row in desk.record(f"p/{stage}"))


def test_a_failing_stage_ends_the_rest_and_the_same_command_goes_on(desk: Desk) -> None:
    images = image_folder(desk.folder / "images" / "train", num_classes=3, per_class=4, size=(70, 70)).parent
    image_folder(images / "val", num_classes=3, per_class=2, size=(70, 70))
    jobs = pipeline(desk, images)
    assert list(jobs) == ["pretrain", "finetune", "segment", "report"]
    shutil.move(images, desk.folder / "gone")  # seen by the checks, and not there when its stage begins
    desk.wait_for_end(*jobs.values())
    assert [starts(desk, stage) for stage in ("pretrain", "finetune", "segment")] == [1, 1, 0]
    assert desk.record("p/finetune")[-1]["why"] == "mistake"
    assert not desk.record("p/finetune")[-1]["again"]
    assert desk.state(jobs["segment"]) == "CANCELLED"
    report = (desk.run("p") / "report.md").read_text()
    assert "| pretrain | finished |" in report
    assert "| finetune | mistake |" in report
    assert str(images) in report, "the reason is in it"

    shutil.move(desk.folder / "gone", images)
    jobs = pipeline(desk, images)
    assert list(jobs) == ["finetune", "segment", "report"]
    desk.wait_for_end(*jobs.values())
    assert [starts(desk, stage) for stage in ("pretrain", "finetune", "segment")] == [1, 2, 1]
    report = (desk.run("p") / "report.md").read_text()
    for words in ("| finetune | finished |", "| segment | finished |", "top1", "miou", "finetune/best/results.json"):
        assert words in report
    text = desk.submit("status", "runs/p")
    assert text.count("finished") == 3


def test_data_is_prepared_by_an_array_and_what_it_wrote_can_be_trained_on_and_probed(desk: Desk) -> None:
    image_folder(desk.folder / "images" / "train", num_classes=3, per_class=8, size=(70, 70))
    image_folder(desk.folder / "images" / "val", num_classes=3, per_class=2, size=(70, 70))
    words = ("--array", "2", "--shards", "2", "--time", "10", "--mem", "1G", "--cpus-per-task", "1")
    text = desk.submit("prepare", "images", "packed", *words)
    first, second = re.findall(r"job (\d+)", text)[:2]
    desk.wait_for_end(first, second)
    assert desk.submit("prepare", "images", "packed", *words, "--print").count("--array") >= 1
    small = ("--set", "model.image_size=64", "--set", "model.patch_size=8", "--set", "global_batch_size=8")
    where = ("--config", str(desk.site), "--nodes", "1", "--cluster", "slurm", "--gpus-per-node", "1")
    more = ("--set", "steps=2", "--set", "model.depth=1", "--set", "optim.warmup_steps=1", "--set", "engine.precision=fp32")
    text = desk.submit("pretrain", "vit_tiny", "--data", "packed", "--name", "t", *where, *small, *more)
    desk.wait_for_end(*re.findall(r"submitted job (\d+)", text))
    assert desk.record("t")[-1]["why"] == "finished", desk.picture()

    options = ("--", "--probes", "knn", "--num-train", "12", "--num-test", "4", "--k", "3")
    text = desk.submit("probe", "runs/t", "--cluster", "slurm", "--config", str(desk.site), *options)
    desk.wait_for_end(*re.findall(r"submitted job (\d+)", text))
    assert (desk.run("t") / "evaluation.json").exists(), (desk.run("t") / "probe" / "log.txt").read_text()
    assert "knn_3" in read_scores(desk.run("t"))


SWEEP = """\
stages: {pretrain: {recipe: vit_tiny}, finetune: {recipe: vit_tiny, from: pretrain}}
options: >-
  --data digits --gpus-per-node 1 --set model.depth=1 --set optim.warmup_steps=1 --set steps=2 --set metrics.every=1
  --set finetune:evaluate.max_samples=20
score: finetune.top1
variants:
  default: {published: 50}
  no_shift: {options: "--config pretrain:ablate/no_shift", published: fails}
  no_causal: {options: "--config pretrain:ablate/no_causal"}
  bad:
    options: >-
      --set pretrain:optim.base_lr=1e30 --set pretrain:optim.clip_grad_norm=null
      --set pretrain:guard.max_consecutive_skips=1 --set pretrain:steps=9
"""


def test_a_sweep_of_four_is_an_array_for_each_stage_with_a_table_at_the_end(desk: Desk) -> None:
    (desk.folder / "four.yaml").write_text(SWEEP)
    words = ("sweep", "four.yaml", "--name", "s", "--config", str(desk.site), "--array-parallelism", "2")
    text = desk.submit(*words)
    jobs = [line.split(": job ")[1].split()[0].rstrip(",") for line in text.splitlines() if ": job " in line]
    assert len(jobs) == 3
    assert "ArrayTaskThrottle=2" in desk.ask("scontrol", "show", "job", jobs[0])
    assert "run by run" in text
    desk.wait_for_end(*jobs)
    rows = list(csv.DictReader((desk.run("s") / "table.csv").open()))
    assert [row["variant"] for row in rows] == ["default", "no_shift", "no_causal", "bad"]
    for variant in ("default", "no_shift", "no_causal"):
        assert (desk.run("s") / variant / "finetune" / "best" / "results.json").exists(), variant
    assert not (desk.run("s") / "bad" / "finetune" / "checkpoints").exists()
    for name in ("table.md", "scores.png"):
        assert (desk.run("s") / name).stat().st_size > 100
