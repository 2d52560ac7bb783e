"""Mamba, the selective state space model, in one file that is meant to be read.

    Albert Gu and Tri Dao: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    arXiv 2312.00752v2. Equation and section numbers below are this paper's.

    import torch, mamba
    model = mamba.Mamba.from_pretrained("state-spaces/mamba-130m")  # or a local folder
    logits = model(input_ids)                                       # (b, l) -> (b, l, vocab)
    block = mamba.MambaBlock(mamba.MambaConfig(d_model=64))         # a layer for your own network
    y = block(torch.randn(2, 100, 64))                              # (b, l, d_model) in and out

Part I is Mamba. Part II runs the same recurrence faster. Part III checks, loads and saves.

Symbols. Capital letters belong to the state space model (SSM), lowercase letters are signals or
axes: b batch, l seqlen, d d_inner (channels), n d_state (states of a channel).

    stream  (b, l, d_model)  the residual stream, to which every block adds
    u       (b, l, d_model)  input of a Mamba block: the stream, normed
    raw, z  (b, l, d)        what in_proj makes of u: the input of a short convolution, and the gate
    x, y    (b, l, d)        input and output of the SSM; x comes out of the convolution
    dt      (b, l, d)        what dt_proj makes of the token, for
    delta   (b, l, d)        Δ = softplus(dt + bias), the step size: how much the token counts.
                             softplus(a) = log(1 + e^a); the bias is dt_proj's
    A       (d, n)           how fast each state decays, negative; learned
    B, C    (b, l, n)        what is written into the state, what is read out of it; from the token
    D       (d,)             the direct path from x to y; learned
    h       (b, d, n)        the state, always float32 (float64 for float64 inputs)
    A_bar, B_bar  (b, d, n)  Ā and B̄: A and B for one step of length Δ

Their names in the paper's Algorithm 2 and in other codes: a table at the end of part II.

The core of Mamba in numbers: one channel, one state, A = -1, B = C = 1, from h = 0. Each token has
its own Δ, which gives Ā = exp(ΔA) and B̄ = ΔB. Then h_t = Ā h_{t-1} + B̄ x_t and y_t = C h_t.

    x     Δ       Ā       B̄       y = h
    3     1       0.368   1       0.368 · 0    + 1    · 3  =  3       is written into the state
    7     0.01    0.990   0.01    0.990 · 3    + 0.01 · 7  =  3.04    is nearly skipped
    5     4       0.018   4       0.018 · 3.04 + 4    · 5  =  20.06   takes the place of the past
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

## ================================================================================================
## Part I: Mamba
## ================================================================================================
##
## Lines that begin with ## teach; comments with a single # protect the code. Functions called
## check_... raise errors (part III), `companion` finds a GPU kernel (part II): read past them.
##
## A sequence model turns the inputs x_1 ... x_t into an output y_t, for every t. Attention keeps
## all past inputs and looks through them again at each step. A recurrent model keeps a summary of
## fixed size, the state h, and must decide at each step what to write into it and what to let go.
##
## A state space model is the plainest such recurrence, borrowed from control theory. A signal x(t)
## drives a state h(t), and the output reads the state; in continuous time, and in steps of Δ:
##
##     h'(t) = A h(t) + B x(t)     (1a)          h_t = Ā h_{t-1} + B̄ x_t     (2a)
##     y(t)  = C h(t)              (1b)          y_t = C h_t                 (2b)
##
## with Ā and B̄ computed from Δ, A and B (`discretize`). x_t and y_t are one number each; h_t, B and
## C have n, and C h is a sum over n. A, in general n x n, is diagonal here, n numbers: each state
## decays at its own rate, none mix, and exp(ΔA) is n plain exponentials. A layer runs d such SSMs
## side by side, one for each channel, and stores their A as (d, n).
##
## In S4 (arXiv 2111.00396) Δ, A, B and C are the same at every step. Unroll (2a), and powers of one
## Ā appear: y_t = C B̄ x_t + C Ā B̄ x_{t-1} + C Ā² B̄ x_{t-2} + ... This is a convolution with one
## filter as long as the text (eq. 3), which a fast Fourier transform computes for all t at once.
## But it treats every token alike: it cannot keep this name and skip that filler word. (Written
## out, Mamba's sum is an l x l matrix for each channel, as attention's is, but has no softmax. It
## is never formed.)
##
## Mamba's one idea is selection: Δ, B and C are computed from the current input (`select`). Ā now
## differs at every step, so there is no such filter. What is left is (2a) itself, to be run as a
## scan: like a cumulative sum, it yields a result at every position, each from the one before.
##
## An LSTM or GRU gates its memory too, but its gates read h_{t-1}, through a matrix and a sigmoid:
## nobody can compute step t + 1 before step t is done. Here Ā_t and B̄_t read only the input. Given
## these, (2a) is linear in h, and linear steps can be merged before h is known ("The combine"). And
## with n = 16 a channel remembers at 16 time scales and, through B and C, 16 different things.
##
## A layer remembers d x n numbers for the SSM and d x (d_conv - 1) for its short convolution:
## 24 layers x 1536 x (16 + 3) x 4 bytes = 2.8 MB a sequence for mamba-130m in float32, after ten
## tokens and after a million. A transformer of that width, 12 layers of attention and 12 of MLPs,
## caches 12 x (key + value) x 768 x 4 bytes for each token: 2.8 MB at token 38. The price: a state
## of fixed size cannot hold everything. A long random string, or a long phone book, takes more bits
## than it has (arXiv 2402.01032; examples/recall.py counts). Selection chooses what to lose. And
## the shape sets no limit to the length, but the training does: the published models saw 2048
## tokens at a time. Beyond, h holds a longer past than they have learned to read: they get worse.


@dataclass
class MambaConfig:
    """Every number that defines a model; `MambaConfig(d_model=64)` is enough for one block. Raises
    ValueError for values of the wrong type or size. (In the official names dt_... means Δ.)"""

    d_model: int  # width of the stream (the paper's D; its code has D for the direct path, as here)
    n_layer: int = 1
    vocab_size: int = 50277  # rows of the embedding that stand for tokens: sample no other
    d_state: int = 16  # the paper's N: states per channel
    d_conv: int = 4  # width of the causal convolution
    expand: float = 2  # the paper's E: d_inner = E * d_model
    dt_rank: int | str = "auto"  # the paper's R: rank of the projection to Δ. "auto": d_model / 16
    rule: str = "mamba"  # how A and B are discretised: see `discretize`
    bias: bool = False  # in in_proj and out_proj
    conv_bias: bool = True
    dt_min: float = 0.001  # Δ starts log-uniform in [dt_min, dt_max] ...
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4  # ... and not below this
    dt_init: str = "random"  # dt_proj.weight starts "random" (uniform) or "constant" ...
    dt_scale: float = 1.0  # ... times this
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True  # lm_head.weight is embedding.weight
    pad_vocab_size_multiple: int = 8  # rows are rounded up to it: matrix units like multiples
    tokenizer: str | None = None  # "bytes": token i is byte i. None: see generate.py
    scan: str = "auto"  # how to run the recurrence, not what it is: never saved. See part II

    def __post_init__(self) -> None:
        check_config(self)
        if self.dt_rank == "auto":
            self.dt_rank = math.ceil(self.d_model / 16)

    @property
    def d_inner(self) -> int:
        return int(self.expand * self.d_model)

    @property
    def padded_vocab_size(self) -> int:  # 50280 in the published files
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple


## The language model ------------------------------------------------------------------------------
##
## Token ids become vectors, n_layer residual blocks transform them, a norm and a matrix turn them
## into logits: scores of every possible next token. There are no positions, no attention heads:
## order enters through the recurrence and the convolution. Each star is one block at one time:
##
##     layers[2]    *-----*-----*-----*-----*     The state moves right (time), the stream moves up.
##                  |     |     |     |     |     A star needs the star to its left (the state of
##     layers[1]    *-----*-----*-----*-----*     the same layer, one token earlier) and the star
##                  |     |     |     |     |     below (the same token, one layer down).
##     layers[0]    *-----*-----*-----*-----*     `forward`: row by row, bottom to top. One layer
##                  |     |     |     |     |     over all time (a scan), then the next. Training.
##     embedding   t=1   t=2   t=3   t=4   t=5    `step`: column by column, left to right. All
##                                                layers for one token, then the next. Generation.
##
## Both give the same numbers up to rounding (sums in another order: 1e-6 in float32). A completion
## takes both: `forward` for the prompt (prefill), which leaves a state behind, then step by `step`.


class Mamba(nn.Module):
    """The language model of the paper: embedding, residual blocks, norm, logits.

    Module names equal the keys of the published checkpoints (state-spaces/mamba-*).

        logits = model(input_ids)                      # (b, l) -> (b, l, padded_vocab_size)
        state = model.init_state(b)                    # or what an earlier call has returned
        logits, state = model(input_ids, state)        # the same, continuing from a state
        logits, state = model.step(token_ids, state)   # (b,) -> (b, padded_vocab_size)

    Raises ValueError for what does not fit, IndexError for an id without a row. In part III:
    from_pretrained, save_pretrained, param_groups (optimisers).
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        embedding = torch.empty(config.padded_vocab_size, config.d_model)
        if not embedding.is_meta:  # shapes without numbers have nothing to initialise
            nn.init.normal_(embedding, std=0.02)
        self.backbone = nn.ModuleDict()
        self.backbone["embedding"] = nn.Embedding.from_pretrained(embedding, freeze=False)
        layers = (ResidualBlock(config) for _ in range(config.n_layer))
        self.backbone["layers"] = nn.ModuleList(layers)
        self.backbone["norm_f"] = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the embedding and lm_head be one matrix, when the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(
        self, input_ids: Tensor, state: MambaState | None = None, *, reset: Tensor | None = None,
        head: Callable[[Tensor], Any] | None = None,
    ) -> Any:  # fmt: skip
        """(b, l) ids -> logits (b, l, padded_vocab_size); with a state, (logits, next state).

        reset (b, l) bool: True where a new document starts, in all layers. head: called in place of
        lm_head, on (b, l, d_model), and what it returns stands in place of the logits: for a loss
        that never holds all logits at once, or a prompt, of which only the last ones count.
        """
        check_ids(self.config, input_ids, 2, state)
        start = self.init_state(len(input_ids)) if state is None else state
        stream, next_states = self.embed(input_ids), []
        for i, layer in enumerate(self.backbone.layers):
            stream, next_state = layer(stream, start[i], reset=reset)
            next_states.append(next_state)
        logits = (self.lm_head if head is None else head)(self.backbone.norm_f(stream))
        return logits if state is None else (logits, MambaState.stack(next_states))

    def step(self, token_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """One token: (b,) ids and the state before it -> logits (b, padded_vocab_size), state."""
        check_ids(self.config, token_ids, 1, state)
        stream, next_states = self.embed(token_ids), []
        for i, layer in enumerate(self.backbone.layers):
            stream, next_state = layer(stream, state[i])
            next_states.append(next_state)
        return self.lm_head(self.backbone.norm_f(stream)), MambaState.stack(next_states)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (...) -> the stream before the first block, (..., d_model)."""
        ## Small additions to a bfloat16 number of size 100 would be rounded away, layer after
        ## layer: the stream is float32 (float32 + bfloat16 gives float32) even if all else is not.
        stream = self.backbone.embedding(ids)
        return at_least_float32(stream) if self.config.residual_in_fp32 else stream

    def init_state(self, batch: int) -> MambaState:
        """The state before the first token: zeros, with the layers stacked in front."""
        layers = self.backbone.layers
        return MambaState.stack([layers[0].mixer.init_state(batch)] * len(layers))


class ResidualBlock(nn.Module):
    """stream + mixer(norm(stream)). A block adds to the stream and never overwrites it: gradients
    reach every layer along the plain sum. mixer: stands in place of a MambaBlock."""

    def __init__(self, config: MambaConfig, mixer: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MambaBlock(config) if mixer is None else mixer

    def forward(self, stream: Tensor, state: MambaState, **options) -> tuple[Tensor, MambaState]:
        if kernels := kernels_for(self, stream):  # the same in fewer kernels: see part II
            return fused_block(kernels, self, stream, state, **options)
        correction, state = self.mixer(self.norm(stream), state, **options)
        return stream + correction, state


class RMSNorm(nn.Module):
    """stream / sqrt(mean(stream²) + eps) * weight, in float32, returned in weight's dtype."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps  # keeps the gradient finite where the stream is all zeros, as padding may be
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, stream: Tensor) -> Tensor:
        stream, weight = at_least_float32(stream, self.weight)
        return F.rms_norm(stream, weight.shape, weight, self.eps).to(self.weight.dtype)


