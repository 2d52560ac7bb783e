"""Look inside a layer: its steps Δ, its state at every token, and its hidden attention matrix.

    python examples/look_inside.py "To be, or not to be, that is the question:" --layer 6

draws them into look_inside.png, for the model that ships here; --out names another picture, --model
another model. It needs matplotlib (pip install matplotlib).

The functions are there to be lifted out. They read what `watch` sees in a layer:

    with watch(model) as layers:
        model(input_ids)
    h = states(layers[2])                                   # (b, l, d, n)
    alpha = hidden_attention(layers[2], channels=[0, 300])  # (b, 2, l, l)
    mean = mean_attention(layers[2])                        # (b, l, l)

demo.ipynb tells with them what the shipped model does.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from generate import DEFAULT_MODEL, Parser, Tokenizer, load_tokenizer
from mamba import Mamba, MambaBlock, MambaConfig, at_least_float32, discretize

## x_proj reads x and gives B and C, dt_proj gives dt: hooks on these two see all that a scan reads.


@contextlib.contextmanager
def watch(model: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """What goes into the scan of every MambaBlock of a model, in their order, at its last call.

    Of each layer x (b, l, d), dt (b, l, d) without its bias, delta (b, l, d), A (d, n), B and C
    (b, l, n); without the axis l after a `step`. They carry gradients where the call does. Raises
    ValueError where there is no MambaBlock, and for blocks of another kind, such as EventBlock:
    these five would not say what its state does.
    """
    blocks = [module for module in model.modules() if isinstance(module, MambaBlock)]
    if not blocks or any(type(block) is not MambaBlock for block in blocks):
        kinds = ", ".join(sorted({type(block).__name__ for block in blocks})) or "none"
        raise ValueError(f"watch reads models of MambaBlocks, found {kinds}")
    layers: list[dict[str, Tensor]] = [{} for _ in blocks]
    with contextlib.ExitStack() as hooks:
        for block, layer in zip(blocks, layers, strict=True):

            def see_x(_, inputs, output, block=block, layer=layer) -> None:
                n = block.config.d_state
                layer["x"], (layer["B"], layer["C"]) = inputs[0], output[..., -2 * n :].split(n, -1)

            def see_dt(_, inputs, dt, block=block, layer=layer) -> None:
                delta = F.softplus(at_least_float32(dt) + block.dt_proj.bias)
                layer["dt"], layer["delta"], layer["A"] = dt, delta, block.A

            for module, see in ((block.x_proj, see_x), (block.dt_proj, see_dt)):
                hooks.callback(module.register_forward_hook(see).remove)
        yield layers


## These fix the recurrence
##
##     h_t = Ā_t h_{t-1} + B̄_t x_t        (2a)        y_t = C_t h_t        (2b)
##
## so whatever happens inside can be computed again. All that follows does so, token after token.


def steps(
    inside: dict[str, Tensor], rule: str, reset: Tensor | None, channels: Sequence[int] | slice
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For every token Ā and B̄ (b, d, n), x (b, d, 1) and C (b, 1, n), for these d channels."""
    if "x" not in inside or inside["x"].ndim != 3:
        raise ValueError("there is no sequence here: watch a call of the model, not a step")
    x, delta, A, B, C = (at_least_float32(inside[name]) for name in ("x", "delta", "A", "B", "C"))
    if reset is not None and reset.shape != x.shape[:2]:
        raise ValueError(f"reset must be {tuple(x.shape[:2])}, got {tuple(reset.shape)}")
    x, delta, A = x[..., channels], delta[..., channels], A[channels]
    for t in range(x.shape[1]):
        A_bar, B_bar = discretize(delta[:, t], A, B[:, t], rule)
        if reset is not None:
            A_bar = A_bar.masked_fill(reset[:, t, None, None], 0)
        yield A_bar, B_bar, x[:, t].unsqueeze(-1), C[:, t].unsqueeze(-2)


## The state. A scan returns y and forgets h: at every token it would be n times larger than x. Here
## it is wanted, so use it for short texts, or for one layer at a time.


