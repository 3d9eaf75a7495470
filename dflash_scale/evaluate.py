"""How good an exported drafter is, measured in three ways that must agree.

    dflash-scale evaluate --drafter runs/demo/drafter --verifier VERIFIER --prompts heldout.jsonl [--vllm-python PY]

1. Greedy speculative decoding written out here, with a Transformers verifier and the training code's drafter.
2. The same prompts in a real vLLM that serves the exported folder (evaluate_vllm.py).
3. Replay: the answers of 1 as packed training rows, anchors where decoding drafted, through the training forward.
1 and 3 differ only if training sees something else than serving; 1 and 2 only if the export says something else.
Replay at uniformly drawn anchors is reported too: it is what a validation during training measures, and it differs
from the rest, because decoding drafts more often where drafts fail.

T tokens · A anchors · S block size · L verifier layers tapped · H hidden size.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from dflash_scale.acceptance import Acceptance
from dflash_scale.drafter.heads import OutputHead
from dflash_scale.drafter.model import Drafter, DrafterSpec, block_inputs
from dflash_scale.drafter.pretrained import load_drafter, load_output
from dflash_scale.evaluate_vllm import ServerSpec, answer_prompts
from dflash_scale.packer import pack
from dflash_scale.prompts import load_prepared
from dflash_scale.verifier.layers import causal_model

log = logging.getLogger(__name__)

ROW_TOKENS = 2048  # of a replayed row, or the longest answer if that is longer


@dataclass(frozen=True, slots=True)
class Trace:
    """One prompt's speculative decoding.

    tokens: prompt and everything that was verified, past the cut too. output: the answer, cut at the first end token or
    at max_new_tokens. steps: (position of the anchor, accepted drafts) of every verify step.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    output: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]


def cut(answer: Sequence[int], ends: frozenset[int], max_new_tokens: int) -> list[int] | None:
    """The finished answer, or None if it goes on."""
    for count, token in enumerate(answer[:max_new_tokens], start=1):
        if token in ends or count == max_new_tokens:
            return list(answer[:count])
    return None


