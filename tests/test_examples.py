"""The scripts in examples/, the model that one of them made, and train.py and trainer.py."""

import contextlib
import importlib
import itertools
import math
import re
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import train
from safetensors.torch import load_file
from test_look_inside import Largest
from torch import Tensor

from mamba import Mamba, MambaConfig, ResidualBlock
from test_mamba import assert_all_close, assert_close, error_of, random_model

ROOT = Path(__file__).parent.parent

# Macbeth, act 5, scene 5: a hold-out of the shipped model.
VERSE = b"""
Tomorrow, and tomorrow, and tomorrow,
Creeps in this petty pace from day to day,
To the last syllable of recorded time;
And all our yesterdays have lighted fools
The way to dusty death. Out, out, brief candle!
"""


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
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


def test_training_windows_read_on_where_they_stopped_and_one_row_in_eight_jumps():
    windows = train.Windows(torch.arange(256, dtype=torch.uint8).repeat(999), 400, seqlen=10)
    before, jumped = windows.next()
    assert jumped.all(), "the first windows start from the zero state"
    jumps = 0
    for _ in range(50):
        ids, jumped = windows.next()
        assert ids.shape == (400, 11) and (ids.diff(dim=1) % 256 == 1).all()
        assert (ids[~jumped, 0] == before[~jumped, -1]).all()
        before, jumps = ids, jumps + jumped.sum().item()
    assert 0.118 < jumps / (50 * 400) < 0.132


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
        found = judge(partial(train.chunked_cross_entropy, chunk=chunk), torch.float32)
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
    found = judge(partial(train.chunked_cross_entropy, chunk=16), dtype)
    exact = judge(cross_entropy, torch.float64)
    assert [tensor.dtype for tensor in found] == [torch.float32, dtype, dtype]
    errors = [*map(error_of, found, exact)]
    assert errors[0] < 1e-5  # of 0.003: float32 has no more
    assert all(1e-4 < error < (4e-3 if autocast else 6e-3) for error in errors[1:]), errors


def test_the_defaults_are_those_that_made_the_shipped_model(monkeypatch):
    monkeypatch.setattr(train, "train", lambda options: made.append(vars(options)))
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "text"])
    made = []
    train.main()
    config = Mamba.from_pretrained(ROOT / "checkpoints" / "shakespeare").config
    assert made[0].items() >= {
        "d_model": config.d_model, "n_layer": config.n_layer, "batch": 64, "seqlen": 512,
        "steps": 1800, "warmup": 100, "dropout": 0.25, "lr": 2e-3, "evaluate_every": 300,
        "seed": 0, "minutes": None, "compile": False,
    }.items()  # fmt: skip


def test_evaluation_reads_each_text_once_and_carries_the_state_from_window_to_window():
    model, texts = random_model(vocab_size=256), [VERSE[:30], b"x", VERSE[50:67]]
    ids = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts]
    loss = train.evaluate(model, ids, window=7)
    assert loss == pytest.approx((nats(model, texts[0]) + nats(model, texts[2])) / 45, rel=1e-5)
    assert math.isnan(train.evaluate(model, []))
    rounded = nats(model.bfloat16(), texts[0]) / 29
    assert train.evaluate(model, ids[:1]) == pytest.approx(rounded, rel=1e-6)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """A training of few steps, 61 seconds each; its windows are repeatable, and listed."""

    class Windows(train.Windows):
        def next(self):
            run.seeds.append(torch.initial_seed())
            torch.manual_seed(int(self.position.sum()))
            run.text = bytes(self.text.tolist())
            run.windows.append(super().next())
            return run.windows[-1]

    def run(options: str) -> str:
        run.windows, run.seeds, run.compiled = [], [], []
        clock = SimpleNamespace(perf_counter=itertools.count(1, 61).__next__)
        monkeypatch.setattr(train, "time", clock)
        start = """train.py --data read.txt kept.txt more.txt --hold-out kept.txt --device cpu
            --d-model 8 --n-layer 2 --batch 3 --seqlen 8 --warmup 2 --lr 0.01 --steps 6 --seed 5
            --dropout 0"""
        monkeypatch.setattr(sys, "argv", [*start.split(), *options.split()])
        train.main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    texts = {"read": VERSE, "kept": VERSE[::-1], "more": VERSE.upper(), "empty": b""}
    for name, text in texts.items():
        Path(f"{name}.txt").write_bytes(text)
    monkeypatch.setattr(train, "Windows", Windows)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: run.compiled.append(self))
    return run


