"""NEPA written plainly, as a model of Hugging Face's library would be: what :mod:`benchmarks.reference` measures against.

The same function as the project's model with none of its arrangements: query, key and value are three linear layers, gate and
up two; RoPE tables are made in every forward, and each layer splits CLS off, rotates the rest and joins them again; all 257
tokens are fed; nothing is compiled. Parameters have the released names: ``nepa_dist.official.to_official`` gives its weights.

Legend: B batch, T tokens, D width, H heads, K head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nepa_dist.config import ModelConfig


class Embeddings(nn.Module):
    """CLS and the patches of an image."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.patch_embeddings = nn.Module()
        size = config.patch_size
        self.patch_embeddings.projection = nn.Conv2d(config.in_channels, config.embed_dim, size, stride=size)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embeddings.projection(images).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)


class Rope(nn.Module):
    """Cosine and sine [N, K] of the patches of one grid, with the random rescale of training."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        quarter = config.head_dim // 4
        self.register_buffer("frequencies", config.rope_theta ** -(torch.arange(quarter) / quarter), persistent=False)
        self.rescale, self.patch_size = config.rope_rescale, config.patch_size

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        sides = [torch.arange(0.5, side, device=images.device) * 2 / side - 1 for side in self._grid(images)]
        coordinates = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 1)
        if self.training and self.rescale > 1:
            limit = math.log(self.rescale)
            coordinates = coordinates * torch.empty(1, device=images.device).uniform_(-limit, limit).exp()
        angles = (2 * math.pi * coordinates[:, :, None] * self.frequencies).flatten(1, 2).tile(2)
        return angles.cos(), angles.sin()

    def _grid(self, images: Tensor) -> list[int]:
        return [side // self.patch_size for side in images.shape[2:]]


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) to (-b, a), a and b the halves of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate all tokens of [B, H, T, K] but the first, CLS."""
    cls, patches = x.split([x.shape[2] - len(cos), len(cos)], dim=2)
    return torch.cat([cls, patches * cos + rotate_half(patches) * sin], dim=2).to(x.dtype)


class SelfAttention(nn.Module):
    """Queries, keys and values from three layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.embed_dim
        self.num_heads = config.num_heads
        self.query, self.key, self.value = (nn.Linear(D, D, bias=config.qkv_bias) for _ in range(3))
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm, self.k_norm = (
                nn.LayerNorm(config.head_dim, config.norm_eps, elementwise_affine=config.qk_norm_affine, bias=False)
                for _ in range(2)
            )

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        q, k = apply_rope(self.q_norm(q), *rope), apply_rope(self.k_norm(k), *rope)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        return y.transpose(1, 2).flatten(2)


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((config.embed_dim,), config.layer_scale_init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class Layer(nn.Module):
    """One block, with the released names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, hidden, eps = config.embed_dim, config.mlp_hidden_dim_, config.norm_eps
        self.attention = nn.Module()
        self.attention.attention = SelfAttention(config)
        self.attention.output = nn.Module()
        self.attention.output.dense = nn.Linear(D, D)
        self.layer_scale = LayerScale(config)
        self.intermediate = nn.Module()
        self.intermediate.up_proj = nn.Linear(D, hidden)
        if config.gated_mlp:
            self.intermediate.gate_proj = nn.Linear(D, hidden)
        self.output = nn.Module()
        self.output.dense = nn.Linear(hidden, D)
        self.output.layer_scale = LayerScale(config)
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(D, eps), nn.LayerNorm(D, eps)
        self.activation = F.silu if config.activation == "silu" else F.gelu
        self.gated = config.gated_mlp

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        attended = self.attention.output.dense(self.attention.attention(self.layernorm_before(x), rope))
        x = self.layer_scale(attended) + x
        normed = self.layernorm_after(x)
        up = self.intermediate.up_proj(normed)
        up = self.activation(self.intermediate.gate_proj(normed)) * up if self.gated else self.activation(up)
        return self.output.layer_scale(self.output.dense(up)) + x


class PlainNepa(nn.Module):
    """Images [B, 3, H, W], normalised, to the NEPA loss, 0-d."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.vit_nepa = nn.Module()
        self.vit_nepa.embeddings = Embeddings(config)
        self.vit_nepa.encoder = nn.Module()
        self.vit_nepa.encoder.layer = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.vit_nepa.layernorm = nn.LayerNorm(config.embed_dim, config.norm_eps)
        self.rope = Rope(config)

    def forward(self, images: Tensor) -> Tensor:
        embed = self.vit_nepa.embeddings(images)
        hidden, rope = embed, self.rope(images)
        for layer in self.vit_nepa.encoder.layer:
            hidden = layer(hidden, rope)
        hidden = self.vit_nepa.layernorm(hidden)
        prediction, target = F.normalize(hidden[:, :-1], dim=-1), F.normalize(embed[:, 1:].detach(), dim=-1)
        return -(prediction * target).sum(dim=-1).mean()
