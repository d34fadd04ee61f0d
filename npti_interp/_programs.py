"""Code that runs where the model is: in this process, or on a server that has PyTorch and nnsight but not this package.

Remote jobs send this module by value, so it imports nothing but PyTorch, and takes and returns plain containers of
tensors. The engine in memory uses the same functions for what both must do alike: choosing tokens, applying edits.
"""

from __future__ import annotations

import math
from typing import Any

import torch

COARSE_BINS = 18
"""Coarse bins of positive values: each a run of `FINE_BINS` bins of the sketch's logarithmic grid."""
FINE_BINS = 36
COARSE_START = -12
"""First coarse bin: values from about 2e-4 on; the last one ends at about 70."""

SITES = ("before", "heads", "value", "product", "residual")
"""Where a layer is read and edited, in the order of its forward pass; `npti_interp.models._sites` says what each is."""
INPUTS = ("before", "heads", "product")
"""The sites that are the input of their module; the others are the output of theirs."""

# The grid of `npti_interp._sketch`, whose numbers these must be.
GRID = (6 / 35, -3 / 5, 10 / 7, 1.002 * 0.7 / math.log(1.01 / 0.99), 2.0**-23)


# -- choosing tokens --------------------------------------------------------------------------------------------------


def generators(decoding: dict[str, Any], keys: list[int]) -> list[Any]:
    """One random stream a row, none where decoding is greedy."""
    if decoding["temperature"] == 0:
        return []
    return [torch.Generator().manual_seed((decoding["seed"] * 1_000_003 + key) % 2**63) for key in keys]


def choose(logits: torch.Tensor, decoding: dict[str, Any], seen: Any, streams: list[Any]) -> list[int]:
    """Each row's next token.

    Args:
        logits: ``Float[Tensor, "row vocab"]``.
        decoding: the fields of `npti_interp.generation.Decoding`.
        seen: for each row, the token ids of its prompt and answer so far; used only with a repetition penalty.
        streams: for each row its `torch.Generator`, from `generators`; unused where decoding is greedy.
    """
    penalty, temperature = decoding["repetition_penalty"], decoding["temperature"]
    if penalty != 1.0:
        # In float32, as Hugging Face does: in half precision a penalty would make ties of what was none.
        logits = logits.to(torch.float32, copy=True)
        for k in range(len(logits)):
            known = torch.tensor(sorted(set(seen[k])), device=logits.device)
            value = logits[k, known]
            logits[k, known] = torch.where(value < 0, value * penalty, value / penalty)
    if temperature == 0:
        return logits.argmax(dim=-1).tolist()
    probability = torch.softmax(logits.float() / temperature, dim=-1).cpu()
    chosen: list[int] = []
    for k in range(len(logits)):
        p, token = probability[k].sort(descending=True)
        p = torch.where(p.cumsum(0) - p < decoding["top_p"], p, torch.zeros_like(p))
        chosen.append(int(token[torch.multinomial(p, 1, generator=streams[k])]))
    return chosen


class Chooser:
    """`choose` as a logits processor of Hugging Face's ``generate``: leaves only the chosen token possible."""

    def __init__(self, decoding: dict[str, Any], prompts: list[list[int]], keys: list[int], stop: list[int]) -> None:
        self.decoding, self.prompts, self.stop = decoding, prompts, set(stop)
        self.streams = generators(decoding, keys)
        self.out: list[list[int]] = [[] for _ in prompts]
        self.going = [True] * len(prompts)

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        alive = [k for k, going in enumerate(self.going) if going]
        own = logits[alive]
        if not bool(torch.isfinite(own.amax(dim=-1)).all()):
            raise ValueError("NaN or infinite logits while generating: an edit with too large a γ does this")
        seen = [self.prompts[k] + self.out[k] for k in alive] if self.decoding["repetition_penalty"] != 1.0 else None
        chosen = choose(own, self.decoding, seen, [self.streams[k] for k in alive] if self.streams else [])
        for k, token in zip(alive, chosen):  # noqa: B905
            self.out[k].append(token)
            self.going[k] = token not in self.stop
        forced = torch.full_like(logits, -math.inf)
        for k, own_tokens in enumerate(self.out):
            forced[k, own_tokens[-1]] = 0.0
        return forced


