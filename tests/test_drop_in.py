"""examples/drop_in.py is the official function, the official layer, and the mixer of transformers.
Its judges are the recurrence in float64, a channel at a time, and the model without the mixer."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
from drop_in import Layer, Mixer, selective_scan_fn
from torch import Tensor
from transformers.models.mamba.modeling_mamba import MambaMixer

from mamba import MambaBlock, MambaConfig
from test_mamba import assert_all_close, assert_close, error_of, gradients_of, selective_by_hand

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))]  # fmt: skip
LAYOUTS = ["constant", "shared", "groups"]


def written_out(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, **_):
    """Channel by channel, in float64; cast once, so that each gradient is rounded once."""
    dtype, (u, delta, A, B, C) = u.dtype, (t.double() for t in (u, delta, A, B, C))

    def of_channel(tensor: Tensor, c: int) -> Tensor:
        """B or C in any layout -> (b, l, n)."""
        if tensor.ndim == 2:
            return tensor[c].expand(*u.mT.shape[:2], -1)
        return (tensor if tensor.ndim == 3 else tensor[:, c * tensor.shape[1] // len(A)]).mT

    ys, hs = [], []
    for c in range(len(A)):
        x, step, z_c = (None if t is None else t[:, [c]].mT for t in (u, delta, z))
        A_c, D_c, bias = (None if t is None else t[[c]] for t in (A, D, delta_bias))
        options = {"D": D_c, "z": z_c, "dt_bias": bias, "dt_softplus": delta_softplus}
        y, h = selective_by_hand(x, step, A_c, of_channel(B, c), of_channel(C, c), **options)
        ys.append(y.mT)
        hs.append(h)
    return torch.cat(ys, dim=1).to(dtype), torch.cat(hs, dim=1)


def make_inputs(B="shared", C="shared", seqlen=7, d=6, n=3, batch=2) -> dict[str, Tensor]:
    """Groups that do not divide each other: two of B, three of C."""
    shapes = {"constant": (d, n), "shared": (batch, n, seqlen)}
    u, delta, z = torch.randn(3, batch, d, seqlen)
    B = torch.randn(shapes.get(B, (batch, 2, n, seqlen)))
    C = torch.randn(shapes.get(C, (batch, 3, n, seqlen)))
    inputs = {"u": u, "delta": delta.sigmoid() / 2, "A": -torch.rand(d, n), "B": B, "C": C}
    return inputs | {"D": torch.randn(d), "z": z, "delta_bias": torch.rand(d) / 2}


def results(function, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """The output, the last state and all gradients of a loss that depends on both."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    out, h = function(**leaves, **options, return_last_state=True)
    weights = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=weights).to(t)).sum() for t in (out, h))
    return {"out": out, "last state": h} | gradients_of(loss, leaves)


