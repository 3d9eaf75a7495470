"""Sections of the configuration: every key, its default and its unit. Drafter and stream have files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dflash_scale.config.drafter import Positive, Section

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
        description="Aux layers, ascending; id k = hidden states after k decoder layers (0 = embeddings). "
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
    row_tokens: Positive = Field(default=8192, description="Tokens of one row (packed sequence), a micro-step.")
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
        description="Loss kernel; auto = the compiled one that is verified on the device, else plain torch.",
    )

    @property
    def needs_verifier(self) -> bool:
        """Whether training needs the verifier's logits: all terms but the cross entropy compare with them."""
        soft = any(weight for name, weight in self.terms.weights.items() if name != "ce")
        return soft or self.labels == "verifier"


class TrainSection(Section):
    output_dir: str = Field(
        default="runs/dflash", min_length=1, description="Folder of checkpoints, metrics and ledgers."
    )
    epochs: Positive = Field(default=6, description="Passes over the data set.")
    max_steps: Positive | None = Field(
        default=None, description="Optimizer steps after which the run ends; null = no limit."
    )
    rows_per_step: Positive = Field(
        default=8, description="Rows (packed sequences) of one optimizer step, over all ranks: the global batch."
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
    clip: float = Field(default=1.0, gt=0, description="Max gradient norm: a larger global norm is scaled down to it.")
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
    keep_checkpoints: Positive = Field(default=3, description="Newest checkpoints kept; the best one is kept too.")
    validate_every: int = Field(default=500, ge=0, description="Optimizer steps between validations; 0 = never.")
    log_every: Positive = Field(default=10, description="Optimizer steps between log lines.")
    tensorboard: bool = Field(default=False, description="Also write TensorBoard files into output_dir.")

    @property
    def quarantine_file(self) -> Path:
        """Where the samples that no server could answer are written to (data/quarantine.py)."""
        return Path(self.output_dir) / "quarantined.jsonl"

    @field_validator("betas")
    @classmethod
    def _shares(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("two numbers in [0, 1)")
        return betas


def default_gamma(block_size: int) -> float:
    """The paper's 4, 5 and 7 for 8, 10 and 16 slots (arXiv 2602.06036); straight lines between and beyond."""
    if block_size <= 10:
        return max(1.0, block_size / 2)
    return 5.0 + (block_size - 10) / 3
