"""Says how a directory becomes an ext4 image with the same bytes each time, on whatever host.

`mke2fs -d` takes files in the order in which the host's file system lists them, and permissions as the umask
left them. Hence the image is made empty, and filled by debugfs in an order of ours. Pure, but for looking at
the directory.
"""

from __future__ import annotations

import stat
import uuid
from collections.abc import Mapping
from pathlib import Path

BLOCK = 4096

# The inodes of mke2fs itself: bad blocks, the room for growing, lost+found.
_OWN = ("<1>", "<7>", "<11>", "/")
_TIMES = ("atime", "ctime", "mtime", "crtime")


Owners = Mapping[str, tuple[int, int, int]]
"""User, group and permissions by path below the root, for what is not simply root's."""


def options(root: Path, slack: int) -> tuple[list[str], int]:
    """The options of mke2fs for an empty file system that `root` fits into, without a journal and owned by
    root, and its size in blocks, `slack` bytes of which stay free."""
    contents = (path.stat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    blocks = sum(-(-size // BLOCK) for size in contents) + sum(1 for _ in root.rglob("*"))
    features = "^has_journal,^metadata_csum,uninit_bg"
    extended = f"root_owner=0:0,lazy_itable_init=1,hash_seed={_uuid('hash seed')}"
    words = ["-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-m", "0", "-O", features, "-E", extended]
    return [*words, "-L", "KENAZROOT", "-U", _uuid("root")], blocks + slack // BLOCK


def commands(root: Path, epoch: int, owners: Owners | None = None) -> list[str]:
    """What debugfs is told, so that the empty file system holds `root`, all of it owned by root and of the
    time `epoch`. Files are 0755 where their owner may execute them, else 0644; `owners` knows others."""
    paths = sorted(root.rglob("*"), key=lambda path: path.relative_to(root).as_posix())
    told = [f"set_current_time @{epoch}"]
    for path in paths:
        name = _name(path, root)
        if path.is_symlink():
            told.append(f"symlink {name} {path.readlink()}")
        elif path.is_dir():
            told.append(f"mkdir {name}")
        else:
            told.append(f'write "{path}" {name}')
    known = owners or {}
    facts = {_name(path, root): known.get(path.relative_to(root).as_posix()) for path in paths}
    for name in (*_OWN, *facts):
        user, group, _ = facts.get(name) or (0, 0, 0)
        told += [f"set_inode_field {name} uid {user}", f"set_inode_field {name} gid {group}"]
        told += [f"set_inode_field {name} {field} @{epoch}" for field in _TIMES]
    for path in paths:
        name = _name(path, root)
        fact = facts[name]
        mode = _mode(path) if fact is None else stat.S_IFMT(path.lstat().st_mode) | fact[2]
        told.append(f"set_inode_field {name} mode 0{mode:o}")
    return told


def _name(path: Path, root: Path) -> str:
    return f'"/{path.relative_to(root).as_posix()}"'


def _mode(path: Path) -> int:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return stat.S_IFLNK | 0o777
    if stat.S_ISDIR(mode):
        return stat.S_IFDIR | 0o755
    return stat.S_IFREG | (0o755 if mode & stat.S_IXUSR else 0o644)


def _uuid(purpose: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"https://kenaz.dev/demo-image/{purpose}"))
