"""Mamba, the selective state space model, in one file that is meant to be read.

    Albert Gu and Tri Dao: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    arXiv 2312.00752v2. Equation and section numbers below are this paper's.

    import torch, mamba
    model = mamba.Mamba.from_pretrained("state-spaces/mamba-130m")  # or a local folder
    logits = model(input_ids)                                       # (b, l) -> (b, l, vocab)
    block = mamba.MambaBlock(mamba.MambaConfig(d_model=64))         # a layer for your own network
    y = block(torch.randn(2, 100, 64))                              # (b, l, d_model) in and out

Symbols. Capital letters are parameters of the state space model (SSM), whether learned or computed
from the token; lowercase letters are signals or axes.

    u        (b, l, d_model)  the residual stream, which every block reads and adds to
    x, y     (b, l, d)        input and output of the SSM, d = d_inner; x goes through the short
                              convolution first
    z        (b, l, d)        the gate
    dt       (b, l, d)        Δ before its bias is added and softplus is taken
    delta    (b, l, d)        Δ, the step size
    A        (d, n)           how fast each state decays, negative
    B, C     (b, l, n)        what is written into the state, what is read out of it
    D        (d,)             the direct path from x to y
    h        (b, d, n)        the state, always float32 (float64 for float64 inputs)
    A_bar, B_bar  (b, d, n)   A and B after discretisation, at one time step
    b, l, d, n                batch, seqlen, d_inner, d_state
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import re
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

## ================================================================================================
## The story
## ================================================================================================
##
## A sequence model turns the inputs x_1 ... x_t into an output y_t, for every t. Attention keeps
## all past inputs and looks through them again at each step. A recurrent model keeps a summary of
## fixed size, the state h, and must decide at each step what to write into it and what to let go.
##
## A state space model (SSM) is the plainest such recurrence, borrowed from control theory. A signal
## x(t) drives a state h(t), and the output reads the state. In continuous time:
##
##     h'(t) = A h(t) + B x(t)        (1a)        y(t) = C h(t)        (1b)
##
## Text comes in steps, so the equation is discretised. Over a step of length Δ it becomes
##
##     h_t = Ā h_{t-1} + B̄ x_t        (2a)        y_t = C h_t          (2b)
##
## with Ā and B̄ computed from Δ, A and B (`discretize`). Here x_t and y_t are one number each, and
## h_t holds n numbers, the states. A is diagonal: each state decays at a rate of its own and they
## do not mix. A layer runs d such SSMs side by side, one for each channel of its input. Everything
## in this file serves these two lines: where Δ, B and C come from, and how to run (2a) fast.
##
## Where it comes from. S4 (arXiv 2111.00396) made SSMs into layers of a network, H3 (2212.14052)
## into a language model. There Δ, A, B and C are the same at every step. Unroll (2a), and the
## powers of one Ā appear: y_t = C B̄ x_t + C Ā B̄ x_{t-1} + C Ā² B̄ x_{t-2} + ... The whole layer is a
## convolution of x with the fixed kernel (C B̄, C Ā B̄, C Ā² B̄, ...), eq. 3, as long as the text, and
## a fast Fourier transform computes it for all t at once. The price: a fixed kernel treats every
## token alike. It cannot decide to remember this name and to skip that filler word, because nothing
## in it depends on what the token is.
##
## Mamba's one idea is selection: Δ, B and C are computed from the current input (`select`). Now Ā
## differs at every step, the powers of one Ā become products of many, and no fixed kernel exists:
## the convolution is gone. What is left is the recurrence (2a) itself. It has to be run as a scan:
## like a cumulative sum, it yields a result at every position, each from the one before. The
## second half of this file is about running it in parallel all the same.
##
## How this differs from an LSTM or a GRU. Those gate their memory too, but their gates read
## h_{t-1} through a matrix and a sigmoid, so nobody can compute step t+1 before step t is done.
## Here the gates Ā_t and B̄_t read only the input. Given the inputs, (2a) is linear in h, and linear
## steps compose: two steps can be merged into one before h is known (see "The combine" below).
## That is all parallel training needs. minGRU and minLSTM (arXiv 2410.01201) arrive here from the
## other side: they take h_{t-1} out of the gates and the candidate of a GRU and an LSTM. What they
## get is (2a) with one state per channel, n = 1. Mamba has n = 16 per channel, so that each channel
## remembers at 16 time scales and, through B and C, 16 different things.
##
## What the state costs. A layer remembers d x n numbers for the SSM and d x (d_conv - 1) for its
## short convolution, whatever the length of the text. For mamba-130m in float32 that is
## 24 layers x 1536 x (16 + 3) x 4 bytes = 2.8 MB a sequence, after ten tokens and after a million.
## An attention layer of the same width caches keys and values, 2 x 768 numbers for every token: 24
## of them, in float32, pass 2.8 MB at token 20 and never stop growing.
##
## A state of fixed size therefore cannot hold everything. Copying a long random string, looking up
## one number in a long phone book, quoting a page read an hour ago: what needs more bits than the
## state has must fail, where attention does not (arXiv 2402.01032). Selection chooses what to lose.
## And constant cost is no promise of quality: the published models were trained on 2048 tokens at a
## time, and not far beyond that their predictions get worse.
##
## The order of this file is from the outside in:
##   configuration -> language model -> residual block -> Mamba block (with `forward`, `step` and
##   `select`) -> `discretize` -> the scan, in several ways -> `selective_scan` -> the state.
## Below the line "Nothing below is about Mamba" files are read and written.
##
## Lines that begin with ## teach. Comments with a single # protect the code: keep them when you
## strip the first kind (README has the command).


## ================================================================================================
## Configuration
## ================================================================================================


@dataclass
class MambaConfig:
    """Every number that defines a model; `MambaConfig(d_model=64)` is enough for one block.

    Raises ValueError for values of the wrong type, sizes and numbers that are not positive, and an
    unknown rule, dt_init or scan. `scan` says how to compute and not what: it is never saved.
    """

    d_model: int  # width of the residual stream (the paper's D; its D is also d_inner, and D below)
    n_layer: int = 1
    vocab_size: int = 50277  # rows of the embedding that stand for tokens
    d_state: int = 16  # the paper's N: states per channel
    d_conv: int = 4  # width of the causal convolution
    expand: int = 2  # the paper's E: d_inner = E * d_model
    dt_rank: int | str = "auto"  # the paper's R: rank of the projection to Δ
    rule: str = "mamba"  # how A and B are discretised: see `discretize`
    event_time: bool = False  # every call gives the time between tokens: see "Event time"
    bias: bool = False  # in in_proj and out_proj
    conv_bias: bool = True
    dt_min: float = 0.001  # Δ starts log-uniform in [dt_min, dt_max] ...
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4  # ... and not below this
    dt_init: str = "random"  # dt_proj.weight: "random" (uniform) or "constant"
    dt_scale: float = 1.0  # times this
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True  # lm_head.weight is embedding.weight
    pad_vocab_size_multiple: int = 8  # the embedding's rows are rounded up to a multiple of this
    tokenizer: str | None = None  # "bytes": token i is byte i. None: see generate.py
    scan: str = "auto"  # how to run the recurrence: see `selective_scan`

    def __post_init__(self) -> None:
        if self.dt_rank == "auto" and type(self.d_model) is int:
            self.dt_rank = math.ceil(self.d_model / 16)
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type.startswith("int") and (type(value) is not int or value < 1):
                raise ValueError(f"{item.name} must be a positive integer, got {value!r}")
            if item.type == "bool" and type(value) is not bool:
                raise ValueError(f"{item.name} must be True or False, got {value!r}")
            if item.type == "float" and (type(value) not in (int, float) or not value > 0):
                raise ValueError(f"{item.name} must be a positive number, got {value!r}")
        for name, allowed in (
            ("rule", RULES),
            ("dt_init", ("random", "constant")),
            ("scan", ("auto", "triton", *SCANS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.event_time and self.rule != "mamba":
            raise ValueError(f"event_time brings its own rule: leave rule out, got {self.rule!r}")
        if self.dt_min > self.dt_max:
            raise ValueError(f"need dt_min <= dt_max, got {self.dt_min}, {self.dt_max}")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding. Matrix units like multiples of 8; the extra rows mean nothing."""
        multiple = self.pad_vocab_size_multiple
        return math.ceil(self.vocab_size / multiple) * multiple


## ================================================================================================
## The language model
## ================================================================================================
##
## Token ids become vectors, n_layer residual blocks transform them, a norm and a matrix turn them
## into logits: scores of every possible next token. Nothing here knows about positions; order
## enters through the recurrence alone.
##
## One picture holds both ways of running the model. Each star is one block at one time:
##
##     layers[2]    *-----*-----*-----*-----*     The state moves right (time), u moves up (layers).
##                  |     |     |     |     |     A star needs the star to its left (the state of
##     layers[1]    *-----*-----*-----*-----*     the same layer, one token earlier) and the star
##                  |     |     |     |     |     below (the same token, one layer down).
##     layers[0]    *-----*-----*-----*-----*     `forward`: row by row, bottom to top. One layer
##                  |     |     |     |     |     over all time, then the next layer. Training.
##     embedding   t=0   t=1   t=2   t=3   t=4    `step`: column by column, left to right. All
##                                                layers for one token, then the next. Generation.
##
## Both orders compute a star after the two that it needs, so both give the same numbers. Row order
## shows a layer all its inputs at once, which is what a parallel scan needs. Column order needs of
## the past only the column before, that is, the state (`MambaState`), and generation has no more:
## token t+1 is not known before column t is done. Completing a text uses both: `forward` for
## the prompt (the prefill), which leaves a state behind, then `step` for token after token.


