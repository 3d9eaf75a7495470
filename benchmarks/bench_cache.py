"""How many bytes per second the cache writes and reads, on the disk that holds a folder.

    python benchmarks/bench_cache.py [--folder DIR] [--tokens 1500] [--samples 20] [--json FILE]

write          `Cache.write`: checksum, file, rename; into the kernel's memory, as far as it lets writers go ahead
whole          `Cache.read` of all layers from the kernel's memory: checks and checksum included
aux_layers     the same without the last layer, as a training row wants it; bytes are those that are wanted
cold           whole, after the kernel was told to forget the files
safetensors    the library's own reading into memory and a copy from there, without a checksum
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors import safe_open

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:  # started as a script
    sys.path.insert(0, str(REPO))

from benchmarks.machine import stamp  # noqa: E402
from dflash_scale.cache.folder import Cache  # noqa: E402
from dflash_scale.transport.layout import Layout  # noqa: E402

LAYOUT: Final = Layout((2, 9, 17, 25, 33, 36), 4096, "bfloat16")  # an 8B verifier: 48 KiB per token


def forget(cache: Cache, samples: int) -> None:
    os.sync()
    for sample in range(samples):
        file = os.open(cache.path(sample), os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def with_safetensors(cache: Cache, sample: int, slot: memoryview) -> None:
    with safe_open(cache.path(sample), "pt") as file:
        states = file.get_tensor("hidden_states").view(torch.uint8)
        np.frombuffer(slot, np.uint8)[:] = states.numpy().reshape(-1)


def measure(folder: Path, tokens: int, samples: int) -> dict[str, float]:
    """Bytes per second by what is done."""
    cache = Cache(folder, LAYOUT.layer_ids)
    aux_layers = LAYOUT.only(LAYOUT.layer_ids[:-1])
    token_ids = np.arange(tokens, dtype="<i4").tobytes()
    states = np.random.default_rng(0).bytes(tokens * LAYOUT.bytes_per_token)
    slot = memoryview(bytearray(len(states)))

    def timed(work: Callable[[int], object], layout: Layout = LAYOUT) -> float:
        started = time.perf_counter()
        for sample in range(samples):
            work(sample)
        return samples * tokens * layout.bytes_per_token / (time.perf_counter() - started)

    rates = {"write": timed(lambda sample: cache.write(sample, token_ids, LAYOUT, states))}
    rates["whole"] = timed(lambda sample: cache.read(sample, token_ids, LAYOUT, slot))
    part = slot[: tokens * aux_layers.bytes_per_token]
    rates["aux_layers"] = timed(lambda sample: cache.read(sample, token_ids, aux_layers, part), aux_layers)
    rates["safetensors"] = timed(lambda sample: with_safetensors(cache, sample, slot))
    forget(cache, samples)
    rates["cold"] = timed(lambda sample: cache.read(sample, token_ids, LAYOUT, slot))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the files go for the time of a round; default: TMPDIR")
    parser.add_argument("--tokens", type=int, default=1500, help="of a sample")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="the best of each counts")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    machine, rounds = stamp(("numpy", "safetensors", "xxhash")), []
    for _ in range(args.rounds):
        folder = tempfile.mkdtemp(prefix="dflash-bench-", dir=args.folder)
        try:
            rounds.append(measure(Path(folder), args.tokens, args.samples))
        finally:
            shutil.rmtree(folder)
    for way in rounds[0]:
        print(f"{way:12}{max(found[way] for found in rounds) / 1e9:6.2f} GB/s")
    if args.json:
        result = {
            **machine,
            "sample_bytes": args.tokens * LAYOUT.bytes_per_token,
            "samples": args.samples,
            "bytes_per_s": {way: [round(found[way]) for found in rounds] for way in rounds[0]},
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
