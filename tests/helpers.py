"""Tiny models with random weights, and a second, slow implementation of the method to hold the toolkit against.

No reference uses npti_interp except to build its `Model` and `NeuronEdit` objects. They run the plain Hugging Face model
without any cache, one row at a time, on the whole sequence again for each token. At the end, what tests of experiments
share: labs, made-up scores, comparing and interrupting runs.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from matplotlib.figure import Figure
from matplotlib.text import Text
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

import npti_interp as npti
from npti_interp.activations import ActivationCollector
from npti_interp.evaluation import Calibration, LikelihoodJudge
from npti_interp.experiments._lab import Condition, Lab, answer_rows
from npti_interp.generation import Decoding
from npti_interp.interventions import NeuronEdit
from npti_interp.models import Model
from npti_interp.prompts import eliciting_personas
from npti_interp.runs import RunFolder, write_table

VOCAB = 97
PAD, BOS, EOS, USER, ASSISTANT = range(5)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>")
TEMPLATE = (
    "<bos>{% for m in messages %} {{ '<user>' if m.role == 'user' else '<assistant>' }} {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB, "n_embd": 32, "n_inner": 64, "n_layer": 3, "n_head": 4, "n_positions": 128,
    "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
_NEOX = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"} | {"intermediate_size": 64}
_WINDOWS: dict[str, Any] = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**_COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**_COMMON, head_dim=12),  # its heads are wider than the stream
    "mistral": lambda: transformers.MistralConfig(**_COMMON, sliding_window=5),
    "gemma2": lambda: transformers.Gemma2Config(
        **_COMMON, **_WINDOWS, attn_logit_softcapping=5.0, final_logit_softcapping=8.0
    ),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**_COMMON, **_WINDOWS),
    "phi3": lambda: transformers.Phi3Config(**_COMMON),
    "olmo2": lambda: transformers.Olmo2Config(**_COMMON),
    "smollm3": lambda: transformers.SmolLM3Config(**_COMMON, no_rope_layer_interval=2),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_NEOX),
}
ARCHITECTURES = tuple(CONFIGS)


def tokenizer(template: str | None = None, words: int = VOCAB) -> Any:
    """A word-level tokenizer: five special tokens, then ``w5 w6 …``; it adds no token of its own."""
    vocabulary = {word: k for k, word in enumerate([*SPECIAL, *(f"w{k}" for k in range(len(SPECIAL), words))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=f"w{words - 1}"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", additional_special_tokens=list(SPECIAL[1:])
    )
    made.chat_template = template
    return made


def text(tokens: Sequence[int]) -> str:
    """The prompt that the tokenizer without a template encodes as these tokens."""
    return " ".join(f"w{t}" for t in tokens)


def hf_model(kind: str, seed: int = 0) -> Any:
    """A plain Hugging Face model with random weights, biases and norms included."""
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:  # they start at 0 or 1, which would hide a forgotten one
                parameter.add_(0.2 * torch.randn(parameter.shape))
            if "bias" not in name and kind == "gpt_neox":
                parameter.mul_(1.5)
    return made


# -- where things are: written out by hand, not taken from the toolkit ------------------------------------------------


def layers_of(model: nn.Module) -> list[Any]:
    """The transformer blocks."""
    path = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(model.config.model_type, "model.layers")
    return list(model.get_submodule(path))  # pyright: ignore[reportArgumentType]


def down_of(block: Any) -> nn.Module:
    """The module that writes into the residual stream."""
    for name in ("down_proj", "c_proj", "dense_4h_to_h"):
        if hasattr(block.mlp, name):
            return getattr(block.mlp, name)
    raise AssertionError(block)


def heads_of(block: Any) -> nn.Module:
    """The module that reads the attention heads' outputs."""
    if hasattr(block, "self_attn"):
        return block.self_attn.o_proj
    return block.attn.c_proj if hasattr(block, "attn") else block.attention.dense