class Mamba(nn.Module):
    """The language model of the paper: embedding, residual blocks, norm, logits.

    Module names equal the keys of the published checkpoints (state-spaces/mamba-*).

        logits = model(input_ids)                      # (b, l) -> (b, l, padded_vocab_size)
        logits, state = model(input_ids, state)        # the same, continuing from a state
        logits, state = model.step(token_ids, state)   # (b,) -> (b, padded_vocab_size)
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        # nn.Embedding(rows, columns) would draw numbers that reset_parameters draws again.
        embedding = torch.empty(config.padded_vocab_size, config.d_model)
        self.backbone = nn.ModuleDict(
            {
                "embedding": nn.Embedding.from_pretrained(embedding, freeze=False),
                "layers": nn.ModuleList(ResidualBlock(config) for _ in range(config.n_layer)),
                "norm_f": RMSNorm(config.d_model, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        if not embedding.is_meta:  # shapes without numbers have nothing to initialise
            self.reset_parameters()
        self.tie_weights()

    def reset_parameters(self) -> None:
        """The model's share of the official initialisation; each block has initialised itself."""
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        for layer in self.backbone.layers:
            ## Every block adds its output to the residual stream. n_layer independent additions
            ## would make its variance grow n_layer-fold: each is scaled by 1 / sqrt(n_layer).
            layer.mixer.out_proj.reset_parameters()
            with torch.no_grad():
                layer.mixer.out_proj.weight /= math.sqrt(self.config.n_layer)
            for linear in (layer.mixer.in_proj, layer.mixer.out_proj):
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def tie_weights(self) -> None:
        """Let the embedding and lm_head be one matrix, when the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(
        self, input_ids: Tensor, state: MambaState | None = None, *, mask: Tensor | None = None,
        reset: Tensor | None = None, time_steps: Tensor | None = None,
        internals: list[dict[str, Tensor]] | None = None,
    ) -> Tensor | tuple[Tensor, MambaState]:  # fmt: skip
        """(b, l) ids -> logits (b, l, padded_vocab_size); with a state, (logits, next state).

        mask, reset, time_steps, internals: as in `MambaBlock.forward`, for all layers. Raises what
        that raises; ValueError for ids of the wrong shape or type; IndexError for an id that has no
        row, on the CPU only: to look at ids on a GPU would make the CPU wait for it.
        """
        start = self.init_state(len(input_ids)) if state is None else state
        options = {"mask": mask, "reset": reset, "time_steps": time_steps, "internals": internals}
        u, next_state = self.features(input_ids, start, **options)
        logits = self.lm_head(u)
        return logits if state is None else (logits, next_state)

    def features(
        self, input_ids: Tensor, state: MambaState, **options: Any
    ) -> tuple[Tensor, MambaState]:
        """As `forward` without its last line: (b, l, d_model), which lm_head maps to logits.

        Use it where logits of every position would be a waste of memory: to process a prompt, of
        which only the last logits count, or to compute a loss a few positions at a time.
        """
        check_model_inputs(self.config, input_ids, 2, state)
        u = self.embed(input_ids)
        next_states = []
        for i, layer in enumerate(self.backbone.layers):
            u, next_state = layer(u, state[i], **options)
            next_states.append(next_state)
        return self.backbone.norm_f(u), MambaState.stack(next_states)

    def step(
        self, token_ids: Tensor, state: MambaState, *, time_steps: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """One token: (b,) ids and the state before it -> logits (b, padded_vocab_size), state."""
        check_model_inputs(self.config, token_ids, 1, state)
        u = self.embed(token_ids)
        next_states = []
        for i, layer in enumerate(self.backbone.layers):
            u, next_state = layer.step(u, state[i], time_steps=time_steps)
            next_states.append(next_state)
        return self.lm_head(self.backbone.norm_f(u)), MambaState.stack(next_states)

    def embed(self, ids: Tensor) -> Tensor:
        try:
            u = self.backbone.embedding(ids)
        except IndexError as error:
            rows, low, high = self.config.padded_vocab_size, ids.min().item(), ids.max().item()
            message = f"token ids must be in [0, {rows}), got {low} ... {high}"
            raise IndexError(message) from error
        ## Small additions to a bfloat16 number of size 100 would be rounded away, layer after
        ## layer. The stream is therefore kept in float32 (float32 + bfloat16 gives float32), even
        ## if the weights, and what goes through the blocks, are bfloat16.
        return at_least_float32(u) if self.config.residual_in_fp32 else u

    def init_state(self, batch: int) -> MambaState:
        """The state before the first token: zeros, with the layers stacked in front."""
        return MambaState.stack([layer.mixer.init_state(batch) for layer in self.backbone.layers])

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Two parameter groups for torch.optim.AdamW: with weight decay and without.

        Decay is for the weights of the projections, the convolution and the embedding. Biases,
        norms and D are no such weights, and A_log pulled towards 0 is every rate pulled towards 1.
        """
        decay, keep = [], []
        for name, parameter in self.named_parameters():
            # A_log has two axes, as a matrix has: its name tells, not its shape.
            is_weight = parameter.ndim >= 2 and not name.endswith("A_log")
            (decay if is_weight else keep).append(parameter)
        return [
            {"params": decay, "weight_decay": weight_decay},
            {"params": keep, "weight_decay": 0.0},
        ]

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, *, revision: str | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        scan: str = "auto", cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> Mamba:  # fmt: skip
        """Load a checkpoint: a local folder, or a Hub repository such as "state-spaces/mamba-130m".

        The files may have the layout of state-spaces/mamba-* or that of transformers (mamba-*-hf).
        dtype None means float32, whatever the file holds. Every weight must be there with its own
        shape, and nothing else.

        Raises FileNotFoundError for a folder, repository or file that is not there or not within
        reach, ValueError for a config.json of another kind of model or a wrong argument,
        RuntimeError for weights that are damaged or do not fit, and for a Hub that refuses.
        How files are found and read: at the end of this file.
        """
        dtype = dtype or torch.float32
        check_target(device, dtype)
        find = file_finder(name_or_path, revision, cache_dir, local_files_only)
        config = replace(read_config(find("config.json")), scan=scan)
        with torch.device("meta"):  # the shapes without the numbers: these come from the file
            model = cls(config)
        load_weights(model, find, device, dtype)
        return model

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write a folder that `from_pretrained` loads: config.json and model.safetensors."""
        write_checkpoint(Path(path), self)


## ================================================================================================
## The residual block
## ================================================================================================
##
## A block adds a correction to the stream u and never overwrites it: gradients reach every layer
## along the plain sum. A transformer alternates two kinds of blocks, attention and MLP. Mamba has
## one kind: its gate z (below) does the MLP's work inside the same block.


class ResidualBlock(nn.Module):
    """u + mixer(norm(u)), for a sequence (`forward`) or one token (`step`)."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MambaBlock(config)

    def forward(self, u: Tensor, state: MambaState, **options: Any) -> tuple[Tensor, MambaState]:
        """Arguments and results as in `MambaBlock.forward` with a state."""
        y, state = self.mixer(self.norm(u), state, **options)
        return u + y, state

    def step(self, u: Tensor, state: MambaState, **options: Any) -> tuple[Tensor, MambaState]:
        """Arguments and results as in `MambaBlock.step`."""
        y, state = self.mixer.step(self.norm(u), state, **options)
        return u + y, state


