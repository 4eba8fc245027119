"""Benchmarks of generation: python -m tests.bench.serve [FIGURE ...], or `make bench-serve`.

    static            tokens/s of 32 requests at once, equal lengths, against one batch of `generate`; each model
    arrivals          96 requests of 16 to 128 new tokens that come over time, against static batches; each model
    continuous        32 requests at once, against transformers' continuous batching, tuned; each model
    prefix            16 requests that begin with the same 200 tokens, against no sharing of prefixes; SmolLM2
    one_client        decoding for one client, against llama.cpp at the same precision; SmolLM2
    http              streaming to 16 clients, against `transformers serve`, tuned; L4-256, SmolLM2
    http_engine       streaming to 16 clients, against the engine alone; L4-256, SmolLM2
    first_token       10 ms (p50) and 30 ms (p99) over what Ray Serve adds to the time to the first token; L4-256
    goodput           share of the requests let in that are answered before their deadline, at twice the capacity

L4-256 has 4 layers, 256 wide, 4,096 tokens of vocabulary; L8-512 8, 512, 8,192 (34 M parameters); SmolLM2 135 M
(`served`). All generate greedily in fp32 on two threads, and no figure counts unless both sides gave the same answers,
token for token (over HTTP: the same text). The engine's figures are measured in this process, those of the service
with a service started for each turn (`serve_engine`, `serve_http`).

reads   what HEADWATER_BENCH_DATA names (`texts`); the environments of the peers (`peer`)
writes  runs/bench/serve.json, and one line a figure: BENCH name value [low, high] bar B met

Ends with an error only where a comparison is invalid. All of it runs on two CPUs.
"""

from __future__ import annotations

import sys

import torch

from tests.bench import command, serve_engine, serve_http
from tests.bench.measure import FOLDER

FIGURES: dict[str, command.Measure] = {
    "static": serve_engine.static,
    "arrivals": serve_engine.arrivals,
    "continuous": serve_engine.continuous,
    "prefix": serve_engine.prefix,
    "one_client": serve_engine.one_client,
    "http": serve_http.http,
    "http_engine": serve_http.http_engine,
    "first_token": serve_http.first_token,
    "goodput": serve_http.goodput,
}


def main(arguments: list[str]) -> int:
    torch.set_num_threads(command.CPUS)
    return command.run("tests.bench.serve", FIGURES, arguments, FOLDER / "serve.json")


if __name__ == "__main__":
    command.on_few_cpus()
    sys.exit(main(sys.argv[1:]))
