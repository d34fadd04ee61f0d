r"""NPTI against steering vectors, inside the model: do they do the same thing?

It goes on where `compare` ended: with its vectors, its chosen settings and its judged answers. For each trait, and each
steering method *V* with a vector *v_l* after every layer (towards the high pole):

- **Direction** (a). What the edit towards the high pole writes minus what the one towards the low pole writes,
  ``D_l = Σ_i amount_i · m_i · W_out[i]`` over the trait's neurons of layer *l* with *m_i* the mean of ĥW3 that the
  addition is multiplied by, and its sum over the layers up to *l*. Cosine with *v_l*, beside the same for random neurons,
  as many in each layer.
- **Span** (b). Share of *v_l*'s squared length that lies in the span of the W_out rows of the layer's trait neurons,
  beside as many random ones (a random vector has n / d_model).
- **Drive** (c). With answers given and fed back: how much *V* raises the trait's high-pole neurons over its low-pole ones
  (in standard deviations of each neuron, half of high minus low), and how far the neuron edit moves the residual along
  *v_l* (in halves of *v_l*'s own length: 1 is as far as a pole lies from the middle of both). Both beside random neurons.
- **Agreement** (d). Spearman's correlation over questions of the pole pair's scores under the two.
- **Tokens** (e). Direct logit attribution of the summed write and of the vector: the tokens each raises, and the
  correlation of the two over the vocabulary, beside random neurons.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from npti_interp._files import read_json
from npti_interp.evaluation import bootstrap_mean, spearman
from npti_interp.experiments._compare import CompareResult, label_of
from npti_interp.experiments._lab import (
    ExperimentConfig,
    ExperimentResult,
    Lab,
    Session,
    finished_run,
    interval_columns,
)
from npti_interp.experiments._paired import BOTH, RESAMPLES, measures, preset, random_draws
from npti_interp.experiments._replay import (
    Replay,
    amounts,
    logit_vectors,
    matched_draws,
    replayed,
    scattered,
    written_rows,
)
from npti_interp.experiments._search_data import search_data
from npti_interp.experiments._writes import visible
from npti_interp.figures._inside import plot_inside
from npti_interp.generation import Answer
from npti_interp.interventions import Intervention
from npti_interp.methods import METHODS, ActAdd, Prepared
from npti_interp.methods._actadd import FrontVectors
from npti_interp.methods._vectors import Steering
from npti_interp.neurons import NeuronSet
from npti_interp.runs import read_manifest, read_table
from npti_interp.traits import POLES, Pole, Trait

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["INSIDE_PRESETS", "InsideConfig", "InsideResult", "inside"]

Floats = npt.NDArray[np.float64]
_BAND = (0.025, 0.975)
_EXACT = 1e-6  # relative singular values below are rounding


@dataclass(frozen=True)
class InsideConfig(ExperimentConfig):
    """Settings of `inside`. Nothing is decoded: answers come from the comparison.

    Attributes:
        vectors: steering methods, names in `npti_interp.methods.METHODS`.
        n_answers: answers that are replayed a trait.
        random_draws: draws of random neurons for weights; ``random_edits`` of them are edited in the model.
        random_edits: see ``random_draws``.
        n_tokens: tokens listed at either end.
    """

    vectors: tuple[str, ...] = ("actadd", "caa", "persona_vector")
    n_answers: int = 12
    random_draws: int = 100
    random_edits: int = 3
    n_tokens: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.vectors or len(set(self.vectors)) != len(self.vectors):
            raise ValueError(f"vectors must be at least one, and differ; got {self.vectors}")
        if self.n_answers < 2 or self.random_draws < 20 or self.random_edits < 1 or self.n_tokens < 1:
            raise ValueError(
                "n_answers must be at least 2, random_draws 20, random_edits and n_tokens 1; got "
                f"{self.n_answers}, {self.random_draws}, {self.random_edits} and {self.n_tokens}"
            )


INSIDE_PRESETS: dict[str, InsideConfig] = {
    "tiny": InsideConfig(
        traits=("Neuroticism",), vectors=("caa",), n_answers=2, random_draws=20, random_edits=1, n_tokens=3
    ),
    "quick": InsideConfig(traits=("Neuroticism",)),
    "full": InsideConfig(n_answers=90, random_draws=1000, random_edits=10, n_tokens=20),
}
"""Those of `COMPARE_PRESETS` go before them."""


@dataclass(frozen=True)
class _Trait:
    """What the comparison left of one trait."""

    trait: Trait
    neurons: NeuronSet
    vectors: Mapping[str, Float[Tensor, "layer d_model"]]
    interventions: Mapping[tuple[str, Pole], Intervention]
    questions: Sequence[str]
    answers: Sequence[Answer]
    random: Sequence[NeuronSet]
    gammas: Mapping[Pole, float]


def after_layers(prepared: Prepared) -> Float[Tensor, "layer d_model"]:
    """A steering method's vector after each layer; NaN after the last for one that is defined before layers.

    Of a vector for each position (ActAdd) the sum over positions, which is what enters the prompt as a whole.

    Raises:
        ValueError: the method has no vectors in the residual stream.
    """
    if isinstance(prepared, Steering):
        return prepared.vectors.float()
    if isinstance(prepared, FrontVectors):
        before = prepared.difference.float().sum(dim=1)
        return torch.cat([before[1:], torch.full_like(before[:1], torch.nan)])
    raise ValueError(f"{type(prepared).__name__} is no direction in the residual stream")


def _load(lab: Lab, config: InsideConfig, compared: Path, trait: Trait) -> _Trait:
    data = search_data(lab, trait)
    choices: Any = read_table(compared / f"choices/{trait}.parquet").set_index(["method", "pole"])
    vectors, edits, gammas = dict[str, Tensor](), dict[tuple[str, Pole], Intervention](), dict[Pole, float]()
    for name in (*config.vectors, "npti"):
        folder = compared / f"prepared/{trait}/{name}"
        own = type(METHODS[name]).from_settings(read_json(folder / "about.json")["settings"])
        prepared = own.load(folder, data)
        if name != "npti":
            vectors[name] = after_layers(prepared)
        for pole in POLES:
            setting = json.loads(choices.loc[(name, pole.value), "setting"])
            edit = prepared.intervention(pole, setting)
            assert edit is not None
            edits[name, pole] = edit
            if name == "npti":
                gammas[pole] = setting["gamma"]
    table: Any = read_table(compared / f"answers/test-{trait}.parquet")
    plain = table[table["condition"] == "none"].iloc[: config.n_answers]
    answers = [Answer(a, [int(k) for k in t]) for a, t in zip(plain["answer"], plain["tokens"], strict=True)]
    draws, _ = random_draws(lab.of(trait), trait, config.seed, config.random_edits)
    return _Trait(trait, lab.of(trait), vectors, edits, plain["question"].tolist(), answers, draws, gammas)


# -- weights ---------------------------------------------------------------------------------------------------------


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


def _band(name: str, draws: Tensor | Floats) -> dict[str, float]:
    """Mean and 95 % range of what random neurons give."""
    values = np.asarray(draws, np.float64)
    low, high = np.quantile(values, _BAND)
    return {
        f"{name}_random": float(values.mean()),
        f"{name}_random_low": float(low),
        f"{name}_random_high": float(high),
    }


def explained_share(vector: Float[Tensor, " d_model"], rows: Float[Tensor, "row d_model"]) -> float:
    """Share of the vector's squared length that lies in the span of ``rows``; 0 for no rows."""
    if not len(rows):
        return 0.0
    _, size, basis = torch.linalg.svd(rows.double(), full_matrices=False)
    kept = basis[size > _EXACT * size[0]]
    unit = vector.double() / vector.double().norm()
    return float((kept @ unit).square().sum())