@pytest.mark.parametrize("C", LAYOUTS)
@pytest.mark.parametrize("B", LAYOUTS)
def test_every_layout_of_B_with_every_layout_of_C_whatever_is_left_out(B, C):
    d = 6 if "groups" in (B, C) else 5
    for left_out, seqlen, n in ((None, 7, 3), ("D", 1, 1), ("z", 2, 1), ("delta_bias", 5, 2)):
        inputs = {k: t.double() for k, t in make_inputs(B, C, seqlen, d, n).items()}
        inputs.pop(left_out, None)
        for options in ({}, {"delta_softplus": True}):
            found = results(selective_scan_fn, inputs, **options)
            assert found["out"].is_contiguous() and found["last state"].is_contiguous()
            assert_all_close(found, results(written_out, inputs, **options), 1e-12)
            assert torch.equal(selective_scan_fn(**inputs, **options), found["out"])
    # As in the official reference, so that a rank of a parallel run that has no row goes on.
    empty = make_inputs(B, C, batch=0)
    assert_all_close(results(selective_scan_fn, empty), results(written_out, empty), 0)
    assert selective_scan_fn(**empty).shape == (0, 6, 7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B", LAYOUTS)
def test_short_floats_are_rounded_once_in_the_output_and_in_each_gradient(B, dtype, device):
    inputs = make_inputs(B, "shared", seqlen=65, d=12, n=64)
    if B == "shared":
        inputs["C"] = torch.randn(2, 12, 64, 65)  # groups, for each of which B is repeated
    inputs = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    ours, reference = (results(scan, inputs) for scan in (selective_scan_fn, written_out))
    exact = results(written_out, {name: tensor.double() for name, tensor in inputs.items()})
    assert ours.pop("last state").dtype == torch.float32
    assert {tensor.dtype for tensor in ours.values()} == {dtype}
    for name in ours:
        errors = [error_of(each[name], exact[name]) for each in (ours, reference)]
        allowed = max(1.2 * errors[1], 1e-5 if device == "cpu" else 6e-4)
        assert errors[0] < allowed, f"{name}: {errors[0]:.1e}, {errors[1]:.1e}"


def test_the_layer_has_the_arguments_of_the_official_one_in_its_order_with_its_defaults():
    sizes = dict(d_state=4, d_conv=3, expand=1.5, dt_rank=2, conv_bias=False, bias=True)
    layer = Layer(16, **sizes, use_fast_path=False, layer_idx=3, device="cpu", dtype=torch.bfloat16)
    for name, parameter in layer.named_parameters():  # as in the official layer
        assert parameter.dtype == (torch.float32 if name in ("A_log", "D") else torch.bfloat16)
    config = MambaConfig(16, scan="chunked", **sizes)
    assert (layer.config, layer.layer_idx) == (config, 3)
    u, block = torch.randn(2, 5, 16).bfloat16(), MambaBlock(config)
    block.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(layer(u, inference_params=None), block(u))
    arguments = 16, 8, 4, 2, 3, 0.01, 0.2, "constant", 0.5, 0.02, False, True
    names = [*inspect.signature(Layer).parameters][:12]
    assert Layer(*arguments).config == MambaConfig(**dict(zip(names, arguments, strict=True)))
    assert Layer(16).config == MambaConfig(16) and Layer(16).A_log.dtype == torch.float32
    with torch.device("meta"):
        assert Layer(16).A_log.is_meta and not Layer(16, device="cpu").A_log.is_meta


def host_and_ours(**changes) -> tuple:
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "vocab_size": 20, "state_size": 3}
    host = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes | changes)).eval()
    for parameter in host.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    ours = copy.deepcopy(host)
    for layer in ours.backbone.layers:
        layer.mixer = Mixer(layer.mixer)
    return host, ours


# A prompt beside one with padding on the left.
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
BIASES = {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "expand": 3}


@pytest.mark.parametrize("changes", [{}, BIASES])
def test_each_prompt_gets_from_our_blocks_what_it_gets_alone_without_them(changes, tmp_path):
    """Values, gradients, and what is saved, which loads without our blocks."""
    (host, ours), ids = host_and_ours(**changes), torch.randint(1, 20, (2, 9))
    logits = ours(ids, attention_mask=MASK, use_cache=False).logits[MASK.bool()]
    alone = [host(ids[:1], use_cache=False), host(ids[1:, 4:], use_cache=False)]
    expected = torch.cat([out.logits[0] for out in alone])
    assert_close("logits", logits, expected, 1e-5)
    found = (gradients_of(each.square().sum(), m) for each, m in ((logits, ours), (expected, host)))
    assert_all_close(*found, 1e-4)
    ours.save_pretrained(tmp_path)
    theirs, report = type(host).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(theirs(ids).logits, host(ids).logits)


def test_the_parameters_are_the_hosts_own_with_what_was_frozen_and_the_mode():
    mixer = host_and_ours()[0].backbone.layers[1].mixer
    mixer.A_log.requires_grad_(False)
    mixer.D.data = mixer.D.data.double()
    theirs, ours = {name: id(p) for name, p in mixer.named_parameters()}, Mixer(mixer)
    assert {name: id(p) for name, p in ours.named_parameters()} == theirs
    assert [name for name, p in ours.named_parameters() if not p.requires_grad] == ["A_log"]
    assert not ours.training and Mixer(mixer.train()).training and ours.layer_idx == 1