class RMSNorm(nn.Module):
    """u / rms(u) * weight, over the last axis; computed in float32, returned in weight's dtype."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, u: Tensor) -> Tensor:
        ## u / sqrt(mean(u²) + eps) * weight. PyTorch's function does it in one kernel on a GPU.
        # eps keeps the gradient finite where u is all zeros, as padded positions may be.
        u, weight = at_least_float32(u), self.weight.to(torch.promote_types(u.dtype, torch.float32))
        return F.rms_norm(u, u.shape[-1:], weight, self.eps).to(self.weight.dtype)


## ================================================================================================
## The Mamba block
## ================================================================================================
##
##        u (b, l, d_model)
##        |
##      in_proj ------------------.        x and z: two projections of u, each d = expand d_model
##        | x                     | z
##      conv1d, silu              |        x_t sees its three left neighbours.
##        |                       |
##        |----> select: Δ, B, C  |        What this token wants written, kept and read.
##        |        |              |
##      selective scan           silu      The recurrence (2a), (2b): here, and only here,
##        |        + D x          |        information travels along time without limit.
##        | y                     |
##        `--------- * -----------'        The gate.
##                   |
##                out_proj -> (b, l, d_model)
##
## Each of the d channels runs its own SSM with n states, so A has (d, n) entries. Channels do not
## mix inside the scan, only in the projections; the states of a channel do not mix at all. Each is
## a leaky sum of its own, h = Ā h + B̄ x.
##
## What the convolution is for. Δ, B and C should depend on more than a bare token: "not" means
## something else after "why". Four inputs side by side are cheap, and a recurrence is poor at
## exactly this: it smears the past by exponentials and has no sharp view of "two tokens ago".
## In the same place, for the same reason, H3 has an SSM that can only shift.
##
## What the gate z is for. It multiplies what the scan recalls by what the current token has to say:
## two different readings meet in a product, as in a gated MLP, whose work it does. z comes from u
## directly, past the convolution and the scan. It is not a residual: nothing is added to it.
##
## What D is for. y_t = C h_t goes through the state even to pass x_t on unchanged. D x_t is the
## direct path, one weight per channel: the SSM then only has to learn what to add to it.


class MambaBlock(nn.Module):
    """The paper's Figure 3: projections, causal convolution, selective SSM, gate.

    y = block(u)                    (b, l, d_model) -> (b, l, d_model), from the zero state
    y, state = block(u, state)      the same, continuing: prefill, truncated back-propagation
    y, state = block.step(u, state) one token, u and y (b, d_model)
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        d, n, rank = config.d_inner, config.d_state, config.dt_rank
        self.in_proj = nn.Linear(config.d_model, 2 * d, bias=config.bias)
        # It holds the filters; causal_conv applies them, with the past in the place of padding.
        self.conv1d = nn.Conv1d(d, d, config.d_conv, groups=d, bias=config.conv_bias)
        self.x_proj = nn.Linear(d, rank + 2 * n, bias=False)
        self.dt_proj = DeltaProjection(rank, d)
        self.A_log = nn.Parameter(torch.empty(d, n))
        self.D = nn.Parameter(torch.empty(d))
        if config.event_time:
            self.dt_A_bias = nn.Parameter(torch.empty(d))
        self.out_proj = nn.Linear(d, config.d_model, bias=config.bias)
        if not self.D.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The official initialisation of what belongs to the SSM; the rest is PyTorch's default.

        Do not run a generic initialiser over this block afterwards: setting every bias of every
        Linear to zero would set Δ = softplus(0) = 0.69 and leave a memory of one or two tokens.
        """
        config = self.config
        ## A = -1, -2, ..., -n in every channel (arXiv 2206.11893 calls it S4D-Real): with a step
        ## of Δ, state number i fades to 1/e in 1 / (Δ i) tokens. n states are n time scales.
        self.A_log.copy_(torch.arange(1, config.d_state + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)

        ## Δ starts log-uniform in [0.001, 0.1]: time scales from 10 to 1000 tokens for A = -1.
        ## It lives in the bias, so that Δ = softplus(bias) while dt_proj's input is near zero, and
        ## softplus is inverted: log(1 + e^bias) = Δ  <=>  bias = log(e^Δ - 1) = Δ + log(1 - e^-Δ).
        bound = config.dt_scale * config.dt_rank**-0.5
        if config.dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        log_min, log_max = math.log(config.dt_min), math.log(config.dt_max)
        biases = [self.dt_proj.bias] + ([self.dt_A_bias] if config.event_time else [])
        for bias in biases:
            delta = torch.empty_like(bias).uniform_(log_min, log_max).exp()
            delta = delta.clamp(min=config.dt_init_floor)
            # expm1 keeps the digits that 1 - exp(-delta) loses for small delta.
            bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    ## A is negative, because Ā = exp(ΔA) must stay below 1: with a positive A the state would grow
    ## without bound. It is stored as the log of its size, because -exp(.) is negative whatever the
    ## optimiser does, and because one step of the optimiser then changes a rate of decay by a
    ## factor and not by an amount: a rate of 1 and one of 16 are equally easy to adjust.

    @property
    def A(self) -> Tensor:
        """(d, n), negative, float32."""
        return -torch.exp(at_least_float32(self.A_log))

    def forward(
        self, u: Tensor, state: MambaState | None = None, *, mask: Tensor | None = None,
        reset: Tensor | None = None, time_steps: Tensor | None = None,
        internals: list[dict[str, Tensor]] | None = None,
    ) -> Tensor | tuple[Tensor, MambaState]:  # fmt: skip
        """(b, l, d_model) -> y (b, l, d_model), or with a state (y, next state).

        mask:      (b, l) bool, False on the left padding of a batch of unequal prompts.
        reset:     (b, l) bool, True where a new document starts: nothing crosses that point.
        time_steps: (b, l), finite and not negative: the time since the event before, in a unit in
                   which a typical one is about 1. Only with MambaConfig(event_time=True), and then
                   always. The first has no effect without a state, nor have those of padding.
        internals: a list; this call appends {x, dt, delta, A, B, C}. They give the state at every
                   token: run the loop of `scan_sequential` on them, from the same start state,
                   with the same rule and reset.
                   (With event time x is Δ x, delta is Δ_A, and the rule "dirac".)

        Raises ValueError for shapes that do not fit, for a mask that is not left padding, and for
        time_steps that are missing, not wanted, negative or not finite (a look at numbers that is
        left out on a GPU and under torch.compile).
        """
        check_block_inputs(self.config, u, 3, state, mask=mask, reset=reset)
        check_time_steps(self.config, u, time_steps)
        start = self.init_state(u.shape[0]) if state is None else state
        x, z = self.in_proj(u).chunk(2, dim=-1)  # (b, l, d) each
        if mask is not None:
            check_left_padding(mask, start)
            ## Zeroed twice: padding must not reach the convolution's window, and the convolution's
            ## bias must not bring it to life again. Then B̄ x = 0 and a zero state stays zero.
            x = x * mask.unsqueeze(-1)
        x, conv = causal_conv(
            x, self.conv1d.weight, self.conv1d.bias, start.conv, reset,
            silu=True, scan=self.config.scan,
        )  # fmt: skip
        if mask is not None:
            x = x * mask.unsqueeze(-1)

        dt, B, C = self.select(x)
        if time_steps is None:
            y, h = selective_scan(
                x, dt, self.A, B, C, self.D, z, start.h, dt_bias=self.dt_proj.bias,
                rule=self.config.rule, reset=reset, scan=self.config.scan,
            )  # fmt: skip
        else:
            v, delta_A = self.at_events(x, dt, time_steps)
            y, h = selective_scan(
                v, delta_A, self.A, B, C, None, None, start.h, dt_softplus=False,
                rule="dirac", reset=reset, scan=self.config.scan,
            )  # fmt: skip
            y = ((y + at_least_float32(self.D) * x) * F.silu(at_least_float32(z))).to(x.dtype)
        if internals is not None:
            if time_steps is None:
                v, delta_A = x, F.softplus(at_least_float32(dt) + self.dt_proj.bias)
            internals.append({"x": v, "dt": dt, "delta": delta_A, "A": self.A, "B": B, "C": C})
        y = self.out_proj(y)
        return y if state is None else (y, MambaState(conv, h))

    ## `step` is `forward` with the axis l removed: lay one over the other. The convolution becomes
    ## one weighted sum over a window that slides, the scan becomes one application of (2a), (2b).
    ## Nothing in it depends on how many tokens came before: constant time, constant memory.

    def step(
        self, u: Tensor, state: MambaState, *, time_steps: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """One token: u (b, d_model), the state before it, and with event time time_steps (b,).

        Returns y (b, d_model) and the next state.
        """
        check_block_inputs(self.config, u, 2, state)
        check_time_steps(self.config, u, time_steps)
        x, z = self.in_proj(u).chunk(2, dim=-1)  # (b, d) each
        window = torch.cat([state.conv.to(x.dtype), x.unsqueeze(-1)], dim=-1)  # (b, d, d_conv)
        x = (window * self.conv1d.weight.squeeze(1)).sum(-1)
        if self.conv1d.bias is not None:
            x = x + self.conv1d.bias
        x = F.silu(x)

        dt, B, C = self.select(x)
        v, delta, rule = x, F.softplus(at_least_float32(dt) + self.dt_proj.bias), self.config.rule
        if time_steps is not None:
            (v, delta), rule = self.at_events(x, dt, time_steps), "dirac"
        A_bar, B_bar = discretize(delta, self.A, at_least_float32(B), rule)
        h = A_bar * state.h + B_bar * v.unsqueeze(-1)  # (2a)
        y = (h * C.unsqueeze(-2)).sum(-1)  # (2b)
        y = (y + at_least_float32(self.D) * x) * F.silu(at_least_float32(z))
        return self.out_proj(y.to(u.dtype)), MambaState(window[..., 1:], h)

    ## Selection ----------------------------------------------------------------------------------
    ##
    ## Here a token decides what happens to the memory. From x_t, which since the convolution knows
    ## of this token and the three before it, come
    ##   B_t  (n numbers)  what to write: x_t is added to state i in proportion to B_t[i];
    ##   C_t  (n numbers)  what to read: the output is the sum of the states weighted by C_t[i];
    ##   Δ_t  (d numbers)  how much this token counts, in each channel.
    ## B_t and C_t are the same for all channels, as a key and a query are in attention; what a
    ## channel writes also depends on its own x_t and Δ_t.
    ##
    ## Δ is the one to understand. It multiplies both A and B; with Ā and B̄ written out (2a) is
    ##   h_t = exp(Δ A) h_{t-1} + Δ B x_t
    ##   Δ -> 0:    exp(Δ A) -> 1 and Δ B -> 0. The state stays as it is and the token is skipped.
    ##              (Not under rule "dirac", where B̄ = B.)
    ##   Δ -> inf:  exp(Δ A) -> 0 and Δ B -> inf. The past is forgotten, the token takes over. (Its
    ##              weight grows without limit here; under rule "zoh" it would settle at B / |A|.)
    ## Why these belong together: Δ is a step in time, and a long step is at once a long time to
    ## decay and a long time under the influence of this input. In the simplest case it is a gate:
    ## with n = 1, A = -1, B = 1 and the exact solution of (1a) over a step (rule "zoh" below),
    ## h_t = (1 - g) h_{t-1} + g x_t, where g = sigmoid(dt + bias). That is minGRU's recurrence, and
    ## the paper's Theorem 1. A itself needs no selection: it appears only in the product Δ A.
    ##
    ## Δ = softplus(dt + bias), where softplus(a) = log(1 + e^a) is positive: nearly 0 for very
    ## negative a, nearly a for large ones. The bias, one for each channel, is the time scale that
    ## the channel has before a token says anything.
    ##
    ## Why Δ has low rank. d values from d inputs would take a d x d matrix: 2.4 million weights in
    ## mamba-130m, where in_proj has as many. Tokens do not differ in that many ways as to how
    ## much they count; so x_proj maps to R = d_model / 16 numbers and dt_proj maps these back to d:
    ## 2 R d = 147 thousand weights. The two matrices have nothing between them, so their product
    ## could be stored as one matrix: it would compute the same and be sixteen times larger.

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., d) -> dt (..., d) without its bias, B (..., n), C (..., n)."""
        n, rank = self.config.d_state, self.config.dt_rank
        low_rank, B, C = self.x_proj(x).split([rank, n, n], dim=-1)
        return self.dt_proj(low_rank), B, C

    ## Event time ---------------------------------------------------------------------------------
    ##
    ## Words come one after the other; heartbeats, purchases and spikes come when they come. There
    ## the time between two events should say how much is forgotten, and the event how much is
    ## written. But Δ says both. Event time splits it in two (arXiv 2411.12603): Ā = exp(Δ_A A) with
    ## Δ_A = the time that has passed, times a rate of the channel, softplus(dt_A_bias); and the
    ## event adds Δ_t B_t x_t at once, whatever the interval. That is rule "dirac" on the impulses
    ## v = Δ x, so every scan can do it. Δ -> 0 still adds nothing, but no longer keeps the past:
    ## time alone decides that. An interval of 0 forgets nothing: two events at one time. (Their
    ## order still shows, because the convolution counts events and not time.)

    def at_events(self, x: Tensor, dt: Tensor, time_steps: Tensor) -> tuple[Tensor, Tensor]:
        """x and dt (..., d), time_steps (...) -> Δ x and Δ_A, (..., d)."""
        delta = F.softplus(at_least_float32(dt) + self.dt_proj.bias)
        rate = F.softplus(at_least_float32(self.dt_A_bias))
        return delta * x, time_steps.to(rate.dtype).unsqueeze(-1) * rate

    def init_state(self, batch: int) -> MambaState:
        """The state before the first token: zeros."""
        conv_shape = (batch, self.config.d_inner, self.config.d_conv - 1)
        h_shape = (batch, self.config.d_inner, self.config.d_state)
        return MambaState(self.D.new_zeros(conv_shape), at_least_float32(self.D.new_zeros(h_shape)))