def sigma_of(model: Any) -> Callable[[Tensor], Tensor]:
    """σ by the configuration's word for it, from its formula."""
    config = model.config
    word = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    word = word or config.activation_function
    return {
        "silu": lambda x: x / (1 + torch.exp(-x)),
        "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_new": _gelu_tanh,
        "gelu_pytorch_tanh": _gelu_tanh,
    }[word]


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def by_hand(model: Any, block: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Neuron values σ(x W1) and, in a gated FFN, x W3, from the weights."""
    mlp, sigma = block.mlp, sigma_of(model)
    if hasattr(mlp, "gate_up_proj"):
        w1, w3 = mlp.gate_up_proj.weight.chunk(2, dim=0)
        return sigma(x @ w1.T), x @ w3.T
    if hasattr(mlp, "gate_proj"):
        return sigma(x @ mlp.gate_proj.weight.T), x @ mlp.up_proj.weight.T
    if hasattr(mlp, "c_fc"):
        return sigma(x @ mlp.c_fc.weight + mlp.c_fc.bias), None
    return sigma(x @ mlp.dense_h_to_4h.weight.T + mlp.dense_h_to_4h.bias), None


# -- edits -----------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Neurons of both poles, by layer, neuron, δ and a95; METHOD.md section 2 in plain Python."""

    high: list[tuple[int, int, float, float]]
    low: list[tuple[int, int, float, float]]

    def edit(self, pole: str, gamma: float = 1.4, **settings: Any) -> NeuronEdit:
        """The toolkit's edit towards one pole."""
        up, down = (self.high, self.low) if pole == "high" else (self.low, self.high)
        every = [*up, *down]
        return NeuronEdit(
            layer=np.array([row[0] for row in every]),
            neuron=np.array([row[1] for row in every]),
            amount=np.array(
                [gamma * p95 / (1 + math.exp(-10 * (abs(d) - 0.15))) for _, _, d, p95 in up] + [0.0] * len(down)
            ),
            clamp=np.array([False] * len(up) + [True] * len(down)),
            **settings,
        )

    def function(self, pole: str, gamma: float = 1.4) -> Callable[[int, Tensor], Tensor]:
        """``(layer, values) -> values`` of METHOD.md section 2, neuron by neuron."""
        up, down = (self.high, self.low) if pole == "high" else (self.low, self.high)

        def change(layer: int, values: Tensor) -> Tensor:
            values = values.clone()
            for at, neuron, _, _ in down:
                if at == layer:
                    values[..., neuron] = torch.where(values[..., neuron] < 0, values[..., neuron], 0.0)
            for at, neuron, delta, p95 in up:
                if at == layer:
                    values[..., neuron] += gamma * p95 / (1 + math.exp(-10 * (abs(delta) - 0.15)))
            return values

        return change


def some_neurons(seed: int = 0, n_layers: int = 3, d_mlp: int = 48, each: int = 24, scale: float = 1.0) -> Pair:
    """Random neurons of both poles; layer 0 has only high ones, layer 1 only low ones, layer 2 both."""
    rng = np.random.default_rng(seed)
    spots = {"high": [], "low": []}
    for layer in range(n_layers):
        order = rng.permutation(d_mlp)
        for k, pole in enumerate(("high", "low")):
            if layer != 1 - k:
                spots[pole] += [(layer, int(i)) for i in order[k * each // 2 : (k + 1) * each // 2]]
    return Pair(*(
        [(layer, i, float(rng.uniform(0.1, 0.6)), float(scale * rng.uniform(0.5, 3.0))) for layer, i in spots[pole]]
        for pole in ("high", "low")
    ))  # fmt: skip


# -- the reference ---------------------------------------------------------------------------------------------------

Change = Callable[[int, Tensor], Tensor]


@contextmanager
def changed(model: Any, change: Change | None, start: int) -> Iterator[list[Tensor]]:
    """Edit the neurons of one row's places ``start …``; yields the values of all places, layer by layer, as they end up.

    The values are computed from the weights by hand; the model's own activation module is only overwritten.
    """
    blocks, values, handles = layers_of(model), [torch.empty(0)] * len(layers_of(model)), []

    def before(layer: int) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert inputs[0].shape[0] == 1, "the reference runs one row at a time"
            value = by_hand(model, blocks[layer], inputs[0])[0]
            if change is not None:
                value[:, start:] = change(layer, value[:, start:])
            values[layer] = value[0].detach()

        return hook

    def after(layer: int) -> Any:
        return lambda _module, _inputs, _output: values[layer][None]

    for layer, block in enumerate(blocks):
        act = next(getattr(block.mlp, n) for n in ("act_fn", "activation_fn", "act") if hasattr(block.mlp, n))
        handles.append(block.mlp.register_forward_pre_hook(before(layer)))
        handles.append(act.register_forward_hook(after(layer)))
    try:
        with torch.no_grad():
            yield values
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Reference:
    """What the reference decoding of one row gave."""

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)  # by layer: [fed token, neuron]
    gap: float = math.inf  # least distance between the best and the second logit

    @property
    def n_fed(self) -> int:
        return len(self.tokens) - 1


def decode(
    model: Any,
    prompt: Sequence[int],
    n_new: int,
    change: Change | None = None,
    stop: Sequence[int] = (),
    start: int | None = None,
    penalty: float = 1.0,
) -> Reference:
    """Greedy decoding without a cache: the whole sequence again for each token, edited from place ``start`` on."""
    start = len(prompt) if start is None else start
    done = Reference(tuple(prompt))
    while True:
        whole = [*prompt, *done.tokens]
        with changed(model, change, start) as values:
            logits = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0, -1]
        done.values = [v[len(prompt) :] for v in values]
        for token in set(whole) if penalty != 1.0 else ():
            logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        best = logits.topk(2)
        done.gap = min(done.gap, float(best.values[0] - best.values[1]))
        done.tokens.append(int(best.indices[0]))
        if len(done.tokens) == n_new or done.tokens[-1] in stop:
            return done


def hf_tokens(
    model: Any, prompts: Sequence[Sequence[int]], n_new: int, stop: Sequence[int] = (), **more: Any
) -> list[list[int]]:
    """Greedy answers of ``model.generate`` itself, row by row and without padding."""
    out = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False,
            eos_token_id=list(stop) or None, pad_token_id=PAD, **more,
        )  # fmt: skip
        out.append(whole[0, len(prompt) :].tolist())
    return out


