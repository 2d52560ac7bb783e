"""Text completion with Mamba: tokenizers, a sampler, a loop, and a command line.

    python generate.py "To be, or not to be"                       # the small model that ships
    python generate.py "Mamba is the" --model state-spaces/mamba-370m

    model = Mamba.from_pretrained("state-spaces/mamba-130m")
    tokenizer = load_tokenizer(model.config, "state-spaces/mamba-130m")
    print(generate(model, tokenizer, "Mamba is the", temperature=0.7, seed=1))

From the outside in: `generate` (text in, text out) -> `stream` (ids in, ids out, one at a time) ->
`prefill` (the prompt) -> the steps on a GPU and on a CPU -> `sample` (logits in, ids out) -> the
tokenizers -> the checks -> the command line.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import copy
import functools
import importlib.util
import itertools
import math
import os
import platform
import re
import signal
import sys
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    # Before torch, whose import takes seconds: Ctrl-C ends the program, with no traceback, and
    # warnings are off unless Python was told otherwise: stderr is for one error, or for --stats.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamba
from mamba import (
    SCANS,
    Mamba,
    MambaConfig,
    MambaState,
    at_least_float32,
    discretize,
    file_finder,
    is_our_own,
)

## ================================================================================================
## Text in, text out
## ================================================================================================


def generate(
    model: Mamba, tokenizer: Tokenizer, prompt: str | list[str], **sampling: Any
) -> str | list[str]:
    """The text that follows the prompt, without the prompt; for a list of prompts, a list.

    sampling: the keyword arguments of `stream`, except mask. Unless given, eos_token_id and
    vocab_size are the tokenizer's. The text ends before the EOS, and without a character that is
    left incomplete. Raises ValueError for an empty prompt, and what `stream` raises.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    input_ids, mask = encode_batch(tokenizer, prompts, model.lm_head.weight.device)
    eos = sampling.setdefault("eos_token_id", tokenizer.eos_token_id)
    sampling.setdefault("vocab_size", tokenizer.vocab_size)
    steps = list(stream(model, input_ids, mask=mask, **sampling))
    texts = []
    for ids in torch.stack(steps, dim=1).tolist():
        ids = itertools.takewhile(lambda token_id: token_id != eos, ids)
        texts.append("".join(tokenizer.decode_stream(ids)))
    return texts[0] if isinstance(prompt, str) else texts


## Prompts of unequal length form one batch by padding on the left, so that all of them end, and
## continue, at the same column. The mask keeps the padding out of the state: each prompt gets the
## numbers that it would get alone.


