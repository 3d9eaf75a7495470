"""What servers are asked: the samples of a data set, or prompts that the verifier is to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dflash_scale.data.dataset import Samples
from dflash_scale.transport.messages import TOKEN_ID_BYTES


class Requests(Protocol):
    """Samples 0, 1, ... and what to ask for each. Token ids as bytes are int32, little-endian.

    answers: whether a server generates, so that a sample's tokens are known only when it has come.
    lengths: (samples,) int32, tokens of each sample, with an answer the most there can be.
    """

    answers: bool
    lengths: npt.NDArray[np.int32]

    def body(self, sample: int) -> dict[str, Any]:
        """Prompt and sampling of POST /v1/completions."""
        ...

    def problem(self, sample: int, token_ids: bytes) -> str | None:
        """Why these cannot be the tokens of the sample; None if they can."""
        ...


class SampleRequests:
    """The samples of a data set: all of their tokens are sent, and have to come back."""

    answers = False

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self.lengths = samples.lengths

    def body(self, sample: int) -> dict[str, Any]:
        return {"prompt": self._samples.tokens(sample).tolist(), "max_tokens": 1, "temperature": 0}

    def problem(self, sample: int, token_ids: bytes) -> str | None:
        same = token_ids == self._samples.tokens(sample).astype("<i4").tobytes()
        return None if same else "the token ids are not those of the sample"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are generated: at most `answer_tokens` tokens, and `max_tokens` of prompt and answer together;
    `temperature` 0 is greedy. What is not said here is the server's default: for vLLM the verifier's own
    generation_config.json, top_p and top_k among it."""

    answer_tokens: int
    max_tokens: int
    temperature: float


class PromptRequests:
    """Prompts, each (n,) int32 with n below `sampling.max_tokens`; what comes back goes on where the prompt ends."""

    answers = True

    def __init__(self, prompts: Sequence[npt.NDArray[np.int32]], sampling: Sampling) -> None:
        self._prompts, self._temperature = prompts, sampling.temperature
        sizes = np.array([len(prompt) for prompt in prompts], np.int32)
        self.lengths = np.minimum(sizes + np.int32(sampling.answer_tokens), np.int32(sampling.max_tokens))

    def body(self, sample: int) -> dict[str, Any]:
        prompt = self._prompts[sample]
        most = int(self.lengths[sample]) - len(prompt)
        return {"prompt": prompt.tolist(), "max_tokens": most, "temperature": self._temperature}

    def problem(self, sample: int, token_ids: bytes) -> str | None:
        prompt = self._prompts[sample].astype("<i4").tobytes()
        if not token_ids.startswith(prompt) or len(token_ids) == len(prompt):
            return "the token ids are not the prompt's and an answer's"
        if len(token_ids) > int(self.lengths[sample]) * TOKEN_ID_BYTES:
            return f"{len(token_ids) // TOKEN_ID_BYTES} tokens came, at most {self.lengths[sample]} were asked for"
        return None
