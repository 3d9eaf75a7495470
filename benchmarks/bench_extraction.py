"""What extraction costs a vLLM server: HTTP replies to requests whose hidden states are sent, and to ones without.

    python benchmarks/bench_extraction.py --vllm-python PYTHON [--rounds 8] [--json FILE]

One real vLLM with this project's connector and a random verifier answers rounds of the same prompts, in turn

sent      with a ticket: the hidden states are copied, checked, and sent to a receiver that throws them away
dropped   without: vLLM writes them to its cache all the same, and the connector lets them go

Every second pair of rounds runs the other way round, so that a busy moment of the machine meets both. Reported are
medians over the rounds, of a reply (the median in its round), of the whole round, and of the CPU time of the server's
processes, which others on the machine disturb least; and the median of each pair's quotient. The receiver shares the
machine's cores, and on a CPU the copies are made by the thread that computes. A small verifier computes little for each
byte that it sends, 2 FLOP per parameter and token against the bytes of its layers, so that a real one pays a smaller
share.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:  # started as a script
    sys.path.insert(0, str(REPO))

import zmq  # noqa: E402

from benchmarks.machine import stamp  # noqa: E402
from benchmarks.vllm_server import Sizes, VllmServer, dealer, prompt, vllm_server, write_verifier  # noqa: E402
from dflash_scale.transport import messages  # noqa: E402

SIZES: Final = Sizes(vocabulary=1024, hidden=512, layers=8, heads=16, length=1024)
AUX_LAYERS: Final = (1, 3, 5, 7)
TOKENS: Final = 384  # of a prompt
WAYS: Final = ("sent", "dropped")
KEYS: Final = ("reply", "round", "cpu")


class Receiver(threading.Thread):
    """Reads what comes and keeps the count of it."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        super().__init__(daemon=True)
        self._socket = socket
        self.samples = self.nbytes = self.refused = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            if not self._socket.poll(100):
                continue
            frames = self._socket.recv_multipart(copy=False)
            if len(frames) == 3:
                self.samples += 1
                self.nbytes += len(frames[2])
            elif not isinstance(messages.decode(frames[0].bytes, max_tokens=0), messages.HelloReply):
                self.refused += 1


def round_of(server: VllmServer, way: str, requests: int, concurrency: int) -> dict[str, float]:
    """Seconds: of the median reply, of the round, and of the server's CPU time."""
    layer_ids = (*AUX_LAYERS, SIZES.layers)

    def ask(number: int) -> float:
        ticket = messages.Ticket("bench", "bench", 0, number, 0, layer_ids, "float32") if way == "sent" else None
        started = time.perf_counter()
        server.complete(prompt(TOKENS, number, SIZES.vocabulary), ticket, 1)
        return time.perf_counter() - started

    started, computed = time.perf_counter(), server.cpu_seconds()
    with ThreadPoolExecutor(concurrency) as pool:
        replies = list(pool.map(ask, range(requests)))
    whole = time.perf_counter() - started
    return {"reply": statistics.median(replies), "round": whole, "cpu": server.cpu_seconds() - computed}


def measure(server: VllmServer, args: argparse.Namespace) -> dict[str, Any]:
    """The two ways, alternating; ends with an error if a sample was refused or lost."""
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with dealer(server, "bench") as socket:
        socket.send(messages.encode(messages.Hello("bench", "bench")))
        receiver = Receiver(socket)
        receiver.start()
        for way in WAYS:
            round_of(server, way, args.requests, args.concurrency)  # warm
        for number in range(args.rounds):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                rounds[way].append(round_of(server, way, args.requests, args.concurrency))
        wanted = (args.rounds + 1) * args.requests
        deadline = time.monotonic() + 60
        while receiver.samples < wanted and time.monotonic() < deadline:
            time.sleep(0.05)
        receiver.stop.set()
        receiver.join()
    if (receiver.samples, receiver.refused) != (wanted, 0):
        raise SystemExit(f"{receiver.samples} of {wanted} samples came, {receiver.refused} were refused")
    return {"rounds": rounds, "sample_bytes": receiver.nbytes // receiver.samples}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--vllm-python", required=True, help="the Python that has vLLM")
    parser.add_argument("--rounds", type=int, default=8, help="of each way")
    parser.add_argument("--requests", type=int, default=24, help="in a round")
    parser.add_argument("--concurrency", type=int, default=4, help="requests open at once")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    args = parser.parse_args()
    machine = stamp(("pyzmq",))
    with tempfile.TemporaryDirectory(prefix="bench-extraction-") as folder:
        model = write_verifier(Path(folder) / "verifier", SIZES)
        flags = ("--max-model-len", str(SIZES.length), "--max-num-seqs", "8")
        with vllm_server(model, AUX_LAYERS, args.vllm_python, *flags) as server:
            found = measure(server, args)
    print(
        f"{args.rounds} rounds of {args.requests} prompts of {TOKENS} tokens, {args.concurrency} at once, "
        f"{found['sample_bytes'] / 2**20:.1f} MiB each, "
        f"{machine['cores']} cores, load {machine['load_average_before']} before"
    )
    sent, dropped = (found["rounds"][way] for way in WAYS)
    median = {way: {key: statistics.median(r[key] for r in found["rounds"][way]) for key in KEYS} for way in WAYS}
    quotient = {key: statistics.median(s[key] / d[key] for s, d in zip(sent, dropped, strict=True)) for key in KEYS}
    print(f"{'seconds':10}" + "".join(f"{key:>10}" for key in KEYS))
    for way in WAYS:
        print(f"{way:10}" + "".join(f"{median[way][key]:10.3f}" for key in KEYS))
    print(f"{'quotient':10}" + "".join(f"{quotient[key]:10.3f}" for key in KEYS))
    if args.json:
        result = {
            **machine,
            "verifier": {"hidden": SIZES.hidden, "layers": SIZES.layers, "layer_ids": [*AUX_LAYERS, SIZES.layers]},
            "prompt_tokens": TOKENS,
            "sample_bytes": found["sample_bytes"],
            "requests": args.requests,
            "concurrency": args.concurrency,
            "median_s": median,
            "quotient": quotient,
            "rounds_s": {way: [{k: round(v, 4) for k, v in r.items()} for r in found["rounds"][way]] for way in WAYS},
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
