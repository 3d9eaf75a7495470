"""The `drafter` section of the configuration, and what all sections are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dflash_scale.verifier.rope import check_rope

LayerType = Literal["full_attention", "sliding_attention"]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    # strict: `"layers": true` and `"lr": "6e-4"` are mistakes, not numbers.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DrafterSection(Section):
    layers: Positive = Field(default=5, description="Decoder layers of the drafter.")
    block_size: int = Field(
        default=16, ge=2, description="Slots of a block: the anchor and block_size - 1 drafted tokens."
    )
    intermediate_size: Positive | None = Field(default=None, description="Width of the MLP; null = the verifier's.")
    heads: Positive | None = Field(default=None, description="Query heads; null = the verifier's.")
    kv_heads: Positive | None = Field(default=None, description="Key and value heads; null = the verifier's.")
    head_dim: Positive | None = Field(default=None, description="Numbers per head; null = the verifier's.")
    init_from: str | None = Field(
        default=None,
        min_length=1,
        description="Folder of an exported drafter (speculators or z-lab format) whose weights the run begins from; "
        "null = random ones.",
    )
    vocab_size: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="Tokens that the drafter can draft: the special ones and the data set's most frequent; "
        "null = the verifier's whole vocabulary.",
    )
    rope_parameters: dict[str, str | int | float | bool] | None = Field(
        default=None,
        description="Rotary embedding, as Transformers 5 writes it: rope_type default, linear, llama3 or yarn, "
        "rope_theta and what the type needs; null = the verifier's, of its full attention layers.",
    )
    mask_token_id: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Token id of the mask slots; null = the tokenizer's mask token or an unused embedding row.",
    )
    layer_types: tuple[LayerType, ...] | None = Field(
        default=None,
        strict=False,
        description="Attention of each drafter layer, one entry a layer; null = all full_attention.",
    )
    sliding_window: Positive | None = Field(
        default=None,
        description="Window of the sliding_attention layers, in tokens counted back from the query itself.",
    )
    causal_block: bool = Field(
        default=False, description="Slots see only earlier slots of their block (the paper: false)."
    )
    attention_backend: Literal["auto", "sm90", "sm80", "cpu", "flex", "reference"] = Field(
        default="auto",
        description="Attention kernel; auto = the fastest that is verified on the device; any other name = that "
        "kernel, or an error where it cannot run.",
    )
    pointwise: Literal["auto", "cuda", "torch"] = Field(
        default="auto",
        description="Kernels of norms, rotary embedding and SiLU; auto = cuda on a GPU once it is verified there, else "
        "plain torch.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> DrafterSection:
        if self.layer_types is not None and len(self.layer_types) != self.layers:
            raise ValueError(
                f"drafter.layer_types: got {len(self.layer_types)} entries, wanted drafter.layers = {self.layers}; "
                "give one entry a layer or leave it null"
            )
        sliding = "sliding_attention" in (self.layer_types or ())
        if sliding and self.sliding_window is None:
            raise ValueError(
                "drafter.sliding_window: got null, wanted a window in tokens because drafter.layer_types has "
                "sliding_attention layers; set it, for example to 2048"
            )
        if self.sliding_window is not None and not sliding:
            raise ValueError(
                f"drafter.sliding_window: got {self.sliding_window}, wanted null because no entry of "
                "drafter.layer_types is sliding_attention; name the sliding layers there or drop the window"
            )
        if self.rope_parameters is not None:
            check_rope(self.rope_parameters)
        if self.heads and self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(
                f"drafter.heads: got {self.heads}, wanted a multiple of drafter.kv_heads = {self.kv_heads}; "
                "change one of them"
            )
        return self
