"""examples/look_inside.py: what it says about a layer is what happens in the layer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import look_inside as look
import pytest
import torch
from look_inside import watch

import test_mamba
from mamba import Mamba, MambaConfig, discretize, scan_sequential
from test_mamba import RULES, assert_close, by_hand, random_ids, random_state

ROOT = Path(__file__).parent.parent


def random_inside(batch=2, seqlen=13, d=5, n=3, dtype=torch.float64, delta=1.0, seed=0):
    """What `watch` sees in a layer; Δ from nearly 0 to so large that bilinear's Ā < 0."""
    torch.manual_seed(seed)
    inside = {
        "x": torch.randn(batch, seqlen, d),
        "dt": torch.full((batch, seqlen, d), torch.nan),  # nobody should need it
        "delta": delta * torch.randn(batch, seqlen, d).exp(),
        "A": -torch.arange(1.0, n + 1).expand(d, n) * torch.rand(d, 1).add(0.2),
        "B": torch.randn(batch, seqlen, n),
        "C": torch.randn(batch, seqlen, n),
    }
    return {name: tensor.to(dtype) for name, tensor in inside.items()}


def scan(inside, h0=None, **options):
    return scan_sequential(*(inside[name] for name in ("x", "delta", "A", "B", "C")), h0, **options)


