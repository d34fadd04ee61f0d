"""A model's identity: what neurons and statistics are bound to.

Released neuron files say nothing of their model, and users applied Llama-3 neurons to Llama-3.1 and saw no effect
(METHOD.md section 4, item 11). Every file of this toolkit carries the fingerprint below, and a mismatch raises.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from npti_interp._files import from_fields, parse_json
from npti_interp.errors import ArtifactError, FingerprintMismatchError
from npti_interp.models._sites import FFNSites, activation_name, sampled_values
from npti_interp.models._weights import quantisation_of, stored_parameters

__all__ = ["ModelFingerprint", "fingerprint_model"]

SAMPLES_PER_TENSOR = 256


def _digest(*parts: bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()[:32]


@dataclass(frozen=True)
class ModelFingerprint:
    """Identity of a model, its tokenizer and its chat template.

    Attributes:
        architecture: class name of the Hugging Face model.
        n_layers: transformer blocks.
        d_mlp: neurons a layer.
        d_model: residual width.
        vocab_size: rows of the embedding.
        activation: name of σ.
        weights: digest of names, shapes and up to 256 evenly spaced entries (as bfloat16) of every parameter; milliseconds
            a billion parameters, since nothing else is read (offloaded weights are fetched for it). Of quantised weights,
            the packed entries, after the word ``4bit`` or ``8bit``. Of a model on a server whose sandbox lets no weights
            be read: ``named``, with its name and revision.
        tokenizer: digest of the vocabulary and special tokens.
        chat_template: digest of the template, or ``""`` for a model that has none.
    """

    architecture: str
    n_layers: int
    d_mlp: int
    d_model: int
    vocab_size: int
    activation: str
    weights: str
    tokenizer: str
    chat_template: str

    @property
    def digest(self) -> str:
        """One short hexadecimal word for the whole."""
        return _digest(self.to_json().encode())[:16]

    @property
    def quantisation(self) -> str:
        """``"4bit"``, ``"8bit"``, or ``""`` for weights in floating point."""
        word = self.weights.partition(" ")[0]
        return word if word in ("4bit", "8bit") else ""

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelFingerprint:
        """Inverse of `to_json`.

        Raises:
            ArtifactError: not a fingerprint.
        """
        shown = f"not a model fingerprint: {str(text)[:80]!r}"
        try:
            made = from_fields(cls, parse_json(text), shown)
        except ArtifactError:
            raise
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{shown} ({error})") from error
        if min(made.n_layers, made.d_mlp, made.d_model, made.vocab_size) < 1:
            raise ArtifactError(f"{shown}: a size below 1")
        return made

    def differences(self, other: ModelFingerprint) -> list[str]:
        """Fields that differ, as ``"field: mine != theirs"``."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} != {theirs[name]}" for name in mine if mine[name] != theirs[name]]

    def require_same(self, other: ModelFingerprint, what: str) -> None:
        """Raise unless ``other`` is the same model.

        Args:
            other: the fingerprint to compare with.
            what: what is being compared, for the message.

        Raises:
            FingerprintMismatchError: naming every field that differs.
        """
        if different := self.differences(other):
            hint = ""
            if any(weights.startswith("named ") for weights in (self.weights, other.weights)):
                hint = (
                    "; weights in a server's sandbox cannot be read: if they are the same, say so with "
                    "neurons.bound_to(model)"
                )
            elif self.quantisation != other.quantisation:
                mine, theirs = (q or "floating-point" for q in (self.quantisation, other.quantisation))
                hint = (
                    f"; one has {mine} weights, the other {theirs} ones, and how often a neuron fires depends on that: "
                    "locate on the model that is used, or, to use the other's neurons nonetheless, say so with "
                    "neurons.bound_to(model)"
                )
            raise FingerprintMismatchError(f"{what} belong to different models ({'; '.join(different)}){hint}")

    def __str__(self) -> str:
        return f"{self.architecture} {self.n_layers}×{self.d_mlp} [{self.digest}]"


def fingerprint_model(
    model: nn.Module,
    tokenizer: Any,
    sites: FFNSites,
    bits: Mapping[str, torch.Tensor] | None = None,
    known_as: str = "",
) -> ModelFingerprint:
    """Fingerprint of a Hugging Face model with its tokenizer.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        sites: its FFN neurons.
        bits: for a model whose weights are elsewhere: sampled entries of every parameter (int16, of bfloat16).
        known_as: for a model whose weights cannot be read at all: its name, which stands for them.
    """
    weights = hashlib.sha256()
    quantised = quantisation_of(model)
    for name, parameter in _named(model, bits) if not known_as else ():
        weights.update(f"{name}{tuple(parameter.shape)}".encode())
        own = sampled_values(parameter, SAMPLES_PER_TENSOR).view(torch.int16) if bits is None else bits[name]
        weights.update(own.numpy().tobytes())
    digest = f"{quantised} {weights.hexdigest()[:32]}".strip()
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    special = sorted((str(k), str(v)) for k, v in tokenizer.special_tokens_map.items())
    hf_model: Any = model
    return ModelFingerprint(
        architecture=type(model).__name__,
        n_layers=sites.n_layers,
        d_mlp=sites.d_mlp,
        d_model=sites.d_model,
        vocab_size=int(hf_model.get_input_embeddings().weight.shape[0]),
        activation=activation_name(model, sites),
        weights=known_as or digest,
        tokenizer=_digest(json.dumps(vocabulary).encode(), json.dumps(special).encode()),
        chat_template=_digest(str(tokenizer.chat_template).encode()) if tokenizer.chat_template else "",
    )


def _named(model: nn.Module, bits: Mapping[str, torch.Tensor] | None) -> Iterable[tuple[str, torch.Tensor]]:
    """Parameters by name; with ``bits`` given, only their shapes matter."""
    return stored_parameters(model) if bits is None else sorted(model.named_parameters())
