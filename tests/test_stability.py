"""Stability: made-up statistics of known reliability, replays against direct counts, and a small run."""

import math
from dataclasses import asdict, replace
from json import dumps, loads

import numpy as np
import pandas as pd
import pytest
from helpers import StopError, digests, stop_after

import npti_interp as npti
from npti_interp._sketch import QuantileSketch
from npti_interp.activations import ActivationStatistics
from npti_interp.evaluation import Calibration
from npti_interp.experiments import _stability as module
from npti_interp.experiments._lab import Condition, Lab, answer_rows
from npti_interp.experiments._locate import collect_plan
from npti_interp.experiments._search_plan import SearchPlan
from npti_interp.experiments._stability import (
    STABILITY_PRESETS,
    VARIANTS,
    StabilityConfig,
    StabilityResult,
    agreement,
    agreement_curve,
    choose_neurons,
    reliability,
    spearman_brown,
    stability,
)
from npti_interp.generation import Decoding
from npti_interp.models import ModelFingerprint
from npti_interp.neurons import select_neurons
from npti_interp.prompts import eliciting_personas
from npti_interp.runs import write_table
from npti_interp.traits import POLES, Pole

LAYERS, NEURONS, BLOCKS, TOKENS = 4, 500, 8, 200
FINGERPRINT = ModelFingerprint("Toy", LAYERS, NEURONS, 8, 11, "silu", "w", "t", "c")
RULE = {"name": "npti", "threshold": 0.1, "floor": None, "k": None}
SIZES = {Pole.HIGH: 100, Pole.LOW: 100}
SMALL = replace(STABILITY_PRESETS["tiny"], n_questions=2, max_new_tokens=3, n_subsets=3, random_draws=1)
ASKED = 4  # search questions, each a block of its own


def statistics(probability, rng, pole):
    """Blocks of binomial draws round given probabilities, [layer, neuron] or [block, layer, neuron]."""
    share = np.broadcast_to(np.clip(probability, 0, 1), (BLOCKS, LAYERS, NEURONS))
    made = ActivationStatistics(
        rng.binomial(TOKENS, share).astype(np.int64), np.full(BLOCKS, TOKENS, np.int64), np.zeros((LAYERS, NEURONS)),
        np.ones((LAYERS, NEURONS)), QuantileSketch.empty(LAYERS * NEURONS), FINGERPRINT, {"pole": pole},
    )  # fmt: skip
    made._p95 = np.full((LAYERS, NEURONS), 2.0 if pole == "high" else 3.0)
    return made