def _direction_rows(
    lab: Lab, config: InsideConfig, own: _Trait, replays: Mapping[Pole, Replay]
) -> tuple[pd.DataFrame, Float[Tensor, "draw d_model"]]:
    """Directions and spans, a row a layer × vector; and the summed write with its random draws (row 0 is the trait's)."""
    model, neurons = lab.model, own.neurons
    rng = np.random.default_rng([config.seed, list(Trait).index(own.trait)])
    given = {p: amounts(neurons, own.gammas[p], p) * p.sign for p in POLES}
    total = torch.zeros(1 + config.random_draws, model.sites.d_model, dtype=torch.float64)
    rows: list[dict[str, Any]] = []
    for layer in range(model.sites.n_layers):
        here = neurons.layer == layer
        write = torch.zeros_like(total)
        places = np.zeros((1 + config.random_draws, 0), np.int64)
        if here.any():
            drawn = matched_draws(neurons, layer, model.sites.d_mlp, config.random_draws, rng)
            places = np.concatenate([neurons.neuron[here][None], drawn])
            for pole in POLES:
                weight = written_rows(model, layer, replays[pole].post_scale[layer])
                multiplier = torch.from_numpy(replays[pole].multiplier[layer]).to(weight)
                added = scattered(places, given[pole][here], model.sites.d_mlp).to(weight)
                write += ((added * multiplier) @ weight).double().cpu()
        total += write
        weight = written_rows(model, layer).cpu()
        for name, vectors in own.vectors.items():
            vector = vectors[layer]
            row: dict[str, Any] = {"vector": name, "layer": layer, "neurons": int(here.sum())}
            if torch.isfinite(vector).all() and here.any():
                for key, made in (("cosine", write), ("cosine_upto", total)):
                    found = _cosine(made, vector[None].double())
                    row |= {key: float(found[0]), **_band(key, found[1:])}
                shares = [
                    explained_share(vector, weight[torch.from_numpy(p)])
                    for p in places[: 1 + min(config.random_draws, 40)]
                ]
                row |= {"explained": shares[0], **_band("explained", np.array(shares[1:]))}
            rows.append(row)
    return pd.DataFrame(rows), total


