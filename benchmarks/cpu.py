"""Speed and memory on a CPU, beside transformers and mambapy, and against what the CPU can do.

    python benchmarks/cpu.py                              # all; writes cpu.json and context.png
    python benchmarks/cpu.py --what prefill --rounds 9    # a part; writes nothing
    python benchmarks/cpu.py --no-compile                 # without torch.compile; writes nothing
    python benchmarks/cpu.py --draw-only                  # tables and context.png from cpu.json
    python benchmarks/cpu.py --dry-run                    # tiny sizes, seconds: does it run

Needs transformers; `pip install --no-deps mambapy==1.2.0` adds mambapy (its language model imports
CUDA code, so its layers stand here between an embedding and a head); matplotlib draws the picture.
A peer that is not installed is left out, and a line says so.

All systems of a part compute with the very same tensors as weights, random ones, and in float32
they must agree on logits or loss before they are timed. They run in turns in one process, A B C A B
C: what disturbs the machine disturbs all. The first round is a warm-up; a time is the median of the
other --rounds, and cpu.json has the lowest and the highest beside it. "theirs / ours" is above 1
where ours is faster: eager against eager, compiled against compiled. Compiled means
`layer.compile()` on every layer; what its first run takes, with an empty cache, stands apart. Where
transformers has a choice of scans: eager it loops over time, compiled it uses PyTorch's
associative_scan; both are its defaults.

decode   130m (768 x 24, vocabulary 50280), batch 1: time of a token. Ours is `stream` of
         generate.py, without the copies of weights that it makes before its second token;
         transformers is its forward with cache_params, which is what its `generate` runs, without
         what that adds; mambapy is its `step`. All take the most probable token, but for one row of
         ours, which samples as the command line does by default. Two rows more are ours without
         `stream`: `model.step`, and the same with the step of every layer compiled.
         Limit: the bytes of all weights, each read once for a token, over the bandwidth of the
         faster of two reads, the sum and the matrix-vector product of a matrix of 512 MiB.
prefill  130m, one prompt, float32: until the logits of its last position are there. Ours is
         `prefill` of generate.py and includes the state that decoding starts from, the peers need
         not compute one. Compiled, ours has the products that `prefill` would choose.
         Limit: all matrix products alone, with the same weights and computed the same way.
train    256 x 4, vocabulary 1000, one row, float32: forward, cross-entropy and backward, no
         optimizer. The loop of transformers takes quadratic time backward, because each index
         makes a gradient of full length: it runs on a shorter row, beside ours on the same row.
         Limit: all matrix products alone, forward and backward.
         Two peaks. tensors: the most bytes that PyTorch's allocator has handed out at a time, as
         its profiler records every allocation and release, gradients included, weights not.
         process: the highest resident set of a new process in the step (VmHWM) over that before
         it, after a warm-up on 16 tokens: what the tensors cost with what malloc cannot reuse.
         Linux only, and eager only, since compiling has a peak of its own.
context  128 x 4, vocabulary 256: the time of token number t, by `step`, and by running the whole
         prefix again. All tokens are run through; then the states before each t take one step in
         turns, 1000 times, and the prefixes 5 times: medians. One thread, as in generate.py.
load     is benchmarks/load.py, which this runs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load import memory
from scan import number, rounded, table

from generate import by_convolution, can_convolve, prefill, stream
from mamba import Mamba, MambaConfig

HERE = Path(__file__).resolve().parent
PARTS = ("decode", "prefill", "train", "context", "load")
SIZES = {  # d_model, n_layer, vocabulary
    "decode": (768, 24, 50280), "prefill": (768, 24, 50280),
    "train": (256, 4, 1000), "context": (128, 4, 256),
}  # fmt: skip
LENGTHS = {"decode": 16, "prefill": 512, "train": 2048, "train, loop": 256, "context": 100_000}
LONGEST_PREFIX = 3000
COMMAND_LINE = {"temperature": 0.8, "top_p": 0.95}  # the defaults of generate.py


## The systems ------------------------------------------------------------------------------------
##
## Each takes the weights of a reference model and offers the same: its layers, the logits of every
## position or of the last, and a stream of greedy tokens.


class Ours:
    name = "ours"
    compiles = True

    def __init__(self, reference: Mamba) -> None:
        with torch.device("meta"):
            self.model = Mamba(reference.config)
        self.model.load_state_dict(reference.state_dict(), assign=True)
        self.model.tie_weights()
        self.layers = self.model.backbone.layers

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids)

    def last_logits(self, ids: Tensor) -> Tensor:
        logits, _ = prefill(self.model, ids)
        return logits

    def choose_products(self, tokens: int) -> None:
        """Do now what `prefill` would do, so that the layers can be compiled."""
        if can_convolve(self.model, tokens):
            self.model = by_convolution(self.model)
            self.layers = self.model.backbone.layers

    def stream(self, ids: Tensor, **sampling: Any) -> Iterator[Tensor]:
        sampling = sampling or {"temperature": 0.0}
        return stream(self.model, ids, max_new_tokens=sys.maxsize, **sampling)

    @torch.no_grad()
    def stream_by_step(self, ids: Tensor, compiled: bool) -> Iterator[Tensor]:
        """With `model.step`, which `stream` replaces where it knows a faster one."""
        for layer in self.layers if compiled else ():
            layer.step = torch.compile(layer.step)
        logits, state = prefill(self.model, ids)
        while True:
            token_ids = logits.argmax(-1)
            yield token_ids
            logits, state = self.model.step(token_ids, state)


class Transformers:
    name = "transformers"
    compiles = True

    def __init__(self, reference: Mamba, use_mambapy: bool = False) -> None:
        import transformers

        transformers.logging.set_verbosity_error()  # that CUDA kernels are not installed
        c = reference.config
        config = transformers.MambaConfig(
            hidden_size=c.d_model,
            num_hidden_layers=c.n_layer,
            vocab_size=c.padded_vocab_size,
            use_mambapy=use_mambapy,
        )
        with torch.device("meta"):
            self.model = transformers.MambaForCausalLM(config)
        weights = reference.state_dict()
        weights["backbone.embeddings.weight"] = weights.pop("backbone.embedding.weight")
        self.model.load_state_dict(weights, assign=True)
        self.model.tie_weights()
        self.layers = self.model.backbone.layers

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits

    def last_logits(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]

    @torch.no_grad()
    def stream(self, ids: Tensor) -> Iterator[Tensor]:
        out = self.model(ids, use_cache=True)
        while True:
            token_ids = out.logits[:, -1].argmax(-1)
            yield token_ids
            ids = token_ids.unsqueeze(-1)
            if "cache" in out:  # from 5.24 on
                cache = {"cache": out["cache"]}
            else:  # the first versions also ask where the token stands: past the window is enough
                past = torch.tensor([2**31])
                cache = {"cache_params": out["cache_params"], "cache_position": past}
            out = self.model(ids, **cache, use_cache=True)


class Mambapy:
    name = "mambapy"
    compiles = False

    def __init__(self, reference: Mamba) -> None:
        from mambapy.mamba import Mamba as Layers
        from mambapy.mamba import MambaConfig as LayersConfig
        from mambapy.mamba import RMSNorm

        c = reference.config
        with torch.device("meta"):
            parts = {
                "embedding": nn.Embedding(c.padded_vocab_size, c.d_model),
                "mamba": Layers(LayersConfig(d_model=c.d_model, n_layers=c.n_layer)),
                "norm_f": RMSNorm(c.d_model),
                "lm_head": nn.Linear(c.d_model, c.padded_vocab_size, bias=False),
            }
        self.model = nn.ModuleDict(parts)
        weights = {
            name.removeprefix("backbone.").replace("layers", "mamba.layers", 1): weight
            for name, weight in reference.state_dict().items()
        }
        self.model.load_state_dict(weights, assign=True)
        self.model.lm_head.weight = self.model.embedding.weight
        self.layers = self.model.mamba.layers

    def features(self, ids: Tensor) -> Tensor:
        return self.model.norm_f(self.model.mamba(self.model.embedding(ids)))

    def logits(self, ids: Tensor) -> Tensor:
        return self.model.lm_head(self.features(ids))

    def last_logits(self, ids: Tensor) -> Tensor:
        return self.model.lm_head(self.features(ids)[:, -1])

    @torch.no_grad()
    def stream(self, ids: Tensor) -> Iterator[Tensor]:
        c = self.model.mamba.config
        past = torch.zeros(len(ids), c.d_inner, c.d_conv - 1)
        caches: list[Any] = [(None, past) for _ in self.layers]
        waiting = list(ids.unbind(1))  # the prompt, which it too takes token by token
        while True:
            for token_ids in waiting:
                u, caches = self.model.mamba.step(self.model.embedding(token_ids), caches)
            token_ids = self.model.lm_head(self.model.norm_f(u)).argmax(-1)
            yield token_ids
            waiting = [token_ids]


SYSTEMS = {system.name: system for system in (Ours, Transformers, Mambapy)}
SYSTEMS["transformers with mambapy"] = functools.partial(Transformers, use_mambapy=True)


def installed() -> dict[str, str]:
    """The peers that are there, with their versions; a line for one that is not."""
    versions = {}
    for name in ("transformers", "mambapy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed: left out", file=sys.stderr)
    return versions


def wanted(names: list[str], options: argparse.Namespace) -> list[str]:
    """Those of the systems' names whose packages are installed."""
    return [
        name for name in names
        if all(peer in options.peers for peer in ("transformers", "mambapy") if peer in name)
    ]  # fmt: skip


