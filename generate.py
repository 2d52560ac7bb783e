# ruff: noqa: E402
"""Text completion with Mamba.

    python generate.py "To be, or not to be"                       # the small model that ships
    python generate.py "Mamba is the" --model state-spaces/mamba-370m

    model = Mamba.from_pretrained("state-spaces/mamba-130m")
    tokenizer = load_tokenizer(model.config, "state-spaces/mamba-130m")
    print(generate(model, tokenizer, "Mamba is the", temperature=0.7, seed=1))

From the outside in: the command line -> `generate` (text in, text out) -> `stream` (ids in, ids
out, one at a time) -> `prefill` (the prompt) -> a token on a CPU -> `sample` -> the tokenizers.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import copy
import difflib
import itertools
import json
import math
import os
import platform
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from numbers import Integral, Real
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn

## The command line --------------------------------------------------------------------------------
##
## It stands above the import of torch, which takes seconds: help and wrong calls need not wait.

DEFAULT_MODEL = Path(__file__).parent / "checkpoints" / "shakespeare"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A wrong call is one line: argparse would print its usage as well."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, *arguments: Any) -> argparse.Namespace:
        known, others = self.parse_known_args(*arguments)
        if option := next((other for other in others if other.startswith("-")), None):
            names, said = list(self._option_string_actions), option.partition("=")[0]
            nearest = [name for name in names if name.startswith(said)]
            nearest += difflib.get_close_matches(said, names, 1)
            advice = f"did you mean {nearest[0]}? " if nearest else ""
            advice += "--help shows all; a prompt that starts with '-' stands last, after '--'"
            self.error(f"unknown option {option}: {advice}")
        if others:
            self.error(f'quote the prompt: {self.prog} "{" ".join([known.prompt, *others])}"')
        return known


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """A wrong call exits with 2."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser("generate.py", formatter_class=defaults, allow_abbrev=False)
    add, prompt = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    dtypes = ("float32", "bfloat16", "float16", "float64")
    scans = ("auto", "sequential", "logspace", "chunked", "recompute", "triton")
    prompt("prompt", nargs="?", help="without it, standard input is the prompt")
    prompt("--prompt-file", metavar="FILE", help="the prompt, as UTF-8 text")
    add("--model", default=str(DEFAULT_MODEL), help="a folder, or a repository on the Hub")
    add("--max-new-tokens", type=int, default=300, metavar="N", help="at most so many")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy")
    add("--top-k", type=int, default=0, metavar="K", help="0 is off")
    add("--top-p", type=float, default=0.95, metavar="P", help="1 is off")
    add("--min-p", type=float, default=0.0, metavar="P", help="0 is off")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 is off")
    add("--seed", type=int, metavar="S", help="the same seed and options, the same text")
    add("--device", default="auto", help="auto: cuda where there is one, else cpu")
    add("--dtype", default="float32", choices=dtypes, help="of the weights")
    add("--scan", default="auto", choices=scans, help="for the prompt")
    add("--num-samples", type=int, default=1, metavar="N", help="so many texts")
    add("--stats", action="store_true", help="tokens, times and the state's size on stderr")
    arguments = parser.parse_args(argv)
    try:
        check_sampling(**{name: getattr(arguments, name) for name in ALLOWED})
    except ValueError as error:
        parser.error("--" + str(error).replace("_", "-"))
    model = arguments.model
    if re.fullmatch(r"mamba-[\w.-]+", model) and not Path(model).is_dir():
        parser.error(f"no folder {model!r}: on the Hub it is --model state-spaces/{model}")
    arguments.prompt = read_prompt(arguments.prompt, arguments.prompt_file, parser)
    return arguments


def read_prompt(text: str | None, file: str | None, parser: Parser) -> str:
    """Without the newline at the end, which editors and echo add and nobody means."""
    if text is None and file is None and (sys.stdin is None or sys.stdin.isatty()):
        parser.error('a prompt is missing: generate.py "To be, or not"')
    try:
        if text is None:
            text = sys.stdin.read() if file is None else Path(file).read_text("utf-8-sig")
            text = text.removesuffix("\n")
        text.encode()  # Bytes that are no UTF-8 may come as halves of characters: UnicodeError.
    except UnicodeError:
        parser.error("the prompt is not UTF-8 text")
    except OSError as error:
        parser.error(f"cannot read the prompt from {file or 'standard input'}: {error.strerror}")
    return text or parser.error("the prompt is empty: there is nothing to continue")


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


