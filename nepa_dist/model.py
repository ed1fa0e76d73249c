"""The vision transformer that every task shares.

An image becomes the sequence z = [CLS; patch embeddings]; pre-norm blocks with RoPE, QK-norm, LayerScale and a gated MLP turn
it into z_hat. In pretraining attention is causal and z_hat[t] predicts z[t + 1]; downstream it may look both ways.

Legend: B batch, T tokens (CLS first), N patches, D width, H heads, K head width, P patch size.

Sources: arXiv 2512.16922 section 3; numbers and conventions from the released model (DINOv3-style RoPE on normalised patch
centres, LayerNorm eps 1e-12, truncated normal of 0.02).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nepa_dist.attention import Attend, sdpa
from nepa_dist.config import ModelConfig
from nepa_dist.keyed import keyed_seed
from nepa_dist.linear import Linear


class Features(NamedTuple):
    """What the backbone returns."""

    embed: Tensor
    """z [B, T, D]: CLS and the raw patch embeddings, without positions and before any masking."""
    hidden: Tensor
    """z_hat [B, T, D] after the final LayerNorm; T - 1 tokens with ``drop_last``."""
    taps: dict[int, Tensor]
    """Outputs [B, T, D] of the blocks that were asked for, by index from 0."""
    grid: tuple[int, int]
    """Rows and columns of patches."""


class Rotary(NamedTuple):
    """Cosine and sine tables [T, K] of one forward pass; the CLS row does not rotate."""

    cos: Tensor
    sin: Tensor


def rotary_table(config: ModelConfig, grid: tuple[int, int], device: torch.device, scale: Tensor | None = None) -> Rotary:
    """2-D axial RoPE tables for CLS and a grid of patches, in fp32.

    Patch centres are mapped to [-1, 1] on each axis, so any grid works. Half of the K/2 angles turn with y, half with x, at
    K/4 frequencies theta^(-4k/K) each; dimension i is paired with i + K/2.

    Args:
        config: the model.
        grid: rows and columns of patches.
        device: where the tables are made.
        scale: factor on the coordinates, 0-d (the random rescale of training).

    Returns:
        Tables of shape [1 + rows * columns, K].
    """
    rows, columns = grid
    quarter = config.head_dim // 4
    frequencies = config.rope_theta ** -(torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) / rows * 2 - 1
    x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) / columns * 2 - 1
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(rows * columns, 2)
    if scale is not None:
        centres = centres * scale
    angles = (2 * math.pi * centres[:, :, None] * frequencies).flatten(1)  # [N, K/2]
    angles = F.pad(torch.cat([angles, angles], dim=1), (0, 0, 1, 0))  # CLS: angle 0
    return Rotary(angles.cos(), angles.sin())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate queries or keys [B, H, T, K] by their positions."""
    first, second = x.chunk(2, dim=-1)
    return x * rotary.cos + torch.cat([-second, first], dim=-1) * rotary.sin


class Attention(nn.Module):
    """Multi-head self-attention with QK-norm before RoPE (paper 3.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, K = config.embed_dim, config.head_dim
        self.num_heads = config.num_heads
        self.qkv = Linear(D, 3 * D, bias=config.qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.LayerNorm(K, config.norm_eps, elementwise_affine=config.qk_norm_affine, bias=False)
            self.k_norm = nn.LayerNorm(K, config.norm_eps, elementwise_affine=config.qk_norm_affine, bias=False)
        self.proj = Linear(D, D)
        self.attend: Attend = sdpa

    def heads(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and rotated, and values of x [B, T, D], each [B, H, T, K]."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v

    def forward(self, x: Tensor, rotary: Rotary | None, causal: bool) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.heads(x, rotary)
        # Norm and rotation run in fp32 under autocast; attention takes one dtype.
        y = self.attend(q.to(v.dtype), k.to(v.dtype), v, causal)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(B, T, D))
        return out


class Mlp(nn.Module):
    """Plain or gated MLP; the gated one computes gate and up in one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, hidden = config.embed_dim, config.mlp_hidden_dim_
        self.activation = F.silu if config.activation == "silu" else F.gelu
        self.gated = config.gated_mlp
        if config.gated_mlp:
            self.gate_up = Linear(D, 2 * hidden)
        else:
            self.up = Linear(D, hidden)
        self.down = Linear(hidden, D)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            x = self.activation(gate) * up
        else:
            x = self.activation(self.up(x))
        out: Tensor = self.down(x)
        return out