# -- edits ------------------------------------------------------------------------------------------------------------


def thin(add: torch.Tensor, drop: float, seed: int, step: int, layer: int) -> torch.Tensor:
    """Leave out a share of the additions: the same for every row, so that the batch does not matter."""
    if drop == 0:
        return add
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1_009 + layer) % 2**63)
    return add * (torch.rand(add.shape, generator=generator) >= drop).to(add)


class Edits:
    """The edits of several interventions, stacked so that each row of a batch finds its own.

    Args:
        plan: plain data: ``n`` interventions; ``early``, for each whether it edits the prompt's end; ``d_mlp``;
            ``neurons``, for each layer four tensors of one length (intervention, neuron, bound, addition); ``masks``,
            for each intervention and layer with a random mask its (drop, seed); ``vectors``, for each site and layer
            two tensors (interventions, their vectors: ``[n, width]``, at the site ``before`` ``[n, pos, d_model]``).
        device: where the tables go: one place for all layers, or a list with a layer's own.

    Attributes:
        tables: by site and layer what is done there, one entry an intervention.
    """

    def __init__(self, plan: dict[str, Any], device: Any = None) -> None:
        self.n: int = plan["n"]
        self.early: list[bool] = plan["early"]
        self.masks: dict[tuple[int, int], tuple[float, int]] = plan["masks"]
        self.tables: dict[str, dict[int, Any]] = {name: {} for name in SITES}

        def home(layer: int) -> Any:
            return device[layer] if isinstance(device, list) else device

        for layer, (which, index, bound, add) in plan["neurons"].items():
            b = torch.full((self.n, plan["d_mlp"]), math.inf)
            a = torch.zeros(self.n, plan["d_mlp"])
            b[which.long(), index.long()] = bound
            a[which.long(), index.long()] = add
            self.tables["value"][layer] = (b.to(home(layer)), a.to(home(layer)))
        for name, layers in plan["vectors"].items():
            for layer, (which, vectors) in layers.items():
                table = torch.zeros(self.n, *vectors.shape[1:])
                table[which.long()] = vectors
                self.tables[name][layer] = table.to(home(layer))

    def __bool__(self) -> bool:
        return any(self.tables.values())

    def fronts(self) -> list[int]:
        """For each intervention the number of its edit of the prompt's front; equal ones have one number."""
        if not self.tables["before"]:
            return [0] * self.n
        flat = torch.cat([table.flatten(1).cpu() for table in self.tables["before"].values()], dim=1)
        return torch.unique(flat, dim=0, return_inverse=True)[1].tolist()

    def change(
        self, name: str, layer: int, values: torch.Tensor, which: torch.Tensor, steps: list[int], start: Any
    ) -> torch.Tensor:  # fmt: skip
        """What flows through a site of a layer that `tables` names, ``[row, pos, width]``, with each row's own edit.

        Args:
            name: the site.
            layer: the layer.
            values: what flows there.
            which: each row's intervention.
            steps: each row's step, for random masks.
            start: each row's first place that is not padding; used at the site ``before`` alone.
        """
        if name == "value":
            return self.neurons(layer, values, which, steps)
        table = self.tables[name][layer].to(values.device)
        if name == "before":
            place = torch.arange(values.shape[1], device=values.device) - start[:, None].to(values.device)
            inside = (place >= 0) & (place < table.shape[1])
            own = table[which.to(values.device)[:, None], place.clamp(0, table.shape[1] - 1)]
            return values + torch.where(inside[:, :, None], own, 0.0).to(values.dtype)
        own = table[0] if self.n == 1 else table.index_select(0, which.to(values.device))[:, None]
        return values + own.to(values.dtype)

    def neurons(self, layer: int, values: torch.Tensor, which: torch.Tensor, steps: list[int]) -> torch.Tensor:
        """``min(v, bound) + add`` with each row's own edit.

        Args:
            layer: a layer of ``tables["value"]``.
            values: ``Float[Tensor, "row pos d_mlp"]``.
            which: each row's intervention.
            steps: each row's step, for random masks.
        """
        bound, add = (t.to(values.device) for t in self.tables["value"][layer])
        masked = [c for c in range(self.n) if (c, layer) in self.masks]
        if masked:
            made: dict[tuple[int, int], torch.Tensor] = {}
            for c, step in set(zip(which.tolist(), steps)):  # noqa: B905
                drop, seed = self.masks.get((c, layer), (0.0, 0))
                made[c, step] = thin(add[c], drop, seed, step, layer)
            a = torch.stack([made[c, step] for c, step in zip(which.tolist(), steps)])[:, None]  # noqa: B905
            b = bound.index_select(0, which.to(bound.device))[:, None]
        elif self.n == 1:
            b, a = bound[0], add[0]
        else:
            which = which.to(values.device)
            b, a = bound.index_select(0, which)[:, None], add.index_select(0, which)[:, None]
        return torch.minimum(values, b.to(values.dtype)) + a.to(values.dtype)


