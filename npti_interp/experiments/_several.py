"""Several traits at once: what is left of each trait's edit when others act beside it.

The paper's case study induces neuroticism and extraversion together. Here any combination of two to five trait-poles is
induced by one composed edit (`compose`), and every answer is judged on every trait of its combination, beside the
answers under each edit alone, under the same composition at random neurons, and unedited. A replay of the combined
answers tells, token by token, how much each trait's edit alone makes the token likelier.
"""

from __future__ import annotations

import copy
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy import special as _special

from npti_interp.evaluation import Interval, benjamini_hochberg, bootstrap_mean, sign_flip_test
from npti_interp.experiments._lab import (
    Condition,
    ExperimentConfig,
    ExperimentResult,
    Lab,
    Meter,
    Session,
    interval_columns,
)
from npti_interp.experiments._paired import preset, random_draws, span
from npti_interp.figures._several import plot_several
from npti_interp.figures._style import TRAIT_COLOURS
from npti_interp.interventions import CONFLICTS, Intervention, NeuronEdit, compose, count_conflicts
from npti_interp.models import Model, Prompt
from npti_interp.models._weights import execution_device
from npti_interp.runs import read_table
from npti_interp.traits import TRAITS, Pole, Trait, as_pole, as_trait

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "SEVERAL_PRESETS",
    "SeveralTraitsConfig",
    "SeveralTraitsResult",
    "several_traits",
    "token_effects",
]

Floats = npt.NDArray[np.float64]
TraitPole = tuple[Trait, Pole]


# -- tokens ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_effects(
    model: Model, prompt: Prompt, tokens: Sequence[int], edits: Sequence[Intervention]
) -> npt.NDArray[np.float64]:
    """How much likelier each token of an answer is under each edit than unedited, the answer being given.

    Every edit acts on the same tokens, so what it changes at a token is its own doing, not that of other words before.
    The first token is always unaffected, as prompts are never edited.

    Args:
        model: the model.
        prompt: what was asked.
        tokens: the answer's token ids.
        edits: the edits, each taken by itself.

    Returns:
        ``log p(token | edit) − log p(token)`` in nats, ``[edit, token]``.

    Raises:
        ValueError: no tokens; an edit is active already, has a random mask, or edits the prompt.
        FingerprintMismatchError: an edit of another model.
    """
    answer = [int(t) for t in tokens]
    if not answer:
        raise ValueError("the answer has no tokens")
    device = execution_device(model.hf_model.get_input_embeddings())
    asked = torch.tensor([model.encode(prompt)], device=device)
    effects = np.zeros((len(edits), len(answer)))
    if len(answer) == 1 or not edits:
        return effects
    cache = model.hf_model(input_ids=asked, use_cache=True).past_key_values
    fed, wanted = (torch.tensor([part], device=device) for part in (answer[:-1], answer[1:]))

    def log_p() -> torch.Tensor:
        logits = model.hf_model(input_ids=fed, past_key_values=copy.deepcopy(cache), use_cache=True).logits[0]
        return logits.float().log_softmax(-1).gather(1, wanted[0, :, None])[:, 0].double()

    plain = log_p()
    for k, edit in enumerate(edits):
        with model.editing(edit):
            effects[k, 1:] = (log_p() - plain).cpu().numpy()
    return effects


def _pieces(model: Model, tokens: Sequence[int]) -> list[str]:
    """The text of each token; a character of several tokens goes to the last of them."""
    pieces: list[str] = []
    done = ""
    for k in range(len(tokens)):
        text: str = model.tokenizer.decode(list(tokens[: k + 1]), skip_special_tokens=True)
        whole = not text.endswith("\ufffd") or k + 1 == len(tokens)
        pieces.append(text[len(done) :] if whole else "")
        done = text if whole else done
    return pieces


