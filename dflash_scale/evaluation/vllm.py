"""Acceptance in a real vLLM: starts a server on an exported drafter, sends prompts, reads vLLM's own counters.

Only this process's own server is stopped, by its process id. T=0 throughout: greedy answers do not depend on a seed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dflash_scale.evaluation.acceptance import Acceptance
from dflash_scale.server.process import call, end_with_parent, free_port, stop, wait_until_ready

LAUNCHER = Path(__file__).parents[2] / "launch" / "serve_vllm.py"
SAMPLE = re.compile(r"^vllm:spec_decode_(\w+?)_total(?:\{([^}]*)\})? ([0-9.eE+]+)$", re.MULTILINE)
POSITION = re.compile(r'position="(\d+)"')


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """What to serve and how. `python` is the interpreter that has vLLM; `flags` are passed on to vLLM."""

    verifier: str
    drafter: Path
    python: str
    log_file: Path
    flags: tuple[str, ...] = ()


@contextmanager
def serving(spec: ServerSpec) -> Iterator[str]:
    """A running server's address; the server is gone when the block is left.

    Raises:
        ValueError: the server ended, or was not ready in time; the log's end is quoted.
    """
    port = free_port()
    launcher = [sys.executable, str(LAUNCHER), spec.verifier, "--drafter", str(spec.drafter), "--port", str(port)]
    command = [*launcher, "--python", spec.python, "--", *spec.flags]
    spec.log_file.parent.mkdir(parents=True, exist_ok=True)
    with spec.log_file.open("wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent
        )
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}", spec.log_file)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(server)


def parse_counters(text: str, slots: int) -> Acceptance:
    """vLLM's speculative counters in a /metrics page, summed over engines.

    Args:
        text: the page.
        slots: S-1, drafts per step.
    """
    totals = dict.fromkeys(("num_drafts", "num_draft_tokens", "num_accepted_tokens"), 0)
    per_position = [0] * slots
    for name, labels, value in SAMPLE.findall(text):
        if name in totals:
            totals[name] += int(float(value))
        elif name == "num_accepted_tokens_per_pos" and (at := POSITION.search(labels)):
            per_position[int(at[1])] += int(float(value))
    return Acceptance(
        totals["num_drafts"], totals["num_draft_tokens"], totals["num_accepted_tokens"], tuple(per_position)
    )


def settled_counters(address: str, slots: int) -> Acceptance:
    """The counters once they stand still: replies may come before the last step is counted."""
    before = parse_counters(call(f"{address}/metrics").decode(), slots)
    while True:
        time.sleep(0.5)
        now = parse_counters(call(f"{address}/metrics").decode(), slots)
        if now == before:
            return now
        before = now


def answer_prompts(
    spec: ServerSpec, prompts: Sequence[Sequence[int]], max_new_tokens: int, slots: int, concurrency: int = 8
) -> tuple[list[list[int]], Acceptance]:
    """Serves the drafter, answers `prompts` greedily and stops the server.

    Args:
        prompts: token ids.
        max_new_tokens: longest answer.
        slots: S-1, drafts per step.
        concurrency: requests open at once.

    Returns:
        The answers' token ids, and vLLM's counts over these prompts.
    """
    with serving(spec) as address:
        models = json.loads(call(f"{address}/v1/models"))
        model = models["data"][0]["id"]

        def answer(prompt: Sequence[int]) -> list[int]:
            body: dict[str, object] = {
                "model": model,
                "prompt": list(prompt),
                "max_tokens": max_new_tokens,
                "temperature": 0,
                "return_token_ids": True,
            }
            reply = json.loads(call(f"{address}/v1/completions", body))
            return [int(token) for token in reply["choices"][0]["token_ids"]]

        before = settled_counters(address, slots)
        with ThreadPoolExecutor(concurrency) as pool:
            answers = list(tqdm(pool.map(answer, prompts), total=len(prompts), unit="prompt", desc="vLLM"))
        return answers, settled_counters(address, slots) - before
