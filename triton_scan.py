"""The selective scan of Mamba as GPU kernels in Triton: nothing to build, nothing but this file.

    Albert Gu and Tri Dao: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    arXiv 2312.00752v2, section 3.3.2. It continues the ladder of scans in mamba.py.

    from triton_scan import selective_scan_triton
    y, h_last = selective_scan_triton(x, dt, A, B, C, D, z, dt_bias=bias)   # CUDA tensors
    y.sum().backward()                                                     # every gradient
    with step_graph(model, state) as step: ...                             # token after token

    python triton_scan.py       # checks against the recurrence in float64, on a GPU

Symbols as in mamba.py: x, dt, z, y (b, l, d), A (d, n), B and C (b, l, n), the state h (b, d, n).

A lesson, for those who have read mamba.py and know the vector addition of Triton's tutorials: from
`first_kernel` to the last one in steps. Each says what was slow, what changed and what it gained:
ms forward / backward on an NVIDIA H100, of 8 x 2048 x 2048 (batch x channels x steps), n = 16,
bfloat16, where no other size is named; from step 5 on of earlier versions, to be compared within a
pair. At the end it is 0.242 / 1.09. (benchmarks/NOTES.md has more, and what failed.)

    The problem             what limits a GPU here; how the work lies over it (a picture); words
    The first kernel        scan_chunked of mamba.py, fused                     about 3
    Step 1  Lanes           a channel lies in one lane of a warp, or in two     1.29  / 4.12
    Step 2  Tiles           several steps at once                               0.65  / 1.69
    Step 3  Loads ahead     memory is asked two tiles before                    0.265 / 1.15
    Step 4  Cheap numbers   fewer instructions around each exponential          0.242 / 1.09
    Step 5  Cutting time    if channels do not fill the chip    1 x 5120 x 2048: 0.173 -> 0.127
            Forward         the kernel of steps 1 to 5
    Step 6  h again         the backward pass computes states and does not store them: not timed
    Step 7  Sums            over channels, by halves: 15 exchanges between lanes in place of 64
    Step 8  Two lanes       for a channel, backward, that share its work            1.36 -> 1.09
            Backward        the kernel of steps 1 to 8
    Step 9  Launching       less Python, fewer launches     1 x 1536 x 2048 backward: 0.98 -> 0.46
    Step 10 Convolution     inputs stay in registers, loads ahead    8 x 1536 x 2048: 0.114 -> 0.072
    Step 11 Residual block  one function with its own backward pass      training 130m: 86.4 -> 82.7
    Step 12 One token       four kernels a layer, each starts early             130m: 0.402 -> 0.201
    Step 13 The choice      a token is drawn without a sort                  0.224 and more -> 0.031
    Step 14 Recorded        a step is one call of Python: not timed apart
"""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
## not leave the registers (but one in 64, step 6): it is 2 n times as large as x.
##
## What is then the limit? An H100 has 132 processors of four schedulers each, 528 in all. A
## scheduler has some warps of 32 lanes and starts one instruction a clock, for all lanes of one
## warp at once. Each state and step needs one exponential, and the special-function units give 16 a
## clock on each processor: 537 million take 0.145 ms at 1.755 GHz, and with softplus and silu 0.181
## ms. Exponentials, not memory, are the limit, and right behind them comes the number of
## instructions. Both say the same: what is not an exponential should cost few instructions.
##
## How the work lies over the GPU ------------------------------------------------------------------
##
## A program, the unit of work that a GPU schedules, is one warp in the kernels of the scan. Rows of
## the batch and channels are independent: each program has one row and a block of channels, walks
## along time, and keeps h in its registers. For x (8, 2048, 2048), forward, row 0:
##
##                       time: 2048 steps, 256 tiles of 8 ----------------->
##     channels  0-15    [tile][tile][tile][tile] ...    a program
##     channels 16-31    [tile][tile][tile][tile] ...    another       128 blocks of channels
##       ...                                                           x 8 rows = 1024 programs
##
## A tile of states has four axes, (t, m, j, c). Steps t and states m are registers of a lane; lanes
## of a channel j and channels c are lanes:
##
##                lanes with j = 0        lanes with j = 1
##     lane       0     1   ...   15     16    17   ...   31      lane = j C + c
##     channel    0     1   ...   15      0     1   ...   15      c = 0 ... C - 1, C = 16 (CHANNELS)
##     t, states 0-7   0-7  ...  0-7    8-15  8-15  ...  8-15     the states n = j M + m, M = 8
##        ...
##       t + 7   0-7   0-7  ...  0-7    8-15  8-15  ...  8-15     T = 8 steps: 64 numbers a lane
##
## Time never crosses lanes: the recurrence runs within each. A sum over n, for y, is over registers
## and then over two lanes. A sum over c, for dB and dC, is over 16 lanes and then over programs.
## How shapes are cut, for n = 16:
##
##     x (b, l, d)        kernel      M x J x C     blocks x segments x b = programs    slices
##     (8, 2048, 2048)    forward     8 x 2 x 16    128 x 1 x 8 = 1024                  1
##     (1, 2048, 1536)    forward     16 x 1 x 32   48 x 22 x 1 = 1056                  1
##     (8, 2048, 2048)    backward    8 x 2 x 16    128 x 1 x 8 = 1024                  1
##     (1, 65536, 2048)   backward    8 x 2 x 16    128 x 8 x 1 = 1024                  4
##
## Words, from small to large. Step: one token. Tile: the 8 or 4 steps in registers. Chunk: K = 64
## steps; h at the start of each is kept for the backward pass. Segment: the steps of one program.
## Piece: a quarter of a segment, backward. Slice: what one launch of the backward kernel covers. A
## block is the channels of a program, a group those of a backward program.
##
## Names in kernels: i_ index, o_ offsets, p_ pointers, m_ masks, b_ a block of values in registers;
## x_b, x_l, x_d are strides of x. Capitals are constants of the compiler (tl.constexpr): for each
## set of them it makes a kernel, without what its flags (HAS_Z, ...) say is not needed. EVEN: no
## tile reaches over an edge. FAST: inline assembly. It makes others for numbers and addresses that
## are multiples of 16; `do_not_specialize` names those of which it is not to know. `.to(tl.int64)`
## is for tensors of more than 2^31 numbers.


## ================================================================================================
## The first kernel
## ================================================================================================
##
## `scan_chunked` of mamba.py, fused. A program holds the states of 32 channels as (channels,
## states) and walks through one chunk of time (later on: a segment). Launched twice: from zero
## states it gives the end of each chunk, e; PyTorch chains these with h <- exp(A ΣΔ) h + e; then
## from the true starts it gives y. All takes about 3 ms, softplus and gate left out; the limit with
## them is 0.181.


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

    Without reset, and forward only. Raises RuntimeError off the GPU and where a gradient would be
    wanted, ValueError for chunk < 1.
    """
    check_device(x)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if wants_gradient(x, delta, A, B, C):
        raise RuntimeError("first_scan has no gradient: use selective_scan_triton")
    x, delta, A, B, C = (tensor.float().contiguous() for tensor in (x, delta, A, B, C))
    (batch, seqlen, d_inner), d_state = x.shape, A.shape[1]
    chunks, channels = triton.cdiv(seqlen, chunk), 32
    starts = x.new_zeros(batch, chunks, d_inner, d_state)
    y, ends = torch.empty_like(x), torch.empty_like(starts)
    grid = (triton.cdiv(d_inner, channels), chunks, batch)
    options = {"CHUNK": chunk, "CHANNELS": channels, "STATES": next_power_of_2(d_state)}
    sizes = (seqlen, d_inner, d_state)
    first_kernel[grid](x, delta, A, B, C, starts, y, ends, *sizes, **options, num_warps=1)
    if h0 is not None:
        starts[:, 0] = h0
    for i in range(chunks - 1):
        decay = torch.exp(A * delta[:, i * chunk : (i + 1) * chunk].sum(1).unsqueeze(-1))
        starts[:, i + 1] = decay * starts[:, i] + ends[:, i]
    first_kernel[grid](x, delta, A, B, C, starts, y, ends, *sizes, **options, num_warps=1)
    return y, ends[:, -1]


## Step 1. Lanes -----------------------------------------------------------------------------------
##
## Slow: the compiler chooses which axis of a block lies in lanes. In the first kernel four lanes
## share a channel, with four states each: C h is a sum between lanes, and x, Δ and y change their
## layout at every step. And it takes all exponentials twice, to cut time where nothing asks for it.
##
## Changed: a lane has a channel and all of its n states, or two lanes have half of them each. The
## sum over n is a chain of multiply-adds within a lane. B and C, the same for all channels, are
## read from shared memory, where lanes that read the same word are served at once. Two lanes a
## channel make twice as many programs: faster while a scheduler has few (`forward_shape`). What has
## no axis (Δ has none for m, B none for c) is broadcast. The compiler takes the last axes for
## lanes: (t, m, j, c).
##
## Gained: 3 -> 1.29 ms, one pass for two, bfloat16 and some of step 4 included. 132 instructions
## for a step of 32 channels; an early version with four lanes a channel had 237, one with time
## across the lanes 490. (Steps 1 to 4 by `python benchmarks/scan.py --parts steps`: the kernels
## below, their constants set back. So backward, 4.12 ms here, has steps 6 to 8 from the start.)

LANES = 32  # of a warp


@triton.jit
def axes(i_d, M: tl.constexpr, J: tl.constexpr, CHANNELS: tl.constexpr, T: tl.constexpr):
    """Numbers along the axes of a tile: t, c, the state n (m, j), and d (c), the channel."""
    c = tl.arange(0, CHANNELS)
    n = tl.arange(0, M)[:, None] + tl.arange(0, J) * M
    return tl.arange(0, T), c, n, i_d * CHANNELS + c


@triton.jit
def start_of(tensor, i_b, i_d, t, c, step_b, step_l, step_d):
    """Where a program's channels begin in a tensor (b, l, d), and the offsets in a tile, which need
    32 bits: what may be far goes into the pointer. t (t, 1), c (1, c), or an axis between them."""
    tensor += i_b * step_b + (i_d * c.numel).to(tl.int64) * step_d
    return tensor, t * step_l + c * step_d


@triton.jit
def load_channels(vector, d, d_inner, EXISTS: tl.constexpr):
    if EXISTS:
        return tl.load(vector + d, mask=d < d_inner, other=0.0).to(tl.float32)
    else:
        return tl.zeros(d.shape, tl.float32)


@triton.jit
def state_mask(d, n, d_inner, d_state):
    """Offsets and mask (m, j, c) in a tensor (d, n), of the states n (m, j, 1 or c)."""
    return d[None, None, :] * d_state + n, (n < d_state) & (d < d_inner)[None, None, :]


@triton.jit
def load_A(A, d, n, d_inner, d_state, LOG: tl.constexpr):
    """A log2 e as (m, j, c); 0 for channels and states that only fill up the tile. LOG: what is
    stored is log(-A), as a block of mamba.py has it."""
    offsets, mask = state_mask(d, n, d_inner, d_state)
    if LOG:
        b_A = -tl.exp(tl.load(A + offsets, mask=mask, other=float("-inf")).to(tl.float32))
    else:
        b_A = tl.load(A + offsets, mask=mask, other=0.0).to(tl.float32)
    return b_A * LOG2E


## States lie in memory as in the lanes of the backward kernel, (m, j, c) for each of its groups of
## 16 channels. `state_offsets` finds them for kernels with one lane a channel as well.


@triton.jit
def state_offsets(
    M: tl.constexpr, J: tl.constexpr, CHANNELS: tl.constexpr,
    GROUP_J: tl.constexpr, GROUP_C: tl.constexpr,
):  # fmt: skip
    """(m, 32): where the states of M x J x CHANNELS lie, in groups of GROUP_J x GROUP_C lanes."""
    lane = tl.arange(0, J * CHANNELS)[None, :]
    if J == GROUP_J and CHANNELS == GROUP_C:
        # What follows comes to the same, but the compiler would not see that lanes are neighbours.
        return tl.arange(0, M)[:, None] * (J * CHANNELS) + lane
    n = (lane // CHANNELS) * M + tl.arange(0, M)[:, None]
    c = lane % CHANNELS
    GROUP_M: tl.constexpr = (M * J) // GROUP_J
    place = (n % GROUP_M) * (GROUP_J * GROUP_C) + (n // GROUP_M) * GROUP_C + c % GROUP_C
    return (c // GROUP_C) * (M * J * GROUP_C) + place


## Step 2. Tiles -----------------------------------------------------------------------------------
##
## Slow: at each step a warp asks for x, Δ, B and C, waits for memory (500 clocks and more), and
## then has work for 200.
##
## Changed: T steps are a tile and are loaded at once. The exponentials of all its steps, which do
## not depend on h, are there before the recurrence runs through them.
##
## Gained: forward 1.29 ms, T = 2 0.98, T = 4 0.91, T = 8 0.65. Backward 4.12, 2.41 and, T = 4,
## 1.69. (With steps 3 and 4: T = 8 backward 1.90 for 1.09; T = 16 forward 0.224 for 0.242, but
## with one lane a channel, or more than 16 states, there are too few registers.)
##
## Triton cannot index a tile in registers. But a scan or a reduction along an axis in the registers
## of a lane compiles to plain instructions: `associative_scan` is a loop here, and `row`, which
## picks out a step, is free. That holds for the layouts that we get, not by the language.

K = 64  # steps between two stored states


@triton.jit
def load(pointers, mask, EVEN: tl.constexpr):
    if EVEN:  # the tile lies inside the tensor
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointers, value, mask, EVEN: tl.constexpr):
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=None if EVEN else mask)


@triton.jit
def load_resets(reset, here, HAS_RESET: tl.constexpr):
    """Whether a document starts at a step (t)."""
    if HAS_RESET:
        return tl.load(reset, mask=here, other=0) != 0
    else:
        return tl.zeros(here.shape, tl.int1)


@triton.jit
def delta_x(b_delta, b_x, DIRAC: tl.constexpr):
    return b_x if DIRAC else b_x * b_delta


@triton.jit
def combine(a1, v1, a2, v2):
    ## Two steps of the recurrence in one, mamba.py's "The combine". In the plain loop that it
    ## becomes the products of a, which nobody reads, are never computed.
    return a2 * a1, a2 * v1 + v2


@triton.jit
def recur(a, b_v, b_B, b_h, b_r, HAS_RESET: tl.constexpr):
    """Through a tile, from the state before it: Ā, with resets, and h (t, m, j, c).

    a is exp(ΔA) (t, m, j, c), b_v Δ x (t, 1, 1 or j, c), B (t, m, j, 1 or c). The state before the
    tile, b_h, enters through the input of the first step.
    """
    if HAS_RESET:
        a = tl.where(b_r[:, None, None, None], 0.0, a)
    v = b_v * b_B
    first = (tl.arange(0, v.shape[0]) == 0)[:, None, None, None]
    v = tl.where(first, v + a * b_h[None, :, :, :], v)
    _, h = tl.associative_scan((a, v), 0, combine)
    return a, h


@triton.jit
def row(tile, k: tl.constexpr):
    """Step k of a tile (t, m, j, c)."""
    here = (tl.arange(0, tile.shape[0]) == k).to(tl.int32)[:, None, None, None]
    _, value = tl.reduce((tl.broadcast_to(here, tile.shape), tile), 0, chosen)
    return value


@triton.jit
def chosen(here1, value1, here2, value2):
    return here1 | here2, tl.where(here2 != 0, value2, value1)


## Step 3. Loads ahead -----------------------------------------------------------------------------
##
## Slow: a tile still waits for its loads. A change that halved the instructions left the time as it
## was (benchmarks/NOTES.md): with few warps on a scheduler nothing else is there to run.
##
## Changed: `num_stages` of the loops over tiles (`tl.range`). While one tile is computed, the next
## two, backward three, are copied to shared memory (cp.async): no register, and nobody waits.
##
## Gained: 0.65 -> 0.265 ms and 1.69 -> 1.15. (Two stages, with step 4: 0.36, 1.48.)

FORWARD_T, FORWARD_STAGES = 8, 3  # steps of a tile, tiles in flight
BACKWARD_T, BACKWARD_STAGES = 4, 4


## Step 4. Cheap numbers ---------------------------------------------------------------------------
##
## Slow: exp2 takes four instructions, to be right for results below 2^-126, which are noise here.
## Each program converts B and C to float32: 32 conversions a step. And what has no states, Δ, D x,
## the gate, is the same in both lanes of a channel.
##
## Changed: A is multiplied by log2 e beforehand, ex2.approx.ftz is one instruction. `widen_kernel`
## converts B and C once for all. And each lane computes what has no states for its share of the
## steps of a tile: tiles (s, j, c), where lane j has the S = T / J steps from j S on. All lanes get
## all of them by `spread`, one exchange between lanes for each number; `sum_states` sums over the
## lanes of a channel and gives each the sums of its own steps.
##
## Gained: 0.265 -> 0.242 ms and 1.15 -> 1.09 by the first, with the others there. By the second 184
## -> 137 instructions, 0.35 -> 0.33 ms, early. By the third 80 -> 74 (16 channels), 0.256 -> 0.240.

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Inline assembly is for NVIDIA's compiler; elsewhere the same functions in plain Triton.
FAST = not INTERPRETED and torch.version.cuda is not None


@triton.jit
def instruction(v, ASSEMBLY: tl.constexpr):
    return tl.inline_asm_elementwise(ASSEMBLY, "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exp2(v, FAST: tl.constexpr):
    return instruction(v, "ex2.approx.ftz.f32 $0, $1;") if FAST else tl.exp2(v)


@triton.jit
def log2(v, FAST: tl.constexpr):
    return instruction(v, "lg2.approx.ftz.f32 $0, $1;") if FAST else tl.log2(v)


@triton.jit
def reciprocal(v, FAST: tl.constexpr):
    return instruction(v, "rcp.approx.ftz.f32 $0, $1;") if FAST else 1.0 / v


@triton.jit
def sigmoid(v, FAST: tl.constexpr):
    return reciprocal(1.0 + exp2(v * -LOG2E, FAST), FAST)


## softplus(v) = log(1 + e^v). For small e = e^v the sum 1 + e forgets the last digits of e: at the
## smallest Δ of the official initialisation, 0.001, the result would be wrong in the fourth digit.
## A polynomial takes over below e = 1/4: log(1 + e) / e to 1e-8, interpolated in Chebyshev points.
## Not where dt is bfloat16: with its 8 bits, rounding dt has cost as much already.


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
def load_delta(
    dt, mask, b_bias,
    SOFTPLUS: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Δ of a tile, and dΔ/d(dt)."""
    PRECISE: tl.constexpr = dt.dtype.element_ty != tl.bfloat16
    v = load(dt, mask, EVEN) + b_bias
    slope = tl.full(v.shape, 1.0, tl.float32)
    delta = v
    if SOFTPLUS:
        delta, e = softplus(v, PRECISE, FAST)
        slope = tl.where(v > 20.0, 1.0, e * reciprocal(1.0 + e, FAST))
    if not EVEN:
        # Steps past the end must leave h alone: Ā = exp(0 A) = 1, and x = 0 there.
        delta = tl.where(mask, delta, 0.0)
    return delta, slope


