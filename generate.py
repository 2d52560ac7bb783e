"""Text completion with Mamba: tokenizers, a sampler, a loop, and a command line.

    python generate.py "To be, or not to be"                       # the small model that ships
    python generate.py "Mamba is the" --model state-spaces/mamba-370m

    model = Mamba.from_pretrained("state-spaces/mamba-130m")
    tokenizer = load_tokenizer(model.config, "state-spaces/mamba-130m")
    print(generate(model, tokenizer, "Mamba is the", temperature=0.7, seed=1))

From the outside in: `generate` (text in, text out) -> `stream` (ids in, ids out, one at a time) ->
`prefill` (the prompt) -> one token on a CPU -> `sample` (logits in, ids out) -> the tokenizers ->
the checks -> the command line.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import copy
import itertools
import math
import os
import platform
import re
import signal
import sys
import time
import warnings
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

from mamba import (
    SCANS,
    Mamba,
    MambaConfig,
    MambaState,
    ResidualBlock,
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
    mask: (batch, seqlen), bool or integers 0 and 1, 0 on left padding (`reset_after_padding`). The
        ids there may be any of the vocabulary.

    All arguments are checked when the first token is asked for. Raises ValueError for values out
    of range and shapes that do not fit, IndexError for an id that is not in the vocabulary. Raises
    RuntimeError for logits that are not finite; on a GPU only those of the prompt are looked at.
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
    check_prompt(vocab_size, input_ids)
    batch, device, on_gpu = len(input_ids), input_ids.device, input_ids.is_cuda
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    logits, state = prefill(model, input_ids, mask)
    # What the prompt contains. Padding is marked in a column of its own, which is cut off.
    real_ids = input_ids if mask is None else input_ids.masked_fill(~mask.bool(), vocab_size)
    seen = torch.zeros(batch, vocab_size + 1, dtype=torch.bool, device=device)
    seen = seen.scatter_(1, real_ids.long(), True)[:, :vocab_size]

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


## `model.step` is for every device, and for reading. Two others compute the same, and faster: on a
## GPU a recorded one, of triton_scan.py, and for one sequence on a CPU "One token on a CPU" below.
## The same up to rounding: with short floats a seed may lead to another text.


def continuing(
    model: Mamba, state: MambaState, tokens: int
) -> contextlib.AbstractContextManager[Callable[[Tensor], Tensor]]:
    """A function that feeds tokens (batch,) to the model and returns logits, from this state on.

    tokens: how many will be asked for in all; it will be called for fewer.
    """
    if can_record(model):
        with contextlib.suppress(ImportError):  # without Triton, step by step
            from triton_scan import step_graph

            return step_graph(model, state)
    step = LayerStep if worth_copies(model, state, tokens) else by_step
    return contextlib.nullcontext(step(model, state))


def can_record(model: Mamba) -> bool:
    """Whether a step is nothing but launches: on a GPU, and with nothing in it but our modules."""
    return model.lm_head.weight.is_cuda and is_our_own(model)


def by_step(model: Mamba, state: MambaState) -> Callable[[Tensor], Tensor]:
    def step(token_ids: Tensor) -> Tensor:
        nonlocal state
        logits, state = model.step(token_ids, state)
        return logits

    return step


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
## over an image in which each pixel is a token and its colours are the d_in numbers of u.


def prefill(
    model: Mamba, input_ids: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, MambaState]:
    """input_ids (batch, seqlen) -> (batch, padded_vocab_size), the last position's logits; state.

    What `model(input_ids, model.init_state(batch), reset=...)` returns, up to rounding, without the
    logits of the other positions. mask: see `reset_after_padding`. A model that is not of our
    modules only gets the prompt in one piece.
    """
    if mask is not None and mask.shape != input_ids.shape:
        shapes = f"{tuple(input_ids.shape)}, got {tuple(mask.shape)}"
        raise ValueError(f"mask must have the shape of input_ids, {shapes}")
    state = model.init_state(len(input_ids))
    reset = None if mask is None else reset_after_padding(mask)
    reader, (batch, length) = model, input_ids.shape
    if is_our_own(model):
        if can_convolve(model, batch * length):
            reader = by_convolution(model)
        length = max(1, (GPU_READS if input_ids.is_cuda else CPU_READS) // batch)
    parts = input_ids.split(length, dim=1)
    resets = [None] * len(parts) if reset is None else reset.split(length, dim=1)
    for ids, part_reset in zip(parts, resets, strict=True):
        last, state = reader(ids, state, reset=part_reset, head=lambda hidden: hidden[:, -1])
    return model.lm_head(last), state


# Tokens of all rows in a part. More of them take more memory and no less time.
CPU_READS, GPU_READS = 1024, 8192


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
    """A twin of a model, in which the two large products of each layer are convolutions.

    The parameters are shared: gradients reach them, and changes in place count. Raises ValueError
    for a model with hooks, adapters or modules that are not ours: it would pass them by.
    """
    if not is_our_own(model):
        raise ValueError("by_convolution takes a model of our own modules only, without hooks")

    def twin_of(module: nn.Module) -> Any:
        twin = copy.copy(module)
        twin._modules = {
            name: Convolution(child) if name in ("in_proj", "out_proj") else twin_of(child)
            for name, child in module._modules.items()
        }
        return twin

    return twin_of(model)


def can_convolve(model: Mamba, tokens: int) -> bool:
    """Whether that is faster: many tokens, in float32, on a processor of AMD with AVX-512.

    (Short floats go to oneDNN anyway. Intel's processors lose, up to two thirds of their speed.)
    """
    return (
        all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
        and tokens >= WORTH_CONVOLUTION
        and torch.get_num_threads() > 1  # with one thread PyTorch convolves a single image itself
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in processor()
        and is_our_own(model)
    )


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # only Linux has it
    return cpuinfo.read_text() if cpuinfo.exists() else platform.processor()


WORTH_CONVOLUTION = 128  # tokens; oneDNN first copies the weights into an order of its own


## Padding on the left is a document of its own that ends where the prompt begins. There the model
## forgets, and each prompt gets the numbers that it would get alone. A row without padding has no
## such place: it goes on from the state that it is given.


def reset_after_padding(mask: Tensor, state: MambaState | None = None) -> Tensor:
    """(batch, seqlen), bool or integers 0 and 1, 0 on left padding -> reset, (batch, seqlen) bool.

    state: what the rows start from. Raises ValueError for a mask of another shape or type, for one
    that is not left padding, for a row of nothing else, and for padding in a row whose state is not
    zero: there it would be no padding but part of a text, and the text would be forgotten.
    """
    is_integer = not (mask.is_floating_point() or mask.is_complex())
    if mask.ndim != 2 or mask.numel() == 0 or not is_integer:
        raise ValueError(
            "mask must be bool, or integers 0 and 1, (batch, seqlen), "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    real = mask.bool()
    ends = ~real[:, -1] | (real[:, :-1] & ~real[:, 1:]).any(-1)
    used = torch.zeros_like(ends)
    for tensor in () if state is None else (state.conv, state.h):
        used |= (tensor != 0).movedim(-3, 0).flatten(1).any(-1)
    faults = [(mask != real).any(), ends.any(), (used & ~real[:, 0]).any()]
    strange, not_left, not_zero = torch.stack(faults).tolist()  # the one look at a GPU's numbers
    if strange or not_left:
        raise ValueError(
            "mask must be left padding: in each row 0 or False before the first token, then only "
            "1 or True, at least once"
        )
    if not_zero:
        raise ValueError("mask has padding in a row whose state is not zero: pad whole prompts")
    return real & ~F.pad(real[:, :-1], (1, 0), value=True)


## ================================================================================================
## One token on a CPU
## ================================================================================================
##
## A token takes a CPU the time to read every weight once: 517 MB for 130m in float32, 10 ms at 50
## GB/s. That is, if all threads read, each its own part, and in the best order. nn.Linear does not
## always: its routine for one vector may run in one thread. And a product can be written in another
## way. With the columns of W,
##
##     W x  =  x_1 (column 1)  +  x_2 (column 2)  +  ...
##
## A sum of a few long columns is read faster than many short rows are, if W is stored by columns.
## So where W has more rows than columns, Parts keeps a copy in that order.


class Parts:
    """W (rows, columns) times one vector, float32: as many products as there are threads, if their
    number divides the rows."""

    def __init__(self, weight: Tensor) -> None:
        rows, columns = weight.shape
        self.parts = math.gcd(rows, torch.get_num_threads())  # all of one size
        table = weight.reshape(self.parts, -1, columns).mT
        self.table = table.contiguous() if rows > columns else table

    def __call__(self, x: Tensor) -> Tensor:
        """(columns,) -> (rows,)"""
        return torch.bmm(x.expand(self.parts, 1, -1), self.table).view(-1)


## Short floats have no such product that is fast everywhere. But for weighted sums of the rows of a
## table PyTorch has a fast function, made for models that look up many embeddings at a time. Here
## they are columns of W. Long ones are cut into pieces, so that the sum of a piece stays in
## registers and each thread has pieces of its own. For 40 rows, 3 columns and pieces of 16 the
## table is (3 pieces x 3, 16):
##
##     its rows  0 1 2    rows  0-15 of the columns 0 1 2       one bag: y[0:16]
##               3 4 5    rows 16-31                            one bag: y[16:32]
##               6 7 8    rows 32-39, filled up with zeros      one bag: y[32:48], cut at 40
##
## A bag is what embedding_bag sums up, in float32. Its weights are x, the same for every bag.


class Bags:
    """W (rows, columns) in bfloat16 or float16, copied by columns, times one vector."""

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
        """(columns,) of any float dtype -> (rows,) float32"""
        x = x.to(self.table.dtype).expand(self.pieces, -1).reshape(-1)
        y = F.embedding_bag(self.ids, self.table, self.starts, mode="sum", per_sample_weights=x)
        return y.view(-1)[: self.rows].float()


# 28 of the 32 registers of 16 numbers of AVX-512; AVX2 has 16 of 8, which two passes fill.
LONGEST_PIECE = 448 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 192
WORTH_THREADS = 2**18  # to wake a thread takes as long as to multiply so many numbers


def product(weight: Tensor) -> Parts | Bags:
    return (Parts if weight.dtype == torch.float32 else Bags)(weight)


## Between the products every operator has its price: while they read hundreds of megabytes, all
## else is pushed out of the caches. So this step has few operators. What is the same for all
## tokens, such as A and float32 copies of short vectors, it computes once. It runs along long rows,
## with the channels last, and changes its state in place.


class Layer:
    """`ResidualBlock.step` for one sequence: u (d_model,) -> u (d_model,). It keeps the state."""

    def __init__(self, layer: ResidualBlock, state: MambaState) -> None:
        block, config = layer.mixer, layer.mixer.config
        self.eps, self.norm, self.rule = layer.norm.eps, layer.norm.weight.float(), config.rule
        self.in_proj, self.in_bias = product(block.in_proj.weight), block.in_proj.bias
        self.x_proj, self.dt_proj = product(block.x_proj.weight), product(block.dt_proj.weight)
        self.out_proj, self.out_bias = product(block.out_proj.weight), block.out_proj.bias
        self.filters = block.conv1d.weight.squeeze(1).T.float().contiguous()  # (d_conv, d)
        self.conv_bias, self.dt_bias = block.conv1d.bias, block.dt_proj.bias.float()
        self.widths = [config.dt_rank, config.d_state, config.d_state]
        self.A, self.D = block.A.T.contiguous(), block.D.float()  # (n, d)
        self.A_log2e = self.A * math.log2(math.e)
        self.past, self.h = state.conv[0].T.float(), state.h[0].T.clone().contiguous()

    def step(self, u: Tensor) -> Tensor:
        row = u.float()
        rms = math.sqrt(row.dot(row).item() / len(row) + self.eps)
        raw, z = add(self.in_proj((row * self.norm).div_(rms)), self.in_bias).chunk(2)
        window = torch.cat([self.past, raw.unsqueeze(0)])  # (d_conv, d)
        self.past = window[1:]
        x = F.silu(add((window * self.filters).sum(0), self.conv_bias))
        low_rank, B, C = self.x_proj(x).split(self.widths)
        delta = F.softplus(self.dt_proj(low_rank) + self.dt_bias)
        if self.rule == "mamba":
            # exp2: PyTorch's exp takes several times as long on some processors.
            A_bar = (delta * self.A_log2e).exp2_()
            self.h.mul_(A_bar).addcmul_(B.unsqueeze(-1), delta * x)  # (2a)
        else:
            A_bar, B_bar = discretize(delta, self.A.T, B, self.rule)
            self.h.mul_(A_bar.T).addcmul_(B_bar.T, x)
        y = torch.addcmul(C @ self.h, self.D, x) * F.silu(z)  # (2b)
        return u + add(self.out_proj(y), self.out_bias).to(u.dtype)

    @property
    def state(self) -> MambaState:
        return MambaState(self.past.T.unsqueeze(0), self.h.T.unsqueeze(0))


def add(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


class LayerStep:
    """`model.step` for one sequence: token ids (1,) in, logits (1, padded_vocab_size) out.

    The copies are made for the first token, and again where PyTorch notes that weights have changed
    since. It does not note what is changed in place through `.data`, by a fused optimizer or in
    parameters that were made in inference mode; nor are modules looked for that are replaced.
    """

    def __init__(self, model: Mamba, state: MambaState) -> None:
        self.model, self.states = model, [state[i] for i in range(len(state.h))]
        self.owners = [module._parameters for module in model.modules() if module._parameters]
        self.layers: list[Layer] = []
        self.versions: list[tuple[int, int]] | None = None

    @torch.inference_mode()  # an operator then takes a little less of Python's time
    def __call__(self, token_ids: Tensor) -> Tensor:
        weights = (p for owner in self.owners for p in owner.values() if p is not None)
        versions = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in weights]
        if versions != self.versions:
            self.copy_weights()
            self.versions = versions
        u = self.model.embed(token_ids).squeeze(0)
        for layer in self.layers:
            u = layer.step(u)
        return self.lm_head(self.model.backbone.norm_f(u)).unsqueeze(0)

    def copy_weights(self) -> None:
        if self.layers:
            self.states = [layer.state for layer in self.layers]
        self.layers, self.lm_head = [], None  # the old copies are free to go
        for layer, state in zip(self.model.backbone.layers, self.states, strict=True):
            self.layers.append(Layer(layer, state))
        self.lm_head = product(self.model.lm_head.weight)

    @property
    def state(self) -> MambaState:
        return MambaState.stack([layer.state for layer in self.layers] or self.states)


## The copies take as long as some dozen tokens, most of it to get the memory. So they are made
## where there is more to come. They are not kept: weights change between generations, and a second
## copy of every model that ever spoke would stay in memory.

COPY_FOR_TOKENS = 64
COPY_AT_MOST = 4 * 2**30  # bytes; larger models take model.step


def worth_copies(model: Mamba, state: MambaState, tokens: int) -> bool:
    """Whether to decode by layers: one sequence, of some length, on a CPU, by modules of ours."""
    weights = list(model.parameters())
    return (
        all(p.device.type == "cpu" and p.dtype == weights[0].dtype for p in weights)
        and weights[0].dtype in (torch.float32, torch.bfloat16, torch.float16)
        and sum(p.nbytes for p in weights) <= COPY_AT_MOST
        and state.h.shape[1] == 1
        and tokens >= COPY_FOR_TOKENS
        and is_our_own(model)
    )


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
    # To sort 50,000 numbers takes a CPU 4 ms, a sixth of the time of a token of mamba-130m. The
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


def check_prompt(vocab_size: int, input_ids: Tensor) -> None:
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
