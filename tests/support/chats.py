"""Conversations and a byte tokenizer with a chat template, for tests."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token per byte, besides the two marks of a turn; trained on nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def save_tokenizer(folder: Path, template: str = CHATML) -> str:
    byte_tokenizer(template).save_pretrained(folder)
    return str(folder)


def chat(*turns: str) -> str:
    """User and assistant by turns, as a line."""
    roles = ["user", "assistant"]
    return json.dumps({"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]})
