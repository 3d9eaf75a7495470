"""A Sender in a process of its own, whose memory a test can look at.

    python tests/support/sender_process.py [KEYS]

Prints its endpoint; then answers each line on stdin: "send TOKENS" sends that many tokens to the receiver "rx", "stats"
prints the counters as JSON. Ends with its stdin.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from dflash_scale.server.sender import Offer, Sender
from dflash_scale.transport.keys import server_keys
from dflash_scale.transport.layout import Layout
from dflash_scale.transport.messages import Ticket

LAYOUT = Layout((1, 2), 256, "float32")


def main() -> None:
    keys = server_keys(Path(sys.argv[1])) if sys.argv[1:] else None
    sender = Sender("tcp://127.0.0.1:*", Offer(LAYOUT, "model"), keys=keys)
    print(sender.endpoint, flush=True)
    for sample, line in enumerate(sys.stdin):
        match line.split():
            case ["send", tokens]:
                count = int(tokens)
                ticket = Ticket("run", "rx", 0, sample, 0, LAYOUT.layer_ids, LAYOUT.dtype)
                sender.send(ticket, bytes(4 * count), bytes(count * LAYOUT.bytes_per_token))
                print(sample, flush=True)
            case _:
                print(json.dumps(asdict(sender.counters)), flush=True)
    sender.close()


if __name__ == "__main__":
    main()
