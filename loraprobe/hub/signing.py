"""Signatures of probes, by OpenSSF Model Signing: made and checked with keys alone, offline.

What is signed is config.json, which holds the digests of the weights, and the weights themselves;
the card is for reading only. The signature is `model.sig` beside them.

Source: https://github.com/sigstore/model-transparency, format version 1.0.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ..adapters.strict_json import read_json
from ..errors import TrustError, quoted, require
from ..limits import PROBE_CONFIG, read_limited
from .format import CONFIG_NAME, SIGNATURE_NAME, weight_files

MAX_SIGNATURE_BYTES = 1 << 20


def sign_folder(folder: Path, key: Path) -> Path:
    """Sign a saved probe with a private key (PEM, an elliptic curve); the signature's path.

    Raises:
        TrustError: the key cannot be read or is of another kind.
        MissingExtra: model-signing is not installed.
    """
    require("model_signing", "sign", "Signing a probe")
    from model_signing import signing

    with TemporaryDirectory(prefix="loraprobe-") as scratch, _refusals(f"{folder}, {key}"):
        signer = signing.Config().use_elliptic_key_signer(private_key=key)
        signer.sign(_signed_files(folder, Path(scratch)), folder / SIGNATURE_NAME)
    return folder / SIGNATURE_NAME


def check_signature(folder: Path, key: Path) -> None:
    """Refuse a probe that was not signed, as it is, by the owner of a public key (PEM).

    Raises:
        TrustError: there is no signature, it is of another key, or a file is not what was signed.
        MissingExtra: model-signing is not installed.
    """
    require("model_signing", "sign", "Checking a signature")
    from model_signing import hashing, verifying

    signature = folder / SIGNATURE_NAME
    if not signature.is_file():
        raise TrustError(f"{folder} holds no {SIGNATURE_NAME}; expected one by {key}")
    if signature.stat().st_size > MAX_SIGNATURE_BYTES:
        raise TrustError(f"{signature}: expected at most {MAX_SIGNATURE_BYTES} bytes")
    with TemporaryDirectory(prefix="loraprobe-") as scratch, _refusals(f"{signature}, {key}"):
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=key)
        verifier.set_hashing_config(hashing.Config())
        verifier.verify(_signed_files(folder, Path(scratch)), signature)


def _signed_files(folder: Path, scratch: Path) -> Path:
    """A copy of the files that a signature is of, under a name that is always the same."""
    signed = scratch / "probe"
    signed.mkdir()
    for name in (
        CONFIG_NAME,
        *weight_files(read_json(read_limited(folder / CONFIG_NAME, PROBE_CONFIG, TrustError))),
    ):
        shutil.copyfile(folder / name, signed / name)
    return signed


@contextmanager
def _refusals(where: str) -> Iterator[None]:
    """What the library raises is its own, of cryptography, or of what parses for it."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    refused = (ValueError, TypeError, LookupError, OSError, InvalidSignature, UnsupportedAlgorithm)
    try:
        yield
    except refused as error:
        reason = quoted(str(error) or type(error).__name__, 300)
        raise TrustError(f"{where}: {reason}. Nothing was signed or verified") from error
