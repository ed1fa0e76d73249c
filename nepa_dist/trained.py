"""Trained models from wherever they are kept: the folder of a run, a checkpoint, exported weights, official weights.

What a path holds is decided by what lies in it: ``checkpoints/`` makes it a run, ``manifest.json`` a checkpoint,
``config.json`` weights, official ones if that says ``hidden_size``. A file of tensors needs its ``config.json`` beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nepa_dist.checkpoint.portable import CheckpointError
from nepa_dist.checkpoint.store import CheckpointStore
from nepa_dist.config import Config, ConfigError, DataConfig
from nepa_dist.data.device import normalize
from nepa_dist.labels import ID2LABEL, LABEL2ID, read_labels
from nepa_dist.model import Features, VisionTransformer
from nepa_dist.names import misfits
from nepa_dist.official import OFFICIAL_EMA, OfficialFormatError, read_json, read_official
from nepa_dist.provenance import Kind, Provenance
from nepa_dist.tasks.base import Task
from nepa_dist.tasks.build import build_task

_log = logging.getLogger(__name__)


class WeightsError(ValueError):
    """A path that holds no model that can be loaded; the message says what is wrong with it."""


class Weights(NamedTuple):
    """Tensors and what they are of."""

    state: dict[str, Tensor]
    """By the names of a task: ``backbone.*``, ``head.*``. CPU, in the dtype they are stored in."""
    config: Config
    """Of the run. For official weights: task, model and normalisation are theirs, the rest is the defaults."""
    provenance: Provenance
    ones: tuple[str, ...] = ()
    """QK-norm weights that official weights lack; they are ones."""
    class_names: tuple[str, ...] = ()
    """Of the head's classes, in order; none if they are not recorded."""


class Trained(NamedTuple):
    """A model and where it comes from."""

    task: Task
    """In evaluation mode, on the CPU, in fp32."""
    config: Config
    """See :class:`Weights`."""
    provenance: Provenance
    class_names: tuple[str, ...] = ()
    """See :class:`Weights`."""

    @property
    def data(self) -> DataConfig:
        """Its ``mean`` and ``std`` normalise the pixels."""
        return self.config.data

    @property
    def origin(self) -> str:
        """Which weights these are, for people: step, averaged or raw."""
        return self.provenance.origin


class Backbone(nn.Module):
    """A trained backbone for images of any size.

    Args:
        model: the vision transformer.
        config: attention, mean and std are those that it was trained with.
        provenance: where it comes from.
    """

    def __init__(self, model: VisionTransformer, config: Config, provenance: Provenance) -> None:
        super().__init__()
        self.model = model
        self.causal = config.causal
        """Whether a token saw only itself and earlier ones in training."""
        self.mean, self.std = config.data.mean, config.data.std
        """For pixels in [0, 1]."""
        self.provenance = provenance

    def forward(self, images: Tensor, *, layers: tuple[int, ...] = (), causal: bool | None = None) -> Features:
        """Features of normalised images.

        A side that is no multiple of the patch size is scaled to the nearest one (bilinear, antialiased), at least one patch.

        Args:
            images: [B, 3, H, W] float, normalised with ``mean`` and ``std``; H and W any.
            layers: blocks whose outputs are wanted too (``taps``), by index from 0; negative ones count from the end.
            causal: whether a token sees only itself and earlier ones; default: as in training. A backbone that was pretrained
                causally and not fine-tuned has never looked ahead.

        Returns:
            ``hidden`` [B, T, D] after the final norm, CLS first, then the patches of ``grid`` row by row; ``embed``, ``taps``.

        Raises:
            ValueError: the images have another shape, or a layer is no block.
        """
        P, size = self.model.config.patch_size, tuple(images.shape[2:])
        fitting = tuple(max(1, int(side / P + 0.5)) * P for side in size)
        if images.dim() == 4 and min(images.shape) > 0 and fitting != size:
            images = nn.functional.interpolate(images, size=fitting, mode="bilinear", align_corners=False, antialias=True)
        features: Features = self.model(images, causal=self.causal if causal is None else causal, taps=layers)
        return features

    def prepare(self, pixels: Tensor) -> Tensor:
        """Normalise uint8 pixels [B, H, W, 3] to float32 [B, 3, H, W] on their device.

        Raises:
            ValueError: these are no such pixels; floats may be in [0, 1] or not, which only their owner knows.
        """
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[3] != 3:
            found = f"{str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}"
            raise ValueError(f"pixels must be uint8 [B, H, W, 3], got {found}; normalise others with mean and std yourself")
        return normalize(pixels, self.mean, self.std)


