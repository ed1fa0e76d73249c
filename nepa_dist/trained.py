"""Trained models from wherever they are kept: the folder of a run, a checkpoint, converted weights, official weights.

What a path holds is decided by what lies in it: ``checkpoints/`` makes it a run, ``manifest.json`` a checkpoint,
``config.json`` weights, official ones if that says ``hidden_size``. A file of tensors needs its ``config.json`` beside it.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nepa_dist.checkpoint.portable import CheckpointError
from nepa_dist.checkpoint.store import CheckpointStore
from nepa_dist.config import Config, DataConfig
from nepa_dist.export import OfficialTask, load_official, read_official
from nepa_dist.tasks.base import build_task
from nepa_dist.tasks.finetune import FinetuneTask
from nepa_dist.tasks.pretrain import PretrainTask

OFFICIAL_EMA = "pytorch_model_ema.bin"

_log = logging.getLogger(__name__)


class WeightsError(ValueError):
    """A path that holds no model that can be loaded; the message says what is wrong with it."""


class Trained(NamedTuple):
    """A model and what its images must look like."""

    task: OfficialTask
    """In evaluation mode, on the CPU, in fp32."""
    data: DataConfig
    """Its ``mean`` and ``std`` normalise the pixels."""
    origin: str
    """Which weights these are, for people: step, averaged or raw."""


def load_trained(path: str | Path, *, ema: bool = True) -> Trained:
    """Load a model for looking at it.

    Args:
        path: a run's folder (its newest checkpoint that verifies; newer ones that do not are logged), a checkpoint's folder,
            a folder of weights as ``convert`` or the official code writes it, or a safetensors file beside its ``config.json``.
        ema: take the averaged weights where there are any. A folder that ``convert`` made holds one kind only.

    Raises:
        WeightsError: there is nothing at the path, it is none of these, or its content does not fit.
        CheckpointError: the run has no checkpoint that verifies, or the checkpoint does not.
        OfficialFormatError: official weights that cannot be loaded.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"there is no run and no file of weights at {path}")
    if path.is_file():
        return _from_weights(path.parent, path, ema=ema)
    if (path / "checkpoints").is_dir():
        return _from_run(path, ema=ema)
    if (path / "manifest.json").is_file():
        return _from_checkpoint(path, ema=ema, check_digests=True)
    if (path / "config.json").is_file():
        return _from_weights(path, None, ema=ema)
    raise WeightsError(
        f"{path} is no run (no checkpoints/ in it), no checkpoint (no manifest.json) and no weights (no config.json)"
    )


def _from_run(run_dir: Path, *, ema: bool) -> Trained:
    found = CheckpointStore(run_dir / "checkpoints").latest()
    damaged = [f"{path}: {reason}" for path, reason in found.passed_over]
    if found.path is None:
        raise CheckpointError("\n  - ".join([f"{run_dir} has no checkpoint that can be used", *damaged]))
    for line in damaged:
        _log.warning("passed over %s", line)
    return _from_checkpoint(found.path, ema=ema, check_digests=False)


def _from_checkpoint(folder: Path, *, ema: bool, check_digests: bool) -> Trained:
    manifest, reader = CheckpointStore.open(folder, check_digests=check_digests)
    config = _config(manifest.meta.get("config"), folder / "manifest.json")
    field = "ema" if ema and "ema" in reader.common_fields() else "weight"
    state = {name: reader.read(name, [field])[field] for name in reader.names()}
    kind = "averaged" if field == "ema" else "raw"
    return Trained(_fill(config, state, folder), config.data, f"step {manifest.step}, {kind} weights")


def _from_weights(folder: Path, file: Path | None, *, ema: bool) -> Trained:
    settings = _read_settings(folder / "config.json", file)
    if "hidden_size" in settings:
        averaged = ema and file is None and (folder / OFFICIAL_EMA).is_file()
        task = read_official(folder, ema=averaged) if file is None else load_official(_read_tensors(file), settings)
        return Trained(task, DataConfig(), "official format" + (", averaged weights" if averaged else ""))
    config = _config(settings, folder / "config.json")
    file = file or folder / "model.safetensors"
    return Trained(_fill(config, _read_tensors(file), file), config.data, "converted weights")


def _read_settings(config_file: Path, file: Path | None) -> dict[str, Any]:
    if not config_file.is_file():
        raise WeightsError(f"{file} has no config.json beside it, which says what model these weights are of")
    try:
        settings = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{config_file} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise WeightsError(f"{config_file} holds no settings by name")
    return settings


def _config(values: Any, origin: Path) -> Config:
    if not isinstance(values, dict) or "model" not in values:
        raise WeightsError(f"{origin} holds no configuration of a run, and none of an official model")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise WeightsError("\n  - ".join([f"the configuration in {origin} is not valid here:", *problems])) from None


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} cannot be read as safetensors: {error}") from None


def _fill(config: Config, state: dict[str, Tensor], origin: Path) -> OfficialTask:
    task = build_task(config)
    if not isinstance(task, PretrainTask | FinetuneTask):
        raise WeightsError(f"{origin} is of task {config.task!r}; pretraining and classification can be loaded here")
    try:
        task.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise WeightsError(f"{origin} does not fit its configuration: {error}") from None
    return task.float().eval()
