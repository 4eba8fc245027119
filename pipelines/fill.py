"""MODEL and a text with [MASK] in it -> the likeliest words for each, with their probabilities."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import BadInput, Problem
from llm.pieces import Pieces, harmless, visible
from llm.vocabulary import encode_text, load_tokenizer

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedModel

GAP = "[MASK]"
BAR_WIDTH = 24
FILLERS = "give a run with pretrain.objective=masked or mixed, or the Hugging Face folder of an encoder"


def fill(model_folder: Path, text: str, *, top: int, as_json: bool) -> dict[str, Any]:
    """Print the `top` likeliest words for each [MASK] in `text`; return the same as an object.

    Each gap is one token, filled by itself: what is likeliest in one doesn't depend on what is in another. A space
    before a gap belongs to its word. The object has `text`, `filled` (with the likeliest in every gap), `gaps` (each a
    list of `id`, `text`, `probability`) and `independent`; `as_json` prints it in place of the tables. BadInput if the
    folder holds no model that fills in words, or the text no gap.
    """
    from llm.loading import load_filler

    parts = _parts(text)
    try:
        model, tokenizer = load_filler(model_folder), load_tokenizer(model_folder)
    except ValueError as error:
        raise BadInput(Problem(str(error), FILLERS)) from error
    gaps = _likeliest(model, *_ids(tokenizer, parts), top)
    answer = _as_object(text, parts, gaps, Pieces(tokenizer))
    if as_json:
        print(json.dumps(answer, ensure_ascii=False))
    else:
        _show(answer)
    return answer


# The text


def _parts(text: str) -> list[str]:
    """The text between the gaps. A space before a gap is left out: it is the beginning of the word in it."""
    parts = text.split(GAP)
    if len(parts) == 1:
        raise BadInput(Problem(f"there is no {GAP} in the text", "write it where a word is to be filled in"))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(Problem(f"the text isn't valid Unicode: {error}", "write it in UTF-8")) from error
    return [*(part.removesuffix(" ") for part in parts[:-1]), parts[-1]]


def _ids(tokenizer, parts: list[str]) -> tuple[list[int], list[int]]:
    """The ids, with what the tokenizer puts around a text, and the places of the gaps."""
    if tokenizer.mask_token_id is None:
        raise BadInput(Problem("the model's tokenizer has no mask token", FILLERS))
    before, after = _around(tokenizer)
    ids, places = list(before), []
    for number, part in enumerate(parts):
        if number:
            places.append(len(ids))
            ids.append(tokenizer.mask_token_id)
        ids += encode_text(tokenizer, part)
    return [*ids, *after], places


def _around(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text: BERT's does, ours doesn't."""
    bare, whole = encode_text(tokenizer, "a"), tokenizer("a")["input_ids"]
    first = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
    return whole[:first], whole[first + len(bare) :]


# The model


def _likeliest(model: PreTrainedModel, ids: list[int], places: list[int], top: int) -> list[list[tuple[int, float]]]:
    """For each of `places` the `top` likeliest ids with their probabilities."""
    import torch

    from llm.cloze import logits_of

    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and len(ids) > context:
        raise BadInput(Problem(f"the text has {len(ids)} tokens, the context has {context}", "give a shorter text"))
    if top < 1:
        raise BadInput(Problem(f"--top must be at least 1, got {top}", "leave it out for the five likeliest"))
    row = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        logits = logits_of(model, row, torch.arange(len(ids), device=model.device)[None], row[:, 0] >= 0)[0, places]
    found = logits.float().softmax(dim=-1).topk(min(top, logits.shape[-1]))
    return [list(zip(*pair, strict=True)) for pair in zip(found.indices.tolist(), found.values.tolist(), strict=True)]


# The answer


def _as_object(text: str, parts: list[str], gaps: list[list[tuple[int, float]]], pieces: Pieces) -> dict[str, Any]:
    words = [pieces.spelling(gap[0][0]) for gap in gaps]
    return {
        "text": text,
        "filled": parts[0] + "".join(word + part for word, part in zip(words, parts[1:], strict=True)),
        "gaps": [[{"id": i, "text": pieces.spelling(i), "probability": p} for i, p in gap] for gap in gaps],
        "independent": True,
    }


def _show(answer: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(harmless(answer["filled"]), style="dim")
    for number, gap in enumerate(answer["gaps"], start=1):
        console.print(f"{GAP} {number} of {len(answer['gaps'])}" if len(answer["gaps"]) > 1 else GAP)
        for line in gap_lines(gap):
            console.print(line)
    if len(answer["gaps"]) > 1:
        console.print(f"each {GAP} is filled by itself: no word here depends on what stands in another", style="dim")


def gap_lines(gap: list[dict[str, Any]]) -> Iterator[Text]:
    """A line for each likely word: its probability, the same as a bar, and the word."""
    from rich.text import Text

    for number, word in enumerate(gap):
        bar = "█" * max(1, round(word["probability"] * BAR_WIDTH))
        line = f"  {word['probability']:6.1%} {bar:<{BAR_WIDTH}} {visible(word['text'])}  {word['id']}"
        yield Text(line, style="" if number else "bold green")