def load_backbone(path: str | Path, *, ema: bool = True) -> Backbone:
    """Load the backbone of any run, checkpoint or weights, whatever head it was trained with.

    Args:
        path: see :func:`read_weights`.
        ema: see :func:`read_weights`.

    Returns:
        In evaluation mode, on the CPU, in fp32.

    Raises:
        WeightsError, CheckpointError, OfficialFormatError: as for :func:`read_weights`; or tensors do not fit, or raw weights
            are asked for of a file of averages.
    """
    weights = _read_as_asked(path, ema=ema)
    config, prefix = weights.config, "backbone."
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.state.items() if name.startswith(prefix)}
    with torch.device("meta"):  # weights that are overwritten need not be drawn: 7 of 8 seconds for vit_l
        backbone = VisionTransformer(config.model)
    _fill(backbone.to_empty(device="cpu"), own, path)
    return Backbone(backbone, config, weights.provenance).float().eval()


def load_trained(path: str | Path, *, ema: bool = True) -> Trained:
    """Load a model with the head that it was trained with.

    Args:
        path: see :func:`read_weights`.
        ema: see :func:`read_weights`.

    Raises:
        WeightsError, CheckpointError, OfficialFormatError: as for :func:`load_backbone`.
    """
    weights = _read_as_asked(path, ema=ema)
    try:
        task = build_task(weights.config)
    except ConfigError as error:
        raise WeightsError(f"{path} cannot be built: {'; '.join(error.problems)}") from None
    _fill(task, weights.state, path)
    return Trained(task.float().eval(), weights.config, weights.provenance, weights.class_names)


