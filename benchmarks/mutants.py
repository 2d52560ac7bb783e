"""Plant one-line mistakes in the code, and see whether the tests notice.

    python benchmarks/mutants.py --sample 200 --seed 0                 # an hour on two cores
    python benchmarks/mutants.py --file mamba.py --lines 380-420       # all of some lines

A mutant is the project with one expression changed: another operator, a number beside it, a
condition turned round, a call or a statement left out. It is caught if a test of the files that
belong to its source fails, or does not end in time. Survivors are listed by file and line: each is
a claim that no test makes, code that does nothing, or an equivalent mutant, which computes the
same. Equivalent ones stand in equivalent_mutants.txt with their reason, and do not count.

Each worker has a copy of the project's tracked files; the project itself is not touched.
"""

from __future__ import annotations

import argparse
import ast
import itertools
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
        "test_mamba.py tests/test_model.py tests/test_stream.py tests/test_loading.py "
        "tests/test_wrapped.py tests/test_prompt.py tests/test_residual_block.py"
    ),
    "generate.py": (
        "tests/test_decoding.py tests/test_prompt.py tests/test_cpu_step.py tests/test_stream.py "
        "tests/test_sampler.py tests/test_tokenizers.py tests/test_command_line.py"
    ),
    "triton_scan.py": (
        "tests/test_triton_scan.py tests/test_step_graph.py tests/test_residual_block.py"
    ),
    "examples/drop_in.py": "tests/test_drop_in.py tests/test_examples.py",
    "examples/event_time.py": "tests/test_event_time.py tests/test_examples.py",
    "examples/export.py": "tests/test_wrapped.py tests/test_examples.py",
    "examples/induction_heads.py": "tests/test_tasks.py",
    "examples/look_inside.py": "tests/test_look_inside.py tests/test_examples.py",
    "examples/recall.py": "tests/test_tasks.py",
    "examples/recipes.py": "tests/test_recipes.py tests/test_examples.py",
    "examples/selective_copying.py": "tests/test_tasks.py",
    "examples/texts.py": "tests/test_examples.py",
    "examples/train.py": "tests/test_examples.py",
    "examples/chunked_loss.py": "tests/test_examples.py",
    "examples/trainer.py": "tests/test_examples.py",
    "checkpoints/shakespeare/prepare.py": "tests/test_shipped_texts.py",
}

# Keyword arguments, or keys of a dictionary, that are no part of what is computed: the speed of a
# kernel, and lengths that are equal by construction.
UNJUDGED = ("num_warps", "num_stages", "eviction_policy", "launch_pdl", "overlap",
            "strict")  # fmt: skip

# Whole kinds of equivalent mutants: file, function, what the line has and its mutant has not.
KINDS = [
    # Of tiles that are valid the fastest is chosen. That they are valid is tested.
    ("triton_scan.py", "vector_tile", ""),
    ("triton_scan.py", "matrix_tile", ""),
    # Offsets beyond 32 bits: only a GPU with 45 GB free has a test.
    ("triton_scan.py", "", ".to(tl.int64)"),
    # A kernel that starts while the last one runs, which GPUs from Hopper on can.
    ("triton_scan.py", "wait_for_the_kernel_before", "gdc_"),
    ("triton_scan.py", "overlap_options", ""),
]


def equivalent_mutants() -> set[tuple[str, str, str]]:
    """(file, line, line of the mutant, or "*" for all of them)."""
    found, file, line = set(), "", ""
    for text in (ROOT / "benchmarks" / "equivalent_mutants.txt").read_text().splitlines()[2:]:
        if text.startswith("== "):
            file = text[3:]
        elif text == "    *":
            found.add((file, line, "*"))
        elif text.startswith("    "):
            old, _, new = text[4:].partition(" =>")
            found.add((file, line, line.replace(old, new.removeprefix(" "), 1).strip()))
        elif text and not text.startswith("# "):
            line = text
    return found


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
    for node in ast.walk(tree):
        named = [(getattr(node, "arg", None), node)]
        if isinstance(node, ast.Dict):
            keys = [getattr(key, "value", None) for key in node.keys]
            named = list(zip(keys, node.values, strict=True))
        skipped |= {
            id(inner) for name, part in named if name in UNJUDGED for inner in ast.walk(part)
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
                r"(^|\.)(min|max|gcd|equal|minimum|maximum|mul|addcmul_|transpose|wants_gradient)$",
                ast.unparse(node.func),
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


def compiles(mutant: Mutant, source: str) -> bool:
    try:
        compile(mutant.apply(source), mutant.file, "exec")
    except SyntaxError:
        return False
    return True


def is_of_a_kind(mutant: Mutant, before: str, after: str) -> bool:
    return any(
        mutant.file == file
        and function in ("", mutant.function)
        and (not text or before.count(text) > after.count(text))
        for file, function, text in KINDS
    )


def chosen(options: argparse.Namespace) -> list[Mutant]:
    files, equivalent = [options.file] if options.file else list(BELONGING), equivalent_mutants()
    sources = {file: (ROOT / file).read_text() for file in files}
    mutants = sorted(
        {mutant for file, source in sources.items() for mutant in mutants_of(file, source)},
        key=lambda mutant: (mutant.file, mutant.line, mutant.column, mutant.text),
    )
    if options.lines:
        first, last = map(int, options.lines.split("-"))
        mutants = [mutant for mutant in mutants if first <= mutant.line <= last]

    def counts(mutant: Mutant) -> bool:
        before, after = mutant.before_and_after(sources[mutant.file])
        names = {(mutant.file, before, after), (mutant.file, before, "*")}
        return (
            not names & equivalent
            and not is_of_a_kind(mutant, before, after)
            and compiles(mutant, sources[mutant.file])
        )

    random.Random(options.seed).shuffle(mutants)
    return list(itertools.islice(filter(counts, mutants), options.sample))


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
