"""The work of :mod:`nepa_dist.online_knn`: k-NN of one layer on images that stay in memory; and the process that does it.

The process gets the setup as a line of JSON, then requests: the length and the bytes of a safetensors file with weights. It
answers each with a line of JSON.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from nepa_dist.config import Config
from nepa_dist.data.device import normalize
from nepa_dist.data.loader import EvalLoader
from nepa_dist.data.open import open_split
from nepa_dist.data.order import spread
from nepa_dist.model import VisionTransformer
from nepa_dist.tasks.features import extract_features
from nepa_dist.tasks.probe import knn_accuracy

MAX_K = 20
"""Neighbours; fewer where a class has fewer images."""
LENGTH_BYTES = 8

_BATCH_SIZE = 64


class Setup(NamedTuple):
    """What :class:`OnlineProbe` measures."""

    config: Config
    num_train: int
    num_test: int
    layer: int
    """Block, from 0."""


class OnlineProbe:
    """Reads the images once; classifies them with whatever weights it is given.

    Args:
        setup: what is measured.
        device: where the backbone runs.
        stop: ends a measurement between two batches.
    """

    def __init__(self, setup: Setup, device: torch.device, stop: threading.Event) -> None:
        self._setup, self._device, self._stop = setup, device, stop
        self._images: list[list[dict[str, Tensor]]] | None = None
        self._num_classes = 0

    def accuracy(self, state: dict[str, Tensor]) -> float:
        """Top-1 accuracy in [0, 1] of the weights by name, without the prefix ``backbone.``."""
        config, layer = self._setup.config, self._setup.layer
        if self._images is None:
            self._images = self._read()
        with torch.device("meta"):  # its own initial weights would be drawn from the generator that the trainer uses
            backbone = VisionTransformer(config.model.model_copy(update={"depth": layer + 1}))
        backbone.load_state_dict(state, strict=True, assign=True)
        data: list[Any] = []
        for images in self._images:
            found, labels = extract_features(backbone, self._batches(images), layers=[layer], causal=config.causal)
            data += [found[layer], labels]
        k = max(1, min(MAX_K, len(data[1]) // self._num_classes))
        return knn_accuracy(*data, ks=(k,), device=self._device)[k]

    def _read(self) -> list[list[dict[str, Tensor]]]:
        """Labelled images of both splits as bytes, in batches."""
        config = self._setup.config
        read = []
        for split, count in (("train", self._setup.num_train), ("val", self._setup.num_test)):
            container = open_split(config.data, "val" if split == "val" else "train", image_size=config.model.image_size)
            self._num_classes = max(self._num_classes, len(container.class_names))
            # No worker processes: they would be forked where other threads are running.
            loader = EvalLoader(
                container,
                config.data,
                image_size=config.model.image_size,
                batch_size=_BATCH_SIZE,
                indices=spread(len(container), count),
                num_workers=0,
            )
            batches = []
            for batch in loader:
                self._go_on()
                labelled = batch.labels >= 0
                if bool(labelled.any()):
                    batches.append({"images": batch.images[labelled], "labels": batch.labels[labelled]})
            if not batches:
                raise ValueError(f"none of the images chosen from the {split} split can be read and has a label")
            read.append(batches)
        return read

    def _batches(self, images: Sequence[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        data = self._setup.config.data
        for batch in images:
            self._go_on()
            pixels = normalize(batch["images"].to(self._device), data.mean, data.std)
            yield {"images": pixels, "labels": batch["labels"]}

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise InterruptedError("the run ended")


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """What the process does until its trainer closes the requests, which a trainer that dies does too."""
    torch.set_num_threads(1)
    values = json.loads(requests.readline())
    setup = Setup(**values | {"config": Config.model_validate(values["config"])})
    probe = OnlineProbe(setup, torch.device("cpu"), threading.Event())
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def receive() -> None:
        while len(head := requests.read(LENGTH_BYTES)) == LENGTH_BYTES:
            length = int.from_bytes(head, "little")
            if len(request := requests.read(length)) == length:
                waiting.put(request)
        os._exit(0)  # whatever is being measured, nobody wants to know any more

    threading.Thread(target=receive, daemon=True).start()
    while True:
        try:
            answer: dict[str, Any] = {"top1": probe.accuracy(safetensors.torch.load(waiting.get()))}
        except Exception as error:
            answer = {"problem": str(error) or type(error).__name__}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def main() -> None:
    """Entry of the process."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
