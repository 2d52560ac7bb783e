"""Plant one-line mistakes in the code, and see whether the tests notice.

    python benchmarks/mutants.py --sample 200 --seed 0                 # an hour on two cores
    python benchmarks/mutants.py --file mamba.py --lines 380-420       # all of some lines

A mutant is the project with one expression changed: another operator, a number beside it, a
condition turned round, a call or a statement left out. It is caught if a test of the files that
belong to its source fails, or does not end in time. Survivors are listed by file and line: each is
a claim that no test makes, code that does nothing, or an equivalent mutant, which computes the
same. Equivalent ones stand in EQUIVALENT with their reason, and do not count.

Each worker has a copy of the project's tracked files; the project itself is not touched.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Before triton and torch are imported: the interpreter where there is no GPU, and a question about
# GPUs that does not spoil them for the children.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Only so that no child has to.
import hypothesis  # noqa: F401
import pytest
import torch._dynamo
import triton  # noqa: F401
from transformers import AutoTokenizer, MambaForCausalLM  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent

# The tests that should notice a mistake in a file.
BELONGING = {
    "mamba.py": (
        "test_mamba.py tests/test_scans.py tests/test_model.py tests/test_stream.py "
        "tests/test_loading.py tests/test_wrapped.py tests/test_export.py tests/test_prompt.py"
    ),
    "generate.py": (
        "tests/test_decoding.py tests/test_prompt.py tests/test_cpu_step.py tests/test_stream.py "
        "tests/test_tokenizers.py tests/test_command_line.py tests/test_properties.py"
    ),
    "triton_scan.py": "tests/test_triton_scan.py tests/test_step_graph.py",
    "examples/drop_in.py": "tests/test_drop_in.py tests/test_examples.py",
    "examples/event_time.py": "tests/test_event_time.py tests/test_examples.py",
    "examples/export.py": "tests/test_export.py tests/test_examples.py",
    "examples/look_inside.py": "tests/test_look_inside.py tests/test_examples.py",
    "examples/recipes.py": "tests/test_recipes.py tests/test_examples.py",
    "examples/train.py": "tests/test_examples.py",
    "examples/trainer.py": "tests/test_examples.py",
}

# (file, the line, the line of the mutant or "*" for all of its mutants): why no test can tell them
# apart.
EQUIVALENT: dict[tuple[str, str, str], str] = {}
EQUIVALENT |= {
    (f"examples/{name}.py", before, before.replace(*change) if change else "*"): reason
    for name, before, change, reason in (
        ("event_time", "loss = F.mse_loss(model(numbers, gaps), level)",
         ("model(numbers, gaps), level", "level, model(numbers, gaps)"), "symmetric"),
        ("event_time", "return (F.mse_loss(model(numbers, gaps), level) / level.var()).item()",
         ("model(numbers, gaps), level", "level, model(numbers, gaps)"), "symmetric"),
        ("event_time", "def __init__(self, kind: str, d_model: int = 16) -> None:",
         None, "the example at another size"),
        ("event_time", "def train(kind: str, steps: int, seqlen: int = 40, batch: int = 64, "
         "seed: int = 0) -> float:", None, "the example at another size"),
        ("event_time", 'parser.add_argument("--steps", type=int, default=600, '
         'help="of training, for each model")', ("600", "601"), "the example at another size"),
        ("event_time", 'parser.add_argument("--seed", type=int, default=0, '
         'help="of the weights and the events")', ("0", "1"), "other events, other weights"),
        ("event_time", "optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, "
         "weight_decay=0.0)", ("3e-3", "1.003"), "the schedule sets it before the first step"),
        ("event_time", "torch.set_num_threads(1)  # tensors as small as these do not gain from "
         "more", None, "speed alone"),
        ("look_inside", 'figure = Figure(figsize=(8, 10.5), dpi=150, layout="constrained")',
         None, "looks"),
        ("look_inside", 'sizes = {"height_ratios": (2, 1, 7), "width_ratios": (1, 0.025)}',
         None, "looks"),
        ("look_inside", "bar.minorticks_off()", None, "looks"),
        ("look_inside", 'middle.plot(norm.numpy(), "o-" if short else "-", color="royalblue", '
         "markersize=3)", None, "looks"),
        ("look_inside", 'middle.spines[["top", "right"]].set_visible(False)', None, "looks"),
        ("look_inside", 'bottom.spines[["top", "right"]].set_visible(False)', None, "looks"),
        ("look_inside", "axis.set_tick_params(length=0)", None, "looks"),
        ("look_inside", "plane = torch.linalg.svd(F.pad(log_ratio, (0, 1)), full_matrices=False).U"
         "  # l may be 1", None, "more zeros beside it, more vectors after the two that are read"),
        ("look_inside", "in_order = log_ratio[torch.atan2(plane[:, 1], plane[:, 0]).argsort()]",
         ("plane[:, 1], plane[:, 0]", "plane[:, 0], plane[:, 1]"), "the other way round"),
        ("look_inside", "rows.append((C.unsqueeze(-1) * weights).sum(-2))", ("sum(-2)", "sum(2)"),
         "the same axis of four"),
        ("recipes", "torch.set_num_threads(1)  # tensors as small as these gain nothing from more",
         None, "speed alone"),
        ("recipes", "ids = ((torch.arange(1201) + torch.randint(6, (16, 1))) % 6 == 5).long()",
         ("+", "-"), "a random phase either way"),
        ("recipes", "model = SequenceClassifier(config, classes=7)", ("7", "8"),
         "a class that is never the answer"),
        ("recipes", 'print(f"   {len(documents)} documents in {len(rows[0])} rows: {loss:.6f}")',
         ("rows[0]", "rows[1]"), "as many of both"),
        ("recipes", "torch.manual_seed(0)", ("0", "1"), "other weights"),
        ("recipes", "for norm, block in zip(self.norms, self.blocks, strict=True):",
         ("True", "False"), "as many of both"),
        ("recipes", "new[:kept] = old.detach()[:kept]", (".detach()", ""), "a Parameter detaches"),
        ("recipes", '(folder / "config.json").write_text(json.dumps(config, indent=2) + "\\n")',
         ("indent=2", "indent=3"), "looks"),
        ("recipes", "loss_of(model, *make(32)).backward()", ("32", "33"), "one more row"),
        ("recipes", "return loss_of(model, *make(1000)).item()", ("1000", "1001"), "one more row"),
        ("recipes", "return [torch.randint(8, (3,)).repeat(8)[:length] for length in lengths]",
         ("repeat(8)", "repeat(9)"), "cut to 24 at most"),
        ("recipes", "config = MambaConfig(d_model=32, vocab_size=8)", ("8", "9"),
         "a token that never comes"),
        ("recipes", "model = nn.Sequential(nn.Embedding(4, 32), block, nn.Linear(32, 4))",
         ("Embedding(4", "Embedding(5"), "a token that never comes"),
        ("recipes", "model = nn.Sequential(nn.Embedding(4, 32), block, nn.Linear(32, 4))",
         ("(32, 4)", "(32, 5)"), "a token that never comes"),
        ("recipes", "loss = fit(model, answer_loss, rows_with_an_end, steps=100)",
         ("100", "101"), "one more step"),
        ("recipes", 'print(f"   SequenceClassifier: {fit(model, answer_loss, rows_with_a_mark, '
         'steps=300):.3f}")', ("300", "301"), "one more step"),
        ("recipes", "fit(model, packed_loss, lambda count: pack(repetitions(count), 48), "
         "steps=150)",
         ("150", "151"), "one more step"),
        ("recipes", "fit(model, packed_loss, lambda count: pack(repetitions(count), 48), "
         "steps=150)",
         ("48", "49"), "rows of one more"),
        ("recipes", "alone = [pack([document], 48) for document in documents]", ("48", "49"),
         "rows of one more"),
        ("recipes", "for rows in (pack(documents, 48), [torch.cat(parts) for parts in zip(*alone, "
         "strict=True)]):", ("48", "49"), "rows of one more"),
        ("recipes", "for rows in (pack(documents, 48), [torch.cat(parts) for parts in zip(*alone, "
         "strict=True)]):", ("True", "False"), "as many of both"),
        ("recipes", "model, documents = Mamba(config), repetitions(1000)", ("1000", "1001"),
         "one more document"),
        ("event_time", "for number, gap in zip(numbers.unbind(1), gaps.unbind(1), strict=True):",
         ("True", "False"), "as many of both"),
        ("drop_in", "u, delta, z = (None if t is None else F.pad(t, (0, 0, 0, 0, 0, 1)) for t in "
         "(u, delta, z))", ("0, 1))", "1, 1))"), "one more row that nobody sees"),
        ("drop_in", "B, C = (at_least_float32(t) if t.shape[1] < groups else t for t in (B, C))",
         ("<", "<="), "the scan casts it too"),
        ("drop_in", "ys, hs = zip(*results, strict=True)", ("True", "False"), "as many of both"),
        ("drop_in", "for A_i, B_i, C_i in zip(A.unbind(1), B, C, strict=True):", ("True", "False"),
         "as many of all"),
        ("drop_in", "if u.ndim != 3 or A.ndim != 2 or len(A) != u.shape[1] or 0 in (*u.shape[1:], "
         "*A.shape):", ("[1:]", "[2:]"), "the first is that of A"),
        ("drop_in", "groups = shape[1] if len(shape) == 4 and shape[1] > 0 else 1", ("> 0", "> 1"),
         "1 is 1"),
        ("drop_in", "h_i, h_last = selective_scan(x * B_i, delta, A_i.unsqueeze(-1), one, one, "
         "**options)", ("unsqueeze(-1)", "unsqueeze(1)"), "the same axis of two"),
        ("drop_in", "if hidden_states.shape[1] == 1 and reset is None:", ("[1]", "[2]"),
         "the same, slower"),
        ("look_inside", "for block, layer in zip(blocks, layers, strict=True):", ("True", "False"),
         "as many of both"),
        ("look_inside", 'inside: dict[str, Tensor], rule: str = "mamba", reset: Tensor | None = '
         "None, at_once: int = 16", None, "memory"),
        ("trainer", "decayed = {id(p) for p in self.model.param_groups(weight_decay=1.0)[0]"
         '["params"]}', ("1.0", "2.0"), "only whether it is 0"),
        ("trainer", 'parser.add_argument("--steps", type=int, default=1000, '
         'help="in all, of 16 x 256 bytes each")', ("1000", "1001"), "one more step"),
        ("trainer", 'parser.add_argument("--save-every", type=int, default=200, '
         'help="steps between checkpoints")', ("200", "201"), "one more step"),
        ("trainer", "options.out, max_steps=options.steps, save_steps=options.save_every, "
         "logging_steps=50,", None, "what only a long training can judge"),
        ("trainer", "per_device_train_batch_size=16, learning_rate=2e-3, weight_decay=0.1, "
         "warmup_steps=50,", None, "what only a long training can judge"),
        ("trainer", "model = TrainerMamba(MambaConfig(256, n_layer=6, vocab_size=256, "
         'tokenizer="bytes"))', None, "what only a long training can judge"),
        ("train", "jumped = (dice < self.jump) | (self.position > last)", ("<", "<="),
         "a die on its edge"),
        ("train", "progress = (step - warmup) / max(1, steps - warmup)", ("max(1", "max(2"),
         "0 / 1 is 0 / 2"),
        ("train", "def chunked_cross_entropy(u: Tensor, weight: Tensor, targets: Tensor, "
         "chunk: int = 2048) -> Tensor:", None, "memory and rounding"),
        ("train", "def evaluate(model: Mamba, texts: list[Tensor], window: int = 4096) -> float:",
         None, "memory"),
        ("train", "tokens = stream(model, ids, max_new_tokens=length, temperature=0.8, seed=0)",
         None, "another sample"),
        ("train", 'sample = sample_text(model, "KING.\\n", 200)', None, "another sample"),
        ("train", "for group in copy.param_groups(weight_decay=1.0):", ("1.0", "2.0"),
         "only whether it is 0"),
        ("train", "model = Mamba(config).to(device)", (".to(device)", ""), "on a CPU"),
        ("train", "torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)",
         (".to(device)", ""), "on a CPU"),
        ("train", "model.param_groups(weight_decay=0.1), lr=options.lr, betas=(0.9, 0.95), "
         "fused=True", ("True", "False"), "speed alone"),
        ("train", "saved = torch.load(checkpoint, map_location=device, weights_only=True)",
         ("True", "False"), "protects from a file of somebody else"),
        ("train", 'progress = tqdm(total=options.steps, initial=step, unit="step", '
         "smoothing=0.05)", None, "looks"),
        ("train", "progress.update()", None, "looks"),
        ("train", "progress.close()", None, "looks"),
        ("train", "losses.append(loss.detach())", (".detach()", ""), "memory"),
        ("train", "**vars(state.detach()),", (".detach()", ""), "detached where it is used"),
        ("train", "out_of_time = options.minutes is not None and seconds > 60 * options.minutes",
         (">", ">="), "the very second"),
        *(
            (name, "sys.path.insert(0, str(Path(__file__).resolve().parent.parent))",
             ("(0", "(1"), "before examples/ or after it, which has none of these names")
            for name in ("drop_in", "event_time", "export", "look_inside", "recipes", "train",
                         "trainer")
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    column: int
    length: int  # of the text that is replaced, in characters of its line
    text: str  # what stands there instead
    function: str  # the name of the function around it, or ""

    def apply(self, source: str) -> str:
        lines = source.splitlines(keepends=True)
        old = lines[self.line - 1]
        lines[self.line - 1] = old[: self.column] + self.text + old[self.column + self.length :]
        return "".join(lines)

    def before_and_after(self, source: str) -> tuple[str, str]:
        return tuple(
            text.splitlines()[self.line - 1].strip() for text in (source, self.apply(source))
        )


# What an operator looks like, and what stands in its place.
SWAPS = {
    ast.Add: "+ -", ast.Sub: "- +", ast.Mult: "* +", ast.Div: "/ *", ast.FloorDiv: "// *",
    ast.Mod: "% +", ast.Pow: "** *", ast.BitOr: "| &", ast.BitAnd: "& |", ast.BitXor: "^ |",
    ast.LShift: "<< >>", ast.RShift: ">> <<", ast.MatMult: "@ *", ast.Lt: "< <=", ast.LtE: "<= <",
    ast.Gt: "> >=", ast.GtE: ">= >", ast.Eq: "== !=", ast.NotEq: "!= ==", ast.And: "and or",
    ast.Or: "or and", ast.In: "in not_in", ast.NotIn: "not_in in", ast.Is: "is is_not",
    ast.IsNot: "is_not is",
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "float32": "bfloat16",
         "True": "False", "zeros": "ones", "ones": "zeros", "amax": "amin", "floor": "ceil",
         "argmax": "argmin", "exp": "exp2", "sum": "mean", "cdiv": "multiple_of"}  # fmt: skip
DROPPABLE = ("clone", "contiguous", "detach", "clamp", "float", "to", "double", "strip", "rstrip")


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    """All mutants of a file. Not touched: annotations, docstrings and the words of errors."""
    tree, lines = ast.parse(source), source.splitlines()
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        for part in ("annotation", "returns", "exc")
        if isinstance(outer := getattr(node, part, None), ast.AST)
        for inner in ast.walk(outer)
    }
    owner = {
        id(inner): node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        for inner in ast.walk(node)
    }

    def text_between(line: int, start: int, stop: int) -> str:
        return lines[line - 1].encode()[start:stop].decode()

    def at(node: ast.AST, line: int, start: int, stop: int, text: str) -> Mutant:
        """Columns of the syntax tree count bytes."""
        column = len(text_between(line, 0, start))
        length = len(text_between(line, start, stop))
        return Mutant(file, line, column, length, text, owner.get(id(node), ""))

    def whole(node: ast.AST, text: str) -> Iterator[Mutant]:
        if node.lineno == node.end_lineno:
            yield at(node, node.lineno, node.col_offset, node.end_col_offset, text)

    def operator(node: ast.AST, left: ast.AST, kind: ast.AST, right: ast.AST) -> Iterator[Mutant]:
        if left.end_lineno != right.lineno or type(kind) not in SWAPS:
            return
        sign, other = (text.replace("_", " ") for text in SWAPS[type(kind)].split())
        line = right.lineno
        gap = text_between(line, left.end_col_offset, right.col_offset)
        if (found := gap.find(sign)) >= 0:
            start = left.end_col_offset + len(gap[:found].encode())
            yield at(node, line, start, start + len(sign), other)

    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.BinOp):
            yield from operator(node, node.left, node.op, node.right)
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from operator(node, left, node.op, right)
        elif isinstance(node, ast.Compare):
            yield from operator(node, node.left, node.ops[0], node.comparators[0])
        elif isinstance(node, ast.UnaryOp):
            start = node.operand.col_offset
            if node.lineno == node.operand.lineno:
                yield at(node, node.lineno, node.col_offset, start, "")
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, bool):
                yield from whole(node, str(not node.value))
            elif isinstance(node.value, (int, float)):
                yield from whole(node, repr(node.value + 1))
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            start = node.end_col_offset - len(node.attr)
            yield at(node, node.end_lineno, start, node.end_col_offset, NAMES[node.attr])
        elif isinstance(node, ast.Name) and node.id in NAMES and isinstance(node.ctx, ast.Load):
            yield from whole(node, NAMES[node.id])
        elif isinstance(node, ast.IfExp):
            yield from whole(node.test, f"not ({ast.unparse(node.test)})")
        elif isinstance(node, ast.If):
            yield from whole(node.test, f"not ({ast.unparse(node.test)})")
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in DROPPABLE:
                if node.func.value.end_lineno == node.end_lineno:
                    start, line = node.func.value.end_col_offset, node.end_lineno
                    yield at(node, line, start, node.end_col_offset, "")
            symmetric = re.search(
                r"(^|\.)(min|max|gcd|equal|minimum|maximum)$", ast.unparse(node.func)
            )
            if len(node.args) > 1 and node.args[0].lineno == node.args[1].end_lineno:
                first, second = map(ast.unparse, node.args[:2])
                start, stop = node.args[0].col_offset, node.args[1].end_col_offset
                if first != second and not (symmetric or isinstance(node.args[1], ast.Starred)):
                    yield at(node, node.args[0].lineno, start, stop, f"{second}, {first}")
        elif isinstance(node, (ast.AugAssign, ast.Expr)):
            is_words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not is_words and not isinstance(getattr(node, "value", None), ast.Yield):
                yield from whole(node, "pass")


def tests_of(mutant: Mutant) -> list[str]:
    """The files that belong to its source, those first that name its function most often."""
    pattern = re.compile(rf"\b{re.escape(mutant.function or mutant.file)}\b")
    files = BELONGING[mutant.file].split()
    return sorted(files, key=lambda file: -len(pattern.findall((ROOT / file).read_text())))


def copy_of_the_project(folder: Path) -> Path:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def judge(mutant: Mutant, folder: Path, limit: int) -> None:
    """In a child: plants the mutant, runs its tests, and ends with what pytest ends with."""
    os.setsid()  # so that what the tests start ends with them
    signal.alarm(limit)
    os.chdir(folder)
    os.environ.pop("CI", None)  # what is not installed here is skipped
    sys.path.insert(0, str(folder))
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    with open("output.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    path = folder / mutant.file
    path.write_text(mutant.apply(path.read_text()))
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", *tests_of(mutant)])
    sys.stdout.flush()
    os._exit(int(status))


def verdicts(mutants: list[Mutant], options: argparse.Namespace) -> Iterator[tuple[Mutant, str]]:
    """Each mutant with "caught", "time" or "survived", as they end.

    This process has imported what takes long and nothing of the project; its children begin there.
    """
    waiting, running = list(mutants), {}
    with tempfile.TemporaryDirectory() as scratch:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                mutant = waiting.pop(0)
                folder = copy_of_the_project(Path(tempfile.mkdtemp(dir=scratch)))
                if (child := os.fork()) == 0:
                    judge(mutant, folder, options.limit)
                running[child] = mutant, folder
            child, status = os.wait()
            mutant, folder = running.pop(child)
            try:
                os.killpg(child, signal.SIGKILL)
            except ProcessLookupError:
                pass
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, 1, 2, -signal.SIGALRM):  # a crash is noticed too, but is named
                print((folder / "output.txt").read_text()[-2000:], file=sys.stderr)
            shutil.rmtree(folder)
            yield mutant, {0: "survived", -signal.SIGALRM: "time"}.get(code, "caught")


def chosen(options: argparse.Namespace) -> list[Mutant]:
    files = [options.file] if options.file else list(BELONGING)
    mutants = []
    for file in files:
        source = (ROOT / file).read_text()
        for mutant in sorted(
            set(mutants_of(file, source)), key=lambda m: (m.line, m.column, m.text)
        ):
            try:
                compile(mutant.apply(source), file, "exec")
            except SyntaxError:
                continue
            before, after = mutant.before_and_after(source)
            if not {(file, before, after), (file, before, "*")} & EQUIVALENT.keys():
                mutants.append(mutant)
    if options.lines:
        first, last = map(int, options.lines.split("-"))
        mutants = [mutant for mutant in mutants if first <= mutant.line <= last]
    if len(mutants) > options.sample:
        mutants = random.Random(options.seed).sample(mutants, options.sample)
    return mutants


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=200, help="how many, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", choices=list(BELONGING), help="mutants of this file alone")
    parser.add_argument("--lines", metavar="FIRST-LAST", help="and of these lines alone")
    parser.add_argument("--limit", type=int, default=400, help="seconds for the tests of one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--verbose", action="store_true", help="name those that are caught too")
    options = parser.parse_args()
    mutants, begun = chosen(options), time.perf_counter()
    counts = dict.fromkeys(("caught", "time", "survived"), 0)
    for mutant, verdict in verdicts(mutants, options):
        counts[verdict] += 1
        before, after = mutant.before_and_after((ROOT / mutant.file).read_text())
        if verdict == "survived" or options.verbose:
            word = verdict.upper()
            print(f"{word} {mutant.file}:{mutant.line}\n  - {before}\n  + {after}", flush=True)
        done, seconds = sum(counts.values()), time.perf_counter() - begun
        print(f"{done}/{len(mutants)} {verdict}, after {seconds:.0f} s", file=sys.stderr)
    known = len(mutants) - counts["survived"]
    print(f"{known} of {len(mutants)} caught ({counts['time']} by time), seed {options.seed}")


if __name__ == "__main__":
    main()
