"""The two sorts of settings, and how a mapping that a person wrote becomes checked settings."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import BadInput, Problem


def identity(default: Any = ..., doc: str = "", **bounds: Any) -> Any:
    """A setting that the result depends on: changing it re-runs the stage."""
    return Field(default, description=doc, json_schema_extra={"sort": "identity"}, **bounds)


def placement(default: Any = ..., doc: str = "", **bounds: Any) -> Any:
    """A setting of where and how it runs: changing it never re-runs a finished stage."""
    return Field(default, description=doc, json_schema_extra={"sort": "placement"}, **bounds)


class Settings(BaseModel):
    """Typed, frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """The part of these settings that names the result, as plain JSON values."""
        plain = self.model_dump(mode="json")
        return {name: _identity_of(getattr(self, name), plain[name]) for name in _identity_names(type(self))}


Some = TypeVar("Some", bound=Settings)


def check(schema: type[Some], values: dict[str, Any], where: str) -> Some:
    """`values` as `schema`, or BadInput with every problem at once. `where` names the file or flag they came from."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise BadInput(*(_problem(schema, detail, where) for detail in error.errors())) from None


def _identity_names(schema: type[Settings]) -> list[str]:
    return [name for name, field in schema.model_fields.items() if _sort(field) == "identity"]


def _sort(field: Any) -> str:
    return (field.json_schema_extra or {}).get("sort", "identity")


def _identity_of(value: Any, plain: Any) -> Any:
    if isinstance(value, Settings):
        return value.identity()
    if isinstance(value, (list, tuple)):
        return [_identity_of(one, dumped) for one, dumped in zip(value, plain, strict=True)]
    return plain


def _problem(schema: type[Settings], detail: Any, where: str) -> Problem:
    path = ".".join(str(part) for part in detail["loc"]) or "(top level)"
    if detail["type"] == "extra_forbidden":
        return Problem(f"{where}: unknown setting '{path}'", _nearest(schema, detail["loc"]))
    if detail["type"] == "missing":
        return Problem(f"{where}: setting '{path}' is missing", f"give it a value: --set {path}=...")
    message = detail["msg"].removeprefix("Value error, ")
    # Where settings disagree with one another the input is all of them, and the message names the values.
    if detail["type"] == "value_error" and isinstance(detail["input"], dict):
        return Problem(f"{where}: {path}: {message}", "change one of the settings that it names")
    return Problem(f"{where}: {path}: {message}, got {detail['input']!r}", _remedy(schema, detail["loc"]))


def _nearest(schema: type[Settings], location: tuple) -> str:
    parent = _schema_at(schema, location[:-1])
    names = list(parent.model_fields) if parent else []
    close = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{'.'.join([*map(str, location[:-1]), close[0]])}'?"
    return f"known settings here: {', '.join(names)}"


def _remedy(schema: type[Settings], location: tuple) -> str:
    """What the setting means, from its documentation."""
    names = [part for part in location if isinstance(part, str)]
    parent = _schema_at(schema, tuple(names[:-1])) if names else None
    field = parent.model_fields.get(names[-1]) if parent else None
    return f"{names[-1]} is: {field.description}" if field is not None else "see the shipped recipes"


def _schema_at(schema: Any, location: tuple) -> type[Settings] | None:
    """The settings class that holds the key at `location`, through nested settings and lists of them."""
    for part in location:
        if isinstance(part, int):
            continue
        field = schema.model_fields.get(part) if schema else None
        schema = _settings_in(field.annotation) if field else None
    return schema


def _settings_in(annotation: Any) -> type[Settings] | None:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _settings_in(arg))), None)