def random_model(rule="mamba", dtype=torch.float64, n_layer=2):
    torch.manual_seed(1)
    config = MambaConfig(d_model=6, n_layer=n_layer, vocab_size=24, d_state=4, rule=rule)
    model = Mamba(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # Δ, B and C that differ much from token to token
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


## ================================================================================================
## What is watched
## ================================================================================================


def check_what_was_seen(layers, model, ids, start, logits, state) -> None:
    """The recurrence over what was seen gives every layer's state and the logits."""
    stream = model.backbone.embedding(ids)
    for i, (layer, seen) in enumerate(zip(model.backbone.layers, layers, strict=True)):
        block, x, delta = layer.mixer, seen["x"], seen["delta"]
        expected = torch.log1p(torch.exp(seen["dt"] + block.dt_proj.bias))
        assert_close(f"delta of layer {i}", delta, expected, 1e-6)
        assert_close(f"A of layer {i}", seen["A"], -block.A_log.exp(), 1e-6)
        y, h = by_hand(x, delta, seen["A"], seen["B"], seen["C"], start.h[i])
        assert_close(f"h of layer {i}", state.h[i], h, 1e-5)
        z = block.in_proj(layer.norm(stream))[..., 32:]
        stream = stream + block.out_proj(((y + block.D * x) * z * torch.sigmoid(z)).float())
    assert_close("logits", logits, model.lm_head(model.backbone.norm_f(stream)), 1e-5)


def test_the_recurrence_over_what_was_seen_gives_every_layers_state_and_the_logits():
    """Of the last call: a whole sequence, and then a step."""
    model = test_mamba.random_model()
    ids, start = random_ids(2, 9), random_state(model, 2)
    with watch(model) as layers:
        logits, state = model(ids, start)
        check_what_was_seen(layers, model, ids, start, logits, state)
        next_logits, last = model.step(ids[:, 0], state)
    assert [tuple(layers[1][name].shape) for name in ("x", "delta", "A", "B")] == [
        (2, 32), (2, 32), (32, 4), (2, 4),
    ]  # fmt: skip
    of_one = [
        {name: t if name == "A" else t.unsqueeze(1) for name, t in layer.items()}
        for layer in layers
    ]
    check_what_was_seen(of_one, model, ids[:, :1], state, next_logits.unsqueeze(1), last)


def test_delta_is_seen_with_float32_digits_and_gradients_flow_through_what_was_seen():
    model = test_mamba.random_model().bfloat16()
    with watch(model) as layers:
        model(random_ids(2, 5))
    for layer, seen in zip(model.backbone.layers, layers, strict=True):
        bias = layer.mixer.dt_proj.bias.double()
        expected = torch.log1p(torch.exp(seen["dt"].double() + bias))
        assert_close("delta", seen["delta"], expected, 1e-6)
        assert seen["dt"].dtype == seen["x"].dtype == torch.bfloat16
    layers[1]["delta"].mean().backward()
    assert model.backbone.layers[0].mixer.A_log.grad.any()


def test_nothing_is_watched_once_the_context_is_left_even_by_an_exception():
    model = test_mamba.random_model()
    with pytest.raises(KeyError), watch(model) as layers:
        model(random_ids(1, 2))
        raise KeyError
    seen = [dict(layer) for layer in layers]
    model(random_ids(1, 3))
    for layer, before in zip(layers, seen, strict=True):
        assert layer.keys() == before.keys()
        assert all(layer[name] is before[name] for name in layer)
    assert not any(module._forward_hooks for module in model.modules())


def test_watching_changes_nothing_and_two_may_watch():
    model, ids = test_mamba.random_model(), random_ids(2, 5)
    expected = model(ids)
    with watch(model) as layers, watch(model.backbone.layers[1]) as (second,):
        assert torch.equal(model(ids), expected)
    assert all(second[name] is layers[1][name] for name in ("x", "dt"))
    assert torch.equal(second["delta"], layers[1]["delta"])


## ================================================================================================
## What is drawn
## ================================================================================================


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("with_reset", [False, True])
def test_the_matrix_is_the_formula_of_the_paper_written_out(rule, with_reset):
    inside = random_inside(batch=2, seqlen=7, d=3, n=2)
    batch, seqlen, d = inside["x"].shape
    reset = torch.zeros(batch, seqlen, dtype=torch.bool)
    if with_reset:
        reset[0, 3] = reset[1, 0] = reset[1, 6] = True
    expected = torch.zeros(batch, d, seqlen, seqlen, dtype=torch.float64)
    for b in range(batch):
        A_bar, B_bar = discretize(inside["delta"][b], inside["A"], inside["B"][b], rule)
        for t in range(seqlen):
            for s in range(t + 1):
                product = B_bar[s].clone()  # (d, n)
                for k in range(s + 1, t + 1):
                    product = product * (0 if reset[b, k] else A_bar[k])
                expected[b, :, t, s] = (product * inside["C"][b, t]).sum(-1)
    ours = look.hidden_attention(inside, rule, reset=reset if with_reset else None)
    assert ours.dtype == torch.float64 and ours.shape == expected.shape
    assert error(ours, expected) < 1e-14
    assert (ours.triu(1) == 0).all(), "no token reads one that is to come"


@pytest.mark.parametrize("rule", RULES)
def test_the_matrix_times_x_is_the_output_of_the_scan(rule):
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        for delta in (1e-3, 1.0, 30.0):  # nothing forgotten; some; all, down to Ā = 0
            inside = random_inside(seqlen=67, dtype=dtype, delta=delta)
            alpha = look.hidden_attention(inside, rule)
            y = (alpha @ inside["x"].mT.unsqueeze(-1)).squeeze(-1).mT
            assert y.dtype == dtype and error(y, scan(inside, rule=rule)[0]) < bound


def test_float32_keeps_its_digits_after_a_long_text():
    """Where differences of cumulative sums would have lost four of them."""
    inside = random_inside(batch=1, seqlen=600, d=3, delta=20.0)
    exact = look.hidden_attention(inside)
    low = look.hidden_attention({name: tensor.float() for name, tensor in inside.items()})
    late = exact[..., 300:, 300:].tril(-1)
    assert late.norm() > 0 and error(low[..., 300:, 300:].tril(-1).double(), late) < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_the_states_are_those_of_stepping_token_by_token(rule):
    """From a state that is not zero, which is carried; and the last is what the model returns."""
    model = random_model(rule)
    ids = torch.randint(24, (2, 11))
    _, start = model(ids[:, :4], model.init_state(2))
    with watch(model) as layers:
        _, end = model(ids[:, 4:], start)
    hs = [look.states(inside, h0, rule) for inside, h0 in zip(layers, start.h, strict=True)]
    state = start
    for t in range(7):
        _, state = model.step(ids[:, 4 + t], state)
        for layer, h in enumerate(hs):
            assert error(h[:, t], state.h[layer]) < 1e-12
    assert error(torch.stack([h[:, -1] for h in hs]), end.h) < 1e-12


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_reading_the_states_with_c_gives_the_output_of_the_scan(rule, dtype, bound):
    inside = random_inside(dtype=dtype)
    h0 = torch.randn(2, 5, 3, dtype=dtype)
    for start in (None, h0):
        h = look.states(inside, start, rule)
        assert h.shape == (2, 13, 5, 3) and h.dtype == dtype
        y, last = scan(inside, start, rule=rule)
        assert error((h * inside["C"].unsqueeze(-2)).sum(-1), y) < bound
        assert error(h[:, -1], last) < bound


@pytest.mark.parametrize("rule", RULES)
def test_nothing_crosses_a_reset(rule):
    model = random_model(rule)
    ids, reset = torch.randint(24, (2, 9)), torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 5] = True
    with watch(model) as packed:
        _, end = model(ids, model.init_state(2), reset=reset)
    with watch(model) as alone:
        model(ids[:, 5:])
    for layer, (inside, second) in enumerate(zip(packed, alone, strict=True)):
        alpha = look.hidden_attention(inside, rule, reset=reset)
        assert (alpha[..., 5:, :5] == 0).all() and (alpha[..., 5:, 5] != 0).all()
        assert error(alpha[..., 5:, 5:], look.hidden_attention(second, rule)) < 1e-12
        assert (look.mean_attention(inside, rule, reset)[:, 5:, :5] == 0).all()
        h = look.states(inside, torch.randn_like(end.h[layer]), rule, reset)
        assert error(h[:, 5:], look.states(second, rule=rule)) < 1e-12
        assert error(h[:, -1], end.h[layer]) < 1e-12
    with pytest.raises(ValueError, match=r"reset must be \(2, 9\), got \(2, 4\)"):
        look.states(packed[0], rule=rule, reset=reset[:, 5:])


