"""Flags for `os.open` of a file whose bytes are meant as they are, and that no child is to have."""

import os

PLAIN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""O_CLOEXEC where there is one, and on Windows O_BINARY: without it, what is written gets a carriage return
before each line feed, and what is read ends at a control-Z."""
