"""Read by the Python of Windows that runs under Wine 8.0: what that Wine lacks, and Windows has."""

import importlib.util
import sys
from importlib.abc import MetaPathFinder

# Wine ends a program that asks WMI; the module platform does without.
sys.modules["_wmi"] = None

POLLING = "trio._core._io_windows"


class Finder(MetaPathFinder):
    """trio looks for layered socket providers by SIO_BSP_HANDLE_SELECT, which Wine lacks, as it does them."""

    def find_spec(self, fullname, path, target=None):
        """The module as it is, with that one question left out."""
        if fullname != POLLING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            ask = module._get_underlying_socket

            def ask_for_the_base(sock, *, which=None):
                return ask(sock)

            module._get_underlying_socket = ask_for_the_base

        spec.loader.exec_module = execute_and_change
        return spec


sys.meta_path.insert(0, Finder())
