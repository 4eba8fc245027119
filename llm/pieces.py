"""What a single token id stands for: its bytes, and a way to write them where they aren't whole characters."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how SentencePiece spells a byte
_SPACE_PIECE = "\u2581"  # and a space


def byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte (GPT-2): Latin-1 if printable, the others from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


class Pieces:
    """The bytes of a tokenizer's ids, for byte-level BPE and SentencePiece spellings."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        from tokenizers.decoders import ByteLevel

        self.tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        byte_level = isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel)
        self._byte_of = {letter: byte for byte, letter in enumerate(byte_letters())} if byte_level else None

    def bytes(self, token: int) -> bytes:
        """The bytes that `token` adds to a text; a special token's own spelling; none for an id without a piece."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token in self._special:
            return piece.encode()
        if self._byte_of is not None and all(letter in self._byte_of for letter in piece):
            return bytes(self._byte_of[letter] for letter in piece)
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE_PIECE, " ").encode()

    def text(self, token: int) -> str | None:
        """The token as text, or None where its bytes aren't whole UTF-8 characters."""
        try:
            return self.bytes(token).decode()
        except UnicodeDecodeError:
            return None

    def spelling(self, token: int) -> str:
        r"""The token as text, or as `bytes:\xe2\x82` where it isn't any: one spelling for each sequence of bytes."""
        text = self.text(token)
        return text if text is not None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes(token))


def visible(text: str) -> str:
    """`text` for one line of a terminal: spaces, line ends and control characters drawn, so that none of them acts."""
    return "".join(_visible_character(letter) for letter in text)


def harmless(text: str) -> str:
    """`text` as a terminal may get it: its lines and spaces as they are, other control characters drawn."""
    return "".join(letter if letter in "\n\t " else visible(letter) for letter in text)


def _visible_character(letter: str) -> str:
    drawn = {" ": "·", "\n": "⏎", "\t": "⇥", "\x7f": "␡"}.get(letter)
    if drawn:
        return drawn
    if letter < " ":
        return chr(0x2400 + ord(letter))
    return letter if letter.isprintable() else f"\\u{ord(letter):04x}"
