"""The model and its block at their edges: initial values, states, documents, and what a call that
does not fit gets. The larger claims about them are in test_mamba.py, whose judges are used here.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from look_inside import watch
from torch import Tensor, nn

import generate
import mamba
from mamba import Mamba, MambaBlock, MambaConfig, MambaState
from test_mamba import (
    SCANS,
    assert_all_close,
    assert_close,
    assert_same_results,
    error_of,
    gradients_of,
    logspace_bound,
    packed_documents,
    random_ids,
    random_model,
    random_state,
    randomise,
    run_pieces,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_importing_mamba_loads_torch_and_einops_alone_and_prints_nothing():
    """And a CPU never imports Triton, which takes a second."""
    code = (
        "import sys, torch, einops; before = set(sys.modules); import mamba;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "new -= {'mamba', 'torch', 'einops', *sys.stdlib_module_names}; assert not new, new;"
        "mamba.MambaBlock(mamba.MambaConfig(8))(torch.ones(1, 2, 8));"
        "assert 'triton_scan' not in sys.modules"
    )
    folder = Path(mamba.__file__).parent
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


## ================================================================================================
## Configuration and initialisation
## ================================================================================================


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("d_model", 8.5), ("n_layer", 0), ("d_conv", -1), ("vocab_size", True)),
        *(("tie_embeddings", "false"), ("norm_eps", "1e-5"), ("dt_min", 0), ("dt_init", "zeros")),
    ],
)
def test_a_configuration_value_of_the_wrong_kind_is_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*{value!r}"):
        MambaConfig(**{"d_model": 8, name: value})


def test_a_smallest_step_above_the_largest_is_refused():
    with pytest.raises(ValueError, match=r"need dt_min <= dt_max, got 0\.2, 0\.1"):
        MambaConfig(d_model=8, dt_min=0.2)


def test_embeddings_start_with_standard_deviation_two_hundredths():
    weight = Mamba(MambaConfig(d_model=64, vocab_size=1000)).backbone.embedding.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(weight.mean().item()) < 0.001


@pytest.mark.parametrize("dt_init", ["constant", "random"])
def test_dt_proj_starts_at_dt_scale_over_the_root_of_its_rank(dt_init):
    config = MambaConfig(d_model=64, dt_rank=16, dt_scale=3.0, dt_init=dt_init)
    weight = MambaBlock(config).dt_proj.weight
    bound = 3 / 4
    if dt_init == "constant":
        assert torch.equal(weight, torch.full_like(weight, bound))
    else:
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


## ================================================================================================
## The norm
## ================================================================================================


def test_the_norm_has_a_finite_gradient_where_the_stream_is_all_zeros():
    norm, stream = mamba.RMSNorm(4), torch.zeros(2, 3, 4, requires_grad=True)
    norm(stream).sum().backward()
    assert_close("gradient", stream.grad, torch.full((2, 3, 4), 1e-5**-0.5), 1e-6)


def test_the_norm_of_large_float16_numbers_is_that_of_float64():
    """1000 squared is infinite in float16."""
    norm, stream = mamba.RMSNorm(16).half(), 1000 * torch.randn(3, 16).half()
    mean_square = stream.double().square().mean(-1, keepdim=True)
    expected = stream.double() / (mean_square + 1e-5).sqrt()
    rounded_once = error_of(expected.half(), expected)
    assert_close("norm", norm(stream), expected, 1.02 * rounded_once)


## ================================================================================================
## Documents
## ================================================================================================


@pytest.mark.parametrize("scan", SCANS)
def test_no_gradient_crosses_a_reset(scan):
    """Exactly none, but in log space, where it is a difference of equal sums, rounded."""
    block = randomise(MambaBlock(MambaConfig(d_model=8, scan=scan)))
    u = torch.randn(1, 12, 8, requires_grad=True)
    reset = (torch.arange(12) == 5).unsqueeze(0)
    y, state = block(u, block.init_state(1), reset=reset)
    (y[:, 5:].sum() + state.h.sum()).backward()
    assert u.grad[:, :5].norm() <= (1e-5 if scan == "logspace" else 0) * u.grad.norm()
    assert u.grad[:, 5:].abs().sum(-1).all()


@pytest.mark.parametrize("scan", SCANS)
def test_a_sequence_with_resets_may_be_cut_anywhere(scan):
    """Also right behind a reset, where the next piece's convolution must not see beyond it."""
    model = random_model(scan=scan)
    ids, reset = packed_documents()
    state = random_state(model, 2)
    whole = model(ids, state, reset=reset)
    for cut in range(1, ids.shape[1]):
        pieces = run_pieces(model, ids, [cut, ids.shape[1] - cut], state, reset)
        assert_same_results(pieces, whole, 3e-5, f"cut at {cut}: ")