def pair(effect, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.uniform(0.35, 0.65, (LAYERS, NEURONS))
    return statistics(base + effect / 2, rng, "high"), statistics(base - effect / 2, rng, "low")


@pytest.fixture(scope="module")
def strong():
    return pair(np.random.default_rng(9).normal(0, 0.2, (LAYERS, NEURONS)))


@pytest.fixture(scope="module")
def noise():
    return pair(np.zeros((LAYERS, NEURONS)))


def test_strong_signal_is_found_early(strong):
    curve = agreement_curve(*strong, RULE, n_subsets=10)
    contained, disjoint = (curve[curve["kind"] == k].set_index("blocks") for k in ("contained", "disjoint"))
    assert list(contained.index) == list(range(1, 9)) and list(disjoint.index) == [1, 2, 3, 4]
    assert contained.loc[8, "jaccard"] == 1 and contained.loc[8, "jaccard_rule"] == 1
    assert contained.loc[8, "n_subsets"] == 1
    assert (contained["jaccard"].diff().dropna() > 0).all()
    assert disjoint.loc[4, "jaccard"] > 0.8 > 4 * disjoint.loc[4, "chance"]
    assert (contained["jaccard"][:4] > disjoint["jaccard"]).all(), "a set agrees more with what contains it"
    trust = reliability(*strong, RULE, n_orders=10)
    assert trust["full"] > 0.98
    assert trust["reliable_90"] < 2 and trust["final_90"] < 2
    assert trust["contained_90"] < 5


def test_pure_noise_stays_at_chance(noise):
    rule = {"name": "top_k", "threshold": 0.1, "floor": None, "k": 100}
    curve = agreement_curve(*noise, rule, n_subsets=20)
    disjoint = curve[curve["kind"] == "disjoint"]
    np.testing.assert_allclose(disjoint["jaccard"], disjoint["chance"], atol=0.012)
    np.testing.assert_allclose(disjoint["chance"], (100 * 100 / 2000) / 195, rtol=1e-9)
    assert disjoint["correlation"].abs().max() < 0.05
    trust = reliability(*noise, rule, n_orders=10)
    assert trust["full"] < 0.15 and trust["full_low"] >= 0
    assert not trust["reliable_90"] <= BLOCKS, "not reached"
    assert trust["contained_90"] > 6, "agreement with the set that contains it is no sign of anything"


def test_reliability_is_that_of_the_noise_put_in():
    """Signal variance s², noise variance t² a block: r = s² / (s² + t²), carried to 8 blocks by the formula."""
    found = []
    for seed in range(5):
        effect = np.random.default_rng(seed + 50).normal(0, 0.02, (LAYERS, NEURONS))
        trust = reliability(*pair(effect, seed), RULE, n_orders=2)
        found.append(trust)
    base = np.random.default_rng(0).uniform(0.35, 0.65, 100_000)
    single = 0.02**2 / (0.02**2 + 2 * (base * (1 - base)).mean() / TOKENS)
    table = pd.DataFrame(found)
    assert table["single"].mean() == pytest.approx(single, abs=0.02)
    assert table["full"].mean() == pytest.approx(8 * single / (1 + 7 * single), abs=0.03)
    assert ((table["single_low"] < single) & (single < table["single_high"])).sum() >= 4
    assert table["reliable_90"].mean() == pytest.approx(9 * (1 - single) / single, rel=0.2)
    np.testing.assert_allclose(spearman_brown([0.5, 0.2], [1, 4]), [0.5, 0.5])


def test_ninety_percent_of_the_final_reliability(strong):
    trust = reliability(*pair(np.random.default_rng(3).normal(0, 0.03, (LAYERS, NEURONS))), RULE, n_orders=2)
    n = trust["final_90"]
    assert 1 < n < BLOCKS
    assert float(spearman_brown(trust["single"], n)) == pytest.approx(0.9 * trust["full"])
    assert trust["final_90_low"] < n < trust["final_90_high"]


def test_where_a_curve_crosses():
    assert module._crossing([0.2, 0.8, 1.0], 0.9) == pytest.approx(2.5)
    assert module._crossing([0.95, 1.0], 0.9) == 1.0
    assert math.isnan(module._crossing([0.1, 0.2], 0.9))


def test_subsets_are_disjoint_and_differ():
    rng = np.random.default_rng(0)
    for m, n in ((1, 10), (3, 12), (4, 100)):
        found = module._subsets(8, m, True, n, rng)
        assert len(set(found)) == len(found) == min(n, math.comb(8, m) * math.comb(8 - m, m) // 2)
        assert all(not set(a) & set(b) and len(a) == len(b) == m for a, b in found)
    assert len(module._subsets(8, 8, False, 10, rng)) == 1
    assert len(set(module._subsets(8, 4, False, 20, rng))) == 20


def test_agreement_by_hand_and_its_interval(strong, noise):
    same = agreement(strong, strong, RULE, SIZES)
    assert (same["jaccard"], same["correlation"], same["jaccard_low"], same["jaccard_high"]) == (
        1,
        pytest.approx(1),
        1,
        1,
    )
    halves = ([0, 2, 4, 6], [1, 3, 5, 7])
    found = agreement(strong, strong, RULE, SIZES, blocks=halves)
    a, b = (module._delta(strong, h) for h in halves)
    assert found["correlation"] == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    top = [set(np.argsort(-d.ravel())[:100]) for d in (a, b)]
    low = [set(np.argsort(d.ravel())[:100]) for d in (a, b)]
    each = [len(x & y) / len(x | y) for x, y in (top, low)]
    assert found["jaccard"] == pytest.approx(np.mean(each))
    assert found["jaccard_low"] < found["jaccard"] < found["jaccard_high"]
    against = agreement(noise, noise, RULE, SIZES, blocks=halves, reference=(strong, strong), reference_blocks=halves)
    assert against["difference_correlation"] == pytest.approx(against["correlation"] - found["correlation"])
    assert against["difference_correlation_high"] < -0.5


def test_choosing_gives_what_the_selector_gives(strong):
    expected, mine = select_neurons(*strong, threshold=0.1), choose_neurons(*strong, RULE)
    for name in ("layer", "neuron", "delta", "probability", "p95"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(expected, name))
    top = choose_neurons(*strong, {**RULE, "name": "top_k", "k": 30})
    assert len(top.pole("high")) == len(top.pole("low")) == 30
    assert top.keys() == select_neurons(*strong, "top_k", k=30).keys()
    floor = choose_neurons(*strong, {**RULE, "threshold": 0.9, "floor": 7})
    assert len(floor.pole("high")) == 7
    matched = choose_neurons(*strong, RULE, {Pole.HIGH: 3, Pole.LOW: 5})
    assert (len(matched.pole("high")), len(matched.pole("low"))) == (3, 5)
    with pytest.raises(ValueError, match="random_matched"):
        choose_neurons(*strong, expected.random_matched(0).rule)


@pytest.fixture(scope="module")
def lab(smollm, tmp_path_factory):
    """What `reproduce` leaves of locating, on few questions."""
    folder, bench = tmp_path_factory.mktemp("run"), npti.PersonalityBench.embedded()
    (folder / "statistics").mkdir()
    found = {}
    for trait in (npti.Trait.NEUROTICISM, npti.Trait.EXTRAVERSION):
        asked, both = bench.questions(trait, "search", ASKED), []
        for pole in POLES:
            stats, made = collect_plan(smollm, SearchPlan(bench, trait, asked, ASKED, ASKED, 6), pole, False)
            stats.save(folder / f"statistics/{trait}-{pole}.safetensors")
            personas = [p.id for p in eliciting_personas(bench, trait, pole, ASKED)]
            condition = Condition("persona", pole, facts={"persona": personas})
            rows = answer_rows(smollm, bench, trait, asked, made, condition, Decoding(6))
            write_table(folder / f"answers/search-{trait}-{pole}.parquet", rows)
            both.append(stats)
        found[trait] = select_neurons(*both, threshold=0.3)
    lab = Lab(smollm, bench, found, run=folder)
    lab.judge.personas_per_pole = 1
    for trait in found:
        lab.judge.use_calibration(trait, Calibration(2.0, 0.1, 0.8, 8, 8))
    return lab


@pytest.fixture(scope="module")
def finished(lab, tmp_path_factory):
    return stability(lab, SMALL, tmp_path_factory.mktemp("stability") / "a", progress=False)


def test_replays_are_the_runs_own_statistics_cut_up(lab):
    """Personas a and b together are the full set, and half the questions are its even blocks: to the last count."""
    trait, pole = npti.Trait.NEUROTICISM, Pole.HIGH
    full, table = lab.statistics(trait, pole), lab.search_answers(trait, pole)
    search = module._search(lab, trait, pole, table, full)
    nothing = _Silent()
    made = {
        name: module._collect(lab, SMALL, trait, pole, table, search, name, nothing)
        for name in ("questions_half", "personas_a", "personas_b", "short")
    }
    np.testing.assert_array_equal(made["personas_a"].active_count + made["personas_b"].active_count, full.active_count)
    assert (made["personas_a"].n_tokens * made["personas_b"].n_tokens == 0).all(), "here a block is one question"
    np.testing.assert_array_equal(made["questions_half"].active_count[0::2], full.active_count[0::2])
    assert made["questions_half"].n_tokens[1::2].sum() == 0
    assert (made["short"].n_tokens <= 2).all() and (made["short"].active_count <= full.active_count).all()


def test_halves_of_the_personas_differ_in_wording_alone():
    """Either half has one of each facet's two personas, and is asked questions of all facets."""
    bench = npti.PersonalityBench.embedded()
    own = bench.personas("N", "high", "elicit")
    half = module._persona_halves(len(own))
    for h in (0, 1):
        assert sorted(p.facet for p, x in zip(own, half, strict=True) if x == h) == sorted({p.facet for p in own})
        asked = {q.facet for i, q in enumerate(bench.questions("N", "search", 24)) if half[i % len(own)] == h}
        assert len(asked) == 6


class _Silent:
    def update(self, n=1):
        pass


def test_answers_of_another_run_are_noticed(lab):
    trait, pole = npti.Trait.NEUROTICISM, Pole.HIGH
    table = lab.search_answers(trait, pole)
    shorter = table.assign(tokens=[list(t)[:3] for t in table["tokens"]])
    with pytest.raises(ValueError, match="not those its statistics"):
        module._search(lab, trait, pole, shorter, lab.statistics(trait, pole))
    with pytest.raises(ValueError, match="other questions or personas"):
        module._search(lab, trait, pole, table.assign(persona="X+01"), lab.statistics(trait, pole))


def test_it_is_all_there(finished):
    t = finished.tables
    assert set(t["curve"]["trait"]) == {"Neuroticism", "Extraversion"}
    assert t["curve"].query("kind == 'contained' and blocks == 4")["questions"].tolist() == [4.0, 4.0]
    assert set(t["variants"]["variant"]) == set(VARIANTS)
    assert set(t["variants"]["trait"]) == {"Neuroticism"}
    effects = t["effects"]
    assert set(effects["variant"]) == {"full", "random", *VARIANTS}
    sizes = effects[effects["pole"] == "high"].groupby("variant")["n_raised"].first()
    assert sizes.max() - sizes.min() < 0.02 * sizes.max(), "as many neurons each"
    full = effects[effects["variant"] == "full"]
    assert (full["difference"] == 0).all()
    assert np.isfinite(effects.query("pole == 'both' and variant in @VARIANTS")["difference_q"]).all()
    assert "Jaccard" in finished.summary()
    for end in ("pdf", "png", "csv", "json"):
        assert (finished.folder / "figures" / f"stability.{end}").stat().st_size > 50


def test_it_is_read_without_a_model(finished, monkeypatch):
    monkeypatch.setattr(npti.Model, "collect", None)
    again = StabilityResult.load(finished.folder)
    for name, table in finished.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table)
    assert again.summary() == finished.summary()


def test_interrupted_it_continues_to_the_same_bytes(finished, lab, tmp_path, monkeypatch):
    stop_after(monkeypatch, 6)
    with pytest.raises(StopError):
        stability(lab, SMALL, tmp_path / "b", progress=False)
    monkeypatch.undo()
    stability(lab, SMALL, tmp_path / "b", progress=False)
    assert digests(tmp_path / "b") == digests(finished.folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"variant_traits": ("Honesty",)}, "unknown trait"),
        ({"traits": ("N",), "variant_traits": ("E",)}, "variant_traits"),
        ({"n_subsets": 1}, "n_subsets"),
        ({"length_fraction": 1.0}, "length_fraction"),
        ({"repetition_penalty": 1.0}, "repetition_penalty"),
        ({"repetition_penalty": math.nan}, "repetition_penalty"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        StabilityConfig(**settings)


def test_settings_come_back_and_what_cannot_be_done_is_refused(lab, tmp_path):
    for config in STABILITY_PRESETS.values():
        assert StabilityConfig.from_settings(loads(dumps(asdict(config)))) == config
    with pytest.raises(ValueError, match="unknown preset"):
        stability(lab, "huge", tmp_path)
    without = Lab(lab.model, lab.bench, lab.neurons)
    with pytest.raises(ValueError, match="from_run"):
        stability(without, SMALL, tmp_path / "x", progress=False)
    drawn = Lab(lab.model, lab.bench, {t: n.random_matched(0) for t, n in lab.neurons.items()}, run=lab.run)
    with pytest.raises(ValueError, match="random_matched"):
        stability(drawn, SMALL, tmp_path / "x", progress=False)
