"""examples/look_inside.py: what it says about a layer is what happens in the layer."""

import re
from pathlib import Path

import look_inside as look
import pytest
import torch
from event_time import EventBlock
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from generate import ByteTokenizer
from mamba import Mamba, MambaConfig
from test_mamba import RULES, assert_close, by_hand, random_model, random_state, scan_inputs


def random_inside(seqlen: int = 13, dtype: torch.dtype = torch.float64, copies: int = 1):
    """What `watch` sees in a layer, and a state before it; Δ from 0.001 to 30."""
    inputs = scan_inputs(seqlen, delta=(1e-3, 30.0))
    inside = {name: tensor.detach().to(dtype) for name, tensor in inputs.items()}
    inside["A"] = inside["A"].repeat(copies, 1)
    inside |= {name: inside[name].repeat(1, 1, copies) for name in ("x", "delta")}
    return inside, inside.pop("h0").to(torch.promote_types(dtype, torch.float32))


def check_what_was_seen(layers, model, ids, start, logits, state) -> None:
    stream, dtype = model.backbone.embedding(ids), model.lm_head.weight.dtype
    for i, (layer, seen) in enumerate(zip(model.backbone.layers, layers, strict=True)):
        block, x, A = layer.mixer, seen["x"], -layer.mixer.A_log.double().exp()
        assert x.dtype == seen["dt"].dtype == dtype
        delta = (seen["dt"].double() + block.dt_proj.bias).exp().log1p()
        assert_close(f"delta of layer {i}", seen["delta"], delta, 1e-6)
        assert_close(f"A of layer {i}", seen["A"], A, 1e-6)
        y, h = by_hand(x, delta, A, seen["B"], seen["C"], start.h[i])
        assert_close(f"h of layer {i}", state.h[i], h, 1e-6)
        z = block.in_proj(layer.norm(stream).to(dtype))[..., 32:]
        stream = stream + block.out_proj(((y + block.D * x) * z * torch.sigmoid(z)).to(dtype))
    if dtype == torch.float32:
        assert_close("logits", logits, model.lm_head(model.backbone.norm_f(stream)), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_recurrence_over_what_was_seen_gives_every_layers_state_and_the_logits(dtype):
    """Of the last call: a whole sequence, and then a step. Gradients flow through what was seen."""
    model, ids = random_model().to(dtype), torch.randint(30, (2, 9))
    start = random_state(model, 2)
    with look.watch(model) as layers:
        logits, state = model(ids, start)
        check_what_was_seen(layers, model, ids, start, logits, state)
        logits, last = model.step(ids[:, 0], state)
    layers[1]["delta"].mean().backward()
    assert model.backbone.layers[0].mixer.A_log.grad.any()
    for layer in layers:
        layer |= {name: t.unsqueeze(1) for name, t in layer.items() if name != "A"}
    check_what_was_seen(layers, model, ids[:, :1], state, logits.unsqueeze(1), last)


def test_watching_changes_nothing_two_may_watch_and_it_ends_with_the_context():
    model, ids = random_model(), torch.randint(30, (2, 5))
    expected = model(ids)
    with pytest.raises(KeyError), look.watch(model) as layers:
        with look.watch(model.backbone.layers[1]) as (second,):
            assert torch.equal(model(ids), expected)
        raise KeyError
    assert all(torch.equal(second[name], layers[1][name]) for name in ("x", "dt", *"ABC"))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_column_is_what_one_token_leaves_and_the_states_are_those_of_the_scan(rule, dtype):
    """Across resets and from a state. Short floats are taken as float32, as a scan takes them."""
    bound = 1e-13 if dtype == torch.float64 else 1e-5
    inside, h0 = random_inside(dtype=dtype)
    some = torch.zeros(2, 13, dtype=torch.bool)
    some[0, 5] = some[1, 0] = some[1, 12] = True
    for reset in (None, some):
        alpha = look.hidden_attention(inside, rule, reset=reset)
        assert alpha.dtype == torch.promote_types(dtype, torch.float32)
        for s in range(13):
            pulse = torch.zeros(2, 13, 3)
            pulse[:, s] = 1
            left, _ = by_hand(**inside | {"x": pulse}, rule=rule, reset=reset)
            assert_close(f"column {s}", alpha[..., s], left.mT, bound)
            assert not alpha[:, :, :s, s].any(), "a token reads one that is to come"
        for start in (None, h0):
            h = look.states(inside, start, rule, reset)
            y, last = by_hand(**inside, h0=start, rule=rule, reset=reset)
            assert h.shape == (2, 13, 3, 4) and h.dtype == alpha.dtype
            assert_close("y", (h * inside["C"].unsqueeze(-2)).sum(-1), y, bound)
            assert_close("the last state", h[:, -1], last, bound)


class Largest(TorchDispatchMode):
    elements = 0  # of the largest tensor that is computed

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **keywords or {})
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_chosen_channels_are_those_of_the_whole_and_their_mean_never_holds_all():
    (inside, _), reset = random_inside(10, copies=13), torch.rand(2, 10) < 0.2
    whole = look.hidden_attention(inside, "zoh", reset=reset)
    for channels in ([], [2, 0], slice(1, 3), torch.tensor([2, 2])):
        alpha = look.hidden_attention(inside, "zoh", channels, reset)
        assert_close("alpha", alpha, whole[:, channels], 0)
    with Largest() as largest:
        mean = look.mean_attention(inside, "zoh", reset, at_once=5)
    assert largest.elements == 2 * 5 * 10**2
    for found in (mean, look.mean_attention(inside, "zoh", reset)):
        assert_close("mean", found, whole.abs().mean(1), 1e-14)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command, with a random model in "model"; `run.figures` are those that were saved."""
    config = {"n_layer": 3, "vocab_size": 256, "tokenizer": "bytes", "rule": "zoh"}
    random_model(**config).save_pretrained(tmp_path / "model")

    def run(*options: str) -> None:
        monkeypatch.setattr("sys.argv", ["look_inside.py", "--model", "model", *options])
        look.main()

    run.figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, out: (run.figures.append(f), savefig(f, out)))
    monkeypatch.chdir(tmp_path)
    return run


def test_the_picture_shows_what_is_in_the_layer(run, capsys):
    prompt = "To be,\nü$a$\t\x00\\\x7f"
    run(prompt)
    assert capsys.readouterr() == ("wrote look_inside.png\n", "")
    model, ids = Mamba.from_pretrained("model"), torch.tensor([list(prompt.encode())])
    with look.watch(model) as layers, torch.no_grad():
        model(ids)
    top, _, right, _, middle = run.figures[0].axes
    assert run.figures[0].get_suptitle() == "Layer 2 of model"

    delta = layers[2]["delta"][0]
    ratio = (delta / delta.log().mean(0).exp()).T
    drawn = torch.tensor(top.images[0].get_array())
    order = torch.cdist(drawn, ratio).argmin(1)
    assert sorted(order.tolist()) == list(range(32))
    assert_close("Δ over its mean", drawn, ratio[order], 1e-5)
    # Side by side as their angles are in the plane of the two leading principal components.
    leading = torch.linalg.eigh(ratio.log() @ ratio.log().T).eigenvectors[:, -2:]
    by_angle = torch.atan2(*leading.unbind(1)).argsort()
    steps = set((by_angle.argsort()[order].diff() % 32).tolist())
    assert steps in ({1}, {31}), "neither the one way round nor the other"
    norm = look.states(layers[2], rule="zoh")[0].flatten(1).norm(dim=1)
    assert_close("‖h‖", torch.tensor(middle.lines[0].get_ydata()), norm, 1e-6)
    alpha, image = look.mean_attention(layers[2], "zoh")[0], right.images[0].get_array()
    assert torch.equal(torch.tensor(image.mask), torch.ones_like(alpha).triu(1).bool())
    assert_close("|alpha|", torch.tensor(image.filled(0)), alpha.tril(), 1e-6)
    high = alpha.max().item()
    assert right.images[0].get_clim() == pytest.approx((high / 1e3, high))
    assert top.images[0].get_clim() == (1 / 4, 4) and middle.get_ylim()[0] == 0
    labels = [look.token_label(ByteTokenizer(), i) for i in prompt.encode()]
    assert " ".join(labels) == r"T o ␣ b e , ↵ c3 bc $ a $ \t 00 \ 7f"
    for axis in (top.xaxis, middle.xaxis, right.xaxis, right.yaxis):
        assert [text.get_text() for text in axis.get_ticklabels()] == labels


def test_a_text_of_one_token_and_one_too_long_for_labels_are_drawn(run):
    for seqlen in (1, 80, 81):
        inside = random_inside(seqlen, copies=30)[0]
        look.draw(inside, "bilinear", ["$\\a$"] * seqlen, r"$\typo$", Path("out.png"))
        top = run.figures[-1].axes[0]
        assert top.images[0].get_array().shape == (64, seqlen), "bands of like channels"
        labels = [(text.get_text(), text.get_fontsize()) for text in top.get_xticklabels()]
        assert (labels == [("$\\a$", min(10, 330 / seqlen))] * seqlen) == (seqlen <= 80)


def test_the_picture_of_the_block_names_the_widths_and_every_name_fits_into_its_box():
    figure = Figure(figsize=(7, 2.7), layout="constrained")
    axes, config = figure.subplots(), MambaConfig(d_model=256, d_state=8)
    look.draw_block(axes, config)
    figure.draw_without_rendering()
    boxes = [box.get_window_extent() for box in axes.collections]
    names = [text.get_text() for text in axes.texts if text.get_text()]
    assert {"the stream, 256 numbers a token", "x, 512", "selective scan\nh: 512 × 8"} < {*names}
    for text in axes.texts:
        if text.get_ha() == "center":
            around = text.get_window_extent()
            inside = [box for box in boxes if box.contains(around.x0, around.y0)]
            assert len(inside) == 1 and inside[0].contains(around.x1, around.y1), text.get_text()
    assert len(boxes) == 9


@pytest.mark.parametrize(("options", "code", "words"), [
    ("a --layer 3", 2, "--layer must be 0 ... 2 for this model, got 3"),
    ("a --layer -1", 2, "--layer must be 0 ... 2 for this model, got -1"),
    ("", 2, "the prompt is empty"),
    ("a --model no/such/folder", 1, "no/such/folder"),
    ("a --out no/such/folder.png", 1, "no/such/folder.png"),
])  # fmt: skip
def test_what_goes_wrong_is_one_line(options, code, words, run, capsys):
    with pytest.raises(SystemExit) as exit:
        run(*options.split(" "))
    out, err = capsys.readouterr()
    message = err if code == 2 else exit.value.code  # Python prints the latter and exits with 1
    assert exit.value.code == (2 if code == 2 else message) and out == ""
    assert re.fullmatch(f"look_inside.py: error: .*{re.escape(words)}.*\n?", message)


def test_watch_and_states_say_what_they_cannot_read():
    model, (inside, _) = random_model(), random_inside()
    mixed = nn.Sequential(EventBlock(model.config), model)
    for module, kind in ((nn.Linear(2, 2), "none"), (mixed, "EventBlock, MambaBlock")):
        with pytest.raises(ValueError, match=f"found {kind}"), look.watch(module):
            pass
    with look.watch(model) as layers:
        model.step(torch.tensor([7]), model.init_state(1))
    wrong_length = r"reset must be \(2, 13\), got \(2, 4\)"
    no_sequence = "there is no sequence here"
    for seen, words in (({}, no_sequence), (layers[0], no_sequence), (inside, wrong_length)):
        with pytest.raises(ValueError, match=words):
            look.states(seen, reset=torch.zeros(2, 4, dtype=torch.bool))
