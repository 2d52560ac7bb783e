"""The scripts in examples/, the model that one of them made, and train.py and trainer.py."""

import argparse
import contextlib
import importlib
import itertools
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import texts
import torch
import torch.nn.functional as F
import train
from chunked_loss import chunked_cross_entropy
from safetensors.torch import load_file
from test_look_inside import Largest
from test_tokenizers import of_size, trained
from torch import Tensor

import generate
from mamba import Mamba, MambaConfig
from test_mamba import assert_all_close, assert_close, error_of, gradients_of, random_model

ROOT = Path(__file__).parent.parent

# Macbeth, act 5, scene 5: a hold-out of the shipped model.
VERSE = b"""
Tomorrow, and tomorrow, and tomorrow,
Creeps in this petty pace from day to day,
To the last syllable of recorded time;
And all our yesterdays have lighted fools
The way to dusty death. Out, out, brief candle!
"""


PIECES = {"chunked_loss.py", "recorded.py", "texts.py"}  # to be copied, not run
SCRIPTS = sorted({path.name for path in (ROOT / "examples").glob("*.py")} - PIECES)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_runs_from_a_bare_clone(name, monkeypatch, capsys, tmp_path):
    """And answers --help with its defaults. Imported, it leaves the path alone."""
    if name == "trainer.py":
        pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    clone, source = tmp_path / "clone", (ROOT / "examples" / name).read_text()
    shutil.copytree(ROOT / "examples", clone / "examples")
    for module in ("mamba", "generate", "triton_scan"):
        python = (ROOT / f"{module}.py").read_text()
        (clone / f"{module}.py").write_text(f"{python}\nFROM_THE_CLONE = True\n")
        monkeypatch.setitem(sys.modules, module, sys.modules.get(module))  # to be put back
        del sys.modules[module]
    # As `python examples/name --help` begins: its own folder in front.
    others = [path for path in sys.path if path and not Path(path, "mamba.py").exists()]
    path = [str(clone / "examples"), *others]
    monkeypatch.setattr(sys, "path", path.copy())
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.chdir(tmp_path)
    with contextlib.nullcontext() if name == "drop_in.py" else pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(clone / "examples" / name), run_name="__main__")
    assert sys.modules["mamba"].FROM_THE_CLONE
    printed = capsys.readouterr().out
    assert source.split("\n")[0].removeprefix('"""') in " ".join(printed.split())
    listed = printed.partition("\noptions:\n")[2]
    assert len(re.findall(r"^  --[\w-]+", listed, re.MULTILINE)) == listed.count("(default:")
    assert [*tmp_path.iterdir()] == [clone]
    monkeypatch.setattr(sys, "path", path.copy())
    runpy.run_path(str(clone / "examples" / name), run_name="imported")
    assert sys.path == path


@torch.no_grad()
def nats(model: Mamba, text: bytes) -> float:
    """The loss of all bytes but the first, each text read in one piece."""
    ids = torch.tensor([list(text)])
    return F.cross_entropy(model(ids[:, :-1])[0].float(), ids[0, 1:], reduction="sum").item()


def test_the_shipped_model_predicts_verse_that_it_has_not_read():
    model = Mamba.from_pretrained(ROOT / "checkpoints" / "shakespeare")
    assert nats(model, VERSE) < 1.8 * len(VERSE)
    assert nats(model, VERSE[::-1]) > 3 * len(VERSE)  # and nothing that is no English


def test_the_shipped_model_says_a_name_again_that_it_has_never_read():
    """As who speaks, and in small letters what it has read in capitals."""
    model = Mamba.from_pretrained(ROOT / "checkpoints" / "shakespeare")
    for name in ("GRUMBOL", "TAZIRA", "XIVOPUK"):
        talk, costs = "", []
        for more, said in (
            ("\n\n", name), (".\nWho's there?\n\nFIRST LORD.\nA friend.\n\n", name),
            (".\nStand!\n\nFIRST LORD.\nGood ", name.capitalize()),
        ):  # fmt: skip
            before = nats(model, (talk + more).encode())
            talk += more + said
            costs.append(nats(model, talk.encode()) - before)
        new, again, small = costs
        assert new > 15 and max(again, small) < new / 3, (name, costs)


