"""The paper's synthetic tasks: what is asked is what they say, and selection is what answers it."""

import sys

import induction_heads as induction
import pytest
import torch
import torch.nn.functional as F

from mamba import MambaConfig
from test_mamba import assert_close


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


def test_selection_learns_what_a_fixed_filter_does_not(monkeypatch):
    """In a short training of 8 tokens; and the same seed gives the same losses."""
    shares = {}
    for kind in ("selective", "fixed"):
        losses = []
        for steps in (150, 3):
            torch.manual_seed(0)
            model = induction.make_model(kind, 16)
            losses.append(induction.train(model, 8, 32, steps, 1e-2))
            if steps == 150:
                shares[kind] = induction.accuracy(model, 8, rows=400)
        assert losses[0][:3] == losses[1]
        assert abs(losses[0][0] - torch.tensor(16.0).log()) < 0.1, "at first it guesses"
    assert shares["selective"] > 0.95 and shares["fixed"] < 0.6, shares


def test_the_command_prints_a_table_and_draws(monkeypatch, tmp_path, capsys):
    sizes = {"d_model": 8, "length": 8, "batch": 2, "steps": 1, "lr": 1e-3, "asked": [4, 8]}
    monkeypatch.setitem(induction.SIZES, "small", sizes)
    arguments = ["--small", "--seeds", "3", "5", "--out", str(tmp_path / "picture.png")]
    monkeypatch.setattr(sys, "argv", ["induction_heads.py", *arguments])
    induction.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "| length | paper | selective, seed 3 | selective, seed 5 | fixed, seed 3 | fixed, seed 5 |"
    )
    assert lines[2].startswith("| 4 |") and lines[3].startswith("| 8 (trained) |")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", ["induction_heads.py", "--steps", "0"])
    with pytest.raises(SystemExit, match="2"):
        induction.main()
