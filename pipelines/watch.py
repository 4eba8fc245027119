"""A run folder -> how the run is, live in the terminal. Nothing is written, and the run doesn't notice.

What is shown is whatever numbers the stage records at its steps (`pipelines.vitals`), drawn in text
(`pipelines.plots`), so that pretraining and reinforcement learning need no screens of their own.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster import mirror, objects
from cluster.errors import BadInput, Problem, StageFailed
from cluster.runs import Run, find_run, folder_at
from llm.pieces import harmless
from pipelines.plots import FILLS, braille, duration, number, parts_bar, span, sparkline
from pipelines.vitals import Curves, Vitals, Watcher

MARKS = {"done": ("✓", "green"), "running": ("▶", "bold cyan"), "cut off": ("✗", "red"), "not begun": ("·", "dim")}
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "white")
FIRST = ("loss", "held_out_loss", "reward", "kl")
LAST = ("learning_rate", "grad_norm", "tokens_per_s", "mfu", "data_wait_s")
NOT_PLOTTED = ("step", "seconds", "tokens", "flops_per_s", "bits_per_byte", "held_out_bits_per_byte")
PLOT_COLUMNS = 36  # of a terminal, at least, where there is more than one plot in a row
PLOT_LINES = (2, 6)
LINES_UNSEEN = 1_000  # of a frame that is not for a terminal: all that there is
SAMPLE_LINES = 4
CHECKPOINTS_SHOWN = 4
EVENTS_SHOWN = 3
LATE_S, LATE_STEPS = 60.0, 10.0  # after which a running stage that records no step is late


def watch(name: str, root: Path, stage: str | None, every: float, once: bool, as_json: bool) -> None:
    """Show the run of that name or path until Ctrl-C; one frame with `once`, or where output is no terminal.

    as_json: one object instead (`as_object`). stage: the one to look at, else the one at work or the last. every:
    seconds between two looks. BadInput if there is no such run; StageFailed if its storage doesn't answer.
    """
    if every <= 0:
        raise BadInput(Problem(f"--every must be above 0, got {every:g}", "give the seconds between two looks"))
    watcher, console = Watcher(run_of(name, root), stage), Console()
    if as_json:
        print(json.dumps(as_object(watcher.look(), time.time()), indent=1, allow_nan=False))
    elif once or not console.is_terminal:
        console.print(frame(watcher.look(), console, time.time()))
    else:
        console.print(_live(watcher, console, every))


def run_of(name: str, root: Path) -> Run:
    """The run of that name or path, one that has only been asked for included. BadInput names those that there are."""
    try:
        return find_run(name, root)
    except BadInput:
        folders = [*([] if "://" in name else [root / name]), folder_at(name)]
        begun = [Run(folder) for folder in folders if mirror.children(folder)]
        if not begun:
            raise
    begun[0].check_schema()
    return begun[0]


def frame(vitals: Vitals, console: Console, now: float, note: str = "") -> RenderableType:
    """All of it as one screen for `console`: plots take the lines that the rest leaves. now: seconds since 1970."""
    above = [*_stages(vitals, console.width, note), *_progress(vitals, console.width, now)]
    below = [
        *_step_parts(vitals.metrics, console.width),
        *_held_out(vitals),
        *_facts(vitals, now),
        *_sample(vitals, console),
    ]
    height = console.height if console.is_terminal else LINES_UNSEEN
    left = height - 1 - len(console.render_lines(Group(*above, *below)))
    return Group(*above, *_plots(vitals, console.width, left), *below)


def as_object(vitals: Vitals, now: float) -> dict[str, Any]:
    """The same for programs, in JSON values; numbers that aren't finite are null."""
    metrics = vitals.metrics
    found = {
        "run": vitals.run,
        "state": vitals.state,
        "stages": [one._asdict() for one in vitals.stages],
        "stage": vitals.stage.name if vitals.stage else None,
        "step": vitals.step,
        "steps": vitals.steps,
        "seconds_left": vitals.seconds_left,
        "seconds_since_last_step": now - vitals.modified if metrics.count else None,
        "last": metrics.last,
        "recent": {key: metrics.recent(key) for key in metrics.columns if key != "step"},
        "held_out": vitals.held_out[-1] if vitals.held_out else None,
        "sample": vitals.samples[-1] if vitals.samples else None,
        "events": dict(vitals.counts),
        "checkpoints": [{"step": one.step, "age_s": now - one.written} for one in vitals.checkpoints],
        "parts": vitals.parts,
    }
    return _finite(found)


