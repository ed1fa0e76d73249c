"""The real timm, and figures recorded from it in ``tests/golden/timm.safetensors``.

``python tests/timm_reference.py`` records them anew; it needs timm 1.0.31 or newer. timm imports torchvision for its data
pipeline, which these tests do not touch: where torchvision is missing or does not fit torch, an empty one stands in for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nepa_dist.config import Config
from nepa_dist.tasks.base import Task
from nepa_dist.tasks.build import build_task
from nepa_dist.timm_names import to_timm

GOLDEN = Path(__file__).parent / "golden" / "timm.safetensors"
MODEL = {"image_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "rope_theta": 50.0}
CLASSIFIER = {"task": "finetune", "finetune": {"num_classes": 5}, "model": MODEL | {"qk_norm_affine": True}}


def import_timm() -> Any:
    """timm's module ``models.eva``.

    Raises:
        ImportError: there is no timm.
    """
    if importlib.util.find_spec("timm") is None:
        raise ImportError("there is no timm")
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        _forget_torchvision()
        stand_in = _EmptyTorchvision()
        sys.meta_path.insert(0, stand_in)
        try:
            return importlib.import_module("timm.models.eva")
        finally:  # nothing else may find it
            sys.meta_path.remove(stand_in)
            _forget_torchvision()
    return importlib.import_module("timm.models.eva")


def _forget_torchvision() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]


def timm_model(settings: dict[str, Any], state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """What a user builds from the written files."""
    from timm.layers import LayerNorm

    model: torch.nn.Module = import_timm().Eva(
        norm_layer=partial(LayerNorm, eps=settings["norm_eps"]), **settings["model_args"]
    )
    model.load_state_dict(state, strict=True)
    return model.eval()


def lively_task(values: dict[str, Any]) -> tuple[Task, Config]:
    """A task whose weights are large enough to see every part: LayerScale begins at 1e-5 and a classifier at 0."""
    config = Config.model_validate(values)
    task = build_task(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return task, config


def images(height: int = 28, width: int = 28) -> torch.Tensor:
    """Two images [2, 3, H, W], the same in every call."""
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


class _Names(type):
    """Any attribute is its own name, as of an enumeration."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(types.ModuleType):
    """Any name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


class _EmptyTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        inside = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if inside else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def record() -> None:
    """Write the figures of timm for :data:`CLASSIFIER`."""
    import_timm()
    import timm

    task, config = lively_task(CLASSIFIER)
    state, settings = to_timm(task.state_dict(), config)
    model: Any = timm_model(settings, state)
    with torch.no_grad():
        figures = {
            "features": model.forward_features(images()),
            "features_causal": model.forward_features(images(), is_causal=True),
            "features_35x56": model.forward_features(images(35, 56)),
            "logits": model(images()),
        }
    figures |= {f"ours/{name}": tensor for name, tensor in task.state_dict().items()}
    figures |= {f"timm/{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(figures, GOLDEN, {"timm": timm.__version__, "settings": json.dumps(settings)})


if __name__ == "__main__":
    record()
