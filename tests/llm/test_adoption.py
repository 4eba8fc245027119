"""Another project's tokenizer as a run's own: the same ids, nothing lost, and a model that knows what it knew."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm.adoption import adopt, adopted_size, grow, size_of
from llm.architectures import Saved, saved_at
from llm.chat import render_conversation
from llm.encoding import load_encoder
from llm.masking import IGNORED, load_masker
from llm.packing import RowReader, pack, write_index
from llm.pieces import byte_letters
from llm.shardfile import write_shard
from llm.vocabulary import SPECIAL_TOKENS, encode_text, fingerprint, gpt2_tokenizer, load_tokenizer, token_bytes
from pipelines.pretrain import _same_tokenizer_in, build, next_token_objective
from tests.models import SENTENCES, save_tiny_model, tiny_tokenizer

OWN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # as SmolLM2 has them, the last one its end of text


def save_folder(folder: Path, padded: int = 0, tied: bool = True) -> Path:
    """A model of another project: GPT-2's tokenizer with a chat template and three special tokens, a Llama decoder."""
    backend = gpt2_tokenizer()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in OWN])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=OWN[2], chat_template="{{ messages }}")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    size = {"vocab_size": len(tokenizer) + padded, "tie_word_embeddings": tied, "max_position_embeddings": 64}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, **size, eos_token_id=50258)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def run_tokenizer(folder, tmp_path_factory):
    """The folder that the tokenizer stage leaves."""
    target = tmp_path_factory.mktemp("tokenizer")
    adopt(folder).save_pretrained(target)
    return target


# The tokenizer


def test_ids_of_text_are_the_folders_and_text_comes_back(folder, run_tokenizer):
    theirs, taken = AutoTokenizer.from_pretrained(folder), load_tokenizer(run_tokenizer)
    encoder = load_encoder(run_tokenizer / "tokenizer.json")
    for text in (*SENTENCES, "1234  5\t\n", "<|im_end|> and <|user|> spelt out", "e\u0301 日本 \x00🙂\u200d"):
        ids = encode_text(taken, text)
        assert taken.decode(ids) == text
        assert encoder.encode(text).tolist() == ids
        assert not set(ids) & set(taken.all_special_ids)
        if "<|user|>" not in text:
            assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert token_bytes(taken)[ids].sum() == len(text.encode())


def test_missing_special_tokens_come_behind_and_those_that_are_there_stay(folder, run_tokenizer):
    theirs, taken = AutoTokenizer.from_pretrained(folder), load_tokenizer(run_tokenizer)
    assert size_of(folder) == len(theirs) == 50_259
    assert [taken.convert_tokens_to_ids(token) for token in OWN] == [50_256, 50_257, 50_258]
    added = [token for token in SPECIAL_TOKENS if token not in OWN]
    assert [taken.convert_tokens_to_ids(token) for token in added] == list(range(50_259, len(taken)))
    assert adopted_size(folder) == adopted_size(run_tokenizer) == len(taken)
    assert set(taken.all_special_tokens) == {*OWN, *SPECIAL_TOKENS}
    assert (taken.eos_token, taken.pad_token, taken.mask_token) == SPECIAL_TOKENS[:3]
    ids, _ = render_conversation(taken, [{"role": "user", "content": "Hi"}])
    assert taken.convert_ids_to_tokens(ids) == ["<|user|>", "Hi", "<|end|>"]


def test_it_is_the_same_each_time_and_a_runs_own_stays_as_it_is(folder, run_tokenizer, tmp_path):
    assert fingerprint(adopt(folder)) == fingerprint(load_tokenizer(run_tokenizer))
    assert fingerprint(adopt(run_tokenizer)) == fingerprint(load_tokenizer(run_tokenizer))
    tiny_tokenizer().save_pretrained(tmp_path)
    assert fingerprint(adopt(tmp_path)) == fingerprint(tiny_tokenizer())


def test_what_is_put_round_a_text_is_left_out(folder, tmp_path):
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single=f"{OWN[1]} $A", special_tokens=[(OWN[1], 50_257)])
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert adopt(tmp_path)("The cat sat on the mat today.")["input_ids"] == encode_text(
        adopt(folder), "The cat sat on the mat today."
    )
    assert fingerprint(adopt(tmp_path)) == fingerprint(adopt(folder))


def test_words_of_it_are_hidden_for_masked_pretraining(run_tokenizer):
    taken = load_tokenizer(run_tokenizer)
    ids = np.array(encode_text(taken, SENTENCES[0]), dtype=np.int32)
    masker = load_masker(run_tokenizer / "tokenizer.json")
    hidden = masker.hide_words(ids, np.arange(len(ids)), 3, np.random.default_rng(0))
    assert (hidden.labels != IGNORED).sum() == 3
    assert taken.mask_token_id in hidden.input_ids


