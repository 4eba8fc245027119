"""Keys of the service: a file of their hashes with what each may use, written by the command, read by the service.

A key is 256 random bits, so that a plain SHA-256 keeps it: there is nothing to guess, as there is with passwords.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from cluster.errors import BadInput, Problem

PREFIX = "hw-"
KEYS_VARIABLE = "HEADWATER_KEYS"
NO_LIMITS: Mapping[str, Any] = {}
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"

logger = logging.getLogger(__name__)


class Limits(BaseModel):
    """What a key may use; None: as much as it likes. Each process that answers requests counts for itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: int | None = Field(None, ge=1)
    concurrent: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    tokens_per_day: int | None = Field(None, ge=1)
    models: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(None, min_length=1)


class Key(Limits):
    """One key as it is stored: `sha256` of the text that its owner sends."""

    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    created: AwareDatetime
    expires: AwareDatetime | None = None

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.fullmatch(NAME, name):
            raise ValueError(f"a name has up to 64 letters, digits, dots, dashes and underscores, got {name!r}")
        return name


class KeyFile(BaseModel):
    """The file's content; names are unique."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1]
    keys: tuple[Key, ...]

    @field_validator("keys")
    @classmethod
    def _check_names(cls, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        names = [key.name for key in keys]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two keys are called {', '.join(sorted(twice))}")
        return keys


class Unreadable(Exception):
    """The file of the keys is missing or damaged."""


class KeyStore:
    """The keys of a file as they are now: a changed file counts from the next request on, an unreadable one lets
    nobody in.

    `now` gives the time by which keys expire.
    """

    def __init__(self, path: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)):
        self.path, self._now = Path(path), now
        self._seen: object = None
        self._keys: tuple[Key, ...] = ()
        self._damage: str | None = None

    def find(self, text: str) -> Key | None:
        """The key that is spelt `text`, None if none is. Unreadable: there is no telling.

        All hashes are compared, each in constant time: how long it takes says nothing about the keys.
        """
        given, found = _hash(text), None
        for key in self.all():
            if hmac.compare_digest(key.sha256, given):
                found = key
        return None if found is None or (found.expires and found.expires <= self._now()) else found

    def all(self) -> tuple[Key, ...]:
        """All keys, expired ones too. Unreadable if the file is missing or damaged."""
        if (state := _state(self.path)) != self._seen:
            self._seen = state
            self._read()
        if self._damage:
            raise Unreadable(self._damage)
        return self._keys

    def _read(self) -> None:
        try:
            self._keys, self._damage = _load(self.path), None
        except Unreadable as error:
            self._keys, self._damage = (), str(error)
            logger.error("%s: nobody is let in until it can be read", error)


def default_file() -> Path:
    """HEADWATER_KEYS, else keys.json in the user's folder of configurations."""
    configuration = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(os.environ.get(KEYS_VARIABLE) or f"{configuration}/headwater/keys.json").expanduser().absolute()


def stored(path: Path) -> tuple[Key, ...]:
    """The keys of a file; none if there is no file. BadInput if it is damaged."""
    if not path.exists():
        return ()
    try:
        return _load(path)
    except Unreadable as error:
        raise BadInput(Problem(str(error), "mend it, or move it away and add the keys anew")) from error


def check_file(path: Path) -> None:
    """BadInput if no key of that file lets anybody in: before a service starts that refuses everyone."""
    if not stored(path):
        raise BadInput(Problem(f"there are no keys in {path}", f"headwater keys add NAME --keys {path}"))


def add(path: Path, name: str, expires: datetime | None = None, limits: Mapping[str, Any] = NO_LIMITS) -> str:
    """A new key with those fields of Limits, whose text is returned and stored nowhere.

    BadInput if the name is taken or no name, or a limit is out of bounds.
    """
    text = PREFIX + secrets.token_urlsafe(32)
    try:
        key = Key(name=name, sha256=_hash(text), created=_now(), expires=expires, **limits)
    except ValidationError as error:
        raise BadInput(Problem(_first(error), "see headwater keys add --help")) from None
    with _locked(path):
        keys = stored(path)
        if any(other.name == name for other in keys):
            raise BadInput(Problem(f"there is a key '{name}' already", f"headwater keys revoke {name}"))
        _write(path, (*keys, key))
    return text


def revoke(path: Path, name: str) -> None:
    """Take a key out of the file: its next request is refused. BadInput if there is none of that name."""
    with _locked(path):
        keys = stored(path)
        kept = tuple(key for key in keys if key.name != name)
        if len(kept) == len(keys):
            known = ", ".join(key.name for key in keys) or "none"
            raise BadInput(Problem(f"no key '{name}' in {path}", f"there are: {known}"))
        _write(path, kept)


def _hash(text: str) -> str:
    # Bytes that aren't UTF-8 come as surrogates: they are a wrong key, not a failure.
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _state(path: Path) -> object:
    """What changes whenever the file is replaced or written to."""
    try:
        about = path.stat()
    except OSError as error:
        return error.errno
    return about.st_dev, about.st_ino, about.st_mtime_ns, about.st_ctime_ns, about.st_size


def _load(path: Path) -> tuple[Key, ...]:
    try:
        return KeyFile.model_validate_json(path.read_bytes()).keys
    except ValidationError as error:
        raise Unreadable(f"the keys in {path} are damaged: {_first(error)}") from None
    except OSError as error:
        raise Unreadable(f"the keys in {path} can't be read: {error.strerror}") from error


def _first(error: ValidationError) -> str:
    """What pydantic found wrong first, without the value: it may be a hash."""
    first = error.errors(include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One command at a time changes the file."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(path.with_name(f".{path.name}.lock"), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    """Replace the file in one step; only its owner may read it."""
    text = KeyFile(version=1, keys=keys).model_dump_json(indent=1, exclude_none=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # of mode 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as handle:
            handle.write(text + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(partial)
