"""The configuration of one run: one JSON file, one pydantic model per section, every field with its unit.

    config = load_config("configs/zero2_dflash.json", ["train.lr=3e-4", "deepspeed.zero_optimization.stage=3"])
    shares = resolve(config, world_size=8)

Everything that can be wrong in the file alone is found here, before a GPU, a server or the network is touched.
Errors are `ValueError`s with one line per problem: what, got, wanted, what to do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from dflash_scale.config.drafter import DrafterSection, Section
from dflash_scale.config.errors import explain
from dflash_scale.config.sections import (
    DERIVED_DEEPSPEED_KEYS,
    DataSection,
    LossSection,
    TrainSection,
    VerifierSection,
    default_gamma,
)
from dflash_scale.config.stream import StreamSection


class Config(Section):
    verifier: VerifierSection
    drafter: DrafterSection = DrafterSection()
    data: DataSection
    stream: StreamSection = StreamSection()
    loss: LossSection = LossSection()
    train: TrainSection = TrainSection()
    deepspeed: dict[str, Any] = Field(
        default={"zero_optimization": {"stage": 2}},
        description="DeepSpeed's own dictionary, passed on as it is; zero_optimization.stage is 1, 2 or 3.",
    )

    @field_validator("deepspeed")
    @classmethod
    def _not_twice(cls, given: dict[str, Any]) -> dict[str, Any]:
        for key in given:
            if key in DERIVED_DEEPSPEED_KEYS:
                raise ValueError(
                    f"deepspeed.{key}: do not set this, it is computed; remove it and set {DERIVED_DEEPSPEED_KEYS[key]}"
                )
        zero = given.get("zero_optimization", {})
        stage = zero.get("stage", 2) if isinstance(zero, dict) else zero
        if isinstance(stage, bool) or stage not in (1, 2, 3):
            raise ValueError(
                f"deepspeed.zero_optimization.stage: got {json.dumps(stage)}, wanted 1, 2 or 3; set one of them"
            )
        return given

    @model_validator(mode="after")
    def _only_fake_makes_up(self) -> Config:
        if self.stream.mode != "fake":
            _ = self.data.folder
        elif self.drafter.mask_token_id is None:
            raise ValueError(
                'drafter.mask_token_id: got none with stream.mode "fake", wanted a token id because no tokenizer is '
                "read; set one that the data set does not hold"
            )
        elif self.data.path is None and self.data.exclude is not None:
            raise ValueError(
                f"data.exclude: got {self.data.exclude} for samples that are made up, wanted none; remove it or give "
                "data.path"
            )
        return self

    @model_validator(mode="after")
    def _exclusion_stands_still(self) -> Config:
        written = self.train.quarantine_file
        if self.data.exclude is not None and Path(self.data.exclude).resolve() == written.resolve():
            raise ValueError(
                f"data.exclude: got {self.data.exclude}, which this run itself appends to, wanted a file that stays as "
                "it is; copy it"
            )
        return self

    @model_validator(mode="after")
    def _blocks_fit_a_row(self) -> Config:
        if self.data.row_tokens < self.drafter.block_size:
            raise ValueError(
                f"data.row_tokens: got {self.data.row_tokens}, wanted at least drafter.block_size = "
                f"{self.drafter.block_size}; raise it"
            )
        return self

    @model_validator(mode="after")
    def _pruned_labels_are_known(self) -> Config:
        if self.drafter.vocab_size is not None and self.loss.labels != "data":
            raise ValueError(
                f'loss.labels: got "{self.loss.labels}" with drafter.vocab_size = {self.drafter.vocab_size}, wanted '
                '"data" because which labels are outside the vocabulary has to be known before the step; set it'
            )
        return self

    @property
    def zero_stage(self) -> int:
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 2))

    @property
    def gamma(self) -> float:
        """Decay constant in slots: as configured, else from the block size."""
        return default_gamma(self.drafter.block_size) if self.loss.gamma is None else self.loss.gamma

    def dump(self) -> str:
        """The configuration as JSON text; `parse_config(json.loads(config.dump())) == config`."""
        return self.model_dump_json(indent=2)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What one optimizer step is at a given world size."""

    world_size: int  # ranks
    micro_steps: int  # rows per rank and optimizer step


def resolve(
    config: Config, world_size: int, *, token_bytes: int | None = None, longest_sample: int | None = None
) -> Resolved:
    """Checks what depends on the world size and, once known, on the bytes of one token's hidden states.

    `longest_sample` is in tokens; without it a sample may be as long as a row. Raises ValueError.
    """
    rows = config.train.rows_per_step
    if world_size < 1 or rows % world_size:
        nearest = world_size * math.ceil(rows / world_size) if world_size > 0 else rows
        raise ValueError(
            f"train.rows_per_step: got {rows} with {world_size} ranks, wanted a multiple of the number of ranks; "
            f"use --set train.rows_per_step={nearest} or another number of ranks"
        )
    if token_bytes is not None:
        tokens = min(config.data.row_tokens, longest_sample or config.data.row_tokens)
        wanted = 2 * tokens * token_bytes
        names: dict[str, list[str]] = {"fake": [], "offline": ["ring_bytes"]}
        for name in names.get(config.stream.mode, ["ring_bytes", "server_credit_bytes"]):
            given = getattr(config.stream, name)
            # Half a ring would let one long sample block the next; credit needs room for one sample only.
            least = wanted if name == "ring_bytes" else wanted // 2
            if given < least:
                raise ValueError(
                    f"stream.{name}: got {given}, wanted at least {least} bytes because the longest sample has "
                    f"{tokens} tokens of {token_bytes} bytes; use --set stream.{name}={least} or a smaller "
                    "data.row_tokens"
                )
    return Resolved(world_size=world_size, micro_steps=rows // world_size)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a run's JSON and applies `section.key=value` overrides (JSON values; bare words are strings)."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_no_repeats)
    except OSError as error:
        raise ValueError(
            f"configuration {path}: cannot be read ({error.strerror}); give the path of a JSON file"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"configuration {path}: not valid JSON ({error}); correct the file there") from None
    if not isinstance(content, dict):
        raise ValueError(f"configuration {path}: got a {type(content).__name__}, wanted an object of sections")
    for override in overrides:
        _apply(content, override)
    return parse_config(content, str(path))


def parse_config(content: Mapping[str, Any], origin: str = "the configuration") -> Config:
    """Validates a dictionary as JSON would give it; errors name `origin`."""
    try:
        return Config.model_validate_json(json.dumps(content))
    except ValidationError as error:
        lines = [explain(problem, Config) for problem in error.errors(include_url=False)]
        raise ValueError("\n".join([f"{origin}: {len(lines)} problem(s)", *(f"  {line}" for line in lines)])) from None


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"configuration: got the key {key!r} twice in one object, wanted it once; drop one")
    return dict(pairs)


def _apply(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    *parents, last = name.strip().split(".")
    if not equals or not parents or not all([*parents, last]):
        raise ValueError(f"--set: got {override!r}, wanted section.key=value, for example train.lr=3e-4")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    at = content
    for key in parents:
        at = at.setdefault(key, {})
        if not isinstance(at, dict):
            raise ValueError(f"--set {override}: {key!r} holds a value, not keys; set the whole of it as JSON")
    at[last] = value