def read_weights(path: str | Path, *, ema: bool = True) -> Weights:
    """Read the weights at a path; no model is built.

    Args:
        path: a run's folder (its newest checkpoint that verifies; newer ones that do not are logged), a checkpoint's folder,
            a folder of weights as ``python -m nepa_dist.export`` or the official code writes it, or a file of weights beside
            its ``config.json``.
        ema: take the averaged weights where there are any. Exported weights are of one kind, which their header says. What
            was frozen has no average: its average is the weight.

    Raises:
        WeightsError: there is nothing at the path, it is none of these, or its configuration is not valid here.
        CheckpointError: the run has no checkpoint that verifies, or the checkpoint does not.
        OfficialFormatError: official weights that cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"there is no run and no file of weights at {path}")
    if (path / "checkpoints").is_dir():
        return _from_run(path, ema=ema)
    if (path / "manifest.json").is_file():
        return _from_checkpoint(path, ema=ema, check_digests=True)
    if path.is_file() or (path / "config.json").is_file():
        return _from_folder(path, ema=ema)
    raise WeightsError(
        f"{path} is no run (no checkpoints/ in it), no checkpoint (no manifest.json) and no weights (no config.json)"
    )


def _read_as_asked(path: str | Path, *, ema: bool) -> Weights:
    """:func:`read_weights`, but averages are never given for raw weights."""
    weights = read_weights(path, ema=ema)
    if not ema and weights.provenance.weights == "ema":
        raise WeightsError(
            f"{path} holds only {weights.provenance.origin}: leave --raw out (ema=True) to take them, or name the run or the "
            "checkpoint that they are from, which has the raw ones"
        )
    return weights


def _from_run(run_dir: Path, *, ema: bool) -> Weights:
    found = CheckpointStore(run_dir / "checkpoints").latest()
    damaged = [f"{path}: {reason}" for path, reason in found.passed_over]
    if found.path is None:
        raise CheckpointError("\n  - ".join([f"{run_dir} has no checkpoint that can be used", *damaged]))
    for line in damaged:
        _log.warning("passed over %s", line)
    return _from_checkpoint(found.path, ema=ema, check_digests=False)


def _from_checkpoint(folder: Path, *, ema: bool, check_digests: bool) -> Weights:
    manifest, reader = CheckpointStore.open(folder, check_digests=check_digests)
    config = _config(manifest.meta.get("config"), folder / "manifest.json")
    averaged = {name for name in reader.names() if ema and "ema" in reader.fields(name)}
    state = {}
    for name in reader.names():
        field = "ema" if name in averaged else "weight"
        state[name] = reader.read(name, [field])[field]
    kind: Kind = "ema" if averaged else "raw"
    names = tuple(manifest.meta.get("class_names", ()))
    return Weights(state, config, Provenance.of_checkpoint(folder, manifest, kind), class_names=names)


def _from_folder(path: Path, *, ema: bool) -> Weights:
    """Exported or official weights: a folder, or a file in it."""
    # Where a link leads is looked up once: that of a run's best weights may be moved between two files.
    folder = (path.parent if path.is_file() else path).resolve()
    path = folder / path.name if path.is_file() else folder
    try:
        settings = read_json(folder / "config.json", "it says what model these weights are of")
    except OfficialFormatError as error:
        raise WeightsError(str(error)) from None
    if "hidden_size" in settings:
        return _from_official(path, settings, ema=ema)
    config = _config({key: settings[key] for key in settings if key not in (ID2LABEL, LABEL2ID)}, folder / "config.json")
    try:
        names = read_labels(settings, config.num_classes)
    except ValueError as error:
        raise WeightsError(f"{folder / 'config.json'}: {error}") from None
    file = path if path.is_file() else path / "model.safetensors"
    with _open(file) as content:
        state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - not a dict
    return Weights(state, config, _provenance(file), class_names=names)


def _from_official(path: Path, settings: Mapping[str, Any], *, ema: bool) -> Weights:
    file = path if path.is_file() else path / "model.safetensors"
    if ema and path.is_dir() and (path / OFFICIAL_EMA).is_file():
        file = path / OFFICIAL_EMA
    state, config, ones = read_official(path, ema=file != path and file.name == OFFICIAL_EMA)
    try:
        names = read_labels(settings, config.num_classes)
    except ValueError:  # their library writes LABEL_0 and LABEL_1 for a model without classes
        names = ()
    if file.suffix == ".safetensors" and file.is_file():
        return Weights(state, config, _provenance(file), ones, names)
    kind: Kind = "ema" if file.name == OFFICIAL_EMA else "unknown"
    return Weights(state, config, Provenance(kind, file.resolve().parent.name), ones, names)


def _provenance(file: Path) -> Provenance:
    """What the header of a safetensors file says."""
    with _open(file) as content:
        metadata = content.metadata() or {}
    try:
        return Provenance.from_metadata(metadata, file.resolve().parent.name)
    except (ValueError, TypeError) as error:
        raise WeightsError(f"the header of {file} is malformed: {error}") from None


def _config(values: Any, origin: Path) -> Config:
    if isinstance(values, dict) and "model_args" in values:
        raise WeightsError(f"{origin} is in timm's format, which is only written: export the run in another one")
    if not isinstance(values, dict) or "model" not in values:
        raise WeightsError(f"{origin} holds no configuration of a run, and none of an official model")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise WeightsError("\n  - ".join([f"the configuration in {origin} is not valid here:", *problems])) from None


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} cannot be read as safetensors: {error}") from None


def _fill(module: nn.Module, state: Mapping[str, Tensor], origin: str | Path) -> None:
    """Give a module all of its weights, or say everything that does not fit."""
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    problems = misfits({name: tensor.shape for name, tensor in state.items()}, wanted, by="the configuration says")
    if problems:
        raise WeightsError("\n  - ".join([f"{origin} does not fit its configuration:", *problems]))
    with torch.no_grad():
        module.load_state_dict(state, strict=True)
