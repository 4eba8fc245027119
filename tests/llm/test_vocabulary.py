"""The tokenizer: lossless, with every special token, one template, one fingerprint."""

import pytest

from llm.vocabulary import (
    SMALLEST_VOCABULARY,
    SPECIAL_TOKENS,
    encode_text,
    fingerprint,
    load_tokenizer,
    token_bytes,
    train_tokenizer,
)

TEXTS = ["Hello there, hello again.", "To be, or not to be: that is the question.", "def read(path): return path"] * 20
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Farewell."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, SMALLEST_VOCABULARY + 40)


@pytest.mark.parametrize(
    "text",
    [
        "Hello",
        " two  spaces\t\n\r\n",
        "naïve 日本語 🙂",
        "\x00\x7f",
        "<|endoftext|><|user|> as text",
        "\u200d\ufeff",
        "",
    ],
)
def test_round_trip_loses_nothing(tokenizer, text):
    assert tokenizer.decode(encode_text(tokenizer, text)) == text


def test_upper_and_lower_case_differ(tokenizer):
    assert encode_text(tokenizer, "Hello") != encode_text(tokenizer, "hello")


def test_special_tokens_come_first_in_a_fixed_order(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.eos_token_id == 0
    assert tokenizer.mask_token_id == 2


def test_a_special_token_spelt_out_in_text_is_text(tokenizer):
    assert min(encode_text(tokenizer, "<|endoftext|>")) >= len(SPECIAL_TOKENS)


def test_vocabulary_too_small_says_how_much_is_needed():
    with pytest.raises(ValueError, match=f"at least {SMALLEST_VOCABULARY}.*got 100"):
        train_tokenizer(TEXTS, 100)


def test_template_renders_turns(tokenizer):
    text = tokenizer.apply_chat_template(CONVERSATION[:2], tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>"


def test_template_marks_what_the_assistant_says(tokenizer):
    rendered = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "Hi.<|end|>Farewell.<|end|>"


def test_template_refuses_an_unknown_role(tokenizer):
    with pytest.raises(Exception, match="unknown role: wizard"):
        tokenizer.apply_chat_template([{"role": "wizard", "content": "x"}], tokenize=False)


def test_folder_gives_the_same_tokenizer_back(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert fingerprint(again) == fingerprint(tokenizer)
    assert again.chat_template == tokenizer.chat_template
    assert encode_text(again, "Hello there") == encode_text(tokenizer, "Hello there")


def test_fingerprint_sees_vocabulary_and_template(tokenizer, tmp_path):
    other = train_tokenizer(TEXTS, SMALLEST_VOCABULARY + 41)
    tokenizer.save_pretrained(tmp_path)
    template = load_tokenizer(tmp_path)
    template.chat_template += " "
    assert len({fingerprint(tokenizer), fingerprint(other), fingerprint(template)}) == 3


def test_fingerprint_does_not_see_a_callers_switches(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    used = load_tokenizer(tmp_path)
    used(["a", "a much longer text"], padding=True, truncation=True, max_length=4)
    assert fingerprint(used) == fingerprint(tokenizer)


def test_training_is_repeatable(tokenizer):
    assert fingerprint(train_tokenizer(iter(TEXTS), SMALLEST_VOCABULARY + 40)) == fingerprint(tokenizer)


def test_token_bytes_add_up_to_the_text(tokenizer):
    text = "Hello 日本語, <|user|> 🙂"
    lengths = token_bytes(tokenizer)
    assert lengths[encode_text(tokenizer, text)].sum() == len(text.encode())
    assert lengths[: len(SPECIAL_TOKENS)].sum() == 0


def test_missing_tokenizer_names_the_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json in"):
        load_tokenizer(tmp_path)


def test_the_plain_class_loads_what_transformers_own_choice_does(tmp_path):
    from transformers import AutoTokenizer

    train_tokenizer(["some text, and more"], 300).save_pretrained(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template
