"""Benchmarks run in tiny sizes, and they measure what they say."""

import importlib
import itertools
import json
import math
import random
import re
import sys
import types
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from generate import DEFAULT_MODEL
from mamba import Mamba, MambaConfig, read_file, selective_scan
from test_mamba import random_model

HERE = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    return importlib.import_module("cpu")


def test_a_dry_run_measures_every_system_that_is_installed_and_writes_nothing(
    cpu, monkeypatch, capsys
):
    files = {path: path.stat().st_mtime for path in HERE.glob("*.*")}
    monkeypatch.setattr(sys, "argv", ["cpu.py", "--dry-run", "--threads", "1"])
    cpu.main()
    assert files == {path: path.stat().st_mtime for path in HERE.glob("*.*")}
    out, err = capsys.readouterr()
    for title in ("decode, a token", "prefill", "forward and backward", "token"):
        assert f"\n| {title}" in out
    for peer in ("transformers", "mambapy"):
        assert (f"{peer} is not installed: left out" in err) != (f"\n| {peer}, " in out)


def test_the_peak_of_tensors_counts_what_is_held_at_a_time(cpu):
    held = torch.ones(1000)  # before the run: not counted

    def run():
        for size in (3000, 5000, 2000):  # one after the other
            torch.zeros(size)
        return [held + 1 for _ in range(4)]  # together, but less

    assert cpu.peak_of_tensors(run) == pytest.approx(5000 * 4, abs=256)


