"""Rollouts and the policy's objective on a small model, without Ray and DeepSpeed."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llm.presets import PRESETS, build_model, llama_config
from llm.vocabulary import SMALLEST_VOCABULARY, train_tokenizer
from pipelines import rlhf
from pipelines.rlhf import Rollouts, policy_objective, sampling_seed
from pipelines.schema import RlhfSettings
from pipelines.settings import check
from pipelines.worker import Batch

ANSWERS, ROWS = 4, 2


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Hello there. How are you?"] * 9, SMALLEST_VOCABULARY + 5)


@pytest.fixture
def rollouts(tokenizer, monkeypatch):
    config = llama_config(PRESETS["micro"], tokenizer)
    monkeypatch.setattr(rlhf, "build", lambda folder, saved: build_model(config, seed=1))
    monkeypatch.setattr(rlhf.reward, "load", lambda folder: _reward_model(config))
    settings = check(RlhfSettings, {"steps": 9, "global_batch": 2, "warmup_steps": 0, "max_new_tokens": 6}, "test")
    policy = build_model(config, seed=1)
    return Rollouts.start(Path("chat"), Path("reward"), settings, 7, policy, tokenizer, torch.device("cpu"))


def _reward_model(config):
    from transformers import LlamaForSequenceClassification

    one_score = copy.deepcopy(config)
    one_score.num_labels = 1
    torch.manual_seed(0)
    return LlamaForSequenceClassification(one_score)


@pytest.fixture
def prompts(tokenizer):
    ids = np.full((ROWS, 9), tokenizer.pad_token_id, dtype=np.int32)
    for row, length in enumerate((5, 8)):
        ids[row, :length] = tokenizer("Hello there. How are you?")["input_ids"][:length]
    return Batch(np.array([11, 4]), ROWS * ANSWERS, {"input_ids": ids}, 0.0)


def test_rollouts_have_the_shapes_and_the_numbers_of_the_paper(rollouts, prompts):
    batch = rollouts(prompts, step=3)
    assert batch.arrays["input_ids"].shape[:2] == (ROWS, ANSWERS)
    assert batch.arrays["mask"].shape == batch.arrays["sampled"].shape == batch.arrays["reference"].shape
    assert batch.arrays["advantages"].sum(axis=1) == pytest.approx([0, 0], abs=1e-4)
    assert 1 <= batch.arrays["mask"].sum(axis=-1).min() <= batch.arrays["mask"].sum(axis=-1).max() <= 6
    assert batch.figures["kl"] == pytest.approx(0, abs=1e-5), "the policy still is the reference"
    np.testing.assert_allclose(batch.arrays["sampled"], batch.arrays["reference"], atol=1e-4)


def test_rollouts_depend_on_seed_step_and_row_alone(rollouts, prompts):
    first = rollouts(prompts, step=3).arrays["input_ids"]
    assert (rollouts(prompts, step=3).arrays["input_ids"] == first).all()
    other = rollouts(prompts, step=4).arrays["input_ids"]
    assert other.shape != first.shape or (other != first).any()
    seeds = {sampling_seed(0, step, row, number) for step in range(9) for row in range(9) for number in range(9)}
    assert len(seeds) == 9**3


def test_at_the_first_update_the_loss_is_minus_the_mean_advantage(rollouts, prompts):
    batch = rollouts(prompts, step=0)
    loss = policy_objective(rollouts.policy, batch.part(0, ROWS, torch.device("cpu")), clip=0.2, kl_weight=0.5)
    # Every ratio is 1 and every KL 0, so each answer contributes minus its advantage, and those add up to 0.
    assert loss.item() == pytest.approx(-float(batch.arrays["advantages"].sum()), abs=1e-3)


def test_a_step_makes_good_answers_likelier(rollouts, prompts):
    batch = rollouts(prompts, step=0).part(0, ROWS, torch.device("cpu"))
    optimizer = torch.optim.SGD(rollouts.policy.parameters(), lr=0.05)
    loss = policy_objective(rollouts.policy, batch, clip=0.2, kl_weight=0.0)
    loss.backward()
    optimizer.step()
    assert policy_objective(rollouts.policy, batch, clip=0.2, kl_weight=0.0).item() < loss.item()


def test_answers_are_of_the_present_weights(rollouts, prompts):
    prompt = np.tile(prompts.arrays["input_ids"][1, :8], 4)  # long enough that the engine keeps its beginning
    batch = replace(prompts, arrays={"input_ids": np.stack([prompt] * ROWS)})
    rollouts(batch, step=0)
    assert rollouts.engine.prefix_hit_tokens > 0
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in rollouts.policy.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    rollouts.checked = False
    rollouts(batch, step=1)  # raises where the engine's log-probabilities aren't the policy's


def test_samples_of_another_model_are_refused(rollouts, prompts):
    def other_logits(model, ids):
        return rlhf_logits(model, ids) * 1.5

    rlhf_logits = rlhf._logits
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match=r"more than rlhf\.parity 1e-03"):
        patch.setattr(rlhf, "_logits", other_logits)
        rollouts(prompts, step=0)
