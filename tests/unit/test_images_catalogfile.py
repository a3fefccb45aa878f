"""Catalogs: what they say, and what is said of those that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from kenaz_engine.images.catalogfile import AtManifest, InParts, catalog, load_catalog
from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.policy import ALWAYS, DAILY, NEVER, Refresh
from kenaz_engine.spec.faults import InvalidFile

HEX = "0" * 64
KEY = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3"
HEAD = "apiVersion: kenaz.dev/v1\nkind: Catalog\nimages:\n"

FULL = f"""\
  sigil:
    description: two of them
    refresh: {{if-older-than: 1h30m}}
    arch:
      x86_64:
        manifest: {{urls: ["https://a/image.json", "https://b/image.json"], key: {KEY}}}
      aarch64:
        tag: "7"
        cmdline: quiet
        console: {{device: ttyAMA0, patterns: [{{event: guest.ready, pattern: "^login:"}}]}}
        parts:
          kernel: {{urls: ["https://a/k"], sha256: "{HEX}", size: 5}}
          root:
            {{urls: ["https://a"], sha256: "{HEX}", size: 5, compression: zstd, unpackedSize: 9, format: raw}}
  pinned:
    refresh: never
    arch: {{x86_64: {{manifest: {{urls: ["http://a/image.json"], sha256: "{HEX}"}}}}}}
  always:
    refresh: always
    arch: {{x86_64: {{hint: run it}}}}
