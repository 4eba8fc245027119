"""Models that are built, read and written in parts against the same ones built, read and written whole."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from llm import parts, zero
from llm.presets import PRESETS, build_model, llama_config
from tests.llm.ranks import on_ranks
from tests.llm.test_zero import FakeTokenizer, leave

SEED = 7


def llama(**changes):
    config = llama_config(PRESETS["micro"], FakeTokenizer())
    config.update(changes)
    return config


def config_of(model_type: str, **values):
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, vocab_size=40, **values)


CONFIGS = {
    "tied": lambda: llama(),
    "untied": lambda: llama(tie_word_embeddings=False),
    "grouped": lambda: llama(num_key_value_heads=1),
    "gpt2": lambda: config_of("gpt2", n_layer=2, n_embd=16, n_head=2, n_positions=32),
    "opt": lambda: config_of("opt", num_hidden_layers=2, hidden_size=16, ffn_dim=32, num_attention_heads=2,
                             word_embed_proj_dim=16),
    "mixtral": lambda: config_of("mixtral", num_hidden_layers=2, hidden_size=16, intermediate_size=32,
                                 num_attention_heads=2, num_key_value_heads=2, num_local_experts=2),
}  # fmt: skip


class Keeping:
    """A share that notes each module's weights and leaves none of them, as ZeRO-3 leaves next to none."""

    def __init__(self) -> None:
        self.most = 0  # weights held at once
        self.taken: dict[int, torch.Tensor] = {}

    def __call__(self, module):
        own = list(module.parameters(recurse=False))
        self.most = max(self.most, sum(weight.numel() for weight in own))
        for weight in own:
            self.taken[id(weight)] = weight.data
            weight.data = weight.data.new_empty(0)

    def give_back(self, model):
        for weight in model.parameters():
            weight.data = self.taken.get(id(weight), weight.data)
        return model


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    buffers, expected = dict(one.named_buffers()), dict(other.named_buffers())
    assert buffers.keys() == expected.keys()
    assert [name for name in buffers if not torch.equal(buffers[name], expected[name])] == []


@pytest.fixture
def alone(tmp_path):
    """A group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CONFIGS)
def test_drawn_in_parts_equals_drawn_whole(name, caplog):
    share, before = Keeping(), torch.get_rng_state()
    model = share.give_back(parts.draw_model(CONFIGS[name](), SEED, share))
    same(model, build_model(CONFIGS[name](), SEED))
    assert torch.equal(torch.get_rng_state(), before)
    assert ("the whole model" in caplog.text) == (name == "gpt2"), "its blocks draw their projections once more"
    tied = model.config.tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_of_a_llama_no_more_than_a_module_is_held():
    share = Keeping()
    model = parts.draw_model(llama(), SEED, share)
    assert sum(weight.numel() for weight in model.parameters()) == 0, "all were handed out"
    assert share.most == max(PRESETS["micro"].intermediate, 40) * PRESETS["micro"].hidden


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("most", ["50GB", "20KB"])
def test_read_in_parts_equals_read_whole(name, most, tmp_path, alone, caplog):
    from transformers import AutoModelForCausalLM

    build_model(CONFIGS[name](), SEED).save_pretrained(tmp_path / "model", max_shard_size=most)
    share = Keeping()
    model = share.give_back(parts.read_model(tmp_path / "model", share))
    same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert ("the whole model" in caplog.text) == (name == "mixtral"), "its experts have other names in files"


def test_files_hold_all_names_in_order_within_the_bound():
    sizes = {"a": 4, "b": 3, "c": 3, "d": 9, "e": 1}
    assert parts.files_of(sizes, 7) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert parts.files_of(sizes, 100) == [list(sizes)]


# Under ZeRO-3


@dataclass(frozen=True)
class Part:
    """What ranks do: draw the weights, or read them from `read`; and what they write."""

    ranks: int
    dtype: str
    tied: bool
    read: str | None
    save: str


def settings(dtype: str):
    return zero.zero_settings(stage=3, micro_batch=1, accumulation=1, dtype=dtype, clip_norm=1.0)


def rank_main(rank: int, part: Part) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(part.ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{part.save}.store", rank=rank, world_size=part.ranks)
    zero.deepspeed().init_distributed()
    share = zero.sharer(settings(part.dtype), part.dtype)
    config = llama(tie_word_embeddings=part.tied)
    model = parts.read_model(Path(part.read), share) if part.read else parts.draw_model(config, SEED, share)
    model = model.bfloat16() if part.dtype == "bf16" else model
    assert all(weight.ds_numel > weight.numel() == 0 for weight in model.parameters()), "shared out before the engine"
    engine = zero.initialise(model, settings(part.dtype), betas=(0.9, 0.95), weight_decay=0.1)
    write(engine, part, rank)
    leave()


def write(engine, part: Part, rank: int) -> None:
    """As the saver does: the weights in parts, then the folder around them; once more whole, as one file."""
    from functools import partial

    from llm import checkpoint

    with zero.all_shared(engine):
        parts.write_weights(
            Path(part.save + ".weights"), zero.weight_bytes(engine), partial(zero.gathered, engine), 30_000
        )
    whole = zero.whole_weights(engine)
    if rank == 0:
        checkpoint.save_around(Path(part.save), engine.module, Path(part.save + ".weights"), FakeTokenizer())
        checkpoint.save_model(Path(part.save + ".whole"), engine.module, whole, FakeTokenizer())
    dist.barrier()
    ids = torch.arange(8)[None]
    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)  # it goes on after a save
    engine.step()


def expected(part: Part):
    model = build_model(llama(tie_word_embeddings=part.tied), SEED)
    return model.to(zero.DTYPES[part.dtype])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("dtype", "tied"), [("fp32", True), ("bf16", False)])
def test_zero_3_draws_writes_and_reads_what_one_rank_builds_whole(ranks, dtype, tied, tmp_path):
    from transformers import AutoModelForCausalLM

    first = Part(ranks, dtype, tied, None, str(tmp_path / "drawn"))
    on_ranks(rank_main, (first,), ranks)
    index = json.loads((tmp_path / "drawn" / parts.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    second = Part(3 - ranks, dtype, tied, first.save, str(tmp_path / "read"))
    on_ranks(rank_main, (second,), second.ranks)
    model = expected(first)
    for name in ("drawn", "drawn.whole", "read", "read.whole"):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert found.dtype == model.dtype
        same_weights(found, model)
    in_parts, whole = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("drawn", "drawn.whole"))
    assert in_parts == whole
    assert not (tmp_path / "drawn.whole" / parts.INDEX).exists(), "a small model stays one file"


def same_weights(one, other) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_written_file_holds_what_the_index_says(tmp_path, alone):
    weights = {name: torch.full((size,), float(size)) for name, size in (("a", 3), ("b", 5), ("c", 2))}
    sizes = {name: weight.nbytes for name, weight in weights.items()}
    parts.write_weights(tmp_path / "w", sizes, lambda names: {name: weights[name] for name in names}, 20)
    index = json.loads((tmp_path / "w" / parts.INDEX).read_text())
    assert index["metadata"]["total_size"] == 40
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "w" / file)[name], weights[name])
