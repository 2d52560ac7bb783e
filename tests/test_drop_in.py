"""examples/drop_in.py is the official function: layouts, results, tolerances, gradients.

The judge is the recurrence written out here in float64, in the official layout, with B and C given
to every channel as they are meant. Tolerances are those of the official project's own tests.
"""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from drop_in import Layer, Mixer, selective_scan_fn
from torch import Tensor

from mamba import MambaBlock, MambaConfig

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))]  # fmt: skip
LAYOUTS = {"constant": 2, "shared": 3, "groups": 4}


def for_every_channel(tensor: Tensor, batch: int, d: int, seqlen: int) -> Tensor:
    """B or C in any layout -> (b, d, n, l)."""
    if tensor.ndim == 2:
        return tensor[None, :, :, None].expand(batch, -1, -1, seqlen)
    if tensor.ndim == 3:
        return tensor[:, None].expand(-1, d, -1, -1)
    return torch.stack([tensor[:, c * tensor.shape[1] // d] for c in range(d)], dim=1)


def written_out(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    batch, d, seqlen = u.shape
    B, C = (for_every_channel(tensor, batch, d, seqlen) for tensor in (B, C))
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = torch.log1p(torch.exp(delta))
    h, ys = torch.zeros_like(B[..., 0]), []
    # unbind, not u[:, :, t], whose gradients would take a time quadratic in the length
    for u_t, step, B_t, C_t in zip(*(t.unbind(-1) for t in (u, delta, B, C)), strict=True):
        step = step.unsqueeze(-1)
        h = torch.exp(step * A) * h + step * B_t * u_t.unsqueeze(-1)
        ys.append((h * C_t).sum(-1))
    y = torch.stack(ys, dim=-1)
    if D is not None:
        y = y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def make_inputs(seqlen, B="shared", C="shared", groups=2, d=4, n=3, batch=2, without=()):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def layout(name):
        shapes = {"constant": (d, n), "shared": (batch, n, seqlen)}
        return normal(*shapes.get(name, (batch, groups, n, seqlen)))

    inputs = {
        "u": normal(batch, d, seqlen),
        "delta": 0.5 * torch.rand(batch, d, seqlen, generator=generator),
        "A": -0.5 * torch.rand(d, n, generator=generator),
        "B": layout(B),
        "C": layout(C),
        "D": normal(d),
        "z": normal(batch, d, seqlen),
        "delta_bias": 0.5 * torch.rand(d, generator=generator),
    }
    return {name: tensor for name, tensor in inputs.items() if name not in without}


def check(inputs: dict[str, Tensor], device="cpu", **options) -> None:
    """Values and all gradients, for a loss that depends on the output and on the last state."""
    upstream, found = torch.Generator().manual_seed(1), []
    weights = torch.randn(inputs["u"].shape, generator=upstream)
    of_state = torch.randn(inputs["u"].shape[0], *inputs["A"].shape, generator=upstream)
    for double in (False, True):
        move = {"dtype": torch.float64} if double else {"device": device}
        leaves = {name: t.detach().to(**move).requires_grad_() for name, t in inputs.items()}
        if double:
            out, h = written_out(**leaves, **options)
        else:
            out, h = selective_scan_fn(**leaves, **options, return_last_state=True)
        loss = (out * weights.to(out)).sum() + (h * of_state.to(h)).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        names = ["out", "last state", *(f"gradient of {name}" for name in leaves)]
        found.append(dict(zip(names, (out, h, *gradients), strict=True)))
    for name, actual in found[0].items():
        expected = found[1][name].float()
        assert actual.shape == expected.shape, name
        # The official project allows 6e-4, 2e-3 for float32; gradients are sums over all steps.
        scale = 1.0 if name == "out" else max(1.0, expected.abs().max().item() / 10)
        assert torch.allclose(actual.cpu(), expected, rtol=6e-4, atol=2e-3 * scale), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("seqlen", [128, 512, 4096])
def test_it_holds_the_official_tolerances(seqlen, groups, device):
    check(make_inputs(seqlen, "groups", "groups", groups), device, delta_softplus=True)


@pytest.mark.parametrize("C", LAYOUTS)
@pytest.mark.parametrize("B", LAYOUTS)
def test_every_layout_of_B_with_every_layout_of_C(B, C):
    check(make_inputs(7, B, C), delta_softplus=True)


def test_B_and_C_may_have_other_groups():
    """Also such that do not divide each other."""
    for groups in (1, 3, 6):
        others = {"C": torch.randn(2, groups, 3, 5)}
        check(make_inputs(5, "groups", "groups", groups=2, d=6) | others)


@pytest.mark.parametrize("left_out", ["D", "z", "delta_bias"])
@pytest.mark.parametrize("B", LAYOUTS)
def test_what_may_be_left_out_may_be_left_out(B, left_out):
    check(make_inputs(5, B, without=(left_out,)))


def test_without_softplus_delta_is_the_step():
    check(make_inputs(9), delta_softplus=False)


def test_only_the_output_is_returned_unless_the_state_is_asked_for():
    inputs = make_inputs(6)
    out = selective_scan_fn(**inputs)
    both = selective_scan_fn(**inputs, return_last_state=True)
    assert torch.equal(out, both[0])
    assert both[1].shape == (2, 4, 3)


@pytest.mark.parametrize("B", LAYOUTS)
def test_the_output_has_the_dtype_of_u_and_the_state_is_float32(B):
    inputs = make_inputs(6, B)
    exact, _ = written_out(**{name: tensor.double() for name, tensor in inputs.items()})
    halves = {name: t.bfloat16() if name in ("u", "z") else t for name, t in inputs.items()}
    out, h = selective_scan_fn(**halves, return_last_state=True)
    assert out.dtype == torch.bfloat16
    assert h.dtype == torch.float32
    assert (out - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.parametrize("d_state", [4, 64])
@pytest.mark.parametrize(
    "B, C", [("constant", "shared"), ("groups", "constant"), ("shared", "groups")]
)
def test_bfloat16_gradients_are_as_exact_as_those_of_one_cast_before_the_recurrence(B, C, d_state):
    """The official reference casts its inputs to float32 once, and rounds each gradient once."""

    def of_reference(**inputs):
        return written_out(**{name: t.float() for name, t in inputs.items()})[0].bfloat16()

    inputs = make_inputs(65, B, C, groups=2, n=d_state, d=8)
    inputs = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    weights = torch.randn(2, 8, 65, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = []
    for function, dtype in (
        (lambda **leaves: written_out(**leaves)[0], torch.float64),
        (of_reference, torch.bfloat16),
        (selective_scan_fn, torch.bfloat16),
    ):
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
        loss = (function(**leaves) * weights).sum()
        found.append(torch.autograd.grad(loss, list(leaves.values())))
    for name, exact, reference, ours in zip(inputs, *found, strict=True):
        errors = [((t.double() - exact).norm() / exact.norm()).item() for t in (ours, reference)]
        assert errors[0] < 1.2 * errors[1], f"gradient of {name}: {errors[0]:.1e}, {errors[1]:.1e}"


## The official layer ------------------------------------------------------------------------------


def test_the_layer_takes_the_arguments_of_the_official_one():
    """In its order, and with its defaults."""
    sizes = dict(d_state=4, d_conv=3, expand=1.5, dt_rank=2, conv_bias=False, bias=True)
    layer = Layer(16, **sizes, use_fast_path=False, layer_idx=3, device="cpu", dtype=torch.bfloat16)
    assert (layer.config.d_inner, layer.config.scan, layer.layer_idx) == (24, "chunked", 3)
    kept = {n for n, p in layer.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "D"}, "as in the official layer"
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16, torch.float32}
    u = torch.randn(2, 5, 16).bfloat16()
    block = MambaBlock(MambaConfig(16, scan="chunked", **sizes))
    block.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(layer(u), block(u))
    assert torch.equal(layer(u, inference_params=None), block(u))
    assert Layer(16, 4, 3).config == MambaConfig(16, d_state=4, d_conv=3)
    assert Layer(16, 8, 4, 2, "auto", 0.01, 0.2).config.dt_max == 0.2


def test_the_layer_is_built_where_it_is_wanted():
    assert Layer(16, device="meta").A_log.is_meta
    with torch.device("meta"):
        assert Layer(16).A_log.is_meta
    assert Layer(16).A_log.dtype == torch.float32
    with pytest.raises((RuntimeError, AssertionError)):
        Layer(16, device="cuda:99")
    for arguments, options in (((object(),), {}), ((), {"inference_params": object()})):
        with pytest.raises(ValueError, match="not inference_params"):
            Layer(16)(torch.randn(1, 2, 16), *arguments, **options)


## Edges -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("B, C", [("shared", "groups"), ("constant", "groups")])
def test_an_empty_batch_gives_empty_results_and_gradients_of_zero(B, C):
    """As the official reference does; so a rank of a parallel run that has no row goes on."""
    inputs = make_inputs(7, B, C, batch=0)
    inputs["u"] = inputs["u"].bfloat16()
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out, h = selective_scan_fn(**leaves, delta_softplus=True, return_last_state=True)
    expected = written_out(**leaves)
    assert out.shape == expected[0].shape == (0, 4, 7) and out.dtype == torch.bfloat16
    assert h.shape == expected[1].shape == (0, 4, 3) and h.dtype == torch.float32
    assert selective_scan_fn(**leaves).shape == out.shape
    gradients = torch.autograd.grad(out.sum() + h.sum(), list(leaves.values()))
    for (name, tensor), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.shape == tensor.shape and not gradient.any(), name


@pytest.mark.parametrize("B", LAYOUTS)
def test_what_is_returned_is_contiguous(B):
    for tensor in selective_scan_fn(**make_inputs(6, B), return_last_state=True):
        assert tensor.is_contiguous()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"A": torch.zeros(4, 3, dtype=torch.complex64)}, "complex"),
        ({"A": torch.zeros(5, 3)}, r"u \(b, d, l\) and A \(d, n\)"),
        ({"B": torch.zeros(2, 7, 3)}, r"B must be .*\(2, 3, 7\).*got \(2, 7, 3\)"),
        ({"C": torch.zeros(2, 3, 3, 7)}, r"C must be .*divisor of 4"),
        ({"delta": torch.zeros(2, 7, 4)}, r"delta must be \(2, 4, 7\).*got \(2, 7, 4\)"),
        ({"z": torch.zeros(2, 4, 6)}, r"z must be \(2, 4, 7\)"),
        ({"D": torch.zeros(5)}, r"D must be \(4,\)"),
        ({"delta_bias": torch.zeros(8)}, r"delta_bias must be \(4,\)"),
        ({"u": torch.zeros(2, 4, 7, dtype=torch.int64)}, "float dtype"),
        ({"u": torch.zeros(2, 4, 0)}, r"l and n at least 1, got \(2, 4, 0\)"),
    ],
    ids=["complex", "A", "B", "groups", "delta", "z", "D", "bias", "integers", "length"],
)
def test_what_does_not_fit_is_named(change, words):
    for B in ("shared", "constant"):
        with pytest.raises(ValueError, match=words):
            selective_scan_fn(**(make_inputs(7, B) | change))


## ================================================================================================
## The block in the place of other layers
## ================================================================================================


def transformers_model(**changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "vocab_size": 20, "state_size": 3}
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes | changes))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "changes", [{}, {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "expand": 3}]
)
def test_a_model_of_transformers_with_our_blocks_is_the_same_model(changes):
    model = transformers_model(**changes)
    ids = torch.randint(20, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    # With use_bias transformers lets the bias of in_proj in through the padding: see the next test.
    for options in ({}, {"attention_mask": mask})[: 1 if changes else 2]:
        logits, gradients = [], []
        ours = transformers_model(**changes)
        for layer in ours.backbone.layers:
            layer.mixer = Mixer(layer.mixer)
        for each in (model, ours):
            found = each(ids, use_cache=False, **options).logits
            found = found if not options else found[mask.bool()]
            logits.append(found)
            names, parameters = zip(*each.named_parameters(), strict=True)
            grads = torch.autograd.grad(found.square().sum(), parameters)
            gradients.append(dict(zip(names, grads, strict=True)))
        assert torch.allclose(*logits, rtol=1e-4, atol=1e-5)
        assert gradients[0].keys() == gradients[1].keys()
        for name, expected in gradients[0].items():
            error = (gradients[1][name] - expected).norm() / expected.norm().clamp(min=1e-6)
            assert error < 1e-4, name


def test_padding_on_the_left_changes_nothing_with_a_bias_either():
    model = transformers_model(use_bias=True)
    for layer in model.backbone.layers:
        layer.mixer = Mixer(layer.mixer)
    ids = torch.randint(20, (1, 9))
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    padded = model(ids, use_cache=False, attention_mask=mask).logits[:, 4:]
    alone = model(ids[:, 4:], use_cache=False).logits
    assert torch.allclose(padded, alone, rtol=1e-4, atol=1e-5)


def with_mixers(host):
    ours = copy.deepcopy(host)
    for layer in ours.backbone.layers:
        layer.mixer = Mixer(layer.mixer)
    return ours


def test_the_parameters_are_the_hosts_own_with_what_was_frozen_and_the_mode():
    mixer = transformers_model().eval().backbone.layers[0].mixer
    mixer.A_log.requires_grad_(False)
    mixer.D.data = mixer.D.data.double()
    theirs, ours = dict(mixer.named_parameters()), Mixer(mixer)
    assert not ours.training
    assert {name: id(p) for name, p in ours.named_parameters()} == {
        name: id(p) for name, p in theirs.items()
    }
    assert [name for name, p in ours.named_parameters() if not p.requires_grad] == ["A_log"]


def test_what_a_host_with_mixers_saves_loads_without_them(tmp_path):
    ours, ids = with_mixers(transformers_model()), torch.randint(20, (2, 9))
    ours.save_pretrained(tmp_path)
    theirs, report = type(ours).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs.backbone.layers[0].mixer).__name__ == "MambaMixer"
    logits = [host(ids, use_cache=False).logits for host in (ours, theirs)]
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-5)