def test_training_is_this_loop_and_one_that_was_interrupted_ends_with_the_same_model(run):
    printed = run("--out whole --evaluate-every 4")
    saved = torch.load("whole/training.pt")
    assert run.seeds[0] == 5 and not run.compiled

    torch.manual_seed(5)  # the same by hand
    model = Mamba(MambaConfig(8, n_layer=2, vocab_size=256, tokenizer="bytes"))
    optimizer = torch.optim.AdamW(model.param_groups(weight_decay=0.1), betas=(0.9, 0.95))
    state, losses = model.init_state(3), []
    factors = [0.5, 1, *(0.01 + 0.99 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4))]
    least = train.read_texts([Path("kept.txt")], [], len(VERSE) - 2, torch.device("cpu"))[0]
    assert bytes(least.tolist()) == VERSE[::-1], "long enough for one place"
    assert run.text == VERSE.upper() + b"\n\n" + VERSE, "hold-outs apart, in the order of the names"
    assert 0 < sum(jumped.sum() for _, jumped in run.windows[1:]) < 15
    for factor, (ids, jumped) in zip(factors, run.windows, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor
        state = state.detach().map(lambda t, jumped=jumped: t.masked_fill(jumped[:, None, None], 0))
        logits, state = model(ids[:, :-1], state)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert_all_close(saved["model"], model.state_dict(), 1e-4)
    assert_close("state", saved["h"], state.h, 1e-4)
    said = re.findall(r"^(step .* s)  train (\S+)  hold-out \S+ nats.*\nKING\.\n", printed, re.M)
    assert [words for words, _ in said] == ["step 4  244 s", "step 6  366 s"]
    means = sum(losses[:4]) / 4, sum(losses[4:]) / 2
    assert [float(loss) for _, loss in said] == pytest.approx(means, abs=1e-4)

    for begun, minutes in ((0, "2.01"), (2, "4.05"), (4, "5.5")):
        assert not Path("new/parts/model.safetensors").exists()
        printed = run(f"--out new/parts --minutes {minutes}")
        assert len(run.windows) == 2 and run.seeds[0] == 5 + begun, "not the dice of before again"
        assert f"step {begun + 2}  {61 * (begun + 2)} s  " in printed
        assert ("out of time, wrote new/parts/training.pt" in printed) == (begun < 4)
        assert (f"going on after step {begun}" in printed) == (begun > 0)
    for name in ("model.safetensors", "config.json"):
        assert Path("new/parts", name).read_bytes() == Path("whole", name).read_bytes()
    with pytest.raises(SystemExit, match=r"begun with lr = 0\.01, not 0\.02: delete it"):
        run("--out new/parts --lr 0.02")


def test_what_is_saved_and_measured_is_the_model_without_dropout_matrices_as_float16(run):
    printed = run("--out out --dropout 0.9")
    exact, rounded = torch.load("out/training.pt")["model"], load_file("out/model.safetensors")
    for name, tensor in rounded.items():
        matrix = exact[name].ndim > 1 and not name.endswith("A_log")
        expected = exact[name].half() if matrix else exact[name]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    model = Mamba.from_pretrained("out")
    expected = nats(model, VERSE[::-1]) / (len(VERSE) - 1)
    assert model.config == MambaConfig(8, n_layer=2, vocab_size=256, tokenizer="bytes")
    printed += run("--evaluate out")
    said = re.findall(r"^(?:step 6|out:) .*hold-out (\d\.\d{4}) nats per byte", printed, re.M)
    assert [float(number) for number in said] == pytest.approx([expected] * 3, abs=2e-3)
    printed = run("--out all --dropout 1 --evaluate-every 1 --compile")
    assert [*map(type, run.compiled)] == [ResidualBlock] * 2
    # All that enters the stream is dropped, after each evaluation too: every byte is as likely.
    assert re.findall(r" train (\S+) ", printed) == [f"{math.log(256):.4f}"] * 6


def chunked(u=(6, 4), weight=(5, 4), targets=(6,), chunk=2):
    targets = torch.zeros(targets, dtype=torch.long)
    return lambda _: train.chunked_cross_entropy(torch.ones(u), torch.ones(weight), targets, chunk)


@pytest.mark.parametrize(("call", "words"), [
    (chunked(u=(6, 3)), r"need u .*got \(6, 3\), \(5, 4\)"),
    (chunked(u=(0, 4), targets=(0,)), "not empty"),
    (chunked(targets=(5,)), r"need targets \(6,\) .*got \(5,\), 2"),
    (chunked(chunk=0), "chunk >= 1"),
    (lambda run: run("--hold-out typo.txt"), "train.py: error: --hold-out typo.txt: not"),
    (lambda run: run("--seqlen 423"), "424 bytes to train on are too few for --seqlen 423"),
    (lambda run: run("--hold-out empty.txt --data read.txt empty.txt"), "too few"),
    (lambda run: run("--evaluate typo"), "train.py: error: .*typo"),
    (lambda run: run("--hold-out --evaluate out"), "^2$"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(call, words, run):
    with pytest.raises((ValueError, SystemExit), match=words):
        call(run)


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
