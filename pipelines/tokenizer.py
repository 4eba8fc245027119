"""Stage 2: documents to a tokenizer, a Hugging Face folder with the chat template and every special token.

With tokenizer.from_folder nothing is learnt: the tokenizer of that folder is taken, and measured like one of ours.

sample    a task a documents file: the training documents that are drawn, and others to measure on, held-out ones
          where there are some
learn     one task: the merges, from the sample alone, so its memory is bounded by tokenizer.sample_bytes; then
          bytes a token and tokens a word of every source, next to those of GPT-2's tokenizer
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import mirror
from cluster.errors import BadInput, Problem, StageFailed
from cluster.preflight import Piece
from cluster.progress import console
from llm.vocabulary import encode_text, fingerprint, gpt2_tokenizer, train_tokenizer
from pipelines import documents
from pipelines.partitions import Step, Summary, Work, facts, writing
from pipelines.recipe import Recipe
from pipelines.schema import TokenizerSettings
from pipelines.stage import Demand, Outcome, Stage, StageRun, content_of

if TYPE_CHECKING:
    from rich.table import Table

MEASURED_BYTES = 200_000  # of each source, about
SCHEMA = pa.schema([("use", pa.string()), ("source", pa.string()), ("text", pa.string())])
LEARN, MEASURE = "learn", "measure"


def run(stage: StageRun) -> Outcome:
    """Train on a sample of the training documents; held-out text is never learnt from."""
    settings, ingest = stage.recipe.tokenizer, stage.run.stage("ingest").done() or {}
    work = Work(stage.folder, settings.cpus)
    parts = documents.parts(stage.input("ingest") / "documents")
    sizes = {name: about["text_bytes"] for name, about in ingest["metrics"]["sources"].items()}
    sample = partial(_sample, shares=sample_shares(sizes, settings), sizes=sizes, held_out=stage.recipe.held_out)
    work.each("sample", [{"part": str(part)} for part in parts], sample, "files")
    target = stage.folder.kept_folder("tokenizer")
    learn = partial(_learn, sample=work.step("sample"), target=target, settings=settings)
    with console.status("taking the tokenizer" if settings.from_folder else "learning the merges"):
        [found] = work.each("learn", [{}], learn)
    stage.folder.publish("tokenizer", found.pop("files"))
    if not settings.from_folder and found["vocab_size"] < settings.vocab_size:
        stage.log.warning("the text gave only %d of %d token ids", found["vocab_size"], settings.vocab_size)
    console.print(fertility_table(found["fertility"]))
    return Outcome(
        read=f"{found['sample_bytes'] / 1e6:.1f} MB of {sum(sizes.values()) / 1e6:.1f} MB of text",
        wrote=f"{found['vocab_size']:,} token ids",
        figure=f"{found['bytes_per_token']:.2f} bytes a token",
        metrics={**found, "text_bytes": sum(sizes.values())},
        tables={"fertility": [{"source": name, **_flat(of)} for name, of in found["fertility"].items()]},
    )


# Sampling


def sample_shares(sizes: dict[str, int], settings: TokenizerSettings) -> dict[str, float]:
    """Which share of each source's documents is drawn, so that the sample has `sample_bytes` by the weights.

    `sizes`: bytes of text by source. A source with less text than its weight asks for is taken whole.
    BadInput if a weight is of no source. Nothing is drawn where nothing is learnt.
    """
    if settings.from_folder:
        return dict.fromkeys(sizes, 0.0)
    weights = settings.weights or {name: float(size) for name, size in sizes.items()}
    if unknown := sorted(set(weights) - set(sizes)):
        what = f"tokenizer.weights has a weight for '{unknown[0]}', which is no source"
        raise BadInput(Problem(what, f"sources: {', '.join(sizes)}"))
    total = sum(weights.values())
    return {
        name: min(1.0, settings.sample_bytes * weights.get(name, 0.0) / total / max(size, 1))
        for name, size in sizes.items()
    }


def _sample(
    number: int, item: dict[str, Any], step: Step, shares: dict[str, float], sizes: dict[str, int], held_out: float
) -> Summary:
    """Leave the documents of a part that are drawn."""
    with writing(step.file(number, "parquet")) as path, pq.ParquetWriter(path, SCHEMA, compression="zstd") as out:
        for batch in documents.read(Path(item["part"]), ["id", "text", "source"]):
            rows = [
                {"use": use, "source": row["source"], "text": row["text"]}
                for row in batch.to_pylist()
                for use in _uses(row, shares[row["source"]], MEASURED_BYTES / sizes[row["source"]], held_out)
            ]
            out.write_table(pa.Table.from_pylist(rows, SCHEMA))
    return {}


def _uses(row: dict[str, Any], learnt: float, measured: float, held_out: float) -> Iterator[str]:
    """What a document is drawn for. The draws are made anew, so as not to follow the choice of what is held out."""
    kept_out = documents.is_held_out(row["id"], held_out)
    if not kept_out and _draw("tokenizer", row["id"]) <= learnt:
        yield LEARN
    if _draw("fertility", row["id"]) <= (measured / held_out if kept_out else measured):
        yield MEASURE + (" held out" if kept_out else "")


def _draw(purpose: str, document_id: str) -> float:
    """A number in [0, 1] that a document has for a purpose."""
    digest = hashlib.sha256(f"{purpose}/{document_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / (2**32 - 1)


def _drawn(sample: Step, use: str) -> Iterator[tuple[str, str]]:
    """Source and text of what was drawn for a use, in order."""
    for path in sample.files("parquet"):
        with pq.ParquetFile(mirror.fetch(path)) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from ((row["source"], row["text"]) for row in batch.to_pylist() if row["use"] == use)


# Learning


def _learn(
    number: int, item: dict[str, Any], step: Step, sample: Step, target: Path, settings: TokenizerSettings
) -> Summary:
    counted = _Counted(text for _, text in _drawn(sample, LEARN))
    tokenizer = settings.adopted() if settings.from_folder else train_tokenizer(counted, settings.vocab_size)
    _check_round_trip(tokenizer)
    with mirror.filling(target):
        tokenizer.save_pretrained(target)
    fertility = measure(tokenizer, _texts_to_measure(sample))
    own = [figures["own"] for figures in fertility.values()]
    return {
        "vocab_size": len(tokenizer),
        "sample_bytes": counted.bytes,
        "bytes_per_token": sum(one["bytes"] for one in own) / max(1, sum(one["tokens"] for one in own)),
        "fertility": fertility,
        "fingerprint": fingerprint(tokenizer),
        "files": {path.name: facts(path) for path in sorted(target.iterdir())},
    }


class _Counted:
    """Texts as they come, and their bytes."""

    def __init__(self, texts: Iterator[str]):
        self._texts, self.bytes = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.bytes += len(text.encode())
            yield text


def _check_round_trip(tokenizer) -> None:
    for text in ("Hello, hello!\n\ttab  and  spaces", "naïve café 日本語 🙂 \u200d", "<|endoftext|> spelt out"):
        back = tokenizer.decode(encode_text(tokenizer, text))
        if back != text:
            raise StageFailed(
                Problem(f"the tokenizer turns {text!r} into {back!r}", "report this: it must be lossless")
            )


# Measuring


def measure(tokenizer, texts: dict[str, list[str]]) -> dict[str, dict[str, dict[str, float]]]:
    """Bytes a token and tokens a word (what white space parts) by source, of this tokenizer and of GPT-2's."""
    gpt2 = gpt2_tokenizer()
    return {
        source: {
            "own": _fertility(some, [encode_text(tokenizer, text) for text in some]),
            "gpt2": _fertility(some, [gpt2.encode(text, add_special_tokens=False).ids for text in some]),
        }
        for source, some in texts.items()
    }


