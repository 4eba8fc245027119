"""The head that gives the loss, against the plain loss of all logits."""

import pytest
import torch
from transformers import AutoConfig

from llm.architectures import two_layers
from llm.losses import PIECE, following, linear_nats, next_token_nats
from llm.output_head import PLAIN_HEADS, rows_nats
from llm.packing import IGNORED

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def model_of(model_type, **values):
    config = AutoConfig.for_model(model_type)
    small = {name: value for name, value in {**SMALL, "head_dim": 16, **values}.items() if hasattr(config, name)}
    return two_layers(type(config).from_dict({**config.to_dict(), **small})).eval()  # no dropout


def rows():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (3, 24), generator=generator)
    labels = ids.clone()
    labels[0, :9] = labels[2, 20:] = IGNORED
    return ids, labels


def gradients(model, nats):
    model.zero_grad()
    nats.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def plain(model, ids, labels):
    return next_token_nats(model(input_ids=ids, use_cache=False).logits, labels)


@pytest.mark.parametrize("model_type", PLAIN_HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_all_logits(model_type, tied, monkeypatch):
    model, (ids, labels) = model_of(model_type, tie_word_embeddings=tied), rows()
    expected = plain(model, ids, labels)
    wanted = gradients(model, expected)
    with monkeypatch.context() as patch:
        patch.setattr("llm.output_head.target_nats", None)  # the head itself has to give the loss
        nats = rows_nats(model, ids, following(labels))
    assert nats.item() == pytest.approx(expected.item(), rel=1e-6)
    found = gradients(model, nats)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5 * float(wanted[name].abs().max()))


@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "granite"])
def test_logits_that_are_scaled_or_capped_after_the_head_keep_the_plain_loss(model_type):
    model, (ids, labels) = model_of(model_type, logits_scaling=8.0), rows()
    assert rows_nats(model, ids, following(labels)).item() == pytest.approx(plain(model, ids, labels).item(), rel=1e-6)


def test_the_head_gives_logits_again_afterwards_and_after_an_error():
    model, (ids, labels) = model_of("llama"), rows()
    before = model(input_ids=ids).logits
    rows_nats(model, ids, following(labels))
    with pytest.raises(ValueError, match=r"\(3, 24\) positions, labels of \(1, 24\)"):
        rows_nats(model, ids, following(labels[:1]))
    assert torch.equal(model(input_ids=ids).logits, before)


def test_many_pieces_equal_one_matrix():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * PIECE + 37, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (len(hidden),), generator=generator)
    targets[::3] = IGNORED
    found = torch.autograd.grad(linear_nats(hidden, weight, targets) * 0.5, (hidden, weight))
    logits = hidden @ weight.T
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    for mine, theirs in zip(found, torch.autograd.grad(loss * 0.5, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_in_bf16_the_loss_is_told_in_fp32():
    """Against fp64 of the same bf16 logits: bf16 itself would tell a sum of thousands to three digits."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (3 * PIECE, 512))
    targets = torch.randint(0, 512, (3 * PIECE,), generator=generator)
    logits = torch.cat([part @ weight.T for part in hidden.split(PIECE)]).double()
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    nats = linear_nats(hidden, weight, targets)
    assert nats.dtype == torch.float32
    assert nats.item() == pytest.approx(expected.item(), rel=1e-5)


def test_rows_without_targets_cost_nothing():
    model, (ids, _) = model_of("llama"), rows()
    nats = rows_nats(model, ids, torch.full_like(ids, IGNORED))
    assert nats.item() == 0
    assert all(not grad.any() for grad in gradients(model, nats).values())


def test_a_second_backward_pass_is_refused():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    nats = linear_nats(hidden, weight, torch.tensor([0, 1, 2]))
    nats.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"in-?place"):
        nats.backward()
