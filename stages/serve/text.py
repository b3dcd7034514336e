"""From tokens to text while both are still coming: whole characters only, and nothing of a text that ends an answer."""

import re
from collections.abc import Sequence
from functools import cache

from tokenizers import Tokenizer

_UNFINISHED = "\ufffd"
"""What decoding makes of bytes that are no whole character."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextStream:
    """Decodes token by token: the pieces together are what decoding all tokens at once gives.

    A token is decoded together with those before it, because its text may depend on them (a space, a half character).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._known = 0
        """Tokens whose text is out."""
        self._context = 0
        """Where decoding begins: some tokens earlier, so that the first one of a piece is not the first of a text."""
        self._given = 0
        """Characters that are out of the text of the other tokens."""
        self._is_stable = _is_byte_level(tokenizer)
        """Whether more bytes can change the last character only; others take a whole run back for one bad byte."""

    def push(self, token: int) -> str:
        """Return the text that this token completes, which may be none, or more than its own."""
        self._ids.append(token)
        text = self._new_text()
        if not text.endswith(_UNFINISHED):
            return self._out(text)
        # The last one may be a character that is not whole yet; those before it are of bytes that are none.
        certain = text[:-1] if self._is_stable else ""
        self._given += len(certain)
        return certain

    def finish(self) -> str:
        """Return what is left, with U+FFFD for bytes that are no character."""
        return self._out(self._new_text())

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._known], skip_special_tokens=True)
        whole = self._tokenizer.decode(self._ids[self._context :], skip_special_tokens=True)
        return whole[len(before) + self._given :]

    def _out(self, text: str) -> str:
        if not text:  # a control token alone would make the next token the first of a text
            return ""
        self._context, self._known, self._given = self._known, len(self._ids), 0
        return text


class StopTexts:
    """Holds back what may be the beginning of a text that ends the answer."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Return what is certainly part of the answer; once `found`, nothing more is."""
        if self.found or not self._stops:
            return "" if self.found else text
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._take(min(places))
        return self._take(len(self._held) - self._possible_begin())

    def finish(self) -> str:
        """Return what was held back for nothing."""
        return "" if self.found else self._take(len(self._held))

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _possible_begin(self) -> int:
        """Length of the longest end of the text with which a stop may begin."""
        longest = max(map(len, self._stops)) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that one token stands for."""
    piece = tokenizer.id_to_token(token)
    if piece is None:
        return b""
    if token in tokenizer.get_added_tokens_decoder():
        return piece.encode()
    table = _bytes_of_characters()
    if _is_byte_level(tokenizer) and all(character in table for character in piece):
        return bytes(table[character] for character in piece)
    if found := _BYTE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    return piece.replace("▁", " ").encode()


def token_text(data: bytes) -> str:
    """A token's bytes as OpenAI writes them: as text, or `bytes:\\xe2\\x80` where they are no whole character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return "ByteLevel" in repr(tokenizer.decoder)


@cache
def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: each byte as a character that can be printed (bytes_to_unicode in openai/gpt-2, encoder.py)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
