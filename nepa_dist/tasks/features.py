"""Frozen features of every layer: what probes learn from.

``embed`` is the input of the blocks (raw patch embeddings), a number is the output of that block, ``final`` the output of the
last LayerNorm. The backbone is in evaluation mode and gets no gradient; one pass gives all layers.

Legend: B batch, T tokens (CLS first), D width, n images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from nepa_dist.model import VisionTransformer

Layer = int | Literal["embed", "final"]
Pooling = Literal["mean", "last", "cls"]
Array = NDArray[Any]


@contextmanager
def frozen(backbone: VisionTransformer) -> Iterator[None]:
    """Within the context the backbone is in evaluation mode and no gradient is recorded; after it, all modes are as before."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def layer_tokens(backbone: VisionTransformer, images: Tensor, layers: Sequence[Layer], *, causal: bool) -> dict[Layer, Tensor]:
    """Tokens [B, T, D] of some layers for images [B, 3, H, W], from one forward pass.

    Raises:
        ValueError: a layer is no block, or the images do not fit the model.
    """
    out = backbone(images, causal=causal, taps=[layer for layer in dict.fromkeys(layers) if isinstance(layer, int)])
    ends: dict[Layer, Tensor] = {"embed": out.embed, "final": out.hidden}
    return {layer: out.taps[layer] if isinstance(layer, int) else ends[layer] for layer in layers}


def extract_features(
    backbone: VisionTransformer,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    layers: Sequence[Layer],
    pooling: Pooling = "mean",
    causal: bool = True,
) -> tuple[dict[Layer, NDArray[np.float32]], NDArray[np.int64]]:
    """Keep one vector per image and layer.

    Args:
        backbone: where its weights are, the work is done.
        batches: ``images`` [B, 3, H, W] float, normalised; ``labels`` [B].
        layers: ``embed``, ``final``, or indices of blocks (negative ones count from the end).
        pooling: ``mean`` of the patch tokens, ``last`` token, or ``cls``.
        causal: whether a token sees only itself and earlier ones, as in pretraining.

    Returns:
        Features [n, D] by layer, and labels [n], in host memory.

    Raises:
        ValueError: no or unknown layers, unknown pooling, no batches, or CLS is asked for where it has not seen the image.
    """
    check_layers(layers)
    check_pooling(layers, pooling, causal)
    device = next(backbone.parameters()).device
    parts: dict[Layer, list[Array]] = {layer: [] for layer in layers}
    labels: list[Array] = []
    with frozen(backbone):
        for batch in batches:
            tokens = layer_tokens(backbone, batch["images"].to(device), list(parts), causal=causal)
            for layer, rows in parts.items():
                rows.append(_pool(tokens[layer], pooling).float().cpu().numpy())
            labels.append(batch["labels"].cpu().numpy().astype(np.int64))
    if not labels:
        raise ValueError("there are no batches to extract features from: the data is empty")
    # Layer by layer, so that no more than one of them is in memory twice.
    return {layer: np.concatenate(parts.pop(layer)) for layer in list(parts)}, np.concatenate(labels)


def check_layers(layers: Sequence[Layer]) -> None:
    """Raise ValueError for a list of layers that names none, or something else."""
    if not layers:
        raise ValueError("there are no layers to probe; give 'embed', 'final' or indices of blocks")
    for layer in layers:
        if not isinstance(layer, int) and layer not in ("embed", "final"):
            raise ValueError(f"layer {layer!r} is neither 'embed', 'final' nor the index of a block")


def check_pooling(layers: Sequence[Layer], pooling: Pooling, causal: bool) -> None:
    """Raise ValueError for a pooling that is unknown, or that tells nothing about the image."""
    if pooling not in ("mean", "last", "cls"):
        raise ValueError(f"pooling {pooling!r} is none of 'mean', 'last', 'cls'")
    if pooling == "cls" and (causal or "embed" in layers):
        where = "with causal attention" if causal else "in layer 'embed'"
        raise ValueError(f"pooling 'cls' {where} gives every image the same feature: CLS comes first and has seen no patch")


def check_labels(split: str, labels: Array) -> None:
    """Raise ValueError unless every image of a split has a label."""
    if (unlabelled := int((labels < 0).sum())) == len(labels):
        raise ValueError(f"the {split} data has no labels; a probe needs data with classes")
    if unlabelled:
        raise ValueError(f"{unlabelled} of {len(labels)} {split} images have no label")


def _pool(tokens: Tensor, pooling: Pooling) -> Tensor:
    """Tokens [B, T, D] to one vector [B, D]."""
    if pooling == "mean":
        return tokens[:, 1:].float().mean(dim=1)
    return tokens[:, -1] if pooling == "last" else tokens[:, 0]
