"""Raw `tokenizers` over documents: python -m tests.bench.encode DOCUMENTS TOKENIZER, with RAYON_NUM_THREADS set.

Prints one JSON object: the seconds of `encode_batch` alone, texts in memory, and what the ids are.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llm.vocabulary import END_OF_TEXT
from pipelines import documents
from tests.bench.agreement import digest

BATCH = 1_000


def encode(folder: Path, tokenizer_file: Path) -> dict[str, Any]:
    """Encode all documents of the folder, the end-of-text id put after each."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.encode_special_tokens = True  # special tokens spelt out in text are text, as in our shards
    end, seconds, ids = tokenizer.token_to_id(END_OF_TEXT), 0.0, []
    for texts in _batches(folder):
        started = time.perf_counter()
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        seconds += time.perf_counter() - started
        ids += [np.array([*encoding.ids, end], dtype=np.uint32) for encoding in encodings]
    return {"seconds": seconds, **digest(ids)}


def _batches(folder: Path) -> Iterator[list[str]]:
    texts = [text for part in documents.parts(folder) for text in _texts(part)]
    return (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))


def _texts(part: Path) -> list[str]:
    return [text for batch in documents.read(part, ["text"]) for text in batch.column("text").to_pylist()]


if __name__ == "__main__":
    print(json.dumps(encode(Path(sys.argv[1]), Path(sys.argv[2]))))
