"""``npti plan``: thin, over `plan_memory`; and the plans that long commands say before they begin."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from npti_interp.experiments import ReproduceConfig
    from npti_interp.models import MemoryPlan, Model

__all__ = ["plan", "plan_of_run"]

PERSONA_TOKENS = 250
"""A prompt's tokens with a persona in front, as long commands assume them before any prompt is made."""


def plan(
    model: Annotated[
        str,
        typer.Argument(help="smollm2-135m (comes along), a hub id, or a directory; only its configuration is read."),
    ],
    dtype: Annotated[str, typer.Option(help="Precision of the weights: float32, bfloat16 or float16.")] = "float32",
    quantization: Annotated[str | None, typer.Option(help="8bit or 4bit weights.")] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps; or auto for all.")] = "cpu",
    rows: Annotated[int | None, typer.Option(help="Answers decoded at once; by default as many as fit.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the longest prompt.")] = 150,
    tokens: Annotated[int, typer.Option(help="Length of an answer.")] = 100,
    conditions: Annotated[int, typer.Option(help="Interventions in one sweep.")] = 1,
    traits: Annotated[int, typer.Option(help="Traits whose statistics are held at once.")] = 1,
    questions: Annotated[int, typer.Option(help="Search questions a trait, for a server's jobs.")] = 200,
    remote: Annotated[
        bool, typer.Option("--remote", help="The model is on NDIF: what is here, and what travels.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Plain data instead of text.")] = False,
) -> None:
    """Tell what a run of MODEL takes, and whether it fits here, without reading its weights.

    Ends with 0 where it fits, with 1 where it does not, and with 2 where it cannot be told.
    """
    import torch

    from npti_interp.models import plan_memory

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in types:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(types)}")
    if device not in ("cpu", "auto"):
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # what PyTorch raises differs from device to device
            raise ValueError(f"device {device!r} cannot be used here: {error}") from error
    made = plan_memory(
        model, dtype=types[dtype], quantization=quantization, device="cpu" if device == "auto" else device,
        device_map="auto" if device == "auto" else None, rows=rows, prompt_tokens=prompt_tokens, max_new_tokens=tokens,
        conditions=conditions, traits=traits, n_questions=questions, remote=remote,
    )  # fmt: skip
    typer.echo(json.dumps(made.to_dict(), indent=1) if as_json else str(made))
    raise typer.Exit(0 if made.fits else 1)


def plan_of_run(model: Model, config: ReproduceConfig | None = None, *, conditions: int = 8) -> MemoryPlan:
    """The plan of the main experiment, or of an experiment on its neurons.

    Args:
        model: the loaded model.
        config: of the main experiment.
        conditions: interventions in one sweep.
    """
    from npti_interp.models import plan_memory

    length = 100
    if config is not None:
        length = max(config.search_tokens, config.test_tokens)
        conditions = max(conditions, config.n_dose_conditions if config.dose_trait else 0)
    return plan_memory(model, prompt_tokens=PERSONA_TOKENS, max_new_tokens=length, conditions=conditions)