def test_a_run_of_models_that_is_cut_short_keeps_what_it_has_measured(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.syspath_prepend(HERE)
    model = importlib.import_module("model")
    file = tmp_path / "all.json"
    command = f"model.py --dry-run --runs 1 --json {file} --what "
    monkeypatch.setattr(sys, "argv", [*command.split(), "prefill", "train"])
    monkeypatch.setattr(model, "prepare_training", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.main()
    rows = json.loads(file.read_text())["prefill"]
    assert [(row["system"], row["how"]) for row in rows] == [
        ("ours", "eager"),
        ("ours", "graph"),
    ] * 2
    monkeypatch.setattr(sys, "argv", [*command.split(), "long"])  # another part: that one stays
    model.main()
    kept = json.loads(file.read_text())
    assert kept["prefill"] == rows and len(kept["long"]) == 4
    sys.argv += ["--models", "130m"]
    with pytest.raises(SystemExit):
        model.main()
    file.write_text(json.dumps(kept | {"device": "another"}))
    monkeypatch.setattr(sys, "argv", [*command.split(), "long"])
    with pytest.raises(SystemExit, match="another GPU"):
        model.main()
    said = capsys.readouterr().err
    assert all(row["ms"] > 0 and f"{row['ms']:.3f} ms" in said for row in rows)


@pytest.fixture
def transformer(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    return importlib.import_module("transformer")


@pytest.fixture
def printed(transformer, monkeypatch, tmp_path, capsys):
    """What transformer.py prints, called in an empty folder."""

    def printed(options: str) -> str:
        monkeypatch.setattr(sys, "argv", f"transformer.py --device cpu {options}".split())
        transformer.main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    return printed


def kneser_ney(text: bytes, gram: bytes, whole: bool = True) -> float:
    """P(last byte of gram | those before it), straight from the definition."""
    if not gram:
        return 1 / 256

    def count(size):  # of grams; in a shorter context, of the bytes that came before them
        found = Counter(text[i : i + size] for i in range(len(text) - size + 1))
        return found if whole else Counter(each[1:] for each in found)

    counts = count(len(gram) if whole else len(gram) + 1)
    here = {each: n for each, n in counts.items() if each[:-1] == gram[:-1]}
    shorter = kneser_ney(text, gram[1:], whole=False)
    if not here:
        return shorter
    once, twice = max(1, [*counts.values()].count(1)), [*counts.values()].count(2)
    discount = once / (once + 2 * twice)
    own = max(here.get(gram, 0) - discount, 0)
    return (own + discount * len(here) * shorter) / sum(here.values())


def test_the_probabilities_of_the_n_gram_sum_to_one_and_are_those_of_kneser_and_ney(transformer):
    dice = random.Random(0)
    text = bytes(dice.choices(b"abcd", [8, 4, 2, 1], k=300)) + b"abcabcxyz"
    model = transformer.NGram(text, order=4)
    contexts = [text[7:10], b"dda", b"zzz", b"\0bc", text[-3:], b"xyz"]
    for context in contexts:
        grams = np.array([[*context, byte] for byte in range(256)], dtype=np.uint8)
        assert model(grams).sum() == pytest.approx(1, abs=1e-12)
        expected = [kneser_ney(text, bytes(gram)) for gram in grams[90:125]]
        assert model(grams)[90:125] == pytest.approx(expected, rel=1e-9)
    expected = -sum(math.log(kneser_ney(text, b"abcabq"[i : i + 4])) for i in range(3))
    assert model.nats(b"abcabq") == pytest.approx(expected, rel=1e-9)


def test_attention_is_the_mean_of_values_by_their_scores(transformer):
    """Two heads, against a loop over tokens, as it is measured: not in training."""
    block = transformer.Attention(MambaConfig(d_model=128)).eval()
    u = torch.randn(1, 9, 128)
    qkv = block.in_proj(u).unflatten(-1, (3, 2, 64))
    query, key = transformer.rotated(qkv[:, :, 0])[0], transformer.rotated(qkv[:, :, 1])[0]
    value, y = qkv[0, :, 2], torch.empty(9, 2, 64)
    for t, head in itertools.product(range(9), range(2)):
        weights = (key[: t + 1, head] @ query[t, head] / 8).softmax(0)
        y[t, head] = weights @ value[: t + 1, head]
    found, _ = block(u, block.init_state(1))
    assert torch.allclose(found, block.out_proj(y.flatten(1))[None], atol=1e-5)


def test_the_transformer_is_as_large_sees_the_past_only_and_knows_distances(transformer):
    mamba = Mamba.from_pretrained(DEFAULT_MODEL)
    model = transformer.Transformer(transformer.as_large_as(mamba.config))
    sizes = transformer.parameters(model), transformer.parameters(mamba)
    assert sizes[0] == pytest.approx(sizes[1], rel=2e-3)
    ids = torch.randint(256, (2, 40))
    with torch.no_grad():
        before, ids[:, 20] = model(ids), ids[:, 20] ^ 1
        change = (model(ids) - before).abs().amax(dim=(0, 2))
    assert change[:20].max() == 0 and change[20:].min() > 1e-6
    query, key = torch.randn(2, 1, 1, 1, 64).expand(2, 1, 30, 1, 64)
    query, key = transformer.rotated(query)[0, :, 0], transformer.rotated(key)[0, :, 0]
    scores = query @ key.T
    for distance in (0, 1, 7):
        same = scores.diagonal(-distance)
        assert torch.allclose(same, same[0], atol=1e-4)
    assert scores[:, 0].std() > 0.1


@pytest.mark.parametrize("length", [2, 8, 9, 10, 12, 13, 14, 39])
def test_each_byte_is_measured_once_and_with_half_a_window_of_the_past(transformer, length):
    model = transformer.Transformer(random_model(d_model=16, n_layer=2, vocab_size=256).config)
    torch.nn.init.normal_(model.lm_head.weight)
    ids, window, nats = torch.randint(256, (length,)), 8, 0.0
    for i in range(1, length):
        start = 0 if i <= window else next(s for s in itertools.count(0, 4) if s >= i - window)
        assert start == 0 or window / 2 < i - start <= window
        nats += F.cross_entropy(model(ids[None, start:i])[0, -1], ids[i]).item()
    text = (ids.to(torch.uint8), torch.zeros(length, dtype=torch.bool))
    found = transformer.evaluate(model, [text], window, batch=3)
    assert found == pytest.approx(nats / (length - 1), rel=1e-5)
    assert transformer.evaluate(model, [text, text], window) == pytest.approx(found, rel=1e-6)


def test_the_names_in_a_play_are_new_or_come_again_and_each_kind_has_its_loss(transformer, printed):
    said, long, short = b"Ay.\nWell met.\n\n", b"FIRST WITCH.\n", b" Gentl. \n"
    lines, kinds = zip(
        (b"So:\n", 0), (said, 0), (long, 1), (said, 0), (short, 1), (said, 0),
        (b"ACT II.\n", 0), (long, 0), (b"LO.\n", 0), (said, 0), (b"2 Men.\n", 1),
        (b"\nSCENE.\n\n", 0), (long, 2), (said, 0), (b"LONGER.\n", 1), (said, 0), (short, 2),
        (b"Exit.\n\n", 0), (b"Exeunt.\n\n", 0), (b"ACTOR.\n", 1), strict=True,
    )  # fmt: skip
    play, expected = b"".join(lines), np.repeat(kinds, [*map(len, lines)])
    assert transformer.times_of(play).tolist() == expected.tolist()

    def table(options: str) -> list[str]:
        return printed(f"--mamba mamba --data text play --plays {options}").splitlines()

    (model := random_model(vocab_size=256)).save_pretrained("mamba")
    Path("text").write_bytes(said)
    Path("play").write_bytes(play)
    first, _, row = table("--rows mamba --hold-out play")[-6:-3]
    ids = torch.tensor([*play])
    nats = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
    assert torch.allclose(transformer.losses(model, ids, window=7), nats, atol=1e-5)
    means = [nats[expected[1:] == kind].mean().item() for kind in range(3)]
    shares = [100 * (expected[1:] == kind).mean() for kind in range(3)]
    assert [float(x) for x in re.findall(r"([\d.]+) %", first)] == pytest.approx(shares, abs=0.06)
    assert [float(x) for x in re.findall(r"\d\.\d+", row)] == pytest.approx(means, abs=1e-4)
    *_, row, _, _, last = table("--rows mamba --hold-out text")
    assert re.fullmatch(r"\| mamba \| \d\.\d+ \|  \|  \|", row), "nobody speaks"
    assert last == "| mamba |  |  |  |", "nobody speaks"
    assert len(table("--rows xz --hold-out play")) == 1 + 3, "no model, no second table"


def test_a_name_that_the_training_text_does_not_know_costs_what_it_does_each_time(
    transformer, printed, monkeypatch
):
    """Two plays; a name that speaks in both begins anew in the second. Who speaks 22 times has two
    speeches in the last class; who speaks last has no line break after it. Each play is read once.
    """

    def play(*names: str) -> bytes:
        return b"".join(b"A speech. PAT.\n\n%s.\n" % name.encode() for name in names)

    learned = play("KNOWN", "OLD WITCH")  # PAT is only named in it
    plays = [
        play("KNOWN", *["PAT"] * 22, "1 LORD", "KNOWN", "WITCH", "Known", *["KNOWN"] * 20),
        play("OLD WITCH", "PAT", "2 LORD", "1 LORD", "PAT", "1 LORD")[:-1],
    ]
    (model := random_model(vocab_size=256)).save_pretrained("mamba")
    for name, text in zip(("learned", "a", "b"), (learned, *plays), strict=True):
        Path(name).write_bytes(text)
    costs = {"1st time": [], "2nd to 20th": [], "from the 21st on": []}
    for text in plays:
        ids = torch.tensor([*text])
        nats = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
        spoken = Counter()
        for match in re.finditer(rb"(?<=\n\n)([^.]+)\.(?:\n|$)", text):
            spoken[match[1]] += 1
            if match[1] not in (b"KNOWN", b"OLD WITCH"):
                kind = (spoken[match[1]] > 1) + (spoken[match[1]] > 20)
                costs[[*costs][kind]].append(nats[match.start() - 1 : match.end() - 1].sum().item())
    assert [len(each) for each in costs.values()] == [7, 21, 2]
    read, losses = [], transformer.losses

    def watched(model: Mamba, ids: torch.Tensor, window: int) -> torch.Tensor:
        read.append(bytes(ids.tolist()))
        return losses(model, ids, window)

    monkeypatch.setattr(transformer, "losses", watched)
    options = "--mamba mamba --rows mamba --plays --data learned a b --hold-out a b"
    first, _, row = printed(options).splitlines()[-3:]
    assert read == plays
    titles = " | ".join(f"{kind}: {len(each)}" for kind, each in costs.items())
    assert first == f"| nats of a new name | {titles} |"
    means = [sum(each) / len(each) for each in costs.values()]
    assert [float(x) for x in re.findall(r"\d+\.\d+", row)] == pytest.approx(means, abs=0.006)


def test_columns_are_those_of_their_files_and_what_cannot_be_a_table_is_refused(printed):
    def table(names: str) -> list[str]:
        return printed(f"--rows xz --data text a b --hold-out {names}").splitlines()

    for folder in "ab":
        Path(folder).mkdir()
    Path("text").write_bytes(b"to be or not to be")
    Path("a/z").write_bytes(b"to be or not to be")
    Path("b/y").write_bytes(b"x1y2z3w4v5u6t7s8r9q0")
    assert table("y z")[1] == table("z y y")[1] == "| nats per byte | y | z | all |"
    y, z = (float(x) for x in table("z y")[-1].split("|")[2:4])
    assert y > z + 1
    with pytest.raises(SystemExit, match="none is left to learn from"):
        table("y z text")
    Path("b/z").write_bytes(b"another z")
    with pytest.raises(SystemExit, match="two files of --data have the same name"):
        table("z")


def test_the_table_has_a_row_for_each_and_the_transformer_is_trained_once(
    transformer, printed, monkeypatch, capsys
):
    """What is in the text costs a compressor little, and chance costs it 8 ln 2 nats a byte."""

    shared = """--data text seen chance --hold-out seen chance --d-model 16 --n-layer 2 --steps 4
        --evaluate-every 2 --batch 2 --seqlen 16 --lr 0.02 --warmup 1"""

    def table(options: str) -> list[list[float]]:
        table.printed = printed(f"--mamba mamba {shared} {options}")
        rows = re.findall(r"^\| ([\w-]+) \| (.*) \| (.*) \| (.*) \|$", table.printed, re.M)
        return {name: [float(number) for number in numbers] for name, *numbers in rows[1:]}

    dice = random.Random(0)
    text = bytes(dice.choices(b"abcdefgh .", k=30_000))
    Path("text").write_bytes(text)
    Path("seen").write_bytes(text[9000:11000])
    Path("chance").write_bytes(dice.randbytes(3000))
    random_model(vocab_size=256).save_pretrained("mamba")
    rows = table("--out out")
    assert [*rows] == ["xz", "bzip2", "5-gram", "mamba", "transformer"]
    for row in rows.values():
        assert row[2] == pytest.approx((3 * row[0] + 2 * row[1]) / 5, abs=2e-4)
    assert rows["xz"][1] < 0.1 and math.log(256) < rows["xz"][0] < 6
    counts = transformer.NGram(text)
    for name, found in zip(("chance", "seen"), rows["5-gram"][:2], strict=True):
        known = np.frombuffer(text[-4:] + Path(name).read_bytes(), dtype=np.uint8)
        p = counts(np.lib.stride_tricks.sliding_window_view(known, 5))
        assert found == pytest.approx(-np.log(p).mean(), abs=1e-4)
    assert rows["bzip2"][1] < math.log(16) and rows["5-gram"][1] < math.log(10)
    assert "transformer: 4 steps in " in table.printed and "step 4 " in table.printed
    again = table("--rows transformer --evaluate out")
    assert again == {"transformer": rows["transformer"]} and "step 4 " not in table.printed
    assert read_file(Path("out/training.pt"))["fixed"]["jump"] == 1
    monkeypatch.setattr(sys, "argv", f"train.py {shared} --device cpu --out out --jump 1".split())
    with pytest.raises(SystemExit, match="begun with model = a Transformer, not a Mamba"):
        transformer.train.main()
    sizes = "--d-model 256 --n-layer 10"  # the defaults: those of the model that goes on
    further = table(f"--rows transformer --init-from out --out more --lr 0 --steps 1 {sizes}")
    assert further["transformer"] == pytest.approx(again["transformer"], abs=2e-4), "its weights"
    assert abs(again["transformer"][1] - math.log(256)) > 0.05, "it has learned"
    for wrong in ("--packed", "--tokenizer mamba", "--validation-share 0.1", "--seqlen 1"):
        with pytest.raises(SystemExit, match="2"):
            table(wrong)
    assert "error: --validation-share is not for this table" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"transformer\.py: error: .*nothing"):
        table("--rows transformer --evaluate nothing")


@pytest.fixture
def scan(monkeypatch):
    """benchmarks/scan.py where mamba_ssm is installed: its two functions, by mamba.py."""
    pytest.importorskip("triton")

    def y_of(u, delta, A, B, C, D, z, delta_bias):
        assert u.is_contiguous() and B.shape == C.shape == (len(u), 1, A.shape[1], u.shape[2])
        u, delta, z, B, C = u.mT, delta.mT, z.mT, B[:, 0].mT, C[:, 0].mT
        y, _ = selective_scan(u, delta, A, B, C, D, dt_bias=delta_bias, scan="sequential")
        return y.mT, (y * F.silu(z)).mT

    def fwd(*inputs):
        *inputs, softplus = inputs
        without_gate, y = y_of(*inputs)
        assert softplus is True
        return without_gate, "states", y

    def bwd(*inputs):
        *inputs, dy, states, without_gate, dz, softplus, again = inputs
        assert (states, dz, softplus, again) == ("states", None, True, False)
        assert torch.equal(without_gate, y_of(*inputs)[0])
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in inputs]
            return list(torch.autograd.grad(y_of(*inputs)[1], inputs, dy))

    module = types.ModuleType("selective_scan_cuda")
    module.__spec__, module.fwd, module.bwd = "a spec", fwd, bwd
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", module)
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.delitem(sys.modules, "scan", raising=False)
    yield importlib.import_module("scan")
    del sys.modules["scan"]


def test_the_official_scan_gets_what_ours_gets_and_both_are_in_the_table(scan, monkeypatch, capsys):
    """A dry run of one small shape and length; another y, or gradient of x, is an error."""
    monkeypatch.setattr(scan, "STATES", 1)  # Triton's interpreter is slow
    shape = {"B": 2, "D": 3, "L": 4, "dtype": "fp32", "limit_memory_ms": 1, "limit_exp_ms": 2}
    monkeypatch.setattr(scan, "wanted_shapes", lambda *_: [shape])
    monkeypatch.setattr(sys, "argv", ["scan.py", "--dry-run", "--parts", "shapes"])
    assert scan.parse().official is False, "the real one does not run on a CPU"
    (options := scan.parse()).official = True
    monkeypatch.setattr(scan, "parse", lambda: options)
    times = itertools.count(1)
    monkeypatch.setattr(scan, "milliseconds", lambda run, _: (run(), next(times))[1])
    official = sys.modules["selective_scan_cuda"]
    for name in ("fwd", "bwd"):
        monkeypatch.setattr(official, name, mock.Mock(side_effect=getattr(official, name)))
    scan.main()
    ## To compare one of each; one forward for the timed backward pass; two timed ones of each.
    assert (official.fwd.call_count, official.bwd.call_count) == (1 + 1 + 2, 1 + 2)
    row = re.search(r"^\| 2 x 3 x 4, fp32 \| (.*) \|$", capsys.readouterr().out, re.M)[1]
    ## In the order of measuring: ours forward, from a graph, backward, from a graph; then theirs.
    expected = [x for ours, theirs in zip((1, 2, 3, 4), (5, 6, 7, 8), strict=True)
                for x in (theirs, ours, theirs / ours)]  # fmt: skip
    assert [float(x) for x in row.split("|")] == pytest.approx([*expected, 2, 0.5, 9], rel=5e-3)

    with torch.no_grad():
        row = scan.measure_length(2, options)
    assert (official.fwd.call_count, official.bwd.call_count) == (4 + 2, 3 + 1)
    *_, line, _ = scan.lengths_table([row]).split("\n")
    found = [float(x.replace(",", "")) for x in line.strip("| ").split("|")]
    assert found == pytest.approx([2, 10, 11, 1.05e7, 1, 1, 12, 13, 1, 14, 1], rel=5e-3)

    same = dict.fromkeys([f"{name}_ms" for name in scan.PASSES], 1.0)
    same |= {"fwd_MiB": 1.0, "bwd_MiB": 1.0}
    monkeypatch.setattr(scan, "measure_passes", lambda *_: dict(same))
    monkeypatch.setattr(scan, "errors", lambda *_: (0.0, 0.0))
    for name, which in (("fwd", 2), ("bwd", 0)):
        right = getattr(official, name)

        def wrong(*inputs, right=right, which=which):
            results = list(right(*inputs))
            results[which] = results[which] * 1.001
            return results

        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=r"by 1\.0e-03"):
            patch.setattr(official, name, wrong)
            scan.main()


def test_lines_whose_mutants_do_not_count_are_still_there():
    root = Path(__file__).parent.parent
    missing, sections = [], (root / "benchmarks/equivalent_mutants.txt").read_text().split("\n== ")
    for file, *lines in (section.splitlines() for section in sections[1:]):
        there = {line.strip() for line in (root / file).read_text().splitlines()}
        missing += [line for line in lines if line and line[0] not in "# " and line not in there]
    assert len(sections) > 9 and missing == []