# -- settings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeveralTraitsConfig(ExperimentConfig):
    """Settings of `several_traits`.

    Attributes:
        traits: those of the combinations; need not be given.
        combinations: each two to five ``(trait, pole)``, in the order in which their edits are done.
        conflicts: what becomes of neurons that one edit raises and another clamps; see `compose`.
        random_draws: draws of the random control; question *i* gets draw *i* modulo this.
        n_shown: questions a trait and combination whose combined answers are taken apart token by token.
    """

    traits: tuple[str, ...] = ()
    combinations: tuple[tuple[tuple[str, str], ...], ...] = ((("Neuroticism", "high"), ("Extraversion", "high")),)
    conflicts: str = "sequence"
    random_draws: int = 3
    n_shown: int = 4

    def __post_init__(self) -> None:
        named = tuple(tuple((as_trait(t).value, as_pole(p).value) for t, p in c) for c in self.combinations)
        object.__setattr__(self, "combinations", named)
        if not named or len({frozenset(c) for c in named}) != len(named):
            raise ValueError(f"combinations must be at least one, and differ; got {self.combinations}")
        for own in named:
            if not 2 <= len(own) <= len(TRAITS) or len({t for t, _ in own}) != len(own):
                raise ValueError(f"a combination is of two to five different traits; got {own}")
        used = {t for own in named for t, _ in own}
        derived = tuple(t.value for t in TRAITS if t.value in used)
        if self.traits and {as_trait(t).value for t in self.traits} != used:
            raise ValueError(f"traits are those of the combinations, {', '.join(derived)}; leave them out")
        object.__setattr__(self, "traits", derived)
        super().__post_init__()
        if self.conflicts not in CONFLICTS:
            raise ValueError(f"conflicts must be one of {', '.join(CONFLICTS)}, got {self.conflicts!r}")
        if self.random_draws < 1 or not 1 <= self.n_shown <= self.n_questions:
            raise ValueError(
                f"random_draws must be at least 1 and n_shown lie in 1 … n_questions={self.n_questions}; got "
                f"{self.random_draws} and {self.n_shown}"
            )

    @property
    def parts(self) -> list[tuple[TraitPole, ...]]:
        """The combinations, as traits and poles."""
        return [tuple((as_trait(t), as_pole(p)) for t, p in own) for own in self.combinations]


_NE = tuple(
    (("Neuroticism", n), ("Extraversion", e)) for n, e in (("high", "high"), ("high", "low"), ("low", "high"), ("low", "low"))
)  # fmt: skip

SEVERAL_PRESETS: dict[str, SeveralTraitsConfig] = {
    "tiny": SeveralTraitsConfig(
        combinations=_NE[:1], n_questions=4, max_new_tokens=16, random_draws=2, n_shown=2,
    ),
    "quick": SeveralTraitsConfig(
        combinations=(*_NE, (("Agreeableness", "high"), ("Conscientiousness", "high"), ("Neuroticism", "low"))),
        n_questions=8,
    ),
    "full": SeveralTraitsConfig(
        combinations=(
            *_NE,
            (("Agreeableness", "high"), ("Conscientiousness", "high"), ("Neuroticism", "low")),
            (("Agreeableness", "low"), ("Neuroticism", "high"), ("Openness", "low")),
            tuple((t.value, "low" if t is Trait.NEUROTICISM else "high") for t in TRAITS),
            tuple((t.value, "high" if t is Trait.NEUROTICISM else "low") for t in TRAITS),
        ),
        n_questions=40, max_new_tokens=200, random_draws=5, n_shown=8,
    ),
}  # fmt: skip
"""``tiny`` takes half a minute on one core, ``quick`` (240 answers, 220 judgements of six) five minutes on two; ``full``
is for a GPU. A trait more in a combination multiplies the judging: k traits are judged on k times n questions."""


# -- work ------------------------------------------------------------------------------------------------------------


def _single(part: TraitPole) -> str:
    return f"{part[0]} {part[1]}"


def _name(parts: Iterable[TraitPole]) -> str:
    return " + ".join(map(_single, parts))


def _random(parts: Iterable[TraitPole]) -> str:
    return f"random: {_name(parts)}"


def _groups(config: SeveralTraitsConfig) -> dict[str, list[tuple[TraitPole, ...]]]:
    """Combinations of the same traits share their questions, their unedited answers and their single edits."""
    groups: dict[str, list[tuple[TraitPole, ...]]] = {}
    for parts in config.parts:
        key = "".join(sorted(t.letter for t, _ in parts))
        groups.setdefault(key, []).append(parts)
    return groups


