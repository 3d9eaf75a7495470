"""A scripted fake verifier server for the receiver's tests: HTTP and wire as the real ones, states from the tokens.

    python tests/support/fake_verifier.py --http PORT --zmq PORT --script JSON

The script maps a sample to what is done to its first attempts at this server, one word each; after that, and for all
other samples, the answer is good. Words: corrupt, truncated, layout, tokens, extra-frame, garbage, twice, stranger,
silent, refuse, busy, http400, http500, die, hang; for a ticket that asks for an answer also endless and mute.
"""

import argparse
import contextlib
import json
import os
import queue
import random
import secrets
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from dflash_scale.transport import messages, sockets
from dflash_scale.transport.keys import server_keys
from dflash_scale.transport.layout import Layout
from dflash_scale.transport.messages import Ticket

LAYOUT = Layout((1, 2, 4), 16, "bfloat16")
OTHER_LAYOUT = Layout((1, 3, 4), 16, "bfloat16")

Frames = list[Any]


def states(token_ids: bytes, layout: Layout) -> bytes:
    """The fake's hidden states of a prompt: a function of its tokens and the layers that no other prompt shares."""
    seed = int.from_bytes(token_ids + bytes(layout.layer_ids))
    return random.Random(seed).randbytes(len(token_ids) // 4 * layout.bytes_per_token)


def answer_to(prompt: list[int], most: int) -> list[int]:
    """The fake's answer, of 1 to `most` tokens."""
    return [(prompt[-1] + i) % 1000 for i in range(1 + sum(prompt) % most)]


def bad_frames(word: str, ticket: Ticket, token_ids: bytes) -> Iterator[Frames]:
    """What is sent for an attempt under the word `word`."""
    layout = ticket.part_of(LAYOUT)
    good = messages.data_frames(ticket, layout, token_ids, states(token_ids, layout))
    match word:
        case "corrupt":
            yield [good[0], good[1], bytes(good[2][:-1]) + bytes([good[2][-1] ^ 1])]
        case "truncated":
            yield [good[0], good[1], good[2][:-2]]
        case "extra-frame":
            yield [*good, b"more"]
        case "layout":
            yield messages.data_frames(ticket, OTHER_LAYOUT, token_ids, states(token_ids, OTHER_LAYOUT))
        case "tokens":
            other = (np.frombuffer(token_ids, "<i4") + 1).astype("<i4").tobytes()
            yield messages.data_frames(ticket, layout, other, states(token_ids, layout))
        case "garbage":
            yield [os.urandom(300)]
            yield [good[0]]
            yield [b"\x81" * 5000, b"x"]
            yield good
        case "stranger":
            stranger = Ticket("otherrun", ticket.receiver, 0, 1, 0, ticket.layer_ids, ticket.dtype)
            yield messages.data_frames(stranger, layout, token_ids, states(token_ids, layout))
            yield good
        case "refuse":
            yield [messages.encode(messages.Refusal(ticket, "scripted refusal"))]
        case "busy":
            yield [messages.encode(messages.Refusal(ticket, "scripted: full", busy=True))]
        case "twice":
            yield good
            yield good
        case "silent":
            pass
        case _:
            yield good


def greeting(word: str) -> messages.Message:
    """The answer to a hello; an empty word: one that fits."""
    if word == "other-version":
        return messages.Incompatible((messages.VERSION + 1, messages.VERSION + 1))
    layout = {"wrong-layout": OTHER_LAYOUT, "wrong-size": replace(LAYOUT, hidden_size=32)}.get(word, LAYOUT)
    origin = messages.Origin(verifier="0" * 16) if word == "other-verifier" else messages.Origin()
    rank = 1 if word == "second-engine" else None
    return messages.HelloReply(layout, "fake", secrets.token_hex(8), origin, rank)


class FakeVerifier:
    def __init__(
        self,
        http: int,
        zmq_port: int,
        script: dict[str, list[str]],
        reply: messages.Message,
        keys: Path | None,
        mute: bool,
    ) -> None:
        self.script, self.seen, self.lock = script, Counter[int](), threading.Lock()
        self.reply, self.keys, self.mute = reply, keys, mute
        rank = getattr(reply, "data_parallel_rank", None)
        self.rank = None if rank is None else str(rank)  # what requests have to say
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
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = fake.complete(body) if self.headers["X-data-parallel-rank"] == fake.rank else 400
                self.reply(status, b'{"choices": []}')

            def reply(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                # A receiver that is gone is no news, and what is written while a test reads the receiver's messages
                # from the same file may take the place of one.
                if not isinstance(sys.exception(), ConnectionError):
                    super().handle_error(request, client_address)

        self.http = Server(("127.0.0.1", http), Handler)

    def complete(self, body: dict[str, Any]) -> int:
        ticket = Ticket.from_request(body["kv_transfer_params"])
        assert ticket is not None
        assert body["model"] == "fake"
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
        tokens = body["prompt"]
        if ticket.answer and word != "mute":
            most = body["max_tokens"]
            tokens = [*tokens, *([7] * (most + 1) if word == "endless" else answer_to(tokens, most))]
        token_ids = np.asarray(tokens, "<i4").tobytes()
        for frames in [] if self.mute else bad_frames(word, ticket, token_ids):
            self.outgoing.put([ticket.receiver.encode(), *frames])
        return 200

    def serve_wire(self) -> None:
        context, keys = zmq.Context.instance(), server_keys(self.keys) if self.keys is not None else None
        authenticator = sockets.Authenticator(context, keys.receivers) if keys is not None else None  # noqa: F841
        router = sockets.bind_router(context, f"tcp://127.0.0.1:{self.zmq_port}", keys=keys)
        reply = messages.encode(self.reply)
        while True:
            if router.poll(1):
                receiver, _ = router.recv_multipart()
                with contextlib.suppress(zmq.ZMQError):  # it is gone again
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
    words = ["wrong-layout", "wrong-size", "other-verifier", "other-version", "second-engine"]
    parser.add_argument("--greeting", choices=words)
    parser.add_argument("--keys", type=Path)
    parser.add_argument("--mute", action="store_true", help="answer everything, and never send hidden states")
    args = parser.parse_args()
    reply = greeting(args.greeting or "")
    FakeVerifier(args.http, args.zmq, args.script, reply, args.keys, args.mute).http.serve_forever()


if __name__ == "__main__":
    main()
