"""What `writes` and `overlap` share: what a neuron writes into the residual stream, and what it sends on over answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from npti_interp.errors import NonFiniteActivationError
from npti_interp.experiments._lab import Lab, Session
from npti_interp.generation import hooked
from npti_interp.models import Model
from npti_interp.models._weights import execution_device, plain_weight, stored
from npti_interp.neurons import NeuronSet
from npti_interp.prompts import eliciting_personas, persona_prompts
from npti_interp.runs import read_table, write_table
from npti_interp.traits import Pole, Trait

__all__ = [
    "CONVENTIONS",
    "Replay",
    "amounts",
    "final_norm",
    "label",
    "logit_vectors",
    "matched_draws",
    "minus",
    "post_ffn_norm",
    "replay_answers",
    "replayed",
    "scattered",
    "search_rows",
    "unembedding_rows",
    "written_rows",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CONVENTIONS = {"measured": "amount × mean of ĥW3", "unit": "amount alone"}
"""How the sign of a gated FFN's second factor is taken, for whole traits."""

_REPLAY_ROWS = 8


# -- weights: from a neuron to the logits ------------------------------------------------------------------------------


def _norm_gain(norm: nn.Module, d_model: int, device: torch.device) -> Float[Tensor, " d_model"]:
    """The norm's gain, whatever the architecture stores (Gemma stores gain − 1)."""
    if isinstance(norm, nn.LayerNorm):
        if not norm.elementwise_affine:
            return torch.ones(d_model, device=device)
        return stored(norm, "weight").detach().float().to(device)
    parameter = next(norm.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    with torch.no_grad():  # an RMSNorm gives its gain for a constant vector; a large one drowns its epsilon
        return norm(torch.full((d_model,), 1e4, device=execution_device(norm), dtype=dtype)).float().to(device)


def final_norm(model: Model) -> nn.Module:
    """The norm between the last block and the unembedding.

    Raises:
        ValueError: not found.
    """
    parent = model.hf_model.get_submodule(model.sites._layout.layers.rpartition(".")[0])
    for name in ("norm", "ln_f", "final_layer_norm"):
        if hasattr(parent, name):
            return getattr(parent, name)
    raise ValueError(f"{type(model.hf_model).__name__}: no final norm found beside its blocks")


def post_ffn_norm(model: Model, layer: int) -> nn.Module | None:
    """The norm that what the FFN writes goes through before it enters the residual stream (Gemma 2 and 3, OLMo 2)."""
    return getattr(model.sites.block_modules(model.hf_model)[layer], "post_feedforward_layernorm", None)


def written_rows(model: Model, layer: int, scale: float = 1.0) -> Float[Tensor, "d_mlp d_model"]:
    """Row *i* is what enters the residual stream per unit that neuron *i* sends on, in float32.

    Args:
        model: the model.
        layer: the layer.
        scale: mean reciprocal RMS in front of the norm after the FFN (`Replay.post_scale`); enters only where there is
            such a norm. With 1 the layer's rows are right up to a common factor.

    Raises:
        ValueError: the weights are not here as numbers (on a server, or packed in a way that is not known).
    """
    weight = model.sites.write_weights(model.hf_model, layer)
    if weight.is_meta or weight.shape != (model.sites.d_mlp, model.sites.d_model):
        raise ValueError(
            f"{model.name}: the write weights are not here as numbers (on a server, or packed in a way that is not "
            "known); load the model locally"
        )
    rows = weight.detach().float()
    norm = post_ffn_norm(model, layer)
    return rows if norm is None else rows * (scale * _norm_gain(norm, model.sites.d_model, rows.device))


def unembedding_rows(model: Model) -> Float[Tensor, "vocab d_model"]:
    """Row *t* reads token *t*'s logit from a write into the residual stream: gain and centring folded in, in float32.

    The final norm's scale 1/ρ is not (`Replay.final_scale` is it, measured), nor is a soft cap on the logits. Rows are
    relative to their mean over the vocabulary.
    """
    head = plain_weight(model.hf_model.get_output_embeddings()).detach().float()
    norm = final_norm(model)
    rows = head * _norm_gain(norm, model.sites.d_model, head.device)
    if isinstance(norm, nn.LayerNorm):
        rows = rows - rows.mean(dim=1, keepdim=True)  # the same as centring what is read
    return rows - rows.mean(dim=0)


def logit_vectors(model: Model, writes: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
    """Direct logit attribution of writes into the residual stream, relative to the mean over the vocabulary.

    In units of the final norm's RMS: multiply by `Replay.final_scale` for logits.
    """
    return writes.float() @ unembedding_rows(model).T


# -- activations: answers replayed -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """What teacher-forced replay of answers measured, over their fed-back tokens.

    Attributes:
        multiplier: ``float64 [layer, neuron]``: mean of (ĥW3), by which an addition to σ(ĥW1) is multiplied; 1 in a
            plain FFN.
        contribution: ``float64 [layer, neuron]``: mean of what the neuron sends on.
        post_scale: ``float64 [layer]``: mean reciprocal RMS in front of the norm after the FFN; 1 where there is none.
        final_scale: mean reciprocal RMS (standard deviation for a LayerNorm) in front of the final norm.
        n_tokens: tokens measured.
        examples: the largest values of the chosen neurons: ``layer, neuron, rank, answer, position, value, sent``.
    """

    multiplier: Floats
    contribution: Floats
    post_scale: Floats
    final_scale: float
    n_tokens: int
    examples: pd.DataFrame


def _second_factor(model: Model, layer: int) -> tuple[nn.Module, int]:
    """The module whose output ends in ĥW3, and where in its last dimension that begins."""
    mlp = list(model.sites._mlps(model.hf_model))[layer]
    if hasattr(mlp, "gate_up_proj"):
        return cast(nn.Module, mlp.gate_up_proj), model.sites.d_mlp
    return cast(nn.Module, mlp.up_proj), 0


class _Replayer:
    """Sums over answer tokens, and the largest values so far of the chosen neurons."""

    def __init__(self, model: Model, chosen: Sequence[tuple[int, int]], n_examples: int) -> None:
        sites = model.sites
        self.model, self.n_examples = model, n_examples
        shape = (sites.n_layers, sites.d_mlp)
        self.multiplier, self.contribution = np.zeros(shape), np.zeros(shape)
        self.post, self.final, self.n_tokens = np.zeros(sites.n_layers), 0.0, 0
        self.chosen = [sorted({n for at, n in chosen if at == layer}) for layer in range(sites.n_layers)]
        # By layer [example, chosen neuron]: value, what was sent on, answer, position.
        self.best = [np.full((4, n_examples, len(own)), -np.inf) for own in self.chosen]
        self.mask = torch.zeros(0, 0, dtype=torch.bool)
        self.answers: Ints = np.zeros(0, np.int64)
        self.start: Ints = np.zeros(0, np.int64)
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def _sum(self, values: Tensor) -> npt.NDArray[np.float64]:
        return values[self.mask.to(values.device)].double().sum(dim=0).cpu().numpy()

    def _reciprocal(self, norm: nn.Module, values: Tensor) -> Tensor:
        held = values[self.mask.to(values.device)].float()
        if isinstance(norm, nn.LayerNorm):
            held = held - held.mean(dim=-1, keepdim=True)
        return held.pow(2).mean(dim=-1).rsqrt().double().sum().cpu()

    def _after_activation(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            other = ~self.mask.to(output.device)[:, :, None]
            own = output[:, :, self.chosen[layer]].float().masked_fill(other, -math.inf)
            self._found[layer] = own.max(dim=1)

        return hook

    def _after_second(self, layer: int, begin: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self.multiplier[layer] += self._sum(output[..., begin:])

        return hook

    def _before_down(self, layer: int) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sent = inputs[0]
            self.contribution[layer] += self._sum(sent)
            if not self.chosen[layer]:
                return
            value, position = self._found.pop(layer)
            there = sent[:, :, self.chosen[layer]].float().gather(1, position[:, None])[:, 0]
            rows = np.broadcast_to(self.answers[:, None], value.shape)
            place = position.cpu().numpy() - self.start[:, None]
            new = np.stack([value.cpu().numpy(), there.cpu().numpy(), rows, place]).astype(np.float64)
            both = np.concatenate([self.best[layer], new], axis=1)
            # Equal values: the earlier answer, so that the batching decides nothing.
            order = np.lexsort((both[2], -both[0]), axis=0)[: self.n_examples]
            self.best[layer] = np.take_along_axis(both, order[None], axis=1)

        return hook

    def _before_post(self, layer: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.post[layer] += float(self._reciprocal(module, inputs[0]))

        return hook

    def _before_final(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.final += float(self._reciprocal(module, inputs[0]))

    def hooks(self) -> Iterator[Any]:
        """All hooks on the plain Hugging Face model."""
        model = self.model
        activations = model.sites.activation_modules(model.hf_model)
        for layer, down in enumerate(model.sites.down_projections(model.hf_model)):
            if self.chosen[layer]:
                yield activations[layer].register_forward_hook(self._after_activation(layer))
            yield down.register_forward_pre_hook(self._before_down(layer))
            if model.sites.gated:
                module, begin = _second_factor(model, layer)
                yield module.register_forward_hook(self._after_second(layer, begin))
            if (norm := post_ffn_norm(model, layer)) is not None:
                yield norm.register_forward_pre_hook(self._before_post(layer))
        yield final_norm(model).register_forward_pre_hook(self._before_final)

    def result(self) -> Replay:
        n, sites = self.n_tokens, self.model.sites
        rows: list[dict[str, Any]] = []
        for layer, own in enumerate(self.chosen):
            for k, neuron in enumerate(own):
                for rank in range(self.n_examples):
                    value, sent, answer, position = self.best[layer][:, rank, k]
                    if math.isfinite(value):
                        rows.append(
                            {
                                "layer": layer, "neuron": neuron, "rank": rank, "answer": int(answer),
                                "position": int(position), "value": value, "sent": sent,
                            }
                        )  # fmt: skip
        columns = ["layer", "neuron", "rank", "answer", "position", "value", "sent"]
        post = [post_ffn_norm(self.model, layer) is not None for layer in range(sites.n_layers)]
        return Replay(
            multiplier=self.multiplier / n if sites.gated else np.ones_like(self.multiplier),
            contribution=self.contribution / n,
            post_scale=np.where(post, self.post / n, 1.0),
            final_scale=self.final / n,
            n_tokens=n,
            examples=pd.DataFrame(rows, columns=columns),
        )


def replay_answers(
    model: Model,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    neurons: Sequence[tuple[int, int]] = (),
    *,
    n_examples: int = 5,
    progress: Any = None,
) -> Replay:
    """Pass prompts and their answers through the plain model, and measure what its FFN neurons send on.

    Sums and the largest values are kept, never activations. Rows are padded on the right, so a batch changes nothing
    but rounding.

    Args:
        model: the model; its weights must be in this process.
        prompts: token ids of each prompt.
        answers: token ids of each answer that were fed back (all but the last decoded one); these are measured.
        neurons: ``(layer, neuron)`` to find the largest values σ(ĥW1) of, at most one an answer, so that the examples
            differ.
        n_examples: how many a neuron.
        progress: something whose ``update`` is called with the answers done.

    Raises:
        ValueError: unequal numbers, an empty prompt, or no answer token at all; the weights are not here.
        NonFiniteActivationError: NaN or infinity in a layer.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers")
    if any(len(p) == 0 for p in prompts) or not any(len(a) for a in answers):
        raise ValueError("nothing to replay: an empty prompt, or no answer with a token that was fed back")
    written_rows(model, 0)  # raises where the weights are not here
    hf = model.hf_model
    device = execution_device(hf.get_input_embeddings())
    work = _Replayer(model, neurons, n_examples)
    whole = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
    order = [k for k in sorted(range(len(whole)), key=lambda k: len(whole[k])) if len(answers[k])]
    with hooked(work.hooks()), torch.no_grad():
        for start in range(0, len(order), _REPLAY_ROWS):
            batch = order[start : start + _REPLAY_ROWS]
            width = max(len(whole[k]) for k in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            attention = torch.zeros_like(ids)
            mask = torch.zeros(len(batch), width, dtype=torch.bool)
            for row, k in enumerate(batch):
                ids[row, : len(whole[k])] = torch.tensor(whole[k])
                attention[row, : len(whole[k])] = 1
                mask[row, len(prompts[k]) : len(whole[k])] = True
            work.mask = mask.to(device)
            work.answers = np.array(batch, np.int64)
            work.start = np.array([len(prompts[k]) for k in batch], np.int64)
            work.n_tokens += int(mask.sum())
            hf.base_model(input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False)
            if not np.isfinite(work.contribution).all():  # of all that is summed this sees the most
                layer = int(np.flatnonzero(~np.isfinite(work.contribution).all(axis=1))[0])
                raise NonFiniteActivationError(
                    f"layer {layer}: NaN or infinity in what its neurons send on: half precision overflowing or damaged "
                    "weights do this"
                )
            if progress is not None:
                progress.update(len(batch))
    return work.result()


def search_rows(
    lab: Lab, trait: Trait, pole: Pole, n_answers: int
) -> tuple[list[tuple[int, ...]], list[list[int]], pd.DataFrame]:
    """Prompt tokens, fed-back answer tokens and table of the first answers that the neurons were located on.

    Raises:
        ValueError: the lab was not made from a run; the run's persona prompts cannot be made again with this bench.
    """
    table = lab.search_answers(trait, pole)
    known = {q.id: q for q in lab.bench.questions(trait, "search")}
    ids = table["question_id"].tolist()
    personas = [p.id for p in eliciting_personas(lab.bench, trait, pole, len(table))]
    if any(i not in known for i in ids) or table["persona"].tolist() != personas:
        raise ValueError(
            f"the run's persona prompts of {trait}, {pole}, cannot be made again with the bench {lab.bench.name!r}; give "
            "the lab the bench that the run was made with"
        )
    prompts = persona_prompts(lab.bench, trait, pole, [known[i] for i in ids])[:n_answers]
    part = table.iloc[:n_answers].reset_index(drop=True)
    return (
        [lab.model.encode(p) for p in prompts],
        [[int(t) for t in tokens][:-1] for tokens in part["tokens"]],
        part,
    )


def replayed(
    session: Session, trait: Trait, pole: Pole, n_answers: int, neurons: Sequence[tuple[int, int]] = (),
    *, n_examples: int = 1, context: int = 8,
) -> tuple[Replay, pd.DataFrame]:  # fmt: skip
    """`replay_answers` on the search answers of a trait-pole, as two files of the run folder.

    Returns:
        the means, and the examples with their context in words.
    """
    run, stem = session.run, f"{trait}-{pole}"
    means, examples = f"means/{stem}.parquet", f"examples/{stem}.parquet"
    if not (run.done(means) and run.done(examples)):
        session.bar.set_postfix_str(f"{trait}: replaying the answers of the {pole} pole")
        prompts, answers, rows = search_rows(session.lab, trait, pole, n_answers)
        made = replay_answers(session.lab.model, prompts, answers, neurons, n_examples=n_examples, progress=session.bar)
        layers, d_mlp = made.multiplier.shape
        table = pd.DataFrame(
            {
                "layer": np.repeat(np.arange(layers), d_mlp), "neuron": np.tile(np.arange(d_mlp), layers),
                "multiplier": made.multiplier.ravel(), "contribution": made.contribution.ravel(),
                "post_scale": np.repeat(made.post_scale, d_mlp), "final_scale": made.final_scale,
                "tokens": made.n_tokens,
            }
        )  # fmt: skip
        write_table(run.path / means, table)
        write_table(run.path / examples, _in_words(session.lab.model, made.examples, prompts, answers, rows, context))
        run.record(means, examples)
    else:
        session.bar.update(min(n_answers, max(0.0, session.bar.total - session.bar.n)))
    sites, table = session.lab.model.sites, read_table(run.path / means)
    grid = {
        c: table[c].to_numpy(np.float64).copy().reshape(sites.n_layers, sites.d_mlp)
        for c in ("multiplier", "contribution")
    }
    scale = table["post_scale"].to_numpy(np.float64).reshape(sites.n_layers, sites.d_mlp)[:, 0]
    words = read_table(run.path / examples)
    return Replay(
        grid["multiplier"], grid["contribution"], scale, float(table["final_scale"].iloc[0]),
        int(table["tokens"].iloc[0]), words,
    ), words  # fmt: skip


def _in_words(
    model: Model, examples: pd.DataFrame, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]],
    rows: pd.DataFrame, context: int,
) -> pd.DataFrame:  # fmt: skip
    """Examples with the token and what stands around it (the answer alone, never the prompt)."""
    found: list[dict[str, Any]] = []
    for row in examples.to_dict("records"):
        tokens, at = list(answers[row["answer"]]), row["position"]
        decode: Any = model.tokenizer.decode
        about = rows.iloc[row["answer"]]
        found.append(
            {
                **row,
                "question_id": about["question_id"],
                "persona": about["persona"],
                "before": decode(tokens[max(0, at - context) : at]),
                "token": decode([tokens[at]]),
                "after": decode(tokens[at + 1 : at + 1 + context]),
            }
        )
    columns = [*examples.columns, "question_id", "persona", "before", "token", "after"]
    return pd.DataFrame(found, columns=columns)


# -- whole traits -----------------------------------------------------------------------------------------------------


def amounts(neurons: NeuronSet, gamma: float, pole: Pole) -> Floats:
    """What the edit adds to each neuron of the set, ``float64 [n]``; 0 for the opposite pole's, which it clamps.

    A clamp takes away what the neuron happens to send; it adds nothing constant, so it is part of no direction.
    """
    if not (np.sign(neurons.delta) == pole.sign).any():
        return np.zeros(len(neurons))
    dense = neurons.edit(gamma, pole, clamp_opposite=False).dense()[0].double().numpy()
    return np.where(np.sign(neurons.delta) == pole.sign, dense[neurons.layer, neurons.neuron], 0.0)


def matched_draws(neurons: NeuronSet, layer: int, d_mlp: int, n_draws: int, rng: np.random.Generator) -> Ints:
    """Random neurons of one layer in place of the set's, ``int64 [draw, neuron of the set in this layer]``.

    Each draw is distributed as `NeuronSet.random_matched`: without replacement, none of the set's own as long as the
    layer has enough others. Both poles are drawn together, so they stay disjoint.
    """
    here = neurons.neuron[neurons.layer == layer]
    others = np.setdiff1d(np.arange(d_mlp), here)
    pool = others if len(others) >= len(here) else np.arange(d_mlp)
    return rng.permuted(np.tile(pool, (n_draws, 1)), axis=1)[:, : len(here)]


def scattered(places: Ints, values: Floats, d_mlp: int) -> Float[Tensor, "draw d_mlp"]:
    """Rows of zeros with ``values`` at each draw's places."""
    made = np.zeros((len(places), d_mlp), np.float32)
    np.put_along_axis(made, places, np.broadcast_to(values.astype(np.float32), places.shape), axis=1)
    return torch.from_numpy(made)


def label(trait: Trait | str, pole: Pole | str) -> str:
    """``"N+"`` or ``"N-"``."""
    return f"{Trait(trait).letter}{'+' if Pole(pole) is Pole.HIGH else '-'}"


def minus(text: str) -> str:
    """With a minus sign for every hyphen."""
    return text.replace("-", "−")
