"""Where a run begins: at its own newest checkpoint that verifies, at another run's, or at random weights.

What happens is decided by what the run folder holds. A checkpoint that does not fit is refused with every difference listed;
``checkpoint.allow`` (``--allow``) names what may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from nepa_dist.checkpoint.portable import CheckpointError, PartialState, StateReader
from nepa_dist.checkpoint.store import CheckpointStore
from nepa_dist.config import Config, ConfigError, changed_keys, may_differ
from nepa_dist.data.augment import AUGMENT_VERSION
from nepa_dist.engines.base import NamedStateSource, StateMismatchError
from nepa_dist.run import Run
from nepa_dist.run_folder import count_starts
from nepa_dist.state import TrainState


def begin(run: Run) -> list[str]:
    """Bring weights, optimizer and counters to where the run begins. A collective.

    Args:
        run: its engine, and its state, are changed.

    Returns:
        Sentences about what was found, on the main rank.

    Raises:
        ConfigError: the checkpoint belongs to other settings or other data (every difference is listed), or none that the run
            should begin with can be used.
    """
    notes: list[str] = []
    path: Path | None = None
    if run.world.is_main:
        notes += [f"removed the leftover {name} of an interrupted save" for name in run.store.sweep()]
        path = _newest(run.store, notes, "move the folder away to start over")
        run.state.restarts = count_starts(run.config.run_dir)
    path = run.world.gather(path)[0]
    if path is not None:
        return [*notes, *_continue(run, path)]
    if run.config.init.path is not None and not begins_with_transfer(run.config):
        return [*notes, *_start_from(run, Path(run.config.init.path))]
    return notes


def begins_with_transfer(config: Config) -> bool:
    """Whether a new run takes its weights from another model, before an engine cuts its own (:mod:`nepa_dist.transfer`)."""
    if config.init.path is None or config.init.load not in ("weights", "ema"):
        return False
    return config.task != "pretrain" or (Path(config.init.path) / "config.json").is_file()  # weights, not a run or a checkpoint


def _continue(run: Run, path: Path) -> list[str]:
    # Rank 0 has just read every byte to verify it; the others need not.
    manifest, reader = run.store.open(path, check_digests=False)
    _refuse_other_settings(run, path, manifest.meta)
    _load(run, path, reader, keep_average=run.config.init.load == "weights+ema")
    run.state = replace(TrainState.from_dict(manifest.meta["state"]), restarts=run.state.restarts)
    return [f"continuing from {path}, step {run.state.step}", *_forget_other_scores(run, manifest.meta)]


def _start_from(run: Run, source: Path) -> list[str]:
    """Begin a new run with what ``init`` names."""
    what = run.config.init.load
    notes: list[str] = []
    path: Path | None = None
    if run.world.is_main:
        path = _find(source, notes)
    path = run.world.gather(path)[0]
    assert path is not None
    manifest, reader = run.store.open(path, check_digests=False)
    if what == "everything":
        _refuse_other_settings(run, path, manifest.meta)
        _load(run, path, reader)
        state = TrainState.from_dict(manifest.meta["state"])
        run.state = replace(state, restarts=run.state.restarts, best_score=None, best_step=0)  # those weights are not here
        if run.state.step >= run.plan.steps:
            raise ConfigError([f"init.path: {path} is at the last step, {run.state.step}; give more steps, with --allow steps"])
    else:
        _refuse_other_model(run, path, manifest.meta)
        _load(run, path, _partial(run, reader, what), keep_average=what == "weights+ema")
    return [*notes, f"starting with {what if what == 'everything' else f'the {what}'} of {path}, step {manifest.step}"]


def _forget_other_scores(run: Run, meta: Mapping[str, Any]) -> list[str]:
    """Let the best score start anew where it was measured in another way than scores are from now on; says so."""
    config, state = run.config, run.state
    if state.best_score is None:
        return []
    old, new = meta["config"], config.model_dump(mode="json")
    changes = []
    for name in _MEASURE[config.task]:
        section, _, key = name.partition(".")
        before, after = old.get(section, {}).get(key), new[section][key]
        if before != after:
            changes.append(f"{name} was {before!r} and is {after!r}")
    if meta["data_fingerprint"] != run.container.fingerprint:
        changes.append("the data is other data")
    if not changes:
        return []
    text = (
        f"{', '.join(changes)}: the best score so far, {state.best_score:.4f} of step {state.best_step}, cannot be compared "
        "with those to come, and starts anew; when other weights take the place of these, they are kept as "
        f"best-of-step-{state.best_step:08d}"
    )
    run.state = replace(state, best_score=None)
    return [text]


_MEASURE = {
    "finetune": ("evaluate.max_samples", "evaluate.resize", "evaluate.squash", "evaluate.bicubic"),
    "segment": (
        "evaluate.max_samples",
        *(f"segment.{key}" for key in ("window", "stride", "eval_scales", "eval_flip", "reduce_zero_label")),
    ),
}
"""Settings by task that a score depends on beside the weights."""


def _partial(run: Run, reader: StateReader, what: Literal["weights", "ema", "weights+ema"]) -> PartialState:
    mode: Literal["weights", "weights+ema"] = "weights+ema" if what == "weights+ema" else "weights"
    frozen = {name for name, parameter in run.task.named_parameters() if not parameter.requires_grad}
    keep_ema = run.config.optim.ema_decay is not None
    try:
        return PartialState(reader, mode=mode, use_ema=what == "ema", keep_ema=keep_ema, frozen=frozen)
    except CheckpointError as error:
        raise ConfigError([f"init.load {what}: {error}"]) from None


def _load(run: Run, path: Path, state: NamedStateSource, *, keep_average: bool = False) -> None:
    try:
        run.engine.load_named_state(state, keep_average=keep_average)
    except StateMismatchError as error:
        raise ConfigError([f"{path}: {error}"]) from None


def _find(source: Path, notes: list[str]) -> Path:
    """The checkpoint that ``init.path`` means: a folder of one, or the newest that verifies of a run."""
    if (source / "manifest.json").exists():
        try:
            CheckpointStore.verify(source)
        except CheckpointError as error:
            raise ConfigError([f"init.path: {error}"]) from None
        return source
    path = _newest(CheckpointStore(source / "checkpoints"), notes, "choose another init.path")
    if path is None:
        hint = f"; did you mean {source.absolute().parent}?" if source.name == "checkpoints" else ""
        if (source / "model.safetensors").exists():
            hint = "; it holds weights alone: give --load weights, or name the run itself"
        raise ConfigError([f"init.path {source} is neither a checkpoint nor a run that has one{hint}"])
    return path


def _newest(store: CheckpointStore, notes: list[str], advice: str) -> Path | None:
    try:
        found = store.latest()
    except CheckpointError as error:
        raise ConfigError([str(error)]) from None
    passed_over = [f"passed over the damaged checkpoint {bad}: {reason}" for bad, reason in found.passed_over]
    notes += passed_over
    if found.path is None and passed_over:
        raise ConfigError([f"no checkpoint verifies; {advice}", *passed_over])
    return found.path


def _refuse_other_settings(run: Run, path: Path, meta: Mapping[str, Any]) -> None:
    config = run.config
    problems = [f"{key}: {old!r} in the checkpoint, {new!r} now" for key, old, new in changed_keys(meta["config"], config)]
    if meta["augment_version"] != AUGMENT_VERSION and not may_differ("data.augment", config):
        problems.append(f"data.augment: version {meta['augment_version']} in the checkpoint, {AUGMENT_VERSION} in this code")
    if meta["data_fingerprint"] != run.container.fingerprint and not may_differ("data.source", config):
        problems.append(f"data.source: {config.data.source} holds other images than those the run began with")
    if problems:
        advice = (
            "use another --name, or the settings it was made with (a config.yaml edited by hand can be removed), "
            "or say with --allow KEY what may differ"
        )
        raise ConfigError([f"{path} does not fit this run; {advice}", *problems])


def _refuse_other_model(run: Run, path: Path, meta: Mapping[str, Any]) -> None:
    """Weights alone need the same model; where they were trained, and how, does not matter."""
    changed = [item for item in changed_keys(meta["config"], run.config) if item[0].startswith("model.")]
    # What draws nothing and holds no weight may differ: the size of images (RoPE takes any), rates of drop-out, first values.
    free = {f"model.{name}" for name in ("preset", "image_size", "drop_path", "rope_rescale", "layer_scale_init", "init_std")}
    if not run.config.model.rope:
        free.discard("model.image_size")
    problems = [f"{key}: {old!r} in the checkpoint, {new!r} now" for key, old, new in changed if key not in free]
    if problems:
        raise ConfigError([f"init.path: {path} holds another model", *problems])
