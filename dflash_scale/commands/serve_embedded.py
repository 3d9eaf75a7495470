"""`dflash-scale serve --embedded`: a small verifier in Transformers, without vLLM (server/transformers_server.py)."""

import logging
import signal
import threading
from argparse import Namespace

from dflash_scale.commands import edge
from dflash_scale.server.transformers_server import Options, TransformersServer

log = logging.getLogger(__name__)


def run(args: Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        server = TransformersServer(options(args))
    except OSError as error:
        raise ValueError(str(error)) from error
    log.info("Serving %s at %s, layers %s at %s", args.model, server.http, server.layout.layer_ids, server.zmq)
    stop.wait()
    server.close()
    return edge.DONE


def options(args: Namespace) -> Options:
    """What to serve; raises ValueError for layer ids that are no numbers."""
    try:
        layer_ids = tuple(int(part) for part in args.layer_ids.split(","))
    except ValueError:
        raise ValueError(f"--layer-ids must look like 2,4,6, got {args.layer_ids!r}") from None
    return Options(**{**vars(args), "layer_ids": layer_ids})
