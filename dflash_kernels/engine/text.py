"""Token ids to text, a piece at a time."""

from __future__ import annotations

from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def encode_prompt(tokenizer: Any, text: str, chat: bool = True) -> list[int]:
    """Token ids of a prompt; with ``chat`` and a chat template, as a user's message waiting for its answer."""
    if chat and getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return list(tokenizer.encode(rendered, add_special_tokens=False))
    return list(tokenizer.encode(text))


class StreamDecoder:
    """Turns a growing list of token ids into text pieces whose concatenation is the decoded whole.

    A piece is held back while its last bytes are an incomplete UTF-8 character. Each push decodes only a short tail:
    a few tokens already shown (their rendering may depend on neighbours) and the new ones.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._window = 0  # first id of the tail that is decoded again
        self._shown = 0  # ids before this one are part of the text given out

    def push(self, ids: list[int], final: bool = False) -> str:
        """Add ids and return the text they complete; ``final`` flushes what was held back."""
        self._ids.extend(ids)
        before = self._decode(self._ids[self._window : self._shown])
        now = self._decode(self._ids[self._window :])
        if not final and now.endswith(_UNFINISHED):
            return ""
        piece = now[len(before) :]
        self._window, self._shown = self._shown, len(self._ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
