"""Losses, schedules and baselines against numbers worked out by hand or by another library."""

import math

import numpy as np
import pytest
import torch

from llm.baselines import bigram_nats, count, mean_nats, unigram_nats
from llm.losses import next_token_nats, next_token_nats_by_row
from llm.packing import IGNORED
from llm.presets import PRESETS, Preset, build_model, llama_config
from llm.schedules import learning_rate


def test_uniform_logits_cost_log_of_the_vocabulary():
    labels = torch.tensor([[IGNORED, 1, 2, IGNORED]])
    assert next_token_nats(torch.zeros(1, 4, 8), labels).item() == pytest.approx(2 * math.log(8))


def test_loss_looks_at_the_token_before():
    logits = torch.full((1, 3, 5), -100.0)
    logits[0, 0, 3] = logits[0, 1, 4] = 100.0  # position 0 predicts 3, position 1 predicts 4
    assert next_token_nats(logits, torch.tensor([[0, 3, 4]])).item() == pytest.approx(0.0, abs=1e-6)


def test_loss_equals_hugging_faces_own():
    torch.manual_seed(0)
    config = llama_config(PRESETS["micro"], _FakeTokenizer())
    model = build_model(config, seed=0)
    ids = torch.randint(0, 40, (2, 16))
    theirs = model(input_ids=ids, labels=ids).loss
    ours = next_token_nats(model(input_ids=ids).logits, ids) / (2 * 15)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


def test_loss_is_the_same_however_rows_are_dealt_out():
    torch.manual_seed(0)
    logits = torch.randn(4, 8, 16)
    labels = torch.randint(0, 16, (4, 8))
    labels[0, :6] = IGNORED  # the parts carry unequal numbers of targets
    parts = sum(next_token_nats(logits[i : i + 2], labels[i : i + 2]) for i in (0, 2))
    assert parts.item() == pytest.approx(next_token_nats(logits, labels).item(), rel=1e-6)


def test_packed_pieces_equal_the_pieces_alone():
    model = build_model(llama_config(PRESETS["micro"], _FakeTokenizer()), seed=0).eval()
    first, second = torch.randint(0, 40, (1, 5)), torch.randint(0, 40, (1, 7))
    packed = model(
        input_ids=torch.cat([first, second], dim=1),
        position_ids=torch.cat([torch.arange(5), torch.arange(7)])[None],
        use_cache=False,
    ).logits
    alone = torch.cat([model(input_ids=first).logits, model(input_ids=second).logits], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("step", "decay", "expected"),
    [
        (0, "cosine", 0.1),
        (9, "cosine", 1.0),
        (10, "cosine", 1.0),
        (99, "cosine", 0.2),
        (99, "linear", 0.2),
        (99, "none", 1.0),
    ],
)
def test_learning_rate_at_the_corners(step, decay, expected):
    rate = learning_rate(step, peak=1.0, warmup_steps=10, steps=100, decay=decay, final=0.2)
    assert rate == pytest.approx(expected)


def test_cosine_is_halfway_down_in_the_middle():
    assert learning_rate(50, peak=2.0, warmup_steps=0, steps=101, decay="cosine", final=0.0) == pytest.approx(1.0)


TOKENS = np.array([0, 1, 0, 1, 0, 2])


def test_unigram_by_hand():
    counts = count(TOKENS, vocab_size=4)
    # Laplace: (count + 1) / (6 + 4)
    assert np.exp(-unigram_nats(counts, np.array([0, 1, 2, 3]))).tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_bigram_by_hand():
    counts = count(TOKENS, vocab_size=4)
    # 0 is followed by 1, 1, 2: c = 3, N = 2. Witten-Bell: (c(0, b) + 2 p(b)) / (3 + 2)
    probabilities = np.exp(-bigram_nats(counts, np.array([0, 0, 0, 0]), np.array([0, 1, 2, 3])))
    assert probabilities.tolist() == pytest.approx([0.8 / 5, 2.6 / 5, 1.4 / 5, 0.2 / 5])


def test_bigram_sums_to_one_even_after_an_unseen_token():
    counts = count(TOKENS, vocab_size=4)
    for before in range(4):
        total = np.exp(-bigram_nats(counts, np.full(4, before), np.arange(4))).sum()
        assert total == pytest.approx(1.0)


def test_baselines_score_the_targets_of_the_model():
    counts = count(TOKENS, vocab_size=4)
    rows, labels = np.array([[0, 1, 0]]), np.array([[IGNORED, 1, IGNORED]])
    assert mean_nats(counts, rows, labels)["unigram"] == pytest.approx(-math.log(0.3))
    assert mean_nats(counts, rows, labels)["bigram"] == pytest.approx(-math.log(2.6 / 5))


@pytest.mark.parametrize("preset", [PRESETS["micro"], PRESETS["tiny"], Preset(2, 64, 4, 2, 128, tied=False)])
def test_preset_counts_the_weights_that_the_model_has(preset):
    model = build_model(llama_config(preset, _FakeTokenizer()), seed=0)
    assert preset.parameters(vocab_size=40) == sum(weight.numel() for weight in model.parameters())


def test_seed_draws_the_weights_and_leaves_the_global_generator_alone():
    config = llama_config(PRESETS["micro"], _FakeTokenizer())
    state = torch.get_rng_state()
    first, second, other = (build_model(config, seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


class _FakeTokenizer:
    eos_token_id = 0
    pad_token_id = 1

    def __len__(self):
        return 40


def test_the_loss_by_row_adds_up_to_that_of_all():
    logits, labels = torch.randn(4, 9, 11), torch.randint(0, 11, (4, 9))
    labels[0, 3:6], labels[2] = IGNORED, IGNORED
    nats, targets = next_token_nats_by_row(logits, labels)
    assert nats.sum().item() == pytest.approx(next_token_nats(logits, labels).item(), rel=1e-6)
    assert targets.tolist() == [5, 8, 0, 8]
    assert nats[2] == 0
    assert nats[1].item() == pytest.approx(next_token_nats(logits[1:2], labels[1:2]).item(), rel=1e-6)