def states(
    inside: dict[str, Tensor], h0: Tensor | None = None, rule: str = "mamba",
    reset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """h after every token, (b, l, d, n). The last one is the state that the model returns.

    inside is one layer of `watch`; h0 (b, d, n) is that layer's state before the first
    token, None for zeros; rule and reset are those of the call. float32, or float64.
    """
    h, hs = 0 if h0 is None else h0, []
    for A_bar, B_bar, x, _ in steps(inside, rule, reset, slice(None)):
        h = A_bar * h + B_bar * x  # (2a)
        hs.append(h)
    return torch.stack(hs, dim=1)


## The hidden attention (Ali, Zimerman and Wolf, arXiv 2403.01590). Unroll (2a) from the zero state:
##
##     h_t = Σ_{s<=t} Ā_t ... Ā_{s+1} B̄_s x_s
##     y_t = Σ_{s<=t} alpha[t, s] x_s,    alpha[t, s] = C_t Ā_t ... Ā_{s+1} B̄_s
##
## So each channel multiplies its x by a lower triangular matrix, as causal attention does. C_t is
## the query, B_s the key. Between them stands what attention lacks: a decay, for which every token
## on the way decides with its Δ how much passes. A softmax is missing: entries may be negative, and
## rows sum to what they like. And no model computes alpha to run. It has l x l entries for each of
## d channels, where the scan carries n numbers. It is a way to look at the scan.
##
## `weights` holds what is left at t, in each state, of one unit of every x_s so far. A step
## multiplies all of them by Ā_t and adds one more, B̄_t. (In parallel, exp of a difference of two
## cumulative sums of ΔA is the same product. But the difference of two large sums has few digits,
## and "bilinear", whose Ā may be negative, has nothing to sum.)


def hidden_attention(
    inside: dict[str, Tensor], rule: str = "mamba",
    channels: Sequence[int] | slice | None = None, reset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """alpha (b, channels, l, l), row t reads column s: alpha @ x is the scan's y from h = 0.

    y is what (2b) gives, without D x and the gate. channels: which, None for all of them.
    """
    channels = slice(None) if channels is None else channels
    weights, rows = None, []
    for A_bar, B_bar, _, C in steps(inside, rule, reset, channels):
        new = B_bar.unsqueeze(-1)  # (b, d, n, 1)
        old = new[..., :0] if weights is None else A_bar.unsqueeze(-1) * weights
        weights = torch.cat([old, new], dim=-1)  # (b, d, n, t + 1)
        rows.append((C.unsqueeze(-1) * weights).sum(-2))
    return torch.stack([F.pad(row, (0, len(rows) - row.shape[-1])) for row in rows], dim=-2)


def mean_attention(
    inside: dict[str, Tensor], rule: str = "mamba", reset: Tensor | None = None, at_once: int = 16
) -> Tensor:
    """The mean of |alpha| over all channels, (b, l, l), with so many of them in memory at once."""
    total, d = 0, len(inside["A"])
    for i in range(0, d, at_once):
        total = total + hidden_attention(inside, rule, slice(i, i + at_once), reset).abs().sum(1)
    return total / d


def token_label(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as it is drawn: a space and the end of a line as signs, one of no text in hex."""
    text = tokenizer.decode([token_id])
    if "\ufffd" in text:  # a part of a character
        return f"{token_id:02x}"
    text = text.replace(" ", "␣").replace("\n", "↵")
    return (text if text.isprintable() else repr(text)[1:-1]).replace("\\x", "")


## What the picture shows, with the tokens from left to right in all its parts.
##
##   Δ        Over the channel's own (geometric) mean, channels that react alike side by side.
##            Orange: the token counts for more than others do, it is written in and the past let
##            go. Purple: for less, it is skipped. Each kind of token has its pattern.
##   state    The size of all that the layer remembers. It grows while the state fills. Where it
##            falls, more was forgotten than written.
##   alpha    Row t reads column s. The diagonal is the token itself. A dark column is a token that
##            is read for long, a dark row one that reads all it can. Where a row is light to the
##            left of some column, and all rows below it too, the past was forgotten there.
##
## Look with care. The mean of |alpha| does not know how large x is, nor what D x, the gate and the
## other layers make of y; and x_s has seen, through the convolution, the three tokens before s.


def spell(axis: Any, labels: list[str]) -> None:
    """Write the tokens along an axis of a picture, one at each integer."""
    style = {"family": "monospace", "fontsize": min(10, 330 / len(labels)), "parse_math": False}
    axis.set_ticks(range(len(labels)), labels, **style)
    axis.set_tick_params(length=0)


def draw(inside: dict[str, Tensor], rule: str, labels: list[str], title: str, out: Path) -> None:
    """Δ, the norm of the state and the mean hidden attention of one text (b = 1), into a file."""
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure  # no pyplot: nothing global, no window
    except ImportError as error:
        raise ImportError(f"to draw needs matplotlib (pip install matplotlib): {error}") from error

    log_delta = inside["delta"][0].log()  # (l, d)
    log_ratio = (log_delta - log_delta.mean(0)).T  # (d, l)
    ## Each channel is a point in the plane of the two leading principal components. In the order of
    ## their angles, channels that react alike are neighbours: 64 bands of them say most of it.
    plane = torch.linalg.svd(F.pad(log_ratio, (0, 1)), full_matrices=False).U  # l may be 1
    in_order = log_ratio[torch.atan2(plane[:, 1], plane[:, 0]).argsort()]
    ratio = F.adaptive_avg_pool1d(in_order.T, min(64, len(in_order))).T.exp()  # (64, l)
    norm = states(inside, rule=rule)[0].flatten(1).norm(dim=1)
    alpha = mean_attention(inside, rule)[0]
    high = alpha.max().item()
    # What lies in the future is absent, not small: it gets no colour.
    alpha = alpha.masked_fill(torch.ones_like(alpha).triu(1).bool(), torch.nan)

    figure = Figure(figsize=(13, 5.5), dpi=150, layout="constrained")
    figure.suptitle(title, parse_math=False)
    sizes = {"height_ratios": (2, 1), "width_ratios": (1.2, 0.025, 1, 0.025)}
    places = ["Δ", "Δ bar", "alpha", "alpha bar"], ["state", ".", "alpha", "alpha bar"]
    axes = figure.subplot_mosaic(places, **sizes)
    top, middle, right = axes["Δ"], axes["state"], axes["alpha"]
    grid = {"aspect": "auto", "interpolation": "nearest"}
    image = top.imshow(ratio.numpy(), cmap="PuOr_r", norm=LogNorm(1 / 4, 4), **grid)
    bar = figure.colorbar(image, cax=axes["Δ bar"], extend="both", label="Δ / the channel's mean")
    bar.set_ticks([1 / 4, 1 / 2, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"])
    bar.minorticks_off()
    top.set(ylabel="channels, sorted", yticks=[])
    short = len(labels) <= 80
    middle.plot(norm.numpy(), "o-" if short else "-", color="royalblue", markersize=3)
    middle.set(ylabel="state, ‖h‖", ylim=(0, None))
    middle.spines[["top", "right"]].set_visible(False)
    image = right.imshow(alpha.numpy(), cmap="magma_r", norm=LogNorm(high / 1e3, high), **grid)
    figure.colorbar(image, cax=axes["alpha bar"], extend="min", label="|alpha|, mean over channels")
    right.set(xlabel="s, the token that is read", ylabel="t, the token that reads")
    right.spines[["top", "right"]].set_visible(False)
    for axis in (top, middle, right):
        axis.set_xlim(-0.5, len(labels) - 0.5)
    for axis in (top.xaxis, middle.xaxis, right.xaxis, right.yaxis) if short else ():
        spell(axis, labels)
    figure.savefig(out)


def draw_block(axes: Any, config: MambaConfig) -> None:
    """A residual block of mamba.py, from left to right, with the widths of a model."""
    boxes = {  # center, width, color
        "norm": (0.8, 1.5, 1.0, "black"), "in_proj": (2.2, 1.5, 1.2, "black"),
        "conv1d\nsilu": (4.0, 2, 1.3, "gray"), "select": (5.8, 3, 1.2, "darkorange"),
        f"selective scan\nh: {config.d_inner} × {config.d_state}": (7.5, 2, 2.0, "royalblue"),
        "silu": (7.5, 1, 1.0, "black"), "×": (9.2, 1.5, 0.5, "seagreen"),
        "out_proj": (10.5, 1.5, 1.2, "black"), "+": (11.6, 0, 0.5, "black"),
    }  # fmt: skip
    texts = {
        f"the stream, {config.d_model} numbers a token": (0.1, 0.1, "black"),
        "z, the gate": (3.2, 1.1, "black"), f"x, {config.d_inner}": (5.0, 2.1, "gray"),
        "Δ, B, C": (6.6, 3.1, "darkorange"), "y": (8.8, 2.1, "seagreen"),
    }  # fmt: skip
    arrows = [  # the corners of a line
        ("black", (-0.6, 0), (11.35, 0)), ("black", (-0.2, 0), (-0.2, 1.5), (0.3, 1.5)),
        ("black", (1.3, 1.5), (1.6, 1.5)), ("gray", (2.8, 1.5), (3.0, 1.5), (3.0, 2), (3.35, 2)),
        ("black", (3.0, 1.5), (3.0, 1), (7.0, 1)), ("gray", (4.65, 2), (6.5, 2)),
        ("darkorange", (4.85, 2), (4.85, 3), (5.2, 3)),
        ("darkorange", (6.4, 3), (7.5, 3), (7.5, 2.36)),
        ("seagreen", (8.5, 2), (9.2, 2), (9.2, 1.75)), ("black", (8.0, 1), (9.2, 1), (9.2, 1.25)),
        ("seagreen", (9.45, 1.5), (9.9, 1.5)), ("black", (11.1, 1.5), (11.6, 1.5), (11.6, 0.25)),
        ("black", (11.85, 0), (12.4, 0)),
    ]  # fmt: skip
    for color, *corners, last in arrows:
        axes.plot(*zip(*corners, strict=True), color=color, linewidth=1)
        style = {"arrowstyle": "->", "color": color, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", last, corners[-1], arrowprops=style)
    for text, (x, y, width, color) in boxes.items():
        xs, height = (x - width / 2, x + width / 2), 0.25 if len(text) == 1 else 0.36
        axes.fill_between(xs, y - height, y + height, facecolor="white", edgecolor=color, zorder=2)
        axes.text(x, y, text, color=color, ha="center", va="center", zorder=3)
    for text, (x, y, color) in texts.items():
        axes.text(x, y, text, color=color)
    axes.axis("off")


@torch.no_grad()
def look(options: argparse.Namespace, parser: Parser) -> None:
    """What the command does: run the model, draw one of its layers."""
    model = Mamba.from_pretrained(options.model)
    tokenizer = load_tokenizer(model.config, options.model)
    ids = tokenizer.encode(options.prompt)
    if not ids:
        parser.error("the prompt is empty: there is nothing to look at")
    if not 0 <= options.layer < model.config.n_layer:
        last = model.config.n_layer - 1
        parser.error(f"--layer must be 0 ... {last} for this model, got {options.layer}")
    with watch(model) as layers:
        model(torch.tensor([ids]))
    title = f"Layer {options.layer} of {Path(options.model).name}"
    labels = [token_label(tokenizer, token_id) for token_id in ids]
    draw(layers[options.layer], model.config.rule, labels, title, options.out)


def main() -> None:
    parser = Parser(
        "look_inside.py",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("prompt", help="the text to look at")
    parser.add_argument("--layer", type=int, default=2, help="counted from 0")
    parser.add_argument("--out", type=Path, default=Path("look_inside.png"), help="the picture")
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="a folder, or on the Hub")
    options = parser.parse_args()
    try:
        look(options, parser)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        message = " ".join(str(error).split())
        raise SystemExit(f"look_inside.py: error: {message}") from error
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
