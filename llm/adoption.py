"""The tokenizer of another project's Hugging Face folder as a run's own, and its model made to fit.

reads   FOLDER/tokenizer.json   nothing else of the folder, and no code
writes  nothing

What is taken is the splitting, the merges and the ids. Behind the folder's ids come bytes for which it has no token
(SmolLM2's lacks 21 of the 256, which its text never had), then special tokens of ours that are missing, in our order;
one that is spelt the same keeps the folder's id. The chat template is ours, and what the folder would put round a text
(a begin-of-text token) is dropped: a run renders and parts text in one way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.pieces import byte_letters
from llm.vocabulary import SPECIAL_TOKENS, encode_text, wrap

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TRIED = ("Hello, hello!\n\ttab  and  spaces ", "naïve cafe\u0301 日本語 🙂 \u200d", "\x00 \ufeff\r\n", "1234 don't")


def adopt(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder` with all special tokens and the chat template of ours.

    ValueError, with what it is or does, unless it is byte-level BPE that gives back every text as it was.
    """
    from tokenizers import AddedToken, Tokenizer

    body = _completed(_admitted(folder))
    try:
        backend = Tokenizer.from_str(json.dumps(body))
    except Exception as error:  # of no kind of its own
        raise ValueError(f"the tokenizer in {folder} can't be read: {error}") from None
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer = wrap(backend)
    _check_texts(tokenizer, folder)
    return tokenizer


def size_of(folder: Path) -> int:
    """How many ids the tokenizer in `folder` has by itself. ValueError as of `adopt`, which tries more."""
    return len(_ids(_admitted(folder)))


def adopted_size(folder: Path) -> int:
    """How many it has once it is adopted."""
    body = _completed(_admitted(folder))
    there = {*body["model"]["vocab"], *(one["content"] for one in body.get("added_tokens", []))}
    return len(_ids(body)) + len(set(SPECIAL_TOKENS) - there)


def grow(model: PreTrainedModel, known: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give `model`, which knows the first `known` ids, a row for each id of `tokenizer`, in place.

    Each new row is the mean of the known ones, so a new token is as likely as an average one and the known ones lose
    next to nothing: at most log(1 + new / known) nats (Hewitt 2021, "Initializing new word embeddings for pretrained
    language models"). A vocabulary that is padded is grown only beyond its padding; what lies behind stays padding.
    """
    import torch

    size = len(tokenizer)
    if size > model.config.vocab_size:
        model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for rows in _rows_of_ids(model):
            rows[known:size] = rows[:known].mean(dim=0)
    for config in (model.config, model.generation_config):
        if config is not None:
            config.bos_token_id = None
            config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id


def _rows_of_ids(model: PreTrainedModel) -> list[torch.Tensor]:
    """Weights with a row for each id, those that are tied once."""
    output = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight, *([] if output is None else output.parameters(recurse=False))]
    return list({weight.data_ptr(): weight for weight in found}.values())


def _completed(body: dict[str, Any]) -> dict[str, Any]:
    """With a token for each byte. All special tokens have to be in the vocabulary then: one that is not is numbered
    anew when it is read, by how many the vocabulary has.
    """
    vocab, added = body["model"]["vocab"], body.get("added_tokens", [])
    missing = _missing_bytes(body)
    if not missing:
        return body
    vocab = vocab | {one["content"]: one["id"] for one in added}
    for token in (*missing, *(one for one in SPECIAL_TOKENS if one not in vocab)):
        vocab[token] = len(vocab)
    return body | {"model": body["model"] | {"vocab": vocab}}


# What is admitted


def _admitted(folder: Path) -> dict[str, Any]:
    """What `_read` finds, if it has no defect that can be seen in it."""
    body = _read(folder)
    if why := next(_defects(body), None):
        raise ValueError(f"the tokenizer in {folder} {why}")
    return body


def _read(folder: Path) -> dict[str, Any]:
    """`tokenizer.json`, without the switches of whoever saved it and what is put round a text."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"no tokenizer.json in {folder}: tokenizers in other forms are not read")
    try:
        body = dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} isn't a JSON object: {error}") from None
    return {**body, "truncation": None, "padding": None, "post_processor": None}


def _defects(body: dict[str, Any]) -> Iterator[str]:
    """By what it could lose text, or not be the same twice."""
    model = body.get("model") or {}
    if model.get("type") != "BPE" or (body.get("decoder") or {}).get("type") != "ByteLevel":
        yield f"is {model.get('type')} without bytes, which loses unknown letters or spaces: byte-level BPE is needed"
        return
    if body.get("normalizer") is not None:
        yield f"changes text before it splits it (normalizer {_kinds(body['normalizer'])})"
    splitters = _flat(body.get("pre_tokenizer"))
    if any(one.get("type") == "ByteLevel" and one.get("add_prefix_space") for one in splitters):
        yield "puts a space before every text (add_prefix_space)"
    if model.get("dropout"):
        yield f"leaves out merges by chance (dropout {model['dropout']})"
    if model.get("ignore_merges") and (missing := _missing_bytes(body)):
        yield f"has no token for {len(missing)} of the 256 bytes, and takes whole words before merges"
    ids = _ids(body)
    if ids != set(range(len(ids))):
        yield f"has {len(ids)} ids that go up to {max(ids)}: there are gaps"
    yield from (f"has the added token {token!r} that isn't special" for token in _ordinary(body))


def _missing_bytes(body: dict[str, Any]) -> list[str]:
    return [letter for letter in byte_letters() if letter not in body["model"].get("vocab", {})]


def _ids(body: dict[str, Any]) -> set[int]:
    return {*body["model"]["vocab"].values(), *(one["id"] for one in body.get("added_tokens", []))}


def _ordinary(body: dict[str, Any]) -> list[str]:
    """Added tokens of text: they are found before it is split into bytes."""
    return [one["content"] for one in body.get("added_tokens", []) if not one["special"]]


def _flat(splitter: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The pre-tokenizer's parts."""
    if splitter is None:
        return []
    return [part for one in splitter.get("pretokenizers", []) for part in _flat(one)] or [splitter]


def _kinds(normalizer: dict[str, Any]) -> str:
    return ", ".join(one["type"] for one in normalizer.get("normalizers", [normalizer]))


def _check_texts(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    for text in (*TRIED, "".join(SPECIAL_TOKENS)):
        back = tokenizer.decode(encode_text(tokenizer, text))
        if back != text:
            raise ValueError(f"the tokenizer in {folder} turns {text!r} into {back!r}")
