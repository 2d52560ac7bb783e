"""Training, prefill and decoding on a GPU, beside what the official implementation took.

    python benchmarks/model.py                                   # all; writes model.json
    python benchmarks/model.py --models 130m --what train        # a part; writes nothing
    python benchmarks/model.py --models 130m --what train --profile
    python benchmarks/model.py --what train --json benchmarks/model.json     # that part anew
    python benchmarks/model.py --dry-run                         # tiny sizes, no GPU: does it run

Random weights, vocabulary 50280. The tables are markdown. Where mamba_ssm can be imported, the
official model runs in the same process, with the same help and the same loss; elsewhere its numbers
are those in official_h100.json, of an H100.

train    130m (768 x 24), batch 8, and 370m (1024 x 48), batch 4, 2048 tokens a row: forward,
         cross-entropy and backward, no optimizer, bfloat16 autocast over float32 parameters. Each
         eager, with its layers compiled (`layer.compile()`), and replayed from a CUDA graph, which
         is the time of the GPU without Python's; and with two losses: plain, on all logits in
         float32, and chunked (`chunked_cross_entropy` of examples/chunked_loss.py).
prefill  130m and 2.8b (2560 x 64), one prompt of 2048 tokens, bfloat16 parameters: the logits of
         its last position. Eager, and replayed from a CUDA graph.

decode   130m at batch 1, 4, 64 and 256, 2.8b at 1, 4 and 64, bfloat16 parameters: `stream` of
         generate.py after a prompt of 100 tokens, the most probable token, and sampled, as the
         command line does by default; and once after 100,000 tokens more. ms a token: five times
         the mean of 256 tokens, the median. first: seconds for the first eight, compiling and
         recording included. limit: the bytes of the weights over 3.02 TB/s. The official model's
         `generate` replays a CUDA graph as well (cg=True), and takes the most probable token.

long     a small model (256 x 10, bytes) and one sequence of up to 2^20 of them: a training step
         (bfloat16 autocast over float32 parameters, chunked loss), and the loss alone. Eager.

ms: the median of --runs runs between CUDA events; the official model and ours take turns. peak: the
most that was allocated, parameters and gradients included. --profile adds the ten kernels that take
the longest in one run of each case.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from chunked_loss import chunked_cross_entropy

from generate import stream
from mamba import Mamba, MambaConfig

OFFICIAL = importlib.util.find_spec("mamba_ssm") is not None

HERE = Path(__file__).resolve().parent
SIZES = {"130m": (768, 24), "370m": (1024, 48), "2.8b": (2560, 64)}  # d_model, n_layer
TRAIN = {"130m": 8, "370m": 4}  # batch
PREFILL = ("130m", "2.8b")
DECODE = {"130m": (1, 4, 8, 64, 256), "2.8b": (1, 4, 64)}  # batches
SAMPLING = {  # how tokens are chosen; "sampled" are the defaults of the command line
    "greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.8, "top_p": 0.95},
}  # fmt: skip
SEQLEN, VOCABULARY = 2048, 50280
LONG = (2**14, 2**16, 2**18, 2**20)  # bytes of one sequence, for the model that ships: 256 x 10


def make_model(name: str, options: argparse.Namespace) -> Mamba:
    """A model with random weights, float32, on the device."""
    d_model, n_layer = (32, 2) if options.dry_run else SIZES[name]
    torch.manual_seed(0)
    with torch.device(options.device):
        return Mamba(MambaConfig(d_model, n_layer, options.vocabulary))


def make_official(name: str, options: argparse.Namespace) -> torch.nn.Module:
    """The official model of the same size; called, it gives logits."""
    from mamba_ssm.models.config_mamba import MambaConfig as OfficialConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    torch.manual_seed(0)
    sizes = dict(zip(("d_model", "n_layer"), SIZES[name], strict=True))
    fused = {"rms_norm": True, "fused_add_norm": True, "residual_in_fp32": True}
    config = OfficialConfig(**sizes, vocab_size=options.vocabulary, **fused)
    model = MambaLMHeadModel(config, device=options.device, dtype=torch.float32)
    call = model.forward
    model.forward = lambda ids, **keywords: call(ids, **keywords).logits
    model.logits_and_all = call  # for its own `generate`
    return model


def recorded(kind: str) -> list[dict[str, Any]]:
    """Rows of the official model, with the help they got: eager, or graph, the whole replayed from
    a CUDA graph."""
    rows = json.loads((HERE / "official_h100.json").read_text())[kind]
    return [row | {"model": row["model"].split()[0], "recorded": True} for row in rows]


def official(rows: list[dict[str, Any]], kind: str, name: str) -> dict[str, dict[str, Any]]:
    """Those of this run, or the recorded ones, by the help they got."""
    measured = [row for row in rows if row["system"] == "official"]
    return {row["how"]: row for row in measured or recorded(kind) if row["model"] == name}


@dataclass
class Case:
    """A computation that can be timed: row, what is known of it; after, what follows each run and
    is not timed; alive, what a graph reads and does not keep in memory."""

    row: dict[str, Any]
    run: Callable[[], Any]
    after: Callable[[], None] = lambda: None
    alive: Any = None


def time_together(cases: list[Case], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Their rows with ms, the median of options.runs runs. They take turns, since the speed of a
    machine changes; eager, more than anything else that of its processor."""
    times: list[list[float]] = [[] for _ in cases]
    for i in range(options.runs + 3):
        for case, found in zip(cases, times, strict=True):
            if options.device.type == "cuda":
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                start.record()
                case.run()
                stop.record()
                torch.cuda.synchronize()
                elapsed = start.elapsed_time(stop)
            else:
                begun = time.perf_counter()
                case.run()
                elapsed = 1000 * (time.perf_counter() - begun)
            case.after()
            if i >= 3:  # the first are slower: memory is asked for, kernels are compiled
                found.append(elapsed)
    for case, found in zip(cases, times, strict=True):
        case.row["ms"] = statistics.median(found)
        if "seqlen" in case.row and "loss" in case.row:
            tokens = case.row["batch"] * case.row["seqlen"]
            case.row["tokens_per_s"] = round(1000 * tokens / case.row["ms"])
        if options.profile:
            case.row["kernels"] = longest_kernels(case.run, options)
    return [case.row for case in cases]


