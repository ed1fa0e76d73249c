"""What a model costs: parameters and floating point operations. Imports no torch.

Every formula is checked against a count of the real module in ``tests/test_presets.py``.

Legend: D width, H hidden width of the MLP, K head width, L blocks, T tokens, N patches, P patch size.
"""

from __future__ import annotations

from nepa_dist.config_model import ModelConfig


def num_parameters(model: ModelConfig) -> int:
    """Number of trainable parameters of the backbone."""
    D, H, K = model.embed_dim, model.mlp_hidden_dim_, model.head_dim
    norm = 2 * D
    qkv = 3 * D * D + (3 * D if model.qkv_bias else 0)
    attention = qkv + D * D + D + (2 * K if model.qk_norm and model.qk_norm_affine else 0)
    mlp = (3 if model.gated_mlp else 2) * D * H + (2 if model.gated_mlp else 1) * H + D
    block = 2 * norm + attention + mlp + (2 * D if model.layer_scale else 0)
    patch_embed = model.in_channels * model.patch_size**2 * D + D
    positions = 0 if model.rope else (1 + model.num_patches) * D
    return D + patch_embed + positions + model.depth * block + norm


def forward_flops(model: ModelConfig, *, num_tokens: int | None = None, causal: bool = True) -> tuple[int, int]:
    """Floating point operations of one forward pass of one image (a multiply and an add are two).

    Norms, RoPE, activations and the loss are not counted: they are bound by memory, not by arithmetic.

    Args:
        model: the model.
        num_tokens: tokens in the blocks; default CLS + patches. Pretraining feeds one less (``drop_last_token``).
        causal: count only the attention below the diagonal, T (T + 1) / 2 pairs instead of T^2.

    Returns:
        (operations in the patch embedding, operations in the blocks).
    """
    D, H = model.embed_dim, model.mlp_hidden_dim_
    T = 1 + model.num_patches if num_tokens is None else num_tokens
    linear = 8 * D * D + (6 if model.gated_mlp else 4) * D * H
    attention = 2 * (T + 1) * D if causal else 4 * T * D
    patch_embed = 2 * model.in_channels * model.patch_size**2 * D * model.num_patches
    return patch_embed, model.depth * T * (linear + attention)


def train_flops(model: ModelConfig, *, num_tokens: int | None = None, causal: bool = True) -> int:
    """Operations of forward and backward of one image: three times the blocks, twice the patch embedding.

    The backward pass of a matrix product costs two products; the patch embedding needs no gradient of its input.
    Recomputation by activation checkpointing is not counted (the convention of model FLOPs utilisation).
    """
    patch_embed, blocks = forward_flops(model, num_tokens=num_tokens, causal=causal)
    return 2 * patch_embed + 3 * blocks