def takes_cache(host) -> bool:
    """Whether this version of transformers has the cache that Mixer knows (from 5.24 on)."""
    return "cache" in inspect.signature(type(host.backbone.layers[0]).forward).parameters


@pytest.mark.parametrize("changes", [{}, {"conv_kernel": 1, "use_conv_bias": False}])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_the_host_generates_what_it_generates_without_mixers(changes, options):
    """Also in a batch with padding on the left."""
    host = transformers_model(**changes).eval()
    ours, ids = with_mixers(host), torch.randint(1, 20, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, **options}
    options |= {"eos_token_id": None, "attention_mask": mask}
    if takes_cache(host):
        assert torch.equal(ours.generate(ids, **options), host.generate(ids, **options))
    else:
        with pytest.raises(ValueError, match="use_cache=False"):
            ours.generate(ids, **options)


def test_a_cache_goes_on_in_parts_and_from_host_to_mixers_and_back():
    host = transformers_model().eval()
    if not takes_cache(host):
        pytest.skip("transformers before 5.24 has another cache, which Mixer refuses")
    ours, ids = with_mixers(host), torch.randint(20, (2, 9))
    expected, cache, found = host(ids).logits, None, []
    # After a prompt, transformers' own mixer reads a single token only.
    for model, first, last in ((ours, 0, 2), (ours, 2, 5), (host, 5, 6), (ours, 6, 9)):
        out = model(ids[:, first:last], cache=cache, use_cache=True)
        cache = out.cache
        found.append(out.logits)
    assert torch.allclose(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)