## ================================================================================================
## Discretisation
## ================================================================================================
##
## (1a) speaks of continuous time. Over one step of length Δ, with A and B constant, what does it do
## to h? Solving h' = A h without input gives h(t + Δ) = exp(ΔA) h(t): the first rule for Ā. How
## the input enters depends on what one assumes x to be between the samples:
##
##   "zoh"       Zero-order hold: x keeps its value for the whole step. Eq. 4, exact:
##                   Ā = exp(ΔA)        B̄ = ((exp(ΔA) - 1) / A) B
##   "mamba"     zoh's B̄ is Δ (1 + ΔA/2 + ...) B; keep the first term, as Euler's method does:
##                   Ā = exp(ΔA)        B̄ = Δ B
##   "bilinear"  The trapezoid rule, S4's choice: the slope at both ends counts half:
##                   Ā = (1 + ΔA/2) / (1 - ΔA/2)        B̄ = (Δ / (1 - ΔA/2)) B
##   "dirac"     x is a train of impulses: each makes the state jump by B x, however long the step:
##                   Ā = exp(ΔA)        B̄ = B
##
## The same signal under each: x = 1 at every step, A = -1, B = 1. The exact solution of (1a) ends
## at h = 1.
##
##                Δ = 0.1                      Δ = 4
##                Ā        B̄        last h     Ā        B̄        last h
##   "zoh"        0.905    0.095     1.000     0.018    0.982    1.000
##   "mamba"      0.905    0.100     1.051     0.018    4.000    4.075
##   "bilinear"   0.905    0.095     1.000    -0.333    1.333    1.000
##   "dirac"      0.905    1.000    10.508     0.018    1.000    1.019
##
## A departure from the paper. The paper prints zoh (eq. 4), but the code that trained the published
## checkpoints runs "mamba"; the authors confirm it (github.com/state-spaces/mamba, issue 114).
## Euler is cheaper. The factor that it leaves out, (exp(ΔA) - 1) / (ΔA), is near 1 for small ΔA and
## 1/2 at ΔA = -1.6; x, Δ and B are learned without it. For Ā the same shortcut, 1 + ΔA, would be
## wrong: it leaves (-1, 1) once ΔA < -2, and the state explodes. Bilinear's Ā stays inside, but
## turns negative there.

RULES = ("mamba", "zoh", "bilinear", "dirac")


def discretize(delta: Tensor, A: Tensor, B: Tensor, rule: str = "mamba") -> tuple[Tensor, Tensor]:
    """delta (..., d), A (d, n), B (..., n) -> A_bar, B_bar, both (..., d, n). Raises ValueError."""
    A_bar, scale = decay_and_scale(delta.unsqueeze(-1), A, rule)
    return A_bar, scale * B.unsqueeze(-2)


