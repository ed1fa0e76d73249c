"""Triton kernels of attention over few tokens, from the product of queries, keys and values and back to its gradient.

With 256 tokens attention is bound by memory and by what surrounds it. So norms and rotation of queries and keys happen in it:
forward reads qkv, backward writes its gradient, and in between only normalised and rotated queries and keys are kept. Nothing is
added atomically: results are equal from run to run.

Forward, a program has a tile of queries and goes through the keys (online softmax). Backward, it has a tile of tokens: as keys
and values it goes through the queries that see them, then as queries through the keys that they see. With causal attention
these are equally many tiles for all programs. Softmax is taken to the base 2.

Legend: T tokens, HEADS heads of width K = 2 HALF; M tokens of a tile, C columns of half a head and P of a head, powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nepa_dist.kernels import _halves, _normed, _store_sums, _weights


@triton.jit
def attention_forward(
    qkv,
    cos,
    sin,
    weights,
    q,
    k,
    out,
    logsum,
    T,
    factor,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    AFFINE: tl.constexpr,
    CAUSAL: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Output, and normalised and rotated queries and keys, all [images, T, HEADS, K], and logsum [images, HEADS, T] of scores.

    qkv [images, T, 3, HEADS, K]; factor: of scores, log2(e) included.
    """
    width: tl.constexpr = HEADS * 2 * HALF
    tile, number = tl.program_id(0), tl.program_id(1)
    image, head = (number // HEADS).to(tl.int64), number % HEADS
    columns = tl.arange(0, C)[None, :]
    within = columns < HALF
    whole = tl.arange(0, P)[None, :]
    raw = qkv + image * T * 3 * width + head * 2 * HALF
    kept = image * T * width + head * 2 * HALF
    wqa, wqb = _weights(weights + columns, within, HALF, AFFINE)
    wka, wkb = _weights(weights + 2 * HALF + columns, within, HALF, AFFINE)
    rows = tile * M + tl.arange(0, M)[:, None]
    inside = (rows < T) & within
    c = tl.load(cos + rows * (2 * HALF) + columns, inside, other=0.0)
    s = tl.load(sin + rows * (2 * HALF) + columns, inside, other=0.0)
    a, b = _halves(raw + rows * (3 * width) + columns, inside, HALF)
    a, b, _ = _normed(a, b, inside, EPS, HALF)
    a *= wqa
    b *= wqb
    qa = (a * c - b * s).to(qkv.dtype.element_ty)
    qb = (b * c + a * s).to(qkv.dtype.element_ty)
    tl.store(q + kept + rows * width + columns, qa, inside)
    tl.store(q + kept + rows * width + HALF + columns, qb, inside)
    largest = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, P), tl.float32)
    end = T
    if CAUSAL:
        end = tl.minimum(tile * M + M, T)
    for start in tl.range(0, end, M, num_stages=STAGES):
        keys = start + tl.arange(0, M)[:, None]
        inside = (keys < T) & within
        c = tl.load(cos + keys * (2 * HALF) + columns, inside, other=0.0)
        s = tl.load(sin + keys * (2 * HALF) + columns, inside, other=0.0)
        a, b = _halves(raw + keys * (3 * width) + width + columns, inside, HALF)
        a, b, _ = _normed(a, b, inside, EPS, HALF)
        a *= wka
        b *= wkb
        ka = (a * c - b * s).to(qkv.dtype.element_ty)
        kb = (b * c + a * s).to(qkv.dtype.element_ty)
        if start == tile * M:
            tl.store(k + kept + keys * width + columns, ka, inside)
            tl.store(k + kept + keys * width + HALF + columns, kb, inside)
        v = tl.load(raw + keys * (3 * width) + 2 * width + whole, (keys < T) & (whole < 2 * HALF), other=0.0)
        scores = tl.dot(qa, tl.trans(ka), input_precision="ieee")
        scores = tl.dot(qb, tl.trans(kb), scores, input_precision="ieee") * factor
        seen = start + tl.arange(0, M)[None, :]
        visible = seen <= rows if CAUSAL else seen < T  # causally, no row below T sees a token beyond it
        scores = tl.where(visible, scores, -float("inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        shares = tl.exp2(scores - now[:, None])
        rescale = tl.exp2(largest - now)
        total = total * rescale + tl.sum(shares, 1)
        sums = tl.dot(shares.to(v.dtype), v, sums * rescale[:, None], input_precision="ieee")
        largest = now
    tl.store(out + kept + rows * width + whole, sums / total[:, None], (rows < T) & (whole < 2 * HALF))
    tokens = tile * M + tl.arange(0, M)
    tl.store(logsum + number.to(tl.int64) * T + tokens, largest + tl.log2(total), tokens < T)


@triton.jit
def attention_delta(dout, out, delta, n, T, HEADS: tl.constexpr, K: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    """delta [images, HEADS, T]: what every share of a token's attention has in common in backward, sum(dout * out)."""
    columns = tl.arange(0, P)[None, :]
    rows = tl.program_id(0) * R + tl.arange(0, R)
    inside = (rows[:, None] < n) & (columns < K)
    at = rows[:, None].to(tl.int64) * K + columns
    product = tl.load(dout + at, inside, other=0.0).to(tl.float32) * tl.load(out + at, inside, other=0.0).to(tl.float32)
    token, head = rows // HEADS, rows % HEADS
    tl.store(delta + (token // T * HEADS + head).to(tl.int64) * T + token % T, tl.sum(product, 1), rows < n)


@triton.jit
def attention_backward(
    dout,
    qkv,
    cos,
    sin,
    weights,
    q,
    k,
    logsum,
    delta,
    dqkv,
    sums,
    dweights,
    T,
    factor,
    scale,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    AFFINE: tl.constexpr,
    CAUSAL: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dqkv of dout, and sums over the tokens of a tile in fp32.

    These are sums [images, tiles, 3, HEADS, K] of dqkv and, if AFFINE, dweights [images, tiles, HEADS, 2, K].
    """
    width: tl.constexpr = HEADS * 2 * HALF
    tile, number = tl.program_id(0), tl.program_id(1)
    image, head = (number // HEADS).to(tl.int64), number % HEADS
    whole = tl.arange(0, P)[None, :]
    own = tile * M + tl.arange(0, M)[:, None]
    known = (own < T) & (whole < 2 * HALF)
    kept = image * T * width + head * 2 * HALF
    values = qkv + image * T * 3 * width + head * 2 * HALF + 2 * width
    q += kept
    k += kept
    dout += kept
    logsum += number.to(tl.int64) * T
    delta += number.to(tl.int64) * T
    # own tokens as keys and values
    keys = tl.load(k + own * width + whole, known, other=0.0)
    v = tl.load(values + own * (3 * width) + whole, known, other=0.0)
    dk = tl.zeros((M, P), tl.float32)
    dv = tl.zeros((M, P), tl.float32)
    first = 0
    if CAUSAL:
        first = tile * M
    for start in tl.range(first, T, M, num_stages=STAGES):
        rows = start + tl.arange(0, M)
        inside = (rows[:, None] < T) & (whole < 2 * HALF)
        queries = tl.load(q + rows[:, None] * width + whole, inside, other=0.0)
        do = tl.load(dout + rows[:, None] * width + whole, inside, other=0.0)
        log = tl.load(logsum + rows, rows < T, other=float("inf"))  # beyond T: shares of 0
        common = tl.load(delta + rows, rows < T, other=0.0)
        shares = tl.exp2(tl.dot(keys, tl.trans(queries), input_precision="ieee") * factor - log[None, :])
        shares = tl.where(own <= rows[None, :] if CAUSAL else own < T, shares, 0.0)
        dv = tl.dot(shares.to(do.dtype), do, dv, input_precision="ieee")
        ds = shares * (tl.dot(v, tl.trans(do), input_precision="ieee") - common[None, :])
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee")
    row = image * tl.num_programs(0) + tile
    at = image * T * 3 * width + head * 2 * HALF + own * (3 * width)
    to = sums + row * 3 * width + head * 2 * HALF
    to_weights = dweights + (row * HEADS + head) * 4 * HALF
    tl.store(dqkv + at + 2 * width + whole, dv, known)
    tl.store(to + 2 * width + whole, tl.sum(dv, 0)[None, :], whole < 2 * HALF)
    _store_raw(
        dk * scale,
        at + width,
        to + width,
        to_weights + 2 * HALF,
        dqkv,
        qkv,
        cos,
        sin,
        weights + 2 * HALF,
        own,
        T,
        EPS,
        HALF,
        AFFINE,
        M,
        C,
    )
    # own tokens as queries
    queries = tl.load(q + own * width + whole, known, other=0.0)
    do = tl.load(dout + own * width + whole, known, other=0.0)
    tokens = tile * M + tl.arange(0, M)
    log = tl.load(logsum + tokens, tokens < T, other=float("inf"))
    common = tl.load(delta + tokens, tokens < T, other=0.0)
    dq = tl.zeros((M, P), tl.float32)
    end = T
    if CAUSAL:
        end = tl.minimum(tile * M + M, T)
    for start in tl.range(0, end, M, num_stages=STAGES):
        rows = start + tl.arange(0, M)
        inside = (rows[:, None] < T) & (whole < 2 * HALF)
        others = tl.load(k + rows[:, None] * width + whole, inside, other=0.0)
        theirs = tl.load(values + rows[:, None] * (3 * width) + whole, inside, other=0.0)
        shares = tl.exp2(tl.dot(queries, tl.trans(others), input_precision="ieee") * factor - log[:, None])
        shares = tl.where(rows[None, :] <= own if CAUSAL else rows[None, :] < T, shares, 0.0)
        ds = shares * (tl.dot(do, tl.trans(theirs), input_precision="ieee") - common[:, None])
        dq = tl.dot(ds.to(others.dtype), others, dq, input_precision="ieee")
    _store_raw(dq * scale, at, to, to_weights, dqkv, qkv, cos, sin, weights, own, T, EPS, HALF, AFFINE, M, C)


@triton.jit
def _store_raw(
    g,
    at,
    to,
    to_weights,
    dqkv,
    qkv,
    cos,
    sin,
    weights,
    own,
    T,
    EPS: tl.constexpr,
    HALF: tl.constexpr,
    AFFINE: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
):
    """Take a gradient g [M, 2 C], C = HALF, of queries or keys back through rotation and norm; store it and its sums."""
    columns = tl.arange(0, C)[None, :]
    within = columns < HALF
    inside = (own < T) & within
    c = tl.load(cos + own * (2 * HALF) + columns, inside, other=0.0)
    s = tl.load(sin + own * (2 * HALF) + columns, inside, other=0.0)
    ga, gb = tl.split(tl.permute(tl.reshape(g, (M, 2, C)), (0, 2, 1)))
    a, b = _halves(qkv + at + columns, inside, HALF)
    a, b, scale = _normed(a, b, inside, EPS, HALF)
    ga, gb = ga * c + gb * s, gb * c - ga * s
    if AFFINE:
        _store_sums(to_weights + columns, ga * a, gb * b, within, HALF)
    wa, wb = _weights(weights + columns, within, HALF, AFFINE)
    ga *= wa
    gb *= wb
    mean = (tl.sum(ga, 1) + tl.sum(gb, 1))[:, None] / (2 * HALF)
    along = (tl.sum(ga * a, 1) + tl.sum(gb * b, 1))[:, None] / (2 * HALF)
    ga = tl.where(inside, scale * (ga - mean - a * along), 0.0)
    gb = tl.where(inside, scale * (gb - mean - b * along), 0.0)
    tl.store(dqkv + at + columns, ga, inside)
    tl.store(dqkv + at + HALF + columns, gb, inside)
    _store_sums(to + columns, ga, gb, within, HALF)
