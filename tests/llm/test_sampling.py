from __future__ import annotations

import math
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm.grammar import Grammar
from llm.sampling import (
    Sampler,
    SamplingParams,
    adjusted,
    choose,
    distribution,
    distributions,
    draw,
    draws,
    generator_for,
)

VOCABULARY = 50


END_IDS = (1, 2)


def random_logits(rows: int = 1, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(rows))


def sampler_for(params: SamplingParams, prompt=(0,), answer=(), vocabulary: int = VOCABULARY) -> Sampler:
    sampler = Sampler(params, prompt, vocab_size=vocabulary, end_ids=END_IDS)
    for token in answer:
        sampler.accept(token)
    return sampler


def answer_of(samplers: list[Sampler], length: int, table: torch.Tensor) -> list[list[int]]:
    """What a model answers whose logits are the row of `table` (T, V) for the last token modulo T, begun with 0."""
    answers: list[list[int]] = [[] for _ in samplers]
    for _ in range(length):
        logits = table[[answer[-1] % len(table) if answer else 0 for answer in answers]]
        for sampler, answer, token in zip(samplers, answers, choose(logits, samplers).tolist(), strict=True):
            sampler.accept(token)
            answer.append(token)
    return answers


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


LARGE = 3000  # more than are ranked before the whole vocabulary is


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 40},
        {"top_k": 70, "top_p": 0.9},
        {"top_k": 2000, "min_p": 0.001},
        {"top_p": 0.3},
        {"top_p": 0.95, "temperature": 2.0},
        {"top_p": 0.999999, "temperature": 50.0},
        {"min_p": 0.5},
        {"min_p": 0.02, "temperature": 3.0},
    ],
)
def test_a_large_vocabulary_is_cut_as_transformers_does(settings):
    logits = random_logits(rows=2, vocabulary=LARGE)
    params = SamplingParams(**settings)
    expected = TemperatureLogitsWarper(params.temperature)(None, logits) if params.temperature != 1 else logits
    if params.top_k:
        expected = TopKLogitsWarper(params.top_k)(None, expected)
    if params.top_p < 1:
        expected = TopPLogitsWarper(params.top_p)(None, expected)
    if params.min_p:
        expected = MinPLogitsWarper(params.min_p)(None, expected)
    torch.testing.assert_close(distributions(logits, [params] * 2), expected.softmax(-1))


def test_repetition_penalty_and_bias_are_those_of_transformers():
    prompt, answer, biases = [0, 7, 7, 30], [4, 7, 12, 4], {4: 2.5, 9: -3.0, 49: 100.0}
    logits = random_logits()
    history = torch.tensor([prompt + answer])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(history, logits)
    expected = SequenceBiasLogitsProcessor([[[token], bias] for token, bias in biases.items()])(history, expected)
    params = SamplingParams(repetition_penalty=1.7, logit_bias=biases)
    torch.testing.assert_close(adjusted(logits, [sampler_for(params, prompt, answer)]), expected)


def test_presence_and_frequency_penalties_count_the_answer_alone():
    answer = [4, 7, 12, 4, 4]
    logits = random_logits()
    expected = logits.clone()
    for token, count in Counter(answer).items():
        expected[0, token] -= 0.5 + count * 0.25
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    torch.testing.assert_close(adjusted(logits, [sampler_for(params, [9, 9], answer)]), expected)


@pytest.mark.parametrize("made", [0, 2, 3, 5])
def test_no_end_comes_before_the_least_length(made):
    prompt = [5, 6]
    ends = [*END_IDS, 40]
    expected = MinNewTokensLengthLogitsProcessor(len(prompt), 3, ends)(
        torch.zeros(1, len(prompt) + made, dtype=torch.long), random_logits()
    )
    params = SamplingParams(min_new_tokens=3, stop_ids=(40,))
    torch.testing.assert_close(adjusted(random_logits(), [sampler_for(params, prompt, [8] * made)]), expected)


def test_a_certain_end_waits_for_the_least_length():
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[:, END_IDS[0]] = 1000.0
    for temperature in (0, 1):
        answer = answer_of([sampler_for(SamplingParams(min_new_tokens=6, temperature=temperature))], 7, table)[0]
        assert not {*answer[:6]} & {*END_IDS}
        assert answer[6] == END_IDS[0]


SETTINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 30, 100, 1500, 5000]),
    top_p=st.sampled_from([0.1, 0.9, 0.9999, 1.0]),
    min_p=st.sampled_from([0.0, 0.001, 0.3]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, -1.0, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100), max_size=3),
    min_new_tokens=st.sampled_from([0, 4]),
    stop_ids=st.sampled_from([(), (3, 4)]),
    seed=st.integers(0, 5),
)


