"""vfkit's REST interface over its UNIX socket.

Facts: vfkit 0.6.4, pkg/rest: `GET /vm/state`; `POST /vm/state` answers 202 where its document says 200, and
500 with `{"error": ...}`. The socket is there before the machine is, and gone with it.
"""

from __future__ import annotations

from typing import Any

RUNNING = "VirtualMachineStateRunning"
BROKEN = frozenset({"VirtualMachineStateError", "VirtualMachineStateStopped"})

TIMEOUT = 10.0
"""Seconds that any step of a call may take; callers bound the whole."""


class RestError(Exception):
    """vfkit cannot be asked: it is not there yet, not there any more, or does not answer like vfkit."""


class RestRefused(RestError):
    """vfkit answered that it will not, or cannot."""


class RestClient:
    """Asks the vfkit whose socket is at `path`. Callers give the deadlines."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def state(self) -> str:
        """The machine's state, one of `VirtualMachineState...`. Raises RestError."""
        answer = await self._call("GET", None)
        state = answer.get("state")
        if not isinstance(state, str):
            raise RestError("vfkit does not say the machine's state")
        return state

    async def change(self, wanted: str) -> None:
        """Asks for `Stop` (the power button) or `HardStop` (the power cut). Raises RestError."""
        await self._call("POST", {"state": wanted})

    async def _call(self, method: str, body: dict[str, str] | None) -> dict[str, Any]:
        import httpx  # takes 0.15 s, in which the machine starts

        # There is no TLS on such a socket, and the certificates for it take a while to load.
        transport = httpx.AsyncHTTPTransport(uds=self._path, verify=False)
        try:
            # The proxies of the environment are not meant for it.
            async with httpx.AsyncClient(transport=transport, timeout=TIMEOUT, trust_env=False) as client:
                response = await client.request(method, "http://vfkit/vm/state", json=body)
        except httpx.HTTPError as error:
            raise RestError(f"vfkit cannot be asked: {error or type(error).__name__}") from error
        try:
            answer = response.json() if response.content.strip() else {}
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise RestError(f"vfkit answered what is no JSON object: {response.content[:80]!r}")
        if response.status_code not in {200, 202}:
            raise RestRefused(str(answer.get("error", "")) or f"HTTP status {response.status_code}")
        return answer
