"""The command line: `headwater VERB ...`, the same as `python -m pipelines VERB ...`."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from cluster import mirror
from cluster.errors import BadInput, HeadwaterError, Problem, StageFailed, Stopped
from cluster.runs import Run, find_run, folder_at, runs_root

RUN_HELP = "a run's name or folder"
WRITERS = ("pretrain", "sft", "rlhf")  # stages whose model writes text
DEFAULT_OPENINGS = ("Once upon a time",)
MODEL_HELP = "a run's name or folder, or any Hugging Face model folder"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code that scripts rely on."""
    parser = _parser()
    chosen, rest = parser.parse_known_args(arguments)
    _take_settings(parser, chosen, rest)
    from cluster.progress import warnings_shown

    try:
        with warnings_shown():
            chosen.verb(chosen)
        return 0
    except HeadwaterError as error:
        _complain(error)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _complain(StageFailed(Problem(f"the disk is full: {error}", "free space there; the same command goes on")))
        return StageFailed.exit_code
    except KeyboardInterrupt:
        _complain(Stopped("stopped"))
        return Stopped.exit_code


def _take_settings(parser: argparse.ArgumentParser, chosen: argparse.Namespace, rest: list[str]) -> None:
    """Settings may stand after flags too (`run tiny --to shards name=mine`), where argparse no longer looks."""
    strange = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(chosen, "overrides")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        chosen.overrides = [*chosen.overrides, *rest]


def _complain(error: HeadwaterError) -> None:
    print(f"headwater: {error.title}", file=sys.stderr)
    for problem in error.problems:
        print(f"  - {problem}", file=sys.stderr)


# The verbs


def run(chosen: argparse.Namespace) -> None:
    """Drive the stages of a recipe one after another."""
    from pipelines import report
    from pipelines.run import execute

    journey = _journey(chosen, chosen.first, chosen.last)
    if chosen.dry_run:
        report.show_plan(journey, as_json=chosen.json)
        return
    before = [step.stage.name for step in journey.plan() if step.runs] if mirror.exists(journey.run.lineage) else None
    with _kept_output(journey.run):
        execute(journey)
    if before == []:
        print(f"{mirror.shown(journey.run.path)}: every stage is done, nothing to do", file=sys.stderr)
    report.show_run(journey.run, as_json=chosen.json)


def one_stage(chosen: argparse.Namespace) -> None:
    """Run a single stage of a recipe."""
    chosen.first = chosen.last = chosen.stage
    run(chosen)


def submit(chosen: argparse.Namespace) -> None:
    """Run a recipe as a Ray job on a cluster, or attach to the attempt that is running."""
    from cluster.jobs import Jobs, cluster_address
    from pipelines import report
    from pipelines.submit import submit as submit_journey

    first, last = (chosen.stage, chosen.stage) if chosen.stage else (chosen.first, chosen.last)
    journey = _journey(chosen, first, last, on_cluster=True)
    if chosen.dry_run:
        report.show_plan(journey, as_json=chosen.json)
        return
    submit_journey(journey, Jobs(cluster_address(chosen.cluster)), wait=not chosen.no_wait)


def status(chosen: argparse.Namespace) -> None:
    """What works on a run and how far it is."""
    from pipelines.control import jobs_if_named, show_status

    root, jobs = runs_root(chosen.runs), jobs_if_named(chosen.cluster)
    run = _run_if_there(chosen.run, root) if chosen.run else None
    attempts = jobs.attempts(chosen.run) if jobs else []
    if chosen.run and run is None and not attempts:
        find_run(chosen.run, root)  # says which runs there are
    show_status(run, attempts, chosen.json)


def logs(chosen: argparse.Namespace) -> None:
    """What a run, a stage or a rank printed."""
    from pipelines.control import jobs_if_named, show_logs
    from pipelines.submit import follow

    run = _run_if_there(chosen.run, runs_root(chosen.runs))
    jobs = None if run else jobs_if_named(chosen.cluster)
    attempts = jobs.attempts(chosen.run) if jobs else []
    if jobs and attempts:
        follow(jobs, attempts[-1])
        return
    run = run or find_run(chosen.run, runs_root(chosen.runs))
    show_logs(run, chosen.stage, chosen.rank, chosen.lines, chosen.follow)


