"""The models that the service has: what it needs of each, and how they are listed."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from llm.pieces import Pieces
from serve.backend import Backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class Served:
    """A model that requests name `name`. Ids travel to the backend: texts become ids here, and ids texts.

    `lineage` is what its list entry says of where it came from (`lineage_of`).
    """

    name: str
    backend: Backend
    tokenizer: PreTrainedTokenizerFast  # of the thread that encodes
    lineage: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def pieces(self) -> Pieces:
        """Spells ids, with a tokenizer of its own: the event loop's."""
        return Pieces(copy.deepcopy(self.tokenizer))

    def decode(self, ids: list[int]) -> str:
        """Text of an answer's ids, special tokens left out. For the event loop."""
        return self.pieces.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Model(BaseModel):
    """A model, with additions to OpenAI's: its context in tokens, what it can do, the fingerprints of its making."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "headwater"
    max_model_len: int
    generates: bool
    embeds: bool
    lineage: dict[str, Any]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def lineage_of(folder: Path) -> dict[str, Any]:
    """The run and the stage of a model folder RUN/STAGE/model, and the fingerprints of the run's artefacts.

    Empty for a folder that isn't a run's.
    """
    run = folder.parent.parent
    try:
        lineage = json.loads((run / "lineage.json").read_text(encoding="utf-8"))
        prints = {stage: done["fingerprint"] for stage, done in lineage["stages"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {"run": lineage.get("run"), "stage": folder.parent.name, "fingerprints": prints}
