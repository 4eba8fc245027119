from __future__ import annotations

import pytest
import torch

from llm.engine import Engine, Token
from llm.loading import load
from llm.sampling import SamplingParams
from llm.text_stream import TextStream
from llm.vocabulary import END_OF_TURN, encode_text
from tests.models import grouped_query_model, save_tiny_model, tiny_model

GREEDY = SamplingParams(max_new_tokens=24, temperature=0)
SAMPLED = SamplingParams(max_new_tokens=24, temperature=1.0, seed=11)
TEXTS = ["The cat", "Nobody knew where the naïve traveller had", "def", "3 €! The dog ate", "a + b"]


@pytest.fixture
def engine(model, tokenizer):
    return Engine(model, tokenizer, slots=4, prefill_tokens=16)


@pytest.fixture
def prompts(tokenizer):
    return [encode_text(tokenizer, text) for text in TEXTS]


def run(engine: Engine) -> dict[str, list[Token]]:
    """Step until nothing is left to do; the tokens of each request."""
    answers: dict[str, list[Token]] = {}
    while engine.has_work:
        for token in engine.step():
            answers.setdefault(token.request_id, []).append(token)
    return answers


def ids_of(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def uncached_greedy(model, prompt: list[int], count: int, end_ids: frozenset[int]) -> list[int]:
    """Greedy decoding by a forward pass over everything for every token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in end_ids:
            break
    return ids[len(prompt) :]


def test_greedy_equals_transformers_generate(engine, model, prompts):
    for prompt, answer in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=sorted(engine.end_ids),
            pad_token_id=0,
        )
        assert answer.ids == expected[0, len(prompt) :].tolist()


# 7 cuts the prompts into chunks; 512 reads prompts of different lengths side by side.
@pytest.mark.parametrize("prefill_tokens", [7, 512])
@pytest.mark.parametrize("build", [tiny_model, grouped_query_model])
def test_cached_equals_uncached(build, prefill_tokens, tokenizer, prompts):
    model = build()
    engine = Engine(model, tokenizer, slots=3, prefill_tokens=prefill_tokens)
    for prompt, answer in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        assert answer.ids == uncached_greedy(model, prompt, 24, engine.end_ids)


@pytest.mark.parametrize("prefill_tokens", [7, 512])
def test_logprobs_are_those_of_a_plain_forward_pass(model, tokenizer, prefill_tokens, prompts):
    engine = Engine(model, tokenizer, slots=3, prefill_tokens=prefill_tokens)
    settings = SamplingParams(max_new_tokens=24, temperature=0.7, top_k=50, seed=3, top_logprobs=5)
    for answer in engine.generate(prompts, settings):
        ids = torch.tensor([answer.prompt_ids + answer.ids])
        with torch.no_grad():
            logprobs = model(ids, use_cache=False).logits[0].log_softmax(-1)[len(answer.prompt_ids) - 1 : -1]
        chosen = logprobs.gather(-1, torch.tensor(answer.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs), chosen, atol=1e-4, rtol=0)
        top = torch.tensor([[logprob for _, logprob in token.top] for token in answer.tokens])
        torch.testing.assert_close(top, logprobs.topk(5).values, atol=1e-4, rtol=0)


def test_requests_joining_and_leaving_get_the_same_tokens_as_alone(engine, prompts):
    each = [
        SamplingParams(max_new_tokens=5 + 4 * n, temperature=n / 2, seed=n, top_p=0.9 if n % 2 else 1.0)
        for n in range(len(prompts))
    ]
    alone = [engine.generate([prompt], settings)[0].ids for prompt, settings in zip(prompts, each, strict=True)]
    arrivals = {3 * n: n for n in range(len(prompts))}
    answers: dict[str, list[Token]] = {}
    for step in range(200):
        if step in arrivals:
            n = arrivals[step]
            engine.add(prompts[n], each[n], request_id=str(n))
        for token in engine.step():
            answers.setdefault(token.request_id, []).append(token)
    assert not engine.has_work
    assert [ids_of(answers[str(n)]) for n in range(len(prompts))] == alone


def test_more_requests_than_slots_wait_in_order(engine, prompts):
    for n, prompt in enumerate(prompts * 3):
        engine.add(prompt, SamplingParams(max_new_tokens=4, temperature=0), request_id=str(n))
    engine.step()
    assert (engine.running, engine.waiting) == (4, 11)
    answers = run(engine)
    assert (len(answers), engine.running) == (15, 0)
    assert ids_of(answers["14"]) == ids_of(answers["4"])


def test_a_long_prompt_does_not_stop_the_others(model, tokenizer, prompts):
    engine = Engine(model, tokenizer, prefill_tokens=8)
    engine.add(prompts[0], SAMPLED, request_id="short")
    engine.step()
    engine.add(prompts[1] * 6, SAMPLED, request_id="long")
    assert len(prompts[1] * 6) > 80
    for _ in range(8):
        assert [token.request_id for token in engine.step()] == ["short"]


def test_cancel_frees_the_slot_and_disturbs_nobody(engine, prompts):
    expected = engine.generate([prompts[1]], SAMPLED)[0].ids
    doomed = [engine.add(prompts[0], SAMPLED) for _ in range(3)]
    engine.add(prompts[1], SAMPLED, request_id="kept")
    waiting = engine.add(prompts[2], SAMPLED)
    tokens = [token for _ in range(6) for token in engine.step() if token.request_id == "kept"]
    assert all(engine.cancel(request_id) for request_id in [*doomed, waiting])
    assert (engine.running, engine.waiting) == (1, 0)
    assert not engine.cancel(waiting)
    assert not engine.cancel("nobody")
    assert ids_of(tokens + run(engine)["kept"]) == expected


def test_the_same_seed_repeats_and_another_differs(engine, prompts):
    first, again = (engine.generate([prompts[0]], SAMPLED)[0] for _ in range(2))
    other = engine.generate([prompts[0]], SamplingParams(max_new_tokens=24, seed=12))[0]
    assert (first.ids, first.text, first.logprobs) == (again.ids, again.text, again.logprobs)
    assert first.ids != other.ids


def test_text_is_the_decoded_ids(engine, tokenizer, prompts):
    for answer in engine.generate(prompts, SamplingParams(max_new_tokens=60, seed=5)):
        assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True)
        assert answer.finish_reason == ("stop" if answer.ids[-1] in engine.end_ids else "length")


def test_an_end_id_stops(model, tokenizer, prompts):
    engine = Engine(model, tokenizer)
    assert engine.end_ids == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)}
    plain = engine.generate([prompts[0]], SAMPLED)[0]
    engine.end_ids = frozenset({plain.ids[6]})
    stopped = engine.generate([prompts[0]], SAMPLED)[0]
    length = plain.ids.index(plain.ids[6]) + 1
    assert (stopped.ids, stopped.finish_reason) == (plain.ids[:length], "stop")
    assert stopped.text == tokenizer.decode(stopped.ids[:-1], skip_special_tokens=True)


def test_stop_strings_never_show(engine, prompts):
    plain = engine.generate([prompts[0]], SAMPLED)[0]
    middle = len(plain.text) // 2
    stop = plain.text[middle : middle + 3]
    answer = engine.generate([prompts[0]], SamplingParams(max_new_tokens=24, seed=11, stop=("never", stop)))[0]
    assert answer.text == plain.text[: plain.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert len(answer.ids) < len(plain.ids)


def test_stream_yields_and_closing_it_cancels(engine, prompts):
    assert [token.id for token in engine.stream(prompts[0], GREEDY)] == engine.generate([prompts[0]], GREEDY)[0].ids
    stream = engine.stream(prompts[0], GREEDY)
    next(stream)
    with pytest.raises(RuntimeError, match="other requests"):
        engine.generate([prompts[1]], GREEDY)
    stream.close()
    assert not engine.has_work


def test_bad_requests_are_refused_with_numbers(engine, prompts):
    for prompt, message in [
        ([], "the prompt is empty"),
        ([1, 320], "id 320, outside the vocabulary of 320"),
        ([-1], "id -1, outside"),
        ([5] * 250, "prompt's 250 tokens and max_new_tokens=24 make 274, more than the context of 256"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.add(prompt, GREEDY)
        with pytest.raises(ValueError, match=message):
            engine.generate([prompts[0], prompt], GREEDY)
    assert not engine.has_work
    engine.add(prompts[0], GREEDY, request_id="a")
    with pytest.raises(ValueError, match="'a' is already running"):
        engine.add(prompts[0], GREEDY, request_id="a")
    with pytest.raises(ValueError, match="got 2 for 1 prompts"):
        Engine(engine.model, engine.tokenizer).generate([prompts[0]], [GREEDY, GREEDY])


def test_a_full_context_is_usable_to_its_last_position(engine):
    prompt = [60 + n % 100 for n in range(256 - 24)]
    assert engine.generate([prompt], GREEDY)[0].ids == uncached_greedy(engine.model, prompt, 24, engine.end_ids)


def test_settings_of_the_engine_are_checked(model, tokenizer):
    with pytest.raises(ValueError, match="from 2 to the model's 256, got 512"):
        Engine(model, tokenizer, context=512)
    with pytest.raises(ValueError, match="got 0"):
        Engine(model, tokenizer, slots=0)


def test_training_mode_is_refused(tokenizer, prompts):
    engine = Engine(tiny_model().train(), tokenizer)
    engine.add(prompts[0], GREEDY)
    with pytest.raises(RuntimeError, match="training mode"):
        engine.step()


class TestTextStream:
    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def pieces(self, data: bytes, stop: tuple[str, ...] = ()) -> list[str]:
        stream = TextStream(self.decode, stop)
        return [*(stream.push(byte) for byte in data), stream.finish()]

    def test_no_piece_is_half_a_character(self):
        text = "naïve 🙂🙂 €, ありがとう"
        pieces = self.pieces(text.encode())
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
        assert pieces.count("🙂") == 2

    @pytest.mark.parametrize("seed", range(20))
    def test_joined_pieces_are_the_text_of_any_bytes(self, seed):
        drawn = torch.randint(0, 4, (200, 2), generator=torch.Generator().manual_seed(seed)).tolist()
        data = b"".join(["🙂".encode()[: n + 1], b"\xff", "€".encode()[:n], b"a"][kind] for kind, n in drawn)
        assert "".join(self.pieces(data)) == self.decode(list(data))

    def test_an_unfinished_character_comes_last(self):
        assert self.pieces("a€".encode()[:-1]) == ["a", "", "", "\ufffd"]

    def test_what_could_begin_a_stop_string_waits(self):
        assert self.pieces(b"ab##c", stop=("##!",)) == ["a", "b", "", "", "##c", ""]
        assert self.pieces(b"ab##", stop=("##!",)) == ["a", "b", "", "", "##"]

    def test_the_first_of_several_stop_strings_ends_the_text(self):
        assert "".join(self.pieces(b"one, two. three", stop=("three", "two", "wo."))) == "one, "
        assert "".join(self.pieces(b"aab", stop=("ab",))) == "a"


class TestLoading:
    def test_a_saved_model_generates_the_same(self, tmp_path, engine, prompts):
        loaded = load(save_tiny_model(tmp_path))
        assert loaded.generate(prompts, SAMPLED)[0].ids == engine.generate(prompts, SAMPLED)[0].ids

    def test_what_is_missing_is_named(self, tmp_path):
        with pytest.raises(ValueError, match="no model folder at"):
            load(tmp_path / "nowhere")
        with pytest.raises(ValueError, match=r"no config\.json"):
            load(tmp_path)
        save_tiny_model(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="no usable weights"):
            load(tmp_path)
        (tmp_path / "tokenizer.json").unlink()
        with pytest.raises(ValueError, match=r"no tokenizer\.json"):
            load(tmp_path)

    def test_weights_that_are_not_all_there_are_refused(self, tmp_path):
        from safetensors.torch import load_file, save_file

        path = save_tiny_model(tmp_path) / "model.safetensors"
        weights = load_file(path)
        weights.pop("model.norm.weight")
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks 1 of its model's weights, model\.norm\.weight"):
            load(tmp_path)
