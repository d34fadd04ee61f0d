"""Supervised fine-tuning: a LoRA adapter for each pole, on persona answers without the persona (METHOD.md section 7)."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from npti_interp._files import sha256_of, write_atomic
from npti_interp.backends import RemoteBackend, linear_kernel
from npti_interp.backends._sharing import sharing_twin
from npti_interp.errors import ArtifactError, UnsupportedMethodError
from npti_interp.methods._base import Method, Prepared, SearchData, Setting
from npti_interp.methods._records import read_record, write_record
from npti_interp.models import Model
from npti_interp.models._weights import is_offloaded
from npti_interp.traits import POLES, Pole, Trait

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["SFT", "Adapter", "SFTPrepared"]

_RECORD = "sft.json"
_FILES = ("adapter_config.json", "adapter_model.safetensors")
_NAME = "default"
_PREFIX = "base_model.model."
"""What peft's files put in front of each name: its wrapper around the model, which is not used here."""
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Adapter:
    """One pole's adapter.

    Attributes:
        config: peft's configuration.
        weights: LoRA matrices by the names of their layers, on the CPU.
        losses: mean negative log-likelihood a token of each training batch, in nats; empty if it was loaded.
    """

    config: LoraConfig
    weights: Mapping[str, Tensor]
    losses: tuple[float, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over the matrices, shortened."""
        sha = hashlib.sha256()
        for name in sorted(self.weights):
            own = self.weights[name].detach().float().contiguous()
            sha.update(f"{name}{tuple(own.shape)}".encode())
            sha.update(own.numpy().tobytes())
        return sha.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class SFTPrepared(Prepared):
    """Both poles' adapters and the model they belong to.

    Attributes:
        base: the model, which stays untouched.
        trait: the trait.
        adapters: by pole.
    """

    base: Model
    trait: Trait
    adapters: Mapping[Pole, Adapter]
    _made: dict[tuple[Pole, float], Model] = field(default_factory=dict[tuple[Pole, float], Model], repr=False)

    def model(self, pole: Pole, setting: Setting) -> Model:
        """The fine-tuned model: a twin that shares the base model's parameters, with the adapter in it.

        Its fingerprint is the base model's, with the adapter's digest and scale added to the weights': neurons and
        statistics of the base model do not belong to it.

        Args:
            pole: which adapter.
            setting: ``{"scale": …}`` multiplies the adapter's share; 0 is the base model, 1 what was trained.

        Raises:
            ValueError: another parameter than ``scale``, or one that is not finite; or an edit is active on the model.
        """
        if set(setting) != {"scale"} or not math.isfinite(setting["scale"]):
            raise ValueError(f"SFT has the one parameter 'scale', a finite number; got {dict(setting)}")
        _require_unedited(self.base)
        key = pole, float(setting["scale"])
        if key not in self._made:  # always the same object: the harness tells models apart by it
            adapter = self.adapters[pole]
            twin = _with_adapter(_frozen_twin(self.base.hf_model), adapter.config, adapter.weights)
            for module in _adapted(twin):
                module.set_scale(_NAME, key[1])
            made = Model(
                twin, self.base.tokenizer, f"{self.base.name} + {pole} {self.trait}", backend=self.base.backend.name
            )
            made.cache_bytes = self.base.cache_bytes
            made.allow_overcommit = self.base.allow_overcommit
            own = self.base.fingerprint
            made.fingerprint = replace(own, weights=f"{own.weights} + LoRA {adapter.digest} × {key[1]:g}")
            self._made[key] = made
        return self._made[key]

    def save(self, folder: Path) -> list[Path]:
        """See `Prepared.save`: a record, and one of peft's own adapter folders a pole (``high``, ``low``)."""
        from safetensors.torch import save_file

        files: list[Path] = []
        for pole, adapter in self.adapters.items():
            config, weights = (folder / pole.value / name for name in _FILES)
            with tempfile.TemporaryDirectory() as scratch:
                adapter.config.save_pretrained(scratch)
                write_atomic(config, lambda to, at=scratch: shutil.copyfile(Path(at) / _FILES[0], to))
            tensors = {_PREFIX + name: own.contiguous() for name, own in sorted(adapter.weights.items())}
            write_atomic(weights, lambda to, own=tensors: save_file(own, to, metadata={"format": "pt"}))
            files += [config, weights]
        content = {
            "sha256": {str(file.relative_to(folder)): sha256_of(file) for file in files},
            "losses": {pole.value: adapter.losses for pole, adapter in self.adapters.items()},
        }
        return [write_record(folder / _RECORD, "sft", self.base.fingerprint, self.trait, content), *files]


@dataclass(frozen=True)
class SFT(Method):
    """Fine-tune a LoRA adapter for each pole on that pole's persona answers, trained with the persona left out.

    The prompt of a training example is the bare question in the model's own chat template, its target the answer that
    the model gave under the persona; only the answer's tokens count in the loss. Adapters sit on every linear layer
    of the blocks (peft's ``"all-linear"``, so on every architecture), in a twin that shares the user's parameters:
    the user's model is never touched. Training is seeded by the search data: the same data,
    machine and number of threads give the same adapter.

    The loop is AdamW with a linear warm-up and decay, in this file: the ``Trainer`` of transformers would move the
    shared parameters, seed the process and write a folder of its own.

    The defaults suit the embedded model: 84 answers of 40 tokens take less than two minutes a pole on one core. Usual
    for a real model (8B in bfloat16 on a GPU, some thousand answers of 200 tokens): ``rank=16, alpha=32,
    learning_rate=1e-4, epochs=2, batch_size=16``. The adapter's matrices are float32 in any case.

    Attributes:
        rank: r, of the adapter's matrices.
        alpha: its share is scaled by alpha / r.
        dropout: of the adapter's input.
        learning_rate: peak.
        epochs: passes over the answers.
        batch_size: answers a step.
        warmup: share of the steps that warm up.
        scales: adapter scales to choose from; 1 is what was trained.

    Raises:
        ValueError: a setting out of range.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    learning_rate: float = 1e-3
    epochs: int = 2
    batch_size: int = 8
    warmup: float = 0.1
    scales: tuple[float, ...] = (0.5, 1.0, 1.5)

    name: ClassVar[str] = "sft"
    label: ClassVar[str] = "SFT (LoRA)"
    source: ClassVar[str] = "arXiv 2410.12327 (baseline); LoRA: arXiv 2106.09685"
    parameter: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        for setting in ("rank", "alpha", "epochs", "batch_size"):
            if getattr(self, setting) < 1:
                raise ValueError(f"{setting} must be at least 1, got {getattr(self, setting)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.dropout < 1 or not 0 <= self.warmup < 1:
            raise ValueError(f"dropout and warmup must lie in [0, 1), got {self.dropout} and {self.warmup}")
        if not self.scales or not all(math.isfinite(s) for s in self.scales):
            raise ValueError(f"scales must be finite and at least one, got {self.scales}")

    def check(self, model: Model) -> None:
        """See `Method.check`: the weights must be here in floating point, and the package peft installed."""
        if not model.has_weights or isinstance(model.backend, RemoteBackend):
            raise UnsupportedMethodError(
                f"SFT trains and runs an adapter inside the model, and {model.name} runs on a server; load it in memory "
                "with backend='transformer_lens', or use another method"
            )
        if model.fingerprint.quantisation or is_offloaded(model.hf_model):
            state = f"in {model.fingerprint.quantisation}" if model.fingerprint.quantisation else "partly offloaded"
            raise UnsupportedMethodError(
                f"SFT trains beside weights in floating point on a device, and those of {model.name} are {state}; load "
                "it without quantization= and without offloading, or use another method"
            )
        if importlib.util.find_spec("peft") is None:
            raise UnsupportedMethodError(
                "SFT needs the package peft, which is not installed: pip install 'npti-interp[sft]'"
            )

    def grid(self, model: Model) -> Sequence[Setting]:
        """One setting an adapter scale."""
        return [{"scale": scale} for scale in self.scales]

    def prepare(self, data: SearchData) -> SFTPrepared:
        """Train both poles' adapters.

        Raises:
            UnsupportedMethodError: see `check`.
            ValueError: an answer without tokens, or an edit is active on the model.
        """
        self.check(data.model)
        examples = {pole: _examples(data, pole) for pole in POLES}
        steps = sum(self.epochs * math.ceil(len(own) / self.batch_size) for own in examples.values())
        with tqdm(total=steps, desc=f"sft {data.trait}", disable=not data.progress) as bar:
            return SFTPrepared(
                data.model, data.trait, {pole: self._train(data, own, bar) for pole, own in examples.items()}
            )

    def load(self, folder: Path, data: SearchData) -> SFTPrepared:
        """See `Method.load`."""
        self.check(data.model)
        content = read_record(folder / _RECORD, "sft", data)
        files = {f"{pole.value}/{name}" for pole in POLES for name in _FILES}
        digests, losses = content.get("sha256"), content.get("losses")
        if not isinstance(digests, dict) or set(digests) != files or not isinstance(losses, dict):
            raise ArtifactError(f"{folder / _RECORD} does not name both poles' adapters; prepare the method again")
        for name, digest in digests.items():
            if not (folder / name).is_file():
                raise ArtifactError(f"no file at {folder / name}; prepare the method again")
            if sha256_of(folder / name) != digest:
                raise ArtifactError(f"{folder / name} was altered since it was written; prepare the method again")
        return SFTPrepared(
            data.model,
            data.trait,
            {p: _read_adapter(folder / p.value, losses.get(p.value)) for p in POLES},
        )

    def _train(self, data: SearchData, examples: Sequence[_Example], bar: tqdm[Any]) -> Adapter:
        from peft import LoraConfig, get_peft_model_state_dict
        from transformers import get_linear_schedule_with_warmup

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in data.model.hf_model.modules()),  # GPT-2
        )
        model = data.model
        with _seeded(data.seed, model.device):
            twin: Any = _with_adapter(_frozen_twin(model.hf_model), config).train()
            _speed_up(twin)
            weights = [p for p in twin.parameters() if p.requires_grad]
            optimiser = torch.optim.AdamW(weights, lr=self.learning_rate, weight_decay=0.0)
            steps = self.epochs * math.ceil(len(examples) / self.batch_size)
            schedule = get_linear_schedule_with_warmup(optimiser, round(self.warmup * steps), steps)
            losses: list[float] = []
            for _ in range(self.epochs):
                for chosen in torch.randperm(len(examples)).split(self.batch_size):
                    loss = _loss(twin, [examples[k] for k in chosen.tolist()])
                    if not torch.isfinite(loss):
                        raise ValueError(
                            f"SFT diverged: the loss is {float(loss.detach())} after {len(losses)} steps; lower learning_rate"
                        )
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(weights, 1.0)
                    optimiser.step()
                    schedule.step()
                    optimiser.zero_grad()
                    losses.append(float(loss.detach()))
                    bar.update()
            trained: Any = get_peft_model_state_dict(twin, adapter_name=_NAME)
        return Adapter(config, {name: own.detach().cpu().clone() for name, own in trained.items()}, tuple(losses))


@dataclass(frozen=True)
class _Example:
    """Token ids of a question in its template, and of the answer to learn."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def _require_unedited(model: Model) -> None:
    if model._active:  # the edit's hooks would be copied into the twin, and stay there
        raise ValueError("SFT works on the unedited model; leave the `editing` block first")


def _examples(data: SearchData, pole: Pole) -> list[_Example]:
    _require_unedited(data.model)
    found: list[_Example] = []
    for question, answer in zip(data.questions, data.answers[pole], strict=True):
        tokens = answer.tokens or data.model.encode_answer(answer)
        if not tokens:
            raise ValueError(f"{data.trait}, {pole}: the answer to {question.id} is empty; there is nothing to learn")
        found.append(_Example(data.model.encode(question.text), tuple(tokens)))
    if not found:
        raise ValueError(f"SFT needs search answers of {data.trait}, and there are none")
    return found


def _loss(model: Any, examples: Sequence[_Example]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of the answers' tokens. Rows are aligned on the right, as the answers end there."""
    rows = [(*e.prompt, *e.answer) for e in examples]
    width, room = max(map(len, rows)), max(len(e.answer) for e in examples)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full((len(rows), room), IGNORED)
    for k, (row, example) in enumerate(zip(rows, examples, strict=True)):
        ids[k, width - len(row) :] = torch.tensor(row)
        mask[k, width - len(row) :] = 1
        labels[k, room - len(example.answer) :] = torch.tensor(example.answer)
    device = next(model.parameters()).device
    ids, mask, labels = ids.to(device), mask.to(device), labels.to(device)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=room + 1,
    ).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


# -- peft ------------------------------------------------------------------------------------------------------------


def _frozen_twin(hf_model: nn.Module) -> nn.Module:
    """A twin that shares every parameter's memory but not its ``requires_grad``: peft and training change that flag."""
    twin = sharing_twin(hf_model)
    frozen: dict[int, nn.Parameter] = {}  # one for each, so that tied parameters stay tied
    for module in twin.modules():
        for name, own in module.named_parameters(recurse=False):
            setattr(module, name, frozen.setdefault(id(own), nn.Parameter(own.detach(), requires_grad=False)))
    return twin


def _with_adapter(twin: nn.Module, config: LoraConfig, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Put an adapter into ``twin``, in place: a fresh one (which changes nothing yet), or one with given matrices."""
    import copy

    from peft import inject_adapter_in_model, set_peft_model_state_dict

    # A copy: peft writes the names of the layers it found into the configuration.
    made = inject_adapter_in_model(copy.deepcopy(config), twin, adapter_name=_NAME)
    for name, own in made.named_parameters():
        if (
            "lora_" in name and own.is_floating_point()
        ):  # small steps would be lost in half precision; peft does the same
            own.data = own.data.float()
    if weights is not None:
        outcome: Any = set_peft_model_state_dict(made, dict(weights), adapter_name=_NAME)
        missing = [name for name in outcome.missing_keys if "lora_" in name]
        if missing or outcome.unexpected_keys:
            raise ArtifactError(
                f"the adapter does not fit the model: {len(missing)} matrices are missing and "
                f"{len(outcome.unexpected_keys)} do not belong there"
            )
        made.requires_grad_(False)
    return made.eval()


def _adapted(twin: nn.Module) -> Generator[Any]:
    """The layers that hold an adapter."""
    from peft.tuners.lora import LoraLayer

    yield from (module for module in twin.modules() if isinstance(module, LoraLayer))


_TRAINED = ("r", "lora_alpha", "lora_dropout", "target_modules", "fan_in_fan_out")
_WORDS = ("inference_mode", "base_model_name_or_path", "peft_version", "revision", "auto_mapping", "runtime_config")
"""Fields that change nothing of what an adapter computes."""


def _require_plain(config: Any) -> None:
    """Raise unless an adapter is of the kind that is trained here.

    A configuration can name modules to import and patterns to search with; ours have only sizes and layers' names.

    Raises:
        ValueError: it is not.
    """
    from peft import LoraConfig

    given: Any = {name: getattr(config, name) for name in _TRAINED}
    plain = LoraConfig(task_type="CAUSAL_LM", **given).to_dict()
    own = config.to_dict()
    odd = sorted(k for k in {*plain, *own} if k not in _WORDS and plain.get(k) != own.get(k))
    layers = given["target_modules"]
    sizes = [type(given["r"]) is int and given["r"] >= 1, isinstance(given["lora_alpha"], int | float)]
    if odd or not all(sizes) or not (layers == "all-linear" or isinstance(layers, list | set)):
        raise ValueError(f"an adapter of another kind than is trained here ({', '.join(odd) or 'its sizes or layers'})")


def _read_adapter(folder: Path, losses: Any) -> Adapter:
    from peft import LoraConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if not isinstance(losses, list) or not all(isinstance(loss, int | float) for loss in losses):
            raise ValueError("the losses are no list of numbers")
        config: Any = LoraConfig.from_pretrained(str(folder))
        _require_plain(config)
        weights = {name.removeprefix(_PREFIX): own for name, own in load_file(folder / _FILES[1]).items()}
        return Adapter(config, weights, tuple(losses))
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise ArtifactError(f"{folder} does not hold a whole adapter: {error}") from error


# -- training --------------------------------------------------------------------------------------------------------


@contextmanager
def _seeded(seed: int, device: str) -> Generator[None]:
    """A seeded stretch of code; the process's random numbers go on afterwards as if it had not been there."""
    if device == "cpu":
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            yield
    else:
        with torch.random.fork_rng(device_type=device):
            torch.manual_seed(seed)
            yield


class _FrozenLinear(torch.autograd.Function):
    """A linear layer whose weight is not trained, in oneDNN both ways; see `npti_interp.backends._kernels`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(weight)
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return _product(grad, weight.T, None), None, None


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    op: Any = torch.ops.mkldnn._linear_pointwise.default  # pyright: ignore[reportUnknownMemberType]
    return op(input, weight, bias, "none", [], "")


def _speed_up(twin: nn.Module) -> None:
    """Let the frozen linear layers of a float32 CPU model multiply faster while it is trained: half the time."""
    if linear_kernel() != "onednn":
        return

    def forward(module: Any) -> Callable[[Tensor], Tensor]:
        return lambda input: _FrozenLinear.apply(input, module.weight, module.bias)  # pyright: ignore

    for module in twin.modules():
        frozen = type(module) is nn.Linear and not any(p.requires_grad for p in module.parameters())
        if frozen and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu":
            changeable: Any = module
            changeable.forward = forward(module)
