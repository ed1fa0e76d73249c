"""Sweeps: what their runs are, what is done again, what a failing variant leaves, and what the table says."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cluster, options, submit, sweep, sweep_report
from jobs.pipeline import build_stages
from jobs.runs import write_outcome
from nepa_dist.config import Config
from nepa_dist.config_load import load_config

STAGES = {"pretrain": {"recipe": "vit_tiny"}, "finetune": {"recipe": "vit_tiny", "from": "pretrain"}}
OPTIONS = "--data digits --set steps=4 --set optim.warmup_steps=1"
VARIANTS: dict[str, Any] = {
    "default": {"published": 76.8},
    "no_shift": {"options": "--config pretrain:ablate/no_shift", "published": "fails"},
    "sigreg": {"options": "--config pretrain:ablate/sigreg"},
}
FREEZE: dict[str, Any] = {"frozen": {}, "trained": {"options": "--config ablate/finetune_patch_embed"}}


class Trainer:
    """Stands in for the ranks: leaves in each run folder what a training leaves."""

    def __init__(self) -> None:
        self.runs: list[Config] = []
        self.codes: dict[str, int] = {}
        """Name of a run, VARIANT/STAGE -> exit code; -9 is a rank that is killed and can note nothing."""

    @property
    def names(self) -> list[str]:
        return [name_of(config.run_dir) for config in self.runs]

    def __call__(self, run_dir: Path, world_size: int) -> int:
        config = load_config([run_dir / "config.yaml"])
        self.runs.append(config)
        code = self.codes.get(name_of(run_dir), 0)
        row = {"step": config.steps, "loss": -0.25, "eta_seconds": 0, "step_seconds": 1.0, "images_per_second": 9.0}
        (run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        if code == 0:
            (run_dir / "checkpoints" / f"step-{config.steps:08}").mkdir(parents=True, exist_ok=True)
            if config.task == "finetune":
                (run_dir / "best").mkdir(exist_ok=True)
                (run_dir / "best" / "results.json").write_text('{"step": 4, "top1": 0.7425, "top5": 0.9}')
        if code == 1:
            (run_dir / "log.txt").write_text("12:00:00 step 3\n12:00:01 21 steps in a row had a non-finite gradient\n")
        if code >= 0:
            kinds = {0: "finished", 75: "stopped", 1: "gave up", 2: "mistake"}
            write_outcome(run_dir, kinds[code], "image 7 is missing" if code == 2 else "")
        return abs(code)


def name_of(run_dir: Path) -> str:
    return f"{run_dir.parent.name}/{run_dir.name}"


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trainer:
    monkeypatch.chdir(tmp_path)
    stand_in = Trainer()
    monkeypatch.setattr(cluster, "run_local", stand_in)
    return stand_in


def write(variants: dict[str, Any] = VARIANTS, **fields: Any) -> Path:
    """A file of a sweep in the working folder."""
    content = {"stages": STAGES, "options": OPTIONS, "score": "finetune.top1", "variants": variants} | fields
    path = Path("mine.yaml")
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False))
    return path


def run(*args: str, **fields: Any) -> int:
    return submit.main(["sweep", str(write(**fields)), "--name", "s", *args])


def table(root: Path = Path("runs/s")) -> dict[str, dict[str, str]]:
    with (root / "table.csv").open(newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def test_every_variant_runs_all_stages_with_its_own_settings(trainer: Trainer, tmp_path: Path) -> None:
    assert run() == 0
    assert trainer.names == [f"{name}/{stage}" for name in VARIANTS for stage in ("pretrain", "finetune")]
    root = tmp_path / "runs" / "s"
    assert [config.run_dir for config in trainer.runs[:2]] == [root / "default" / "pretrain", root / "default" / "finetune"]
    assert [config.init.path for config in trainer.runs[1::2]] == [str(root / name / "pretrain") for name in VARIANTS]
    pretraining = {name_of(config.run_dir): config for config in trainer.runs if config.task == "pretrain"}
    assert [config.objective.shift for config in pretraining.values()] == [True, False, True]
    assert pretraining["sigreg/pretrain"].objective.anti_collapse == "sigreg"
    assert {config.steps for config in trainer.runs} == {4}


def test_the_command_line_wins_over_the_file(trainer: Trainer) -> None:
    assert run("--set", "pretrain:steps=6", "--set", "seed=5") == 0
    assert {(config.task, config.steps, config.seed) for config in trainer.runs} == {("pretrain", 6, 5), ("finetune", 4, 5)}


def test_another_size_and_some_of_the_variants_and_stages(trainer: Trainer) -> None:
    assert run("--recipe", "vit_s", "--variants", "default,sigreg", "--stages", "pretrain") == 0
    assert trainer.names == ["default/pretrain", "sigreg/pretrain"]
    assert {config.model.embed_dim for config in trainer.runs} == {384}
    assert table()["no_shift"]["state"] == "pretrain not begun", "the table has all variants"


def test_a_shared_stage_runs_once_and_all_variants_start_with_it(trainer: Trainer, tmp_path: Path) -> None:
    assert run(variants=FREEZE, shared=["pretrain"]) == 0
    assert trainer.names == ["shared/pretrain", "frozen/finetune", "trained/finetune"]
    place = str(tmp_path / "runs" / "s" / "shared" / "pretrain")
    assert [config.init.path for config in trainer.runs] == [None, place, place]
    assert [config.finetune.freeze_patch_embed for config in trainer.runs[1:]] == [True, False]
    assert table()["frozen"]["pretrain_folder"] == table()["trained"]["pretrain_folder"] == place


def test_the_table_shows_ours_beside_the_published_numbers(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.codes["no_shift/finetune"] = 1
    assert run(title="The parts") == 0, "that a variant gives up is its result"
    rows = table()
    assert float(rows["default"]["score_percent"]) == pytest.approx(74.25)
    assert float(rows["default"]["difference"]) == pytest.approx(74.25 - 76.8)
    assert (rows["default"]["pretrain_loss"], rows["default"]["finetune_top5"]) == ("-0.25", "0.9")
    assert rows["no_shift"]["state"] == "finetune gave up"
    assert rows["no_shift"]["reason"].endswith("21 steps in a row had a non-finite gradient")
    assert rows["sigreg"]["published"] == ""
    text = Path("runs/s/table.md").read_text()
    assert text.startswith("# The parts\n")
    assert "| default | 74.25 | 76.8 | -2.55 | finished | -0.2500 | -0.2500 |" in text
    assert "| no_shift | fails | fails |  | finetune gave up |" in text
    for picture in ("scores.png", "loss-pretrain.png", "loss-finetune.png"):
        assert f"]({picture})" in text
        assert Path("runs/s", picture).stat().st_size > 1000
    out = capsys.readouterr().out
    assert "default   74.25" in out
    assert "no_shift: finetune gave up: 12:00:01 21 steps in a row" in out


def test_a_score_that_is_no_number_is_a_failure(trainer: Trainer) -> None:
    assert run() == 0
    Path("runs/s/sigreg/finetune/best/results.json").write_text('{"top1": NaN}')
    assert sweep_report.main(["runs/s"]) == 0
    assert table()["sigreg"]["state"] == "finished without a score"
    assert "| sigreg | fails |" in Path("runs/s/table.md").read_text()


def test_what_is_finished_or_has_given_up_is_not_done_again(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.codes["no_shift/pretrain"] = 1
    assert run() == 0
    assert trainer.names == ["default/pretrain", "default/finetune", "no_shift/pretrain", "sigreg/pretrain", "sigreg/finetune"]
    assert "no_shift/finetune: left out, no_shift/pretrain" in capsys.readouterr().out
    trainer.runs.clear()
    trainer.codes.clear()
    assert run() == 0
    assert trainer.names == []
    out = capsys.readouterr().out
    assert "default/pretrain: finished before" in out
    assert "no_shift/pretrain: gave up before" in out
    assert run("--retry") == 0
    assert trainer.names == ["no_shift/pretrain", "no_shift/finetune"]
    assert table()["no_shift"]["state"] == "finished"


@pytest.mark.parametrize(("code", "reason"), [(2, "image 7 is missing"), (-9, "a rank ended with exit code 9")])
def test_another_failure_is_reported_and_tried_again(
    code: int, reason: str, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.codes["default/pretrain"] = code
    assert run() == 1
    assert trainer.names[0] == "default/pretrain"
    assert trainer.names[1:] == ["no_shift/pretrain", "no_shift/finetune", "sigreg/pretrain", "sigreg/finetune"]
    assert table()["default"]["reason"] == reason
    assert reason in capsys.readouterr().out
    assert "| default |  |" in Path("runs/s/table.md").read_text(), "it says nothing about the method"
    trainer.runs.clear()
    trainer.codes.clear()
    assert run() == 0
    assert trainer.names == ["default/pretrain", "default/finetune"]


def test_a_stop_ends_the_sweep_and_the_same_command_goes_on(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.codes["no_shift/pretrain"] = 75
    assert run() == 75
    assert trainer.names == ["default/pretrain", "default/finetune", "no_shift/pretrain"]
    assert "no_shift/pretrain: stopped; the same command goes on here" in capsys.readouterr().err
    assert table()["default"]["score_percent"] == "74.25", "what is there is in the table"
    assert table()["no_shift"]["state"] == "pretrain stopped"
    trainer.runs.clear()
    trainer.codes.clear()
    assert run() == 0
    assert trainer.names == ["no_shift/pretrain", "no_shift/finetune", "sigreg/pretrain", "sigreg/finetune"]


def test_all_problems_of_all_variants_come_before_anything_starts(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    variants = VARIANTS | {"odd": {"options": "--set pretrain:objektive.shift=false"}, "wide": {"options": "--set seed=-1"}}
    assert run(variants=variants) == 2
    text = capsys.readouterr().err
    assert "odd/pretrain: --set objektive.shift=false: unknown key" in text
    assert "wide/pretrain, wide/finetune: seed" in text
    assert trainer.runs == []
    assert not Path("runs").exists()


def test_a_problem_of_many_runs_is_said_once(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--data", "/nonexistent/images") == 2
    text = capsys.readouterr().err
    assert text.count("/nonexistent/images") == 1
    assert "default/pretrain, default/finetune, no_shift/pretrain, no_shift/finetune and 2 more: " in text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"score": "finetune.top2"}, "score 'finetune.top2' is none of finetune.top1, finetune.top5"),
        ({"score": None}, "score: Field required"),
        ({"score": "finetune.top1", "shared": ["finetune"]}, "its stage is shared"),
        ({"shared": ["pretrian"]}, "did you mean 'pretrain'"),
        ({"shared": ["pretrain"]}, "variant no_shift: its options are for pretrain, which is shared"),
        ({"variants": {}}, "no variants"),
        ({"variants": {"shared": {}}}, "is not 'shared'"),
        ({"variants": {"A b": {}}}, "variant 'A b'"),
        ({"variants": {"a": {"published": True}}}, "variants.a.published: true is a truth value"),
        ({"variants": {"a": {"option": "x"}}}, "variants.a.option"),
        ({"variants": {"a": {"options": "--sed 3"}}}, "variant a: '--sed 3': unrecognized arguments"),
        ({"variants": {"a": {"options": "--set 'x"}}}, 'variant a: "--set \'x": No closing quotation'),
        ({"variants": {"a": {"options": "--name x"}}}, "unrecognized arguments"),
        ({"options": "--retry"}, "options: '--retry': unrecognized arguments"),
        ({"stages": {"finetune": {"from": "pretrain"}}}, "from 'pretrain' is no earlier stage"),
        ({"stages": {"pretrain": {"options": "'"}}}, "pretrain: options"),
        ({"stages": 3}, "stages: Input should be a valid dictionary"),
        ({"stages": {"pretrain": {}, "finetune": {}}}, "unknown recipe ''"),
        ({"variants": {"a": {}, "b": {"published": 3}}}, "variants a and b have the same settings"),
    ],
)
def test_mistakes_in_a_file_are_named(
    fields: dict[str, Any], words: str, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(**fields) == 2
    assert words in capsys.readouterr().err
    assert trainer.runs == []


def test_variants_that_the_command_line_makes_equal_are_refused(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--set", "pretrain:objective.shift=true") == 2
    assert "variants default and no_shift have the same settings" in capsys.readouterr().err


def test_a_start_with_another_model_is_found_before_the_pretraining(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {"same": {}, "plain": {"options": "--config ablate/plain"}}
    assert run(variants=variants, shared=["pretrain"]) == 2
    assert (
        "plain/finetune: another model than shared/pretrain, which it starts with: model.gated_mlp" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["objektive"], "did you mean 'objective'"),
        (["missing.yaml"], "cannot read missing.yaml"),
        (["objective", "--variants", "no_shfit"], "--variants: no variant 'no_shfit'; did you mean 'no_shift'"),
        (["objective", "--stages", "segment"], "--stages: no stage 'segment'"),
    ],
)
def test_a_command_that_cannot_be_is_refused(
    args: list[str], words: str, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main(["sweep", *args]) == 2
    assert words in capsys.readouterr().err


def test_on_slurm_each_stage_is_an_array_that_follows_the_one_before(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run by run; a shared stage is awaited by all."""
    assert run("--cluster", "slurm", "--set", "cluster.gpus_per_node=1", "--print") == 0
    pretrain, finetune = capsys.readouterr().out.split("# ---- ")[1:]
    assert "#SBATCH --array=0-2" in pretrain
    assert "dependency" not in pretrain
    assert "#SBATCH --dependency=aftercorr:JOB-OF-pretrain" in finetune
    assert finetune.index("default/finetune") < finetune.index("no_shift/finetune") < finetune.index("sigreg/finetune")
    assert run("--cluster", "slurm", "--print", variants=FREEZE, shared=["pretrain"]) == 0
    pretrain, finetune = capsys.readouterr().out.split("# ---- ")[1:]
    assert "shared/pretrain" in pretrain
    assert "#SBATCH --dependency=afterok:JOB-OF-pretrain" in finetune
    assert trainer.runs == []