# Written as what is allowed: every comparison with NaN is False, so NaN is refused.
ALLOWED = {
    "max_new_tokens": (Integral, lambda value: value >= 1, "an integer, at least 1"),
    "temperature": (Real, lambda value: 0 <= value < math.inf, "0 (greedy) or a positive number"),
    "top_k": (Integral, lambda value: value >= 0, "0 (off) or a positive integer"),
    "top_p": (Real, lambda value: 0 < value <= 1, "in (0, 1]"),
    "min_p": (Real, lambda value: 0 <= value <= 1, "in [0, 1]"),
    "repetition_penalty": (Real, lambda value: 0 < value < math.inf, "a positive number"),
    "seed": (Integral | None, lambda value: 0 <= (value or 0) < 2**64, "an integer in [0, 2**64)"),
    "num_samples": (Integral, lambda value: value >= 1, "at least 1"),
    "stop": (list | tuple, lambda v: all(map(is_text, v)), "a list of texts that are not empty"),
}


def check_sampling(**options: Any) -> None:
    """Raises ValueError, with the name of the option, what it must be and what it is."""
    for name, value in options.items():
        kind, is_allowed, expected = ALLOWED[name]
        if isinstance(value, bool) or not (isinstance(value, kind) and is_allowed(value)):
            raise ValueError(f"{name} must be {expected}, got {value}")