def stop(chosen: argparse.Namespace) -> None:
    """Save a run's state and end what works on it."""
    from pipelines.control import jobs_if_named
    from pipelines.control import stop as stop_run

    stop_run(chosen.run, runs_root(chosen.runs), jobs_if_named(chosen.cluster))


def doctor(chosen: argparse.Namespace) -> None:
    """Look at this machine, or at every node of a cluster."""
    from pipelines import doctor as findings

    root = runs_root(chosen.runs)
    if chosen.cluster:
        from cluster.jobs import Jobs, cluster_address

        findings.submit(_absolute_root(chosen), Jobs(cluster_address(chosen.cluster)), chosen.json)
    elif chosen.address:
        findings.show(findings.findings_on_cluster(root, chosen.address), chosen.json)
    else:
        findings.show(findings.findings_here(root), chosen.json)


def plan(chosen: argparse.Namespace) -> None:
    """What a recipe will take: memory, GPUs, hours, money, disk."""
    from pipelines.plan import Options, show
    from pipelines.recipe import load_recipe

    recipe = load_recipe(chosen.recipe, (*chosen.overrides, *chosen.set))
    show(recipe, Options(chosen.gpu, chosen.price, chosen.mfu, chosen.api_price), chosen.json)


def show_report(chosen: argparse.Namespace) -> None:
    """What a run has made so far."""
    from pipelines import report

    report.show_run(find_run(chosen.run, runs_root(chosen.runs)), as_json=chosen.json)


def watch(chosen: argparse.Namespace) -> None:
    """Show how a run is, live."""
    from pipelines.watch import watch as watch_run

    watch_run(chosen.run, runs_root(chosen.runs), chosen.stage, chosen.every, chosen.once, chosen.json)


def complete(chosen: argparse.Namespace) -> None:
    """Continue a prompt, token by token."""
    from pipelines.complete import complete as complete_prompt

    complete_prompt(
        model_folder(chosen.model, runs_root(chosen.runs), chosen.stage),
        chosen.prompt,
        params=_sampling(chosen),
        top=chosen.top,
        as_json=chosen.json,
    )


def fill(chosen: argparse.Namespace) -> None:
    """Fill in the masked words of a text."""
    from pipelines.fill import fill as fill_text

    folder = model_folder(chosen.model, runs_root(chosen.runs), "pretrain")
    fill_text(folder, chosen.text, top=chosen.top, as_json=chosen.json)


def chat(chosen: argparse.Namespace) -> None:
    """Talk with a model, or with a service."""
    from pipelines.chat import chat as talk

    remote = chosen.target.startswith(("http://", "https://"))
    target = chosen.target if remote else model_folder(chosen.target, runs_root(chosen.runs), chosen.stage)
    talk(target, params=_sampling(chosen), model_name=chosen.model_name, system=chosen.system)


def look_tokens(chosen: argparse.Namespace) -> None:
    """Show how a text splits into tokens."""
    from pipelines.look import look_tokens as look

    look(tokenizer_folder(chosen.run, runs_root(chosen.runs)), chosen.text, chosen.json)


def look_filters(chosen: argparse.Namespace) -> None:
    """Show what `ingest` dropped, and why."""
    from pipelines import filters

    run = find_run(chosen.run, runs_root(chosen.runs))
    ingest = run.stage("ingest")
    if (done := ingest.done()) is None:
        raise BadInput(Problem(f"ingest has not finished in {run.path}", "run it first: headwater ingest RECIPE"))
    filters.show(filters.of_run(ingest.path, done["metrics"]), done["metrics"], chosen.json)


