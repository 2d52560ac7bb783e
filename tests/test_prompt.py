"""The prompt: read in parts, beside padding, and on some CPUs with convolutions for products.

The judge is `step`, token after token, in float64: it knows no parts, padding or resets. What
decides for convolutions is set for the test, whatever the machine has.
"""

import contextlib
import functools
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import generate
from mamba import Mamba, MambaState
from test_mamba import assert_all_close, assert_same_results, random_ids, random_model, random_state


@functools.cache
def tiny_model() -> Mamba:
    return random_model(d_model=4, d_state=3, vocab_size=11).double().requires_grad_(False)


def by_step(ids: Tensor, reset: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
    """Logits of all tokens, and the last state, which is zeroed where a document starts."""
    logits, model = [], tiny_model()
    for t in range(ids.shape[1]):
        state = state.map(lambda s, t=t: s.masked_fill(reset[:, t].view(1, -1, 1, 1), 0))
        step_logits, state = model.step(ids[:, t], state)
        logits.append(step_logits)
    return torch.stack(logits, dim=1), state


# The same examples in every run, and none that fails because the machine is busy.
@settings(max_examples=60, derandomize=True, deadline=None, phases=[Phase.generate])
@given(st.data(), st.integers(1, 3), st.integers(1, 12), st.integers(1, 20), st.booleans())
def test_each_row_has_its_own_numbers_whatever_the_padding_and_the_parts(
    data, batch, length, reads, used
):
    torch.manual_seed(length)
    model, ids, progress = tiny_model(), random_ids(batch, length, 11), []
    starts = [[data.draw(st.integers(0, 0 if used else length - 1))] for _ in range(batch)]
    mask = torch.arange(length) >= torch.tensor(starts)
    reset = mask & (mask.cumsum(1) == 1) & (torch.arange(length) > 0)
    state = random_state(model, batch) if used else None
    given = mask.to(data.draw(st.sampled_from((torch.bool, torch.int64, torch.uint8))))
    with mock.patch.object(generate, "CPU_READS", reads):
        found = generate.prefill(model, ids, given, state, progress.append)
    expected, last = by_step(ids, reset, state or model.init_state(batch))
    assert_same_results(found, (expected[:, -1], last), 1e-10)
    part = max(1, reads // batch)
    assert progress == [*range(part, length, part), length]


def test_a_model_that_is_not_our_own_gets_the_prompt_in_one_piece_and_its_head_the_end(monkeypatch):
    """What it does with a prompt may not be what it does with parts of one."""
    monkeypatch.setattr(generate, "CPU_READS", 4)
    model, ids, seen = random_model(), random_ids(2, 9), []
    for module in (model.backbone.norm_f, model.lm_head):
        module.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape))
    found = generate.prefill(model, ids)
    assert seen == [(2, 9, 16), (2, 16)]
    expected, last = model(ids, model.init_state(2))
    assert_same_results(found, (expected[:, -1], last))


def test_a_mask_that_is_not_left_padding_is_refused():
    for words, masks in (
        ("left padding", ([[0, 0, 0], [1, 1, 1]], [[0, 1, 0, 1]], [[0, 1, 2]], [[0, -1, 1]])),
        ("bool, or integers", ([[0.0, 1.0, 1.0]], [[0j, 1j]], [0, 1, 1], [[]])),
    ):
        for mask in masks:
            with pytest.raises(ValueError, match=words):
                generate.reset_after_padding(torch.tensor(mask))


@pytest.mark.parametrize("name", ["conv", "h"])
def test_padding_is_refused_in_a_row_that_has_seen_tokens_and_only_there(name):
    model, mask = tiny_model(), torch.tensor([[1, 1, 1], [0, 1, 1]])
    state, refused = model.init_state(2), pytest.raises(ValueError, match="state is not zero")
    for row, looks in ((0, contextlib.nullcontext()), (1, refused)):
        getattr(state, name)[1, row, 2, 1] = 1e-30
        with looks:
            generate.prefill(model, mask, mask, state)
        with looks:
            generate.reset_after_padding(mask, state[1])


