import json
from typing import Any

import pytest

from dflash_scale.data.conversations import BadLine, Encoder
from tests.support.chats import CHATML, byte_tokenizer, chat

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: the last turn shows an (empty) thinking part, earlier turns lose theirs.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% if loop.last and '</think>' not in m.content %}<think>\n\n</think>\n\n{{ m.content }}"
    "{% elif loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1].strip() }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SHOUTING = "{% for m in messages %}[{{ m.role }}|{{ messages | length }}]{{ m.content | upper }}{% endfor %}"


def supervised(line: str, template: str | None, max_tokens: int = 10_000) -> str:
    tokenizer = byte_tokenizer(template)
    encoded = Encoder(tokenizer, len(tokenizer), max_tokens).encode(line)
    return tokenizer.decode(encoded.tokens[encoded.loss_mask])


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_answers_and_their_end_tokens_are_supervised_and_nothing_else(template: str) -> None:
    line = chat("What is 2+2?", "It is 4.", "Sûr ?", "Oui, 4 €.")
    assert supervised(line, template) == "It is 4.<|im_end|>Oui, 4 €.<|im_end|>"


def test_sharegpt_is_the_same_conversation() -> None:
    turns = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    messages = [
        {"role": role, "content": text} for role, text in [("system", "Be kind."), ("user", "Hi"), ("assistant", "Yo")]
    ]
    tokenizer = byte_tokenizer(CHATML)
    encoder = Encoder(tokenizer, len(tokenizer), 1000)
    one = encoder.encode(json.dumps({"conversations": turns}))
    other = encoder.encode(json.dumps({"messages": messages}))
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.loss_mask.tolist() == other.loss_mask.tolist()


def test_a_template_that_drops_old_thinking_still_gives_every_answer() -> None:
    line = chat("a?", "<think>\nhm\n</think>\n\nfirst", "b?", "second")
    assert supervised(line, THINKING) == "first<|im_end|>second<|im_end|>"


def test_thinking_that_was_sampled_is_supervised_and_an_empty_one_of_the_template_is_not() -> None:
    said = "<think>\nhm\n</think>\n\nanswer"
    assert supervised(chat("a?", said), THINKING) == f"{said}<|im_end|>"
    assert supervised(chat("a?", "answer"), THINKING) == "answer<|im_end|>"


def test_white_space_around_an_old_answer_does_no_harm() -> None:
    line = chat("a?", "<think>\nhm\n</think>\n\n first \n", "b?", "second")
    assert supervised(line, THINKING) == "first<|im_end|>second<|im_end|>"


def test_an_end_token_inside_an_answer_is_refused() -> None:
    line = chat("a?", "<think>x</think>fir<|im_end|>st", "b?", "second")
    with pytest.raises(BadLine, match="message 1: the template does not render the answer between"):
        supervised(line, THINKING)


def test_an_answer_equal_to_the_question_is_not_confused_with_it() -> None:
    tokenizer = byte_tokenizer(CHATML)
    encoded = Encoder(tokenizer, len(tokenizer), 1000).encode(chat("same", "same"))
    first = int(encoded.loss_mask.argmax())
    assert tokenizer.decode(encoded.tokens[:first]) == "<|im_start|>user\nsame<|im_end|>\n<|im_start|>assistant\n"


def test_boundaries_that_cannot_be_known_are_refused() -> None:
    with pytest.raises(BadLine, match="message 1: the template renders the turns before it differently"):
        supervised(chat("a", "b"), SHOUTING)