def _group_traits(group: Sequence[tuple[TraitPole, ...]]) -> list[Trait]:
    own = {t for t, _ in group[0]}
    return [t for t in TRAITS if t in own]


def _edits(lab: Lab, config: SeveralTraitsConfig, parts: Iterable[TraitPole]) -> list[NeuronEdit]:
    return [lab.of(trait).edit(config.gamma, pole) for trait, pole in parts]


def _random_edits(lab: Lab, config: SeveralTraitsConfig, parts: Iterable[TraitPole]) -> list[list[NeuronEdit]]:
    """The same at random neurons, for each draw."""
    drawn = [
        [draw.edit(config.gamma, pole) for draw in random_draws(lab.of(t), t, config.seed, config.random_draws)[0]]
        for t, pole in parts
    ]
    return [list(edits) for edits in zip(*drawn, strict=True)]


def _conditions(lab: Lab, config: SeveralTraitsConfig, group: Sequence[tuple[TraitPole, ...]]) -> list[Condition]:
    gamma, made = {"gamma": config.gamma}, [Condition("none", facts={"gamma": 0.0})]
    every = dict.fromkeys(part for parts in group for part in parts)
    made += [Condition(_single(part), part[1], _edits(lab, config, [part]), facts=gamma) for part in every]
    for parts in group:
        own = compose(_edits(lab, config, parts), config.conflicts)
        draws = [compose(edits, config.conflicts) for edits in _random_edits(lab, config, parts)]
        made += [Condition(_name(parts), None, [own], facts=gamma), Condition(_random(parts), None, draws, facts=gamma)]
    return made


def several_traits(
    lab: Lab,
    config: SeveralTraitsConfig | str = "quick",
    folder: str | Path | None = None,
    *,
    progress: bool = True,
) -> SeveralTraitsResult:
    """Induce several traits at once, and see what each keeps of its effect.

    Combinations of the same traits are answered together: test questions of each of their traits, unedited, under each
    edit alone, under the composed edits and under the same composition of random neurons. Each answer is judged on all
    traits of the combination, so that a trait counts as induced only if the same answer shows the others too.

    Args:
        lab: model, bench, neurons and judge.
        config: settings, or the name of a preset.
        folder: where the run goes; by default ``several`` in the lab's run folder.
        progress: show a bar.

    Returns:
        the result; its files are in the folder.

    Raises:
        ValueError: unknown preset, bad settings, no neurons of a trait, too few questions.
        RunFolderError: the folder belongs to other settings.
    """
    config = preset(config, SEVERAL_PRESETS)
    with lab.session("several", config, folder, progress=progress) as session:
        groups = _groups(config)
        for group in groups.values():
            traits = _group_traits(group)
            n_conditions = 1 + len({p for parts in group for p in parts}) + 2 * len(group)
            session.plan([(config.n_questions, n_conditions, len(traits))] * len(traits))
        replays = sum(len(c) * config.n_shown for c in config.combinations)
        cost = replays * 5.0 * (60 + config.max_new_tokens)
        session.bar.total += cost
        session.run.table("neurons/conflicts.parquet", lambda: _conflict_table(lab, config))
        for key, group in groups.items():
            traits = _group_traits(group)
            for trait in traits:
                session.test(
                    f"{key}-{trait}", trait, session.questions(trait),
                    lambda group=group: _conditions(lab, config, group), judged=traits,
                )  # fmt: skip
        session.run.table(
            "answers/tokens.parquet", lambda: _token_table(session, config, Meter(session.bar, cost / replays))
        )
        result = SeveralTraitsResult.from_folder(session.run.path, config)
        session.run.texts({"answers.html": result.answers_html()})
        session.finish(result)
        return result


def _conflict_table(lab: Lab, config: SeveralTraitsConfig) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for parts in config.parts:
        counts = count_conflicts(_edits(lab, config, parts))
        drawn = [count_conflicts(edits)["conflicting"] for edits in _random_edits(lab, config, parts)]
        rows.append(
            {
                "combination": _name(parts),
                "rule": config.conflicts,
                **counts,
                "conflicting_random": float(np.mean(drawn)),
            }
        )
    return pd.DataFrame(rows)


