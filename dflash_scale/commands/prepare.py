"""`dflash-scale prepare`: conversations -> a prepared data set (data/prepare.py)."""

from argparse import Namespace

from dflash_scale.commands import edge
from dflash_scale.data import prepare


def run(args: Namespace) -> int:
    manifest = prepare.prepare(out_dir=args.out, **{name: given for name, given in vars(args).items() if name != "out"})
    counts, tokens = manifest["counts"], manifest["tokens"]
    print(
        f"{args.out}: {counts['train']:,} samples to train on ({tokens['train']:,} tokens), {counts['validation']:,} "
        f"for validation; of {counts['lines']:,} lines {counts['bad']:,} invalid, {counts['untrainable']:,} without "
        f"supervised tokens, {counts['truncated']:,} truncated"
    )
    return edge.DONE
