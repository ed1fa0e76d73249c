"""Whole validation images with their masks, for segmentation: one at a time, each in its own size, read ahead by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence

import torch

from nepa_dist.config import Config
from nepa_dist.data.batch import BadSample, Batch
from nepa_dist.data.containers import Container
from nepa_dist.data.decode import BadImage, decode_image
from nepa_dist.data.segment_augment import class_mask, resize_for_evaluation

READ_AHEAD = 8
"""Images that wait in memory."""


class WholeImages:
    """Batches of one sample: image uint8 [1, h, w, 3] with the crop as its short side, mask uint8 [1, H, W] in its own size.

    A sample that cannot be used gives an empty batch that names it.

    Args:
        container: the validation split.
        config: crop and classes.
        indices: the samples, in order.
    """

    def __init__(self, container: Container, config: Config, indices: Sequence[int]) -> None:
        self._container, self._config, self._indices = container, config, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Batch]:
        ready: queue.Queue[Batch | Exception] = queue.Queue(READ_AHEAD)
        given_up = threading.Event()

        def put(item: Batch | Exception) -> None:
            while not given_up.is_set():
                try:
                    return ready.put(item, timeout=0.5)
                except queue.Full:
                    continue

        def read() -> None:
            try:
                for index in self._indices:
                    if given_up.is_set():
                        return
                    put(self._sample(index))
            except Exception as error:  # raised where the batches are taken
                put(error)

        thread = threading.Thread(target=read, name="validation images", daemon=True)
        thread.start()
        try:
            for _ in self._indices:
                item = ready.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            given_up.set()
            thread.join()

    def _sample(self, index: int) -> Batch:
        crop, none = self._config.model.image_size, torch.zeros(0, dtype=torch.int64)
        try:
            sample = self._container.read(index)
            if sample.mask is None:
                raise BadImage("it has no mask")
            pixels = decode_image(sample.image) if isinstance(sample.image, bytes) else sample.image
            if sample.mask.shape != pixels.shape[:2]:
                height, width = sample.mask.shape
                raise BadImage(f"the mask has {width}x{height} pixels, the image {pixels.shape[1]}x{pixels.shape[0]}")
            mask = class_mask(sample.mask, self._config.segment)
        except (BadImage, OSError) as error:
            bad = BadSample(index, self._container.name(index), str(error))
            return Batch(torch.zeros(0, crop, crop, 3, dtype=torch.uint8), none, none, (bad,))
        image = resize_for_evaluation(pixels, (4 * crop, crop))
        labels, ids = torch.tensor([sample.label]), torch.tensor([index])
        return Batch(torch.from_numpy(image.copy())[None], labels, ids, (), torch.from_numpy(mask.copy())[None])
