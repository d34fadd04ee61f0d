"""The command line ``npti``: thin, over the library."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npti_interp import _cli_audit, _cli_humans, _cli_plan
from npti_interp.bench.construction._cli import build

if TYPE_CHECKING:
    from npti_interp.models import Model

app = typer.Typer(
    name="npti",
    help=(
        "Personality neurons in language models.\n\n"
        "Start with: npti reproduce. It finds the neurons of the Big Five traits in a small chat model that comes "
        "with the installation, induces the traits with them, compares with controls, and draws the figures. "
        "No download and no GPU are needed.\n\n"
        "Then: npti locate finds the neurons of one trait in a model of yours (on many machines: npti merge), npti "
        "induce lets it answer with them, "
        "npti inspect tells what a file holds."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


ModelName = Annotated[
    str,
    typer.Option("--model", "-m", help="smollm2-135m (comes along), a hub id, a directory, or a .gguf file."),
]
DType = Annotated[str, typer.Option(help="Precision of the weights: float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")]
BackendName = Annotated[str, typer.Option("--backend", help="The engine: transformer_lens or nnsight.")]
Remote = Annotated[
    bool, typer.Option("--remote", help="Run on NDIF ($NDIF_API_KEY, $NDIF_HOST); needs --backend nnsight.")
]
TraitName = Annotated[
    str, typer.Argument(help="Agreeableness, Conscientiousness, Extraversion, Neuroticism or Openness (or A C E N O).")
]
BenchPath = Annotated[
    Path | None, typer.Option("--bench", help="A PersonalityBench folder; by default the embedded questions.")
]


def _load(name: str, dtype: str, device: str, backend: str = "transformer_lens", remote: bool = False) -> Model:
    import torch

    from npti_interp.models import load_model

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in types:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(types)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what PyTorch raises differs from device to device
        raise ValueError(f"device {device!r} cannot be used here: {error}") from error
    return load_model(name, backend, remote=remote, dtype=types[dtype], device=device)


def _bench(path: Path | None) -> Any:
    from npti_interp.bench import PersonalityBench

    return PersonalityBench.from_directory(path) if path else PersonalityBench.embedded()


@app.command()
def reproduce(
    preset: Annotated[
        str, typer.Option(help="quick (minutes), tiny (a minute, rough numbers), full (a real model on a GPU).")
    ] = "quick",
    out: Annotated[
        Path | None, typer.Option(help="Run folder; by default runs/PRESET. Continued if it exists.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Another model than the preset's.")] = None,
    dtype: DType = "float32",
    device: Device = "cpu",
    backend: BackendName = "transformer_lens",
    remote: Remote = False,
    bench: BenchPath = None,
) -> None:
    """Run the main experiment: locate, induce, compare with controls, draw the figures.

    Stop it whenever you like; called again, it continues where it was.
    """
    from dataclasses import replace

    from npti_interp.experiments import PRESETS
    from npti_interp.experiments import reproduce as run
    from npti_interp.runs import require_usable

    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    config = replace(PRESETS[preset], model=model) if model else PRESETS[preset]
    folder = out or Path("runs") / preset
    require_usable(folder)  # before the model is loaded
    try:
        loaded = _load(config.model, dtype, device, backend, remote)
        typer.echo(f"{_cli_plan.plan_of_run(loaded, config)}\n")
        result = run(config, folder, model=loaded, bench=_bench(bench))
    except KeyboardInterrupt:
        typer.echo(f"\nnpti: stopped; the same command goes on from what is in {folder}", err=True)
        raise typer.Exit(130) from None
    typer.echo("\n" + result.summary())
    typer.echo(f"Everything is in {folder}:")
    for name, what in (
        ("summary.md", "this text"),
        ("table.csv, table.html, table.tex", "scores out of 10 with variance, intervals and fluency"),
        ("judges.csv", "what each of two judges says of the edit"),
        ("figures/", "scores, neurons per layer, δ, dose–response: PDF, PNG, CSV, JSON"),
        ("answers.parquet, scores.parquet", "every answer and every number"),
        ("neurons/, statistics/", "the neurons, and what they were chosen from"),
        ("manifest.json", "SHA-256 of each file"),
    ):
        typer.echo(f"  {name:<34} {what}")


@app.command()
def locate(
    trait: TraitName,
    model: ModelName = "smollm2-135m",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where the neurons go (.safetensors); by default neurons.safetensors, or with --run the folder alone."
        ),
    ] = None,
    threshold: Annotated[str, typer.Option(help="For |δ|, in (0, 1], or 'auto'.")] = "0.10",
    questions: Annotated[int | None, typer.Option(help="Search questions; by default all.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of each answer.")] = 100,
    run: Annotated[
        Path | None,
        typer.Option(help="Run folder: everything goes there, chunk by chunk; one that was stopped is continued."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="K/N", help="Only part K of N (from 1 on) of the questions; needs --run. See npti merge."),
    ] = None,
    chunk: Annotated[
        int, typer.Option(help="Questions that are done and saved together; the same for all shards.")
    ] = 512,
    batch_size: Annotated[int | None, typer.Option(help="Answers decoded at once; by default as many as fit.")] = None,
    dtype: DType = "float32",
    device: Device = "cpu",
    backend: BackendName = "transformer_lens",
    remote: Remote = False,
    bench: BenchPath = None,
) -> None:
    """Find the neurons that fire more often under one pole of TRAIT than under the other.

    With --run, stop it whenever you like; called again, it continues where it was. With --shard as well, many machines
    share the work: each one takes a part, and npti merge adds the parts up.
    """
    from npti_interp.experiments import LocationShard
    from npti_interp.experiments import locate as work
    from npti_interp.experiments._search_plan import as_shard
    from npti_interp.runs import require_usable
    from npti_interp.traits import as_trait

    wanted = as_trait(trait)  # before the model is loaded
    limit: float | str = threshold if threshold == "auto" else _number(threshold, "threshold")
    part = None if shard is None else as_shard(shard)
    if part is not None and run is None:
        raise ValueError("--shard needs --run: the run folder from which it is merged")
    if part is not None and out is not None:
        raise ValueError("a shard has no neurons to write to --out: they are chosen on all shards by `npti merge`")
    if run is not None:
        require_usable(run)  # before the model is loaded
    loaded, questions_of = _load(model, dtype, device, backend, remote), _bench(bench)
    settings: dict[str, Any] = {
        "threshold": limit, "n_questions": questions, "max_new_tokens": max_new_tokens, "batch_size": batch_size,
        "chunk": chunk, "run": run, "shard": part,
    }  # fmt: skip
    try:
        found = work(loaded, questions_of, wanted, **settings)
    except KeyboardInterrupt:
        kept = f"the same command goes on from what is in {run}" if run else "nothing is kept without --run"
        typer.echo(f"\nnpti: stopped; {kept}", err=True)
        raise typer.Exit(130) from None
    if isinstance(found, LocationShard):
        typer.echo(
            f"{found!r}\nEverything is in {run}; when all {found.shard[1]} are there: npti merge FOLDERS... --out FOLDER"
        )
        return
    _describe_neurons(found.neurons)
    if out is not None or run is None:
        found.neurons.save(target := out or Path("neurons.safetensors"))
        typer.echo(f"written to {target}")
    if run is not None:
        _describe_location(found)


def _describe_location(found: Any) -> None:
    """What lies in a finished run folder of `locate`."""
    typer.echo(f"Everything is in {found.folder}:")
    for name, what in (
        (f"neurons/{found.trait}.safetensors", "the neurons"),
        ("statistics/", "what they were chosen from"),
        ("answers/", f"the answers to {len(found.questions):,} questions as each pole, with every setting"),
        ("manifest.json", "SHA-256 of each file"),
    ):
        typer.echo(f"  {name:<34} {what}")


@app.command()
def merge(
    shards: Annotated[list[Path], typer.Argument(help="Run folders of `npti locate TRAIT --run … --shard K/N`.")],
    out: Annotated[Path, typer.Option(help="Run folder of the whole.")],
    partial: Annotated[
        bool, typer.Option("--partial", help="Do with the shards there are; which are missing is recorded.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Only for shards that were reduced on a server: the model, once more."),
    ] = None,
    dtype: DType = "float32",
    device: Device = "cpu",
    backend: BackendName = "transformer_lens",
    remote: Remote = False,
    bench: BenchPath = None,
) -> None:
    """Add up the SHARDS of npti locate, and choose the neurons on the whole.

    Counts are exactly those of one run over all questions; the order of the folders does not matter.
    """
    from npti_interp.experiments import merge_shards

    loaded = _load(model, dtype, device, backend, remote) if model else None
    found = merge_shards(shards, out, partial=partial, model=loaded, bench=_bench(bench) if model else None)
    _describe_neurons(found.neurons)
    _describe_location(found)


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} must be a number, got {text!r}") from None


@app.command()
def induce(
    neurons: Annotated[Path, typer.Argument(help="A neuron set that `npti locate` or `npti reproduce` wrote.")],
    prompt: Annotated[list[str], typer.Argument(help="One or more questions, each in quotes.")],
    pole: Annotated[str, typer.Option(help="high or low.")] = "high",
    gamma: Annotated[float, typer.Option(help="Strength γ; published work uses 0.6 to 1.5.")] = 1.0,
    model: ModelName = "smollm2-135m",
    max_new_tokens: Annotated[int, typer.Option(help="Length of each answer.")] = 100,
    dtype: DType = "float32",
    device: Device = "cpu",
    backend: BackendName = "transformer_lens",
    remote: Remote = False,
) -> None:
    """Answer each PROMPT with the neurons edited, beside the unedited answer."""
    from npti_interp.neurons import NeuronSet

    edit = NeuronSet.load(neurons).edit(gamma, pole)
    loaded = _load(model, dtype, device, backend, remote)
    plain, edited = loaded.generate_sweep(prompt, [None, edit], max_new_tokens=max_new_tokens)
    for question, before, after in zip(prompt, plain, edited, strict=True):
        typer.echo(f"\n{question}\n  unedited: {before}\n  {pole:>8}: {after}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A file of neurons or statistics, a run folder, or a bench folder.")],
) -> None:
    """Tell what PATH holds."""
    from npti_interp.activations import ActivationStatistics
    from npti_interp.errors import ArtifactError
    from npti_interp.neurons import NeuronSet

    if not path.exists():
        raise FileNotFoundError(f"nothing at {path}")
    if path.is_dir():
        if (path / "config.json").is_file():
            from npti_interp.experiments import Location, LocationShard

            found = _result_in(path)
            if isinstance(found, LocationShard):
                typer.echo(repr(found))
            elif isinstance(found, Location):
                _describe_neurons(found.neurons)
                _describe_location(found)
            else:
                typer.echo(found.summary())
        else:
            bench = _bench(path)
            typer.echo(f"{bench!r}\n{bench.report}")
        return
    try:
        _describe_neurons(NeuronSet.load(path))
    except ArtifactError as error:
        if "ActivationStatistics" not in str(error):
            raise
        typer.echo(repr(ActivationStatistics.load(path)))


def _result_in(folder: Path) -> Any:
    """What a finished run folder holds, whichever command made it."""
    from npti_interp._files import read_json
    from npti_interp.bench.construction import BuildResult
    from npti_interp.experiments import EXPERIMENTS, Location, LocationShard, ReproduceResult

    about = read_json(folder / "config.json")
    if isinstance(about, dict) and "build" in about:
        return BuildResult.load(folder)
    name = about.get("experiment") if isinstance(about, dict) else None
    if name == "locate":
        settings = about.get("settings")
        sharded = isinstance(settings, dict) and settings.get("shard")
        return (LocationShard if sharded else Location).load(folder)
    return (EXPERIMENTS[name].result if name in EXPERIMENTS else ReproduceResult).load(folder)


def _describe_neurons(neurons: Any) -> None:
    typer.echo(f"{neurons!r}\nmodel: {neurons.fingerprint or 'unknown'}")
    for pole in ("high", "low"):
        own = neurons.pole(pole)
        if len(own):
            top = ", ".join(
                f"L{a}.{b} (δ {c:+.2f})" for a, b, c in zip(own.layer[:5], own.neuron[:5], own.delta[:5], strict=True)
            )
            typer.echo(f"  {pole}: {len(own):,} neurons; strongest: {top}")
    if (s := neurons.stability) is not None:
        typer.echo(
            f"  split halves share {s.jaccard_high:.2f} (high) and {s.jaccard_low:.2f} (low) of the set, by chance "
            f"{s.jaccard_chance:.3f}; δ correlates {s.rank_correlation:.2f}"
        )


@app.command()
def experiment(
    name: Annotated[
        str,
        typer.Argument(help="layerwise, overlap, ablations, dose, several, spillover, stability, writes; or all."),
    ],
    run: Annotated[Path, typer.Option(help="A finished run folder of npti reproduce.")] = Path("runs/quick"),
    preset: Annotated[str, typer.Option(help="tiny, quick (minutes each) or full.")] = "quick",
    dtype: DType = "float32",
    device: Device = "cpu",
    backend: BackendName = "transformer_lens",
    remote: Remote = False,
    bench: BenchPath = None,
) -> None:
    """Run one experiment, or all of them, with the neurons of a finished RUN; its results go into RUN/NAME.

    Stop it whenever you like; called again, it continues where it was.
    """
    from npti_interp.experiments import EXPERIMENTS, Lab
    from npti_interp.experiments._lab import finished_run
    from npti_interp.runs import require_usable

    names = list(EXPERIMENTS) if name == "all" else [name]
    for own in names:
        if own not in EXPERIMENTS:
            raise ValueError(f"unknown experiment {own!r}; choose one of {', '.join(EXPERIMENTS)}, or all")
        if preset not in EXPERIMENTS[own].presets:
            raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(EXPERIMENTS[own].presets)}")
    about = finished_run(run, "reproduce", f"`npti reproduce --out {run}` makes or continues one")
    for own in names:
        require_usable(run / own)  # before the model is loaded
    loaded = _load(about["settings"]["model"], dtype, device, backend, remote)
    typer.echo(f"{_cli_plan.plan_of_run(loaded)}\n")
    lab = Lab.from_run(run, model=loaded, bench=_bench(bench))
    for own in names:
        try:
            result = EXPERIMENTS[own].run(lab, preset)
        except KeyboardInterrupt:
            typer.echo(f"\nnpti: stopped; the same command goes on from what is in {run / own}", err=True)
            raise typer.Exit(130) from None
        typer.echo(f"\n{result.summary()}\nEverything is in {run / own}.")


@app.command()
def figures(
    run: Annotated[Path | None, typer.Argument(help="A finished run folder; by default runs/PRESET.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("figures"),
    preset: Annotated[str, typer.Option(help="Names the run folder, where none is given.")] = "quick",
) -> None:
    """Draw the figures of a finished RUN and of the experiments in it anew; no model is needed."""
    from npti_interp.experiments import EXPERIMENTS, ReproduceResult, write_figures
    from npti_interp.runs import at_work_in

    folder = run or Path("runs") / preset
    found = ReproduceResult.load(folder)
    with at_work_in(out):
        written = write_figures(found, out)
        for name, own in EXPERIMENTS.items():
            if (folder / name / "summary.md").is_file():
                written += own.result.load(folder / name).save_figures(out)
    for path in written:
        typer.echo(str(path))


app.command()(build)
app.command()(_cli_audit.audit)
app.command()(_cli_plan.plan)
app.add_typer(_cli_humans.app, name="humans")


def main() -> None:
    """Entry point: errors the user can mend are one line, not a traceback (``$NPTI_DEBUG`` shows it)."""
    from npti_interp.errors import NptiError

    # Waiting threads that spin take the core from those that work; both libraries read this when they load.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if {"audit", "build", "reproduce", "experiment", "locate", "induce"} & set(sys.argv[1:2]):
            from npti_interp.backends._kernels import keep_heap

            keep_heap()
        app()
    except (NptiError, ValueError, OSError) as error:
        if os.environ.get("NPTI_DEBUG"):
            raise
        typer.echo(f"npti: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
