"""Filling in hidden words: who may look at what, the loss by hand, and that it is learnt."""

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from llm.architectures import Ids, check_architecture, two_layers
from llm.cloze import OBJECTIVE, aligned, attention_mask, guess_nats, guesses, logits_of, tell_objective, unfit
from llm.losses import next_token_nats
from llm.masking import Kind
from llm.packing import IGNORED
from tests.models import grouped_query_model, tiny_model

BOTH, CAUSAL = torch.tensor([True]), torch.tensor([False])


def positions_of(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def encoder():
    return BertForMaskedLM(
        BertConfig(
            vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
        )
    ).eval()


def test_who_looks_at_whom():
    seen = attention_mask(positions_of(2, 2).repeat(2, 1), torch.tensor([True, False]))
    assert seen.shape == (2, 1, 4, 4)
    assert seen[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert seen[1, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("make", [tiny_model, grouped_query_model, encoder])
def test_packed_pieces_equal_the_pieces_alone_in_both_directions(make):
    model, draw = make(), torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, 300, (1, length), generator=draw) for length in (9, 14))
    with torch.no_grad():
        packed = logits_of(model, torch.cat([first, second], dim=1), positions_of(9, 14), BOTH)
        alone = [logits_of(model, one, positions_of(one.shape[1]), BOTH) for one in (first, second)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)


def test_an_encoder_alone_sees_what_it_always_sees():
    model, ids = encoder(), torch.randint(0, 300, (1, 12))
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(model, ids, positions_of(12), BOTH), model(input_ids=ids).logits, atol=1e-5, rtol=1e-5
        )


def test_a_decoder_looks_ahead_in_masked_rows_alone():
    model, ids = tiny_model(), torch.arange(10)[None]
    other = ids.clone()
    other[0, -1] = 99
    with torch.no_grad():
        for both_ways, same in ((CAUSAL, True), (BOTH, False)):
            one, two = (logits_of(model, row, positions_of(10), both_ways)[0, 0] for row in (ids, other))
            assert torch.equal(one, two) is same


def batch_of(kinds: list[Kind], seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 300, (len(kinds), 16), generator=draw)
    labels = torch.randint(0, 300, (len(kinds), 16), generator=draw)
    labels[torch.rand(labels.shape, generator=draw) < 0.6] = IGNORED
    positions = positions_of(6, 10).repeat(len(kinds), 1)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "kind": torch.tensor(kinds)}


def part(batch: dict[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    return {name: values[rows] for name, values in batch.items()}


def test_the_loss_by_hand():
    class Fixed(torch.nn.Module):
        def forward(self, **_):
            return type("Out", (), {"logits": torch.log(torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]]))})

    row = {"input_ids": torch.zeros(1, 2).long(), "position_ids": positions_of(2), "labels": torch.tensor([[1, 2]])}
    masked = guess_nats(Fixed(), {**row, "kind": torch.tensor([Kind.MASKED])})
    assert masked.item() == pytest.approx(-math.log(0.3) - math.log(0.7))
    causal = guess_nats(Fixed(), {**row, "kind": torch.tensor([Kind.CAUSAL])})
    assert causal.item() == pytest.approx(-math.log(0.2))  # the second token, told at the first


def test_the_masked_loss_is_hugging_faces():
    model, batch = encoder(), batch_of([Kind.MASKED])
    batch["position_ids"] = positions_of(16)
    with torch.no_grad():
        theirs = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss * (batch["labels"] != IGNORED).sum()
        assert guess_nats(model, batch).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_a_mixed_batch_is_its_two_kinds_run_separately():
    model = tiny_model()
    kinds = [Kind.CAUSAL, Kind.MASKED, Kind.CAUSAL, Kind.SINGLE]
    batch = batch_of(kinds)
    causal = part(batch, [0, 2])
    nats = guess_nats(model, batch)
    nats.backward()
    together = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    logits = model(input_ids=causal["input_ids"], position_ids=causal["position_ids"], use_cache=False).logits
    apart = next_token_nats(logits, causal["labels"]) + guess_nats(model, part(batch, [1, 3]))
    apart.backward()
    assert nats.item() == pytest.approx(apart.item(), rel=1e-6)
    torch.testing.assert_close(together, model.model.embed_tokens.weight.grad, atol=1e-3, rtol=1e-4)


def test_rows_without_targets_cost_nothing():
    batch = batch_of([Kind.MASKED, Kind.MASKED])
    batch["labels"][:] = IGNORED
    nats = guess_nats(model := tiny_model(), batch)
    nats.backward()
    assert nats.item() == 0
    assert not model.model.embed_tokens.weight.grad.any()


def test_guesses_know_their_rows():
    batch = batch_of([Kind.MASKED, Kind.CAUSAL, Kind.MASKED])
    scored = guesses(tiny_model(), batch)
    expected = aligned(batch["labels"], batch["kind"] == Kind.MASKED)
    assert np.bincount(scored.row).tolist() == (expected != IGNORED).sum(dim=1).tolist()
    assert scored.targets.tolist() == expected[expected != IGNORED].tolist()


SMALL = {"hidden_size": 32, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "bert", **SMALL}, None),  # an encoder
        ({"model_type": "qwen2", **SMALL, "num_key_value_heads": 1}, None),
        ({"model_type": "gpt2", "n_embd": 32, "n_head": 2}, None),
        ({"model_type": "bloom", "hidden_size": 32, "n_head": 2}, "takes no mask"),
        ({"model_type": "mamba", "hidden_size": 32}, "takes no mask"),
    ],
)
def test_architectures_that_cannot_fill_in_words_are_found(values, said):
    why = unfit(two_layers(check_architecture(values).config(Ids(64))).eval())
    assert (why is None) if said is None else said in str(why)


@pytest.mark.parametrize(
    ("make", "taken", "said"),
    [
        (encoder, ("input_ids",), "from one document to the next"),
        (tiny_model, ("input_ids", "position_ids"), "can't look at those that follow"),
    ],
)
def test_a_mask_that_is_passed_over_is_found(make, taken, said):
    class Deaf(torch.nn.Module):
        def forward(self, **given):
            return model(**{name: given[name] for name in taken}, use_cache=False)

    model = make()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    assert said in str(unfit(Deaf()))


def test_the_configuration_tells_the_objective(tmp_path):
    from transformers import AutoConfig

    model = tiny_model()
    before = model.config.to_dict()
    tell_objective(model, "causal")
    assert model.config.to_dict() == before
    tell_objective(model, "masked")
    model.save_pretrained(tmp_path)
    assert getattr(AutoConfig.from_pretrained(tmp_path), OBJECTIVE) == "masked"
    tell_objective(model, "causal")  # a model that is trained on to predict the next token
    assert OBJECTIVE not in model.config.to_dict()
