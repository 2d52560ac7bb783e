"""The selective scan of Mamba as GPU kernels in Triton: nothing to compile, nothing but this file.

    Albert Gu and Tri Dao: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    arXiv 2312.00752v2, section 3.3.2. It continues the ladder of scans in mamba.py.

    from triton_scan import selective_scan_triton
    y, h_last = selective_scan_triton(x, dt, A, B, C, D, z, dt_bias=bias)   # CUDA tensors
    y.sum().backward()                                                     # every gradient

    python triton_scan.py       # checks against the recurrence in float64, then times, on a GPU

Symbols as in mamba.py: x, dt, z, y (b, l, d), A (d, n), B and C (b, l, n), the state h (b, d, n).
"""

from __future__ import annotations

import contextlib
import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

## ================================================================================================
## The problem
## ================================================================================================
##
## For every channel and every state, one after the other in time:
##
##     h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t        y_t = (C_t h_t + D x_t) silu(z_t)
##
## Where the time goes when PyTorch runs it, batch 8, 2048 steps, d = 2048, n = 16, bfloat16:
##
##     tensor                       size                    moved by PyTorch      moved by a kernel
##     x, dt, z, y                  b l d       64 MiB      read / written        once, 256 MiB
##     Δ, Δx, silu(z), ...          b l d      128 MiB      several times         stay in registers
##     Ā, B̄x, h, C h                b l d n      2 GiB      each several times    stay in registers
##     B, C                         b l n      0.5 MiB      once                  come from a cache
##
## An H100 moves 3.0 TB/s. 256 MiB take 0.09 ms; ten passes over 2 GiB take 7 ms. So the state must
## never leave the registers: it is n times larger than anything that has to be moved.
##
## What is then the limit? Each state and step needs one exponential, and the special-function
## units give 16 a clock on each of 132 processors: 537 million take 0.145 ms at 1.755 GHz, and with
## softplus and silu 0.181 ms. Exponentials, not memory, are the limit, and right behind them comes
## the number of instructions that a scheduler can issue, one a clock. Both say the same: whatever
## is not an exponential should cost as few instructions as possible.
##
## For the backward pass h is needed again. Keeping it would be 2 GiB a layer. The forward pass
## keeps h at every 64th step instead (32 MiB), and the backward pass computes the steps between
## once more: two more exponentials are cheaper than one number fetched from memory.
##
## The work is cut in three directions; one program, the unit of work that a GPU schedules, is one
## warp of 32 lanes in lockstep:
##
##                   l, time ------------------------------------------>
##           batch  .-------------------.-------------------.-----------.
##          /   d   | program (0, 0)    | program (0, 1)    |  ...      |   32 channels: a lane each
##         /    |   |-------------------|-------------------|-----------|
##              |   | program (1, 0)    | program (1, 1)    |           |
##              v   '-------------------'-------------------'-----------'
##                    one segment
##
## Channels and batch rows are independent. Time is not, so it is cut only where batch x d gives too
## few programs to fill the chip; "Cutting time" says how.


## ================================================================================================
## The first kernel
## ================================================================================================
##
## `scan_chunked` of mamba.py, fused. A program holds the state of some channels in registers and
## walks through one chunk of time. Launched twice: from zero states it gives the end of each chunk,
## e; the chunks are chained with h <- exp(A ΣΔ) h + e; then from the true starts it gives y.