# -- the model at work -----------------------------------------------------------------------------------------------


def _drive_rows(session: Session, own: _Trait) -> pd.DataFrame:
    """How much each moves the other's site, a row a layer × vector × measure × what is edited or looked at."""
    lab, config, model = session.lab, session.config, session.lab.model
    neurons = own.neurons
    sd = np.sqrt(
        np.mean(
            [s.m2 / max(1, int(s.n_tokens.sum()) - 1) for s in (lab.statistics(own.trait, p) for p in POLES)], axis=0
        )
    )

    def halves(site: Any, high: Intervention, low: Intervention) -> Tensor:
        """Half of high minus low at a site, ``[question, layer, width]``."""
        read = [model.read(own.questions, own.answers, site=site, intervention=i) for i in (high, low)]
        return (read[0] - read[1]) / 2

    def of_set(change: Tensor, chosen: NeuronSet, layer: int) -> Floats:
        """Mean change of a set's high-pole neurons minus that of its low-pole ones, in SDs, a number a question."""
        here = chosen.layer == layer
        index = chosen.neuron[here]
        scaled = change[:, layer, torch.from_numpy(index)].double().numpy() / np.maximum(sd[layer, index], 1e-12)
        sign = np.sign(chosen.delta[here])
        means = [scaled[:, sign == s].mean(axis=1) if (sign == s).any() else np.zeros(len(scaled)) for s in (1, -1)]
        return means[0] - means[1]

    rows: list[dict[str, Any]] = []
    for name in own.vectors:
        change = halves("value", own.interventions[name, Pole.HIGH], own.interventions[name, Pole.LOW])
        for layer in np.unique(neurons.layer).tolist():
            about = {"vector": name, "layer": layer, "measure": "vector drives neurons"}
            for kind, sets in (("trait", [neurons]), ("random", own.random)):
                value = np.mean([of_set(change, chosen, layer) for chosen in sets], axis=0)
                found = bootstrap_mean(value, n_resamples=RESAMPLES, seed=config.seed)
                rows.append({**about, "neurons": kind, **interval_columns("change", found)})
    edits = {"trait": [(own.interventions["npti", Pole.HIGH], own.interventions["npti", Pole.LOW])]}
    edits["random"] = [tuple(d.edit(own.gammas[p], p) for p in POLES) for d in own.random]  # pyright: ignore[reportArgumentType]
    for kind, pairs in edits.items():
        moved = [halves("residual", *pair) for pair in pairs]
        for name, vectors in own.vectors.items():
            for layer in range(model.sites.n_layers):
                vector = vectors[layer].double()
                if not torch.isfinite(vector).all():
                    continue
                along = [2 * (m[:, layer].double() @ vector) / vector.square().sum() for m in moved]
                found = bootstrap_mean(torch.stack(along).mean(dim=0).numpy(), n_resamples=RESAMPLES, seed=config.seed)
                about = {"vector": name, "layer": layer, "measure": "neurons move residual", "neurons": kind}
                rows.append({**about, **interval_columns("change", found)})
    return pd.DataFrame(rows)


