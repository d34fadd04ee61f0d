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
# # From a laptop to 180,000 questions
#
# A search set of PersonalityBench's full size has 180,000 questions, 36,000 a trait, and each is answered as both poles:
# too much to lose to a machine that dies, and more than one machine does in a reasonable time. This notebook locates
# with few questions in two shards, adds them up, and holds the sum against one run. Below are the recipes for SLURM, for
# several GPUs in one machine, and for Ray.

# %% tags=["parameters"]
model_name = "smollm2-135m"  # or a hub id, a directory, a .gguf file
trait = "Neuroticism"
n_questions, max_new_tokens = 8, 10  # few: this is about how it adds up
chunk = 4  # questions that are done and saved together; 512 by default

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

import npti_interp as npti

model = npti.load_model(model_name)
bench = npti.PersonalityBench.embedded()
runs = Path(tempfile.mkdtemp())
settings = {
    "n_questions": n_questions,
    "max_new_tokens": max_new_tokens,
    "threshold": "auto",
    "chunk": chunk,
    "progress": False,
}

# %% [markdown]
# **A run folder.** With `run=` all that is done is on disk chunk by chunk: answers, and one file of statistics a pole. Stop
# it, kill it, lose the power: the same call goes on where it was, to the same bytes, and memory does not grow with the
# number of questions. On the command line: `npti locate N --run runs/n`.
#
# **A shard** is a run folder of a part of the questions, cut at whole chunks. Each question keeps the persona and the block
# that it has in the whole list. (A shard answers the first 64 questions of the whole list besides, uncounted: there all
# shards lay the same windows for their percentiles.)

# %%
shards = [npti.locate(model, bench, trait, **settings, run=runs / f"{k}-of-2", shard=f"{k}/2") for k in (1, 2)]
shards[1]

# %%
sorted(str(path.relative_to(runs)) for path in shards[0].folder.rglob("*") if path.is_file() and path.suffix)

# %% [markdown]
# **Adding up.** The folders may lie anywhere and come in any order. What does not belong together is refused: another model,
# bench or setting, a shard that is missing, unfinished, altered or there twice.

# %%
merged = npti.merge_shards([shards[1].folder, shards[0].folder], runs / "merged", progress=False)
merged.neurons

# %% [markdown]
# **It is the whole.** One run that was never cut counts the same tokens and the same firings of every neuron, as integers,
# and so finds the same neurons with the same δ. Moments agree to rounding. A 95th percentile is the same number wherever it
# is known; in a sum it may be unknown (never guessed) for a few neurons more.

# %%
whole = npti.locate(model, bench, trait, **settings)
rows = []
for pole in ("high", "low"):
    one, two = getattr(whole, pole), getattr(merged, pole)
    known = ~np.isnan(one.p95) & ~np.isnan(two.p95)
    rows.append(
        {
            "pole": pole,
            "tokens": two.total_tokens,
            "firings counted": int(two.active_count.sum()),
            "counts that differ": int((one.active_count != two.active_count).sum()),
            "answers that differ": sum(a != b for a, b in zip(whole.answers[pole], merged.answers[pole], strict=True)),
            "largest difference of means": np.abs(one.mean - two.mean).max(),
            "p95 that differ": int((one.p95[known] != two.p95[known]).sum()),
            "p95 unknown, one run": f"{np.isnan(one.p95).mean():.2%}",
            "p95 unknown, merged": f"{np.isnan(two.p95).mean():.2%}",
        }
    )
assert all(row["counts that differ"] == 0 for row in rows)
assert (whole.neurons.neuron == merged.neurons.neuron).all()
assert (whole.neurons.delta == merged.neurons.delta).all()
pd.DataFrame(rows).set_index("pole").T

# %%
from npti_interp.figures import plot_neurons_per_layer

figure, _ = plot_neurons_per_layer({merged.trait: merged.neurons})
figure

# %% [markdown]
# ## Recipes
#
# Each job is one process with one shard; there is nothing between them but a folder that all can write to (or copy to, as
# shards are plain folders). A job that was killed or preempted is started again with the same command. `--questions`,
# `--chunk` and the other settings must be the same for all shards; more shards than chunks are refused. Jobs that start
# twice by mistake do no harm: the second finds the folder locked and says so.
#
# **SLURM**, an array of forty jobs and one that adds up when all are done:
#
# ```bash
# #!/bin/bash
# #SBATCH --job-name=npti --array=1-40 --gres=gpu:1 --cpus-per-task=4 --time=12:00:00 --requeue
# npti locate Neuroticism --model meta-llama/Meta-Llama-3-8B-Instruct --dtype bfloat16 --device cuda \
#     --bench PersonalityBench --max-new-tokens 200 \
#     --run "runs/n/$SLURM_ARRAY_TASK_ID" --shard "$SLURM_ARRAY_TASK_ID/40"
# ```
#
# ```bash
# job=$(sbatch --parsable locate.sh)
# sbatch --dependency=afterok:$job --wrap 'npti merge runs/n/* --out runs/neuroticism'
# ```
#
# **One machine with four GPUs**, as many shards as you like, one a GPU at a time. With GNU parallel:
#
# ```bash
# seq 40 | parallel -j 4 'CUDA_VISIBLE_DEVICES=$(({%} - 1)) \
#     npti locate N --model MODEL --dtype bfloat16 --device cuda --run runs/n/{} --shard {}/40'
# npti merge runs/n/* --out runs/neuroticism
# ```
#
# or with nothing but xargs, one shard a GPU:
#
# ```bash
# seq 4 | xargs -P 4 -I{} sh -c 'CUDA_VISIBLE_DEVICES=$(({} - 1)) \
#     npti locate N --model MODEL --dtype bfloat16 --device cuda --run runs/n/{} --shard {}/4'
# ```
#
# On CPUs the same, with `OMP_NUM_THREADS` set to the cores that each process may have.
#
# **Ray**: a function that locates one shard. Ray starts a task that dies with its machine again; the folder lets it go on.
#
# ```python
# import ray, torch
# import npti_interp as npti
#
# @ray.remote(num_gpus=1, max_retries=5)
# def locate_shard(k, n, folder):
#     model = npti.load_model("meta-llama/Meta-Llama-3-8B-Instruct", dtype=torch.bfloat16, device="cuda")
#     bench = npti.PersonalityBench.from_directory("PersonalityBench")
#     run = f"{folder}/{k}"
#     npti.locate(model, bench, "Neuroticism", max_new_tokens=200, run=run, shard=(k, n), progress=False)
#     return run
#
# ray.init()
# shards = ray.get([locate_shard.remote(k, 40, "/shared/runs/n") for k in range(1, 41)])
# found = npti.merge_shards(shards, "/shared/runs/neuroticism")
# ```
#
# (Tried with Ray 2.60 and the embedded model on CPUs, where one worker was killed in the middle of its shard: Ray started
# it again, and the neurons were those of one run.)
#
# Shards from unlike machines (CPU and GPU, another batch size) add up as well, with a warning, as their sums equal one
# run's to rounding only; unlike precision, versions or models are refused.
