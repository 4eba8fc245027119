"""Errors that end a command, each with the exit code that people script against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what it is, with the value that was found, and what to do about it."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}\n    remedy: {self.remedy}"


class HeadwaterError(Exception):
    """A failure that the user can act on. `problems` are printed one a line; `exit_code` ends the command."""

    exit_code = 4
    title = "failed"

    def __init__(self, *problems: Problem | str):
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


class BadInput(HeadwaterError):
    """The user's settings, arguments or data cannot be used."""

    exit_code = 2
    title = "bad input"


class PreflightRefused(HeadwaterError):
    """What was asked for cannot finish on this machine or cluster."""

    exit_code = 3
    title = "preflight refused"


class StageFailed(HeadwaterError):
    """A stage started and did not finish; what it saved is kept."""

    exit_code = 4
    title = "stage failed"


class Stopped(HeadwaterError):
    """The user or the platform asked to stop, and the state is saved."""

    exit_code = 5
    title = "stopped"