def _token_table(session: Session, config: SeveralTraitsConfig, progress: Meter) -> pd.DataFrame:
    """Replays of the combined answers under each edit alone: one row a token × edit."""
    session.bar.set_postfix_str("replaying answers")
    model, lab = session.lab.model, session.lab
    rows: list[dict[str, Any]] = []
    for key, group in _groups(config).items():
        for parts in group:
            single = dict(zip(map(_single, parts), _edits(lab, config, parts), strict=True))
            draws = [compose(edits, config.conflicts) for edits in _random_edits(lab, config, parts)]
            together = compose(list(single.values()), config.conflicts)
            for trait in _group_traits(group):
                answers = read_table(session.run.path / f"answers/{key}-{trait}.parquet")
                shown: Any = answers[answers["condition"] == _name(parts)].head(config.n_shown)
                for place, row in enumerate(shown.to_dict("records")):
                    # The draw that answered this question.
                    edits = {**single, "combined": together, "random": draws[place % len(draws)]}
                    tokens = [int(t) for t in row["tokens"]]
                    effects = token_effects(model, row["question"], tokens, list(edits.values()))
                    pieces = _pieces(model, tokens)
                    rows += [
                        {
                            "combination": _name(parts), "trait": trait.value, "question_id": row["question_id"],
                            "place": k, "token": token, "piece": piece, "edit": edit, "change": float(effects[e, k]),
                        }
                        for e, edit in enumerate(edits)
                        for k, (token, piece) in enumerate(zip(tokens, pieces, strict=True))
                    ]  # fmt: skip
                    progress.update()
    return pd.DataFrame(rows)


# -- result ----------------------------------------------------------------------------------------------------------


def _wide(scores: pd.DataFrame, judged: Trait, value: str) -> pd.DataFrame:
    """Questions × conditions, for one judged trait; the index says whose question it is."""
    own: Any = scores[scores["judged"] == judged.value]
    return own.pivot(index=["trait", "question_id"], columns="condition", values=value)  # noqa: PD010


def _logit(rating: pd.DataFrame) -> pd.DataFrame:
    """Ratings on the judge's own scale, which has no ends to be squeezed against."""
    share = np.clip((rating.to_numpy(np.float64) - 1) / 4, 1e-9, 1 - 1e-9)
    return pd.DataFrame(_special.logit(share), index=rating.index, columns=rating.columns)


