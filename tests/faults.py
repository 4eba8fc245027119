"""Faults on a real cluster: what is killed, when, and what it cost."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster import mirror
from cluster.runs import read_json
from pipelines.stage import NAMES
from tests.commands import CHECKOUT, command, records
from tests.nodes import Cluster, kill_all, title

ATTEMPTS = 6
ATTEMPT_S = 1200
GIVEN_UP_S = 45
GONE_S = 30
SAVE_S = 5.0  # in which a save comes
STEPS_PAST = 3  # steps behind the last checkpoint at the blow: something must be there to lose
TRAINING = ("pretrain", "sft", "reward", "rlhf")


# What is killed. Each gives False while there is nothing of its kind to kill yet.


def data_worker(nodes: Cluster) -> bool:
    return _kill_one(nodes, "ray::Read", "ray::Map", "ray::MapWorker")


def training_worker(nodes: Cluster) -> bool:
    return _kill_one(nodes, "RayTrainWorker")


def node(nodes: Cluster) -> bool:
    """A worker node with all that runs on it. Another one takes its place."""
    lost = nodes.nodes.pop()
    lost.kill()
    nodes.start_worker()
    return True


def raylet(nodes: Cluster) -> bool:
    """The process of a worker node that the cluster knows it by; the node's own processes notice."""
    lost = nodes.nodes.pop()
    kill_all(lost.named("raylet/raylet"))
    lost.process.wait(60)
    nodes.start_worker()
    return True


def driver(nodes: Cluster) -> bool:
    found = [one for one in nodes.processes() if "pipelines run recipe.yaml" in title(one)]
    kill_all(found)
    return bool(found)


def head(nodes: Cluster) -> bool:
    """The head, with no Redis behind it, and so all that the cluster knew. A new cluster takes its place."""
    lost, nodes.nodes, nodes.redis = nodes.nodes, [], None
    for one in lost:
        one.kill()
    nodes.start_head()
    for _ in lost[1:]:
        nodes.start_worker()
    return True


def head_with_redis(nodes: Cluster) -> bool:
    """The head alone. The workers wait for the next one, which finds in Redis what the last one knew."""
    nodes.nodes.pop(0).kill()
    nodes.nodes.insert(0, nodes.start_head())
    nodes.nodes.pop()  # which start_head put last
    return True


def link(nodes: Cluster) -> bool:
    """A worker node's link, for a moment: shorter than it takes to be given up."""
    lost = nodes.nodes[-1]
    lost.cut()
    time.sleep(4)
    lost.heal()
    return True


def long_cut(nodes: Cluster) -> bool:
    """A worker node's link, until the cluster has given the node up. Healed, it is told so and ends; another joins."""
    lost = nodes.nodes.pop()
    lost.cut()
    time.sleep(GIVEN_UP_S)
    lost.heal()
    lost.kill()
    nodes.start_worker()
    return True


def storage_gone(nodes: Cluster) -> bool:
    """The server of the object storage, which is started again after half a minute. Everyone waits for it."""
    assert nodes.storage is not None
    nodes.storage.server.kill()
    time.sleep(GONE_S)
    nodes.storage.server.start()
    return True


def workers_in_a_save(folder: Path) -> Callable[[Cluster], bool]:
    """Kills all training workers while a checkpoint in `folder` is but a temporary, which must be left behind."""

    def worker_in_a_save(nodes: Cluster) -> bool:
        found = [one for each in nodes.nodes for one in each.named("RayTrainWorker")]
        deadline = time.monotonic() + SAVE_S
        while found and time.monotonic() < deadline:
            if any(folder.glob(".partial-step-*")):
                kill_all(found)
                return any(folder.glob(".partial-step-*"))
        return False

    return worker_in_a_save


def _kill_one(nodes: Cluster, *names: str) -> bool:
    found = [one for each in nodes.nodes for name in names for one in each.named(name)]
    kill_all(found[:1])
    return bool(found)


WAITED_FOR = (link, storage_gone)  # which nothing has to be started again after

# When, and what it cost


