"""Keeping a key out of words: what endpoints say of a key often quotes it, in whole or in part."""

from __future__ import annotations

import base64
from urllib.parse import quote

__all__ = ["SECRET_LENGTH", "without_key"]

SECRET_LENGTH = 12
"""Shorter keys are the words that servers without keys take (``EMPTY``, ``none``): no secrets, and words of answers."""


def without_key(text: str, key: str, least: int = 8) -> str:
    """A text without a key: whole, in base64 or percent-encoded, or the beginning or end of it.

    Args:
        text: from outside.
        key: the key; an empty one is in no text.
        least: shortest beginning or end that is taken out.

    Returns:
        the text with ``[key]`` in their place.
    """
    if not key:
        return text
    forms = {key, base64.b64encode(key.encode()).decode(), quote(key, safe=""), key[::-1]}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "[key]")
    if len(key) < SECRET_LENGTH:
        return text
    for part in (lambda n: key[:n], lambda n: key[-n:]):
        for n in range(len(key) - 1, least - 1, -1):
            if part(least) not in text:
                break
            text = text.replace(part(n), "[key]")
    return text