def _token_rows(
    lab: Lab, config: InsideConfig, own: _Trait, total: Tensor, compared: Path
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tokens that the write and each vector raise and lower, and how far the two agree over the vocabulary."""
    choices: Any = read_table(compared / f"choices/{own.trait}.parquet").set_index(["method", "pole"])
    written = logit_vectors(lab.model, total.float()).double()
    tokens, agreement = list[dict[str, Any]](), list[dict[str, Any]]()

    def ends(name: str, logits: Tensor) -> None:
        standard = logits / logits.std()
        order = standard.argsort(descending=True)
        for side, ids in (("raised", order[: config.n_tokens]), ("lowered", order.flip(0)[: config.n_tokens])):
            tokens.extend(
                {"direction": name, "side": side, "rank": k, "token": visible(str(lab.model.tokenizer.decode([int(i)]))),
                 "logit": float(standard[i])}
                for k, i in enumerate(ids)
            )  # fmt: skip

    ends("npti", written[0])
    for name, vectors in own.vectors.items():
        layer = int(json.loads(choices.loc[(name, Pole.HIGH.value), "setting"])["layer"])
        layer -= isinstance(METHODS[name], ActAdd)  # it is added before its layer
        layer = min(max(layer, 0), len(vectors) - 1)
        logits = logit_vectors(lab.model, vectors[layer][None]).double()[0]
        ends(name, logits)
        centred = written - written.mean(dim=1, keepdim=True)
        found = _cosine(centred, (logits - logits.mean())[None])
        agreement.append(
            {"vector": name, "layer": layer, "correlation": float(found[0]), **_band("correlation", found[1:])}
        )
    return pd.DataFrame(tokens), pd.DataFrame(agreement)


def _agreement_rows(config: InsideConfig, own: _Trait, compared: Path) -> pd.DataFrame:
    """Spearman's correlation over questions of the pole pair's score under NPTI and under every other method."""
    scores = read_table(compared / f"scores/test-{own.trait}.parquet")
    induced = measures(scores, BOTH)["induced"]
    rng = np.random.default_rng(config.seed)
    rows: list[dict[str, Any]] = []
    for other in induced.columns:
        if other in ("none", "npti"):
            continue
        pair = induced[["npti", other]].dropna().to_numpy()
        if len(pair) < 3:
            continue
        draws = [spearman(*pair[rng.integers(0, len(pair), len(pair))].T) for _ in range(RESAMPLES)]
        low, high = np.nanquantile(draws, _BAND)
        rows.append({"method": other, "rho": spearman(*pair.T), "rho_low": low, "rho_high": high, "n": len(pair)})
    return pd.DataFrame(rows)


# -- the experiment --------------------------------------------------------------------------------------------------


def inside(
    lab: Lab,
    config: InsideConfig | str = "quick",
    folder: str | Path | None = None,
    *,
    compared: str | Path | None = None,
    progress: bool = True,
) -> InsideResult:
    """Compare NPTI with steering vectors inside the model.

    Args:
        lab: the lab that the comparison was made with.
        config: the settings, or the name of a preset (`INSIDE_PRESETS`).
        folder: the run folder; by default ``inside`` in the lab's run. A run that was stopped continues there.
        compared: folder of a finished `compare` run; by default ``compare`` in the lab's run.
        progress: show a bar.

    Raises:
        FileNotFoundError: there is no finished comparison.
        ValueError: unknown preset; the comparison lacks a trait or a method; the lab was not made from a run.
        RunFolderError: the folder belongs to other settings, or another process works in it.
    """
    chosen = preset(config, INSIDE_PRESETS)
    if compared is None:
        if lab.run is None:
            raise ValueError("say where the comparison is: this lab was not made from a run")
        compared = lab.run / CompareResult.name
    source = Path(compared)
    made = finished_run(source, CompareResult.name, "run the experiment 'compare' first")["settings"]
    if missing := [t for t in chosen.traits if t not in made["traits"]]:
        raise ValueError(f"the comparison in {source} lacks {', '.join(missing)}")
    if missing := [m for m in (*chosen.vectors, "npti") if m not in made["methods"]]:
        raise ValueError(f"the comparison in {source} lacks {', '.join(missing)}")
    about = {"compared": read_manifest(source)["config.json"]}
    lab.model.require_weights("looking inside")
    with lab.session(InsideResult.name, chosen, folder, progress=progress, more=about) as session:
        session.bar.total = 2 * len(chosen.traits) * chosen.n_answers
        for trait in chosen.trait_list:
            _trait_steps(session, chosen, source, trait)
        result = InsideResult.from_folder(session.run.path, chosen)
        session.finish(result)
    return result


def _trait_steps(session: Session, config: InsideConfig, compared: Path, trait: Trait) -> None:
    run, lab = session.run, session.lab
    names = ("directions", "tokens", "logits", "drive", "agreement")
    if all(run.done(f"{name}/{trait}.parquet") for name in names):
        return
    own = _load(lab, config, compared, trait)
    replays = {pole: replayed(session, trait, pole, config.n_answers)[0] for pole in POLES}
    session.bar.set_postfix_str(f"{trait}: directions")
    directions, total = _direction_rows(lab, config, own, replays)
    run.table(f"directions/{trait}.parquet", lambda: directions)
    tokens, logits = _token_rows(lab, config, own, total, compared)
    run.table(f"tokens/{trait}.parquet", lambda: tokens)
    run.table(f"logits/{trait}.parquet", lambda: logits)
    session.bar.set_postfix_str(f"{trait}: the model at work")
    run.table(f"drive/{trait}.parquet", lambda: _drive_rows(session, own))
    run.table(f"agreement/{trait}.parquet", lambda: _agreement_rows(config, own, compared))


@dataclass(frozen=True)
class InsideResult(ExperimentResult):
    """What `inside` found; the module says what is measured. ``tables`` holds, each with a column ``trait``:

    - ``directions``: a row a layer × vector: ``cosine``, ``cosine_upto``, ``explained``, each with ``_random``,
      ``_random_low`` and ``_random_high``, the mean and 95 % range over random neurons.
    - ``drive``: a row a measure × vector × layer × neurons (``trait`` or ``random``): ``change`` with its interval.
    - ``agreement``: a row a method: Spearman's ``rho`` with NPTI over questions, with its interval.
    - ``tokens``: a row a direction × token; ``logit`` in standard deviations over the vocabulary.
    - ``logits``: a row a vector: ``correlation`` of its logits with those of the summed write.
    """  # noqa: D415

    name: ClassVar[str] = "inside"
    config_type: ClassVar[type[ExperimentConfig]] = InsideConfig

    @classmethod
    def from_folder(cls, folder: Path, config: InsideConfig) -> Self:
        """Read the tables."""
        tables = {
            name: pd.concat(
                [read_table(folder / f"{name}/{t}.parquet").assign(trait=t) for t in config.traits], ignore_index=True
            )
            for name in ("directions", "drive", "agreement", "tokens", "logits")
        }
        return cls(folder, config, tables)

    def summary(self) -> str:
        """What holds on this model, in words (Markdown)."""
        lines = ["# NPTI and steering vectors, inside the model", ""]
        for trait in self.config.traits:
            lines += [f"## {trait}", ""]
            own: dict[str, Any] = {name: t[t["trait"] == trait] for name, t in self.tables.items()}
            for vector in self.config.vectors:
                lines.append(
                    f"- **{label_of(vector)}.** {self._direction_words(own, vector)} {self._drive_words(own, vector)}"
                )
            agreement = ", ".join(
                f"{label_of(r['method'])} {r['rho']:+.2f} [{r['rho_low']:+.2f}, {r['rho_high']:+.2f}]"
                for r in own["agreement"].sort_values("rho", ascending=False).to_dict("records")
            )
            lines.append(f"- Agreement with NPTI over questions (Spearman): {agreement}.")
            for direction in ("npti", *self.config.vectors):
                lines.append(f"- {label_of(direction)}: {self._token_words(own['tokens'], direction)}")
            lines.append("")
        return "\n".join(lines)

    @staticmethod
    def _direction_words(own: Mapping[str, Any], vector: str) -> str:
        part = own["directions"][own["directions"]["vector"] == vector].dropna(subset=["cosine"])
        if not len(part):
            return "No layer has both neurons and a vector."
        outside = (part["cosine"] > part["cosine_random_high"]) | (part["cosine"] < part["cosine_random_low"])
        above = part["explained"] > part["explained_random_high"]
        top: Any = part.loc[part["cosine"].abs().idxmax()]
        logits: Any = own["logits"][own["logits"]["vector"] == vector].iloc[0]
        return (
            f"The neurons' write and the vector have a cosine of {part['cosine'].mean():+.3f} on average, at most "
            f"{top['cosine']:+.3f} (layer {int(top['layer'])}); outside the random neurons' 95 % range in "
            f"{int(outside.sum())} of {len(part)} layers. The neurons' rows span {100 * part['explained'].mean():.1f} % of "
            f"it, random ones {100 * part['explained_random'].mean():.1f} % (above their range in {int(above.sum())}). "
            f"Over the vocabulary the two correlate by {logits['correlation']:+.2f} (random "
            f"{logits['correlation_random_low']:+.2f} to {logits['correlation_random_high']:+.2f})."
        )

    @staticmethod
    def _drive_words(own: Mapping[str, Any], vector: str) -> str:
        part = own["drive"][own["drive"]["vector"] == vector]
        words: list[str] = []
        for measure, text, unit in (
            ("vector drives neurons", "Steering raises the high-pole neurons over the low-pole ones", "SD"),
            ("neurons move residual", "the edit moves the residual along the vector", "of a pole's distance"),
        ):
            wide: Any = part[part["measure"] == measure].pivot_table(
                index="layer", columns="neurons", values=["change", "change_low"]
            )
            real, low, random = wide["change"]["trait"], wide["change_low"]["trait"], wide["change"]["random"]
            clear = int(((low > 0) & (real > random)).sum())
            words.append(
                f"{text} by {real.mean():+.3f} {unit} on average (random {random.mean():+.3f}; above 0 and above random in "
                f"{clear} of {len(wide)} layers)"
            )
        return "; ".join(words) + "."

    @staticmethod
    def _token_words(tokens: Any, direction: str) -> str:
        part = tokens[tokens["direction"] == direction].sort_values("rank")
        named = {
            side: ", ".join(f"`{t}`" for t in part[part["side"] == side]["token"]) for side in ("raised", "lowered")
        }
        return f"raises {named['raised']}; lowers {named['lowered']}."

    def figures(self) -> dict[str, tuple[Figure, pd.DataFrame]]:
        """Panels a to e, one figure a trait."""
        return {
            f"inside_{trait.lower()}": plot_inside(
                {name: cast(pd.DataFrame, t[t["trait"] == trait]) for name, t in self.tables.items()}, trait, label_of
            )
            for trait in self.config.traits
        }
