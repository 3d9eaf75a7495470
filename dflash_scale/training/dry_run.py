"""The dry run, `--plan`: what a run resolves to, without a GPU, a server or the network.

Counts and bytes of the stream are exact; memory of a GPU is an estimate (memory.py).

A anchors in a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from dflash_scale.config.run import Config, resolve
from dflash_scale.data.dataset import Prepared, Samples
from dflash_scale.data.schedule import Place, RowSchedule, schedule_spec
from dflash_scale.drafter.model import Drafter
from dflash_scale.training.fake import run_data
from dflash_scale.training.memory import Memory, Sizes, chunk_slots, gpu_memory, row_buffers
from dflash_scale.training.run import UNKNOWN_MASK, ResolvedRun, resolve_run, resolve_verifier
from dflash_scale.verifier.files import load_tokenizer

GPUS_PER_NODE = 8  # what "per node" means in the printout
ASSUMED_DOCUMENT = 3072  # tokens, where there is no data set yet: the paper's length (arXiv 2602.06036)
Lines = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a dry run knows of a run; `print_dry_run` writes it out. Bytes, tokens and counts."""

    run: ResolvedRun  # its vocabulary is None before there is a data set, too
    mask: str  # the mask token, in words: its id is only known where the tokenizer is
    world_size: int
    micro_steps: int
    trainable: int  # parameters
    frozen: int  # parameters of the verifier's embedding, norm and LM head
    most_anchors: int  # of one row, at most
    anchors: int  # that memory is estimated for
    data: Prepared | None
    schedule: RowSchedule | None
    memory: Memory