class LayerScale(nn.Module):
    """A learned factor per channel on a branch (arXiv 2103.17239)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """x + attention, then x + MLP, each branch normalised before and scaled after."""

    def __init__(self, config: ModelConfig, drop_path: float) -> None:
        super().__init__()
        D = config.embed_dim
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(D, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(D, config.norm_eps)
        self.mlp = Mlp(config)
        self.ls1: nn.Module = nn.Identity()
        self.ls2: nn.Module = nn.Identity()
        if config.layer_scale:
            self.ls1 = LayerScale(D, config.layer_scale_init)
            self.ls2 = LayerScale(D, config.layer_scale_init)

    def forward(self, x: Tensor, rotary: Rotary | None, causal: bool) -> Tensor:
        x = x + self._drop(self.ls1(self.attn(self.norm1(x), rotary, causal)))
        return x + self._drop(self.ls2(self.mlp(self.norm2(x))))

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        # A comparison and not bernoulli_(keep): a compiler would take the rate for a constant, and compile each block anew.
        kept = torch.rand(len(branch), 1, 1, device=branch.device) < keep
        return branch * kept / keep


class PatchEmbed(nn.Conv2d):
    """One linear map of each patch: a convolution without overlap.

    With ``as_matmul`` it is computed as a matrix product, over inputs that are padded with zeros to a multiple of MULTIPLE: a
    patch of 14 pixels has 588, which tensor cores do not take.
    """

    MULTIPLE = 64

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.in_channels, config.embed_dim, kernel_size=config.patch_size, stride=config.patch_size)
        self.as_matmul = False

    def forward(self, images: Tensor) -> Tensor:
        if not self.as_matmul:
            return super().forward(images)
        rows, columns = (side // self.kernel_size[0] for side in images.shape[2:])
        patches = images.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        missing = -patches.shape[-1] % self.MULTIPLE
        out = F.linear(F.pad(patches, (0, missing)), F.pad(self.weight.flatten(1), (0, missing)), self.bias)
        grid: Tensor = out.transpose(1, 2).unflatten(2, (rows, columns))
        return grid


class VisionTransformer(nn.Module):
    """The backbone: patch embedding, blocks, final LayerNorm.

    Args:
        config: sizes and switches.
        seed: of the initial weights. Each parameter draws from its own stream, keyed by (seed, name), so that every
            engine starts from the same numbers.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        D = config.embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.patch_embed = PatchEmbed(config)
        if not config.rope:
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.num_patches, D))
        steps = max(config.depth - 1, 1)
        self.blocks = nn.ModuleList(Block(config, config.drop_path * i / steps) for i in range(config.depth))
        self.norm = nn.LayerNorm(D, config.norm_eps)
        init_weights(self, seed, std=config.init_std)

    def forward(
        self,
        images: Tensor,
        *,
        causal: bool,
        taps: Sequence[int] = (),
        drop_last: bool = False,
        rope_scale: Tensor | None = None,
        corrupt: Callable[[Tensor], Tensor] | None = None,
    ) -> Features:
        """Encode images.

        Args:
            images: [B, 3, H, W] float, normalised; H and W any multiples of the patch size.
            causal: each token sees only itself and earlier ones.
            taps: blocks whose outputs are returned, by index from 0; negative ones count from the end.
            drop_last: do not feed the last patch to the blocks (``embed`` still holds it).
            rope_scale: 0-d factor on the RoPE coordinates. Default: in training a fresh log-uniform draw from
                [1/r, r] with r = ``rope_rescale``, in evaluation none.
            corrupt: maps z [B, T, D] to what the blocks see instead (masking).

        Raises:
            ValueError: H or W is not a multiple of the patch size, or a tap is no block.
        """
        wanted = self._tap_indices(taps)
        embed, grid = self._embed(images)
        x = embed if corrupt is None else corrupt(embed)
        rotary = None
        if self.config.rope:
            rotary = rotary_table(self.config, grid, x.device, self._rope_scale(rope_scale, x.device))
        else:
            x = x + self._positions(grid)
        if drop_last:
            x = x[:, :-1].contiguous()  # as every block's input is: else the first one would be compiled by itself
            rotary = rotary and Rotary(rotary.cos[:-1], rotary.sin[:-1])
        outputs = {}
        for index, block in enumerate(self.blocks):
            x = block(x, rotary, causal)
            if index in wanted:
                outputs[index] = x
        return Features(embed, self.norm(x), {tap: outputs[i] for tap, i in zip(taps, wanted, strict=True)}, grid)

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        size, channels = self.config.patch_size, self.config.in_channels
        sizes = tuple(images.shape)
        if len(sizes) != 4 or sizes[1] != channels or min(sizes) == 0 or sizes[2] % size or sizes[3] % size:
            raise ValueError(
                f"images must be [B, {channels}, H, W] with B > 0 and H and W multiples of the patch size {size}, "
                f"got {list(sizes)}"
            )
        patches = self.patch_embed(images)
        grid = (patches.shape[2], patches.shape[3])
        cls = self.cls_token.expand(len(images), -1, -1)
        return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1), grid

    def _tap_indices(self, taps: Sequence[int]) -> list[int]:
        depth = len(self.blocks)
        for tap in taps:
            if not -depth <= tap < depth:
                raise ValueError(f"tap {tap} is not a block: the model has {depth}, numbered from 0")
        return [tap % depth for tap in taps]

    def _rope_scale(self, scale: Tensor | None, device: torch.device) -> Tensor | None:
        if scale is not None or not self.training or self.config.rope_rescale == 1:
            return scale
        return self.rope_scale_from(torch.rand((), device=device))

    def rope_scale_from(self, uniform: Tensor) -> Tensor:
        """Map a uniform draw in [0, 1) to a log-uniform factor in [1/r, r) with r = ``rope_rescale``."""
        return torch.exp((2 * uniform - 1) * math.log(self.config.rope_rescale))

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        side = self.config.image_size // self.config.patch_size
        if grid == (side, side):
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)