# Live


def _live(watcher: Watcher, console: Console, every: float) -> RenderableType:
    """Look and draw until Ctrl-C; the last frame, which is left on the screen."""
    vitals = watcher.look()
    shown = frame(vitals, console, time.time())
    with suppress(KeyboardInterrupt), Live(shown, console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(shown, refresh=True)
            time.sleep(every)
            vitals, note = _look_again(watcher, vitals)
            shown = frame(vitals, console, time.time(), note)
    return shown


def _look_again(watcher: Watcher, before: Vitals) -> tuple[Vitals, str]:
    """How the run is; how it was, and why that is not now, while its storage is silent."""
    try:
        with objects.hurried():
            return watcher.look(), ""
    except StageFailed as error:
        return before, f"{str(error).splitlines()[0]}; what is shown is from before"


# Parts of a frame


def _stages(vitals: Vitals, width: int, note: str) -> Iterator[RenderableType]:
    yield Text().append(vitals.run, style="bold").append(f"  {vitals.state}", style=_style(vitals.state))
    line = Text()
    for stage in vitals.stages:
        said = Text(f"{MARKS[stage.state][0]} {stage.name}", style=_style(stage.state))
        if line and line.cell_len + 2 + said.cell_len > width:
            yield line
            line = Text()
        line = Text("  ").join([line, said]) if line else said
    yield line
    if note:
        yield Text(note, style="red")


def _style(state: str) -> str:
    return MARKS[state][1]


def _progress(vitals: Vitals, width: int, now: float) -> Iterator[RenderableType]:
    """The stage that is looked at: how far, how long still; what it said at its end, or lately."""
    if (stage := vitals.stage) is None:
        yield Text("no stage has begun yet", style="dim")
        return
    yield Text("\n").append(stage.name, style="bold").append(f"  {_how_far(vitals, now)}")
    if vitals.steps and vitals.metrics.count:
        yield _bar(vitals.step / vitals.steps, width, _style(stage.state))
    if stage.figure:
        yield Text(harmless(stage.figure))
    if not vitals.metrics.count and stage.state != "done":
        yield from (Text(harmless(said), style="dim", no_wrap=True, overflow="ellipsis") for said in vitals.log)


def _how_far(vitals: Vitals, now: float) -> str:
    stage, said = vitals.stage, []
    assert stage is not None
    if vitals.metrics.count:
        said.append(f"step {vitals.step:,}" + (f" of {vitals.steps:,}" if vitals.steps else ""))
    elif vitals.parts:
        said.append("parts done: " + ", ".join(f"{name} {count:,}" for name, count in vitals.parts.items()))
    if (left := vitals.seconds_left) is not None:
        said.append(f"{duration(left)} left")
    if _is_late(vitals, now):
        said.append(f"no step for {duration(now - vitals.modified)}")
    if stage.state == "done":
        said.append(f"done in {duration(stage.seconds)}")
    if stage.state == "cut off":
        said.append("cut off: nothing works on it, the same command goes on")
    return "  ".join(said) or stage.state


def _is_late(vitals: Vitals, now: float) -> bool:
    if vitals.seconds_left is None:
        return False
    return now - vitals.modified > max(LATE_S, LATE_STEPS * vitals.metrics.recent("seconds"))


def _bar(share: float, width: int, style: str) -> Text:
    room = max(1, width - 7)
    full = round(min(1.0, share) * room)
    return Text("█" * full, style=style).append("░" * (room - full), style="dim").append(f" {share:5.1%}", style="")


def _plots(vitals: Vitals, width: int, lines: int) -> Iterator[RenderableType]:
    """A plot of each number recorded, over all steps so far; of what doesn't fit into `lines` the last number."""
    curves = list(_curves(vitals).items())
    columns = max(1, min(len(curves), width // PLOT_COLUMNS))
    fitting = max(1, (lines - 1) // (PLOT_LINES[0] + 1)) * columns
    drawn, left = curves[:fitting], curves[fitting:]
    if drawn:
        yield _grid(drawn, columns, width, lines - bool(left))
    if left:
        said = ", ".join(f"{_named(key)} {_said(key, _latest(values))}" for key, values in left)
        yield Text(said, no_wrap=True, overflow="ellipsis")


def _grid(curves: list[tuple[str, Any]], columns: int, width: int, lines: int) -> RenderableType:
    """Plots side by side, as high as they can be."""
    rows = -(-len(curves) // columns)
    height = min(max(lines // rows - 1, PLOT_LINES[0]), PLOT_LINES[1])
    room = max(8, width // columns - 2)
    cells = [_plot(key, values, room, height, COLOURS[at % len(COLOURS)]) for at, (key, values) in enumerate(curves)]
    table = Table.grid(padding=(0, 2, 0, 0))
    for start in range(0, len(cells), columns):
        table.add_row(*cells[start : start + columns])
    return table


def _plot(key: str, values: Any, width: int, height: int, style: str) -> RenderableType:
    """Its title says the last number, and the least and the greatest where there is room."""
    low, high = span(values)
    title = Text(no_wrap=True).append(_named(key), style="bold").append(f" {_said(key, _latest(values))}")
    limits = f" ({_said(key, low)} … {_said(key, high)})"
    if title.cell_len + len(limits) <= width:
        title.append(limits, style="dim")
    title.truncate(width, overflow="ellipsis")
    return Group(title, *(Text(line, style=style) for line in braille(values, width, height)))


def _curves(vitals: Vitals) -> dict[str, Any]:
    """What is plotted, by its name: first what is learnt, last what it took."""
    metrics = vitals.metrics
    found: dict[str, Any] = {key: metrics[key] for key in metrics.columns if _is_plotted(key)}
    held_out = [record.get("held_out_loss") for record in vitals.held_out]
    if len(held_out) > 1:
        found["held_out_loss"] = [math.nan if loss is None else loss for loss in held_out]
    middle = [key for key in found if key not in (*FIRST, *LAST)]
    return {key: found[key] for key in (*FIRST, *middle, *LAST) if key in found}


def _is_plotted(key: str) -> bool:
    return key not in NOT_PLOTTED and not _is_memory(key) and (key in LAST or not _is_part(key))


def _is_part(key: str) -> bool:
    """Whether it is seconds of a step."""
    return key.endswith("_s") and not key.endswith("_per_s")


def _is_memory(key: str) -> bool:
    return key.endswith("_mb")


def _step_parts(metrics: Curves, width: int) -> Iterator[RenderableType]:
    """What a step's seconds went to, over the last steps, as one bar."""
    means = {_named(key): metrics.recent(key) for key in metrics.columns if _is_part(key)}
    parts = {name: seconds for name, seconds in means.items() if math.isfinite(seconds)}
    whole = metrics.recent("seconds")
    if not parts or not whole > 0:  # NaN where it isn't recorded
        return
    parts["the rest"] = max(0.0, whole - sum(parts.values()))
    bar, legend = Text(), Text(f"a step takes {number(whole)} s: ")
    for at, (name, taken) in enumerate(parts_bar(parts, max(8, width)).items()):
        fill, style = FILLS[at % len(FILLS)], COLOURS[at % len(COLOURS)]
        bar.append(fill * taken, style=style)
        legend.append(fill, style=style).append(f" {name} {parts[name] / sum(parts.values()):.1%}  ")
    yield Group(bar, legend)


def _held_out(vitals: Vitals) -> Iterator[RenderableType]:
    """The last held-out loss, in total and for each source."""
    if not vitals.held_out:
        return
    last = vitals.held_out[-1]
    numbers = (f"{_named(key)} {number(value)}" for key, value in _numbers(last) if key != "step")
    yield Text(f"held out after step {last.get('step', -1) + 1:,}: {', '.join(numbers)}")
    sources = last.get("sources")
    for name in sources if isinstance(sources, dict) else ():
        losses = [_of_source(record, name) for record in vitals.held_out]
        line = Text(f"  {harmless(name):<20.20} {number(losses[-1]):>8} ")
        yield line.append(sparkline(losses, 24) if len(losses) > 1 else "", style="cyan")


def _of_source(record: dict[str, Any], name: str) -> float:
    value = (record.get("sources") or {}).get(name)
    return value if isinstance(value, (int, float)) else math.nan


def _facts(vitals: Vitals, now: float) -> Iterator[RenderableType]:
    """What is one number, checkpoints with their ages, and what happened."""
    last = vitals.metrics.last
    said = [f"{_named(key)} {_said(key, value)}" for key, value in _numbers(last) if _is_fact(key)]
    if said:
        yield Text(", ".join(said))
    if vitals.checkpoints:
        newest = vitals.checkpoints[-CHECKPOINTS_SHOWN:]
        ages = (f"{one.step:,} ({duration(now - one.written)} ago)" for one in newest)
        yield Text(f"checkpoints after step {', '.join(ages)}")
    if vitals.counts:
        yield Text("events: " + ", ".join(f"{harmless(name)} {count}" for name, count in vitals.counts.items()))
    for event in vitals.events[-EVENTS_SHOWN:]:
        yield Text(f"  {harmless(_told(event))}", style="yellow", no_wrap=True, overflow="ellipsis")


def _is_fact(key: str) -> bool:
    return _is_memory(key) or key in ("tokens", "flops_per_s", "bits_per_byte")


def _told(event: dict[str, Any]) -> str:
    others = (f"{key} {value}" for key, value in event.items() if key not in ("step", "event"))
    return " ".join([f"step {event.get('step')}: {event.get('event')}", *others]).replace("\n", " ")


def _sample(vitals: Vitals, console: Console) -> Iterator[RenderableType]:
    """The last text that the model wrote as it learnt, its prompt set off."""
    if not vitals.samples:
        return
    last = vitals.samples[-1]
    prompt, text = (harmless(str(last.get(key, ""))) for key in ("prompt", "text"))
    written = Text().append(prompt, style="bold").append(text)
    yield Text(f"written after step {last.get('step', -1) + 1:,}:", style="dim")
    yield from written.wrap(console, console.width)[:SAMPLE_LINES]


# Numbers


def _numbers(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    found = ((key, value) for key, value in record.items() if not isinstance(value, bool))
    return [(key, value) for key, value in found if isinstance(value, (int, float))]


def _latest(values: Any) -> float:
    return next((value for value in reversed(values) if math.isfinite(value)), math.nan)


def _named(key: str) -> str:
    """A key as it is shown: without a unit that the number says."""
    bare = key.removesuffix("_s") if _is_part(key) else key.removesuffix("_mb")
    return harmless(bare.replace("_per_s", "/s").replace("_", " "))


def _said(key: str, value: float) -> str:
    if key == "mfu":
        return f"{value:.1%}"
    if _is_memory(key):
        return f"{number(value * 1e6)}B"
    return f"{number(value)} s" if _is_part(key) else number(value)


def _finite(value: Any) -> Any:
    """The same without numbers that JSON doesn't have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
