"""What datatrove does in the benchmarks: python datatrove_jobs.py JOB SETTINGS, with datatrove's own Python.

Its own pipelines in two worker processes that are forked, so that none has to import anything. Its defaults, but for
what makes it do the same as we, all of which is less work: n-grams of words by a regular expression instead of spaCy,
as they are, without numbers and diacritics normalised; C4 without the rule of terminal punctuation.
Prints one JSON object: the seconds of the pipelines alone, and what they made.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.extractors.base import BaseExtractor
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.readers import JsonlReader, ParquetReader, WarcReader
from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WordTokenizer
from loguru import logger
from resiliparse.extract.html2text import extract_plain_text

WORKERS = 2


class Words(WordTokenizer):
    """Runs of letters and digits in lower case: the n-grams of deduplication."""

    def word_tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    def sent_tokenize(self, text: str) -> list[str]:
        return re.findall(r"\S[^.!?]*[.!?]*", text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in re.finditer(r"\S[^.!?]*[.!?]*", text)]


class MainText(BaseExtractor):
    """The main text of an HTML page by resiliparse, without the elements that we leave out."""

    name = "resiliparse"

    def __init__(self, skip: list[str]) -> None:
        super().__init__(timeout=30)
        self.skip = skip

    def extract(self, text: str) -> str:
        return extract_plain_text(text, main_content=True, alt_texts=False, skip_elements=self.skip)


def tokenize(documents: str, tokenizer: str, end_of_text: str, work: str) -> dict[str, Any]:
    """Parquet files of documents to one file of shuffled documents, token ids with their boundaries."""
    apart, merged = Path(work, "apart"), Path(work, "merged")
    # The columns that aren't text stay behind: they'd be carried along for nothing.
    read = ParquetReader(documents, read_metadata=False, glob_pattern="*.parquet")
    steps = [read, DocumentTokenizer(str(apart), tokenizer, eos_token=end_of_text, seed=1)]
    merge = [DocumentTokenizerMerger(str(apart), str(merged), "all", seed=1, progress=False)]

    def all_steps() -> None:
        _execute(steps, WORKERS, work)
        _execute(merge, 1, work)

    seconds = _timed(all_steps)
    return {"seconds": seconds, **_digest(_tokens(merged))}


def minhash(documents: str, ngram: int, bands: int, rows: int, work: str) -> dict[str, Any]:
    """JSONL files of documents to those that have no near-duplicate before them."""
    config = MinhashConfig(n_grams=ngram, num_buckets=bands, hashes_per_bucket=rows, norm_config=_as_written())
    signatures, buckets, doubles, kept = (str(Path(work, name)) for name in ("sigs", "buckets", "doubles", "kept"))
    read = JsonlReader(documents)

    def all_steps() -> None:
        _execute([read, MinhashDedupSignature(signatures, config, language=Words())], WORKERS, work)
        _execute([MinhashDedupBuckets(signatures, buckets, config=config)], bands, work)
        _execute([MinhashDedupCluster(buckets, doubles, config)], 1, work)
        _execute([read, MinhashDedupFilter(doubles), JsonlWriter(kept, compression=None)], WORKERS, work)

    return {"seconds": _timed(all_steps), "kept": [row["id"] for row in _rows(kept)]}


def html(pages: str, skip: list[str], work: str) -> dict[str, Any]:
    """WARC files to the pages whose main text keeps all rules."""
    # As we, without the rule of C4 by which lines must end in a mark, which FineWeb found to cost too much, and with
    # the share of characters in repeated lines that FineWeb's paper names.
    last = [C4QualityFilter(filter_no_terminal_punct=False), FineWebQualityFilter(char_duplicates_ratio=0.1)]
    kept = str(Path(work, "kept"))
    steps = [WarcReader(pages), MainText(skip), GopherRepetitionFilter(), GopherQualityFilter(), *last]
    seconds = _timed(lambda: _execute([*steps, JsonlWriter(kept, compression=None)], WORKERS, work))
    return {"seconds": seconds, "kept": [row["metadata"]["url"] for row in _rows(kept)]}


JOBS: dict[str, Callable[..., dict[str, Any]]] = {"tokenize": tokenize, "minhash": minhash, "html": html}


def _execute(steps: list[Any], tasks: int, work: str) -> None:
    logs = Path(work, f"logs-{time.monotonic_ns()}")
    LocalPipelineExecutor(steps, tasks, min(tasks, WORKERS), str(logs), start_method="fork").run()


def _timed(steps: Callable[[], Any]) -> float:
    started = time.perf_counter()
    steps()
    return time.perf_counter() - started


def _as_written() -> TextNormConfig:
    """No normalising beyond lower case, which is our definition of a word and less work."""
    return TextNormConfig(
        lowercase=False,
        norm_whitespace=False,
        remove_punctuation=False,
        norm_unicode_diacritics=False,
        norm_numbers=False,
    )


def _rows(folder: str) -> Iterator[dict[str, Any]]:
    for path in sorted(Path(folder).glob("*.jsonl")):
        with open(path, encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _tokens(folder: Path) -> Iterator[np.ndarray]:
    """The ids of each document of a merged file."""
    for path in sorted(folder.glob("*.ds")):
        size = int(Path(f"{path}.metadata").read_text().split("\n")[0].split("|")[1])
        ids = np.fromfile(path, dtype=f"<u{size}")
        ends = np.fromfile(f"{path}.index", dtype="<u8").astype(np.int64)
        yield from np.split(ids, ends[:-1])


def _digest(documents: Iterator[np.ndarray]) -> dict[str, Any]:
    """What documents hold, whatever their order; `agreement.digest` is the same."""
    lengths, total = [], 0
    for ids in documents:
        lengths.append(len(ids))
        total += int.from_bytes(hashlib.sha256(ids.astype("<u4").tobytes()).digest()[:16], "little")
    return {"documents": len(lengths), "tokens": sum(lengths), "digest": f"{total % 2**128:032x}"}


if __name__ == "__main__":
    logger.remove()
    settings = json.loads(sys.argv[2])
    shutil.rmtree(settings["work"], ignore_errors=True)
    print(json.dumps(JOBS[sys.argv[1]](**settings)))
