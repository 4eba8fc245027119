"""Settings of the second half of the journey: what a base model learns from people, and how it is measured."""

from __future__ import annotations

from pydantic import field_validator

from pipelines.judges import JUDGES
from pipelines.settings import Settings, identity, placement


class ConversationSource(Settings):
    """One body of demonstrations."""

    name: str = identity(doc="short name that every conversation of it carries", pattern=r"^[a-z0-9][a-z0-9._-]*$")
    path: str = placement(
        doc="a JSONL or Parquet file or a folder of them, with `messages` or `prompt` and `completion`; "
        "'arithmetic:' for sums made by a rule; 'chitchat:' for small talk between people (chitchat-dataset)"
    )
    licence: str | None = identity(None, "licence of the text, carried by every conversation; 'unknown' if it is that")
    max_conversations: int | None = identity(None, "take at most this many, the first ones", ge=1)


class PreferenceSource(Settings):
    """One body of preferences of people: of two answers to a prompt, which is the better."""

    name: str = identity(
        doc="short name, by which the rankings made of it say who ranked", pattern=r"^[a-z0-9][a-z0-9._-]*$"
    )
    path: str = placement(
        doc="a JSONL or Parquet file or a folder of them, local or s3://, in TRL's preference format: `prompt`, "
        "`chosen` and `rejected`, texts or lists of messages"
    )
    licence: str | None = identity(None, "licence of the text; 'unknown' if it is not known")
    max_preferences: int | None = identity(None, "take at most this many, the first ones", ge=1)


class AnswerSettings(Settings):
    """How a stage has a model answer prompts."""

    prompts: int = identity(1024, "small-talk prompts to have answered, at most", ge=2)
    answers: int = identity(4, "answers to each prompt", ge=1, le=64)
    temperature: float = identity(1.0, "of the answers' sampling; 1 is the model's own distribution", gt=0, le=10)
    max_new_tokens: int = identity(48, "tokens after which an answer is cut off", ge=1)

    slots: int = placement(32, "answers that one engine writes at once", ge=1)


class RankSettings(AnswerSettings):
    """Prompts to ranked answers."""

    answers: int = identity(4, "answers to each prompt", ge=2, le=64)
    judge: str = identity("asks-back", f"who ranks them: one of {', '.join(JUDGES)}")
    held_out: float = identity(0.1, "share of the prompts kept from training, chosen by hash of id", gt=0, le=0.5)
    preferences: tuple[PreferenceSource, ...] = identity((), "preferences of people, added to the rankings")

    actors: int = placement(1, "processes that write answers, each with an engine of its own", ge=1)
    cpus_per_actor: float = placement(1, "CPUs that each of them claims", gt=0)
    gpus_per_actor: float = placement(0, "GPUs that each of them claims", ge=0)

    @field_validator("judge")
    @classmethod
    def _known(cls, judge: str) -> str:
        if judge not in JUDGES:
            raise ValueError(f"unknown judge, known are {', '.join(JUDGES)}")
        return judge


class EvaluateSettings(AnswerSettings):
    """Base, chat and policy models side by side."""

    prompts: int = identity(128, "held-out small-talk prompts to have answered, at most", ge=2)
    answers: int = identity(2, "answers to each prompt", ge=1, le=64)
    tasks: int = identity(256, "held-out tasks to have solved, at most", ge=1)
    held_out_rows: int = identity(64, "rows of held-out text to measure bits a byte on, at most", ge=1)

    cpus_per_task: float = placement(0.5, "CPUs that measuring one model claims", gt=0)
    gpus_per_task: float = placement(0, "GPUs that measuring one model claims", ge=0)
