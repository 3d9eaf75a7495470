"""From the KV cache of a vLLM worker into the host pool, and from there to the sender.

`connector.py` says when; this knows nothing of vLLM. Nothing here waits: not for the forward that wrote the blocks, not
for a copy, not for a receiver. Imported inside the vLLM server: torch and the standard library.

Shape letters: L verifier layers offered · H hidden size · B cache blocks · P tokens in one cache block.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from dflash_scale.server.host_pool import HostPool, Piece
from dflash_scale.server.sender import Sender
from dflash_scale.transport import messages
from dflash_scale.transport.encoding import bytes_of, encode
from dflash_scale.transport.layout import WireError

SLICE_BYTES: Final = 16 << 20  # gathered on the device at once: its memory is vLLM's, and a copy this long is efficient


@dataclass(frozen=True, slots=True)
class Finished:
    """Scheduler -> worker: a finished request whose cache blocks wait to be copied; no blocks if it is refused.

    token_ids: those whose hidden states are wanted, in the order of `block_ids`, which hold exactly those of them that
    were fed to the verifier: all but the last of an answer.
    """

    request_id: str
    ticket: messages.Ticket
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    refusal: str | None = None

    @property
    def fed(self) -> int:
        return len(self.token_ids) - self.ticket.answer


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy under way into `piece`: whole once `event` is, on a CPU (None) at once."""

    finished: Finished
    piece: Piece
    event: "torch.cuda.Event | None"


class KvCopier:
    """Owns the pool and the sender of a worker whose hidden states are in `cache`, (B, P, L, H) on any device."""

    def __init__(self, cache: torch.Tensor, sender: Sender, pool: HostPool) -> None:
        self._cache, self._sender, self._pool = cache, sender, pool
        self._waiting: deque[Finished] = deque()  # for a piece of the pool, the oldest first
        self._under_way: list[_Copy] = []
        self._side = _SideStream(cache.device)

    def step(self, requests: Sequence[Finished]) -> set[str]:
        """Takes what has finished, starts what copies the pool allows, and returns the requests that are copied."""
        if not self._sender.alive:
            raise RuntimeError("the thread that sends hidden states has ended, see the log: restart this server")
        done = set()
        for finished in requests:
            refusal = finished.refusal or self._why_not(finished)
            if refusal is None:
                self._waiting.append(finished)
                continue
            self._sender.refuse(finished.ticket, refusal)
            if finished.refusal is None:  # its blocks are kept
                done.add(finished.request_id)
        while self._waiting and (piece := self._pool.take(self._nbytes(self._waiting[0]))) is not None:
            finished = self._waiting.popleft()
            event = self._side.run(partial(self._copy, finished, piece))
            self._under_way.append(_Copy(finished, piece, event))
        under_way = []
        for copy in self._under_way:
            if copy.event is None or copy.event.query():
                self._send(copy)
                done.add(copy.finished.request_id)
            else:
                under_way.append(copy)
        self._under_way = under_way
        return done

    def close(self) -> None:
        self._sender.close()

    def _why_not(self, finished: Finished) -> str | None:
        """The reason for which this request can never be sent, None if it can."""
        try:
            need, have = self._nbytes(finished), self._pool.nbytes
        except WireError as error:
            return str(error)
        return f"{need} bytes of hidden states, the server's pool has {have}" if need > have else None

    def _nbytes(self, finished: Finished) -> int:
        layout = finished.ticket.part_of(self._sender.layout)
        return len(finished.token_ids) * layout.bytes_per_token

    def _copy(self, finished: Finished, piece: Piece) -> None:
        """The wanted layers of the request's tokens into `piece`, as the ticket's dtype lies (encoding.py).

        Some blocks at a time, so that what is gathered on the device stays small; with every layer from the first to
        the last wanted one side by side, as the aux layers are, the gather is one kernel.
        """
        offered, wanted = self._sender.layout.layer_ids, finished.ticket.layer_ids
        first, stop = offered.index(wanted[0]), offered.index(wanted[-1]) + 1
        cache = self._cache[:, :, first:stop]
        scattered = [offered.index(layer) - first for layer in wanted] if len(wanted) < stop - first else None
        raw = piece.memory.view(len(finished.token_ids), -1)
        raw[finished.fed :].zero_()
        raw = raw[: finished.fed]
        blocks = _indices(finished.block_ids, cache.device)
        for part in blocks.split(max(1, SLICE_BYTES // cache[0].nbytes)):
            gathered = cache.index_select(0, part)
            if scattered is not None:
                gathered = gathered.index_select(2, _indices(scattered, cache.device))
            rows = encode(gathered.flatten(0, 1)[: len(raw)], finished.ticket.dtype)
            raw[: len(rows)].copy_(rows, non_blocking=True)
            raw = raw[len(rows) :]

    def _send(self, copy: _Copy) -> None:
        token_ids = torch.tensor(copy.finished.token_ids, dtype=torch.int32)
        released = partial(self._pool.give_back, copy.piece)
        self._sender.send(copy.finished.ticket, bytes_of(token_ids), bytes_of(copy.piece.memory), released)


class _SideStream:
    """Runs copies out of the cache without waiting for them, or for the forward that wrote what they copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = None if device.type == "cpu" else torch.cuda.Stream(device)

    def run(self, copy: Callable[[], None]) -> "torch.cuda.Event | None":
        """Starts `copy` and returns the event of its end; on a CPU it is over on return, and there is no event."""
        if self._stream is None:
            copy()
            return None
        # The forward that wrote these blocks may still run on vLLM's stream; everything below waits for it on the
        # side stream, allocates there, and so needs neither a host sync nor record_stream.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy()
            event = torch.cuda.Event()
            event.record(self._stream)
        return event


def _indices(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """On a GPU without waiting for it: pageable memory would."""
    indices = torch.tensor(values)
    return indices if device.type == "cpu" else indices.pin_memory().to(device, non_blocking=True)