# -- reducing ---------------------------------------------------------------------------------------------------------


def grid_codes(values: torch.Tensor) -> torch.Tensor:
    """Bin of each positive value on the sketch's logarithmic grid."""
    bits = values.float().contiguous().view(torch.int32)
    s = (bits & 0x7FFFFF).float() * GRID[4]
    cubic = ((s * torch.tensor(GRID[0]) + torch.tensor(GRID[1])) * s + torch.tensor(GRID[2])) * s
    return torch.floor((((bits >> 23) - 127).float() + cubic) * torch.tensor(GRID[3])).to(torch.int32)


class Counts:
    """Reduces neuron values to counts, moments and coarse bins: 2 bytes a block and neuron, and 44 a neuron.

    Args:
        n_blocks: number of blocks.
    """

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self.tokens = torch.zeros(n_blocks, dtype=torch.int64)
        self.parts: dict[int, dict[str, torch.Tensor]] = {}
        self.seen: dict[int, int] = {}

    def take(self, layer: int, values: torch.Tensor, blocks: torch.Tensor) -> None:
        """Take in a layer's values, ``Float[Tensor, "token d_mlp"]``, and each token's block."""
        if len(values) == 0:
            return
        values = values.float()
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"layer {layer}: NaN or infinite neuron values")
        if layer not in self.parts:
            d, where = values.shape[1], values.device
            self.seen[layer] = 0
            self.parts[layer] = {
                "count": torch.zeros(self.n_blocks, d, dtype=torch.int32, device=where),
                "mean": torch.zeros(d, dtype=torch.float64, device=where),
                "m2": torch.zeros(d, dtype=torch.float64, device=where),
                "coarse": torch.zeros(COARSE_BINS * d, dtype=torch.int32, device=where),
            }
        if layer == 0:
            self.tokens += torch.bincount(blocks.cpu(), minlength=self.n_blocks)
        own, n, fresh = self.parts[layer], self.seen[layer], len(values)
        if n + fresh > 65_535:
            raise ValueError("a job counts at most 65,535 tokens; make it smaller")
        positive = values > 0
        own["count"].index_add_(0, blocks.to(values.device), positive.to(torch.int32))
        mean = values.mean(dim=0)
        step = mean.double() - own["mean"]
        share = fresh / (n + fresh)
        own["m2"] += ((values - mean) ** 2).sum(dim=0).double() + step**2 * (n * share)
        own["mean"] += step * share
        row, neuron = positive.nonzero(as_tuple=True)
        bins = torch.div(grid_codes(values[row, neuron]), FINE_BINS, rounding_mode="floor") - COARSE_START
        place = neuron * COARSE_BINS + bins.clamp(0, COARSE_BINS - 1).long()
        own["coarse"] += torch.bincount(place, minlength=len(own["coarse"])).to(torch.int32)
        self.seen[layer] = n + fresh

    def result(self) -> dict[str, torch.Tensor]:
        """What goes back, stacked over layers."""
        order = sorted(self.parts)
        if not order:
            return {"tokens": self.tokens}

        def over_layers(name: str) -> torch.Tensor:
            return torch.stack([self.parts[layer][name] for layer in order]).cpu()

        return {
            "tokens": self.tokens,
            "count": over_layers("count").to(torch.uint16),
            "mean": over_layers("mean").float(),
            "m2": over_layers("m2").float(),
            "coarse": over_layers("coarse").to(torch.uint16).view(len(order), -1, COARSE_BINS),
        }


