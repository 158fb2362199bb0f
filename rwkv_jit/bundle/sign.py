"""Signatures of bundles: Ed25519 over the index. The only user of cryptography, an optional extra.

A signature covers every file, since the index holds their hashes.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BundleError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

MAX_SIGNATURE_BYTES = 4096
_MAX_KEY_BYTES = 16384
_SCHEMA = 1
# A signature made with the same key for another purpose must not pass for one of a bundle.
_CONTEXT = b"rwkv_jit bundle index 1\n"


def generate_key(path: Path) -> Path:
    """Write a new private key to `path`, readable by its owner alone, and its public key beside it
    with ".pub" added, whose path is returned. Raises BundleError where a file is in the way."""
    _require()
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415

    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    public_path = path.with_name(f"{path.name}.pub")
    for place, data, mode in ((path, private, 0o600), (public_path, public, 0o644)):
        try:
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except OSError as error:
            raise BundleError(f"the key {place} cannot be written: {error.strerror}") from error
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    return public_path


def sign_index(index: bytes, key: Path) -> bytes:
    """The text of a signature file for an index. key: file of a private key."""
    _require()
    signature = _private_key(key).sign(_CONTEXT + index)
    data = {
        "schema": _SCHEMA,
        "algorithm": "ed25519",
        "signature": base64.b64encode(signature).decode(),
    }
    return (json.dumps(data, indent=1) + "\n").encode()


def check_signature(index: bytes, signature: bytes, keys: Sequence[Path]) -> Path:
    """The first of the public keys that an index is signed with. Raises BundleError if none is, or
    if one cannot be read."""
    _require()
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415

    try:
        data: Any = json.loads(signature)
        if (data["schema"], data["algorithm"]) != (_SCHEMA, "ed25519"):
            raise ValueError("its schema or algorithm is not known")
        raw = base64.b64decode(data["signature"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise BundleError(f"its signature cannot be read: {error}") from error
    for path, key in [(path, _public_key(path)) for path in keys]:
        try:
            key.verify(raw, _CONTEXT + index)
        except InvalidSignature:
            continue
        return path
    names = ", ".join(str(path) for path in keys)
    raise BundleError(f"its signature is not by the owner of {names}")


def _require() -> None:
    try:
        import cryptography  # noqa: F401, PLC0415
    except ImportError as error:
        raise BundleError(
            "signatures need the package cryptography: pip install 'rwkv_jit[sign]'"
        ) from error


def _private_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError) as error:
        raise BundleError(f"{path} is not a private key without a password: {error}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise BundleError(f"{path} is not an Ed25519 key; make one with `rwkv-jit bundle keygen`")
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415

    try:
        key = load_pem_public_key(_read(path))
    except ValueError as error:
        raise BundleError(f"{path} is not a public key: {error}") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise BundleError(f"{path} is not an Ed25519 key; make one with `rwkv-jit bundle keygen`")
    return key


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_KEY_BYTES + 1)
    except OSError as error:
        raise BundleError(f"the key {path} cannot be read: {error.strerror}") from error
    if len(data) > _MAX_KEY_BYTES:
        raise BundleError(f"{path} is too large to be a key")
    return data
