"""Pretraining by masked words without a cluster: the rows that workers get, what is learnt, what is measured."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from ray.data.block import BlockAccessor

from cluster.errors import BadInput
from llm.baselines import count
from llm.cloze import guess_nats, tell_objective
from llm.masking import Kind, Masking
from llm.packing import IGNORED, pack, write_index
from llm.presets import PRESETS, build_model, llama_config
from llm.sampling import SamplingParams
from llm.shardfile import Shards, write_shard
from llm.vocabulary import encode_text, train_tokenizer
from pipelines import sft
from pipelines.complete import complete
from pipelines.evaluation import held_out_figures, masked_baselines
from pipelines.fill import fill
from pipelines.recipe import load_recipe
from pipelines.schema import PretrainSettings
from pipelines.stream import SINGLE_ROWS, HeldOutRows, RowStream
from tests.commands import headwater, records

# Who sleeps where: each is told by the other alone.
HOMES = {"cat": "on the mat", "dog": "in the kennel", "bird": "under the roof", "fish": "behind the stone"}
SENTENCES = [f" The {who} sleeps {where}." for who, where in HOMES.items()]
SETTINGS = PretrainSettings(
    steps=350, global_batch=16, learning_rate=4e-3, warmup_steps=20, micro_batch=16, objective="masked"
)
ROW_TOKENS = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, and shard sets of short stories in which everybody sleeps at home."""
    root, draw = tmp_path_factory.mktemp("masked"), np.random.default_rng(0)
    tokenizer = train_tokenizer(SENTENCES * 20, vocab_size=380)
    tokenizer.save_pretrained(root / "tokenizer")
    for name, stories in (("train", 400), ("held_out", 90)):
        texts = ["".join(draw.choice(SENTENCES, draw.integers(1, 6))) for _ in range(stories)]
        documents = [np.array([*encode_text(tokenizer, one), tokenizer.eos_token_id], np.uint32) for one in texts]
        (root / name).mkdir()
        write_shard(root / name / "shard-00000.arrow", [str(one) for one in range(stories)], documents, 380)
        write_index(pack(np.array([len(one) for one in documents]), ROW_TOKENS), root / name / "packing.arrow")
    return root


def masking(folder, share: float = 1.0) -> Masking:
    return Masking(str(folder / "tokenizer"), 0.15, share, seed=7)


def stream(folder, masking: Masking | None, workers: int = 1) -> RowStream:
    settings = SETTINGS.model_copy(update={"workers": workers})
    return RowStream.of(folder / "train", 1, settings, seed=7, masking=masking)


def held_out(folder, masking: Masking | None, workers: int = 1) -> HeldOutRows:
    settings = SETTINGS.model_copy(update={"workers": workers, "micro_batch": 4})
    return HeldOutRows.of_set(30, folder / "held_out", 1, settings, masking=masking)


def columns(table) -> dict[str, np.ndarray]:
    """A block as Ray Data hands it to a worker."""
    return dict(BlockAccessor.for_block(table).to_batch_format("numpy"))


def batches(rows: RowStream, first: int = 0, last: int | None = None) -> list[dict[str, np.ndarray]]:
    """Whole global batches, as its workers take them together."""
    found = []
    for step in range(first, rows.last_step if last is None else last):
        parts = [columns(rows.block((step, step + 1), worker)) for worker in range(rows.workers)]
        found.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return found


