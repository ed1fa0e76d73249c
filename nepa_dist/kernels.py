"""Triton kernels of a block: what lies between its matrix products, forward and backward, each tensor read and written once.

A compiler leaves sums over tokens (the gradients of biases, LayerScale and norms) to passes of their own, and reads a gated
activation and its inputs twice on the way back. Here the kernel that makes a gradient also adds it up. All arithmetic is fp32;
results have the dtype of what they are stored to.

Imported only where Triton is used; :mod:`nepa_dist.fused` holds the functions around these kernels, with their gradients.

Legend: n tokens of all images, T tokens of one, D width, H hidden width of the MLP, K head width. R and C: rows and columns
that a program holds at a time. A program that adds up goes through the tokens in strides and writes to a row of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _act(x, GELU: tl.constexpr):
    if GELU:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    return x * tl.sigmoid(x)


@triton.jit
def _slope(x, GELU: tl.constexpr):
    if GELU:
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    s = tl.sigmoid(x)
    return s * (1 + x * (1 - s))


@triton.jit
def _place(WIDTH: tl.constexpr, C: tl.constexpr):
    """Which C columns of WIDTH, and which tile of tokens, this program is for, the columns of one tile side by side.

    The programs of a large batch are more than the 65,535 that a GPU takes along any axis of a grid but the first.
    """
    parts: tl.constexpr = (WIDTH + C - 1) // C
    return tl.program_id(0) % parts, tl.program_id(0) // parts


@triton.jit
def activation_forward(h, y, n, H: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """y [n, H] = act(h), or act(gate) * up with h = [gate, up] [n, 2 H]."""
    part, tile = _place(H, C)
    columns = part * C + tl.arange(0, C)[None, :]
    rows = (tile * R + tl.arange(0, R)[:, None]).to(tl.int64)
    inside = (rows < n) & (columns < H)
    width: tl.constexpr = 2 * H if GATED else H
    at = h + rows * width + columns
    out = _act(tl.load(at, inside, other=0.0).to(tl.float32), GELU)
    if GATED:
        out *= tl.load(at + H, inside, other=0.0).to(tl.float32)
    tl.store(y + rows * H + columns, out, inside)


@triton.jit
def activation_backward(
    dy,
    h,
    dh,
    sums,
    n,
    H: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """dh as h is laid out, and its sums over tokens: sums [programs, width of h], fp32."""
    columns = tl.program_id(0) * C + tl.arange(0, C)[None, :]
    width: tl.constexpr = 2 * H if GATED else H
    gates = tl.zeros((R, C), tl.float32)
    ups = tl.zeros((R, C), tl.float32)
    for start in range(tl.program_id(1) * R, n, tl.num_programs(1) * R):
        rows = (start + tl.arange(0, R)[:, None]).to(tl.int64)
        inside = (rows < n) & (columns < H)
        at = rows * width + columns
        g = tl.load(dy + rows * H + columns, inside, other=0.0).to(tl.float32)
        x = tl.load(h + at, inside, other=0.0).to(tl.float32)
        if GATED:
            up = tl.load(h + at + H, inside, other=0.0).to(tl.float32)
            of_up = g * _act(x, GELU)
            g *= up
            tl.store(dh + at + H, of_up, inside)
            ups += of_up
        of_gate = g * _slope(x, GELU)
        tl.store(dh + at, of_gate, inside)
        gates += of_gate
    row = sums + tl.program_id(1) * width + columns
    tl.store(row, tl.sum(gates, 0)[None, :], columns < H)
    if GATED:
        tl.store(row + H, tl.sum(ups, 0)[None, :], columns < H)


@triton.jit
def _halves(at, inside, HALF: tl.constexpr):
    return tl.load(at, inside, other=0.0).to(tl.float32), tl.load(at + HALF, inside, other=0.0).to(tl.float32)


@triton.jit
def _normed(a, b, inside, EPS: tl.constexpr, HALF: tl.constexpr):
    """Both halves of a head without mean and with variance 1, and the factor that made it so."""
    mean = (tl.sum(a, 1) + tl.sum(b, 1))[:, None] / (2 * HALF)
    a = tl.where(inside, a - mean, 0.0)
    b = tl.where(inside, b - mean, 0.0)
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1))[:, None] / (2 * HALF) + EPS)
    return a * scale, b * scale, scale


@triton.jit
def _weights(at, within, HALF: tl.constexpr, AFFINE: tl.constexpr):
    if AFFINE:
        return tl.load(at, within, other=0.0).to(tl.float32), tl.load(at + HALF, within, other=0.0).to(tl.float32)
    else:
        return within.to(tl.float32), within.to(tl.float32)


@triton.jit
def heads_forward(
    qkv,
    cos,
    sin,
    weights,
    q,
    k,
    n,
    T,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    AFFINE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """q and k [n, HEADS, K] of qkv [n, 3, HEADS, K], each head normalised, times weights [2, K], and rotated by its position.

    The tables [T, K] of cosines and sines have equal halves, of which the first is read.
    """
    number, tile = _place(HEADS, 1)
    columns = tl.arange(0, C)[None, :]
    rows = tile * R + tl.arange(0, R)[:, None]
    inside = (rows < n) & (columns < HALF)
    table = (rows % T) * (2 * HALF) + columns
    c = tl.load(cos + table, inside, other=0.0)
    s = tl.load(sin + table, inside, other=0.0)
    head = number * 2 * HALF + columns
    at = rows.to(tl.int64) * (HEADS * 2 * HALF)
    for part in tl.static_range(2):
        a, b = _halves(qkv + 3 * at + part * HEADS * 2 * HALF + head, inside, HALF)
        a, b, _ = _normed(a, b, inside, EPS, HALF)
        wa, wb = _weights(weights + part * 2 * HALF + columns, columns < HALF, HALF, AFFINE)
        a *= wa
        b *= wb
        out = (q if part == 0 else k) + at + head
        tl.store(out, a * c - b * s, inside)
        tl.store(out + HALF, b * c + a * s, inside)


@triton.jit
def _turned_back(of, raw, c, s, wa, wb, inside, EPS: tl.constexpr, HALF: tl.constexpr):
    """From the gradient of a rotated head to that of the raw one, and the summands of that of its weights."""
    a, b = _halves(raw, inside, HALF)
    a, b, scale = _normed(a, b, inside, EPS, HALF)
    ga, gb = _halves(of, inside, HALF)
    ga, gb = ga * c + gb * s, gb * c - ga * s
    dwa, dwb = ga * a, gb * b
    ga *= wa
    gb *= wb
    mean = (tl.sum(ga, 1) + tl.sum(gb, 1))[:, None] / (2 * HALF)
    along = (tl.sum(ga * a, 1) + tl.sum(gb * b, 1))[:, None] / (2 * HALF)
    ga = tl.where(inside, scale * (ga - mean - a * along), 0.0)
    gb = tl.where(inside, scale * (gb - mean - b * along), 0.0)
    return ga, gb, dwa, dwb


@triton.jit
def _store_sums(at, a, b, within, HALF: tl.constexpr):
    tl.store(at, tl.sum(a, 0)[None, :], within)
    tl.store(at + HALF, tl.sum(b, 0)[None, :], within)


@triton.jit
def heads_backward(
    dq,
    dk,
    dv,
    qkv,
    cos,
    sin,
    weights,
    dqkv,
    sums,
    dweights,
    n,
    T,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    AFFINE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """dqkv [n, 3, HEADS, K] of dq, dk and dv, each [n, HEADS, K], and sums over tokens in fp32.

    These are sums [programs, 3, HEADS, K] of dqkv and, if AFFINE, dweights [programs * HEADS, 2, K].
    """
    columns = tl.arange(0, C)[None, :]
    within = columns < HALF
    number = tl.program_id(0)
    head = number * 2 * HALF + columns
    width: tl.constexpr = HEADS * 2 * HALF
    wqa, wqb = _weights(weights + columns, within, HALF, AFFINE)
    wka, wkb = _weights(weights + 2 * HALF + columns, within, HALF, AFFINE)
    zero = tl.zeros((R, C), tl.float32)
    qa, qb, ka, kb, va, vb = zero, zero, zero, zero, zero, zero
    dwqa, dwqb, dwka, dwkb = zero, zero, zero, zero
    for start in range(tl.program_id(1) * R, n, tl.num_programs(1) * R):
        rows = start + tl.arange(0, R)[:, None]
        inside = (rows < n) & within
        table = (rows % T) * (2 * HALF) + columns
        c = tl.load(cos + table, inside, other=0.0)
        s = tl.load(sin + table, inside, other=0.0)
        of = rows.to(tl.int64) * width + head
        at = rows.to(tl.int64) * (3 * width) + head
        a, b, dwa, dwb = _turned_back(dq + of, qkv + at, c, s, wqa, wqb, inside, EPS, HALF)
        tl.store(dqkv + at, a, inside)
        tl.store(dqkv + at + HALF, b, inside)
        qa, qb, dwqa, dwqb = qa + a, qb + b, dwqa + dwa, dwqb + dwb
        a, b, dwa, dwb = _turned_back(dk + of, qkv + at + width, c, s, wka, wkb, inside, EPS, HALF)
        tl.store(dqkv + at + width, a, inside)
        tl.store(dqkv + at + width + HALF, b, inside)
        ka, kb, dwka, dwkb = ka + a, kb + b, dwka + dwa, dwkb + dwb
        a, b = _halves(dv + of, inside, HALF)
        tl.store(dqkv + at + 2 * width, a, inside)
        tl.store(dqkv + at + 2 * width + HALF, b, inside)
        va, vb = va + a, vb + b
    row = sums + tl.program_id(1) * 3 * width + head
    _store_sums(row, qa, qb, within, HALF)
    _store_sums(row + width, ka, kb, within, HALF)
    _store_sums(row + 2 * width, va, vb, within, HALF)
    if AFFINE:
        row = dweights + (tl.program_id(1) * HEADS + number) * 4 * HALF + columns
        _store_sums(row, dwqa, dwqb, within, HALF)
        _store_sums(row + 2 * HALF, dwka, dwkb, within, HALF)


@triton.jit
def add_norm_forward(
    x,
    branch,
    gamma,
    kept,
    weight,
    bias,
    out,
    normed,
    mean_of,
    scale_of,
    n,
    T,
    EPS: tl.constexpr,
    D: tl.constexpr,
    KEPT: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """out = x + kept * gamma * branch [n, D] and normed = LayerNorm(out); also its mean and factor [n], fp32.

    kept, one for each image, is what drop path leaves.
    """
    columns = tl.arange(0, C)[None, :]
    within = columns < D
    rows = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    inside = (rows < n) & within
    at = rows.to(tl.int64) * D + columns
    value = tl.load(branch + at, inside, other=0.0).to(tl.float32)
    value *= tl.load(gamma + columns, within, other=0.0).to(tl.float32)
    if KEPT:
        value *= tl.load(kept + rows // T, rows < n, other=0.0)
    value += tl.load(x + at, inside, other=0.0).to(tl.float32)
    tl.store(out + at, value, inside)
    mean = tl.sum(value, 1)[:, None] / D
    value = tl.where(inside, value - mean, 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 1)[:, None] / D + EPS)
    w = tl.load(weight + columns, within, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, within, other=0.0).to(tl.float32)
    tl.store(normed + at, value * scale * w + b, inside)
    tl.store(mean_of + rows, mean, rows < n)
    tl.store(scale_of + rows, scale, rows < n)


@triton.jit
def add_norm_backward(
    dout,
    dnormed,
    out,
    branch,
    gamma,
    kept,
    weight,
    mean_of,
    scale_of,
    dx,
    dbranch,
    sums,
    n,
    T,
    D: tl.constexpr,
    KEPT: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """dx, dbranch [n, D], and sums over tokens [programs, 4, D], fp32: of weight, bias, gamma and of dbranch."""
    columns = tl.arange(0, C)[None, :]
    within = columns < D
    factor = tl.load(gamma + columns, within, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, within, other=0.0).to(tl.float32)
    zero = tl.zeros((R, C), tl.float32)
    of_weight, of_bias, of_gamma, of_branch = zero, zero, zero, zero
    for start in range(tl.program_id(0) * R, n, tl.num_programs(0) * R):
        rows = start + tl.arange(0, R)[:, None]
        inside = (rows < n) & within
        at = rows.to(tl.int64) * D + columns
        g = tl.load(dnormed + at, inside, other=0.0).to(tl.float32)
        x = tl.load(out + at, inside, other=0.0).to(tl.float32)
        value = tl.load(branch + at, inside, other=0.0).to(tl.float32)
        total = tl.load(dout + at, inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_of + rows, rows < n, other=0.0)
        x = tl.where(inside, (x - tl.load(mean_of + rows, rows < n, other=0.0)) * scale, 0.0)
        of_weight += g * x
        of_bias += g
        g *= w
        total += scale * (g - tl.sum(g, 1)[:, None] / D - x * (tl.sum(g * x, 1)[:, None] / D))
        tl.store(dx + at, total, inside)
        if KEPT:
            total *= tl.load(kept + rows // T, rows < n, other=0.0)
        of_gamma += total * value
        total *= factor
        tl.store(dbranch + at, total, inside)
        of_branch += total
    row = sums + tl.program_id(0) * 4 * D + columns
    tl.store(row, tl.sum(of_weight, 0)[None, :], within)
    tl.store(row + D, tl.sum(of_bias, 0)[None, :], within)
    tl.store(row + 2 * D, tl.sum(of_gamma, 0)[None, :], within)
    tl.store(row + 3 * D, tl.sum(of_branch, 0)[None, :], within)


@triton.jit
def add_forward(x, branch, gamma, kept, out, n, T, D: tl.constexpr, KEPT: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """out = x + kept * gamma * branch [n, D]."""
    part, tile = _place(D, C)
    columns = part * C + tl.arange(0, C)[None, :]
    rows = tile * R + tl.arange(0, R)[:, None]
    inside = (rows < n) & (columns < D)
    at = rows.to(tl.int64) * D + columns
    value = tl.load(branch + at, inside, other=0.0).to(tl.float32)
    value *= tl.load(gamma + columns, columns < D, other=0.0).to(tl.float32)
    if KEPT:
        value *= tl.load(kept + rows // T, rows < n, other=0.0)
    tl.store(out + at, tl.load(x + at, inside, other=0.0).to(tl.float32) + value, inside)


@triton.jit
def add_backward(
    dout,
    branch,
    gamma,
    kept,
    dbranch,
    sums,
    n,
    T,
    D: tl.constexpr,
    KEPT: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """dbranch [n, D], and sums over tokens [programs, 2, D], fp32: of gamma and of dbranch."""
    columns = tl.program_id(0) * C + tl.arange(0, C)[None, :]
    factor = tl.load(gamma + columns, columns < D, other=0.0).to(tl.float32)
    of_gamma = tl.zeros((R, C), tl.float32)
    of_branch = tl.zeros((R, C), tl.float32)
    for start in range(tl.program_id(1) * R, n, tl.num_programs(1) * R):
        rows = start + tl.arange(0, R)[:, None]
        inside = (rows < n) & (columns < D)
        at = rows.to(tl.int64) * D + columns
        g = tl.load(dout + at, inside, other=0.0).to(tl.float32)
        if KEPT:
            g *= tl.load(kept + rows // T, rows < n, other=0.0)
        of_gamma += g * tl.load(branch + at, inside, other=0.0).to(tl.float32)
        g *= factor
        tl.store(dbranch + at, g, inside)
        of_branch += g
    row = sums + tl.program_id(1) * 2 * D + columns
    tl.store(row, tl.sum(of_gamma, 0)[None, :], columns < D)
    tl.store(row + D, tl.sum(of_branch, 0)[None, :], columns < D)
