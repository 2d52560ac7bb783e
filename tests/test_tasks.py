"""The synthetic tasks: what is asked is what they say, and who answers it is who should."""

import json
import math
import sys
from functools import partial

import induction_heads as induction
import pytest
import recall
import selective_copying as copying
import torch
import torch.nn.functional as F
from torch import nn

from mamba import MambaConfig
from test_mamba import assert_all_close, assert_close


def test_a_sequence_holds_the_special_token_once_and_ends_with_it():
    """What followed it is asked for; it may stand anywhere, and is never what is asked for."""
    torch.manual_seed(0)
    special = induction.TOKENS - 1
    ids, wanted = induction.make_sequences(3000, 7, "cpu")
    rows, places = (ids[:, :-1] == special).nonzero(as_tuple=True)
    assert torch.equal(rows, torch.arange(3000)) and (ids[:, -1] == special).all()
    assert torch.equal(wanted, ids[rows, places + 1]) and places.unique().tolist() == [*range(5)]
    assert wanted.unique().tolist() == [*range(special)]


def test_a_fixed_block_is_the_same_convolution_for_every_input():
    """Behind x, which is what selection reads: the response to a sum is the sum of responses."""
    block = induction.FixedBlock(MambaConfig(8)).double()
    torch.manual_seed(0)
    inputs = torch.randn(2, 2, 9, 16, dtype=torch.float64)

    def response(x):
        dt, B, C = block.select(x)
        delta = F.softplus(dt + block.dt_proj.bias)
        h, ys = torch.zeros(2, 16, 16, dtype=torch.float64), []
        for t in range(9):
            h = torch.exp(delta[:, t, :, None] * block.A) * h
            h = h + (delta[:, t] * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(1)
            ys.append((h * C[:, t].unsqueeze(1)).sum(-1))
        return torch.stack(ys, dim=1)

    first, second = inputs
    assert_close("y", response(first - 3 * second), response(first) - 3 * response(second), 1e-12)
    block(torch.randn(2, 9, 8, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (block.B, block.C, block.dt_proj.bias))


def test_a_long_sequence_is_read_in_parts(monkeypatch):
    model, ids = induction.make_model("selective", 8), torch.randint(16, (2, 23))
    whole = induction.answer(model, ids)
    monkeypatch.setattr(induction, "PART", 5)
    assert_close("logits", induction.answer(model, ids), whole, 1e-5)
    assert_close("logits", whole, model(ids)[:, -1], 1e-6)


def test_what_is_copied_is_what_is_neither_noise_nor_marker_in_the_order_in_which_it_came():
    torch.manual_seed(0)
    ids, said = copying.make_sequences(2000, 7, 3, "cpu")
    before, after = ids[:, :7], ids[:, 7:]
    is_data = before != copying.NOISE
    assert torch.equal(before[is_data].view(2000, 3), said)
    assert (after == copying.MARKER).all() and after.shape == (2000, 3)
    assert said.unique().tolist() == [*range(1, copying.MARKER)]
    assert len(is_data.unique(dim=0)) == math.comb(7, 3), "data may stand at any three places"


def test_every_key_is_asked_once_and_wants_the_value_that_came_with_it():
    torch.manual_seed(0)
    ids, wanted = recall.make_sequences(500, 3, 5, "cpu")
    orders = set()
    for row, values in zip(ids.tolist(), wanted.tolist(), strict=True):
        pairs, asked = dict(zip(row[0:6:2], row[1:6:2], strict=True)), row[6:]
        assert [pairs[key] for key in asked] == values and len(pairs) == 3
        assert max(pairs) < 5 <= min(values) and max(values) < 10
        orders.add(tuple(row[0:6:2].index(key) for key in asked))
    assert len(orders) == 6 and ids[:, 0].unique().tolist() == [*range(5)]
    assert wanted.unique().tolist() == [*range(5, 10)]


def test_an_embedding_by_a_product_is_the_lookup():
    ids = torch.randint(copying.TOKENS, (3, 7))
    torch.manual_seed(0)
    ours = copying.make_model("selective", 8).double()
    torch.manual_seed(0)
    theirs = induction.make_model("selective", 8).double()
    assert ours.lm_head.weight is ours.backbone.embedding.weight
    gradients = []
    for model in (ours, theirs):
        model(ids).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_close("logits", ours(ids), theirs(ids), 1e-12)
    assert_all_close(*gradients, 1e-12)


def test_a_question_is_answered_at_its_own_key_for_each_number_of_pairs():
    """What ask_all gives is what the whole of each sequence gives at the keys that are asked."""
    model = recall.make_model((20, 2), 8, 6)
    assert (model.config.d_inner, model.config.d_state, model.config.vocab_size) == (20, 2, 12)
    assert model.backbone.layers[0].mixer.A_log.count_nonzero() == 0  # A = -1
    torch.manual_seed(0)
    logits, values = recall.ask_all(model, questions=12, pairs=[2, 4], words=6)
    torch.manual_seed(0)
    for pairs, rows, part in ((2, 6, slice(0, 12)), (4, 3, slice(12, 24))):
        ids, wanted = recall.make_sequences(rows, pairs, 6, "cpu")
        assert torch.equal(values[part], wanted.flatten())
        assert_close("logits", logits[part], model(ids)[:, 2 * pairs :].flatten(0, 1), 1e-6)
    assert len(logits) == len(values) == 24


def test_the_attention_beside_mamba_is_attention():
    """Softmax of the products with all keys so far, written out; and its model reads nothing to
    the right."""
    model = recall.make_model(None, 8, 6).double()
    attention, u = model.backbone.layers[0].mixer, torch.randn(2, 7, 8, dtype=torch.float64)
    raw = F.pad(attention.in_proj(u), (0, 0, 3, 0)).mT
    query, key, value = F.silu(attention.conv1d(raw)).mT.chunk(3, dim=-1)
    for t in range(7):
        scores = (key[:, : t + 1] @ query[:, t].unsqueeze(-1)).squeeze(-1) / math.sqrt(8)
        y = (scores.softmax(1).unsqueeze(-1) * value[:, : t + 1]).sum(1)
        out, _ = attention(u, attention.init_state(2))
        assert_close("out", out[:, t], attention.out_proj(y), 1e-12)
    ids, other = torch.randint(12, (2, 1, 9))
    mixed = torch.cat([ids[:, :5], other[:, 5:]], dim=1)
    assert_close("logits", model(mixed)[:, :5], model(ids)[:, :5], 1e-12)
    assert not torch.allclose(model(mixed)[:, 5:], model(ids)[:, 5:])


def test_a_sum_of_random_patterns_holds_as_many_pairs_as_the_line_says():
    """Tried: the share of right answers is high at half as many, and low at four times as many."""
    generator, numbers, words = torch.Generator().manual_seed(0), 256, 32
    line = recall.held_by_random_patterns(numbers, words)
    shares = []
    for pairs in (round(line / 2), round(line), round(4 * line)):
        right = 0
        for _ in range(100):
            # Of the first key: the patterns of all values with it, of which value 0 was said.
            signs = torch.randint(2, (words + pairs, numbers), generator=generator) * 2.0 - 1
            state = signs[0] + signs[words + 1 :].sum(0)
            right += (signs[:words] @ state).argmax() == 0
        shares.append(right / 100)
    assert shares[0] > 0.9 > shares[1] > 0.5 > shares[2] + 0.1, shares


@pytest.mark.parametrize(
    ("shares", "count", "sign"),
    [([1, 0.75, 0.25], 4 * 2**0.5, ""), ([1, 0.6, 0.4], 4 * 2**0.5, ""), ([0.5, 0.4, 0.3], 2, ""),
     ([1, 1, 0.5], 8, ">"), ([0.4, 0.3, 0.2], 2, "<")],
)  # fmt: skip
def test_half_is_read_between_the_numbers_of_pairs_that_were_tried(shares, count, sign):
    assert recall.half(shares, [2, 4, 8]) == (pytest.approx(count), sign)


def test_a_state_stands_in_the_picture_where_its_numbers_and_its_half_are(monkeypatch, tmp_path):
    from matplotlib.axes import Axes

    sizes = {"words": 8, "asked": [1, 2, 4], "states": [(16, 1), (24, 2)], "d_model": 8}
    results = {(None, 0): [1, 1, 1], ((16, 1), 0): [1, 0.5, 0.2], ((24, 2), 0): [1, 1, 0.9]}
    drawn, plot = [], Axes.plot

    def watched(axes, *what, **how):
        drawn.append(what)
        return plot(axes, *what, **how)

    monkeypatch.setattr(Axes, "plot", watched)
    recall.draw(results, sizes, tmp_path / "a.png")
    assert [xy for xy in drawn if xy[0] in (16, 48)] == [(16, 2, "o"), (48, 4, "^")]
    (line,) = [xy for xy in drawn if xy[0] == [8, 96]]
    assert line[1] == [recall.held_by_random_patterns(n, 8) for n in (8, 96)]
    assert ([1, 2, 4], [1, 0.5, 0.2], "o-") in drawn


def test_the_learning_rate_falls_to_zero_at_the_end_of_the_training_only():
    """With a gradient that hardly changes, AdamW moves a weight by its learning rate, also where
    the gradient is tiny, but not where it is clipped to next to nothing. And after a large gradient
    small ones soon move it again."""
    model = nn.Module()
    model.lm_head = nn.Linear(1, 2, bias=False)

    def ask(model, scale):
        return scale * model.lm_head.weight.T, torch.tensor([0])

    whole, faded = 10.0, 6 + 0.8 + 0.6 + 0.4 + 0.2
    for options, scale, steps in (
        ({}, 1.0, whole), ({"fade": 0.5}, 1.0, faded), ({}, 1e-9, whole), ({"clip": 1e-18}, 1.0, 0),
    ):  # fmt: skip
        before = model.lm_head.weight.detach().clone()
        induction.train(model, partial(ask, scale=scale), 10, 1e-5, **options)
        moved = (model.lm_head.weight - before).detach() / 1e-5
        assert moved.flatten().tolist() == pytest.approx([steps, -steps], rel=0.02, abs=0.02)

    scales = iter([1.0] + [1e-3] * 299)
    before = model.lm_head.weight.detach().clone()
    induction.train(model, lambda model: ask(model, next(scales)), 300, 1e-5)
    moved = (model.lm_head.weight - before).abs().max().item() / 1e-5
    assert 100 < moved < 250, "of 300; with betas[1] = 0.999, 10"


## The trainings are short, and their tasks shorter than those of --small.


@pytest.mark.parametrize(
    ("task", "sizes", "options", "at_least", "at_most"),
    [
        (induction, {"length": 10}, {"steps": 150, "lr": 1e-2}, 0.95, 0.6),
        (copying, {"length": 12, "data": 2},
         {"steps": 160, "lr": 2e-2, "fade": 0.2, "clip": 1.0}, 0.9, 0.8),
    ],
    ids=["induction_heads", "selective_copying"],
)  # fmt: skip
def test_selection_learns_what_a_fixed_filter_does_not(task, sizes, options, at_least, at_most):
    """And the same seed gives the same training."""
    ask, shares = partial(task.ask, rows=32, **sizes), {}
    for kind in ("selective", "fixed"):
        torch.manual_seed(0)
        found = task.train(model := task.make_model(kind, 16), ask, **options)
        shares[kind] = task.accuracy(model, ask, times=12)
        assert abs(found[0, 0] - math.log(16)) < 0.1, "at first it guesses"
    assert shares["selective"] > at_least and shares["fixed"] < at_most, shares
    torch.manual_seed(0)
    again = task.train(task.make_model("fixed", 16), ask, **options | {"steps": 3, "fade": 0.0})
    assert torch.equal(again, found[:, :3])


def test_attention_recalls_at_once_and_mamba_as_its_state_allows():
    ask, shares = partial(recall.ask_all, questions=64, pairs=[2, 4], words=8), {}
    for state, steps in ((None, 80), ((128, 1), 160), ((128, 4), 160)):
        torch.manual_seed(0)
        model = recall.make_model(state, 64, 8)
        recall.train(model, ask, steps, 2e-2, fade=0.2, clip=1.0)
        shares[state] = recall.accuracy(model, ask, times=20)
    attention, small, large = shares.values()
    assert attention > 0.98 and large > 0.88 and small < large - 0.05, shares


@pytest.mark.gpu(needed=True)
@pytest.mark.parametrize(
    "make",
    [partial(copying.make_model, "selective", 16), partial(copying.make_model, "fixed", 16),
     partial(recall.make_model, None, 16, 8)],
    ids=["selective", "fixed", "attention"],
)  # fmt: skip
def test_a_recorded_training_has_the_losses_of_a_plain_one(make):
    """The same sequences at each step: on a GPU from a CUDA graph, on the CPU without."""
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = make().to(device)
        ids, said = (tensor.to(device) for tensor in copying.make_sequences(16, 12, 2, "cpu"))

        def ask(model, ids=ids, said=said):
            return model(ids, head=lambda hidden: model.lm_head(hidden[:, -2:])), said

        found.append(induction.train(model, ask, 12, 1e-3, fade=0.5)[0])
    assert_close("losses", found[1], found[0], 1e-3)
    assert found[1][-1] < found[1][0]


TABLES = {
    induction: "| length | paper | selective, seed 3 | selective, seed 5 | fixed, seed 3 | fixed, ",
    copying: "|  | paper | seed 3 | seed 5 |",
    recall: "| pairs | attention, seed 3 | attention, seed 5 | Mamba, 16 x 1 numbers, seed 3 | ",
}
SMALL = {
    induction: {"d_model": 8, "length": 8, "batch": 2, "asked": [4, 8]},
    copying: {"d_model": 8, "lengths": [4, 6], "batch": 2, "data": 2},
    recall: {"d_model": 8, "words": 4, "pairs": [1, 2], "asked": [1, 2, 4], "questions": 4,
             "states": [(16, 1), (24, 2)]},
}  # fmt: skip


@pytest.mark.parametrize("task", TABLES, ids=lambda task: task.__name__)
def test_a_command_prints_a_table_and_draws(task, monkeypatch, tmp_path, capsys):
    how = {"steps": 2, "lr": 1e-3, "fade": 0.0, "clip": 1.0}
    monkeypatch.setitem(task.SIZES, "small", how | SMALL[task])
    command, picture = [f"{task.__name__}.py", "--small"], tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", [*command, "--seeds", "3", "5", "--out", str(picture)])
    task.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(TABLES[task]) and lines[-1] == f"wrote {picture}"
    assert len({line.count("|") for line in lines[:4]}) == 1 and lines[3].count("%") >= 2
    if task is recall:
        assert [line.split(" ")[1] for line in lines[2:6]] == ["1", "2", "4", "half"]
    assert picture.stat().st_size > 10_000
    printed, keep = lines, ["--keep", str(tmp_path / "runs.json"), "--out", str(picture)]
    for seeds in (["3"], ["3", "5"], ["3", "5"]):  # of one run, then of both, then of none
        monkeypatch.setattr(sys, "argv", [*command, "--seeds", *seeds, *keep])
        task.main()
        if seeds == ["3"]:
            capsys.readouterr()
            assert json.loads((tmp_path / "runs.json").read_text())
    assert capsys.readouterr().out.splitlines() == printed * 2
    kept = len(json.loads((tmp_path / "runs.json").read_text()))
    task.SIZES["small"]["lr"] = 2e-3  # what was kept is of another training
    task.main()
    assert len(json.loads((tmp_path / "runs.json").read_text())) == 2 * kept
    monkeypatch.setattr(sys, "argv", [*command, "--seeds", *seeds, *keep, "--steps", "3"])
    task.main()
    assert len(json.loads((tmp_path / "runs.json").read_text())) == 3 * kept
    capsys.readouterr()
    for option, value, said in (
        ("--keep", str(picture), "is no file of finished runs, name another"),
        ("--steps", "0", "--steps must be at least 1, got 0"),
        ("--out", str(tmp_path / "no" / "a.png"), "--out must name a file in a folder that exists"),
        ("--out", str(tmp_path), "--out must name a file in a folder that exists"),
        ("--keep", "no/a.json", "--keep must name a file in a folder that exists, got no/a.json"),
        ("--out", "picture", "--out must end in .png, .svg or .pdf, got picture"),
    ):
        monkeypatch.setattr(sys, "argv", [*command, option, value])
        with pytest.raises(SystemExit, match="2"):
            task.main()
        assert said in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="1"):
        task.main()
    assert capsys.readouterr().err == "the picture needs matplotlib: pip install matplotlib\n"
