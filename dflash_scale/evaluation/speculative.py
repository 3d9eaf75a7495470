"""Greedy speculative decoding written out, with a Transformers verifier and the training code's drafter.

S block size · L aux layers · H hidden size · N slots.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from dflash_scale.drafter.heads import OutputHead
from dflash_scale.drafter.model import Drafter, block_inputs
from dflash_scale.evaluation.acceptance import Acceptance


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


def counted(traces: Sequence[Trace], block_size: int) -> Acceptance:
    """The acceptance that the traces recorded."""
    return Acceptance.of((accepted for trace in traces for _, accepted in trace.steps), block_size - 1)