def test_the_mixer_refuses_whatever_the_host_gives_it_and_it_does_not_know():
    host = transformers_model()
    mixer, u = Mixer(host.backbone.layers[0].mixer), torch.randn(1, 3, 12)
    for name in ("cache_params", "seq_idx", "cu_seq_lens_q", "a_name_of_tomorrow"):
        assert mixer(u, **{name: None}).shape == u.shape
        with pytest.raises(ValueError, match=f"no {name}: .*use_cache=False"):
            mixer(u, **{name: torch.zeros(1)})
    with pytest.raises(ValueError, match="no cache Tensor: take use_cache=False"):
        mixer(u, cache=torch.zeros(1))
    for mask in (torch.ones(3), torch.ones(1, 1, 3, 3), torch.ones(1, 4)):
        with pytest.raises(ValueError, match=r"attention_mask must be \(1, 3\)"):
            mixer(u, attention_mask=mask)
    if takes_cache(host):
        cache = host(torch.zeros(1, 3, dtype=torch.long), use_cache=True).cache
        with pytest.raises(ValueError, match="padding in a row whose state is not zero"):
            mixer(u, cache=cache, attention_mask=torch.tensor([[0, 1, 1]]))
        cache.activate_past_recording()
        with pytest.raises(ValueError, match="without an assistant model"):
            mixer(u, cache=cache)


