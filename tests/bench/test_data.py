"""The benchmarks of data preparation: what both sides are given, and what is said when one can't be measured."""

import gzip
import json

import numpy as np
import pytest

from llm.shardfile import write_shard
from tests.bench import data, ours, peer, texts
from tests.bench.agreement import digest, text_digest
from tests.bench.measure import Figure, Invalid

SENTENCES = [" ".join(f"w{(n * 7 + place) % 900}x" for place in range(12)) + "." for n in range(900)]


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    monkeypatch.setattr(ours, "WORK", tmp_path / "work")
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    monkeypatch.setattr(data, "_pool", lambda: texts.gather(SENTENCES))
    monkeypatch.delenv(texts.DATA_FOLDER, raising=False)


def test_near_duplicates_are_among_the_documents_under_the_ids_given():
    folder, known, pairs = data._with_doubles(data.Scale(0.01, 1))
    lines = [line for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]
    rows = {row["id"]: row["text"] for row in map(json.loads, lines)}
    assert {text_digest(text): name for name, text in rows.items()} == known
    assert len(pairs) > 10
    for one, two, similarity in pairs:
        assert texts.jaccard(rows[one], rows[two]) == similarity >= 0.5


def test_a_set_of_shards_has_the_digest_of_its_documents(tmp_path):
    documents = [np.array([5, 6, 7], np.uint32), np.array([8], np.uint32), np.array([9, 9], np.uint32)]
    write_shard(tmp_path / "shard-00000-000.arrow", ["a", "b"], documents[:2], 100)
    write_shard(tmp_path / "shard-00001-000.arrow", ["c"], documents[2:], 100)
    assert digest(ours._tokens(tmp_path)) == digest(documents)


def test_recipes_are_what_is_asked_for():
    folder = ours.WORK / "text"
    recipe = ours.recipe("bench", [data._jsonl(folder)], **ours.AS_IS, **ours.KEEP_DOUBLES)
    assert (recipe.name, recipe.ingest.sources[0].path) == ("bench", str(folder))
    assert recipe.ingest.sources[0].id_column == "id"
    settings = recipe.ingest
    assert (settings.mask, settings.decontaminate, settings.deduplicate.near) == ((), False, False)
    assert not recipe.wandb.enabled


def response(url: str, body: str) -> bytes:
    block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + body.encode()
    head = f"WARC/1.1\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nContent-Length: {len(block)}\r\n"
    http = "Content-Type: application/http; msgtype=response\r\n\r\n"
    return gzip.compress((head + http).encode() + block + b"\r\n\r\n")


def test_every_page_counts_with_its_address_and_its_bytes(monkeypatch, tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    (given / "web.warc.gz").write_bytes(
        response("http://a.example/0", "<p>one</p>") + response("http://a.example/1", "é")
    )
    monkeypatch.setenv(texts.DATA_FOLDER, str(given))
    folder = data._pages(data.Scale(0.25, 1))
    assert len(list(folder.iterdir())) == 2
    assert data._responses(folder) == ({"http://a.example/0", "http://a.example/1"}, 2 * (10 + 2))


def test_an_invalid_comparison_is_said_and_the_others_still_measured(monkeypatch, tmp_path, capsys):
    def fails(scale):
        raise Invalid("other ids")

    good = Figure("good", 2.0, 1.5, 2.5, 1.0, {"seconds": 1})
    monkeypatch.setattr(data, "FIGURES", {"bad": fails, "good": lambda scale: [good]})
    assert data.main([]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert "BENCH bad invalid: other ids" in printed
    assert "BENCH good 2 [1.5, 2.5] bar 1 met" in printed
    said = json.loads((tmp_path / "data.json").read_text())
    assert (said["invalid"], [figure["name"] for figure in said["figures"]]) == (["bad"], ["good"])


def test_a_figure_that_falls_short_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr(data, "FIGURES", {"slow": lambda scale: [Figure("slow", 0.5, 0.4, 0.6, 1.0)]})
    assert data.main(["slow", "--pairs", "2"]) == 0
    assert "BENCH slow 0.5 [0.4, 0.6] bar 1 short" in capsys.readouterr().out


def test_memory_is_measured_above_an_idle_ray_and_growth_against_the_smaller(monkeypatch):
    gib = 1 << 30
    monkeypatch.setattr(data.memory, "idle_ray", lambda size: gib)
    monkeypatch.setattr(data, "_peak", lambda name, size: {"memory_1gb": 2 * gib, "memory_4gb": 5 * gib}[name])
    values = {figure.name: figure.value for figure in data.memory_of_all(data.Scale(1, 1))}
    assert values == {"memory_1gb": 2.0, "memory_4gb": 0.5, "memory_flat": pytest.approx(1.15 / 4)}


def test_the_peer_is_told_the_settings_and_its_seconds_are_taken_apart(monkeypatch):
    monkeypatch.setattr(peer, "run", lambda job, **settings: {"seconds": 3.0, "job": job, **settings})
    assert data._peer("minhash", {"rows": 8}) == (3.0, {"job": "minhash", "rows": 8})
