"""``npti humans``: thin, over `make_task` and `human_report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="humans",
    help=(
        "Let people rank answers, without telling them which method gave which.\n\n"
        "npti humans export writes one page a judge; each works offline and saves a file. npti humans report reads "
        "those files."
    ),
    no_args_is_help=True,
)


@app.command()
def export(
    answers: Annotated[
        list[Path], typer.Argument(help="Tables of answers (.parquet), or run folders (their answers/test-*.parquet).")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the task: pages/ for the judges, key.json for you.")] = Path(
        "humans"
    ),
    preset: Annotated[
        str, typer.Option(help="quick, or published (200 questions, 5 judges, the paper's 5 methods).")
    ] = "quick",
    method: Annotated[
        list[str] | None, typer.Option(help="A condition to compare, as the tables name it; repeat it. By default all.")
    ] = None,
    items: Annotated[int | None, typer.Option(help="Questions to rank, attention checks not counted.")] = None,
    judges: Annotated[int | None, typer.Option(help="How many people judge.")] = None,
    per_item: Annotated[int | None, typer.Option(help="Judges a question gets; by default all.")] = None,
    attention: Annotated[float | None, typer.Option(help="Attention checks per question, 0 to 1.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the choice of questions and of every order.")] = None,
) -> None:
    """Make a blinded ranking task from ANSWERS: one offline page a judge, and a key that no judge may see."""
    from dataclasses import replace

    import pandas as pd

    from npti_interp.evaluation.humans import RANKING_PRESETS, make_task
    from npti_interp.runs import read_table, require_usable

    if preset not in RANKING_PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(RANKING_PRESETS)}")
    given: dict[str, Any] = {
        "methods": tuple(method) if method else None, "n_items": items, "judges": judges, "judges_per_item": per_item,
        "attention_rate": attention, "seed": seed,
    }  # fmt: skip
    config = replace(RANKING_PRESETS[preset], **{k: v for k, v in given.items() if v is not None})
    require_usable(out)
    table = pd.concat([read_table(path) for path in _tables(answers)], ignore_index=True)
    task = make_task(table, config)
    written = task.save(out)
    loads = sorted({len(own) for own in task.layouts.values()})
    typer.echo(
        f"{len(task.counted)} questions × {len(task.methods)} methods ({', '.join(task.methods)}), {len(task.checks)} "
        f"attention checks; {' or '.join(map(str, loads))} items a judge."
    )
    if task.dropped:
        typer.echo(f"{task.dropped} questions were left out: a method has no answer to them.")
    if task.identical:
        typer.echo(f"Items in which at least two methods gave the very same answer: {task.identical}.")
    for path in written[1:]:
        typer.echo(f"  {path}")
    typer.echo(f"Send each judge one page. Keep {written[0]}: it says which answer is whose, and the report needs it.")


def _tables(paths: list[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        own = sorted((path / "answers").glob("test-*.parquet")) if path.is_dir() else [path]
        if not own:
            raise FileNotFoundError(f"{path} has no answers/test-*.parquet; name the tables of answers")
        if missing := [p for p in own if not p.is_file()]:
            raise FileNotFoundError(f"no file at {missing[0]}")
        found += own
    return found


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="What the judges sent: .json files, or folders of them.")],
    key: Annotated[Path, typer.Option(help="The task's key.")] = Path("humans/key.json"),
    out: Annotated[Path | None, typer.Option(help="Where the report goes; by default report/ beside the key.")] = None,
    pass_share: Annotated[float, typer.Option(help="Share of the attention checks a judge must pass.")] = 0.75,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
) -> None:
    """Evaluate judges' FILES: mean ranks, tests, agreement, attention, what is missing, the published ranks beside."""
    from npti_interp.evaluation.humans import RankingTask, human_report
    from npti_interp.paper import human_ranks
    from npti_interp.runs import require_usable

    folder = out or key.parent / "report"
    if key.is_file():
        require_usable(folder)
    sent = [p for path in files for p in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    found = human_report(RankingTask.load(key), sent, published=human_ranks(), pass_share=pass_share, seed=seed)
    found.save(folder)
    typer.echo(f"{found.summary()}\nEverything is in {folder}.")
