"""Checks minisign signatures: Ed25519 over the BLAKE2b-512 digest of the content.

Pure. Facts: the formats at https://jedisct1.github.io/minisign/ and the program itself, which the tests run.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from kenaz_engine.images.errors import ImageError

MAX_SIGNATURE = 1 << 14
"""Bytes of the longest signature file that is looked at; minisign's own comments end at 8 KiB."""

DIGEST_SIZE = 64
"""Bytes of the digest that is signed: `hashlib.blake2b` as it is by default."""

_UNTRUSTED, _TRUSTED = "untrusted comment: ", "trusted comment: "


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that signs images. `id` is 8 bytes that tell keys apart and prove nothing; `raw` is the key."""

    id: bytes
    raw: bytes

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """From the line of base64 that `minisign -G` prints, or the two lines of its `.pub` file.

        Raises ImageError.
        """
        lines = text.strip().splitlines()
        if not 1 <= len(lines) <= 2 or (len(lines) == 2 and not lines[0].startswith(_UNTRUSTED)):
            raise ImageError("this is no minisign public key", "give the line that begins with RW")
        data = _decode(lines[-1], 42, "the public key")
        if data[:2] != b"Ed":
            raise ImageError("the public key is of a kind that minisign does not have")
        return cls(data[2:10], data[10:])

    def __str__(self) -> str:
        return base64.b64encode(b"Ed" + self.id + self.raw).decode()

    @property
    def name(self) -> str:
        """The id as minisign prints it."""
        return self.id[::-1].hex().upper()


def verify(key: PublicKey, signature: str, digest: bytes) -> str:
    """Checks that the owner of `key` signed the content with that BLAKE2b-512 digest, as `signature` says.

    `signature` is the text of a `.minisig` file. Returns its trusted comment, which is signed too. Raises
    ImageError for anything else: damaged, by another key, of another content, or a legacy signature, which is
    over the content itself and could not be checked before all of it was in memory.
    """
    if len(digest) != DIGEST_SIZE:
        raise ValueError(f"the digest has {len(digest)} bytes and must have {DIGEST_SIZE}")
    lines = [line.removesuffix("\r") for line in signature.removesuffix("\n").split("\n")]
    if len(lines) != 4 or not lines[0].startswith(_UNTRUSTED) or not lines[2].startswith(_TRUSTED):
        raise ImageError("the signature is not one of minisign's", "sign with `minisign -S`")
    signed = _decode(lines[1], 74, "the signature")
    over_all = _decode(lines[3], 64, "the signature of the comment")
    algorithm, key_id, raw = signed[:2], signed[2:10], signed[10:]
    if algorithm == b"Ed":
        raise ImageError("the signature is of minisign's legacy kind", "sign again with `minisign -S -H`")
    if algorithm != b"ED":
        raise ImageError("the signature is of a kind that minisign does not have")
    if key_id != key.id:
        other = PublicKey(key_id, b"").name
        raise ImageError(f"the signature is by the key {other}, and the pinned key is {key.name}")
    comment = lines[2].removeprefix(_TRUSTED)
    _check(key, raw, digest, f"the signature is not that of the key {key.name} for this content")
    _check(key, over_all, raw + comment.encode(), "the trusted comment of the signature was changed")
    return comment


def _check(key: PublicKey, signature: bytes, message: bytes, otherwise: str) -> None:
    # 10 ms of import, which only a signed image should cost.
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, message)
    except InvalidSignature:
        raise ImageError(otherwise) from None


def _decode(text: str, size: int, what: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ImageError(f"{what} is no base64") from None
    if len(data) != size:
        raise ImageError(f"{what} has {len(data)} bytes and must have {size}")
    return data
