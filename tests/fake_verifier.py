"""A scripted fake verifier server for the receiver's tests: HTTP and wire as the real ones, states from the tokens.

    python tests/fake_verifier.py --http PORT --zmq PORT --script JSON

The script maps a sample to what is done to its first attempts at this server, one word each; after that, and for all
other samples, the answer is good. Words: corrupt, truncated, layout, tokens, extra-frame, garbage, twice, stranger,
silent, refuse, http400, http500, die, hang.
"""

import argparse
import json
import os
import queue
import random
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from dflash_scale.stream import sockets, wire
from dflash_scale.stream.keys import server_keys
from dflash_scale.stream.wire import Layout, Ticket

LAYOUT = Layout((1, 2, 4), 16, "bfloat16")
OTHER_LAYOUT = Layout((1, 3, 4), 16, "bfloat16")

Frames = list[Any]


def states(token_ids: bytes, layout: Layout) -> bytes:
    """The fake's hidden states of a prompt: a function of its tokens and the layers that no other prompt shares."""
    seed = int.from_bytes(token_ids + bytes(layout.layer_ids))
    return random.Random(seed).randbytes(len(token_ids) // 4 * layout.bytes_per_token)


def bad_frames(word: str, ticket: Ticket, token_ids: bytes) -> Iterator[Frames]:
    """What is sent for an attempt under the word `word`."""
    layout = LAYOUT.only(ticket.layer_ids)
    good = wire.data_frames(ticket, layout, token_ids, states(token_ids, layout))
    match word:
        case "corrupt":
            yield [good[0], good[1], bytes(good[2][:-1]) + bytes([good[2][-1] ^ 1])]
        case "truncated":
            yield [good[0], good[1], good[2][:-2]]
        case "extra-frame":
            yield [*good, b"more"]
        case "layout":
            yield wire.data_frames(ticket, OTHER_LAYOUT, token_ids, states(token_ids, OTHER_LAYOUT))
        case "tokens":
            other = (np.frombuffer(token_ids, "<i4") + 1).astype("<i4").tobytes()
            yield wire.data_frames(ticket, layout, other, states(token_ids, layout))
        case "garbage":
            yield [os.urandom(300)]
            yield [good[0]]
            yield [b"\x81" * 5000, b"x"]
            yield good
        case "stranger":
            stranger = Ticket("otherrun", ticket.receiver, 0, 1, 0, ticket.layer_ids)
            yield wire.data_frames(stranger, layout, token_ids, states(token_ids, layout))
            yield good
        case "refuse":
            yield [wire.encode(wire.Refusal(ticket, "scripted refusal"))]
        case "twice":
            yield good
            yield good
        case "silent":
            pass
        case _:
            yield good


class FakeVerifier:
    def __init__(
        self, http: int, zmq_port: int, script: dict[str, list[str]], greeting: str = "", keys: Path | None = None
    ) -> None:
        self.script, self.seen, self.lock = script, Counter[int](), threading.Lock()
        layout = OTHER_LAYOUT if greeting == "wrong-layout" else LAYOUT
        origin = wire.Origin(verifier="0" * 16) if greeting == "other-verifier" else wire.Origin()
        self.reply: wire.Message = wire.HelloReply(layout, "fake", secrets.token_hex(8), origin)
        if greeting == "other-version":
            self.reply = wire.Incompatible((wire.VERSION + 1, wire.VERSION + 1))
        self.keys = keys
        self.outgoing: queue.SimpleQueue[Frames] = queue.SimpleQueue()
        self.zmq_port = zmq_port
        threading.Thread(target=self.serve_wire, daemon=True).start()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(200, b"")

            def do_POST(self) -> None:
                status = fake.complete(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.reply(status, b'{"choices": []}')

            def reply(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.http = ThreadingHTTPServer(("127.0.0.1", http), Handler)

    def complete(self, body: dict[str, Any]) -> int:
        ticket = Ticket.from_request(body["kv_transfer_params"])
        assert ticket is not None
        assert body["model"] == "fake"
        token_ids = np.asarray(body["prompt"], "<i4").tobytes()
        with self.lock:
            words = self.script.get(str(ticket.sample), [])
            word = words[self.seen[ticket.sample]] if self.seen[ticket.sample] < len(words) else ""
            self.seen[ticket.sample] += 1
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        if word.startswith("http"):
            return int(word[4:])
        for frames in bad_frames(word, ticket, token_ids):
            self.outgoing.put([ticket.receiver.encode(), *frames])
        return 200

    def serve_wire(self) -> None:
        context, keys = zmq.Context.instance(), server_keys(self.keys) if self.keys is not None else None
        doorkeeper = sockets.Doorkeeper(context, keys.receivers) if keys is not None else None  # noqa: F841 lives on
        router = sockets.bind_router(context, f"tcp://127.0.0.1:{self.zmq_port}", keys=keys)
        reply = wire.encode(self.reply)
        while True:
            if router.poll(1):
                receiver, _ = router.recv_multipart()
                router.send_multipart([receiver, reply])
            while not self.outgoing.empty():
                frames = self.outgoing.get()
                while True:
                    try:
                        router.send_multipart(frames, zmq.NOBLOCK)
                        break
                    except zmq.Again:
                        time.sleep(0.001)
                    except zmq.ZMQError:  # the receiver is away: a real server loses the message as well
                        break


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--http", type=int, required=True)
    parser.add_argument("--zmq", type=int, required=True)
    parser.add_argument("--script", type=json.loads, default={})
    parser.add_argument("--greeting", choices=["wrong-layout", "other-verifier", "other-version"])
    parser.add_argument("--keys", type=Path)
    args = parser.parse_args()
    FakeVerifier(args.http, args.zmq, args.script, args.greeting, args.keys).http.serve_forever()


if __name__ == "__main__":
    main()
