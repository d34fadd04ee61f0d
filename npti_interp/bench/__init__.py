"""The personality benchmark: personas that put a model at a pole, and open questions that show where it stands.

`PersonalityBench.embedded` is the original set that ships with the package; `PersonalityBench.from_directory`
reads the published layout of NPTI (Deng et al., ICLR 2025) or a set saved by `PersonalityBench.save`. The
functions are the rules that the embedded set keeps, for auditing others.
"""

from npti_interp.bench._bench import PersonalityBench
from npti_interp.bench._checks import (
    answer_format,
    final_sentence,
    near_duplicates,
    printed_options,
    shared_endings,
    topic_overlap,
    trait_words,
)
from npti_interp.bench._schema import LoadReport, Persona, Question, TraitCounts

__all__ = [
    "LoadReport",
    "Persona",
    "PersonalityBench",
    "Question",
    "TraitCounts",
    "answer_format",
    "final_sentence",
    "near_duplicates",
    "printed_options",
    "shared_endings",
    "topic_overlap",
    "trait_words",
]
