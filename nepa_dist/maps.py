"""What a query patch looks at, and how well it was foreseen: the two maps of the paper's figure 5.

Patches are counted in raster order from 0: patch n of a grid with C columns is at row n // C, column n % C. In the sequence
CLS comes first, so patch n is token n + 1. With the objective's shift, z_hat at token t predicts the embedding at token t + 1:
patch n is predicted at token n, which is the patch before it, and patch 0 at CLS. Without the shift a token predicts itself.

Legend: B batch, T tokens (CLS first), D width, H heads, K head width.

Source: arXiv 2512.16922 figure 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nepa_dist.model import Attention, Rotary, VisionTransformer, rotate
from nepa_dist.tasks.pretrain import PretrainTask

Query = tuple[int, int]
"""Row and column of a patch, from 0."""


def attention_maps(
    backbone: VisionTransformer, image: Tensor, query: Query, *, layers: Sequence[int] | None = None, causal: bool = True
) -> dict[int, Tensor]:
    """Attention of one patch to every patch, per layer: the softmax weights, mean over the heads.

    The column of CLS is dropped and the rest is not rescaled: a map sums to 1 less the share that CLS gets. Under causal
    attention the patches after the query are exactly 0.

    Args:
        backbone: in evaluation mode.
        image: [3, S, S'] float, normalised; both sides any multiples of the patch size.
        query: the patch that looks.
        layers: blocks, by index from 0; negative ones count from the end. Default: all.
        causal: each token sees only itself and earlier ones.

    Returns:
        Layer, as it was given, to weights [rows, columns], fp32 on the device of the model.

    Raises:
        ValueError: the backbone is in training mode, a side is no multiple of the patch size, the query is outside the grid, or
            a layer is not a block.
    """
    rows, columns, number = _locate(backbone, image, query)
    depth = len(backbone.blocks)
    wanted = list(range(depth)) if layers is None else list(layers)
    for layer in wanted:
        if not -depth <= layer < depth:
            raise ValueError(f"layer {layer} is not a block: the model has {depth}, numbered from 0 to {depth - 1}")
    found: dict[int, Tensor] = {}
    hooks = []
    try:
        for index in sorted({layer % depth for layer in wanted}):
            attention = _attention(backbone, index)
            hooks.append(attention.register_forward_pre_hook(partial(_keep_row, found, index, number + 1)))
        with torch.no_grad():
            backbone(image[None], causal=causal)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: found[layer % depth][0, :, 1:].mean(dim=0).reshape(rows, columns) for layer in wanted}


def _attention(backbone: VisionTransformer, index: int) -> Attention:
    attention = backbone.blocks[index].attn
    assert isinstance(attention, Attention)
    return attention


def _keep_row(found: dict[int, Tensor], index: int, token: int, attention: nn.Module, args: tuple[Any, ...]) -> None:
    """Hook on the attention of a block: sees the input, the rotation and the mask that the model itself uses."""
    assert isinstance(attention, Attention)
    x, rotary, causal = args
    found[index] = attention_row(attention, x, rotary, token=token, causal=causal)


def attention_row(attention: Attention, x: Tensor, rotary: Rotary | None, *, token: int, causal: bool) -> Tensor:
    """Softmax weights of one token to all tokens, as :class:`Attention` has them but in fp32 throughout (fp64 stays fp64).

    Args:
        attention: of a block.
        x: its input [B, T, D], normalised.
        rotary: RoPE tables, or None.
        token: the one that looks, by index in the sequence (CLS is 0).
        causal: whether later tokens are hidden.

    Returns:
        [B, H, T]; each row sums to 1, with exact zeros after ``token`` if causal.
    """
    B, T, _ = x.shape
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        q, k, _ = attention.qkv(x).view(B, T, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(q), attention.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        seen = token + 1 if causal else T
        logits = torch.einsum("bhk,bhtk->bht", q[:, :, token], k[:, :, :seen]) / math.sqrt(q.shape[-1])
        return F.pad(logits.softmax(dim=-1), (0, T - seen))


def similarity_map(task: PretrainTask, image: Tensor, query: Query) -> Tensor:
    """Cosine between the model's prediction of one patch and the embedding of every patch of the image.

    The prediction of the query patch is z_hat at the token before it (see the module's text), so a model that predicts
    perfectly has its maximum, 1, at the query itself. Targets are the raw patch embeddings, as in the loss.

    Args:
        task: in evaluation mode; ``task.objective`` says whether attention is causal and what predicts what.
        image: [3, S, S'] float, normalised; both sides any multiples of the patch size.
        query: the patch that is predicted.

    Returns:
        [rows, columns] in [-1, 1], fp32 on the device of the model.

    Raises:
        ValueError: the backbone is in training mode, a side is no multiple of the patch size, or the query is outside the grid.
    """
    rows, columns, number = _locate(task.backbone, image, query)
    with torch.no_grad():
        features = task.backbone(image[None], causal=task.objective.causal)
        predicting = number if task.objective.shift else number + 1
        dtype = torch.promote_types(features.hidden.dtype, torch.float32)
        prediction, targets = features.hidden[0, predicting].to(dtype), features.embed[0, 1:].to(dtype)
        return F.cosine_similarity(prediction[None], targets, dim=-1).reshape(rows, columns)


def _locate(backbone: VisionTransformer, image: Tensor, query: Query) -> tuple[int, int, int]:
    """Rows and columns of the grid, and the number of the query patch; checks all three arguments."""
    if backbone.training:
        raise ValueError("maps need a model in evaluation mode: call .eval() first")
    if image.ndim != 3:
        raise ValueError(f"image must be one image [channels, height, width], got {list(image.shape)}")
    patch_size = backbone.config.patch_size
    rows, columns = (check_size(side, patch_size) for side in image.shape[1:])
    check_query(query, rows, columns)
    return rows, columns, query[0] * columns + query[1]


def check_size(size: int, patch_size: int) -> int:
    """Number of patches along a side.

    Args:
        size: the side, pixels.
        patch_size: pixels.

    Raises:
        ValueError: it is not a multiple of the patch size; the message names the nearest two.
    """
    if size > 0 and size % patch_size == 0:
        return size // patch_size
    low = size // patch_size * patch_size
    near = f"{low} or {low + patch_size}" if low > 0 else f"{patch_size} or {2 * patch_size}"
    raise ValueError(f"size {size} is not a multiple of the patch size {patch_size}; nearest: {near}")


def check_query(query: Query, rows: int, columns: int) -> None:
    """Check that a query patch is in the grid.

    Raises:
        ValueError: it is outside; the message names what there is.
    """
    if not (0 <= query[0] < rows and 0 <= query[1] < columns):
        raise ValueError(
            f"query {query[0]},{query[1]} is outside the grid of {rows} x {columns} patches: "
            f"rows are 0 to {rows - 1}, columns 0 to {columns - 1}"
        )
