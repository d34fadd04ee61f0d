"""``npti audit``: thin, over `audit_bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["audit"]


def audit(
    path: Annotated[
        Path | None, typer.Argument(help="Folder of a set, in either layout; by default the embedded set.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("audit"),
    items: Annotated[
        Path | None,
        typer.Option(help="The questionnaire used in evaluation: IPIP-NEO item key (.xls, .csv), or one of your own."),
    ] = None,
    n_items: Annotated[int, typer.Option(help="Items of the item key: 300 or 120.")] = 300,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Also measure discrimination, with this model: smollm2-135m, a hub id, a path."
        ),
    ] = None,
    trait: Annotated[list[str] | None, typer.Option(help="Discrimination of this trait only; repeat it.")] = None,
    questions: Annotated[
        int, typer.Option("--questions", "-n", help="Questions of a trait behind discrimination.")
    ] = 24,
    personas: Annotated[int, typer.Option(help="Descriptions of each pole that answer each of them.")] = 3,
    split: Annotated[str, typer.Option(help="Split whose discrimination is measured: search or test.")] = "test",
    similarity: Annotated[float, typer.Option(help="Jaccard index of word 3-grams that makes a near repeat.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of samples, permutations and resamples.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on warnings, too.")] = False,
) -> None:
    """Audit a set of questions and descriptions: counts, repeats, answer formats, leaks, balance, chosen rows.

    Ends with 0 where the set is clean, with 1 where it has errors (with --strict: or warnings), and with 2 where it
    cannot be read. The report (report.html, report.md, findings.json, tables, figures) is in OUT.
    """
    from npti_interp.audit import AuditConfig, audit_bench
    from npti_interp.bench import PersonalityBench
    from npti_interp.bench._schema import as_split
    from npti_interp.bench.construction import read_items
    from npti_interp.models import load_model
    from npti_interp.runs import require_usable

    require_usable(out)  # before minutes are spent
    config = AuditConfig(
        similarity=similarity, traits=tuple(trait or ()), split=as_split(split), n_questions=questions,
        n_personas=personas, seed=seed,
    )  # fmt: skip
    report = audit_bench(
        path if path is not None else PersonalityBench.embedded(),
        model=None if model is None else load_model(model),
        items=None if items is None else read_items(items, n_items),
        config=config,
        progress=True,
    )
    report.save(out)
    typer.echo(f"{report}\nEverything is in {out}; open {out / 'report.html'}.")
    raise typer.Exit(report.exit_code(strict=strict))