@examples(max_examples=25, deadline=None)
@given(st.lists(SETTINGS, min_size=2, max_size=5), st.sampled_from([VOCABULARY, LARGE]))
def test_a_request_gets_the_same_in_company_as_alone(params, vocabulary):
    table = random_logits(rows=8, vocabulary=vocabulary)
    together = [sampler_for(p, vocabulary=vocabulary) for p in params]
    alone = [sampler_for(p, vocabulary=vocabulary) for p in params]
    answers = answer_of(together, 4, table)
    assert answers == [answer_of([sampler], 4, table)[0] for sampler in alone]
    logits = random_logits(rows=len(params), vocabulary=vocabulary)
    before = logits.clone()
    rows = distributions(adjusted(logits, together), params)
    assert torch.equal(logits, before)
    for row, sampler in enumerate(alone):
        assert torch.equal(rows[row], distributions(adjusted(logits[row : row + 1], [sampler]), [sampler.params])[0])


@examples(max_examples=25, deadline=None)
@given(SETTINGS, st.sampled_from([VOCABULARY, LARGE]), st.booleans())
def test_a_distribution_sums_to_one_and_keeps_the_likeliest(params, vocabulary, equal):
    logits = torch.zeros(1, vocabulary) if equal else random_logits(vocabulary=vocabulary)
    probabilities = distribution(logits[0], params)
    assert math.isclose(probabilities.sum(), 1, rel_tol=1e-5)
    assert probabilities[logits.argmax()] > 0
    if params.top_k and not params.greedy:
        assert (probabilities > 0).sum() <= params.top_k
    if equal and params == SamplingParams(top_k=params.top_k, seed=params.seed):
        assert probabilities.nonzero()[:, 0].tolist() == list(range(min(params.top_k or vocabulary, vocabulary)))


def test_a_seeded_answer_is_the_same_among_any_neighbours():
    table = random_logits(rows=VOCABULARY)
    params = SamplingParams(seed=11)
    alone = answer_of([sampler_for(params)], 30, table)[0]
    others = [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.5, logit_bias={0: 5.0})]
    company = [sampler_for(p) for p in (*others, params, params)]
    assert answer_of(company, 30, table)[3:] == [alone, alone]


def test_a_request_that_asks_for_nothing_gets_the_logits_themselves():
    logits = random_logits(rows=2)
    assert adjusted(logits, [sampler_for(SamplingParams()), sampler_for(SamplingParams(temperature=0))]) is logits


def test_settings_travel_and_can_be_keys():
    params = SamplingParams(logit_bias={7: 1, 3: -2.5}, stop_ids=(4,), grammar=Grammar("regex", "a+"))
    assert pickle.loads(pickle.dumps(params)) == params  # noqa: S301
    assert params.biases == ((3, -2.5), (7, 1.0))
    assert len({params, replace(params), replace(params, logit_bias={3: -2.5, 7: 1.0})}) == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {VOCABULARY: 1.0}}, "logit_bias has id 50, outside the vocabulary of 50"),
        ({"stop_ids": (3, 99)}, "stop_ids has id 99, outside the vocabulary of 50"),
        ({"grammar": Grammar("json_object")}, "needs a matcher"),
    ],
)
def test_a_sampler_refuses_what_its_vocabulary_lacks(params, message):
    with pytest.raises(ValueError, match=message):
        sampler_for(SamplingParams(**params))


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
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens must be a whole number from 0 to 4, got 5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number from 0.01 to 100, got 0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty must be a number from -2 to 2, got 2.1"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {3: 101}}, "logit_bias of id 3 must be a number from -100 to 100, got 101"),
        ({"logit_bias": {3: math.nan}}, "logit_bias of id 3"),
        ({"logit_bias": {-1: 1}}, "logit_bias: an id must be a whole number at least 0, got -1"),
        ({"logit_bias": {"3": 1}}, "logit_bias: an id"),
        ({"logit_bias": {True: 1}}, "logit_bias: an id"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, "logit_bias has an id twice"),
        ({"logit_bias": 5}, "logit_bias must map"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "at most 1024"),
        ({"stop_ids": [3]}, "stop_ids must be a tuple"),
        ({"stop_ids": (-3,)}, "stop_ids: an id"),
        ({"stop_ids": tuple(range(65))}, "at most 64"),
        ({"grammar": "a+"}, "grammar must be a Grammar"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)