## The Mamba block ---------------------------------------------------------------------------------
##
##        u (b, l, d_model)
##        |
##      in_proj ------------------.        Two projections of u, each d = expand * d_model wide.
##        | raw                   | z
##      conv1d, silu              |        x_t has seen raw_t and its three left neighbours.
##        | x                     |
##        |----> select: dt, B, C |        What this token wants kept, written and read.
##        |        |              |
##      selective scan           silu      The recurrence (2a), (2b): here, and only here,
##        |        + D x          |        information travels along time over any distance.
##        | y                     |
##        `--------- * -----------'        The gate. silu(a) = a sigmoid(a)
##                   |
##                out_proj -> (b, l, d_model)
##
## Channels mix in the projections and nowhere else. The convolution (not S4's: d_conv = 4 taps):
## Δ, B and C should depend on more than a bare token. "Not" means something else after "why". Four
## inputs side by side are cheap, and a recurrence is poor at exactly this: it smears the past by
## exponentials and has no sharp view of "two tokens ago". So B_t may be a key made of the token
## before: what follows it is stored under it, and when it comes again C asks for that. The gate z
## multiplies what the scan recalls by what the current token has to say, as in a gated MLP. There
## is no other MLP: two blocks have the weights, 6 d_model² each, of an attention (4) with its MLP
## (8), hence 24 layers for 12 + 12. D x: without it x_t could reach y_t only through the state.


class MambaBlock(nn.Module):
    """The paper's Figure 3. Raises ValueError for shapes that do not fit.

    out = block(u)                     (b, l, d_model) -> (b, l, d_model), from the zero state
    out, state = block(u, state)       the same, continuing: prefill, truncated back-propagation
    out, state = block.step(u, state)  one token, u and out (b, d_model)
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        d, n, rank = config.d_inner, config.d_state, config.dt_rank
        self.in_proj = nn.Linear(config.d_model, 2 * d, bias=config.bias)
        self.conv1d = nn.Conv1d(d, d, config.d_conv, groups=d, bias=config.conv_bias)
        self.x_proj = nn.Linear(d, rank + 2 * n, bias=False)
        self.dt_proj = DeltaProjection(rank, d)  # a Linear that leaves its bias to selective_scan
        self.A_log = nn.Parameter(torch.empty(d, n))
        self.D = nn.Parameter(torch.empty(d))
        self.out_proj = nn.Linear(d, config.d_model, bias=config.bias)
        mark_parameters(self)  # for the optimisers and initialisers of others: see part III
        if not self.D.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The official initialisation, where it is not PyTorch's own. Run no generic one after it:
        all biases zero would be Δ = softplus(0) = 0.69, a memory of one or two tokens."""
        config = self.config
        ## A = -1, -2, ..., -n in every channel (S4D-Real, arXiv 2206.11893): state number i fades
        ## to 1/e in 1 / (Δ i) tokens. n states are n time scales.
        self.A_log.copy_(torch.arange(1, config.d_state + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)

        ## Δ starts log-uniform in [0.001, 0.1]: time scales from 10 to 1000 tokens for A = -1, as
        ## many channels below 100 as above. This start lives in dt_proj's bias (Algorithm 2's
        ## "Parameter"; what the token adds is small at first), which is softplus inverted:
        ## bias = log(e^Δ - 1) = Δ + log(1 - e^-Δ).
        bound = config.dt_scale * config.dt_rank**-0.5
        lower = bound if config.dt_init == "constant" else -bound
        nn.init.uniform_(self.dt_proj.weight, lower, bound)
        log_min, log_max = math.log(config.dt_min), math.log(config.dt_max)
        delta = torch.empty_like(self.dt_proj.bias).uniform_(log_min, log_max).exp()
        delta = delta.clamp(min=config.dt_init_floor)
        # expm1 keeps the digits that 1 - exp(-delta) loses for small delta.
        self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))

        ## n_layer blocks add to the stream: its variance is not to grow n_layer-fold.
        self.out_proj.reset_parameters()
        self.out_proj.weight /= math.sqrt(config.n_layer)
        if config.bias:
            nn.init.zeros_(self.in_proj.bias)
            nn.init.zeros_(self.out_proj.bias)

    ## A is negative, because Ā = exp(ΔA) must stay below 1 or the state would grow without bound.
    ## (Backwards, too, a step multiplies by Ā: along time gradients fade and cannot grow.) -exp(.)
    ## is negative whatever the optimiser does, and an update changes a rate of decay by a factor
    ## and not by an amount. Weight decay would pull every rate towards 1, and dt's bias to 0, which
    ## is Δ to 0.69; norms and D are scales that start at 1, where decay would close a path. It is
    ## for matrices, the convolution's too (`param_groups`, part III).

    @property
    def A(self) -> Tensor:
        """(d, n), negative, float32."""
        return -torch.exp(at_least_float32(self.A_log))

    ## One `forward` for both: for one token the axis l is not there, the convolution (its code is
    ## in part II) is one sum, and the scan one application of (2a), (2b).
    ##
    ##     x_t = silu(bias + Σ_j weight_j raw_{t - (d_conv - 1) + j}),   j = 0 ... d_conv - 1
    ##
    ## Padding on the left would enter the convolution and, by way of x, the state: even a zero
    ## becomes silu(bias). With reset[row, first real token] = True padding is a document before the
    ## text: Ā = 0 forgets it, the convolution does not reach back, and what comes out on it means
    ## nothing. Padding on the right is not seen by the tokens to its left, but the returned state
    ## has read it: pad prompts on the left. Time runs one way, and only the last position has seen
    ## all: classify from it. To read from both sides takes two blocks (examples/recipes.py).

    def forward(
        self, u: Tensor, state: MambaState | None = None, *, reset: Tensor | None = None
    ) -> Tensor | tuple[Tensor, MambaState]:
        """u (b, l, d_model), or one token, (b, d_model), and the state before it.

        reset (b, l) bool: True where a new document starts; nothing crosses that point.
        """
        config = self.config
        check_block(config, u, state, reset)
        start = self.init_state(len(u)) if state is None else state
        raw, z = self.in_proj(u).chunk(2, dim=-1)  # (b, l, d) each
        x, conv = causal_conv(raw, self.conv1d, start.conv, reset, scan=config.scan)
        dt, B, C = self.select(x)
        y, h = selective_scan(
            x, dt, self.A, B, C, self.D, z, start.h, dt_bias=self.dt_proj.bias,
            rule=config.rule, reset=reset, scan=config.scan,
        )  # fmt: skip
        out = self.out_proj(y)
        return out if state is None else (out, MambaState(conv, h))

    def step(self, u: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """One token: u (b, d_model) and the state before it -> (b, d_model), next state."""
        check_token(self.config, u)
        return self(u, state)

    ## Selection. Here a token decides what happens to the memory. From x_t, which through the
    ## convolution knows of this token and the three before it, come
    ##   B_t  (n numbers)  what to write: x_t is added to state i in proportion to B_t[i];
    ##   C_t  (n numbers)  what to read: the output is the sum of the states weighted by C_t[i];
    ##   Δ_t  (d numbers)  how much this token counts, in each channel.
    ## B_t and C_t are the same for all channels, as a key and a query are for all of a head (their
    ## own for each would be 2 d n numbers); what a channel writes depends on its own x_t and Δ_t.
    ##
    ## Δ is the one to understand. It multiplies both A and B:  h_t = exp(Δ A) h_{t-1} + Δ B x_t.
    ##   Δ -> 0:    exp(Δ A) -> 1 and Δ B -> 0. The state stays as it is and the token is skipped.
    ##   Δ -> inf:  exp(Δ A) -> 0 and Δ B -> inf. The past is forgotten, the token takes over.
    ## These belong together: Δ is a step in time, and a long step is at once a long time to decay
    ## and a long time under the influence of this input. (It is no clock's time, but the token's;
    ## for events at known times there is examples/event_time.py.) With n = 1, A = -1, B = 1 and
    ## B̄ = 1 - Ā (rule "zoh" below) it is a gate, g = sigmoid(dt + bias), since exp(-softplus(a)) =
    ## 1 - sigmoid(a): h_t = (1 - g) h_{t-1} + g x_t, the paper's Theorem 1. A needs no selection:
    ## ΔA depends on the token already. (Ā and B̄ straight from the token would be 2 d n numbers,
    ## with nothing to tie forgetting to writing.)
    ##
    ## softplus is positive, nearly 0 for very negative numbers and nearly the identity for large
    ## ones. softplus(bias) is a channel's step before a token says anything: a small one is a long
    ## memory. dt has low rank: a d x d matrix would have as many weights as in_proj, but tokens do
    ## not differ in that many ways as to how much they count. x_proj gives R = d_model / 16 numbers
    ## for it, dt_proj makes them d, and `selective_scan` adds the bias and takes the softplus.

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., d) -> dt (..., d) without its bias, B (..., n), C (..., n)."""
        n, rank = self.config.d_state, self.config.dt_rank
        low_rank, B, C = self.x_proj(x).split([rank, n, n], dim=-1)
        return self.dt_proj(low_rank), B, C

    def init_state(self, batch: int) -> MambaState:
        """The state before the first token: zeros."""
        config, device, dtype = self.config, self.D.device, self.D.dtype
        conv = torch.zeros(batch, config.d_inner, config.d_conv - 1, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        h = torch.zeros(batch, config.d_inner, config.d_state, device=device, dtype=wide)
        return MambaState(conv, h)


class DeltaProjection(nn.Linear):
    """A Linear whose bias `selective_scan` adds, in float32: it starts at -7 to -2, and bfloat16
    would round away much of what is added. (With a plain Linear no dt_bias, or it counts twice.)"""

    def forward(self, low_rank: Tensor) -> Tensor:
        return F.linear(low_rank, self.weight)


@dataclass
class MambaState:
    """All that a block, or a model (with an axis of layers in front), remembers. A value, which
    nothing here changes, and which cannot be shortened as a cache of keys can: to go back, keep an
    earlier one. `torch.save(vars(state), file)`, and to go on `MambaState(**torch.load(file))`;
    `state.map(Tensor.cuda)`; `state[:, parents]` for beams."""

    conv: Tensor  # (b, d, d_conv - 1): the last raw inputs of the convolution, oldest first
    h: Tensor  # (b, d, n): the state of the SSM, float32 (float64 in a float64 model)

    @classmethod
    def stack(cls, states: list[MambaState]) -> MambaState:
        return cls(torch.stack([s.conv for s in states]), torch.stack([s.h for s in states]))

    def map(self, function: Callable[[Tensor], Tensor]) -> MambaState:
        return MambaState(function(self.conv), function(self.h))

    def __getitem__(self, index: Any) -> MambaState:
        """state[i] is layer i of a model's state, state[:, rows] some rows of it."""
        return self.map(lambda tensor: tensor[index])

    def detach(self) -> MambaState:
        """Back-propagation stops here: for training on window after window (truncated)."""
        return self.map(torch.detach)


