"""What of an answer's form can be counted without a model."""

from __future__ import annotations

import math
import re

__all__ = ["distinct_n", "repetition"]


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"[\w']+", text.casefold())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct_n(text: str, n: int = 2) -> float:
    """Share of distinct n-grams among an answer's n-grams of words; NaN for a text of fewer than n words."""
    grams = _ngrams(text, n)
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(text: str, n: int = 4) -> float:
    """Share of n-grams of words that occurred before in the same answer; 0 for a text of fewer than n words, NaN for none."""
    grams = _ngrams(text, n)
    if not text.strip():
        return math.nan
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
