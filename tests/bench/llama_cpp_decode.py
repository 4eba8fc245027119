"""Decodes greedily with llama.cpp in the peer's environment: llama_cpp_decode.py ORDER, as JSON.

Prints `ids` and `seconds`, from the first new token to the last, as JSON. Keys and values are kept in fp32.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import islice
from typing import Any

from llama_cpp import GGML_TYPE_F32, Llama


def main(order: dict[str, Any]) -> None:
    prompt, new_tokens, threads = order["prompt"], order["new_tokens"], order["threads"]
    model = Llama(
        order["model"],
        n_ctx=len(prompt) + new_tokens + 8,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    list(islice(model.generate(prompt, temp=0.0), 4))  # what happens once
    model.reset()
    ids, times = [], []
    for token in islice(model.generate(prompt, temp=0.0), new_tokens):
        ids.append(token)
        times.append(time.perf_counter())
    print(json.dumps({"ids": ids, "seconds": times[-1] - times[0]}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