## Discretisation ----------------------------------------------------------------------------------
##
## (1a) speaks of continuous time. Over one step of length Δ, with A and B constant, what does it do
## to h? Without input, h' = A h gives h(t + Δ) = exp(ΔA) h(t): that is Ā. How the input enters
## depends on what one assumes x to be between the samples. The last two columns: where h ends if
## x = 1 for ever, A = -1 and B = 1; the exact solution of (1a) ends at 1.
##
##                                                                      Δ = 0.1   Δ = 4
##   "mamba"     Ā = exp(ΔA)                  B̄ = ΔB                     1.051    4.075
##   "zoh"       Ā = exp(ΔA)                  B̄ = (exp(ΔA) - 1) / A · B  1.000    1.000
##   "bilinear"  Ā = (1 + ΔA/2) / (1 - ΔA/2)  B̄ = ΔB / (1 - ΔA/2)        1.000    1.000
##   "dirac"     Ā = exp(ΔA)                  B̄ = B                     10.508    1.019
##
## A departure from the paper: it prints "zoh" (zero-order hold, eq. 4, where Δ cancels: x_t holds
## for the step that ends at t; in forward Euler x_{t-1} would, and h_t not know its own token). But
## the code that trained the published checkpoints runs "mamba", as its authors confirm
## (github.com/state-spaces/mamba, issue 114). zoh's B̄ is Δ (1 + ΔA/2 + ...) B; "mamba" keeps the
## first term. What is left out is a factor near 1 for small ΔA and 1/2 at ΔA = -1.6; the weights
## were trained without it. The same shortcut for Ā would be wrong: 1 + ΔA leaves (-1, 1) once
## ΔA < -2, and the state explodes. "bilinear" is S4's choice, the trapezoid rule; "dirac" takes x
## for impulses that add B x, however long the step.

RULES = ("mamba", "zoh", "bilinear", "dirac")


def discretize(delta: Tensor, A: Tensor, B: Tensor, rule: str = "mamba") -> tuple[Tensor, Tensor]:
    """delta (..., d), A (d, n), B (..., n) -> A_bar, B_bar, both (..., d, n). Raises ValueError."""
    delta, B = delta.unsqueeze(-1), B.unsqueeze(-2)
    delta_A = delta * A
    if rule == "mamba":
        return torch.exp(delta_A), delta * B
    if rule == "zoh":
        return torch.exp(delta_A), delta * expm1_over(delta_A) * B
    if rule == "bilinear":
        return (1 + delta_A / 2) / (1 - delta_A / 2), delta / (1 - delta_A / 2) * B
    if rule == "dirac":
        return torch.exp(delta_A), B.expand_as(delta_A)
    raise ValueError(f"rule must be one of {RULES}, got {rule!r}")


