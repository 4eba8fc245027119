"""Demonstrations: conversations in which a person, or a stated rule, shows how to answer.

    arithmetic:        sums of two digits, made by a rule
    chitchat:          small talk between two people, from the package chitchat-dataset
    a file or folder   JSONL or Parquet with `messages`, or `prompt` and `completion`

`read` gives the conversations of a source and what it leaves out; `write` parts them into training and held-out ones.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import mirror
from cluster.errors import BadInput, Problem, StageFailed
from cluster.runs import canonical_hash
from llm.chat import check_messages
from pipelines.alignment import ConversationSource, PreferenceSource
from pipelines.corpus import collect
from pipelines.documents import is_held_out
from pipelines.schema import SftSettings, Source

Message = dict[str, str]  # role and content
Task = dict[str, str]  # answer: a number, by which a reply can be checked

ARITHMETIC, CHITCHAT = "arithmetic:", "chitchat:"
# Raised whenever a rule below gives other conversations than before.
RULE_VERSIONS = {ARITHMETIC: 2, CHITCHAT: 1}
SETS = ("train", "held_out")
ROWS_AT_ONCE = 4096
MOST_PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Conversation:
    """Turns in order; `id` is a hash, whose first 8 digits are shared by what must not be parted."""

    id: str
    messages: list[Message]
    source: str
    licence: str
    task: Task | None = None


class LeftOut(NamedTuple):
    """Something of a source that became no conversation; `reason` is one of a few."""

    source: str
    reason: str


class Fault(NamedTuple):
    """A row of a user's file that can't be used. `line` counts from 1 (rows, in Parquet)."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}: {self.reason}"


class Counts(NamedTuple):
    """What `write` wrote: conversations of each source by set, and what was left out, by reason."""

    train: dict[str, int]
    held_out: dict[str, int]
    left_out: dict[str, int]


def read(source: ConversationSource) -> Iterator[Conversation | LeftOut]:
    """The conversations of a source, in an order that depends on it alone, and what it leaves out.

    BadInput if it can't be found, or names every row of a user's files that can't be used.
    """
    faults: list[Fault] = []
    taken = 0
    for item in _everything(source):
        if isinstance(item, Fault):
            faults.append(item)
            continue
        if taken == source.max_conversations:
            break
        taken += isinstance(item, Conversation)
        yield item
    if faults:
        raise BadInput(*told(source, faults))


def fingerprint(source: ConversationSource, verify: bool = False) -> str:
    """Names the content of a source without its place: SHA-256, as hex.

    Rules and packages count by version; a user's files by name, size and time of change, or with `verify` by bytes.
    """
    if source.path == ARITHMETIC:
        return canonical_hash([ARITHMETIC, RULE_VERSIONS[ARITHMETIC]])
    if source.path == CHITCHAT:
        return canonical_hash([CHITCHAT, RULE_VERSIONS[CHITCHAT], _chitchat_version(source)])
    return files_fingerprint(source, verify)


def files_fingerprint(source: ConversationSource | PreferenceSource, verify: bool = False) -> str:
    """Names the content of a user's files, as `fingerprint` does. BadInput if there are none."""
    files_of(source)
    return collect.fingerprint(_as_files(source), verify)


def problems_of(sources: Iterable[ConversationSource | PreferenceSource], setting: str) -> list[Problem]:
    """What can be seen of the sources before anything starts: those of which nobody said under what licence they are,
    and those that can't be found. `setting` names their list in the recipe."""
    return [problem for source in sources for problem in [*_unlicensed(source, setting), *_unfound(source)]]


def _unlicensed(source: ConversationSource | PreferenceSource, setting: str) -> list[Problem]:
    if source.licence:
        return []
    what = f"{setting}: source '{source.name}' ({source.path}) declares no licence"
    return [Problem(what, "add `licence: ...` to the source, or 'unknown' there to take it all the same")]


def _unfound(source: ConversationSource | PreferenceSource) -> list[Problem]:
    try:
        fingerprint(source) if isinstance(source, ConversationSource) else files_of(source)
    except BadInput as error:
        return [problem for problem in error.problems if isinstance(problem, Problem)]
    return []