def make_dry_run(config: Config, world_size: int) -> DryRun:
    """The dry run of a configuration; raises ValueError for what cannot be run on `world_size` ranks."""
    verifier = resolve_verifier(config)
    shape, layouts = verifier.shape, verifier.layouts
    written = config.data.path is None or Path(config.data.path).exists()
    data = run_data(config.data, shape.vocab_size) if written else None
    longest = int(data.manifest["longest"]) if data is not None else None
    shares = resolve(config, world_size, token_bytes=layouts.validation.bytes_per_token, longest_sample=longest)
    tokenizer = local_tokenizer(verifier.model)
    run = resolve_run(config, verifier, tokenizer, data.train if data is not None else None)
    with torch.device("meta"):
        trainable = sum(parameter.numel() for parameter in Drafter(run.spec).parameters())
    pruned = config.drafter.vocab_size
    rows = shape.vocab_size * (1 if shape.tie_word_embeddings else 2) + (pruned or 0)
    frozen = rows * shape.hidden_size + shape.hidden_size
    schedule = schedule_of(config, data, world_size) if data is not None else None
    most = most_anchors(config, schedule)
    per_document, tokens = config.data.anchors_per_document, config.data.row_tokens
    anchors = most if schedule is not None else min(most, max(per_document, per_document * tokens // ASSUMED_DOCUMENT))
    sizes = Sizes(world_size, trainable, frozen, pruned or shape.vocab_size, anchors)
    return DryRun(
        run=run,
        mask=mask_in_words(run, tokenizer),
        world_size=world_size,
        micro_steps=shares.micro_steps,
        trainable=trainable,
        frozen=frozen,
        most_anchors=most,
        anchors=anchors,
        data=data,
        schedule=schedule,
        memory=gpu_memory(config, run.spec, layouts, sizes),
    )


def local_tokenizer(model: str) -> Any:
    """The verifier's tokenizer if it is on this machine, else None."""
    try:
        return load_tokenizer(model, allow_network=False)
    except ValueError:
        return None


def mask_in_words(run: ResolvedRun, tokenizer: Any) -> str:
    """The mask token and where it is from, as far as it is known."""
    mask = run.spec.mask_token_id
    if run.config.drafter.mask_token_id is not None:
        return f"{mask}, as configured"
    if mask == UNKNOWN_MASK:
        return "unknown until the tokenizer is here: its own, or an unused row of the embedding"
    return f"{mask}, {'its own' if mask == tokenizer.mask_token_id else 'an unused row of the embedding'}"


def schedule_of(config: Config, data: Prepared, world_size: int) -> RowSchedule:
    """The run's schedule, the same that the ranks will follow."""
    return RowSchedule(Samples(data.train, data.validation), schedule_spec(config, world_size))


def most_anchors(config: Config, schedule: RowSchedule | None) -> int:
    """An upper bound of A: over the rows of the schedule, else for documents so short that every token is an anchor."""
    if schedule is None:
        return config.data.row_tokens - 1
    steps = range(1, min(schedule.steps_per_epoch, schedule.total_steps) + 1)
    rows = [
        row for step in steps for rank in range(schedule.spec.world_size) for row in schedule.train_rows(rank, step)
    ]
    return max(sum(_anchors(place, config.data.anchors_per_document) for place in row.places) for row in rows)


def _anchors(place: Place, per_document: int) -> int:
    return min(per_document, place.length - 1)  # the last token has no successor to predict


def size(count: float) -> str:
    """Bytes for people: 402.7 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.1f} GB"


def print_dry_run(config: Config, world_size: int) -> str:
    """The dry run as text; raises ValueError for what cannot be run."""
    dry = make_dry_run(config, world_size)
    sections = {
        f"Run on {world_size} ranks": _processes(dry),
        "Verifier and drafter": _models(dry),
        "Stream": _stream(dry),
        "Schedule": _schedule(dry),
        "Memory of one GPU (estimate)": _memory(dry),
    }
    width = max(len(name) for lines in sections.values() for name, _ in lines)
    return "\n\n".join(
        "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in lines)])
        for title, lines in sections.items()
    )


def _processes(dry: DryRun) -> Lines:
    nodes, mode = -(-dry.world_size // GPUS_PER_NODE), dry.run.config.stream.mode
    return [
        ("training ranks", f"{dry.world_size}, one per GPU, up to {GPUS_PER_NODE} per node"),
        ("receivers", "none" if mode == "fake" else f"{nodes}, one per node"),
        *(
            (f"server {index}", f"{server.name}, hidden states from {server.zmq}")
            for index, server in enumerate(dry.run.config.stream.servers)
            if mode in ("online", "hybrid")
        ),
        ("ZeRO stage", str(dry.run.config.zero_stage)),
        ("output", dry.run.config.train.output_dir),
    ]


def _models(dry: DryRun) -> Lines:
    run, layers, shape = dry.run, dry.run.spec.layers, dry.run.verifier.shape
    rope = cast(dict[str, object], layers.rope_parameters)
    attention = f"{layers.num_attention_heads} query and {layers.num_key_value_heads} key heads of {layers.head_dim}"
    return [
        ("verifier", f"{run.verifier.model} ({shape.model_type}, {shape.layers} layers of {shape.hidden_size})"),
        (
            "aux layers",
            f"{list(run.spec.layer_ids)}, and {shape.layers} for the verifier's logits (k = residual after k layers)",
        ),
        ("drafter", f"{layers.num_hidden_layers} layers of {layers.hidden_size}, MLP {layers.intermediate_size}"),
        ("attention", f"{attention}; blocks {'causal' if run.spec.causal_block else 'bidirectional'}"),
        *_layer_kinds(dry),
        ("rotary embedding", ", ".join(f"{name} {value}" for name, value in rope.items())),
        ("mask token", dry.mask),
        ("vocabulary", _vocabulary(dry)),
        ("block size", f"{run.spec.block_size}: the anchor and {run.spec.block_size - 1} drafts"),
        ("trainable parameters", f"{dry.trainable:,}, from {run.config.drafter.init_from or 'random weights'}"),
        ("frozen parameters", f"{dry.frozen:,} (the verifier's embedding, final norm and head)"),
    ]


def _vocabulary(dry: DryRun) -> str:
    run, rows = dry.run, dry.run.verifier.shape.vocab_size
    size = run.config.drafter.vocab_size
    if size is None:
        return f"all {rows:,} tokens"
    if run.vocabulary is None:
        return f"{size:,} of {rows:,} tokens; what they cover is unknown until the data set is prepared"
    return f"{size:,} of {rows:,} tokens, {100 * run.vocabulary.coverage:.2f} % of the answers' tokens"


def _layer_kinds(dry: DryRun) -> Lines:
    spec = dry.run.spec
    windows = [spec.window(layer) for layer in range(spec.layers.num_hidden_layers)]
    if not any(windows):
        return [("layers", "all with full attention")]
    return [("layers", ", ".join(f"window {window}" if window else "full" for window in windows))]


def _stream(dry: DryRun) -> Lines:
    config, layouts = dry.run.config, dry.run.verifier.layouts
    per_token, validation = layouts.train.bytes_per_token, layouts.validation.bytes_per_token
    ranks = min(dry.world_size, GPUS_PER_NODE)
    row = config.data.row_tokens * validation
    more = f"; {validation:,} in validation, with the last layer" if validation > per_token else ""
    lines = [
        ("mode", config.stream.mode + (f", cache {config.stream.cache}" if config.stream.cache else "")),
        ("hidden states", f"{per_token:,} bytes per token, {layouts.train.dtype}{more}"),
        ("one row", f"{config.data.row_tokens} tokens, {size(row)} at most"),
    ]
    if config.stream.mode == "fake":
        return lines  # drawn on the device: nothing travels
    return [
        *lines,
        ("ring of a rank", size(config.stream.ring_bytes)),
        ("shared memory per node", f"{size(ranks * config.stream.ring_bytes)} ({ranks} rings, page-locked)"),
        (
            "credit",
            f"{size(config.stream.credit_bytes)} in flight to a receiver, {size(config.stream.server_credit_bytes)} "
            "from one server",
        ),
    ]


def _schedule(dry: DryRun) -> Lines:
    config, rows = dry.run.config, dry.run.config.train.rows_per_step
    known = "in the data set's rows" if dry.data is not None else "if all documents are short"
    lines = [
        ("optimizer step", f"{rows} rows = {dry.world_size} ranks × {dry.micro_steps} micro-steps"),
        ("tokens per step", f"{rows * config.data.row_tokens:,} at most"),
        ("anchors per row", f"{dry.most_anchors:,} at most, {known}; {config.data.anchors_per_document} per document"),
        ("anchors per step", f"{rows * dry.most_anchors:,} at most"),
    ]
    if dry.data is None or dry.schedule is None:
        return [*lines, ("steps per epoch", f"unknown until prepared ({config.data.path} does not exist)")]
    schedule = dry.schedule
    validation, cached = len(dry.data.validation), config.stream.mode != "fake"
    tokens = int(dry.data.train.lengths.sum() + dry.data.validation.lengths.sum())
    return [
        *lines,
        ("samples", f"{len(dry.data.train):,} to train on, {validation:,} for validation"),
        *([("a whole cache", size(tokens * dry.run.verifier.layouts.validation.bytes_per_token))] if cached else []),
        ("steps per epoch", f"{schedule.steps_per_epoch:,}"),
        ("steps", f"{schedule.total_steps:,}"),
    ]


def _memory(dry: DryRun) -> Lines:
    memory, config, world = dry.memory, dry.run.config, dry.world_size
    stage = config.zero_stage
    slots = dry.anchors * dry.run.spec.block_size
    rows = "the fullest row" if dry.data is not None else f"a row of {ASSUMED_DOCUMENT}-token documents"
    vocabulary = config.drafter.vocab_size or dry.run.verifier.shape.vocab_size
    dense = config.drafter.attention_backend == "reference"
    scores = "dense scores (drafter.attention_backend is reference)" if dense else "statistics, no scores"

    def share(first_stage: int) -> str:
        return f" (1/{world} of all, ZeRO {stage})" if stage >= first_stage else ""

    return [
        ("parameters", size(memory.parameters) + share(3)),
        ("gradients, fp32", size(memory.gradients) + share(2)),
        ("optimizer", size(memory.optimizer) + share(1)),
        ("frozen weights", size(memory.frozen)),
        ("activations", f"{size(memory.activations)} at {slots:,} slots ({dry.anchors:,} anchors, {rows})"),
        ("attention", f"{size(memory.attention)} of {scores}"),
        ("loss", f"{size(memory.loss)} for chunks of {chunk_slots(config, vocabulary)} slots"),
        (f"hidden states of {row_buffers(config)} rows", size(memory.rows)),
        ("sum", size(memory.total)),
    ]
