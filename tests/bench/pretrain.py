"""Benchmarks of pretraining: python -m tests.bench.pretrain [FIGURE ...], or `make bench-pretrain`.

    one_worker        tokens/s of one worker of two threads, against a plain loop; L8-512
    two_workers       tokens/s of two workers, ZeRO-1 and ZeRO-2, against DDP under torchrun; both models
    hf_trainer        tokens/s of two workers, against transformers.Trainer with DeepSpeed; L4-256, ZeRO-2
    data_wait         0.01 over the share of step time that is spent waiting for rows; L4-256
    save_stall        how many times as long torch.save holds up training as our save does; L8-512
    recovery          SIGKILL of a worker to the next optimizer step, against plain Ray Train; L4-256
    control_plane     step time on one node over that on eight, compute replaced by a sleep

L4-256 has 4 layers, 256 wide, and 4,096 tokens of vocabulary; L8-512 8, 512 and 8,192. A row has as many tokens as
the model is wide. Ours is `headwater run` itself (`drive`), timed by what it writes of its steps; the peers are
`loop`, `hf_trainer` and `ray_ddp`. All train in fp32, or in what HEADWATER_BENCH_DTYPE says (bf16). No figure counts
unless both arms had the same losses in the first steps, and before a figure in bf16 they must have them in fp32.

reads   what HEADWATER_BENCH_DATA names (`texts`); the Trainer's environment (`peer`)
writes  runs/bench/pretrain.json, and one line a figure: BENCH name value [low, high] bar B met

Ends with an error only where a comparison is invalid. All of it runs on two CPUs.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import command, peer, processes
from tests.bench.agreement import same_losses
from tests.bench.command import Scale
from tests.bench.control_plane import STEPS as NAPS
from tests.bench.control_plane import control_plane as steer
from tests.bench.measure import FOLDER, Figure, Turn, compare
from tests.bench.processes import Seen
from tests.bench.recovery import recovery as recover
from tests.bench.workload import L4_256, L8_512, WORK, Model, Plan, drive, prepared, recipe_settings

DTYPE = os.environ.get("HEADWATER_BENCH_DTYPE", "fp32")
WARM_UP = 4  # steps left out, in either arm
MEASURED = {L4_256.name: 30, L8_512.name: 12}
SAVE_EVERY, SAVES = 8, 4
WAIT_LIMIT = 0.01
SELDOM_S = 0.5  # between looks at records that tell themselves how long their step took
SHORTEST_STALL_S = 0.001  # below it nothing is told apart

Arm = Callable[[Plan], Turn]


def main(arguments: list[str]) -> int:
    return command.run("tests.bench.pretrain", FIGURES, arguments, FOLDER / "pretrain.json")


# The figures


def one_worker(scale: Scale) -> list[Figure]:
    plan = Plan(L8_512, workers=1, threads=2, steps=_steps(L8_512, scale), zero_stage=1, dtype=DTYPE)
    return [_against(f"one_worker_{plan.model.name}", 0.97, plan, plain, scale)]


def two_workers(scale: Scale) -> list[Figure]:
    plans = [_two_workers(model, stage, scale) for model in (L4_256, L8_512) for stage in (1, 2)]
    return [_against(f"two_workers_{plan.model.name}_zero{plan.zero_stage}", 1.0, plan, ddp, scale) for plan in plans]


def hf_trainer(scale: Scale) -> list[Figure]:
    plan = _two_workers(L4_256, 2, scale)
    return [_against(f"hf_trainer_{plan.model.name}_zero{plan.zero_stage}", 1.15, plan, trainer, scale)]


def data_wait(scale: Scale) -> list[Figure]:
    """Where steps are shortest. There is no peer; a turn is a training of its own."""
    plan = _two_workers(L4_256, 2, scale)
    shares = [train(plan).made["data_wait_share"] for _ in range(scale.pairs)]
    values = [WAIT_LIMIT / max(share, 1e-9) for share in shares]
    detail = {"data_wait_share": shares, "measured_steps": plan.steps - WARM_UP}
    return [Figure(f"data_wait_{plan.model.name}", WAIT_LIMIT / median(shares), min(values), max(values), 1.0, detail)]


def save_stall(scale: Scale) -> list[Figure]:
    """Seconds that a save holds up training, against `torch.save` by rank 0 while the other waits.

    That steps are slower while a save goes on beside them is no stall; it stands in the detail.
    """
    plan = Plan(L8_512, 2, 1, SAVE_EVERY * SAVES + 2, dtype=DTYPE, save_every=SAVE_EVERY)
    told: dict[str, list[float]] = {"our_slowdown_s_a_save": []}

    def agree(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        told["our_slowdown_s_a_save"].append(mine["slowdown_s"])
        return same_losses(mine, other, DTYPE) | told

    arms = (lambda: saving(plan), lambda: saving_plainly(plan))
    return [compare(f"save_stall_{plan.model.name}", 10.0, *arms, agree, scale.pairs)]


def recovery(scale: Scale) -> list[Figure]:
    return [recover(scale.pairs, DTYPE)]


def control_plane(scale: Scale) -> list[Figure]:
    return [steer(scale.pairs, scale.of(NAPS))]


FIGURES: dict[str, command.Measure] = {
    "one_worker": one_worker,
    "two_workers": two_workers,
    "hf_trainer": hf_trainer,
    "data_wait": data_wait,
    "save_stall": save_stall,
    "recovery": recovery,
    "control_plane": control_plane,
}


def _two_workers(model: Model, zero_stage: int, scale: Scale) -> Plan:
    return Plan(model, workers=2, threads=1, steps=_steps(model, scale), zero_stage=zero_stage, dtype=DTYPE)


def _steps(model: Model, scale: Scale) -> int:
    return WARM_UP + max(2, scale.of(MEASURED[model.name]))


def _against(name: str, bar: float, plan: Plan, theirs: Arm, scale: Scale) -> Figure:
    """How many times as many tokens/s as `theirs`; in fp32 both are seen to compute the same before anything else."""
    if plan.dtype != "fp32":
        exact = plan._replace(dtype="fp32", steps=WARM_UP + 2)
        same_losses(train(exact).made, theirs(exact).made, "fp32")
    agree = lambda mine, other: same_losses(mine, other, plan.dtype) | _told(plan, mine)  # noqa: E731
    return compare(name, bar, lambda: train(plan), lambda: theirs(plan), agree, scale.pairs)


def _told(plan: Plan, mine: dict[str, Any]) -> dict[str, Any]:
    return {
        "dtype": plan.dtype,
        "tokens_a_turn": plan.model.tokens * (plan.steps - WARM_UP),
        "our_data_wait_share": mine["data_wait_share"],
        "our_seconds_outside_steps_share": mine["outside_share"],
    }


# Our arms


def train(plan: Plan) -> Turn:
    """Seconds of the measured steps as the stage itself recorded them."""
    return turn_of(_pretrained(plan, SELDOM_S))


def turn_of(seen: list[Seen]) -> Turn:
    """outside_share: of the time from step to step, what no step counts as its own (writing records, mostly)."""
    measured = [one.record for one in seen[WARM_UP:]]
    seconds = sum(one["seconds"] for one in measured)
    between = seen[-1].at - seen[WARM_UP - 1].at
    made = {
        "losses": [one.record["loss"] for one in seen],
        "data_wait_share": sum(one["data_wait_s"] for one in measured) / seconds,
        "outside_share": 1 - seconds / between,
    }
    return Turn(seconds, made)


def saving(plan: Plan) -> Turn:
    """Seconds by which a save holds up the next step; the median of those of a training."""
    seen = _pretrained(plan)
    stall, slowdown = stalls(seen, plan.save_every or plan.steps)
    return Turn(stall, {"losses": [one.record["loss"] for one in seen], "slowdown_s": slowdown})


def stalls(seen: list[Seen], every: int) -> tuple[float, float]:
    """Seconds that a save holds up training, and those by which the steps until the next save are slower than before.

    A save is charged the larger of what is seen from outside, the time between two steps beyond the usual, and of
    what the next step says that it waited for saves, which may be within the step.
    """
    between = [later.at - one.at - later.record["seconds"] for one, later in pairwise(seen)]
    saves = range(every - 1, len(between), every)
    usual = median(gap for step, gap in enumerate(between) if step >= WARM_UP and step not in saves)
    stall = median(max(between[step] - usual, seen[step + 1].record["save_wait_s"]) for step in saves)
    seconds = [one.record["seconds"] for one in seen]
    calm = median(seconds[WARM_UP:every])
    after = [sum(seconds[step + 1 : step + 1 + every]) - calm * every for step in saves if step + every < len(seconds)]
    return max(stall, SHORTEST_STALL_S), median(after)


def _pretrained(plan: Plan, every_s: float = processes.LOOK_EVERY_S) -> list[Seen]:
    """The records of a pretraining from the first step to the last, and when each was written."""
    run = prepared(plan.model)
    stage = run / "pretrain"
    shutil.rmtree(stage, ignore_errors=True)
    words = drive(plan.model, run, "pretrain", "pretrain", recipe_settings(plan.model, **plan.settings()))
    return processes.followed(words, WORK / "ours.log", stage / "metrics.jsonl", every_s=every_s)


# The peers' arms


def plain(plan: Plan) -> Turn:
    return _turn(processes.answer(processes.python("tests.bench.loop", plan.order())))


def ddp(plan: Plan) -> Turn:
    return _turn(processes.answer(processes.torchrun(plan.workers, plan.order(), "-m", "tests.bench.loop")))


def trainer(plan: Plan) -> Turn:
    script, python = str(Path(__file__).with_name("hf_trainer.py")), str(peer.python("hf_trainer"))
    words = processes.torchrun(plan.workers, plan.order(), script, interpreter=python)
    return _turn(processes.answer(words, peer.environment() | {"DS_ACCELERATOR": "cpu"}))


def saving_plainly(plan: Plan) -> Turn:
    order = plan.order() | {"save_to": WORK / "state.pt"}
    said = processes.answer(processes.torchrun(plan.workers, order, "-m", "tests.bench.loop"))
    return Turn(median(said["saves"]), said)


def _turn(said: dict[str, Any]) -> Turn:
    return Turn(sum(said["seconds"][WARM_UP:]), said)


if __name__ == "__main__":
    command.on_few_cpus()
    sys.exit(main(sys.argv[1:]))