def encode_batch(
    tokenizer: Tokenizer, prompts: list[str], device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """Texts -> ids (batch, longest), int64, and mask, bool, of that shape; None if no padding."""
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    if not rows or not all(rows):
        raise ValueError("the prompt is empty: there is nothing to continue")
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(longest, device=device) >= longest - lengths.unsqueeze(-1)
    return ids, None if mask.all() else mask


## ================================================================================================
## The loop
## ================================================================================================
##
## The prompt is known, so all of it goes through the model at once and in parallel (prefill). What
## it leaves behind is a state of fixed size and the logits of its last position. From here on each
## token depends on the one before, and every step costs the same: sample a token from the logits,
## feed it to `step`, get the next logits and the next state. No earlier token is looked at again.
##
## A function with `yield` is a good home for such a loop. The caller takes as many tokens as it
## likes, when it likes, and between two of them the state waits in the local variables.


@torch.no_grad()
def stream(
    model: Mamba,
    input_ids: Tensor,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    vocab_size: int | None = None,
    seed: int | None = None,
    mask: Tensor | None = None,
) -> Iterator[Tensor]:
    """input_ids (batch, seqlen) -> the next token of each row, (batch,) int64, again and again.

    Ends after max_new_tokens, or once every row has produced eos_token_id; a row that is finished
    repeats it. None never ends early. Temperature to min_p: see `sample`; repetition_penalty: see
    `penalize_repetition`.

    vocab_size: ids from here on are never sampled. The model's rows beyond the tokenizer's last
        token only pad; None trusts the model's configuration to know how many there are.
    seed: None draws from torch's global generator, an integer from one of this call's own. The
        same seed and the same arguments, max_new_tokens among them, give the same tokens.
    mask: (batch, seqlen) bool, False on left padding.

    All arguments are checked when the first token is asked for. Raises ValueError for values out
    of range and shapes that do not fit, IndexError for an id that is not in the vocabulary. Raises
    RuntimeError for logits that are not finite; on a GPU only those after the prompt are looked at.
    """
    cuts = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    check_sampling(
        max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty, seed=seed, **cuts
    )
    vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= model.config.vocab_size:
        raise ValueError(f"vocab_size must be in [1, {model.config.vocab_size}], got {vocab_size}")
    if eos_token_id is not None and not 0 <= eos_token_id < vocab_size:
        raise ValueError(f"eos_token_id must be None or in [0, {vocab_size}), got {eos_token_id}")
    check_prompt(vocab_size, input_ids, mask)
    batch, device, on_gpu = len(input_ids), input_ids.device, input_ids.is_cuda
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    # What the prompt contains. Padding is marked in a column of its own, which is cut off.
    real_ids = input_ids if mask is None else input_ids.masked_fill(~mask, vocab_size)
    seen = torch.zeros(batch, vocab_size + 1, dtype=torch.bool, device=device)
    seen = seen.scatter_(1, real_ids.long(), True)[:, :vocab_size]

    logits, state = prefill(model, input_ids, mask)
    with continuing(model, state, max_new_tokens) as step:
        for count in range(1, max_new_tokens + 1):
            logits = logits[:, :vocab_size]
            if count == 1 or not on_gpu:  # a GPU would have to be waited for
                check_logits(logits)
            if repetition_penalty != 1:
                logits = penalize_repetition(logits, seen, repetition_penalty)
            token_ids = sample(logits, generator=generator, **cuts)
            if eos_token_id is not None:
                token_ids = token_ids.masked_fill(finished, eos_token_id)
                finished |= token_ids == eos_token_id
            yield token_ids
            # Asked here and not before the yield: a step is computed only if its logits are wanted.
            if count == max_new_tokens or (eos_token_id is not None and finished.all()):
                return
            if repetition_penalty != 1:
                seen.scatter_(1, token_ids.unsqueeze(-1), True)
            logits = step(token_ids)


## `model.step` is for every device, and for reading. For a model of our modules only (`is_our_own`)
## two others compute the same, and faster: "The step on a GPU", and "The step on a CPU" for one
## sequence. The same up to rounding: with short floats a seed may lead to another text.


def continuing(
    model: Mamba, state: MambaState, tokens: int
) -> contextlib.AbstractContextManager[Callable[[Tensor], Tensor]]:
    """A function that feeds tokens (batch,) to the model and returns logits, from this state on.

    tokens: how many will be asked for in all; it will be called for fewer.
    """
    if can_record(model):
        return by_graph(model, state)
    if can_copy(model, state, tokens):
        return by_columns(model, state)
    return by_step(model, state)


@contextlib.contextmanager
def by_step(model: Mamba, state: MambaState) -> Iterator[Callable[[Tensor], Tensor]]:
    def step(token_ids: Tensor) -> Tensor:
        nonlocal state
        logits, state = model.step(token_ids, state)
        return logits

    yield step


## ================================================================================================
## The prompt
## ================================================================================================
##
## A part of the prompt leaves a state behind, and the next part goes on from there. So a long
## prompt is read in parts, and needs the memory of one. (Attention can read in parts as well, but
## has to keep all that it has read.)
##
## The time goes into matrix products, and for those PyTorch has two libraries on a CPU. nn.Linear
## calls MKL, which keeps its AVX-512 routines for Intel's processors. On AMD's the other, oneDNN,
## is twice as fast; PyTorch calls it for convolutions. And a Linear is a convolution of width 1,
## over an image in which each pixel is a token and its colours are the d_in numbers of u. So there
## the two large products of every layer are computed as convolutions.


def prefill(
    model: Mamba, input_ids: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, MambaState]:
    """input_ids (batch, seqlen) -> (batch, padded_vocab_size), the last position's logits; state.

    What `model(input_ids, model.init_state(batch), mask=mask)` returns, up to rounding, without
    the logits of the other positions. mask: as in `stream`, which checks both (`check_prompt`).
    A model that is not of our modules only gets the prompt in one piece.
    """
    (batch, length), on_cpu = input_ids.shape, input_ids.device.type == "cpu"
    reader = by_convolution(model) if can_convolve(model, batch * length) else model
    if is_our_own(model):
        length = max(1, (CPU_READS if on_cpu else GPU_READS) // batch)
    parts = input_ids.split(length, dim=1)
    resets = [None] * len(parts) if mask is None else starts(mask).split(length, dim=1)
    state = model.init_state(batch)
    for ids, reset in zip(parts, resets, strict=True):
        u, state = reader.features(ids, state, reset=reset)
    return model.lm_head(u[:, -1]), state


def starts(mask: Tensor) -> Tensor:
    """Left padding (b, l) bool -> True at a row's first token where padding stands before it."""
    return mask & ~F.pad(mask, (1, 0), value=True)[:, :-1]


# Tokens of all rows in a part. More of them take more memory and no less time.
CPU_READS, GPU_READS = 1024, 8192
WORTH_CONVOLUTION = 128  # tokens; oneDNN first copies the weights into an order of its own


class Convolution(nn.Module):
    """An nn.Linear, with the very same parameters, as a convolution of width 1."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, u: Tensor) -> Tensor:
        ## One pixel wide and as high as there are tokens. No number moves: with the colours of a
        ## pixel side by side ("channels last") the image lies in memory as u does.
        image = u.reshape(1, -1, 1, u.shape[-1]).permute(0, 3, 1, 2)  # (1, d_in, tokens, 1)
        image = F.conv2d(image, self.weight[:, :, None, None], self.bias)
        return image.permute(0, 2, 3, 1).reshape(*u.shape[:-1], -1)


def by_convolution(model: Mamba) -> Mamba:
    """A model of the same parameters, in which in_proj and out_proj of all layers are convolutions.

    Nothing is copied, so gradients reach the parameters of the model. Hooks and buffers are shared
    as well: call it, but change the model and not the twin.
    """

    def but_with(module: nn.Module, **children: nn.Module) -> Any:
        twin = copy.copy(module)
        twin._modules = module._modules | children
        return twin

    layers = nn.ModuleList()
    for layer in model.backbone.layers:
        block = layer.mixer
        in_proj, out_proj = Convolution(block.in_proj), Convolution(block.out_proj)
        layers.append(but_with(layer, mixer=but_with(block, in_proj=in_proj, out_proj=out_proj)))
    return but_with(model, backbone=but_with(model.backbone, layers=layers))


def can_convolve(model: Mamba, tokens: int) -> bool:
    """Whether that is faster: many tokens, in float32, on a processor of AMD with AVX-512.

    (Short floats go to oneDNN anyway. Intel's processors lose, up to two thirds of their speed.)
    """
    weights = list(model.parameters())
    return (
        all(p.device.type == "cpu" and p.dtype == torch.float32 for p in weights)
        and tokens >= WORTH_CONVOLUTION
        and torch.get_num_threads() > 1  # with one thread PyTorch convolves a single image itself
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and is_amd()
        and is_our_own(model)
    )


@functools.cache
def is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not on Linux
        return "AuthenticAMD" in platform.processor()


## ================================================================================================
## The step on a GPU
## ================================================================================================
##
## One token is little work, and PyTorch cuts it into some forty operators a layer. A GPU is done
## with each in two microseconds; Python takes longer to start it. Two things help:
##
##   fewer kernels   `block_step_triton` does a layer in four, for five sequences and more in five.
##   a CUDA graph    The launches of one step are recorded once, with the addresses of all their
##                   tensors, and then replayed by a single call. What changes from token to token,
##                   ids, state and logits, has to stay in its place: so a graph has buffers for
##                   these, and overwrites its state, which `model.step` never does.


class StepGraph:
    """`model.step` for one batch size, recorded as a CUDA graph: token ids in, logits out.

    It reads the parameters where they lie: changes in place, as optimisers make them, count from
    the next token on; parameters put in their place count from the next generation on. It does not
    keep the model.
    """

    @torch.inference_mode(False)  # its buffers will be written to outside of that mode as well
    @torch.no_grad()
    def __init__(self, model: Mamba, batch: int) -> None:
        device = model.lm_head.weight.device
        self.token_ids = torch.zeros(batch, dtype=torch.long, device=device)
        state = model.init_state(batch)
        # Channels side by side, one step after the other, because the kernels read them so.
        windows = state.conv.movedim(-1, 1).contiguous().movedim(1, -1)
        self.state = MambaState(windows, state.h)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.run(model)  # what is done only once, such as compiling, must not be recorded
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits = self.run(model)

    def run(self, model: Mamba) -> Tensor:
        if can_fuse(model):
            return fused_step(model, self.token_ids, self.state)
        logits, state = model.step(self.token_ids, self.state)
        self.load(state)
        return logits

    def load(self, state: MambaState) -> None:
        self.state.conv.copy_(state.conv)
        self.state.h.copy_(state.h)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """(batch,) -> logits (batch, padded_vocab_size), overwritten by the next call."""
        self.token_ids.copy_(token_ids)
        self.graph.replay()
        return self.logits


def fused_step(model: Mamba, token_ids: Tensor, state: MambaState) -> Tensor:
    """The logits of `model.step`, in four or five kernels a layer. Changes the state in place."""
    import triton_scan

    u = model.embed(token_ids)
    for i, layer in enumerate(model.backbone.layers):
        block = layer.mixer
        u = triton_scan.block_step_triton(
            u, state.conv[i], state.h[i], norm=layer.norm.weight, eps=layer.norm.eps,
            in_proj=block.in_proj.weight, in_bias=block.in_proj.bias,
            conv_weight=block.conv1d.weight, conv_bias=block.conv1d.bias,
            x_proj=block.x_proj.weight, dt_proj=block.dt_proj.weight, dt_bias=block.dt_proj.bias,
            A_log=block.A_log, D=block.D, out_proj=block.out_proj.weight,
            out_bias=block.out_proj.bias, rule=model.config.rule, overlap=True,
        )  # fmt: skip
    norm = model.backbone.norm_f
    return triton_scan.linear_step(
        u, model.lm_head.weight, norm=norm.weight, eps=norm.eps, overlap=True
    )


def can_fuse(model: Mamba) -> bool:
    """Whether the kernels have this rule, these dtypes and sizes, and may be used."""
    weights = list(model.parameters())
    return (
        importlib.util.find_spec("triton") is not None
        and model.config.scan in ("auto", "triton")
        and model.config.rule in ("mamba", "dirac")
        and model.config.d_state <= 256
        and weights[0].dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(p.dtype == weights[0].dtype and p.is_contiguous() for p in weights)
    )


def can_record(model: Mamba) -> bool:
    """Whether a step is nothing but launches: on a GPU, and with nothing in it but our modules."""
    return model.lm_head.weight.is_cuda and is_our_own(model)


## To record takes a while, so the last graph of each model is kept. Whoever uses it takes it out:
## two streams over one model must not share its buffers. (Use a model in one CUDA stream.) It is
## recorded for the second token: only then is a step wanted.

graphs: weakref.WeakKeyDictionary[Mamba, tuple[Any, StepGraph]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def by_graph(model: Mamba, state: MambaState) -> Iterator[Callable[[Tensor], Tensor]]:
    batch = state.h.shape[1]
    graph: StepGraph | None = None
    key: Any = None

    def step(token_ids: Tensor) -> Tensor:
        nonlocal graph, key
        if graph is None:
            weights = [(p.data_ptr(), p.dtype) for p in model.parameters()]
            key = (batch, repr(model.config), weights)
            last_key, last = graphs.pop(model, (None, None))
            graph = last if last_key == key else StepGraph(model, batch)
            graph.load(state)
        return graph(token_ids)

    try:
        yield step
    finally:
        if graph is not None:
            graphs[model] = key, graph


## ================================================================================================
## The step on a CPU
## ================================================================================================
##
## On a CPU, too, a token costs the time to read every weight once: 517 MB for 130m in float32, 10
## ms at 50 GB/s. PyTorch's product of a matrix and one vector takes four times as long in float32,
## where its routine runs in one thread, and twice as long in bfloat16. That is not the fault of the
## product. But it is also, with the columns of W,
##
##     W x  =  x_1 (column 1)  +  x_2 (column 2)  +  ...
##
## and for weighted sums of the rows of a table PyTorch has a fast function, made for models that
## look up many embeddings at a time. With the columns of W as the rows of its table it reads them
## nearly as fast as memory delivers (on the x86 processors with AVX-512 that we measured).
##
## Long columns are cut into pieces, so that the sum of a piece stays in registers and each thread
## has pieces of its own. For 40 rows, 3 columns and pieces of 16 the table is (3 pieces x 3, 16):
##
##     its rows  0 1 2    rows  0-15 of the columns 0 1 2       one bag: y[0:16]
##               3 4 5    rows 16-31                            one bag: y[16:32]
##               6 7 8    rows 32-39, filled up with zeros      one bag: y[32:48], cut at 40
##
## A bag is what embedding_bag sums up. Its weights are x, the same for every bag.


class Columns:
    """A copy of a weight (rows, columns) that is quick to multiply with one vector."""

    def __init__(self, weight: Tensor) -> None:
        self.rows, columns = weight.shape
        threads = torch.get_num_threads() if weight.numel() >= WORTH_THREADS else 1
        self.pieces = threads * math.ceil(self.rows / (threads * LONGEST_PIECE))
        length = 16 * math.ceil(self.rows / (16 * self.pieces))
        table = weight.new_zeros(self.pieces, columns, length)
        for piece, rows in zip(table, weight.split(length), strict=False):
            piece[:, : len(rows)].copy_(rows.T)
        self.table = table.view(-1, length)
        self.ids = torch.arange(len(self.table), dtype=torch.int32, device=weight.device)
        self.starts = self.ids[::columns].contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """(columns,) of any float dtype -> (rows,) float32."""
        x = x.to(self.table.dtype).expand(self.pieces, -1).reshape(-1)
        y = F.embedding_bag(self.ids, self.table, self.starts, mode="sum", per_sample_weights=x)
        return y.view(-1)[: self.rows].float()


LONGEST_PIECE = 448  # 28 vector registers of 16 numbers (AVX-512)
WORTH_THREADS = 2**18  # to wake a thread takes as long as to multiply so many numbers


class ColumnLayer:
    """`ResidualBlock.step` for one sequence: u (d_model,) -> u (d_model,). It keeps the state."""

    def __init__(self, layer: mamba.ResidualBlock, state: MambaState) -> None:
        block = layer.mixer
        self.norm, self.rule = layer.norm, block.config.rule
        self.in_proj, self.in_bias = Columns(block.in_proj.weight), block.in_proj.bias
        self.x_proj, self.dt_proj = Columns(block.x_proj.weight), Columns(block.dt_proj.weight)
        self.out_proj, self.out_bias = Columns(block.out_proj.weight), block.out_proj.bias
        self.filters = block.conv1d.weight.squeeze(1).T.float().contiguous()  # (d_conv, d)
        self.conv_bias = block.conv1d.bias
        self.dt_bias, self.D = block.dt_proj.bias.float(), block.D.float()
        self.widths = [block.config.dt_rank, block.config.d_state, block.config.d_state]
        self.past = state.conv[0].T.float()  # (d_conv - 1, d)
        # Long rows, and copies: the caller keeps its state.
        self.A, self.h = block.A.T.contiguous(), state.h[0].T.clone().contiguous()  # (n, d)

    def __call__(self, u: Tensor) -> Tensor:
        x, z = add(self.in_proj(rms_norm(u, self.norm)), self.in_bias).chunk(2)
        window = torch.cat([self.past, x.unsqueeze(0)])  # (d_conv, d)
        self.past = window[1:]
        x = F.silu(add((window * self.filters).sum(0), self.conv_bias))
        low_rank, B, C = self.x_proj(x).split(self.widths)
        delta = F.softplus(self.dt_proj(low_rank) + self.dt_bias)
        A_bar, B_bar = discretize(delta, self.A.T, B, self.rule)
        self.h.mul_(A_bar.T).addcmul_(B_bar.T, x)  # (2a)
        y = (C @ self.h + self.D * x) * F.silu(z)  # (2b)
        return u + add(self.out_proj(y), self.out_bias).to(u.dtype)


class ColumnStep:
    """`model.step` for one sequence on a CPU: token ids (1,) in, logits (1, padded_vocab_size) out.

    What is the same for all tokens, such as A, it computes once. It changes its state in place.
    `is_current` is False when weights have changed since, as far as PyTorch notes that: not for
    what is changed in place through `.data`, by a fused optimizer or in parameters that were made
    in inference mode, nor for a module that is replaced.
    """

    @torch.inference_mode(False)  # its state will be written to outside of that mode as well
    @torch.no_grad()
    def __init__(self, model: Mamba, state: MambaState) -> None:
        layers = model.backbone.layers
        self.layers = [ColumnLayer(layer, state[i]) for i, layer in enumerate(layers)]
        self.embed, self.norm = model.embed, model.backbone.norm_f
        self.lm_head = Columns(model.lm_head.weight)
        self.owners = [module._parameters for module in model.modules() if module._parameters]
        self.versions = self.read_versions()

    def __call__(self, token_ids: Tensor) -> Tensor:
        u = self.embed(token_ids).squeeze(0)
        for layer in self.layers:
            u = layer(u)
        return self.lm_head(rms_norm(u, self.norm)).unsqueeze(0)

    def is_current(self) -> bool:
        return self.versions == self.read_versions()

    def read_versions(self) -> list[tuple[int, int]]:
        weights = (p for owner in self.owners for p in owner.values() if p is not None)
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in weights]

    def read_state(self) -> MambaState:
        states = [
            MambaState(layer.past.T.unsqueeze(0), layer.h.T.unsqueeze(0)) for layer in self.layers
        ]
        return MambaState.stack(states)


def rms_norm(u: Tensor, norm: mamba.RMSNorm) -> Tensor:
    u = u.float()
    return u * norm.weight / math.sqrt(u.dot(u).item() / len(u) + norm.eps)


def add(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


## The copy takes as long as some dozen tokens, most of it to get the memory, as much as the model
## has. So it is made where there is more to come. It is not kept: weights change between
## generations, and a second copy of every model that ever spoke would stay in memory.

COPY_FOR_TOKENS = 64
COPY_AT_MOST = 4 * 2**30  # bytes; larger models take model.step


def can_copy(model: Mamba, state: MambaState, tokens: int) -> bool:
    """Whether to decode by columns: one sequence, of some length, on a CPU."""
    weights = list(model.parameters())
    return (
        all(p.device.type == "cpu" and p.dtype == weights[0].dtype for p in weights)
        and weights[0].dtype in (torch.float32, torch.bfloat16, torch.float16)
        and sum(p.nbytes for p in weights) <= COPY_AT_MOST
        and state.h.shape[1] == 1
        and tokens >= COPY_FOR_TOKENS
        and is_our_own(model)
    )


@contextlib.contextmanager
def by_columns(model: Mamba, state: MambaState) -> Iterator[Callable[[Tensor], Tensor]]:
    columns: ColumnStep | None = None

    def step(token_ids: Tensor) -> Tensor:
        nonlocal columns, state
        if columns is not None and not columns.is_current():
            state, columns = columns.read_state(), None
        if columns is None:
            columns = ColumnStep(model, state)
        return columns(token_ids)

    yield step


## ================================================================================================
## The sampler
## ================================================================================================
##
## softmax(logits) is what the model believes about the next token. A text that always takes the
## most probable one is timid and soon walks in circles. A text that follows the belief exactly is
## reckless: each of the thousands of odd tokens is improbable, but together they are not, so one
## comes up every few words, and what follows has to live with it. The useful range lies between:
##
##   temperature  divides the logits. Below 1 it sharpens the distribution, above 1 it flattens it.
##   top-k        keeps the k most probable tokens. Simple and blind: 40 candidates are many inside
##                a word and few at the start of a sentence.
##   top-p        keeps the most probable tokens until they make up the probability p: few where the
##                model is sure, many where it is not (nucleus sampling, arXiv 1904.09751).
##   min-p        keeps tokens at least min_p times as probable as the best (arXiv 2407.01082). It
##                stays firm at high temperatures, where top-p reaches far into the tail.
##
## They apply in this order, each to what the one before has left. The best token passes them all.


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """logits (batch, vocab), any float dtype -> one token id of each row, (batch,) int64.

    temperature 0 takes the most probable token; top_k 0, top_p 1 and min_p 0 switch a cut off.
    The arguments are not checked here, once per token, but by the callers (`check_sampling`).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, token_ids = at_least_float32(logits), None
    if top_k > 0:
        logits, token_ids = logits.topk(min(top_k, logits.shape[-1]))  # the most probable first
    # The largest becomes 0 first: a tiny temperature would make it inf, and inf - inf is NaN. So
    # are 0 / 0 and inf / inf, which temperatures beyond float32 would lead to.
    temperature = min(max(temperature, 1e-30), 1e30)
    probs = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)
    if top_p < 1:
        if token_ids is None:
            probs, token_ids = most_probable(probs, top_p)
        before = probs.cumsum(-1) - probs  # the probability of all better tokens
        # A top_p too small for float32 would be 0, and the best token must stay.
        probs = probs.masked_fill(before >= max(top_p, 1e-30), 0)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
    choice = draw(probs, generator)
    return (choice if token_ids is None else token_ids.gather(-1, choice)).squeeze(-1)


def most_probable(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The largest of probs (batch, vocab), in order, with a sum of top_p or more; their tokens."""
    # To sort 50,000 numbers takes a CPU 4 ms, a quarter of the time of a token of mamba-130m. The
    # first 1024 are nearly always enough. (To ask a GPU that would be to wait for it.)
    if probs.device.type == "cpu" and probs.shape[-1] > 1024:
        best, token_ids = probs.topk(1024)
        if (best.sum(-1) >= top_p).all():
            return best, token_ids
    return probs.sort(dim=-1, descending=True)


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """weights (batch, n), not negative -> a column of each row, as often as its weight says."""
    ## A race of clocks. One with rate w rings after a random time t / w, where t is exponentially
    ## distributed with rate 1. The first to ring is clock i with probability w_i / Σ w. It has the
    ## smallest t / w, which is the largest w / t; a clock with w = 0 never rings.
    # torch.multinomial does the same after checks, which take a GPU longer than the race itself.
    t = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / t).argmax(-1, keepdim=True)


## A model that has written a phrase twice finds it only more probable the third time. The penalty
## of CTRL (arXiv 1909.05858) makes every token less probable that has occurred before. Logits are
## divided where positive and multiplied where negative, so that both move down.


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits (batch, vocab), seen (batch, vocab) bool -> logits, smaller where seen, penalty > 1.

    A penalty of 1 changes nothing, one between 0 and 1 invites repetition.
    """
    logits = at_least_float32(logits)
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    # An extreme penalty makes inf of a large logit, and in the sampler inf - inf would be NaN.
    return torch.where(seen, penalized.nan_to_num(), logits)


## ================================================================================================
## Tokenizers
## ================================================================================================
##
## A token is a short string of bytes. The simplest vocabulary is the 256 bytes themselves; byte
## pair encoding (BPE) adds strings that occur often, such as " the", until it has 50,277 of them.
## Text is the UTF-8 reading of the bytes of all tokens together. Not of each token: "é" is two
## bytes and an emoji four, and a token may end in the middle of one.
##
## So a stream of tokens is decoded with a memory. The incremental decoder of the standard library
## holds back the first bytes of a character until the last one is there, and nothing else.


class Tokenizer(ABC):
    """encode and token_bytes make a tokenizer; the way back to text is the same for all."""

    vocab_size: int
    eos_token_id: int | None = None  # the token that ends a document, if there is one

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for."""

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are not UTF-8, at the end of the ids too, become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """One piece of text for each id, as soon as it comes; concatenated they are the text.

        The piece is "" while a character is incomplete; one that never completes is left out.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in ids:
            yield decoder.decode(self.token_bytes(token_id))


class ByteTokenizer(Tokenizer):
    """Token i is byte i. It has no token for the end of a document."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


class BPETokenizer(Tokenizer):
    """A byte-level BPE from a tokenizer.json, such as that of gpt-neox-20b.

    Raises ValueError for a file that is no tokenizer, or one of another kind.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        import tokenizers

        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        if "ByteLevel" not in repr(self.tokenizer.decoder):
            raise ValueError(f"{path}: expected byte-level BPE, got {self.tokenizer.decoder!r}")
        # Left over from training, these would cut a long prompt short and fill up a short one.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # Not the number of tokens: ids may have gaps.
        self.vocab_size = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        ends = map(self.tokenizer.token_to_id, ("<|endoftext|>", "</s>", "<eos>"))
        self.eos_token_id = next((token_id for token_id in ends if token_id is not None), None)
        # Added tokens stand in the file as plain text; the special ones among them have no text.
        added = self.tokenizer.get_added_tokens_decoder().items()
        self.added = {i: b"" if token.special else token.content.encode() for i, token in added}
        ## The file writes each byte of the other tokens as one printable character: a printable
        ## byte as itself, the rest, in order, as the characters from 256 on. A space is "Ġ".
        printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
        rest = [byte for byte in range(256) if byte not in printable]
        self.byte_of = {chr(byte): byte for byte in printable}
        self.byte_of |= {chr(256 + i): byte for i, byte in enumerate(rest)}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self.added:
            return self.added[token_id]
        characters = self.tokenizer.id_to_token(token_id) or ""  # None: a gap between the ids
        try:
            return bytes(self.byte_of[character] for character in characters)
        except KeyError:  # a token that stands in the file as plain text
            return characters.encode()


## The published originals come without a tokenizer: they were trained with that of gpt-neox-20b.
## Others bring their own. A pair that does not belong together would produce nonsense in silence,
## so the sizes are compared. A model has no fewer rows than there are tokens, and few more: its
## matrices are rounded up, to a multiple of 256 at most.

NEOX, NEOX_SIZE = "EleutherAI/gpt-neox-20b", 50277


def belong_together(tokens: int, rows: int) -> bool:
    return 0 <= rows - tokens < 256


def load_tokenizer(
    config: MambaConfig, name_or_path: str | os.PathLike, *, revision: str | None = None,
    cache_dir: str | None = None, local_files_only: bool = False,
) -> Tokenizer:  # fmt: skip
    """The tokenizer of the model that `Mamba.from_pretrained(name_or_path)` loads.

    Bytes if its config says so; else tokenizer.json from its folder or repository; else that of
    gpt-neox-20b, if the model has as many tokens. What comes from the Hub is downloaded once.
    Raises FileNotFoundError if there is none, ValueError if it is unknown, of another kind, empty,
    or of another size than the model.
    """
    name, rows = os.fspath(name_or_path), config.vocab_size
    if config.tokenizer == "bytes":
        tokenizer: Tokenizer = ByteTokenizer()
    elif config.tokenizer is not None:
        raise ValueError(f"tokenizer must be 'bytes' or not given, got {config.tokenizer!r}")
    else:
        # The originals are not asked for what they do not have: cached, they need no network.
        if re.fullmatch(r"state-spaces/mamba-.*(?<!-hf)", name) and not Path(name).is_dir():
            name, revision = NEOX, None
        try:
            path = find_tokenizer(name, revision, cache_dir, local_files_only)
        except FileNotFoundError:
            if name == NEOX or not belong_together(NEOX_SIZE, rows):
                raise
            path = find_tokenizer(NEOX, None, cache_dir, local_files_only)
        tokenizer = BPETokenizer(path)
        if not tokenizer.encode("a"):
            raise ValueError(f"{path} is an empty tokenizer: it encodes text to nothing")
    if not belong_together(tokenizer.vocab_size, rows):
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}: "
            "they do not belong together"
        )
    return tokenizer


def find_tokenizer(
    name: str, revision: str | None, cache_dir: str | None, local_files_only: bool
) -> Path:
    try:
        # What is cached for "main" is as new as the model: its download has moved "main" along.
        return file_finder(name, revision, cache_dir, True)("tokenizer.json")
    except FileNotFoundError:
        return file_finder(name, revision, cache_dir, local_files_only)("tokenizer.json")


## ================================================================================================
## Checks
## ================================================================================================

# Written as what is allowed: every comparison with NaN is False, so NaN is refused.
ALLOWED = {
    "max_new_tokens": (lambda value: value >= 1, "at least 1"),
    "temperature": (lambda value: 0 <= value < math.inf, "0 (greedy) or a positive number"),
    "top_k": (lambda value: value >= 0, "0 (off) or a positive number"),
    "top_p": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "min_p": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "repetition_penalty": (lambda value: 0 < value < math.inf, "a positive number"),
    "seed": (lambda value: value is None or 0 <= value < 2**64, "in [0, 2**64)"),
}


def check_sampling(**arguments: float | None) -> None:
    """Raises ValueError, with the name of the argument, what it must be and what it is."""
    for name, value in arguments.items():
        is_allowed, expected = ALLOWED[name]
        if not is_allowed(value):
            raise ValueError(f"{name} must be {expected}, got {value}")


def check_prompt(vocab_size: int, input_ids: Tensor, mask: Tensor | None) -> None:
    is_integer = input_ids.dtype in (torch.int64, torch.int32)
    if input_ids.ndim != 2 or input_ids.numel() == 0 or not is_integer:
        raise ValueError(
            "input_ids must be int64 or int32, (batch, seqlen), at least one, "
            f"got {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    # This waits for a GPU: once per prompt it may, per token it must not.
    low, high = input_ids.min().item(), input_ids.max().item()
    if low < 0 or high >= vocab_size:
        raise IndexError(f"token ids must be in [0, {vocab_size}), got {low} ... {high}")
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != input_ids.shape or not mask[:, -1].all():
        raise ValueError(
            f"mask must be bool {tuple(input_ids.shape)}, like input_ids, and True in the last "
            f"column (left padding), got {mask.dtype} {tuple(mask.shape)}"
        )
    if (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("mask must be left padding: False before the first token, then only True")


def check_logits(logits: Tensor) -> None:
    # -inf is allowed: it forbids a token. NaN is larger than everything for amax.
    if not logits.amax(-1).isfinite().all():
        raise RuntimeError(
            "the model's logits are not finite: weights are damaged, or its numbers are too large "
            "for float16 (try bfloat16 or float32)"
        )


## ================================================================================================
## The command line
## ================================================================================================

DEFAULT_MODEL = Path(__file__).parent / "checkpoints" / "shakespeare"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 for a failure. A wrong call exits with 2."""
    try:
        complete(parse_arguments(argv))
    except BrokenPipeError:
        return 0  # the reader has seen enough
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"generate.py: error: {message}", file=sys.stderr)
        return 1
    return 0


def complete(arguments: argparse.Namespace) -> None:
    """Print the prompt and its continuation, piece by piece, as often as samples are wanted."""
    dtype = getattr(torch, arguments.dtype)
    model = Mamba.from_pretrained(
        arguments.model, device=arguments.device, dtype=dtype, scan=arguments.scan
    )
    if arguments.device.type == "cpu" and model.config.d_model <= 512:
        # Threads gain little on matrices this small, and lose much when one waits for a busy core.
        torch.set_num_threads(1)
    tokenizer = load_tokenizer(model.config, arguments.model)
    input_ids, _ = encode_batch(tokenizer, [arguments.prompt], arguments.device)
    eos = tokenizer.eos_token_id
    sampling = {name: getattr(arguments, name) for name in ALLOWED}
    sampling |= {"eos_token_id": eos, "vocab_size": tokenizer.vocab_size}

    for i in range(arguments.num_samples):
        if i > 0:
            print("-" * 80)
            sampling["seed"] = None if arguments.seed is None else (arguments.seed + i) % 2**64
        steps = (step.item() for step in stream(model, input_ids, **sampling))
        ids = itertools.takewhile(lambda token_id: token_id != eos, steps)
        start = first = time.perf_counter()
        # The prompt waits for the first piece, so that an error never stands beside it.
        text, count = arguments.prompt, 0
        for count, piece in enumerate(tokenizer.decode_stream(ids), start=1):
            print(text + piece, end="", flush=True)
            text = ""
            if count == 1:
                first = time.perf_counter()
        last = time.perf_counter()
        print(text, flush=True)
        if arguments.stats:
            rate = (count - 1) / (last - first) if count > 1 else 0.0
            state = model.init_state(1)
            print(
                f"prompt {input_ids.shape[1]} tokens, first token after {first - start:.3f} s; "
                f"{count} tokens, after the first {rate:.1f} tokens/s; "
                f"state {state.conv.nbytes + state.h.nbytes} bytes",
                file=sys.stderr,
            )


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A wrong call: one line, where argparse would print its usage as well."""
        if "unrecognized" in message or "explicit argument" in message:
            message += "; a prompt that starts with '-' stands last, after '--'"
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        "generate.py",
        description="Complete a text with a Mamba model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, prompt = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    prompt("prompt", nargs="?", default=None, help="without it, standard input is the prompt")
    prompt("--prompt-file", metavar="FILE", help="the prompt, as UTF-8 text")
    add("--model", default=str(DEFAULT_MODEL), help="a folder, or a repository on the Hub")
    add("--max-new-tokens", type=int, default=300, metavar="N")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy")
    add("--top-k", type=int, default=0, metavar="K", help="0 is off")
    add("--top-p", type=float, default=0.95, metavar="P", help="1 is off")
    add("--min-p", type=float, default=0.0, metavar="P", help="0 is off")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 is off")
    add("--seed", type=int, metavar="S", help="the same seed and options, the same text")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=available_device, default=device)
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    add("--scan", default="auto", choices=("auto", *SCANS, "triton"), help="for the prompt")
    add("--num-samples", type=int, default=1, metavar="N")
    add("--stats", action="store_true", help="tokens, times and the state's size on stderr")
    arguments = parser.parse_args(argv)

    try:
        check_sampling(**{name: getattr(arguments, name) for name in ALLOWED})
    except ValueError as error:
        parser.error("--" + str(error).replace("_", "-"))
    if arguments.num_samples < 1:
        parser.error(f"--num-samples must be at least 1, got {arguments.num_samples}")
    arguments.prompt = read_prompt(arguments.prompt, arguments.prompt_file, parser)
    return arguments


def read_prompt(text: str | None, file: str | None, parser: Parser) -> str:
    """Without the newline at the end, which editors and echo add and nobody means."""
    try:
        if file is not None:
            text = Path(file).read_text("utf-8-sig").removesuffix("\n")
        elif text is None and (sys.stdin is None or sys.stdin.isatty()):
            parser.error('a prompt is missing: generate.py "To be, or not"')
        elif text is None:
            text = sys.stdin.read().removesuffix("\n")
        text.encode()  # Bytes that are no UTF-8 may come as halves of characters: UnicodeError.
    except UnicodeError:
        parser.error("the prompt is not UTF-8 text")
    except OSError as error:
        parser.error(f"cannot read the prompt from {file or 'standard input'}: {error.strerror}")
    return text or parser.error("the prompt is empty: there is nothing to continue")


def available_device(name: str) -> torch.device:
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # a device that is there gives a number back; "meta" does not
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} is not available on this machine") from error


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it is closed
    sys.stdout.reconfigure(errors="replace")  # for characters that a terminal does not know
    try:
        sys.exit(main())
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # said already: the flush at exit must not say it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