@triton.jit
def first_kernel(
    x, delta, A, B, C, starts, y, ends, seqlen, d_inner, d_state,
    CHUNK: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    i_d, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = i_d * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    m_d = d < d_inner
    m_dn = m_d[:, None] & (n < d_state)[None, :]
    o_dn = d[:, None] * d_state + n[None, :]
    chunk = (i_b * tl.num_programs(1) + i_c) * d_inner * d_state  # where its states are stored
    b_A = tl.load(A + o_dn, mask=m_dn, other=0.0)
    b_h = tl.load(starts + chunk + o_dn, mask=m_dn, other=0.0)
    for t in range(i_c * CHUNK, min(seqlen, (i_c + 1) * CHUNK)):
        row = i_b * seqlen + t
        b_x = tl.load(x + row * d_inner + d, mask=m_d, other=0.0)
        b_delta = tl.load(delta + row * d_inner + d, mask=m_d, other=0.0)
        b_B = tl.load(B + row * d_state + n, mask=n < d_state, other=0.0)
        b_C = tl.load(C + row * d_state + n, mask=n < d_state, other=0.0)
        b_h = tl.exp(b_delta[:, None] * b_A) * b_h + (b_delta * b_x)[:, None] * b_B[None, :]
        tl.store(y + row * d_inner + d, tl.sum(b_h * b_C[None, :], 1), mask=m_d)
    tl.store(ends + chunk + o_dn, b_h, mask=m_dn)


def first_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None = None,
    *, chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A scan in mamba.py's signature: x, delta (b, l, d) -> y (b, l, d), h_last (b, d, n), float32.

    Forward only. Raises RuntimeError for tensors that are not on a GPU.
    """
    check_device(x)
    x, delta, A, B, C = (tensor.float().contiguous() for tensor in (x, delta, A, B, C))
    (batch, seqlen, d_inner), d_state = x.shape, A.shape[1]
    chunks = triton.cdiv(seqlen, chunk)
    y = torch.empty_like(x)
    starts = x.new_zeros(batch, chunks, d_inner, d_state)
    ends = torch.empty_like(starts)
    channels = 32
    grid = (triton.cdiv(d_inner, channels), chunks, batch)
    options = {"CHUNK": chunk, "CHANNELS": channels, "STATES": triton.next_power_of_2(d_state)}
    sizes = (seqlen, d_inner, d_state)
    first_kernel[grid](x, delta, A, B, C, starts, y, ends, *sizes, **options, num_warps=1)
    if h0 is not None:
        starts[:, 0] = h0
    for i in range(chunks - 1):
        decay = torch.exp(A * delta[:, i * chunk : (i + 1) * chunk].sum(1).unsqueeze(-1))
        starts[:, i + 1] = decay * starts[:, i] + ends[:, i]
    first_kernel[grid](x, delta, A, B, C, starts, y, ends, *sizes, **options, num_warps=1)
    return y, ends[:, -1]


## ================================================================================================
## The fast kernel: tiles
## ================================================================================================
##
## The first kernel spends its time waiting. At each step it asks for x, Δ, B and C, waits for
## memory (500 clocks and more), and then has work for 200. The remedies, in the order of what they
## gave (benchmarks/NOTES.md has the numbers of each):
##
## 1. Tiles of T steps. A tile is loaded at once, and the exponentials of all its steps, which do
##    not depend on h, are there before the recurrence runs through them.
## 2. Loads ahead (`num_stages`). While one tile is computed, the next two are copied to shared
##    memory by cp.async, which takes no register and stops nobody.
## 3. One channel, one lane. A lane keeps all n states of its channel in registers: the sum C h
##    over n is then a chain of multiply-adds within a lane and not an exchange between lanes. B
##    and C, the same for all channels, are read from shared memory, where 32 lanes that read the
##    same word are served at once.
## 4. B and C are widened to float32 once, by the caller: 32 conversions a step less.
## 5. Cheap exponentials. A is multiplied by log2 e beforehand, and ex2.approx.ftz is one
##    instruction where exp2 takes four to be right for results below 2^-126, which are noise here.
##
## The tile of states has four axes, (t, m, j, c):
##
##     t  T steps, in registers, so that the recurrence runs inside each lane
##     m  states of a lane, in registers
##     j  lanes that share a channel: state n is number m of lane j, n = j M + m
##     c  channels: the 32 lanes of a warp are j x c
##
## Forward, j has one value and c 32. A state too large for a lane (n > 16) is spread over j lanes.
## What has no axis (Δ none for m and j, B none for c) is broadcast. The compiler chooses which axis
## lies in lanes and which in registers, and takes the last ones for lanes: hence the order.
##
## Names: i_ index, o_ offsets, b_ block of values in registers. K steps are a chunk: the state at
## the start of each is kept for the backward pass.

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

K = 64  # steps between two stored states
LANES = 32  # of a warp
FORWARD_T, FORWARD_STAGES = 8, 3  # steps of a tile, tiles in flight
BACKWARD_T, BACKWARD_STAGES = 4, 3

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Inline assembly is for NVIDIA's compiler; elsewhere the same functions in plain Triton.
FAST = not INTERPRETED and torch.version.cuda is not None


@triton.jit
def exp2(v, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(v)


@triton.jit
def log2(v, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(v)


@triton.jit
def reciprocal(v, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / v


## softplus(v) = log(1 + e^v). For small e = e^v the sum 1 + e forgets the last digits of e: at the
## smallest Δ of the official initialisation, 0.001, the result would be wrong in the fourth digit.
## Where dt has 8 bits (bfloat16) nobody can tell; where it has 24, a polynomial takes over below
## e = 1/4: log(1 + e) / e to 1e-8, by interpolation in Chebyshev points.


@triton.jit
def softplus(v, PRECISE: tl.constexpr, FAST: tl.constexpr):
    """(softplus(v), e^v). The second is for the derivative, e^v / (1 + e^v)."""
    e = exp2(v * LOG2E, FAST)
    s = log2(1.0 + e, FAST) * LN2
    if PRECISE:
        p = -0.0921675599 * e + 0.181595551
        p = p * e - 0.247756151
        p = p * e + 0.333205997
        p = p * e - 0.499997313
        p = p * e + 0.999999991
        s = tl.where(e < 0.25, e * p, s)
    return tl.where(v > 20.0, v, s), e


@triton.jit
def combine(a1, v1, a2, v2):
    ## Two steps of the recurrence in one, mamba.py's "The combine". The time axis of a tile lies in
    ## the registers of one lane, so the scan becomes a plain loop, and the products of a, which
    ## nobody reads, are never computed.
    return a2 * a1, a2 * v1 + v2


@triton.jit
def last_of(p, q):
    return q


@triton.jit
def load(pointers, mask, EVEN: tl.constexpr):
    if EVEN:  # the tile lies inside the tensor
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointers, value, mask, EVEN: tl.constexpr):
    if EVEN:
        tl.store(pointers, value.to(pointers.dtype.element_ty))
    else:
        tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def load_delta(
    dt, mask, b_bias,
    SOFTPLUS: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Δ of a tile (t, c), and dΔ/d(dt)."""
    PRECISE: tl.constexpr = dt.dtype.element_ty == tl.float32
    v = load(dt, mask, EVEN) + b_bias[None, :]
    slope = tl.full(v.shape, 1.0, tl.float32)
    delta = v
    if SOFTPLUS:
        delta, e = softplus(v, PRECISE, FAST)
        slope = tl.where(v > 20.0, 1.0, e * reciprocal(1.0 + e, FAST))
    if not EVEN:
        # Steps past the end must leave h alone: Ā = exp(0 A) = 1, and x = 0 there.
        delta = tl.where(mask, delta, 0.0)
    return delta, slope


@triton.jit
def load_reset(reset, i_b, t, seqlen):
    return tl.load(reset + i_b * seqlen + t, mask=t < seqlen, other=0)


@triton.jit
def decay(b_delta, b_A2, reset, HAS_RESET: tl.constexpr, FAST: tl.constexpr):
    """Ā (t, m, j, c) of a tile; 0 where a document starts. b_A2 is A log2 e."""
    a = exp2(b_delta[:, None, None, :] * b_A2[None, :, :, :], FAST)
    if HAS_RESET:
        a = tl.where(reset[:, None, None, None], 0.0, a)
    return a


## A segment hands its state on as it is, (m, j, c), 32 lanes side by side for every m. Backward, a
## channel has two lanes and a program 16 channels, so that is how all stored states are laid out:
## for each group of channels an array (m, j, c) of its own. `state_offsets` finds the place of
## state n of channel c.


@triton.jit
def state_offsets(
    M: tl.constexpr, J: tl.constexpr, C: tl.constexpr,
    GROUP_J: tl.constexpr, GROUP_C: tl.constexpr,
):  # fmt: skip
    """(m, 32): where the states of M x J x C lie, in groups of GROUP_J x GROUP_C lanes."""
    lane = tl.arange(0, J * C)[None, :]
    if J == GROUP_J and C == GROUP_C:
        # What follows comes to the same, but the compiler would not see that lanes are neighbours.
        return tl.arange(0, M)[:, None] * (J * C) + lane
    n = (lane // C) * M + tl.arange(0, M)[:, None]
    c = lane % C
    GROUP_M: tl.constexpr = (M * J) // GROUP_J
    place = (n % GROUP_M) * (GROUP_J * GROUP_C) + (n // GROUP_M) * GROUP_C + c % GROUP_C
    return (c // GROUP_C) * (M * J * GROUP_C) + place


@triton.jit
def state_mask(d, d_inner, d_state, M: tl.constexpr, J: tl.constexpr):
    """Offsets and mask (m, j, c) in a tensor (d, n)."""
    n = tl.arange(0, M)[:, None, None] + tl.arange(0, J)[None, :, None] * M
    return d[None, None, :] * d_state + n, (n < d_state) & (d < d_inner)[None, None, :]


@triton.jit
def load_A(A, d, d_inner, d_state, M: tl.constexpr, J: tl.constexpr):
    """A log2 e as (m, j, c); 0 for channels and states that only fill up the tile."""
    offsets, mask = state_mask(d, d_inner, d_state, M, J)
    return tl.load(A + offsets, mask=mask, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def load_channels(vector, d, d_inner, EXISTS: tl.constexpr):
    if EXISTS:
        return tl.load(vector + d, mask=d < d_inner, other=0.0).to(tl.float32)
    else:
        return tl.zeros(d.shape, tl.float32)


## ================================================================================================
## Cutting time
## ================================================================================================
##
## A GPU with 528 schedulers wants two programs for each. One sequence and d = 1536 are 48 programs.
## Then time is cut into segments, and the scan becomes what section 3.3.2 calls parallel: the
## combine of whole segments. A segment turns its start state h into P h + e, so that
##
##     1. a summary of every segment: e, and Σ Δ, since P = exp(A ΣΔ) needs no product;
##     2. every segment chains the summaries before it, h <- P h + e, and then runs in full.
##
## The summary is no recurrence. The input v_t = B_t Δ_t x_t of step t arrives at the end decayed by
## the steps after it:
##
##     e = Σ_t exp(A (Δ_{t+1} + ... + Δ_end)) v_t
##
## Walk from the end to the start and carry that sum of Δ: a weighted sum, with all terms of a tile
## at once. It costs as many exponentials as the scan and hardly anything else. That is the price of
## cutting time, and why it is not done where batch x d fills the chip.


@triton.jit(do_not_specialize=["seqlen", "segment", "segments"])
def forward_summary_kernel(
    x, dt, A, B, dt_bias, reset, ends, sums, seqlen, d_inner, d_state, segment, segments,
    x_b, x_l, x_d, dt_b, dt_l, dt_d,
    M: tl.constexpr, J: tl.constexpr, C: tl.constexpr,
    GROUP_J: tl.constexpr, GROUP_C: tl.constexpr, T: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, SOFTPLUS: tl.constexpr,
    DIRAC: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """e (m, j, c) and ΣΔ (c) of one segment; ΣΔ is infinite if a document starts in it."""
    i_d, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    N: tl.constexpr = M * J
    c, t, n = tl.arange(0, C), tl.arange(0, T), tl.arange(0, M)[:, None] + tl.arange(0, J) * M
    d = i_d * C + c
    b_A2 = load_A(A, d, d_inner, d_state, M, J)
    b_bias = load_channels(dt_bias, d, d_inner, HAS_BIAS)
    x += i_b * x_b + (i_d * C).to(tl.int64) * x_d
    dt += i_b * dt_b + (i_d * C).to(tl.int64) * dt_d
    o_x, o_dt = t[:, None] * x_l + c[None, :] * x_d, t[:, None] * dt_l + c[None, :] * dt_d
    B += i_b * seqlen * N
    o_B = t[:, None, None] * N + n[None, :, :]

    b_e = tl.zeros([M, J, C], tl.float32)
    b_sum = tl.zeros([C], tl.float32)  # ΣΔ of the tiles after this one
    resets_after = tl.full([], 0, tl.int32)
    start = i_s * segment
    tiles = tl.cdiv(min(seqlen, start + segment) - start, T)
    for k in tl.range(0, tiles, num_stages=STAGES):
        i = tl.cast(start + (tiles - 1 - k) * T, tl.int64)
        mask = (i + t < seqlen)[:, None] & (d < d_inner)[None, :]
        b_delta, _ = load_delta(dt + i * dt_l + o_dt, mask, b_bias, SOFTPLUS, EVEN, FAST)
        b_v = load(x + i * x_l + o_x, mask, EVEN)
        if not DIRAC:
            b_v = b_v * b_delta
        b_B = load(B + i * N + o_B, (i + t < seqlen)[:, None, None] & (n < N)[None, :, :], EVEN)
        total = tl.sum(b_delta, 0)
        b_after = (b_sum + total)[None, :] - tl.cumsum(b_delta, 0)
        b_weight = exp2(b_after[:, None, None, :] * b_A2[None, :, :, :], FAST)
        if HAS_RESET:
            b_r = load_reset(reset, i_b, i + t, seqlen)
            b_r = b_r.to(tl.int32)
            count = tl.sum(b_r, 0)
            cut = resets_after + count - tl.cumsum(b_r, 0) > 0  # a document starts after step t
            b_weight = tl.where(cut[:, None, None, None], 0.0, b_weight)
            resets_after += count
        b_e += tl.sum(b_weight * b_v[:, None, None, :] * b_B[:, :, :, None], 0)
        b_sum += total
    if HAS_RESET:
        b_sum = tl.where(resets_after > 0, float("inf"), b_sum)

    where = (i_b * segments + i_s) * tl.num_programs(0) + i_d
    o_h = state_offsets(M, J, C, GROUP_J, GROUP_C)
    tl.store(ends + where * (N * C) + o_h, tl.reshape(b_e, [M, J * C]))
    tl.store(sums + where * C + c, b_sum)


@triton.jit
def chain(
    b_h, ends, sums, where, state_step, b_A2, o_h,
    M: tl.constexpr, J: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """P h + e, with the summary of one segment."""
    b_e = tl.reshape(tl.load(ends + where * state_step + o_h), [M, J, C])
    b_sum = tl.load(sums + where * C + tl.arange(0, C))[None, None, :]
    b_P = tl.where(b_sum == float("inf"), 0.0, exp2(b_A2 * b_sum, FAST))
    return b_P * b_h + b_e


## ================================================================================================
## Forward
## ================================================================================================


@triton.jit(do_not_specialize=["seqlen", "segment", "state_step"])
def forward_kernel(
    x, dt, z, A, B, C_, D, dt_bias, reset, h0, ends, sums, y, borders, h_last,
    seqlen, d_inner, d_state, segment, state_step,
    x_b, x_l, x_d, dt_b, dt_l, dt_d, z_b, z_l, z_d,
    M: tl.constexpr, J: tl.constexpr, C: tl.constexpr,
    GROUP_J: tl.constexpr, GROUP_C: tl.constexpr,
    T: tl.constexpr, STAGES: tl.constexpr, K: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr,
    HAS_H0: tl.constexpr, SAVE: tl.constexpr, SOFTPLUS: tl.constexpr, DIRAC: tl.constexpr,
    EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """y of one segment of C channels; h at the start of every K-th step; h after the last."""
    i_d, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks, segments = tl.num_programs(0), tl.num_programs(1)
    N: tl.constexpr = M * J
    c, t, n = tl.arange(0, C), tl.arange(0, T), tl.arange(0, M)[:, None] + tl.arange(0, J) * M
    d = i_d * C + c
    b_A2 = load_A(A, d, d_inner, d_state, M, J)
    b_bias = load_channels(dt_bias, d, d_inner, HAS_BIAS)
    b_D = load_channels(D, d, d_inner, HAS_D)
    o_h = state_offsets(M, J, C, GROUP_J, GROUP_C)

    # state_step is N C, but the compiler does not know that it is a multiple of anything. It would
    # otherwise give a lane four neighbouring channels, to load 16 bytes at once, and shuffle the
    # states back and forth in every tile.
    b_h = tl.zeros([M, J, C], tl.float32)
    if HAS_H0:
        b_h = tl.reshape(tl.load(h0 + (i_b * blocks + i_d) * state_step + o_h), [M, J, C])
    for s in range(0, i_s):
        where = (i_b * segments + s) * blocks + i_d
        b_h = chain(b_h, ends, sums, where, state_step, b_A2, o_h, M, J, C, FAST)

    start = i_s * segment
    stop = min(seqlen, start + segment)
    x += i_b * x_b + (i_d * C).to(tl.int64) * x_d
    dt += i_b * dt_b + (i_d * C).to(tl.int64) * dt_d
    z += i_b * z_b + (i_d * C).to(tl.int64) * z_d
    y += i_b * seqlen * d_inner + i_d * C
    o_x, o_dt = t[:, None] * x_l + c[None, :] * x_d, t[:, None] * dt_l + c[None, :] * dt_d
    o_z, o_y = t[:, None] * z_l + c[None, :] * z_d, t[:, None] * d_inner + c[None, :]
    B += i_b * seqlen * N
    C_ += i_b * seqlen * N
    o_B = t[:, None, None] * N + n[None, :, :]
    borders += ((i_b * tl.cdiv(seqlen, K) + start // K) * blocks + i_d) * state_step

    for step in tl.range(start, stop, T, num_stages=STAGES):
        if SAVE:
            border = step % K == 0
            tl.store(borders + o_h, tl.reshape(b_h, [M, J * C]), mask=border)
            borders += tl.where(border, blocks * state_step, 0)
        i = tl.cast(step, tl.int64)
        mask = (i + t < seqlen)[:, None] & (d < d_inner)[None, :]
        mask_B = (i + t < seqlen)[:, None, None] & (n < N)[None, :, :]
        b_x = load(x + i * x_l + o_x, mask, EVEN)
        b_delta, _ = load_delta(dt + i * dt_l + o_dt, mask, b_bias, SOFTPLUS, EVEN, FAST)
        b_B = load(B + i * N + o_B, mask_B, EVEN)
        b_C = load(C_ + i * N + o_B, mask_B, EVEN)
        b_r = t
        if HAS_RESET:
            b_r = load_reset(reset, i_b, i + t, seqlen)
        a = decay(b_delta, b_A2, b_r, HAS_RESET, FAST)
        b_v = b_x
        if not DIRAC:
            b_v = b_x * b_delta
        v = b_v[:, None, None, :] * b_B[:, :, :, None]
        ## The state before the tile enters through its first step; then (2a) for all T of them.
        v = tl.where((t == 0)[:, None, None, None], v + a * b_h[None, :, :, :], v)
        _, h = tl.associative_scan((a, v), 0, combine)
        b_h = tl.reduce(h, 0, last_of)
        b_y = tl.sum(tl.sum(h * b_C[:, :, :, None], 1), 1) + b_D[None, :] * b_x  # (2b), and D x
        if HAS_Z:
            b_z = load(z + i * z_l + o_z, mask, EVEN)
            b_y = b_y * b_z * reciprocal(1.0 + exp2(b_z * -LOG2E, FAST), FAST)
        store(y + i * d_inner + o_y, b_y, mask, EVEN)

    if i_s == segments - 1:
        offsets, mask_h = state_mask(d, d_inner, d_state, M, J)
        tl.store(h_last + i_b * d_inner * d_state + offsets, b_h, mask=mask_h)


## ================================================================================================
## Backward
## ================================================================================================
##
## The mirror. Let G_t be the gradient of the loss with respect to h_t, counting all that follows,
## and g the gradient of y before the gate. h_t is read by y_t and by h_{t+1}:
##
##     G_t = C_t g_t + Ā_{t+1} G_{t+1}               the same recurrence, from the end to the start
##
## and everything else is local in time. With w_t = Ā_t G_t, what arrives at h_{t-1}:
##
##     dC_t = Σ_d g_t h_t          dB_t = Σ_d G_t Δ_t x_t         d(Δx)_t = Σ_n G_t B_t
##     dA   = Σ_t Δ_t w_t h_{t-1}  dΔ_t = Σ_n A w_t h_{t-1} + x_t d(Δx)_t
##
## The program walks through its chunks from the last to the first. For each it runs forward once
## from the stored border and leaves the state at the start of every tile in a scratch buffer that
## stays in the L2 cache; then it takes the tiles from last to first: forward through the tile, with
## h in registers, and backward through the same registers. Exponentials: two a step.
##
## The sums over d, for dB and dC, go across lanes, which is the one expensive thing: 2 n sums of 32
## lanes a step would be 160 exchanges by the textbook. `fold` halves the values with each exchange
## instead: half of the lanes keep the first half of the values and give away the second, the
## others the reverse. 16 + 8 + 4 + 2 + 1 exchanges give every lane one finished sum. Each
## program then writes the sum over its own channels, and PyTorch adds the programs up: always in
## the same order, so that two runs agree to the bit, which atomic additions would not.
##
## A lane that held 16 states would need more registers than it has (255): two lanes share a
## channel here, j = 2, and a program has 16 channels.


@triton.jit
def row(tile, k: tl.constexpr):
    """Step k of a tile (t, m, j, c). All steps are in the registers of a lane: it costs nothing."""
    here = (tl.arange(0, tile.shape[0]) == k).to(tl.int32)[:, None, None, None]
    _, value = tl.reduce((tl.broadcast_to(here, tile.shape), tile), 0, chosen)
    return value


@triton.jit
def chosen(here1, value1, here2, value2):
    return here1 | here2, tl.where(here2 != 0, value2, value1)


@triton.jit
def from_lane(p, bit: tl.constexpr):
    """p of the lane whose channel differs in one bit."""
    c = tl.arange(0, p.shape[3]) ^ bit
    return tl.gather(p, tl.broadcast_to(c[None, None, None, :], p.shape), 3)


@triton.jit
def exchange(low, high, bit: tl.constexpr):
    """low, summed over pairs of lanes, to those without the bit; high to those with it."""
    has_bit = ((tl.arange(0, low.shape[3]) & bit) != 0)[None, None, None, :]
    return tl.where(has_bit, high, low) + from_lane(tl.where(has_bit, low, high), bit)


@triton.jit
def fold(p, bit: tl.constexpr):
    """(t, m, j, c) -> (t, m / 2, j, c): the sum over pairs of lanes, each with half of the m."""
    T: tl.constexpr = p.shape[0]
    M: tl.constexpr = p.shape[1]
    J: tl.constexpr = p.shape[2]
    C: tl.constexpr = p.shape[3]
    if M == 1:
        return p + from_lane(p, bit)
    else:
        halves = tl.permute(tl.reshape(p, [T, 2, M // 2, J, C]), [0, 2, 3, 4, 1])
        low, high = tl.split(halves)
        return exchange(low, high, bit)


@triton.jit
def sum_channels(p, q):
    """Sums over c of two tiles (t, m, j, c); of the 2 m sums lane c has those from 2 m c / C."""
    C: tl.constexpr = p.shape[3]
    s = exchange(p, q, C // 2)
    if C >= 4:
        s = fold(s, C // 4)
    if C >= 8:
        s = fold(s, C // 8)
    if C >= 16:
        s = fold(s, C // 16)
    if C >= 32:
        s = fold(s, C // 32)
    return s


@triton.jit(do_not_specialize=["seqlen", "segment", "segments", "slice_start", "slice_stop"])
def backward_summary_kernel(
    dt, z, dy, A, C_, dt_bias, reset, ends, sums,
    seqlen, d_inner, d_state, slice_start, slice_stop, segment, segments,
    dt_b, dt_l, dt_d, z_b, z_l, z_d, dy_b, dy_l, dy_d,
    M: tl.constexpr, J: tl.constexpr, C: tl.constexpr, T: tl.constexpr, STAGES: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr,
    SOFTPLUS: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The mirror of the forward summary: what g of a segment's steps adds to w at its start."""
    i_d, i_s, i_b = tl.program_id(0), tl.program_id(1) + 1, tl.program_id(2).to(tl.int64)
    N: tl.constexpr = M * J
    c, t, n = tl.arange(0, C), tl.arange(0, T), tl.arange(0, M)[:, None] + tl.arange(0, J) * M
    d = i_d * C + c
    b_A2 = load_A(A, d, d_inner, d_state, M, J)
    b_bias = load_channels(dt_bias, d, d_inner, HAS_BIAS)
    dt += i_b * dt_b + (i_d * C).to(tl.int64) * dt_d
    z += i_b * z_b + (i_d * C).to(tl.int64) * z_d
    dy += i_b * dy_b + (i_d * C).to(tl.int64) * dy_d
    o_dt, o_z = t[:, None] * dt_l + c[None, :] * dt_d, t[:, None] * z_l + c[None, :] * z_d
    o_dy = t[:, None] * dy_l + c[None, :] * dy_d
    C_ += i_b * seqlen * N
    o_C = t[:, None, None] * N + n[None, :, :]

    b_e = tl.zeros([M, J, C], tl.float32)
    b_sum = tl.zeros([C], tl.float32)  # ΣΔ of the tiles before this one
    resets_before = tl.full([], 0, tl.int32)
    start = slice_start + i_s * segment
    stop = min(min(seqlen, slice_stop), start + segment)
    for step in tl.range(start, stop, T, num_stages=STAGES):
        i = tl.cast(step, tl.int64)
        mask = (i + t < seqlen)[:, None] & (d < d_inner)[None, :]
        b_delta, _ = load_delta(dt + i * dt_l + o_dt, mask, b_bias, SOFTPLUS, EVEN, FAST)
        b_g = load(dy + i * dy_l + o_dy, mask, EVEN)
        if HAS_Z:
            b_z = load(z + i * z_l + o_z, mask, EVEN)
            b_g = b_g * b_z * reciprocal(1.0 + exp2(b_z * -LOG2E, FAST), FAST)
        b_C = load(C_ + i * N + o_C, (i + t < seqlen)[:, None, None] & (n < N)[None, :, :], EVEN)
        b_through = b_sum[None, :] + tl.cumsum(b_delta, 0)  # Δ of step t included
        b_weight = exp2(b_through[:, None, None, :] * b_A2[None, :, :, :], FAST)
        if HAS_RESET:
            b_r = load_reset(reset, i_b, i + t, seqlen)
            b_r = b_r.to(tl.int32)
            cut = resets_before + tl.cumsum(b_r, 0) > 0
            b_weight = tl.where(cut[:, None, None, None], 0.0, b_weight)
            resets_before += tl.sum(b_r, 0)
        b_e += tl.sum(b_weight * b_g[:, None, None, :] * b_C[:, :, :, None], 0)
        b_sum += tl.sum(b_delta, 0)
    if HAS_RESET:
        b_sum = tl.where(resets_before > 0, float("inf"), b_sum)

    where = (i_b * segments + i_s) * tl.num_programs(0) + i_d
    o_h = state_offsets(M, J, C, J, C)
    tl.store(ends + where * (N * C) + o_h, tl.reshape(b_e, [M, J * C]))
    tl.store(sums + where * C + c, b_sum)


@triton.jit(
    do_not_specialize=["seqlen", "segment", "slice_start", "slice_stop", "steps", "state_step"]
)
def backward_kernel(
    x, dt, z, dy, A, B, C_, D, dt_bias, reset, borders, scratch, ends, sums, w_after, w_before,
    dx, ddt, dz, dA, dBC, dD, dbias,
    seqlen, d_inner, d_state, slice_start, slice_stop, segment, steps, state_step,
    x_b, x_l, x_d, dt_b, dt_l, dt_d, z_b, z_l, z_d, dy_b, dy_l, dy_d,
    M: tl.constexpr, J: tl.constexpr, C: tl.constexpr,
    T: tl.constexpr, STAGES: tl.constexpr, K: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr,
    SOFTPLUS: tl.constexpr, DIRAC: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """All gradients of one segment of C channels, inside one slice of time."""
    i_d, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks, segments = tl.num_programs(0), tl.num_programs(1)
    N: tl.constexpr = M * J
    c, t, n = tl.arange(0, C), tl.arange(0, T), tl.arange(0, M)[:, None] + tl.arange(0, J) * M
    d = i_d * C + c
    t4 = t[:, None, None, None]
    b_A2 = load_A(A, d, d_inner, d_state, M, J)
    b_bias = load_channels(dt_bias, d, d_inner, HAS_BIAS)
    b_D = load_channels(D, d, d_inner, HAS_D)
    o_h = state_offsets(M, J, C, J, C)

    b_w = tl.reshape(tl.load(w_after + (i_b * blocks + i_d) * state_step + o_h), [M, J, C])
    for k in range(0, segments - 1 - i_s):
        where = (i_b * segments + segments - 1 - k) * blocks + i_d
        b_w = chain(b_w, ends, sums, where, state_step, b_A2, o_h, M, J, C, FAST)

    x += i_b * x_b + (i_d * C).to(tl.int64) * x_d
    dt += i_b * dt_b + (i_d * C).to(tl.int64) * dt_d
    z += i_b * z_b + (i_d * C).to(tl.int64) * z_d
    dy += i_b * dy_b + (i_d * C).to(tl.int64) * dy_d
    o_x, o_dt = t[:, None] * x_l + c[None, :] * x_d, t[:, None] * dt_l + c[None, :] * dt_d
    o_z, o_dy = t[:, None] * z_l + c[None, :] * z_d, t[:, None] * dy_l + c[None, :] * dy_d
    dx += i_b * seqlen * d_inner + i_d * C
    ddt += i_b * seqlen * d_inner + i_d * C
    dz += i_b * seqlen * d_inner + i_d * C
    o_dx = t[:, None] * d_inner + c[None, :]
    B += i_b * seqlen * N
    C_ += i_b * seqlen * N
    o_B = t[:, None, None] * N + n[None, :, :]
    borders += (i_b * tl.cdiv(seqlen, K) * blocks + i_d) * state_step
    program = (i_b * segments + i_s) * blocks + i_d
    scratch += program * state_step  # of tile 0; those of the next tile follow all programs'
    scratch_step = tl.cast(blocks * segments * tl.num_programs(2), tl.int64) * state_step
    # dBC (b, blocks, steps, 2, N): the sums over this program's channels. Which of the 2 M sums of
    # its j a lane has: see sum_channels.
    dBC += (i_b * blocks + i_d) * steps * (2 * N)
    R: tl.constexpr = (2 * M) // C if 2 * M > C else 1
    which = (tl.arange(0, R)[:, None] + tl.arange(0, C)[None, :] * R) * (2 * M) // (R * C)  # (r, c)
    o_sum = (which // M * N + which % M)[:, None, :] + (tl.arange(0, J) * M)[None, :, None]

    b_dA = tl.zeros([M, J, C], tl.float32)
    b_dD, b_dbias = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    start = slice_start + i_s * segment
    stop = min(min(seqlen, slice_stop), start + segment)
    for k in range(0, tl.cdiv(stop - start, K)):
        chunk = (tl.cdiv(stop, K) - 1 - k) * K
        tiles = tl.cdiv(min(stop, chunk + K) - chunk, T)
        ## Forward through the chunk: the state at the start of each tile, into the scratch buffer.
        border = borders + tl.cast(chunk // K, tl.int64) * (blocks * state_step)
        b_h = tl.reshape(tl.load(border + o_h), [M, J, C])
        tl.store(scratch + o_h, tl.reshape(b_h, [M, J * C]))
        for tile in tl.range(0, tiles - 1, num_stages=STAGES):
            i = tl.cast(chunk + tile * T, tl.int64)
            mask = (i + t < seqlen)[:, None] & (d < d_inner)[None, :]
            b_x = load(x + i * x_l + o_x, mask, EVEN)
            b_delta, _ = load_delta(dt + i * dt_l + o_dt, mask, b_bias, SOFTPLUS, EVEN, FAST)
            b_B = load(B + i * N + o_B, (i + t < seqlen)[:, None, None] & (n < N)[None], EVEN)
            b_r = t
            if HAS_RESET:
                b_r = load_reset(reset, i_b, i + t, seqlen)
            a = decay(b_delta, b_A2, b_r, HAS_RESET, FAST)
            b_v = b_x
            if not DIRAC:
                b_v = b_x * b_delta
            v = b_v[:, None, None, :] * b_B[:, :, :, None]
            v = tl.where(t4 == 0, v + a * b_h[None, :, :, :], v)
            _, h = tl.associative_scan((a, v), 0, combine)
            b_h = tl.reduce(h, 0, last_of)
            tl.store(scratch + (tile + 1) * scratch_step + o_h, tl.reshape(b_h, [M, J * C]))
        tl.debug_barrier()  # the lanes that load the scratch buffer are not those that stored it
        ## Backward through its tiles.
        for tile in tl.range(0, tiles, num_stages=STAGES):
            b_h = tl.load(scratch + (tiles - 1 - tile) * scratch_step + o_h)
            b_h = tl.reshape(b_h, [M, J, C])
            i = tl.cast(chunk + (tiles - 1 - tile) * T, tl.int64)
            mask = (i + t < seqlen)[:, None] & (d < d_inner)[None, :]
            mask_B = (i + t < seqlen)[:, None, None] & (n < N)[None, :, :]
            b_x = load(x + i * x_l + o_x, mask, EVEN)
            b_delta, b_slope = load_delta(dt + i * dt_l + o_dt, mask, b_bias, SOFTPLUS, EVEN, FAST)
            b_g = load(dy + i * dy_l + o_dy, mask, EVEN)
            b_B = load(B + i * N + o_B, mask_B, EVEN)
            b_C = load(C_ + i * N + o_B, mask_B, EVEN)
            b_r = t
            if HAS_RESET:
                b_r = load_reset(reset, i_b, i + t, seqlen)
            a = decay(b_delta, b_A2, b_r, HAS_RESET, FAST)
            b_v = b_x
            if not DIRAC:
                b_v = b_x * b_delta
            v = b_v[:, None, None, :] * b_B[:, :, :, None]
            v = tl.where(t4 == 0, v + a * b_h[None, :, :, :], v)
            _, h = tl.associative_scan((a, v), 0, combine)
            if HAS_Z:
                ## y' = y silu(z). silu(z) = z σ, and its derivative is σ (1 + z - z σ).
                b_z = load(z + i * z_l + o_z, mask, EVEN)
                b_y = tl.sum(tl.sum(h * b_C[:, :, :, None], 1), 1) + b_D[None, :] * b_x
                sigma = reciprocal(1.0 + exp2(b_z * -LOG2E, FAST), FAST)
                b_dz = b_g * b_y * sigma * (1.0 + b_z - b_z * sigma)
                store(dz + i * d_inner + o_dx, b_dz, mask, EVEN)
                b_g = b_g * b_z * sigma
            ## G and w h_{t-1} of every step, from the last to the first.
            G = b_g[:, None, None, :] * b_C[:, :, :, None]
            wh = G
            for s in tl.static_range(T - 1, -1, -1):
                G_s = row(G, s) + b_w
                b_w = row(a, s) * G_s
                h_before = b_h
                if s > 0:
                    h_before = row(h, s - 1)
                G = tl.where(t4 == s, G_s[None, :, :, :], G)
                wh = tl.where(t4 == s, (b_w * h_before)[None, :, :, :], wh)
            b_dv = tl.sum(tl.sum(G * b_B[:, :, :, None], 1), 1)
            b_ddelta = tl.sum(tl.sum(wh * b_A2[None, :, :, :], 1), 1) * LN2
            b_dA += tl.sum(wh * b_delta[:, None, None, :], 0)
            b_dx = b_dv
            if not DIRAC:
                b_dx = b_dv * b_delta
                b_ddelta += b_dv * b_x
            b_ddt = b_ddelta * b_slope
            if not EVEN:
                b_ddt = tl.where(mask, b_ddt, 0.0)
            b_dbias += tl.sum(b_ddt, 0)
            b_dD += tl.sum(b_g * b_x, 0)
            store(ddt + i * d_inner + o_dx, b_ddt, mask, EVEN)
            store(dx + i * d_inner + o_dx, b_dx + b_D[None, :] * b_g, mask, EVEN)
            both = sum_channels(G * b_v[:, None, None, :], h * b_g[:, None, None, :])
            o_t = (i - slice_start + t).to(tl.int32)[:, None, None, None] * (2 * N)
            tl.store(dBC + (o_t + o_sum[None, :, :, :]), both, mask=i + t4 < seqlen)
        tl.debug_barrier()

    # Slices follow one another, so that adding to what the later one left is no race.
    p_dA = dA + program * state_step + o_h
    tl.store(p_dA, tl.load(p_dA) + tl.reshape(b_dA, [M, J * C]))
    tl.store(dD + program * C + c, tl.load(dD + program * C + c) + b_dD)
    tl.store(dbias + program * C + c, tl.load(dbias + program * C + c) + b_dbias)
    if i_s == 0:
        p_w = w_before + (i_b * blocks + i_d) * state_step + o_h
        tl.store(p_w, tl.reshape(b_w, [M, J * C]))


## ================================================================================================
## Launching
## ================================================================================================


def check_device(x: Tensor) -> None:
    if INTERPRETED or x.is_cuda:
        return
    raise RuntimeError(
        f"the Triton scan runs on a GPU, got tensors on {x.device}: move them there, or use "
        "mamba.py's scan='chunked' (or, to try the kernels slowly on a CPU, set "
        "TRITON_INTERPRET=1 before triton is imported)"
    )


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def lane_shape(d_state: int, lanes_of_a_channel: int) -> tuple[int, int, int]:
    """(M, J, C): states of a lane, lanes of a channel, channels of a warp. M is at most 16."""
    states = triton.next_power_of_2(d_state)
    J = min(states, max(lanes_of_a_channel, states // 16))
    return states // J, J, LANES // J


## The rules that cut time depend on the sizes alone and not on the device, so that every process
## of a distributed run computes the same bits. They were measured on an H100: programs of the
## forward kernel fill it from about 400 on, those of the backward kernel from about 700.


def segment_length(seqlen: int, programs: int, enough: int, wanted: int) -> int:
    """Steps of a segment, a multiple of K: one segment if there are enough programs without."""
    chunks = ceil_div(seqlen, K)
    segments = 1 if programs >= enough else min(chunks, ceil_div(wanted, programs))
    return ceil_div(chunks, segments) * K


def pack(h: Tensor, channels: int, M: int, J: int, C: int) -> Tensor:
    """States (..., d, n) in the order of the kernels, (..., groups, m, j, c), channels in all."""
    h = torch.nn.functional.pad(h.float(), (0, M * J - h.shape[-1], 0, channels - h.shape[-2]))
    return h.unflatten(-1, (J, M)).unflatten(-3, (-1, C)).transpose(-3, -1).contiguous()


def unpack(packed: Tensor, d_inner: int, d_state: int) -> Tensor:
    """The inverse of pack: (..., groups, m, j, c) -> (..., d, n)."""
    h = packed.transpose(-3, -1).flatten(-2).flatten(-3, -2)
    return h[..., :d_inner, :d_state].contiguous()


def widened(B: Tensor, states: int) -> Tensor:
    """B or C in float32, contiguous, with zeros for the states that only fill up the tile."""
    if states == B.shape[-1]:
        return B.float().contiguous()
    return torch.nn.functional.pad(B.float(), (0, states - B.shape[-1]))


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tensor.stride()


## A missing tensor is passed to a kernel as x, which a flag keeps it from reading.


def scan_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    h0: Tensor | None, dt_bias: Tensor | None, reset: Tensor | None,
    dt_softplus: bool, rule: str, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, h_last, and the states at every K-th step (empty unless save), in the kernels' order."""
    (batch, seqlen, d_inner), d_state = x.shape, A.shape[1]
    M, J, channels = lane_shape(d_state, 1)
    group_M, group_J, group_C = lane_shape(d_state, 2)
    states, blocks = M * J, ceil_div(d_inner, channels)
    group = (blocks * channels // group_C, group_M, group_J, group_C)
    segment = segment_length(seqlen, batch * blocks, enough=384, wanted=2048)
    segments = ceil_div(seqlen, segment)

    y = x.new_empty(batch, seqlen, d_inner)
    chunks = ceil_div(seqlen, K) if save else 0
    borders = x.new_empty((batch, chunks, *group), dtype=torch.float32)
    h_last = x.new_empty((batch, d_inner, d_state), dtype=torch.float32)
    A, B, C = A.contiguous(), widened(B, states), widened(C, states)
    start = None if h0 is None else pack(h0, blocks * channels, *group[1:])
    flags = {
        "M": M, "J": J, "C": channels, "GROUP_J": group_J, "GROUP_C": group_C,
        "T": FORWARD_T, "STAGES": FORWARD_STAGES,
        "HAS_BIAS": dt_bias is not None, "HAS_RESET": reset is not None,
        "SOFTPLUS": dt_softplus, "DIRAC": rule == "dirac", "FAST": FAST,
        "EVEN": d_inner == blocks * channels and seqlen % FORWARD_T == 0,
    }  # fmt: skip
    bias = x if dt_bias is None else dt_bias.contiguous()
    document = x if reset is None else reset.contiguous().view(torch.uint8)
    ends = sums = x
    with device_of(x):
        if segments > 1:
            ends = x.new_empty((batch, segments, *group), dtype=torch.float32)
            sums = x.new_empty((batch, segments, blocks * channels), dtype=torch.float32)
            forward_summary_kernel[blocks, segments - 1, batch](
                x, dt, A, B, bias, document, ends, sums,
                seqlen, d_inner, d_state, segment, segments,
                *x.stride(), *dt.stride(), **flags, num_warps=1,
            )  # fmt: skip
        forward_kernel[blocks, segments, batch](
            x, dt, x if z is None else z, A, B, C, x if D is None else D.contiguous(), bias,
            document, x if start is None else start, ends, sums, y, borders, h_last,
            seqlen, d_inner, d_state, segment, states * channels,
            *x.stride(), *dt.stride(), *strides(z), **flags, K=K, HAS_Z=z is not None, HAS_D=D is not None, HAS_H0=h0 is not None,
            SAVE=save, num_warps=1,
        )  # fmt: skip
    return y, h_last, borders


def scan_backward(
    dy: Tensor, dh_last: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, h0: Tensor | None, dt_bias: Tensor | None,
    reset: Tensor | None, borders: Tensor, dt_softplus: bool, rule: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, z, h0, dt_bias; an empty tensor for what was None."""
    (batch, seqlen, d_inner), d_state = x.shape, A.shape[1]
    M, J, channels = lane_shape(d_state, 2)
    states, blocks = M * J, borders.shape[2]
    group, programs = borders.shape[2:], batch * blocks

    ## The sums of dB and dC, one for each program, are b (d / 16) l 2 n numbers: more than x.
    ## So the kernel runs on slices of time, the last first, and each is added up before the next
    ## overwrites it. A slice leaves behind w, what arrives at the state before it.
    room = max(x.numel() * x.element_size(), 8 * 2**20)
    steps = max(K, room // (programs * 2 * states * 4) // K * K)
    steps = min(steps, ceil_div(seqlen, K) * K)
    segment = segment_length(steps, programs, enough=700, wanted=1024)
    segments = ceil_div(steps, segment)

    empty = lambda *shape: x.new_empty(shape, dtype=torch.float32)  # noqa: E731
    zeros = lambda *shape: x.new_zeros(shape, dtype=torch.float32)  # noqa: E731
    dx = x.new_empty(batch, seqlen, d_inner)
    ddt = dt.new_empty(batch, seqlen, d_inner)
    dz = None if z is None else z.new_empty(batch, seqlen, d_inner)
    dBC, parts = empty(batch, seqlen, 2, states), empty(batch, blocks, steps, 2, states)
    dA = zeros(batch * segments, *group)
    dD, dbias = zeros(2, batch * segments, blocks * channels)
    scratch = empty(K // BACKWARD_T, batch * segments, blocks, states * channels)
    if dh_last is None:
        w_after = zeros(batch, *group)
    else:
        w_after = pack(dh_last, blocks * channels, *group[1:])
    w_before = torch.empty_like(w_after)
    ends, sums = empty(batch, segments, *group), empty(batch, segments, blocks * channels)
    A, B, C = A.contiguous(), widened(B, states), widened(C, states)
    flags = {
        "M": M, "J": J, "C": channels, "T": BACKWARD_T, "STAGES": BACKWARD_STAGES,
        "HAS_Z": z is not None, "HAS_BIAS": dt_bias is not None, "HAS_RESET": reset is not None,
        "SOFTPLUS": dt_softplus, "FAST": FAST,
        "EVEN": d_inner == blocks * channels and seqlen % BACKWARD_T == 0,
    }  # fmt: skip
    gate = x if z is None else z
    bias = x if dt_bias is None else dt_bias.contiguous()
    document = x if reset is None else reset.contiguous().view(torch.uint8)
    with device_of(x):
        for start in range((seqlen - 1) // steps * steps, -1, -steps):
            stop = min(seqlen, start + steps)
            count = ceil_div(stop - start, segment)
            sizes = (seqlen, d_inner, d_state, start, stop, segment)
            if count > 1:
                backward_summary_kernel[blocks, count - 1, batch](
                    dt, gate, dy, A, C, bias, document, ends, sums, *sizes, count,
                    *dt.stride(), *strides(z), *dy.stride(), **flags, num_warps=1,
                )  # fmt: skip
            backward_kernel[blocks, count, batch](
                x, dt, gate, dy, A, B, C, x if D is None else D.contiguous(), bias, document,
                borders, scratch, ends, sums, w_after, w_before,
                dx, ddt, dx if dz is None else dz, dA, parts, dD, dbias,
                *sizes, steps, states * channels, *x.stride(), *dt.stride(), *strides(z), *dy.stride(),
                **flags, K=K, HAS_D=D is not None, DIRAC=rule == "dirac", num_warps=1,
            )  # fmt: skip
            torch.sum(parts[:, :, : stop - start], dim=1, out=dBC[:, start:stop])
            w_after, w_before = w_before, w_after
    dB, dC = dBC[..., :d_state].unbind(2)
    none = empty(0)
    return [
        dx,
        ddt,
        unpack(dA.sum(0), d_inner, d_state).to(A.dtype),
        dB.to(B.dtype, copy=True),
        dC.to(C.dtype, copy=True),
        none if D is None else dD.sum(0)[:d_inner].to(D.dtype),
        none.clone() if dz is None else dz,
        none.clone() if h0 is None else unpack(w_after, d_inner, d_state).to(h0.dtype),
        none.clone() if dt_bias is None else dbias.sum(0)[:d_inner].to(dt_bias.dtype),
    ]


def device_of(x: Tensor):
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


## torch.compile does not look into kernels: it has to be told that each of the two functions is one
## operator, and what it returns for given shapes. Without it the operators would only cost time.


def forward_shapes(x, dt, A, B, C, D, z, h0, dt_bias, reset, dt_softplus, rule, save):
    (batch, seqlen, d_inner), d_state = x.shape, A.shape[1]
    channels = lane_shape(d_state, 1)[2]
    M, J, group_C = lane_shape(d_state, 2)
    groups = ceil_div(d_inner, channels) * channels // group_C
    borders = (batch, ceil_div(seqlen, K) if save else 0, groups, M, J, group_C)
    return (
        x.new_empty(batch, seqlen, d_inner),
        x.new_empty((batch, d_inner, d_state), dtype=torch.float32),
        x.new_empty(borders, dtype=torch.float32),
    )


def backward_shapes(dy, dh_last, x, dt, A, B, C, D, z, h0, dt_bias, *_):
    return [
        x.new_empty(0, dtype=torch.float32) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (x, dt, A, B, C, D, z, h0, dt_bias)
    ]


forward_operator = torch.library.custom_op(
    "mamba_annotated::scan_forward", scan_forward, mutates_args=()
)
forward_operator.register_fake(forward_shapes)
backward_operator = torch.library.custom_op(
    "mamba_annotated::scan_backward", scan_backward, mutates_args=()
)
backward_operator.register_fake(backward_shapes)


class SelectiveScan(torch.autograd.Function):
    """The two as one differentiable function. It keeps its inputs and the borders, nothing else."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, h0, dt_bias, reset, dt_softplus, rule):
        tensors = (x, dt, A, B, C, D, z, h0, dt_bias, reset)
        run = forward_operator if torch.compiler.is_compiling() else scan_forward
        y, h_last, borders = run(*tensors, dt_softplus, rule, True)
        ctx.save_for_backward(*tensors, borders)
        ctx.options = dt_softplus, rule
        ctx.set_materialize_grads(False)  # a gradient of h_last that nobody uses is None, not zeros
        return y, h_last

    @staticmethod
    @once_differentiable  # an error for second derivatives, which would be silently zero
    def backward(ctx, dy, dh_last):
        tensors = ctx.saved_tensors
        dy = torch.zeros_like(tensors[0]) if dy is None else dy
        run = backward_operator if torch.compiler.is_compiling() else scan_backward
        gradients = run(dy, dh_last, *tensors, *ctx.options)
        needed = zip(gradients, ctx.needs_input_grad, strict=False)
        return *(g if need else None for g, need in needed), None, None, None


## ================================================================================================
## The public function
## ================================================================================================

RULES = ("mamba", "dirac")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_inputs(rule: str, x: Tensor, A: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError for what the kernels cannot take, RuntimeError off the GPU."""
    if rule not in RULES:
        raise ValueError(
            f"the Triton scan takes the rules {RULES}, got {rule!r}: use scan='chunked' for it"
        )
    if x.ndim != 3 or A.ndim != 2 or 0 in x.shape:
        raise ValueError(
            f"need x (b, l, d), not empty, and A (d, n), got {tuple(x.shape)}, {tuple(A.shape)}"
        )
    (b, seqlen, d), n = x.shape, A.shape[1]
    shapes = {
        "x": (b, seqlen, d), "dt": (b, seqlen, d), "z": (b, seqlen, d), "A": (d, n),
        "B": (b, seqlen, n), "C": (b, seqlen, n), "D": (d,), "dt_bias": (d,), "h0": (b, d, n),
        "reset": (b, seqlen),
    }  # fmt: skip
    for name, tensor in {"x": x, "A": A, **others}.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} must be {shapes[name]}, got {tuple(tensor.shape)}")
        if name == "reset" and tensor.dtype != torch.bool:
            raise ValueError(f"reset must be torch.bool, got {tensor.dtype}")
        if name != "reset" and tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}: "
                "use scan='chunked' for it"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
    if not 1 <= n <= 256:
        raise ValueError(f"d_state must be from 1 to 256, got {n}: use scan='chunked'")
    if b > 65535:
        raise ValueError(f"the batch must be at most 65535, got {b}: split it")
    check_device(x)


def selective_scan_triton(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, h0: Tensor | None = None, *, dt_bias: Tensor | None = None,
    dt_softplus: bool = True, rule: str = "mamba", reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """mamba.py's `selective_scan` in one kernel: lines 4 to 6 of Algorithm 2, D x and the gate.

        delta = softplus(dt + dt_bias);  y = (scan(x, delta, A, B, C) + D x) silu(z)

    x, dt, z (b, l, d), A (d, n), B, C (b, l, n), D, dt_bias (d,), h0 (b, d, n), reset (b, l) bool:
    a document starts here. Any strides; float32, bfloat16 or float16, also mixed; n up to 256.
    Returns y (b, l, d) in x's dtype and h_last (b, d, n) in float32; computes in float32.
    Differentiable in every tensor but reset, h0 and h_last included; deterministic.
    rule: "mamba" (exp, Euler) or "dirac" (Ā = exp(ΔA), B̄ = B; x is then an impulse).

    Raises ValueError for shapes, dtypes and rules that do not fit, RuntimeError off the GPU.
    """
    tensors = {
        "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "h0": h0, "dt_bias": dt_bias,
        "reset": reset,
    }  # fmt: skip
    check_inputs(rule, **tensors)
    differentiable = (tensor for tensor in tensors.values() if tensor is not None)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable):
        return SelectiveScan.apply(*tensors.values(), dt_softplus, rule)
    run = forward_operator if torch.compiler.is_compiling() else scan_forward
    return run(*tensors.values(), dt_softplus, rule, False)[:2]