class GreedyVerifier:
    """A Transformers verifier that reads tokens behind a cache that can be cropped.

    Args:
        model: a causal language model in evaluation mode.
        layer_ids: aux layers, each below the number of layers (the last of Transformers' hidden states is not a
            residual: the final norm has gone over it).
        output: the drafter's own, if its vocabulary is pruned (`pretrained.load_output`); None: the verifier's.
    """

    def __init__(self, model: Any, layer_ids: tuple[int, ...], output: OutputHead | None = None) -> None:
        self.model, self.layer_ids = model, layer_ids
        self.embedding: Tensor = model.get_input_embeddings().weight.detach()
        own = output or OutputHead(model.get_output_embeddings().weight.detach())
        self.head = own.to(self.embedding.device, self.embedding.dtype)
        given = model.generation_config.eos_token_id
        self.ends = frozenset([] if given is None else [given] if isinstance(given, int) else given)
        self.limit: int = model.config.get_text_config().max_position_embeddings

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], cache: DynamicCache | None = None) -> tuple[list[int], Tensor]:
        """Reads (n,) tokens; greedy next token after each, and their hidden states (n, L*H)."""
        ids = torch.tensor([list(tokens)], device=self.embedding.device)
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, output_hidden_states=True)
        states = torch.cat([out.hidden_states[k][0] for k in self.layer_ids], dim=-1)
        return out.logits[0].argmax(-1).tolist(), states

    def new_cache(self) -> DynamicCache:
        """An empty cache whose sliding layers keep what a rejected draft pushed out of their window."""
        cache = DynamicCache(config=self.model.config)
        cache.activate_past_recording()
        return cache

    def before_step(self, cache: DynamicCache) -> DynamicCache | None:
        """What `take_back` needs. A linear attention's state has no past to return to: it is kept from before the step,
        and read forward again."""
        recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
        return copy.deepcopy(cache) if recurrent else None

    def take_back(self, cache: DynamicCache, before: DynamicCache | None, read: Sequence[int], rejected: int) -> Any:
        """The cache without the `rejected` last tokens; `read` are those that stay of what was read since `before`."""
        if before is None:
            cache.crop(-rejected)
            return cache
        self.read(read, before)
        return before

    def greedy(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """The answer without a drafter, token by token."""
        cache = self.new_cache()
        answer = [self.read(prompt, cache)[0][-1]]
        while (done := cut(answer, self.ends, max_new_tokens)) is None:
            answer.append(self.read(answer[-1:], cache)[0][0])
        return done


@torch.inference_mode()
def draft(drafter: Drafter, verifier: GreedyVerifier, states: Tensor, anchor_token: int) -> list[int]:
    """S-1 greedy drafts after the anchor. states (a, L*H): those of all tokens before it."""
    a, device = len(states), states.device
    row = torch.cat([states, states.new_zeros(1, states.shape[1])])  # the anchor's own state is never seen
    positions = torch.arange(a + 1, dtype=torch.int32, device=device)
    slots = block_inputs(verifier.embedding, torch.tensor([anchor_token], device=device), drafter.spec)
    anchors = torch.tensor([a], dtype=torch.int32, device=device)
    hidden = drafter(slots, row, positions, anchors, torch.zeros_like(positions))
    picked: list[int] = verifier.head.greedy(hidden[1:]).tolist()
    return picked


def speculate(verifier: GreedyVerifier, drafter: Drafter, prompt: Sequence[int], max_new_tokens: int) -> Trace:
    """Greedy speculative decoding of one prompt, as vLLM's method dflash does it.

    Raises:
        ValueError: prompt, answer and one more block do not fit the verifier's positions (vLLM verifies fewer drafts
            near its limit, which would change what is counted).
    """
    size = drafter.spec.block_size
    if not prompt or len(prompt) + max_new_tokens + size > verifier.limit:
        raise ValueError(
            f"prompt: got {len(prompt)} tokens, wanted 1 to {verifier.limit - max_new_tokens - size} so that "
            f"{max_new_tokens} new ones and a block of {size} fit; lower --max-new-tokens or leave the prompt out"
        )
    cache = verifier.new_cache()
    following, states = verifier.read(prompt, cache)
    tokens, steps = [*prompt, following[-1]], []
    while (output := cut(tokens[len(prompt) :], verifier.ends, max_new_tokens)) is None:
        anchor = len(tokens) - 1
        drafts = draft(drafter, verifier, states, tokens[anchor])
        before = verifier.before_step(cache)
        following, new = verifier.read([tokens[anchor], *drafts], cache)
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == following[accepted]:
            accepted += 1
        tokens += following[: accepted + 1]
        states = torch.cat([states, new[: accepted + 1]])
        if accepted < len(drafts):
            cache = verifier.take_back(cache, before, [tokens[anchor], *drafts[:accepted]], len(drafts) - accepted)
        steps.append((anchor, accepted))
    return Trace(tuple(prompt), tuple(tokens), tuple(output), tuple(steps))


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


def counted(traces: Sequence[Trace], block_size: int) -> Acceptance:
    """The acceptance that the traces recorded."""
    return Acceptance.of((accepted for trace in traces for _, accepted in trace.steps), block_size - 1)


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dflash-scale evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--verifier", required=True, help="folder or hub id")
    parser.add_argument("--drafter", required=True, type=Path, help="exported folder")
    parser.add_argument("--prompts", required=True, type=Path, help="JSONL with prompt_ids, or a prepared folder")
    parser.add_argument("--count", type=int, default=64, help="prompts, at most")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--vllm-python", help="interpreter that has vLLM; without it vLLM is left out")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    parser.add_argument("--device", default="cpu", help="torch device of the Transformers verifier")
    parser.add_argument("vllm_flags", nargs="*", help="flags for vLLM, after --")
    args = vars(parser.parse_args(argv))
    out, flags = args.pop("out"), tuple(args.pop("vllm_flags"))
    try:
        result = evaluate(EvaluateSpec(**args, vllm_flags=flags))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report_lines(result))
    if out is not None:
        aside = out.with_name(out.name + ".partial")
        aside.write_text(result.dump(), encoding="utf-8")
        os.replace(aside, out)
    return 0
