"""A rank that doesn't arrive is named within the deadline: pure, and with processes that are really stopped."""

import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from llm.watchdog import Sign, Watchdog, missing
from tests.nodes import free_port

DEADLINE_S = 2.0


def sign(rank: int, count: int, step: int, phase: str, part: int = 0) -> Sign:
    return Sign(rank, "node", 100 + rank, count, step, part, phase)


LATE = "didn't arrive, it is still in the"
NETWORK = "what they wait for is the network between them, or storage"


@pytest.mark.parametrize(
    ("counts", "places", "words"),
    [
        ([9, 9], ["7 backward", "7 data"], "1 didn't arrive, it is still waiting for the rows of step 7"),
        ([9, 9], ["8 data", "7 metrics"], "1 didn't arrive, it is still gathering the loss of step 7"),
        ([9, 9], ["7 backward 2", "7 backward 1"], f"1 {LATE} backward pass of step 7, micro-batch 1"),
        ([9, 9], ["7 backward 1", "7 forward 2"], f"0 {LATE} backward pass of step 7, micro-batch 1"),
        ([9, 9], ["7 metrics", "7 optimizer 3"], f"1 {LATE} optimizer's step of step 7, micro-batch 3"),
        ([5, 9], ["7 forward", "7 backward"], "0 gives no sign of life, in the forward pass of step 7"),
        ([9, 9], ["7 backward", "7 backward"], f"all ranks are in the backward pass of step 7: {NETWORK}"),
    ],
)  # fmt: skip
def test_the_rank_that_is_furthest_back_is_named(counts, places, words):
    at = [(int(step), phase, int(part[0]) if part else 0) for step, phase, *part in map(str.split, places)]
    before = {rank: sign(rank, 5, *one) for rank, one in enumerate(at)}
    after = {rank: sign(rank, counts[rank], *one) for rank, one in enumerate(at)}
    told = missing(before, after, world=2).removeprefix("rank ")
    assert re.sub(r" \(process 10\d on node\)", "", told) == words


def test_a_rank_that_never_began_is_named():
    one = {0: sign(0, 1, 0, "start")}
    assert missing(one, one | {0: sign(0, 2, 0, "start")}, world=2) == "rank 1 never began"


def stand_still(rank: int, folder: str, stopped: int) -> None:
    store = dist.TCPStore("127.0.0.1", int(os.environ["PORT"]), 3, rank == 0, timeout=timedelta(seconds=20))
    told = f"{folder}/{rank}"

    def late(words: str) -> None:
        with open(told, "w") as file:
            file.write(words)
        os._exit(0)

    dog = Watchdog(store, rank, 3, DEADLINE_S, late)
    dog.at(4, "data" if rank == stopped else "backward")
    if rank == stopped:
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 2])
def test_a_stopped_process_is_named_by_all_others(stopped, tmp_path, monkeypatch):
    monkeypatch.setenv("PORT", str(free_port()))
    context = mp.spawn(stand_still, args=(str(tmp_path), stopped), nprocs=3, join=False)
    others = [process for rank, process in enumerate(context.processes) if rank != stopped]
    try:
        for process in others:
            process.join(timeout=60)
        told = [(tmp_path / str(rank)).read_text() for rank in range(3) if rank != stopped]
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    assert all("no step for" in words for words in told)
    if stopped == 0:
        assert all("rank 0, which holds the group's store, doesn't answer" in words for words in told)
    else:
        who = f"rank {stopped} (process {context.processes[stopped].pid} on "
        assert [words for words in told if who not in words] == []
        assert all("gives no sign of life, waiting for the rows of step 4" in words for words in told)