def decay_and_scale(delta: Tensor, A: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Ā, and s in B̄ = s B: all four rules only scale B. delta and A may have any shapes that
    broadcast."""
    if rule == "bilinear":
        half = delta * A / 2
        return (1 + half) / (1 - half), delta / (1 - half)
    # exp(ΔA), by exp2: on one CPU that we measured PyTorch's exp took eight times as long.
    A_bar = torch.exp2(delta * (A * LOG2_E))
    if rule == "mamba":
        return A_bar, delta
    if rule == "zoh":
        return A_bar, delta * expm1_over(delta * A)
    if rule == "dirac":
        return A_bar, torch.ones_like(delta)
    raise ValueError(f"rule must be 'mamba', 'zoh', 'bilinear' or 'dirac', got {rule!r}")


LOG2_E = math.log2(math.e)


def expm1_over(a: Tensor) -> Tensor:
    """(exp(a) - 1) / a, with value and gradient right down to a = 0, where it is 1."""
    # The gradient of the quotient is a difference of two numbers near 1/a: it loses all its digits
    # as a -> 0. Below 0.03 seven terms of the series are exact to 1e-15, their gradient to 1e-12.
    small = a.abs() < 0.03
    # Both branches are computed, and NaN times 0 is NaN: keep 0/0 out of the one not taken.
    quotient_a = torch.where(small, 1.0, a)
    series = 1 + a / 2 * (1 + a / 3 * (1 + a / 4 * (1 + a / 5 * (1 + a / 6 * (1 + a / 7)))))
    return torch.where(small, series, torch.expm1(quotient_a) / quotient_a)


## ================================================================================================
## The scan, in several ways
## ================================================================================================
##
## One problem, h_t = Ā_t h_{t-1} + B̄_t x_t and y_t = C_t h_t for all t, behind one signature:
##
##   scan(x, delta, A, B, C, h0=None, *, rule="mamba", reset=None) -> (y, h_last)
##
##   x, delta (b, l, d), A (d, n), B and C (b, l, n), h0 (b, d, n) or None for zeros,
##   reset (b, l) bool: Ā = 0 there  ->  y (b, l, d), h_last (b, d, n)
##
## Each is a pure function, differentiable in every tensor, h0 and h_last included. Each computes in
## float32 even if it is given less, because errors in h add up along time: bfloat16, with 8
## significant bits, has no number between 0.9961 and 1 for a decay. README lists what to copy too.


def at_least_float32(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def float32_island(scan: Callable) -> Callable:
    """Decorator of a scan: all inputs become float32, or float64 if any of them is."""

    @functools.wraps(scan)
    def run(x, delta, A, B, C, h0=None, **options):
        tensors = [x, delta, A, B, C, h0]
        wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
        dtype = torch.float64 if wide else torch.float32
        return scan(*(None if t is None else t.to(dtype) for t in tensors), **options)

    return run


## 1. The definition. ------------------------------------------------------------------------------
## Time is a loop. It is slow on parallel hardware, since it has l steps and each waits for the one
## before. But it is (2a) and (2b) to the letter.


@float32_island
def scan_sequential(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None = None,
    *, rule: str = "mamba", reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence (2a), (2b), step by step. Shapes as above."""
    h = x.new_zeros(x.shape[0], *A.shape) if h0 is None else h0
    # unbind, not x[:, t]: the gradient of every index would be a zero tensor of the full length,
    # and the time of the backward pass would be quadratic in it.
    steps = zip(*(tensor.unbind(1) for tensor in (x, delta, B, C)), strict=True)
    ys = []
    for t, (x_t, delta_t, B_t, C_t) in enumerate(steps):
        A_bar, B_bar = discretize(delta_t, A, B_t, rule)
        if reset is not None:
            A_bar = A_bar.masked_fill(reset[:, t, None, None], 0)
        h = A_bar * h + B_bar * x_t.unsqueeze(-1)  # (2a)
        # (2b). Not an einsum or a matrix product: autocast would run it in bfloat16.
        ys.append((h * C_t.unsqueeze(-2)).sum(-1))
    return torch.stack(ys, dim=1), h


## The combine. ------------------------------------------------------------------------------------
## One step of (2a) is the map h -> a h + v, with a = Ā_t and v = B̄_t x_t. Do one such map and then
## another, and the result is again such a map:
##
##     a2 (a1 h + v1) + v2  =  (a2 a1) h + (a2 v1 + v2)
##     combine((a1, v1), (a2, v2)) = (a2 a1, a2 v1 + v2)
##
## That is all of it. The pair on the right was computed without knowing h, so half of the work can
## start in the middle of the sequence. And combine is associative: any bracketing gives the same
## result. Combine neighbours, then pairs of pairs: log2(l) rounds up the tree give the whole, and
## as many back down hand every position the combination of all before it. Nothing of the kind
## holds for tanh(W h + v), which is why an LSTM must wait. The scans below use the same linearity,
## in forms that suit PyTorch better than a tree does.
##
## 2. Cumulative sums in log space. ----------------------------------------------------------------
## Heinsen (arXiv 2311.06281): with v_t = B̄_t x_t and a*_t = log Ā_1 + ... + log Ā_t,
##
##     divide (2a) by exp(a*_t):    h_t exp(-a*_t) = h_{t-1} exp(-a*_{t-1}) + v_t exp(-a*_t)
##     so the left is a plain sum:  h_t = exp(a*_t) (h_0 + Σ_{s<=t} v_s exp(-a*_s))
##     and in logarithms:           log (h_t - exp(a*_t) h_0) = a*_t + logcumsumexp(log v - a*)_t
##
## Two cumulative sums, which every parallel machine has. The logarithm is no ornament: exp(-a*_s)
## overflows as soon as a*_s < -88. log Ā needs no logarithm: it is ΔA.
##
## Signs. A logarithm wants positive v. Write v = v⁺ - v⁻, two non-negative parts, scan both and
## subtract. (Complex logarithms do the same at the same price.) Ā must be positive as well; under
## "bilinear" it need not be, so that rule is refused.
##
## Error. The share of v_s in h_t is exp(log v_s - a*_s + a*_t). An exponent is rounded relative to
## the size of its terms, so each share is wrong by a factor of about 1 ± ε (|a*| + |log v|), with
## ε = 1.2e-7 in float32: 5e-5 after decays that sum to |a*| = 400, a tenth at 1e6. The sums are
## therefore restarted in every chunk, where |a*| is at most the chunk's own |A| ΣΔ. Two things
## remain. Where v⁺ and v⁻ cancel, the error stays as large as what has cancelled. And the gradients
## of Δ and A have |ΔA| times this error, more than is left of them where decays are extreme.


@float32_island
def scan_logspace(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None = None,
    *, rule: str = "mamba", reset: Tensor | None = None, chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Heinsen's scan, chunk after chunk, `chunk` steps long. Shapes as above.

    Error about ε (|A| ΣΔ + |log v| + 104 · resets), the largest over the chunks, ε = 1.2e-7,
    relative to the sum of the sizes of all that h adds up. Raises ValueError for rule "bilinear".
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if rule == "bilinear":
        raise ValueError("scan='logspace' cannot do rule='bilinear': Ā may be negative there")

    def log_cumsum(part: Tensor, a_star: Tensor) -> Tensor:
        return (a_star + (part.log() - a_star).logcumsumexp(1)).exp()

    h = x.new_zeros(x.shape[0], *A.shape) if h0 is None else h0
    ys = []
    for i in range(0, x.shape[1], chunk):
        x_i, delta_i, B_i, C_i = (tensor[:, i : i + chunk] for tensor in (x, delta, B, C))
        _, B_bar = discretize(delta_i, A, B_i, rule)  # (b, chunk, d, n)
        v = B_bar * x_i.unsqueeze(-1)
        log_A_bar = delta_i.unsqueeze(-1) * A
        if reset is not None:
            # exp(-104) is below the smallest float32: as good as the zero that has no logarithm.
            log_A_bar = log_A_bar.masked_fill(reset[:, i : i + chunk, None, None], -104.0)
        a_star = log_A_bar.cumsum(1)
        # log 0 has no gradient; a floor of 1e-30 on both parts cancels when they are subtracted.
        plus, minus = (v.abs() + v) / 2 + 1e-30, (v.abs() - v) / 2 + 1e-30
        hs = a_star.exp() * h.unsqueeze(1) + log_cumsum(plus, a_star) - log_cumsum(minus, a_star)
        ys.append((hs * C_i.unsqueeze(-2)).sum(-1))
        h = hs[:, -1].clone()  # a view would keep the states of the whole chunk in memory
    return torch.cat(ys, dim=1), h


## 3. Chunks. --------------------------------------------------------------------------------------
## Log space takes several logarithms and exponentials for every state and step. Chunks take only
## the exponentials of the loop, twice: each step is done two times, but many steps at once. Cut
## time into chunks of k steps. A chunk, combined into one map, turns its start state h into
##
##     h_end = P h + e,    P = Ā_k ... Ā_2 Ā_1,    e = the end state if the chunk starts at zero
##
## So:
##   1. run all chunks at once, each from zero: k steps, with the chunks as a batch axis. Gives e.
##   2. walk over the chunks with h <- P h + e: l / k steps. Gives each chunk's true start state.
##   3. run all chunks at once again, each from its true start state: k steps. Gives y.
## 2 k + l / k steps instead of l, fewest for k = sqrt(l / 2): 128 in place of 2048.
##
## The decay over a chunk needs no product of k factors: Ā_k ... Ā_1 = exp(Δ_k A) ... exp(Δ_1 A)
## = exp(A ΣΔ), one sum and one exponential. (Not under "bilinear", whose Ā is no exponential.
## There P is what the chunk makes of a state of ones when no input comes.) The code that named this
## form "chunk-parallel" (github.com/MzeroMiko/mamba-mini) finds y in step 3 by dividing by running
## products of decays, and fails where these underflow to 0. Here nothing is divided: no chunk is
## too long and no decay too strong.


@float32_island
def scan_chunked(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None = None,
    *, rule: str = "mamba", reset: Tensor | None = None, chunk: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All chunks at once, then from chunk to chunk, then all at once again. Shapes as above.

    chunk: steps per chunk; None takes sqrt(l / 2). It changes the speed and the rounding only.
    """
    batch, seqlen, _ = x.shape
    h = x.new_zeros(batch, *A.shape) if h0 is None else h0
    chunk = max(1, round(math.sqrt(seqlen / 2))) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
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


## 4. Recomputation. -------------------------------------------------------------------------------
## Training keeps what the backward pass needs. Of the loop or the chunks above, that is several
## tensors of (b, l, d, n), each n times as large as x. But all of it can be computed again from the
## state at the start of a chunk. So: one chunk after the other, keep only the h between them, and
## let the backward pass run each chunk again before it differentiates it (section 3.3.2 does the
## same on a GPU).
##
## The gradient of (2a) is a recurrence of the same kind, from the end to the start. With G_t the
## gradient with respect to h_t, from y_t and from h_{t+1}:
##
##     G_t = C_t dy_t + Ā_{t+1} G_{t+1}     dC_t = Σ_d dy_t h_t
##     dĀ_t = G_t h_{t-1}                   d(B̄_t x_t) = G_t
##
## At the last step of a chunk the second term of G is dh, the gradient of the h that is handed on;
## in return the chunk hands Ā_1 G_1 to the chunk before it. The rest, from Ā and B̄ x back to Δ, A,
## B and x, has no recurrence and is left to autograd.
##
## One chunk at a time is also what a CPU likes: it has few cores to run chunks side by side, but a
## short chunk stays in its cache, and every step is done once. Time is the first axis here and
## channels are the last, so that every operation runs along long rows in memory.


class RecomputedChunk(torch.autograd.Function):
    """x, delta (k, b, d), A (n, d), B, C (k, b, n), h (b, n, d), reset -> y (k, b, d), next h."""

    @staticmethod
    def inputs_of_recurrence(x, delta, A, B, rule, reset):
        """Ā and B̄ x, (k, b, n, d)."""
        A_bar, scale = decay_and_scale(delta.unsqueeze(-2), A, rule)
        if reset is not None:
            A_bar = A_bar.masked_fill(reset[:, :, None, None], 0)
        return A_bar, scale * x.unsqueeze(-2) * B.unsqueeze(-1)

    @staticmethod
    def run(A_bar, v, h):
        """h_t = Ā_t h_{t-1} + v_t for all t, in the place of v."""
        for A_t, h_t in zip(A_bar.unbind(), v.unbind(), strict=True):
            h = h_t.addcmul_(A_t, h)

    @staticmethod
    def forward(ctx, x, delta, A, B, C, h, rule, reset):
        ctx.save_for_backward(x, delta, A, B, C, h)
        ctx.rule, ctx.reset = rule, reset
        A_bar, hs = RecomputedChunk.inputs_of_recurrence(x, delta, A, B, rule, reset)
        RecomputedChunk.run(A_bar, hs, h)
        return (C.unsqueeze(-1) * hs).sum(-2), hs[-1].clone()

    @staticmethod
    def backward(ctx, dy, dh):
        if torch.is_grad_enabled():  # create_graph=True; else they would be zero without a word
            raise RuntimeError(
                "scan='recompute', which 'auto' means on a CPU, has no second derivatives: "
                "use scan='chunked'"
            )
        *inputs, C, h = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in inputs]
            A_bar, v = RecomputedChunk.inputs_of_recurrence(*inputs, ctx.rule, ctx.reset)
        # h takes v's place in memory. Autograd will not mind: the gradient of a product needs its
        # factors and not its result.
        decays, hs = A_bar.detach(), v.detach()
        RecomputedChunk.run(decays, hs, h)
        G = C.unsqueeze(-1) * dy.unsqueeze(-2)
        G[-1] += dh
        G_next, *before = reversed(G.unbind())
        for decay, G_t in zip(reversed(decays.unbind()), before, strict=False):
            G_next = G_t.addcmul_(decay, G_next)
        dA_bar = torch.empty_like(G)
        torch.mul(G[0], h, out=dA_bar[0])
        torch.mul(G[1:], hs[:-1], out=dA_bar[1:])
        dx, ddelta, dA, dB = torch.autograd.grad((A_bar, v), inputs, (dA_bar, G))
        dC, dh = (hs * dy.unsqueeze(-2)).sum(-1), decays[0] * G[0]
        return dx, ddelta, dA, dB, dC, dh, None, None


@float32_island
def scan_recompute(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None = None,
    *, rule: str = "mamba", reset: Tensor | None = None, chunk: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Chunk after chunk, with only the states between them kept. Shapes as above.

    chunk: steps per chunk; None takes 8 to 64, about 1 MB of states where the sizes allow it. For
    second derivatives and torch.func take another scan: this one is differentiable once.
    """
    if chunk is None:
        chunk = min(64, max(8, 2**18 // max(1, x.shape[0] * A.numel())))
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    h = x.new_zeros(x.shape[0], *A.mT.shape) if h0 is None else h0.mT.contiguous()
    A = A.mT.contiguous()
    chunks = [tensor.transpose(0, 1).split(chunk) for tensor in (x, delta, B, C)]
    resets = [None] * len(chunks[0]) if reset is None else reset.mT.split(chunk)
    ys = []
    for x_i, delta_i, B_i, C_i, reset_i in zip(*chunks, resets, strict=True):
        y, h = RecomputedChunk.apply(x_i, delta_i, A, B_i, C_i, h, rule, reset_i)
        ys.append(y.transpose(0, 1))
    return torch.cat(ys, dim=1), h.mT.contiguous()


## 5. The fused kernel. ----------------------------------------------------------------------------
## All scans above move tensors of (b, l, d, n) through memory, n times more than x and y have. On
## a GPU that traffic, not arithmetic, is the time. A fused kernel reads x, dt, B, C and z once,
## keeps h in registers and writes y once; for the backward pass it computes h again instead of
## having stored it (section 3.3.2). It is a text of its own, triton_scan.py, and goes on from here.

SCANS = {
    "sequential": scan_sequential,
    "logspace": scan_logspace,
    "chunked": scan_chunked,
    "recompute": scan_recompute,
}


## ================================================================================================
## The selective scan
## ================================================================================================
##
## What surrounds the recurrence, in one function: Δ from dt, the direct path D x, the gate. It is
## the piece that one lifts into another network.
##
## A crosswalk for readers of the official code (github.com/state-spaces/mamba):
##
##   official                                 here
##   selective_scan_fn(u, delta, ...)         selective_scan(x, dt, ...); time is axis 1, not last
##   u, delta in it                           x, dt (here u is the residual stream, delta is Δ)
##   delta_bias, delta_softplus               dt_bias, dt_softplus
##   mamba_inner_fn, use_fast_path            nothing: PyTorch's operators around one fused scan
##   inference_params, allocate_inference_cache    state, init_state
##   conv_state, ssm_state                    state.conv, state.h
##   seqlen_offset (0: prefill, else: step)   nothing: the caller calls forward or step
##   d, D in the shapes of its scans          d = d_inner; d there is not d_model
##   D in the shapes of Algorithm 2           d = d_inner; here D is only the direct path


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, h0: Tensor | None = None, *, dt_bias: Tensor | None = None,
    dt_softplus: bool = True, rule: str = "mamba", reset: Tensor | None = None, scan: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The SSM with everything around it: lines 4 to 6 of Algorithm 2, then D x and the gate.

        delta = softplus(dt + dt_bias);  y = (scan(x, delta, A, B, C) + D x) silu(z)

    x, dt, z (b, l, d), A (d, n), B, C (b, l, n), D, dt_bias (d,), h0 (b, d, n), reset (b, l) bool.
    Returns y (b, l, d) in x's dtype and h_last (b, d, n) in float32 (float64 for float64 inputs).
    scan: a name in SCANS, "triton" (the fused kernel), or "auto": on a CPU recompute, on a GPU
    triton if it takes these tensors; else, and under torch.compile and torch.func, chunked.
    Raises ValueError for shapes that do not fit and for unknown names, RuntimeError if "triton" is
    asked for and cannot run.
    """
    tensors = (x, dt, A, B, C, D, z, h0)
    if scan == "triton" or (scan == "auto" and triton_takes(rule, *tensors, dt_bias)):
        options = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "rule": rule, "reset": reset}
        return import_triton_scan().selective_scan_triton(*tensors, **options)
    if scan != "auto" and scan not in SCANS:
        raise ValueError(f"scan must be 'auto', 'triton' or one of {tuple(SCANS)}, got {scan!r}")
    check_scan_shapes(x, A=A, dt=dt, B=B, C=C, D=D, z=z, h0=h0, dt_bias=dt_bias, reset=reset)

    if scan == "auto":
        # Compilers, tracers and transformations want plain operators.
        plain = torch.compiler.is_compiling() or torch.jit.is_tracing() or in_functorch()
        scan = "recompute" if x.device.type == "cpu" and not plain else "chunked"
    run = SCANS[scan]
    delta = at_least_float32(dt)
    if dt_bias is not None:
        delta = delta + dt_bias
    if dt_softplus:
        delta = F.softplus(delta)
    y, h_last = run(x, delta, A, B, C, h0, rule=rule, reset=reset)
    if D is not None:
        y = y + at_least_float32(D) * x
    if z is not None:
        y = y * F.silu(at_least_float32(z))
    return y.to(x.dtype), h_last


def in_functorch() -> bool:
    """Whether torch.func.grad, vmap or their like are at work."""
    return torch._C._are_functorch_transforms_active()


# Looked for, not imported: `import mamba` must not wait for it.
HAS_TRITON = all(importlib.util.find_spec(name) for name in ("triton", "triton_scan"))


def import_triton_scan():
    """triton_scan.py, which stands beside this file. Raises RuntimeError without triton."""
    try:
        import triton_scan
    except ImportError as error:
        raise RuntimeError(
            "scan='triton' needs triton_scan.py beside mamba.py, and triton, which comes with "
            f"PyTorch for GPUs (or: pip install triton): {error}. Or use scan='chunked'"
        ) from error
    return triton_scan


def triton_takes(rule: str, *tensors: Tensor | None) -> bool:
    """Whether scan="auto" may choose the kernel: a GPU, and rule, sizes and dtypes that it has."""
    on_gpu = all(t is None or (t.is_cuda and t.dtype != torch.float64) for t in tensors)
    return on_gpu and rule in ("mamba", "dirac") and tensors[2].shape[-1] <= 256 and HAS_TRITON


## ================================================================================================
## The other parts of the block
## ================================================================================================


class DeltaProjection(nn.Linear):
    """A Linear whose bias is left to the caller, who adds it in float32.

    The bias starts between -7 and -2, and what the weights add to it is small. A sum in bfloat16,
    with its 8 significant bits, would round away much of what the token has to say about Δ. It is
    called as a module, so that adapters such as LoRA can wrap it; a wrapper has to pass `.bias` on.
    """

    def forward(self, low_rank: Tensor) -> Tensor:
        return F.linear(low_rank, self.weight)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, reset: Tensor | None = None,
    *, silu: bool = False, scan: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A convolution along time that sees nothing to the right, one filter per channel.

    x (b, l, d), weight (d, 1, d_conv), bias (d,), past (b, d, d_conv - 1): the inputs before x,
    oldest first. Returns out (b, l, d) and the past of what follows, (b, d, d_conv - 1):

        out_t = bias + Σ_j weight_j x_{t - (d_conv - 1) + j},   j = 0 ... d_conv - 1

    With reset (b, l), no term of the sum reaches back over the start of a document. silu: SiLU of
    the sum. scan: with "auto" or "triton" a kernel does the same on a GPU.
    """
    seqlen, reach = x.shape[1], weight.shape[-1] - 1
    past = past.to(x.dtype)
    # Number the documents; the past belongs to number 0.
    document = None if reset is None else F.pad(reset.cumsum(-1), (reach, 0)).unsqueeze(1)
    recent = x[:, max(0, seqlen - reach) :].mT  # (b, d, d_conv - 1)
    # A new tensor: a view would keep all of x in memory for as long as the state lives.
    next_past = torch.cat([past[..., seqlen:], recent], dim=-1)
    if document is not None:
        next_past = next_past * (document[..., seqlen:] == document[..., -1:])
    fits = x.is_cuda and x.dtype != torch.float64 and reach < 4
    if fits and scan in ("auto", "triton") and HAS_TRITON:
        kernel = import_triton_scan().causal_conv_triton
        return kernel(x, weight, bias, past, reset, silu=silu), next_past

    ## Filter number j sees the sequence d_conv - 1 - j steps late. The sum is float32: bfloat16
    ## would round it four times.
    window = at_least_float32(torch.cat([past.mT, x], dim=1))  # (b, d_conv - 1 + l, d)
    out = window.new_zeros(()) if bias is None else at_least_float32(bias)
    for j in range(reach + 1):
        filter_j = at_least_float32(weight[:, 0, j])
        if document is not None:  # multiply away what is not of one's own document
            same = document[:, 0, j : j + seqlen] == document[:, 0, reach:]
            filter_j = filter_j * same.unsqueeze(-1)
        out = torch.addcmul(out, window[:, j : j + seqlen], filter_j)
    return (F.silu(out) if silu else out).to(x.dtype), next_past


## ================================================================================================
## The state
## ================================================================================================


@dataclass
class MambaState:
    """All that a block, or a model, remembers of the past. Its size does not depend on the length.

    conv: (b, d, d_conv - 1)  the last inputs of the convolution, raw and oldest first
    h:    (b, d, n)           the state of the SSM, float32 (float64 in a float64 model)

    A model's state has the layers as an additional axis in front. States are values: no function
    here changes one, each returns a new one, so a state can be kept and used again.

        torch.save(vars(state), file);   state = MambaState(**torch.load(file))
    """

    conv: Tensor
    h: Tensor

    @classmethod
    def stack(cls, states: list[MambaState]) -> MambaState:
        """One state for a model from the states of its layers."""
        return cls(torch.stack([s.conv for s in states]), torch.stack([s.h for s in states]))

    def map(self, function: Callable[[Tensor], Tensor]) -> MambaState:
        """Apply a function to both tensors."""
        return MambaState(function(self.conv), function(self.h))

    def __getitem__(self, index: Any) -> MambaState:
        """Index both tensors: state[i] is layer i of a model's state, state[:, rows] some rows."""
        return self.map(lambda tensor: tensor[index])

    def clone(self) -> MambaState:
        return self.map(torch.clone)

    def detach(self) -> MambaState:
        """Cut the graph, so that back-propagation stops here (truncated back-propagation)."""
        return self.map(torch.detach)

    def to(self, device: torch.device | str) -> MambaState:
        """Move to a device; dtypes stay, because h must remain float32."""
        return self.map(lambda tensor: tensor.to(device))


## ================================================================================================
## Nothing below is about Mamba
## ================================================================================================
##
## Errors are raised here, at the boundary, with the offending value and what was expected.


def check_model_inputs(config: MambaConfig, ids: Tensor, ndim: int, state: MambaState) -> None:
    axes = "(batch, seqlen)" if ndim == 2 else "(batch,)"
    if ids.ndim != ndim or ids.numel() == 0 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expected integer ids {axes}, got {ids.dtype} {tuple(ids.shape)}")
    if state.h.ndim != 4 or len(state.h) != config.n_layer:
        raise ValueError(
            f"expected the state of a model of {config.n_layer} layers, with h (layers, batch, "
            f"d_inner, d_state), got {tuple(state.h.shape)}"
        )


def check_block_inputs(
    config: MambaConfig, u: Tensor, ndim: int, state: MambaState | None, **flags: Tensor | None
) -> None:
    axes = "(batch, seqlen, d_model)" if ndim == 3 else "(batch, d_model)"
    if u.ndim != ndim or u.shape[-1] != config.d_model or u.numel() == 0:
        raise ValueError(f"expected {axes}, d_model = {config.d_model}, got {tuple(u.shape)}")
    if state is not None:
        for name, last in (("conv", config.d_conv - 1), ("h", config.d_state)):
            expected, shape = (u.shape[0], config.d_inner, last), getattr(state, name).shape
            if shape != expected:
                raise ValueError(f"state.{name} must have shape {expected}, got {tuple(shape)}")
    for name, flag in flags.items():
        if flag is not None and (flag.dtype != torch.bool or flag.shape != u.shape[:2]):
            raise ValueError(
                f"{name} must be bool {tuple(u.shape[:2])}, got {flag.dtype} {tuple(flag.shape)}"
            )


def check_time_steps(config: MambaConfig, u: Tensor, time_steps: Tensor | None) -> None:
    if (time_steps is not None) != config.event_time:
        expected = "time_steps" if config.event_time else "no time_steps"
        raise ValueError(f"this model takes {expected}: its config has {config.event_time=}")
    if time_steps is None:
        return
    shape = u.shape[:-1]
    if time_steps.shape != shape or time_steps.is_complex() or time_steps.dtype == torch.bool:
        raise ValueError(
            f"time_steps must be real numbers {tuple(shape)}, one for each token, "
            f"got {time_steps.dtype} {tuple(time_steps.shape)}"
        )
    # A look at numbers makes the CPU wait for a GPU, and breaks a compiled graph.
    if time_steps.device.type == "cpu" and not torch.compiler.is_compiling():
        if not ((time_steps >= 0) & time_steps.isfinite()).all():
            raise ValueError("time_steps must be finite and not negative: one of them is not")


def check_left_padding(mask: Tensor, start: MambaState) -> None:
    if torch.compiler.is_compiling():
        return
    if (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("mask must be left padding: False before the first token, then only True")
    if (start.h[~mask[:, 0]] != 0).any():
        raise ValueError("mask pads a row that has already seen tokens: pad the first chunk only")


def check_scan_shapes(x: Tensor, **tensors: Tensor | None) -> None:
    if x.ndim != 3 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"x must be real (batch, seqlen, d_inner), got {x.dtype} {tuple(x.shape)}")
    (batch, seqlen, d), n = x.shape, tensors["A"].shape[-1]
    bld, bln = (batch, seqlen, d), (batch, seqlen, n)
    shapes = dict(A=(d, n), dt=bld, B=bln, C=bln, D=(d,), z=bld, dt_bias=(d,))
    shapes |= dict(h0=(batch, d, n), reset=(batch, seqlen))
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shapes[name]:
            raise ValueError(f"{name} must have shape {shapes[name]}, got {tuple(tensor.shape)}")
        if tensor is not None and tensor.is_complex():
            raise ValueError(f"{name} must be real: complex SSMs are not implemented")
    if tensors["reset"] is not None and tensors["reset"].dtype != torch.bool:
        raise ValueError(f"reset must be bool, got {tensors['reset'].dtype}")


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Device = torch.device | str | None


def check_target(device: Device, dtype: torch.dtype) -> None:
    """For `from_pretrained`, before anything is downloaded."""
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = first_sentence(error)
        raise ValueError(f"device {str(device)!r} cannot be used: {why}") from error


def first_sentence(error: BaseException) -> str:
    return re.split(r"\n|\. ", str(error).strip() or type(error).__name__)[0][:200]


## config.json has one of two layouts. That of the state-spaces/mamba-* repositories keeps the
## fields of the SSM in "ssm_cfg" and all others at the top. That of transformers has everything at
## the top, under other names, with defaults of its own, and ignores what it does not know.

TOP_FIELDS = (
    "d_model n_layer vocab_size residual_in_fp32 pad_vocab_size_multiple tie_embeddings"
).split()
SSM_FIELDS = (
    "d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale dt_init_floor conv_bias bias"
).split()
EXTRA_FIELDS = ["norm_eps", "tokenizer", "rule"]  # written only when they are not the default
FIELDS = {name: name for name in TOP_FIELDS + EXTRA_FIELDS + SSM_FIELDS}
HF_FIELDS = dict(
    hidden_size="d_model", num_hidden_layers="n_layer", vocab_size="vocab_size",
    state_size="d_state", conv_kernel="d_conv", expand="expand", time_step_rank="dt_rank",
    use_bias="bias", use_conv_bias="conv_bias", residual_in_fp32="residual_in_fp32",
    layer_norm_epsilon="norm_eps", tie_word_embeddings="tie_embeddings",
)  # fmt: skip
HF_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 32, "vocab_size": 50280, "model_type": None}
# Fields that may stand there with exactly this value, since no other is implemented.
FIXED_FIELDS = {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}}
FIXED_FIELDS |= {"layer": "Mamba1", "model_type": "mamba"}
HF_FIXED_FIELDS = {"model_type": "mamba", "hidden_act": "silu", "quantization_config": None}
# Fields that do not change what is computed.
IGNORED_FIELDS = {"fused_add_norm", "use_fast_path", "architectures", "torch_dtype", "dtype"}


def read_config(path: Path) -> MambaConfig:
    """config.json -> MambaConfig. Raises ValueError for a field that would change the model."""
    found = read_json(path)
    from_hf = "hidden_size" in found or ("model_type" in found and "d_model" not in found)
    names, fixed = (HF_FIELDS, HF_FIXED_FIELDS) if from_hf else (FIELDS, FIXED_FIELDS)
    try:
        if found.pop("event_time", False) is not False:
            raise ValueError("event_time belongs to the block of examples/event_time.py")
        ssm = {} if from_hf else found.pop("ssm_cfg", {})
        if not isinstance(ssm, dict) or ssm.keys() & found:
            raise ValueError(f"ssm_cfg must hold fields that stand nowhere else, got {ssm!r}")
        found = HF_DEFAULTS | found if from_hf else found | ssm
        known = {ours: found.pop(theirs) for theirs, ours in names.items() if theirs in found}
        for name, value in fixed.items():
            if (other := found.pop(name, value)) != value:
                raise ValueError(f"{name} = {other!r} is another architecture, Mamba has {value!r}")
        if not from_hf and (unknown := found.keys() - IGNORED_FIELDS):
            raise ValueError(f"unknown fields {', '.join(sorted(unknown))}")
        if missing := {"d_model", "n_layer", "vocab_size"} - known.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}: not the config of a Mamba")
        config = MambaConfig(**known, **({"pad_vocab_size_multiple": 1} if from_hf else {}))
        if from_hf and (size := found.get("intermediate_size", config.d_inner)) != config.d_inner:
            raise ValueError(f"intermediate_size must be {config.d_inner}, got {size!r}")
        # A slip of the finger must not become an hour of building layers.
        largest = max(value for value in vars(config).values() if type(value) is int)
        if config.n_layer > 10_000 or config.d_inner * largest > 2**40:
            raise ValueError(f"these sizes are too large to be meant: {known}")
        return config
    except (TypeError, ValueError) as error:
        theirs = {ours: name for name, ours in names.items()}  # MambaConfig begins with our name
        message = re.sub(r"^\w+", lambda word: theirs.get(word[0], word[0]), str(error))
        raise ValueError(f"{path}: {message}") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        if not isinstance(entries := json.loads(path.read_bytes()), dict):
            raise ValueError(f"a {type(entries).__name__}, not an object")
        return entries
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error


## What the Hub's client raises, by the name of the class or of its nearest base class here, and
## what is said instead. By name, because the client is imported only when it is needed.

OUT_OF_REACH = "{files} is not in the cache and the Hub is out of reach ({why}): check the network"
# fmt: off
HUB_FAULTS = {
    "GatedRepoError": (RuntimeError,
        "accept its terms at https://huggingface.co/{name}, then run `hf auth login`"),
    "RepositoryNotFoundError": (FileNotFoundError,
        "the Hub has no such repository, or it is private: check the name or run `hf auth login`"),
    "RevisionNotFoundError": (FileNotFoundError,
        "no revision {revision!r}: choose one of https://huggingface.co/{name}/commits"),
    "OfflineModeIsEnabled": (FileNotFoundError,
        "{files} is not in the cache: load once without HF_HUB_OFFLINE and local_files_only"),
    "ConnectError": (FileNotFoundError, OUT_OF_REACH),
    "TimeoutException": (FileNotFoundError, OUT_OF_REACH),
    "TimeoutError": (FileNotFoundError, OUT_OF_REACH + " or set HF_HUB_ETAG_TIMEOUT=10"),
    "Exception": (RuntimeError, "{files} could not be downloaded ({why}): try again later"),
}
# fmt: on


def file_finder(
    name_or_path: str | os.PathLike, revision: str | None = None,
    cache_dir: str | os.PathLike | None = None, local_files_only: bool = False,
) -> Callable[..., Path]:  # fmt: skip
    """find(*files): the path of the first of these files that a folder or repository has.

    The Hub is asked once for its list of files; what is found is downloaded if need be. If it does
    not answer (no network, HF_HUB_OFFLINE, an expired login), its cache is looked through.
    """
    folder, name = Path(name_or_path).expanduser(), str(name_or_path).rstrip("/")
    where, listed, failure = {"revision": revision, "cache_dir": cache_dir}, set(), None
    is_folder = name != "" and folder.is_dir()
    # "checkpoints/typo" looks like a repository: a folder "checkpoints" here says that it is none.
    is_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not folder.parent.is_dir()
    if is_folder:
        listed = {path.name for path in folder.iterdir() if path.is_file()}
    elif is_name:
        import huggingface_hub as hub
        from huggingface_hub import errors, utils

        utils.validate_repo_id(name)
        try:
            if local_files_only:
                raise errors.OfflineModeIsEnabled
            info = in_time(hub.HfApi().model_info, name, revision=revision)
            listed = {file.rfilename for file in info.siblings or ()}
        except Exception as error:
            failure = error
    else:
        raise FileNotFoundError(f"{name!r} is neither a folder nor the name of a Hub repository")

    def find(*files: str) -> Path:
        nonlocal failure
        file = next((file for file in files if file in listed), None)
        if file is None and failure is None:
            raise FileNotFoundError(f"{name} has no file {' or '.join(files)}")
        if is_folder:
            return folder / file
        try:
            if failure is None:
                url = hub.hf_hub_url(name, file, revision=where["revision"])
                in_time(hub.get_hf_file_metadata, url)
                # Not snapshot_download: it shows a bar even for what is there.
                path = Path(hub.hf_hub_download(name, file, **where))
                where["revision"] = path.parent.name  # its commit: all files are of the same
                return path
        except Exception as error:
            failure = error
        for cached in files:
            if isinstance(path := hub.try_to_load_from_cache(name, cached, **where), str):
                return Path(path)
        fault = next(c.__name__ for c in type(failure).__mro__ if c.__name__ in HUB_FAULTS)
        kind, sentence = HUB_FAULTS[fault]
        words = {"name": name, "files": file or " or ".join(files), "revision": revision}
        sentence = sentence.format(**words, why=first_sentence(failure))
        raise kind(f"{name}: {sentence}") from failure

    return find


def in_time(ask: Callable[..., Any], *question: Any, **options: Any) -> Any:
    """What the Hub's client answers or raises, or TimeoutError.

    Its downloads try for 23 seconds and more, and to look up an address may take as long as it
    likes: hence a thread, which is left alone when its time is over.
    """
    seconds, answer = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", 1.5)), Future()

    def run() -> None:
        try:
            answer.set_result(ask(*question, **options, timeout=seconds))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(seconds)


WEIGHT_FILES = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILES += "pytorch_model.bin", "pytorch_model.bin.index.json"
EMBEDDING, HF_EMBEDDING = "backbone.embedding.weight", "backbone.embeddings.weight"


def load_weights(
    model: Mamba, find: Callable[..., Path], device: Device, dtype: torch.dtype
) -> None:
    """Give the model, so far without numbers, those of its files: every weight and no other."""
    path = find(*WEIGHT_FILES)
    paths, weights, found, promised = [path], {}, set(), None
    if path.suffix == ".json":
        index, kind = read_json(path).get("weight_map"), path.name.split(".")[1]
        shards = {str(shard) for shard in index.values()} if isinstance(index, dict) else set()
        # A name with a slash could lead out of the folder.
        if not shards or not all(re.fullmatch(rf"[\w.-]+\.{kind}", shard) for shard in shards):
            raise ValueError(f"{path}: weight_map must name the .{kind} file of each weight")
        paths, promised = [find(shard) for shard in sorted(shards)], set(index.items())
    for file in paths:
        tensors = read_tensors(file, device, dtype)
        weights |= tensors
        found |= {(name, file.name) for name in tensors}
    if promised and (torn := sorted({name for name, _ in promised ^ found})):
        raise RuntimeError(f"{path} and its files disagree on {len(torn)} weights, first {torn[0]}")
    if HF_EMBEDDING in weights and EMBEDDING not in weights:
        weights[EMBEDDING] = weights.pop(HF_EMBEDDING)
    if model.config.tie_embeddings and EMBEDDING in weights:
        weights.setdefault("lm_head.weight", weights[EMBEDDING])
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise RuntimeError(f"{path} and config.json do not fit together: {error}") from error
    if model.config.tie_embeddings:
        if not torch.equal(model.lm_head.weight, model.backbone.embedding.weight):
            raise ValueError(f"{path}: the embeddings are tied, but lm_head is not the embedding")
        model.tie_weights()


def read_tensors(path: Path, device: Device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one file, cast. If they have this dtype, the file is mapped into memory.

    A mapped file stays there until its last tensor is gone: with the copies of another dtype, one
    and a half files. To be cast, each tensor gets memory of its own.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    def read(mapped: bool) -> Any:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            return tensors if mapped else {n: safe_open(path, "pt").get_tensor(n) for n in tensors}
        # weights_only: a pickle from the internet may contain tensors, never code to run.
        # A file from before torch 1.6 is no zip file and cannot be mapped.
        mapped = mapped and zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)

    try:
        tensors = read(mapped=True)
    except Exception as error:
        with path.open("rb") as file:
            why = f"{first_sentence(error)}; it begins with {file.read(24)!r}"
        message = f"{path} is damaged or holds more than tensors, of which nothing was run ({why})"
        remedy = "get it again, a git-lfs pointer by `git lfs pull`"
        raise RuntimeError(f"{message}: {remedy}") from error
    if not isinstance(tensors, dict):
        raise RuntimeError(f"{path} must hold a dict of tensors, got {type(tensors).__name__}")
    odd = [  # in a list of its own: a variable for a tensor would keep the file mapped
        f"{name!r} is {type(t).__name__} {getattr(t, 'dtype', '')}"
        for name, t in tensors.items()
        if not (isinstance(name, str) and isinstance(t, Tensor) and t.dtype in FLOATS)
        or (t.layout, t.is_meta) != (torch.strided, False)
    ]
    if odd:
        raise RuntimeError(f"{path} must hold dense tensors of real numbers, but {odd[0]}")
    if any(tensor.dtype != dtype for tensor in tensors.values()):
        tensors = read(mapped=False)
    return {name: tensors.pop(name).to(device, dtype).contiguous() for name in list(tensors)}


def write_checkpoint(folder: Path, model: Mamba) -> None:
    """config.json and model.safetensors, in the layout of the state-spaces/mamba-* repositories."""
    from safetensors.torch import save_file

    values, weights = vars(model.config), dict(model.state_dict())
    extra = [name for name in EXTRA_FIELDS if values[name] != getattr(MambaConfig, name)]
    entries = {name: values[name] for name in (*TOP_FIELDS, *extra)}
    entries["ssm_cfg"] = {name: values[name] for name in SSM_FIELDS}
    entries |= {"rms_norm": True, "fused_add_norm": True}
    if model.config.tie_embeddings:
        del weights["lm_head.weight"]  # the same tensor as the embedding; loading ties it again
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(entries, indent=2) + "\n")
    # Written aside and moved: the old file may be the one that the model's weights are mapped from.
    temporary = folder / "model.safetensors.partial"
    save_file({k: v.contiguous() for k, v in weights.items()}, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")
