"""A stand-in for the ranks of a run: it leaves in the run folder what a training leaves, at once."""

from __future__ import annotations

import json
from pathlib import Path

from jobs.runs import write_outcome
from nepa_dist.config import Config
from nepa_dist.config_load import load_config


class Trainer:
    """Stands in for the ranks: leaves in each run folder what a training leaves."""

    def __init__(self) -> None:
        self.runs: list[Config] = []
        self.codes: dict[str, int] = {}
        self.drawn: list[Path] = []

    def __call__(self, run_dir: Path, world_size: int) -> int:
        config = load_config([run_dir / "config.yaml"])
        self.runs.append(config)
        code = self.codes.get(config.task, 0)
        if code == 0:
            row = {"step": config.steps, "loss": 0.25, "eta_seconds": 0, "step_seconds": 1.0, "images_per_second": 9.0}
            (run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
            (run_dir / "checkpoints" / f"step-{config.steps:08}").mkdir(parents=True, exist_ok=True)
            (run_dir / "figures").mkdir(exist_ok=True)
            (run_dir / "figures" / "loss.png").touch()
        write_outcome(run_dir, {0: "finished", 75: "stopped", 2: "mistake"}[code], "why it ended")
        return code
