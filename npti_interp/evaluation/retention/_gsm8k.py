"""Word problems of GSM8K (arXiv 2110.14168), from the user's copy of the published file: exact match on the final number.

The file is a list of ``{"question", "answer"}``; the number stands behind ``####`` in the answer. The solved examples in
front of a problem are of our own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from npti_interp._files import read_json
from npti_interp.errors import ArtifactError
from npti_interp.evaluation.retention._conditions import Conditions, respond
from npti_interp.evaluation.retention._texts import read_data
from npti_interp.generation import Decoding, Progress
from npti_interp.models import Model

__all__ = ["Problem", "final_number", "gsm8k", "problem_prompt", "read_gsm8k"]

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-−])?\s?[$€£¥]?\s?"
    r"(?P<whole>\d{1,3}(?:[,\u00a0\u202f]\d{3})+(?!\d)|\d+)(?P<decimals>\.\d+)?(?:\s?/\s?(?P<below>[1-9]\d*))?"
)
_MARKS = (
    re.compile(r"####"),
    re.compile(r"\\boxed\s*\{"),
    re.compile(r"(?i)\banswer(?:\s+is)?\s*[:=]|\banswer\s+is\b"),
)


@dataclass(frozen=True)
class Problem:
    """A word problem and its number."""

    question: str
    number: Fraction


_LONGEST = 1000
"""Digits of a number: what repeats a digit without end is none (and Python refuses to read it)."""


def _numbers(text: str) -> list[Fraction]:
    found: list[Fraction] = []
    for m in _NUMBER.finditer(text):
        whole = re.sub(r"\D", "", m["whole"])
        if len(m[0]) > _LONGEST:
            continue
        value = Fraction(whole + (m["decimals"] or "")) / int(m["below"] or 1)
        found.append(-value if m["sign"] else value)
    return found


def final_number(answer: str) -> Fraction | None:
    """The number an answer ends in; None if there is none (then it is *unparsed*).

    In this order: behind the last ``####``; in the last ``\\boxed{…}``; behind the last “answer is” or “answer:”, on its
    line (behind the last equals sign there, if there is one); else the last number of the answer. Thousands separators,
    currency signs and fractions are understood.
    """  # noqa: D301
    for mark in _MARKS:
        places = list(mark.finditer(answer))
        if not places:
            continue
        line = answer[places[-1].end() :].lstrip().split("\n", 1)[0]
        if found := _numbers(line.rsplit("=", 1)[-1]) or _numbers(line):
            return found[0]
    found = _numbers(answer)
    return found[-1] if found else None


def read_gsm8k(path: str | Path | None = None) -> list[Problem]:
    """The published problems.

    Args:
        path: the JSON file; by default ``capability/gsm8k_test.json`` in the folder ``$NPTI_UPSTREAM``.

    Raises:
        FileNotFoundError: it is not there, or no path was given and ``NPTI_UPSTREAM`` is not set.
        ArtifactError: not a list of problems; the message names the first bad row.
    """
    if path is None:
        root = os.environ.get("NPTI_UPSTREAM")
        if not root:
            raise FileNotFoundError(
                "GSM8K is not part of this package; give the path of its JSON file, or set NPTI_UPSTREAM to a folder "
                "with capability/gsm8k_test.json"
            )
        path = Path(root) / "capability/gsm8k_test.json"
    rows = read_json(Path(path))
    if not isinstance(rows, list) or not rows:
        raise ArtifactError(f"{path} is not a list of problems")
    problems: list[Problem] = []
    for k, row in enumerate(rows):
        question, answer = (row.get(key) if isinstance(row, dict) else None for key in ("question", "answer"))
        marked = isinstance(answer, str) and "####" in answer
        number = _numbers(answer.rsplit("####", 1)[1]) if marked else []  # pyright: ignore[reportOptionalMemberAccess]
        if not isinstance(question, str) or not question.strip() or len(number) != 1:
            raise ArtifactError(f"{path}, row {k}: expected a question and an answer that ends in '#### number'")
        problems.append(Problem(question, number[0]))
    return problems


def problem_prompt(question: str, shots: int = 0) -> str:
    """The prompt of a problem, behind ``shots`` solved examples.

    Raises:
        ValueError: fewer than 0 or more than there are.
    """
    examples = read_data("arithmetic")
    if not 0 <= shots <= len(examples):
        raise ValueError(f"shots must lie in 0 … {len(examples)}, got {shots}")
    told = "Solve the problem step by step. End with a line of the form “The answer is: NUMBER”."
    shown = [
        f"Problem: {e['question']}\nSolution: {e['solution']}\nThe answer is: {e['answer']}" for e in examples[:shots]
    ]
    return "\n\n".join([told, *shown, f"Problem: {question}\nSolution:" if shots else f"Problem: {question}"])


def gsm8k(
    model: Model,
    conditions: Conditions,
    problems: Sequence[Problem] | None = None,
    *,
    n: int | None = None,
    shots: int = 0,
    max_new_tokens: int = 256,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | Progress = False,
) -> pd.DataFrame:
    """Solve problems under every condition; exact match on the final number.

    Args:
        model: the unedited model.
        conditions: what is compared with it.
        problems: by default `read_gsm8k`'s.
        n: draw so many of them; None takes all.
        shots: solved examples of our own in front of each.
        max_new_tokens: length of the answers.
        seed: of the draw.
        batch_size: rows decoded at once; changes no result.
        progress: show a bar, or advance the one given by one an answer.

    Returns:
        a row a condition × problem: ``condition``, ``problem`` (its place in the file), ``answer``, ``finished``,
        ``expected``, ``number`` (as text; None if unparsed), ``parsed``, ``correct`` (1 or 0: an unparsed answer is
        wrong, and counted), ``shots``, ``seed``.

    Raises:
        FileNotFoundError: see `read_gsm8k`.
        ValueError: ``n`` or ``shots`` out of range; see `respond`.
    """
    whole = read_gsm8k() if problems is None else list(problems)
    if n is not None and not 1 <= n <= len(whole):
        raise ValueError(f"n must lie in 1 … {len(whole)}, got {n}")
    every = np.arange(len(whole))
    drawn = every if n is None else np.sort(np.random.default_rng(seed).choice(every, n, replace=False))
    chosen = [whole[int(k)] for k in drawn]
    prompts = [problem_prompt(p.question, shots) for p in chosen]
    decoding = Decoding(max_new_tokens)
    answers = respond(model, conditions, prompts, decoding, batch_size=batch_size, progress=progress)
    rows: list[dict[str, Any]] = []
    for (name, _), own in zip(conditions, answers, strict=True):
        for place, problem, answer in zip(drawn.tolist(), chosen, own, strict=True):
            number = final_number(answer)
            rows.append(
                {
                    "condition": name, "problem": place, "answer": str(answer), "finished": answer.finished,
                    "expected": str(problem.number), "number": None if number is None else str(number),
                    "parsed": number is not None, "correct": float(number == problem.number), "shots": shots,
                    "seed": seed,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)
