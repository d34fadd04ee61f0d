"""JSON files of prepared methods: bound to a model and a trait, with a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from npti_interp._files import read_json, write_json
from npti_interp.errors import ArtifactError
from npti_interp.methods._base import SearchData
from npti_interp.models._fingerprint import ModelFingerprint
from npti_interp.neurons import NeuronSet
from npti_interp.traits import Trait

__all__ = ["load_neurons", "read_record", "write_record"]

_VERSION = 1


def write_record(
    path: Path, kind: str, fingerprint: ModelFingerprint, trait: Trait, content: Mapping[str, Any]
) -> Path:
    """Write what a method learnt of one trait (whole or not at all).

    Args:
        path: the file.
        kind: the name of what it holds.
        fingerprint: the model.
        trait: the trait.
        content: JSON values.

    Returns:
        the file.
    """
    record: dict[str, Any] = json.loads(
        json.dumps(
            {
                "kind": kind,
                "version": _VERSION,
                "fingerprint": fingerprint.to_json(),
                "trait": trait.value,
                "content": dict(content),
            }
        )
    )
    write_json(path, {**record, "sha256": _digest(record)})
    return path


def read_record(path: Path, kind: str, data: SearchData) -> dict[str, Any]:
    """The content that `write_record` wrote.

    Args:
        path: the file.
        kind: what it must hold.
        data: the model and trait it must belong to.

    Raises:
        ArtifactError: missing, damaged, altered, of another kind or trait, or of a newer format version.
        FingerprintMismatchError: made on another model.
    """
    record: Any = read_json(_present(path))
    found = record.get("kind") if isinstance(record, dict) else None
    if found != kind:
        raise ArtifactError(f"{path} holds {found or 'something this toolkit did not write'}, not {kind}")
    if type(record.get("version")) is not int or record["version"] > _VERSION:
        raise ArtifactError(
            f"{path} is {kind} format {record.get('version')}; this version of npti_interp reads up to {_VERSION}: "
            "upgrade it"
        )
    if record.pop("sha256", None) != _digest(record):
        raise ArtifactError(f"{path} was altered: its content does not match the checksum stored with it")
    if missing := [name for name in ("fingerprint", "trait", "content") if name not in record]:
        raise ArtifactError(f"{path} lacks {', '.join(missing)}")
    ModelFingerprint.from_json(record["fingerprint"]).require_same(data.model.fingerprint, f"{path} and the model")
    if not isinstance(record["content"], dict):
        raise ArtifactError(f"{path}: its content is no object")
    if record["trait"] != data.trait.value:
        raise ArtifactError(f"{path} is of {record['trait']}, not of {data.trait}")
    return record["content"]


def load_neurons(path: Path, data: SearchData) -> NeuronSet:
    """Neurons that a method saved.

    Raises:
        ArtifactError: missing, damaged or of another trait.
        FingerprintMismatchError: of another model, or of none.
    """
    neurons = NeuronSet.load(_present(path))
    require_own(neurons, data, str(path))
    return neurons


def require_own(neurons: NeuronSet, data: SearchData, what: str) -> None:
    """Raise unless the neurons are of this model and trait.

    Raises:
        ArtifactError: of another trait.
        FingerprintMismatchError: of another model, or of none.
    """
    if neurons.fingerprint is not None:  # neurons bound to no model say so themselves when they are used
        neurons.fingerprint.require_same(data.model.fingerprint, f"{what} and the model")
    if neurons.metadata.get("trait", data.trait.value) != data.trait.value:
        raise ArtifactError(f"{what} are neurons of {neurons.metadata['trait']}, not of {data.trait}")


def _present(path: Path) -> Path:
    if not path.is_file():
        raise ArtifactError(f"no file at {path}; prepare the method again")
    return path


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(record), sort_keys=True).encode()).hexdigest()
