"""MODEL and a prompt -> the prompt's continuation, token after token, and the distribution each was drawn from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import BadInput
from llm.pieces import Pieces, harmless, visible
from llm.sampling import SamplingParams
from llm.vocabulary import encode_text

if TYPE_CHECKING:
    from rich.text import Text

    from llm.engine import Token

BAR_WIDTH = 24


def complete(model_folder: Path, prompt: str, *, params: SamplingParams, top: int, as_json: bool) -> dict[str, Any]:
    """Print `prompt` and what the model in `model_folder` continues it with; return the same as an object.

    With `top` above 0 each token is shown among the `top` likeliest at its place, with the model's probabilities. The
    object has `prompt`, `text`, `tokens` (each with `id`, `text`, `logprob`, `top`) and `finish_reason`; `as_json`
    prints it in place of the text. BadInput if the folder holds no causal language model or the prompt doesn't fit.
    """
    from llm.loading import load

    try:
        engine = load(model_folder, slots=1)
        params = replace(params, top_logprobs=max(top, params.top_logprobs))
        stream = engine.stream(_encode(engine.tokenizer, prompt), params)
        pieces = Pieces(engine.tokenizer)
        tokens = list(stream if as_json else _shown(stream, prompt, top, pieces))
    except ValueError as error:
        raise BadInput(str(error)) from error
    answer = as_object(prompt, tokens, pieces)
    if as_json:
        print(json.dumps(answer, ensure_ascii=False))
    return answer


def as_object(prompt: str, tokens: list[Token], pieces: Pieces) -> dict[str, Any]:
    """The answer as plain values; a token's `text` is its own spelling, `logprob` natural."""
    return {
        "prompt": prompt,
        "text": "".join(token.text for token in tokens),
        "tokens": [
            {
                "id": token.id,
                "text": pieces.spelling(token.id),
                "logprob": token.logprob,
                "top": [{"id": i, "text": pieces.spelling(i), "logprob": logprob} for i, logprob in token.top],
            }
            for token in tokens
        ],
        "finish_reason": tokens[-1].finish_reason,
    }


def _encode(tokenizer, prompt: str) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt isn't valid Unicode: {error}") from error
    return encode_text(tokenizer, prompt)


def _shown(stream: Iterator[Token], prompt: str, top: int, pieces: Pieces) -> Iterator[Token]:
    """Pass the tokens on, writing each to the terminal as it comes."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if top:
        console.print(prompt, style="dim")
        for token in stream:
            console.print(distribution_lines(token, top, pieces))
            yield token
        return
    # What isn't a terminal gets the text as it is; a terminal must not obey control characters that a model wrote.
    show = harmless if console.is_terminal else str
    console.out(show(prompt), end="", style="dim", highlight=False)
    for token in stream:
        console.out(show(token.text), end="", highlight=False)
        console.file.flush()
        yield token
    console.out("")


def distribution_lines(token: Token, top: int, pieces: Pieces) -> Text:
    """One line for each of the `top` likeliest tokens, with its probability as a bar; the one taken is marked."""
    from rich.text import Text

    ranked = token.top[:top]
    if token.id not in [i for i, _ in ranked]:
        ranked = [*ranked, (token.id, token.logprob)]
    lines = Text()
    for i, logprob in ranked:
        taken, probability = i == token.id, math.exp(logprob)
        bar = "█" * max(1, round(probability * BAR_WIDTH))
        line = f"{'▶' if taken else ' '} {probability:6.1%} {bar:<{BAR_WIDTH}} {visible(pieces.spelling(i))}  {i}\n"
        lines.append(line, style="bold green" if taken else "")
    return lines
