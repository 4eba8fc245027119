"""What is measured of a model in pretraining, without a cluster: by source, over ranks, by weight of the sources."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llm.architectures import Ids, check_architecture
from llm.losses import next_token_nats
from llm.order import Mixture, batch_rows
from llm.packing import IGNORED, RowReader, pack, write_index
from llm.shardfile import write_shard
from llm.vocabulary import encode_text, token_bytes
from pipelines import pretrain
from pipelines.evaluate import bits_per_byte
from pipelines.evaluation import held_out_by_source
from pipelines.pretrain import _why_unfit, bytes_per_token
from pipelines.recipe import load_recipe
from pipelines.schema import PretrainSettings
from pipelines.stream import HeldOutRows
from tests.models import tiny_model, tiny_tokenizer

ROW_TOKENS, ROWS = 16, [5, 0, 9]  # by source
SETTINGS = PretrainSettings(steps=2, global_batch=4, warmup_steps=0, micro_batch=2)
TRAIN = pretrain.STAGE


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A set of rows of which each is a document, of three sources one after another; the second has none."""
    folder, draw = tmp_path_factory.mktemp("held_out"), np.random.default_rng(3)
    documents = [draw.integers(40, 300, ROW_TOKENS).astype(np.uint32) for _ in range(sum(ROWS))]
    write_shard(folder / "shard-00000.arrow", [str(one) for one in range(len(documents))], documents, 320)
    write_index(pack(np.full(len(documents), ROW_TOKENS), ROW_TOKENS), folder / "packing.arrow")
    return folder


def own_batches(folder, worker: int, workers: int) -> list[dict[str, torch.Tensor]]:
    """What a worker evaluates on."""
    settings = SETTINGS.model_copy(update={"workers": workers})
    rows = HeldOutRows.of_set(sum(ROWS), folder, 1, settings)
    blocks = [rows.block((step, step + 1), worker).to_pydict() for step in range(rows.last_step)]
    names = ("row", "input_ids", "position_ids", "labels")
    return [{name: torch.tensor(np.array(block[name])).long() for name in names} for block in blocks]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_nats_by_source_add_up_over_ranks(held_out, workers):
    model, reader = tiny_model(), RowReader(held_out, 1)
    parts = [
        held_out_by_source(model, own_batches(held_out, worker, workers), names=["a", "b", "c"], rows=ROWS)
        for worker in range(workers)
    ]
    summed = {name: sum(part[name] for part in parts) for name in parts[0]}
    for name, rows in {"a": range(5), "c": range(5, 14)}.items():
        tokens = {key: torch.from_numpy(one).long() for key, one in reader.read(np.array(rows)).items()}
        with torch.no_grad():
            logits = model(input_ids=tokens["input_ids"], position_ids=tokens["position_ids"], use_cache=False).logits
        nats, targets = summed[f"sources/{name}"].tolist()
        assert targets == len(rows) * (ROW_TOKENS - 1)
        assert nats == pytest.approx(next_token_nats(logits, tokens["labels"]).item(), rel=1e-5)
    assert summed["sources/b"].tolist() == [0, 0]
    torch.testing.assert_close(summed["held_out_loss"], summed["sources/a"] + summed["sources/c"])


def test_bytes_of_a_token_are_those_of_the_rows_that_are_read():
    sources = {
        "dense": {"rows": 10, "tokens": 1000, "text_bytes": 2000},
        "none": {"rows": 0, "tokens": 0, "text_bytes": 0},
        "thin": {"rows": 30, "tokens": 3000, "text_bytes": 15000},
    }
    assert bytes_per_token(sources, None) == 17000 / 4000
    mixture = Mixture(np.array([10, 0, 30]), np.array([15, 0, 5]))
    # A row of either has 100 tokens; of four rows three are dense: 2 bytes a token, and 5.
    assert bytes_per_token(sources, mixture) == pytest.approx((3 * 2 + 5) / 4)
    rows = np.concatenate([batch_rows(step, 10, 40, 7, mixture) for step in range(6)])
    size = np.where(rows < 10, 200, 500)
    assert size.sum() / (len(rows) * 100) == pytest.approx(bytes_per_token(sources, mixture))


@pytest.mark.parametrize("isolated", [True, False])
def test_bits_a_byte_see_what_training_saw(tmp_path, isolated):
    tokenizer, model = tiny_tokenizer(), tiny_model()
    texts = ["The cat sat.", "The dog ate the cat's dinner.", "Nobody knew."]
    documents = [np.array([*encode_text(tokenizer, one), tokenizer.eos_token_id], np.uint32) for one in texts]
    write_shard(tmp_path / "shard-00000.arrow", list("abc"), documents, 320)
    write_index(pack(np.array([len(one) for one in documents]), 64), tmp_path / "packing.arrow")
    tokens = RowReader(tmp_path, 1, isolated).read(np.array([0]))
    ids = [torch.from_numpy(one.astype(np.int64))[None] for one in documents]
    if not isolated:  # one text: each document is told from those before it in the row
        filled = tokens["input_ids"][:, : sum(map(len, documents))]
        ids = [torch.from_numpy(filled).long()]
    with torch.no_grad():
        nats = sum(model(input_ids=one, labels=one).loss.item() * (one.shape[1] - 1) for one in ids)
    size = sum(int(token_bytes(tokenizer)[one[0, 1:]].sum()) for one in ids)
    engine = SimpleNamespace(model=model, tokenizer=tokenizer)
    assert bits_per_byte(engine, tmp_path, 1, 1, isolated) == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert (tokens["labels"] != IGNORED).sum() == sum(one.shape[1] - 1 for one in ids)


@pytest.mark.parametrize(
    ("mode", "idle", "acts"),
    [
        ((), ("pretrain.mask_rate=0.3", "pretrain.masked_share=0.2", "pretrain.max_epochs=9"), "pretrain.decay=wsd"),
        ((), ("pretrain.decay_share=0.5",), "pretrain.final_learning_rate=0.5"),
        (("pretrain.decay=none",), ("pretrain.final_learning_rate=0.5", "pretrain.decay_share=0.5"), "seed=3"),
        (("pretrain.decay=wsd",), (), "pretrain.decay_share=0.5"),
        (("pretrain.objective=masked",), ("pretrain.masked_share=0.2",), "pretrain.mask_rate=0.3"),
        (("pretrain.objective=mixed",), (), "pretrain.masked_share=0.2"),
    ],
)
def test_what_has_no_effect_is_no_part_of_the_result(mode, idle, acts):
    before = TRAIN.identity(load_recipe("micro", mode))
    assert TRAIN.identity(load_recipe("micro", (*mode, *idle))) == before
    assert TRAIN.identity(load_recipe("micro", (*mode, acts))) != before


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 12}, 12),
        ({"model_type": "gemma3_text", "sliding_window": 12, "head_dim": 16}, 12),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 0}, 12),
        ({"model_type": "qwen2", "sliding_window": 12}, None),
    ],
)
def test_a_sliding_window_shorter_than_a_row_is_refused_by_name_for_masked_words(values, window):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = check_architecture({**shape, **values}).config(Ids(64))
    masked = PretrainSettings(steps=2, global_batch=4, warmup_steps=0, objective="masked")
    why = _why_unfit(config, masked, row_tokens=16)
    assert (why is None) if window is None else f"{values['model_type']} looks 12 tokens far" in why
    assert _why_unfit(config, masked, row_tokens=12) is None
    assert _why_unfit(config, masked.model_copy(update={"objective": "causal"}), row_tokens=16) is None
