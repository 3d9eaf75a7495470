"""How good an exported drafter is, measured in three ways that must agree.

    dflash-scale evaluate --drafter runs/demo/drafter --verifier VERIFIER --prompts heldout.jsonl [--vllm-python PY]

1. Greedy speculative decoding written out (speculative.py), with a Transformers verifier and the training code's
   drafter.
2. The same prompts in a real vLLM that serves the exported folder (vllm.py).
3. Replay: the answers of 1 as packed training rows, anchors where decoding drafted, through the training forward.
1 and 3 differ only if training sees something else than serving; 1 and 2 only if the export says something else.
Replay at uniformly drawn anchors is reported too: it is what a validation during training measures, and it differs
from the rest, because decoding drafts more often where drafts fail.

S block size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from dflash_scale.data.dataset import load_prepared
from dflash_scale.data.schedule import pack
from dflash_scale.drafter.model import Drafter, DrafterSpec, block_inputs
from dflash_scale.drafter.pretrained import load_drafter, load_output
from dflash_scale.evaluation.acceptance import Acceptance
from dflash_scale.evaluation.speculative import GreedyVerifier, Trace, counted, speculate
from dflash_scale.evaluation.vllm import ServerSpec, answer_prompts
from dflash_scale.verifier.layers import causal_model

ROW_TOKENS = 2048  # of a replayed row, or the longest answer if that is longer


def replayed(
    verifier: GreedyVerifier, drafter: Drafter, traces: Sequence[Trace], anchors: Sequence[Sequence[int]]
) -> Acceptance:
    """Acceptance of the training forward on packed rows of the traces' tokens.

    Args:
        anchors: per trace, positions in its tokens, ascending.
    """
    lengths = np.array([len(trace.tokens) for trace in traces], np.int32)
    accepted: list[int] = []
    for places in pack(range(len(traces)), lengths, max(ROW_TOKENS, int(lengths.max()))):
        documents = [traces[place.sample].tokens for place in places]
        at = [place.start + anchor for place in places for anchor in anchors[place.sample]]
        if at:
            accepted += replay_row(verifier, drafter, documents, np.array(at, np.int32))
    return Acceptance.of(accepted, drafter.spec.block_size - 1)


@torch.inference_mode()
def replay_row(
    verifier: GreedyVerifier, drafter: Drafter, documents: Sequence[Sequence[int]], anchors: npt.NDArray[np.int32]
) -> list[int]:
    """Accepted drafts at every anchor of one row of documents: the leading slots that predict their token."""
    size, device = drafter.spec.block_size, verifier.embedding.device
    states = torch.cat([verifier.read(document)[1] for document in documents])
    tokens = np.concatenate([np.array(document, np.int32) for document in documents])
    doc_ids = np.repeat(np.arange(len(documents), dtype=np.int32), [len(d) for d in documents])
    positions = np.concatenate([np.arange(len(d), dtype=np.int32) for d in documents])
    at = torch.from_numpy(anchors).to(device)
    slots = block_inputs(verifier.embedding, torch.from_numpy(tokens[anchors]).to(device), drafter.spec)
    hidden = drafter(slots, states, torch.from_numpy(positions).to(device), at, torch.from_numpy(doc_ids).to(device))
    picked = verifier.head.greedy(hidden).view(-1, size)[:, 1:].cpu().numpy()
    # A slot past the document's end has no token to predict, so the run ends there at the latest.
    targets = anchors[:, None] + np.arange(1, size)
    inside = np.minimum(targets, len(tokens) - 1)
    right = (targets < len(tokens)) & (doc_ids[inside] == doc_ids[anchors][:, None]) & (picked == tokens[inside])
    return [int(count) for count in right.cumprod(axis=1).sum(axis=1)]


def uniform_anchors(trace: Trace, block_size: int) -> range:
    """All anchors of the answer whose whole block lies in it: as training draws them, without cut blocks."""
    return range(len(trace.prompt), len(trace.tokens) - block_size + 1)


@dataclass(frozen=True, slots=True)
class EvaluateSpec:
    """What to evaluate. `vllm_python` None leaves vLLM out; `seed` is the untrained drafter's."""

    verifier: str
    drafter: Path
    prompts: Path
    count: int = 64
    max_new_tokens: int = 256
    vllm_python: str | None = None
    vllm_flags: tuple[str, ...] = ()
    log_file: Path = Path("runs/vllm-evaluate.log")
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results. `equal`: share of prompts answered token for token as plain greedy decoding does.

    speculative: way 1. vllm: way 2, None if it was left out. replay: way 3, at the anchors of way 1. uniform: at all
    anchors. untrained: way 1 with a fresh drafter. Gaps in percentage points of acceptance at the worst position.
    """

    prompts: int
    max_new_tokens: int
    speculative: Acceptance
    equal: float
    untrained: Acceptance
    replay: Acceptance
    replay_gap: float
    uniform: Acceptance
    vllm: Acceptance | None = None
    vllm_equal: float | None = None
    vllm_gap: float | None = None

    def dump(self) -> str:
        """JSON text, with each acceptance's length and rates."""
        content = asdict(self)
        for name in ("speculative", "untrained", "replay", "uniform", "vllm"):
            counts: Acceptance | None = getattr(self, name)
            if counts is not None:
                content[name] |= {"length": counts.length, "rates": counts.rates}
        return json.dumps(content, indent=2) + "\n"