def tensors(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    names = ("input_ids", "position_ids", "labels", "kind")
    return {name: torch.tensor(batch[name]).long() for name in names}


# Rows


@pytest.mark.parametrize(("workers", "group"), [(2, 2), (4, 2), (4, 4)])
def test_workers_that_share_rows_have_their_tokens_between_them(folder, workers, group):
    settings = SETTINGS.model_copy(update={"workers": workers, "sequence_parallel": group, "objective": "causal"})
    shared = RowStream.of(folder / "train", 1, settings, seed=7)
    blocks = [columns(shared.block((3, 5), worker)) for worker in range(workers)]
    whole = columns(stream(folder, None).block((3, 5), 0))
    rows = np.concatenate([block["row"].reshape(2, -1) for block in blocks[::group]], axis=1)
    assert np.array_equal(rows.reshape(-1), whole["row"]), "each row once, in the same order"
    for first in range(0, workers, group):
        of_group = blocks[first : first + group]
        assert all(np.array_equal(block["row"], of_group[0]["row"]) for block in of_group)
        place = [np.flatnonzero(whole["row"] == row)[0] for row in of_group[0]["row"]]
        ids = np.concatenate([block["input_ids"] for block in of_group], axis=1)
        targets = np.concatenate([block["targets"] for block in of_group], axis=1)
        assert np.array_equal(ids, whole["input_ids"][place])
        assert np.array_equal(targets[:, :-1], whole["labels"][place][:, 1:])
        assert np.array_equal(of_group[0]["batch_targets"], whole["batch_targets"][place])


def test_workers_that_share_layers_have_the_same_whole_rows(folder):
    settings = SETTINGS.model_copy(update={"workers": 4, "tensor_parallel": 2, "objective": "causal"})
    shared = RowStream.of(folder / "train", 1, settings, seed=7)
    blocks = [columns(shared.block((3, 5), worker)) for worker in range(4)]
    halves = RowStream.of(folder / "train", 1, SETTINGS.among(2), seed=7)
    for worker, block in enumerate(blocks):
        expected = columns(halves.block((3, 5), worker // 2))
        assert all(np.array_equal(block[name], expected[name]) for name in expected)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_global_batches_are_the_same_for_any_number_of_workers_and_from_any_step(folder, share):
    whole = batches(stream(folder, masking(folder, share)), 0, 8)
    for workers in (2, 4):
        for one, other in zip(whole, batches(stream(folder, masking(folder, share), workers), 0, 8), strict=True):
            assert all((one[name] == other[name]).all() for name in one)
    (entered,) = batches(replace(stream(folder, masking(folder, share)), first_step=5), 5, 6)
    assert all((entered[name] == whole[5][name]).all() for name in entered)
    spans = columns(stream(folder, masking(folder, share)).block((0, 8), 0))
    assert (spans["labels"] == np.concatenate([one["labels"] for one in whole])).all()


@pytest.mark.parametrize("workers", [3, 5, 6])
def test_a_batch_that_does_not_divide_by_the_workers_is_filled_up_with_empty_rows(folder, workers):
    one = stream(folder, masking(folder, 0.5))
    dealt = one.among(SETTINGS.among(workers))
    for whole, other in zip(batches(one, 0, 8), batches(dealt, 0, 8), strict=True):
        real = len(whole["row"])
        assert all((whole[name] == other[name][:real]).all() for name in whole)
        assert (other["row"][real:] < 0).all()
        assert (other["labels"][real:] == IGNORED).all()
        assert len(other["row"]) == workers * dealt.share > real


@pytest.mark.parametrize("workers", [2, 3])
def test_the_held_out_rows_are_the_same_for_any_number_of_workers(folder, workers):
    one = held_out(folder, None)
    dealt = one.among(SETTINGS.among(workers))
    rows = [np.concatenate([batch["row"] for batch in batches(each)]) for each in (one, dealt)]
    assert rows[0][rows[0] >= 0].tolist() == rows[1][rows[1] >= 0].tolist()
    assert one.targets() == dealt.targets()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_batch_targets_are_the_labels_that_carry_loss(folder, share):
    for batch in batches(stream(folder, masking(folder, share)), 0, 8):
        both_ways = batch["kind"] != Kind.CAUSAL
        assert both_ways.all() or share < 1
        carry = (batch["labels"] != IGNORED).sum()
        assert set(batch["batch_targets"].tolist()) == {carry}


def test_a_row_is_masked_otherwise_when_it_is_read_again(folder):
    rows = stream(folder, masking(folder))
    epoch = math.ceil(rows._reader.index.num_rows / rows.global_batch)
    found = batches(rows, 0, 2 * epoch)
    masks: dict[int, list] = {}
    for batch in found:
        for row, labels in zip(batch["row"].tolist(), batch["labels"], strict=True):
            masks.setdefault(row, []).append(labels)
    twice = [labels for labels in masks.values() if len(labels) == 2]
    assert len(twice) > 50
    assert sum((one == two).all() for one, two in twice) < 0.1 * len(twice)


def test_causal_rows_are_the_readers_own(folder):
    table = stream(folder, None, workers=2).block((3, 5), 1)
    assert table.column_names == ["step", "row", "batch_targets", "input_ids", "position_ids", "labels"]
    rows = stream(folder, None)
    found, read = columns(table), rows._reader.read(table["row"].to_numpy())
    assert all((found[name] == read[name]).all() for name in read)
    assert found["row"].tolist() == [*rows.rows_of_batch(3)[8:], *rows.rows_of_batch(4)[8:]]
    for step in (3, 4):
        (targets,) = set(found["batch_targets"][found["step"] == step].tolist())
        assert targets == rows._reader.targets(rows.rows_of_batch(step)).sum()


@pytest.mark.parametrize("workers", [1, 2])
def test_held_out_rows_come_in_every_kind_that_the_objective_has(folder, workers):
    counts = dict.fromkeys(Kind, 30)
    for share, kinds in ((1.0, [Kind.MASKED, Kind.SINGLE]), (0.5, list(Kind))):
        rows = held_out(folder, masking(folder, share), workers)
        found = batches(rows)
        together = {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}
        real = together["row"] >= 0
        assert {kind: int((together["kind"][real] == kind).sum()) for kind in kinds} == {k: counts[k] for k in kinds}
        assert (together["labels"] != IGNORED).sum() == rows.targets()
        assert ((together["labels"][together["kind"] == Kind.SINGLE] != IGNORED).sum(axis=1) <= 1).all()
        assert (together["labels"][~real] == IGNORED).all()
    assert SINGLE_ROWS > 30
    plain = held_out(folder, None, workers)
    assert sum((batch["row"] >= 0).sum() for batch in batches(plain)) == 30
    assert plain.targets() == sum((batch["labels"] != IGNORED).sum() for batch in batches(plain))


# Learning


@pytest.fixture(scope="module")
def trained(folder):
    """A decoder that looks both ways, after 350 steps on the stories."""
    from llm.vocabulary import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer")
    model = build_model(llama_config(PRESETS["micro"], tokenizer), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so small a model more are slower, and far more so on a busy machine
    for step, batch in enumerate(batches(stream(folder, masking(folder)))):
        optimizer.param_groups[0]["lr"] = SETTINGS.rate(step)
        (guess_nats(model, tensors(batch)) / batch["batch_targets"][0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    tell_objective(model, "masked")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return model.eval()


def test_held_out_words_are_filled_in_better_than_by_the_commonest(folder, trained):
    rows = held_out(folder, masking(folder))
    figures = held_out_figures(trained, map(tensors, batches(rows)), objective="masked")
    assert list(figures) == ["held_out_loss", "masked_loss", "masked_accuracy", "pseudo_loss"]
    means = {name: (total / number).item() for name, (total, number) in figures.items()}
    table = masked_baselines(rows, count(Shards(folder / "train").flat(10_000), 380), end_of_text=0)
    assert figures["masked_loss"][1] == table["masked_targets"]
    assert figures["pseudo_loss"][1] == table["single_targets"] == 30
    assert means["masked_accuracy"] > table["unigram_masked_accuracy"] + 0.5
    assert means["masked_loss"] < table["unigram_masked_loss"] / 2
    assert means["pseudo_loss"] < table["unigram_masked_loss"] / 2


def test_figures_of_the_ranks_add_up(folder, trained):
    whole = held_out_figures(trained, map(tensors, batches(held_out(folder, masking(folder, 0.5)))), objective="mixed")
    parts = []
    for worker in range(2):
        rows = held_out(folder, masking(folder, 0.5), workers=2)
        own = [tensors(columns(rows.block((step, step + 1), worker))) for step in range(rows.last_step)]
        parts.append(held_out_figures(trained, own, objective="mixed"))
    for name, figure in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], figure, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole["held_out_loss"], whole["causal_loss"])


def test_pseudo_perplexity_is_that_of_tokens_hidden_one_at_a_time(folder, trained):
    rows = held_out(folder, masking(folder))
    single, whole = rows.rows_of(Kind.SINGLE), rows._reader.read(rows._plan.rows[:30])
    nats = []
    for row, place in zip(*np.nonzero(single["labels"] != IGNORED), strict=True):
        begins = np.flatnonzero(whole["position_ids"][row] == 0)
        begin = begins[begins <= place].max()
        end = min([*begins[begins > place], ROW_TOKENS])
        ids = torch.from_numpy(whole["input_ids"][row, begin:end].copy()).long()[None]
        target = ids[0, place - begin].item()
        ids[0, place - begin] = 2  # the mask token's id: third of the special tokens
        with torch.no_grad():
            logits = trained(
                input_ids=ids, attention_mask=torch.ones(1, 1, *[ids.shape[1]] * 2, dtype=torch.bool), use_cache=False
            ).logits
        nats.append(-logits[0, place - begin].log_softmax(-1)[target].item())
    figure = held_out_figures(trained, [tensors(single)], objective="masked")["pseudo_loss"]
    assert figure[0].item() == pytest.approx(sum(nats), rel=1e-4)


def test_every_name_of_the_baselines_by_hand(folder):
    rows = held_out(folder, masking(folder))
    labels = rows.rows_of(Kind.MASKED)["labels"]
    hidden = labels[labels != IGNORED]
    tokens = np.array([0, 0, 0, 0, 300, 300, 301])  # the end of text is commonest, and never hidden
    table = masked_baselines(rows, count(tokens, 380), end_of_text=0)
    assert table["unigram_masked_accuracy"] == pytest.approx((hidden == 300).mean())
    at = {300: 3, 301: 2}
    nats = [-math.log(at.get(one, 1) / (7 + 380)) for one in hidden.tolist()]
    assert table["unigram_masked_loss"] == pytest.approx(np.mean(nats))


# headwater fill


@pytest.mark.parametrize(("who", "where"), HOMES.items())
def test_the_right_word_is_filled_in_from_either_side(folder, trained, who, where):
    place = where.split()[-1]
    after = fill(folder / "model", f" The {who} sleeps {where.removesuffix(place)}[MASK].", top=3, as_json=False)
    assert after["gaps"][0][0]["text"] == f" {place}"
    assert after["filled"] == f" The {who} sleeps {where}."
    before = fill(folder / "model", f" The [MASK] sleeps {where}.", top=3, as_json=False)
    assert before["gaps"][0][0]["text"] == f" {who}"
    assert before["gaps"][0][0]["probability"] > 0.5


def test_json_is_one_object(folder, trained, capsys):
    answer = fill(folder / "model", " The [MASK] sleeps on the [MASK].", top=4, as_json=True)
    assert json.loads(capsys.readouterr().out) == answer
    assert set(answer) == {"text", "filled", "gaps", "independent"}
    assert [len(gap) for gap in answer["gaps"]] == [4, 4]
    assert all(0 < word["probability"] <= 1 for gap in answer["gaps"] for word in gap)


def test_people_see_a_table_with_bars_and_that_gaps_are_independent(folder, trained, capsys):
    fill(folder / "model", " The [MASK] sleeps on the [MASK].", top=2, as_json=False)
    said = capsys.readouterr().out
    assert "█" in said
    assert "·mat" in said
    assert "[MASK] 2 of 2" in said
    assert "by itself" in said
    fill(folder / "model", " The cat sleeps on the [MASK].", top=2, as_json=False)
    assert "by itself" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "top", "message"),
    [
        ("no gap", 5, r"there is no \[MASK\] in the text"),
        ("\ud800 [MASK]", 5, "isn't valid Unicode"),
        ("a [MASK]", 0, "at least 1, got 0"),
        ("word " * 300 + "[MASK]", 5, "the context has 256"),
    ],
)
def test_bad_texts_are_refused(folder, trained, text, top, message):
    with pytest.raises(BadInput, match=message):
        fill(folder / "model", text, top=top, as_json=True)


def test_what_only_fills_in_is_not_asked_to_go_on_nor_the_other_way_round(folder, trained, tmp_path):
    with pytest.raises(BadInput, match="headwater fill"):
        complete(folder / "model", "The cat", params=SamplingParams(), top=0, as_json=True)
    trained.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / "tokenizer" / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("pretraining_objective") == "masked"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="trained to predict the next token"):
        fill(tmp_path, "The [MASK]", top=5, as_json=True)
    (tmp_path / "config.json").write_text(json.dumps({**config, "pretraining_objective": "mixed"}))
    assert fill(tmp_path, "The [MASK]", top=5, as_json=True)["gaps"]
    assert complete(tmp_path, "The cat", params=SamplingParams(max_new_tokens=2), top=0, as_json=True)["tokens"]


def test_an_encoder_of_another_project_fills_in_too(folder, tmp_path):
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForMaskedLM

    from llm.vocabulary import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer")
    around = [("<|user|>", tokenizer.convert_tokens_to_ids("<|user|>")), ("<|end|>", 7)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=around
    )
    tokenizer.save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=380, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
    )
    model = BertForMaskedLM(config).eval()
    model.save_pretrained(tmp_path)
    answer = fill(tmp_path, " The cat [MASK] on", top=1, as_json=True)
    before, after = encode_text(tokenizer, " The cat"), encode_text(tokenizer, " on")
    ids = torch.tensor([[around[0][1], *before, tokenizer.mask_token_id, *after, around[1][1]]])
    with torch.no_grad():
        likeliest = model(input_ids=ids).logits[0, len(before) + 1].softmax(-1).max(dim=-1)
    assert answer["gaps"][0][0]["id"] == likeliest.indices.item()
    assert answer["gaps"][0][0]["probability"] == pytest.approx(likeliest.values.item(), rel=1e-4)


