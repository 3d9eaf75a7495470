"""From the ring to rows: a thread puts every record in its place in a row buffer and hands rows over in order.

Samples arrive in any order; the row schedule says where each one lies. A row is handed over when all its samples are
in, so what is trained at a step never depends on the order of arrival. The row buffers lie on the training device
(`device_rows`): `lookahead` rows being filled, one that is ready and one that is in use.
"""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dflash_scale.data.schedule import Row
from dflash_scale.receiver.layouts import RowLayouts
from dflash_scale.training.copiers import Copier
from dflash_scale.training.device_rows import READY_AND_IN_USE, DeviceRows, RowBuffer
from dflash_scale.training.row_source import RowStates
from dflash_scale.transport.encoding import decode
from dflash_scale.transport.ring import QUARANTINED, Record, Ring

if TYPE_CHECKING:  # which brings the configuration, and pydantic with it
    from dflash_scale.receiver.client import Stream

POLL_S = 0.2  # how long the thread waits for a record before it looks whether it should stop
COPY_POLL_S = 0.001  # or whether copies have ended, while there are some


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    """`lookahead` rows are filled at once; `row_tokens` tokens fit in each."""

    layouts: RowLayouts
    row_tokens: int
    lookahead: int


@dataclass(slots=True)
class OpenRow:
    """A row that is being filled."""

    row: Row
    buffer: RowBuffer
    missing: dict[int, tuple[int, int]]  # sample -> (start, length)
    quarantined: list[int]


class RowLoader:
    """Gives the rows of one rank, in the order of the schedule. `wait` and `next` are for the training thread.

    Args:
        ring: the rank's ring, opened for reading.
        rows: the rows of this rank, in the order it trains them.
        spec: sizes.
        copier: how bytes get from this ring to the training device; closed with the loader.
    """

    def __init__(self, ring: Ring, rows: Iterator[Row], spec: LoaderSpec, copier: Copier) -> None:
        self._ring = ring
        self._rows = rows
        self._spec = spec
        self._open: deque[OpenRow] = deque()
        self._opened = 0
        row_bytes = spec.row_tokens * spec.layouts.validation.bytes_per_token  # a row of either kind
        self._device_rows = DeviceRows(ring, copier, rows=spec.lookahead + READY_AND_IN_USE, row_bytes=row_bytes)
        self._ready: queue.SimpleQueue[OpenRow | BaseException | None] = queue.SimpleQueue()
        self._next: list[OpenRow | BaseException | None] = []  # what `wait` has taken from it
        self._in_use: RowBuffer | None = None  # of the row that was handed over last
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="row-loader", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops the thread; rows not handed over yet are dropped (a resumed run asks for them again)."""
        self._stop.set()
        self._thread.join()
        self._device_rows.close()

    def wait(self, seconds: float) -> bool:
        """Whether there is a next row, or an end, at most this much later."""
        if not self._next:
            with contextlib.suppress(queue.Empty):
                self._next.append(self._ready.get(timeout=seconds))
        return bool(self._next)

    def next(self) -> RowStates | None:
        """The next row, None behind the last one. Raises what ended the thread, such as the receiver's death."""
        if self._in_use is not None:
            self._device_rows.give_back(self._in_use)
            self._in_use = None
        item = self._next.pop() if self._next else self._ready.get()
        if item is None:
            return None
        if isinstance(item, BaseException):
            raise item
        row, per_token = item.row, self._spec.layouts.of(item.row).bytes_per_token
        raw = self._device_rows.hand_over(item.buffer, row.tokens * per_token)
        self._in_use = item.buffer
        states = decode(raw.view(row.tokens, per_token), self._spec.layouts.of(row))
        return RowStates(row, states, tuple(item.quarantined))

    def _run(self) -> None:
        try:
            self._device_rows.enter()
            self._fill_all()
            self._device_rows.release_copied(wait=True)
            self._ready.put(None)
        except BaseException as error:  # noqa: BLE001 - the edge of the thread: raised again in the training one
            self._ready.put(error)

    def _fill_all(self) -> None:
        more = True
        while not self._stop.is_set():
            self._hand_over_whole()  # first: each of them makes place for another one
            while more and len(self._open) < self._spec.lookahead and (buffer := self._device_rows.take()) is not None:
                more = self._open_row(buffer)
                self._hand_over_whole()  # a row without samples is whole at once
            if not self._open and not more:
                return
            self._device_rows.release_copied()
            if self._open:
                record = self._ring.next_record(COPY_POLL_S if self._device_rows.copying else POLL_S)
                if record is not None:
                    self._place(record)
            else:
                self._stop.wait(POLL_S / 20)  # every buffer is ready or in use: the trainer is the slower half

    def _hand_over_whole(self) -> None:
        while self._open and not self._open[0].missing:
            self._ready.put(self._open.popleft())

    def _open_row(self, buffer: RowBuffer) -> bool:
        row = next(self._rows, None)
        if row is None:
            self._ring.reader_mark = self._opened  # the receiver looks one row further, and finds the end
            return False
        missing = {place.sample: (place.start, place.length) for place in row.places}
        self._open.append(OpenRow(row, buffer, missing, []))
        self._opened += 1
        # The receiver may request the samples of rows [mark, mark + lookahead): exactly those that are open here.
        self._ring.reader_mark = max(0, self._opened - self._spec.lookahead)
        return True

    def _place(self, record: Record) -> None:
        for row in self._open:
            if row.row.epoch == record.epoch and record.sample in row.missing:
                break
        else:
            raise RuntimeError(
                f"the receiver delivered sample {record.sample} of epoch {record.epoch}, which no open row wants: "
                "the receiver and this rank do not run the same schedule"
            )
        start, length = row.missing.pop(record.sample)
        if record.status == QUARANTINED:
            row.quarantined.append(record.sample)
        per_token = self._spec.layouts.of(row.row).bytes_per_token
        self._device_rows.fill(row.buffer, start * per_token, (start + length) * per_token, record)


@dataclass(frozen=True, slots=True)
class RingSource:
    """Rows from this rank's ring, and the stream behind it."""

    loader: RowLoader
    stream: "Stream"

    def wait(self, seconds: float) -> bool:
        return self.loader.wait(seconds)

    def next(self) -> RowStates | None:
        return self.loader.next()

    def status(self) -> list[dict[str, Any]]:
        return self.stream.servers()

    def close(self) -> None:
        try:
            self.loader.close()
        finally:
            self.stream.close()
