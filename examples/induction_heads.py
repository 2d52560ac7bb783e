"""Induction heads: what stood after this token, the last time it was there?

    python examples/induction_heads.py --small   # a minute on a CPU: a table, a picture
    python examples/induction_heads.py           # the paper's sizes, for a GPU

The task of section 4.1.2 of the paper (arXiv 2312.00752; sizes of its appendix E.1, but half of its
204,800 steps, and a learning rate that falls to 0 at the end). A sequence of random tokens holds
one special token, somewhere. At the end the special token comes again, and the model is to say
which token followed it the first time:

    7 3 [S] 9 1 4 4 0 2 [S]  ->  9

Attention finds the place by comparing. A recurrent model has to notice [S] when it comes, write the
next token into its state, and keep it from there on, whatever else it reads: it must select. Two
layers are trained on one length and asked at lengths up to thousands of times as long. Beside them
two layers of the same size whose Δ, B and C are the same for every token (`FixedBlock`), as S4's
are: they keep a fading sum of all that came.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recorded import recorded

from mamba import Mamba, MambaBlock, MambaConfig

TOKENS = 16  # the last one is special
PART = 2**15  # tokens of a long sequence that are read at once
# Accuracy that the paper's table 2 gives for Mamba, at every length from 2^6 to 2^20.
PAPER = 1.0
SIZES = {  # length and rows in training, learning rate and how it ends, lengths that are asked
    "paper": {"d_model": 64, "length": 256, "batch": 8, "steps": 25 * 4096, "lr": 1e-3, "fade": 0.2,
              "asked": [2**k for k in range(6, 21)]},
    "small": {"d_model": 16, "length": 16, "batch": 32, "steps": 500, "lr": 1e-2, "fade": 0.2,
              "asked": [2**k for k in range(3, 11)]},
}  # fmt: skip
COLORS = {"selective": "royalblue", "fixed": "darkorange"}
LABELS = {"selective": "Δ, B, C from the token (Mamba)", "fixed": "Δ, B, C fixed (as in S4)"}


class FixedBlock(MambaBlock):
    """A MambaBlock without selection: Δ, B and C are parameters, and x does not change them."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.B, self.C = (nn.Parameter(torch.randn(config.d_state)) for _ in range(2))

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., d) -> dt (..., d), B and C (..., n). Δ is softplus(dt + bias): dt is 0."""
        B, C = (parameter.expand(*x.shape[:-1], -1) for parameter in (self.B, self.C))
        return torch.zeros_like(x), B, C


def make_model(kind: str, d_model: int) -> Mamba:
    """Two layers. kind: "selective" or "fixed"."""
    model = Mamba(MambaConfig(d_model, n_layer=2, vocab_size=TOKENS, pad_vocab_size_multiple=1))
    if kind == "fixed":
        for layer in model.backbone.layers:
            layer.mixer = FixedBlock(model.config)
    return model


def make_sequences(batch: int, length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """ids (b, l) and the token that is asked for (b,), from the device's global generator."""
    ids = torch.randint(TOKENS - 1, (batch, length), device=device)
    place = torch.randint(length - 2, (batch, 1), device=device)
    ids.scatter_(1, place, TOKENS - 1)
    ids[:, -1] = TOKENS - 1
    return ids, ids.gather(1, place + 1).squeeze(1)


def answer(model: Mamba, ids: Tensor) -> Tensor:
    """ids (b, l) -> logits (b, TOKENS) after the last token, reading part after part."""
    state = model.init_state(len(ids))
    for part in ids.split(PART, dim=1):
        logits, state = model(part, state, head=lambda hidden: model.lm_head(hidden[:, -1]))
    return logits