# On a cluster


@pytest.mark.slow
def test_the_recipe_micro_by_masked_words(before_pretrain):
    words = ("pretrain.objective=masked", "pretrain.steps=30", "pretrain.held_out_rows=16")
    done = headwater("pretrain", "micro", "--runs", str(before_pretrain.parent), *words)
    assert done.returncode == 0, done.stderr
    figures = json.loads((before_pretrain / "pretrain" / "done.json").read_text())["metrics"]
    (held_out,) = records(before_pretrain / "pretrain" / "held_out.jsonl")
    assert figures["masked_loss"] == held_out["masked_loss"] < math.log(512)
    assert figures["pseudo_perplexity"] == pytest.approx(math.exp(held_out["pseudo_loss"]))
    assert figures["single_targets"] == 16
    assert 0 < figures["unigram_masked_accuracy"] < 1
    assert figures["last_loss"] < figures["first_loss"] - 0.5
    model = before_pretrain / "pretrain" / "model"
    assert json.loads((model / "config.json").read_text())["pretraining_objective"] == "masked"
    root = ("--runs", str(before_pretrain.parent))
    filled = headwater("fill", "micro", "To be, or [MASK] to be", "--top", "3", "--json", *root)
    assert [len(gap) for gap in json.loads(filled.stdout)["gaps"]] == [3], filled.stderr
    refused = headwater("complete", "micro", "To be", "--stage", "pretrain", *root)
    assert refused.returncode == 2
    assert "headwater fill" in refused.stderr


def test_a_chat_model_cannot_begin_with_masked_words_alone():
    recipes = {one: load_recipe("micro", (f"pretrain.objective={one}",)) for one in ("causal", "masked", "mixed")}
    said = {objective: sft._check(recipe) for objective, recipe in recipes.items()}
    assert [objective for objective, problems in said.items() if problems] == ["masked"]
    assert "pretrained on masked words alone" in said["masked"][0].what
