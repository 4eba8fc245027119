"""Ranks of a training group as processes of a test's own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

# What takes seconds to import. Ranks are forked from one process that has done so, and has started no threads.
IMPORTED = ["deepspeed", "transformers.models.llama.modeling_llama", "deepspeed.runtime.engine", "llm.zero"]


def on_ranks(function: Callable[..., None], args: tuple[Any, ...], ranks: int) -> None:
    """Call `function(rank, *args)` in as many processes, and wait for all; an exception of any is raised here.

    They have the environment of the first such call in this process.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    mp.start_processes(function, args=args, nprocs=ranks, start_method="forkserver")
