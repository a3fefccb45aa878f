"""Signatures of minisign: a pair that the program made, and everything that must not pass for it."""

from __future__ import annotations

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.signature import PublicKey, verify

# By minisign 0.11, of the content "hello\n".
KEY_FILE = """untrusted comment: minisign public key CC186BC3C526F342
RWRC8ybFw2sYzLUEgeaPWg1Tk5Y0fnu9hf6+k+lEaCtbA9wQd+I3LRy7
"""
SIGNATURE = """untrusted comment: signature from minisign secret key
RURC8ybFw2sYzEy6dhbSWSy9XtdIyp9YDAnp3Kuq8sQ2KF+m5mynTOcbZBB9QvphPfxbJ9L/lGQpUh39MR/K5RHx2uunremV8wI=
trusted comment: image demo
iRusvaY+NXAkpVVe/ciGz4F4krWi+84B9DJ3JXaj2hIkl7ThTHwF9u+w5/Q7x40vE86pbjAUzPR/GGO2Sg4bCw==
"""
LEGACY = """untrusted comment: signature from minisign secret key
RWRC8ybFw2sYzNWtZQYPcFfMOoY8UZwR0VbYJ5f2fNRF+xL0KQj+cIng5Iz1RLjiGs9iHtRyrD2suJFtMbBMX1MFyezVuz8lyQs=
trusted comment: timestamp:1795532071\tfile:f
GKsJqNOykep4IONuLYkXp9BuJ1SgEgH5WYTReO7F7pItyZLU0RlX1xNHaVfPTqdjyvZMYHQv3X6RGxb+lL2rCA==
"""
KEY = PublicKey.parse(KEY_FILE)
DIGEST = hashlib.blake2b(b"hello\n").digest()


class Signer:
    """Somebody with a key of their own, and whatever id they like."""

    def __init__(self, key_id: bytes = b"\x01" * 8) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.public = PublicKey(key_id, self._key.public_key().public_bytes_raw())

    def sign(self, digest: bytes, comment: str = "c", algorithm: bytes = b"ED") -> str:
        raw = self._key.sign(digest)
        over_all = self._key.sign(raw + comment.encode())
        line = base64.b64encode(algorithm + self.public.id + raw).decode()
        return (
            f"untrusted comment: x\n{line}\n"
            f"trusted comment: {comment}\n{base64.b64encode(over_all).decode()}\n"
        )


def test_a_signature_of_the_program_is_taken_and_its_comment_told() -> None:
    assert verify(KEY, SIGNATURE, DIGEST) == "image demo"
    assert verify(KEY, SIGNATURE.replace("\n", "\r\n"), DIGEST) == "image demo"
    assert verify(KEY, SIGNATURE.rstrip("\n"), DIGEST) == "image demo"


def test_a_key_is_its_line_or_its_file() -> None:
    line = KEY_FILE.splitlines()[1]
    assert PublicKey.parse(line) == PublicKey.parse(f"  {line}\n") == KEY
    assert str(KEY) == line
    assert KEY.name == "CC186BC3C526F342"


def test_the_untrusted_comment_is_nobodys() -> None:
    assert verify(KEY, SIGNATURE.replace("signature from", "whatever"), DIGEST) == "image demo"


def test_our_signatures_are_as_the_programs() -> None:
    signer = Signer()
    assert verify(signer.public, signer.sign(DIGEST, "größer"), DIGEST) == "größer"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("image demo", "image demx", "the trusted comment of the signature was changed"),
        ("image demo", "image demo ", "the trusted comment of the signature was changed"),
        ("RURC8ybFw2sYzE", "RURC8ybFw2sYzF", "is not that of the key CC186BC3C526F342 for this content"),
        ("iRusvaY", "iRusvaZ", "the trusted comment of the signature was changed"),
        ("RURC8yb", "RURC8yc", "by the key .*, and the pinned key is CC186BC3C526F342"),
        ("RURC8yb", "RVRC8yb", "of a kind that minisign does not have"),
        ("RURC8yb", "RURC8y!", "the signature is no base64"),
        ("RURC8yb", "ü", "the signature is no base64"),
        ("RURC8ybF", "RURC", "the signature has 71 bytes and must have 74"),
        ("iRusvaY+", "iRus", "the signature of the comment has 61 bytes and must have 64"),
        ("trusted comment: image", "comment: image", "not one of minisign's"),
        ("untrusted comment: s", "comment: s", "not one of minisign's"),
    ],
)
def test_a_changed_signature_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        verify(KEY, SIGNATURE.replace(old, new, 1), DIGEST)


@pytest.mark.parametrize(
    "text", ["", "\n\n\n\n", SIGNATURE + "more\n", "\n".join(SIGNATURE.splitlines()[:3])]
)
def test_a_signature_with_other_lines_is_refused(text: str) -> None:
    with pytest.raises(ImageError, match="not one of minisign's"):
        verify(KEY, text, DIGEST)


def test_other_content_is_refused() -> None:
    with pytest.raises(ImageError, match="is not that of the key CC186BC3C526F342 for this content"):
        verify(KEY, SIGNATURE, hashlib.blake2b(b"hello").digest())


def test_another_key_of_the_same_id_is_refused() -> None:
    forger = Signer(KEY.id)
    with pytest.raises(ImageError, match="is not that of the key CC186BC3C526F342 for this content"):
        verify(KEY, forger.sign(DIGEST), DIGEST)


def test_another_key_is_refused_and_both_are_named() -> None:
    stranger = Signer()
    with pytest.raises(
        ImageError, match="by the key 0101010101010101, and the pinned key is CC186BC3C526F342"
    ):
        verify(KEY, stranger.sign(DIGEST), DIGEST)


def test_a_signature_cannot_be_moved_under_another_comment() -> None:
    signer = Signer()
    one, other = signer.sign(DIGEST, "release 1"), signer.sign(hashlib.blake2b(b"").digest(), "release 2")
    mixed = "\n".join(one.splitlines()[:2] + other.splitlines()[2:])
    with pytest.raises(ImageError, match="the trusted comment of the signature was changed"):
        verify(signer.public, mixed, DIGEST)


def test_the_legacy_kind_is_refused_with_what_to_do() -> None:
    with pytest.raises(ImageError, match="legacy kind") as caught:
        verify(KEY, LEGACY, DIGEST)
    assert caught.value.hint == "sign again with `minisign -S -H`"


def test_a_legacy_signature_of_a_digest_is_none_of_the_content() -> None:
    """It would say that the digest itself was signed as a file."""
    signer = Signer()
    with pytest.raises(ImageError, match="legacy kind"):
        verify(signer.public, signer.sign(DIGEST, algorithm=b"Ed"), DIGEST)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no minisign public key"),
        ("a\nb", "no minisign public key"),
        ("untrusted comment: x\ny\nz", "no minisign public key"),
        ("RW!!", "the public key is no base64"),
        ("RWRC", "the public key has 3 bytes and must have 42"),
        ("RU" + str(KEY)[2:], "of a kind that minisign does not have"),
    ],
)
def test_what_is_no_key_is_refused(text: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        PublicKey.parse(text)


def test_another_digest_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="32 bytes and must have 64"):
        verify(KEY, SIGNATURE, hashlib.sha256(b"hello\n").digest())