def test_a_dry_run_describes_all_runs_and_touches_nothing(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(variants=FREEZE, shared=["pretrain"])
    assert submit.main(["sweep", str(path), "--dry-run", "--gpus-per-node", "finetune:4"]) == 0
    out = capsys.readouterr().out
    assert "2 variants, compared by finetune.top1" in out
    assert "pretrain: 1 run\nfinetune: 2 runs, after pretrain\n" in out
    assert "trained/finetune: 4 steps on 4 ranks, starts with shared/pretrain" in out
    assert str(Path("runs/sweep-mine").absolute()) in out
    assert [entry.name for entry in Path().iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(("shared", "one_to_one"), [([], True), (["pretrain"], False)])
def test_the_runs_of_a_stage_can_be_one_array(shared: list[str], one_to_one: bool, trainer: Trainer) -> None:
    """What a submission needs: which runs, in which order, and after which others."""
    found, problems = sweep.read_sweep(write(variants=FREEZE, shared=shared))
    assert found is not None, problems
    args = sweep.sweep_parser().parse_args(["mine.yaml"])
    first, second = sweep.arrays(build_stages(found.runs, args, Path("runs/s").absolute())[0])
    assert (first.stage, first.after, len(first.runs)) == ("pretrain", None, 2 if one_to_one else 1)
    assert (second.stage, second.after, second.one_to_one) == ("finetune", "pretrain", one_to_one)
    assert [name_of(stage.config.run_dir) for stage in second.runs] == ["frozen/finetune", "trained/finetune"]
    starts = [Path(str(stage.config.init.path)) for stage in second.runs]
    waits = [stage.config.run_dir for stage in first.runs]
    assert starts == (waits if one_to_one else waits * 2)


@pytest.mark.parametrize("name", options.recipe_names("sweep"))
def test_every_sweep_of_the_project_can_start(name: str, trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    """From any working folder, and each of its variants is another model, objective or recipe."""
    assert submit.main(["sweep", name, "--dry-run"]) == 0, capsys.readouterr().err


def test_the_sweeps_of_the_paper_exist() -> None:
    wanted = "objective masking components freeze attention layer_decay mlp anti_collapse objective_digits"
    assert sorted(wanted.split()) == options.recipe_names("sweep")


def test_a_real_sweep_ends_with_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real ranks on digits: a variant with a learning rate that nothing survives fails, the other has a score."""
    monkeypatch.chdir(tmp_path)
    small = "--set model.embed_dim=32 --set model.num_heads=2 --set model.depth=1 --set model.image_size=32 "
    small += "--set model.patch_size=8 --set global_batch_size=4 --set finetune:evaluate.max_samples=8 "
    variants = {
        "sane": {"published": 50.0},
        "wild": {"options": "--set pretrain:optim.base_lr=1e30 --set pretrain:guard.max_consecutive_skips=1"},
    }
    assert run(variants=variants, options=small + OPTIONS) == 0
    rows = table()
    assert rows["wild"]["state"] == "pretrain gave up"
    assert "non-finite gradient" in rows["wild"]["reason"]
    capsys.readouterr()
    assert submit.main(["status", "runs/s/wild"]) == 0
    assert "ended: gave up (2 steps in a row had a non-finite gradient" in capsys.readouterr().out
    assert rows["sane"]["state"] == "finished"
    assert 0 <= float(rows["sane"]["score_percent"]) <= 100
    assert (rows["sane"]["pretrain_step"], rows["sane"]["finetune_step"]) == ("4", "4")
    assert (tmp_path / "runs" / "s" / "scores.png").exists()