@pytest.mark.skipif(
    "cache" not in inspect.signature(MambaMixer.forward).parameters,
    reason="before 5.24, transformers has another cache, which Mixer refuses",
)
@pytest.mark.parametrize("changes", [{}, {"conv_kernel": 1, "use_conv_bias": False}])
def test_the_host_generates_and_a_cache_goes_on_from_host_to_mixers_and_back(changes):
    (host, ours), ids = host_and_ours(**changes), torch.randint(1, 20, (2, 9))
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    options |= {"eos_token_id": None, "attention_mask": MASK}
    assert torch.equal(ours.generate(ids, **options), host.generate(ids, **options))
    cache, found = None, []
    # After a prompt, transformers' own mixer reads a single token only.
    for model, first, last in ((ours, 0, 2), (ours, 2, 5), (host, 5, 6), (ours, 6, 9)):
        out = model(ids[:, first:last], cache=cache, use_cache=True)
        cache = out.cache
        found.append(out.logits)
    assert_close("logits", torch.cat(found, 1), host(ids).logits, 1e-5)
    mixer, u = ours.backbone.layers[0].mixer, torch.randn(2, 3, 12)
    with pytest.raises(ValueError, match="padding in a row whose state is not zero"):
        mixer(u, cache=cache, attention_mask=torch.tensor([[0, 1, 1]] * 2))
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="without an assistant model"):
        mixer(u, cache=cache)


FALCON = type("FalconMambaMixer", (torch.nn.Module,), {})()  # the same names, norms in its buffers


def scan_with(name: str, *shape: int, dtype=torch.float32):
    return lambda: selective_scan_fn(**make_inputs() | {name: torch.zeros(shape, dtype=dtype)})


def mix(**options):
    return lambda: host_and_ours()[1].backbone.layers[0].mixer(torch.randn(1, 3, 12), **options)


HALF_A_CACHE = dict.fromkeys(("get_conv_state", "get_recurrent_state", "update_conv_state"))


@pytest.mark.parametrize(("call", "words"), [
    (scan_with("A", 6, 3, dtype=torch.complex64), "complex"),
    (scan_with("A", 5, 3), r"u \(b, d, l\) and A \(d, n\)"),
    (scan_with("u", 2, 6, 7, dtype=torch.int64), "float dtype"),
    (scan_with("u", 2, 6, 0), r"l and n at least 1, got \(2, 6, 0\)"),
    (scan_with("C", 2, 4, 3, 7), r"C must be .*divisor of 6, got \(2, 4, 3, 7\)"),
    (scan_with("delta", 2, 7, 6), r"delta must be \(2, 6, 7\).*got \(2, 7, 6\)"),
    (scan_with("z", 2, 6, 6), r"z must be \(2, 6, 7\)"),
    (scan_with("D", 5), r"D must be \(6,\)"),
    (scan_with("delta_bias", 8), r"delta_bias must be \(6,\)"),
    (lambda: Layer(16)(torch.randn(1, 2, 16), object()), "not inference_params"),
    (lambda: Layer(16)(torch.randn(1, 2, 16), inference_params=1), "not inference_params"),
    (lambda: Mixer(FALCON), "need a MambaMixer of transformers, got FalconMambaMixer"),
    (lambda: host_and_ours(hidden_act="gelu"), "gelu"),
    (lambda: host_and_ours(intermediate_size=23), "23, 2 "),
    (mix(a=None, b=torch.zeros(1), c=2), "no b, c: .*use_cache=False"),
    (mix(cache=SimpleNamespace(**HALF_A_CACHE)), "no cache SimpleNamespace: take use_cache"),
    (mix(attention_mask=torch.ones(1, 4)), r"attention_mask must be \(1, 3\)"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
