"""The config disk: a small read-only ISO 9660 image labelled KENAZMETA with the boot parameters."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

LABEL = "KENAZMETA"
ENVIRONMENT_FILE = "kenaz.env"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# What systemd drops without a word when it reads the file, and what UTF-8 cannot carry.
_REFUSED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_SPECIAL = re.compile(r'["\\$`]')
_PROTECTED = r"\\\g<0>"


def environment_file(variables: Mapping[str, str]) -> bytes:
    """The variables as a systemd EnvironmentFile, sorted by name, each value in double quotes.

    Any text survives the way to the guest, but for control characters other than tab and newline: these, and
    names that are no names, raise ValueError, which never shows the value.
    """
    lines = []
    for name, value in sorted(variables.items()):
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be the name of an environment variable")
        if _REFUSED.search(value):
            raise ValueError(f"the value of {name} holds a control character other than tab and newline")
        lines.append(f'{name}="{_SPECIAL.sub(_PROTECTED, value)}"\n')
    return "".join(lines).encode()


def write_config_disk(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes the config disk with `files`, all in its top directory, to `path`.

    The file is made anew, readable by the owner alone. Raises FileExistsError when there is one, and other
    OSError as the file system has them; nothing is left behind then. Takes 2 ms, and the first time 30 ms.
    """
    content = _iso9660(files)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            path.chmod(0o600)  # whatever the umask takes away
            file.write(content)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _iso9660(files: Mapping[str, bytes]) -> bytes:
    import pycdlib  # 30 ms, which only a run should pay

    iso = pycdlib.PyCdlib()
    # Rock Ridge for Linux, Joliet for the rest: plain ISO 9660 has names in capitals only.
    iso.new(interchange_level=3, vol_ident=LABEL, rock_ridge="1.09", joliet=3)
    for number, (name, content) in enumerate(sorted(files.items())):
        iso.add_fp(
            BytesIO(content),
            len(content),
            f"/FILE{number}.;1",
            rr_name=name,
            joliet_path=f"/{name}",
            file_mode=0o100400,
        )
    image = BytesIO()
    iso.write_fp(image)
    iso.close()
    return image.getvalue()