@dataclass(frozen=True)
class SeveralTraitsResult(ExperimentResult):
    """What `several_traits` found.

    Tables (changes are from the unedited answer to the same question, *oriented*: positive is toward the wanted pole;
    intervals and p-values by resampling questions and flipping signs; q-values are Benjamini–Hochberg's over the table):

    - ``effects``: combination × judged trait × condition (the trait's own edit alone, the other edits alone, combined,
      random), over all of the combination's questions and over the trait's own.
    - ``additivity``: for each trait of a combination, combined − alone (``difference``), combined − random
      (``over_random``), and the departure from additivity on the judge's logit scale (``interaction``: combined − sum of
      all the edits alone).
    - ``together``: share of answers in which *every* trait of the combination moved to its wanted side, and fluency.
    - ``conflicts``: neurons that several edits touch, by kind.
    - ``tokens``: nats a token by which each edit alone makes the combined answers likelier.

    Attributes:
        answers: the answers, one row a group × question × condition.
        tokens: one row a token × edit of the answers that were replayed.
    """

    config: SeveralTraitsConfig
    answers: pd.DataFrame
    tokens: pd.DataFrame
    name: ClassVar[str] = "several"
    config_type: ClassVar[type[ExperimentConfig]] = SeveralTraitsConfig

    @classmethod
    def from_folder(cls, folder: Path, config: Any) -> Self:
        """See `ExperimentResult.from_folder`."""
        chosen: SeveralTraitsConfig = config
        effects: list[dict[str, Any]] = []
        additivity: list[dict[str, Any]] = []
        together: list[dict[str, Any]] = []
        answers: list[pd.DataFrame] = []
        for key, group in _groups(chosen).items():
            traits = _group_traits(group)
            scores = pd.concat([read_table(folder / f"scores/{key}-{t}.parquet") for t in traits], ignore_index=True)
            answers += [read_table(folder / f"answers/{key}-{t}.parquet").assign(group=key) for t in traits]
            for parts in group:
                effects += _effect_rows(scores, parts, chosen.seed)
                additivity += _additivity_rows(scores, parts, chosen.seed)
                together += _together_rows(scores, parts, chosen.seed)
        tokens = read_table(folder / "answers/tokens.parquet")
        tables = {
            "effects": _with_q(pd.DataFrame(effects), ["p"]),
            "additivity": _with_q(pd.DataFrame(additivity), ["difference_p", "over_random_p", "interaction_p"]),
            "together": _with_q(pd.DataFrame(together), ["over_random_p"]),
            "conflicts": read_table(folder / "neurons/conflicts.parquet"),
            "tokens": _token_summary(tokens, chosen.seed),
        }
        return cls(folder, chosen, tables, pd.concat(answers, ignore_index=True), tokens)

    def summary(self) -> str:
        """See `ExperimentResult.summary`."""
        c = self.config
        t: dict[str, Any] = dict(self.tables)
        add, both, tokens, conflicts = (
            t["additivity"],
            t["together"],
            t["tokens"],
            t["conflicts"].set_index("combination"),
        )
        kept = int((add["over_random_low"] > 0).sum())
        lost = int(((add["difference_high"] < 0) & (add["difference_q"] < 0.05)).sum())
        gained = int(((add["difference_low"] > 0) & (add["difference_q"] < 0.05)).sum())
        lines = [
            "# Several traits at once",
            "",
            f"{len(c.combinations)} combinations; {c.n_questions} test questions of each of their traits, "
            f"{c.max_new_tokens} tokens; γ = {c.gamma:g} for every edit; neurons in conflict: {c.conflicts}. Changes are "
            "of the judge's rating (1–5) from the unedited answer, positive toward the wanted pole, with 95 % intervals "
            "by bootstrap over questions.",
            "",
            f"**Does each trait stay induced beside the others?** In {kept} of {len(add)} cases a trait moves "
            f"further to the wanted side than with random neurons (paired 95 % interval above 0; "
            f"{int(((add['over_random_q'] < 0.05) & (add['over_random'] > 0)).sum())} with q < 0.05). Against the trait's "
            f"edit alone, the combination does less in {lost} and more in {gained} (q < 0.05); in the other "
            f"{len(add) - lost - gained} the data do not say, which is not to say that nothing changes.",
            "",
        ]
        for own in c.parts:
            name = _name(own)
            joint: Any = both[both["combination"] == name].set_index("condition")
            k = conflicts.loc[name]
            lines += [
                f"## {name}",
                "",
                f"{int(k['conflicting']):,} of the {int(k['raised']):,} raised neurons are clamped as well "
                f"({k['conflicting_random']:,.0f} with random neurons), {int(k['raised_by_several']):,} are raised and "
                f"{int(k['clamped_by_several']):,} clamped by several edits. Every trait moves to its wanted side in "
                f"{_share(joint.loc['combined'], 'joint')} of the answers; {_share(joint.loc['random'], 'joint')} with "
                f"random neurons. NLL {span(joint.loc['combined'], 'nll')} nats a token, repeated 4-grams "
                f"{span(joint.loc['combined'], 'repetition')}.",
                "",
            ]
            for row in add[add["combination"] == name].to_dict("records"):
                lines.append(
                    f"- {row['judged']} {row['pole']}: {span(row, 'combined')} combined, {span(row, 'single')} alone, "
                    f"{span(row, 'random')} random; combined − alone {span(row, 'difference')} "
                    f"(q = {row['difference_q']:.3f}); from additivity, in the judge's logits: "
                    f"{span(row, 'interaction')} (q = {row['interaction_q']:.3f})."
                )
            told = "; ".join(
                f"{row['edit']} {span(row, 'change', 3)}"
                for row in tokens[tokens["combination"] == name].to_dict("records")
            )
            lines += [f"- Nats a token that each edit by itself adds to the combined answers: {told}.", ""]
        lines += [
            "The combined answers were chosen under the combined edit, so that edits which took part make them likelier is "
            "no surprise; what counts is which part does, and that random neurons do not. Ratings on questions of another "
            "trait lean on a judge that was calibrated on the trait's own: `effects.csv` has both.",
            "",
        ]
        return "\n".join(lines)

    def figures(self) -> dict[str, tuple[Figure, pd.DataFrame]]:
        """See `ExperimentResult.figures`."""
        return {"several": plot_several(self.tables["additivity"])}

    def answers_html(self) -> str:
        """The replayed answers side by side as one HTML page; the combined answers' tokens coloured by trait.

        A token has the colour of the trait whose edit alone makes it likeliest, the stronger the more nats that is (full
        at 2); all numbers are in its tooltip.
        """
        colours = " ".join(
            f'<span style="background:{_tint(t, 1.5)}">{html.escape(t.value)}</span>'
            for t in map(as_trait, self.config.traits)
        )
        pages = [
            "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>Several traits at once</title>"
            "<style>body{font:14px/1.45 sans-serif;margin:2em}table{border-collapse:collapse;margin:1em 0}"
            "td,th{border:1px solid #ccc;padding:.4em .6em;vertical-align:top;text-align:left}</style></head><body>"
            "<h1>Several traits at once</h1><p>In the combined answers a token has the colour of the trait whose edit "
            f"alone makes it likeliest: {colours}. Point at it for nats.</p>"
        ]
        for key, group in _groups(self.config).items():
            pages += [f"<h2>{html.escape(_name(parts))}</h2>{self._page(key, parts)}" for parts in group]
        return "".join([*pages, "</body></html>\n"])

    def _page(self, key: str, parts: tuple[TraitPole, ...]) -> str:
        name = _name(parts)
        columns = ["none", *map(_single, parts)]
        own: Any = self.answers[self.answers["group"] == key]
        by_id = {(r["question_id"], r["condition"]): r for r in own.to_dict("records")}
        shown: Any = self.tokens[self.tokens["combination"] == name]
        head = ["question", "no edit", *map(_single, parts), "combined"]
        rows = ["<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"]
        for question_id, tokens in shown.groupby("question_id", sort=False):
            cells = [html.escape(by_id[question_id, "none"]["question"])]
            cells += [html.escape(by_id[question_id, column]["answer"]) for column in columns]
            cells.append(_coloured(tokens, parts))
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        return "<table>" + "".join(rows) + "</table>"

    def _repr_html_(self) -> str:
        return self.answers_html() + super()._repr_html_()