class Windows:
    """Reduces the values of chosen neurons to fine counts inside given windows of the grid.

    Args:
        chosen: for each layer, the neurons and their windows' first bins ``Int[Tensor, "neuron window"]``.
    """

    def __init__(self, chosen: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.chosen = chosen
        self.counts = {
            layer: torch.zeros(*starts.shape, FINE_BINS, dtype=torch.int32) for layer, (_, starts) in chosen.items()
        }

    def take(self, layer: int, values: torch.Tensor, blocks: torch.Tensor) -> None:
        """Take in a layer's values, ``Float[Tensor, "token d_mlp"]``; the blocks do not matter here."""
        if layer not in self.chosen:
            return
        neurons, starts = self.chosen[layer]
        own = values.float()[:, neurons.long().to(values.device)].cpu()
        row, k = (own > 0).nonzero(as_tuple=True)
        codes = grid_codes(own[row, k])
        flat = self.counts[layer].view(-1)
        for window in range(starts.shape[1]):
            offset = codes - starts[k, window]
            inside = (offset >= 0) & (offset < FINE_BINS)
            place = (k[inside] * starts.shape[1] + window) * FINE_BINS + offset[inside].long()
            flat += torch.bincount(place, minlength=len(flat)).to(torch.int32)

    def result(self) -> dict[int, torch.Tensor]:
        """What goes back."""
        return {layer: counts.to(torch.uint16) for layer, counts in self.counts.items()}


class Means:
    """Averages what flows through a site over each owner's tokens.

    Args:
        owner: whose each token is, in order.
        n: number of owners.
    """

    def __init__(self, owner: torch.Tensor, n: int) -> None:
        self.owner, self.n = owner, n
        self.layers: dict[int, torch.Tensor] = {}

    def take(self, layer: int, values: torch.Tensor) -> None:
        """Take in a layer's ``Float[Tensor, "token width"]``."""
        owner = self.owner.to(values.device)
        total = torch.zeros(self.n, values.shape[1], device=values.device)
        total.index_add_(0, owner, values.float())
        count = torch.bincount(owner, minlength=self.n).clamp(min=1)[:, None]
        self.layers[layer] = (total / count).cpu()

    def result(self) -> torch.Tensor:
        """``Float[Tensor, "owner layer width"]``."""
        return torch.stack([self.layers[layer] for layer in sorted(self.layers)], dim=1)


# -- programs: one function a trace, as names bound to a finished one cannot be sent ----------------------------------


def module_at(model: Any, path: str) -> Any:
    """The module of an nnsight model at a dotted path."""
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def placed(values: torch.Tensor, change: Any, where: Any) -> torch.Tensor:
    """``change(values)`` at the wanted positions: ``"all"``, ``"last"``, or those of a mask [row, pos]."""
    if isinstance(where, str):
        if where == "all":
            return change(values)
        return torch.cat([values[:, :-1], change(values[:, -1:])], dim=1)
    return torch.where(where.to(values.device)[:, :, None], change(values), values)


def visit(
    model: Any, paths: Any, layer: int, edits: Edits, which: Any, steps: list[int], start: Any, where: Any,
    wanted: str, take: Any,
) -> None:  # fmt: skip
    """Edit one layer, and read it, in the order of its forward pass.

    Args:
        model: nnsight's model, inside a trace.
        paths: `npti_interp.models._sites.FFNSites.paths`.
        layer: the layer.
        edits: the edits.
        which: each row's intervention.
        steps: each row's step.
        start: each row's first place that is not padding, where the pass goes over prompts; None where it does not.
        where: places that are edited (`placed`); None is nowhere. The prompt's front is edited besides.
        wanted: the site that is read; ``""`` is none.
        take: gets what flows there, edited.
    """
    for name in SITES:
        acts = layer in edits.tables[name] and (start if name == "before" else where) is not None
        reads = name == wanted
        if not (acts or reads):
            continue
        module = module_at(model, paths[name][layer])
        whole = module.input if name in INPUTS else module.output
        values = whole[0] if isinstance(whole, tuple) else whole
        if acts:
            change = lambda v, name=name: edits.change(name, layer, v, which, steps, start)  # noqa: E731
            values = placed(values, change, "all" if name == "before" else where)
            if name in INPUTS:
                module.input = values
            else:
                module.output = (values, *whole[1:]) if isinstance(whole, tuple) else values
        if reads:
            take(values)


def decode(
    model: Any, batch: Any, paths: Any, edits: Edits, which: Any, start: Any, chooser: Chooser, blocks: Any, sink: Any,
    settings: Any,
) -> None:  # fmt: skip
    """Generate; edits act on generated tokens, early ones on the last prompt position as well, front ones on prompts."""
    n, rows, counts = settings["generation_config"].max_new_tokens, len(which), sink is not None
    early = edits.early[int(which[0])]
    with torch.no_grad(), model.generate(logits_processor=[chooser], **settings) as tracer:  # noqa: SIM117
        with tracer.invoke(batch):
            for step in tracer.iter[0 if early or edits.tables["before"] else 1 : n]:
                where, begin = "all", None
                if step == 0:
                    where, begin = "last" if early else None, start
                for layer in range(len(paths["before"])):

                    def take(values: Any, step: int = step, layer: int = layer) -> None:
                        # Asked only now: before the read, the token that this pass feeds may not be chosen yet.
                        alive = torch.tensor([k for k in range(rows) if chooser.going[k] and blocks[k] >= 0]).long()
                        sink.take(layer, values[:, -1][alive.to(values.device)], blocks[alive])

                    wanted = "value" if counts and step > 0 else ""
                    visit(model, paths, layer, edits, which, [step - 1] * rows, begin, where, wanted, take)


def decode_sandboxed(
    model: Any, batch: Any, paths: Any, edits: Edits, which: Any, start: Any, settings: Any
) -> torch.Tensor:  # fmt: skip
    """Generate greedily where nothing of ours can be handed to ``generate``; returns prompts and answers."""
    n, rows = settings["generation_config"].max_new_tokens, len(which)
    early = edits.early[int(which[0])]
    with torch.no_grad(), model.generate(**settings) as tracer:
        with tracer.invoke(batch):
            for step in tracer.iter[0 if early or edits.tables["before"] else 1 : n]:
                where, begin = "all", None
                if step == 0:
                    where, begin = "last" if early else None, start
                for layer in range(len(paths["before"])):
                    visit(model, paths, layer, edits, which, [step - 1] * rows, begin, where, "", None)
                last = module_at(model, paths["residual"][-1]).output
                if not bool(torch.isfinite(last[0] if isinstance(last, tuple) else last).all()):
                    raise ValueError("NaN or infinite values while generating: an edit with too large a γ does this")
        with tracer.invoke():
            tokens = tracer.result.save()
    return tokens


def decode_plain(model: Any, batch: Any, chooser: Chooser, settings: Any) -> None:
    """Generate without edits."""
    with torch.no_grad(), model.generate(batch, logits_processor=[chooser], **settings):
        pass


def replay(
    model: Any, batch: Any, paths: Any, edits: Edits, which: Any, where: torch.Tensor, at: torch.Tensor, wanted: str,
    take: Any,
) -> None:  # fmt: skip
    """Feed prompts with answers, edited in the places ``where`` and in front; hand on what a site holds ``at`` others."""
    begin = torch.zeros(len(which), dtype=torch.long)
    with torch.no_grad(), model.trace(batch) as tracer:
        for layer in range(len(paths["before"])):
            taker = lambda values, layer=layer: take(layer, values[at.to(values.device)])  # noqa: E731
            visit(model, paths, layer, edits, which, [0] * len(which), begin, where, wanted, taker)
        tracer.stop()


def read_logits(
    model: Any, batch: Any, paths: Any, edits: Edits, which: Any, where: torch.Tensor, at: torch.Tensor, tokens: Any
) -> torch.Tensor:
    """At the places of a mask ``[row, pos]``: the logits, or where tokens are given their log-probabilities."""
    begin = torch.zeros(len(which), dtype=torch.long)
    with torch.no_grad(), model.trace(batch):
        for layer in range(len(paths["before"])):
            visit(model, paths, layer, edits, which, [0] * len(which), begin, where, "", None)
        logits = model.output.logits
        picked = logits[at.to(logits.device)]
        if tokens is not None:
            pieces = [
                part.float().gather(1, own[:, None])[:, 0] - part.float().logsumexp(dim=1)
                for part, own in zip(picked.split(32), tokens.to(picked.device).split(32))  # noqa: B905
            ]
            picked = torch.cat(pieces)
        picked: Any = picked.float().cpu()
        picked = picked.save()
    return picked


# -- tasks: plain data in, plain data out -----------------------------------------------------------------------------


def left_padded(prompts: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """Ids and mask of prompts that are to be continued."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def right_padded(prompts: list[list[int]], answers: list[list[int]], pad: int) -> tuple[Any, torch.Tensor]:
    """Ids, mask and positions of prompts with their answers, and where the answers are."""
    width = max(len(p) + len(a) for p, a in zip(prompts, answers))  # noqa: B905
    ids = torch.full((len(prompts), width), pad)
    mask, answering = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (p, a) in enumerate(zip(prompts, answers)):  # noqa: B905
        ids[row, : len(p) + len(a)] = torch.tensor([*p, *a])
        mask[row, : len(p) + len(a)] = 1
        answering[row, len(p) : len(p) + len(a)] = True
    positions = torch.arange(width).expand_as(ids)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, answering


def prompt_ends(prompts: list[list[int]], width: int) -> torch.Tensor:
    """Where the prompts of a right-padded batch end: mask ``[row, pos]``."""
    return torch.arange(width) == torch.tensor([len(p) - 1 for p in prompts])[:, None]


def edited_places(edits: Edits, which: torch.Tensor, prompts: list[list[int]], answering: torch.Tensor) -> torch.Tensor:
    """The answers' places, and the prompt's end in rows whose edit begins there: mask ``[row, pos]``."""
    early = torch.tensor(edits.early)[which.cpu()]
    return answering | (prompt_ends(prompts, answering.shape[1]) & early[:, None])


def places_read(
    at: str, prompts: list[list[int]], answers: list[list[int]], answering: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:  # fmt: skip
    """The places that a read is about.

    Args:
        at: ``"answer"`` averages each answer's tokens, ``"answer_end"`` and ``"prompt_end"`` are single ones,
            ``"every"`` is each prompt token by itself.
        prompts: token ids.
        answers: token ids.
        answering: where the answers are, as `right_padded` says.

    Returns:
        mask ``[row, pos]``; each of its places' owner, for `Means`; and how many owners each row has.
    """
    places = torch.arange(answering.shape[1])
    lengths = torch.tensor([len(p) for p in prompts])[:, None]
    if at == "every":
        mask = places < lengths
        return mask, torch.arange(int(mask.sum())), [len(p) for p in prompts]
    if at == "prompt_end":
        mask = prompt_ends(prompts, answering.shape[1])
    elif at == "answer_end":
        mask = places == lengths + torch.tensor([len(a) for a in answers])[:, None] - 1
    else:
        mask = answering
    return mask, mask.nonzero()[:, 0], [1] * len(prompts)


def up_to_stop(tokens: list[int], stop: list[int]) -> list[int]:
    """Tokens up to the first that ends an answer, that one included."""
    ends = [k for k, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0] + 1] if ends else tokens


def decode_task(model: Any, task: dict[str, Any], sink: Any = None) -> dict[str, Any]:
    """Decode one answer a row, and count meanwhile if ``task["n_blocks"]`` says so."""
    prompts, which, blocks = task["prompts"], torch.tensor(task["which"]), torch.tensor(task["blocks"])
    edits = Edits(task["plan"])
    if task["n_blocks"]:
        sink = Counts(task["n_blocks"])
    stop = task["settings"]["generation_config"].eos_token_id
    batch = left_padded(prompts, task["pad"])
    start = batch["attention_mask"].argmax(dim=1)
    if task["sandbox"]:
        whole = decode_sandboxed(model, batch, task["sites"], edits, which, start, task["settings"])
        tokens = [up_to_stop(row, stop) for row in whole[:, batch["input_ids"].shape[1] :].tolist()]
        counted = None
        if sink is not None:  # counted in a pass of its own, as which rows have ended is not known meanwhile
            again = {**task, "answers": [own[:-1] for own in tokens], "want": "counts"}
            counted = replay_task(model, again)["counted"]
        return {"tokens": tokens, "counted": counted}
    chooser = Chooser(task["decoding"], prompts, task["keys"], stop)
    if edits or sink is not None:
        decode(model, batch, task["sites"], edits, which, start, chooser, blocks, sink, task["settings"])
    else:
        decode_plain(model, batch, chooser, task["settings"])
    return {"tokens": chooser.out, "counted": sink.result() if isinstance(sink, Counts) else None}


def replay_task(model: Any, task: dict[str, Any], sink: Any = None) -> dict[str, Any]:
    """Replay answers: counts, fine counts of chosen neurons, or what a site holds."""
    prompts, answers = task["prompts"], task["answers"]
    batch, answering = right_padded(prompts, answers, task["pad"])
    which, edits = torch.tensor(task["which"]), Edits(task["plan"])
    where = edited_places(edits, which, prompts, answering)
    if task["want"] == "read":
        at, owner, sizes = places_read(task["at"], prompts, answers, answering)
        means = Means(owner, sum(sizes))
        replay(model, batch, task["sites"], edits, which, where, at, task["site"], means.take)
        return {"read": list(means.result().split(sizes))}
    if task["want"] == "counts":
        sink = Counts(task["n_blocks"])
    elif task["want"] == "windows":
        sink = Windows(task["chosen"])
    blocks = torch.repeat_interleave(torch.tensor(task["blocks"]), torch.tensor([len(a) for a in answers]))

    def take(layer: int, values: torch.Tensor) -> None:
        sink.take(layer, values, blocks)

    replay(model, batch, task["sites"], edits, which, where, answering, "value", take)
    return {"counted": sink.result() if isinstance(sink, Counts | Windows) else None}


def score_task(model: Any, task: dict[str, Any], sink: Any = None) -> dict[str, Any]:
    """Summed log-probability of each row's continuation given its prompt."""
    batch, answering = right_padded(task["prompts"], task["answers"], task["pad"])
    which, edits = torch.tensor(task["which"]), Edits(task["plan"])
    where = edited_places(edits, which, task["prompts"], answering)
    tokens, at = batch["input_ids"][answering], torch.roll(answering, -1, dims=1)
    each = read_logits(model, batch, task["sites"], edits, which, where, at, tokens)
    lengths = [len(a) for a in task["answers"]]
    return {"sums": torch.stack([part.double().sum() for part in each.split(lengths)])}


def logits_task(model: Any, task: dict[str, Any], sink: Any = None) -> dict[str, Any]:
    """Logits after each prompt."""
    batch, answering = right_padded(task["prompts"], [[] for _ in task["prompts"]], task["pad"])
    which, edits = torch.tensor(task["which"]), Edits(task["plan"])
    where = edited_places(edits, which, task["prompts"], answering)
    at = prompt_ends(task["prompts"], answering.shape[1])
    return {"logits": read_logits(model, batch, task["sites"], edits, which, where, at, None)}


def probe_task(model: Any, task: dict[str, Any], sink: Any = None) -> dict[str, Any]:
    """Evenly spaced entries of every parameter as `npti_interp.models._sites.sampled_values` takes them, as bits."""
    taken: dict[str, Any] = {}
    dtype = ""
    for name in task["names"]:
        flat = module_at(model, name).detach().reshape(-1)
        dtype = dtype or str(flat.dtype)
        step = -(-flat.numel() // task["count"]) | 1
        taken[name] = flat[::step].to(torch.bfloat16).view(torch.int16).cpu()
    return {"samples": taken, "dtype": dtype}


TASKS = {
    "decode": decode_task, "replay": replay_task, "score": score_task, "logits": logits_task, "probe": probe_task,
}  # fmt: skip


def run_task(model: Any, name: str, task: dict[str, Any], sink: Any = None) -> dict[str, Any]:
    """Run a task by name."""
    return TASKS[name](model, task, sink)
