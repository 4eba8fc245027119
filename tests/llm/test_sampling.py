from __future__ import annotations

import math

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm.sampling import Sampler, SamplingParams, choose, distribution, distributions, draw, draws, generator_for

VOCABULARY = 50


def random_logits(rows: int = 1) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({}, []),
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_k": 500}, []),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.5, "top_k": 10, "top_p": 0.9, "min_p": 0.05},
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(10), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
    ],
)
def test_distribution_is_that_of_transformers_warpers(settings, warpers):
    logits = random_logits()
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    torch.testing.assert_close(distribution(logits[0], SamplingParams(**settings)), expected.softmax(-1)[0])


def test_greedy_puts_all_mass_on_the_likeliest():
    logits = random_logits()[0]
    for temperature in (0, 1e-30):
        probabilities = distribution(logits, SamplingParams(temperature=temperature))
        assert probabilities[logits.argmax()] == probabilities.sum() == 1


def test_a_low_temperature_does_not_overflow():
    probabilities = distribution(1e30 * random_logits()[0], SamplingParams(temperature=1e-4))
    assert math.isclose(probabilities.sum(), 1, rel_tol=1e-6)


def test_top_k_keeps_exactly_k_of_equal_tokens():
    probabilities = distribution(torch.zeros(VOCABULARY), SamplingParams(top_k=3))
    assert probabilities.nonzero()[:, 0].tolist() == [0, 1, 2]


def test_the_likeliest_token_survives_every_truncation():
    for settings in ({"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 1}):
        assert distribution(random_logits()[0], SamplingParams(**settings)).max() == 1


def test_rows_of_a_batch_do_not_depend_on_each_other():
    params = [SamplingParams(temperature=0), SamplingParams(top_p=0.5), SamplingParams(temperature=0.3, top_k=4)]
    logits = random_logits(rows=3)
    together = distributions(logits, params)
    for row, settings in enumerate(params):
        assert torch.equal(together[row], distribution(logits[row], settings))


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(draws(probabilities.expand(5000, -1), [generator] * 5000), minlength=6)
    # Four standard deviations of a binomial count.
    bound = 4 * (5000 * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - 5000 * probabilities).abs() <= bound).all()


def test_a_seed_repeats_and_its_absence_does_not():
    probabilities = torch.full((1000,), 1e-3)
    assert draw(probabilities, generator_for(SamplingParams(seed=7))) == draw(
        probabilities, generator_for(SamplingParams(seed=7))
    )
    fresh = {draw(probabilities, generator_for(SamplingParams())) for _ in range(20)}
    assert len(fresh) > 1


def test_a_draw_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    choose(random_logits(), [Sampler(SamplingParams(seed=1), [0], vocab_size=VOCABULARY, end_ids=[1])])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number at least 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature must be a number from 0 to 100, got -0.1"),
        ({"temperature": math.nan}, "temperature .* got nan"),
        ({"temperature": math.inf}, "temperature .* got inf"),
        ({"temperature": "1"}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"stop": "end"}, "stop must be a tuple"),
        ({"stop": ("",)}, "empty string"),
        ({"stop": ("x",) * 17}, "at most 16"),
        ({"top_logprobs": 101}, "top_logprobs"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)