class Recorder(ActivationCollector):
    """A collector that also keeps every value, by block and layer: ``values[block][layer] = [row, …]``."""

    def __init__(self, fingerprint: Any, n_blocks: int) -> None:
        super().__init__(fingerprint, n_blocks)
        self.values: list[list[list[Tensor]]] = [[[] for _ in range(fingerprint.n_layers)] for _ in range(n_blocks)]

    def add(self, layer: int, values: Tensor, rows: Any, blocks: Any) -> None:
        for row, block in zip(rows, blocks, strict=True):
            self.values[int(block)][layer].append(values[int(row)].detach().float().clone())
        super().add(layer, values, rows, blocks)

    def of(self, block: int) -> list[Tensor]:
        """One block's values, by layer ``[token, neuron]``."""
        return [torch.stack(v) if v else torch.empty(0, self._neurons) for v in self.values[block]]


# -- models with everything about them --------------------------------------------------------------------------------

PROMPT_LENGTHS = (7, 1, 12, 3, 12, 20)
N_NEW = 12


@dataclass
class Tiny:
    """A tiny model in the toolkit, an untouched copy of it, prompts of six lengths, and what the copy answers."""

    kind: str
    plain: Any
    model: Model
    prompts: list[tuple[int, ...]]
    stop: tuple[int, ...]
    expected: list[Reference]

    @property
    def texts(self) -> list[str]:
        return [text(p) for p in self.prompts]

    @property
    def d_mlp(self) -> int:
        return self.model.sites.d_mlp

    def pair(self, seed: int = 0, scale: float = 1.0) -> Pair:
        return some_neurons(seed, 3, self.d_mlp, scale=scale)


@functools.cache
def tiny(kind: str) -> Tiny:
    """The tiny model of one architecture. Its end token is one that ends some of the answers early, but not all."""
    plain = hf_model(kind)
    rng = np.random.default_rng(11)
    prompts = [tuple(int(t) for t in rng.integers(len(SPECIAL), VOCAB - 1, n)) for n in PROMPT_LENGTHS]
    free = [decode(plain, p, N_NEW) for p in prompts]
    ends = {t: sum(t in r.tokens[1:-1] for r in free) for r in free for t in r.tokens[1:-1]}
    stop = min((t for t, n in ends.items() if t >= len(SPECIAL)), key=lambda t: (abs(ends[t] - 2), t))
    assert 0 < ends[stop] < len(prompts), f"{kind}: no token ends some answers early"
    plain.generation_config.eos_token_id = plain.config.eos_token_id = stop
    model = Model(copy.deepcopy(plain), tokenizer(), kind)
    return Tiny(kind, plain, model, prompts, (stop,), [decode(plain, p, N_NEW, stop=(stop,)) for p in prompts])


# -- experiments -----------------------------------------------------------------------------------------------------


def tiny_lab(model: Model, folder: Path | None = None, *, skip_layers: tuple[int, ...] = ()) -> Lab:
    """A lab of few questions, with a calibration made up; ``folder`` gets the statistics, as a run's would."""
    bench = npti.PersonalityBench.embedded()
    found = npti.locate(model, bench, "Neuroticism", n_questions=8, max_new_tokens=5, threshold=0.2, progress=False)
    neurons = found.neurons._where(~np.isin(found.neurons.layer, skip_layers))
    judge = LikelihoodJudge(model, bench, personas_per_pole=1)
    judge.use_calibration("Neuroticism", Calibration(8.0, 0.0, 0.8, 8, 8))
    if folder is not None:
        for pole, own in (("high", found.high), ("low", found.low)):
            own.save(folder / f"statistics/Neuroticism-{pole}.safetensors")
    return Lab(model, bench, {"Neuroticism": neurons}, judge=judge, run=folder)