def serve(chosen: argparse.Namespace) -> None:
    """Deploy a model on Ray Serve until stopped."""
    from cluster.local import ray_session
    from pipelines.run import stoppable
    from pipelines.schema import ClusterSettings

    root = runs_root(chosen.runs)
    folder, recipe = model_folder(chosen.model, root, chosen.stage), _recipe_of(chosen.model, root)
    name = chosen.model_name or _model_name(chosen.model)
    models = {name: folder, **_further_models(chosen.also, root)}
    settings = _serve_settings(chosen, recipe)
    where = recipe.cluster if recipe else ClusterSettings()
    with stoppable(), ray_session(where.address, where.object_store_mb):
        from pipelines.deploy import service_args
        from serve import app
        from serve.options import Options

        options = Options(**service_args(settings))
        address = app.start(models, settings.host, settings.port, options=options, insecure=chosen.insecure)
        try:
            _use(address, name, chosen, recipe)
        finally:
            app.stop()


def keys_add(chosen: argparse.Namespace) -> None:
    """Make a key of the service and show it, this once."""
    from datetime import UTC, datetime

    from pipelines.keys import expiry, show_new
    from serve import keys

    file = _keys_file(chosen)
    limits = {name: getattr(chosen, name) for name in keys.Limits.model_fields}
    ends = expiry(chosen.expires, datetime.now(UTC)) if chosen.expires else None
    show_new(chosen.name, keys.add(file, chosen.name, ends, limits), file, chosen.json)


def keys_list(chosen: argparse.Namespace) -> None:
    """Show the service's keys and their budgets."""
    from pipelines.keys import show
    from serve import keys

    file = _keys_file(chosen)
    show([key.model_dump(exclude={"sha256"}) for key in keys.stored(file)], file, chosen.json)


def keys_revoke(chosen: argparse.Namespace) -> None:
    """End a key."""
    from serve import keys

    file = _keys_file(chosen)
    keys.revoke(file, chosen.name)
    print(json.dumps({"revoked": chosen.name, "file": str(file)}) if chosen.json else f"{chosen.name} is revoked")


def _keys_file(chosen: argparse.Namespace) -> Path:
    from serve.keys import default_file

    return Path(chosen.keys).expanduser().absolute() if chosen.keys else default_file()


def render_manifests(chosen: argparse.Namespace) -> None:
    """Write a recipe's Kubernetes manifests into a folder, or print them."""
    from cluster import manifests
    from pipelines.deploy import order
    from pipelines.recipe import load_recipe

    recipe = load_recipe(chosen.recipe, (*chosen.overrides, *chosen.set))
    node = manifests.Node(chosen.pod_cpus, chosen.pod_gpus, chosen.memory_per_cpu)
    documents = manifests.render(order(recipe, chosen.runs, node, chosen.image), chosen.overlay)
    if chosen.out is None:
        print(manifests.as_yaml(documents), end="")
        return
    for name in manifests.write(documents, Path(chosen.out).expanduser().absolute()):
        print(Path(chosen.out, name))


def _use(address: str, name: str, chosen: argparse.Namespace, recipe: Any) -> None:
    """Try the service over HTTP, or leave it to its clients."""
    from pipelines import trial

    trial.wait_until_ready(address)
    if not chosen.trial:
        print(f"{name} is served at {address} (Ctrl-C stops it); try:\n{trial.example(address, name)}", flush=True)
        signal.pause()
    root = runs_root(chosen.runs)
    others = {stage: path for stage in ("pretrain", "sft") if (path := _made_by(stage, chosen.model, root))}
    if recipe and "sft" in others:
        trial.ask_questions(address, name, recipe.questions, others)
    else:
        trial.complete_openings(address, name, recipe.openings if recipe else DEFAULT_OPENINGS)


# What arguments mean


def _journey(chosen: argparse.Namespace, first: str, last: str, on_cluster: bool = False) -> Any:
    from pipelines.recipe import load_recipe
    from pipelines.run import Journey

    recipe = load_recipe(chosen.recipe, (*chosen.overrides, *chosen.set))
    root = _absolute_root(chosen) if on_cluster or _in_ray_job() else runs_root(chosen.runs)
    run = Run(root / recipe.name)
    if not on_cluster:  # which alone may have the credentials
        run.check_access()
    return Journey(recipe, run, first, last, chosen.verify)