@triton.jit(do_not_specialize=["seqlen", "batch"])
def widen_kernel(
    B, C, wide, seqlen, batch, d_state, B_b, B_l, B_n, C_b, C_l, C_n,
    N: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """wide (2, b, l, N): B and C in float32, with zeros for states that only fill up the tile."""
    i_b = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    t, n = o // N, o % N
    mask = (t < seqlen) & (n < d_state)
    b_B = tl.load(B + i_b * B_b + t * B_l + n * B_n, mask=mask, other=0.0)
    b_C = tl.load(C + i_b * C_b + t * C_l + n * C_n, mask=mask, other=0.0)
    numbers = tl.cast(seqlen, tl.int64) * N
    tl.store(wide + i_b * numbers + o, b_B.to(tl.float32), mask=t < seqlen)
    tl.store(wide + (batch + i_b) * numbers + o, b_C.to(tl.float32), mask=t < seqlen)


@triton.jit
def own_steps(J: tl.constexpr, T: tl.constexpr):
    """(s, j, 1): the steps of each lane. If they are fewer than lanes, neighbours share one."""
    S: tl.constexpr = T // J if T > J else 1
    return (tl.arange(0, S)[:, None] + (tl.arange(0, J) * T // J)[None, :])[:, :, None]


@triton.jit
def from_lane(p, lane):
    """p (., ., j, c) of other lanes, numbered lane = j C + c."""
    shape: tl.constexpr = [p.shape[0], p.shape[1], 1, lane.shape[0]]
    lane = tl.broadcast_to(lane[None, None, None, :], shape)
    return tl.reshape(tl.gather(tl.reshape(p, shape), lane, 3), p.shape)


@triton.jit
def spread(v, T: tl.constexpr):
    """A tile (s, j, c), each lane with its own steps -> (t, 1, j, c), all steps in each lane."""
    S: tl.constexpr = v.shape[0]
    J: tl.constexpr = v.shape[1]
    CHANNELS: tl.constexpr = v.shape[2]
    t, all_steps = tl.arange(0, T)[:, None, None, None], tl.zeros([T, 1, J, CHANNELS], tl.float32)
    for k in tl.static_range(T // S):  # the steps k S ... k S + S - 1, and the first lane with them
        j = tl.full([J, 1], k * J * S // T, tl.int32)
        lane = tl.reshape(j * CHANNELS + tl.arange(0, CHANNELS)[None, :], [J * CHANNELS])
        for s in tl.static_range(S):
            one = from_lane(row(v[:, None, :, :], s)[None, :, :, :], lane)
            all_steps = tl.where(t == k * S + s, one, all_steps)
    return all_steps


@triton.jit
def sum_states(p):
    """Sums over m and j of a tile (t, m, j, c), for the steps of each lane: (s, j, c)."""
    T: tl.constexpr = p.shape[0]
    J: tl.constexpr = p.shape[2]
    CHANNELS: tl.constexpr = p.shape[3]
    s = tl.reshape(tl.sum(p, 1), [1, T, J, CHANNELS])  # steps where `fold` has m
    for k in tl.static_range(1, 6):
        if J >> k > 0:
            s = fold(s, (J >> k) * CHANNELS)
    return tl.reshape(s, [T // J if T > J else 1, J, CHANNELS])


@triton.jit
def fold(p, bit: tl.constexpr):
    """(t, m, j, c) -> (t, m / 2, j, c): the sum over pairs of lanes, `bit` apart, each with half of
    the m. A single m is summed in both lanes."""
    if p.shape[1] == 1:
        return p + from_lane(p, tl.arange(0, p.shape[2] * p.shape[3]) ^ bit)
    else:
        low, high = halves(p)
        return exchange(low, high, bit)


@triton.jit
def exchange(low, high, bit: tl.constexpr):
    """low, summed over pairs of lanes, to those without the bit; high to those with it."""
    lane = tl.arange(0, low.shape[2] * low.shape[3])
    has_bit = tl.reshape((lane & bit) != 0, [1, 1, low.shape[2], low.shape[3]])
    return tl.where(has_bit, high, low) + from_lane(tl.where(has_bit, low, high), lane ^ bit)


@triton.jit
def halves(p):
    """(t, m, j, c) -> two of (t, m / 2, j, c)."""
    shape: tl.constexpr = [p.shape[0], 2, p.shape[1] // 2, p.shape[2], p.shape[3]]
    return tl.split(tl.permute(tl.reshape(p, shape), [0, 2, 3, 4, 1]))


@triton.jit
def store_own(pointers, value, mask, EVEN: tl.constexpr):
    """A tile and mask (s, j, c), to pointers (j, s, c): a store has its first axis in lanes."""
    value = tl.permute(value, [1, 0, 2])
    store(pointers, value, mask if EVEN else tl.permute(mask, [1, 0, 2]), EVEN)


## Step 5. Cutting time ----------------------------------------------------------------------------
##
## Slow: one sequence with d = 1536 makes 48 programs with one lane a channel, 96 with two. Most of
## 528 schedulers are idle, and the others wait, as in step 3.
##
## Changed: time is cut into segments, and the scan becomes what section 3.3.2 calls parallel: the
## combine of whole segments. A segment turns its start state h into P h + e. Hence two launches:
##
##     1. a summary of every segment: e, and Σ Δ, since P = exp(A ΣΔ) needs no product;
##     2. every segment chains the summaries before it, h <- P h + e, and then runs in full.
##
## The summary is the recurrence from the zero state: no C, no gate, nothing written but the end. It
## still takes all exponentials: hence not where batch x d fills the chip.
##
## And it does little else: it waits for the special functions, of which a scheduler has 4 a clock,
## where it multiplies and adds 32 times. So exp(ΔA) = 2^v is a polynomial for one state in eight.
## (The scan itself gains nothing by that: it multiplies more.)
##
## Gained, in µs, over two lanes a channel and no cut: 1 x 5120 x 2048 173 -> 139. By four summaries
## at a time (`chain`) and segments that leave few schedulers idle (`soonest`) 1 x 1536 x 2048 went
## 60 -> 50. Then 1 x 5120 and 1 x 1536: by a summary that computes Δ once 137 -> 131 and 50 -> 48,
## by its polynomial -> 127 and 46. Backward, 1 x 5120, by four summaries a segment: 611 -> 573.


@triton.jit
def exp2_polynomial(v):
    """2^v for v < 128, 2^-126 below that: 2^i 2^f, i the whole number next to v. (2^f - 1) / f is a
    polynomial, to 4e-7, so that an Ā near 1 is as close as float32 is."""
    v = tl.maximum(v, -126.0)
    shifted = v + 12582912.0  # 1.5 x 2^23: in a float of this size the last bits are i
    f = v - (shifted - 12582912.0)
    p = (((0.001326697479 * f + 0.009665878351) * f + 0.05550665521) * f + 0.240223582) * f
    p = (p + 0.6931470929) * f + 1.0
    bits = p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)  # i is added to the exponent of p


@triton.jit
def exp2_shared(v, SHARE: tl.constexpr, FAST: tl.constexpr):
    """2^v of a tile (t, m, j, c), for one of SHARE states by the polynomial."""
    if SHARE == 1:
        return exp2_polynomial(v)
    else:
        few_states, most = halves(v)
        both = tl.join(exp2_shared(few_states, SHARE // 2, FAST), exp2(most, FAST))
        return tl.reshape(tl.permute(both, [0, 4, 1, 2, 3]), v.shape)


@triton.jit(do_not_specialize=["seqlen", "segment", "segments", "state_step"])
def forward_summary_kernel(
    x, dt, A, B, dt_bias, reset, ends, sums,
    seqlen, segment, segments, state_step, d_inner, d_state,
    x_b, x_l, x_d, dt_b, dt_l, dt_d,
    M: tl.constexpr, J: tl.constexpr, CHANNELS: tl.constexpr,
    GROUP_J: tl.constexpr, GROUP_C: tl.constexpr, T: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, SOFTPLUS: tl.constexpr,
    DIRAC: tl.constexpr, LOG: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """e (m, j, c) and ΣΔ (c) of one segment, but not of the last, which nobody asks for. Where a
    document starts in the segment, P = 0: ΣΔ = infinity stands for that."""
    i_d, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    N: tl.constexpr = M * J
    t, c, n, d = axes(i_d, M, J, CHANNELS, T)
    b_A2 = load_A(A, d, n[:, :, None], d_inner, d_state, LOG)
    b_bias = load_channels(dt_bias, d, d_inner, HAS_BIAS)
    x, o_x = start_of(x, i_b, i_d, t[:, None], c[None, :], x_b, x_l, x_d)
    dt, o_dt = start_of(dt, i_b, i_d, t[:, None], c[None, :], dt_b, dt_l, dt_d)
    B, o_B = B + i_b * seqlen * N, t[:, None, None] * N + n[None, :, :]
    reset += i_b * seqlen

    b_h = tl.zeros([M, J, CHANNELS], tl.float32)
    b_sum = tl.zeros([1, 1, CHANNELS], tl.float32)  # as in a tile
    resets = tl.full([], 0, tl.int32)
    start = i_s * segment
    for step in tl.range(start, min(seqlen, start + segment), T, num_stages=STAGES):
        i = tl.cast(step, tl.int64)
        here = i + t < seqlen
        mask = here[:, None] & (d < d_inner)[None, :]
        b_x = load(x + i * x_l + o_x, mask, EVEN)
        b_delta, _ = load_delta(dt + i * dt_l + o_dt, mask, b_bias[None, :], SOFTPLUS, EVEN, FAST)
        b_B = load(B + i * N + o_B, here[:, None, None], EVEN)[:, :, :, None]
        b_r = load_resets(reset + i + t, here, HAS_RESET)
        b_v, delta4 = delta_x(b_delta, b_x, DIRAC)[:, None, None, :], b_delta[:, None, None, :]
        v = delta4 * b_A2[None, :, :, :]
        a = exp2_shared(v, 8, FAST) if M >= 8 else exp2(v, FAST)
        _, h = recur(a, b_v, b_B, b_h, b_r, HAS_RESET)
        b_h = row(h, T - 1)
        b_sum += tl.sum(delta4, 0)
        if HAS_RESET:
            resets += tl.sum(b_r.to(tl.int32), 0)
    if HAS_RESET:
        b_sum = tl.where(resets > 0, float("inf"), b_sum)

    where = (i_b * segments + i_s) * tl.num_programs(0) + i_d
    o_h = state_offsets(M, J, CHANNELS, GROUP_J, GROUP_C)
    tl.store(ends + where * state_step + o_h, tl.reshape(b_h, [M, J * CHANNELS]))
    tl.store(sums + where * CHANNELS + c[None, None, :], b_sum)


@triton.jit
def chain(
    b_h, ends, sums, where, step, count, state_step, b_A2, o_h,
    M: tl.constexpr, J: tl.constexpr, CHANNELS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """P h + e, with the summaries of `count` segments: those at where, where + step, ... Four are
    asked for at a time, so that memory is waited for a quarter as often."""
    for s in range(0, count, 4):
        e0, sum0 = load_summary(ends, sums, where, step, s, count, state_step, o_h, CHANNELS)
        e1, sum1 = load_summary(ends, sums, where, step, s + 1, count, state_step, o_h, CHANNELS)
        e2, sum2 = load_summary(ends, sums, where, step, s + 2, count, state_step, o_h, CHANNELS)
        e3, sum3 = load_summary(ends, sums, where, step, s + 3, count, state_step, o_h, CHANNELS)
        b_h = after_segment(b_h, e0, sum0, b_A2, M, J, CHANNELS, FAST)
        b_h = after_segment(b_h, e1, sum1, b_A2, M, J, CHANNELS, FAST)
        b_h = after_segment(b_h, e2, sum2, b_A2, M, J, CHANNELS, FAST)
        b_h = after_segment(b_h, e3, sum3, b_A2, M, J, CHANNELS, FAST)
    return b_h


@triton.jit
def load_summary(ends, sums, where, step, s, count, state_step, o_h, CHANNELS: tl.constexpr):
    """e and ΣΔ of one segment; zeros, P = 1 and e = 0, which change nothing, past the last one."""
    c, where = tl.arange(0, CHANNELS), where + s * step
    b_e = tl.load(ends + where * state_step + o_h, mask=s + 0 * o_h < count, other=0.0)
    return b_e, tl.load(sums + where * CHANNELS + c, mask=s + 0 * c < count, other=0.0)


@triton.jit
def after_segment(
    b_h, b_e, b_sum, b_A2,
    M: tl.constexpr, J: tl.constexpr, CHANNELS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """P h + e, with P = exp(A ΣΔ)."""
    b_sum = b_sum[None, None, :]
    b_P = tl.where(b_sum == float("inf"), 0.0, exp2(b_A2 * b_sum, FAST))
    return b_P * b_h + tl.reshape(b_e, [M, J, CHANNELS])


## Forward: steps 1 to 5 in one kernel -------------------------------------------------------------
##
## Beside `first_kernel`: a tile where that has a step; softplus, D x and the gate inside.


@triton.jit(do_not_specialize=["seqlen", "segment", "state_step"])
def forward_kernel(
    x, dt, z, A, B, C, D, dt_bias, reset, h0, ends, sums, y, borders, h_last,
    seqlen, segment, state_step, d_inner, d_state,
    x_b, x_l, x_d, dt_b, dt_l, dt_d, z_b, z_l, z_d,
    M: tl.constexpr, J: tl.constexpr, CHANNELS: tl.constexpr,
    GROUP_J: tl.constexpr, GROUP_C: tl.constexpr,
    T: tl.constexpr, STAGES: tl.constexpr, K: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr,
    HAS_H0: tl.constexpr, SAVE: tl.constexpr, SOFTPLUS: tl.constexpr, DIRAC: tl.constexpr,
    LOG: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """y of one segment of C channels; h at the start of every K-th step; h after the last."""
    i_d, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks, segments = tl.num_programs(0), tl.num_programs(1)
    N: tl.constexpr = M * J
    t, c, n, d = axes(i_d, M, J, CHANNELS, T)
    t_own, c3 = own_steps(J, T), c[None, None, :]
    b_A2 = load_A(A, d, n[:, :, None], d_inner, d_state, LOG)
    b_bias = load_channels(dt_bias, d, d_inner, HAS_BIAS)[None, None, :]
    b_D = load_channels(D, d, d_inner, HAS_D)[None, None, :]
    o_h = state_offsets(M, J, CHANNELS, GROUP_J, GROUP_C)

    b_h = tl.zeros([M, J, CHANNELS], tl.float32)
    if HAS_H0:
        offsets, m_h = state_mask(d, n[:, :, None], d_inner, d_state)
        b_h += tl.load(h0 + i_b * d_inner * d_state + offsets, mask=m_h, other=0.0)
    # state_step is N C, but the compiler is not to know that it is a multiple of anything. It would
    # give a lane four neighbouring channels, to move 16 bytes at once, and, since all of b_h has
    # one layout, shuffle the states in every tile (do_not_specialize; backward for pointers, too).
    where = i_b * segments * blocks + i_d
    b_h = chain(b_h, ends, sums, where, blocks, i_s, state_step, b_A2, o_h, M, J, CHANNELS, FAST)

    start = i_s * segment
    stop = min(seqlen, start + segment)
    x, o_x = start_of(x, i_b, i_d, t_own, c3, x_b, x_l, x_d)
    dt, o_dt = start_of(dt, i_b, i_d, t_own, c3, dt_b, dt_l, dt_d)
    z, o_z = start_of(z, i_b, i_d, t_own, c3, z_b, z_l, z_d)
    y, o_y = start_of(y, i_b * seqlen, i_d, t_own, c3, d_inner, d_inner, 1)
    o_y = tl.permute(o_y, [1, 0, 2])
    B, C, o_B = B + i_b * seqlen * N, C + i_b * seqlen * N, t[:, None, None] * N + n[None, :, :]
    reset += i_b * seqlen
    borders += ((i_b * tl.cdiv(seqlen, K) + tl.cdiv(start, K)) * blocks + i_d) * state_step

    for step in tl.range(start, stop, T, num_stages=STAGES):
        if SAVE:
            border = step % K == 0
            tl.store(borders + o_h, tl.reshape(b_h, [M, J * CHANNELS]), mask=border)
            borders += tl.where(border, blocks * state_step, 0)
        i = tl.cast(step, tl.int64)
        here = i + t < seqlen
        mask = (i + t_own < seqlen) & (d < d_inner)[None, None, :]
        b_x = load(x + i * x_l + o_x, mask, EVEN)
        b_delta, _ = load_delta(dt + i * dt_l + o_dt, mask, b_bias, SOFTPLUS, EVEN, FAST)
        b_B = load(B + i * N + o_B, here[:, None, None], EVEN)
        b_r = load_resets(reset + i + t, here, HAS_RESET)
        b_C = load(C + i * N + o_B, here[:, None, None], EVEN)
        all_delta, all_v = spread(b_delta, T), spread(delta_x(b_delta, b_x, DIRAC), T)
        a = exp2(all_delta * b_A2[None, :, :, :], FAST)
        _, h = recur(a, all_v, b_B[:, :, :, None], b_h, b_r, HAS_RESET)
        b_h = row(h, T - 1)
        b_y = sum_states(h * b_C[:, :, :, None]) + b_D * b_x  # C h, and D x
        if HAS_Z:
            b_z = load(z + i * z_l + o_z, mask, EVEN)
            b_y = b_y * b_z * sigmoid(b_z, FAST)
        store_own(y + i * d_inner + o_y, b_y, mask, EVEN)

    if i_s == segments - 1:
        offsets, m_h = state_mask(d, n[:, :, None], d_inner, d_state)
        tl.store(h_last + i_b * d_inner * d_state + offsets, b_h, mask=m_h)


## Step 6. h again ---------------------------------------------------------------------------------
##
## Backward is the mirror. Let G_t be the gradient of the loss with respect to h_t, which y_t and
## h_{t+1} read, and g_t that with respect to y_t as it was before the gate:
##
##     G_t = C_t g_t + Ā_{t+1} G_{t+1}               the same recurrence, from the end to the start
##
## and everything else is local in time. With w_t = Ā_t G_t, what arrives at h_{t-1}:
##
##     dC_t = Σ_d g_t h_t          dB_t = Σ_d G_t Δ_t x_t         d(Δx)_t = Σ_n G_t B_t
##     dA   = Σ_t Δ_t w_t h_{t-1}  dΔ_t = Σ_n A w_t h_{t-1} + x_t d(Δx)_t
##     dx_t = Δ_t d(Δx)_t + D g_t  ddt_t = dΔ_t sigmoid(dt_t + bias)          dD = Σ_t g_t x_t
##
## Slow: this needs h, in reverse order. All of it is 2 GiB a layer, 1.4 ms to write and read. And
## the recurrence cannot be run backward: Ā may be 0.
##
## Changed: the forward pass keeps h at the start of every chunk of 64 steps (32 MiB, `borders`).
## Backward takes the chunks from the last to the first. It runs each forward once from its border
## and leaves the state at the start of every tile in a scratch buffer (16 KB a program; if few, in
## the L2 cache). Then, from the last tile to the first: forward through it, with h in registers,
## and backward through the same registers.
##
## Gained: one exponential more a state and step, 0.14 ms, for 1.4 ms of memory; not timed.


## Step 7. Sums over channels ----------------------------------------------------------------------
##
## Slow: the sums over d, for dB and dC, go across lanes, and a processor does one exchange between
## lanes a clock for all of its schedulers. With n = 16 and two lanes a channel one has 8
## products for dB and 8 for dC a step; to sum each over 16 lanes the usual way takes 16 x 4.
##
## Changed: `sum_channels` halves the values with each exchange. First lanes c and c ^ 8: the one
## with c < 8 keeps the lower half of the states and gives the upper half away, the other the
## reverse. Then c ^ 4: one keeps dB, the other dC. Then c ^ 2, c ^ 1, by halves of states again: 8
## + 4 + 2 + 1 = 15 exchanges. The bits of c, from the top, say what a lane is left with. Each
## program writes the sums over its own channels, and `sum_blocks_kernel` adds the programs up:
## always in the same order, so that two runs agree to the bit, which atomic additions would not.
##
## To choose by the lane's number what to keep takes two selects for an exchange. The first 8 of the
## 15 need none: lanes with c >= 8 have the halves of their states swapped from the beginning, A, B,
## C, h and all, and so every lane keeps what is in its first registers. B and C have no c; they get
## an axis u of two, the two orders (`both_orders`). Then a product that is kept is added to what
## comes in the instruction that multiplies. (For n < 3, no halves, and n > 128, fewer than 4
## channels a program, nothing is swapped: the first exchange then divides dB from dC.)
##
## Gained: with one lane a channel 31 exchanges for 160, 612 instructions for 880, and now 1.36
## ms. Swapped halves: 521 instructions for 567, timed with step 8.


@triton.jit
def fold_swapped(p, bit: tl.constexpr):
    """`fold`, where the lanes with the bit have the halves of the m in the other order."""
    kept, given = halves(p)
    return kept + from_lane(given, tl.arange(0, p.shape[2] * p.shape[3]) ^ bit)


@triton.jit
def sum_channels(p, q, SWAP: tl.constexpr):
    """Sums over c of two tiles (t, m, j, c): (t, max(1, 2 m / C), j, c).

    Number the 2 m sums of a j: first p's, then q's; with SWAP p's lower half, q's lower half, p's
    upper half, q's upper half. Lane c has those from number 2 m c / C on. If there are fewer sums
    than lanes, neighbours have the same one.
    """
    CHANNELS: tl.constexpr = p.shape[3]
    if SWAP:
        p, q = fold_swapped(p, CHANNELS // 2), fold_swapped(q, CHANNELS // 2)
        s = exchange(p, q, CHANNELS // 4)
    else:
        s = exchange(p, q, CHANNELS // 2)
    for k in tl.static_range(3 if SWAP else 2, 6):
        if CHANNELS >> k > 0:
            s = fold(s, CHANNELS >> k)
    return s


@triton.jit
def both_orders(p, CHANNELS: tl.constexpr):
    """B or C in both orders, (t, U, M / U, j, u) -> (t, m, j, c): each lane has its own of them.
    The first C / U channels take order u = 0, the others u = 1."""
    shape: tl.constexpr = [p.shape[0], p.shape[1] * p.shape[2], p.shape[3], p.shape[4], 1]
    wide: tl.constexpr = [shape[0], shape[1], shape[2], shape[3], CHANNELS // shape[3]]
    p = tl.broadcast_to(tl.reshape(p, shape), wide)
    return tl.reshape(p, [shape[0], shape[1], shape[2], CHANNELS])


## Step 8. Two lanes for a channel -----------------------------------------------------------------
##
## Slow: a lane that holds 16 states needs more registers than there are (255), and spills.
##
## Changed: two lanes share a channel, J = 2, and a program has 16 channels. What has no states is
## shared, as in step 4. Pointers move on, tile by tile.
##
## Gained: 1.36 -> 1.09 ms by two lanes. By what they share, pointers and swapped halves, in a later
## version, 665 -> 521 instructions, 1.22 -> 1.17 ms, and 7.10 -> 6.29 for 8 x 5120 x 4096: the
## limit is now how long the instructions of a tile wait for each other, not their number.


## ================================================================================================
## Backward: steps 1 to 8 in one kernel
## ================================================================================================
##
## Time is cut as in step 5, from its end to its start: what is chained is w, and the summary of
## some steps is what their g add to it, a plain sum. Summaries chain, so that a segment may have
## more than one: it has four pieces, each with its own, which makes four times as many programs of
## that short kernel. It waits for the special functions, as the forward one does. By one lane for a
## channel and a polynomial: 176 -> 144 clocks a step of 32 channels, 1 x 5120 x 2048 449 -> 445 µs.


@triton.jit
def side_by_side(h, V: tl.constexpr):
    """(m, j, c) -> (j c, m / V, V): the states of a lane, of which it moves V at once."""
    shape: tl.constexpr = [h.shape[0] // V, V, h.shape[1] * h.shape[2]]
    return tl.permute(tl.reshape(h, shape), [2, 0, 1])


@triton.jit
def add_both(a1, b1, a2, b2):
    return a1 + a2, b1 + b2


@triton.jit(do_not_specialize=["seqlen", "first_stop", "piece", "pieces"])
def backward_summary_kernel(
    dt, z, dy, A, C, dt_bias, reset, ends, sums,
    seqlen, first_stop, piece, pieces, d_inner, d_state,
    dt_b, dt_l, dt_d, z_b, z_l, z_d, dy_b, dy_l, dy_d,
    M: tl.constexpr, J: tl.constexpr, CHANNELS: tl.constexpr,
    GROUP_J: tl.constexpr, GROUP_C: tl.constexpr, T: tl.constexpr, STAGES: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr,
    SOFTPLUS: tl.constexpr, LOG: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """What the gradients g of a piece's own steps add to w at its start. piece: its steps, pieces:
    the slice's; those of its first segment, up to first_stop, nobody asks for: they are left out.

    In this direction the decays to the start are at hand, exp(A (Δ_start + ... + Δ_t)) for step t,
    and the sum over the steps, Σ_t exp(...) C_t g_t, needs no recurrence.
    """
    i_d, i_p, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    N: tl.constexpr = M * J
    t, c, n, d = axes(i_d, M, J, CHANNELS, T)
    b_A2 = load_A(A, d, n[:, :, None], d_inner, d_state, LOG)
    b_bias = load_channels(dt_bias, d, d_inner, HAS_BIAS)
    dt, o_dt = start_of(dt, i_b, i_d, t[:, None], c[None, :], dt_b, dt_l, dt_d)
    z, o_z = start_of(z, i_b, i_d, t[:, None], c[None, :], z_b, z_l, z_d)
    dy, o_dy = start_of(dy, i_b, i_d, t[:, None], c[None, :], dy_b, dy_l, dy_d)
    C, o_C = C + i_b * seqlen * N, t[:, None, None] * N + n[None, :, :]
    reset += i_b * seqlen

    b_e = tl.zeros([M, J, CHANNELS], tl.float32)
    b_sum = tl.zeros([1, 1, CHANNELS], tl.float32)  # ΣΔ of the tiles before this one
    resets_before = tl.full([], 0, tl.int32)
    start = first_stop + i_p * piece
    for step in tl.range(start, min(seqlen, start + piece), T, num_stages=STAGES):
        i = tl.cast(step, tl.int64)
        here = i + t < seqlen
        mask = here[:, None] & (d < d_inner)[None, :]
        b_delta, _ = load_delta(dt + i * dt_l + o_dt, mask, b_bias[None, :], SOFTPLUS, EVEN, FAST)
        b_g = load(dy + i * dy_l + o_dy, mask, EVEN)
        if HAS_Z:
            b_z = load(z + i * z_l + o_z, mask, EVEN)
            b_g = b_g * b_z * sigmoid(b_z, FAST)
        b_C = load(C + i * N + o_C, here[:, None, None], EVEN)
        delta4 = b_delta[:, None, None, :]
        b_through = b_sum[None, :, :, :] + tl.cumsum(delta4, 0)  # Δ of step t included
        v = b_through * b_A2[None, :, :, :]
        b_weight = exp2_shared(v, 8, FAST) if M >= 8 else exp2(v, FAST)
        if HAS_RESET:
            b_r = load_resets(reset + i + t, here, HAS_RESET).to(tl.int32)
            cut = resets_before + tl.cumsum(b_r, 0) > 0
            b_weight = tl.where(cut[:, None, None, None], 0.0, b_weight)
            resets_before += tl.sum(b_r, 0)
        b_e += tl.sum(b_weight * b_g[:, None, None, :] * b_C[:, :, :, None], 0)
        b_sum += tl.sum(delta4, 0)
    if HAS_RESET:
        b_sum = tl.where(resets_before > 0, float("inf"), b_sum)

    where = ((i_b + 1) * pieces - tl.num_programs(1) + i_p) * tl.num_programs(0) + i_d
    o_h = state_offsets(M, J, CHANNELS, GROUP_J, GROUP_C)
    tl.store(ends + where * (N * CHANNELS) + o_h, tl.reshape(b_e, [M, J * CHANNELS]))
    tl.store(sums + where * CHANNELS + c[None, None, :], b_sum)


@triton.jit(do_not_specialize=[
    "seqlen", "slice_start", "slice_stop", "first_stop", "segment", "steps", "has_w", "earlier",
    "state_step", "dx", "ddt", "dz", "y", "dBC",
])  # fmt: skip
def backward_kernel(
    x, dt, z, dy, A, B, C, D, dt_bias, reset, borders, scratch, ends, sums, w_after, w_before,
    dx, ddt, dz, y, dBC, totals,
    seqlen, slice_start, slice_stop, first_stop, segment, steps, has_w, earlier, state_step,
    d_inner, d_state, x_b, x_l, x_d, dt_b, dt_l, dt_d, z_b, z_l, z_d, dy_b, dy_l, dy_d, dx_l,
    M: tl.constexpr, J: tl.constexpr, CHANNELS: tl.constexpr, SWAP: tl.constexpr,
    T: tl.constexpr, STAGES: tl.constexpr, K: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr,
    SOFTPLUS: tl.constexpr, DIRAC: tl.constexpr, LOG: tl.constexpr, AGAIN: tl.constexpr,
    PIECES: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """All gradients of one segment of C channels, inside one slice of time: dx, ddt, dz, and in
    dBC and totals this program's part of the sums. AGAIN: and y. dx_l: a step of dx, ddt, dz, y."""
    i_d, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks, segments = tl.num_programs(0), tl.num_programs(1)
    N: tl.constexpr = M * J
    t, c, n, d = axes(i_d, M, J, CHANNELS, T)
    t4, c3 = t[:, None, None, None], c[None, None, :]
    t_own = own_steps(J, T)
    # The states of each lane (m, j, c): swapped halves where c >= C / 2.
    U: tl.constexpr = 2 if SWAP else 1
    HALF: tl.constexpr = M // U
    m = (tl.arange(0, M)[:, None, None] + c3 // (CHANNELS // U) * HALF) % M
    n = m + tl.arange(0, J)[None, :, None] * M
    b_A2 = load_A(A, d, n, d_inner, d_state, LOG)
    b_bias = load_channels(dt_bias, d, d_inner, HAS_BIAS)[None, None, :]
    b_D = load_channels(D, d, d_inner, HAS_D)[None, None, :]
    o_h = m * (J * CHANNELS) + tl.arange(0, J)[None, :, None] * CHANNELS + c3
    o_h = tl.reshape(o_h, [M, J * CHANNELS])

    # w of the segment's end: w_after, 0 if not has_w, through all pieces between, last to first.
    p_w = w_after + (i_b * blocks + i_d) * state_step + o_h
    b_w = tl.reshape(tl.load(p_w, mask=o_h < has_w * (N * CHANNELS), other=0.0), [M, J, CHANNELS])
    last, count = ((i_b + 1) * segments * PIECES - 1) * blocks + i_d, (segments - 1 - i_s) * PIECES
    b_w = chain(b_w, ends, sums, last, -blocks, count, state_step, b_A2, o_h, M, J, CHANNELS, FAST)

    x, o_x = start_of(x, i_b, i_d, t_own, c3, x_b, x_l, x_d)
    dt, o_dt = start_of(dt, i_b, i_d, t_own, c3, dt_b, dt_l, dt_d)
    z, o_z = start_of(z, i_b, i_d, t_own, c3, z_b, z_l, z_d)
    dy, o_dy = start_of(dy, i_b, i_d, t_own, c3, dy_b, dy_l, dy_d)
    dx, o_dx = start_of(dx, i_b * seqlen, i_d, t_own, c3, dx_l, dx_l, 1)
    ddt, o_dx = start_of(ddt, i_b * seqlen, i_d, t_own, c3, dx_l, dx_l, 1)
    dz, o_dx = start_of(dz, i_b * seqlen, i_d, t_own, c3, dx_l, dx_l, 1)
    y, o_dx = start_of(y, i_b * seqlen, i_d, t_own, c3, dx_l, dx_l, 1)
    o_dx = tl.permute(o_dx, [1, 0, 2])
    # B and C as (t, U, M / U, j, u): in order u the i-th half is number i + u, mod 2.
    B, C, u = B + i_b * seqlen * N, C + i_b * seqlen * N, tl.arange(0, U)
    half = ((u[:, None] + u[None, :]) % U)[:, None, None, :]
    o_B = tl.arange(0, HALF)[None, :, None, None] + tl.arange(0, J)[None, None, :, None] * M
    o_B = t[:, None, None, None, None] * N + (half * HALF + o_B)[None, :, :, :, :]
    reset += i_b * seqlen
    borders += (i_b * tl.cdiv(seqlen, K) * blocks + i_d) * state_step
    program = (i_b * segments + i_s) * blocks + i_d
    scratch += program * (N * CHANNELS)  # scratch (tiles of a chunk, programs, N C)
    scratch_step = tl.cast(blocks * segments * tl.num_programs(2), tl.int64) * (N * CHANNELS)
    V: tl.constexpr = 4 if M > 4 else M
    lane = tl.arange(0, J * CHANNELS)
    o_scratch = tl.arange(0, M // V)[None, :, None] * (J * CHANNELS * V)
    o_scratch += lane[:, None, None] * V + tl.arange(0, V)[None, None, :]
    # dBC (b, blocks, steps, j, 2 M): the sums over this program's channels, in sum_channels' order.
    dBC += (i_b * blocks + i_d) * steps * (2 * N)
    SUMS: tl.constexpr = (2 * M) // CHANNELS if 2 * M > CHANNELS else 1  # of a lane
    if SUMS * CHANNELS == 2 * M:
        first = lane * SUMS  # as below, but the compiler sees that lanes are neighbours
    else:
        first = lane // CHANNELS * (2 * M) + lane % CHANNELS * (2 * M) // CHANNELS
    o_sum = t[:, None, None] * (2 * N) + tl.arange(0, SUMS)[None, :, None] + first[None, None, :]

    b_dA = tl.zeros([M, J, CHANNELS], tl.float32)
    b_dD, b_dbias = tl.zeros([J, CHANNELS], tl.float32), tl.zeros([J, CHANNELS], tl.float32)
    m_d = (d < d_inner)[None, None, :]
    start = max(slice_start, first_stop + (i_s - 1) * segment)  # of segment 0: what is left
    stop = min(slice_stop, first_stop + i_s * segment)
    for k in range(0, tl.cdiv(stop - start, K)):
        chunk = (tl.cdiv(stop, K) - 1 - k) * K
        tiles = tl.cdiv(min(stop, chunk + K) - chunk, T)
        ## Forward through the chunk: the state at the start of each tile, into the scratch buffer.
        border = borders + tl.cast(chunk // K, tl.int64) * (blocks * state_step)
        b_h = tl.reshape(tl.load(border + o_h), [M, J, CHANNELS])
        p_scratch, i_0 = scratch + o_scratch, tl.cast(chunk, tl.int64)
        tl.store(p_scratch, side_by_side(b_h, V))
        p_x, p_dt, p_B = x + i_0 * x_l + o_x, dt + i_0 * dt_l + o_dt, B + i_0 * N + o_B
        for tile in tl.range(0, tiles - 1, num_stages=STAGES):
            i = chunk + tile * T
            here, mask = i + t < seqlen, (i + t_own < seqlen) & m_d
            b_x = load(p_x, mask, EVEN)
            b_delta, _ = load_delta(p_dt, mask, b_bias, SOFTPLUS, EVEN, FAST)
            b_B = both_orders(load(p_B, here[:, None, None, None, None], EVEN), CHANNELS)
            b_r = load_resets(reset + i + t, here, HAS_RESET)
            all_delta, all_v = spread(b_delta, T), spread(delta_x(b_delta, b_x, DIRAC), T)
            a = exp2(all_delta * b_A2[None, :, :, :], FAST)
            _, h = recur(a, all_v, b_B, b_h, b_r, HAS_RESET)
            b_h = row(h, T - 1)
            p_scratch += scratch_step
            tl.store(p_scratch, side_by_side(b_h, V))
            p_x, p_dt, p_B = p_x + T * x_l, p_dt + T * dt_l, p_B + T * N
        tl.debug_barrier()  # the lanes that load the scratch buffer may not be those that stored it
        ## Backward through its tiles. To move a pointer is cheaper than to find it anew.
        i_0 = tl.cast(chunk + (tiles - 1) * T, tl.int64)
        p_x, p_dt, p_z = x + i_0 * x_l + o_x, dt + i_0 * dt_l + o_dt, z + i_0 * z_l + o_z
        p_dy, p_B, p_C = dy + i_0 * dy_l + o_dy, B + i_0 * N + o_B, C + i_0 * N + o_B
        p_dx, p_ddt = dx + i_0 * dx_l + o_dx, ddt + i_0 * dx_l + o_dx
        p_dz, p_y = dz + i_0 * dx_l + o_dx, y + i_0 * dx_l + o_dx
        p_sum = dBC + (i_0 - slice_start) * (2 * N) + o_sum
        p_scratch = scratch + (tiles - 1) * scratch_step + o_scratch
        for tile in tl.range(0, tiles, num_stages=STAGES):
            b_h = tl.reshape(tl.permute(tl.load(p_scratch), [1, 2, 0]), [M, J, CHANNELS])
            i = chunk + (tiles - 1 - tile) * T
            here, mask = i + t < seqlen, (i + t_own < seqlen) & m_d
            b_x, b_g = load(p_x, mask, EVEN), load(p_dy, mask, EVEN)
            b_delta, b_slope = load_delta(p_dt, mask, b_bias, SOFTPLUS, EVEN, FAST)
            b_B = both_orders(load(p_B, here[:, None, None, None, None], EVEN), CHANNELS)
            b_C = both_orders(load(p_C, here[:, None, None, None, None], EVEN), CHANNELS)
            b_r = load_resets(reset + i + t, here, HAS_RESET)
            all_delta, all_v = spread(b_delta, T), spread(delta_x(b_delta, b_x, DIRAC), T)
            a = exp2(all_delta * b_A2[None, :, :, :], FAST)
            a, h = recur(a, all_v, b_B, b_h, b_r, HAS_RESET)
            if HAS_Z:
                ## y' = y silu(z). silu(z) = z σ, and its derivative is σ (1 + z - z σ).
                b_z = load(p_z, mask, EVEN)
                b_y = sum_states(h * b_C) + b_D * b_x
                sigma = sigmoid(b_z, FAST)
                b_dz = b_g * b_y * sigma * (1.0 + b_z - b_z * sigma)
                store_own(p_dz, b_dz, mask, EVEN)
                b_y *= b_z * sigma
                b_g = b_g * b_z * sigma
            ## G and w h_{t-1} of every step, from the last to the first.
            all_g = spread(b_g, T)
            G = all_g * b_C
            wh = G  # a tile of that shape: each of its steps is put in below
            for s in tl.static_range(T - 1, -1, -1):
                G_s = row(G, s) + b_w
                b_w = row(a, s) * G_s
                h_before = b_h
                if s > 0:
                    h_before = row(h, s - 1)
                G = tl.where(t4 == s, G_s[None, :, :, :], G)
                wh = tl.where(t4 == s, (b_w * h_before)[None, :, :, :], wh)
            b_dv = sum_states(G * b_B)
            b_ddelta = sum_states(wh * b_A2[None, :, :, :]) * LN2  # A = b_A2 ln 2
            b_dA += tl.sum(wh * all_delta, 0)
            b_dx = b_dv
            if not DIRAC:
                b_dx = b_dv * b_delta
                b_ddelta += b_dv * b_x
            b_ddt = b_ddelta * b_slope
            if not EVEN:
                b_ddt = tl.where(mask, b_ddt, 0.0)
            of_bias, of_D = tl.reduce((b_ddt, b_g * b_x), 0, add_both)
            b_dbias, b_dD = b_dbias + of_bias, b_dD + of_D
            if AGAIN:
                store_own(p_y, b_y, mask, EVEN)
            store_own(p_ddt, b_ddt, mask, EVEN)
            store_own(p_dx, b_dx + b_D * b_g, mask, EVEN)
            both = sum_channels(G * all_v, h * all_g, SWAP)
            both = tl.reshape(both, [T, SUMS, J * CHANNELS])
            store(p_sum, both, here[:, None, None], EVEN)
            p_x, p_dt, p_z = p_x - T * x_l, p_dt - T * dt_l, p_z - T * z_l
            p_dy, p_B, p_C = p_dy - T * dy_l, p_B - T * N, p_C - T * N
            p_dx, p_ddt = p_dx - T * dx_l, p_ddt - T * dx_l
            p_dz, p_y = p_dz - T * dx_l, p_y - T * dx_l
            p_sum, p_scratch = p_sum - T * (2 * N), p_scratch - scratch_step
        tl.debug_barrier()  # the next chunk overwrites the scratch buffer

    # totals (rows, blocks, N C + 2 C): dA, dD and dbias of this program, after those of the
    # `earlier` programs of other launches.
    totals += (earlier + program) * (state_step + 2 * CHANNELS)
    tl.store(totals + o_h, tl.reshape(b_dA, [M, J * CHANNELS]))
    own = ((tl.arange(0, J) * T) % J == 0)[:, None]  # of lanes with the same steps the first one
    b_dD, b_dbias = tl.where(own, b_dD, 0.0), tl.where(own, b_dbias, 0.0)
    tl.store(totals + state_step + c, tl.sum(b_dD, 0))
    tl.store(totals + state_step + CHANNELS + c, tl.sum(b_dbias, 0))
    if i_s == 0:
        p_w = w_before + (i_b * blocks + i_d) * state_step + o_h
        tl.store(p_w, tl.reshape(b_w, [M, J * CHANNELS]))


@triton.jit
def sum_rows(p, step, rows, o, mask, ROWS: tl.constexpr):
    """Σ_r p[r step + o], r = 0 ... rows - 1, always in the same order."""
    r = tl.arange(0, ROWS)
    total = tl.zeros(o.shape, tl.float32)
    for k in range(0, rows, ROWS):
        place = tl.cast(k + r, tl.int64)[:, None] * step + o[None, :]
        here = (k + r < rows)[:, None] & mask[None, :]
        total += tl.sum(tl.load(p + place, mask=here, other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["seqlen", "start", "numbers", "steps", "blocks"])
def sum_blocks_kernel(
    dBC, dB, dC, seqlen, start, numbers, steps, blocks, d_state,
    M: tl.constexpr, J: tl.constexpr, SWAP: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """dB and dC of a slice: the sums of all programs, dBC (b, blocks, steps, j, 2 M), added up."""
    N: tl.constexpr = M * J
    HALF: tl.constexpr = M // 2 if SWAP else M  # so many of dB, as many of dC, and if SWAP again
    i_b, o = tl.program_id(1).to(tl.int64), tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    step = tl.cast(steps, tl.int64) * (2 * N)
    total = sum_rows(dBC + i_b * blocks * step, step, blocks, o, o < numbers, ROWS)
    t, j, w = o // (2 * N), o // (2 * M) % J, o % (2 * M)
    n, of_C = j * M + w // (2 * HALF) * HALF + w % HALF, (w // HALF) % 2 == 1
    place = (i_b * seqlen + start + t) * d_state + n
    mask = (o < numbers) & (n < d_state)
    tl.store(dB + place, total.to(dB.dtype.element_ty), mask=mask & ~of_C)
    tl.store(dC + place, total.to(dC.dtype.element_ty), mask=mask & of_C)


@triton.jit(do_not_specialize=["rows", "blocks"])
def sum_totals_kernel(
    totals, A, dA, dD, dbias, rows, blocks, d_inner, d_state,
    M: tl.constexpr, J: tl.constexpr, CHANNELS: tl.constexpr, LOG: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """dA (d, n), dD and dbias (d): the rows of totals added up, and put in the order of A. LOG: A
    is given as log(-A), and dA is the gradient of that: the one of A, times A."""
    i_d, o = tl.program_id(1), tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    STATES: tl.constexpr = M * J * CHANNELS
    step = tl.cast(blocks, tl.int64) * (STATES + 2 * CHANNELS)
    mask = o < STATES + 2 * CHANNELS
    total = sum_rows(totals + i_d * (STATES + 2 * CHANNELS), step, rows, o, mask, ROWS)
    d = i_d * CHANNELS + o % CHANNELS
    n = (o // CHANNELS) % J * M + o // (J * CHANNELS)
    mask = d < d_inner
    m_dA = mask & (o < STATES) & (n < d_state)
    b_dA = total
    if LOG:
        b_dA *= -tl.exp(tl.load(A + d * d_state + n, mask=m_dA, other=0.0).to(tl.float32))
    tl.store(dA + d * d_state + n, b_dA.to(dA.dtype.element_ty), mask=m_dA)
    if HAS_D:
        m_dD = mask & (o // CHANNELS == M * J)
        tl.store(dD + d, total.to(dD.dtype.element_ty), mask=m_dD)
    if HAS_BIAS:
        m_dbias = mask & (o // CHANNELS == M * J + 1)
        tl.store(dbias + d, total.to(dbias.dtype.element_ty), mask=m_dbias)


## Step 9. Launching -------------------------------------------------------------------------------
##
## Slow: Triton looks at every argument of every launch, 50 µs of Python and more where this was
## timed; PyTorch's wrapper for operators takes as long again; and backward was twenty launches.
##
## Changed: `launch` remembers what Triton found out; `operator` gives the wrapper to torch.compile
## only; nothing is set to zero, one kernel adds up all parts of a sum, most often for all of time.
##
## Gained, 1 x 1536 x 2048 backward: by the first two 0.98 -> 0.46 ms, by the third, on another
## machine, 1.07 -> 0.16. By one slice of time, not four: 8 x 2048 x 2048 1.19 -> 1.10.


def check_device(x: Tensor) -> None:
    if INTERPRETED or x.is_cuda:
        return
    raise RuntimeError(
        f"triton_scan.py runs on a GPU, got tensors on {x.device}: move them there, or use "
        "mamba.py's scan='chunked' (or, to try the kernels slowly on a CPU, set "
        "TRITON_INTERPRET=1 before triton is imported)"
    )


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


next_power_of_2 = functools.cache(triton.next_power_of_2)


@functools.cache
def lane_shape(d_state: int, lanes_of_a_channel: int) -> tuple[int, int, int]:
    """(M, J, C): states of a lane, lanes of a channel, channels of a warp. M is at most 16.

    A channel gets more lanes than asked for if its states need them, fewer if it has fewer states.
    """
    states = next_power_of_2(d_state)
    J = min(states, max(lanes_of_a_channel, states // 16))
    return states // J, J, LANES // J


## How the work is cut depends on the sizes and not on the device, so that every process of a
## distributed run computes the same bits. The numbers are an H100's, as measured. FULL: programs
## from which on the forward kernel is as fast without cutting time.

SCHEDULERS = 528
FORWARD_FULL, FORWARD_CROWDED = 448, 4096  # programs of two lanes; from CROWDED on one is faster
PIECES = 4  # of a segment, backward, with a summary each


def forward_shape(
    batch: int, seqlen: int, d_inner: int, d_state: int
) -> tuple[tuple[int, int, int], int]:
    """(M, J, C) of the forward kernel, and the steps of a segment, a multiple of FORWARD_T.

    Where two lanes a channel make programs enough, time is not cut; where they make very many, a
    channel has one lane. Where too few, it has one lane too, and time is cut.
    """
    one, two = lane_shape(d_state, 1), lane_shape(d_state, 2)
    programs = batch * ceil_div(d_inner, two[2])
    if programs >= FORWARD_FULL:
        return two if programs < FORWARD_CROWDED else one, ceil_div(seqlen, FORWARD_T) * FORWARD_T
    return one, soonest(batch * ceil_div(d_inner, one[2]), seqlen, FORWARD_T, K)


@functools.lru_cache(10_000)
def soonest(programs: int, seqlen: int, tile: int, shortest: int) -> int:
    """The steps of a segment with which all is done soonest: a multiple of tile, at least shortest.

    Each segment has `programs`. One to a scheduler is a turn; 33 for 32 schedulers are two. A
    turn takes a segment's steps and its chain of summaries, in the mean half of all, each about as
    long as a step. In a single turn nothing else runs while a program waits: 2 to 8 are tried.
    """

    def time(steps: int) -> float:
        segments = ceil_div(seqlen, steps)
        return ceil_div(segments * programs, SCHEDULERS) * (steps + segments / 2)

    tiles, most = ceil_div(seqlen, tile), [turns * SCHEDULERS // programs for turns in range(2, 9)]
    return min((max(ceil_div(tiles, n) * tile, shortest) for n in most), key=time)


@functools.lru_cache(10_000)
def backward_segment(programs: int, chunks: int) -> int:
    """`soonest` for the backward kernel, in chunks, by times in NOTES.md ("What a turn is").

    Two programs a scheduler are a turn, full or not: a processor takes new ones only when each of
    its schedulers has room. A cut adds the summaries, and to each turn 1/50 chunk for a segment. To
    spare memory, cut into at most five turns.
    """

    def time(length: int) -> float:
        segments = ceil_div(chunks, length)
        turns = ceil_div(segments * programs, 2 * SCHEDULERS)
        summaries = 0.55 + 0.077 * programs / SCHEDULERS * (chunks - length)
        return turns * (length + segments / 50) + (summaries if segments > 1 else 0)

    most = min(chunks, max(1, 10 * SCHEDULERS // programs))
    return min((ceil_div(chunks, segments) for segments in range(1, most + 1)), key=time)


def pack(h: Tensor, channels: int, M: int, J: int, C: int) -> Tensor:
    """States (..., d, n) in the order of the kernels, (..., groups, m, j, c), channels in all."""
    h = torch.nn.functional.pad(h.float(), (0, M * J - h.shape[-1], 0, channels - h.shape[-2]))
    return h.unflatten(-1, (J, M)).unflatten(-3, (-1, C)).transpose(-3, -1).contiguous()


def unpack(packed: Tensor, d_inner: int, d_state: int) -> Tensor:
    """The inverse of pack: (..., groups, m, j, c) -> (..., d, n)."""
    h = packed.transpose(-3, -1).flatten(-2).flatten(-3, -2)
    return h[..., :d_inner, :d_state].contiguous()


## Which compiled variant of a kernel fits depends on the dtypes, on whether addresses and `fixed`
## numbers are multiples of 16 (and on numbers that are 1, or need 64 bits), and on the constants;
## not on the values of the `free` numbers (do_not_specialize), whose types must stay the same.

variants: dict = {}


def launch(kernel, grid, tensors: tuple, free: tuple, fixed: tuple, **constants) -> None:
    """kernel[grid](*tensors, *free, *fixed, **constants)."""
    # Lists, which are faster than generators, and the function, whose hash is its address.
    addresses = [tensor.data_ptr() for tensor in tensors]
    dtypes = [tensor.dtype for tensor in tensors]
    uneven = [i for i, address in enumerate(addresses) if address % 16]
    traits = [n % 16 == 0 if 1 < n < 2**31 else (n,) for n in fixed]
    key = (kernel.fn, tensors[0].device, *dtypes, *traits, *constants.values(), *uneven)
    if key in variants:
        variant, values = variants[key]  # of a tensor Triton asks the address again
        variant[grid](*addresses, *free, *fixed, *values)
        return
    variant = kernel[grid](*tensors, *free, *fixed, **constants)
    if not INTERPRETED:
        count = len(tensors) + len(free) + len(fixed)
        variants[key] = variant, tuple(constants[name] for name in kernel.arg_names[count:])


def or_else(tensor: Tensor | None, other: Tensor) -> Tensor:
    """For a tensor that is missing a kernel gets another, which a flag keeps it from reading."""
    return other if tensor is None else tensor.contiguous()


def document_starts(reset: Tensor | None, other: Tensor) -> Tensor:
    return other if reset is None else reset.contiguous().view(torch.uint8)


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tensor.stride()


def within_reach(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy if a chunk of it does not fit the kernels' 32-bit offsets."""
    if tensor is None or max(tensor.stride()[1:]) < 2**24:
        return tensor
    return tensor.contiguous()


## torch.compile cannot trace `launch`: inside of it each of the four functions of the scan and the
## convolution is an opaque operator, registered with one that makes its results without computing
## them. (`room` and `dx`, which are written, come from `Block` only, which is never compiled.)

library = torch.library.Library("mamba_annotated", "DEF")


def operator(results):
    """A decorator of functions of tensors."""

    def decorate(function):
        name = function.__name__
        library.define(name + torch.library.infer_schema(function, mutates_args=()))
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mamba_annotated::{name}", results, lib=library)
        registered = getattr(torch.ops.mamba_annotated, name)

        def either(*args, **options):
            run = registered if torch.compiler.is_compiling() else function
            return run(*args, **options)

        return functools.wraps(function)(either)

    return decorate


def forward_results(x: Tensor, A: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What scan_forward returns, still empty."""
    (batch, seqlen, d_inner), d_state = x.shape, A.shape[1]
    # Groups enough for whole programs of one lane a channel as well as of two.
    channels, (M, J, C) = lane_shape(d_state, 1)[2], lane_shape(d_state, 2)
    groups, chunks = ceil_div(d_inner, channels) * channels // C, ceil_div(seqlen, K) if save else 0
    empty = functools.partial(x.new_empty, dtype=torch.float32)
    return (
        x.new_empty(batch, seqlen, d_inner),
        empty((batch, d_inner, d_state)),
        empty((batch, chunks, groups, M, J, C)),
        empty((2, batch, seqlen, M * J)),
    )


def empty_like_each(x: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """For None a new tensor of no numbers each time: an operator may not return one twice."""
    return [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors]


@operator(lambda x, dt, A, *others: forward_results(x, A, others[9]))
def scan_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    h0: Tensor | None, dt_bias: Tensor | None, reset: Tensor | None,
    dt_softplus: bool, rule: str, save: bool, log: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, h_last, and for the backward pass `borders` and `wide`. log: A is given as log(-A).

    borders: the states at every K-th step (none unless save), in the kernels' order; wide (2, b, l,
    N): B and C as the kernels read them.
    """
    (batch, seqlen, d_inner), d_state = x.shape, A.shape[1]
    (M, J, channels), segment = forward_shape(batch, seqlen, d_inner, d_state)
    states, segments = M * J, ceil_div(seqlen, segment)

    x, dt, z = within_reach(x), within_reach(dt), within_reach(z)
    y, h_last, borders, wide = forward_results(x, A, save)
    group = borders.shape[2:]
    blocks = group[0] * group[3] // channels
    A = A.contiguous()
    flags = {
        "M": M, "J": J, "CHANNELS": channels, "GROUP_J": group[2], "GROUP_C": group[3],
        "T": FORWARD_T, "STAGES": FORWARD_STAGES,
        "HAS_BIAS": dt_bias is not None, "HAS_RESET": reset is not None,
        "SOFTPLUS": dt_softplus, "DIRAC": rule == "dirac", "LOG": log, "FAST": FAST,
        "EVEN": d_inner == blocks * channels and seqlen % FORWARD_T == 0, "num_warps": 1,
    }  # fmt: skip
    bias, document = or_else(dt_bias, x), document_starts(reset, x)
    ends = sums = x
    with device_of(x):
        grid = (ceil_div(seqlen * states, 1024), batch, 1)
        fixed = (d_state, *B.stride(), *C.stride())
        constants = {"N": states, "SIZE": 1024, "num_warps": 4}
        launch(widen_kernel, grid, (B, C, wide), (seqlen, batch), fixed, **constants)
        B, C = wide.unbind()
        if segments > 1:
            ends = x.new_empty((batch, segments, *group), dtype=torch.float32)
            sums = x.new_empty((batch, segments, blocks * channels), dtype=torch.float32)
            grid, tensors = (blocks, segments - 1, batch), (x, dt, A, B, bias, document, ends, sums)
            fixed = (d_inner, d_state, *x.stride(), *dt.stride())
            free = (seqlen, segment, segments, states * channels)
            launch(forward_summary_kernel, grid, tensors, free, fixed, **flags)
        tensors = (
            x, dt, x if z is None else z, A, B, C, or_else(D, x), bias, document, or_else(h0, x),
            ends, sums, y, borders, h_last,
        )  # fmt: skip
        fixed = (d_inner, d_state, *x.stride(), *dt.stride(), *strides(z))
        flags |= {"K": K, "SAVE": save, "HAS_Z": z is not None, "HAS_D": D is not None}
        flags["HAS_H0"] = h0 is not None
        free = (seqlen, segment, states * channels)
        launch(forward_kernel, (blocks, segments, batch), tensors, free, fixed, **flags)
    return y, h_last, borders, wide


def room_for_sums(x: Tensor) -> int:
    """Bytes for the sums of dB and dC of one slice of time, if it has more than one chunk."""
    return max(x.numel() * x.element_size(), 2**28)


@operator(lambda dy, dh_last, x, *others: empty_like_each(x, x, *others[:8]))
def scan_backward(
    dy: Tensor, dh_last: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, h0: Tensor | None, dt_bias: Tensor | None,
    reset: Tensor | None, borders: Tensor, wide: Tensor, dt_softplus: bool, rule: str,
    log: bool = False, room: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, dt, A (with log, of log(-A)), B, C, D, z, h0, dt_bias; an empty tensor for
    what was None. room (b, l, 4, d), if z is there: dz, y again, ddt and dx are written to it."""
    (batch, seqlen, d_inner), d_state = x.shape, A.shape[1]
    M, J, channels = lane_shape(d_state, 2)
    states, state_step, group = M * J, M * J * channels, borders.shape[2:]
    blocks, programs = group[0], batch * group[0]
    swap = M > 1 and channels >= 4  # states whose halves can be swapped, and lanes for both orders
    x, dt, z, dy = within_reach(x), within_reach(dt), within_reach(z), within_reach(dy)

    ## The sums of dB and dC of each program are n / 8 float32 numbers for each of x: for n = 16 and
    ## bfloat16 as much as x, dx, ddt and dz. If that exceeds both x and 256 MiB, time is in slices,
    ## the last first, each added up before the next, which gets w, what arrives at its last state.
    slices = ceil_div(seqlen, K * max(1, room_for_sums(x) // (programs * K * 2 * states * 4)))
    chunks = ceil_div(seqlen, K * slices)  # of a slice; the last may have fewer
    steps, segment = min(seqlen, chunks * K), backward_segment(programs, chunks) * K
    segments, pieces = ceil_div(steps, segment), min(PIECES, K // BACKWARD_T)  # a tile at least

    starts = range((seqlen - 1) // steps * steps, -1, -steps)
    counts = [ceil_div(min(seqlen, start + steps) - start, segment) for start in starts]

    empty = functools.partial(x.new_empty, dtype=torch.float32)
    dx, ddt, dA, dB, dC, dD, dz, dh0, dbias = empty_like_each(x, x, dt, A, B, C, D, z, h0, dt_bias)
    dz, y, ddt, dx = (dz, dx, ddt, dx) if room is None else room.unbind(2)  # without it y is unused
    parts = empty((batch, blocks, steps, J, 2 * M))
    totals = empty((batch * sum(counts), blocks, (states + 2) * channels))
    scratch = empty((K // BACKWARD_T, batch * segments, blocks, state_step))
    ends = sums = x
    if segments > 1:
        ends = empty((batch, segments * pieces, *group))
        sums = empty((batch, segments * pieces, blocks * channels))
    w_after, w_before = empty((2, batch, *group)).unbind()
    if dh_last is not None:
        w_after = pack(dh_last, blocks * channels, *group[1:])
    A, (wide_B, wide_C) = A.contiguous(), wide.unbind()
    flags = {
        "M": M, "J": J, "CHANNELS": channels, "T": BACKWARD_T, "STAGES": BACKWARD_STAGES,
        "HAS_Z": z is not None, "HAS_BIAS": dt_bias is not None, "HAS_RESET": reset is not None,
        "SOFTPLUS": dt_softplus, "LOG": log, "FAST": FAST,
        "EVEN": d_inner == blocks * channels and seqlen % BACKWARD_T == 0, "num_warps": 1,
    }  # fmt: skip
    one = dict(zip(("M", "J", "CHANNELS"), lane_shape(d_state, 1), strict=True))
    one |= {"GROUP_J": J, "GROUP_C": channels}  # of the summary; e is stored as the kernel reads it
    gate = x if z is None else z
    bias, document = or_else(dt_bias, x), document_starts(reset, x)
    with device_of(x):
        for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
            stop = min(seqlen, start + steps)
            first_stop = ceil_div(stop, K) * K - (count - 1) * segment  # then whole segments
            if count > 1:
                tensors = (dt, gate, dy, A, wide_C, bias, document, ends, sums)
                fixed = (d_inner, d_state, *dt.stride(), *strides(z), *dy.stride())
                grid = (blocks * channels // one["CHANNELS"], (count - 1) * pieces, batch)
                free = (seqlen, first_stop, segment // pieces, count * pieces)
                launch(backward_summary_kernel, grid, tensors, free, fixed, **flags | one)
            tensors = (
                x, dt, gate, dy, A, wide_B, wide_C, or_else(D, x), bias, document, borders, scratch,
                ends, sums, w_after, w_before, dx, ddt, dx if z is None else dz, y, parts, totals,
            )  # fmt: skip
            has_w, earlier = int(i > 0 or dh_last is not None), sum(counts[:i]) * programs
            free = (seqlen, start, stop, first_stop, segment, steps, has_w, earlier, state_step)
            fixed = (d_inner, d_state, *x.stride(), *dt.stride(), *strides(z), *dy.stride())
            fixed += (dx.stride(1),)
            launch(
                backward_kernel, (blocks, count, batch), tensors, free, fixed,
                **flags, K=K, SWAP=swap, HAS_D=D is not None, DIRAC=rule == "dirac",
                AGAIN=room is not None, PIECES=pieces,
            )  # fmt: skip
            numbers = (stop - start) * 2 * states
            grid, free = (ceil_div(numbers, 128), batch, 1), (seqlen, start, numbers, steps, blocks)
            constants = {"M": M, "J": J, "SWAP": swap, "ROWS": 32, "SIZE": 128, "num_warps": 4}
            launch(sum_blocks_kernel, grid, (parts, dB, dC), free, (d_state,), **constants)
            w_after, w_before = w_before, w_after
        constants = {
            "M": M, "J": J, "CHANNELS": channels, "LOG": log, "HAS_D": D is not None,
            "HAS_BIAS": dt_bias is not None, "ROWS": 16, "SIZE": 64, "num_warps": 4,
        }  # fmt: skip
        launch(
            sum_totals_kernel, (ceil_div((states + 2) * channels, 64), blocks, 1),
            (totals, A, dA, dD if D is not None else dA, dbias if dt_bias is not None else dA),
            (len(totals), blocks), (d_inner, d_state), **constants,
        )  # fmt: skip
    if h0 is not None:
        dh0 = unpack(w_after, d_inner, d_state).to(h0.dtype)
    return [dx, ddt, dA, dB, dC, dD, dz, dh0, dbias]


def device_of(x: Tensor):
    """Triton launches on the current device, which need not be that of x."""
    there = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return NOTHING if there else torch.cuda.device(x.device)


NOTHING = contextlib.nullcontext()


def refuse_second_derivatives() -> None:
    """They would be silently zero: what the kernels do leaves no trace for autograd."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the Triton kernels have no second derivatives (create_graph=True): "
            "use mamba.py's scan='chunked'"
        )


class SelectiveScan(torch.autograd.Function):
    """The two as one differentiable function. It keeps its inputs, the borders and `wide`."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, h0, dt_bias, reset, dt_softplus, rule):
        tensors = (x, dt, A, B, C, D, z, h0, dt_bias, reset)
        y, h_last, *for_backward = scan_forward(*tensors, dt_softplus, rule, True)
        ctx.save_for_backward(*tensors, *for_backward)
        ctx.options = dt_softplus, rule
        ctx.set_materialize_grads(False)  # a gradient of h_last that nobody uses is None, not zeros
        return y, h_last

    @staticmethod
    def backward(ctx, dy, dh_last):
        refuse_second_derivatives()
        tensors = ctx.saved_tensors
        dy = torch.zeros_like(tensors[0]) if dy is None else dy
        gradients = scan_backward(dy, dh_last, *tensors, *ctx.options)
        needed = zip(gradients, ctx.needs_input_grad, strict=False)
        return *(g if need else None for g, need in needed), None, None, None


## ================================================================================================
## The public function, and what it takes
## ================================================================================================
##
## `takes` answers with yes or no, for a caller who has another way; what is called raises errors.

RULES = ("mamba", "dirac")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_STATE, MAX_WIDTH = 256, 4  # states of a channel, inputs of a filter
MAX_BATCH = 65535  # as many programs as a grid can have along its last axis
ELSE = "use mamba.py's scan='chunked'"


def fits(tensors: Iterable[Tensor | None], rule: str, d_state: int, d_conv: int) -> bool:
    """Whether the kernels have these dtypes, this rule and these sizes."""
    return (
        rule in RULES
        and 1 <= d_state <= MAX_STATE
        and 1 <= d_conv <= MAX_WIDTH
        # A list, not a generator: asked twice for each layer, and eager time is Python's time.
        and all([tensor is None or tensor.dtype in DTYPES for tensor in tensors])
    )


def takes(
    x: Tensor, *others: Tensor | None, rule: str = "mamba", d_state: int = 1, d_conv: int = 1
) -> bool:
    """Whether the kernels can run on x (b, l, d) and the others, and should.

    Not on a CPU, where the interpreter is for tests. Not under torch.func and torch.jit.trace,
    which want plain operators. That all are on x's device is for the call to check.
    """
    return (
        x.is_cuda
        and x.ndim == 3
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
        and len(x) <= MAX_BATCH
        and fits((x, *others), rule, d_state, d_conv)
    )


def check_tensors(tensors: dict[str, Tensor | None], shapes: dict[str, tuple]) -> None:
    """Shape, dtype and device of each; the first one is x."""
    x = tensors["x"]
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {tensor!r}")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} must be {shapes[name]}, got {tuple(tensor.shape)}")
        if name == "reset" and tensor.dtype != torch.bool:
            raise ValueError(f"reset must be torch.bool, got {tensor.dtype}")
        if name != "reset" and tensor.dtype not in DTYPES:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"{name} must be {names}, got {tensor.dtype}: {ELSE}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
    if len(x) > MAX_BATCH:
        raise ValueError(f"the batch must be at most {MAX_BATCH}, got {len(x)}: split it")
    check_device(x)


def check_rule(rule: str) -> None:
    if rule not in RULES:
        raise ValueError(f"the Triton kernels have the rules {RULES}, got {rule!r}: {ELSE}")


def check_inputs(rule: str, x: Tensor, A: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError for what the kernels cannot take, RuntimeError off the GPU."""
    check_rule(rule)
    if x.ndim != 3 or A.ndim != 2 or 0 in x.shape:
        raise ValueError(
            f"need x (b, l, d), not empty, and A (d, n), got {tuple(x.shape)}, {tuple(A.shape)}"
        )
    (b, seqlen, d), n = x.shape, A.shape[1]
    shapes = dict.fromkeys(("x", "dt", "z"), (b, seqlen, d)) | {
        "A": (d, n), "B": (b, seqlen, n), "C": (b, seqlen, n), "D": (d,), "dt_bias": (d,),
        "h0": (b, d, n), "reset": (b, seqlen),
    }  # fmt: skip
    check_tensors({"x": x, "A": A, **others}, shapes)
    if not 1 <= n <= MAX_STATE:
        raise ValueError(f"d_state must be from 1 to {MAX_STATE}, got {n}: {ELSE}")


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
    Differentiable (once) in every tensor but reset, h0 and h_last included; deterministic.
    A must be negative where time is cut, as it is in Mamba: exp(A ΣΔ) is not to overflow.
    rule: "mamba" (exp, Euler) or "dirac" (Ā = exp(ΔA), B̄ = B; x is then an impulse).

    Raises ValueError for shapes, dtypes and rules that do not fit, RuntimeError off the GPU.
    """
    tensors = dict(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, h0=h0, dt_bias=dt_bias, reset=reset)
    check_inputs(rule, **tensors)
    if wants_gradient(*tensors.values()):
        return SelectiveScan.apply(*tensors.values(), dt_softplus, rule)
    return scan_forward(*tensors.values(), dt_softplus, rule, False)[:2]


## Step 10. The convolution ------------------------------------------------------------------------
##
## Slow: PyTorch's convolution wants (b, d, l) where all else has (b, l, d), so that x is copied
## there and back, and SiLU reads and writes it once more. Memory is the limit.
##
## Changed: a program takes (b, l, d) as it is, walks along a strip of time and keeps the last W - 1
## inputs of its 128 channels in registers: x is read about once, the result written once.
##
##     pre_t = bias + Σ_k w_k x_{t-k}        out_t = silu(pre_t)        k = 0 ... W - 1 steps back
##
## Backward, with p_t the gradient of pre_t: dx_t = Σ_k w_k p_{t+k}. The same walk in the same
## direction: p_t is added to W sums that are under way, and the oldest of them is then complete. At
## the start of a document no term reaches back: f_k is 1 if steps t and t - k belong together.
##
## Gained: 8 x 1536 x 2048 backward 0.12 ms, where a kernel that read x at four shifts took 0.51 (an
## H200). By loads ahead, as in step 3, 0.114 -> 0.072, and forward 0.050 -> 0.042.

CONV_C, CONV_STEPS = 128, 16  # channels and, at least, steps of a program


@triton.jit
def conv_weights(weight, d, d_inner, W: tl.constexpr):
    """w_0 ... w_3: w_k is for the input k steps back; zero beyond the width of the filter."""
    p, m = weight + d * W + W - 1, d < d_inner
    w0 = tl.load(p, mask=m, other=0.0).to(tl.float32)
    w1 = tl.load(p - 1, mask=m & (W > 1), other=0.0).to(tl.float32)
    w2 = tl.load(p - 2, mask=m & (W > 2), other=0.0).to(tl.float32)
    w3 = tl.load(p - 3, mask=m & (W > 3), other=0.0).to(tl.float32)
    return w0, w1, w2, w3


@triton.jit
def input_before(x, past, t, d, d_inner, x_l, x_d, W: tl.constexpr):
    """x at a step before the strip, from the past if that is before the beginning."""
    m, t = d < d_inner, t + 0 * d
    b_x = tl.load(x + t * x_l + d * x_d, mask=m & (t >= 0), other=0.0).to(tl.float32)
    m_past = m & (t < 0) & (t >= 1 - W)
    return b_x + tl.load(past + d * (W - 1) + t + W - 1, mask=m_past, other=0.0).to(tl.float32)


@triton.jit
def continues(reset, t, seqlen, HAS_RESET: tl.constexpr):
    """1.0, or 0.0 if a document starts at step t."""
    if HAS_RESET:
        return 1.0 - tl.load(reset + t, mask=(t >= 0) & (t < seqlen), other=0).to(tl.float32)
    else:
        return 1.0


@triton.jit
def before_strip(
    x, past, reset, start, d, seqlen, d_inner, x_l, x_d, W: tl.constexpr, HAS_RESET: tl.constexpr
):
    """x of the last three steps before the strip, and f_1, f_2 of the last of them."""
    t = tl.cast(start, tl.int64)
    x1 = input_before(x, past, t - 1, d, d_inner, x_l, x_d, W)
    x2 = input_before(x, past, t - 2, d, d_inner, x_l, x_d, W)
    x3 = input_before(x, past, t - 3, d, d_inner, x_l, x_d, W)
    f1 = continues(reset, start - 1, seqlen, HAS_RESET)
    return x1, x2, x3, f1, f1 * continues(reset, start - 2, seqlen, HAS_RESET)


@triton.jit
def gated(pre, SILU: tl.constexpr, FAST: tl.constexpr):
    """silu(pre) and its derivative, or pre and 1."""
    if SILU:
        sigma = sigmoid(pre, FAST)
        return pre * sigma, sigma * (1.0 + pre - pre * sigma)
    else:
        return pre, tl.full(pre.shape, 1.0, tl.float32)


@triton.jit(do_not_specialize=["seqlen"])
def conv_forward_kernel(
    x, weight, bias, past, reset, out, seqlen, d_inner, x_b, x_l, x_d,
    W: tl.constexpr, STRIP: tl.constexpr, CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    i_t, i_d, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d, start = (i_d * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64), i_t * STRIP
    b_bias = load_channels(bias, d, d_inner, HAS_BIAS)
    w0, w1, w2, w3 = conv_weights(weight, d, d_inner, W)
    x, past = x + i_b * x_b, past + i_b * d_inner * (W - 1)
    reset, out = reset + i_b * seqlen, out + i_b * seqlen * d_inner
    x1, x2, x3, f1, f2 = before_strip(
        x, past, reset, start, d, seqlen, d_inner, x_l, x_d, W, HAS_RESET
    )
    # The compiler loads nothing ahead in a loop that hands on, as it is, what it was handed, as x1
    # for x2. It may not leave out "+ 0.0", which makes 0.0 of -0.0.
    for step in tl.range(start, min(seqlen, start + STRIP), num_stages=6):
        t = tl.cast(step, tl.int64)
        x0 = tl.load(x + t * x_l + d * x_d, mask=d < d_inner, other=0.0).to(tl.float32)
        same = continues(reset, step, seqlen, HAS_RESET)
        f1, f2, f3 = same, f1 * same, f2 * same
        pre = b_bias + w0 * x0 + f1 * (w1 * x1) + f2 * (w2 * x2) + f3 * (w3 * x3)
        b_out, _ = gated(pre, SILU, FAST)
        tl.store(out + t * d_inner + d, b_out.to(out.dtype.element_ty), mask=d < d_inner)
        x1, x2, x3 = x0, x1 + 0.0, x2 + 0.0


@triton.jit(do_not_specialize=["seqlen"])
def conv_backward_kernel(
    x, weight, bias, past, reset, dout, dx, dpast, dweight, dbias,
    seqlen, d_inner, x_b, x_l, x_d, g_b, g_l, g_d, dx_l,
    W: tl.constexpr, STRIP: tl.constexpr, CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dx and dpast; dweight and dbias summed over the strip, one row for each program in time."""
    i_t, i_d, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d, start = (i_d * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64), i_t * STRIP
    m = d < d_inner
    b_bias = load_channels(bias, d, d_inner, HAS_BIAS)
    w0, w1, w2, w3 = conv_weights(weight, d, d_inner, W)
    x, past = x + i_b * x_b, past + i_b * d_inner * (W - 1)
    dx, dpast = dx + i_b * seqlen * dx_l, dpast + i_b * d_inner * (W - 1)
    reset, dout = reset + i_b * seqlen, dout + i_b * g_b
    x1, x2, x3, f1, f2 = before_strip(
        x, past, reset, start, d, seqlen, d_inner, x_l, x_d, W, HAS_RESET
    )
    zero = tl.zeros([CHANNELS], tl.float32)
    s1, s2, s3 = zero, zero, zero  # dx of the last three steps, still without what comes
    dw0, dw1, dw2, dw3, db = zero, zero, zero, zero, zero
    for step in tl.range(start, start + STRIP + 3, num_stages=6):
        t = tl.cast(step, tl.int64)
        inside = m & (t + 0 * d < seqlen)
        x0 = tl.load(x + t * x_l + d * x_d, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(dout + t * g_l + d * g_d, mask=inside, other=0.0).to(tl.float32)
        same = continues(reset, step, seqlen, HAS_RESET)
        f1, f2, f3 = same, f1 * same, f2 * same
        pre = b_bias + w0 * x0 + f1 * (w1 * x1) + f2 * (w2 * x2) + f3 * (w3 * x3)
        _, slope = gated(pre, SILU, FAST)
        p = p * slope
        complete = s3 + f3 * (w3 * p)
        s1, s2, s3 = w0 * p, s1 + f1 * (w1 * p), s2 + f2 * (w2 * p)
        first = step - 3 + 0 * d
        m_dx = m & (first >= start) & (first < seqlen)
        tl.store(dx + (t - 3) * dx_l + d, complete.to(dx.dtype.element_ty), mask=m_dx)
        m_past = m & (first < 0) & (first >= 1 - W)
        o_past = d * (W - 1) + first + W - 1
        tl.store(dpast + o_past, complete.to(dpast.dtype.element_ty), mask=m_past)
        p = tl.where(step < start + STRIP, p, 0.0)  # the next strip counts the steps after this one
        dw0, dw1 = dw0 + p * x0, dw1 + f1 * (p * x1)
        dw2, dw3 = dw2 + f2 * (p * x2), dw3 + f3 * (p * x3)
        db += p
        x1, x2, x3 = x0, x1 + 0.0, x2 + 0.0
    row = (i_b * tl.num_programs(0) + i_t) * d_inner
    tl.store(dbias + row + d, db, mask=m)
    p_w = dweight + (row + d) * W + W - 1
    tl.store(p_w, dw0, mask=m)
    tl.store(p_w - 1, dw1, mask=m & (W > 1))
    tl.store(p_w - 2, dw2, mask=m & (W > 2))
    tl.store(p_w - 3, dw3, mask=m & (W > 3))


def conv_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, reset: Tensor | None, silu: bool,
    strip: int,
) -> tuple[tuple, tuple, dict]:  # fmt: skip
    """The grid, the tensors that both kernels read, and the constants of both."""
    grid = (ceil_div(x.shape[1], strip), ceil_div(x.shape[2], CONV_C), x.shape[0])
    tensors = (x, weight.contiguous(), or_else(bias, x), past.contiguous())
    flags = {
        "W": weight.shape[-1], "STRIP": strip, "CHANNELS": CONV_C, "HAS_BIAS": bias is not None,
        "HAS_RESET": reset is not None, "SILU": silu, "FAST": FAST, "num_warps": 1,
    }  # fmt: skip
    return grid, (*tensors, document_starts(reset, x)), flags


@operator(lambda x, *others: x.new_empty(x.shape))
def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, reset: Tensor | None, silu: bool
) -> Tensor:
    batch, seqlen, d_inner = x.shape
    out = x.new_empty(batch, seqlen, d_inner)
    grid, tensors, flags = conv_arguments(x, weight, bias, past, reset, silu, CONV_STEPS)
    with device_of(x):
        fixed = (d_inner, *x.stride())
        launch(conv_forward_kernel, grid, (*tensors, out), (seqlen,), fixed, **flags)
    return out


@operator(lambda dout, x, *others: empty_like_each(x, x, *others[:3]))
def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor,
    reset: Tensor | None, silu: bool, dx: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, in dx (b, l, d) if it is given, weight, bias (empty if none) and past."""
    batch, seqlen, d_inner = x.shape
    # A program reads three steps more than its own, and leaves sums: long strips, but 1536 of them.
    steps = batch * seqlen * ceil_div(d_inner, CONV_C) // 1536
    strip = min(128, max(CONV_STEPS, 2 ** steps.bit_length() // 2))
    grid, tensors, flags = conv_arguments(x, weight, bias, past, reset, silu, strip)
    dx = x.new_empty(batch, seqlen, d_inner) if dx is None else dx
    dpast = past.new_empty(past.shape)
    dweight = x.new_empty((batch * grid[0], *weight.shape), dtype=torch.float32)
    dbias = x.new_empty((batch * grid[0], d_inner), dtype=torch.float32)
    with device_of(x):
        fixed = (d_inner, *x.stride(), *dout.stride(), dx.stride(1))
        tensors = (*tensors, dout, dx, dpast, dweight, dbias)
        launch(conv_backward_kernel, grid, tensors, (seqlen,), fixed, **flags)
    dbias = x.new_empty(0) if bias is None else dbias.sum(0).to(bias.dtype)
    return [dx, dweight.sum(0).to(weight.dtype), dbias, dpast]


class CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, past, reset, silu):
        ctx.save_for_backward(x, weight, bias, past, reset)
        ctx.silu = silu
        return conv_forward(x, weight, bias, past, reset, silu)

    @staticmethod
    def backward(ctx, dout):
        refuse_second_derivatives()
        gradients = conv_backward(dout, *ctx.saved_tensors, ctx.silu)
        needed = zip(gradients, ctx.needs_input_grad, strict=False)
        return *(g if need else None for g, need in needed), None, None


def causal_conv_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, reset: Tensor | None = None,
    *, silu: bool = False,
) -> Tensor:  # fmt: skip
    """The convolution of mamba.py's `causal_conv`: x (b, l, d) of any strides -> out (b, l, d).

    weight (d, 1, W) with W at most 4, bias (d,), past (b, d, W - 1): the inputs before x, oldest
    first; reset (b, l) bool. Differentiable in x, weight, bias and past. Raises ValueError for a
    wider filter, RuntimeError off the GPU.
    """
    W = weight.shape[-1]
    if not 1 <= W <= MAX_WIDTH:
        raise ValueError(f"a filter is from 1 to {MAX_WIDTH} wide here, got {W}")
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"need x (b, l, d), not empty, got {tuple(x.shape)}")
    b, seqlen, d = x.shape
    shapes = {"weight": (d, 1, W), "bias": (d,), "past": (b, d, W - 1), "reset": (b, seqlen)}
    tensors = {"weight": weight, "bias": bias, "past": past, "reset": reset}
    check_tensors({"x": x, **tensors}, {"x": (b, seqlen, d), **shapes})
    if wants_gradient(x, weight, bias, past):
        return CausalConv.apply(x, weight, bias, past, reset, silu)
    return conv_forward(x, weight, bias, past, reset, silu)


## Step 11. The residual block ---------------------------------------------------------------------
##
## Slow: for a prompt and in training a block is about 25 operators of PyTorch, twice that backward,
## and starting one takes Python longer than many of them take the GPU.
##
## Changed: eight or nine kernels, and a backward pass that is written out, so that it keeps less:
## what is cheap is computed again, y by the scan's backward pass. Nothing is read only to be
## copied: the norm leaves a copy of the stream, to which out_proj's product is added in place. And
## gradients along time lie side by side, those of x before the convolution and of z as in_proj gave
## these: what follows, du and the gradient of in_proj, is one product each.
##
##     norm                  stream -> u, a copy     kept: the stream; u computed again
##     in_proj               u -> x before the convolution, z               kept: 2 b l d
##     convolution, silu     -> x                    computed again
##     x_proj                x -> low_rank, B, C     kept: b l (R + 2 n)
##     dt_proj               low_rank -> dt          computed again
##     scan, in two or three -> y, states            y again; kept: float32 b l d n / 64, 2 b l n
##     out_proj              copy + y W -> stream    the sum is the end of the product, in float32
##
## The products are those of cuBLAS, which sums in float32 and writes float32 where that is wanted:
## the stream, and gradients of float32 weights. Autocast rounds the weights once for both passes.
##
## Gained, 130m from a CUDA graph: a training step 86.4 -> 82.7 ms and 18.1 -> 15.3 GiB, a prompt of
## 2048 tokens 3.74 -> 3.24 ms. Later 79.6 -> 77.2 ms and 15.2 -> 14.1 GiB, step 10 included.


NORM_ROWS = 16  # of a program of the norm's backward pass


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed in float32 and, where cuBLAS can, rounded once, to dtype."""
    if a.is_cuda and dtype == torch.float32 != a.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def add_product(c: Tensor, a: Tensor, b: Tensor) -> None:
    """c += a @ b, rounded once where c is float32 or all are of one dtype."""
    if a.is_cuda and c.dtype == torch.float32 != a.dtype:
        torch.addmm(c, a, b, out_dtype=c.dtype, out=c)
    elif a.dtype == c.dtype:
        c.addmm_(a, b)
    else:
        c += a @ b


@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    stream, weight, du, dout, u, dstream, dweight, rows, eps,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """u again; dstream = dout + what comes through the norm; dweight of the rows of a program.

    With r = 1 / rms:  u = r w stream,  dstream = dout + r (w du - stream r² mean(stream w du)).
    """
    i, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    m = c < COLUMNS
    b_weight = tl.load(weight + c, mask=m, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BLOCK], tl.float32)
    for row in range(i * ROWS, min(rows, (i + 1) * ROWS)):
        o = row * COLUMNS + c
        v = tl.load(stream + o, mask=m, other=0.0).to(tl.float32)
        g = tl.load(du + o, mask=m, other=0.0).to(tl.float32)
        b_dout = tl.load(dout + o, mask=m, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(v * v, 0) / COLUMNS + eps)
        b_dweight += g * v * r
        g *= b_weight
        tl.store(u + o, (v * r * b_weight).to(u.dtype.element_ty), mask=m)
        b_dstream = b_dout + r * (g - v * (r * r * (tl.sum(v * g, 0) / COLUMNS)))
        tl.store(dstream + o, b_dstream.to(dstream.dtype.element_ty), mask=m)
    tl.store(dweight + i * COLUMNS + c, b_dweight, mask=m)


def norm_backward(
    du: Tensor, dout: Tensor, stream: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, d_model) each, contiguous -> u, dstream, dweight."""
    rows, columns = stream.shape
    programs = ceil_div(rows, NORM_ROWS)
    u, dstream = torch.empty_like(du), torch.empty_like(stream)
    dweight = stream.new_empty((programs, columns), dtype=torch.float32)
    with device_of(stream):
        tensors = (stream, weight, du, dout, u, dstream, dweight)
        constants = {"COLUMNS": columns, "BLOCK": next_power_of_2(columns)}
        constants |= {"ROWS": NORM_ROWS, "num_warps": 4}
        launch(norm_backward_kernel, (programs, 1, 1), tensors, (rows,), (eps,), **constants)
    return u, dstream, dweight.sum(0).to(weight.dtype)


class Weights(NamedTuple):
    """Of a ResidualBlock of mamba.py; as a tuple, autograd takes them."""

    norm: Tensor
    in_proj: Tensor
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_proj: Tensor
    out_bias: Tensor | None

    @classmethod
    def of(cls, layer: Any) -> Weights:
        block = layer.mixer  # Module.__getattr__ is slow, for twelve weights of every layer
        own, of = block._parameters, block._modules
        names = "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"
        in_proj, conv, x_proj, dt_proj, out_proj = [of[name]._parameters for name in names]
        return cls(
            layer.norm.weight, in_proj["weight"], in_proj["bias"], conv["weight"], conv["bias"],
            x_proj["weight"], dt_proj["weight"], dt_proj["bias"], own["A_log"], own["D"],
            out_proj["weight"], out_proj["bias"],
        )  # fmt: skip


def block_forward(
    stream: Tensor, past: Tensor, h0: Tensor | None, reset: Tensor | None, weights: Weights,
    eps: float, rule: str, dtype: torch.dtype, save: bool,
) -> tuple[Tensor, Tensor, Tensor, tuple]:  # fmt: skip
    """The next stream, what goes into the convolution, h_last, and what the backward pass needs."""
    w = weights
    matrices = w.in_proj, w.x_proj, w.dt_proj, w.out_proj
    rounded = [m if m.dtype == dtype else m.to(dtype) for m in matrices]
    in_proj, x_proj, dt_proj, out_proj = rounded
    (batch, seqlen, width), (d_inner, rank) = stream.shape, dt_proj.shape
    rows = stream.view(-1, width)
    out, u = norm_step(rows, w.norm, eps, dtype=dtype)  # of step 12; out: the copy of the stream
    if w.in_bias is None:
        xz = u @ in_proj.T
    else:
        xz = torch.addmm(w.in_bias.to(dtype), u, in_proj.T)
    raw, z = xz.view(batch, seqlen, 2 * d_inner).chunk(2, dim=-1)
    x = conv_forward(raw, w.conv, w.conv_bias, past, reset, True)
    projected = x.view(-1, d_inner) @ x_proj.T
    dt = (projected[:, :rank] @ dt_proj.T).view_as(x)
    B, C = projected.view(batch, seqlen, -1)[..., rank:].chunk(2, dim=-1)
    options = (w.D, z, h0, w.dt_bias, reset, True, rule, save, True)
    y, h_last, *states = scan_forward(x, dt, w.A_log, B, C, *options)
    add_product(out, y.view(-1, d_inner), out_proj.T)
    if w.out_bias is not None:
        out += w.out_bias
    return out.view_as(stream), raw, h_last, (raw, z, projected, *states, *rounded)


class Block(torch.autograd.Function):
    """block_forward, and its gradients line by line, from the last to the first."""

    @staticmethod
    def forward(ctx, stream, past, h0, reset, eps, rule, dtype, *weights):
        inputs, ctx.options = (stream, past, h0, reset, Weights(*weights)), (eps, rule)
        *outputs, kept = block_forward(*inputs, eps, rule, dtype, True)
        h0 = h0 if ctx.needs_input_grad[2] else None  # its gradient is all that it is kept for
        ctx.save_for_backward(stream, past, h0, reset, *weights, *kept)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, dout, draw_later, dh_last):
        refuse_second_derivatives()
        stream, past, h0, reset, *others = ctx.saved_tensors
        count, (eps, rule) = len(Weights._fields), ctx.options
        w, wants = Weights(*others[:count]), Weights(*ctx.needs_input_grad[-count:])
        raw, z, projected, borders, wide, in_proj, x_proj, dt_proj, out_proj = others[count:]
        (d_inner, n), rank = w.A_log.shape, dt_proj.shape[1]

        def of_matrix(wanted: bool, weight: Tensor, d_result: Tensor, u: Tensor) -> Tensor | None:
            return product(d_result.T, u, weight.dtype) if wanted else None

        def of_bias(bias: Tensor | None, d_result: Tensor) -> Tensor | None:
            return None if bias is None else d_result.sum(0, dtype=torch.float32).to(bias.dtype)

        dout = torch.zeros_like(stream) if dout is None else dout.contiguous()
        drows = dout.view(-1, stream.shape[-1])
        d_added = drows.to(raw.dtype)
        x = conv_forward(raw, w.conv, w.conv_bias, past, reset, True)
        low_rank, rows = projected[:, :rank], x.view(-1, d_inner)
        dt, dy = (low_rank @ dt_proj.T).view_as(x), (d_added @ out_proj).view_as(x)
        B, C = projected.view(*x.shape[:2], -1)[..., rank:].chunk(2, dim=-1)
        inputs = (x, dt, w.A_log, B, C, w.D, z, h0, w.dt_bias, reset, borders, wide, True, rule)
        room = x.new_empty(*x.shape[:2], 5, d_inner)  # for draw, dz, y, ddt, dx
        gradients = scan_backward(dy, dh_last, *inputs, True, room[:, :, 1:])
        _, _, d_A_log, dB, dC, dD, _, dh0, d_dt_bias = gradients
        dxz, y, ddt, dx = room.view(-1, 5 * d_inner).split((2 * d_inner, *[d_inner] * 3), dim=1)

        d_out_proj = of_matrix(wants.out_proj, w.out_proj, d_added, y)
        d_dt_proj = of_matrix(wants.dt_proj, w.dt_proj, ddt, low_rank)
        d_projected = torch.cat([ddt @ dt_proj, dB.view(-1, n), dC.view(-1, n)], dim=1)
        d_x_proj = of_matrix(wants.x_proj, w.x_proj, d_projected, rows)
        dx.addmm_(d_projected, x_proj)
        _, d_conv, d_conv_bias, dpast = conv_backward(
            room[:, :, 4], raw, w.conv, w.conv_bias, past, reset, True, room[:, :, 0]
        )
        if draw_later is not None:
            room[:, :, 0] += draw_later
        du = dxz @ in_proj
        u, dstream, d_norm = norm_backward(du, drows, stream.view(drows.shape), w.norm, eps)
        d_in_proj = of_matrix(wants.in_proj, w.in_proj, dxz, u)

        gradients = Weights(
            d_norm, d_in_proj, of_bias(w.in_bias, dxz), d_conv,
            None if w.conv_bias is None else d_conv_bias, d_x_proj, d_dt_proj, d_dt_bias, d_A_log,
            dD, d_out_proj, of_bias(w.out_bias, d_added),
        )  # fmt: skip
        dh0 = None if h0 is None else dh0
        return dstream.view_as(stream), dpast, dh0, None, None, None, None, *gradients


def takes_block(layer: Any, stream: Tensor) -> bool:
    """Whether residual_block_triton can run this layer of mamba.py, on a stream that is taken."""
    config, parts = layer.mixer.config, layer.mixer._modules
    if not all(["weight" in part._parameters for part in parts.values()]):
        return False
    w = Weights.of(layer)
    filters, dilation = w.conv.shape[1:], parts["conv1d"].dilation
    return (
        w.in_proj.dtype == w.x_proj.dtype == w.dt_proj.dtype == w.out_proj.dtype
        and w.dt_bias is not None
        and parts["x_proj"]._parameters["bias"] is None
        and (filters, dilation) == ((1, config.d_conv), (1,))
        and fits((stream, *w), config.rule, d_state=w.A_log.shape[1], d_conv=filters[-1])
    )


def residual_block_triton(
    layer: Any, stream: Tensor, past: Tensor, h0: Tensor | None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A ResidualBlock of mamba.py: stream (b, l, d_model) -> the next one, what went into the
    convolution (b, l, d), and h_last (b, d, n).

    past (b, d, W - 1), h0 (b, d, n) or None for zeros, reset (b, l) bool. Differentiable once, in
    every tensor and weight. Products take autocast's dtype, if it is on, else that of the weights.
    """
    weights, device = Weights.of(layer), stream.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weights.in_proj.dtype
    options = layer.norm.eps, layer.mixer.config.rule, dtype
    tensors = (stream.contiguous(), past.to(dtype), h0, reset)
    with torch.autocast(device, enabled=False) if autocast else NOTHING:
        if wants_gradient(stream, past, h0, *weights):
            return Block.apply(*tensors, *options, *weights)
        return block_forward(*tensors, weights, *options, False)[:3]


## Step 12. One token ------------------------------------------------------------------------------
##
## Slow: nothing runs in parallel over time, and for one sequence every weight is read once for one
## multiply-add. So the limit is the weights: 258 MB for 130m in bfloat16, 0.086 ms at 3.0 TB/s. As
## PyTorch operators a layer is about forty kernels, two microseconds each, however little they do.
##
## Changed: four kernels a layer.
##
##     1. norm, in_proj, convolution, silu    u -> x and z, the window moves on
##     2. x_proj                              x -> low_rank, B, C
##     3. dt_proj, the recurrence, the gate   -> y, the next h              (`state_step_kernel`)
##     4. out_proj, residual                  y -> u
##
## 1, 2 and 4 are products with something before and after. `first_step_kernel`, the plain form of
## one, has a program for each number of the result. Its norm costs no pass: W (u w / rms) =
## (W (u w)) / rms, so that one walk over u gives the product and the sum of squares.
##
## Gained: from the first four kernels to the last 0.402 -> 0.201 ms a token of 130m (one sequence,
## from a CUDA graph, several H100s), as listed below. The plain form is to read, and was not timed.


@triton.jit
def first_step_kernel(
    u, weight, norm, out, rows, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out (b, rows) = weight RMSNorm(u). A grid of (rows, b)."""
    i_r, i_b, k = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    products, squares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        m = start + k < COLUMNS
        b_u = tl.load(u + i_b * COLUMNS + start + k, mask=m, other=0.0).to(tl.float32)
        b_norm = tl.load(norm + start + k, mask=m, other=0.0).to(tl.float32)
        b_weight = tl.load(weight + i_r * COLUMNS + start + k, mask=m, other=0.0).to(tl.float32)
        squares += b_u * b_u
        products += b_weight * (b_u * b_norm)
    result = tl.sum(products, 0) / tl.sqrt(tl.sum(squares, 0) / COLUMNS + eps)
    tl.store(out + i_b * rows + i_r, result.to(out.dtype.element_ty))


## From there to `vector_step_kernel`, with ms of a token of 130m:
##
## 1. Several rows for a program, which asks memory for more at once and reads x less often. Not
##    timed, but 4096 numbers of the weight a program in place of 8192: 0.261 -> 0.243.
## 2. What comes after a product and needs only its own channel, such as the convolution, is done
##    where the row is: 0.402 -> 0.338. With channels side by side in its windows 0.243 -> 0.229.
## 3. From Hopper on a GPU can start a kernel while the last one runs (programmatic dependent
##    launch): 0.338 -> 0.261. What an earlier kernel of this token writes is touched only after a
##    wait; weights, window and state, which none of them writes, are loaded before: 0.229 -> 0.211.
##    The wait lasts until the kernel before has ended, and that one has waited too; the lookup of
##    the embedding, an ordinary kernel, waits for the token before. Programs that wait take up
##    room: with more sequences the state's kernel lets the next one start after its own wait only.
## 4. The weights are read again and again, in the same order. A cache that throws out what it has
##    not used for longest has thrown out each by the time it is wanted. "evict_first" says that it
##    may go at once: then others stay, of 130m's about a fifth: 0.220 -> 0.200.
## 5. Programs with the same rows of the weight, for different sequences, are neighbours and run at
##    the same time: one reads from memory, the others from the cache: 0.38 -> 0.30 for four.
##
## For more sequences the tensor cores have enough to do: `tile_step_kernel`, and seven kernels a
## layer. The norm is one of its own: inside the product the tile would go through registers, and
## every program would add up out_proj's parts again. And dt_proj no longer fits into the kernel of
## the state. A product of few rows makes few programs, and each reads memory only so fast: x_proj
## and out_proj are cut into parts, which the next kernel adds up.
##
##     1. residual, norm                     5. dt_proj
##     2. in_proj, convolution, silu         6. the recurrence, the gate
##     3. x_proj, in parts                   7. out_proj, in parts
##     4. their sum


@triton.jit
def wait_for_the_kernel_before(OVERLAP: tl.constexpr, NEXT_MAY_WAIT: tl.constexpr = True):
    if OVERLAP and NEXT_MAY_WAIT:
        tl.extra.cuda.gdc_launch_dependents()  # the next one may start, and wait here
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    if OVERLAP and not NEXT_MAY_WAIT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def shift_window(
    window, weight, bias, r, m_d, m_x, conv_j, W: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """(b, r) of the convolution without its newest input, whose weight (r) follows. window (b, r)
    points at the oldest input. It moves on, but for its newest place."""
    pre = tl.zeros(m_x.shape, tl.float32)
    for j in tl.static_range(W - 1):
        w = tl.load(weight + r * W + j, mask=m_d, other=0.0).to(tl.float32)
        pre += tl.load(window + j * conv_j, mask=m_x, other=0.0).to(tl.float32) * w[None, :]
    last_w = tl.load(weight + r * W + W - 1, mask=m_d, other=0.0).to(tl.float32)
    if HAS_BIAS:
        pre += tl.load(bias + r, mask=m_d, other=0.0).to(tl.float32)[None, :]
    tl.debug_barrier()  # some lanes have copies of a channel: all have read, then one writes
    for j in tl.static_range(W - 2):
        later = tl.load(window + (j + 1) * conv_j, mask=m_x)
        tl.store(window + j * conv_j, later, mask=m_x)
    return pre, last_w


@triton.jit
def convolve(result, pre, last_w, window, m_x, conv_j, W: tl.constexpr, FAST: tl.constexpr):
    """silu of the convolution for the rows that have one; `result` is its newest input."""
    raw = result.to(window.dtype.element_ty)
    pre += raw.to(tl.float32) * last_w[None, :]
    result = tl.where(m_x, pre * sigmoid(pre, FAST), result)
    if W > 1:
        tl.debug_barrier()
        tl.store(window + (W - 2) * conv_j, raw, mask=m_x)
    return result


@triton.jit
def vector_step_kernel(
    x, weight, bias, conv, conv_weight, conv_bias, residual, out, norm,
    rows, d_inner, x_b, conv_b, conv_d, conv_j, eps,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORM: tl.constexpr, CONV: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, FAST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out (b, rows) = f(weight norm(x) + bias) + residual: ROWS numbers for one row of x.

    BLOCK columns at a time. x_b and conv_b, conv_d, conv_j are strides.
    """
    # One row, but as an axis: without it the sums change their layout, and registers run out.
    b = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)
    r, k = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_r = r < rows
    m_out, o_out = m_r[None, :], b[:, None] * rows + r[None, :]
    ## Before the wait: what no other kernel of this token writes is loaded, the window is shifted.
    weight += r.to(tl.int64)[:, None] * COLUMNS + k[None, :]
    m_w = m_r[:, None] & (k < COLUMNS)[None, :]
    b_weight = tl.load(weight, mask=m_w, other=0.0, eviction_policy="evict_first")
    if HAS_BIAS:
        b_bias = tl.load(bias + r, mask=m_r, other=0.0).to(tl.float32)
    if CONV:
        m_d = r < d_inner
        m_x, window = m_d[None, :], conv + b[:, None] * conv_b + r[None, :] * conv_d
        pre, last_w = shift_window(
            window, conv_weight, conv_bias, r, m_d, m_x, conv_j, W, HAS_CONV_BIAS
        )
    wait_for_the_kernel_before(OVERLAP)
    if RESIDUAL:
        b_residual = tl.load(residual + o_out, mask=m_out, other=0.0).to(tl.float32)
    x += b[:, None] * x_b + k[None, :]
    ## Lanes multiply and add, for the eight numbers that each loads at once; the sum is at the end.
    SUMS: tl.constexpr = BLOCK // 8
    products, squares = tl.zeros([ROWS, SUMS], tl.float32), tl.zeros([1, SUMS], tl.float32)
    for start in tl.static_range(0, COLUMNS, BLOCK):
        m_k = start + k < COLUMNS
        b_x = tl.load(x + start, mask=m_k[None, :], other=0.0).to(tl.float32)
        if start > 0:
            m_w = m_r[:, None] & m_k[None, :]
            b_weight = tl.load(weight + start, mask=m_w, other=0.0, eviction_policy="evict_first")
        if NORM:
            squares += tl.sum(tl.reshape(b_x * b_x, [1, SUMS, 8]), 2)
            b_x *= tl.load(norm + start + k, mask=m_k, other=0.0).to(tl.float32)[None, :]
        products += tl.sum(tl.reshape(b_weight.to(tl.float32) * b_x, [ROWS, SUMS, 8]), 2)
    result = tl.sum(products, 1)[None, :]
    if NORM:
        result = result / tl.sqrt(tl.sum(squares, 1) / COLUMNS + eps)[:, None]
    if HAS_BIAS:
        result += b_bias[None, :]
    if CONV:
        result = convolve(result, pre, last_w, window, m_x, conv_j, W, FAST)
    if RESIDUAL:
        result += b_residual
    tl.store(out + o_out, result.to(out.dtype.element_ty), mask=m_out)


@triton.jit
def multiply(b_x, b_weight, result, FAST: tl.constexpr):
    """result (b, r) + x (b, k) weight (r, k), in the weight's dtype."""
    b_x = b_x.to(b_weight.dtype)
    if not FAST:  # Triton's interpreter has no products of short floats
        b_x, b_weight = b_x.to(tl.float32), b_weight.to(tl.float32)
    return tl.dot(b_x, tl.trans(b_weight), result, input_precision="ieee")


@triton.jit
def tile_step_kernel(
    x, weight, bias, conv, conv_weight, conv_bias, out,
    batch, rows, d_inner, x_b, conv_b, conv_d, conv_j,
    COLUMNS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BATCH: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, W: tl.constexpr,
    HAS_BIAS: tl.constexpr, CONV: tl.constexpr, HAS_CONV_BIAS: tl.constexpr, FAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """out (parts, b, rows) = f(weight x + bias): a tile of ROWS x BATCH numbers.

    Each part is the product of PART columns, BLOCK of them at a time; the first has the bias.
    AHEAD: the first BLOCK of the weight is loaded before the wait.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(1) * BATCH + tl.arange(0, BATCH)).to(tl.int64)
    k = tl.program_id(2) * PART + tl.arange(0, BLOCK)
    m_r, m_b = r < rows, b < batch
    m_out = m_b[:, None] & m_r[None, :]
    o_out = (tl.program_id(2) * batch + b)[:, None] * rows + r[None, :]
    weight += r.to(tl.int64)[:, None] * COLUMNS + k[None, :]
    if AHEAD:
        first_weight = tl.load(weight, mask=m_r[:, None] & (k < COLUMNS)[None, :], other=0.0)
    if HAS_BIAS:
        end = tl.where(tl.program_id(2) == 0, rows, 0)
        b_bias = tl.load(bias + r, mask=r < end, other=0.0).to(tl.float32)
    if CONV:
        m_d = r < d_inner
        m_x = m_b[:, None] & m_d[None, :]
        window = conv + b[:, None] * conv_b + r[None, :] * conv_d
        pre, last_w = shift_window(
            window, conv_weight, conv_bias, r, m_d, m_x, conv_j, W, HAS_CONV_BIAS
        )
    wait_for_the_kernel_before(OVERLAP)
    x += b[:, None] * x_b + k[None, :]
    if AHEAD:
        first_x = tl.load(x, mask=m_b[:, None] & (k < COLUMNS)[None, :], other=0.0)
    result = tl.zeros([BATCH, ROWS], tl.float32)
    for start in tl.range(BLOCK if AHEAD else 0, PART, BLOCK, num_stages=STAGES):
        m_k = start + k < COLUMNS
        b_x = tl.load(x + start, mask=m_b[:, None] & m_k[None, :], other=0.0)
        b_weight = tl.load(weight + start, mask=m_r[:, None] & m_k[None, :], other=0.0)
        result = multiply(b_x, b_weight, result, FAST)
    if AHEAD:
        result = multiply(first_x, first_weight, result, FAST)
    if HAS_BIAS:
        result += b_bias[None, :]
    if CONV:
        result = convolve(result, pre, last_w, window, m_x, conv_j, W, FAST)
    tl.store(out + o_out, result.to(out.dtype.element_ty), mask=m_out)


@triton.jit
def norm_step_kernel(
    u, weight, added, stream, out, batch, eps,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, STORE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """stream = u + the sum of added (parts, b, columns), if any; out = RMSNorm(stream). One row."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    m = c < COLUMNS
    b_weight = tl.load(weight + c, mask=m, other=0.0).to(tl.float32)
    wait_for_the_kernel_before(OVERLAP)
    b_u = tl.load(u + row * COLUMNS + c, mask=m, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):
        b_u += tl.load(added + (part * batch + row) * COLUMNS + c, mask=m, other=0.0)
    if STORE:
        b_u = b_u.to(stream.dtype.element_ty)
        tl.store(stream + row * COLUMNS + c, b_u, mask=m)
        b_u = b_u.to(tl.float32)
    b_out = b_u / tl.sqrt(tl.sum(b_u * b_u, 0) / COLUMNS + eps) * b_weight
    tl.store(out + row * COLUMNS + c, b_out.to(out.dtype.element_ty), mask=m)


@triton.jit
def sum_step_kernel(
    parts, out, numbers, PARTS: tl.constexpr, SIZE: tl.constexpr, OVERLAP: tl.constexpr
):
    """out = the sum of parts (parts, numbers)."""
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    wait_for_the_kernel_before(OVERLAP)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * numbers + o, mask=o < numbers, other=0.0)
    tl.store(out + o, total, mask=o < numbers)


@triton.jit
def state_step_kernel(
    xz, low_rank, dt, dt_weight, dt_bias, A_log, D, h, y, d_inner, d_state, rank,
    CHANNELS: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    HAS_DT: tl.constexpr, DIRAC: tl.constexpr, FAST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """y (b, d) = the gated output; the next h in the place of h. One row, some channels.

    low_rank (b, rank + 2 n): x_proj's product. dt_proj's is dt (b, d), or computed here.
    """
    i_b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n, r, m = tl.arange(0, N), tl.arange(0, RANK), c < d_inner
    m_n, m_r = m[:, None] & (n < d_state)[None, :], m[:, None] & (r < rank)[None, :]
    o_n = c[:, None] * d_state + n[None, :]
    if not HAS_DT:
        b_weight = tl.load(dt_weight + c[:, None] * rank + r[None, :], mask=m_r, other=0.0)
    b_A2 = tl.load(A_log + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_A2 = exp2(b_A2 * LOG2E, FAST) * -LOG2E
    b_bias = tl.load(dt_bias + c, mask=m, other=0.0).to(tl.float32)
    b_D = tl.load(D + c, mask=m, other=0.0).to(tl.float32)
    h += i_b * d_inner * d_state + o_n
    b_h = tl.load(h, mask=m_n, other=0.0)
    wait_for_the_kernel_before(OVERLAP, not HAS_DT)
    xz += i_b * 2 * d_inner + c
    b_x = tl.load(xz, mask=m, other=0.0).to(tl.float32)
    b_z = tl.load(xz + d_inner, mask=m, other=0.0).to(tl.float32)
    low_rank += i_b * (rank + 2 * d_state)
    b_B = tl.load(low_rank + rank + n, mask=n < d_state, other=0.0)
    b_C = tl.load(low_rank + rank + d_state + n, mask=n < d_state, other=0.0)
    if HAS_DT:
        b_dt = tl.load(dt + i_b * d_inner + c, mask=m, other=0.0)
    else:
        b_low = tl.load(low_rank + r, mask=r < rank, other=0.0)
        b_dt = tl.sum(b_weight.to(tl.float32) * b_low[None, :], 1)
    b_delta, _ = softplus(b_dt + b_bias, True, FAST)
    b_v = b_x
    if not DIRAC:
        b_v = b_x * b_delta
    b_h = exp2(b_delta[:, None] * b_A2, FAST) * b_h + b_v[:, None] * b_B[None, :]  # (2a)
    tl.store(h, b_h, mask=m_n)
    b_y = (tl.sum(b_h * b_C[None, :], 1) + b_D * b_x) * b_z * sigmoid(b_z, FAST)  # (2b)
    tl.store(y + i_b * d_inner + c, b_y.to(y.dtype.element_ty), mask=m)


@functools.cache
def overlap_options(device: torch.device, overlap: bool) -> dict:
    """Programmatic dependent launch, where the GPU has it.

    overlap False: this kernel starts after the one before, but lets the next one start early.
    """
    if FAST and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"OVERLAP": True, "launch_pdl": overlap}
    return {"OVERLAP": False}


PROCESSORS = 132  # of an H100


def few(batch: int, d_model: int) -> bool:
    """Whether products are done lane by lane, with every weight read for each row."""
    return batch <= min(5, max(1, 6144 // d_model))


def vector_tile(rows: int, columns: int, batch: int) -> tuple[int, int, int]:
    """For one program of vector_step_kernel: rows of the weight, columns at a time, warps."""
    ROWS, warps = 16, 4
    while ROWS > 1 and rows * batch < 2 * PROCESSORS * ROWS:  # two programs for a processor or more
        ROWS //= 2
    if batch == 1 and rows < columns > 2048 and ROWS >= 4:  # out_proj of wide models: long rows
        ROWS, warps = 4, 8
    numbers = 4096 if columns < 2048 else 8192
    return ROWS, min(max(8, next_power_of_2(columns)), numbers // ROWS), warps


def matrix_tile(rows: int, columns: int, batch: int, size: int, split: bool) -> dict[str, Any]:
    """For one program of tile_step_kernel: its rows, columns and columns at a time, how many of
    these are in flight, and whether the first is loaded before the wait.

    size: bytes of a number. split: the columns may be split.
    """
    BATCH, ROWS = min(64, max(16, next_power_of_2(batch))), 32 if batch <= 64 else 64
    small = rows < 512 or columns <= 256  # x_proj, dt_proj: the first block is loaded ahead
    if small:
        BLOCK, ROWS, parts, stages = 256, 16 if split else 32, 8, 3
    elif split:  # out_proj
        BLOCK, parts, stages = 256 if columns <= 2048 else 128, 2 if columns < 2048 else 4, 3
    else:
        BLOCK, parts, stages = 128, 1, 6 if columns <= 1024 else 3
    BLOCK = min(BLOCK * 2 // size, max(16, next_power_of_2(columns)))
    PART = BLOCK * ceil_div(columns, BLOCK * (parts if split else 1))
    tile = {"ROWS": ROWS, "BATCH": BATCH, "BLOCK": BLOCK, "PART": PART}
    return tile | {"STAGES": stages, "AHEAD": small}


def linear_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None,
    conv: tuple[Tensor, Tensor, Tensor | None] | None, overlap: bool,
) -> tuple[tuple, tuple, dict[str, Any]]:  # fmt: skip
    """Tensors, numbers and constants that the kernels of both products have in common."""
    rows, columns = weight.shape
    if x.stride(1) != 1 or x.shape[1] < columns or not weight.is_contiguous():
        raise ValueError(f"need x (b, {columns} or more) in rows, and a contiguous weight")
    window, conv_weight, conv_bias = conv or (x.new_empty(0, 0, 0), x, None)
    shapes = (len(x), rows // 2, conv_weight.shape[-1] - 1), (rows // 2, 1, conv_weight.shape[-1])
    if conv is not None and (window.shape, conv_weight.shape) != shapes:
        raise ValueError(f"need windows {shapes[0]} and filters {shapes[1]}")
    filters = conv_weight if conv is None else conv_weight.contiguous()
    tensors = (x, weight, or_else(bias, x), window, filters, or_else(conv_bias, x))
    flags = {
        "COLUMNS": columns, "W": window.shape[-1] + 1, "HAS_BIAS": bias is not None,
        "CONV": conv is not None, "HAS_CONV_BIAS": conv_bias is not None, "FAST": FAST,
        **overlap_options(x.device, overlap),
    }  # fmt: skip
    return tensors, (rows, rows // 2, x.stride(0), *window.stride()), flags


def vector_step(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Tensor | None = None,
    eps: float = 1e-5, conv: tuple[Tensor, Tensor, Tensor | None] | None = None,
    residual: Tensor | None = None, dtype: torch.dtype | None = None, overlap: bool = False,
) -> Tensor:  # fmt: skip
    """conv(weight RMSNorm(x) + bias) + residual: x (b, columns or more) -> (b, rows), in dtype.

    norm: the weight of the norm, or None. conv: for the first half of the rows, with SiLU, windows
    (b, rows / 2, W - 1), which move on, filters (rows / 2, 1, W) and bias. residual: (b, rows).
    dtype None: the weight's. x has rows of stride 1; weight and residual are contiguous, else
    ValueError. overlap: it may start while kernels before it run. None of them may write weight,
    bias, norm or filters, and all must have started after the windows' last use had ended.
    """
    tensors, numbers, flags = linear_arguments(x, weight, bias, conv, overlap)
    batch, (rows, columns) = len(x), weight.shape
    if residual is not None and (residual.shape != (batch, rows) or not residual.is_contiguous()):
        raise ValueError(f"residual must be ({batch}, {rows}) and contiguous")
    out = x.new_empty((batch, rows), dtype=dtype or weight.dtype)
    ROWS, BLOCK, warps = vector_tile(rows, columns, batch)
    with device_of(x):
        vector_step_kernel[(batch, ceil_div(rows, ROWS))](
            *tensors, or_else(residual, x), out, or_else(norm, x), *numbers, eps,
            ROWS=ROWS, BLOCK=BLOCK, NORM=norm is not None, RESIDUAL=residual is not None,
            num_warps=warps, **flags,
        )  # fmt: skip
    return out


def tile_step(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    conv: tuple[Tensor, Tensor, Tensor | None] | None = None, dtype: torch.dtype | None = None,
    split: bool = False, overlap: bool = False,
) -> Tensor:  # fmt: skip
    """conv(weight x + bias), as vector_step has it, for more rows of x.

    split: in parts, (parts, b, rows), whose sum it is. Not with conv, else ValueError.
    """
    if split and conv is not None:
        raise ValueError("a convolution needs the whole product: it cannot be split")
    tensors, numbers, flags = linear_arguments(x, weight, bias, conv, overlap)
    batch, (rows, columns) = len(x), weight.shape
    tile = matrix_tile(rows, columns, batch, weight.element_size(), split)
    grid = (ceil_div(rows, tile["ROWS"]), ceil_div(batch, tile["BATCH"]))
    parts = ceil_div(columns, tile["PART"])
    out = x.new_empty((parts, batch, rows), dtype=dtype or weight.dtype)
    with device_of(x):
        tile_step_kernel[(*grid, parts)](*tensors, out, batch, *numbers, **tile, **flags)
    return out if split else out[0]


def norm_step(
    u: Tensor, weight: Tensor, eps: float, added: Tensor | None = None, overlap: bool = False,
    *, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """u (b, columns) and what is still to be added to it, float32 (parts, b, columns) -> their sum,
    in u's dtype, and its RMSNorm, in the weight's.

    overlap: as in vector_step. dtype: the norm's; the sum is then new, in the wider of both dtypes.
    """
    batch, columns = u.shape
    parts = 0 if added is None else len(added)
    if not u.is_contiguous() or (parts and added.shape != (parts, batch, columns)):
        raise ValueError("need u (b, columns), contiguous, and added (parts, b, columns) or None")
    out, store = u.new_empty((batch, columns), dtype=dtype or weight.dtype), bool(parts or dtype)
    wide = u.dtype if dtype is None else torch.promote_types(u.dtype, dtype)
    stream = torch.empty_like(u, dtype=wide) if store else u
    constants = {
        "COLUMNS": columns, "BLOCK": next_power_of_2(columns), "PARTS": parts,
        "STORE": store, **overlap_options(u.device, overlap),
    }  # fmt: skip
    with device_of(u):
        tensors = (u, weight.contiguous(), or_else(added, u), stream, out)
        launch(norm_step_kernel, (batch, 1, 1), tensors, (), (batch, eps), **constants)
    return stream, out


def sum_step(parts: Tensor) -> Tensor:
    """parts (p, ...) float32, contiguous -> their sum (...)."""
    out, SIZE = torch.empty_like(parts[0]), 256
    constants = {"PARTS": len(parts), "SIZE": SIZE, **overlap_options(parts.device, True)}
    with device_of(parts):
        sum_step_kernel[(ceil_div(out.numel(), SIZE),)](parts, out, out.numel(), **constants)
    return out


def state_step(
    block: Any, xz: Tensor, low_rank: Tensor, dt: Tensor | None, h: Tensor, rule: str
) -> Tensor:
    """x and z (b, 2 d), x_proj's product and dt_proj's, if it is there -> y (b, d), and the next h
    in the place of h."""
    batch, (d_inner, d_state), rank = len(xz), block.A_log.shape, block.dt_proj.weight.shape[1]
    y, CHANNELS = xz.new_empty(batch, d_inner), 16 if dt is None else 64
    tensors = (block.dt_proj.weight, block.dt_proj.bias, block.A_log, block.D, h, y)
    constants = {
        "CHANNELS": CHANNELS, "N": next_power_of_2(d_state), "HAS_DT": dt is not None,
        "RANK": next_power_of_2(rank), "DIRAC": rule == "dirac", "FAST": FAST,
        "num_warps": 2, **overlap_options(xz.device, True),
    }  # fmt: skip
    with device_of(xz):
        state_step_kernel[(ceil_div(d_inner, CHANNELS), batch)](
            xz, low_rank, or_else(dt, xz), *tensors, d_inner, d_state, rank, **constants
        )
    return y


def block_step(
    layer: Any, u: Tensor, conv: Tensor, h: Tensor, added: Tensor | None = None, *,
    rule: str = "mamba", overlap: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A ResidualBlock of mamba.py for one token: u (b, d_model) and what is still to be added to it
    -> the same for the next block. No gradients.

    added: None, or float32 (parts, b, d_model): for many sequences a block leaves its share to the
    norm of the next one. conv (b, d, W - 1), of any strides, and h (b, d, n) float32 are changed in
    place. All but conv are contiguous, the weights of one dtype; else, and for other rules than
    "mamba" and "dirac", ValueError. overlap: conv, h and weights are used while the kernel before
    may still run: another, ordinary kernel must have been launched since they were last used, as
    the lookup of the embedding is in every step of a model.
    """
    check_rule(rule)
    block, (norm, eps) = layer.mixer, (layer.norm.weight, layer.norm.eps)
    in_proj, out_proj, dt_weight = block.in_proj, block.out_proj, block.dt_proj.weight
    if not all(tensor.is_contiguous() for tensor in (u, h, dt_weight, block.A_log, block.D)):
        raise ValueError("u, h and the weights must be contiguous")
    if h.shape != (len(u), *block.A_log.shape):
        raise ValueError(f"need h {(len(u), *block.A_log.shape)}, got {tuple(h.shape)}")
    window, options = (conv, block.conv1d.weight, block.conv1d.bias), {"overlap": True}
    if added is None and few(*u.shape):
        before = {"norm": norm, "eps": eps, "overlap": overlap}
        xz = vector_step(u, in_proj.weight, in_proj.bias, conv=window, **before)
        low_rank = vector_step(xz, block.x_proj.weight, dtype=torch.float32, **options)
        y = state_step(block, xz, low_rank, None, h, rule)
        options |= {"residual": u, "dtype": u.dtype}
        return vector_step(y, out_proj.weight, out_proj.bias, **options), None
    u, normed = norm_step(u, norm, eps, added, overlap)
    xz = tile_step(normed, in_proj.weight, in_proj.bias, conv=window, **options)
    options["dtype"] = torch.float32
    low_rank = sum_step(tile_step(xz, block.x_proj.weight, split=True, **options))
    dt = tile_step(low_rank, dt_weight, **options)
    y = state_step(block, xz, low_rank, dt, h, rule)
    return u, tile_step(y, out_proj.weight, out_proj.bias, split=True, **options)


## Step 13. The choice of a token ------------------------------------------------------------------
##
## Slow: top-p keeps the most probable tokens that make up p, and to find them one sorts: 50,000
## numbers, twenty kernels, longer than a step of mamba-130m.
##
## Changed: whether one token is kept is seen without an order: if those that are more probable make
## up less than p. So draw one from all, look, and if it is not kept, draw again from those that
## were more probable. Every token that is kept is better than every one that is not: all of them
## stay among the candidates, and in each draw their odds to each other are those of the cut. (min-p
## keeps the best too.) A token that fails leaves with all that are no better, so the draws end, at
## the latest with the best: in the mean 1 + ln(1/p) of them, 1.1 for p = 0.9. Two walks over the
## row come first, and each draw takes two and a bit. (To draw: the last token whose predecessors in
## the vocabulary have no more than a uniform number's share of all that may be drawn.)
##
## Gained: 224 to 288 -> 31 µs for a row of 50,277 logits.


@triton.jit
def weigh(row, start, vocab, top, scale, v_than, i_than, SIZE: tl.constexpr, FAST: tl.constexpr):
    """The weights of SIZE tokens, e^((logit - top) / temperature), a probability up to a factor; 0
    for those that are not better than token i_than, with logit v_than. Of equals the first is."""
    i = start + tl.arange(0, SIZE)
    v = tl.load(row + i, mask=i < vocab, other=-float("inf")).to(tl.float32)
    better = (i < vocab) & ((v > v_than) | ((v == v_than) & (i < i_than)))
    # The largest becomes 0 first: a tiny temperature would make it inf, and inf - inf is NaN.
    return tl.where(better, exp2((v - top) * scale, FAST), 0.0)


@triton.jit
def weigh_all(row, vocab, top, scale, v_than, i_than, SIZE: tl.constexpr, FAST: tl.constexpr):
    """The sum of the weights of all tokens that are better."""
    total = tl.zeros([SIZE], tl.float32)
    for start in range(0, vocab, SIZE):
        total += weigh(row, start, vocab, top, scale, v_than, i_than, SIZE, FAST)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["vocab", "scale", "top_p", "min_p"])
def sample_kernel(
    logits, seeds, out, vocab, scale, top_p, min_p, logits_b, SIZE: tl.constexpr, FAST: tl.constexpr
):
    """One token of one row. scale = log2 e / temperature."""
    i_b, i = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    row, seed = logits + i_b * logits_b, tl.load(seeds + i_b)
    best = tl.full([SIZE], -float("inf"), tl.float32)
    for start in range(0, vocab, SIZE):
        v = tl.load(row + start + i, mask=start + i < vocab, other=-float("inf"))
        best = tl.maximum(best, v.to(tl.float32))
    top = tl.max(best, 0)
    # All are better than a token that is not there.
    v_than, token = tl.full([], -float("inf"), tl.float32), tl.full([], 2**31 - 1, tl.int32)
    everything = weigh_all(row, vocab, top, scale, v_than, token, SIZE, FAST)
    rest, draws, drawing = everything, tl.full([], 0, tl.int32), everything > 0
    while drawing:
        wanted = tl.rand(seed, draws) * rest
        before, place = tl.full([], 0.0, tl.float32), tl.full([], 0, tl.int32)
        before_place = before
        for start in range(0, vocab, SIZE):
            some = tl.sum(weigh(row, start, vocab, top, scale, v_than, token, SIZE, FAST), 0)
            here = (some > 0) & (before <= wanted)
            place, before_place = tl.where(here, start, place), tl.where(here, before, before_place)
            before += some
        weights = weigh(row, place, vocab, top, scale, v_than, token, SIZE, FAST)
        before_each = before_place + tl.cumsum(weights, 0) - weights
        token = place + tl.max(tl.where((weights > 0) & (before_each <= wanted), i, 0), 0)
        v_than = tl.load(row + token).to(tl.float32)
        rest = weigh_all(row, vocab, top, scale, v_than, token, SIZE, FAST)
        # The best one, which has nothing before it, is kept whatever its weight.
        cut = (rest >= top_p * everything) | (exp2((v_than - top) * scale, FAST) < min_p)
        drawing = (rest > 0) & cut
        draws += 1
    tl.store(out + i_b, tl.where(everything > 0, token, 0).to(tl.int64))


def sample_triton(
    logits: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, min_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """`sample` of generate.py, without top-k: logits (b, vocab) -> token ids (b,), int64.

    The same odds, but other tokens for the same generator. temperature is above 0. Logits are
    float32, bfloat16 or float16, rows of stride 1, else ValueError. RuntimeError off the GPU.
    """
    batch, vocab = logits.shape
    if logits.dtype not in DTYPES or logits.stride(1) != 1:
        found = f"{logits.dtype} with strides {logits.stride()}"
        raise ValueError(f"need rows of float32, bfloat16 or float16, with stride 1, got {found}")
    check_device(logits)
    seeds = torch.randint(2**31, (batch,), generator=generator, device=logits.device)
    out = torch.empty_like(seeds)
    SIZE = min(8192, max(32, next_power_of_2(vocab)))
    # Temperatures beyond float32 would make 0 / 0 and inf / inf.
    scale = LOG2E.value / min(max(temperature, 1e-30), 1e30)
    with device_of(logits):
        # Floats: a variant that was compiled for an integer takes no other.
        free = vocab, scale, float(top_p), float(min_p)
        constants = {"SIZE": SIZE, "FAST": FAST, "num_warps": max(1, SIZE // 512)}
        tensors, fixed = (logits, seeds, out), (logits.stride(0),)
        launch(sample_kernel, (batch, 1, 1), tensors, free, fixed, **constants)
    return out


## Step 14. The step, recorded ---------------------------------------------------------------------
##
## Slow: a GPU is done with a small kernel in two microseconds; Python takes longer to start it.
##
## Changed: the launches of one step are recorded once, as a CUDA graph, with the addresses of all
## their tensors, and then replayed by a single call. What changes from token to token, ids, state
## and logits, has to stay in its place: a graph has buffers for these, and overwrites its state,
## which `model.step` never does. (Not timed apart: step 12 is in ms of the graph.)
##
## Nothing of mamba.py is imported. Used of a model: `embed`, `step`, `init_state`, the modules with
## its weights, of its config `rule`, `scan` and `d_state`; of a state: conv (layers, b, d, W - 1),
## h (layers, b, d, n), and that its type makes a new one from these two.


def fused_step(model: Any, token_ids: Tensor, state: Any) -> Tensor:
    """The logits of `model.step`, in four or seven kernels a layer. Changes the state in place."""
    u, added = model.embed(token_ids), None
    options = {"rule": model.config.rule, "overlap": True}
    for i, layer in enumerate(model.backbone["layers"]):
        u, added = block_step(layer, u, state.conv[i], state.h[i], added, **options)
    norm, head = model.backbone["norm_f"], model.lm_head.weight
    if few(*u.shape):
        return vector_step(u, head, norm=norm.weight, eps=norm.eps, overlap=True)
    return tile_step(norm_step(u, norm.weight, norm.eps, added, True)[1], head, overlap=True)


def can_fuse(model: Any) -> bool:
    """Whether the kernels have this rule, these dtypes and sizes, and may be used."""
    config, weights = model.config, list(model.parameters())
    return (
        config.scan in ("auto", "triton")
        and fits(weights, config.rule, config.d_state, d_conv=1)  # these windows have any width
        and all(p.dtype == weights[0].dtype and p.is_contiguous() for p in weights)
    )


class StepGraph:
    """`model.step` for one batch size, recorded as a CUDA graph: token ids in, logits out.

    It reads the parameters where they lie, and does not keep the model.
    """

    @torch.inference_mode(False)  # its buffers will be written to outside of that mode as well
    @torch.no_grad()
    def __init__(self, model: Any, batch: int) -> None:
        device = model.lm_head.weight.device
        self.token_ids = torch.zeros(batch, dtype=torch.long, device=device)
        state = model.init_state(batch)
        # Channels side by side, one step after the other, because the kernels read them so.
        windows = state.conv.movedim(-1, 1).contiguous().movedim(1, -1)
        self.state = type(state)(windows, state.h)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.run(model)  # what is done only once, such as compiling, must not be recorded
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits = self.run(model)

    def run(self, model: Any) -> Tensor:
        if can_fuse(model):
            return fused_step(model, self.token_ids, self.state)
        logits, state = model.step(self.token_ids, self.state)
        self.load(state)
        return logits

    def load(self, state: Any) -> None:
        for buffer, given in ((self.state.conv, state.conv), (self.state.h, state.h)):
            if given.shape != buffer.shape:
                raise ValueError(f"need a state {tuple(buffer.shape)}, got {tuple(given.shape)}")
            buffer.copy_(given)

    def __call__(self, token_ids: Tensor) -> Tensor:
        self.token_ids.copy_(token_ids)
        self.graph.replay()
        return self.logits


## The last graph of each model is kept. Who uses it takes it out: two generations with one model
## must not share its buffers. (Use a model in one CUDA stream.)

graphs: weakref.WeakKeyDictionary[Any, tuple[Any, StepGraph]] = weakref.WeakKeyDictionary()


class RecordedStep:
    """What `step_graph` yields: step(token_ids) -> logits, and step.state()."""

    def __init__(self, model: Any, state: Any) -> None:
        self.model, self.start = model, state
        self.graph: StepGraph | None = None
        self.key: Any = None  # all that the graph depends on
        self.ended = False

    def check_not_ended(self) -> None:
        if self.ended:
            raise RuntimeError("this step has ended: use it inside of `with step_graph(...)`")

    @torch.no_grad()
    def __call__(self, token_ids: Tensor) -> Tensor:
        """(b,) -> logits (b, padded_vocab_size), overwritten by the next call."""
        self.check_not_ended()
        batch = self.start.h.shape[1]
        if token_ids.shape != (batch,):
            raise ValueError(f"need token ids ({batch},), got {tuple(token_ids.shape)}")
        if self.graph is None:
            weights = [(p.data_ptr(), p.dtype, p.stride()) for p in self.model.parameters()]
            self.key = (batch, repr(self.model.config), weights)
            last_key, last = graphs.pop(self.model, (None, None))
            self.graph = last if last_key == self.key else StepGraph(self.model, batch)
            self.graph.load(self.start)
        return self.graph(token_ids)

    def state(self) -> Any:
        """The state after the last token, as a copy."""
        self.check_not_ended()
        now = self.start if self.graph is None else self.graph.state
        copies = (t.clone(memory_format=torch.contiguous_format) for t in (now.conv, now.h))
        return type(now)(*copies)


@contextlib.contextmanager
def step_graph(model: Any, state: Any) -> Iterator[RecordedStep]:
    """`model.step` as a CUDA graph: token ids (b,) -> logits, from this state on.

    The state is copied and stays as it is. For a model on a GPU, made of mamba.py's modules, with
    no hooks and outside of autocast, all of which a graph would pass by. Where the fused kernels do
    not take the model (float64, rule "zoh") `model.step` is recorded. Changes of parameters in
    place count from the next token on, new parameters from the next `step_graph` on.
    """
    step = RecordedStep(model, state)
    try:
        yield step
    finally:
        if step.graph is not None:
            graphs[model] = step.key, step.graph
        step.graph, step.ended = None, True


## A check -----------------------------------------------------------------------------------------


def reference(x, dt, A, B, C, D, z, dt_bias):
    """The recurrence, written out, in the precision of its inputs."""
    delta = torch.nn.functional.softplus(dt + dt_bias)
    h, ys = x.new_zeros(x.shape[0], *A.shape), []
    for t in range(x.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h
        h = h + (delta[:, t] * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(1)
        ys.append((h * C[:, t].unsqueeze(1)).sum(-1))
    return (torch.stack(ys, 1) + D * x) * torch.nn.functional.silu(z)


def random_inputs(batch: int, seqlen: int, d_inner: int, d_state: int, device) -> list:
    x, dt, z = (torch.randn(batch, seqlen, d_inner, device=device) for _ in range(3))
    A = -torch.exp(torch.randn(d_inner, d_state, device=device) / 2)
    B, C = (torch.randn(batch, seqlen, d_state, device=device) for _ in range(2))
    D, dt_bias = torch.randn(2, d_inner, device=device)
    return [x, dt, A, B, C, D, z, dt_bias - 4]


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not INTERPRETED:
        raise SystemExit("no GPU: set TRITON_INTERPRET=1 to check the kernels, slowly, on the CPU")
    sizes = (2, 200, 64) if device.type == "cuda" else (1, 9, 5)
    inputs = [t.requires_grad_() for t in random_inputs(*sizes, 16, device)]
    y, _ = selective_scan_triton(*inputs[:-1], dt_bias=inputs[-1])
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    expected = reference(*doubles)
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, inputs, dy)
    wanted = torch.autograd.grad(expected, doubles, dy.double())
    names = "y dx ddt dA dB dC dD dz ddt_bias".split()
    for name, ours, theirs in zip(names, (y, *gradients), (expected, *wanted), strict=True):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        print(f"{name:8}  relative error against float64  {error:.1e}")
        if error > 1e-4:
            raise SystemExit(f"{name} is wrong")


if __name__ == "__main__":
    main()