def _fertility(texts: list[str], ids: list[list[int]]) -> dict[str, float]:
    size, words = sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts)
    tokens = sum(map(len, ids))
    return {
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": round(size / max(1, tokens), 4),
        "tokens_per_word": round(tokens / max(1, words), 4),
    }


def _texts_to_measure(sample: Step) -> dict[str, list[str]]:
    """By source, the held-out documents that were drawn, or the others where there are none."""
    found: dict[str, list[str]] = {}
    for use in (MEASURE, f"{MEASURE} held out"):
        drawn: dict[str, list[str]] = {}
        for source, text in _drawn(sample, use):
            drawn.setdefault(source, []).append(text)
        found |= drawn
    return dict(sorted(found.items()))


def _flat(of: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{whose}_{what}": value for whose, figures in of.items() for what, value in figures.items()}


def fertility_table(fertility: dict[str, Any]) -> Table:
    """What `measure` found, for people."""
    from rich.table import Table

    table = Table(title="fertility", title_justify="left")
    for name in ("source", "bytes a token", "GPT-2's", "tokens a word", "GPT-2's"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for source, of in fertility.items():
        pairs = [
            f"{of[whose][what]:.2f}" for what in ("bytes_per_token", "tokens_per_word") for whose in ("own", "gpt2")
        ]
        table.add_row(source, *pairs)
    return table


def _check(recipe: Recipe) -> list[Problem]:
    """Why a folder's tokenizer can't be the run's."""
    try:
        if recipe.tokenizer.from_folder:
            recipe.tokenizer.adopted()
    except BadInput as error:
        return [problem for problem in error.problems if isinstance(problem, Problem)]
    return []


def _sources(recipe: Recipe, verify: bool) -> dict[str, str]:
    """The tokenizer that is taken."""
    if recipe.tokenizer.folder is None:
        return {}
    file = recipe.tokenizer.folder / "tokenizer.json"
    return {"from_folder": content_of([file] if file.is_file() else [], verify)}


STAGE = Stage(
    name="tokenizer",
    version=3,
    needs=("ingest",),
    artefacts=("tokenizer",),
    identity=lambda recipe: {**recipe.tokenizer.identity(), "held_out": recipe.held_out},
    check=_check,
    sources=_sources,
    demand=lambda recipe: Demand(
        (Piece("task", "tokenizer.cpus", recipe.tokenizer.cpus),), disk_bytes=recipe.tokenizer.vocab_size * 200
    ),
    run=run,
)