def test_a_reset_at_the_first_token_forgets_the_state():
    model = random_model()
    ids, reset = random_ids(2, 6), torch.arange(6).expand(2, 6) == 0
    forgotten = model(ids, random_state(model, 2), reset=reset)
    assert_same_results(forgotten, model(ids, model.init_state(2)))


@pytest.mark.parametrize("reset", [torch.ones(1, 2) > 0, torch.ones(1, 1) > 0, torch.ones(1, 3)])
def test_a_reset_that_is_not_one_bool_for_each_token_is_refused(reset):
    with pytest.raises(ValueError, match=r"reset must be bool \(1, 3\)"):
        random_model()(random_ids(1, 3), reset=reset)


## ================================================================================================
## States
## ================================================================================================


@pytest.mark.parametrize(
    "changes", [{"n_layer": 3}, {"n_layer": 1}, {"d_state": 5}, {"d_conv": 1}, {"d_conv": 3}]
)
def test_the_state_of_another_model_is_refused(changes):
    model, stranger = random_model(), random_model(**changes)
    with pytest.raises(ValueError, match="state"):
        model(random_ids(2, 3), stranger.init_state(2))
    with pytest.raises(ValueError, match="state"):
        model.step(random_ids(2, 1)[:, 0], stranger.init_state(2))
    with pytest.raises(ValueError, match="state"):
        model(random_ids(2, 3), model.init_state(3))


def test_a_state_survives_a_file_that_may_hold_tensors_only(tmp_path):
    model = random_model()
    _, state = model(random_ids(2, 5), model.init_state(2))
    torch.save(vars(state), tmp_path / "state.pt")
    loaded = MambaState(**torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(loaded.conv, state.conv) and torch.equal(loaded.h, state.h)


## ================================================================================================
## Ids, and inputs of a block
## ================================================================================================


@pytest.mark.parametrize("bad", [-1, 32, 1000])
def test_a_token_id_without_a_row_is_named(bad):
    model, ids = random_model(), random_ids(2, 5)
    ids[1, 3] = bad
    with pytest.raises(IndexError, match=rf"\[0, 32\).*{bad}"):
        model(ids)
    with pytest.raises(IndexError, match=rf"\[0, 32\).*{bad}"):
        model.step(ids[:, 3], model.init_state(2))


@pytest.mark.parametrize("ids", [torch.rand(2, 5), torch.ones(2, 5) > 0, torch.ones(5, dtype=int)])
def test_ids_of_the_wrong_type_or_shape_are_refused(ids):
    model = random_model()
    with pytest.raises(ValueError, match=r"integer ids \(batch, seqlen\)"):
        model(ids)
    if ids.ndim == 2:
        with pytest.raises(ValueError, match=r"integer ids \(batch,\)"):
            model.step(ids, model.init_state(2))


@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 8), (0, 3, 8), (2, 0, 8)], ids=str)
def test_an_input_of_a_block_that_does_not_fit_is_refused(shape):
    block = MambaBlock(MambaConfig(d_model=8))
    with pytest.raises(ValueError, match=r"expected \(batch, seqlen, d_model\), d_model = 8, got"):
        block(torch.zeros(shape))
    if len(shape) == 3:
        with pytest.raises(ValueError, match=r"expected \(batch, d_model\), d_model = 8, got"):
            block.step(torch.zeros(shape), block.init_state(2))


## ================================================================================================
## A model as it was made, and others
## ================================================================================================