def write(found: Iterable[Conversation | LeftOut], folder: Path, held_out_share: float) -> Counts:
    """Write `train.parquet` and `held_out.parquet` into `folder`; a conversation that came before is left out.

    StageFailed if either would be empty.
    """
    counts: dict[str, Counter[str]] = {name: Counter() for name in (*SETS, "left_out")}
    with ExitStack() as files:
        writers = {name: files.enter_context(_Writer(folder / f"{name}.parquet")) for name in SETS}
        for item in _each_once(found):
            if isinstance(item, LeftOut):
                counts["left_out"][item.reason] += 1
                continue
            name = "held_out" if is_held_out(item.id, held_out_share) else "train"
            writers[name].add(item)
            counts[name][item.source] += 1
    _refuse_empty(counts)
    return Counts(**{name: dict(sorted(counter.items())) for name, counter in counts.items()})


def load(path: Path) -> Iterator[Conversation]:
    """The conversations of a file that `write` wrote, in order."""
    with pq.ParquetFile(mirror.here(path)) as file:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
            for row in batch.to_pylist():
                task = json.loads(row["task"]) if row["task"] else None
                yield Conversation(row["id"], json.loads(row["messages"]), row["source"], row["licence"], task)


def held_out_texts(settings: SftSettings) -> Iterator[str]:
    """What is said in the conversations that `write` will hold out of the sources of `settings`, each as one text."""
    for source in settings.sources:
        for item in read(source):
            if isinstance(item, Conversation) and is_held_out(item.id, settings.held_out):
                yield "\n".join(message["content"] for message in item.messages)


def first_prompt(messages: list[Message]) -> list[Message]:
    """What stands before the assistant's first reply."""
    return list(itertools.takewhile(lambda message: message["role"] != "assistant", messages))


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _everything(source: ConversationSource) -> Iterator[Conversation | LeftOut | Fault]:
    if source.path == ARITHMETIC:
        return _arithmetic(source)
    return _chitchat(source) if source.path == CHITCHAT else _from_files(source)


def _made(source: ConversationSource, of: Any, messages: list[Message], task: Task | None = None) -> Conversation:
    """A conversation whose id begins with the hash of `of`: what it must be held out together with."""
    together, own = canonical_hash(of), canonical_hash([messages, task])
    return Conversation(together[:8] + own[:24], messages, source.name, source.licence or "unknown", task)


# Sums, made by a rule

LARGEST_TERM = 9
# One number bare in the reply, and many wordings of the question: what a model of a few million parameters can learn
# from some minutes of training. Asked to repeat the sum before the answer, or for differences too, it learns neither.
OPENINGS = ("", "hey, ", "please, ", "tell me, ", "quick question: ", "I wonder: ")
WORDINGS = (
    "what is {a} + {b}?",
    "what is {a} plus {b}?",
    "how much is {a} + {b}?",
    "how much is {a} plus {b}?",
)
SHUFFLE_SEED = 0


def _arithmetic(source: ConversationSource) -> Iterator[Conversation]:
    """Every sum of two digits in every wording, in an order in which any first part is a fair sample.

    What is held out is a question, not a sum: the same sum in other words is trained on. A model of this size learns
    the table by heart in a few minutes; that it carries the rule over to a sum it never saw would take far longer.
    """
    numbers = range(LARGEST_TERM + 1)
    made = list(itertools.product(numbers, numbers, OPENINGS, WORDINGS))
    random.Random(SHUFFLE_SEED).shuffle(made)
    for a, b, opening, wording in made:
        question = opening + wording.format(a=a, b=b)
        messages = [message("user", question[0].upper() + question[1:]), message("assistant", f"{a + b}.")]
        yield _made(source, question, messages, {"answer": str(a + b)})


# Small talk between people

CHITCHAT_DISTRIBUTION, CHITCHAT_PACKAGE = "chitchat-dataset", "chitchat_dataset"
LONGEST_TURN = 100  # characters
EXCHANGE_TURNS = (1, 2, 3)  # a user's and an assistant's turn count as one; exchanges take these lengths in rotation

MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>")
LINK = re.compile(r"(?:https?://|www\.)\S+")
PERSONAL = re.compile(r"\S@\S|(?<!\w)@\w|(?:\d[ .()-]*){7,}")  # addresses, accounts, telephone numbers
LETTER = re.compile(r"[A-Za-z]")


def _chitchat(source: ConversationSource) -> Iterator[Conversation | LeftOut]:
    """Exchanges of one to three turns, cut from conversations in which both sides keep short."""
    talks = json.loads(_chitchat_file(source).read_text(encoding="utf-8"))
    for name, talk in talks.items():
        for exchange in _exchanges(_spoken(talk["messages"]), source.name):
            yield exchange if isinstance(exchange, LeftOut) else _made(source, name, exchange)


def _spoken(groups: list[list[dict[str, str]]]) -> list[str]:
    """What the two say in turns: consecutive utterances of a speaker joined, markup and links taken out."""
    utterances = itertools.chain.from_iterable(groups)
    by_speaker = itertools.groupby(utterances, key=lambda utterance: utterance["sender"])
    return [_clean(" ".join(utterance["text"] for utterance in said)) for _, said in by_speaker]


def _clean(text: str) -> str:
    return " ".join(LINK.sub(" ", MARKUP.sub(" ", text)).split())


def _exchanges(spoken: list[str], source: str) -> Iterator[list[Message] | LeftOut]:
    """Runs of usable turns. An unusable one ends the exchange that it stands in."""
    lengths = itertools.cycle(EXCHANGE_TURNS)
    exchange: list[Message] = []
    wanted = next(lengths)
    for user, assistant in zip(spoken[::2], spoken[1::2], strict=False):
        reason = _unusable(user) or _unusable(assistant)
        if reason is None:
            exchange += [message("user", user), message("assistant", assistant)]
        if exchange and (reason or len(exchange) == 2 * wanted):
            yield exchange
            exchange, wanted = [], next(lengths)
        if reason:
            yield LeftOut(source, reason)
    if exchange:
        yield exchange
    if len(spoken) % 2:
        yield LeftOut(source, "turn without an answer")


def _unusable(text: str) -> str | None:
    """Why a turn can't be learned from, if so."""
    if not LETTER.search(text):
        return "turn without words"
    if len(text) > LONGEST_TURN:
        return f"turn of more than {LONGEST_TURN} characters"
    return "turn with personal data" if PERSONAL.search(text) else None