def test_documents_stand_one_after_another_and_each_starts_at_the_end_of_the_last(tmp_path):
    """With files and separators; in bytes, and in tokens of a tokenizer with an end token."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"one|two||")
    second.write_bytes("drei…".encode())
    for separator, whole, starts in (
        ("|", "one\n\ntwo\n\ndrei…", [4, 9]), (None, "one|two||\n\ndrei…", [10]),
    ):  # fmt: skip
        ids, reset = texts.read_text([first, second], generate.ByteTokenizer(), separator)
        assert bytes(ids.tolist()).decode() == whole
        assert reset.nonzero().flatten().tolist() == starts
    two_ends = SimpleNamespace(eos_token_ids=[7, 8], encode=lambda text: [len(text)])
    assert texts.read_text([first], two_ends, "|")[0].tolist() == [3, 7, 3], "of two ends the first"
    for packed in (False, True):  # what is measured has documents if what is trained on has
        options = argparse.Namespace(
            data=[first, second], out=tmp_path, hold_out=["a"], separator="|", packed=packed,
            validation_share=0.0, evaluate_window=0,
        )  # fmt: skip
        _, [(_, reset)] = texts.read_texts(options, generate.ByteTokenizer())
        assert reset.nonzero().flatten().tolist() == ([4] if packed else [])
    first.write_bytes(b"ab")
    options.separator = None
    _, [(ids, _)] = texts.read_texts(options, generate.ByteTokenizer())
    assert bytes(ids.tolist()) == b"ab", "one to read and one to predict are enough"
    first.write_bytes(b"one|two||")
    made = trained("<|endoftext|>")
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = generate.FileTokenizer(tmp_path / "tokenizer.json")
    ids, reset = texts.read_text([first, second], tokenizer, "|")
    end = made.token_to_id("<|endoftext|>")
    one, two, three = (made.encode(text).ids for text in ("one", "two", "drei…"))
    assert ids.tolist() == [*one, end, *two, end, *three]
    assert torch.equal(reset, ids == end)


def test_a_folder_is_each_of_its_files_once_but_not_what_is_hidden_or_written_by_the_run(run):
    for folder in ("sub/.git", "out"):
        Path(folder).mkdir(parents=True)
        Path(folder, "text").write_bytes(VERSE)
    Path("sub/more").write_bytes(VERSE)
    Path("empty.txt").unlink()
    named = f"read.txt {Path('read.txt').absolute()} sub/../read.txt"
    run(f"--data . {named} --steps 1 --out sub/../out")
    assert bytes(run.text.tolist()) == b"\n\n".join([VERSE.upper(), VERSE, VERSE])


def test_training_windows_read_on_where_they_stopped_and_one_row_in_eight_jumps():
    text = torch.arange(256, dtype=torch.uint8).repeat(999)
    windows, dice = texts.Windows((text, text == 7), 400, seqlen=10), torch.Generator()
    before, _, jumped = windows.next(dice)
    assert jumped.all(), "the first windows start from the zero state"
    jumps = 0
    for _ in range(50):
        ids, reset, jumped = windows.next(dice)
        assert ids.shape == (400, 11) and (ids.diff(dim=1) % 256 == 1).all()
        assert (ids[~jumped, 0] == before[~jumped, -1]).all()
        assert torch.equal(reset, ids[:, :-1] == 7)
        before, jumps = ids, jumps + jumped.sum().item()
    assert 0.118 < jumps / (50 * 400) < 0.132
    shortest = texts.Windows((text[:11], text[:11] == 7), 2, seqlen=10)
    assert [shortest.next(dice)[0].tolist() for _ in range(3)] == [[[*range(11)]] * 2] * 3
    longer = texts.Windows((text[:12], text[:12] == 7), 40, seqlen=10, jump=1.0)
    assert longer.next(dice)[0][:, 0].unique().tolist() == [0, 1], "the last place too"
    on = texts.Windows((text[:4], text[:4] == 7), 40, seqlen=1, jump=0.0)
    said = torch.cat([on.next(dice)[0][:, 1] for _ in range(5)])
    assert said.unique().tolist() == [1, 2, 3], "up to the last token and no further"


def cross_entropy(u: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(u @ weight.T, targets)


@pytest.mark.parametrize("tokens, chunk", [(1, 4), (23, 5), (2, 1)])
def test_the_loss_in_chunks_is_the_loss_and_never_holds_all_logits(tokens, chunk):
    """Also where the head is the embedding, and where some gradient arrives that is not 1."""
    # Logits up to about 30: some tokens are certain, and their p - 1 is all rounding if p is.
    u, weight, targets = 3 * torch.randn(tokens, 8), 3 * torch.randn(37, 8), torch.arange(tokens)

    def judge(loss_of, dtype) -> dict[str, Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (u, weight)]
        plain = loss_of(*leaves, targets)
        tied = loss_of(leaves[0] + leaves[1][targets].tanh(), leaves[1], targets)
        tied = tied + leaves[1].square().mean()
        of_plain, of_tied = (torch.autograd.grad(0.3 * loss, leaves) for loss in (plain, tied))
        return dict(enumerate((plain, tied, *of_plain, *of_tied)))

    with Largest() as largest:
        found = judge(partial(chunked_cross_entropy, chunk=chunk), torch.float32)
    assert largest.elements == max(37 * 8, 37 * min(chunk, tokens))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert_all_close(found, judge(cross_entropy, torch.float64), 1e-6)


@pytest.mark.parametrize("autocast", [True, False])
def test_the_loss_in_chunks_of_short_floats_rounds_the_gradient_of_the_logits_only(autocast):
    # Small integers: bfloat16 holds them and their products. So the loss has no excuse, and the
    # gradients that of one rounding, although tokens are certain and p - 1 small.
    weight, targets = torch.randint(-1, 2, (64, 24)).float(), torch.randint(64, (130,))

    def judge(loss_of, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (weight[targets], weight)]  # p is near 1
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype != torch.float64):
            loss = loss_of(*leaves, targets)
        return [loss, *torch.autograd.grad(loss, leaves)]

    dtype = torch.float32 if autocast else torch.bfloat16
    found = judge(partial(chunked_cross_entropy, chunk=16), dtype)
    exact = judge(cross_entropy, torch.float64)
    assert [tensor.dtype for tensor in found] == [torch.float32, dtype, dtype]
    errors = [*map(error_of, found, exact)]
    assert errors[0] < 1e-5  # of 0.003: float32 has no more
    assert all(1e-4 < error < (4e-3 if autocast else 6e-3) for error in errors[1:]), errors


def test_the_commands_of_the_card_make_the_shipped_model_and_further_training_is_milder(
    monkeypatch,
):
    made, card = [], (ROOT / "checkpoints/shakespeare/README.md").read_text()
    monkeypatch.setattr(train, "train", lambda options: made.append(vars(options)))
    commands = re.findall(r"^python examples/(.* --out .*)$", card.replace("\\\n", ""), re.M)
    further = ["train.py --data text", "train.py --data text --init-from mine"]
    for command in (*commands, *further):
        monkeypatch.setattr(sys, "argv", command.split())
        train.main()
    config = Mamba.from_pretrained(ROOT / "checkpoints" / "shakespeare").config
    each = {
        "d_model": config.d_model, "n_layer": config.n_layer, "batch": 32, "seed": 0, "clip": 1.0,
        "jump": 0.125, "accumulate": 1, "validation_share": 0.0, "evaluate_window": 0,
        "tokenizer": "bytes",
    }  # fmt: skip
    on_gpu = each | {
        "seqlen": 1024, "weight_decay": 0.3, "average": 0.998, "packed": False, "separator": None,
        "graph": True, "hold_out": ["as_you_like_it_gut.txt", "hamlet_gut.txt"],
    }  # fmt: skip
    plays = on_gpu | {"dropout": 0.25, "depth_dropout": 0.2, "keep_best": True}
    wanted = [
        on_gpu | {
            "data": ["drills", "validation"], "steps": 2000, "lr": 4e-3, "warmup": 100,
            "evaluate_every": 2000, "init_from": None, "dropout": 0.0, "depth_dropout": 0.0,
            "keep_best": False,
        },
        plays | {
            "data": ["plays", "renamed", "bible", "drills", "validation"], "steps": 23_000,
            "lr": 4e-3, "warmup": 100, "evaluate_every": 1500, "init_from": str(made[0]["out"]),
        },
        plays | {
            "data": ["plays", "renamed/*_[01].txt", "validation"], "steps": 800, "lr": 3e-4,
            "warmup": 50, "evaluate_every": 200, "init_from": str(made[1]["out"]),
        },
        each | {
            "data": ["plays", "renamed/*_[01].txt"], "seqlen": 256, "steps": 40, "lr": 5e-5,
            "warmup": 10, "evaluate_every": 40, "init_from": str(made[2]["out"]), "packed": True,
            "separator": r"$'\n\n'", "weight_decay": 0.0, "average": 0.9, "dropout": 0.1,
            "depth_dropout": 0.0, "keep_best": False, "graph": False, "hold_out": [],
            "device": "cpu",
        },
    ]  # fmt: skip
    assert len(made) == len(wanted) + len(further)
    for options, expected in zip(made, wanted, strict=False):
        data = [Path("texts") / name for name in expected["data"]]
        assert options.items() >= (expected | {"data": data}).items()
    names = "dropout", "depth_dropout", "weight_decay", "average"
    found = [[options[name] for name in names] for options in made[4:]]
    assert found == [[0.1, 0.1, 1.0, 0.0], [0.0, 0.0, 0.1, 0.0]]


def test_evaluation_reads_each_text_once_and_forgets_only_where_it_says():
    model, cut = random_model(vocab_size=256), [0, 9, 10, 23]
    ids = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (VERSE[:30], b"no")]
    resets = [torch.zeros(len(each), dtype=torch.bool) for each in ids]
    expected = [nats(model, VERSE[:30]), nats(model, b"no")]
    found = train.evaluate(model, [*zip(ids, resets, strict=True)], window=7)
    assert found == pytest.approx(sum(expected) / 30, rel=1e-5)
    resets[0][cut] = True
    pieces = (VERSE[a : b + 1] for a, b in itertools.pairwise([*cut, 29]))
    found = train.evaluate(model, [(ids[0], resets[0])], window=7)
    assert found == pytest.approx(sum(nats(model, piece) for piece in pieces) / 29, rel=1e-5)
    rounded = nats(model.bfloat16(), b"no")
    assert train.evaluate(model, [(ids[1], resets[1])]) == pytest.approx(rounded, rel=1e-6)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """A training of few steps in a folder of its own, without pictures; its windows are listed."""

    class Windows(train.Windows):
        def next(self, dice):
            run.text = self.ids
            run.windows.append(super().next(dice))
            return run.windows[-1]

    def run(options: str) -> str:
        run.windows = []
        start = """train.py --data read.txt kept.txt more.txt --hold-out kept.txt --device cpu
            --d-model 8 --n-layer 2 --batch 6 --seqlen 8 --warmup 2 --lr 0.01 --steps 6 --seed 5
            --dropout 0 --depth-dropout 0 --evaluate-every 2 --average 0.998"""
        monkeypatch.setattr(sys, "argv", [*start.split(), *options.split()])
        with warnings.catch_warnings(record=True) as run.warned:
            train.main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    texts = {"read": VERSE, "kept": VERSE[::-1], "more": VERSE.upper(), "empty": b"\n"}
    for name, text in texts.items():
        Path(f"{name}.txt").write_bytes(text)
    monkeypatch.setattr(train, "Windows", Windows)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    return run


def start(run, options: str, rank: int = 0, world: int = 1, port: int = 0):
    """`run` in a process of its own, which torchrun might have started."""
    if torch.cuda.is_available():
        pytest.skip("what knows a GPU cannot be forked: run this test with CUDA_VISIBLE_DEVICES=")

    def body() -> None:
        if world > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # tqdm's own lock is shared with the parent: killed while it is held, all others would wait.
        train.tqdm.set_lock(threading.RLock())
        run(options)

    process = multiprocessing.get_context("fork").Process(target=body, daemon=True)
    process.start()
    return process


def only_once(save):
    """torch.save that is interrupted in the middle, but for the first time."""
    calls = itertools.count()

    def cut(what, path):
        if next(calls) == 0:
            return save(what, path)
        path.write_bytes(b"the first half")
        raise KeyboardInterrupt

    return cut


def losses(folder: str) -> Tensor:
    """What a run has left: (steps, 2), NaN where nothing was measured."""
    title, *lines = Path(folder, "loss.csv").read_text().splitlines()
    assert title == "step,train,hold_out"
    assert [int(line.split(",")[0]) for line in lines] == [*range(1, len(lines) + 1)]
    return torch.tensor([[float(x or "nan") for x in line.split(",")[1:]] for line in lines])


@pytest.mark.parametrize("packed", [False, True])
def test_training_is_this_loop(run, packed):
    options = "--separator , --average 0.5 --evaluate-every 4"
    printed = run(f"--out whole {options} {'--packed' * packed}")
    saved = torch.load("whole/training.pt")

    torch.manual_seed(5)  # the same by hand
    model = Mamba(MambaConfig(8, n_layer=2, vocab_size=256, tokenizer="bytes"))
    optimizer = torch.optim.AdamW(model.param_groups(weight_decay=1.0), betas=(0.9, 0.95))
    state, means, average = model.init_state(6), [], {}
    factors = [0.5, 1, *(0.01 + 0.99 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4))]
    text = VERSE.upper() + b"\n\n" + VERSE  # hold-outs apart, in the order of the names
    assert bytes(run.text.tolist()) == text.replace(b",", b"\n\n")
    assert 0 < sum(jumped.sum() for *_, jumped in run.windows[1:]) < 30
    for factor, (ids, reset, jumped) in zip(factors, run.windows, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor
        state = state.detach().map(lambda t, jumped=jumped: t.masked_fill(jumped[:, None, None], 0))
        logits, state = model(ids[:, :-1], state, reset=reset if packed else None)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        means.append(loss.item())
        for name, weight in model.named_parameters():
            newest = max(0.5, 3 / (len(means) + 3))
            average[name] = weight.detach().lerp(average.get(name, weight), 1 - newest).clone()
    assert_all_close(saved["weights"], model.state_dict(), 1e-4)
    found = {name: of["average"] for name, of in saved["moments"]["state"].items()}
    assert_all_close(found, average, 1e-4)
    assert_close("state", saved["h"], state.h, 1e-4)
    assert losses("whole")[:, 0].tolist() == pytest.approx(means, abs=1e-5)
    said = re.findall(r"^(step .) .* train (\S+)  hold-out (\S+) nats.*\n\n.", printed, re.M)
    assert [step for step, *_ in said] == ["step 4", "step 6"]
    found = [float(number) for _, *numbers in said for number in numbers]
    expected = [sum(means[:4]) / 4, losses("whole")[3, 1].item()]
    expected += [sum(means[4:]) / 2, losses("whole")[5, 1].item()]
    assert found == pytest.approx(expected, abs=1e-4)
    assert "matplotlib is not installed" in str(run.warned[0].message)


def test_a_run_that_is_killed_at_any_moment_goes_on_and_ends_with_the_same_bits(run, monkeypatch):
    """With dropout. Killed some time after a checkpoint, and while one is written."""
    run("--out whole --dropout 0.3")
    file, exits = Path("killed/training.pt"), []
    for delay in (0, 0.03, 0.1):
        before = file.stat().st_mtime_ns if file.exists() else 0
        process = start(run, "--out killed --dropout 0.3")
        deadline = time.monotonic() + 60
        while (
            process.is_alive()
            and time.monotonic() < deadline
            and (not file.exists() or file.stat().st_mtime_ns == before)
        ):
            process.join(0.001)
        time.sleep(delay)
        process.kill()
        process.join()
        exits.append(process.exitcode)
    assert -signal.SIGKILL in exits and {*exits} <= {-signal.SIGKILL, 0}
    run("--out killed --dropout 0.3")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", only_once(torch.save))
        with pytest.raises(SystemExit, match=r"train\.py: stopped: the same command goes on from"):
            run("--out new/cut --dropout 0.3")
    before = torch.load("new/cut/training.pt")["seconds"]
    assert "new/cut/training.pt: going on after step 2\n" in run("--out new/cut --dropout 0.3")
    assert torch.load("new/cut/training.pt")["seconds"] > before > 0
    for name in ("model.safetensors", "config.json", "loss.csv"):
        whole = Path("whole", name).read_bytes()
        found = [Path(folder, name).read_bytes() for folder in ("killed", "new/cut")]
        assert found == [whole] * 2, name
    for name, before, value in (
        ("lr", "0.01", "0.02"), ("steps", "6", "7"), ("average", "0.998", "0.0"), ("seed", "5", "6")
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=f"begun with {name} = {before}, not {value}: delete"):
            run(f"--out new/cut --dropout 0.3 --{name} {value}")
    Path("more.txt").write_bytes(VERSE.swapcase())
    with pytest.raises(SystemExit, match=r"begun with texts = 424 tokens \w+, .*, not 424 tokens "):
        run("--out new/cut --dropout 0.3")
    Path("more.txt").write_bytes(VERSE.upper())
    Path("kept.txt").write_bytes(VERSE)
    with pytest.raises(SystemExit, match="begun with texts"):
        run("--out new/cut --dropout 0.3")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_end_where_one_does_and_take_turns_with_it(run, how, monkeypatch):
    """Killed after two steps, they go on, or one goes on alone: weights, moments and state are
    whole in the file. A process takes its rows in three parts."""
    run("--out one --packed")

    def run_both() -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = f"--out two --packed --accumulate 3 --parallel {how}"
        first, second = (start(run, options, rank, 2, port) for rank in range(2))
        first.join(60)
        second.join(0 if first.exitcode else 60)
        second.kill()
        return [first.exitcode, second.exitcode]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", only_once(torch.save))
        assert run_both()[0] == 1
    shutil.copytree("two", "alone")
    assert run_both() == [0, 0]
    assert "going on after step 2" in run("--out alone --packed")
    expected = torch.load("one/training.pt")
    for folder in ("two", "alone"):
        assert_close("losses", losses(folder)[:, 0], losses("one")[:, 0], 1e-6)
        saved = torch.load(f"{folder}/training.pt")
        assert_all_close(saved["weights"], expected["weights"], 1e-4)
        both = (each["moments"]["state"].items() for each in (saved, expected))
        assert_all_close(*({name: of["average"] for name, of in each} for each in both), 1e-4)
        assert_close("state", saved["h"], expected["h"], 1e-4)
        assert Path(folder, "model.safetensors").exists()


@pytest.mark.gpu(needed=True)
def test_a_recorded_step_is_the_step_and_a_run_on_a_gpu_goes_on(run, monkeypatch):
    """With the same dropout, within the rounding of bfloat16."""
    gpu = "--device cuda --dropout 0.3 --packed --steps 10 --accumulate 2"
    run(f"--out plain {gpu}")
    run(f"--out graph {gpu} --graph")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", only_once(torch.save))
        with pytest.raises(SystemExit, match="stopped"):
            run(f"--out cut {gpu} --graph")
    assert "going on after step 2" in run(f"--out cut {gpu} --graph")
    for folder in ("graph", "cut"):
        assert_close(folder, losses(folder)[:, 0], losses("plain")[:, 0], 1e-3)


def test_a_sample_that_a_terminal_cannot_print_costs_nothing(run, monkeypatch):
    with monkeypatch.context() as patch, open("printed", "w", encoding="ascii") as file:
        patch.setattr(sys, "stdout", file)
        run("--out out --prompt ü")
    assert "step 6" in Path("printed").read_text() and Path("out/training.pt").exists()


def test_packed_documents_have_the_losses_and_gradients_of_documents_read_alone(run):
    """The first moments of Adam after one step are a tenth of the gradient."""
    run("--out packed --packed --separator , --seqlen 80 --steps 1 --clip 1e9")
    ids, reset, _ = run.windows[0]
    torch.manual_seed(5)
    model, total = Mamba(MambaConfig(8, n_layer=2, vocab_size=256)), 0
    assert reset.sum() > 6
    for row, forget in zip(ids, reset, strict=True):
        starts = {0, *forget.nonzero().flatten().tolist()}
        for a, b in itertools.pairwise([*sorted(starts), 80]):
            logits = model(row[None, a:b])[0]
            total = total + F.cross_entropy(logits, row[a + 1 : b + 1], reduction="sum")
    loss = total / (6 * 80)
    assert losses("packed")[0, 0].item() == pytest.approx(loss.item(), rel=1e-5)
    moments = torch.load("packed/training.pt")["moments"]["state"]
    expected = gradients_of(loss, model)
    found = {f"gradient of {name}": 10 * each["exp_avg"] for name, each in moments.items()}
    assert_all_close(found, expected, 1e-4)


def test_the_end_of_a_text_is_measured_in_windows_from_the_zero_state_and_losses_are_drawn(
    run, monkeypatch
):
    """As nanoGPT splits and measures tinyshakespeare, but all of it and not a sample."""
    pytest.importorskip("matplotlib")
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    share = "--hold-out --validation-share 0.1 --evaluate-window 9 --data read.txt"
    printed = run(f"--out out --jump 1 --steps 2 {share}")
    assert all(jumped.all() for *_, jumped in run.windows)
    border = int(len(VERSE) * 0.9)
    assert bytes(run.text.tolist()) == VERSE[:border]
    rest, model = VERSE[border:], Mamba.from_pretrained("out")
    pieces = [rest[i : i + 10] for i in range(0, len(rest) - 1, 9)]
    loss = sum(nats(model, piece) for piece in pieces) / (len(rest) - 1)
    measured = losses("out")[1, 1].item()
    assert measured == pytest.approx(loss, rel=1e-5)
    assert (
        f"wrote out: step 2, hold-out {measured:.4f} (at best {measured:.4f}, step 2)\n" in printed
    )
    assert run(f"--evaluate out {share}") == f"out: hold-out {measured:.4f} nats per token\n"
    assert Path("out/loss.png").stat().st_size > 10_000 and not run.warned


def test_words_are_learnt_with_the_tokenizer_of_a_model_and_further_from_that_model(run):
    """And generate.py finds the tokenizer, and what ends a text, beside the weights."""
    random_model(vocab_size=400).save_pretrained("theirs")
    trained().save("theirs/tokenizer.json")
    run("--out words --tokenizer theirs --packed --hold-out")
    model = Mamba.from_pretrained("words")
    tokenizer = generate.load_tokenizer(model.config, "words")
    assert model.config == MambaConfig(8, n_layer=2, vocab_size=400)
    assert tokenizer.encode("To be") == trained().encode("To be").ids
    assert [*tokenizer.eos_token_ids] == [trained().token_to_id("<|endoftext|>")]
    run("--out further --init-from words --d-model 256 --n-layer 10 --lr 0 --steps 1")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert Path("further", name).read_bytes() == Path("words", name).read_bytes()


@pytest.mark.parametrize("average", [0, 0.9])
def test_what_is_saved_and_measured_is_the_average_without_dropout_matrices_as_float16(
    run, average
):
    printed = run(f"--out out --dropout 0.9 --average {average}")
    exact, rounded = torch.load("out/training.pt"), load_file("out/model.safetensors")
    moments, exact = exact["moments"]["state"], exact["weights"]
    assert all(("average" in of) == (average > 0) for of in moments.values())
    exact |= {name: of["average"] for name, of in moments.items() if average}
    for name, tensor in rounded.items():
        matrix = exact[name].ndim > 1 and not name.endswith("A_log")
        expected = exact[name].half() if matrix else exact[name]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    model = Mamba.from_pretrained("out")
    expected = nats(model, VERSE[::-1]) / (len(VERSE) - 1)
    assert model.config == MambaConfig(8, n_layer=2, vocab_size=256, tokenizer="bytes")
    printed += run("--evaluate out")
    said = re.findall(r"^(?:step 6|out:) .*hold-out (\d\.\d{4}) nats per token", printed, re.M)
    assert [float(number) for number in said] == pytest.approx([expected] * 2, abs=1e-4)
    assert run("--out all --dropout 1 --evaluate-every 1 --prompt=").count("\n") == 7  # no samples
    # All that enters the stream is dropped, after each evaluation too: every byte is as likely.
    assert losses("all")[:, 0].tolist() == pytest.approx([math.log(256)] * 6, rel=1e-6)


def test_the_model_of_the_lowest_hold_out_loss_is_kept_if_wanted(run, monkeypatch):
    """Also by a run that was stopped right after it and goes on. Otherwise the last is."""
    found, seen, save = [3.0, 1.0, 2.0, 1.0], [], torch.save

    def measure(model, texts):
        seen.append({name: tensor.clone() for name, tensor in model.named_parameters()})
        return found[len(seen) - 1]

    monkeypatch.setattr(train, "train", partial(train.train, evaluate=measure))
    every = "--steps 4 --evaluate-every 1"
    assert "wrote last: step 4, hold-out 1.0000 (at best 1.0000, step 2)" in run(
        f"--out last {every}"
    )
    last = seen.copy()
    seen.clear()
    monkeypatch.setattr(torch, "save", only_once(save))  # the second training.pt is not finished
    with pytest.raises(SystemExit, match="stopped"):
        run(f"--out best {every} --keep-best")
    monkeypatch.setattr(torch, "save", save)
    seen.pop()
    printed = run(f"--out best {every} --keep-best")
    assert "wrote best: step 2, hold-out 1.0000 (at best 1.0000, step 2)" in printed
    for folder, expected in (("last", last[3]), ("best", seen[1])):
        saved = {name: w.float() for name, w in load_file(f"{folder}/model.safetensors").items()}
        assert_all_close(saved, expected, 0)
    assert not torch.equal(last[1]["backbone.norm_f.weight"], last[3]["backbone.norm_f.weight"])


def test_without_its_blocks_the_model_is_its_embedding(run):
    run("--out none --depth-dropout 1 --steps 1")
    ids = run.windows[0][0]
    torch.manual_seed(5)
    model = Mamba(MambaConfig(8, n_layer=2, vocab_size=256))
    logits = model.lm_head(model.backbone.norm_f(model.backbone.embedding(ids[:, :-1])))
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert losses("none")[0, 0].item() == pytest.approx(loss, rel=1e-5)


def test_stochastic_depth_takes_whole_rows_out_of_a_block_and_makes_up_for_it():
    model, ids = random_model(n_layer=2), torch.randint(8, (4000, 3))
    out_proj, seen = model.backbone.layers[1].mixer.out_proj, []
    out_proj.register_forward_hook(lambda *args: seen.append(args[2]))  # as it was
    train.add_dropout(model, p=0.0, depth=0.25)
    out_proj.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        model(ids)
    before, after = seen
    gone = (after == 0).all(dim=(1, 2))
    assert 0.22 < gone.float().mean() < 0.28
    torch.testing.assert_close(after[~gone], before[~gone] / 0.75)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids), model(ids)) and torch.equal(*seen[2:4])


def chunked(u=(6, 4), weight=(5, 4), targets=(6,), chunk=2):
    targets = torch.zeros(targets, dtype=torch.long)
    return lambda _: chunked_cross_entropy(torch.ones(u), torch.ones(weight), targets, chunk)


@pytest.mark.parametrize(("call", "words"), [
    (chunked(u=(6, 3)), r"need u .*got \(6, 3\), \(5, 4\)"),
    (chunked(u=(0, 4), targets=(0,)), "not empty"),
    (chunked(targets=(5,)), r"need targets \(6,\) .*got \(5,\), 2"),
    (chunked(chunk=0), "chunk >= 1"),
    (lambda run: run("--hold-out typo.txt"), "train.py: error: --hold-out typo.txt: no file of"),
    (lambda run: run("--separator typo"), "--separator 'typo': no file of --data has it"),
    (lambda run: run("--separator="), "--separator '': no file of --data has it"),
    (lambda run: run("--seqlen 424"), "424 tokens to train on are too few for --seqlen 424"),
    (lambda run: run("--hold-out --data nothing"), "0 tokens to train on are too few"),
    (lambda run: run("--data read.txt typo.txt --hold-out"), "error: .*typo.txt"),
    (lambda run: run("--data read.txt empty.txt --hold-out"), "empty.txt is empty"),
    (lambda run: run("--hold-out --data read.txt --validation-share 1e-9"), "few to measure"),
    (lambda run: run("--accumulate 4"), "--batch 6 .* of 4 = 1 processes x --accumulate 4"),
    (lambda run: run("--graph"), "--graph needs one process and a GPU, got 1 and cpu"),
    (lambda run: run("--out out --lr 1e38 --clip 1e38"), "not finite by step 2: lower --lr"),
    # The loss of step 1 is that of the weights before it.
    (lambda run: run("--out out --lr 1e38 --evaluate-every 1"), "weight not finite by step 1"),
    (lambda run: run("--evaluate typo"), "train.py: error: .*typo"),
    (lambda run: run("--evaluate damaged"), "error: damaged/config.json is damaged"),
    (lambda run: run("--out damaged"), "error: damaged/training.pt is damaged"),
    (lambda run: run("--out read.txt --lr 1e38 --evaluate-every 1"), "error: .*exists: 'read.txt'"),
    (lambda run: run("--device typo"), "train.py: error: .* device"),
    (lambda run: run("--hold-out --evaluate out"), "^2$"),
    (lambda run: run("--hold-out --keep-best"), "^2$"),
    (lambda run: run("--validation-share 1"), "0 tokens to train on are too few"),
    (lambda run: run("--jump 1.1"), "^2$"),
    (lambda run: run("--clip 0"), "^2$"),
    (lambda run: run("--average 1"), "^2$"),
    (lambda run: run("--steps 0"), "^2$"),
    (lambda run: run("--init-from out"), "^2$"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(call, words, run):
    for folder in ("nothing/.git", "damaged"):
        Path(folder).mkdir(parents=True)
        for name in ("config.json", "training.pt"):
            Path(folder, name).write_bytes(b"not what it should be")
    with pytest.raises((ValueError, SystemExit), match=words):
        call(run)
    assert not Path("checkpoints").exists() and not Path("out/model.safetensors").exists()


@pytest.mark.parametrize(("options", "words"), [
    ("--init-from small", "the tokenizer has 256 tokens, the model 100"),
    ("--init-from good --out good/../good", "--out good/../good would be written over"),
    ("--init-from good --evaluate good", "a model that is trained: without --init-from"),
    ("--init-from good --n-layer 3", "--n-layer 3 is for a new model: --init-from has its own"),
    ("--init-from good --evaluate-every 0", "--evaluate-every must be from 1 to inf, got 0"),
    ("--init-from good --average 1", "--average must be from 0 to below 1, got 1.0"),
    ("--init-from good --clip 0", "--clip must be above 0, or inf for none, got 0.0"),
])  # fmt: skip
def test_what_cannot_be_trained_further_is_refused(options, words, run, capsys):
    for name, vocab_size in (("good", 256), ("small", 100)):
        config = MambaConfig(8, vocab_size=vocab_size, tokenizer="bytes")
        Mamba(config).save_pretrained(name)
    before = Path("good/model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as error:
        run(f"--d-model 256 --n-layer 10 --out out {options}")
    assert words in f"{error.value}{capsys.readouterr().err}"
    assert Path("good/model.safetensors").read_bytes() == before and not Path("out").exists()


def test_a_folder_in_which_nothing_can_be_written_is_an_error_before_the_training(run, monkeypatch):
    def full(dir: Path) -> None:
        raise OSError(f"{dir}: no space left")

    monkeypatch.setattr(train, "TemporaryFile", full)
    with pytest.raises(SystemExit, match=r"train\.py: error: out: no space left"):
        run("--out out")
    assert run.windows == []


def test_more_processes_than_rows_are_refused_by_the_first_and_than_gpus_by_the_last(
    run, monkeypatch
):
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "0"), ("LOCAL_RANK", "99")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="batch 6 must be a multiple of 8 = 8 processes"):
        run("")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit, match=r"^1$"):
        run("")
    with pytest.raises(SystemExit, match="process 3 needs a GPU of its own, and this machine has"):
        run("--device cuda")


def test_text_that_a_tokenizer_cannot_read_is_refused(run):
    random_model(vocab_size=400).save_pretrained("theirs")
    trained().save("theirs/tokenizer.json")
    Path("read.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SystemExit, match=r"read\.txt is not UTF-8: convert it, or train on bytes"):
        run("--tokenizer theirs")
    Path("theirs/tokenizer.json").write_bytes(of_size(400))
    with pytest.raises(SystemExit, match="--packed needs a tokenizer that names an end token"):
        run("--tokenizer theirs --packed --data more.txt --hold-out")


@pytest.fixture
def script():
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    return importlib.import_module("trainer")


def three_steps(script, folder, resume=None, tied=True, **options):
    """A training, and its rows: ids and labels (12, 9), some of them padding."""
    torch.manual_seed(0)
    ids = torch.randint(11, (12, 9))
    labels = ids.clone()
    labels[::3, 6:] = -100
    rows = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    usual = {"per_device_train_batch_size": 4, "weight_decay": 0.1, "save_steps": 2}
    usual |= {"max_steps": 3, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True}
    arguments = script.TrainingArguments(folder, **usual | options)
    model = script.TrainerMamba(MambaConfig(8, n_layer=2, vocab_size=11, tie_embeddings=tied))
    trainer = script.MambaTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, ids, labels


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_of_the_trainer_that_goes_on_ends_where_a_whole_one_ends(script, tied, tmp_path):
    whole = three_steps(script, tmp_path, tied=tied)[0].model
    checkpoint, last = tmp_path / "checkpoint-2", Mamba.from_pretrained(tmp_path / "checkpoint-3")
    weight = Mamba.from_pretrained(checkpoint).lm_head.weight
    assert error_of(weight, whole.lm_head.weight) > 1e-3
    again = three_steps(script, tmp_path / "more", str(checkpoint), tied)[0].model
    assert_all_close(again.state_dict(), whole.state_dict(), 0)
    assert_all_close(last.state_dict(), whole.state_dict(), 0)
    assert (last.lm_head.weight is last.backbone.embedding.weight) == tied


def test_the_trainer_loads_its_best_and_decays_the_matrices_alone(script, tmp_path, caplog):
    trainer, ids, labels = three_steps(
        script, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="eval_runtime", greater_is_better=True, save_steps=1,
        per_device_eval_batch_size=12,
    )  # fmt: skip
    model, best = trainer.model, Mamba.from_pretrained(trainer.state.best_model_checkpoint)
    assert_all_close(model.state_dict(), best.state_dict(), 0)
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert "missing keys" not in caplog.text
    log_p = best(ids)[:, :-1].log_softmax(-1)
    chosen = log_p.gather(2, ids[:, 1:, None]).squeeze(2)
    loss = -chosen[labels[:, 1:] != -100].mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert model.bfloat16()(*torch.ones(2, 3, 4).long())["loss"].dtype == torch.float32

    trainer.optimizer = trainer.lr_scheduler = None
    groups = trainer.create_optimizer().param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (p.ndim > 1 and not name.endswith("A_log")), name
    with pytest.raises(RuntimeError, match="leave out FSDP"):  # which hand over what they gathered
        trainer._save(tmp_path / "part", state_dict={})


def test_the_script_of_the_trainer_goes_on(script, tmp_path, monkeypatch, capsys):
    small, written = MambaConfig(8, n_layer=1, vocab_size=256, tokenizer="bytes"), []
    monkeypatch.setattr(script, "MambaConfig", lambda *_, **__: small)
    monkeypatch.chdir(tmp_path)

    def run(options: str, size: int) -> None:
        Path("text").write_bytes((VERSE * 4)[:size])
        monkeypatch.setattr(sys, "argv", ["trainer.py", *options.split()])
        script.main()

    for steps, size in ((1, 256), (2, 800)):
        run(f"text --out out --steps {steps} --save-every 1", size)
        written.append(Path("out/checkpoint-1/optimizer.pt").stat().st_mtime_ns)
    assert written[0] == written[1] and Path("out/checkpoint-2").exists(), "begun anew"
    assert "wrote out: config.json, model.safetensors" in capsys.readouterr().out
    assert Mamba.from_pretrained("out").config == small
    with pytest.raises(SystemExit, match=r"trainer\.py: error: .*at least 256 .* got 255"):
        run("text", 255)
    with pytest.raises(SystemExit, match=r"^2$"):
        run("text --steps 0", 800)