## By convolution ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"bias": False, "tie_embeddings": False}])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_model_by_convolution_has_the_same_parameters_results_and_gradients(changes, threads):
    """And the model itself is left as it was."""
    torch.set_num_threads(threads)
    model, ids = random_model(**changes).double(), random_ids(3, 7)  # an odd number
    modules = list(model.named_modules())
    twin, names = generate.by_convolution(model), dict(model.named_parameters()).keys()
    assert list(model.named_modules()) == modules
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    for layer in twin.backbone.layers:
        types = [type(getattr(layer.mixer, name)) for name in ("in_proj", "out_proj", "x_proj")]
        assert types == [generate.Convolution, generate.Convolution, nn.Linear]
    start, found = random_state(model, 3), []
    for each in (twin, model):
        logits, state = each(ids, start)
        next_logits, _ = each.step(ids[:, 0], start)
        gradients = torch.autograd.grad(logits.square().sum(), [*model.parameters()])
        values = {"logits": logits, "next logits": next_logits, **vars(state)}
        found.append(values | dict(zip(names, gradients, strict=True)))
    assert_all_close(*found, 1e-12)


def made_by(vendor: str) -> mock.Mock:  # in place of /proc/cpuinfo
    return mock.Mock(**{"exists.return_value": True, "read_text.return_value": f"id : {vendor}"})


# With the first value convolutions are faster, with the second they are not.
MACHINE = [
    (generate, "CPUINFO", made_by("AuthenticAMD"), made_by("GenuineIntel")),
    (torch, "get_num_threads", lambda: 2, lambda: 1),
    (torch.backends.mkldnn, "enabled", True, False),
    (torch.backends.cpu, "get_cpu_capability", lambda: "AVX512", lambda: "AVX2"),
    (generate, "WORTH_CONVOLUTION", 10, 11),
]


@pytest.fixture
def right_machine(monkeypatch):
    for owner, name, right, _ in MACHINE:
        monkeypatch.setattr(owner, name, right)


def convolved(model: Mamba, batch: int = 2, seqlen: int = 5) -> int:
    """How many convolutions the prefill of a prompt runs."""
    real = generate.Convolution.forward
    with mock.patch.object(generate.Convolution, "forward", autospec=True, side_effect=real) as spy:
        generate.prefill(model, random_ids(batch, seqlen).to(model.lm_head.weight.device))
    return spy.call_count


@pytest.mark.parametrize(("owner", "name", "_", "wrong"), MACHINE)
def test_on_the_right_machine_the_two_large_products_of_a_layer_are_convolutions(
    owner, name, _, wrong, right_machine, monkeypatch
):
    """If the tokens of all rows are enough; else they stay products."""
    assert convolved(random_model()) == convolved(random_model(), 1, 10) == 2 * 2
    monkeypatch.setattr(owner, name, wrong)
    assert convolved(random_model()) == 0


def test_other_dtypes_and_models_that_are_not_our_own_have_their_products(right_machine):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert convolved(random_model().to(dtype)) == 0
    model, called = random_model(), []
    model.backbone.layers[1].mixer.in_proj.register_forward_hook(lambda *_: called.append(1))
    assert convolved(model) == 0 and called == [1]
    with pytest.raises(ValueError, match="of our own modules only"):
        generate.by_convolution(model)
    mixed = random_model()
    mixed.backbone.norm_f.double()
    assert generate.can_convolve(random_model(), 10) and not generate.can_convolve(mixed, 10)


def test_where_there_is_no_cpuinfo_python_knows_who_made_the_processor(right_machine, monkeypatch):
    """Elsewhere than on Linux."""
    monkeypatch.setattr(generate, "CPUINFO", Path("/no/such/file"))
    for vendor in ("AuthenticAMD", "GenuineIntel"):
        monkeypatch.setattr(generate.platform, "processor", lambda name=f"AMD64, {vendor}": name)
        assert generate.can_convolve(random_model(), 10) is (vendor == "AuthenticAMD")


@pytest.mark.gpu(needed=True)
def test_on_a_gpu_the_parts_are_larger_and_the_products_stay(right_machine, monkeypatch):
    monkeypatch.setattr(generate, "GPU_READS", 10)
    model, ids = random_model().cuda(), random_ids(2, 13).cuda()
    assert convolved(model) == 0
    expected, last = model(ids, model.init_state(2))
    assert_same_results(generate.prefill(model, ids), (expected[:, -1], last))
