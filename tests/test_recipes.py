"""examples/recipes.py: padding, packing and windows change nothing but the cost.

The judge is the same layer or model reading one document at a time, alone and mostly by `step`,
which knows no padding, no resets and no windows. In float64: what differs by 1e-9 is wrong.
"""

import copy
import json
import re

import pytest
import recipes
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba import SCANS, Mamba, MambaBlock, MambaConfig


def randomised(module: nn.Module) -> nn.Module:
    """Random in every parameter, so that none can be forgotten."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(torch.randn_like(parameter) / 3)
    return module


def small(**changes) -> MambaConfig:
    return MambaConfig(**{**dict(d_model=8, d_state=3, n_layer=2, vocab_size=11), **changes})


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert actual.shape == expected.shape, name
    error = (actual - expected).abs().max().item()
    assert error < tolerance, f"{name} is off by {error:.1e}"


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(f"gradient of {name}", actual[name], expected[name])


## ================================================================================================
## Both directions
## ================================================================================================


def by_steps(block: MambaBlock, u: Tensor) -> Tensor:
    """u (l, d_model), one position at a time from the left -> (l, d_model)."""
    state, ys = block.init_state(1), []
    for u_t in u:
        y, state = block.step(u_t.unsqueeze(0), state)
        ys.append(y)
    return torch.cat(ys)


def from_both_sides(block: recipes.BidirectionalBlock, u: Tensor) -> Tensor:
    """u (l, d_model), one sequence alone: a step at a time rightward, another leftward."""
    last_first = list(reversed(range(len(u))))
    return by_steps(block.rightward, u) + by_steps(block.leftward, u[last_first])[last_first]


@pytest.mark.parametrize("scan", SCANS)
def test_each_sequence_in_a_bidirectional_batch_is_read_from_both_sides_whatever_pads_it(scan):
    """Padding on the right, on the left, on both sides, none, and packed documents."""
    block = randomised(recipes.BidirectionalBlock(small(scan=scan)))
    documents = torch.tensor(
        [
            [1, 1, 1, 1, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0, 1],
            [0, 0, 1, 1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 1, 1, 1, 1, 1],
            [1, 2, 2, 2, 2, 3, 3, 0, 0],
        ]
    )
    u = torch.randn(5, 9, 8, dtype=torch.float64)
    y, y_masked = block(u, documents), block(u, documents > 0)
    for row in range(5):
        for number in set(documents[row].tolist()) - {0}:
            here = documents[row] == number
            expected = from_both_sides(block, u[row, here])
            assert_close(f"document {number} of row {row}", y[row, here], expected)
            if row < 4:
                assert_close(f"masked row {row}", y_masked[row, here], expected)
    assert_close("no documents", block(u)[3], y[3])


def test_no_gradient_of_a_bidirectional_layer_comes_from_padding():
    block = randomised(recipes.BidirectionalBlock(small()))
    mask = torch.tensor([[True] * 5 + [False] * 3, [False] * 3 + [True] * 5])
    u = torch.randn(2, 8, 8, dtype=torch.float64)
    padded, alone = u.clone().requires_grad_(), u[mask].view(2, 5, 8).requires_grad_()
    weight = torch.randn(2, 5, 8, dtype=torch.float64)
    loss = (block(padded, mask)[mask].view(2, 5, 8) * weight).sum()
    loss_alone = (block(alone) * weight).sum()
    assert_same_gradients(gradients(loss, block), gradients(loss_alone, block))
    (du,), (du_alone,) = torch.autograd.grad(loss, padded), torch.autograd.grad(loss_alone, alone)
    assert not du[~mask].any(), "padding has a gradient"
    assert_close("gradient of u", du[mask].view(2, 5, 8), du_alone)


def test_reading_backwards_with_the_two_directions_exchanged_reverses_the_output():
    block = randomised(recipes.BidirectionalBlock(small()))
    exchanged = recipes.BidirectionalBlock(small())
    exchanged.rightward, exchanged.leftward = block.leftward, block.rightward
    u, documents = torch.randn(2, 7, 8, dtype=torch.float64), torch.arange(14).view(2, 7) // 3
    assert_close("whole rows", exchanged(u.flip(1)), block(u).flip(1))
    expected = block(u, documents).flip(1)
    assert_close("documents", exchanged(u.flip(1), documents.flip(1)), expected)


def test_every_position_of_a_bidirectional_layer_depends_on_every_other():
    block = randomised(recipes.BidirectionalBlock(small()))
    u = torch.randn(1, 13, 8, dtype=torch.float64, requires_grad=True)
    y = block(u)
    for t in range(13):
        (du,) = torch.autograd.grad(y[0, t].sum(), u, retain_graph=True)
        assert du[0].abs().sum(-1).all(), f"position {t} does not see all others"


## ================================================================================================
## The classifier
## ================================================================================================


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("features", [None, 5])
def test_a_row_among_longer_rows_is_classified_as_it_is_alone(pool, features):
    model = randomised(recipes.SequenceClassifier(small(), 4, features, pool))
    lengths = torch.tensor([9, 1, 4, 2, 8])
    rows = torch.randn(5, 9, 5, dtype=torch.float64) if features else torch.randint(11, (5, 9))
    logits = model(rows, lengths)
    assert logits.shape == (5, 4)
    for i, length in enumerate(lengths.tolist()):
        alone = model(rows[i : i + 1, :length])
        assert_close(f"row of {length}", logits[i : i + 1], alone)
        u = model.embed(rows[i, :length])  # the same, written out
        for norm, block in zip(model.norms, model.blocks, strict=True):
            u = u + by_steps(block, norm(u))
        u = model.norm_f(u)
        pooled = u[-1] if pool == "last" else torch.stack(list(u)).mean(0)
        assert_close(f"row of {length} by steps", logits[i], model.head(pooled))
    parts = [
        model(rows[i : i + 1, :length]).square().sum() for i, length in enumerate(lengths.tolist())
    ]
    expected = gradients(sum(parts), model)
    assert_same_gradients(gradients(logits.square().sum(), model), expected)


def test_the_classifier_learns_to_find_a_mark_in_rows_of_unequal_lengths():
    model = recipes.SequenceClassifier(MambaConfig(d_model=16, vocab_size=8), classes=7)
    recipes.fit(model, recipes.answer_loss, recipes.rows_with_a_mark, steps=250)
    ids, lengths, answers = recipes.rows_with_a_mark(1000)
    with torch.no_grad():
        right = (model(ids, lengths).argmax(-1) == answers).float().mean().item()
    assert right > 0.95, f"{right:.1%} right; a guess is right in 14.3%"


@pytest.mark.parametrize("lengths", [[3, 0], [7, 1], [-1, 2], [3], [[3, 3]]], ids=str)
def test_a_length_that_no_row_can_have_is_refused(lengths):
    with pytest.raises(ValueError, match=re.escape(f"need 2 lengths in 1 ... 6, got {lengths}")):
        recipes.SequenceClassifier(small(), 4)(torch.zeros(2, 6).long(), torch.tensor(lengths))


def test_an_unknown_pool_is_refused():
    with pytest.raises(ValueError, match="'last' or 'mean', got 'max'"):
        recipes.SequenceClassifier(small(), 4, pool="max")


## ================================================================================================
## Windows
## ================================================================================================


def losses_by_steps(model: Mamba, ids: Tensor, borders: set[int]) -> list[Tensor]:
    """The loss of every prediction, a token at a time, the gradient cut at the borders."""
    state, losses = model.init_state(len(ids)), []
    for t in range(ids.shape[1] - 1):
        if t in borders:
            state = state.detach()
        logits, state = model.step(ids[:, t], state)
        losses.append(F.cross_entropy(logits, ids[:, t + 1]))
    return losses


@pytest.mark.parametrize("window, seqlen", [(1, 5), (4, 13), (5, 18), (7, 7), (30, 12)])
def test_windows_have_the_losses_of_one_pass_and_the_gradients_of_a_cut_at_each_border(
    window, seqlen
):
    model, ids = randomised(Mamba(small())), torch.randint(11, (3, seqlen))
    twin = copy.deepcopy(model)
    still = torch.optim.SGD(model.parameters(), lr=0.0)  # the weights stay, the gradients are real
    borders = list(range(0, seqlen - 1, window))
    log_p = twin(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])  # one long pass
    judge = losses_by_steps(twin, ids, set(borders))

    for i, loss in zip(borders, recipes.train_in_windows(model, ids, window, still), strict=True):
        here = slice(i, min(i + window, seqlen - 1))
        assert_close(
            f"loss from {i}", torch.tensor(loss, dtype=torch.float64), -log_p[:, here].mean()
        )
        actual = {name: p.grad.clone() for name, p in model.named_parameters()}
        assert_same_gradients(actual, gradients(torch.stack(judge[here]).mean(), twin))


def test_a_cut_changes_the_gradient_so_that_the_test_above_can_see_it():
    model, ids = randomised(Mamba(small())), torch.randint(11, (3, 9))
    cut, whole = (
        gradients(torch.stack(losses_by_steps(model, ids, borders)[4:]).mean(), model)
        for borders in ({4}, set())
    )
    for name in ("embedding.weight", "layers.0.mixer.A_log", "layers.1.mixer.in_proj.weight"):
        difference = cut[f"backbone.{name}"] - whole[f"backbone.{name}"]
        assert difference.abs().max() > 1e-4, name


def test_each_window_takes_one_step_of_the_optimizer_from_a_gradient_of_its_own():
    model, ids = randomised(Mamba(small())), torch.randint(11, (2, 13))
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = list(recipes.train_in_windows(model, ids, 4, optimizer))
    state = twin.init_state(2)
    for i, loss in zip((0, 4, 8), losses, strict=True):
        logits, state = twin(ids[:, i : i + 4], state.detach())
        expected = F.cross_entropy(logits.mT, ids[:, i + 1 : i + 5])
        assert loss == pytest.approx(expected.item(), abs=1e-9)
        slopes = torch.autograd.grad(expected, list(twin.parameters()))
        with torch.no_grad():
            for parameter, slope in zip(twin.parameters(), slopes, strict=True):
                parameter -= 0.1 * slope
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(name, ours, theirs)


## ================================================================================================
## Packed documents
## ================================================================================================


def test_packing_loses_no_token_and_takes_the_first_row_with_room():
    documents = [torch.randint(1, 11, (length,)) for length in (5, 1, 7, 2, 8, 3)]
    ids, numbers = recipes.pack(documents, 8)
    assert numbers.tolist() == [
        [1, 1, 1, 1, 1, 2, 4, 4],
        [3, 3, 3, 3, 3, 3, 3, 0],
        [5, 5, 5, 5, 5, 5, 5, 5],
        [6, 6, 6, 0, 0, 0, 0, 0],
    ]
    for number, document in enumerate(documents, start=1):
        assert torch.equal(ids[numbers == number], document)
    with pytest.raises(ValueError, match="document 3 has 7 tokens, a row only 6"):
        recipes.pack(documents, 6)


@pytest.mark.parametrize("scan", SCANS)
def test_packed_documents_have_the_logits_loss_and_gradients_of_separate_documents(scan):
    model = randomised(Mamba(small(scan=scan)))
    documents = [torch.randint(11, (length,)) for length in (5, 1, 7, 2, 9, 3, 1)]
    ids, numbers = recipes.pack(documents, 12)
    assert len(ids) < len(documents) and (numbers == 0).any()  # there is something to get wrong
    logits, losses = model(ids, reset=recipes.starts(numbers)), []
    for number, document in enumerate(documents, start=1):
        alone = model(document.unsqueeze(0))[0]
        assert_close(f"logits of document {number}", logits[numbers == number], alone)
        losses += [-alone[t].log_softmax(-1)[id] for t, id in enumerate(document[1:])]
    loss, expected = recipes.packed_loss(model, ids, numbers), torch.stack(losses).mean()
    assert_close("loss", loss, expected)
    assert_same_gradients(gradients(loss, model), gradients(expected, model))


## ================================================================================================
## Files for others
## ================================================================================================


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [20, 12, 9, 4])
def test_a_resized_model_keeps_what_it_knew_of_old_tokens_trains_and_can_be_saved(
    tied, size, tmp_path
):
    model = randomised(Mamba(small(tie_embeddings=tied)))
    ids = torch.randint(min(size, 11), (2, 7))
    before = model(ids)[..., : min(size, 11)]
    recipes.resize_token_embeddings(model, size)
    logits = model(ids)
    assert logits.shape[-1] == model.config.padded_vocab_size == -(-size // 8) * 8
    assert_close("logits of old tokens", logits[..., : min(size, 11)], before)
    assert (model.lm_head.weight is model.backbone.embedding.weight) == tied
    for rows in [model.backbone.embedding.weight, model.lm_head.weight]:
        if size > 11:
            assert 0.01 < rows[11:].std() < 0.03
    new = torch.full((2, 3), size - 1)
    assert gradients(model(new).square().sum(), model)["backbone.embedding.weight"][size - 1].any()
    model.save_pretrained(tmp_path)
    loaded = Mamba.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config == model.config and torch.equal(loaded(new), model(new))


def test_a_model_is_resized_without_another_that_shares_its_configuration():
    model, other = (Mamba(config) for config in [small()] * 2)
    recipes.resize_token_embeddings(model, 20.0)
    assert (model.config.vocab_size, type(model.config.vocab_size)) == (20, int)
    assert other.config == small()
    model.config.scan = "sequential"  # one configuration for all blocks, as before
    assert model.backbone.layers[1].mixer.config.scan == "sequential"


def test_a_size_that_no_model_can_have_is_refused_and_the_model_stays_as_it_was():
    model = Mamba(small())
    with pytest.raises(ValueError, match="vocab_size must be a positive integer, got 0"):
        recipes.resize_token_embeddings(model, 0)
    assert model.config == small() and len(model.lm_head.weight) == 16


OFFICIAL_FIELDS = {
    *("d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx"),
    *("attn_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple"),
    "tie_embeddings",
}  # of MambaConfig in mamba_ssm 2.2
OFFICIAL_SSM_FIELDS = {
    *("d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale"),
    *("dt_init_floor", "conv_bias", "bias", "use_fast_path"),
}  # of its Mamba


@pytest.mark.parametrize("tied", [True, False])
def test_the_official_loader_reads_what_is_saved_for_it(tied, tmp_path):
    """Its two steps: config.json as keyword arguments, then a strict load of pytorch_model.bin."""
    model = randomised(Mamba(small(tie_embeddings=tied, tokenizer="bytes"))).float()
    for name in ("model.safetensors.index.json", "model-00001-of-00001.safetensors"):
        (tmp_path / name).write_text("of another model, and older")
    recipes.save_for_official(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}

    entries = json.loads((tmp_path / "config.json").read_text())
    assert entries.keys() <= OFFICIAL_FIELDS and entries["ssm_cfg"].keys() <= OFFICIAL_SSM_FIELDS
    weights = torch.load(tmp_path / "pytorch_model.bin", map_location="cpu")
    ssm = entries.pop("ssm_cfg")
    assert entries.pop("rms_norm") is entries.pop("fused_add_norm") is True
    other = Mamba(MambaConfig(**entries, **ssm))
    other.load_state_dict(weights, strict=True)
    ids = torch.randint(11, (2, 7))
    assert torch.equal(other(ids), model(ids))
    loaded = Mamba.from_pretrained(tmp_path)  # mapped from the file that is written next
    recipes.save_for_official(loaded, tmp_path)
    assert torch.equal(loaded(ids), model(ids))
    assert torch.equal(Mamba.from_pretrained(tmp_path)(ids), model(ids))


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False, "bias": True}, {"norm_eps": 0.1, "residual_in_fp32": False}],
    ids=str,
)
def test_transformers_reads_what_is_saved_for_it_and_so_do_we(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = randomised(Mamba(small(d_conv=3, expand=3, dt_rank=5, **changes))).float()
    recipes.save_for_transformers(model, tmp_path)
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(11, (2, 7))
    expected = model(ids)
    scale = expected.abs().max()
    for name, other in {
        "theirs": theirs(ids).logits,
        "ours": Mamba.from_pretrained(tmp_path)(ids),
    }.items():
        assert_close(name, other / scale, expected / scale, 1e-5)


@pytest.mark.parametrize("save", [recipes.save_for_official, recipes.save_for_transformers])
def test_a_rule_that_others_do_not_know_is_refused_and_nothing_is_written(save, tmp_path):
    with pytest.raises(ValueError, match="rule = 'zoh' cannot be said there, only 'mamba'"):
        save(Mamba(small(rule="zoh")), tmp_path)
    assert not list(tmp_path.iterdir())
    if save is recipes.save_for_official:
        with pytest.raises(ValueError, match=r"norm_eps = 0\.1"):
            save(Mamba(small(norm_eps=0.1)), tmp_path)


## ================================================================================================
## The script
## ================================================================================================


def test_the_script_prints_two_numbers_for_each_comparison(monkeypatch, capsys):
    """After one step of training on few rows; the windows are read to the end."""
    fit = recipes.fit

    def fit_a_little(model, loss_of, make, steps):
        return fit(model, loss_of, lambda count: make(min(count, 32)), steps=1)

    monkeypatch.setattr(recipes, "fit", fit_a_little)
    monkeypatch.setattr("sys.argv", ["recipes.py"])
    recipes.main()
    printed = capsys.readouterr().out
    first, second, third, fourth = re.split(r"^\d\. ", printed, flags=re.MULTILINE)[1:]
    assert len(re.findall(r"Block: \d\.\d{3}$", first, re.MULTILINE)) == 2
    assert re.search(r"SequenceClassifier: \d\.\d{3}$", second, re.MULTILINE)
    carried, forgotten = map(float, re.findall(r"(\S+) at last$", third, re.MULTILINE))
    assert carried < 0.15 < 0.25 < forgotten
    packed, alone = map(float, re.findall(r"rows: (\S+)$", fourth, re.MULTILINE))
    assert packed == pytest.approx(alone, abs=3e-6)
