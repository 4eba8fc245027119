"""What it costs to steer training on more and more nodes: step time on one node over step time on eight.

Each node is a `ray start` of its own on this machine, with two CPUs and one worker. The workers sleep where they would
compute; the stream, the collectives, the ledger and the checkpoints are real. The rows of a step grow with the nodes.
"""

from __future__ import annotations

import shutil

from llm.presets import Preset
from tests.bench import processes
from tests.bench.measure import Figure, Invalid, ratio
from tests.bench.workload import L4_256, WORK, Model, Plan, drive, prepared, recipe_settings, rows_of
from tests.commands import records
from tests.nodes import Cluster, cluster

BAR = 0.95
NODES = (1, 2, 4, 8)
CPUS = 2
ROWS = 2  # of a node in a step
NAP_S = 0.1
STEPS, WARM_UP, SAVE_EVERY = 220, 20, 50
SEED = 1337


def control_plane(turns: int, steps: int = STEPS) -> Figure:
    """Efficiency on the most nodes, with the seconds of a step on each number of them."""
    prepared(L4_256)
    seconds: dict[int, list[float]] = {number: [] for number in NODES}
    for _ in range(turns):
        with cluster(workers=0) as nodes:
            for number in NODES:
                _grow(nodes, number)
                seconds[number].append(_step_seconds(nodes, number, steps))
    value, low, high = ratio(seconds[NODES[-1]], seconds[NODES[0]])
    return Figure("control_plane_8_nodes", value, low, high, BAR, {"nap_s": NAP_S, "step_s_by_nodes": seconds})


def _grow(nodes: Cluster, number: int) -> None:
    """To so many nodes beside the head."""
    while len(nodes.nodes) < number + 1:
        nodes.start_worker(CPUS)


def _step_seconds(nodes: Cluster, number: int, steps: int) -> float:
    """Seconds from one step to the next, saves included, with a worker on each of `number` nodes."""
    plan = _plan(number, steps)
    run = prepared(L4_256)
    stage = run / "pretrain"
    shutil.rmtree(stage, ignore_errors=True)
    settings = recipe_settings(plan.model, **plan.settings() | {"cpus_per_worker": CPUS * 0.75})
    words = drive(plan.model, run, "pretrain", "pretrain", settings | {"name": run.name}, NAP_S)
    joined = nodes.variables | {"RAY_ADDRESS": f"{nodes.head_ip}:{nodes.port}"}
    seen = processes.followed(words, WORK / f"control-{number}.log", stage / "metrics.jsonl", joined)
    _check_ledger(plan, [one["rows"] for one in records(stage / "ledger.jsonl")])
    measured = seen[WARM_UP:]
    return (measured[-1].at - measured[0].at) / (len(measured) - 1)


def _plan(number: int, steps: int) -> Plan:
    shape = Preset(layers=1, hidden=16, heads=2, kv_heads=2, context=L4_256.shape.context)
    model = Model("nap", shape, L4_256.vocabulary, ROWS * number)
    return Plan(model, workers=number, threads=1, steps=steps, save_every=SAVE_EVERY)


def _check_ledger(plan: Plan, rows: list[list[int]]) -> None:
    """Each step took exactly its rows, or Invalid."""
    expected = [rows_of(L4_256._replace(rows=plan.model.rows), step, SEED) for step in range(plan.steps)]
    wrong = [step for step in range(min(len(rows), plan.steps)) if sorted(rows[step]) != sorted(expected[step])]
    if wrong or len(rows) != plan.steps:
        raise Invalid(f"the ledger has {len(rows)} steps of {plan.steps}; other rows in steps {wrong[:5]}")
