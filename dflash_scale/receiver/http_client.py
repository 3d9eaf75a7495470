"""HTTP to the servers: one thread posts what the fleet wants sent, and reports what came of it. It decides nothing.

A server that hangs holds up nobody else. Connections are kept open between requests. A whole exchange has a deadline,
from connecting to the last byte of the reply, however slowly the bytes drip in, and no more of a reply is read than
MAX_REPLY_BYTES. Redirects are not followed, nothing is decompressed, and proxies and cookies play no part.
"""

from __future__ import annotations

import asyncio
import errno
import json
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

import aiohttp

from dflash_scale.fleet.state import Fault, Probe, Send

MAX_REPLY_BYTES: Final = 1 << 22  # of what a reply says only the status is used
SHOWN_CHARS: Final = 200
RANK_HEADER: Final = "X-data-parallel-rank"  # to which of its engines vLLM gives a request
CONNECTION_ERRORS: Final = {
    errno.ECONNREFUSED: "connection refused",
    errno.ECONNRESET: "connection reset",
    errno.EPIPE: "connection broken",
}


@dataclass(frozen=True, slots=True)
class Posted:
    """A request is over. `fault` None: the server answered 200."""

    sent: Send
    fault: Fault | None
    reason: str


@dataclass(frozen=True, slots=True)
class HealthAnswered:
    """GET /health is over; `problem` None: the server answered 200."""

    probe: Probe
    problem: str | None


HttpEvent = Posted | HealthAnswered


@dataclass(frozen=True, slots=True)
class Host:
    """One server's HTTP face, at http://HOST:PORT; with a rank, that engine of it."""

    address: str
    data_parallel_rank: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        rank = {} if self.data_parallel_rank is None else {RANK_HEADER: str(self.data_parallel_rank)}
        return {"Content-Type": "application/json", **rank}


@dataclass(slots=True)
class _Exchange:
    """Whether a request went over a connection that was open before it."""

    reused: bool = False


class HttpClient:
    """The HTTP side of a fleet, which bounds the requests in flight itself.

    Args:
        timeout_s: seconds until a request is given up.
        report: called from the thread with every event; must be quick and thread-safe.
    """

    def __init__(self, timeout_s: float, report: Callable[[HttpEvent], None]) -> None:
        self._timeout_s = timeout_s
        self._report = report
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        # A probe has a connection of its own: an old one says nothing about whether the server takes new ones.
        self._kept, self._fresh = self._loop.run_until_complete(_open_sessions())
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._thread.start()

    def post(self, host: Host, sent: Send, body: dict[str, Any]) -> None:
        """POST /v1/completions; one `Posted` follows, whatever happens."""
        self._begin(self._post(host, sent, body))

    def health(self, host: Host, probe: Probe, timeout_s: float) -> None:
        """GET /health; one `HealthAnswered` follows."""
        self._begin(self._health(host, probe, timeout_s))

    def close(self) -> None:
        """Gives up what is under way, without an event."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _begin(self, exchange: Coroutine[Any, Any, None]) -> None:
        self._loop.call_soon_threadsafe(self._start, exchange)

    def _start(self, exchange: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(exchange)
        self._tasks.add(task)  # the event loop alone would not keep it
        task.add_done_callback(self._tasks.discard)

    async def _close(self) -> None:
        under_way = list(self._tasks)
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self._kept.close()
        await self._fresh.close()

    async def _health(self, host: Host, probe: Probe, timeout_s: float) -> None:
        problem: str | None
        url = f"{host.address}/health"
        try:
            async with asyncio.timeout(timeout_s), self._fresh.get(url, allow_redirects=False) as response:
                problem = None if response.status == 200 else f"GET /health answered {response.status}"
        except Exception as error:  # noqa: BLE001 - somebody waits for the event
            problem = explain(error)
        self._report(HealthAnswered(probe, problem))

    async def _post(self, host: Host, sent: Send, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        try:
            async with asyncio.timeout(self._timeout_s):
                fault, reason = await self._exchange(host, raw)
        except Exception as error:  # noqa: BLE001 - somebody waits for the event
            fault, reason = fault_of(error), explain(error)
        self._report(Posted(sent, fault, reason))

    async def _exchange(self, host: Host, raw: bytes) -> tuple[Fault | None, str]:
        while True:
            exchange = _Exchange()
            try:
                async with self._kept.post(
                    f"{host.address}/v1/completions",
                    data=raw,
                    headers=host.headers,
                    allow_redirects=False,
                    trace_request_ctx=exchange,
                ) as response:
                    return judge(response.status, await _read(response))
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                # Servers close idle connections; only a fresh one tells whether this one is down.
                if not exchange.reused:
                    raise


async def _open_sessions() -> tuple[aiohttp.ClientSession, aiohttp.ClientSession]:
    """One that keeps its connections, and one that does not."""
    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(_note_reuse)
    kept, fresh = (
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=not traces),
            timeout=aiohttp.ClientTimeout(),  # none: each exchange has one around it
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=traces,
        )
        for traces in ([trace], [])
    )
    return kept, fresh


async def _note_reuse(
    session: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceConnectionReuseconnParams
) -> None:
    context.trace_request_ctx.reused = True


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """A reply's text, cut; the connection of one that goes on is closed when the response is left."""
    text = bytearray()
    while len(text) < MAX_REPLY_BYTES and (chunk := await response.content.read(MAX_REPLY_BYTES - len(text))):
        text += chunk
    return bytes(text)


def judge(status: int, text: bytes) -> tuple[Fault | None, str]:
    """Whose fault an HTTP status is."""
    if status == 200:
        return None, ""
    shown = " ".join(text[: 4 * SHOWN_CHARS].decode(errors="replace").split())[:SHOWN_CHARS]
    fault = Fault.DOUBT
    if status == 429:
        fault = Fault.BUSY
    elif 400 <= status < 500 and status != 408:
        fault = Fault.SAMPLE
    return fault, f"HTTP {status}: {shown}"


def fault_of(error: Exception) -> Fault:
    """A server that cannot be reached is down; one that is slow, or breaks off in mid-reply, is in doubt."""
    if isinstance(error, TimeoutError) or not isinstance(error, OSError | aiohttp.ServerDisconnectedError):
        return Fault.DOUBT
    return Fault.SERVER


def explain(error: Exception) -> str:
    """A short reason, as it stands in a log line."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "connection closed without an answer"
    if isinstance(error, OSError) and error.errno in CONNECTION_ERRORS:
        return CONNECTION_ERRORS[error.errno]
    return f"{type(error).__name__}: {error}"[:SHOWN_CHARS]
