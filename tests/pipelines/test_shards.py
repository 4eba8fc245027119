"""The stages `tokenizer` and `shards`: what is in a shard, in what order, and what is refused."""

import itertools
import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BadInput
from cluster.runs import Run, hash_folder
from llm.packing import RowReader, pack, pack_best_fit, read_index
from llm.shardfile import Shards, check_boundaries, read_arrow, token_lists
from llm.vocabulary import encode_text, load_tokenizer, train_tokenizer
from pipelines import documents, partitions, pretrain, shards, tokenizer
from pipelines.corpus.records import Document
from pipelines.ingest import _table
from pipelines.recipe import load_recipe
from pipelines.schema import PretrainSettings, TokenizerSettings
from pipelines.stage import StageRun
from tests.pipelines.corpus.in_process import InProcess

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "while",
    "12",
    "judges",
    "of",
    "1984",
    "sing:",
    "def",
    "answer()",
    "->",
    "int",
]
SOURCES = ("plays", "code")


def made(source: str, number: int, kind: str = "book", repository: str | None = None) -> Document:
    draw = random.Random(f"{source}{number}")
    meta = {"repository": repository} if repository else {}
    said = " ".join(draw.choices(WORDS, k=draw.randint(5, 60)))
    return Document(f"{draw.getrandbits(64):016x}", said, kind, source, f"file:{number}", "MIT", json.dumps(meta))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run whose ingest and tokenizer are done: plays in two parts, and code of four repositories in one."""
    run = Run(tmp_path_factory.mktemp("runs") / "run")
    folder = run.stage("ingest")
    folder.begin("key")
    parts = [
        [made("plays", number) for number in range(150)],
        [made("plays", number) for number in range(150, 200)],
        [made("code", 10 * repository + n, "code", f"r{repository}") for repository in range(4) for n in range(10)],
    ]
    with folder.artefact("documents") as target:
        for number, part in enumerate(parts):
            with _table(target / f"part-{number:05d}.parquet", Document) as out:
                out.add(part)
    sizes = {
        name: {"text_bytes": sum(len(one.text) for part in parts for one in part if one.source == name)}
        for name in SOURCES
    }
    folder.finish({"metrics": {"sources": sizes}, "fingerprint": "0"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "Work", InProcess)
        tokenizer.STAGE.run(begin(run, "tokenizer"))
    return run


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(shards, "Work", InProcess)


def begin(run: Run, stage: str, **settings) -> StageRun:
    micro = load_recipe("micro")
    sources = [{"name": name, "path": "/nowhere", "licence": "MIT"} for name in SOURCES]
    own = {"sequence_length": 32, "tokens_per_shard": 1000} | settings
    words = [f"ingest.sources={json.dumps(sources)}", *(f"shards.{key}={value}" for key, value in own.items())]
    recipe = load_recipe("micro", (*words, "tokenizer.vocab_size=320", "held_out=0.1"))
    assert recipe.pretrain == micro.pretrain
    folder = run.stage(stage)
    folder.begin("key")
    return StageRun(recipe, run, folder, logging.getLogger("test"), lambda numbers: None)


@pytest.fixture
def sharded(run, here, tmp_path) -> Path:
    copy = Run(Path(shutil.copytree(run.path, tmp_path / "run")))
    shards.STAGE.run(begin(copy, "shards"))
    return copy.path / "shards" / "tokens"


def documents_of(run: Run) -> dict[str, dict]:
    columns = ["id", "text", "source", "meta"]
    parts = documents.parts(run.stage("ingest").path / "documents")
    return {row["id"]: row for part in parts for batch in documents.read(part, columns) for row in batch.to_pylist()}


def ids_in(folder: Path) -> list[str]:
    return [name for path in sorted(folder.glob("shard-*")) for name in read_arrow(path).column("id").to_pylist()]


# What is in them


def test_every_document_is_in_one_shard_whole_and_ends_with_its_mark(run, sharded):
    loaded = load_tokenizer(run.stage("tokenizer").path / "tokenizer")
    everything = documents_of(run)
    seen = []
    for name in shards.SETS:
        tokens, ids = Shards(sharded / name), ids_in(sharded / name)
        for number, (document, length) in enumerate(zip(ids, tokens.lengths(), strict=True)):
            expected = [*encode_text(loaded, everything[document]["text"]), loaded.eos_token_id]
            assert tokens.tokens(number, 0, int(length)).tolist() == expected
            assert documents.is_held_out(document, 0.1) == (name == "held_out")
        seen += ids
    assert sorted(seen) == sorted(everything)


def test_the_manifest_says_what_is_there(run, sharded):
    manifest = shards.read_manifest(sharded)
    assert (manifest["bos_id"], manifest["eos_id"], manifest["schema_version"]) == (None, 0, 2)
    everything = documents_of(run)
    for name in shards.SETS:
        about = manifest[name]
        lengths = Shards(sharded / name).lengths()
        assert (about["documents"], about["tokens"]) == (len(lengths), lengths.sum())
        for source in SOURCES:
            own = [one for one in ids_in(sharded / name) if everything[one]["source"] == source]
            assert about["sources"][source]["documents"] == len(own)
            size = sum(len(everything[one]["text"].encode()) for one in own)
            assert about["sources"][source]["text_bytes"] == size
        assert set(about["files"]) == {f"{name}/{path.name}" for path in (sharded / name).glob("*.arrow")}, (
            "and of every file its hash"
        )


def test_every_row_is_of_one_source_and_no_token_is_lost(sharded):
    manifest = shards.read_manifest(sharded)
    reader, tokens = RowReader(sharded / "train", manifest["pad_id"]), Shards(sharded / "train")
    first = 0
    owner = np.repeat(
        np.arange(len(SOURCES)), [manifest["train"]["sources"][source]["documents"] for source in SOURCES]
    )
    for number, source in enumerate(SOURCES):
        last = first + manifest["train"]["sources"][source]["rows"]
        pieces = (reader.index.row >= first) & (reader.index.row < last)
        assert set(owner[reader.index.document[pieces]]) == {number}
        assert reader.index.length[pieces].sum() == manifest["train"]["sources"][source]["tokens"]
        first = last
    assert reader.index.length.sum() == tokens.lengths().sum()
    assert first == manifest["train"]["rows"]


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_documents_fill_rows_as_the_recipe_says_but_code_in_its_order(run, here, tmp_path, packing):
    copy = Run(Path(shutil.copytree(run.path, tmp_path / "run")))
    shards.STAGE.run(begin(copy, "shards", packing=packing))
    tokens = copy.path / "shards" / "tokens"
    sources = shards.read_manifest(tokens)["train"]["sources"]
    lengths, index = Shards(tokens / "train").lengths(), read_index(tokens / "train" / "packing.arrow")
    plays, code = np.split(lengths, [sources["plays"]["documents"]])
    expected = [{"best_fit": pack_best_fit, "concatenate": pack}[packing](plays, 32), pack(code, 32)]
    assert index.length.tolist() == [length for one in expected for length in one.length]
    assert index.start.tolist() == [start for one in expected for start in one.start]


def test_shards_have_one_size_but_for_chance(sharded):
    lists = [read_arrow(path).column("tokens").chunk(0) for path in (sharded / "train").glob("shard-000-*")]
    sizes = [len(tokens.values) for tokens in lists]
    assert len(sizes) > 3
    assert np.mean(sizes) == pytest.approx(1000, rel=0.25)
    assert max(sizes) < 2000


def test_documents_are_shuffled_over_all_parts_but_repositories_stay_together(run, sharded):
    everything = documents_of(run)
    order = [everything[one] for one in ids_in(sharded / "train")]
    plays = [row["id"] for row in order if row["source"] == "plays"]
    written = [one for one in everything if one in set(plays)]
    moved = np.mean([abs(plays.index(one) - written.index(one)) for one in written])
    assert moved > len(plays) / 5, "a random order moves each by a third of all, on average"
    code = [row for row in order if row["source"] == "code"]
    names = [json.loads(row["meta"])["repository"] for row in code]
    changes = sum(before != after for before, after in itertools.pairwise(names))
    assert changes == len(set(names)) - 1, "the files of a repository follow one another"
    for name in set(names):
        own = [row["id"] for row in code if json.loads(row["meta"])["repository"] == name]
        assert own == [one for one in everything if one in set(own)], "in the order in which they were read"


@pytest.mark.parametrize(
    ("meta", "together"),
    [
        ({"repository": "file:r", "path": "a/b.py"}, {"repository": "file:r", "path": "c.py"}),
        ({"repository": "stdlib:", "path": "json/a.py"}, {"repository": "stdlib:", "path": "json/b.py"}),
    ],
)
def test_files_of_a_repository_are_kept_together_and_loose_ones_by_folder(meta, together):
    loose = {"repository": "stdlib:", "path": "wave.py"}
    keys = [
        shards.shuffle_key({"id": f"{n}", "kind": "code", "meta": json.dumps(one)})
        for n, one in enumerate((meta, together, loose))
    ]
    assert keys[0] == keys[1] != keys[2]


def test_killed_before_any_task_it_goes_on_and_the_bytes_are_the_same(run, sharded, here, tmp_path, monkeypatch):
    do, whole, fatal = partitions._do, hash_folder(sharded), 0
    while True:
        fatal, tasks = fatal + 1, 0

        def dying(row, step, task, fatal=fatal):
            nonlocal tasks
            tasks += 1
            if tasks == fatal:
                raise KeyboardInterrupt
            return do(row, step, task)

        copy = Run(Path(shutil.copytree(run.path, tmp_path / f"run-{fatal}")))
        monkeypatch.setattr(partitions, "_do", dying)
        try:
            shards.STAGE.run(begin(copy, "shards"))
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(partitions, "_do", do)
            shards.STAGE.run(begin(copy, "shards"))
        assert hash_folder(copy.path / "shards" / "tokens") == whole
    assert fatal > 10


# What is refused


def test_sound_shards_are_taken(sharded):
    ray_free_verify(sharded)


@pytest.mark.parametrize("harm", ["damaged", "missing", "foreign", "partial", "other version", "no manifest"])
def test_unsound_shards_are_refused_by_name(sharded, harm):
    victim = sorted((sharded / "train").glob("shard-*"))[1]
    manifest = sharded / "manifest.json"
    if harm == "damaged":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif harm == "missing":
        victim.unlink()
    elif harm == "foreign":
        shutil.copy(victim, victim := victim.with_name("shard-000-99999.arrow"))
    elif harm == "partial":
        victim.write_bytes(victim.read_bytes()[:-100])
    elif harm == "other version":
        manifest.write_text(manifest.read_text().replace('"schema_version": 2', '"schema_version": 1'))
    else:
        (victim := manifest).unlink()
    said = {"other version": "schema version 1", "no manifest": "manifest.json"}.get(harm, victim.name)
    with pytest.raises(BadInput, match=said):
        ray_free_verify(sharded)


def ray_free_verify(tokens: Path) -> None:
    """What `verify` has done by tasks, done here."""
    manifest = shards.read_manifest(tokens)
    files = {name: about for one in shards.SETS for name, about in manifest[one]["files"].items()}
    damaged = [name for name, about in files.items() if shards._damaged(tokens, name, about)]
    shards.refuse_damaged(tokens, damaged)


@pytest.mark.parametrize("documents", [[[5, 6, 1]], [[5, 0, 6, 0]], [[5, 6]], [[5, 0], [0, 6]]])
def test_a_mark_that_is_missing_or_in_the_wrong_place_is_no_shard(documents):
    lists = token_lists([np.array(ids, dtype=np.uint32) for ids in documents], 300)
    with pytest.raises(ValueError, match="must end every document"):
        check_boundaries(lists, [0, 1], 0)


def test_marks_in_their_places_give_the_lengths():
    lists = token_lists([np.array(ids, dtype=np.uint32) for ids in ([5, 6, 0], [0], [7, 0])], 300)
    assert check_boundaries(lists, [0, 1], 0).tolist() == [3, 1, 2]
    assert isinstance(lists, pa.LargeListArray)


# Mixtures


def test_a_mixture_is_of_the_sources_that_there_are():
    sources = {"plays": {"rows": 100}, "code": {"rows": 50}, "none": {"rows": 0}}
    settings = load_recipe("micro").pretrain.model_dump() | {"steps": 20, "global_batch": 8}
    mix = lambda **mixture: pretrain.mixture_of(sources, PretrainSettings(**settings | {"mixture": mixture}))  # noqa: E731
    assert mix() is None
    assert mix(plays=1, code=3).share.tolist() == [40, 120, 0]
    assert pretrain._epochs(sources, mix(plays=1, code=3), PretrainSettings(**settings)) == {
        "plays": 0.4,
        "code": 2.4,
        "none": 0.0,
    }
    with pytest.raises(BadInput, match="'none', of which there are no rows"):
        mix(none=1)
    with pytest.raises(BadInput, match="160 rows are wanted, 100 are there in 1 epochs"):
        settings["max_epochs"] = 1
        mix(plays=1)


# The tokenizer


def test_the_sample_is_drawn_by_weight():
    sizes = {"plays": 1000, "code": 3000}
    draw = lambda **settings: tokenizer.sample_shares(sizes, TokenizerSettings(sample_bytes=1000, **settings))  # noqa: E731
    assert draw() == {"plays": 0.25, "code": 0.25}
    assert draw(weights={"plays": 3, "code": 1}) == {"plays": 0.75, "code": pytest.approx(1 / 12)}
    assert draw(weights={"code": 1}) == {"plays": 0.0, "code": pytest.approx(1 / 3)}
    with pytest.raises(BadInput, match="'verse', which is no source"):
        draw(weights={"verse": 1})


def test_fertility_is_measured_by_source_next_to_gpt2(run):
    loaded = load_tokenizer(run.stage("tokenizer").path / "tokenizer")
    found = tokenizer.measure(loaded, {"plays": ["Hello world"]})["plays"]
    assert found["gpt2"] == {"bytes": 11, "tokens": 2, "bytes_per_token": 5.5, "tokens_per_word": 1.0}
    own = len(encode_text(loaded, "Hello world"))
    assert found["own"] == {
        "bytes": 11,
        "tokens": own,
        "bytes_per_token": round(11 / own, 4),
        "tokens_per_word": own / 2,
    }


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer([" ".join(WORDS)] * 20, 320)


@given(text=st.text())
def test_any_text_survives(trained, text):
    assert trained.decode(encode_text(trained, text)) == text


def test_digits_are_split_one_by_one(trained):
    pieces = [trained.convert_ids_to_tokens(token) for token in encode_text(trained, "1984 12")]
    assert [piece.lstrip("Ġ") for piece in pieces if piece != "Ġ"] == ["1", "9", "8", "4", "1", "2"]


def test_documents_are_put_in_order_as_arrow_would():
    draw = np.random.default_rng(0)
    lengths = [draw.integers(1, 9, count) for count in (7, 1, 5)]
    lists = [
        pa.LargeListArray.from_arrays(np.concatenate([[0], one.cumsum()]), draw.integers(0, 99, one.sum(), np.uint16))
        for one in lengths
    ]
    keys = [np.sort(draw.integers(0, 6, len(one))) for one in lengths]
    tables = [pa.table({"key": key, "tokens": one}) for key, one in zip(keys, lists, strict=True)]
    parts = [tables[0].slice(2, 4), *tables[1:]]
    whole = pa.concat_tables(parts)
    expected = whole.take(np.argsort(whole["key"].to_numpy(), kind="stable"))
    assert shards._in_order(parts).equals(expected.combine_chunks())