"""


def test_a_catalog_says_it_all() -> None:
    known = load_catalog(HEAD + FULL, "c.yaml")
    sigil = known["sigil"]
    assert (sigil.description, sigil.refresh) == ("two of them", Refresh(5400.0))
    rolling = sigil.offers["x86_64"].source
    assert rolling == AtManifest(("https://a/image.json", "https://b/image.json"), "", KEY)
    assert rolling.rolling
    parts = sigil.offers["aarch64"].source
    assert isinstance(parts, InParts)
    assert (parts.tag, parts.cmdline, parts.root_format, parts.rolling) == ("7", "quiet", "raw", False)
    assert parts.console_patterns == (("guest.ready", "^login:"),)
    assert (parts.parts["root"].compression, parts.parts["root"].unpacked_size) == ("zstd", 9)
    pinned = known["pinned"].offers["x86_64"].source
    assert isinstance(pinned, AtManifest)
    assert (pinned.sha256, pinned.rolling, known["pinned"].refresh) == (HEX, False, NEVER)
    assert (known["always"].offers["x86_64"].source, known["always"].offers["x86_64"].hint) == (
        None,
        "run it",
    )
    assert known["always"].refresh == ALWAYS


def test_without_a_word_the_publisher_is_asked_once_a_day() -> None:
    assert load_catalog(HEAD + "  a: {arch: {x86_64: {hint: x}}}\n", "c")["a"].refresh == DAILY


PLACE = "  a:\n    arch:\n      x86_64:\n"
MANIFEST = PLACE + "        manifest: "
ROOT = PLACE + "        parts:\n          root: "


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (PLACE + "        {}\n", "c.yaml:7:9: images.a.arch.x86_64: says neither where the image is nor how"),
        (
            MANIFEST + '{urls: ["https://a/i.json"]}\n',
            "c.yaml:7:19: images.a.arch.x86_64.manifest: nothing says what the manifest must be "
            "(add its sha256:, or the key: it is signed with)",
        ),
        (
            MANIFEST + f'{{urls: ["http://a/i.json"], key: {KEY}}}\n',
            "c.yaml:7:27: images.a.arch.x86_64.manifest.urls[0]: without a digest, only https: will do",
        ),
        (
            MANIFEST + f'{{urls: ["https://a/i.json"], sha256: "{HEX}", key: nonsense}}\n',
            "images.a.arch.x86_64.manifest.key: the public key has 6 bytes and must have 42",
        ),
        (
            MANIFEST + f'{{urls: ["ftp://a/i.json"], sha256: "{HEX}"}}\n',
            "c.yaml:7:27: images.a.arch.x86_64.manifest.urls[0]: `ftp://a/i.json` is not an https:, ",
        ),
        (
            MANIFEST + f'{{urls: ["https://a/i.json"], sha256: "{HEX}"}}\n        tag: x\n',
            "c.yaml:8:14: images.a.arch.x86_64.tag: goes with parts:; a manifest says that itself",
        ),
        (
            ROOT + f'{{urls: ["https://a/r"], sha256: "{HEX}", size: 5, format: raw, compression: xz}}\n',
            "images.a.arch.x86_64.parts.root.compression: nothing says how long the content may become",
        ),
        (
            ROOT + f'{{urls: ["https://a/r"], sha256: "{HEX}", size: 5, format: raw, unpackedSize: 9}}\n',
            "images.a.arch.x86_64.parts.root.unpackedSize: is for a packed file",
        ),
        (
            ROOT + '{urls: ["https://a/r"], size: 5, format: vmdk}\n',
            "images.a.arch.x86_64.parts.root: `sha256` is missing",
        ),
        (
            ROOT
            + f'{{urls: ["https://a/r"], sha256: "{HEX}", size: 5, format: raw}}\n'
            + f'          initrd: {{urls: ["https://a/i"], sha256: "{HEX}", size: 5}}\n'
            + "        console: {patterns: [{event: guest.panic, pattern: '('}]}\n"
            + f'        manifest: {{urls: ["https://a/i.json"], sha256: "{HEX}"}}\n',
            "images.a.arch.x86_64.parts.initrd: is of no use without a kernel",
        ),
        (
            "  a: {refresh: weekly, arch: {x86_64: {hint: x}}}\n",
            "images.a.refresh: `weekly` is not never, always",
        ),
        ("  a: {refresh: {if-older-than: 1 day}, arch: {x86_64: {hint: x}}}\n", "'1 day' is not a duration"),
        ("  A: {arch: {x86_64: {hint: x}}}\n", "images.A: is not an image's name"),
        ("  a: {arch: {riscv: {hint: x}}}\n", "images.a.arch.riscv: this key is unknown"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, fault: str) -> None:
    with pytest.raises(InvalidFile) as caught:
        load_catalog(HEAD + text, "c.yaml")
    assert fault in "\n".join(map(str, caught.value.faults))


def test_all_faults_are_said_at_once() -> None:
    text = ROOT + f'{{urls: ["https://a/r"], sha256: "{HEX}", size: 5, format: raw}}\n'
    text += "        console: {patterns: [{event: guest.panic, pattern: '('}]}\n"
    text += f'        manifest: {{urls: ["https://a/i.json"], sha256: "{HEX}"}}\n'
    text += "  b: {arch: {x86_64: {}}}\n"
    with pytest.raises(InvalidFile) as caught:
        load_catalog(HEAD + text, "c.yaml")
    messages = [fault.message for fault in caught.value.faults]
    assert len(messages) == 3
    assert any("is no regular expression" in message for message in messages)


def test_the_users_catalog_goes_before_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KENAZ_CATALOG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert list(catalog()) == ["demo", "sigilos"]
    (tmp_path / "kenaz").mkdir()
    (tmp_path / "kenaz/catalog.yaml").write_text(HEAD + "  demo: {arch: {x86_64: {hint: mine}}}\n" + FULL)
    assert catalog()["demo"].offers["x86_64"].hint == "mine"
    assert len(catalog()) == 5
    monkeypatch.setenv("KENAZ_CATALOG", str(tmp_path / "gone.yaml"))
    with pytest.raises(ImageError, match=r"there is no catalog .*gone\.yaml"):
        catalog()
    monkeypatch.setenv("KENAZ_CATALOG", str(tmp_path))
    with pytest.raises(ImageError, match="cannot be read"):
        catalog()
