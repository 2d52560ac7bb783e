"""The scripts in examples/ and the model that one of them made."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mamba import Mamba, MambaConfig

ROOT = Path(__file__).parent.parent

# Macbeth, act 5, scene 5: a hold-out of the shipped model.
VERSE = b"""
Tomorrow, and tomorrow, and tomorrow,
Creeps in this petty pace from day to day,
To the last syllable of recorded time;
And all our yesterdays have lighted fools
The way to dusty death. Out, out, brief candle!
Life's but a walking shadow; a poor player,
That struts and frets his hour upon the stage,
And then is heard no more: it is a tale
Told by an idiot, full of sound and fury,
Signifying nothing.
"""


SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The Python files alone, elsewhere; each says so when it is imported."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "examples", folder / "examples")
    for name in ("mamba.py", "generate.py", "triton_scan.py"):
        (folder / name).write_text((ROOT / name).read_text() + "\nFROM_THE_CLONE = True\n")
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_runs_from_a_bare_clone_and_answers_help_with_its_defaults(
    name, clone, monkeypatch, capsys, tmp_path
):
    if name == "trainer.py":
        pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    # As `python examples/name --help` begins: its own folder in front, nothing of ours imported.
    elsewhere = [path for path in sys.path if path and not Path(path, "mamba.py").exists()]
    monkeypatch.setattr(sys, "path", [str(clone / "examples"), *elsewhere])
    for module in ("mamba", "generate", "triton_scan"):
        monkeypatch.setitem(sys.modules, module, sys.modules.get(module))  # to be put back
        del sys.modules[module]
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.chdir(tmp_path)
    try:
        script = runpy.run_path(str(clone / "examples" / name), run_name="__main__")
    except SystemExit as exit:
        assert exit.code == 0
    else:
        assert name == "drop_in.py" and script["MambaBlock"]
    assert sys.modules["mamba"].FROM_THE_CLONE
    printed, source = capsys.readouterr().out, (ROOT / "examples" / name).read_text()
    assert source.split("\n")[0].removeprefix('"""') in " ".join(printed.split())
    listed = printed.partition("\noptions:\n")[2]
    assert len(re.findall(r"^  --[\w-]+", listed, re.MULTILINE)) == listed.count("(default:")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_is_imported_leaves_the_path_alone(name, monkeypatch):
    if name == "trainer.py":
        pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    before = list(sys.path)
    runpy.run_path(str(ROOT / "examples" / name), run_name="imported")
    assert sys.path == before


@torch.no_grad()
def nats_per_byte(model: Mamba, text: bytes) -> float:
    ids = torch.tensor([list(text)])
    return F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:]).item()