def _absolute_root(chosen: argparse.Namespace) -> Path:
    """The runs root for a Ray job, whose working directory is thrown away afterwards."""
    root = chosen.runs or os.environ.get("HEADWATER_RUNS")
    if not (root and (Path(root).is_absolute() or "://" in root)):
        remedy = "give a path or s3://BUCKET/PREFIX: its working directory is thrown away afterwards"
        raise BadInput(Problem(f"a Ray job needs an absolute --runs, got {root!r}", remedy))
    return runs_root(root)


def _in_ray_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _kept_output(run: Run) -> AbstractContextManager[None]:
    """In a Ray job, what is printed goes into the run folder as well: the job's own log dies with the cluster."""
    from cluster.jobs import ATTEMPT_VARIABLE
    from cluster.progress import copied_output

    if not _in_ray_job():
        return nullcontext()
    attempt = os.environ.get(ATTEMPT_VARIABLE) or f"job-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    return copied_output(run.jobs / f"{attempt}.log")


def _run_if_there(name: str, root: Path) -> Run | None:
    """The run of that name or path, None where the root does not hold it: it may be known to the cluster alone."""
    try:
        return find_run(name, root)
    except (BadInput, StageFailed):
        return None


def model_folder(name_or_path: str, root: Path, stage: str | None = None) -> Path:
    """The Hugging Face folder that RUN|MODEL means; of a run, what `stage` made, or else the last stage done."""
    if direct := _published(name_or_path, "config.json"):
        return direct
    for name in [stage] if stage else reversed(WRITERS):
        if folder := _made_by(name, name_or_path, root):
            return folder
    found = find_run(name_or_path, root)
    raise BadInput(
        Problem(
            f"run '{found.name}' has no finished model of {stage or 'any stage'} yet", f"headwater report {found.name}"
        )
    )


def _published(name_or_path: str, file: str) -> Path | None:
    """The folder at that path or address, on this machine, if it holds `file`."""
    folder = folder_at(name_or_path)
    if mirror.key_of(folder) and mirror.is_published(folder):
        folder = mirror.here(folder)
    return folder if (folder / file).is_file() else None


def _made_by(stage: str, run: str, root: Path) -> Path | None:
    """The model that a stage of a run has finished, if there is one."""
    if _published(run, "config.json"):
        return None
    folder = find_run(run, root).stage(stage)
    return mirror.here(folder.path / "model") if folder.done() else None


def tokenizer_folder(name_or_path: str, root: Path) -> Path:
    """The tokenizer that RUN|MODEL means; a run has one before it has a model."""
    if direct := _published(name_or_path, "tokenizer.json"):
        return direct
    found = find_run(name_or_path, root)
    if found.stage("tokenizer").done() is None:
        raise BadInput(
            Problem(f"run '{found.name}' has no tokenizer yet", f"headwater run {found.name} --to tokenizer")
        )
    return mirror.here(found.stage("tokenizer").path / "tokenizer")


def _recipe_of(name: str, root: Path) -> Any:
    """The recipe that a run was made with; None for a model folder that belongs to no run."""
    from pipelines.recipe import load_recipe

    if _published(name, "config.json"):
        return None
    return load_recipe(str(mirror.fetch(find_run(name, root).path / "recipe.yaml")))


def _model_name(name_or_path: str) -> str:
    return folder_at(name_or_path).name


def _serve_settings(chosen: argparse.Namespace, recipe: Any) -> Any:
    from pipelines.schema import ServeSettings
    from pipelines.settings import check

    values = (recipe.serve if recipe else ServeSettings()).model_dump()
    given = {key: getattr(chosen, key, None) for key in ServeSettings.model_fields}
    if given["keys"] is not None:
        given["keys"] = str(Path(given["keys"]).expanduser().absolute())
    known = {key: value for key, value in given.items() if value is not None}
    return check(ServeSettings, {**values, **known}, "the command line")


def _further_models(also: Sequence[str], root: Path) -> dict[str, Path]:
    """The folders of models given as NAME=MODEL."""
    parts = [text.partition("=") for text in also]
    wrong = [text for text, (name, _, model) in zip(also, parts, strict=True) if not name or not model]
    if wrong:
        raise BadInput(Problem(f"--also {wrong[0]} names no model", "give it as NAME=MODEL, with a run or a folder"))
    return {name: model_folder(model, root) for name, _, model in parts}


