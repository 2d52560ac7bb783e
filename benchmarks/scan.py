"""The selective scan on a GPU: time and memory of triton_scan.py beside the official CUDA kernel.

    python benchmarks/scan.py                                  # all: tables, scan.json, scan.png
    python benchmarks/scan.py --quick                          # two shapes, short lengths: a look
    python benchmarks/scan.py --shapes 8x2048x2048 1x5120x2048 --parts shapes
    python benchmarks/scan.py --draw-only                      # scan.png from scan.json, no GPU
    python benchmarks/scan.py --dry-run                        # tiny sizes, no GPU: does it run

The tables are markdown. Where mamba_ssm is installed, its kernel runs beside ours, with the same
inputs, in its own layout, and y and the gradient of x must be the same; elsewhere its numbers are
those in official_h100.json, launched, of an H100. Three parts:

shapes   batch x channels x length with 16 states, D, z, dt_bias and softplus. ms: median of
         `triton.testing.do_bench`, launch included and L2 cache cold. graph: the same calls
         replayed from a CUDA graph, L2 cache warm: without what Python costs. MiB: the most that
         the call had allocated, its results included. limit: the larger of two times of the
         forward pass that no kernel can beat (see official_h100.json). error: |ours - exact| /
         |exact| over the first 256 steps of batch row 0, in float64; for the backward pass the
         worst of the gradients, when only those steps have a gradient.
steps    what each step of speed gives: constants of triton_scan.py set back, and one at a time.
lengths  one sequence of 512 to 1,048,576 steps, forward and backward; the official kernel below
         2^31 numbers, and scan_chunked of mamba.py in eager PyTorch to 4096 steps. MiB: what both
         passes add to their inputs at the most.

Needs triton and, for the picture, matplotlib. Exits with 1 if an error is larger than it may be.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mamba import selective_scan

HERE = Path(__file__).resolve().parent
OFFICIAL = importlib.util.find_spec("selective_scan_cuda") is not None  # comes with mamba_ssm

PARTS = ("shapes", "steps", "lengths")
PASSES = ("fwd", "fwd_graph", "bwd", "bwd_graph")
STATES = 16
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# |ours - exact| / |exact|: y in bfloat16 has 8 bits, the approximations of float32 about 20.
ALLOWED = {"bf16": 6e-3, "fp32": 2e-5}
MIB = 2**20

# Constants of triton_scan.py: each line is the one before with something more.
SLOW = {
    "FORWARD_T": 1, "BACKWARD_T": 1, "FORWARD_STAGES": 1, "BACKWARD_STAGES": 1, "FAST": False,
}  # fmt: skip
LADDER = [
    ("one step at a time", SLOW),
    ("tiles of 2 steps", SLOW | {"FORWARD_T": 2, "BACKWARD_T": 2}),
    ("tiles of 4", SLOW | {"FORWARD_T": 4, "BACKWARD_T": 4}),
    ("tiles of 8, backward 4", SLOW | {"FORWARD_T": 8, "BACKWARD_T": 4}),
    ("loads ahead", {"FAST": False}),
    ("cheap exponentials: as it is", {}),
]
CHANGES = [
    {"FORWARD_T": 4, "BACKWARD_T": 2},
    {"FORWARD_T": 16, "BACKWARD_T": 8},
    {"FORWARD_STAGES": 1, "BACKWARD_STAGES": 1},
    {"FORWARD_STAGES": 2, "BACKWARD_STAGES": 2},
    {"FORWARD_STAGES": 4, "BACKWARD_STAGES": 4},
    {"K": 32},
    {"K": 128},
]


## What is measured -------------------------------------------------------------------------------


def make_inputs(
    batch: int, d_inner: int, seqlen: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor | None], Tensor]:
    """The tensors of a scan by name, as a freshly initialised block would make them, and dy."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    wide, narrow = (batch, seqlen, d_inner), (batch, seqlen, STATES)
    delta = torch.logspace(-3, -1, d_inner, device=device)  # from 0.001 to 0.1, as at the start
    tensors = {
        "x": normal(*wide),
        "dt": normal(*wide).mul_(0.5),
        "A": -torch.arange(1.0, STATES + 1, device=device).repeat(d_inner, 1),
        "B": normal(*narrow),
        "C": normal(*narrow),
        "D": torch.ones(d_inner, device=device),
        "z": normal(*wide),
        "h0": None,
        "dt_bias": delta + torch.log(-torch.expm1(-delta)),
        "reset": None,
    }
    return tensors, normal(*wide)


