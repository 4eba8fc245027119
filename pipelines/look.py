"""A tokenizer and a text -> how the text splits into tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import BadInput
from llm.pieces import Pieces, visible
from llm.vocabulary import encode_text, load_tokenizer

if TYPE_CHECKING:
    from rich.text import Text

STYLES = ("black on bright_cyan", "black on bright_yellow")


def look_tokens(tokenizer_folder: Path, text: str, as_json: bool) -> dict[str, Any]:
    """Print how `text` splits under the tokenizer in `tokenizer_folder`; return the same as an object.

    On a terminal neighbouring tokens have different colours, with their ids beneath; spaces and line ends are drawn,
    and bytes that aren't whole characters are shown in hexadecimal. The object has `tokens` (each with `id`, `text`,
    null where its bytes aren't whole characters, and `hex`), `count`, `bytes` and `bytes_per_token`. BadInput if
    there is no tokenizer in the folder.
    """
    try:
        tokenizer = load_tokenizer(tokenizer_folder)
        size = len(text.encode())
    except ValueError as error:  # UnicodeEncodeError is one
        raise BadInput(str(error)) from error
    ids = encode_text(tokenizer, text)
    pieces = Pieces(tokenizer)
    answer = {
        "tokens": [{"id": i, "text": pieces.text(i), "hex": pieces.bytes(i).hex()} for i in ids],
        "count": len(ids),
        "bytes": size,
        "bytes_per_token": size / len(ids) if ids else 0.0,
    }
    if as_json:
        print(json.dumps(answer, ensure_ascii=False))
    else:
        _show(answer)
    return answer


def _show(answer: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    cells = [(_label(token), str(token["id"])) for token in answer["tokens"]]
    for line in cell_lines(cells, console.width):
        console.print(line, no_wrap=True, crop=False)
    size = f"{answer['count']} tokens, {answer['bytes']} bytes, {answer['bytes_per_token']:.2f} bytes per token"
    console.print(size, style="dim")


def _label(token: dict[str, Any]) -> str:
    if token["text"] is not None:
        return visible(token["text"])
    return " ".join(f"0x{byte:02X}" for byte in bytes.fromhex(token["hex"]))


def cell_lines(cells: list[tuple[str, str]], width: int) -> Iterator[Text]:
    """Pairs of lines, at most `width` columns wide: labels side by side in alternating colours, the ids beneath."""
    from rich.cells import cell_len
    from rich.text import Text

    labels, ids = Text(), Text()
    for number, (label, token) in enumerate(cells):
        columns = max(cell_len(label), len(token) + 1)
        if labels and labels.cell_len + columns > width:
            yield from (labels, ids)
            labels, ids = Text(), Text()
        labels.append(label, style=STYLES[number % 2]).append(" " * (columns - cell_len(label)))
        ids.append(token.ljust(columns), style="dim")
    if labels:
        yield from (labels, ids)