def bpe(tmp_path: Path, *, normalizer=None, prefix=False, dropout=None, drop="", added=None, whole=False) -> Path:
    vocab = {letter: number for number, letter in enumerate(one for one in sorted(byte_letters()) if one not in drop)}
    backend = Tokenizer(models.BPE(vocab, [], dropout=dropout, ignore_merges=whole))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=prefix)]
    )
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    if added:
        backend.add_tokens([added])
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize(
    ("defect", "said"),
    [
        ({"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])}, "normalizer NFD, Lowerc"),
        ({"normalizer": normalizers.NFC()}, "changes text before it splits it"),
        ({"prefix": True}, "puts a space before every text"),
        ({"dropout": 0.1}, r"leaves out merges by chance \(dropout 0.1\)"),
        ({"drop": "A", "whole": True}, "no token for 1 of the 256 bytes, and takes whole words before merges"),
        ({"added": "  "}, "added token '  ' that isn't special"),
    ],
)
def test_what_loses_text_is_refused_by_name(tmp_path, defect, said):
    with pytest.raises(ValueError, match=said):
        adopt(bpe(tmp_path, **defect))
    assert len(adopt(bpe(tmp_path))) == 256 + len(SPECIAL_TOKENS)


@pytest.mark.parametrize("added", [None, AddedToken("<|theirs|>", special=True, normalized=False)])
def test_bytes_without_a_token_get_one_behind_and_no_text_is_lost(tmp_path, added):
    bare = bpe(tmp_path, drop="AB", added=added)
    taken, known = adopt(bare), size_of(bare)
    assert known == 254 + bool(added)
    assert sorted(taken.convert_tokens_to_ids(["A", "B"])) == [known, known + 1]
    missing = [token for token in SPECIAL_TOKENS if token != "<|theirs|>"]
    assert sorted(taken.convert_tokens_to_ids(missing)) == list(range(known + 2, len(taken)))
    if added:
        assert taken.convert_tokens_to_ids("<|theirs|>") == 254
    text = "ABBA 日本 <|theirs|> <|user|> B"
    ids = encode_text(taken, text)
    assert taken.decode(ids) == text
    assert token_bytes(taken)[ids].sum() == len(text.encode())
    assert adopted_size(bare) == len(taken)
    taken.save_pretrained(tmp_path / "run")
    again = load_tokenizer(tmp_path / "run")
    assert fingerprint(again) == fingerprint(taken) == fingerprint(adopt(tmp_path / "run"))
    assert load_encoder(tmp_path / "run" / "tokenizer.json").encode(text).tolist() == ids


def test_other_kinds_and_gaps_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        adopt(tmp_path)
    Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="is WordPiece without bytes"):
        adopt(tmp_path)
    body = json.loads((bpe(tmp_path) / "tokenizer.json").read_text())
    body["model"]["vocab"]["far"] = 400
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match="257 ids that go up to 400"):
        adopt(tmp_path)
    body = json.loads((bpe(tmp_path) / "tokenizer.json").read_text())
    body["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match="turns 'Hello"):
        adopt(tmp_path)


# The model


@pytest.mark.parametrize(("padded", "tied"), [(0, True), (0, False), (5, True), (100, False)])
def test_new_rows_are_the_mean_of_the_known_and_padding_is_used_first(tmp_path, padded, tied):
    folder = save_folder(tmp_path, padded, tied)
    before, model = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    tokenizer, known = adopt(folder), size_of(folder)
    grow(model, known, tokenizer)
    assert model.config.vocab_size == max(len(tokenizer), known + padded)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 50_256
    for one in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, one)().weight, getattr(model, one)().weight
        assert torch.equal(new[:known], old[:known])
        torch.testing.assert_close(new[known : len(tokenizer)], old[:known].mean(0).expand(len(tokenizer) - known, -1))
        assert torch.equal(new[len(tokenizer) :], old[len(tokenizer) :])
    same = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert same == tied


def rows_of(folder: Path, run_tokenizer: Path) -> dict[str, torch.Tensor]:
    """Packed rows of text, as the stream gives them."""
    tokenizer = load_tokenizer(run_tokenizer)
    documents = [np.array([*encode_text(tokenizer, text), tokenizer.eos_token_id], np.uint32) for text in SENTENCES]
    write_shard(folder / "shard-00000.arrow", list("abc"), documents, len(tokenizer))
    write_index(pack(np.array([len(one) for one in documents]), 24), folder / "packing.arrow")
    reader = RowReader(folder, tokenizer.pad_token_id)
    return {name: torch.from_numpy(one).long() for name, one in reader.read(np.arange(reader.index.num_rows)).items()}


def test_the_first_loss_is_that_of_the_folders_model(folder, run_tokenizer, tmp_path):
    batch = rows_of(tmp_path, run_tokenizer)
    model = build(saved_at(folder), run_tokenizer, seed=0, saved=None)
    with torch.no_grad():
        nats = next_token_objective(model, batch).item()
        targets = (batch["labels"] != IGNORED).sum().item()
        said = {"labels": batch["labels"], "position_ids": batch["position_ids"], "use_cache": False}
        grown = model(input_ids=batch["input_ids"], **said).loss.item()
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        ids = batch["input_ids"].clamp(max=50_258)  # the padding, which they don't know and which carries no loss
        before = theirs(input_ids=ids, **said).loss.item()
    assert nats / targets == pytest.approx(grown, rel=1e-6)
    # The new tokens take a share of the probability, by Jensen at most what as many average ones have.
    added = len(load_tokenizer(run_tokenizer)) - 50_259
    assert 0 < grown - before <= math.log1p(added / 50_259) + 1e-5  # fp32 rounds


def test_a_model_goes_on_with_its_own_tokenizer_or_with_that_taken_from_it_alone(folder, run_tokenizer, tmp_path):
    taken = {"tokenizer_fingerprint": fingerprint(load_tokenizer(run_tokenizer))}
    _same_tokenizer_in(folder, taken)
    with pytest.raises(Exception, match=r"set tokenizer\.from_folder to the same folder"):
        _same_tokenizer_in(folder, {"tokenizer_fingerprint": fingerprint(tiny_tokenizer())})
    own = save_tiny_model(tmp_path)
    _same_tokenizer_in(own, {"tokenizer_fingerprint": fingerprint(tiny_tokenizer())})
    with pytest.raises(Exception, match="has tokenizer"):
        _same_tokenizer_in(own, taken)
    before = AutoModelForCausalLM.from_pretrained(own).state_dict()
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    after = build(Saved(own), tmp_path / "tokenizer", seed=0, saved=None).state_dict()
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