def reset_peak(options: argparse.Namespace) -> None:
    gc.collect()  # a compiled layer refers to itself, and would keep its model in memory
    if options.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def allocated(options: argparse.Namespace) -> int:
    """Bytes, by others that are there already."""
    return torch.cuda.memory_allocated() if options.device.type == "cuda" else 0


def peak_GiB(options: argparse.Namespace, before: int = 0) -> float:
    if options.device.type != "cuda":
        return 0.0
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def longest_kernels(run: Callable[[], Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The ten kernels with the most device time in one run: name, ms, share of all, launches."""
    from torch.profiler import ProfilerActivity, profile

    cuda = options.device.type == "cuda"
    activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()
    rows = [
        {
            "kernel": event.key,
            "ms": (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000,
            "launches": event.count,
        }
        for event in profiler.key_averages()
        # With a GPU: what ran on it, not the calls that launched it, nor the names of regions.
        if not cuda
        or (
            event.device_type == torch.autograd.DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
        )
    ]
    total = sum(row["ms"] for row in rows)
    rows = [row | {"share": row["ms"] / total} for row in rows if row["ms"] > 0]
    return sorted(rows, key=lambda row: -row["ms"])[:10]


def prepare_training(
    name: str, how: str, loss: str, options: argparse.Namespace, make: Callable = make_model
) -> Case:
    before = allocated(options)
    model = make(name, options)
    batch = TRAIN[name]
    generator = torch.Generator(options.device).manual_seed(0)
    ids = torch.randint(
        options.vocabulary, (batch, options.seqlen + 1), generator=generator, device=options.device
    )
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].flatten()
    if how == "compiled":
        for layer in model.backbone.layers:
            layer.compile()

    def plain() -> Tensor:
        logits = model(inputs)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets)

    def chunked() -> Tensor:
        def loss(hidden: Tensor) -> Tensor:
            return chunked_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets)

        return model(inputs, head=loss)

    loss_of = {"plain": plain, "chunked": chunked}[loss]
    value = torch.zeros(())

    def step() -> None:
        nonlocal value
        # A graph must cast the weights anew each time: no cache may outlive its capture.
        with torch.autocast(options.device.type, torch.bfloat16, cache_enabled=how != "graph"):
            found = loss_of()
        found.backward()
        value = found.detach()

    clear = model.zero_grad  # to None, so that every run writes its gradients anew
    step()
    clear()
    reset_peak(options)
    step()
    clear()
    row: dict[str, Any] = {
        "model": name, "how": how, "loss": loss, "batch": batch, "seqlen": options.seqlen,
        "peak_GiB": peak_GiB(options, before), "value": value.item(),  # the same in all cases
    }  # fmt: skip
    if how != "graph" or options.device.type != "cuda":
        return Case(row, step, clear)
    captured = capture(lambda: (clear(), step()))  # no old gradients, to which it would add
    captured.replay()
    if abs(value.item() - row["value"]) > 1e-3:
        raise RuntimeError(f"{name}: the replayed graph gives another loss")
    return Case(row, captured.replay, alive=(model, inputs, targets))


def capture(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what run does, after three runs on the side."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what initialises itself on its first call does it now
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured


@torch.inference_mode()
def prepare_prefill(
    name: str, how: str, options: argparse.Namespace, make: Callable = make_model
) -> Case:
    before = allocated(options)
    model = make(name, options).to(torch.bfloat16)
    ids = torch.randint(options.vocabulary, (1, options.seqlen), device=options.device)

    def prefill() -> Tensor:
        if make is make_official:
            return model(ids, num_last_tokens=1)
        return model(ids, head=lambda hidden: model.lm_head(hidden[:, -1]))

    reset_peak(options)
    logits = expected = prefill()
    row: dict[str, Any] = {
        "model": name, "how": how, "batch": 1, "seqlen": options.seqlen,
        "peak_GiB": peak_GiB(options, before),
    }  # fmt: skip
    if how != "graph" or options.device.type != "cuda":
        return Case(row, torch.inference_mode()(prefill))

    def keep() -> None:
        nonlocal logits
        logits = prefill()

    captured = capture(keep)
    captured.replay()
    torch.cuda.synchronize()
    if not torch.allclose(logits, expected, rtol=1e-2, atol=1e-2):
        raise RuntimeError(f"{name}: the replayed graph gives other logits than the eager run")
    return Case(row, captured.replay, alive=(model, ids))


def prepare_long(seqlen: int, how: str, options: argparse.Namespace) -> Case:
    """One sequence. how: "train", forward and backward, or "evaluate", the loss alone."""
    torch.manual_seed(0)
    with torch.device(options.device):
        model = Mamba(MambaConfig(*((32, 2) if options.dry_run else (256, 10)), vocab_size=256))
        ids = torch.randint(256, (1, seqlen + 1))
    targets = ids[0, 1:]

    def loss(hidden: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden[0], model.lm_head.weight, targets)

    def run() -> None:
        with torch.autocast(options.device.type, torch.bfloat16), torch.set_grad_enabled(train):
            value = model(ids[:, :-1], head=loss)
        if train:
            value.backward()

    train = how == "train"
    run()
    model.zero_grad()
    reset_peak(options)
    run()
    model.zero_grad()
    row = {"model": "256 x 10", "how": how, "seqlen": seqlen, "peak_GiB": peak_GiB(options)}
    return Case(row, run, model.zero_grad)


def measure_official_decoding(
    name: str, batch: int, how: str, skipped: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Its `generate` for 264 tokens less that for 8, by 256: the median of three."""
    model = make_official(name, options).to(torch.bfloat16)
    model.forward = model.logits_and_all
    prompt = torch.randint(options.vocabulary, (batch, 100), device=options.device)

    def clock(tokens: int) -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        model.generate(input_ids=prompt, max_length=100 + tokens, cg=True, top_k=1)
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    first = clock(264)
    ms = statistics.median(1000 * (clock(264) - clock(8)) / 256 for _ in range(3))
    row = {"model": name, "batch": batch, "how": how, "after": 100 + skipped}
    return row | {"ms": ms, "first_s": first}


def measure_decoding(
    name: str, batch: int, how: str, skipped: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Time of a token after a prompt and `skipped` more tokens."""
    sampling = SAMPLING[how]
    model = make_model(name, options).to(torch.bfloat16)
    prompt = torch.randint(options.vocabulary, (batch, 100), device=options.device)
    few, many = (2, 4) if options.dry_run else (8, 256)

    def wait() -> float:
        if options.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    begun = wait()
    for _ in stream(model, prompt, max_new_tokens=few, **sampling):
        pass
    first = wait() - begun
    reset_peak(options)
    times = []
    tokens = stream(model, prompt, max_new_tokens=sys.maxsize, **sampling)
    for _ in range(few + skipped):
        next(tokens)
    for _ in range(5):
        begun = wait()
        for _ in range(many):
            next(tokens)
        times.append(1000 * (wait() - begun) / many)
    weights = sum(p.nbytes for p in model.parameters())
    return {
        "model": name, "batch": batch, "how": how, "after": 100 + skipped,
        "ms": statistics.median(times), "first_s": first,
        "limit_ms": max(weights / 3.02e9, 0.001), "peak_GiB": peak_GiB(options),
    }  # fmt: skip


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def training_table(rows: list[dict[str, Any]]) -> str:
    titles = ["forward and backward", "tokens/s", "peak GiB", "ours / official", "loss value"]
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        theirs = official(rows, "train_fwd_bwd", name)
        for how, row in theirs.items():
            whose = "official, recorded" if "recorded" in row else "official"
            numbers = [f"{row['tokens_per_s']:,}", f"{row['peak_GiB']:.1f}", "", ""]
            lines.append([f"{name}, {whose}, {how}, plain loss", *numbers])
        for row in rows:
            if row["model"] != name or row["system"] == "official":
                continue
            numbers = [f"{row['tokens_per_s']:,}", f"{row['peak_GiB']:.1f}", ""]
            if row["how"] in theirs and row["loss"] == "plain":
                their_rate = theirs[row["how"]]["tokens_per_s"]
                numbers[2] = f"{row['tokens_per_s'] / their_rate:.2f}"
            lines.append(
                [f"{name}, {row['how']}, {row['loss']} loss", *numbers, f"{row['value']:.4f}"]
            )
    return table(titles, lines)


def prefill_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["system"] == "ours":
            theirs = official(rows, "prefill_ms", row["model"])[row["how"]]
            whose = " (official recorded)" if "recorded" in theirs else ""
            times = [theirs["ms"], row["ms"], theirs["ms"] / row["ms"]]
            times = [f"{time:.2f}" for time in times]
            lines.append([f"{row['model']}, {row['how']}{whose}", *times, f"{row['peak_GiB']:.1f}"])
    return table(["prefill", "official, ms", "ours", "official / ours", "peak GiB"], lines)


def decoding_table(rows: list[dict[str, Any]]) -> str:
    measured = [row for row in rows if row["system"] == "official"]
    kept = [row for row in recorded("decode_ms_per_token") if row["cuda_graph"]]
    official = {(row["model"], row["batch"]): row["ms"] for row in measured or kept}
    lines = []
    for row in rows:
        if row["system"] == "official":
            continue
        theirs = official.get((row["model"], row["batch"])) if row["how"] == "greedy" else None
        lines.append(
            [f"{row['model']}, batch {row['batch']}, {row['how']}, after {row['after']:,} tokens",
             f"{row['ms']:.3f}", f"{theirs:.3f}" if theirs else "",
             f"{theirs / row['ms']:.2f}" if theirs else "", f"{row['limit_ms']:.3f}",
             f"{row['ms'] / row['limit_ms']:.2f}", f"{row['first_s']:.1f}"]
        )  # fmt: skip
    whose = "official" if measured else "official, recorded"
    titles = ["decode", "ms a token", whose, "official / ours", "limit", "of it", "first s"]
    return table(titles, lines)


def long_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [f"{row['seqlen']:,}, {row['how']}", f"{row['ms']:.1f}",
         f"{1e6 * row['ms'] / row['seqlen']:.0f}", f"{row['peak_GiB']:.2f}"]
        for row in rows
    ]  # fmt: skip
    return table(["256 x 10, bytes of one sequence", "ms", "ns a byte", "peak GiB"], lines)


def kernels_table(row: dict[str, Any]) -> str:
    how = (row["how"], row["loss"]) if "loss" in row else (row["how"],)
    lines = [
        [kernel["kernel"][:70].replace("|", "/"), f"{kernel['ms']:.2f}",
         f"{100 * kernel['share']:.0f} %", str(kernel["launches"])]
        for kernel in row["kernels"]
    ]  # fmt: skip
    return table(
        [", ".join((row["system"], row["model"], *how)), "ms", "of all kernels", "launches"], lines
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--what", nargs="+", choices=("train", "prefill", "decode", "long"))
    parser.add_argument("--profile", action="store_true", help="also the ten longest kernels")
    parser.add_argument("--runs", type=int, default=20, help="timed runs of each case")
    parser.add_argument(
        "--json", type=Path, metavar="FILE",
        help="a part of all models takes its place in a file of the same GPU and versions; default "
        "of a full run: model.json, beside this",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args()
    all_models = set(options.models) == set(SIZES)
    options.full = options.what is None and all_models
    if options.full and not options.dry_run:
        options.json = options.json or HERE / "model.json"
    if options.json and options.json.exists() and not all_models:
        parser.error(f"{options.json} is there: a part of it is of all models")
    options.what = options.what or ["train", "prefill", "decode", "long"]
    options.device = torch.device("cpu" if options.dry_run else "cuda")
    options.seqlen = 16 if options.dry_run else SEQLEN
    options.vocabulary = 200 if options.dry_run else VOCABULARY
    return options


def main() -> None:
    options = parse()
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("model.py needs a GPU; without one there is --dry-run")
    device = "CPU" if options.dry_run else torch.cuda.get_device_name()
    measured: dict[str, Any] = {"device": device, "torch": torch.__version__}
    try:
        import triton
    except ImportError:
        print("no triton: the scan is scan_chunked", file=sys.stderr)
    else:
        measured["triton"] = triton.__version__
    if options.json and options.json.exists() and not options.full:
        before = json.loads(options.json.read_text())
        if any(before.get(name) != measured.get(name) for name in ("device", "torch", "triton")):
            raise SystemExit(f"{options.json} is of another GPU or version: name another file")
        measured = before
    far = 4 if options.dry_run else 100_000
    cases: dict[str, list[tuple]] = {
        "train": [
            (prepare_training, name, how, loss)
            for name in options.models
            if name in TRAIN
            for how in ("eager", "compiled", "graph")
            for loss in ("plain", "chunked")
        ],
        "prefill": [
            (prepare_prefill, name, how)
            for name in options.models
            if name in PREFILL
            for how in ("eager", "graph")
        ],
        "decode": [
            (measure_decoding, name, batch, how, skipped)
            for name in options.models
            for batch in DECODE.get(name, ())
            for how, skipped in (
                ("greedy", 0),
                ("sampled", 0),
                *([("greedy", far)] if (name, batch) == ("130m", 1) else []),
            )
        ],
        "long": [
            (prepare_long, seqlen, how)
            for seqlen in ((16, 32) if options.dry_run else LONG)
            for how in ("train", "evaluate")
        ],
    }
    official = OFFICIAL and not options.dry_run
    for what in options.what:
        measured[what] = []
        for run, *case in cases[what]:
            rows = []
            if what == "decode":
                rows.append({"system": "ours"} | run(*case, options))
                if official and case[-2:] == ["greedy", 0]:
                    rows.append({"system": "official"} | measure_official_decoding(*case, options))
            elif what == "long":
                rows = time_together([run(*case, options)], options)
                rows[0]["system"] = "ours"
            else:
                makers = {"ours": make_model}
                if official and "chunked" not in case and "compiled" not in case:
                    makers["official"] = make_official
                prepared = []
                for system, make in makers.items():
                    prepared.append(run(*case, options, make))
                    prepared[-1].row = {"system": system} | prepared[-1].row
                rows = time_together(prepared, options)
                del prepared
            torch.compiler.reset()  # what a model has compiled is of no use to the next one
            reset_peak(options)
            for row in rows:
                said = ", ".join(map(str, (what, row["system"], *case)))
                print(f"{said}: {row['ms']:.3f} ms", file=sys.stderr)
                measured[what].append(
                    {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
                )
            if options.json:  # each time: a run that is cut short keeps what it has
                options.json.write_text(json.dumps(measured, indent=1) + "\n")
    versions = ", ".join(f"{k} {measured[k]}" for k in ("torch", "triton") if k in measured)
    print(f"{measured['device']}, {versions}\n")
    tables = {
        "train": training_table, "prefill": prefill_table, "decode": decoding_table,
        "long": long_table,
    }  # fmt: skip
    for what in options.what:
        print(tables[what](measured[what]))
    for what in options.what:
        for row in measured[what]:
            if "kernels" in row:
                print(kernels_table(row))


if __name__ == "__main__":
    main()
