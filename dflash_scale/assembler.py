"""From the ring to the device: a thread copies every record to its place in a row buffer and hands rows over in order.

Samples arrive in any order; the row schedule says where each one lies. A row is handed over when all its samples are
in, so what is trained at a step never depends on the order of arrival. The row buffers are the only host memory that a
rank holds besides its ring: `lookahead` rows being filled, one that is ready and one that is in use.

T tokens in use in a row · L verifier layers in its layout · H the verifier's hidden size.
"""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dflash_scale.packer import AnchorSpec, Row, RowPlan, Samples, plan_row
from dflash_scale.stream.encoding import decode
from dflash_scale.stream.layouts import RowLayouts
from dflash_scale.stream.ring import QUARANTINED, Record, Ring
from dflash_scale.stream.wire import Layout

POLL_S = 0.2  # how long the thread waits for a record before it looks whether it should stop


@dataclass(frozen=True, slots=True)
class RowBatch:
    """One row, ready to train: its plan, and states (T, L, H) on the training device."""

    plan: RowPlan
    states: Tensor
    quarantined: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AssemblerSpec:
    """`lookahead` rows are filled at once; `row_tokens` tokens fit in each."""

    layouts: RowLayouts
    row_tokens: int
    lookahead: int
    anchors: AnchorSpec
    device: torch.device


class RowBuffer:
    """Host memory of one row of either kind, page-locked where there is a GPU."""

    def __init__(self, spec: AssemblerSpec) -> None:
        self._row_tokens, largest = spec.row_tokens, spec.layouts.validation.bytes_per_token
        self._bytes = torch.zeros(spec.row_tokens * largest, dtype=torch.uint8, pin_memory=spec.device.type == "cuda")
        self.copied: torch.cuda.Event | None = None

    def bytes(self, layout: Layout) -> npt.NDArray[np.uint8]:
        """(row_tokens, bytes of a token)."""
        return self._bytes.numpy()[: self._row_tokens * layout.bytes_per_token].reshape(self._row_tokens, -1)

    def raw(self, layout: Layout, tokens: int) -> Tensor:
        """(tokens, bytes of a token) uint8, the first of the row."""
        return self._bytes[: tokens * layout.bytes_per_token].view(tokens, layout.bytes_per_token)


@dataclass(slots=True)
class OpenRow:
    """A row that is being filled."""

    row: Row
    buffer: RowBuffer
    missing: dict[int, tuple[int, int]]  # sample -> (start, length)
    quarantined: list[int]


def without(plan: RowPlan, samples: list[int]) -> RowPlan:
    """The plan without some of its samples: their tokens become padding, their anchors go."""
    doc_ids = plan.doc_ids.copy()
    for place in plan.row.places:
        if place.sample in samples:
            doc_ids[place.start : place.start + place.length] = -1
    keep = doc_ids[plan.anchors] >= 0
    return replace(
        plan,
        doc_ids=doc_ids,
        anchors=plan.anchors[keep],
        trained=plan.trained[keep],
        block_tokens=plan.block_tokens[keep],
    )


class RowAssembler:
    """Iterates over the rows of one rank as `RowBatch`es, in the order of the schedule.

    Args:
        ring: the rank's ring, opened for reading.
        rows: the rows of this rank, in the order it trains them.
        samples: the data set.
        spec: sizes and device.
    """

    def __init__(self, ring: Ring, rows: Iterator[Row], samples: Samples, spec: AssemblerSpec) -> None:
        self._ring, self._rows, self._samples, self._spec = ring, rows, samples, spec
        self._open: deque[OpenRow] = deque()
        self._opened = 0
        self._free: queue.SimpleQueue[RowBuffer] = queue.SimpleQueue()
        for _ in range(spec.lookahead + 2):
            self._free.put(RowBuffer(spec))
        self._ready: queue.SimpleQueue[OpenRow | BaseException | None] = queue.SimpleQueue()
        self._next: list[OpenRow | BaseException | None] = []  # what `wait` has taken from it
        self._stop = threading.Event()
        self._copy_stream = torch.cuda.Stream(spec.device) if spec.device.type == "cuda" else None
        self._thread = threading.Thread(target=self._run, name="row-assembler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops the thread; rows not handed over yet are dropped (a resumed run asks for them again)."""
        self._stop.set()
        self._thread.join()

    def wait(self, seconds: float) -> bool:
        """Whether there is a next row, or an end, at most this much later."""
        if not self._next:
            with contextlib.suppress(queue.Empty):
                self._next.append(self._ready.get(timeout=seconds))
        return bool(self._next)

    def __iter__(self) -> Iterator[RowBatch]:
        """Raises what ended the thread, for example that the receiver died."""
        in_use: RowBuffer | None = None
        while (item := self._next.pop() if self._next else self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if in_use is not None:
                self._free.put(in_use)
            plan = plan_row(item.row, self._samples, self._spec.anchors)
            if item.quarantined:
                plan = without(plan, item.quarantined)
            in_use = item.buffer
            yield RowBatch(plan, self._to_device(in_use, item.row, len(plan.tokens)), tuple(item.quarantined))

    def _to_device(self, buffer: RowBuffer, row: Row, tokens: int) -> Tensor:
        layout = self._spec.layouts.of(row)
        raw = buffer.raw(layout, tokens)
        if self._copy_stream is None:
            return decode(raw, layout)
        with torch.cuda.stream(self._copy_stream):
            states = decode(raw.to(self._spec.device, non_blocking=True), layout)
            buffer.copied = torch.cuda.Event()
            buffer.copied.record(self._copy_stream)
        current = torch.cuda.current_stream(self._spec.device)
        current.wait_event(buffer.copied)
        states.record_stream(current)
        return states

    def _run(self) -> None:
        try:
            self._fill_all()
            self._ready.put(None)
        except BaseException as error:  # noqa: BLE001 - the edge of the thread: raised again in the training one
            self._ready.put(error)

    def _fill_all(self) -> None:
        more = self._open_row()
        while not self._stop.is_set():
            while more and len(self._open) < self._spec.lookahead and not self._free.empty():
                more = self._open_row()
            while self._open and not self._open[0].missing:
                self._ready.put(self._open.popleft())
            if not self._open and not more:
                return
            if self._open:
                record = self._ring.next_record(POLL_S)
                if record is not None:
                    self._place(record)
                    self._ring.release()
            else:
                self._stop.wait(POLL_S / 20)  # every buffer is ready or in use: the trainer is the slower half

    def _open_row(self) -> bool:
        row = next(self._rows, None)
        if row is None:
            self._ring.reader_mark = self._opened  # the receiver looks one row further, and finds the end
            return False
        buffer = self._free.get()
        if buffer.copied is not None:
            buffer.copied.synchronize()
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
        target = row.buffer.bytes(self._spec.layouts.of(row.row))[start : start + length]
        if record.status == QUARANTINED:
            row.quarantined.append(record.sample)
            target[:] = 0  # not stale values: a NaN there would reach the gradient of fc
            return
        source = np.frombuffer(record.payload, np.uint8)
        if source.size != target.size:
            raise RuntimeError(f"sample {record.sample}: got {source.size} bytes, wanted {target.size}")
        target[:] = source.reshape(target.shape)