def _chitchat_file(source: ConversationSource) -> Path:
    """The package's data, found without running the package."""
    _chitchat_version(source)
    spec = importlib.util.find_spec(CHITCHAT_PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "dataset.json"


def _chitchat_version(source: ConversationSource) -> str:
    try:
        return importlib.metadata.version(CHITCHAT_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        what = f"source '{source.name}': the package {CHITCHAT_DISTRIBUTION} of '{source.path}' is not installed"
        raise BadInput(Problem(what, f"pip install {CHITCHAT_DISTRIBUTION}")) from None


# A user's own files

SUFFIXES = (".jsonl", ".parquet")


def _from_files(source: ConversationSource) -> Iterator[Conversation | Fault]:
    """One conversation a row, or what is wrong with the row."""
    for file in files_of(source):
        for line, row in rows_of(file.path):
            try:
                messages, task = _checked(row)
            except ValueError as error:
                yield Fault(file.path, line, str(error))
            else:
                yield _made(source, messages, messages, task)


def files_of(source: ConversationSource | PreferenceSource) -> list[collect.SourceFile]:
    """The files of a user's source, in order. BadInput if there are none."""
    if re.match(r"[a-z][a-z0-9+.-]+:", source.path) and not source.path.startswith(mirror.SCHEME):
        known = "give a file, a folder, " + " or ".join(RULE_VERSIONS)
        raise BadInput(Problem(f"source '{source.name}': don't know how to read '{source.path}'", known))
    found = [file for file in collect.resolve(_as_files(source)) if file.path.suffix in SUFFIXES]
    if not found:
        what = f"source '{source.name}': no {' or '.join(SUFFIXES)} file at {source.path}"
        raise BadInput(Problem(what, "put conversations there, one a row, or name another path"))
    return found


def _as_files(source: ConversationSource | PreferenceSource) -> Source:
    return Source(name=source.name, kind="auto", path=source.path)


def rows_of(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows with their number; a line that isn't JSON comes as the error that it gives."""
    path = mirror.fetch(path)
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(ROWS_AT_ONCE))
            yield from enumerate(rows, start=1)
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one
        return error


def _checked(row: Any) -> tuple[list[Message], Task | None]:
    """The messages and the task of a row. ValueError says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object: {row!s:.80}")
    messages = _messages_of(row)
    if messages[0]["role"] == "assistant" or not any(message["role"] == "assistant" for message in messages):
        raise ValueError("the assistant must answer something, and something of the assistant must be there to learn")
    return messages, _task(row.get("task"))


def _messages_of(row: dict[str, Any]) -> list[Message]:
    """From `messages`, or from `prompt` and `completion`, each a text or a list of messages."""
    if row.get("messages") is not None:
        return _listed(row["messages"], "messages")
    if row.get("prompt") is not None and row.get("completion") is not None:
        return [*_turn(row["prompt"], "prompt", "user"), *_turn(row["completion"], "completion", "assistant")]
    raise ValueError(f"neither 'messages' nor 'prompt' and 'completion', but {', '.join(row) or 'nothing'}")


def _turn(value: Any, column: str, role: str) -> list[Message]:
    return _listed([message(role, value)] if isinstance(value, str) else value, column)


def _listed(value: Any, column: str) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError(f"{column} must be a list of messages, got {value!r:.80}")
    try:
        check_messages(value)
    except ValueError as error:
        raise ValueError(f"{column}: {error}") from None
    silent = [place for place, turn in enumerate(value) if not turn["content"].strip()]
    if silent:
        raise ValueError(f"{column}: messages[{silent[0]}] says nothing")
    return [message(turn["role"], turn["content"]) for turn in value]


def _task(value: Any) -> Task | None:
    if value is None:
        return None
    try:
        float(value["answer"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"'task' must be like {{'answer': '12'}}, a number, got {value!r:.80}") from None
    return {"answer": str(value["answer"])}


def told(source: ConversationSource | PreferenceSource, faults: list[Fault]) -> list[Problem]:
    """The first faults one by one, the rest by number."""
    remedy = "correct the row or take it out"
    problems = [Problem(f"source '{source.name}': {fault}", remedy) for fault in faults[:MOST_PROBLEMS_SHOWN]]
    if rest := len(faults) - len(problems):
        problems.append(Problem(f"source '{source.name}': {rest:,} more rows that can't be used", remedy))
    return problems


# Writing


class _Writer:
    """A Parquet file of conversations, written a row group at a time."""

    schema = pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("messages", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("licence", pa.string(), nullable=False),
            pa.field("task", pa.string()),
        ]
    )

    def __init__(self, path: Path):
        self._file = pq.ParquetWriter(path, self.schema, compression="zstd")
        self._rows: list[dict[str, str | None]] = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._file.close()

    def add(self, one: Conversation) -> None:
        messages = json.dumps(one.messages, ensure_ascii=False)
        task = json.dumps(one.task) if one.task else None
        self._rows.append(
            {"id": one.id, "messages": messages, "source": one.source, "licence": one.licence, "task": task}
        )
        if len(self._rows) == ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        self._file.write_table(pa.Table.from_pylist(self._rows, self.schema))
        self._rows = []


def _each_once(found: Iterable[Conversation | LeftOut]) -> Iterator[Conversation | LeftOut]:
    """Conversations with the same messages once, the first one."""
    seen: set[str] = set()
    for item in found:
        if isinstance(item, LeftOut):
            yield item
            continue
        content = canonical_hash(item.messages)
        yield LeftOut(item.source, "said before, word for word") if content in seen else item
        seen.add(content)


def _refuse_empty(counts: dict[str, Counter[str]]) -> None:
    for name in SETS:
        if not counts[name]:
            found = {key: counter.total() for key, counter in counts.items()}
            problem = Problem(
                f"no conversation fell into the {name} set (conversations: {found})",
                "add conversations, or raise the share that is held out",
            )
            raise StageFailed(problem)