@dataclass
class Fault:
    """Something killed in a stage once that is at work, and what that cost."""

    stage: str
    kill: Callable[[Cluster], bool]
    when: Callable[[Path, Cluster], bool] | None = None  # the stage is ready for it; None: in the midst of its work
    struck: float = 0.0  # time.time()
    at: int = 0  # steps that the stage had recorded
    lost: int = 0  # of which were made again
    inode: int = 0  # of the record of steps, which is replaced when the stage goes on from a checkpoint
    recovered_s: float = 0.0  # from the blow until the stage was further than before it, or done

    @property
    def kind(self) -> str:
        return self.kill.__name__.replace("_", " ")

    def strike(self, run: Path, nodes: Cluster) -> None:
        stage = run / self.stage
        if self.struck or not (self.when or at_work)(stage, nodes):
            return
        saved, (inode, steps), struck = saved_step(stage), steps_taken(stage, nodes), time.time()
        if self.kill(nodes):
            self.struck, self.at, self.inode = struck, steps, inode
            self.lost = steps - saved

    def watch(self, run: Path, nodes: Cluster) -> None:
        """Note when the stage was further than the blow had found it."""
        stage = run / self.stage
        if not self.struck or self.recovered_s:
            return
        inode, steps = steps_taken(stage, nodes)
        # Steps that workers of a killed driver still take are no recovery: they are made again.
        further = self.at and steps > self.at and (inode != self.inode or self.kill in WAITED_FOR)
        if further or mirror.seen(stage / "done.json"):
            self.recovered_s = time.time() - self.struck
            self.lost = self.lost if inode != self.inode else 0

    def row(self) -> str:
        others = "nothing" if self.kill in WAITED_FOR else "the stage's work so far"
        lost = f"{self.lost} of {self.at} steps" if self.stage in TRAINING else others
        return f"{self.stage:10} {self.kind:16} {lost:24} {self.recovered_s:6.0f} s"


def at_work(stage: Path, nodes: Cluster) -> bool:
    """Whether the stage is in the midst of it: some steps past a checkpoint if it trains, begun if it does not."""
    if not mirror.seen(stage / "state.json") or mirror.seen(stage / "done.json"):
        return False
    if stage.name in TRAINING:
        saved = saved_step(stage)
        return saved > 0 and steps_taken(stage, nodes)[1] >= saved + STEPS_PAST
    return True


def past(step: int) -> Callable[[Path, Cluster], bool]:
    """Whether the stage has recorded that many steps, and has some checkpoint to go back to."""
    return lambda stage, nodes: saved_step(stage) > 0 and steps_taken(stage, nodes)[1] >= step


def saved_step(stage: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    folder = stage / "checkpoints"
    if mirror.key_of(folder):
        found = [name for name in mirror.names(folder) if name.endswith("/manifest.json")]
    else:
        found = [path.parent.name for path in folder.glob("step-*/manifest.json")]
    return max([0, *(int(name[5:13]) for name in found if name.startswith("step-"))])


def steps_taken(stage: Path, nodes: Cluster) -> tuple[int, int]:
    """The record of steps, on the disk of whichever node writes it: its inode, and how many steps it holds."""
    found = [stage / "metrics.jsonl"]
    if mirror.key_of(stage):
        found = [disk / found[0].relative_to(mirror.cache().parent) for disk in nodes.caches()]
    written = [path for path in found if path.exists()]
    if not written:
        return 0, 0
    newest = max(written, key=lambda path: path.stat().st_mtime)
    return newest.stat().st_ino, len(records(newest))


def drive(nodes: Cluster, root: Path, logs: Path, faults: list[Fault], *words: str) -> list[int]:
    """Give the same `headwater submit micro WORDS` again until it succeeds, striking one after another; its codes."""
    codes: list[int] = []
    while (not codes or codes[-1] != 0) and len(codes) < ATTEMPTS:
        line = command("submit", "micro", "--cluster", nodes.address, "--runs", mirror.shown(root), *words)
        with open(logs / f"submit-{len(codes)}.log", "wb") as log:
            process = psutil.Popen(line, cwd=CHECKOUT, env=nodes.variables, stdout=log, stderr=subprocess.STDOUT)
        codes.append(_until_ended(process, nodes, root / "micro", faults))
    return codes


def _until_ended(process: psutil.Popen, nodes: Cluster, run: Path, faults: list[Fault]) -> int:
    deadline = time.monotonic() + ATTEMPT_S
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if due := next((fault for fault in faults if not fault.recovered_s), None):
                due.strike(run, nodes)
                due.watch(run, nodes)
            time.sleep(0.1)
        return process.wait(10)
    finally:
        kill_all([process])


def fingerprints(run: Path, names: tuple[str, ...] = NAMES) -> dict[str, str]:
    """The content hash of what each stage left."""
    return {name: read_json(run / name / "done.json")["fingerprint"] for name in names}


def same_ledger(one: Path, other: Path, stage: str = "pretrain") -> bool:
    """Whether both took the same rows in every step."""
    return records(one / stage / "ledger.jsonl") == records(other / stage / "ledger.jsonl")


def before_the_stage(run: Path, stage: str, target: Path) -> None:
    """A copy of the run in which `stage` and those after it have not begun."""
    later = NAMES[NAMES.index(stage) :]

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder) == run and name in (*later, "wandb", "jobs")]

    shutil.copytree(run, target, ignore=left_out)
