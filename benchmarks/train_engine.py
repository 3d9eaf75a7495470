"""What of bench_train.py needs the run's configuration, and so pydantic: the planner's figure, and the training step
under DeepSpeed, as the trainer runs it."""

from __future__ import annotations

import os
import socket

import torch
from torch import Tensor, nn
from torch import distributed as dist

from benchmarks.train_cases import MASK_TOKEN, Case, Row, drafter_spec
from benchmarks.train_step import Options, Step
from dflash_scale.config.run import Config, parse_config
from dflash_scale.drafter.model import Drafter
from dflash_scale.receiver.layouts import run_layouts
from dflash_scale.training.memory import Sizes, gpu_memory
from dflash_scale.verifier.shape import VerifierShape


def run_config(case: Case, options: Options) -> Config:
    """The configuration of a run on one rank whose rows are the case's."""
    return parse_config(
        {
            "verifier": {"model": case.name, "layer_ids": list(range(1, case.aux_layers + 1))},
            "drafter": {
                "layers": case.layers,
                "block_size": case.block,
                "intermediate_size": case.inner,
                "heads": case.heads,
                "kv_heads": case.kv_heads,
                "head_dim": case.head_dim,
                "mask_token_id": MASK_TOKEN,
                "attention_backend": options.attention,
                "pointwise": options.pointwise,
            },
            "data": {"path": case.name, "row_tokens": case.tokens, "anchors_per_document": case.anchors},
            "loss": {"terms": {case.term: 1.0}, "kernel": options.loss},
            "train": {
                "precision": "bf16" if case.dtype == "bfloat16" else "fp32",
                "rows_per_step": options.rows,
                "activation_checkpointing": case.recompute,
            },
            "deepspeed": {"zero_optimization": {"stage": 2}},
        }
    )


def verifier_shape(case: Case) -> VerifierShape:
    layers = drafter_spec(case).layers
    return VerifierShape(
        model_type="qwen3",
        hidden_size=case.hidden,
        layers=case.aux_layers + 1,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        intermediate_size=case.inner,
        vocab_size=case.vocabulary,
        max_position_embeddings=layers.max_position_embeddings,
        rms_norm_eps=layers.rms_norm_eps,
        rope_parameters=dict(layers.rope_parameters or {}),
        tie_word_embeddings=False,
        dtype=case.dtype,
    )


def planned_bytes(case: Case, row: Row, options: Options) -> int:
    """What the planner says that one GPU holds of this row, without the row buffers, which the benchmark has not: its
    row's hidden states are among the activations."""
    config, spec, shape = run_config(case, options), drafter_spec(case), verifier_shape(case)
    with torch.device("meta"):
        trainable = sum(parameter.numel() for parameter in Drafter(spec).parameters())
    frozen = 2 * case.vocabulary * case.hidden
    sizes = Sizes(1, trainable, frozen, case.vocabulary, len(row.anchors))
    memory = gpu_memory(config, spec, run_layouts(config, shape), sizes)
    return memory.total - memory.rows


class EngineStep(Step):
    """The same step through DeepSpeed on one rank: bf16 or fp32 as the case, ZeRO 2, the trainer's own optimizer."""

    def take_over(self) -> None:
        from dflash_scale.training.distributed import join_ranks
        from dflash_scale.training.optim import make_engine

        if not dist.is_initialized():
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0"}
            os.environ.update(alone, WORLD_SIZE="1")
            join_ranks(torch.device(self.options.device))
        self.every = self.options.rows
        self.engine = make_engine(run_config(self.case, self.options), self.drafter, total_steps=1000)

    def model(self) -> nn.Module:
        return self.engine

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def accumulate(self) -> None:
        """Done in the backward."""

    def due(self) -> bool:
        return self.engine.is_gradient_accumulation_boundary()

    def update(self) -> None:
        self.engine.step()

    def gradient(self) -> Tensor:
        from deepspeed.utils import safe_get_full_grad

        return torch.cat([safe_get_full_grad(p).float() for p in self.drafter.parameters() if p.dim() == 1])

    def close(self) -> None:
        self.engine.destroy()