def _sampling(chosen: argparse.Namespace) -> Any:
    from llm.sampling import SamplingParams

    names = {field.name for field in dataclasses.fields(SamplingParams)}
    values = {key: value for key, value in vars(chosen).items() if key in names and value is not None}
    try:
        return SamplingParams(**{**values, "stop": tuple(chosen.stop)})
    except ValueError as error:
        raise BadInput(Problem(str(error), "see --help")) from None


# The parser


def _parser() -> argparse.ArgumentParser:
    from pipelines.stage import NAMES

    parser = argparse.ArgumentParser(
        prog="headwater", description="From raw text to a served language model on Ray: one recipe, one run folder."
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    _add_run(verbs, NAMES)
    for name in NAMES:
        _add_stage(verbs, name)
    _add_submit(verbs, NAMES)
    _add_control(verbs, NAMES)
    _add_doctor(verbs)
    _add_plan(verbs)
    _add_report(verbs)
    _add_watch(verbs, NAMES)
    _add_complete(verbs)
    _add_fill(verbs)
    _add_chat(verbs)
    _add_serve(verbs)
    _add_keys(verbs)
    _add_look(verbs)
    _add_k8s(verbs)
    return parser


def _verb(verbs: Any, name: str, verb: Any, text: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(verb=verb)
    parser.add_argument(
        "--runs", metavar="ROOT", help="folder of all runs, or s3://BUCKET/PREFIX (HEADWATER_RUNS, else runs/)"
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    return parser


def _add_run(verbs: Any, names: tuple[str, ...]) -> None:
    parser = _verb(verbs, "run", run, "run a recipe's stages, skipping what is done and resuming what was cut off")
    _add_recipe(parser)
    _add_range(parser, names)


def _add_range(parser: argparse.ArgumentParser, names: tuple[str, ...]) -> None:
    parser.add_argument("--from", dest="first", choices=names, default=names[0], help="first stage to consider")
    parser.add_argument("--to", dest="last", choices=names, default=names[-1], help="last stage to consider")


def _add_submit(verbs: Any, names: tuple[str, ...]) -> None:
    parser = _verb(verbs, "submit", submit, "run a recipe as a Ray job, or attach to the attempt that is running")
    _add_recipe(parser)
    _add_range(parser, names)
    _add_cluster(parser)
    parser.add_argument("--stage", choices=names, help="this stage alone")
    parser.add_argument("--no-wait", action="store_true", help="submit and return, without following the output")


def _add_control(verbs: Any, names: tuple[str, ...]) -> None:
    parser = _verb(verbs, "status", status, "what works on a run and how far it is")
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run's name; all attempts of the cluster without one")
    _add_cluster(parser)
    parser = _verb(verbs, "logs", logs, "what a run, a stage or a rank printed, from the run folder or the cluster")
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--stage", choices=names, help="the log of this stage (the last attempt's output)")
    parser.add_argument("--rank", type=int, help="the log of this training worker, from 0 (the driver's)")
    parser.add_argument("--lines", type=int, default=200, help="how many lines of its end")
    parser.add_argument("--follow", action="store_true", help="go on as it grows, until Ctrl-C")
    _add_cluster(parser)
    parser = _verb(verbs, "stop", stop, "save a run's state and end what works on it")
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    _add_cluster(parser)


def _add_doctor(verbs: Any) -> None:
    parser = _verb(verbs, "doctor", doctor, "look at this machine, or at every node of a cluster, before it is used")
    parser.add_argument("--cluster", metavar="ADDRESS", help="examine a cluster from within, by its Jobs API")
    parser.add_argument(
        "--address", metavar="ADDRESS", help="examine the cluster that this machine is a node of (auto)"
    )


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    text = "address of the cluster's Jobs API, http://HEAD:8265 (RAY_API_SERVER_ADDRESS, else RAY_ADDRESS)"
    parser.add_argument("--cluster", metavar="ADDRESS", help=text)


def _add_stage(verbs: Any, name: str) -> None:
    parser = _verb(verbs, name, one_stage, f"run the stage {name} alone")
    parser.set_defaults(stage=name)
    _add_recipe(parser)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, for example name=mine")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="the same, as a flag")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and what would run, and why")
    parser.add_argument("--verify", action="store_true", help="compare a folder's bytes, not names, sizes and times")


def _add_plan(verbs: Any) -> None:
    from cluster.plan import GPUS, MFU

    parser = _verb(verbs, "plan", plan, "what a recipe will take before it starts: memory, GPUs, hours, money, disk")
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, for example pretrain.workers=16")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="the same, as a flag")
    parser.add_argument("--gpu", metavar="NAME", default="H100", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--price", type=float, metavar="USD", help="what a GPU costs an hour")
    parser.add_argument("--mfu", type=float, metavar="SHARE", default=MFU, help="of the GPU's peak that is reached")
    parser.add_argument("--api-price", type=float, metavar="USD", help="what an API asks for a million tokens")


def _add_report(verbs: Any) -> None:
    parser = _verb(verbs, "report", show_report, "show what a run has made")
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)


def _add_watch(verbs: Any, names: tuple[str, ...]) -> None:
    parser = _verb(verbs, "watch", watch, "show a run live in the terminal, until Ctrl-C; the run doesn't notice")
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--stage", choices=names, help="the stage to look at (the one at work, else the last)")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="time between two looks")
    parser.add_argument("--once", action="store_true", help="print one frame and end, as where there is no terminal")


def _add_complete(verbs: Any) -> None:
    parser = _verb(verbs, "complete", complete, "continue a prompt, token by token")
    _add_model(parser, "model", MODEL_HELP)
    parser.add_argument("prompt", help="the text to continue")
    _add_sampling(parser, max_new_tokens=64)
    parser.add_argument("--top", type=int, default=0, metavar="N", help="show the N likeliest tokens at each step")


def _add_fill(verbs: Any) -> None:
    parser = _verb(verbs, "fill", fill, "the likeliest words for each [MASK] in a text, each filled by itself")
    parser.add_argument("model", metavar="RUN|MODEL", help=MODEL_HELP)
    parser.add_argument("text", help='for example "The cat [MASK] on the mat."')
    parser.add_argument("--top", type=int, default=5, metavar="N", help="show the N likeliest words")


def _add_chat(verbs: Any) -> None:
    parser = _verb(verbs, "chat", chat, "talk with a model, with history; /new forgets it, /quit ends")
    _add_model(parser, "target", f"{MODEL_HELP}; or the address of a service, http://HOST:PORT/v1")
    parser.add_argument("--model-name", help="which of the service's models (the first)")
    parser.add_argument("--system", metavar="TEXT", help="a system prompt, never forgotten")
    _add_sampling(parser, max_new_tokens=48)


def _add_model(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    parser.add_argument(name, metavar="RUN|MODEL", help=text)
    parser.add_argument("--stage", choices=WRITERS, help="whose model of a run (the last one that is done)")


def _add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="tokens to write, at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest tokens, 0 from all")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass")
    parser.add_argument("--min-p", type=float, default=0.0, help="drop tokens below this share of the likeliest")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same text")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")


def _add_serve(verbs: Any) -> None:
    parser = _verb(verbs, "serve", serve, "deploy a model on Ray Serve with an OpenAI-compatible API")
    _add_model(parser, "model", MODEL_HELP)
    parser.add_argument("--model-name", help="name that clients use (the run's)")
    parser.add_argument(
        "--also", action="append", default=[], metavar="NAME=MODEL", help="serve another model under a name of its own"
    )
    _add_serve_settings(parser)
    parser.add_argument(
        "--insecure", action="store_true", help="listen on a public address although there are no keys"
    )
    parser.add_argument("--trial", action="store_true", help="ask the recipe's questions over HTTP, then stop")


def _add_serve_settings(parser: argparse.ArgumentParser) -> None:
    """Flags for what a recipe's section `serve` says; without a flag it is that, else the default."""
    from pipelines.schema import ServeSettings

    kinds = {"port": int, "replicas": int, "max_replicas": int, "slots": int, "max_requests": int, "deadline_s": float}
    for name in ("host", *kinds, "keys"):
        field = ServeSettings.model_fields[name]
        text = f"{field.description} (the recipe's serve.{name}, else {field.default})"
        metavar = {int: "N", float: "SECONDS"}.get(kinds.get(name, str), "FILE" if name == "keys" else "HOST")
        parser.add_argument(f"--{name.replace('_', '-')}", type=kinds.get(name, str), metavar=metavar, help=text)


def _add_keys(verbs: Any) -> None:
    about = "keys of the service: who may use it, and how much"
    things = verbs.add_parser("keys", help=about, description=about).add_subparsers(
        title="things", required=True, metavar="THING"
    )
    text = "make a key and show it, this once; what answers requests counts its budgets, each process for itself"
    parser = _add_keys_verb(things, "add", keys_add, text)
    parser.add_argument("name", metavar="NAME", help="what to call it in lists, logs and `revoke`")
    parser.add_argument(
        "--requests-per-minute", type=int, metavar="N", help="requests a minute; evenly after N at once"
    )
    parser.add_argument("--concurrent", type=int, metavar="N", help="requests at once")
    parser.add_argument("--tokens-per-minute", type=int, metavar="N", help="tokens a minute, of prompts and answers")
    parser.add_argument("--tokens-per-day", type=int, metavar="N", help="tokens a day of UTC")
    parser.add_argument("--models", type=_words, metavar="A,B", help="models that it is for (all)")
    parser.add_argument("--expires", metavar="WHEN", help="12h, 30d, 8w, or a date, of UTC (never)")
    _add_keys_verb(things, "list", keys_list, "show the keys and their budgets, not what they are")
    parser = _add_keys_verb(things, "revoke", keys_revoke, "end a key: a running service refuses it from now on")
    parser.add_argument("name", metavar="NAME", help="the key's name")


def _add_keys_verb(things: Any, name: str, verb: Any, text: str) -> argparse.ArgumentParser:
    parser = things.add_parser(name, help=text, description=text)
    parser.set_defaults(verb=verb)
    where = "the file of the keys (HEADWATER_KEYS, else keys.json in ~/.config/headwater)"
    parser.add_argument("--keys", metavar="FILE", help=where)
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _add_look(verbs: Any) -> None:
    parser = verbs.add_parser("look", help="look at what a run holds", description="Look at what a run holds.")
    things = parser.add_subparsers(title="things", required=True, metavar="THING")
    tokens = _verb(things, "tokens", look_tokens, "how a text splits into tokens, with their ids")
    tokens.add_argument("run", metavar="RUN|MODEL", help=MODEL_HELP)
    tokens.add_argument("text", help="the text to split")
    filtered = _verb(things, "filters", look_filters, "what was dropped by which rule, with the measured values")
    filtered.add_argument("run", metavar="RUN", help="a run's name or folder")


def _add_k8s(verbs: Any) -> None:
    about = "manifests that run a recipe on Kubernetes"
    things = verbs.add_parser("k8s", help=about, description=about).add_subparsers(
        title="things", required=True, metavar="THING"
    )
    text = "write the manifests of a recipe, one file for each thing to apply; k8s/README.md says in what order"
    parser = things.add_parser(
        "render", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(verb=render_manifests)
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, for example name=mine")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="the same, as a flag")
    names = "laptop, gpu, production, spot, kueue or volcano; may be given several times"
    parser.add_argument("--overlay", action="append", default=[], metavar="NAME", help=names)
    parser.add_argument("--out", metavar="FOLDER", help="where to write them; without it they are printed")
    parser.add_argument("--runs", metavar="ROOT", default="/runs", help="folder of all runs, as pods see it")
    parser.add_argument("--image", help="image of every container (what k8s/ says)")
    parser.add_argument("--pod-cpus", type=int, default=8, metavar="N", help="CPUs that one pod may have, at most")
    parser.add_argument("--pod-gpus", type=int, default=8, metavar="N", help="GPUs that one pod may have, at most")
    parser.add_argument(
        "--memory-per-cpu", type=float, default=4, metavar="GIB", help="memory of a worker, for each CPU"
    )


if __name__ == "__main__":
    sys.exit(main())
