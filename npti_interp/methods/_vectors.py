"""What methods that learn vectors share: their files, reading both poles, and steering one layer at a time."""

from __future__ import annotations

import json
import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from npti_interp._files import library_versions, read_tensors, write_tensors
from npti_interp.errors import ArtifactError
from npti_interp.interventions import Intervention, ResidualSteering
from npti_interp.methods._base import Method, Prepared, SearchData, Setting
from npti_interp.models import Model, ModelFingerprint
from npti_interp.traits import POLES, Pole, Trait

__all__ = ["Learnt", "LearntMethod", "Steering", "SteeringMethod", "layers_at", "read_answers", "value_of"]

_VERSION = 1


@dataclass(frozen=True, eq=False)
class Learnt(Prepared):
    """Tensors that a method has learnt about one trait of one model.

    Subclasses add fields: tensors, which `save` writes, and no others.

    Attributes:
        method: key of the method.
        settings: the method's own settings.
        fingerprint: the model.
        trait: the trait.
        facts: what else is worth knowing of how it was learnt, as JSON values.
    """

    method: str
    settings: Mapping[str, Any]
    fingerprint: ModelFingerprint
    trait: Trait
    facts: Mapping[str, Any]

    @classmethod
    def tensor_names(cls) -> tuple[str, ...]:
        """Names of the tensors that a subclass adds."""
        own = {f.name for f in fields(Learnt)}
        return tuple(f.name for f in fields(cls) if f.name not in own)

    def save(self, folder: Path) -> list[Path]:
        """See `Prepared.save`: one file, ``METHOD.safetensors``."""
        path = Path(folder) / f"{self.method}.safetensors"
        tensors = {name: getattr(self, name).numpy() for name in self.tensor_names()}
        metadata = {
            "settings": dict(self.settings),
            "fingerprint": self.fingerprint.to_json(),
            "trait": self.trait.value,
            "facts": dict(self.facts),
            "versions": library_versions(),
        }
        write_tensors(path, type(self).__name__, _VERSION, tensors, metadata)
        return [path]

    @classmethod
    def read(cls, folder: Path, method: Method, data: SearchData) -> Self:
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing, damaged, or was learnt about another trait or with other settings.
            FingerprintMismatchError: it was learnt on another model.
        """
        path = Path(folder) / f"{method.name}.safetensors"
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: {method.label} was not saved here; prepare it and save it")
        arrays, metadata = read_tensors(path, cls.__name__, _VERSION)
        try:
            fingerprint = ModelFingerprint.from_json(metadata["fingerprint"])
            trait, settings, facts = Trait(metadata["trait"]), metadata["settings"], metadata["facts"]
            if not isinstance(facts, dict):
                raise ArtifactError(f"its facts are a {type(facts).__name__}")
            tensors = {f.name: torch.from_numpy(arrays[f.name]) for f in fields(cls) if f.name in cls.tensor_names()}
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is not a whole {cls.__name__}: {error}") from error
        fingerprint.require_same(data.model.fingerprint, f"{path.name} and the model")
        if trait is not data.trait:
            raise ArtifactError(f"{path} was learnt about {trait}, not {data.trait}")
        if settings != _as_json(method.settings()):
            raise ArtifactError(
                f"{path} was learnt with settings {settings}, not {_as_json(method.settings())}; use those, or prepare "
                "the method again"
            )
        for f in fields(cls):
            if f.name in tensors:
                _require_annotated(tensors[f.name], str(f.type), data.model, f"{path}: {f.name}")
        return cls(method.name, settings, fingerprint, trait, facts, **tensors)


_ANNOTATION = re.compile(r"(Float|Bool)\[Tensor, ['\"]([\w ]+)['\"]\]")


def _require_annotated(tensor: Tensor, annotation: str, model: Model, what: str) -> None:
    """Raise unless a tensor that was read is of the kind and shape that its field is annotated with.

    Raises:
        ArtifactError: it is not.
    """
    found = _ANNOTATION.fullmatch(annotation)
    assert found is not None, annotation
    at = model.sites
    sizes = {
        "layer": at.n_layers, "d_mlp": at.d_mlp, "d_model": at.d_model, "head": at.n_heads, "d_head": at.d_head,
        "pos": None,
    }  # fmt: skip
    wanted = [sizes[axis] for axis in found[2].split()]
    fits = tensor.ndim == len(wanted) and all(
        want in (None, got) for want, got in zip(wanted, tensor.shape, strict=True)
    )
    kind = tensor.dtype == torch.bool if found[1] == "Bool" else tensor.is_floating_point()
    if not (fits and kind):
        raise ArtifactError(f"{what} is {tensor.dtype} {list(tensor.shape)} where {annotation} is expected")


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(settings)))


P = TypeVar("P", bound=Learnt)


class LearntMethod(Method, Generic[P]):
    """A method whose learning ends in tensors."""

    result: ClassVar[type[Learnt]]

    def load(self, folder: Path, data: SearchData) -> P:
        """See `Method.load`."""
        return self.result.read(folder, self, data)  # pyright: ignore[reportReturnType]

    def made(self, data: SearchData, facts: Mapping[str, Any], **tensors: Tensor) -> P:
        """What was learnt from ``data``."""
        about = (self.name, _as_json(self.settings()), data.model.fingerprint, data.trait, facts)
        return self.result(*about, **tensors)  # pyright: ignore[reportReturnType]


def value_of(setting: Setting, name: str) -> float:
    """A parameter's value.

    Raises:
        ValueError: the setting has no such parameter, or it is not finite.
    """
    if name not in setting or not math.isfinite(setting[name]):
        raise ValueError(f"the setting needs a finite {name!r}, got {dict(setting)}")
    return float(setting[name])


def layer_of(setting: Setting, n_layers: int) -> int:
    """The layer that a setting names.

    Raises:
        ValueError: it names none, or none of the model's.
    """
    layer = value_of(setting, "layer")
    if layer != int(layer) or not 0 <= layer < n_layers:
        raise ValueError(f"layer {setting['layer']} is not among 0 … {n_layers - 1}")
    return int(layer)


def layers_at(depths: Sequence[float], n_layers: int) -> list[int]:
    """The layers at given shares of a model's depth, each once, in order."""
    return sorted({min(n_layers - 1, int(depth * n_layers)) for depth in depths})


