"""What is compared of learning: the same budget and schedule, plain rows, an evaluator that tells each token once."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llm.presets import Preset
from llm.shardfile import write_shard
from llm.vocabulary import encode_text
from tests.bench import learn, loop, workload
from tests.bench.learn import Pair
from tests.bench.measure import Invalid
from tests.bench.workload import Model
from tests.models import SENTENCES, save_tiny_model, tiny_tokenizer

SMALL = Model("small", Preset(layers=1, hidden=16, heads=2, kv_heads=2, context=12), 320, rows=2)


def test_the_median_of_the_seeds_is_told_with_all_of_them():
    pairs = [Pair(1, 2.0, 2.2), Pair(2, 2.0, 1.9), Pair(3, 2.0, 2.0)]
    figure = learn.compared("f", pairs, {"steps": 5})
    assert (figure.value, figure.low, figure.high) == pytest.approx((1.005, 1.005 * 0.95, 1.005 * 1.1))
    assert figure.met
    assert not learn.compared("f", [Pair(1, 2.02, 2.0)], {}).met
    assert figure.detail["by_seed"]["2"] == {"our_bits_per_byte": 2.0, "their_bits_per_byte": 1.9}
    with pytest.raises(Invalid, match="no numbers"):
        learn.compared("f", [Pair(1, float("nan"), 2.0)], {})


def test_both_arms_have_the_same_schedule_and_budget(tmp_path):
    recipe = workload.recipe_of(learn.settings_of(seed=12, steps=50), learn.L4_256.shape)
    order = json.loads(json.dumps(learn._order(tmp_path, recipe, 50), default=str))
    assert (recipe.seed, order["steps"], len(order["rates"])) == (12, 50, 50)
    assert order["rates"] == [recipe.pretrain.rate(step) for step in range(50)]
    assert order["rates"][0] < max(order["rates"]) == learn.PEAK > order["rates"][-1]
    assert order["global_batch"] == recipe.pretrain.global_batch == learn.L4_256.rows
    assert learn.STEPS * learn.L4_256.tokens == 2_662_400  # as the module's docstring says


def test_plain_rows_are_documents_end_to_end_in_an_order_of_their_own(tmp_path):
    documents = [np.arange(start, start + size, dtype=np.uint32) for start, size in ((0, 30), (30, 7), (37, 50))]
    write_shard(tmp_path / "shard-00000.arrow", list("abc"), documents, 320)
    found = learn.plain_rows(tmp_path, SMALL, steps=7, seed=1)
    rows = found["input_ids"]
    assert rows.shape == (14, 12)
    assert (np.diff(rows, axis=1) == 1).all()
    epoch = rows[:7, 0] // 12
    assert sorted(epoch) == sorted(rows[7:, 0] // 12) == list(range(7))  # 87 tokens: 3 that fill no row are left out
    assert epoch.tolist() != (rows[7:, 0] // 12).tolist()
    assert epoch.tolist() != (learn.plain_rows(tmp_path, SMALL, 7, seed=2)["input_ids"][:7, 0] // 12).tolist()
    assert (found["labels"] == rows).all()
    assert (found["position_ids"] == np.arange(12)).all()


@pytest.mark.parametrize("size", [1, 2, 11, 12, 13, 23, 24, 40])
def test_each_token_but_the_first_is_told_once(size):
    parts = learn.windows(np.arange(size), 12)
    assert [token for part in parts for token in part[1:]] == list(range(1, size))
    assert all(2 <= len(part) <= 12 for part in parts)


def test_bits_a_byte_are_hugging_faces_own_loss_over_the_bytes(tmp_path):
    folder, tokenizer = save_tiny_model(tmp_path), tiny_tokenizer()
    documents = [np.array([*encode_text(tokenizer, text), tokenizer.eos_token_id]) for text in SENTENCES]
    model, nats, size = AutoModelForCausalLM.from_pretrained(folder), 0.0, 0
    for ids, text in zip(documents, SENTENCES, strict=True):
        rows = torch.from_numpy(ids)[None]
        with torch.no_grad():
            nats += model(input_ids=rows, labels=rows).loss.item() * (len(ids) - 1)
        size += len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    assert learn.bits_per_byte(folder, documents) == pytest.approx(nats / np.log(2) / size, rel=1e-5)


def test_the_loop_follows_the_rates_and_keeps_its_model(tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "model")
    rows = np.arange(48, dtype=np.int32).reshape(4, 12) + 40
    places = np.broadcast_to(np.arange(12, dtype=np.int32), rows.shape)
    np.savez(tmp_path / "rows.npz", input_ids=rows, position_ids=places, labels=rows)
    same = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "clip_norm": 1.0, "learning_rate": 1.0, "dtype": "fp32"}
    size = {"global_batch": 2, "steps": 2, "threads": 1, "save_every": None}
    order = {**same, **size, "rows": tmp_path / "rows.npz", "model": folder, "keep": tmp_path / "kept"}
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    moved = {}
    for name, rates in {"still": [0.0, 0.0], "last": [0.0, 1e-3]}.items():
        loop.main({**order, "rates": rates})
        kept = AutoModelForCausalLM.from_pretrained(tmp_path / "kept").state_dict()
        moved[name] = any(not torch.equal(before[key], weight) for key, weight in kept.items())
        assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["losses"]) == 2
    assert moved == {"still": False, "last": True}