# Forward returns y first; backward takes all that it returns, and gives the gradient of x first.
Passes = tuple[Callable[[], tuple], Callable[..., Any]]


def our_passes(tensors: dict[str, Tensor | None], dy: Tensor) -> Passes:
    import triton_scan

    def forward() -> tuple[Tensor, ...]:
        return triton_scan.scan_forward(*tensors.values(), True, "mamba", save=True)

    def backward(y: Tensor, h_last: Tensor, *kept: Tensor) -> list[Tensor]:
        return triton_scan.scan_backward(dy, None, *tensors.values(), *kept, True, "mamba")

    return forward, backward


def official_passes(tensors: dict[str, Tensor | None], dy: Tensor) -> Passes:
    """The same by the official kernel, to which sequences are (batch, channels, length)."""
    import selective_scan_cuda

    x, dt, B, C, z = (tensors[name].mT.contiguous() for name in ("x", "dt", "B", "C", "z"))
    inputs = x, dt, tensors["A"], B.unsqueeze(1), C.unsqueeze(1), tensors["D"], z
    inputs += (tensors["dt_bias"],)
    dy = dy.mT.contiguous()

    def forward() -> tuple[Tensor, ...]:
        without_gate, states, y = selective_scan_cuda.fwd(*inputs, True)
        return y.mT, states, without_gate

    def backward(y: Tensor, *kept: Tensor) -> list[Tensor]:
        dx, *others = selective_scan_cuda.bwd(*inputs, dy, *kept, None, True, False)
        return [dx.mT, *others]

    return forward, backward


