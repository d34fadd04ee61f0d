"""The command ``npti build``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["build"]


def build(
    items: Annotated[
        Path,
        typer.Option(help="IPIP-NEO item key (.xls, .csv), or a questionnaire of your own (.json, .csv)."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the build. Continued if it exists; the set is in OUT/bench.")],
    base_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint, up to /v1; its key is in $OPENAI_API_KEY.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model's name at the endpoint.")] = None,
    local: Annotated[
        str | None, typer.Option(help="Instead of an endpoint: smollm2-135m, a hub id, a directory, a .gguf file.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell calls, tokens and cost; send nothing.")] = False,
    prompt_price: Annotated[float | None, typer.Option(help="Of a million prompt tokens.")] = None,
    completion_price: Annotated[float | None, typer.Option(help="Of a million completion tokens.")] = None,
    n_items: Annotated[int, typer.Option(help="Items to take from the item key: 300 or 120.")] = 300,
    trait: Annotated[list[str] | None, typer.Option(help="Only this trait; may be given several times.")] = None,
    items_per_trait: Annotated[int | None, typer.Option(help="Most items of a trait, facets in turn.")] = None,
    topics: Annotated[int | None, typer.Option(help="How many of the sixty topics; by default all.")] = None,
    questions: Annotated[int, typer.Option(help="Questions for each item and topic.")] = 10,
    personas: Annotated[int, typer.Option(help="Descriptions for each pole.")] = 80,
    refine_at_once: Annotated[int, typer.Option(help="Questions that one call refines.")] = 5,
    test_items: Annotated[float, typer.Option(help="Share of the items that the test split gets.")] = 0.2,
    test_topics: Annotated[float, typer.Option(help="Share of the topics that the test split gets.")] = 0.2,
    write_aside: Annotated[
        bool, typer.Option("--write-aside", help="Also write questions that fit neither split.")
    ] = False,
    search_per_trait: Annotated[int | None, typer.Option(help="Most search questions of a trait.")] = None,
    test_per_trait: Annotated[int | None, typer.Option(help="Most test questions of a trait.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the writer.")] = 0.8,
    attempts: Annotated[int, typer.Option(help="Draws of an answer that cannot be used.")] = 3,
    seed: Annotated[int, typer.Option(help="Of draws and splits.")] = 0,
    name: Annotated[str, typer.Option(help="Name of the finished set.")] = "personalitybench",
    licence: Annotated[str, typer.Option(help="Licence of the finished set.")] = "CC-BY-4.0",
    cache: Annotated[Path | None, typer.Option(help="Folder of replies; by default in the user's cache.")] = None,
    concurrency: Annotated[int, typer.Option(help="Calls at once, at an endpoint.")] = 8,
    requests_per_minute: Annotated[float | None, typer.Option(help="Limit of the endpoint.")] = None,
    tokens_per_minute: Annotated[float | None, typer.Option(help="Limit of the endpoint.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one call may take.")] = 120.0,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again where an earlier run got no reply.")
    ] = False,
) -> None:
    """Build a PersonalityBench: a chat model writes it from questionnaire items and topics.

    Stop it whenever you like; called again, it goes on where it was, and makes no call twice.
    """
    from npti_interp.bench.construction import BuildConfig, build_bench, embedded_topics, estimate_bench, read_items
    from npti_interp.runs import require_usable

    if (prompt_price is None) != (completion_price is None):
        raise ValueError("give both --prompt-price and --completion-price, or neither")
    every = embedded_topics()
    if topics is not None and not 2 <= topics <= len(every):
        raise ValueError(f"--topics must lie between 2 and {len(every)}, got {topics}")
    config = BuildConfig(
        name=name, n_personas=personas, topics=every[:topics], questions_per_cell=questions,
        refine_at_once=refine_at_once, test_items=test_items, test_topics=test_topics, write_aside=write_aside,
        search_per_trait=search_per_trait, test_per_trait=test_per_trait, temperature=temperature, attempts=attempts,
        seed=seed, licence=licence,
    )  # fmt: skip
    chosen = _chosen(read_items(items, n_items), trait, items_per_trait)
    kept = "cache" if cache is None else cache
    if not dry_run:
        require_usable(out)  # before a model is loaded or a call made
    chat = _chat(base_url, model, local, kept, concurrency, requests_per_minute, tokens_per_minute, timeout)
    if dry_run:
        estimate = estimate_bench(chosen, chat, config, folder=out)
        typer.echo(str(estimate))
        if prompt_price is not None and completion_price is not None:
            typer.echo(f"at most {estimate.cost(prompt_price, completion_price):,.2f} in the currency of the prices")
        return
    try:
        result = build_bench(out, chosen, chat, config, retry_failed=retry_failed)
    except KeyboardInterrupt:
        typer.echo(f"\nnpti: stopped; the same command goes on from what is in {out}", err=True)
        raise typer.Exit(130) from None
    typer.echo(result.summary())


def _chosen(items: Any, traits: list[str] | None, most: int | None) -> Any:
    from npti_interp.traits import as_trait

    if most is not None and most < 2:
        raise ValueError(f"--items-per-trait must be at least 2, so that each split gets one; got {most}")
    wanted = {as_trait(t) for t in traits} if traits else {i.domain for i in items}
    places: dict[Any, int] = {}
    ranked: list[tuple[int, int, Any]] = []
    for n, item in enumerate(items):
        if item.domain in wanted:
            own = item.domain, item.facet
            place = places[own] = places.get(own, -1) + 1
            ranked.append((place, n, item))
    if not ranked:
        raise ValueError(f"the items have none of {', '.join(sorted(wanted))}")
    taken: dict[Any, list[Any]] = {}
    for _, _, item in sorted(ranked, key=lambda r: r[:2]):
        taken.setdefault(item.domain, []).append(item)
    return [item for own in taken.values() for item in own[:most]]


def _chat(
    base_url: str | None, model: str | None, local: str | None, cache: Any, concurrency: int,
    requests_per_minute: float | None, tokens_per_minute: float | None, timeout: float,
) -> Any:  # fmt: skip
    from npti_interp.chat import ChatClient, LocalChat

    if (local is None) == (base_url is None) or (base_url is None) != (model is None):
        raise ValueError("the writer is either --local MODEL or --base-url URL with --model NAME")
    if local is not None:
        from npti_interp.models import load_model

        return LocalChat(load_model(local), cache=cache)
    assert base_url is not None
    assert model is not None
    return ChatClient(
        base_url, model, cache=cache, concurrency=concurrency, requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute, timeout=timeout,
    )  # fmt: skip
