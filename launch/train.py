"""Trains a drafter: `deepspeed launch/train.py --config configs/zero2_dflash.json [--set section.key=value ...]`.

One process per GPU (on a CPU: as many as --num_accelerators says), started by the `deepspeed` launcher. `--plan` prints
what the run resolves to and exits, without a GPU, a server or the network.
"""

import argparse
import json
import logging
import os
import secrets
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist

from dflash_scale.config import Config, load_config, resolve
from dflash_scale.hidden_states import run_layouts
from dflash_scale.plan import print_plan
from dflash_scale.prompts import check_tokenizer, load_prepared
from dflash_scale.verifier.shape import verifier_shape

if TYPE_CHECKING:
    from dflash_scale.trainer import Trainer

log = logging.getLogger("train")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="JSON file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint in output_dir")
    parser.add_argument("--plan", action="store_true", help="print the resolved run and exit")
    parser.add_argument("--world", type=int, default=8, help="ranks (GPUs) to plan for, with --plan")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    rank = int(os.environ.get("RANK", "0"))
    # DeepSpeed calls collectives by names that torch is renaming; nothing that a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(name)s: %(message)s")
    try:
        config = load_config(args.config, args.set)
        if args.plan:
            if rank == 0:
                print(print_plan(config, args.world))
            return 0
        resolve(config, int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        return refuse(error)
    return run(config, resume=args.resume)


def local_place() -> tuple[int, int]:
    """This rank's number on its node, and the ranks there: deepspeed's names, and torchrun's."""
    environment = os.environ
    local_size = environment.get("LOCAL_SIZE") or environment.get("LOCAL_WORLD_SIZE") or "1"
    return int(environment.get("LOCAL_RANK", "0")), int(local_size)


def start_ranks() -> tuple[torch.device, dist.ProcessGroup]:
    """Joins the process group; returns this rank's device and a group for what stays on the CPU."""
    from dflash_scale.ranks import follow_launcher, join_ranks

    local_rank, local_size = local_place()
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    threading.Thread(target=follow_launcher, name="follow-launcher", daemon=True).start()
    return device, join_ranks(device)


def run(config: Config, *, resume: bool) -> int:
    """The whole run of one rank. Returns 0 when the schedule is complete, 143 when a signal ended it early, 2 when the
    configuration, the data set, the verifier and the checkpoint do not fit together, 3 when the books do not balance.
    """
    from dflash_scale.ranks import leave_ranks

    device, control = start_ranks()
    try:
        trainer, close = set_up(config, device, control, resume=resume)
    except ValueError as error:
        return refuse(error)
    try:
        complete = trainer.run()
    finally:
        close()
    leave_ranks()
    if trainer.unbalanced:
        return 3  # the trainer's log says which epoch
    return 0 if complete else 143


def refuse(error: ValueError) -> int:
    """One line for the person, the traceback for whoever sets the log level to debug."""
    log.debug("refused", exc_info=error)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # once a node: what is missing may be missing on that node alone
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


def set_up(
    config: Config, device: torch.device, control: dist.ProcessGroup, *, resume: bool
) -> "tuple[Trainer, Callable[[], None]]":
    """Makes everything that a run works with, servers last; returns the trainer, and what ends the stream.

    Raises:
        ValueError: what was given does not fit together.
    """
    from dflash_scale.assembler import AssemblerSpec, RowAssembler
    from dflash_scale.checkpoint import Checkpoints, Position
    from dflash_scale.cuda_copier import CudaCopier
    from dflash_scale.drafter.model import Drafter, drafter_spec
    from dflash_scale.drafter.pretrained import load_start
    from dflash_scale.packer import AnchorSpec, RowSchedule, Samples, schedule_spec
    from dflash_scale.quarantine import read_exclusion
    from dflash_scale.ranks import check_alike, check_shared
    from dflash_scale.receiver.client import RankPlace, Stream
    from dflash_scale.row_memory import Copier, HostCopier
    from dflash_scale.stream.cache import CacheOrigin, claim
    from dflash_scale.stream.keys import receiver_keys
    from dflash_scale.trainer import Parts, Trainer
    from dflash_scale.training.optim import make_engine
    from dflash_scale.verifier.identity import origin_of
    from dflash_scale.verifier.shape import mask_token_id
    from dflash_scale.verifier_head import load_verifier_head
    from dflash_scale.vocabulary import run_vocabulary

    rank, world, train = dist.get_rank(), dist.get_world_size(), config.train
    output, run_id = Path(train.output_dir), shared_run_id(control)
    check_shared(output, run_id, control)

    # What is trained when: a function of the data set and the configuration alone.
    prepared = load_prepared(Path(config.data.path))
    samples = Samples(prepared.train, prepared.validation)
    exclusion = read_exclusion(config.data.exclude)
    exclusion.check(prepared.fingerprint)
    check_alike(common(config) | {"data.path": exclusion.fingerprint(prepared.fingerprint)}, control)
    schedule = RowSchedule(samples, schedule_spec(config, world))

    # The drafter, and of the verifier what the drafter needs: embedding, norm and head.
    shape = verifier_shape(config.verifier.model, allow_network=True)
    layouts = run_layouts(config, shape)
    resolve(config, world, token_bytes=layouts.validation.bytes_per_token, longest_sample=int(samples.lengths.max()))
    tokenizer = check_tokenizer(prepared, config.verifier.model)
    if config.stream.keys is not None:
        receiver_keys(Path(config.stream.keys))  # the receiver reads them; what is wrong with them is said here
    if config.stream.cache is not None:
        digest = origin_of(config.verifier.model).verifier
        origin = CacheOrigin(layouts.validation, config.verifier.model, digest, prepared.fingerprint)
        claim(Path(config.stream.cache), origin, writable=config.stream.mode == "hybrid")
    mask = mask_token_id(tokenizer, shape.vocab_size, config.drafter.mask_token_id)
    vocabulary = run_vocabulary(prepared.train, shape.vocab_size, tokenizer, config.drafter.vocab_size)
    if vocabulary is not None:
        log.info("the drafter's %d tokens are %.2f %% of the answers", len(vocabulary.ids), 100 * vocabulary.coverage)
    inside = None if vocabulary is None else vocabulary.t2d
    anchors = AnchorSpec(config.drafter.block_size, config.data.anchors_per_document, train.seed, inside)
    spec = drafter_spec(config.drafter, shape, layouts.taps, mask)
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    head = load_verifier_head(config.verifier.model, dtype, device)
    backends = (config.drafter.attention_backend, config.drafter.pointwise)
    drafter = Drafter(spec, *backends, recompute=train.activation_checkpointing)
    drafter.initialise(train.seed)
    if config.drafter.init_from is not None and not resume:
        drafter.load_state_dict(load_start(Path(config.drafter.init_from), spec))

    # A run is continued only if it is asked for, and only with the schedule that it began with.
    d2t = None if vocabulary is None else vocabulary.d2t
    checkpoints = Checkpoints(output / "checkpoints", train.keep_checkpoints, d2t)
    if not resume and checkpoints.latest() is not None:
        raise ValueError(f"{output} holds a run: give --resume to continue it, or another train.output_dir")
    if rank == 0:
        checkpoints.clean()
    engine = make_engine(config, drafter, schedule.total_steps)
    # Which kernels work out norms and SiLU is no part of it.
    definition = config.drafter.model_dump(mode="json", exclude={"pointwise"})
    position = Position(
        step=0,
        best_acceptance_length=0.0,
        world_size=world,
        rows_per_step=train.rows_per_step,
        row_tokens=config.data.row_tokens,
        block_size=config.drafter.block_size,
        seed=train.seed,
        data=exclusion.fingerprint(prepared.fingerprint),
        definition=json.dumps([config.verifier.model, layouts.taps, mask, definition]),
    )
    if resume:
        position = checkpoints.load(engine, position)

    # Hidden states: one receiver process per node fills this rank's ring, a thread fills rows from the ring.
    place = RankPlace(rank, world, *local_place())
    stream = Stream.start(config, layouts, place, first_step=position.step + 1, run_id=run_id)
    copier: Copier = CudaCopier(stream.ring, device) if device.type == "cuda" else HostCopier()
    room = AssemblerSpec(layouts, config.data.row_tokens, config.stream.lookahead_rows, anchors)
    assembler = RowAssembler(stream.ring, schedule.rows(rank, position.step + 1), samples, room, copier)
    rest = (engine, iter(assembler), assembler.wait, checkpoints, control, position, output, vocabulary, stream.servers)
    parts = Parts(config, spec, head, samples, schedule, anchors, *rest)

    def close() -> None:
        try:
            assembler.close()
        finally:
            stream.close()

    return Trainer(parts), close


def common(config: Config) -> dict[str, str]:
    """What nodes must have in common, by section: not where things are on a node, nor which servers it asks."""
    places = {"verifier": {"model"}, "data": {"path", "exclude"}, "train": {"output_dir"}}
    sections = config.model_dump(mode="json", exclude={"stream"})
    return {
        name: json.dumps({key: value for key, value in section.items() if key not in places.get(name, ())})
        for name, section in sections.items()
    }


def shared_run_id(control: dist.ProcessGroup) -> str:
    """The same random id on every rank; ports, shared memory and messages carry it."""
    value = torch.tensor([secrets.randbits(48)])
    dist.broadcast(value, src=0, group=control)
    return f"{int(value):012x}"


if __name__ == "__main__":
    sys.exit(main())
