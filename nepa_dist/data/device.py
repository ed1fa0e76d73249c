"""From a batch on the host to tensors on the device. Pixels cross as bytes, a quarter of their size as floats.

On a GPU copies and normalisation have a stream of their own. The trainer asks for the next batch while the last step is still
being computed, so they run beside that step: the batch in use and the one on its way are the two buffers.

Suffix letters: B samples, H and W height and width in pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

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

    On a GPU all of it runs in a side stream. What the current stream is given next waits for it, what it was given before does
    not.

    Args:
        batch: from a loader.
        device: where the model is.
        mean, std: see :func:`normalize`.

    Returns:
        images float32 [B, 3, H, W], labels int64 [B], ids int64 [B], and masks uint8 [B, H, W] if the batch has them.
    """
    pinned = batch.images.is_pinned()
    side = side_stream(device)
    with nullcontext() if side is None else side.entered():
        images, labels, ids = (tensor.to(device, non_blocking=pinned) for tensor in (batch.images, batch.labels, batch.ids))
        pixels = normalize(images, mean, std)
        if batch.erasings is not None:
            erase(pixels, batch.erasings)
        moved = {"images": pixels, "labels": labels, "ids": ids}
        if batch.masks is not None:
            moved["masks"] = batch.masks.to(device, non_blocking=pinned)
    if side is not None:
        side.hand_over(moved.values())
    return moved


class SideStream:
    """A stream of a GPU beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def entered(self) -> AbstractContextManager[object]:
        """What is started in this context runs in the side stream."""
        return torch.cuda.stream(self._stream)

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors of the side stream to the current one, which waits for them without the host."""
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)  # else their memory could be used again while they are read


@functools.cache
def side_stream(device: torch.device) -> SideStream | None:
    """The side stream of a device; a CPU has none."""
    return SideStream(device) if device.type == "cuda" else None


def usable_device(name: str) -> torch.device:
    """The device of that name, on which convolutions in fp32 are fp32 from now on, as in a run: torch's own choice is TF32.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a build without CUDA asserts
        raise ValueError(f"device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    torch.backends.cudnn.allow_tf32 = False
    return device


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept, because making a small tensor on a GPU waits for its copy in every step.
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
