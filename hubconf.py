"""For ``torch.hub``: ``torch.hub.load(REPOSITORY, "nepa_backbone", weights=PATH, source="local")``; see docs/weights.md."""

from nepa_dist.trained import Backbone, load_backbone

dependencies = ["numpy", "pydantic", "safetensors", "torch", "yaml"]


def nepa_backbone(weights: str, *, ema: bool = True) -> Backbone:
    """A trained backbone in evaluation mode, for images of any size.

    Args:
        weights: a run, a checkpoint, exported weights or an official checkpoint; a folder, or a file of weights in one.
        ema: take the averaged weights where there are any.
    """
    return load_backbone(weights, ema=ema)
