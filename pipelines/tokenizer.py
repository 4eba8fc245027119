"""Stage 2: documents to a tokenizer, a Hugging Face folder with the chat template and every special token."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from cluster import mirror
from cluster.errors import Problem, StageFailed
from cluster.progress import console
from llm.vocabulary import encode_text, fingerprint, train_tokenizer
from pipelines import documents
from pipelines.stage import Demand, Outcome, Stage, StageRun


def run(stage: StageRun) -> Outcome:
    """Train on a sample of the training documents; held-out text is never seen."""
    settings, folder = stage.recipe.tokenizer, stage.input("ingest") / "documents"
    with stage.folder.artefact("tokenizer") as target:
        task = ray.remote(num_cpus=settings.cpus)(_train).remote(
            folder, target, settings.vocab_size, settings.sample_bytes, stage.recipe.held_out
        )
        with console.status("learning the merges"):
            found = ray.get(task)
    if found["vocab_size"] < settings.vocab_size:
        stage.log.warning("the text gave only %d of %d token ids", found["vocab_size"], settings.vocab_size)
    return Outcome(
        read=f"{found['sample_bytes'] / 1e6:.1f} MB of {found['text_bytes'] / 1e6:.1f} MB of text",
        wrote=f"{found['vocab_size']:,} token ids",
        figure=f"{found['bytes_per_token']:.2f} bytes a token",
        metrics=found,
    )


def _train(folder: Path, target: Path, vocab_size: int, sample_bytes: int, held_out: float) -> dict[str, Any]:
    total = sum(len(text.encode()) for _, text in _training_texts(folder, held_out))
    share = min(1.0, sample_bytes / max(1, total))
    sample = list(_sample(folder, held_out, share))
    tokenizer = train_tokenizer(sample, vocab_size)
    _check_round_trip(tokenizer)
    with mirror.filling(target):
        tokenizer.save_pretrained(target)
    return {
        "vocab_size": len(tokenizer),
        "text_bytes": total,
        "sample_bytes": sum(len(text.encode()) for text in sample),
        "bytes_per_token": _bytes_per_token(tokenizer, sample),
        "fingerprint": fingerprint(tokenizer),
    }


def _training_texts(folder: Path, held_out: float) -> Iterator[tuple[str, str]]:
    for part in documents.parts(folder):
        for batch in documents.read(part, ["id", "text"]):
            for row in batch.to_pylist():
                if not documents.is_held_out(row["id"], held_out):
                    yield row["id"], row["text"]


def _sample(folder: Path, held_out: float, share: float) -> Iterator[str]:
    """The documents whose id, hashed anew so as not to follow the held-out choice, falls into `share`."""
    for document_id, text in _training_texts(folder, held_out):
        draw = int.from_bytes(hashlib.sha256(f"tokenizer/{document_id}".encode()).digest()[:4], "big")
        if draw <= share * (2**32 - 1):
            yield text


def _bytes_per_token(tokenizer, sample: list[str], enough: int = 1_000_000) -> float:
    """Compression over documents spread evenly through the sample, about `enough` characters of them."""
    every = max(1, sum(map(len, sample)) // enough)
    texts = sample[::every]
    return sum(len(text.encode()) for text in texts) / max(1, sum(len(encode_text(tokenizer, text)) for text in texts))


def _check_round_trip(tokenizer) -> None:
    for text in ("Hello, hello!\n\ttab  and  spaces", "naïve café 日本語 🙂 \u200d", "<|endoftext|> spelt out"):
        back = tokenizer.decode(encode_text(tokenizer, text))
        if back != text:
            raise StageFailed(
                Problem(f"the tokenizer turns {text!r} into {back!r}", "report this: it must be lossless")
            )


STAGE = Stage(
    name="tokenizer",
    version=1,
    needs=("ingest",),
    artefacts=("tokenizer",),
    identity=lambda recipe: {
        "vocab_size": recipe.tokenizer.vocab_size,
        "sample_bytes": recipe.tokenizer.sample_bytes,
        "held_out": recipe.held_out,
    },
    demand=lambda recipe: Demand(cpus=recipe.tokenizer.cpus, disk_bytes=recipe.tokenizer.vocab_size * 200),
    run=run,
)