def main(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 0, or 1 for a failure."""
    try:
        complete(arguments)
    except BrokenPipeError:
        return 0  # the reader has seen enough
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        # What a call in Python would write as scan='chunked' is an option here.
        message = re.sub(r"\b(scan|dtype)=['\"]?(\w+)['\"]?", r"--\1 \2", message)
        print(f"generate.py: error: {message}", file=sys.stderr)
        return 1
    return 0


def complete(arguments: argparse.Namespace) -> None:
    """Print the prompt and its continuation, piece by piece, as often as samples are wanted."""
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # a device that is there gives a number back
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {device} is not available on this machine") from error
    model = Mamba.from_pretrained(arguments.model, device=device, dtype=dtype, scan=arguments.scan)
    if device == "cpu" and model.config.d_model <= 512:
        # Threads gain little on matrices this small, and lose much when one waits for a busy core.
        torch.set_num_threads(1)
    tokenizer = load_tokenizer(model.config, arguments.model)
    input_ids, _ = encode_batch(tokenizer, [arguments.prompt], device)
    sampling = {name: getattr(arguments, name) for name in ALLOWED}
    samples, stop = sampling.pop("num_samples"), sampling.pop("stop")
    sampling |= {"eos_token_id": tokenizer.eos_token_ids, "vocab_size": tokenizer.vocab_size}
    for i in range(samples):
        if i > 0:
            print("-" * 80)
            sampling["seed"] = None if arguments.seed is None else (arguments.seed + i) % 2**64
        start = first = time.perf_counter()
        progress = partial(say_progress, start, input_ids.shape[1])
        steps = stream(model, input_ids, progress=progress, **sampling)
        pieces = text_of(tokenizer, map(Tensor.item, steps), steps.ends, stop)
        # The prompt waits for the first piece, so that an error never stands beside it.
        text, count = arguments.prompt, 0
        for count, piece in enumerate(pieces, start=1):
            print(text + piece, end="", flush=True)
            text, first = "", first if count > 1 else time.perf_counter()
        seconds = time.perf_counter() - first
        print(text, flush=True)
        if arguments.stats:
            state, rate = model.init_state(1), (count - 1) / seconds if count > 1 else 0.0
            stats = f"prompt {input_ids.shape[1]} tokens, first token after {first - start:.3f} s; "
            stats += f"{count} tokens, after the first {rate:.1f} tokens/s; "
            stats += f"state {state.conv.nbytes + state.h.nbytes} bytes"
            print(stats, file=sys.stderr)


def say_progress(start: float, total: int, count: int) -> None:
    """On stderr, if it is a terminal and the prompt takes long; erased when it has been read."""
    if sys.stderr and sys.stderr.isatty() and time.perf_counter() - start > 2:
        line = f"{count} of {total} tokens of the prompt are read" if count < total else ""
        print(f"\r{line:60}\r", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program, with no traceback
    if not sys.warnoptions:  # stderr is for one error, or for --stats
        warnings.simplefilter("ignore")
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it is closed
    sys.stdout.reconfigure(errors="replace")  # for characters that a terminal does not know
    the_call = parse_arguments()

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba import Mamba, MambaConfig, MambaState, at_least_float32, file_finder, is_our_own

## Text in, text out -------------------------------------------------------------------------------


def generate(
    model: Mamba, tokenizer: Tokenizer, prompt: str | list[str], *, stop: Sequence[str] = (),
    **sampling: Any,
) -> str | list[str]:  # fmt: skip
    """The text that follows the prompt, without the prompt; for a list of prompts, a list.

    sampling: the keyword arguments of `stream`, except mask and state. Unless given, eos_token_id
    and vocab_size are the tokenizer's. The text ends before an end token, before the first of the
    texts in stop, and without a character that is left incomplete. Nothing is remembered: for a
    conversation see `stream`. Raises ValueError for an empty prompt, and what `stream` raises.
    """
    check_sampling(stop=stop)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    input_ids, mask = encode_batch(tokenizer, prompts, model.backbone.embedding.weight.device)
    defaults = {"eos_token_id": tokenizer.eos_token_ids, "vocab_size": tokenizer.vocab_size}
    steps = stream(model, input_ids, mask=mask, **defaults | sampling)
    ## Each row takes as many steps as it needs; tee keeps those that others have still to take.
    rows = enumerate(itertools.tee(map(Tensor.tolist, steps), len(prompts)))
    rows = [text_of(tokenizer, map(itemgetter(i), row), steps.ends, stop) for i, row in rows]
    texts = ["".join(pieces) for pieces in rows]
    return texts[0] if isinstance(prompt, str) else texts


def text_of(
    tokenizer: Tokenizer, ids: Iterable[int], ends: Sequence[int], stop: Sequence[str]
) -> Iterator[str]:
    """The text of one row, in pieces, before the first end token or stop string."""
    held = ""
    for piece in tokenizer.decode_stream(itertools.takewhile(lambda i: i not in ends, ids)):
        held += piece
        if found := [held.index(text) for text in stop if text in held]:
            yield held[: min(found)]
            return
        # What may turn out to be the beginning of a stop string is held back.
        lengths = (n for text in stop for n in range(len(text)) if held.endswith(text[:n]))
        sure = len(held) - max(lengths, default=0)
        yield held[:sure]
        held = held[sure:]
    if held:
        yield held


## Prompts of unequal length form one batch by padding on the left, so that all of them end, and
## continue, at the same column. By the mask each gets the numbers that it would get alone.


def encode_batch(
    tokenizer: Tokenizer, prompts: list[str], device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """Texts -> ids (batch, longest), int64, and mask, bool, of that shape; None if no padding."""
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    if not rows or not all(rows):
        raise ValueError("the prompt is empty: there is nothing to continue")
    rows = [torch.tensor(row, device=device) for row in rows]
    padded = partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    mask = padded([torch.ones_like(row, dtype=torch.bool) for row in rows])
    return padded(rows), None if mask.all() else mask


## The loop ----------------------------------------------------------------------------------------
##
## The prompt is known, so all of it goes through the model at once and in parallel (prefill). What
## it leaves behind is a state of fixed size and the logits of its last position. From here on each
## token depends on the one before, and every step costs the same: sample a token from the logits,
## feed it to `step`, get the next logits and the next state. No earlier token is looked at again.
##
## A function with `yield` is a good home for such a loop: the caller takes as many tokens as it
## likes, when it likes, and between two of them everything waits in the local variables.


class Stream(Iterator[Tensor]):
    """What `stream` returns: token ids (batch,), step by step. Its `.state`, between two of them
    and after the end, is a copy that holds the prompt and every token so far but the last."""

    def __init__(self, steps: Iterator[Tensor], ask: list[Callable], ends: list[int]) -> None:
        self.steps, self.ask, self.ends = steps, ask, ends

    def __next__(self) -> Tensor:
        return next(self.steps)

    @property
    def state(self) -> MambaState:
        return self.ask[0]().map(torch.clone)


def stream(
    model: Mamba, input_ids: Tensor, *, state: MambaState | None = None,
    mask: Tensor | None = None, max_new_tokens: int = 256, temperature: float = 1.0,
    top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None, vocab_size: int | None = None,
    seed: int | None = None, progress: Callable[[int], None] | None = None,
) -> Stream:  # fmt: skip
    """input_ids (batch, seqlen) -> the next token of each row, (batch,) int64, again and again.

    Ends after max_new_tokens, or once every row has produced an end token, one of eos_token_id; a
    row that is finished repeats the first of these, and its state reads them. Temperature to min_p:
    see `sample`; repetition_penalty, for tokens of input_ids and after: see `penalize_repetition`.

    state: what the rows have read before. A conversation goes on with the last token, which the
        state does not hold, and with what is said next:

            turn = stream(model, ids)
            *_, last = turn
            turn = stream(model, torch.cat([last[:, None], next_ids], dim=1), state=turn.state)

        To continue one text in several ways, read it once, `_, state = prefill(model, ids)`, and
        begin each time with `state`, or n rows at once with `state[:, [0] * n]`.
    mask: (batch, seqlen), 0 on left padding (`reset_after_padding`): any ids of the vocabulary.
    vocab_size: ids from here on stand for no token and are never sampled. None: the model's.
    seed: None draws from torch's global generator, an integer from one of this call's own. The
        same seed and the same arguments, max_new_tokens among them, give the same tokens.
    progress: is called after each part of the prompt, with the length that has been read.

    The model must not change before the end. Raises ValueError for values out of range and shapes
    that do not fit, IndexError for an id that is not in the vocabulary, RuntimeError for logits
    that are not finite; on a GPU only those of the prompt are looked at.
    """
    cuts = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    others = dict(max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty, seed=seed)
    check_sampling(**cuts, **others)
    vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
    if not (isinstance(vocab_size, Integral) and 1 <= vocab_size <= model.config.vocab_size):
        raise ValueError(f"vocab_size must be in [1, {model.config.vocab_size}], got {vocab_size}")
    eos_token_id = eos_token_id.tolist() if isinstance(eos_token_id, Tensor) else eos_token_id
    ends = eos_token_id if isinstance(eos_token_id, Iterable) else [eos_token_id]
    ends = [end for end in ends if end is not None]
    if not all(isinstance(end, Integral) and 0 <= end < vocab_size for end in ends):
        raise ValueError(f"eos_token_id must be None or in [0, {vocab_size}), got {eos_token_id}")
    is_integer = input_ids.dtype in (torch.int64, torch.int32)
    if input_ids.ndim != 2 or input_ids.numel() == 0 or not is_integer:
        found = f"{input_ids.dtype} {tuple(input_ids.shape)}"
        expected = "int64 or int32, (batch, seqlen), at least one"
        raise ValueError(f"input_ids must be {expected}, got {found}")
    # This waits for a GPU: once per prompt it may, per token it must not.
    low, high = (bound.item() for bound in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise IndexError(f"token ids must be in [0, {vocab_size}), got {low} ... {high}")
    batch, device, on_gpu = len(input_ids), input_ids.device, input_ids.is_cuda
    start = model.init_state(batch) if state is None else state
    ask = [lambda: start]  # who knows the state

    @torch.no_grad()
    def steps() -> Iterator[Tensor]:
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        finished = torch.zeros(batch, dtype=torch.bool, device=device)
        logits, read = prefill(model, input_ids, mask, start, progress)
        if repetition_penalty != 1:
            # Padding is marked in a column of its own, which is cut off.
            real = input_ids if mask is None else input_ids.masked_fill(~mask.bool(), vocab_size)
            seen = torch.zeros(batch, vocab_size + 1, dtype=torch.bool, device=device)
            seen = seen.scatter_(1, real.long(), True)[:, :vocab_size]
        with continuing(model, read, max_new_tokens) as step:
            ask[0] = step.state
            for count in range(1, max_new_tokens + 1):
                logits = logits[:, :vocab_size]
                if count == 1 or not on_gpu:  # a GPU would have to be waited for
                    check_logits(logits)
                if repetition_penalty != 1:
                    logits = penalize_repetition(logits, seen, repetition_penalty)
                token_ids = sample(logits, generator=generator, **cuts)
                if ends:
                    token_ids = token_ids.masked_fill(finished, ends[0])
                    for end in ends:
                        finished |= token_ids == end
                yield token_ids
                # Asked after the yield: a step is computed only if its logits are wanted.
                if count == max_new_tokens or (ends and finished.all()):
                    break
                if repetition_penalty != 1:
                    seen.scatter_(1, token_ids.unsqueeze(-1), True)
                logits = step(token_ids)
            last = step.state()  # for now the step goes, with its buffers or copies
            ask[0] = lambda: last

    return Stream(steps(), ask, ends)


## `model.step` is for every device, and for reading. Two others compute the same, and faster: on a
## GPU a recorded one, of triton_scan.py, and for one sequence on a CPU `CopiedStep`. The same up to
## rounding: with short floats a seed may lead to another text.


def continuing(
    model: Mamba, state: MambaState, tokens: int
) -> contextlib.AbstractContextManager[Callable[[Tensor], Tensor]]:
    """A function that feeds tokens (batch,) to the model and returns logits, from this state on,
    and has a method `state`. tokens: how many will be asked for in all, or fewer."""
    with contextlib.suppress(ImportError):  # without Triton, step after step
        if can_record(model):
            from triton_scan import step_graph

            return step_graph(model, state)
    step = CopiedStep if worth_copies(model, state, tokens) else PlainStep
    return contextlib.nullcontext(step(model, state))


def can_record(model: Mamba) -> bool:
    """Whether a step is nothing but launches: on a GPU, and by our modules only."""
    return model.backbone.embedding.weight.is_cuda and is_our_own(model)


class PlainStep:
    def __init__(self, model: Mamba, state: MambaState) -> None:
        self.model, self.last = model, state

    def __call__(self, token_ids: Tensor) -> Tensor:
        logits, self.last = self.model.step(token_ids, self.last)
        return logits

    def state(self) -> MambaState:
        return self.last


def check_logits(logits: Tensor) -> None:
    # -inf is allowed: it forbids a token. NaN is larger than everything for amax.
    if not logits.amax(-1).isfinite().all():
        why = "weights are damaged, or its numbers are too large for float16 (try dtype=bfloat16)"
        raise RuntimeError(f"the model's logits are not finite: {why}")


## The prompt --------------------------------------------------------------------------------------
##
## A part of the prompt leaves a state behind, and the next part goes on from there. So a long
## prompt is read in parts, in the memory of one. (Attention has to keep all that it has read.)

CPU_READS, GPU_READS = 1024, 8192  # tokens of all rows in a part. More are no faster


def prefill(
    model: Mamba, input_ids: Tensor, mask: Tensor | None = None, state: MambaState | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, MambaState]:  # fmt: skip
    """input_ids (batch, seqlen) -> (batch, padded_vocab_size), the last position's logits; state.

    As `model(input_ids, state, reset=...)`, up to rounding. mask, state, progress: see `stream`. A
    model that is not of our modules only gets the prompt in one piece.
    """
    if mask is not None and mask.shape != input_ids.shape:
        shapes = f"{tuple(input_ids.shape)}, got {tuple(mask.shape)}"
        raise ValueError(f"mask must have the shape of input_ids, {shapes}")
    reset = None if mask is None else reset_after_padding(mask, state)
    state = model.init_state(len(input_ids)) if state is None else state
    reader, (batch, length) = model, input_ids.shape
    if is_our_own(model):
        if can_convolve(model, batch * length):
            reader = by_convolution(model)
        length = max(1, (GPU_READS if input_ids.is_cuda else CPU_READS) // batch)
    for start in range(0, input_ids.shape[1], length):
        part = slice(start, start + length)
        part_reset = None if reset is None else reset[:, part]
        last, state = reader(input_ids[:, part], state, reset=part_reset, head=lambda u: u[:, -1])
        if progress is not None:
            progress(min(part.stop, input_ids.shape[1]))
    return model.lm_head(last), state


## The time goes into matrix products, and for those PyTorch has two libraries on a CPU. nn.Linear
## calls MKL, which keeps its AVX-512 routines for Intel's processors. On AMD's the other, oneDNN,
## is twice as fast; PyTorch calls it for convolutions. And a Linear is a convolution of width 1,
## over an image in which each pixel is a token and its colours are the d_in numbers of u.


class Convolution(nn.Linear):
    def forward(self, u: Tensor) -> Tensor:
        ## One pixel wide and as high as there are tokens. No number moves: with the colours of a
        ## pixel side by side ("channels last") the image lies in memory as u does.
        image = u.reshape(1, -1, 1, u.shape[-1]).permute(0, 3, 1, 2)  # (1, d_in, tokens, 1)
        image = F.conv2d(image, self.weight[:, :, None, None], self.bias)
        return image.permute(0, 2, 3, 1).reshape(*u.shape[:-1], -1)


def by_convolution(model: Mamba) -> Mamba:
    """A model with the same parameters, to train as well, whose in_proj and out_proj are
    convolutions. Raises ValueError for one with hooks, adapters or modules that are not ours."""
    if not is_our_own(model):
        raise ValueError("by_convolution takes a model of our own modules only, without hooks")

    def twin_of(module: nn.Module, name: str = "") -> Any:
        twin = copy.copy(module)  # not a deep copy: that takes 20 ms
        twin._modules = {child: twin_of(module, child) for child, module in twin._modules.items()}
        if name in ("in_proj", "out_proj"):
            twin.__class__ = Convolution
        return twin

    return twin_of(model)


WORTH_CONVOLUTION = 128  # tokens; oneDNN first copies the weights into an order of its own
CPUINFO = Path("/proc/cpuinfo")  # only Linux has it


def can_convolve(model: Mamba, tokens: int) -> bool:
    """Whether that is faster: many tokens, in float32, on a processor of AMD with AVX-512."""
    return (
        tokens >= WORTH_CONVOLUTION
        and torch.get_num_threads() > 1  # with one thread PyTorch convolves a single image itself
        and torch.backends.mkldnn.enabled
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in (CPUINFO.read_text() if CPUINFO.exists() else platform.processor())
        and kind_of_weights(model) == ("cpu", torch.float32)
    )


def kind_of_weights(model: Mamba) -> tuple[str, torch.dtype] | None:
    """Where they are and their dtype; None if they differ, or if not all modules are ours."""
    kinds = {(p.device.type, p.dtype) for p in model.parameters()}
    return kinds.pop() if len(kinds) == 1 and is_our_own(model) else None


## Padding on the left is a document of its own that ends where the prompt begins. There the model
## forgets. A row without padding has no such place: it goes on from the state that it is given.


def reset_after_padding(mask: Tensor, state: MambaState | None = None) -> Tensor:
    """(batch, seqlen), bool or integers 0 and 1, 0 on left padding -> reset, (batch, seqlen) bool.

    Raises ValueError for a mask that is something else, for a row of nothing but padding, and for
    padding in a row whose state is not zero: the text before it would be forgotten.
    """
    if mask.ndim != 2 or mask.numel() == 0 or mask.is_floating_point() or mask.is_complex():
        found = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"mask must be bool, or integers 0 and 1, (batch, seqlen), got {found}")
    real = mask.bool()
    ends = ~real[:, -1] | (real[:, :-1] & ~real[:, 1:]).any(-1)
    used = torch.zeros_like(ends)
    for tensor in () if state is None else (state.conv, state.h):
        used |= (tensor != 0).movedim(-3, 0).flatten(1).any(-1)
    faults = [(mask != real).any() | ends.any(), (used & ~real[:, 0]).any()]
    not_left, not_zero = torch.stack(faults).tolist()  # the one look at a GPU's numbers
    if not_left:
        allowed = "in each row 0 or False before the first token, then only 1 or True"
        raise ValueError(f"mask must be left padding: {allowed}, at least once")
    if not_zero:
        raise ValueError("mask has padding in a row whose state is not zero: pad whole prompts")
    return real & ~F.pad(real[:, :-1], (1, 0), value=True)


## One token on a CPU ------------------------------------------------------------------------------
##
## A token takes a CPU the time to read every weight once: 517 MB for 130m in float32, 10 ms at 50
## GB/s. That is, if all threads read, each its own part, and in the best order. nn.Linear does not
## always. And a product can be written in another way. With the columns of W,
##
##     W x  =  x_1 (column 1)  +  x_2 (column 2)  +  ...
##
## A sum of a few long columns is read faster than many short rows are. So where W has more rows
## than columns, Parts keeps a copy in that order.


class Parts:
    """W (rows, columns) times one vector, float32: a product for each thread, if these divide W."""

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
        filled_up = F.pad(weight, (0, 0, 0, self.pieces * length - self.rows))
        pieces = filled_up.reshape(self.pieces, length, columns).mT  # by columns
        self.table = pieces.contiguous().view(-1, length)
        self.ids = torch.arange(len(self.table), dtype=torch.int32)
        self.starts = self.ids[::columns].contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """(columns,) of any float dtype -> (rows,) float32"""
        x = x.to(self.table.dtype).expand(self.pieces, -1).reshape(-1)
        y = F.embedding_bag(self.ids, self.table, self.starts, mode="sum", per_sample_weights=x)
        return y.view(-1)[: self.rows].float()


## 28 of the 32 registers of 16 numbers of AVX-512; AVX2 has 16 of 8, which two passes fill.
LONGEST_PIECE = 448 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 192
WORTH_THREADS = 2**18  # to wake a thread takes as long as to multiply so many numbers


def product(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    times = (Parts if linear.weight.dtype == torch.float32 else Bags)(linear.weight)
    bias = None if linear.bias is None else linear.bias.float()
    return times if bias is None else lambda x: times(x) + bias


## Between the products every operator has its price: while they read hundreds of megabytes, all
## else is pushed out of the caches. So this step has few operators, computes once what is the same
## for all tokens, runs along long rows, the channels last, and changes its state in place.


class LayerStep:
    """`ResidualBlock.step` for one sequence: stream (d_model,) in and out. It keeps the state."""

    def __init__(self, layer: nn.Module, state: MambaState) -> None:
        block, config = layer.mixer, layer.mixer.config
        self.eps, self.norm = layer.norm.eps, layer.norm.weight.float()
        self.in_proj, self.x_proj = product(block.in_proj), product(block.x_proj)
        self.dt_proj, self.out_proj = product(block.dt_proj), product(block.out_proj)
        self.filters = block.conv1d.weight.squeeze(1).T.float().contiguous()  # (d_conv, d)
        bias, self.D = block.conv1d.bias, block.D.float()
        self.conv_bias = torch.zeros_like(self.D) if bias is None else bias.float()
        self.widths = [config.dt_rank, config.d_state, config.d_state]
        # exp2: PyTorch's exp takes several times as long on some processors.
        self.A_log2e = block.A.T.contiguous() * math.log2(math.e)  # (n, d)
        self.past, self.h = state.conv[0].T.float(), state.h[0].T.clone().contiguous()

    def __call__(self, stream: Tensor) -> Tensor:
        row = stream.float()
        rms = math.sqrt(row.dot(row).item() / len(row) + self.eps)
        raw, z = self.in_proj((row * self.norm).div_(rms)).chunk(2)
        window = torch.cat([self.past, raw.unsqueeze(0)])  # (d_conv, d)
        self.past = window[1:]
        x = F.silu((window * self.filters).sum(0) + self.conv_bias)
        low_rank, B, C = self.x_proj(x).split(self.widths)
        delta = F.softplus(self.dt_proj(low_rank))
        self.h.mul_((delta * self.A_log2e).exp2_()).addcmul_(B.unsqueeze(-1), delta * x)  # (2a)
        y = torch.addcmul(C @ self.h, self.D, x) * F.silu(z)  # (2b)
        return stream + self.out_proj(y).to(stream.dtype)


class CopiedStep:
    """`model.step` for one sequence: token ids (1,) in, logits (1, padded_vocab_size) out. Raises
    RuntimeError if PyTorch notes that weights have changed since the first token."""

    def __init__(self, model: Mamba, state: MambaState) -> None:
        self.model, self.start = model, state
        self.layers: list[LayerStep] = []
        self.weights = [p for p in model.parameters() if not p.is_inference()]  # those count none

    @torch.inference_mode()  # an operator then takes a little less of Python's time
    def __call__(self, token_ids: Tensor) -> Tensor:
        changes = sum([p._version for p in self.weights])
        if not self.layers:
            for i, layer in enumerate(self.model.backbone.layers):
                self.layers.append(LayerStep(layer, self.start[i]))
            self.lm_head, self.changes = product(self.model.lm_head), changes
        if changes != self.changes:
            raise RuntimeError("the weights changed in the middle of a stream: begin another one")
        stream = self.model.embed(token_ids).squeeze(0)
        for layer in self.layers:
            stream = layer(stream)
        return self.lm_head(self.model.backbone.norm_f(stream)).unsqueeze(0)

    def state(self) -> MambaState:
        """The state after the last token, as a copy."""
        if not self.layers:
            return self.start
        conv = torch.stack([layer.past.T for layer in self.layers]).to(self.start.conv.dtype)
        h = torch.stack([layer.h.T for layer in self.layers])
        return MambaState(conv.unsqueeze(1), h.unsqueeze(1))


## The copies take as long as some dozen tokens, most of it to get the memory. They are not kept:
## weights change between generations, and every model that ever spoke would be there twice.

COPY_FOR_TOKENS, COPY_AT_MOST = 64, 4 * 2**30  # tokens or more; bytes


def worth_copies(model: Mamba, state: MambaState, tokens: int) -> bool:
    device, dtype = kind_of_weights(model) or (None, None)
    rules = {layer.mixer.config.rule for layer in model.backbone.layers} if device else {}
    return (
        (state.h.shape[1], state.h.dtype, device) == (1, torch.float32, "cpu")
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and rules == {"mamba"}
        and tokens >= COPY_FOR_TOKENS
        and sum(p.nbytes for p in model.parameters()) <= COPY_AT_MOST
    )


## The sampler -------------------------------------------------------------------------------------
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
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    min_p: float = 0.0, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """logits (batch, vocab), any float dtype -> one token id of each row, (batch,) int64.

    temperature 0 takes the most probable token; top_k 0, top_p 1 and min_p 0 switch a cut off. The
    arguments are checked by the callers, once (`check_sampling`).
    """
    if temperature == 0:
        return logits.argmax(-1)
    if logits.is_cuda and top_k == 0 and logits.dtype != torch.float64 and logits.stride(1) == 1:
        ## To sort 50,000 numbers takes a GPU as long as a step of mamba-130m. triton_scan.py
        ## draws from all, looks whether the token would have been kept, and if not draws again.
        with contextlib.suppress(ImportError):
            from triton_scan import sample_triton

            cuts = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
            return sample_triton(logits, generator=generator, **cuts)
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
    ## To sort 50,000 numbers takes a CPU 4 ms, a sixth of the time of a token of mamba-130m. The
    ## first 1024 are nearly always enough. (To ask a GPU that would be to wait for it.)
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
    """logits, seen (batch, vocab), bool -> logits, smaller where seen if the penalty is above 1."""
    logits = at_least_float32(logits)
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    # An extreme penalty makes inf of a large logit, and in the sampler inf - inf would be NaN.
    return torch.where(seen, penalized.nan_to_num(), logits)


## Tokenizers --------------------------------------------------------------------------------------
##
## A token is a short string of bytes. The simplest vocabulary is the 256 bytes themselves; byte
## pair encoding (BPE) adds strings that occur often, such as " the", until it has 50,277 of them.
## Text is the UTF-8 reading of the bytes of all tokens together. Not of each token: "é" is two
## bytes and an emoji four, and a token may end in the middle of one. So a stream of tokens is
## decoded with a memory, which holds a character back until its last byte is there.


class ByteTokenizer:
    """Token i is byte i."""

    vocab_size = 256
    eos_token_ids: Sequence[int] = ()  # those that end a document
    find = {}.get  # name of a token -> its id, or None

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are not UTF-8, at the end of the ids too, become U+FFFD."""
        return bytes(ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """A piece of text for each id, "" while a character is incomplete. One that never becomes
        complete is left out."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return (decoder.decode(bytes([token_id])) for token_id in ids)


class FileTokenizer:
    """A tokenizer.json, such as that of gpt-neox-20b; used as `ByteTokenizer` is. Special tokens
    have no text. Raises ValueError for a file that is no tokenizer."""

    def __init__(self, path: str | os.PathLike) -> None:
        from tokenizers import Tokenizer, decoders

        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        # Left over from training, these would cut a long prompt short and fill up a short one.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # Not the number of tokens: ids may have gaps.
        self.vocab_size = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        self.new_decoder = partial(decoders.DecodeStream, skip_special_tokens=True)
        self.find = self.tokenizer.token_to_id
        ends = map(self.find, ("<|endoftext|>", "</s>", "<eos>"))  # if no file says more
        self.eos_token_ids = tuple(end for end in ends if end is not None)[:1]

    def encode(self, text: str) -> list[int]:
        """The file's template may begin the text, as in training; it must not end a prompt."""
        encoding = self.tokenizer.encode(text)
        ids, from_template = encoding.ids, encoding.special_tokens_mask
        while ids and from_template[len(ids) - 1]:
            ids.pop()
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        decoder = self.new_decoder()
        return (decoder.step(self.tokenizer, token_id) or "" for token_id in ids)


Tokenizer = ByteTokenizer | FileTokenizer


## The published originals come without a tokenizer: they were trained with that of gpt-neox-20b.
## Others bring their own. A pair that does not belong together would produce nonsense in silence,
## so the sizes are compared. A model has no fewer rows than there are tokens, and few more: its
## matrices are rounded up, to a multiple of 256 at most. What ends a text is an id in some files,
## the name of a token in others, one or several. The first file that says something counts.

NEOX, NEOX_SIZE = "EleutherAI/gpt-neox-20b", 50277
END_TOKENS = {
    "generation_config.json": "eos_token_id", "config.json": "eos_token_id",
    "tokenizer_config.json": "eos_token", "special_tokens_map.json": "eos_token",
}  # fmt: skip


def load_tokenizer(
    config: MambaConfig, name_or_path: str | os.PathLike, *, revision: str | None = None,
    cache_dir: str | None = None, local_files_only: bool = False,
) -> Tokenizer:  # fmt: skip
    """The tokenizer of the model that `Mamba.from_pretrained(name_or_path)` loads.

    Bytes if its config says so; else its own tokenizer.json; else that of gpt-neox-20b, if it has
    as many tokens. Raises FileNotFoundError if there is none, ValueError if it is unknown, damaged
    or of another size than the model, or if a file names an end token that it has not.
    """
    if config.tokenizer not in ("bytes", None):
        raise ValueError(f"tokenizer must be 'bytes' or not given, got {config.tokenizer!r}")
    name, rows, where = os.fspath(name_or_path), config.vocab_size, (cache_dir, local_files_only)
    # The originals are not asked for what they do not have: cached, they need no network.
    if re.fullmatch(r"state-spaces/mamba-.*(?<!-hf)", name) and not Path(name).is_dir():
        name, revision = NEOX, None
    tokenizer, finders = ByteTokenizer(), [file_finder(name, revision, *where)]
    if config.tokenizer is None:
        try:
            path = finders[0]("tokenizer.json")
        except FileNotFoundError:
            if name == NEOX or rows not in range(NEOX_SIZE, NEOX_SIZE + 256):
                raise
            finders.append(file_finder(NEOX, None, *where))
            path = finders[1]("tokenizer.json")
        tokenizer = FileTokenizer(path)
    if rows not in range(tokenizer.vocab_size, tokenizer.vocab_size + 256):
        sizes = f"the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}"
        raise ValueError(f"{sizes}: they do not belong together")
    ends = (end_tokens(find, file, tokenizer) for find in finders for file in END_TOKENS)
    tokenizer.eos_token_ids = next(filter(None, ends), tokenizer.eos_token_ids)
    return tokenizer


def end_tokens(find: Callable[..., Path], file: str, tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text by this file; none if there is no file, or it says nothing."""
    try:
        path, field = find(file), END_TOKENS[file]
    except (FileNotFoundError, RuntimeError):  # a Hub that is ill does not stop what is cached
        return []
    try:
        ends = json.loads(path.read_bytes()).get(field)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error
    ids = []
    for end in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        token = end.get("content") if isinstance(end, dict) else end
        ids.append(tokenizer.find(token) if isinstance(token, str) else token)
        if type(ids[-1]) is not int or not 0 <= ids[-1] < tokenizer.vocab_size:
            known = f"of the tokenizer's {tokenizer.vocab_size} tokens"
            raise ValueError(f"{path}: {field} must be {known}, got {end!r}")
    return ids


if __name__ == "__main__":
    os._exit(main(the_call))  # at once: what cannot be written, Python would tell a second time