def recurrence(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor,
    *, rule: str = "mamba", reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token: x, delta (b, d), B, C (b, n), h (b, d, n), reset (b,) -> y (b, d), the next h."""
    A_bar, B_bar = discretize(delta, A, B, rule)
    if reset is not None:
        A_bar = A_bar.masked_fill(reset[:, None, None], 0)  # a document starts: forget
    h = A_bar * h + B_bar * x.unsqueeze(-1)  # (2a)
    # (2b). Not an einsum or a matrix product: autocast would run it in bfloat16.
    return (h * C.unsqueeze(-2)).sum(-1), h


## A scan runs it for all t. Every scan in this file has this signature, is differentiable in every
## tensor, h0 and h_last included, and computes in float32 even if it is given less: errors in h add
## up along time, and in bfloat16 a decay of 0.999 would be 1. This loop is the definition: to check
## another scan, give both the same float64 tensors. In float32 two right ones (but for log space)
## differ by 1e-6 of the size of y; in bfloat16, to which y is rounded at the end, by 2^-8 of each
## number. float16 ends at 65504, and y is a product of five factors without bounds: train with
## float32 parameters and autocast to bfloat16.


def scan_sequential(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None = None,
    *, rule: str = "mamba", reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x, delta (b, l, d), A (d, n), B, C (b, l, n), h0 (b, d, n) or None for zeros, reset (b, l)
    -> y (b, l, d), h_last (b, d, n)."""
    h = x.new_zeros(x.shape[0], *A.shape) if h0 is None else h0
    x, delta, A, B, C, h = at_least_float32(x, delta, A, B, C, h)
    resets = [None] * x.shape[1] if reset is None else reset.unbind(1)
    ys = []
    # unbind, not x[:, t]: the gradient of every index would be a zero tensor of the full length,
    # and the time of the backward pass would be quadratic in it.
    steps = zip(*(tensor.unbind(1) for tensor in (x, delta, B, C)), resets, strict=True)
    for x_t, delta_t, B_t, C_t, reset_t in steps:
        y_t, h = recurrence(x_t, delta_t, A, B_t, C_t, h, rule=rule, reset=reset_t)
        ys.append(y_t)
    return torch.stack(ys, dim=1), h


## The combine. One step of (2a) is the map h -> a h + v, with a = Ā_t and v = B̄_t x_t. Do one such
## map and then another, and the result is again such a map:
##
##     a2 (a1 h + v1) + v2  =  (a2 a1) h + (a2 v1 + v2)
##     combine((a1, v1), (a2, v2)) = (a2 a1, a2 v1 + v2)
##
## This needs no h: the second half of a sequence can be combined while the first still runs. And
## combine is associative: any bracketing gives the same result. Combine neighbours, then pairs of
## pairs: log2(l) rounds, up a tree, give the whole, and as many back down hand every position the
## combination of all before it: four times the multiplications of the loop, in 2 log2(l) rounds in
## place of l. It pays where b d n numbers do not fill the machine; on a CPU they do. (No such tree
## runs here: part II cuts time into chunks.) Nothing like it holds for an LSTM's tanh(W h + v).


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, h0: Tensor | None = None, *, dt_bias: Tensor | None = None,
    dt_softplus: bool = True, rule: str = "mamba", reset: Tensor | None = None, scan: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Δ = softplus(dt + dt_bias), then y = (scan(x, Δ, A, B, C) + D x) silu(z).

    x, dt, z (b, l, d), A (d, n), B, C (b, l, n), D, dt_bias (d,), h0 (b, d, n), reset (b, l) bool;
    or one token, with h0 and without the axis l: no scan. Returns y in x's dtype, h_last (b, d, n)
    in float32 (float64 for float64 inputs). scan: a name in SCANS, or "triton", the fused kernel,
    which "auto" takes where it can. Raises ValueError for what does not fit, RuntimeError where
    "triton" is asked for and cannot run.
    """
    tensors, one_token, needs = (x, dt, A, B, C, D, z, h0), x.ndim == 2, {"d_state": A.shape[-1]}
    if not one_token and (kernels := companion(scan, *tensors, dt_bias, rule=rule, **needs)):
        options = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "rule": rule, "reset": reset}
        return kernels.selective_scan_triton(*tensors, **options)
    check_scan(scan, x, A=A, dt=dt, B=B, C=C, D=D, z=z, h0=h0, dt_bias=dt_bias, reset=reset)
    dtype, x, delta = x.dtype, at_least_float32(x), at_least_float32(dt)  # x once, for all its uses
    if dt_bias is not None:
        delta = delta + dt_bias
    if dt_softplus:
        delta = F.softplus(delta)
    inputs = (x, delta, A, B, C, h0)
    if one_token:
        y, h_last = recurrence(*at_least_float32(*inputs), rule=rule, reset=reset)
    else:
        y, h_last = SCANS[scan](*inputs, rule=rule, reset=reset)
    if D is not None:
        y = y + at_least_float32(D) * x
    if z is not None:
        y = y * F.silu(at_least_float32(z))
    return y.to(dtype), h_last


SCANS = {"auto": scan_sequential, "sequential": scan_sequential}  # part II puts faster ones here


## ================================================================================================
## Part II: the same recurrence, faster, and the convolution
## ================================================================================================
##
## h_t = Ā_t h_{t-1} + v_t, with v_t = B̄_t x_t, for all t, behind the signature of scan_sequential.
##
## Log space --------------------------------------------------------------------------------------
##
## Heinsen (arXiv 2311.06281): with a*_t = log Ā_1 + ... + log Ā_t,
##
##     divide (2a) by exp(a*_t):    h_t exp(-a*_t) = h_{t-1} exp(-a*_{t-1}) + v_t exp(-a*_t)
##     so the left is a plain sum:  h_t = exp(a*_t) (h_0 + Σ_{j<=t} v_j exp(-a*_j))
##     and in logarithms:           log (h_t - exp(a*_t) h_0) = a*_t + logcumsumexp(log v - a*)_t
##
## Two cumulative sums, which every parallel machine has. log Ā needs no logarithm: it is ΔA. The
## sum over j needs it, because exp(-a*_j) overflows as soon as a*_j < -88. And a logarithm wants
## positive v: write v = v⁺ - v⁻, two non-negative parts, scan both and subtract.
##
## Error. An exponent is rounded relative to its terms, so the share of v_j in h_t, exp(log v_j -
## a*_j + a*_t), is wrong by a factor of about 1 ± ε (|a*| + |log v|), with ε = 1.2e-7 in float32:
## 5e-5 after decays that sum to |a*| = 400, a tenth at 1e6. Hence the sums restart in every chunk.
## But where v⁺ and v⁻ cancel, the error stays as large as what has cancelled, and the gradients of
## Δ and A have |ΔA| times this error, more than is left of them where decays are extreme.


def scan_logspace(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None = None,
    *, rule: str = "mamba", reset: Tensor | None = None, chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Heinsen's scan, chunk after chunk, `chunk` steps long. Shapes as in scan_sequential.
    Error about ε (|A| ΣΔ + |log v| + 104 · resets), the largest over the chunks, ε = 1.2e-7,
    relative to the sum of the sizes of all that h adds up. Raises ValueError for rule "bilinear".
    """
    check_chunk(chunk)
    if rule == "bilinear":
        raise ValueError("scan='logspace' cannot do rule='bilinear': Ā may be negative there")

    def log_cumsum(v: Tensor, a_star: Tensor) -> Tensor:
        return (a_star + (v.log() - a_star).logcumsumexp(1)).exp()

    h = x.new_zeros(x.shape[0], *A.shape) if h0 is None else h0
    x, delta, A, B, C, h = at_least_float32(x, delta, A, B, C, h)
    chunks = [tensor.split(chunk, dim=1) for tensor in (x, delta, B, C)]
    resets = [None] * len(chunks[0]) if reset is None else reset.split(chunk, dim=1)
    ys = []
    for x_k, delta_k, B_k, C_k, reset_k in zip(*chunks, resets, strict=True):
        _, B_bar = discretize(delta_k, A, B_k, rule)  # (b, chunk, d, n)
        v = B_bar * x_k.unsqueeze(-1)
        log_A_bar = delta_k.unsqueeze(-1) * A
        if reset_k is not None:
            # exp(-104) is below the smallest float32: as good as the zero that has no logarithm.
            log_A_bar = log_A_bar.masked_fill(reset_k[:, :, None, None], -104.0)
        a_star = log_A_bar.cumsum(1)
        # log 0 has no gradient; a floor of 1e-30 on both parts cancels when they are subtracted.
        plus, minus = (v.abs() + v) / 2 + 1e-30, (v.abs() - v) / 2 + 1e-30
        hs = a_star.exp() * h.unsqueeze(1) + log_cumsum(plus, a_star) - log_cumsum(minus, a_star)
        ys.append((hs * C_k.unsqueeze(-2)).sum(-1))
        h = hs[:, -1].clone()  # a view would keep the states of the whole chunk in memory
    return torch.cat(ys, dim=1), h


## Chunks ------------------------------------------------------------------------------------------
##
## Each step is done two times, but many steps at once. Cut time into chunks of k steps. A chunk,
## combined into one map, turns its start state h into
##
##     h_end = P h + end,    P = Ā_k ... Ā_2 Ā_1,    end = what the chunk makes of the zero state
##
##   1. Run all chunks at once, each from zero: k steps, with the chunks as a batch axis: the ends.
##   2. Walk over the chunks with h <- P h + end: l / k steps. Gives each chunk's true start state.
##   3. Run all chunks at once again, each from its true start state: k steps. Gives y.
##
## 2 k + l / k steps instead of l, fewest for k = sqrt(l / 2): 128 in place of 2048. P is no product
## of k factors but exp(A ΣΔ) (or, under "bilinear", what the chunk makes of a state of ones without
## input). Nothing is divided by running products of decays, which may underflow to 0 (mamba-mini,
## which named this form "chunk-parallel", does that): no decay is too strong.


def scan_chunked(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None = None,
    *, rule: str = "mamba", reset: Tensor | None = None, chunk: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All chunks at once, then from chunk to chunk, then all at once again. As scan_sequential.
    chunk None takes sqrt(l / 2). It changes the speed and the rounding only."""
    batch, seqlen, _ = x.shape
    chunk = max(1, round(math.sqrt(seqlen / 2))) if chunk is None else chunk
    check_chunk(chunk)
    h = x.new_zeros(batch, *A.shape) if h0 is None else h0
    x, delta, A, B, C, h = at_least_float32(x, delta, A, B, C, h)
    # Fill up the last chunk with steps of length zero: Δ = 0 and x = 0 leave h alone in every rule.
    padding = -seqlen % chunk
    x, delta, B, C = (F.pad(tensor, (0, 0, 0, padding)) for tensor in (x, delta, B, C))
    fold = functools.partial(rearrange, pattern="b (c k) ... -> (b c) k ...", k=chunk)
    unfold = functools.partial(rearrange, pattern="(b c) ... -> b c ...", b=batch)
    if reset is not None:
        reset = fold(F.pad(reset, (0, padding)))
    x, delta, B, C = fold(x), fold(delta), fold(B), fold(C)

    # 1. Every chunk from the zero state.
    _, ends = scan_sequential(x, delta, A, B, C, rule=rule, reset=reset)
    # 2. From chunk to chunk.
    if rule == "bilinear":
        ones, nothing = torch.ones_like(ends), torch.zeros_like(x)
        _, decays = scan_sequential(nothing, delta, A, B, C, ones, rule=rule, reset=reset)
    else:
        decays = torch.exp(delta.sum(1).unsqueeze(-1) * A)  # (b c, d, n)
        if reset is not None:
            decays = decays.masked_fill(reset.any(1)[:, None, None], 0)
    starts = []
    for decay, end in zip(unfold(decays).unbind(1), unfold(ends).unbind(1), strict=True):
        starts.append(h)
        h = decay * h + end
    # 3. Every chunk from its own start state.
    starts = rearrange(torch.stack(starts, dim=1), "b c d n -> (b c) d n")
    y, _ = scan_sequential(x, delta, A, B, C, starts, rule=rule, reset=reset)
    return rearrange(y, "(b c) k d -> b (c k) d", b=batch)[:, :seqlen], h


## Recomputation -----------------------------------------------------------------------------------
##
## Training keeps several tensors of (b, l, d, n) for the backward pass. But all can be computed
## again from the state at the start of a chunk (section 3.3.2). So: one chunk after the other, keep
## only the h between them, and let the backward pass run each again before it differentiates it.
##
## The gradient of (2a) is a recurrence of the same kind, from the end to the start. Let G_t be the
## gradient of the loss with respect to h_t, by way of y_t and of h_{t+1}, and ∂q that of any q:
##
##     G_t  = C_t ∂y_t + Ā_{t+1} G_{t+1}     ∂C_t = Σ_d ∂y_t h_t
##     ∂Ā_t = G_t h_{t-1}                    ∂v_t = G_t
##
## At the last step of a chunk the second term of G is ∂h, of the h that is handed on; in return the
## chunk hands Ā_1 G_1 to the one before it. The rest, from Ā and v back to Δ, A, B and x, has no
## recurrence and is left to autograd. A short chunk stays in a CPU's cache. And with time as the
## first axis and channels as the last every operation runs along long rows in memory.


class RecomputedChunk(torch.autograd.Function):
    """x, delta (k, b, d), A (n, d), B, C (k, b, n), h (b, n, d), reset -> y (k, b, d), next h."""

    @staticmethod
    def decays_and_inputs(x, delta, A, B, rule, reset):
        """Ā and v = B̄ x, (k, b, n, d)."""
        if rule == "mamba":
            # exp(ΔA) by exp2: PyTorch's exp takes several times as long on some processors. And
            # (Δ x) B in place of (Δ B) x: one pass over the large tensor less.
            A_bar = torch.exp2(delta.unsqueeze(-2) * (A * math.log2(math.e)))
            v = (delta * x).unsqueeze(-2) * B.unsqueeze(-1)
        else:
            A_bar, B_bar = discretize(delta, A.mT, B, rule)
            A_bar, v = A_bar.mT.contiguous(), (B_bar * x.unsqueeze(-1)).mT.contiguous()
        return A_bar if reset is None else A_bar.masked_fill(reset[:, :, None, None], 0), v

    @staticmethod
    def run(A_bar, v, h):
        """h_t = Ā_t h_{t-1} + v_t for all t, in the place of v."""
        for A_t, h_t in zip(A_bar.unbind(), v.unbind(), strict=True):
            h = h_t.addcmul_(A_t, h)

    @staticmethod
    def forward(ctx, x, delta, A, B, C, h, rule, reset):
        ctx.save_for_backward(x, delta, A, B, C, h)
        ctx.rule, ctx.reset = rule, reset
        A_bar, hs = RecomputedChunk.decays_and_inputs(x, delta, A, B, rule, reset)
        RecomputedChunk.run(A_bar, hs, h)
        return (C.unsqueeze(-1) * hs).sum(-2), hs[-1].clone()

    @staticmethod
    def backward(ctx, grad_y, grad_h):
        if torch.is_grad_enabled():  # create_graph=True; else they would be zero without a word
            raise RuntimeError(
                "scan='recompute', which 'auto' means on a CPU, has no second derivatives: "
                "use scan='chunked'"
            )
        *inputs, C, h = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in inputs]
            A_bar, v = RecomputedChunk.decays_and_inputs(*inputs, ctx.rule, ctx.reset)
        # h takes v's place in memory. Autograd will not mind: the gradient of a product needs its
        # factors and not its result.
        decays, hs = A_bar.detach(), v.detach()
        RecomputedChunk.run(decays, hs, h)
        G = C.unsqueeze(-1) * grad_y.unsqueeze(-2)
        G[-1] += grad_h
        G_next, *before = reversed(G.unbind())
        for decay, G_t in zip(reversed(decays.unbind()), before, strict=False):
            G_next = G_t.addcmul_(decay, G_next)
        grad_A_bar = torch.empty_like(G)
        torch.mul(G[0], h, out=grad_A_bar[0])
        torch.mul(G[1:], hs[:-1], out=grad_A_bar[1:])
        grads = torch.autograd.grad((A_bar, v), inputs, (grad_A_bar, G))
        return *grads, (hs * grad_y.unsqueeze(-2)).sum(-1), decays[0] * G[0], None, None


def scan_recompute(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None = None,
    *, rule: str = "mamba", reset: Tensor | None = None, chunk: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Chunk after chunk, with only the states between them kept. Shapes as in scan_sequential.
    chunk: None takes 8 to 64, about 1 MB of states. Differentiable once, and not under torch.func.
    """
    if chunk is None:
        chunk = min(64, max(8, 2**18 // max(1, x.shape[0] * A.numel())))
    check_chunk(chunk)
    h = x.new_zeros(x.shape[0], *A.shape) if h0 is None else h0
    x, delta, A, B, C, h = at_least_float32(x, delta, A, B, C, h)
    A, h = A.mT.contiguous(), h.mT.contiguous()
    chunks = [tensor.transpose(0, 1).split(chunk) for tensor in (x, delta, B, C)]
    resets = [None] * len(chunks[0]) if reset is None else reset.mT.split(chunk)
    ys = []
    for x_k, delta_k, B_k, C_k, reset_k in zip(*chunks, resets, strict=True):
        y, h = RecomputedChunk.apply(x_k, delta_k, A, B_k, C_k, h, rule, reset_k)
        ys.append(y.transpose(0, 1))
    return torch.cat(ys, dim=1), h.mT.contiguous()


## The fused kernel, and the choice ----------------------------------------------------------------
##
## All scans above move tensors of (b, l, d, n) through memory, and on a GPU that traffic, not
## arithmetic, is the time. triton_scan.py goes on from here, a lesson of its own: a kernel that
## reads x, dt, B, C and z once, keeps h in registers, writes y once, and backward computes h again.
## scan="auto" is that kernel on a GPU, where it takes the tensors, and else the following.


def scan_auto(x: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Recompute on a CPU; else, and for compilers, which unroll loops, chunked: fewer steps."""
    plain = torch.compiler.is_compiling() or torch.jit.is_tracing() or in_functorch()
    run = scan_recompute if x.device.type == "cpu" and not plain else scan_chunked
    return run(x, *others, **options)


def in_functorch() -> bool:
    """Whether torch.func.grad, vmap or their like are at work."""
    return torch._C._are_functorch_transforms_active()


SCANS |= {
    "auto": scan_auto, "logspace": scan_logspace, "chunked": scan_chunked,
    "recompute": scan_recompute,
}  # fmt: skip


def companion(scan: str, x: Tensor, *others: Tensor | None, **needs: Any) -> ModuleType | None:
    """triton_scan.py if it is to run these tensors, else None. Only its `takes` knows what it takes
    (needs: rule and sizes). Raises RuntimeError if scan="triton" and it cannot be imported."""
    if scan != "triton" and (scan != "auto" or not x.is_cuda):
        return None  # and Triton, whose import takes a second, is not imported
    try:
        import triton_scan as kernels
    except ImportError as error:
        if scan == "auto":
            return None
        raise RuntimeError(
            "scan='triton' needs triton_scan.py beside mamba.py, and triton, which comes with "
            f"PyTorch for GPUs (or: pip install triton): {error}. Or use scan='chunked'"
        ) from error
    return kernels if scan == "triton" or kernels.takes(x, *others, **needs) else None


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether it is of one of these very types, with no hook, and no other forward of its own."""
    own = vars(module)
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"]
    hooks = hooks or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return type(module) in kinds and not hooks and "forward" not in own


def are_our_own(*modules: nn.Module) -> bool:
    """Whether these, without those inside of them, are our own: a hook, an adapter or a quantised
    weight would be passed by. (Hooks on all modules at once are not looked for.)"""
    own = Mamba, ResidualBlock, MambaBlock, RMSNorm, DeltaProjection
    own += nn.Linear, nn.Conv1d, nn.Embedding, nn.ModuleDict, nn.ModuleList
    # Asked of every block in every prompt: plain loops, and no attributes of modules.
    for module in modules:
        mine = vars(module)
        if not is_plain(module, *own) or not mine.keys().isdisjoint(("step", "select", "embed")):
            return False
        if not all([p is None or type(p) is nn.Parameter for p in mine["_parameters"].values()]):
            return False
    return True


def is_our_own(model: nn.Module) -> bool:
    """Whether all of it is our own, and autocast is off."""
    autocast = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    return not autocast and are_our_own(*model.modules())


def kernels_for(layer: nn.Module, stream: Tensor) -> ModuleType | None:
    """triton_scan.py if it is to run this ResidualBlock as a whole, else None."""
    if not stream.is_cuda or stream.ndim != 3 or torch.compiler.is_compiling():
        return None
    block = layer.mixer
    parts = block._modules
    # Not the layer itself: whatever is around its forward, this is called from inside of it.
    if not are_our_own(layer.norm, block, *parts.values()):
        return None
    if type(parts["dt_proj"]) is not DeltaProjection:  # a Linear adds its bias itself
        return None
    scan = "auto" if block.config.scan == "triton" else block.config.scan  # who asked hears later
    kernels = companion(scan, stream, rule=block.config.rule)
    return kernels if kernels and kernels.takes_block(layer, stream) else None


def fused_block(
    kernels: ModuleType, layer: nn.Module, stream: Tensor, state: MambaState,
    *, reset: Tensor | None = None,
) -> tuple[Tensor, MambaState]:  # fmt: skip
    """`ResidualBlock.forward` by triton_scan.py. Shapes and errors are the same."""
    check_block(layer.mixer.config, stream, state, reset)
    stream, raw, h = kernels.residual_block_triton(layer, stream, state.conv, state.h, reset)
    return stream, MambaState(window_after(raw, state.conv.to(raw.dtype), reset)[0], h)


## The convolution, and two functions of part I that say what they do by their names --------------


def causal_conv(
    raw: Tensor, conv1d: nn.Conv1d, past: Tensor, reset: Tensor | None = None, *, scan: str = "auto"
) -> tuple[Tensor, Tensor]:
    """A convolution along time that sees nothing to the right, one filter per channel, then SiLU.

    raw (b, l, d), or (b, d), one token; past (b, d, d_conv - 1): the inputs before, oldest first.
    reset (b, l): no term reaches over the start of a document. Returns x and the next past.
    """
    if not is_plain(conv1d, nn.Conv1d):
        return adapted_conv(raw, conv1d, past, reset)
    weight, bias, past = conv1d.weight, conv1d.bias, past.to(raw.dtype)
    if weight.shape[1:] != (1, past.shape[-1] + 1) or conv1d.dilation != (1,):
        raise ValueError(f"conv1d must have a filter per channel as long as its past, got {conv1d}")
    if raw.ndim == 2:  # one token
        window = torch.cat([past, raw.unsqueeze(-1)], dim=-1)  # (b, d, d_conv)
        x = (at_least_float32(window) * weight.squeeze(1)).sum(-1)
        return F.silu(x if bias is None else x + bias).to(raw.dtype), window[..., 1:]

    seqlen, reach = raw.shape[1], past.shape[-1]
    next_past, document = window_after(raw, past, reset)
    if kernels := companion(scan, raw, weight, bias, past, d_conv=reach + 1):
        return kernels.causal_conv_triton(raw, weight, bias, past, reset, silu=True), next_past

    ## Tap j sees the sequence d_conv - 1 - j steps late. The sum is float32, to be rounded once.
    window = at_least_float32(torch.cat([past.mT, raw], dim=1))  # (b, d_conv - 1 + l, d)
    x = window.new_zeros(()) if bias is None else at_least_float32(bias)
    for j in range(reach + 1):
        weight_j = at_least_float32(weight[:, 0, j])
        if reset is not None:  # multiply away what is not of one's own document
            weight_j = weight_j * (document[:, j : j + seqlen] == document[:, reach:])
        x = torch.addcmul(x, window[:, j : j + seqlen], weight_j)
    return F.silu(x).to(raw.dtype), next_past


def window_after(raw: Tensor, past: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The past of what follows raw, and the numbers of the documents (b, d_conv - 1 + l, 1)."""
    seqlen, reach = raw.shape[1], past.shape[-1]
    # A new tensor: a view would keep all of raw in memory for as long as the state lives.
    window = torch.cat([past[..., seqlen:], raw[:, max(0, seqlen - reach) :].mT], dim=-1)
    if reset is None:
        return window, None
    # Number the documents; the past belongs to number 0.
    document = F.pad(reset.cumsum(-1), (reach, 0)).unsqueeze(-1)
    return window * (document[:, seqlen:] == document[:, -1:]).mT, document


def adapted_conv(
    raw: Tensor, conv1d: nn.Module, past: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`causal_conv` by a call of the module, with its adapter or hooks. Reset only at the start."""
    if reset is not None and reset[:, 1:].any():
        raise ValueError(
            "conv1d has a hook or an adapter and would look across a reset inside the sequence: "
            "feed such documents, or unequal prompts, one by one"
        )
    past = past if reset is None else past.masked_fill(reset[:, :1, None], 0)
    window = torch.cat([past.to(raw.dtype), raw.reshape(len(raw), -1, raw.shape[-1]).mT], -1)
    x = F.silu(conv1d(window)).mT.to(raw.dtype)  # (b, l, d)
    return x.reshape(raw.shape), window[..., x.shape[1] :].clone()


def at_least_float32(*tensors: Tensor) -> Any:
    """float16 and bfloat16 become float32; if one is float64, all do. One in, one out."""
    wide = torch.float64 if any([t.dtype == torch.float64 for t in tensors]) else torch.float32
    # Asked before: `to` takes longer to find that it has nothing to do.
    results = [t if t.dtype == wide else t.to(wide) for t in tensors]
    return results if len(results) > 1 else results[0]


def expm1_over(a: Tensor) -> Tensor:
    """(exp(a) - 1) / a, with value and gradient right down to a = 0, where it is 1."""
    # The gradient of the quotient, a difference of numbers near 1/a, loses all digits as a -> 0.
    # Seven terms of the series are exact to 1e-15 here, their gradient to 1e-12.
    small = a.abs() < 0.03
    # Both branches are computed, and NaN times 0 is NaN: keep 0/0 out of the one not taken.
    quotient_a = torch.where(small, 1.0, a)
    series = 1 + a / 2 * (1 + a / 3 * (1 + a / 4 * (1 + a / 5 * (1 + a / 6 * (1 + a / 7)))))
    return torch.where(small, series, torch.expm1(quotient_a) / quotient_a)


## The same things in other texts ------------------------------------------------------------------
##
##   here            Algorithm 2  mamba_simple.py  selective_scan_ref  mamba-minimal   mamba-mini
##   u               -            hidden_states    -                   x               -
##   raw, z          -            x, z (in xz)     -, z                x, res          -
##   conv            -            conv_state       -                   -               -
##   x               x            x                u                   x, then u       us
##   low_rank, B, C  -, B, C      parts of x_dbl   -, B, C             parts of x_dbl  -, Bs, Cs
##   dt              s_Δ(x)       dt               delta               -               dts
##   dt_bias         Parameter    dt_proj.bias     delta_bias          dt_proj.bias    delta_bias
##   delta           Δ            dt (in step)     delta, later        delta, later    dts, later
##   A_bar           Ā            dA (in step)     deltaA              deltaA          -
##   B_bar x = v     B̄ x          dB x (in step)   deltaB_u            deltaB_u        dtBus
##   h, h_last       -            ssm_state        x, last_state       x               hs, hprefix
##
## "later": the same name again. conv_state has d_conv columns, ours d_conv - 1: it also has the
## newest input. selective_scan_ref and mamba-mini have (b, d, l) and (b, n, l). Algorithm 2's B, L,
## D, N are sizes, too: b, l, d, n. In log space Heinsen's a, b, x are Ā, v, h and a_star is a*;
## exp(a*) is mamba-mini's Ats, ΔA mamba-tiny's dA.


## ================================================================================================
## Part III: nothing below is about Mamba (checks, optimisers, files)
## ================================================================================================


def check_config(config: MambaConfig) -> None:
    """Also makes numbers of other types, such as 16.0 or numpy's, the integers that they are."""
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, Real) and not isinstance(value, bool):
            value = int(value) if value % 1 == 0 else float(value)
            setattr(config, item.name, value)
        if item.type.startswith("int") and (type(value) is not int or value < 1):
            if (item.name, value) != ("dt_rank", "auto"):
                raise ValueError(f"{item.name} must be a positive integer, got {value!r}")
        if item.type == "bool" and type(value) is not bool:
            raise ValueError(f"{item.name} must be True or False, got {value!r}")
        if item.type == "float" and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise ValueError(f"{item.name} must be a positive number, got {value!r}")
    if config.d_inner < 1:
        raise ValueError(f"expand must give at least one channel, got {config.expand}")
    scans = (*SCANS, "triton")
    for name, allowed in (("rule", RULES), ("dt_init", ("random", "constant")), ("scan", scans)):
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {getattr(config, name)!r}")
    if config.dt_min > config.dt_max:
        raise ValueError(f"need dt_min <= dt_max, got {config.dt_min}, {config.dt_max}")


def check_ids(config: MambaConfig, ids: Tensor, ndim: int, state: MambaState | None) -> None:
    axes = "(batch, seqlen)" if ndim == 2 else "(batch,)"
    if ids.ndim != ndim or ids.numel() == 0 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expected int64 ids {axes}, got {ids.dtype} {tuple(ids.shape)}")
    if state is not None and (state.h.ndim != 4 or len(state.h) != config.n_layer):
        raise ValueError(
            f"expected the state of a model of {config.n_layer} layers, with h (layers, batch, "
            f"d_inner, d_state), got {tuple(state.h.shape)}"
        )
    # To look at ids makes the CPU wait for a GPU, breaks a compiled graph, and fails in vmap.
    if ids.device.type == "cpu" and not (torch.compiler.is_compiling() or in_functorch()):
        low, high = (bound.item() for bound in ids.aminmax())
        if low < 0 or high >= config.padded_vocab_size:
            rows = config.padded_vocab_size
            raise IndexError(f"token ids must be in [0, {rows}), got {low} ... {high}")


def check_token(config: MambaConfig, u: Tensor) -> None:
    if u.ndim != 2:
        axes = f"(batch, d_model), d_model = {config.d_model}"
        raise ValueError(f"expected {axes}, got {tuple(u.shape)}")


def check_block(
    config: MambaConfig, u: Tensor, state: MambaState | None, reset: Tensor | None
) -> None:
    one_token = u.ndim == 2 and state is not None
    if not (one_token or u.ndim == 3) or u.shape[-1] != config.d_model or u.numel() == 0:
        axes = "(batch, d_model)" if one_token else "(batch, seqlen, d_model)"
        raise ValueError(f"expected {axes}, d_model = {config.d_model}, got {tuple(u.shape)}")
    if state is not None:
        for name, last in (("conv", config.d_conv - 1), ("h", config.d_state)):
            expected, shape = (u.shape[0], config.d_inner, last), getattr(state, name).shape
            if shape != expected:
                raise ValueError(f"state.{name} must have shape {expected}, got {tuple(shape)}")
    if reset is not None and (reset.dtype != torch.bool or reset.shape != u.shape[:-1]):
        raise ValueError(
            f"reset must be bool {tuple(u.shape[:-1])}, got {reset.dtype} {tuple(reset.shape)}"
        )


def check_scan(scan: str, x: Tensor, **tensors: Tensor | None) -> None:
    if scan != "triton" and scan not in SCANS:
        raise ValueError(f"scan must be one of {(*SCANS, 'triton')}, got {scan!r}")
    if x.ndim not in (2, 3) or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"x must be real (batch, seqlen, d_inner), got {x.dtype} {tuple(x.shape)}")
    if x.ndim == 2 and tensors["h0"] is None:
        raise ValueError(f"x {tuple(x.shape)} is one token (batch, d_inner): it needs h0")
    *axes, d, n = *x.shape, tensors["A"].shape[-1]
    shapes = dict(A=(d, n), B=(*axes, n), C=(*axes, n), D=(d,), dt_bias=(d,))
    shapes |= dict(dt=(*axes, d), z=(*axes, d), h0=(axes[0], d, n), reset=tuple(axes))
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shapes[name]:
            raise ValueError(f"{name} must have shape {shapes[name]}, got {tuple(tensor.shape)}")
        if tensor is not None and tensor.is_complex():
            raise ValueError(f"{name} must be real: complex SSMs are not implemented")
    if tensors["reset"] is not None and tensors["reset"].dtype != torch.bool:
        raise ValueError(f"reset must be bool, got {tensors['reset'].dtype}")


def check_chunk(chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for torch.optim.AdamW, of any module that contains MambaBlocks: with weight decay
    the weights of projections, convolutions and embeddings, without it all else."""
    groups = [{"params": [], "weight_decay": decay} for decay in (weight_decay, 0.0)]
    for name, parameter in model.named_parameters():
        # A_log has two axes, as a matrix has: its name tells, not its shape.
        is_weight = parameter.ndim >= 2 and not name.endswith("A_log")
        groups[0 if is_weight else 1]["params"].append(parameter)
    return groups


def mark_parameters(block: MambaBlock, *_: Any) -> None:
    """The marks of the official layer. New parameters have none, so again after loading, moving."""
    block.A_log._no_weight_decay = block.D._no_weight_decay = True
    if getattr(block.dt_proj, "bias", None) is not None:
        block.dt_proj.bias._no_reinit = True
    if not block._load_state_dict_post_hooks:
        block.register_load_state_dict_post_hook(mark_parameters)


def marked(name: str) -> Callable[..., Any]:
    def method(block: MambaBlock, *arguments: Any, **options: Any) -> Any:
        result = getattr(super(MambaBlock, block), name)(*arguments, **options)
        mark_parameters(block)
        return result

    return method


def keep_tied(model: Mamba, *arguments: Any, **options: Any) -> Mamba:
    """Moved from the meta device, one matrix of two names would become two."""
    tied = model.lm_head.weight is model.backbone.embedding.weight
    super(Mamba, model)._apply(*arguments, **options)
    if tied:
        model.lm_head.weight = model.backbone.embedding.weight
    return model


MambaBlock._apply, MambaBlock.__setstate__ = marked("_apply"), marked("__setstate__")
Mamba._apply = keep_tied
Mamba.param_groups = param_groups
# A pytree: torch.export, vmap and torch.compile look inside.
torch.export.register_dataclass(MambaState, serialized_type_name=f"{__name__}.MambaState")


## Files: config.json and the weights, as in state-spaces/mamba-* or transformers (mamba-*-hf).

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEAD, EMBEDDING = "lm_head.weight", "backbone.embedding.weight"
HF_EMBEDDING = "backbone.embeddings.weight"
WEIGHT_FILES = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILES += "pytorch_model.bin", "pytorch_model.bin.index.json"


def load(
    cls: type[Mamba], name_or_path: str | os.PathLike, *, revision: str | None = None,
    device: torch.device | str | None = None, dtype: torch.dtype | None = None, scan: str = "auto",
    cache_dir: str | os.PathLike | None = None, local_files_only: bool = False,
) -> Mamba:  # fmt: skip
    """A model with the weights of a local folder, or of a repository: "state-spaces/mamba-130m".

    dtype None means float32, whatever the file holds. Raises FileNotFoundError for what is not
    there or not within reach, ValueError for a config.json of another kind of model or a wrong
    argument, RuntimeError for weights that are damaged or do not fit exactly, and for what else the
    Hub, the disk or the device refuses.
    """
    if (dtype := dtype or torch.float32) not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype!r}")
    try:
        torch.empty(0, device=device)  # a device that is not there is missed before a download
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} is not available on this machine") from error
    find = file_finder(name_or_path, revision, cache_dir, local_files_only)
    config = replace(read_config(find("config.json")), scan=scan)
    with torch.device("meta"):  # the shapes without the numbers: these come from the file
        model = cls(config)
    path = find(*WEIGHT_FILES)
    weights = read_weights(path, find)
    if HF_EMBEDDING in weights and EMBEDDING not in weights:
        weights[EMBEDDING] = weights.pop(HF_EMBEDDING)
    if config.tie_embeddings and EMBEDDING in weights:
        weights.setdefault(HEAD, weights[EMBEDDING])
    check_fit(f"{path} and config.json", model, weights)
    if config.tie_embeddings and not torch.equal(weights.pop(HEAD), weights[EMBEDDING]):
        raise ValueError(f"{path}: lm_head is not the embedding, but config.json ties the two")
    # What has this dtype stays mapped; what has not is cast one by one.
    weights = {name: weights.pop(name).to(device, dtype).contiguous() for name in list(weights)}
    weights.setdefault(HEAD, weights[EMBEDDING])
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    return model


def save(model: Mamba, path: str | os.PathLike) -> None:
    """Write a folder that `from_pretrained` loads, in the layout of state-spaces/mamba-*. Raises
    RuntimeError, and writes nothing, if weights and config do not fit together."""
    from safetensors.torch import save_file

    folder, weights = Path(path), dict(model.state_dict())
    with torch.device("meta"):
        check_fit("the model and its config", type(model)(model.config), weights)
    one, other = weights[HEAD], weights[EMBEDDING]
    if tied := (one.data_ptr(), one.stride()) == (other.data_ptr(), other.stride()):
        del weights[HEAD]
    values = vars(replace(model.config, scan="auto", tie_embeddings=tied))
    ssm = {name: values.pop(name) for name in SSM_FIELDS}
    top = {k: v for k, v in values.items() if k not in OUR_OWN or v != getattr(MambaConfig, k)}
    entries = {**top, "ssm_cfg": ssm, "rms_norm": True, "fused_add_norm": True}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(entries, indent=2) + "\n")
    # Written aside and moved: the old file may be the one that the model's weights are mapped from.
    temporary = folder / "model.safetensors.partial"
    save_file({k: v.contiguous() for k, v in weights.items()}, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")


## config.json has one of two layouts. That of state-spaces/mamba-* keeps the fields of the SSM in
## "ssm_cfg". That of transformers has other names and defaults, and ignores what it does not know.
## Here stands for each field our name, or a list of the values that are implemented; an empty one
## says that the field changes nothing.

SSM_FIELDS = "d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale dt_init_floor".split()
SSM_FIELDS += ["conv_bias", "bias"]
OUR_OWN = ["norm_eps", "tokenizer", "rule", "scan"]  # not written if they are the default
FIELDS = {item.name: item.name for item in fields(MambaConfig) if item.name != "scan"} | dict(
    model_type=["mamba"], layer=["Mamba1"], rms_norm=[True], d_intermediate=[0], attn_cfg=[{}],
    attn_layer_idx=[[]], fused_add_norm=[], use_fast_path=[], architectures=[], torch_dtype=[],
    dtype=[], eos_token_id=[], bos_token_id=[], pad_token_id=[],
)  # fmt: skip
HF_FIELDS = dict(
    model_type=["mamba"], hidden_act=["silu", "swish"], quantization_config=[None],
    intermediate_size=[], tokenizer="tokenizer",  # the last is ours, and kept by transformers
    hidden_size="d_model", num_hidden_layers="n_layer", vocab_size="vocab_size",
    state_size="d_state", conv_kernel="d_conv", expand="expand", time_step_rank="dt_rank",
    use_bias="bias", use_conv_bias="conv_bias", residual_in_fp32="residual_in_fp32",
    layer_norm_epsilon="norm_eps", tie_word_embeddings="tie_embeddings",
)  # fmt: skip
HF_DEFAULTS = dict(d_model=768, n_layer=32, vocab_size=50280, pad_vocab_size_multiple=1)
HF_REFUSED = r"eps(ilon)?$|(?<!ngram)_size$|_dim$|_rank$|^d_state$|^d_conv$"


def read_config(path: Path) -> MambaConfig:
    """config.json -> MambaConfig. Raises ValueError for a field that would change the model."""
    found = {name: value for name, value in read_file(path).items() if value is not None}
    from_hf = "hidden_size" in found or ("model_type" in found and "d_model" not in found)
    layout, refused = (HF_FIELDS, HF_REFUSED) if from_hf else (FIELDS, "")
    known = dict(HF_DEFAULTS) if from_hf else dict.fromkeys(("d_model", "n_layer", "vocab_size"))
    try:
        if found.pop("event_time", False):
            raise ValueError("event_time belongs to the block of examples/event_time.py")
        if from_hf:
            found = {"model_type": None} | found
        elif not isinstance(ssm := found.pop("ssm_cfg", {}), dict) or ssm.keys() & found:
            raise ValueError(f"ssm_cfg must hold fields that stand nowhere else, got {ssm!r}")
        else:
            found |= {name: value for name, value in ssm.items() if value is not None}
        for name, value in found.items():
            if isinstance(ours := layout.get(name), str):
                known[ours] = value
            elif ours and value not in ours:
                raise ValueError(f"{name} = {value!r} is another architecture, not {ours[0]!r}")
        if unknown := [name for name in found if name not in layout and re.search(refused, name)]:
            raise ValueError(f"unknown fields {', '.join(unknown)}")
        config = MambaConfig(**known)
        # A slip of the finger must not become an hour of building layers.
        largest = max(value for value in vars(config).values() if type(value) is int)
        if config.n_layer > 10_000 or config.d_inner * largest > 2**40:
            raise ValueError(f"these sizes are too large to be meant: {known}")
        return config
    except (TypeError, ValueError) as error:
        theirs = {ours: name for name, ours in layout.items() if isinstance(ours, str)}
        message = re.sub(r"^\w+", lambda word: theirs.get(word[0], word[0]), str(error))
        raise ValueError(f"{path}: {message}") from error


def read_weights(path: Path, find: Callable[..., Path]) -> dict[str, Tensor]:
    """The tensors of a file, or of all that an index names, mapped into memory."""
    weights, files = {}, [path.name]
    if path.suffix == ".json":
        index = read_file(path).get("weight_map")
        files = sorted({str(file) for file in index.values()} if isinstance(index, dict) else {})
        if not files or any("/" in file for file in files):  # it could lead out of the folder
            raise ValueError(f"{path}: weight_map must name the file of each weight")
    for path in map(find, files):
        tensors = read_file(path)
        for key in tensors.keys() & {"state_dict", "model_state_dict", "model", "module", "ema"}:
            line = f"torch.save(torch.load({str(path)!r})[{key!r}], {str(path)!r})"
            raise RuntimeError(f"{path} holds its tensors under {key!r}: take them out by `{line}`")
        if twice := weights.keys() & tensors:
            raise RuntimeError(f"{path} holds {twice.pop()}, which stands in another file as well")
        weights |= tensors
    return weights


def read_file(path: Path) -> dict[str, Any]:
    """What is in a file of JSON or of tensors. These are mapped into memory."""
    from safetensors.torch import load_file

    try:
        if path.suffix == ".json":
            content = json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # weights_only: a pickle from the internet may contain tensors, never code to run.
            # A file from before torch 1.6 is no zip file and cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} is no dict")
        return content
    except Exception as error:
        with path.open("rb") as file:
            start = file.read(40)
        # The first sentence: in the next one torch recommends to run what is in the file.
        why = re.split(r"\n|\. ", str(error))[0]
        remedy = ": run `git lfs pull`" if b"git-lfs" in start else ""
        message = f"{path} is damaged or of another kind, and nothing in it was run"
        raise RuntimeError(f"{message} ({why}; it begins with {start!r}){remedy}") from error


def check_fit(what: str, model: Mamba, weights: dict[str, Tensor]) -> None:
    """Raise RuntimeError unless the weights have the names and shapes of the model's own."""

    def form(t: Any) -> str:
        usual = getattr(t, "dtype", None) in FLOATS and t.layout == torch.strided and not t.is_meta
        return f"{tuple(t.shape)}" if usual else f"{type(t).__name__} {getattr(t, 'dtype', '')}"

    expected = {name: f"{tuple(t.shape)}" for name, t in model.state_dict().items()}
    found = {str(name): form(t) for name, t in weights.items()}
    prefix = next((n.removesuffix("backbone.norm_f.weight") for n in found if "norm_f" in n), "")
    if prefix and all(name.startswith(prefix) for name in found):
        line = f"weights = {{k.removeprefix({prefix!r}): v for k, v in weights.items()}}"
        raise RuntimeError(f"{what}: all names begin with {prefix!r}, take it off by `{line}`")
    both = [name for name in expected if name in found]
    faults = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "misshapen": [
            f"{n} {found[n]}, not {expected[n]}" for n in both if found[n] != expected[n]
        ],
    }
    said = [f"{len(ns)} {fault}: {', '.join(ns[:3])}" for fault, ns in faults.items() if ns]
    if said:
        raise RuntimeError(f"{what} do not fit together (weights: {'; '.join(said)})")


## What is said of errors of the Hub's client, by name: it is imported only when it is needed.

OUT_OF_REACH = "{file} is not in the cache and the Hub is out of reach ({why}): check the network"
HUB_FAULTS = dict(
    GatedRepoError="accept its terms at https://huggingface.co/{name}, then run `hf auth login`",
    RepositoryNotFoundError="the Hub has no such repository, or it is private: check the name or "
    "run `hf auth login`",
    OfflineModeIsEnabled="{file} is not in the cache: load once without HF_HUB_OFFLINE and "
    "local_files_only",
    TransportError=OUT_OF_REACH,
    TimeoutError=OUT_OF_REACH + " or set HF_HUB_ETAG_TIMEOUT=10",
    Exception="{file} could not be downloaded ({why})",
)  # fmt: skip


def file_finder(
    name_or_path: str | os.PathLike, revision: str | None = None,
    cache_dir: str | os.PathLike | None = None, local_files_only: bool = False,
) -> Callable[..., Path]:  # fmt: skip
    """find(*files): the path of the first of these files that a folder or repository has. If the
    Hub does not answer (no network, HF_HUB_OFFLINE, an expired login), its cache is looked through.
    """
    folder, name = Path(name_or_path).expanduser(), str(name_or_path).rstrip("/")
    where, listed, failure = {"revision": revision, "cache_dir": cache_dir}, set(), None
    is_folder = name != "" and folder.is_dir()
    if is_folder:
        listed = {path.name for path in folder.iterdir() if path.is_file()}
    # "checkpoints/typo" looks like a repository: a folder "checkpoints" here says that it is none.
    elif not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or folder.parent.is_dir():
        raise FileNotFoundError(f"{name!r} is neither a folder nor the name of a Hub repository")
    else:
        from multiprocessing.pool import ThreadPool

        import huggingface_hub as hub
        from huggingface_hub import errors

        seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", 1.5))
        try:
            if local_files_only:
                raise errors.OfflineModeIsEnabled
            options = {"revision": revision, "timeout": seconds}
            # In a thread that may be left behind: to look up an address knows no timeout.
            with ThreadPool(1) as pool:
                info = pool.apply_async(hub.HfApi().model_info, [name], options).get(seconds)
            listed = {file.rfilename for file in info.siblings or ()}
        except Exception as error:
            failure = error

    def find(*files: str) -> Path:
        nonlocal failure
        file = next((file for file in files if file in listed), None)
        if file is None and failure is None:
            raise FileNotFoundError(f"{name} has no file {' or '.join(files)}")
        if is_folder:
            return folder / file
        try:
            if failure is None:
                # Not snapshot_download: it shows a bar even for what is there.
                path = Path(hub.hf_hub_download(name, file, etag_timeout=seconds, **where))
                where["revision"] = path.parent.name  # its commit: all files are of the same
                return path
        except Exception as error:
            failure = error
        for cached in files:
            if isinstance(path := hub.try_to_load_from_cache(name, cached, **where), str):
                return Path(path)
        kind = next(c.__name__ for c in type(failure).__mro__ if c.__name__ in HUB_FAULTS)
        why = " ".join((str(failure) or kind).split())[:300]
        said = HUB_FAULTS[kind].format(name=name, file=file or " or ".join(files), why=why)
        error = RuntimeError if kind in ("GatedRepoError", "Exception") else FileNotFoundError
        raise error(f"{name}: {said}") from failure

    return find


Mamba.from_pretrained, Mamba.save_pretrained = classmethod(load), save

## What PEFT and others ask a model for, to know that two of its matrices are one.

Mamba._tied_weights_keys = {HEAD: EMBEDDING}
Mamba.is_gradient_checkpointing = False  # else PEFT leaves a hook on the embedding
Mamba.get_input_embeddings = lambda model: model.backbone.embedding
Mamba.get_output_embeddings = lambda model: model.lm_head
MambaConfig.to_dict = lambda config: vars(config) | {"tie_word_embeddings": config.tie_embeddings}
MambaConfig.tie_word_embeddings = property(
    lambda config: config.tie_embeddings,
    lambda config, tied: setattr(config, "tie_embeddings", tied),
)
