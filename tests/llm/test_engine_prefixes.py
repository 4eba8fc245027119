"""What requests have in common at their beginning is read once, and never survives the weights it was read with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llm.engine import Completion, Engine
from llm.kv_cache import BLOCK
from llm.sampling import SamplingParams
from tests.models import tiny_model

GREEDY = SamplingParams(max_new_tokens=12, temperature=0)


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(60, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def engine(tokenizer):
    return Engine(tiny_model(), tokenizer, slots=8, prefill_tokens=40)


class Reading:
    """Counts the tokens that a model is given."""

    def __init__(self, model):
        self.tokens = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model, arguments, named) -> None:
        self.tokens += named["input_ids"].numel()


def of(answers: list[Completion]) -> list[list[int]]:
    return [answer.ids for answer in answers]


def unshared(engine: Engine, prompts, params) -> list[list[int]]:
    return of(Engine(engine.model, engine.tokenizer, slots=1, share_prefixes=False).generate(prompts, params))


def forward_logprobs(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]


def test_several_answers_to_a_prompt_read_it_once(engine):
    prompts = [ids(101, 0)] * 6
    params = [SamplingParams(max_new_tokens=8, seed=n) for n in range(6)]
    expected = unshared(engine, prompts, params)
    reading = Reading(engine.model)
    assert of(engine.generate(prompts, params)) == expected
    assert engine.prefix_hit_tokens == 5 * 6 * BLOCK
    assert reading.tokens < 101 + 5 * (101 - 6 * BLOCK) + 6 * 8 + 60  # some of it padding


def test_a_common_system_prompt_is_read_once(engine):
    system = ids(70, 1)
    prompts = [system + ids(5 + n, 10 + n) for n in range(6)]
    expected = unshared(engine, prompts, GREEDY)
    assert of(engine.generate(prompts, GREEDY)) == expected
    assert engine.prefix_hit_tokens == 5 * 4 * BLOCK
    assert of(engine.generate(prompts, GREEDY)) == expected  # all of them are known now
    assert engine.prefix_hit_tokens == (5 + 6) * 4 * BLOCK


def test_an_earlier_turn_is_not_read_again(engine):
    engine.end_ids = frozenset()
    prompt = ids(50, 2)
    answer = engine.generate([prompt], replace(GREEDY, max_new_tokens=32))[0].ids
    turn = [prompt + answer + ids(9, 3)]
    expected = unshared(engine, turn, GREEDY)
    assert of(engine.generate(turn, GREEDY)) == expected
    assert engine.prefix_hit_tokens == (50 + 31) // BLOCK * BLOCK


def test_a_prompt_of_whole_blocks_still_reads_its_last_token(engine):
    prompts = [ids(3 * BLOCK, 4)] * 2
    first, second = engine.generate(prompts, GREEDY)
    assert first.ids == second.ids == unshared(engine, prompts, GREEDY)[0]
    assert engine.prefix_hit_tokens == 2 * BLOCK


def test_logprobs_after_a_shared_beginning_are_a_forward_pass(engine):
    prompts = [ids(70, 5) + ids(n, 20 + n) for n in range(1, 5)]
    for prompt, answer in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        expected = forward_logprobs(engine.model, prompt, answer.ids)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)


def test_who_waits_for_a_cancelled_reader_reads_alone(engine):
    prompt = ids(120, 6)
    engine.add(prompt, GREEDY, "reader")
    engine.add(prompt, GREEDY, "follower")
    engine.step()
    engine.cancel("reader")
    tokens = []
    while engine.has_work:
        tokens += engine.step()
    assert [token.id for token in tokens] == unshared(engine, [prompt], GREEDY)[0]


def test_without_sharing_nothing_is_kept(model, tokenizer):
    engine = Engine(model, tokenizer, share_prefixes=False)
    engine.generate([ids(80, 7)] * 3, GREEDY)
    assert engine.prefix_hit_tokens == 0
    assert engine._cache.blocks == 0


class TestWeights:
    def test_new_weights_answer_as_a_new_engine_does(self, engine, tokenizer):
        prompts = [ids(60, 8)] * 2
        other = tiny_model(seed=1)
        old = of(engine.generate(prompts, GREEDY))
        hits = engine.prefix_hit_tokens
        weights = {name: weight.clone() for name, weight in other.state_dict().items()}
        engine.load_weights(weights)
        new = engine.generate(prompts[:1], GREEDY)
        assert of(new) == unshared(Engine(other, tokenizer), prompts[:1], GREEDY) != old[:1]
        assert engine.prefix_hit_tokens == hits

    def test_between_steps_what_follows_is_of_the_new_weights(self, engine):
        engine.end_ids = frozenset()
        prompt = ids(30, 9)
        engine.add(prompt, GREEDY)
        tokens = [token for _ in range(6) for token in engine.step()]
        engine.load_weights(lambda model: [weight.mul_(0.7) for weight in model.parameters()])
        while engine.has_work:
            tokens += engine.step()
        assert 0 < len(tokens[:5]) < len(tokens) == GREEDY.max_new_tokens
        expected = forward_logprobs(engine.model, prompt, [token.id for token in tokens])
        given = torch.tensor([token.logprob for token in tokens])
        torch.testing.assert_close(given[6:], expected[6:], atol=1e-4, rtol=0)
        assert (given[:5] - expected[:5]).abs().max() > 1e-2

    def test_what_runs_while_weights_change_leaves_nothing_of_the_old_ones(self, engine, tokenizer):
        prompt = ids(60, 10)
        engine.add(prompt, GREEDY)
        for _ in range(4):
            engine.step()
        with torch.no_grad():
            for weight in engine.model.parameters():
                weight.mul_(0.7)
        engine.drop_prefixes()
        while engine.has_work:
            engine.step()
        answer = engine.generate([prompt], GREEDY)[0]
        assert engine.prefix_hit_tokens == 3 * BLOCK
        expected = forward_logprobs(engine.model, prompt, answer.ids)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)

    def test_weights_of_another_model_are_refused_unread(self, engine):
        before = {name: weight.clone() for name, weight in engine.model.state_dict().items()}
        wrong = {name: torch.zeros_like(weight) for name, weight in before.items()}
        wrong["model.norm.weight"] = torch.zeros(3)
        with pytest.raises(ValueError, match=r"1 differ in name or shape, model\.norm\.weight"):
            engine.load_weights(wrong)
        del wrong["model.norm.weight"]
        with pytest.raises(ValueError, match=r"model\.norm\.weight"):
            engine.load_weights(wrong)
        torch.testing.assert_close(dict(engine.model.state_dict()), before)

    def test_tied_weights_need_no_second_name(self, engine):
        weights = {name: weight.clone() for name, weight in tiny_model(seed=1).state_dict().items()}
        assert engine.model.config.tie_word_embeddings
        del weights["lm_head.weight"]
        engine.load_weights(weights)
        torch.testing.assert_close(engine.model.lm_head.weight.data, weights["model.embed_tokens.weight"])