def test_a_model_with_a_hook_an_adapter_or_another_forward_is_not_our_own():
    """Nor is one under autocast: whoever computes a model without its modules asks for all this."""

    class Subclass(Mamba):
        pass

    class Adapter(nn.Linear):
        pass

    class Quantised(Tensor):
        pass

    def hooked(model):
        model.backbone.layers[1].mixer.dt_proj.register_forward_hook(lambda *args: None)

    def hooked_before(model):
        model.backbone.norm_f.register_forward_pre_hook(lambda *args: None)

    def adapted(model):
        model.backbone.layers[0].mixer.in_proj.__class__ = Adapter

    def quantised(model):
        weight = model.lm_head.weight.detach().as_subclass(Quantised)
        model.lm_head.weight = nn.Parameter(weight)

    def of_another_class(model):
        model.__class__ = Subclass

    assert mamba.is_our_own(random_model())
    for change in (hooked, hooked_before, adapted, quantised, of_another_class):
        model = random_model()
        change(model)
        assert not mamba.is_our_own(model), change.__name__
    for name in ("forward", "step", "select"):
        model = random_model()
        setattr(model.backbone.layers[0].mixer, name, lambda *args: None)
        assert not mamba.is_our_own(model), name
    model = random_model()
    model.embed = lambda ids: None
    assert not mamba.is_our_own(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not mamba.is_our_own(random_model())


@needs_gpu
@pytest.mark.parametrize("scan", SCANS)
def test_a_gpu_gives_the_numbers_of_the_cpu(scan):
    model, (ids, reset) = random_model(scan=scan), packed_documents((5, 35, 1, 29))
    numbers = {}
    with watch(model) as layers:
        model(ids, reset=reset)
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(model).to(device)
        start = there.init_state(2)
        logits, state = there(ids.to(device), start, reset=reset.to(device))
        gradients = gradients_of(logits.square().mean(), there)
        next_logits, state = there.step(ids[:, -1].to(device), state)
        outputs = {"logits": logits, "next logits": next_logits, "h": state.h}
        prompt = ids[:, :9].to(device)
        tokens = list(generate.stream(there, prompt, max_new_tokens=9, temperature=0))
        outputs |= {"tokens": torch.stack(tokens)}
        numbers[device] = [
            {name: t.cpu() for name, t in each.items()} for each in (outputs, gradients)
        ]
    # As in judge_scan: log space within what it states about itself, the others within 1e-5.
    bound = max(logspace_bound(layer, 64, reset) for layer in layers)
    tolerance = max(1e-5, 2 * bound) if scan == "logspace" else 1e-5
    assert_all_close(numbers["cuda"][0], numbers["cpu"][0], tolerance)
    assert_all_close(numbers["cuda"][1], numbers["cpu"][1], 10 * tolerance)


@needs_gpu
def test_a_model_compiled_for_a_gpu_is_the_model_and_is_compiled_whole():
    model, ids = random_model().to("cuda"), random_ids(2, 9).to("cuda")
    torch.compiler.reset()
    forward, step = (torch.compile(f, fullgraph=True) for f in (model, model.step))
    actual, expected = forward(ids), model(ids)
    assert_close("logits", actual, expected, 1e-5)
    gradients = (gradients_of(logits.square().mean(), model) for logits in (actual, expected))
    assert_all_close(*gradients, 1e-4)
    with torch.no_grad():
        _, state = model(ids, model.init_state(2))
        assert_same_results(step(ids[:, 0], state), model.step(ids[:, 0], state))


## ================================================================================================
## Files
## ================================================================================================


def assert_same_weights(actual: Mamba, expected: dict[str, Tensor]) -> None:
    assert actual.state_dict().keys() == expected.keys()
    for name, tensor in actual.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_bit_by_bit_with_its_whole_configuration(tied, tmp_path):
    changes = {"d_conv": 3, "dt_rank": 5, "norm_eps": 1e-3, "rule": "zoh", "tokenizer": "bytes"}
    model = random_model(**changes, tie_embeddings=tied, scan="sequential")
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = Mamba.from_pretrained(tmp_path / "new" / "folder", scan="sequential")
    assert loaded.config == model.config
    assert_same_weights(loaded, model.state_dict())
    assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) == tied
    ids = random_ids(2, 5)
    assert torch.equal(loaded(ids), model(ids))


def test_saving_into_the_folder_that_the_model_came_from_is_safe(tmp_path):
    random_model().save_pretrained(tmp_path)
    model = Mamba.from_pretrained(tmp_path)
    with torch.no_grad():
        model.backbone.norm_f.weight += 1
    model.save_pretrained(tmp_path)
    assert_same_weights(Mamba.from_pretrained(tmp_path), model.state_dict())
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_dtype_is_float32_unless_asked_for_whatever_the_file_holds(tmp_path):
    model = random_model().bfloat16()
    model.save_pretrained(tmp_path)
    loaded = Mamba.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert_same_weights(loaded, {name: t.float() for name, t in model.state_dict().items()})
    loaded = Mamba.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_weights(loaded, model.state_dict())
    assert loaded.lm_head.weight is loaded.backbone.embedding.weight
