"""The prompt in generate.py: read in parts, and on some CPUs with convolutions for products.

The judge is the model on the whole prompt, in float64. What decides for convolutions is looked at
one condition at a time: the machine of the tests may have none of them.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import generate
from mamba import Mamba, MambaConfig, MambaState

VOCABULARY = 19


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def made_by(vendor: str) -> mock.Mock:
    """What stands in the place of /proc/cpuinfo."""
    return mock.Mock(**{"exists.return_value": True, "read_text.return_value": f"id : {vendor}"})


@pytest.fixture
def right_machine(monkeypatch):
    """Whatever the machine is, it is one on which convolutions are faster, for any prompt."""
    monkeypatch.setattr(generate, "WORTH_CONVOLUTION", 1)
    monkeypatch.setattr(generate, "CPUINFO", made_by("AuthenticAMD"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


def small_model(dtype=torch.float64, **changes) -> Mamba:
    """No parameter has the value that it starts training with."""
    torch.manual_seed(0)
    sizes = {"d_model": 8, "n_layer": 2, "vocab_size": VOCABULARY, "d_state": 3}
    model = Mamba(MambaConfig(**sizes | changes)).to(dtype).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) / 3)
    return model


def random_ids(batch: int, seqlen: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch + 100 * seqlen)
    return torch.randint(VOCABULARY, (batch, seqlen), generator=generator)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error < tolerance, f"{name}: relative error {error:.1e}"


def assert_reads_as_the_model_does(model: Mamba, ids: Tensor, mask: Tensor | None = None) -> None:
    """Row by row: each is read whole, alone, and without its padding."""
    logits, state = generate.prefill(model, ids, mask)
    for row in range(len(ids)):
        alone = ids[row] if mask is None else ids[row][mask[row].bool()]
        expected, last = model(alone.unsqueeze(0), model.init_state(1))
        assert_close(f"logits of row {row}", logits[row], expected[0, -1])
        assert_close(f"state.conv of row {row}", state.conv[:, row], last.conv[:, 0])
        assert_close(f"state.h of row {row}", state.h[:, row], last.h[:, 0])


## ================================================================================================
## In parts
## ================================================================================================


@pytest.mark.parametrize("seqlen", [1, 2, 6, 7, 13])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 6), (2, 6), (3, 6), (3, 2), (1, 1000)])
def test_a_prompt_read_in_parts_leaves_what_it_leaves_whole(batch, tokens, seqlen, monkeypatch):
    monkeypatch.setattr(generate, "CPU_READS", tokens)
    assert_reads_as_the_model_does(small_model(), random_ids(batch, seqlen))


@pytest.mark.parametrize("tokens", [3, 9, 12, 100])
def test_padding_may_be_longer_than_a_part(tokens, monkeypatch):
    monkeypatch.setattr(generate, "CPU_READS", tokens)
    mask = torch.arange(11) >= torch.tensor([[0], [4], [10]])
    assert_reads_as_the_model_does(small_model(), random_ids(3, 11), mask)


@pytest.mark.parametrize(("batch", "longest"), [(1, 12), (2, 6), (5, 2), (12, 1), (13, 1)])
def test_no_part_has_more_tokens_than_it_may(batch, longest, monkeypatch):
    monkeypatch.setattr(generate, "CPU_READS", 12)
    model, seen = small_model(), []
    forward = Mamba.forward

    def watched(self, ids, state, **options):
        seen.append(ids)
        return forward(self, ids, state, **options)

    monkeypatch.setattr(Mamba, "forward", watched)
    ids = random_ids(batch, 25)
    generate.prefill(model, ids)
    assert max(part.shape[1] for part in seen) == longest
    assert torch.equal(torch.cat(seen, dim=1), ids), "every token once, and in order"


def test_only_the_last_logits_are_computed(monkeypatch):
    model = small_model()
    with mock.patch.object(model.lm_head, "forward", wraps=model.lm_head.forward) as head:
        logits, _ = generate.prefill(model, random_ids(2, 9))
    ((u,), _) = head.call_args
    assert head.call_count == 1 and u.shape == (2, 8) and logits.shape[0] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_logits_that_are_no_numbers_are_an_error_and_no_text(batch, temperature, dtype):
    """After the prompt, and on a CPU after every token."""
    for broken_from in (0, 2):
        model = small_model(dtype, tie_embeddings=False)
        options = {"temperature": temperature, "seed": 0, "max_new_tokens": 9}
        steps = generate.stream(model, random_ids(batch, 4), **options)
        with pytest.raises(RuntimeError, match="not finite"):
            for i in itertools.count():
                if i == broken_from:
                    model.lm_head.weight[3, 5] = math.nan
                next(steps)
        assert i == broken_from


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 1])
def test_one_number_that_is_none_is_enough(row, value, dtype):
    logits = torch.randn(2, 7).to(dtype)
    generate.check_logits(logits)
    logits[row, 3] = value
    with pytest.raises(RuntimeError, match="not finite"):
        generate.check_logits(logits)


def test_a_token_may_be_forbidden_but_not_all_of_them():
    logits = torch.randn(2, 7)
    logits[1, 1:] = -math.inf
    generate.check_logits(logits)
    assert generate.sample(logits)[1] == 0
    logits[1, 0] = -math.inf
    with pytest.raises(RuntimeError, match="not finite"):
        generate.check_logits(logits)


@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 6e4), (torch.float64, 1e300)])
def test_large_logits_are_numbers(dtype, large):
    generate.check_logits(torch.full((1, 50_000), large, dtype=dtype))


## ================================================================================================
## Padding
## ================================================================================================


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
def test_a_mask_becomes_a_reset_at_the_first_token_after_padding(dtype):
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]).to(dtype)
    reset = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).bool()
    assert torch.equal(generate.reset_after_padding(mask), reset)


def test_a_row_without_padding_goes_on_from_its_state_beside_one_that_starts():
    model, ids = small_model(), random_ids(2, 6)
    _, state = model(random_ids(1, 5), model.init_state(1))
    both = MambaState(*(torch.cat([t, torch.zeros_like(t)], dim=1) for t in (state.conv, state.h)))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    logits, after = model(ids, both, reset=generate.reset_after_padding(mask, both))
    for row, start, alone in ((0, state, ids[:1]), (1, model.init_state(1), ids[1:, 3:])):
        expected, last = model(alone, start)
        assert_close(f"logits of row {row}", logits[row, -1], expected[0, -1])
        assert_close(f"h of row {row}", after.h[:, row], last.h[:, 0])


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[1, 1, 0]], "left padding"),
        ([[1, 0, 1]], "left padding"),
        ([[0, 0, 0], [1, 1, 1]], "left padding"),
        ([[0, 1, 2]], "left padding"),
        ([[0, -1, 1]], "left padding"),
        ([[0.0, 1.0, 1.0]], "bool, or integers"),
        ([0, 1, 1], "bool, or integers"),
        ([[]], "bool, or integers"),
    ],
)
def test_a_mask_that_is_not_left_padding_is_refused(mask, words):
    with pytest.raises(ValueError, match=words):
        generate.reset_after_padding(torch.tensor(mask))


@pytest.mark.parametrize("name", ["conv", "h"])
@pytest.mark.parametrize("layer", [slice(None), 1])
def test_padding_in_a_row_that_has_seen_tokens_is_refused(name, layer):
    """Be it the state of a model or of a layer."""
    mask, state = torch.tensor([[1, 1, 1], [0, 1, 1]]), small_model().init_state(2)
    getattr(state, name)[1, 0, 2, 1] = 1e-30  # the row without padding
    generate.reset_after_padding(mask, state[layer])
    getattr(state, name)[1, 1, 2, 1] = 1e-30
    with pytest.raises(ValueError, match="state is not zero"):
        generate.reset_after_padding(mask, state[layer])


def test_a_mask_of_another_shape_than_the_prompt_is_refused():
    for shape in ((1, 4), (2, 3), (4,)):
        with pytest.raises(ValueError, match="mask must have the shape of input_ids"):
            next(generate.stream(small_model(), random_ids(2, 4), mask=torch.ones(shape).bool()))


def test_a_mask_with_a_hole_is_refused_wherever_the_hole_is(monkeypatch):
    monkeypatch.setattr(generate, "CPU_READS", 4)
    model, ids = small_model(), random_ids(1, 12)
    for start in range(1, 11):
        mask = torch.ones(1, 12, dtype=torch.bool)
        mask[:, start] = False
        with pytest.raises(ValueError, match="mask must be left padding"):
            next(generate.stream(model, ids, mask=mask))


def test_each_of_unequal_prompts_has_the_continuation_that_it_has_alone():
    model = small_model()
    tokenizer = generate.ByteTokenizer()
    tokenizer.vocab_size = VOCABULARY
    tokenizer.encode = lambda text: [ord(character) % VOCABULARY for character in text]
    prompts = ["To be", "or", "not to be, that is"]
    together = generate.generate(model, tokenizer, prompts, temperature=0, max_new_tokens=9)
    alone = [
        generate.generate(model, tokenizer, prompt, temperature=0, max_new_tokens=9)
        for prompt in prompts
    ]
    assert together == alone and len(set(alone)) == 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.complex64])
def test_ids_that_no_embedding_takes_are_refused(dtype):
    with pytest.raises(ValueError, match="input_ids must be int64 or int32"):
        next(generate.stream(small_model(), random_ids(1, 4).to(dtype)))


def test_a_model_that_is_not_our_own_gets_the_prompt_in_one_piece(monkeypatch):
    """What it does with a prompt may not be what it does with parts of one."""
    monkeypatch.setattr(generate, "CPU_READS", 4)
    seen = []

    class Own(Mamba):
        def forward(self, ids, state, **options):
            seen.append(ids.shape)
            return super().forward(ids, state, **options)

    model = small_model()
    own = Own(model.config).double()
    own.load_state_dict(model.state_dict())
    assert_reads_as_the_model_does(own, random_ids(2, 9))
    assert seen[0] == (2, 9)


## ================================================================================================
## By convolution
## ================================================================================================


@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (2, 7, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_linear_is_a_convolution_of_width_one(threads, bias, shape):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
            linear = nn.Linear(5, 9, bias=bias, dtype=dtype)
            u = torch.randn(shape, dtype=dtype)
            expected = linear.double()(u.double()).to(dtype)
            linear.to(dtype)
            convolve = partial(generate.Convolution.forward, linear)
            assert_close("out", convolve(u), expected, tolerance)
            wide = torch.randn(*shape[:-1], 10, dtype=dtype)
            u = wide[..., ::2]  # numbers that do not lie side by side
            assert_close("strided", convolve(u), linear(u), 10 * tolerance)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("changes", [{}, {"bias": True}, {"tie_embeddings": False}, {"d_conv": 1}])
def test_a_model_by_convolution_is_the_model(changes):
    model = small_model(**changes)
    twin = generate.by_convolution(model)
    ids = random_ids(2, 7)
    expected, last = model(ids, model.init_state(2))
    logits, state = twin(ids, twin.init_state(2))
    assert_close("logits", logits, expected)
    assert_close("state.h", state.h, last.h)
    assert_close("step", twin.step(ids[:, 0], state)[0], model.step(ids[:, 0], last)[0])


def test_both_have_the_same_parameters_and_the_model_is_left_as_it_was():
    model = small_model(bias=True)
    modules = [(name, module) for name, module in model.named_modules()]
    twin = generate.by_convolution(model)
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(parameter is theirs[name] for name, parameter in ours.items())
    assert twin.lm_head.weight is twin.backbone.embedding.weight
    after = [(name, module) for name, module in model.named_modules()]
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(modules, after, strict=True))
    for layer in twin.backbone.layers:
        types = [type(getattr(layer.mixer, name)) for name in ("in_proj", "out_proj", "x_proj")]
        assert types == [generate.Convolution, generate.Convolution, nn.Linear]


def test_to_train_one_is_to_train_the_other():
    model = small_model().requires_grad_(True)
    ids = random_ids(2, 6)
    with torch.enable_grad():
        expected = torch.autograd.grad(model(ids).square().sum(), list(model.parameters()))
        generate.by_convolution(model)(ids).square().sum().backward()
    for (name, parameter), right in zip(model.named_parameters(), expected, strict=True):
        assert_close(name, parameter.grad, right, 1e-10)


def convolved(model: Mamba, *prompt: Tensor) -> int:
    """How many convolutions the prefill of a prompt runs."""
    forward = generate.Convolution.forward
    with mock.patch.object(generate.Convolution, "forward", autospec=True) as spy:
        spy.side_effect = forward
        generate.prefill(model, *prompt)
    return spy.call_count


def test_on_the_right_machine_the_two_large_products_of_a_layer_are_convolutions(right_machine):
    model = small_model(torch.float32)
    assert convolved(model, random_ids(2, 5)) == 2 * 2
    assert convolved(model, random_ids(1, 1)) == 2 * 2


def test_the_tokens_of_all_rows_count(right_machine, monkeypatch):
    monkeypatch.setattr(generate, "WORTH_CONVOLUTION", 12)
    model = small_model(torch.float32)
    assert convolved(model, random_ids(2, 5)) == 0
    assert convolved(model, random_ids(2, 6)) > 0


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (generate, "CPUINFO", made_by("GenuineIntel")),
        (torch, "get_num_threads", lambda: 1),
        (torch.backends.mkldnn, "enabled", False),
        (torch.backends.cpu, "get_cpu_capability", lambda: "AVX2"),
        (generate, "WORTH_CONVOLUTION", 11),
    ],
)
def test_on_another_machine_and_for_short_prompts_they_are_products(
    owner, name, value, right_machine, monkeypatch
):
    model, ids = small_model(torch.float32), random_ids(2, 5)
    assert convolved(model, ids) > 0
    monkeypatch.setattr(owner, name, value)
    assert convolved(model, ids) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_have_their_products(dtype, right_machine):
    assert convolved(small_model(dtype), random_ids(2, 5)) == 0


def test_so_does_a_model_with_a_weight_of_another_dtype(right_machine):
    model = small_model(torch.float32)
    assert convolved(model, random_ids(2, 5)) > 0
    model.backbone.norm_f.weight = nn.Parameter(model.backbone.norm_f.weight.double())
    assert not generate.can_convolve(model, 10)


def test_a_model_in_which_something_is_not_our_own_has_its_products(right_machine):
    model, called = small_model(torch.float32), []
    hook = model.backbone.layers[1].mixer.in_proj.register_forward_hook(lambda *_: called.append(1))
    assert convolved(model, random_ids(2, 5)) == 0 and called == [1]
    hook.remove()
    assert convolved(model, random_ids(2, 5)) > 0
    model.backbone.layers[0].mixer.out_proj = nn.Sequential(model.backbone.layers[0].mixer.out_proj)
    assert convolved(model, random_ids(2, 5)) == 0


def test_a_stream_goes_on_from_there(right_machine):
    model = small_model(torch.float32)
    ids = random_ids(1, 9)
    found = torch.stack(list(generate.stream(model, ids, max_new_tokens=8, temperature=0)))
    state = model.init_state(1)
    logits, state = model(ids, state)
    expected, logits = [], logits[:, -1]
    for _ in range(8):
        expected.append(logits[:, :VOCABULARY].argmax(-1))
        logits, state = model.step(expected[-1], state)
    assert torch.equal(found, torch.stack(expected))


def test_where_there_is_no_cpuinfo_python_knows_who_made_the_processor(right_machine, monkeypatch):
    """Elsewhere than on Linux."""
    monkeypatch.setattr(generate, "CPUINFO", Path("/no/such/file"))
    for vendor in ("AuthenticAMD", "GenuineIntel"):
        monkeypatch.setattr(generate.platform, "processor", lambda name=f"AMD64, {vendor}": name)
        assert generate.can_convolve(small_model(torch.float32), 10) is (vendor == "AuthenticAMD")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_parts_are_larger_and_the_products_stay(right_machine, monkeypatch):
    monkeypatch.setattr(generate, "GPU_READS", 10)
    model = small_model(torch.float32).cuda()
    ids = random_ids(2, 13).cuda()
    assert convolved(model, ids) == 0
    expected, last = model(ids, model.init_state(2))
    logits, state = generate.prefill(model, ids)
    assert_close("logits", logits, expected[:, -1], 1e-5)
    assert_close("state.h", state.h, last.h, 1e-5)
    assert isinstance(state, MambaState)


def test_a_model_by_convolution_is_refused_where_the_twin_would_pass_something_by():
    model = small_model(torch.float32)
    hook = model.backbone.layers[1].mixer.in_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="of our own modules only"):
        generate.by_convolution(model)
    hook.remove()
    generate.by_convolution(model)
