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
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from dflash_scale.config_drafter import DrafterSection, Positive, Section
from dflash_scale.config_errors import explain
from dflash_scale.config_stream import StreamSection
from dflash_scale.quarantine import FILE_NAME

# DeepSpeed keys that follow from this file. Given twice they could disagree, so they may not be given there.
DERIVED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.rows_per_step",
    "train_micro_batch_size_per_gpu": "train.rows_per_step (a micro-step is one row of data.row_tokens tokens)",
    "gradient_accumulation_steps": "train.rows_per_step (micro-steps = rows_per_step / world size)",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "gradient_clipping": "train.clip",
    "optimizer": "train.lr, train.weight_decay and train.betas",
    "scheduler": "train.warmup_ratio and train.min_lr_ratio",
}


class VerifierSection(Section):
    model: str = Field(min_length=1, description="Verifier: a local folder or a hub id, as the servers serve it.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="dtype of the streamed hidden states; auto = the dtype in the verifier's config.json.",
    )
    layer_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None,
        strict=False,
        description="Aux layers, ascending; id k = residual after k decoder layers (0 = embedding output). "
        "null = 5 of them, uniformly from the 2nd to the 3rd last layer.",
    )

    @field_validator("layer_ids")
    @classmethod
    def _ascending(cls, ids: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if ids is not None and (not ids or list(ids) != sorted(set(ids))):
            raise ValueError("at least one layer id, ascending, without repeats")
        return ids


class DataSection(Section):
    path: str | None = Field(
        default=None,
        min_length=1,
        description="Folder that `dflash-scale prepare` wrote; null in stream.mode fake alone, which then makes up "
        "samples.",
    )
    exclude: str | None = Field(
        default=None,
        min_length=1,
        description="A quarantined.jsonl of an earlier run on the same data set, whose samples are left out.",
    )
    row_tokens: Positive = Field(default=8192, description="Tokens of one packed row, the unit of a micro-step.")
    anchors_per_document: Positive = Field(default=512, description="Anchors drawn per document and epoch, at most.")

    @property
    def folder(self) -> Path:
        """`path`, of a run that needs one. Raises ValueError if none is given."""
        if self.path is None:
            raise ValueError("data.path: got none, wanted a folder that `dflash-scale prepare` wrote; name one")
        return Path(self.path)


class LossTerms(Section):
    ce: float = Field(default=0.0, ge=0, description="Cross entropy of the label, -log p(y).")
    kl: float = Field(
        default=0.0, ge=0, description="KL divergence of the drafter's p from the verifier's q: sum of q log(q/p)."
    )
    reverse_kl: float = Field(default=0.0, ge=0, description="KL divergence the other way: sum of p log(p/q).")
    tv: float = Field(default=0.0, ge=0, description="Total variation distance: half the sum of absolute differences.")

    @model_validator(mode="after")
    def _one(self) -> LossTerms:
        if not any(self.weights.values()):
            raise ValueError(
                f"loss.terms: got no weight above 0, wanted at least one of {', '.join(self.weights)}; give it one in "
                'the file, for example {"ce": 1.0}, or with --set loss.terms.ce=1'
            )
        return self

    @property
    def weights(self) -> dict[str, float]:
        """By the terms' names."""
        return {name: getattr(self, name) for name in type(self).model_fields}


class LossSection(Section):
    terms: LossTerms = Field(
        default=LossTerms(ce=1.0),
        description="Weight of each term of the loss; where it is given, terms that are not named have weight 0.",
    )
    labels: Literal["data", "verifier"] = Field(
        default="data",
        description="Label of a slot: the data's token, or the verifier's argmax at the position before it.",
    )
    weights: Literal["decay", "dpace"] = Field(
        default="decay", description="Weights of the slots: exp decay, or D-PACE."
    )
    gamma: float | None = Field(
        default=None,
        gt=0,
        description="Decay constant in slots, w_k = exp(-(k-1)/gamma); null = by block size: 4, 5, 7 for 8, 10, 16.",
    )
    dpace_alpha: float = Field(default=0.5, gt=0, le=1, description="D-PACE floor of a slot's confidence, 0 to 1.")
    chunk_slots: Positive | None = Field(
        default=None, description="Slots whose logits are held at once; null = by the device's memory."
    )
    kernel: Literal["auto", "cuda", "cpu", "torch"] = Field(
        default="auto",
        description="Loss kernel; auto = the compiled one that is proven on the device, else plain torch.",
    )


class TrainSection(Section):
    output_dir: str = Field(
        default="runs/dflash", min_length=1, description="Folder of checkpoints, metrics and ledgers."
    )
    epochs: Positive = Field(default=6, description="Passes over the data set.")
    max_steps: Positive | None = Field(
        default=None, description="Optimizer steps after which the run ends; null = no limit."
    )
    rows_per_step: Positive = Field(
        default=8, description="Rows of one optimizer step, over all ranks and micro-steps."
    )
    lr: float = Field(default=6e-4, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(
        default=0.0, ge=0, description="Decoupled weight decay of AdamW, per unit of learning rate."
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.95), strict=False, description="Moment decays of AdamW, each in [0, 1)."
    )
    warmup_ratio: float = Field(
        default=0.04, ge=0, lt=1, description="Share of all steps in which lr rises linearly to its peak."
    )
    min_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="lr at the end of the cosine, as a share of the peak."
    )
    clip: float = Field(default=1.0, gt=0, description="Global gradient norm above which gradients are scaled down.")
    precision: Literal["bf16", "fp32"] = Field(
        default="bf16", description="Compute dtype; fp32 is for tests and CPU runs."
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Keep only the input of each drafter layer for the backward, and compute the rest again there: "
        "less memory for about a third more work.",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of initialisation, shuffling and anchors.")
    checkpoint_every: Positive = Field(default=500, description="Optimizer steps between checkpoints.")
    keep_checkpoints: Positive = Field(default=3, description="Newest checkpoints kept; the best one is kept besides.")
    validate_every: int = Field(default=500, ge=0, description="Optimizer steps between validations; 0 = never.")
    log_every: Positive = Field(default=10, description="Optimizer steps between log lines.")
    tensorboard: bool = Field(default=False, description="Also write TensorBoard files into output_dir.")

    @field_validator("betas")
    @classmethod
    def _shares(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("two numbers in [0, 1)")
        return betas


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
                    f"deepspeed.{key}: got a value, wanted none because it is derived; "
                    f"remove it and use {DERIVED_DEEPSPEED_KEYS[key]}"
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
        written = Path(self.train.output_dir) / FILE_NAME
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


def default_gamma(block_size: int) -> float:
    """The paper's 4, 5 and 7 for 8, 10 and 16 slots (arXiv 2602.06036); straight lines between and beyond."""
    if block_size <= 10:
        return max(1.0, block_size / 2)
    return 5.0 + (block_size - 10) / 3


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
