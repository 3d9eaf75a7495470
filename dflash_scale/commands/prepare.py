"""`dflash-scale prepare`: conversations -> a prepared data set (data/prepare.py)."""

from argparse import Namespace

from dflash_scale.commands import edge
from dflash_scale.data import prepare


def run(args: Namespace) -> int:
    manifest = prepare.prepare(
        args.sources,
        args.model,
        args.out,
        validation_fraction=args.validation_fraction,
        max_tokens=args.max_tokens,
        seed=args.seed,
        workers=args.workers,
    )
    counts, tokens = manifest["counts"], manifest["tokens"]
    print(
        f"{args.out}: {counts['train']:,} samples to train on ({tokens['train']:,} tokens), {counts['validation']:,} "
        f"for validation; of {counts['lines']:,} lines {counts['bad']:,} invalid, {counts['untrainable']:,} without "
        f"supervised tokens, {counts['truncated']:,} truncated"
    )
    return edge.DONE
