"""The attentive probe: a learned query attends to the frozen patch tokens of a layer, a linear classifier reads what it saw.

The protocol, the same for every layer, model and run:

- Each channel is standardised with the mean and deviation of all training tokens.
- One query per head of the backbone; it scores whole tokens, x . q / sqrt(D), and the weighted sum of the tokens is projected
  to the D / H values of its head. That is multi-head cross-attention: with a single learned query the key projection is part of
  the query, and the value projection may come after the sum. The heads together, D numbers, go to a linear classifier.
- Queries and classifier start at zero, so the probe starts as a linear one on the mean token; projections are normal with
  deviation D^-1/2.
- AdamW, learning rate 3e-3 with linear warm-up over the first 5 % of the steps and a cosine to 0, betas (0.9, 0.999), weight
  decay 0.01 on projections and classifier, 128 images a step, 50 epochs, no augmentation, fp32. Everything random follows from
  the seed. The last step's weights are judged.

Probes of all layers are trained beside each other on the same passes. Tokens are kept in memory where they fit, and else
computed again in every epoch; the result is the same up to rounding.

Legend: B batch, N patches, D width, H heads, C classes, n images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nepa_dist.keyed import keyed_seed
from nepa_dist.tasks.features import Layer, check_labels, check_layers, frozen, layer_tokens

if TYPE_CHECKING:
    from nepa_dist.model import VisionTransformer

ATTENTIVE_EPOCHS = 50
ATTENTIVE_LR = 3e-3
ATTENTIVE_WEIGHT_DECAY = 0.01
ATTENTIVE_BATCH_SIZE = 128
_WARMUP = 0.05


class ImageSource(Protocol):
    """Labelled images that can be read again, in any order."""

    def __len__(self) -> int:
        """Number of images n, unreadable ones included."""

    def batches(self, order: Sequence[int] | None = None, *, batch_size: int | None = None) -> Iterable[Mapping[str, Tensor]]:
        """Batches of ``images`` [B, 3, H, W] float, normalised, their ``labels`` [B] and ``numbers`` [B].

        Unreadable images are left out.

        Args:
            order: which images, by their number from 0 to n - 1; default: all, in order.
            batch_size: B; default: of the source.
        """


class AttentiveProbe(nn.Module):
    """One layer's probe.

    Args:
        mean: of the training tokens [D].
        std: of the training tokens [D].
        num_heads: H, a divisor of D.
        num_classes: C.
        seed: of the projections.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, *, num_heads: int, num_classes: int, seed: int) -> None:
        super().__init__()
        D = len(mean)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        values = torch.randn(num_heads, D, D // num_heads, generator=torch.Generator().manual_seed(seed)) / math.sqrt(D)
        self.queries = nn.Parameter(torch.zeros(num_heads, D, device=mean.device))
        self.values = nn.Parameter(values.to(mean.device))
        self.weight = nn.Parameter(torch.zeros(num_classes, D, device=mean.device))
        self.bias = nn.Parameter(torch.zeros(num_classes, device=mean.device))

    def forward(self, tokens: Tensor) -> Tensor:
        """Class scores [B, C] of patch tokens [B, N, D]."""
        tokens = (tokens.float() - self.mean) / self.std
        attention = (tokens @ self.queries.T / math.sqrt(tokens.shape[-1])).softmax(dim=1)  # [B, N, H]
        seen = attention.transpose(1, 2) @ tokens  # [B, H, D]
        return F.linear(torch.einsum("bhd,hdk->bhk", seen, self.values).flatten(1), self.weight, self.bias)

    def param_groups(self) -> list[dict[str, object]]:
        """For the optimizer: what decays, and what does not."""
        return [
            {"params": [self.values, self.weight], "weight_decay": ATTENTIVE_WEIGHT_DECAY},
            {"params": [self.queries, self.bias], "weight_decay": 0.0},
        ]


def attentive_accuracy(
    backbone: VisionTransformer,
    train: ImageSource,
    test: ImageSource,
    *,
    layers: Sequence[Layer],
    causal: bool = True,
    epochs: int = ATTENTIVE_EPOCHS,
    seed: int = 0,
    cache_bytes: int = 0,
) -> dict[Layer, float]:
    """Train one attentive probe per layer and judge it; the protocol is in the module's docstring.

    Args:
        backbone: frozen; the probes are trained on its device.
        train: what the probes learn from.
        test: what they are judged on.
        layers: ``embed``, ``final``, or indices of blocks.
        causal: how the backbone attends.
        epochs: passes over the training images.
        seed: of the order of the images and of the probes' initial weights.
        cache_bytes: host memory that the training tokens of all layers may take; where they need more, the backbone runs again
            in each epoch.

    Returns:
        Top-1 accuracy in [0, 1] by layer.

    Raises:
        ValueError: labels are missing, there are fewer than two classes to learn, or a token is not finite.
    """
    check_layers(layers)
    tokens = _TrainingTokens(backbone, train, list(dict.fromkeys(layers)), causal, cache_bytes)
    heads = backbone.config.num_heads
    probes = {
        layer: AttentiveProbe(
            *moments, num_heads=heads, num_classes=len(tokens.classes), seed=keyed_seed(seed, "attentive", layer)
        )
        for layer, moments in tokens.moments.items()
    }
    groups = [group for probe in probes.values() for group in probe.param_groups()]
    optimizer = torch.optim.AdamW(groups, lr=ATTENTIVE_LR)
    num_steps = epochs * -(-tokens.num_images // ATTENTIVE_BATCH_SIZE)
    step = 0
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(keyed_seed(seed, "attentive", "order", epoch))
        for found, targets in tokens.batches(torch.randperm(tokens.num_images, generator=generator)):
            for group in optimizer.param_groups:
                group["lr"] = ATTENTIVE_LR * _schedule(step, num_steps)
            optimizer.zero_grad()
            for layer, probe in probes.items():  # each has its own graph, which is gone before the next
                F.cross_entropy(probe(found[layer]), targets).backward()
            optimizer.step()
            step += 1
    return _judge(backbone, test, probes, tokens.classes, causal)


def _schedule(step: int, num_steps: int) -> float:
    warmup = math.ceil(_WARMUP * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


class _Moments(NamedTuple):
    mean: Tensor
    std: Tensor


class _TrainingTokens:
    """Patch tokens of frozen layers: from memory where they fit, else computed anew for each batch.

    The first pass over the images finds labels, mean and deviation, and fills the memory.
    """

    def __init__(
        self, backbone: VisionTransformer, source: ImageSource, layers: list[Layer], causal: bool, cache_bytes: int
    ) -> None:
        self._backbone, self._source, self._layers, self._causal = backbone, source, layers, causal
        self._device = next(backbone.parameters()).device
        self._cache: dict[Layer, Tensor] | None = None
        labels: list[Tensor] = []
        numbers: list[Tensor] = []
        sums: dict[Layer, Tensor] = {}
        count = filled = 0
        for index, (tokens, part, number) in enumerate(self._compute(None)):
            if index == 0:
                self._cache = self._new_cache(tokens, cache_bytes)
            for layer, x in tokens.items():
                flat = x.flatten(0, 1).double()
                sums[layer] = sums.get(layer, 0) + torch.stack([flat.sum(dim=0), flat.square().sum(dim=0)])
                if self._cache is not None:
                    self._cache[layer][filled : filled + len(x)] = x
            count += flat.shape[0]
            filled += len(part)
            labels.append(part)
            numbers.append(number)
        if not labels:
            raise ValueError("there are no batches to extract features from: the data is empty")
        self._labels = torch.cat(labels)
        check_labels("training", self._labels.numpy())
        self.classes = self._labels.unique()
        """Labels of the training images, ascending [C]."""
        if len(self.classes) < 2:
            raise ValueError(
                f"all {filled} training images are of class {int(labels[0][0])}; a probe needs at least two classes"
            )
        self.num_images = filled
        self._numbers = torch.cat(numbers)  # of the images that can be read
        self.moments = {layer: _to_moments(layer, total, count) for layer, total in sums.items()}

    def batches(self, order: Tensor) -> Iterator[tuple[dict[Layer, Tensor], Tensor]]:
        """Tokens [B, N, D] by layer and targets [B], class indices from 0, in an order of the images; on the device."""
        if self._cache is None:
            for tokens, labels, _ in self._compute(self._numbers[order].tolist()):
                yield tokens, torch.searchsorted(self.classes, labels).to(self._device)
            return
        for part in order.split(ATTENTIVE_BATCH_SIZE):
            targets = torch.searchsorted(self.classes, self._labels[part])
            yield {layer: x[part].to(self._device) for layer, x in self._cache.items()}, targets.to(self._device)

    def _compute(self, order: Sequence[int] | None) -> Iterator[tuple[dict[Layer, Tensor], Tensor, Tensor]]:
        """Tokens by layer, labels and numbers of the images in the source, batch by batch."""
        for batch in self._source.batches(order, batch_size=ATTENTIVE_BATCH_SIZE):
            tokens = _patch_tokens(self._backbone, batch["images"], self._layers, self._causal)
            yield tokens, batch["labels"].cpu(), batch["numbers"].cpu()

    def _new_cache(self, tokens: dict[Layer, Tensor], limit: int) -> dict[Layer, Tensor] | None:
        n = len(self._source)
        if sum(n * x[0].numel() * 4 for x in tokens.values()) > limit:
            return None
        return {layer: torch.empty(n, *x.shape[1:]) for layer, x in tokens.items()}


def _patch_tokens(backbone: VisionTransformer, images: Tensor, layers: Sequence[Layer], causal: bool) -> dict[Layer, Tensor]:
    device = next(backbone.parameters()).device
    with frozen(backbone):
        tokens = layer_tokens(backbone, images.to(device), layers, causal=causal)
        return {layer: x[:, 1:].float() for layer, x in tokens.items()}


def _to_moments(layer: Layer, sums: Tensor, count: int) -> _Moments:
    """Mean and standard deviation from the sums of x and of x^2 [2, D]."""
    mean, square = sums / count
    if not bool(sums.isfinite().all()):
        raise ValueError(f"probe of layer {layer}: the training tokens are not finite")
    std = (square - mean.square()).clamp_min(0).sqrt()
    std[std <= 1e-6 * mean.abs()] = 1.0  # a constant channel becomes 0
    return _Moments(mean.float(), std.float())


def _judge(
    backbone: VisionTransformer, test: ImageSource, probes: Mapping[Layer, AttentiveProbe], classes: Tensor, causal: bool
) -> dict[Layer, float]:
    correct, labels = dict.fromkeys(probes, 0), []
    for batch in test.batches(batch_size=ATTENTIVE_BATCH_SIZE):
        labels.append(batch["labels"].cpu())
        tokens = _patch_tokens(backbone, batch["images"], list(probes), causal)
        for layer, probe in probes.items():
            with torch.no_grad():
                scores = probe(tokens[layer]).cpu()
            if not bool(scores.isfinite().all()):
                raise ValueError(f"probe of layer {layer}: test tokens are not finite")
            correct[layer] += int((classes[scores.argmax(dim=1)] == labels[-1]).sum())
    if not labels:
        raise ValueError("there are no batches to extract features from: the data is empty")
    check_labels("test", (every := torch.cat(labels)).numpy())
    return {layer: count / len(every) for layer, count in correct.items()}