def test_ids_are_taken_as_they_are() -> None:
    tokenizer = byte_tokenizer(None)
    encoder = Encoder(tokenizer, 100, 6)
    encoded = encoder.encode('{"prompt_ids": [1, 2, 3], "answer_ids": [4, 99]}')
    assert encoded.tokens.tolist() == [1, 2, 3, 4, 99]
    assert encoded.loss_mask.tolist() == [False, False, False, True, True]
    assert not encoded.truncated
    cut = encoder.encode('{"prompt_ids": [1, 2, 3], "answer_ids": [4, 5, 6, 7]}')
    assert (cut.tokens.tolist(), cut.truncated) == ([1, 2, 3, 4, 5, 6], True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not valid JSON"),
        ("[1]", "got a list, wanted an object"),
        ('{"text": "x"}', "wanted messages, conversations, or prompt_ids"),
        ('{"messages": []}', "no assistant message"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant message"),
        ('{"messages": [{"content": "x"}]}', "message 0: wanted a role"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "message 0: wanted content of text"),
        ('{"conversations": [{"from": "alien", "value": "x"}]}', "turn 0: got from='alien', wanted one of human"),
        ('{"conversations": 3}', "conversations: wanted a list"),
        ('{"prompt_ids": [1]}', "answer_ids: wanted a list of integers"),
        ('{"prompt_ids": [true], "answer_ids": [1]}', "prompt_ids: wanted a list of integers"),
        ('{"prompt_ids": [1], "answer_ids": [100000]}', "answer_ids: got the token 100000, wanted 0 to 257"),
        ('{"prompt_ids": [-1], "answer_ids": [1]}', "prompt_ids: got the token -1"),
    ],
)
def test_bad_lines_give_their_reason(line: str, reason: str) -> None:
    with pytest.raises(BadLine) as caught:
        supervised(line, CHATML)
    assert reason in str(caught.value)


def test_a_template_that_raises_makes_a_bad_line() -> None:
    with pytest.raises(BadLine, match=r"the chat template refuses the conversation.*roles must alternate"):
        supervised(chat("a", "b"), "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadLine, match="no chat template"):
        supervised(chat("a", "b"), None)


def test_trainable_needs_two_supervised_tokens_in_a_row() -> None:
    tokenizer = byte_tokenizer(None)
    encoder = Encoder(tokenizer, 100, 4)

    def trainable(prompt: Any, answer: Any) -> bool:
        return encoder.encode(json.dumps({"prompt_ids": prompt, "answer_ids": answer})).trainable

    assert trainable([1], [2, 3])
    assert trainable([], [2, 3])
    assert not trainable([1], [2])
    assert not trainable([1], [])
    assert not trainable([1, 2, 3], [4, 5])  # the cut leaves one
    assert not trainable([], [])


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast, name_or_path = False, "old"

    with pytest.raises(ValueError, match="got a slow tokenizer, wanted a fast one"):
        Encoder(Slow(), 10, 10)


def prompt_of(line: str, template: str | None = CHATML, max_tokens: int = 1000) -> str:
    tokenizer = byte_tokenizer(template)
    return tokenizer.decode(Encoder(tokenizer, len(tokenizer), max_tokens).prompt(line))


def test_a_prompt_ends_where_the_last_answer_begins() -> None:
    asked = "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(chat("a?")) == prompt_of(chat("a?", "not the verifier's")) == asked
    assert prompt_of(chat("a?", "yes", "b?", "no")) == (
        "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n"
    )
    turns = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]
    assert prompt_of(json.dumps({"conversations": turns})) == f"<|im_start|>system\nbe brief<|im_end|>\n{asked}"
    tokenizer = byte_tokenizer(None)
    line = json.dumps({"prompt_ids": [3, 4], "answer_ids": [5]})
    assert Encoder(tokenizer, 10, 9).prompt(line).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("line", "template", "reason"),
    [
        ("[]", CHATML, "got a list, wanted an object"),
        ('{"prompt_ids": []}', CHATML, "the prompt has 0 tokens, wanted 1 to 28"),
        (chat("x" * 40), CHATML, "tokens, wanted 1 to 28"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', CHATML, "there is nothing to answer"),
        (chat("a?"), None, "no chat template"),
        ('{"prompt_ids": [3, 999]}', CHATML, "got the token 999"),
    ],
)
def test_a_line_without_a_prompt(line: str, template: str | None, reason: str) -> None:
    with pytest.raises(BadLine, match=reason):
        prompt_of(line, template, 30)