def test_a_mixer_of_another_architecture_is_refused():
    """FalconMamba's has the same names and weights, and norms in its buffers."""

    class FalconMambaMixer(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match="need a MambaMixer of transformers, got FalconMambaMixer"):
        Mixer(FalconMambaMixer())


def test_a_mixer_with_an_activation_that_ours_has_not_is_refused():
    other = transformers_model(hidden_act="gelu")
    with pytest.raises(ValueError, match="gelu"):
        Mixer(other.backbone.layers[0].mixer)


# What the layer `mamba_ssm.Mamba(d_model=16, d_state=4)` has, in its order: d = 32, dt_rank = 1.
OFFICIAL = {
    "A_log": (32, 4), "D": (32,), "in_proj.weight": (64, 16), "conv1d.weight": (32, 1, 4),
    "conv1d.bias": (32,), "x_proj.weight": (9, 32), "dt_proj.weight": (32, 1),
    "dt_proj.bias": (32,), "out_proj.weight": (16, 32),
}  # fmt: skip


def test_weights_of_the_official_layer_load_both_ways():
    block = MambaBlock(MambaConfig(d_model=16, d_state=4))
    assert {name: tuple(t.shape) for name, t in block.state_dict().items()} == OFFICIAL
    block.load_state_dict({name: torch.randn(shape) for name, shape in OFFICIAL.items()})


def test_the_official_layer_itself_where_it_is_installed():
    mamba_ssm = pytest.importorskip("mamba_ssm")
    if not torch.cuda.is_available():
        pytest.skip("the official layer runs on a GPU")
    theirs = mamba_ssm.Mamba(d_model=16, d_state=4, d_conv=4, expand=2).cuda()
    ours = MambaBlock(MambaConfig(d_model=16, d_state=4, d_conv=4, expand=2)).cuda()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    u = torch.randn(2, 65, 16, device="cuda")
    assert torch.allclose(ours(u), theirs(u), rtol=6e-4, atol=2e-3)
