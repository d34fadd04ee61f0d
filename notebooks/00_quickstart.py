# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Personality neurons, from the start
#
# Which neurons of a chat model fire more often while it answers as a neurotic person than as a stable one? Edit just
# those while it generates, and it takes on the trait: no training, no prompt. This notebook does it with a small model
# that comes with the installation (a minute or two on two cores), and checks the result against the control it needs:
# the same edit at random neurons.

# %% tags=["parameters"]
model_name = "smollm2-135m"  # or a hub id, a directory, a .gguf file
trait = "Neuroticism"
n_search, n_test, n_tokens = 48, 24, 40

# %%
# %matplotlib inline
import pandas as pd

import npti_interp as npti

pd.set_option("display.max_colwidth", None)
model = npti.load_model(model_name)
bench = npti.PersonalityBench.embedded()
bench

# %% [markdown]
# **Locate.** The model answers search questions as one pole of the trait and as the other; a neuron's δ is the
# difference of the two fractions of generated tokens on which it is active. `threshold="auto"` takes the largest of
# 0.10, 0.09 … at which each pole has 4 % of the neurons: the published 0.10 leaves a small model few.

# %%
found = npti.locate(model, bench, trait, n_questions=n_search, max_new_tokens=n_tokens, threshold="auto")
found.neurons

# %%
found.high

# %% [markdown]
# **Induce.** Neurons of the wanted pole are raised by γ · a95 · f(|δ|), those of the other pole are clamped to at most
# 0, at generated tokens only. The control edits as many other neurons of each layer by the same amounts.

# %%
control = found.neurons.random_matched(seed=0)
conditions = {"no edit": None}
conditions |= {f"NPTI {pole}": found.neurons.edit(gamma=1.4, pole=pole) for pole in ("high", "low")}
conditions |= {f"random {pole}": control.edit(gamma=1.4, pole=pole) for pole in ("high", "low")}

questions = bench.questions(trait, "test", n_test)
sweep = npti.generate_sweep(model, [q.text for q in questions], list(conditions.values()), max_new_tokens=n_tokens)
answers = dict(zip(conditions, sweep, strict=True))

# %%
pd.DataFrame({"question": [q.text for q in questions], **answers})[["question", "NPTI high", "NPTI low"]].head(4)

# %% [markdown]
# **Measure.** The judge asks how much likelier each answer is under held-out personas of the high pole than of the low
# one. Its AUC on answers of known pole says what that is worth on this model: 0.5 is chance.

# %%
judge = npti.LikelihoodJudge(model, bench)
judge.calibrate(trait, found.questions[:24], found.answers["high"][:24], found.answers["low"][:24])

# %%
scores = dict(zip(conditions, judge.score_many(questions, sweep, trait), strict=True))
pd.DataFrame(
    {
        name: {
            "rating 1–5": str(npti.bootstrap_mean(s["rating"])),
            "NLL per token": str(npti.bootstrap_mean(s["nll"])),
            "repeated 4-grams": f"{s['repetition_4'].mean():.2f}",
            "judge's AUC": f"{s['auc'][0]:.2f}",
        }
        for name, s in scores.items()
    }
).T

# %% [markdown]
# **Look.** Neurons of each layer, high pole upwards, low pole downwards. `npti reproduce` does all of this for the five
# traits, with persona prompts and a dose–response curve beside it.

# %%
from npti_interp.figures import plot_neurons_per_layer

figure, _ = plot_neurons_per_layer({found.trait: found.neurons})
figure