def train(folder: Path, *options: str) -> subprocess.CompletedProcess:
    sizes = "--d-model 16 --n-layer 1 --batch 4 --seqlen 32 --warmup 5 --lr 0.01 --steps 20"
    command = [sys.executable, str(ROOT / "examples" / "train.py"), "--out", "out", "--data"]
    command += ["read.txt", "kept.txt", "--hold-out", "kept.txt", "--device", "cpu"]
    return subprocess.run(
        [*command, *sizes.split(), *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_shipped_model_predicts_verse_that_it_has_not_read():
    model = Mamba.from_pretrained(ROOT / "checkpoints" / "shakespeare")
    assert nats_per_byte(model, VERSE) < 1.8
    assert nats_per_byte(model, VERSE[::-1]) > 3  # and nothing that is no English


def test_the_hold_outs_are_not_among_what_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import train as script

    texts = {"b.txt": b"second" * 9, "a.txt": b"first" * 9, "kept.txt": b"kept" * 9}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    paths = [tmp_path / name for name in texts]
    train_text, held_out = script.read_texts(paths, ["kept.txt"], 8, torch.device("cpu"))
    assert bytes(train_text.tolist()) == texts["a.txt"] + b"\n\n" + texts["b.txt"]
    assert [bytes(text.tolist()) for text in held_out] == [texts["kept.txt"]]
    with pytest.raises(ValueError, match="typo"):
        script.read_texts(paths, ["typo.txt"], 8, torch.device("cpu"))


def test_training_windows_read_on_where_they_stopped_unless_they_jump(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import train as script

    torch.manual_seed(0)
    windows = script.Windows(torch.arange(200, dtype=torch.uint8), batch=16, seqlen=10)
    before, jumped = windows.next()
    assert jumped.all(), "the first windows start from the zero state"
    jumps = 0
    for _ in range(50):
        ids, jumped = windows.next()
        assert ids.shape == (16, 11) and (ids.diff(dim=1) == 1).all()
        assert (ids[~jumped, 0] == before[~jumped, -1]).all()
        before, jumps = ids, jumps + jumped.sum().item()
    assert 0.1 < jumps / (50 * 16) < 0.5  # one in eight, and where the text ends


def loss_and_gradients(loss_of, *tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    loss = loss_of(*leaves)
    # An incoming gradient that is not 1, as from a penalty or an accumulation over batches.
    return loss.detach(), *torch.autograd.grad(0.3 * loss, leaves)


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("tokens, chunk", [(1, 4), (8, 4), (23, 5), (23, 23), (23, 100)])
def test_the_loss_in_chunks_is_the_loss(tokens, chunk, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from train import chunked_cross_entropy

    torch.manual_seed(0)
    # Logits up to about 30: some tokens are certain, and their p - 1 is all rounding if p is.
    u, weight, targets = 3 * torch.randn(tokens, 8), 3 * torch.randn(37, 8), torch.arange(tokens)

    def plain(u, weight):
        return F.cross_entropy(F.linear(u, weight), targets)

    def in_chunks(u, weight):
        return chunked_cross_entropy(u, weight, targets, chunk=chunk)

    def tied(loss_of):
        # As with tie_embeddings: u is made of the same matrix, and both ways lead back to it.
        return lambda u, weight: (
            loss_of(u + weight[targets].tanh(), weight) + weight.square().mean()
        )

    expected = loss_and_gradients(plain, u.double(), weight.double())
    for ours, theirs in zip(loss_and_gradients(in_chunks, u, weight), expected, strict=True):
        assert ours.dtype == torch.float32 and distance(ours, theirs) < 1e-6
    expected = loss_and_gradients(tied(plain), u.double(), weight.double())
    for ours, theirs in zip(loss_and_gradients(tied(in_chunks), u, weight), expected, strict=True):
        assert distance(ours, theirs) < 1e-6


def test_the_loss_in_chunks_under_autocast_rounds_the_gradient_of_the_logits_only(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from train import chunked_cross_entropy

    torch.manual_seed(0)
    # Small integers: bfloat16 holds them and their products. So the loss has no excuse, and the
    # gradients that of one rounding, although tokens are certain and p - 1 small.
    weight, targets = torch.randint(-1, 2, (64, 24)).float(), torch.randint(64, (130,))
    u = weight[targets]  # closest to its own row: p is near 1

    def plain(u, weight):
        return F.cross_entropy(F.linear(u, weight), targets)

    def in_chunks(u, weight):
        return chunked_cross_entropy(u, weight, targets, chunk=16)

    exact = loss_and_gradients(plain, u.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradients(in_chunks, u, weight)
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 3
    assert distance(ours[0], exact[0]) < 1e-5  # of 0.003: float32 has no more
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert 1e-4 < distance(a, b) < 4e-3  # less would be float32, and not autocast
    half = loss_and_gradients(in_chunks, u.bfloat16(), weight.bfloat16())
    assert [t.dtype for t in half] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for a, b in zip(half, exact, strict=True):
        assert distance(a, b) < 6e-3


def test_the_loss_in_chunks_never_holds_all_logits(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from torch.utils._python_dispatch import TorchDispatchMode
    from train import chunked_cross_entropy

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    u = torch.randn(300, 8, requires_grad=True)
    weight = torch.randn(90, 8, requires_grad=True)
    with Watch():
        chunked_cross_entropy(u, weight, torch.arange(300) % 90, chunk=50).backward()
    assert largest == 50 * 90


def test_the_loss_in_chunks_refuses_what_does_not_fit(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from train import chunked_cross_entropy

    u, weight, targets = torch.ones(6, 4), torch.ones(5, 4), torch.zeros(6, dtype=torch.int64)
    for arguments in ((u[:, :3], weight, targets), (u, weight, targets[:5]), (u[:0], weight, u[0])):
        with pytest.raises(ValueError, match=r"need .*got \("):
            chunked_cross_entropy(*arguments)
    with pytest.raises(ValueError, match="chunk >= 1"):
        chunked_cross_entropy(u, weight, targets, chunk=0)


def test_an_interrupted_training_goes_on_and_ends_with_a_model_that_has_learned(tmp_path):
    (tmp_path / "read.txt").write_bytes(VERSE * 20)
    (tmp_path / "kept.txt").write_bytes(VERSE)

    interrupted = train(tmp_path, "--minutes", "0")
    assert interrupted.returncode == 0, interrupted.stderr
    assert re.search(r"^step 1 .*hold-out \d\.\d+", interrupted.stdout, re.MULTILINE)
    assert "out of time, wrote out/training.pt" in interrupted.stderr + interrupted.stdout
    assert not (tmp_path / "out" / "model.safetensors").exists()

    other = train(tmp_path, "--lr", "0.02")
    assert other.returncode == 1
    assert re.search(r"begun with lr = 0.01, not 0.02", other.stderr)

    resumed = train(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after step 1" in resumed.stdout
    assert "wrote out: config.json, model.safetensors, and training.pt" in resumed.stdout
    model = Mamba.from_pretrained(tmp_path / "out")
    said = float(re.search(r"hold-out (\d\.\d+) nats per byte, as saved", resumed.stdout)[1])
    assert nats_per_byte(model, VERSE) == pytest.approx(said, abs=1e-3)
    assert said < 5  # an untrained model has log(256) = 5.5
    assert model.config.tokenizer == "bytes"


## ================================================================================================
## The Trainer of transformers
## ================================================================================================


@pytest.fixture
def script():
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    import trainer

    return trainer


def rows_with_padding() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(11, (12, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[::3, 6:] = -100
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]


def three_steps(script, folder, resume=None, tie_embeddings=True, **options):
    torch.manual_seed(0)
    config = MambaConfig(8, n_layer=2, vocab_size=11, tie_embeddings=tie_embeddings)
    rows = rows_with_padding()
    usual = {"per_device_train_batch_size": 4, "weight_decay": 0.1, "save_steps": 2}
    arguments = script.TrainingArguments(
        folder, max_steps=3, learning_rate=1e-2, report_to="none", use_cpu=True,
        disable_tqdm=True, **usual | options,
    )  # fmt: skip
    model = script.TrainerMamba(config)
    trainer = script.MambaTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_trainer_refuses_labels_that_it_would_smooth_without_shifting_them(script, tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
        three_steps(script, tmp_path, label_smoothing_factor=0.1)


def distances(model, other) -> dict[str, float]:
    both = zip(model.named_parameters(), other.parameters(), strict=True)
    return {name: (a - b).abs().max().item() for (name, a), b in both}


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_run_of_the_trainer_that_goes_on_ends_where_one_that_was_not_interrupted_ends(
    script, tie_embeddings, tmp_path
):
    whole = three_steps(script, tmp_path / "whole", tie_embeddings=tie_embeddings)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert max(distances(whole.model, Mamba.from_pretrained(checkpoint)).values()) > 1e-3
    resumed = three_steps(script, tmp_path / "resumed", str(checkpoint), tie_embeddings)
    assert not any(distances(whole.model, resumed.model).values())
    loaded = Mamba.from_pretrained(tmp_path / "whole" / "checkpoint-3")
    assert not any(distances(whole.model, loaded).values())
    assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) == tie_embeddings


def test_a_checkpoint_that_does_not_fit_is_refused(script, tmp_path):
    three_steps(script, tmp_path, tie_embeddings=False)
    weights = tmp_path / "checkpoint-2" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    kept = {name: t for name, t in load_file(weights).items() if "A_log" not in name}
    save_file(kept, weights)
    with pytest.raises(RuntimeError, match="A_log"):
        three_steps(script, tmp_path / "other", str(weights.parent), tie_embeddings=False)


def test_the_trainer_loads_the_best_of_its_checkpoints(script, tmp_path, caplog):
    trainer = three_steps(
        script, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="eval_runtime", greater_is_better=True, save_steps=1,
    )  # fmt: skip
    best = Mamba.from_pretrained(trainer.state.best_model_checkpoint)
    assert not any(distances(trainer.model, best).values())
    assert trainer.model.lm_head.weight is trainer.model.backbone.embedding.weight
    assert "missing keys" not in caplog.text


def test_the_trainer_saves_what_processes_the_data_too_and_refuses_a_part_of_a_model(
    script, tmp_path
):
    class Processor:
        def save_pretrained(self, folder):
            (Path(folder) / "processor.json").write_text("{}")

    trainer = three_steps(script, tmp_path)
    trainer.processing_class = Processor()
    trainer.save_model(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names >= {"model.safetensors", "config.json", "processor.json"}
    with pytest.raises(RuntimeError, match="leave out FSDP"):  # which hand over what they gathered
        trainer._save(tmp_path / "part", state_dict={})


def test_the_trainer_measures_the_loss_of_what_is_not_padding(script, tmp_path):
    trainer = three_steps(script, tmp_path, per_device_eval_batch_size=12)
    model, total, count = trainer.model, 0.0, 0
    for row in rows_with_padding():
        log_p = Mamba.forward(model, row["input_ids"][None])[0].log_softmax(-1)
        for t, label in enumerate(row["labels"][1:].tolist()):
            if label != -100:
                total, count = total - log_p[t, label].item(), count + 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, abs=1e-5)


def test_the_trainer_decays_what_param_groups_decays(script, tmp_path):
    """With a gradient of zero, only decay moves a weight."""
    torch.manual_seed(0)
    trainer = three_steps(script, tmp_path)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.optimizer, trainer.lr_scheduler = None, None
    optimizer = trainer.create_optimizer()
    for parameter in before:
        trainer.model.get_parameter(parameter).grad = torch.zeros_like(before[parameter])
    optimizer.step()
    moved = {name for name, p in trainer.model.named_parameters() if not p.equal(before[name])}
    decayed = {id(p) for p in trainer.model.param_groups(0.1)[0]["params"]}
    assert moved == {name for name, p in trainer.model.named_parameters() if id(p) in decayed}
    assert any("in_proj" in name for name in moved)
    assert not any("A_log" in name or name.endswith(".D") for name in moved)


def test_the_script_of_the_trainer_goes_on_and_says_what_it_wrote(
    script, tmp_path, monkeypatch, capsys
):
    small = MambaConfig(8, n_layer=1, vocab_size=256, tokenizer="bytes")
    monkeypatch.setattr(script, "MambaConfig", lambda *_, **__: small)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(VERSE * 2)
    written = []  # to begin anew would write it again
    for steps in ("2", "3"):
        command = ["trainer.py", "a.txt", "--out", "out", "--steps", steps, "--save-every", "2"]
        monkeypatch.setattr(sys, "argv", command)
        script.main()
        written.append((tmp_path / "out" / "checkpoint-2" / "optimizer.pt").stat().st_mtime_ns)
    assert written[0] == written[1]
    assert "wrote out: config.json, model.safetensors" in capsys.readouterr().out
    assert Mamba.from_pretrained(tmp_path / "out").config == small
    history = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert history["global_step"] == 3
    monkeypatch.setattr(sys, "argv", ["trainer.py", "no.txt"])
    with pytest.raises(SystemExit, match=r"trainer\.py: error: .*no\.txt"):
        script.main()