def require_shares(name: str, values: Sequence[float]) -> None:
    """Raise unless the values are shares of the depth.

    Raises:
        ValueError: none given, or one outside [0, 1).
    """
    if not values or any(not 0 <= v < 1 for v in values):
        raise ValueError(f"{name} must be shares of the model's depth in [0, 1), at least one; got {tuple(values)}")


def require_strengths(name: str, values: Sequence[float]) -> None:
    """Raise unless the values are strengths.

    Raises:
        ValueError: none given, or one that is not above 0 and finite.
    """
    if not values or any(not (math.isfinite(v) and v > 0) for v in values):
        raise ValueError(f"{name} must be above 0 and finite, at least one; got {tuple(values)}")


def require_poles(data: SearchData, what: str) -> None:
    """Raise unless there are answers of both poles to at least two questions.

    Raises:
        ValueError: there are not.
    """
    missing = [pole.value for pole in POLES if pole not in data.prompts or pole not in data.answers]
    if missing or len(data.questions) < 2:
        lack = f"the {' and '.join(missing)} pole's" if missing else f"more than {len(data.questions)} questions'"
        raise ValueError(f"{what} contrasts both poles over several questions, and the search data lack {lack} answers")


def read_answers(
    data: SearchData,
    *,
    site: Literal["residual", "heads"],
    at: Literal["answer", "answer_end"],
    persona: bool,
) -> dict[Pole, Float[Tensor, "question layer width"]]:
    """What every layer holds while each pole's answers are replayed.

    Args:
        data: both poles' answers.
        site: see `Model.read`.
        at: see `Model.read`.
        persona: after the persona prompts that elicited them; otherwise after the bare questions, so that the poles
            differ in the answers alone.
    """
    questions = [question.text for question in data.questions]
    return {
        pole: data.model.read(
            data.prompts[pole] if persona else questions, data.answers[pole], site=site, at=at, progress=data.progress
        )
        for pole in POLES
    }


@dataclass(frozen=True, eq=False)
class Steering(Learnt):
    """One direction a layer, to steer along at generated tokens.

    ``intervention`` adds ``± coefficient · norm_l · v_l / |v_l|`` after layer *l*, plus towards the high pole.

    Attributes:
        vectors: mean of the high pole minus mean of the low one, after each layer.
        norms: mean norm of what the vectors are differences of: the coefficient's unit.
    """

    vectors: Float[Tensor, "layer d_model"]
    norms: Float[Tensor, " layer"]

    def intervention(self, pole: Pole, setting: Setting) -> Intervention:
        """See `Prepared.intervention`; the setting has ``layer`` and ``coefficient``."""
        layer, coefficient = layer_of(setting, len(self.vectors)), value_of(setting, "coefficient")
        vector = self.vectors[layer]
        if not vector.any():
            raise ValueError(
                f"{self.method}, {self.trait}: the poles do not differ after layer {layer}; choose another"
            )
        return ResidualSteering(
            {layer: vector * (self.norms[layer] / vector.norm())},
            pole.sign * coefficient,
            fingerprint=self.fingerprint,
            label=f"{self.method} {pole} layer {layer} c={coefficient:g}",
        )

    def project(self, stream: Float[Tensor, "prompt layer d_model"]) -> Float[Tensor, "prompt layer"]:
        """Where points of the residual stream lie along each layer's vector, in the stream's own units.

        Raises:
            ValueError: the points have other layers or another width.
        """
        if stream.ndim != 3 or stream.shape[1:] != self.vectors.shape:
            raise ValueError(f"expected [prompt, {', '.join(map(str, self.vectors.shape))}], got {tuple(stream.shape)}")
        return torch.einsum("pld,ld->pl", stream, torch.nn.functional.normalize(self.vectors, dim=1))


@dataclass(frozen=True)
class SteeringMethod(LearntMethod[P]):
    """A method that steers one layer along a learnt direction.

    Attributes:
        depths: layers to choose from, as shares of the depth.
        coefficients: strengths to choose from, in multiples of the layer's mean residual norm.

    Raises:
        ValueError: a share outside [0, 1), or a coefficient that is not above 0.
    """

    depths: tuple[float, ...]
    coefficients: tuple[float, ...]

    parameter = "coefficient"

    def __post_init__(self) -> None:
        require_shares("depths", self.depths)
        require_strengths("coefficients", self.coefficients)

    def grid(self, model: Model) -> list[dict[str, float]]:
        """See `Method.grid`: every layer with every coefficient."""
        return [
            {"layer": layer, "coefficient": c}
            for layer in layers_at(self.depths, model.sites.n_layers)
            for c in self.coefficients
        ]

    def contrast(self, data: SearchData, read: Mapping[Pole, Float[Tensor, "question layer d_model"]]) -> P:
        """The difference of the poles' means, and the mean norm."""
        high, low = read[Pole.HIGH], read[Pole.LOW]
        return self.made(
            data,
            {"n_questions": len(high)},
            vectors=high.mean(dim=0) - low.mean(dim=0),
            norms=torch.cat([high, low]).norm(dim=2).mean(dim=0),
        )

    @abstractmethod
    def prepare(self, data: SearchData) -> P:
        """See `Method.prepare`."""
