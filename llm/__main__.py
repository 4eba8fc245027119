"""A model folder and a prompt -> text, with torch and transformers alone: `python -m llm FOLDER "Once upon a"`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DTYPES = ("float32", "bfloat16", "int8")
BAD_INPUT, STOPPED = 2, 5  # the exit codes of `headwater`


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what the model makes of the prompt to standard output, as it comes. The exit code."""
    chosen = _parser().parse_args(arguments)
    try:
        _write(chosen)
    except ValueError as error:
        print(f"llm: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return STOPPED
    return 0


def _write(chosen: argparse.Namespace) -> None:
    from llm.loading import check_model_folder, load
    from llm.pieces import harmless
    from llm.sampling import SamplingParams
    from llm.vocabulary import load_tokenizer

    params = SamplingParams(
        max_new_tokens=chosen.max_new_tokens, temperature=chosen.temperature, top_p=chosen.top_p, seed=chosen.seed
    )
    check_model_folder(chosen.model)
    prompt = _prompt(load_tokenizer(chosen.model), chosen.prompt, chosen.chat)
    # A terminal must not obey control characters that a model wrote; what isn't one gets the text as it is.
    shown = harmless if sys.stdout.isatty() else str
    for token in load(chosen.model, slots=1, dtype=chosen.dtype).stream(prompt, params):
        print(shown(token.text), end="", flush=True)
    print()


def _prompt(tokenizer: PreTrainedTokenizerFast, text: str, chat: bool) -> list[int]:
    """The ids of `text`, or of the turn of a user who says it."""
    from llm.chat import render_turns
    from llm.vocabulary import CHAT_TEMPLATE, encode_text

    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt isn't valid Unicode: {error}") from error
    if not chat:
        return encode_text(tokenizer, text)
    turns = [{"role": "user", "content": text}]
    if tokenizer.chat_template == CHAT_TEMPLATE:
        return render_turns(tokenizer, turns)
    if tokenizer.chat_template is None:
        raise ValueError("the model has no chat template: leave out --chat to have the prompt continued")
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llm",
        description="Continue a prompt, or answer it, with torch and transformers alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a Hugging Face model folder")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens to write, at most")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest of this mass")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed writes the same text")
    parser.add_argument("--chat", action="store_true", help="put the prompt as a user's turn, by the chat template")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (float32 on a CPU, as saved on a GPU); int8 for CPUs alone"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