@functools.cache
def spelling_model() -> Model:
    """A tiny Llama that reads letter by letter, so that personas and questions differ for it."""
    letters = " abcdefghijklmnopqrstuvwxyz.,?!'-:"
    vocabulary = {t: k for k, t in enumerate([*SPECIAL, *letters])}
    vocabulary |= {f"w{k}": k for k in range(len(vocabulary), VOCAB)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=f"w{VOCAB - 1}"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", additional_special_tokens=list(SPECIAL[1:])
    )
    return Model(hf_model("llama", seed=3), made, "spelling")


@functools.cache
def located_traits() -> tuple[npti.PersonalityBench, dict[npti.Trait, npti.Location]]:
    """Two traits located on the tiny model."""
    bench = npti.PersonalityBench.embedded()
    return bench, {
        trait: npti.locate(
            spelling_model(), bench, trait, n_questions=8, max_new_tokens=6, threshold=0.08, n_blocks=4, progress=False
        )
        for trait in (npti.Trait.EXTRAVERSION, npti.Trait.NEUROTICISM)
    }


def make_lab(folder: Path) -> Lab:
    """A lab in which ``folder`` holds answers and statistics as a run's would."""
    bench, found = located_traits()
    for (trait, made), pole in itertools.product(found.items(), npti.POLES):
        personas = [p.id for p in eliciting_personas(bench, trait, pole, 8)]
        condition = Condition("persona", pole, facts={"persona": personas})
        rows = answer_rows(
            spelling_model(), bench, trait, made.questions, made.answers[pole], condition, Decoding(6)
        )  # fmt: skip
        write_table(folder / f"answers/search-{trait}-{pole}.parquet", rows)
        (made.high if pole is npti.Pole.HIGH else made.low).save(folder / f"statistics/{trait}-{pole}.safetensors")
    return Lab(spelling_model(), bench, {t: f.neurons for t, f in found.items()}, run=folder)


def write_scores(
    folder: Path, trait: str, effects: dict[str, Any], n: int = 12, noise: float = 0.05, **facts: Any
) -> None:
    """Plan and scores in which a condition adds ``(induced, NLL)`` to the unedited ones, the same for both poles.

    Args:
        effects: by condition; None is an edit of nothing.
    """
    rng = np.random.default_rng(0)
    base = {"high": rng.uniform(2.9, 3.1, n), "nll": rng.uniform(1, 2, n)}
    plan, rows = [], []
    for name, effect in {"none": (0.0, 0.0), **effects}.items():
        for pole in (None,) if name == "none" else ("high", "low"):
            about = {key: value(name) for key, value in facts.items()}
            counts = (
                {"n_raised": 0, "n_clamped": 0} if effect is None or name == "none" else {"n_raised": 3, "n_clamped": 2}
            )
            plan.append({"condition": name, "pole": pole, "reused": effect is None, **about, **counts})
            if effect is None:
                continue
            moved = effect[0] + (rng.normal(0, noise, n) if name != "none" else 0.0)
            rows.append(
                pd.DataFrame(
                    {
                        "trait": trait,
                        "condition": name,
                        "pole": pole,
                        "question_id": [f"q{i}" for i in range(n)],
                        "rating": base["high"] + (-moved if pole == "low" else moved),
                        "nll": base["nll"] + effect[1],
                        "repetition_4": 0.0,
                        "auc": 0.8,
                    }
                )
            )
    write_table(folder / f"plans/{trait}.parquet", pd.DataFrame(plan))
    write_table(folder / f"scores/{trait}.parquet", pd.concat(rows, ignore_index=True))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a run folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def check_figure(figure: Figure, data: pd.DataFrame) -> None:
    """Of a paper's width, legible, with its data."""
    assert figure.get_size_inches()[0] == pytest.approx(5.5)
    assert min(t.get_fontsize() for t in figure.findobj(Text) if t.get_text()) >= 6
    assert len(data)


class StopError(Exception):
    """Interrupts a run."""


def stop_after(monkeypatch: pytest.MonkeyPatch, which: str | int) -> None:
    """Interrupt right after the file ``which`` was recorded, or after so many records."""
    real, count = RunFolder.replace, [0]  # `record` goes through it

    def replace(self: RunFolder, old: Sequence[str], *names: str) -> None:
        real(self, old, *names)
        count[0] += 1
        if which in names or which == count[0]:
            raise StopError

    monkeypatch.setattr(RunFolder, "replace", replace)
