"""`dflash-scale keys`: a pair of keys for the servers and one for the receivers (transport/keys.py)."""

from argparse import Namespace

from dflash_scale.commands import edge
from dflash_scale.transport.keys import make_keys


def run(args: Namespace) -> int:
    make_keys(args.folder)
    print(
        f"{args.folder}: server.secret and receiver.public for the servers (--keys), receiver.secret and server.public "
        "for the runs (stream.keys)"
    )
    return edge.DONE
