from __future__ import annotations

import json

import pytest

from cluster.errors import BadInput
from llm.pieces import visible
from pipelines.look import look_tokens
from tests.models import tiny_tokenizer

TEXT = "The cat sat\non 3 € [bold]ありがとう[/bold] 🙂 <|end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_the_tokens_bytes_are_the_texts(folder, capsys):
    answer = look_tokens(folder, TEXT, as_json=True)
    assert json.loads(capsys.readouterr().out) == answer
    assert bytes.fromhex("".join(token["hex"] for token in answer["tokens"])).decode() == TEXT
    assert answer["bytes"] == len(TEXT.encode())
    assert answer["count"] == len(answer["tokens"])
    assert {token["text"] for token in answer["tokens"]} >= {"The", None}


def test_what_is_shown_holds_every_id_and_draws_what_cannot_be_seen(folder, capsys):
    answer = look_tokens(folder, TEXT, as_json=False)
    shown = capsys.readouterr().out
    words = shown.split()
    assert all(str(token["id"]) in words for token in answer["tokens"])
    assert "⏎" in shown
    assert "0xF0" in shown
    assert f"{answer['count']} tokens, {answer['bytes']} bytes" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_an_empty_text_has_no_tokens(folder):
    assert look_tokens(folder, "", as_json=False)["bytes_per_token"] == 0


def test_bad_input_is_refused(folder, tmp_path):
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        look_tokens(tmp_path, "x", as_json=True)
    with pytest.raises(BadInput, match="surrogates"):
        look_tokens(folder, "\ud800", as_json=True)


def test_no_control_character_reaches_the_terminal():
    assert visible("a \x1b[31m\t\n\x7f\u202e") == "a·␛[31m⇥⏎␡\\u202e"
