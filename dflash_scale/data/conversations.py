"""One line of a data file -> token ids and a mask of the tokens that the verifier said.

Three forms of a line: {"messages": [{"role", "content"}]} (OpenAI), {"conversations": [{"from", "value"}]} (ShareGPT),
and {"prompt_ids": [...], "answer_ids": [...]}: ids as the verifier generated them, so that nothing is tokenised twice
and no token boundary can drift.

The text is tokenised once, as a whole. Which tokens are an assistant's comes from the template's own
`{% generation %}` marks if it has them, else from rendering the conversation up to each turn; if such a rendering is
no prefix of the whole, the boundaries are unknown and the line is bad: a guess would train the drafter on prompts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
GENERATION_MARK = re.compile(r"\{%-?\+?\s*generation\b")


class BadLine(ValueError):
    """A line that cannot be used; the text is the reason, for the log."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """tokens (n,) int32 · loss_mask (n,) bool, True where the verifier said the token · truncated: to max_tokens."""

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    truncated: bool

    @property
    def trainable(self) -> bool:
        """Whether some position may be an anchor: it and its successor are supervised (drafter/blocks.py)."""
        return bool((self.loss_mask[:-1] & self.loss_mask[1:]).any())


class Encoder:
    """Encodes lines with one verifier's tokenizer and chat template.

    `tokenizer` is a fast Transformers tokenizer; `vocab_rows` bounds ids given as ids; `max_tokens` cuts samples.
    """

    def __init__(self, tokenizer: Any, vocab_rows: int, max_tokens: int) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path}: got a slow tokenizer, wanted a fast one, because the loss mask "
                "needs the tokens' offsets; add a tokenizer.json"
            )
        self._tokenizer, self._vocab_rows, self._max_tokens = tokenizer, vocab_rows, max_tokens
        self._specials = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        self._marked = bool(GENERATION_MARK.search(template))
        self._may_think = "enable_thinking" in template

    def encode(self, line: str) -> Encoded:
        """Encodes one line; raises BadLine with the reason."""
        content = _object(line)
        if "prompt_ids" in content or "answer_ids" in content:
            tokens, mask = self._from_ids(content)
        else:
            tokens, mask = self._from_messages(messages_of(content), content.get("tools"))
        # Nothing after the last supervised token is ever a context or a label: it would only cost bandwidth.
        useful = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
        kept = min(useful, self._max_tokens)
        return Encoded(tokens[:kept], mask[:kept], truncated=useful > kept)

    def prompt(self, line: str) -> npt.NDArray[np.int32]:
        """(n,) token ids of what the verifier is to answer: the conversation up to its last turn that is not an
        assistant's, and the template's start of an answer. Whatever answers that turn in the line is left out.

        Raises BadLine with the reason; a prompt that leaves no room for two tokens is one.
        """
        content = _object(line)
        if "prompt_ids" in content:
            tokens = self._ids("prompt_ids", content)
        else:
            messages = messages_of(content)
            turns = max((i + 1 for i, message in enumerate(messages) if message["role"] != "assistant"), default=0)
            if not turns:
                raise BadLine("all messages are the assistant's: there is nothing to answer")
            self._check_template()
            text = self._apply(messages[:turns], content.get("tools"), tokenize=False, add_generation_prompt=True)
            tokens = np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        if not 1 <= len(tokens) <= self._max_tokens - 2:
            raise BadLine(f"the prompt has {len(tokens)} tokens, wanted 1 to {self._max_tokens - 2}")
        return tokens

    def _from_ids(self, content: dict[str, Any]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        parts = [self._ids(key, content) for key in ("prompt_ids", "answer_ids")]
        mask = np.concatenate([np.zeros(len(parts[0]), bool), np.ones(len(parts[1]), bool)])
        return np.concatenate(parts), mask

    def _ids(self, key: str, content: dict[str, Any]) -> npt.NDArray[np.int32]:
        ids = content.get(key)
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise BadLine(f"{key}: wanted a list of integers")
        if ids and not 0 <= min(ids) <= max(ids) < self._vocab_rows:
            wrong = next(token for token in ids if not 0 <= token < self._vocab_rows)
            raise BadLine(f"{key}: got the token {wrong}, wanted 0 to {self._vocab_rows - 1}")
        return np.asarray(ids, np.int32)

    def _check_template(self) -> None:
        if not self._tokenizer.chat_template:
            raise BadLine("the tokenizer has no chat template, wanted one (or prompt_ids and answer_ids)")

    def _from_messages(
        self, messages: list[dict[str, Any]], tools: Any
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        self._check_template()
        if not any(message["role"] == "assistant" for message in messages):
            raise BadLine("no assistant message: there is nothing to train on")
        if self._marked:
            out = self._apply(messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return np.asarray(out["input_ids"], np.int32), np.asarray(out["assistant_masks"], bool)
        text = self._apply(messages, tools, tokenize=False)
        spans = [
            self._span(messages, index, text, tools)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        out = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = np.asarray(out["input_ids"], np.int32)
        offsets = np.asarray(out["offset_mapping"], np.int64).reshape(-1, 2)
        mask = np.zeros(len(tokens), bool)
        for start, stop in spans:  # a token across a boundary was not sampled as such: it stays out
            mask |= (offsets[:, 0] >= start) & (offsets[:, 1] <= stop)
        return tokens, mask

    def _apply(self, messages: list[dict[str, Any]], tools: Any, **options: bool) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, tools=tools, **options)
        except Exception as error:  # a template is the model author's code and may raise anything
            raise BadLine(f"the chat template refuses the conversation ({type(error).__name__}: {error})") from error

    def _span(self, messages: list[dict[str, Any]], index: int, text: str, tools: Any) -> tuple[int, int]:
        """Characters [start, stop) of `text` that the verifier said in turn `index`, with its end-of-turn token."""
        prompt = self._apply(messages[:index], tools, tokenize=False, add_generation_prompt=True) if index else ""
        if not text.startswith(prompt):
            raise BadLine(
                f"message {index}: the template renders the turns before it differently than in the whole conversation"
            )
        if self._may_think and index:
            # An empty thinking part is written by the template, never sampled: it belongs to the prompt.
            silent = self._apply(
                messages[:index], tools, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            prompt = silent if text.startswith(silent) and len(silent) > len(prompt) else prompt
        start = len(prompt)
        through = self._apply(messages[: index + 1], tools, tokenize=False)
        if text.startswith(through) and len(through) > start:
            stop = len(through)
        else:
            stop = self._end_of_answer(messages[index], index, text, start)
        # Templates end a turn by its end token and a line feed; the verifier stops at the token.
        trimmed = text[start:stop].rstrip()
        return start, start + len(trimmed) if trimmed.endswith(self._specials) else stop

    def _end_of_answer(self, message: dict[str, Any], index: int, text: str, start: int) -> int:
        """Where a turn ends that the template renders otherwise once it is not the last (it drops the thinking)."""
        ends = [at + len(token) for token in self._specials if (at := text.find(token, start)) >= 0]
        stop = min(ends, default=start)
        answer = str(message.get("content") or "").rsplit("</think>", 1)[-1].strip()
        if stop == start or answer not in text[start:stop]:
            raise BadLine(f"message {index}: the template does not render the answer between its turn's start and end")
        return stop


def _object(line: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadLine(f"not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise BadLine(f"got a {type(content).__name__}, wanted an object")
    return content


def messages_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a line as OpenAI messages; raises BadLine."""
    if "messages" in content:
        messages = content["messages"]
    elif "conversations" in content:
        messages = _from_sharegpt(content["conversations"])
    else:
        raise BadLine(f"got the keys {sorted(content)[:5]}, wanted messages, conversations, or prompt_ids + answer_ids")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadLine("messages: wanted a list of objects")
    for index, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise BadLine(f"message {index}: wanted a role")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise BadLine(f"message {index}: wanted content of text (pictures and other parts are not supported)")
    return messages


def _from_sharegpt(turns: Any) -> list[dict[str, Any]]:
    if not isinstance(turns, Sequence) or not all(isinstance(turn, dict) for turn in turns):
        raise BadLine("conversations: wanted a list of objects")
    messages = []
    for index, turn in enumerate(turns):
        role = SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            raise BadLine(f"turn {index}: got from={turn.get('from')!r}, wanted one of {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": role, "content": turn.get("value")})
    return messages
