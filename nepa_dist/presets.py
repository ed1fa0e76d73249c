"""Model sizes by name.

Sources: widths, depths and heads of B and L from the official configs; S and H are the usual ViT sizes (arXiv 2010.11929,
2106.04560), tiny from DeiT (arXiv 2012.12877). ``*_gelu`` are the configurations of the released weights.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_b": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_l": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_h": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "vit_b_gelu": {"embed_dim": 768, "depth": 12, "num_heads": 12, "gated_mlp": False, "activation": "gelu"},
    "vit_l_gelu": {
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "gated_mlp": False,
        "activation": "gelu",
        "qk_norm_affine": True,
    },
}


def mlp_hidden_dim(embed_dim: int, mlp_ratio: float, gated: bool) -> int:
    """Hidden width H of the MLP.

    A plain MLP has ``mlp_ratio * D``. A gated one has three matrices instead of two, so two thirds of that, rounded up to a
    multiple of 64 for the tensor cores: with ratio 4, B has 2048 and L 2752, at the parameter count of the plain model.
    """
    if not gated:
        return round(mlp_ratio * embed_dim)
    width = mlp_ratio * embed_dim * 2 / 3
    return -(-int(width + 0.5) // 64) * 64