def init_weights(module: nn.Module, seed: int, *, std: float | None) -> None:
    """Initialise in place: weights and tokens normal(0, std) truncated at +-2, biases 0, norms 1, LayerScale its value.

    Args:
        module: any module built from the parts of this file and torch's Linear, convolutions, LayerNorm and GroupNorm.
        seed: the stream of a parameter is keyed by (seed, its name in this module).
        std: of the truncated normal; the cut is absolute (released code), so for 0.02 it is plain normal. None: for each
            weight sqrt(2 / n), where n is how many inputs an output is the sum of (He et al., arXiv 1502.01852).
    """
    for path, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            with torch.no_grad():
                if isinstance(part, LayerScale):
                    parameter.fill_(part.init)
                elif isinstance(part, (nn.LayerNorm, nn.GroupNorm)):
                    parameter.fill_(1.0 if name == "weight" else 0.0)
                elif name == "bias":
                    parameter.zero_()
                elif not parameter.is_meta:
                    generator = torch.Generator(parameter.device).manual_seed(keyed_seed(seed, full))
                    scale = math.sqrt(2 / _num_inputs(part, parameter)) if std is None else std
                    nn.init.trunc_normal_(parameter, std=scale, generator=generator)


def _num_inputs(part: nn.Module, weight: Tensor) -> float:
    """Inputs of one output of a linear layer or convolution; a transposed one spreads an input over stride^2 outputs."""
    if isinstance(part, nn.ConvTranspose2d):
        return weight.shape[0] * weight[0, 0].numel() / math.prod(part.stride)
    return weight[0].numel()