## How things are measured ------------------------------------------------------------------------


def make_reference(part: str, options: argparse.Namespace) -> Mamba:
    torch.manual_seed(0)
    return Mamba(MambaConfig(*((32, 2, 200) if options.dry_run else SIZES[part])))


def random_ids(seqlen: int, model: Mamba) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, seqlen), generator=generator)


def interleaved(
    runs: dict[str, Callable[[], Any]], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Milliseconds of each run: A B C A B C, without the first round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(options.rounds + 1):
        print(f"round {i} of {options.rounds}", file=sys.stderr)
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if i > 0:
                times[name].append(1000 * (time.perf_counter() - begun))
    return {
        name: {"ms": statistics.median(t), "lowest_ms": min(t), "highest_ms": max(t)}
        for name, t in times.items()
    }


def compile_layers(
    system: Any, run: Callable[[], Any], options: argparse.Namespace
) -> float | None:
    """Seconds of the first run with compiled layers; None if they do not compile."""
    for layer in system.layers:
        layer.compile()
    # An empty cache: what an earlier run has compiled must not shorten this one.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=options.scratch)
    begun = time.perf_counter()
    try:
        run()
    except Exception as error:  # whatever a compiler raises
        print(f"{system.name} does not compile: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return time.perf_counter() - begun


def check_agreement(found: dict[str, Tensor]) -> None:
    """Raises RuntimeError where a system gives other numbers than the first of them."""
    first, expected = next(iter(found.items()))
    for name, value in found.items():
        error = ((value - expected).norm() / expected.norm()).item()
        if not error < 1e-4:
            raise RuntimeError(f"{name} and {first} do not agree: relative error {error:.1e}")


def matrix_products(
    model: Mamba, seqlen: int, positions: int, backward: bool = False
) -> Callable[[], None]:
    """A function that multiplies as the model does for seqlen tokens and logits of positions."""
    pairs = [
        (torch.randn(1, seqlen, product.weight.shape[1]), product)
        for layer in model.backbone.layers
        for mixer in [layer.mixer]
        for product in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    ]
    pairs.append((torch.randn(1, positions, model.config.d_model), model.lm_head))

    def run() -> None:
        for x, product in pairs:
            y = product(x.requires_grad_(backward))
            if backward:
                torch.autograd.grad(y, (x, product.weight), y.detach())

    return run


def peak_of_tensors(run: Callable[[], Any]) -> int:
    """The most bytes that PyTorch has allocated at a time during the run, over those before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [
        (event.start_ns(), event.nbytes())  # negative where memory is released
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    changes.sort(key=lambda change: change[0])
    return max(itertools.accumulate(nbytes for _, nbytes in changes))


def peak_of_process(name: str, seqlen: int, options: argparse.Namespace) -> int | None:
    """The same in resident memory, from a new process (`print_peak`); None without Linux."""
    if options.dry_run or not sys.platform.startswith("linux"):
        return None
    command = [sys.executable, __file__, "--peak", name, str(seqlen)]
    command += ["--threads", str(options.threads)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(result.stdout)


def print_peak(name: str, seqlen: int, options: argparse.Namespace) -> None:
    reference = make_reference("train", options)
    system = SYSTEMS[name](reference)
    training_step(system, random_ids(16 + 1, reference))()
    step = training_step(system, random_ids(seqlen + 1, reference))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from here
    before = memory("VmRSS")
    step()
    print(memory("VmHWM") - before)


## The parts --------------------------------------------------------------------------------------


@torch.no_grad()
def measure_decode(options: argparse.Namespace) -> dict[str, Any]:
    count = 2 if options.dry_run else LENGTHS["decode"]
    models = {"float32": make_reference("decode", options)}
    models["bfloat16"] = copy.deepcopy(models["float32"]).bfloat16()
    prompt = random_ids(8, models["float32"])
    # mambapy's step multiplies its float32 state by C: it has no bfloat16.
    cases = [(name, "float32") for name in ("ours", "transformers", "mambapy")]
    cases += [(name, "bfloat16") for name in ("ours", "transformers")]
    streams, found = {}, {}
    for name, dtype in cases:
        if name in wanted(list(SYSTEMS), options):
            system = SYSTEMS[name](models[dtype])
            streams[f"{name}, {dtype}"] = system.stream(prompt)
            if dtype == "float32":
                found[name] = system.last_logits(prompt)
    check_agreement(found)
    sampled = Ours(models["float32"]).stream(prompt, **COMMAND_LINE)
    streams["ours, float32, sampled"] = sampled
    for how, compiled in (("model.step", False), ("model.step compiled", True)):
        if options.compile or not compiled:
            tokens = Ours(models["float32"]).stream_by_step(prompt, compiled)
            streams[f"ours, float32, {how}"] = tokens

    megabytes = 1 if options.dry_run else 512
    matrix, vector = torch.randn(megabytes * 2**6, 2**12), torch.randn(2**12)
    runs: dict[str, Callable[[], Any]] = {
        name: lambda tokens=tokens: [next(tokens) for _ in range(count)]
        for name, tokens in streams.items()
    }
    times = interleaved(runs | {"sum": matrix.sum, "mv": lambda: matrix @ vector}, options)
    reads = {name: times.pop(name)["ms"] for name in ("sum", "mv")}
    read = min((ms, name) for name, ms in reads.items())
    limits = {
        dtype: read[0] * sum(p.nbytes for p in model.parameters()) / matrix.nbytes
        for dtype, model in models.items()
    }
    rows = []
    for name, row in times.items():
        system, dtype, *how = name.split(", ")
        row = {key: value / count for key, value in row.items()}
        rows.append({"system": system, "dtype": dtype, "how": "".join(how) or "greedy"} | row)
    return {
        "bandwidth_GB_per_s": matrix.nbytes / read[0] / 1e6, "read_by": read[1],
        "reads_GB_per_s": {name: matrix.nbytes / ms / 1e6 for name, ms in reads.items()},
        "limit_ms": limits, "rows": rows,
    }  # fmt: skip


@torch.no_grad()
def measure_prefill(options: argparse.Namespace) -> dict[str, Any]:
    seqlen = 16 if options.dry_run else LENGTHS["prefill"]
    reference = make_reference("prefill", options)
    ids = random_ids(seqlen, reference)
    runs: dict[str, Callable[[], Any]] = {}
    compile_seconds = {}
    for name in wanted(["ours", "transformers", "mambapy"], options):
        system = SYSTEMS[name](reference)
        runs[f"{name}, eager"] = functools.partial(system.last_logits, ids)
        if system.compiles and options.compile:
            system = SYSTEMS[name](reference)
            if isinstance(system, Ours):
                system.choose_products(seqlen)
            run = functools.partial(system.last_logits, ids)
            seconds = compile_layers(system, run, options)
            if seconds is not None:
                key = f"{name}, compiled"
                runs[key], compile_seconds[key] = run, seconds
    check_agreement({name: run() for name, run in runs.items()})
    ours = Ours(reference)
    ours.choose_products(seqlen)
    runs["limit"] = matrix_products(ours.model, seqlen, positions=1)
    times = interleaved(runs, options)
    limit = times.pop("limit")["ms"]
    rows = [
        case_of(name) | row | compile_time(compile_seconds.get(name))
        for name, row in times.items()
    ]  # fmt: skip
    return {"tokens": seqlen, "limit_ms": limit, "rows": rows}


def case_of(name: str) -> dict[str, str]:
    system, how = name.split(", ")
    return {"system": system, "how": how}


def compile_time(seconds: float | None) -> dict[str, float]:
    return {} if seconds is None else {"compile_s": seconds}


def training_step(system: Any, ids: Tensor) -> Callable[[], Tensor]:
    """A function that runs forward, loss and backward, drops the gradients, returns the loss."""
    inputs, targets = ids[:, :-1], ids[:, 1:].flatten()

    def step() -> Tensor:
        loss = F.cross_entropy(system.logits(inputs).flatten(0, 1), targets)
        loss.backward()
        system.model.zero_grad()  # to None, so that every run writes its gradients anew
        return loss.detach()

    return step


def measure_training(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One group of rows for the long row of tokens, one for that which a slow loop can bear."""
    long, short = (32, 16) if options.dry_run else (LENGTHS["train"], LENGTHS["train, loop"])
    groups = [(long, ["ours", "mambapy", "transformers with mambapy"], options.compile)]
    groups.append((short, ["ours", "transformers"], False))
    return [measure_training_at(*group, options) for group in groups]


def measure_training_at(
    seqlen: int, names: list[str], compiled: bool, options: argparse.Namespace
) -> dict[str, Any]:
    reference = make_reference("train", options)
    ids = random_ids(seqlen + 1, reference)
    steps, compile_seconds = {}, {}
    for name in wanted(names, options):
        steps[f"{name}, eager"] = training_step(SYSTEMS[name](reference), ids)
    for name in wanted(["ours", "transformers"], options) if compiled else []:
        system = SYSTEMS[name](reference)
        step = training_step(system, ids)
        seconds = compile_layers(system, step, options)
        if seconds is not None:
            key = f"{name}, compiled"
            steps[key], compile_seconds[key] = step, seconds
    check_agreement({name: step() for name, step in steps.items()})
    products = matrix_products(reference, seqlen, positions=seqlen, backward=True)
    times = interleaved({**steps, "limit": products}, options)
    limit = times.pop("limit")["ms"]
    rows = []
    for name, step in steps.items():
        row: dict[str, Any] = case_of(name) | times[name]
        row |= compile_time(compile_seconds.get(name))
        row["tensors_MiB"] = peak_of_tensors(step) / 2**20
        if row["how"] == "eager":
            peak = peak_of_process(row["system"], seqlen, options)
            row |= {} if peak is None else {"process_MiB": peak / 2**20}
        rows.append(row)
    return {"tokens": seqlen, "limit_ms": limit, "rows": rows}


@torch.no_grad()
def measure_context(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each of 10, 30, 100, 300, ... tokens: both times, and the size of the state."""
    model = make_reference("context", options)
    points = [n * 10**k for k in range(1, 9) for n in (1, 3) if n * 10**k <= options.tokens]
    ids = random_ids(min(max(points), LONGEST_PREFIX), model)
    state, token_ids = model.init_state(1), ids[:, 0]
    torch.set_num_threads(1)
    kept = {}  # token: what comes before it
    for t in range(1, max(points) + 1):
        if t in points:
            kept[t] = token_ids, state
        logits, state = model.step(token_ids, state)
        token_ids = logits.argmax(-1)

    def step(t: int) -> None:
        logits, _ = model.step(*kept[t])
        logits.argmax(-1)

    def prefix_again(t: int) -> None:
        model(ids[:, :t], head=lambda hidden: model.lm_head(hidden[:, -1])).argmax(-1)

    def in_turns(run: Callable[[int], None], tokens: list[int], rounds: int) -> dict[int, float]:
        """Medians in ms. The machine's speed changes within seconds: it must not favour a token."""
        times: dict[int, list[float]] = {t: [] for t in tokens}
        for _ in range(rounds):
            for t in tokens:
                begun = time.perf_counter()
                run(t)
                times[t].append(1000 * (time.perf_counter() - begun))
        return {t: statistics.median(own) for t, own in times.items()}

    steps = in_turns(step, points, 1000)
    prefixes = in_turns(prefix_again, [t for t in points if t <= LONGEST_PREFIX], 5)
    rows: list[dict[str, Any]] = []
    for t in points:
        size = sum(x.untyped_storage().nbytes() for x in vars(kept[t][1]).values())
        rows.append({"token": t, "step_ms": steps[t], "state_bytes": size})
        if t in prefixes:
            rows[-1]["prefix_ms"] = prefixes[t]
    torch.set_num_threads(options.threads)
    return rows


def measure_loading(options: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, str(HERE / "load.py")]
    if options.dry_run:
        command += ["--d-model", "32", "--n-layer", "1"]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


MEASURES = {
    "decode": measure_decode, "prefill": measure_prefill, "train": measure_training,
    "context": measure_context, "load": measure_loading,
}  # fmt: skip


## Tables and the picture -------------------------------------------------------------------------


def against_ours(rows: list[dict[str, Any]], same: tuple[str, ...]) -> list[str]:
    """theirs / ours for every row: ours is that row of ours which agrees in the fields of same."""
    ours = {tuple(row[key] for key in same): row for row in rows if row["system"] == "ours"}
    found = [ours.get(tuple(row[key] for key in same)) for row in rows]
    return [
        "" if row is mine or mine is None else number(row["ms"] / mine["ms"])
        for row, mine in zip(rows, found, strict=True)
    ]


def decode_table(part: dict[str, Any]) -> str:
    titles = ["decode, a token", "ms", "tokens/s", "theirs / ours", "measured / limit"]
    ratios = against_ours(part["rows"], ("dtype", "how"))
    lines = []
    for row, ratio in zip(part["rows"], ratios, strict=True):
        name = ", ".join(row[key] for key in ("system", "dtype", "how"))
        over = row["ms"] / part["limit_ms"][row["dtype"]]
        lines.append([name, number(row["ms"]), number(1000 / row["ms"]), ratio, number(over)])
    for dtype, limit in part["limit_ms"].items():
        name = f"limit, {dtype}: weights at {number(part['bandwidth_GB_per_s'])} GB/s"
        lines.append([name, number(limit), number(1000 / limit), "", "1"])
    for name, speed in part.get("reads_GB_per_s", {}).items():
        lines.append([f"read by {name}: {number(speed)} GB/s", "", "", "", ""])
    return table(titles, lines)


def products_table(title: str, part: dict[str, Any]) -> str:
    """Of prefill and of training: the limit is that of the matrix products."""
    memory_keys = [key for key in ("tensors_MiB", "process_MiB") if key in part["rows"][0]]
    titles = [f"{title}, {part['tokens']:,} tokens", "ms", "tokens/s", "theirs / ours"]
    titles += ["measured / limit", "compile s"]
    titles += [f"peak MiB, {key.removesuffix('_MiB')}" for key in memory_keys]
    lines = []
    for row, ratio in zip(part["rows"], against_ours(part["rows"], ("how",)), strict=True):
        line = [f"{row['system']}, {row['how']}", number(row["ms"])]
        line += [number(1000 * part["tokens"] / row["ms"]), ratio]
        line += [number(row["ms"] / part["limit_ms"]), number(row.get("compile_s"))]
        lines.append(line + [number(row.get(key)) for key in memory_keys])
    limit = [number(part["limit_ms"]), number(1000 * part["tokens"] / part["limit_ms"]), "", "1"]
    blank = [""] * (1 + len(memory_keys))
    return table(titles, [*lines, ["limit: matrix products alone", *limit, *blank]])


def context_table(rows: list[dict[str, Any]]) -> str:
    titles = ["token", "step, ms", "prefix again, ms", "state, bytes"]
    lines = [
        [f"{row['token']:,}", number(row["step_ms"]), number(row.get("prefix_ms")),
         f"{row['state_bytes']:,}"]
        for row in rows
    ]  # fmt: skip
    return table(titles, lines)


def loading_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        keys = ("layout", "dtype") if "layout" in row else ("hub", "cache")
        name = ", ".join(row[key] for key in keys)
        lines.append([name, number(row["seconds"]), number(row.get("peak_over_file"))])
    return table(["loading", "seconds", "added peak memory / file"], lines)


def report(measured: dict[str, Any]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in measured["machine"].items())
    tables = [facts + "\n"]
    if "decode" in measured:
        tables.append(decode_table(measured["decode"]))
    if "prefill" in measured:
        tables.append(products_table("prefill", measured["prefill"]))
    for part in measured.get("train", []):
        tables.append(products_table("forward and backward", part))
    if "context" in measured:
        tables.append(context_table(measured["context"]))
    if "load" in measured:
        tables.append(loading_table(measured["load"]))
    return "\n".join(tables)


def draw(measured: dict[str, Any], picture: Path) -> None:
    """Time of a token against its number, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    rows = measured["context"]
    prefix = [row for row in rows if "prefix_ms" in row]
    state = rows[0]["state_bytes"] / 1000
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    x, y = [row["token"] for row in rows], [row["step_ms"] for row in rows]
    axis.plot(x, y, "o-", color="C0", markersize=4)
    beside = {"textcoords": "offset points", "annotation_clip": False}
    label = f"step: the state is {state:.0f} kB throughout"
    axis.annotate(label, (x[-1], y[-1]), (0, -16), color="C0", ha="right", **beside)
    x, y = [row["token"] for row in prefix], [row["prefix_ms"] for row in prefix]
    axis.plot(x, y, "^--", color="0.5", markersize=5)
    axis.annotate("running the prefix again", (x[-1], y[-1]), (9, -3), color="0.4", **beside)
    axis.set_xscale("log")
    axis.set_yscale("log")
    lowest = min(row["step_ms"] for row in rows)
    axis.set_ylim(lowest / 3, 3 * max(y))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.set_xlabel("token")
    axis.set_ylabel("milliseconds")
    d_model, n_layer, _ = SIZES["context"]
    what = f"d_model {d_model}, {n_layer} layers, float32, one thread"
    axis.set_title(f"Time of one more token\n{what}", fontsize=11)
    figure.savefig(picture, dpi=200)
    plt.close(figure)


## The command ------------------------------------------------------------------------------------


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on, and nothing that tells whose machine it is."""
    name, flags, cpuinfo = platform.processor() or platform.machine(), "", Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        entries = {key.strip(): value.strip() for key, _, value in lines}
        name, flags = entries.get("model name", name), entries.get("flags", "")
    has = {flag: "yes" if flag in flags.split() else "no" for flag in ("avx512_bf16", "amx_tile")}
    has["PyTorch uses"] = torch.backends.cpu.get_cpu_capability()
    versions = {"torch": torch.__version__, **options.peers}
    return {"cpu": name, **has, "threads": options.threads, **versions}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--what", nargs="+", choices=PARTS, help="default: all")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=LENGTHS["context"], help="of context")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--json", type=Path, help="default of a full run: cpu.json, beside this")
    parser.add_argument("--picture", type=Path, help="default of a full run: context.png")
    parser.add_argument("--draw-only", action="store_true", help="tables and picture from --json")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, no compiling, no load")
    parser.add_argument("--peak", nargs=2, metavar=("SYSTEM", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1 or options.tokens < 10:
        parser.error("--rounds must be at least 1, --tokens at least 10")
    full = options.what is None and options.compile and not options.dry_run
    if full or options.draw_only:
        options.json = options.json or HERE / "cpu.json"
        options.picture = options.picture or HERE / "context.png"
    if options.dry_run:
        options.rounds, options.tokens, options.compile = 1, 30, False
        options.what = options.what or list(PARTS[:-1])
    options.what = options.what or list(PARTS)
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.peak:
        print_peak(options.peak[0], int(options.peak[1]), options)
        return
    if options.draw_only:
        measured = json.loads(options.json.read_text())
    else:
        options.peers = installed()
        measured = {"machine": machine(options)}
        with tempfile.TemporaryDirectory() as options.scratch:
            for part in options.what:
                print(part, file=sys.stderr)
                measured[part] = rounded(MEASURES[part](options))
                torch.compiler.reset()  # what a part has compiled is of no use to the next one
        if options.json:
            options.json.write_text(json.dumps(measured, indent=1) + "\n")
    print(report(measured))
    if options.picture and "context" in measured:
        draw(measured, options.picture)


if __name__ == "__main__":
    main()
