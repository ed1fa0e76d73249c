"""What the loop and the engines know of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nepa_dist.config import ModelConfig
from nepa_dist.keyed import keyed_uniform
from nepa_dist.metrics.collapse import AllReduce
from nepa_dist.model import VisionTransformer

HEAD_LAYER = -1
"""``Task.lr_layer`` of what has the head's own learning rate."""


class Scores(NamedTuple):
    """What a task makes of the sums over a validation split."""

    values: dict[str, float]
    """By metric name."""
    main: str
    """Name of the one that the best checkpoint is chosen by; more is better."""
    per_class: str
    """CSV with a header and one line for each class."""


class Health(NamedTuple):
    """Gauges of the representation."""

    gauges: dict[str, Tensor]
    """0-d, by metric name, equal on all ranks."""
    spectra: dict[str, Tensor]
    """What :func:`nepa_dist.metrics.collapse.spectral_metrics` needs for the rest, by the label of the embeddings."""


class Task(nn.Module, ABC):
    """A backbone, a head, and the loss that trains them.

    Parameters are named ``backbone.*`` and ``head.*`` in every checkpoint; what is frozen requires no gradient. The loss is
    computed inside ``forward``, so that hooks of an engine and compilation see the whole graph.

    Args:
        model: the backbone.
        seed: of the initial weights, and of whatever is drawn per step.
    """

    head: nn.Module
    weighs = False
    """Whether micro-batches count differently in the mean over the global batch, by :meth:`weight`."""
    looked_into = False
    """While true, pretraining's forward gives its predictions, as ``hidden`` [B, T, D] in the logs, and no loss."""

    def __init__(self, model: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.backbone = VisionTransformer(model, seed=seed)
        self.seed = seed
        # A tensor and not a Python number: a new value each step must not recompile a compiled forward. Not a buffer: it
        # follows from the step, so there is nothing for an engine to broadcast or save.
        self.rope_scale = torch.ones(())

    @abstractmethod
    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of one micro-batch.

        Args:
            batch: ``images`` [B, 3, H, W] float32, normalised; ``labels`` and ``ids`` [B] int64; ``masks`` uint8 [B, H, W] if
                the data has them; or what :meth:`prepare` made of these.

        Returns:
            The mean loss (0-d, fp32) and further 0-d values to log, by metric name.
        """

    def begin_step(self, step: int, *, observe: bool) -> None:
        """Prepare for one optimizer update; draws its RoPE rescale, one for all ranks and micro-batches.

        Args:
            step: number of finished updates; keys everything random that belongs to the step and not to a sample.
            observe: keep from the step's last micro-batch what :meth:`health` needs.
        """
        if self.backbone.config.rope_rescale > 1:
            uniform = torch.tensor(keyed_uniform(self.seed, "rope_scale", step))
            scale = float(self.backbone.rope_scale_from(uniform))
            self.rope_scale = torch.full((), scale, device=self.backbone.cls_token.device)

    def compile_loss(self) -> None:
        """Compile what follows the last block, where that saves much; called once, before training."""

    def prepare(self, batch: dict[str, Tensor], *, step: int, micro_batch: int) -> dict[str, Tensor]:
        """Change a training micro-batch on the device before the forward, as mixup does.

        Args:
            batch: see :meth:`forward`.
            step: number of finished updates.
            micro_batch: index in the global batch: rank x micro-batches per rank + micro-batch of the rank.
        """
        return batch

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        """How much a micro-batch counts in the mean over the global batch, 0-d; asked where ``weighs`` is true."""
        raise NotImplementedError(f"all micro-batches of {type(self).__name__} count the same")

    def lr_layer(self, name: str) -> int:
        """How many times layer decay applies to a parameter, by its name; HEAD_LAYER for the head's own rate."""
        return 0

    def health(self, all_reduce: AllReduce | None = None, *, audit_seed: int | None = None) -> Health:
        """Gauges of the representation from the last observed step. A collective; waits for no device.

        Args:
            all_reduce: sums a tensor over ranks; None in one process.
            audit_seed: take the costly gauges too, whose random projections it keys.
        """
        return Health({}, {})

    def measure(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What one validation batch adds to the sums over the split, by name. In evaluation mode, without gradients.

        Args:
            batch: as for :meth:`forward`; masks may have another size than the images. A label of -1 counts nowhere.
        """
        raise NotImplementedError(f"{type(self).__name__} has no validation")

    def score(self, sums: Mapping[str, Tensor], class_names: list[str]) -> Scores:
        """Turn the sums of :meth:`measure` over all batches and ranks into scores.

        Args:
            sums: empty if nothing was measured.
            class_names: one for each class.

        Raises:
            ValueError: nothing was measured.
        """
        raise NotImplementedError(f"{type(self).__name__} has no validation")

    def _rope_scale(self, device: torch.device) -> Tensor | None:
        """The step's RoPE rescale in training, none in evaluation."""
        return self.rope_scale.to(device) if self.training else None


def layer_of(name: str, depth: int) -> int:
    """How many times layer decay applies below a head (arXiv 2106.08254): a block, its distance from the top; what comes before
    the blocks, the depth; the rest, 0."""
    if name.startswith("backbone.blocks."):
        return depth - 1 - int(name.split(".")[2])
    below = name.startswith(("backbone.cls_token", "backbone.patch_embed", "backbone.pos_embed"))
    return depth if below else 0