def share_equal(answers: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> float:
    """Share of answers that equal their reference."""
    return float(np.mean([list(a) == list(b) for a, b in zip(answers, references, strict=True)]))


def read_prompts(path: Path, count: int) -> list[list[int]]:
    """At most `count` prompts: of a JSONL file with prompt_ids, or of a prepared data set's validation conversations,
    each up to its first supervised token.

    Raises:
        ValueError: there is none.
    """
    if path.is_dir():
        split = load_prepared(path).validation
        firsts = ((i, int(np.argmax(split.loss_mask(i)))) for i in range(len(split)))
        prompts = [split.tokens(i)[:first].tolist() for i, first in firsts if first > 0]
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts = [list(map(int, json.loads(line)["prompt_ids"])) for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts {path}: got none, wanted prompt_ids lines or a prepared folder with validation")
    return prompts[:count]


def untrained_drafter(spec: DrafterSpec, seed: int) -> Drafter:
    """A drafter as training starts it: what acceptance costs nothing."""
    drafter = Drafter(spec)
    drafter.initialise(seed)
    return drafter.eval()


def evaluate(spec: EvaluateSpec) -> Evaluation:
    """Runs all ways and compares them. Raises ValueError for inputs that do not fit together."""
    prompts = read_prompts(spec.prompts, spec.count)
    drafter = load_drafter(spec.drafter).to(spec.device)
    size, limit = drafter.spec.block_size, spec.max_new_tokens
    model = causal_model(spec.verifier, torch.float32).to(spec.device)
    verifier = GreedyVerifier(model, drafter.spec.layer_ids, load_output(spec.drafter))
    fresh = untrained_drafter(drafter.spec, spec.seed).to(spec.device)
    traces, baseline, greedy = [], [], []
    for prompt in tqdm(prompts, unit="prompt", desc="Transformers"):
        traces.append(speculate(verifier, drafter, prompt, limit))
        baseline.append(speculate(verifier, fresh, prompt, limit))
        greedy.append(verifier.greedy(prompt, limit))
    speculative = counted(traces, size)
    replay = replayed(verifier, drafter, traces, [[anchor for anchor, _ in trace.steps] for trace in traces])
    served: dict[str, Any] = {}
    if spec.vllm_python is not None:
        server = ServerSpec(spec.verifier, spec.drafter, spec.vllm_python, spec.log_file, spec.vllm_flags)
        answers, counts = answer_prompts(server, prompts, limit, size - 1)
        served = {
            "vllm": counts,
            "vllm_equal": share_equal(answers, greedy),
            "vllm_gap": counts.gap(speculative),
        }
    return Evaluation(
        prompts=len(prompts),
        max_new_tokens=limit,
        speculative=speculative,
        equal=share_equal([trace.output for trace in traces], greedy),
        untrained=counted(baseline, size),
        replay=replay,
        replay_gap=replay.gap(speculative),
        uniform=replayed(verifier, drafter, traces, [uniform_anchors(trace, size) for trace in traces]),
        **served,
    )


def report_lines(result: Evaluation) -> str:
    """What a person reads: one line per way."""
    named = [
        ("untrained drafter", result.untrained),
        ("speculative decoding", result.speculative),
        ("vLLM", result.vllm),
        ("training forward, same anchors", result.replay),
        ("training forward, all anchors", result.uniform),
    ]
    lines = [
        f"{name:32} {counts.length:5.2f}   " + " ".join(f"{100 * rate:3.0f}" for rate in counts.rates)
        for name, counts in named
        if counts is not None
    ]
    equal = f"equal to greedy: {result.equal:.0%}"
    if result.vllm_equal is not None:
        equal += f", vLLM {result.vllm_equal:.0%}"
    return "\n".join([f"{'':32} length   % accepted at each position", *lines, equal])