def _tint(trait: Trait, nats: float) -> str:
    red, green, blue = (int(TRAIT_COLOURS[trait][k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},{min(1.0, max(0.0, nats / 2)) * 0.75:.2f})"


def _coloured(tokens: pd.DataFrame, parts: tuple[TraitPole, ...]) -> str:
    wide: Any = tokens.pivot(index=["place", "piece"], columns="edit", values="change")  # noqa: PD010
    spans: list[str] = []
    for (_, piece), row in wide.iterrows():
        best = max(parts, key=lambda part: row[_single(part)])
        told = html.escape(", ".join(f"{_single(part)} {row[_single(part)]:+.2f}" for part in parts), quote=True)
        colour = _tint(best[0], float(row[_single(best)]))
        spans.append(f'<span style="background:{colour}" title="{told}">{html.escape(piece)}</span>')
    return "".join(spans)


def _with_q(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    names: list[str] = []
    for name in table.columns:
        names.append(str(name))
        if name in columns:
            names.append(f"{str(name).removesuffix('p')}q")
    q = {f"{name.removesuffix('p')}q": benjamini_hochberg(table[name]) for name in columns}
    return table.assign(**q).reindex(columns=names)


def _share(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.0%} [{row[f'{name}_low']:.0%}, {row[f'{name}_high']:.0%}]"


def _mean(values: Any, seed: int) -> Interval:
    return bootstrap_mean(values, seed=seed)


def _effect_rows(scores: pd.DataFrame, parts: tuple[TraitPole, ...], seed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    named = {**{_single(p): _single(p) for p in parts}, _name(parts): "combined", _random(parts): "random"}
    for trait, pole in parts:
        rating = _wide(scores, trait, "rating")
        change = rating.sub(rating["none"], axis=0) * pole.sign
        for questions in ("all", "own"):
            kept: Any = change if questions == "all" else change.loc[[trait.value]]
            unedited = rating["none"] if questions == "all" else rating.loc[[trait.value], "none"]
            for condition, label in named.items():
                values = kept[condition].to_numpy()
                found = _mean(values, seed)
                rows.append(
                    {
                        "combination": _name(parts), "judged": trait.value, "pole": pole.value, "questions": questions,
                        "condition": "alone" if condition == _single((trait, pole)) else label,
                        **interval_columns("change", found), "p": sign_flip_test(values, seed=seed),
                        "unedited": float(np.nanmean(unedited)), "n": found.n, "unscored": found.unscored,
                    }
                )  # fmt: skip
    return rows


def _additivity_rows(scores: pd.DataFrame, parts: tuple[TraitPole, ...], seed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for trait, pole in parts:
        rating = _wide(scores, trait, "rating")
        change = rating.sub(rating["none"], axis=0) * pole.sign
        logit = _logit(rating)
        logit = logit.sub(logit["none"], axis=0) * pole.sign
        alone, combined, random = (change[c] for c in (_single((trait, pole)), _name(parts), _random(parts)))
        contrasts = {
            "difference": combined - alone,
            "over_random": combined - random,
            "interaction": logit[_name(parts)] - logit[[_single(p) for p in parts]].sum(axis=1, skipna=False),
        }
        row: dict[str, Any] = {"combination": _name(parts), "judged": trait.value, "pole": pole.value}
        for label, values in (("single", alone), ("combined", combined), ("random", random)):
            row |= interval_columns(label, _mean(values, seed))
        for label, values in contrasts.items():
            row |= {**interval_columns(label, _mean(values, seed)), f"{label}_p": sign_flip_test(values, seed=seed)}
        rows.append({**row, "n": int(np.isfinite(combined).sum())})
    return rows


def _together_rows(scores: pd.DataFrame, parts: tuple[TraitPole, ...], seed: int) -> list[dict[str, Any]]:
    moved: list[pd.DataFrame] = []
    for trait, pole in parts:
        rating = _wide(scores, trait, "rating")
        change = rating.sub(rating["none"], axis=0) * pole.sign
        moved.append((change > 0).astype(float).where(change.notna()))
    joint: Any = sum(frame.to_numpy() for frame in moved)
    every = pd.DataFrame(
        np.where(np.isnan(joint), np.nan, joint == len(parts)), index=moved[0].index, columns=moved[0].columns
    )
    nll, repetition = (_wide(scores, parts[0][0], v) for v in ("nll", "repetition_4"))
    rows: list[dict[str, Any]] = []
    conditions = {_name(parts): "combined", **{_single(p): _single(p) for p in parts}, _random(parts): "random"}
    for condition, label in conditions.items():
        over = every[condition] - every[_random(parts)]
        rows.append(
            {
                "combination": _name(parts), "condition": label,
                **interval_columns("joint", _mean(every[condition], seed)),
                **interval_columns("over_random", _mean(over, seed)),
                "over_random_p": sign_flip_test(over, seed=seed) if label != "random" else float("nan"),
                **interval_columns("nll", _mean(nll[condition] - nll["none"], seed)),
                **interval_columns("repetition", _mean(repetition[condition] - repetition["none"], seed)),
                "n": int(np.isfinite(every[condition].to_numpy()).sum()),
            }
        )  # fmt: skip
    return rows


def _token_summary(tokens: pd.DataFrame, seed: int) -> pd.DataFrame:
    later: Any = tokens[tokens["place"] > 0]  # the first token is the unedited model's
    each = later.groupby(["combination", "edit", "question_id"], sort=False)["change"].mean().reset_index()
    rows = [
        {
            "combination": combination,
            "edit": edit,
            **interval_columns("change", _mean(part["change"], seed)),
            "n": len(part),
        }
        for (combination, edit), part in each.groupby(["combination", "edit"], sort=False)
    ]
    return pd.DataFrame(rows)
