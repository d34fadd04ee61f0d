"""Errors that callers may want to catch by name. Plain bad values raise `ValueError`."""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "FingerprintMismatchError",
    "NonFiniteActivationError",
    "NotEnoughMemoryError",
    "NptiError",
    "RemoteJobError",
    "RemoteServiceError",
    "RunFolderError",
    "UnsupportedMethodError",
    "UnsupportedModelError",
]


class NptiError(Exception):
    """Base of the errors below."""


class UnsupportedModelError(NptiError, ValueError):
    """The model's architecture has no known FFN site (mixture-of-experts, unknown, not a causal LM)."""


class FingerprintMismatchError(NptiError, ValueError):
    """Neurons or statistics belong to another model than the one they are used with."""


class ArtifactError(NptiError, ValueError):
    """A file is not what it says: truncated, altered, of another kind, or of a newer format version."""


class NonFiniteActivationError(NptiError, FloatingPointError):
    """NaN or infinity among a layer's activations; the message names the layer."""


class NotEnoughMemoryError(NptiError, MemoryError):
    """A model or a run would not fit into memory; raised before the work starts, with the numbers and what would fit."""


class RunFolderError(NptiError, RuntimeError):
    """A run folder cannot be used: other settings, damaged files, or another process at work in it."""


class RemoteServiceError(NptiError):
    """The remote service cannot be used: not there, another version, no key, or without the model."""


class RemoteJobError(NptiError):
    """A remote job failed for good; the message has its id and the server's words."""


class UnsupportedMethodError(NptiError, ValueError):
    """A method has no meaning on this model, or the package it needs is not installed."""
