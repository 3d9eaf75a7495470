"""The optimizer of a run: AdamW, the learning rate over the steps, and the DeepSpeed engine that owns both."""

import math
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import distributed as dist

from dflash_scale.config.run import Config
from dflash_scale.drafter.model import Drafter


def lr_factor(step: int, total: int, warmup_ratio: float, floor: float) -> float:
    """Linear warm-up to 1, then a cosine to `floor`; `step` optimizer steps are completed."""
    warmup = max(1, round(warmup_ratio * total))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def engine_config(config: Config, world_size: int) -> dict[str, Any]:
    """DeepSpeed's dictionary: the user's, and the keys that follow from the rest of the configuration."""
    rows = config.train.rows_per_step
    derived: dict[str, Any] = {
        "train_batch_size": rows,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": rows // world_size,
        "gradient_clipping": config.train.clip,
    }
    if config.train.precision == "bf16":
        derived["bf16"] = {"enabled": True}
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    zero = {**config.deepspeed.get("zero_optimization", {}), "stage": config.zero_stage}
    return {"steps_per_print": 2**31 - 1, **config.deepspeed, "zero_optimization": zero, **derived}


def make_engine(config: Config, drafter: Drafter, total_steps: int) -> DeepSpeedEngine:
    """Hands the drafter to DeepSpeed, which owns weights, gradients and optimizer from here on."""
    train = config.train
    matrices = [p for p in drafter.parameters() if p.dim() == 2]
    norms = [p for p in drafter.parameters() if p.dim() == 1]  # weight decay would pull them from 1 to 0
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": train.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=train.lr,
        betas=train.betas,
        fused=True,  # one pass over weights, gradients and moments, on a CPU too
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, total_steps, train.warmup_ratio, train.min_lr_ratio)
    )
    settings = engine_config(config, dist.get_world_size())
    engine, *_ = deepspeed.initialize(model=drafter, optimizer=optimizer, lr_scheduler=scheduler, config=settings)
    return engine