def test_chosen_channels_are_those_of_the_whole():
    inside = random_inside()
    whole = look.hidden_attention(inside)
    for channels in ([3], [4, 0], slice(1, 3), torch.tensor([2, 2])):
        some = look.hidden_attention(inside, channels=channels)
        assert error(some, whole[:, channels]) < 1e-14
    assert look.hidden_attention(inside, channels=[]).shape == (2, 0, 13, 13)


def test_half_precision_is_taken_as_float32():
    """x, B and C of a bfloat16 model are bfloat16; the scan of that model computes in float32."""
    inside = random_inside(dtype=torch.float32)
    for low in (("x", "B", "C"), tuple(inside)):  # or all of them, from a file
        inside |= {name: inside[name].bfloat16() for name in low}
        alpha, h = look.hidden_attention(inside), look.states(inside)
        assert alpha.dtype == h.dtype == torch.float32
        y = (alpha @ inside["x"].float().mT.unsqueeze(-1)).squeeze(-1).mT
        assert error(y, scan(inside)[0]) < 1e-5 and error(h[:, -1], scan(inside)[1]) < 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_the_mean_over_channels_never_holds_all_channels(rule):
    from torch.utils._python_dispatch import TorchDispatchMode

    inside = random_inside(seqlen=40, d=37)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        mean = look.mean_attention(inside, rule, at_once=5)
    assert largest == 2 * 5 * 40**2
    assert mean.shape == (2, 40, 40)
    assert error(mean, look.hidden_attention(inside, rule).abs().mean(1)) < 1e-14
    assert error(mean, look.mean_attention(inside, rule)) < 1e-14


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "look_inside.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_draws_a_layer_of_the_shipped_model(tmp_path):
    result = run("To be, or not to be,\nfür $a$\t", "--layer", "9", folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "wrote look_inside.png\n"
    from matplotlib.image import imread

    picture = imread(tmp_path / "look_inside.png")
    assert picture.shape[0] > 1000 and picture.std() > 0.1  # and not one colour


def test_a_text_of_one_token_and_one_too_long_for_labels_are_drawn(tmp_path):
    for seqlen in (1, 81):
        inside, out = random_inside(1, seqlen, dtype=torch.float32), tmp_path / f"{seqlen}.png"
        look.draw(inside, "bilinear", ["a"] * seqlen, r"$\typo$", out)
        assert out.stat().st_size > 10_000


def test_tokens_are_labelled_so_that_all_of_them_can_be_seen():
    from generate import ByteTokenizer

    tokenizer = ByteTokenizer()
    labels = [look.token_label(tokenizer, i) for i in tokenizer.encode("a \n\tü\x00\\")]
    assert labels == ["a", "␣", "↵", "\\t", "c3", "bc", "00", "\\"]


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (("a", "--layer", "10"), 2, "--layer must be 0 ... 9 for this model, got 10"),
        (("a", "--layer", "-1"), 2, "--layer must be 0 ... 9 for this model, got -1"),
        (("",), 2, "the prompt is empty"),
        (("a", "--model", "no/such/folder"), 1, "no/such/folder"),
        (("a", "--out", "no/such/folder.png"), 1, "no/such/folder.png"),
        (("a", "--out", "picture.typo"), 1, "'typo' is not supported"),
    ],
)
def test_what_goes_wrong_is_one_line(arguments, code, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["look_inside.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        look.main()
    out, err = capsys.readouterr()
    message = err if code == 2 else exit.value.code  # Python prints the latter and exits with 1
    assert exit.value.code == (2 if code == 2 else message) and out == ""
    assert message.startswith("look_inside.py: error: ") and words in message
    assert message.strip().count("\n") == 0


def test_watch_says_what_it_cannot_read():
    with pytest.raises(ValueError, match="found none"), look.watch(torch.nn.Linear(2, 2)):
        pass
    model = Mamba(MambaConfig(d_model=8, vocab_size=11))
    with look.watch(model) as layers:
        with pytest.raises(ValueError, match="there is no sequence here"):
            look.states(layers[0])
        model.step(torch.zeros(1, dtype=torch.long), model.init_state(1))
        with pytest.raises(ValueError, match="there is no sequence here"):
            look.states(layers[0])
