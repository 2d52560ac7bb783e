"""Train a Mamba language model on text: from scratch or further, on one device or on many.

    python examples/train.py --data texts/plays --hold-out lear_gut.txt --graph
    python examples/train.py --data mine.txt --validation-share 0.1 --lr 1e-4 --batch 16 \
        --accumulate 4 --init-from state-spaces/mamba-130m
    torchrun --nproc-per-node 2 examples/train.py --data many --packed --parallel fsdp

Every --evaluate-every steps the script prints losses and a sample, and writes to --out loss.csv,
loss.png, the model as generate.py and from_pretrained load it (with --keep-best, if no hold-out
loss before was lower), and training.pt: the same command goes on from there, in any number of
processes, and ends as if nothing had stopped it. --evaluate FOLDER measures a model only. The
defaults are those for a small model of a few megabytes of text, which it reads many times.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

if __name__ == "__main__":  # from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chunked_loss import chunked_cross_entropy
from recorded import recorded
from texts import Text, Windows, read_texts

from generate import ByteTokenizer, Tokenizer, generate, load_tokenizer
from mamba import Mamba, MambaConfig, file_finder, read_config, read_file


def add_dropout(model: Mamba, p: float, depth: float) -> None:
    """Dropout on all that enters the residual stream: the embedding's output and every block's.

    And stochastic depth (arXiv 1603.09382): a share `depth` of the rows goes without what a block
    adds, and the others get 1/(1 - depth) of it. (Its state reads on in all of them.) Forward
    hooks, so that nothing of this is saved or left behind in the model.
    """

    def drop(module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        return F.dropout(output, p, module.training)

    def drop_rows(module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        return output * F.dropout(output.new_ones(len(output), 1, 1), depth, module.training)

    for module in (model.backbone.embedding, *(x.mixer.out_proj for x in model.backbone.layers)):
        module.register_forward_hook(drop)
    for layer in model.backbone.layers if depth else ():
        layer.mixer.out_proj.register_forward_hook(drop_rows)


## The weights of each step are off to a side, that of the last few batches, each to another one.
## Their average is nearer to the middle. At step t it moves towards the newest weights by 3/(t + 3)
## of the way, and so spans about the last third of all steps, until this is 1 - β, and from there
## on the last 1/(1 - β). (β is --average; arXiv 1212.1824.) It is what is measured and saved as
## the model; training does not see it. It is worth much while the learning rate is high: where a
## text is soon known by heart, the best model is an early one (--average 0.998). At the end of the
## schedule the weights have come to rest, and a short run's last third is too long: it is off.


def keep_average(optimizer: torch.optim.Optimizer, newest: Tensor) -> None:
    """After each step, move an average of each weight towards it by the share `newest`. Saved,
    loaded and shared between processes as Adam's moments are, among which it stands."""

    @torch.no_grad()
    def update(*_: object) -> None:
        for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
            if "average" not in (kept := optimizer.state[weight]):
                kept["average"] = weight.clone()
            kept["average"].lerp_(weight, newest)

    optimizer.register_step_post_hook(update)


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """The factor on --lr: a linear warm-up, then half a cosine down to a hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model: Mamba, texts: list[Text], window: int = 4096) -> float:
    """Mean loss in nats per token, each text read once from its first token to its last.

    The state is carried from window to window, so that the window changes the memory needed and
    nothing else: a text itself says where to forget. Its first token is given, not predicted.
    """
    nats, device = 0.0, model.lm_head.weight.device
    for ids, reset in texts:
        state = model.init_state(1)
        for i in range(0, len(ids) - 1, window):
            part = ids[i : i + window + 1].to(device).long()
            forget = reset[None, i : i + len(part) - 1]
            forget = forget.to(device) if forget.any() else None
            logits, state = model(part[None, :-1], state, reset=forget)
            nats += F.cross_entropy(logits[0].float(), part[1:], reduction="sum").item()
    return nats / sum(len(ids) - 1 for ids, _ in texts)


def rounded(model: Mamba, weights: dict[str, Tensor]) -> Mamba:
    """The model with these weights, its matrices in float16: half the bytes, eleven bits of each.

    A_log, D, biases and norms stay in float32. They are few, and A_log sits in an exponent.
    """
    small = type(model)(model.config)
    small.load_state_dict(weights, strict=False)  # lm_head, if tied, is not among parameters
    matrices, _ = small.param_groups(weight_decay=1.0)  # what decays is what may be rounded
    for parameter in matrices["params"]:
        parameter.data = parameter.data.half()
    return small


def export(model: Mamba, tokenizer: Tokenizer, folder: Path) -> None:
    """The files that generate.py and from_pretrained load."""
    model.save_pretrained(folder)
    if not isinstance(tokenizer, ByteTokenizer):
        tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
        ends = {"eos_token_id": [*tokenizer.eos_token_ids]}
        (folder / "generation_config.json").write_text(json.dumps(ends))


def write_curve(folder: Path, losses: list[float], measured: dict[int, float]) -> None:
    """loss.csv and, where matplotlib is installed, loss.png. Nine digits are a whole float32."""
    lines = [f"{i},{loss:.9g},{measured.get(i, '')}\n" for i, loss in enumerate(losses, start=1)]
    (folder / "loss.csv").write_text("".join(["step,train,hold_out\n", *lines]))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return warnings.warn("no loss.png: matplotlib is not installed", stacklevel=2)
    axes = (figure := Figure(dpi=150, layout="constrained")).subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="lightsteelblue", label="training")
    axes.plot([*measured], [*measured.values()], "o-", color="royalblue", label="hold-out")
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend(frameon=False)
    figure.savefig(folder / "loss.png")


## Several processes share the rows of each batch. With DDP each holds the whole model, and they
## average the gradients. With FSDP each holds its part of every weight, gradient and moment of
## Adam, and weights are gathered when their turn comes: those of four blocks at once, since each
## time costs milliseconds of Python. Either way the gradient is that of the mean over all rows: the
## losses are those of one process, up to rounding and the dropout.


def which_process(name: str) -> tuple[int, int, torch.device]:
    """The number of this process, how many there are (torchrun tells both), and its device."""
    rank, local, world = (int(os.environ.get(n, 0)) for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and local >= count:
        raise RuntimeError(f"process {rank} needs a GPU of its own, and this machine has {count}")
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    return rank, max(1, world), device


def share(model: Mamba, how: str, world: int, device: torch.device) -> nn.Module:
    """What is called in the place of the model. "fsdp" changes the model itself."""
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    mesh = dist.init_device_mesh(device.type, (world,))
    for i in range(0, len(model.backbone.layers), 4):
        fully_shard([*model.backbone.layers[i : i + 4]], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def make_model(options: argparse.Namespace) -> tuple[Mamba, Tokenizer]:
    torch.manual_seed(options.seed)
    if name := options.init_from:
        model = Mamba.from_pretrained(name)
        return model, load_tokenizer(model.config, name)
    name, size = options.tokenizer, (options.d_model, options.n_layer)
    if name == "bytes":
        return Mamba(MambaConfig(*size, 256, tokenizer="bytes")), ByteTokenizer()
    theirs = read_config(file_finder(name)("config.json"))
    config = MambaConfig(*size, theirs.vocab_size, tokenizer=theirs.tokenizer)
    return Mamba(config), load_tokenizer(config, name)


def train(
    options: argparse.Namespace, make_model: Callable = make_model, evaluate: Callable = evaluate
) -> None:
    """benchmarks/transformer.py trains a model of another kind, and measures it in another way."""
    (rank, world, device), checkpoint = which_process(options.device), options.out / "training.pt"
    model, tokenizer = make_model(options)
    text, held_out = read_texts(options, tokenizer)
    batch, seqlen, parts = options.batch, options.seqlen, options.accumulate
    if batch % (world * parts):
        n = f"{world * parts} = {world} processes x --accumulate {parts}"
        raise ValueError(f"--batch {batch} must be a multiple of {n}")
    if (length := len(text[0])) <= seqlen:
        raise ValueError(f"{length} tokens to train on are too few for --seqlen {seqlen}")
    if options.packed and not isinstance(tokenizer, ByteTokenizer) and not tokenizer.eos_token_ids:
        raise ValueError("--packed needs a tokenizer that names an end token")
    if options.graph and (world > 1 or device.type != "cuda"):
        raise ValueError(f"--graph needs one process and a GPU, got {world} and {device.type}")
    options.out.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=options.out).close()  # if nothing can be written, it is to fail now
    # A run goes on only if all options but these, the model and the texts are as when it began.
    free = "data out evaluate evaluate_every prompt device parallel accumulate graph".split()
    fixed = {name: value for name, value in vars(options).items() if name not in free}
    texts = [f"{len(ids)} tokens {zlib.crc32(ids.numpy()):08x}" for ids, _ in (text, *held_out)]
    fixed |= {"model": f"a {type(model).__name__}", "texts": ", ".join(texts)}
    model.to(device)
    if options.dropout or options.depth_dropout:  # blocks with a hook run without fused kernels
        add_dropout(model, options.dropout, options.depth_dropout)
    shared = share(model, options.parallel, world, device) if world > 1 else model
    # Tensors, as a recorded step would not look at numbers again.
    lr, newest = (torch.tensor(value, device=device) for value in (options.lr, 1.0))
    groups = model.param_groups(options.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=True)
    if options.average:
        keep_average(optimizer, newest)

    # All that a step reads, in its place: rows of this process and, of all, where windows are.
    mine = slice(rank * batch // world, (rank + 1) * batch // world)
    windows = Windows(text, batch, seqlen, options.jump)
    state = model.init_state(batch // world)
    ids = torch.zeros(batch // world, seqlen + 1, dtype=torch.long, device=device)
    reset = torch.zeros(batch // world, seqlen, dtype=torch.bool, device=device)
    jumped = torch.zeros(batch // world, dtype=torch.bool, device=device)

    whole = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # in the first process
    losses, measured, seconds = [], {}, 0.0
    if checkpoint.exists():
        saved = read_file(checkpoint)
        for name in saved["fixed"] | fixed:
            if (value := fixed.get(name)) != (before := saved["fixed"].get(name)):
                said = f"{checkpoint} was begun with {name} = {before}, not {value}"
                raise ValueError(f"{said}: delete it to begin anew, or choose another --out")
        losses, measured, seconds = saved["losses"], saved["measured"], saved["seconds"]
        windows.position = saved["position"]
        both = {"model_state_dict": saved["weights"], "optim_state_dict": saved["moments"]}
        dcp.get_optimizer_state_dict(model, optimizer)  # makes places for all that is kept
        dcp.set_state_dict(model, optimizer, **both, options=whole)
        state.conv.copy_(saved["conv"][:, mine])
        state.h.copy_(saved["h"][:, mine])
        if rank == 0:
            print(f"{checkpoint}: going on after step {len(losses)}")
    for group in optimizer.param_groups:  # what was loaded has a rate of its own, or was recorded
        group |= {"lr": lr, "capturable": False}

    def loss_of(u: Tensor, rows: slice) -> Tensor:
        return chunked_cross_entropy(u.flatten(0, 1), model.lm_head.weight, ids[rows, 1:].flatten())

    def step() -> Tensor:
        """From ids, reset and state to the loss; in their places, the next state and weights."""
        total, size = torch.zeros((), device=device), len(ids) // parts
        state.map(lambda tensor: tensor.masked_fill_(jumped[:, None, None], 0))
        for i in range(0, len(ids), size):
            rows = slice(i, i + size)
            if shared is not model:  # DDP: gradients are sent with the last part
                shared.require_backward_grad_sync = i + size == len(ids)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                # The loss inside of `forward`: DDP averages the gradients of nothing else.
                forget = reset[rows] if options.packed else None
                head = partial(loss_of, rows=rows)
                loss, after = shared(ids[rows, :-1], state[:, rows], reset=forget, head=head)
            (loss / parts).backward()
            state.conv[:, rows], state.h[:, rows] = after.conv.detach(), after.h.detach()
            total += loss.detach() / parts
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad()
        return total

    run = recorded(step, optimizer).__next__ if options.graph else step
    new, tokens, mark = [], batch * seqlen, time.perf_counter()
    look = {"unit": " tokens", "unit_scale": True, "smoothing": 0.05, "mininterval": 1}
    bar = tqdm(total=options.steps * tokens, initial=len(losses) * tokens, disable=rank > 0, **look)
    for i in range(len(losses), options.steps):
        ## All chance in a step comes from the seed and the number of the step. So a run that goes
        ## on throws the dice that it would have thrown, and all processes agree on all windows.
        dice = torch.Generator().manual_seed(seed := options.seed * 1_000_003 + i)
        torch.manual_seed(seed * 1024 + rank)  # for dropout
        lr.fill_(options.lr * learning_rate(i, options.steps, options.warmup))
        newest.fill_(max(1 - options.average, 3 / (i + 4)))
        for place, values in zip((ids, reset, jumped), windows.next(dice), strict=True):
            values = values[mine].pin_memory() if place.is_cuda else values[mine]
            place.copy_(values, non_blocking=True)
        new.append(run())
        bar.update(tokens)
        if i % 10 == 0:  # to look at it is to wait for the GPU
            bar.set_postfix(loss=f"{new[-1].item():.3f}", refresh=False)
        if (i + 1) % options.evaluate_every and i + 1 < options.steps:
            continue

        recent, new = torch.stack(new) / world, []
        if world > 1:
            dist.all_reduce(recent)
        losses, interval = losses + recent.tolist(), time.perf_counter() - mark
        seconds += interval
        weights, moments = dcp.get_state_dict(model, optimizer, options=whole)
        if not all(each.half().isfinite().all() for each in (recent, *weights.values())):
            raise ValueError(f"loss or float16 weight not finite by step {i + 1}: lower --lr")
        saved = {"fixed": fixed, "losses": losses, "measured": measured, "seconds": seconds}
        saved |= {"weights": weights, "moments": moments, "position": windows.position}
        for name, tensor in vars(state).items():
            rows = [torch.empty_like(tensor) for _ in range(world)]
            dist.all_gather(rows, tensor) if world > 1 else rows[0].copy_(tensor)
            saved[name] = torch.cat(rows, dim=1)
        if rank == 0:
            said = f"step {i + 1}  {seconds:.0f} s, {len(recent) * tokens / interval:,.0f} tokens/s"
            if device.type == "cuda":
                said += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            said += f"  train {recent.mean():.4f}"
            if options.average:
                weights = {n: moments["state"][n]["average"] for n, _ in model.named_parameters()}
            small = rounded(model, weights)
            plain = copy.deepcopy(small).float().to(device)
            if held_out:
                measured[i + 1] = evaluate(plain, held_out)
                said += f"  hold-out {measured[i + 1]:.4f}"
            if not options.keep_best or min(measured, key=measured.get) == i + 1:
                export(small, tokenizer, options.out)
            write_curve(options.out, losses, measured)
            # Written aside and moved: an interruption must not cost the only checkpoint.
            torch.save(saved, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
            bar.write(f"{said} nats per token")
            if prompt := options.prompt:
                sampling = {"temperature": 0.8, "seed": 0, "max_new_tokens": 200}
                sample = generate(plain, tokenizer, prompt, eos_token_id=None, **sampling)
                letters = sys.stdout.encoding or "utf-8"  # of a terminal, which may lack some
                bar.write(f"{prompt}{sample}\n".encode(letters, "replace").decode(letters))
            del plain  # training needs its memory
        mark = time.perf_counter()  # what it takes to look is not training
    bar.close()
    if rank == 0:
        said = f"wrote {options.out}"
        if measured:
            best = min(measured, key=measured.get)
            kept = best if options.keep_best else options.steps
            said += f": step {kept}, hold-out {measured[kept]:.4f}"
            said += f" (at best {measured[best]:.4f}, step {best})"
        print(said)
    if world > 1:
        dist.barrier()  # one that left while its last message is under way could hang (gloo)
        shared = None  # DDP, the last to let go of gloo, would hold the lock that gloo waits for
        dist.destroy_process_group()


def option_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, help="text files, and folders of them")
    add("--separator", metavar="TEXT", help="what stands between documents (None: files)")
    add("--packed", action="store_true", help="a document does not see those before it")
    add("--hold-out", nargs="*", default=[], metavar="NAME", help="files of --data, measured only")
    add("--validation-share", type=float, default=0.0, help="of the text, its end: measured only")
    add("--evaluate-window", type=int, default=0, help="measure windows from zero (0: read on)")
    add("--out", type=Path, default=Path("checkpoints/mine"), help="the folder to write")
    add("--evaluate", type=Path, metavar="FOLDER", help="measure this one; train nothing")
    add("--init-from", metavar="NAME", help="a folder or a Hub repository, to train further")
    add("--tokenizer", default="bytes", metavar="NAME", help="bytes, or that of this model")
    add("--d-model", type=int, default=256, help="width")
    add("--n-layer", type=int, default=10, help="depth")
    add("--batch", type=int, default=64, help="rows of a step, in all processes together")
    add("--accumulate", type=int, default=1, help="parts in which a process takes its rows")
    add("--seqlen", type=int, default=512, help="tokens of a row")
    add("--jump", type=float, default=1 / 8, help="share of rows that do not read on")
    add("--steps", type=int, default=5000, help="in all, with those before an interruption")
    add("--warmup", type=int, default=100, help="steps until the learning rate is whole")
    add("--lr", type=float, default=2e-3, help="the highest learning rate")
    add("--weight-decay", type=float, default=1.0, help="of matrices (--init-from: 0.1)")
    add("--clip", type=float, default=1.0, help="largest norm of a gradient (inf: any)")
    add("--average", type=float, default=0.0, help="of weights: share kept a step (0: none)")
    add("--dropout", type=float, default=0.1, help="of what enters the stream (--init-from: 0)")
    add("--depth-dropout", type=float, default=0.1, help="rows without a block (--init-from: 0)")
    add("--evaluate-every", type=int, default=500, help="steps between losses, samples, saves")
    add("--keep-best", action="store_true", help="save at the lowest hold-out loss, not the last")
    add("--prompt", default="\n", metavar="TEXT", help="how samples begin; an empty one: none")
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="how torchrun's processes share")
    add("--graph", action="store_true", help="record a step as a CUDA graph (one GPU)")
    add("--seed", type=int, default=0, help="of the weights, the windows and the dropout")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    if parser.parse_known_args()[0].init_from:
        parser.set_defaults(dropout=0.0, depth_dropout=0.0, weight_decay=0.1)
    options = parser.parse_args()
    low = dict.fromkeys("batch accumulate seqlen steps evaluate_every".split(), 1)
    high = dict.fromkeys("validation_share jump dropout depth_dropout".split(), 1) | {"seed": 2**32}
    for name in (*low, *high, "lr", "warmup", "weight_decay", "evaluate_window"):
        value, least, most = getattr(options, name), low.get(name, 0), high.get(name, math.inf)
        if not least <= value <= most:
            parser.error(f"{option_of(name)} must be from {least} to {most}, got {value}")
    if not 0 <= options.average < 1:
        parser.error(f"--average must be from 0 to below 1, got {options.average}")
    if not options.clip > 0:
        parser.error(f"--clip must be above 0, or inf for none, got {options.clip}")
    held_out = options.hold_out or options.validation_share
    if (options.evaluate or options.keep_best) and not held_out:
        parser.error("--evaluate and --keep-best need a text: --hold-out or --validation-share")
    if options.init_from and options.evaluate:
        parser.error("--evaluate measures a model that is trained: without --init-from")
    if options.init_from and Path(options.init_from).resolve() == options.out.resolve():
        parser.error(f"--out {options.out} would be written over: --init-from reads it")
    for name in ("tokenizer", "d_model", "n_layer") if options.init_from else ():
        if (value := getattr(options, name)) != parser.get_default(name):
            parser.error(f"{option_of(name)} {value} is for a new model: --init-from has its own")
    return options


@contextmanager
def in_a_sentence(script: str) -> Iterator[None]:
    """What a user can mend is said without a traceback."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        # What is wrong in all processes is said by the first, what is wrong in one by this one.
        quiet = isinstance(error, ValueError) and os.environ.get("RANK", "0") != "0"
        raise SystemExit(1 if quiet else f"{script}: error: {error}") from error
    except KeyboardInterrupt as error:
        said = "stopped: the same command goes on from the last save, if there is one"
        raise SystemExit(f"{script}: {said}") from error


def main() -> None:
    title, defaults = __doc__.split("\n")[0], argparse.ArgumentDefaultsHelpFormatter
    options = parse_arguments(argparse.ArgumentParser(description=title, formatter_class=defaults))
    with in_a_sentence("train.py"):
        if options.evaluate is None:
            return train(options)
        model = Mamba.from_pretrained(options.evaluate, device=options.device)
        _, texts = read_texts(options, load_tokenizer(model.config, options.evaluate))
        print(f"{options.evaluate}: hold-out {evaluate(model, texts):.4f} nats per token")


if __name__ == "__main__":
    main()
