"""`dflash-scale export`: a checkpoint -> a folder that stock vLLM serves (training/export.py)."""

from argparse import Namespace

from dflash_scale.commands import edge
from dflash_scale.training.export import export_checkpoint, named_checkpoint


def run(args: Namespace) -> int:
    print(export_checkpoint(named_checkpoint(args.checkpoint), args.out_dir, args.verifier, args.format))
    return edge.DONE
