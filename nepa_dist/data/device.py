"""From a batch on the host to tensors on the device. Pixels cross as bytes, a quarter of their size as floats.

Suffix letters: B samples, H and W height and width in pixels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nepa_dist.data.erasing import erase
from nepa_dist.data.loader import Batch


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Scale pixels to [0, 1], subtract mean and divide by std, per channel.

    Args:
        images: uint8 [B, H, W, 3].
        mean, std: one value per channel, for pixels in [0, 1].

    Returns:
        float32 [B, 3, H, W] on the device of images, in channels_last memory (the layout of the input: nothing is transposed).
    """
    pixels = images.permute(0, 3, 1, 2).to(torch.float32)
    return pixels.div_(255).sub_(_per_channel(mean, images.device)).div_(_per_channel(std, images.device))


def to_device(batch: Batch, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Tensor]:
    """Move a batch to the device, normalise it there and paint what is erased; pinned memory is copied without waiting.

    Args:
        batch: from a loader.
        device: where the model is.
        mean, std: see :func:`normalize`.

    Returns:
        images float32 [B, 3, H, W], labels int64 [B], ids int64 [B], and masks uint8 [B, H, W] if the batch has them.
    """
    pinned = batch.images.is_pinned()
    images, labels, ids = (tensor.to(device, non_blocking=pinned) for tensor in (batch.images, batch.labels, batch.ids))
    pixels = normalize(images, mean, std)
    if batch.erasings is not None:
        erase(pixels, batch.erasings)
    moved = {"images": pixels, "labels": labels, "ids": ids}
    return moved if batch.masks is None else moved | {"masks": batch.masks.to(device, non_blocking=pinned)}


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a build without CUDA asserts
        raise ValueError(f"device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept, because making a small tensor on a GPU waits for its copy in every step.
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