def ask(model: Mamba, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """The logits of the answers to new sequences (rows, TOKENS), and the right ones (rows,)."""
    ids, wanted = make_sequences(rows, length, model.lm_head.weight.device)
    return answer(model, ids), wanted


def train(
    model: Mamba, ask: Callable[[Mamba], tuple[Tensor, Tensor]], steps: int, lr: float,
    *, fade: float = 0.0, clip: float = math.inf, say: str = "",
) -> Tensor:  # fmt: skip
    """AdamW without weight decay, on cross-entropy. Returns losses and shares answered (2, steps).

    ask(model) makes new sequences at each call, and returns logits (..., tokens) and the tokens
    that are right (...): what is answered in training was never seen before. The learning rate
    falls to 0 over the last `fade` of the steps. clip: the largest norm of a gradient.
    """
    device = model.lm_head.weight.device
    on_gpu, found = device.type == "cuda", torch.zeros(2, steps, device=device)
    rate = torch.tensor(lr, device=device)  # not a number, which a recorded step would not look up
    ## Adam divides a gradient by its own size, so that small ones move a weight as far as large
    ## ones, until they are no larger than eps. PyTorch's eps of 1e-8 is too large here. All answers
    ## at the length in training are soon right, and the gradients nearly nothing, while Δ on noise
    ## is still too large for sequences thousands of times as long. With 1e-15 Δ goes on falling.
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0, capturable=on_gpu
    )
    count = torch.zeros(1, dtype=torch.long, device=device)

    def step() -> Tensor:
        if fade:
            rate.copy_(lr * ((steps - count) / (fade * steps)).clamp(max=1).squeeze())
        logits, wanted = ask(model)
        loss = F.cross_entropy(logits.flatten(0, -2), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        right = (logits.argmax(-1) == wanted).float().mean()
        found.index_copy_(1, count, torch.stack([loss.detach(), right]).unsqueeze(1))
        count.add_(1)
        return loss.detach()

    # On a GPU a step of a model this small is nearly all Python, so it is recorded.
    run = recorded(step, optimizer).__next__ if on_gpu else step
    begun = time.perf_counter()
    for i in range(steps):
        run()
        if say and (i + 1) % max(1, steps // 20) == 0:
            loss, right = found[:, max(0, i - 50) : i + 1].mean(1).tolist()
            line = f"{say}, step {i + 1:,} of {steps:,}: loss {loss:.3f}, right {100 * right:.0f} %"
            line += f", {time.perf_counter() - begun:.0f} s"
            print(f"\r{line:78}", end="", file=sys.stderr, flush=True)
    if say:
        print(file=sys.stderr)
    return found.cpu()


@torch.no_grad()
def accuracy(model: Mamba, ask: Callable[[Mamba], tuple[Tensor, Tensor]], times: int = 1) -> float:
    """The share that is answered when it is asked so many times."""
    answers = (ask(model) for _ in range(times))
    shares = [(logits.argmax(-1) == wanted).float().mean() for logits, wanted in answers]
    return torch.stack(shares).mean().item()


def table(results: dict[tuple[str, int], list[float]], sizes: dict) -> str:
    """Lines of markdown: a row for each length, a column for each model and seed."""
    titles = ["length", "paper", *(f"{kind}, seed {seed}" for kind, seed in results)]
    lines = [titles, ["---:"] * len(titles)]
    for i, length in enumerate(sizes["asked"]):
        mark = " (trained)" if length == sizes["length"] else ""
        paper = f"{100 * PAPER:.0f} %" if sizes is SIZES["paper"] else ""
        found = (f"{100 * shares[i]:.0f} %" for shares in results.values())
        lines.append([f"{length:,}{mark}", paper, *found])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(results: dict[tuple[str, int], list[float]], sizes: dict, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    labels = dict(LABELS)  # one line of the legend for all seeds
    for (kind, _), shares in results.items():
        axes.plot(sizes["asked"], shares, "o-", color=COLORS[kind], label=labels.pop(kind, None))
    axes.axvline(sizes["length"], color="gray", linestyle=":", label="length in training")
    axes.axhline(1 / (TOKENS - 1), color="gray", linestyle="--", label="guessing")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("tokens in the sequence")
    axes.set_ylabel("share answered")
    axes.set_title("Induction heads: each line a seed")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file)


def command_line(description: str, picture: str, seeds: tuple[int, ...]) -> argparse.Namespace:
    """small, seeds, steps, keep, out, and the device to run on."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[*seeds], metavar="S", help="of a run each"
    )
    parser.add_argument("--steps", type=int, help="of training, in place of the sizes' own")
    parser.add_argument("--keep", type=Path, help="a file of finished runs, which are not repeated")
    parser.add_argument("--out", type=Path, default=Path(picture), help="picture")
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    # All that would be an error after the training is one before it.
    for option, file in (("--out", options.out), ("--keep", options.keep)):
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            parser.error(f"{option} must name a file in a folder that exists, got {file}")
    if options.out.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--out must end in .png, .svg or .pdf, got {options.out}")
    try:
        read_kept(options.keep)
    except (OSError, TypeError, ValueError) as error:
        parser.error(f"--keep {options.keep} is no file of finished runs, name another: {error}")
    if importlib.util.find_spec("matplotlib") is None:
        print("the picture needs matplotlib: pip install matplotlib", file=sys.stderr)
        raise SystemExit(1)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cpu":
        torch.set_num_threads(1)  # matrices as small as these do not gain from more
    return options


def read_kept(file: Path | None) -> dict[str, Any]:
    return {} if file is None or not file.exists() else dict(json.loads(file.read_text()))


def run_each(
    run: Callable[[Any, int], Any], kinds: Iterable, sizes: dict, options: argparse.Namespace
) -> dict[tuple[Any, int], Any]:
    """run(kind, seed), of numbers and lists, for each kind and seed, with the seed set; or what it
    gave before, if --keep names a file that has it, of the same sizes."""
    finished, results = read_kept(options.keep), {}
    for kind, seed in itertools.product(kinds, options.seeds):
        key = f"{kind}, seed {seed}, {sizes}"
        if key not in finished:
            torch.manual_seed(seed)
            finished[key] = run(kind, seed)
            if options.keep is not None:  # written aside and moved: killed here, the old one stays
                aside = options.keep.with_name(options.keep.name + ".partial")
                aside.write_text(json.dumps(finished, indent=1))
                aside.replace(options.keep)
        results[kind, seed] = finished[key]
    return results


def main() -> None:
    options = command_line(__doc__.split("\n")[0], "induction_heads.png", (0, 1, 2))
    sizes = SIZES["small" if options.small else "paper"]
    lr, fade, steps = sizes["lr"], sizes["fade"], options.steps or sizes["steps"]

    def run(kind: str, seed: int) -> list[float]:
        model = make_model(kind, sizes["d_model"]).to(options.device)
        learn = functools.partial(ask, rows=sizes["batch"], length=sizes["length"])
        train(model, learn, steps, lr, fade=fade, say=f"{kind}, seed {seed}")
        exams = (functools.partial(ask, rows=64, length=length) for length in sizes["asked"])
        return [accuracy(model, exam) for exam in exams]

    results = run_each(run, LABELS, sizes | {"steps": steps}, options)
    print(table(results, sizes))
    draw(results, sizes, options.out)
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
