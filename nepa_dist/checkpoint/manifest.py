"""The manifest of a checkpoint: what its files must be and what the run was, as JSON that carries its own SHA-256.

A digest finds damage. It is no signature: whoever can write the files can also write a matching manifest. So nothing in a
manifest is trusted: types are checked, and a file's name can only be ``state-<number>.safetensors`` in the same folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nepa_dist.checkpoint.portable import FileRecord

FORMAT = 1
_FILE_NAME = re.compile(r"state-\d{5,}\.safetensors", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    """Finished optimizer updates."""
    created: str
    """UTC, ISO 8601."""
    meta: dict[str, Any]
    """JSON values given by the caller."""
    files: tuple[FileRecord, ...]
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        """The content of ``manifest.json``."""
        body = asdict(self) | {"files": [file._asdict() for file in self.files]}
        return _encode(body | {"sha256": hashlib.sha256(_encode(body)).hexdigest()})

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            ValueError: the bytes are anything else; the message says what.
        """
        try:
            return cls._parse(raw)
        except RecursionError:
            raise ValueError("is nested too deeply") from None

    @classmethod
    def _parse(cls, raw: bytes) -> Manifest:
        try:
            body = json.loads(raw.decode("utf-8"))
        except ValueError:
            raise ValueError("is not JSON") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            version = body.get("format") if isinstance(body, dict) else None
            raise ValueError(f"has format {version!r}; this version of the program reads format {FORMAT}")
        digest = body.pop("sha256", None)
        # Comparing the bytes as well finds a change that means the same JSON.
        if hashlib.sha256(_encode(body)).hexdigest() != digest or _encode(body | {"sha256": digest}) != raw:
            raise ValueError("does not match its own SHA-256")
        if problem := _type_problem(body):
            raise ValueError(problem)
        return cls(**body | {"files": tuple(FileRecord(**file) for file in body["files"])})


def as_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What ``meta`` will be when it is read back: tuples become lists, keys strings.

    Raises:
        ValueError: a value has no JSON form (NaN and infinity have none).
    """
    try:
        values: dict[str, Any] = json.loads(json.dumps(dict(meta), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the meta of a checkpoint must be JSON: {error}") from None
    return values


def _type_problem(body: dict[str, Any]) -> str | None:
    """What is wrong with the values of a manifest; it may be made by someone else, so nothing is taken for granted."""
    if set(body) != {"format", "step", "created", "meta", "files"}:
        return f"has the keys {sorted(body)}"
    if type(body["step"]) is not int or body["step"] < 0:
        return f"has the step {body['step']!r}"
    if not isinstance(body["created"], str) or not isinstance(body["meta"], dict) or not isinstance(body["files"], list):
        return "has values of wrong types"
    for file in body["files"]:
        if not isinstance(file, dict) or set(file) != {"name", "bytes", "sha256"}:
            return f"has a malformed file record {file!r}"
        if not isinstance(file["name"], str) or not _FILE_NAME.fullmatch(file["name"]):
            return f"names the file {file['name']!r}; expected state-<number>.safetensors in the same folder"
        if type(file["bytes"]) is not int or not isinstance(file["sha256"], str) or not _SHA256.fullmatch(file["sha256"]):
            return f"has a malformed size or SHA-256 of {file['name']}"
    if len({file["name"] for file in body["files"]}) != len(body["files"]):
        return "names a file twice"
    return None


def _encode(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()