@contextmanager
def constants(**values: int | bool) -> Iterator[None]:
    """triton_scan with other module constants."""
    import triton_scan

    before = {name: getattr(triton_scan, name) for name in values}
    try:
        for name, value in values.items():
            setattr(triton_scan, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(triton_scan, name, value)


def milliseconds(run: Callable[[], Any], options: argparse.Namespace) -> float:
    """The median time of a call, launched anew each time."""
    if options.dry_run:
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    import triton.testing

    return triton.testing.do_bench(run, warmup=25, rep=options.rep, return_mode="median")


def graph_milliseconds(run: Callable[[], Any], options: argparse.Namespace) -> float:
    """The median time of a call, replayed from a CUDA graph."""
    if options.dry_run:
        return milliseconds(run, options)
    import triton.testing

    torch.cuda.synchronize()
    return triton.testing.do_bench_cudagraph(run, rep=20, return_mode="median")


def added_memory(run: Callable[[], Any], options: argparse.Namespace) -> float:
    """MiB: the most that was allocated during a call beyond what was before. Its second call."""
    if options.dry_run:
        return 1.0
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return (peak - before) / MIB


def relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def errors(tensors: dict[str, Tensor | None], dy: Tensor) -> tuple[float, float]:
    """Relative errors of y and of the worst gradient, on the first 256 steps of batch row 0.

    What follows cannot change these steps of y. It would change their gradients: so dy is zero
    there and in the other rows, and A, D and dt_bias then get their gradients from here alone.
    """
    steps = min(256, dy.shape[1])
    along_time = ("x", "dt", "B", "C", "z")
    names = [name for name, tensor in tensors.items() if tensor is not None]
    cut = {
        name: (tensors[name][:1, :steps] if name in along_time else tensors[name])
        .double()
        .requires_grad_()
        for name in names
    }
    with torch.enable_grad():
        y_exact, _ = selective_scan(**cut, scan="sequential")
    dy_here = torch.zeros_like(dy)
    dy_here[:1, :steps] = dy[:1, :steps]
    exact = torch.autograd.grad(y_exact, list(cut.values()), dy_here[:1, :steps].double())

    forward, backward = our_passes(tensors, dy_here)
    y = (results := forward())[0]
    found = dict(zip([*tensors][:9], backward(*results), strict=True))
    worst = 0.0
    for name, gradient in zip(names, exact, strict=True):
        ours = found[name][:1, :steps] if name in along_time else found[name]
        error = relative(ours, gradient)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return relative(y[:1, :steps], y_exact.detach()), worst


def free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


## The three parts --------------------------------------------------------------------------------


def measure_shape(official: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    from torch.nn.functional import softplus

    from triton_scan import first_scan

    sizes, dtype = (official["B"], official["D"], official["L"]), DTYPES[official["dtype"]]
    tensors, dy = make_inputs(*sizes, dtype, options.device)
    row: dict[str, Any] = {name: official[name] for name in ("B", "D", "L", "dtype")}
    row["fwd_error"], row["bwd_error"] = errors(tensors, dy)
    row |= measure_passes(our_passes(tensors, dy), options)
    free()
    if options.official:
        difference = difference_of(official_passes, our_passes, tensors, dy)
        free()
        row["official"] = measure_passes(official_passes(tensors, dy), options)
        row["official"]["difference"] = difference
    else:
        names = ("fwd_ms", "bwd_ms", "fwd_MiB", "bwd_MiB")
        row["official"] = {name: official[name] for name in names}
    free()
    x, B, C = (tensors[name].float() for name in "xBC")
    delta = softplus(tensors["dt"].float() + tensors["dt_bias"])
    first = lambda: first_scan(x, delta, tensors["A"], B, C)  # noqa: E731
    row["first_kernel_fwd_ms"] = milliseconds(first, options)
    row["fwd_limit_ms"] = max(official["limit_memory_ms"], official["limit_exp_ms"])
    return row


def difference_of(theirs: Callable, ours: Callable, tensors: dict, dy: Tensor) -> float:
    """The larger of the relative differences of y and of the gradient of x."""
    found = []
    for passes in (theirs, ours):
        forward, backward = passes(tensors, dy)
        results = forward()
        found.append((results[0], backward(*results)[0]))
    return max(relative(a, b.double()) for a, b in zip(*found, strict=True))


def measure_passes(passes: Passes, options: argparse.Namespace) -> dict[str, float]:
    row, (forward, backward) = {}, passes
    for name, run in (("fwd", forward), ("bwd", partial(backward, *forward()))):
        row[name + "_ms"] = milliseconds(run, options)
        row[name + "_graph_ms"] = graph_milliseconds(run, options)
        row[name + "_MiB"] = added_memory(run, options)
    return row


def measure_steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The ladder, then single changes, at batch 8, 2048 channels, 2048 steps, bfloat16."""
    from torch.nn.functional import softplus

    from triton_scan import first_scan

    sizes = (1, 16, 4) if options.dry_run else (8, 2048, 2048)
    tensors, dy = make_inputs(*sizes, torch.bfloat16, options.device)
    x, B, C = (tensors[name].float() for name in "xBC")
    delta = softplus(tensors["dt"].float() + tensors["dt_bias"])
    ms = milliseconds(lambda: first_scan(x, delta, tensors["A"], B, C), options)
    rows = [{"step": "the first kernel", "constants": {}, "fwd_ms": ms, "bwd_ms": None}]
    single = [(", ".join(f"{k} = {v}" for k, v in change.items()), change) for change in CHANGES]
    ladder = LADDER + single
    for name, change in ladder[:1] + ladder[-1:] if options.dry_run else ladder:
        row: dict[str, Any] = {"step": name, "constants": change, "fwd_ms": None, "bwd_ms": None}
        with constants(**change):
            try:
                forward, backward = our_passes(tensors, dy)
                row["fwd_ms"] = milliseconds(forward, options)
                row["bwd_ms"] = milliseconds(partial(backward, *forward()), options)
            except Exception as error:  # a tile that does not fit says so, and the rest goes on
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        rows.append(row)
        print(f"{name}: {number(row['fwd_ms'])}, {number(row['bwd_ms'])} ms", file=sys.stderr)
    return rows


def measure_lengths(options: argparse.Namespace) -> list[dict[str, Any]]:
    lengths = [2**i for i in range(9, 21)]
    if options.quick:
        lengths = lengths[:8]
    rows = []
    for seqlen in [2, 8] if options.dry_run else lengths:
        free()
        rows.append(measure_length(seqlen, options))
        print(f"{seqlen} steps: {number(rows[-1]['ns_per_token'])} ns a token", file=sys.stderr)
    return rows


def measure_length(seqlen: int, options: argparse.Namespace) -> dict[str, Any]:
    """One sequence, 2048 channels, bfloat16: forward and backward."""
    d_inner = 16 if options.dry_run else 2048
    tensors, dy = make_inputs(1, d_inner, seqlen, torch.bfloat16, options.device)
    inputs = [tensor for tensor in (*tensors.values(), dy) if tensor is not None]
    inputs_MiB = sum(tensor.numel() * tensor.element_size() for tensor in inputs) / MIB
    row: dict[str, Any] = {"L": seqlen} | measure_both(our_passes(tensors, dy), options)
    row["peak_MiB"] = row["added_MiB"] + inputs_MiB
    row["ns_per_token"] = 1e6 * (row["fwd_ms"] + row["bwd_ms"]) / seqlen
    if options.official and dy.numel() < 2**31:
        free()
        row["official"] = measure_both(official_passes(tensors, dy), options)
    return row | measure_pytorch(tensors, dy, options) if seqlen <= 4096 else row


def measure_both(passes: Passes, options: argparse.Namespace) -> dict[str, float]:
    forward, backward = passes

    def both() -> tuple:
        results = forward()
        return results, backward(*results)

    row = {"added_MiB": added_memory(both, options)}
    row["fwd_ms"] = milliseconds(forward, options)
    row["bwd_ms"] = milliseconds(partial(backward, *forward()), options)
    return row


def measure_pytorch(
    tensors: dict[str, Tensor | None], dy: Tensor, options: argparse.Namespace
) -> dict[str, float]:
    """scan_chunked, eager, forward and backward; nothing where memory does not suffice."""
    leaves = {
        name: tensor.detach().requires_grad_()
        for name, tensor in tensors.items()
        if tensor is not None
    }

    def both() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            y, _ = selective_scan(**leaves, scan="chunked")
        return torch.autograd.grad(y, list(leaves.values()), dy)

    try:
        memory = added_memory(both, options)
        return {"pytorch_ms": milliseconds(both, options), "pytorch_added_MiB": memory}
    except torch.cuda.OutOfMemoryError:
        return {}


## What is said about it --------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Three digits, and not fewer than the integer has."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return str(value)
    if abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def shape_name(row: dict[str, Any]) -> str:
    return f"{row['B']} x {row['D']} x {row['L']:,}, {row['dtype']}"


def geometric_means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of official / ours, and of ours / limit."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        theirs = row["official"]
        values = {f"official_over_ours_{name}": times_as_fast(row, name) for name in PASSES}
        both = row["fwd_ms"] + row["bwd_ms"]
        values |= {
            "official_over_ours_both": (theirs["fwd_ms"] + theirs["bwd_ms"]) / both,
            "ours_over_limit_fwd": row["fwd_ms"] / row["fwd_limit_ms"],
            "first_kernel_over_ours_fwd": row["first_kernel_fwd_ms"] / row["fwd_ms"],
        }
        for name, value in values.items():
            ratios.setdefault(name, []).append(value)
    return {name: statistics.geometric_mean(values) for name, values in ratios.items()}


def times_as_fast(row: dict[str, Any], name: str) -> float:
    """official / ours; a recorded official kernel was launched, and stands beside our graph so."""
    theirs = row["official"]
    return theirs.get(name + "_ms", theirs[name[:3] + "_ms"]) / row[name + "_ms"]


def times_table(rows: list[dict[str, Any]], means: dict[str, float]) -> str:
    titles = ["batch x d x length"]
    for title in ("forward", "forward, graph", "backward", "backward, graph"):
        titles += [title + ": official ms", "ours", "ratio"]
    titles += ["limit, forward", "ours / limit", "first kernel"]
    lines = []
    for row in rows:
        values = []
        for name in PASSES:
            times = row["official"].get(name + "_ms"), row[name + "_ms"]
            values += [*times, times_as_fast(row, name)]
        limit = row["fwd_limit_ms"]
        values += [limit, row["fwd_ms"] / limit, row["first_kernel_fwd_ms"]]
        lines.append([shape_name(row), *map(number, values)])
    last = ["geometric mean"]
    for name in PASSES:
        last += ["", "", number(means["official_over_ours_" + name])]
    lines.append([*last, "", number(means["ours_over_limit_fwd"]), ""])
    return table(titles, lines)


def memory_table(rows: list[dict[str, Any]]) -> str:
    titles = ["batch x d x length", "forward MiB", "official", "backward MiB", "official"]
    titles += ["forward error", "backward error"]
    lines = []
    for row in rows:
        theirs = row["official"]
        values = [row["fwd_MiB"], theirs["fwd_MiB"], row["bwd_MiB"], theirs["bwd_MiB"]]
        found = [f"{row[name]:.1e}" for name in ("fwd_error", "bwd_error")]
        lines.append([shape_name(row), *map(number, values), *found])
    return table(titles, lines)


def steps_table(rows: list[dict[str, Any]]) -> str:
    lines = [[row["step"], number(row["fwd_ms"]), number(row["bwd_ms"])] for row in rows]
    return table(["8 x 2048 x 2,048, bf16", "forward ms", "backward ms"], lines)


def lengths_table(rows: list[dict[str, Any]]) -> str:
    titles = ["1 x 2048 x length, bf16", "forward ms", "backward ms", "ns a token", "added MiB"]
    titles += ["MiB with inputs", "official forward", "backward", "MiB", "PyTorch ms", "MiB"]
    names = ("fwd_ms", "bwd_ms", "ns_per_token", "added_MiB", "peak_MiB")
    lines = []
    for row in rows:
        values = [*map(row.get, names)]
        values += map(row.get("official", {}).get, ("fwd_ms", "bwd_ms", "added_MiB"))
        values += map(row.get, ("pytorch_ms", "pytorch_added_MiB"))
        lines.append([f"{row['L']:,}", *map(number, values)])
    return table(titles, lines)


def report(measured: dict[str, Any]) -> str:
    tables = []
    if measured.get("shapes"):
        tables.append(times_table(measured["shapes"], measured["geometric_means"]))
        tables.append(memory_table(measured["shapes"]))
    if measured.get("steps"):
        tables.append(steps_table(measured["steps"]))
    if measured.get("lengths"):
        tables.append(lengths_table(measured["lengths"]))
    head = f"{measured['device']}, torch {measured['torch']}, triton {measured['triton']}\n"
    return "\n".join([head, *tables])


def draw(measured: dict[str, Any], official: dict[str, Any], picture: Path) -> None:
    """Time and memory of forward and backward against the length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    lengths = measured["lengths"]
    ## Of each system the length, milliseconds and MiB of both passes.
    ours = [(row["L"], row["fwd_ms"] + row["bwd_ms"], row["added_MiB"]) for row in lengths]
    theirs = [
        (row["L"], both["fwd_ms"] + both["bwd_ms"], both["added_MiB"])
        for row in lengths if (both := row.get("official"))
    ]  # fmt: skip
    eager = [
        (row["L"], row["pytorch_ms"], row["pytorch_added_MiB"])
        for row in lengths if "pytorch_ms" in row
    ]  # fmt: skip
    title, line = "official CUDA kernel", "s-"
    if not theirs:
        title, line = "official CUDA kernel (recorded)", "s"
        theirs = [
            (row["L"], row["fwd_ms"] + row["bwd_ms"], row["fwd_MiB"] + row["bwd_MiB"])
            for row in official["scan"]
            if (row["B"], row["D"], row["dtype"]) == (1, 2048, "bf16")
        ]
    systems = [
        ("triton_scan.py", ours, "o-", {"color": "C0", "markersize": 4}),
        (title, theirs, line, {"color": "C3", "markersize": 5, "markerfacecolor": "none"}),
        ("PyTorch, chunked", eager, "^--", {"color": "0.5", "markersize": 5}),
    ]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    panels = ("time", "milliseconds", 1), ("memory beyond the inputs", "GiB", 1024)
    for i, (axis, (title, unit, divisor)) in enumerate(zip(axes, panels, strict=True), start=1):
        for label, points, line, style in systems:
            x, y = [point[0] for point in points], [point[i] / divisor for point in points]
            axis.plot(x, y, line, label=label, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks([2**i for i in range(10, 21, 2)], "1K 4K 16K 64K 256K 1M".split())
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("steps of one sequence")
        axis.set_ylabel(unit)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    what = "forward and backward, launched, batch 1, 2048 channels, 16 states, bfloat16"
    figure.suptitle(f"The selective scan on one {measured['device']}\n{what}", fontsize=11)
    figure.savefig(picture, dpi=200)
    plt.close(figure)


def rounded(value: Any) -> Any:
    """Floats with four digits, in dictionaries and lists too: the rest is noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


## The command ------------------------------------------------------------------------------------


def wanted_shapes(official: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = official["scan"]
    names = ["{B}x{D}x{L}".format(**row) for row in rows]
    if unknown := set(options.shapes or []) - set(names):
        raise SystemExit(f"--shapes {' '.join(sorted(unknown))}: take from {' '.join(names)}")
    if options.shapes:
        return [row for row, name in zip(rows, names, strict=True) if name in options.shapes]
    if options.dry_run:
        return [row | {"B": 1, "D": 20, "L": 6 + i} for i, row in enumerate(rows[1:3])]
    return [rows[0], rows[3]] if options.quick else rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", metavar="BxDxL", help="of official_h100.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all")
    parser.add_argument("--json", type=Path, help="default: scan.json beside this file")
    parser.add_argument("--picture", type=Path, help="default: scan.png beside this file")
    parser.add_argument("--rep", type=int, default=100, help="milliseconds of timed runs")
    parser.add_argument("--quick", action="store_true", help="a look; files only where named")
    parser.add_argument("--draw-only", action="store_true", help="tables and picture from --json")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU; as --quick else")
    options = parser.parse_args()
    partial = options.quick or options.dry_run or options.shapes or options.parts
    if not partial or options.draw_only:
        options.json = options.json or HERE / "scan.json"
        options.picture = options.picture or HERE / "scan.png"
    options.parts = options.parts or (["shapes", "lengths"] if options.quick else list(PARTS))
    options.device = torch.device("cpu" if options.dry_run else "cuda")
    options.official = OFFICIAL and not options.dry_run
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: hence not at the top
    return options


@torch.no_grad()
def measure(official: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    import triton

    device = "CPU" if options.dry_run else torch.cuda.get_device_name()
    measured: dict[str, Any] = {
        "device": device, "torch": torch.__version__, "triton": triton.__version__
    }  # fmt: skip
    if device != official["device"]:
        what = "limits are" if options.official else "limits and the official numbers are"
        print(f"{what} of {official['device']}, not {device}", file=sys.stderr)
    if "shapes" in options.parts:
        rows = []
        for official_row in wanted_shapes(official, options):
            free()
            row = measure_shape(official_row, options)
            rows.append(row)
            times = f"{number(row['fwd_ms'])}, {number(row['bwd_ms'])} ms"
            print(f"{shape_name(row)}: {times}", file=sys.stderr)
        measured |= {"shapes": rows, "geometric_means": geometric_means(rows)}
    if "steps" in options.parts:
        free()
        measured["steps"] = measure_steps(options)
    if "lengths" in options.parts:
        measured["lengths"] = measure_lengths(options)
    return rounded(measured)


def main() -> None:
    options = parse()
    official = json.loads((HERE / "official_h100.json").read_text())
    if options.draw_only:
        measured = json.loads(options.json.read_text())
    else:
        if not options.dry_run and not torch.cuda.is_available():
            raise SystemExit("scan.py needs a GPU; without one there are --draw-only and --dry-run")
        measured = measure(official, options)
        if options.json:
            options.json.write_text(json.dumps(measured, indent=1) + "\n")
    print(report(measured))
    if options.picture and measured.get("lengths"):
        draw(measured, official, options.picture)
    for row in measured.get("shapes", []):
        found, allowed = max(row["fwd_error"], row["bwd_error"]), ALLOWED[row["dtype"]]
        if not found <= allowed:
            raise SystemExit(f"{shape_name(row)}: wrong by {found:.1e}")
        if not (found := row["official"].get("difference", 0)) <= 2 * allowed:
            raise SystemExit(
                f"{shape_name(row)}: y or dx are not the official ones, by {found:.1e}"
            )


if __name__ == "__main__":
    main()
