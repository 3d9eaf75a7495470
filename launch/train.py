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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from dflash_scale.commands import edge
from dflash_scale.config.run import Config, load_config, resolve
from dflash_scale.data.dataset import Prepared, Samples, check_tokenizer
from dflash_scale.data.quarantine import read_exclusion
from dflash_scale.data.schedule import Row, RowSchedule, schedule_spec
from dflash_scale.drafter.blocks import AnchorSpec
from dflash_scale.drafter.model import Drafter
from dflash_scale.drafter.pretrained import load_start
from dflash_scale.receiver.client import RankPlace
from dflash_scale.training import distributed
from dflash_scale.training.dry_run import print_dry_run
from dflash_scale.training.fake import fake_head, run_data
from dflash_scale.training.run import ResolvedRun, ResolvedVerifier, resolve_run, resolve_verifier
from dflash_scale.verifier.head import VerifierHead, load_verifier_head

if TYPE_CHECKING:  # DeepSpeed takes seconds, and a dry run does without
    from dflash_scale.training.checkpoint import Checkpoints, Position
    from dflash_scale.training.row_source import RowSource
    from dflash_scale.training.trainer import Trainer

log = logging.getLogger("train")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dflash-scale train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, type=Path, help="JSON file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint in output_dir")
    parser.add_argument("--plan", action="store_true", help="dry run: print what the run resolves to, and exit")
    parser.add_argument("--world", type=int, default=8, help="ranks (GPUs) of the dry run; default %(default)s")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    place = distributed.launched_place()
    first = place is None or place.rank == 0
    # DeepSpeed calls collectives by names that torch is renaming; nothing that a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(name)s: %(message)s")
    try:
        config = load_config(args.config, args.set)
        if args.plan:
            if first:
                print(print_dry_run(config, args.world))
            return edge.DONE
        if place is None:
            raise ValueError("got no RANK in the environment; start it with `dflash-scale train` or `deepspeed`")
        resolve(config, place.world_size)
    except ValueError as error:
        return refuse(error, place)
    return run(config, place, resume=args.resume)


def start_ranks(place: RankPlace) -> tuple[torch.device, dist.ProcessGroup]:
    """Joins the process group; returns this rank's device and a group for what stays on the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_size))
    threading.Thread(target=distributed.follow_launcher, name="follow-launcher", daemon=True).start()
    return device, distributed.join_ranks(device)


def run(config: Config, place: RankPlace, *, resume: bool) -> int:
    """The whole run of one rank. Returns 0 when the schedule is complete, 143 when a signal ended it early, 2 when the
    configuration, the data set, the verifier and the checkpoint do not fit together, 3 when samples are unaccounted
    for or were trained twice.
    """
    device, control = start_ranks(place)
    try:
        trainer = set_up(config, place, device, control, resume=resume)
    except ValueError as error:
        return refuse(error, place)
    try:
        complete = trainer.run()
    finally:
        trainer.parts.rows.close()
    distributed.leave_ranks()
    if trainer.unbalanced:
        return edge.UNACCOUNTED  # the trainer's log says which epoch
    return edge.DONE if complete else edge.STOPPED


def refuse(error: ValueError, place: RankPlace | None) -> int:
    """One line for the person, once a node: what is missing may be missing on that node alone."""
    if place is None or place.local_rank == 0:
        edge.fail("train", error)
    return edge.REFUSED


def set_up(
    config: Config, place: RankPlace, device: torch.device, control: dist.ProcessGroup, *, resume: bool
) -> "Trainer":
    """Makes everything that a run works with, its row source last; whoever calls closes that (`parts.rows`).

    Raises:
        ValueError: what was given does not fit together.
    """
    from dflash_scale.training.optim import make_engine
    from dflash_scale.training.trainer import Parts, Trainer

    output, run_id = Path(config.train.output_dir), shared_run_id(control)
    distributed.check_shared(output, run_id, control)
    verifier = resolve_verifier(config, allow_network=True)
    data = load_data(config, verifier, control)
    run = resolve_trained(config, verifier, data)
    checkpoints = open_checkpoints(run, resume=resume)
    head = make_head(run, device)
    engine = make_engine(config, make_drafter(run, resume=resume), data.schedule.total_steps)
    position = first_position(run, data)
    if resume:
        position = checkpoints.load(engine, position)
    first_step = position.step + 1
    rows = data.schedule.rows(dist.get_rank(), first_step)
    parts = Parts(
        run=run,
        head=head,
        samples=data.samples,
        schedule=data.schedule,
        anchors=anchor_spec(run),
        engine=engine,
        rows=row_source(run, rows, device, place, first_step=first_step, run_id=run_id),
        checkpoints=checkpoints,
        control=control,
        position=position,
        output=output,
    )
    return Trainer(parts)


def row_source(
    run: ResolvedRun, rows: Iterator[Row], device: torch.device, place: RankPlace, *, first_step: int, run_id: str
) -> "RowSource":
    """Where the hidden states of this rank's rows come from: its ring, filled by the node's receiver, or nowhere."""
    from dflash_scale.receiver.client import Stream
    from dflash_scale.training.copiers import Copier, CudaCopier, HostCopier
    from dflash_scale.training.loader import LoaderSpec, RingSource, RowLoader
    from dflash_scale.training.row_source import FakeSource

    config, layouts = run.config, run.verifier.layouts
    if config.stream.mode == "fake":
        return FakeSource(rows, layouts, device)
    stream = Stream.start(config, layouts, place, first_step=first_step, run_id=run_id)
    copier: Copier = CudaCopier(stream.ring, device) if device.type == "cuda" else HostCopier()
    spec = LoaderSpec(layouts, config.data.row_tokens, config.stream.lookahead_rows)
    return RingSource(RowLoader(stream.ring, rows, spec, copier), stream)


@dataclass(frozen=True)
class Data:
    """The data set of a run, and what is trained of it when: a function of it and of the configuration alone."""

    prepared: Prepared
    samples: Samples
    schedule: RowSchedule
    fingerprint: str  # of the data set without what is left out


def load_data(config: Config, verifier: ResolvedVerifier, control: dist.ProcessGroup) -> Data:
    """Opens the data set, which has to be the same on all ranks, as the configuration; raises ValueError."""
    prepared = run_data(config.data, verifier.shape.vocab_size)
    samples = Samples(prepared.train, prepared.validation)
    exclusion = read_exclusion(config.data.exclude)
    exclusion.check(prepared.fingerprint)
    fingerprint = exclusion.fingerprint(prepared.fingerprint)
    distributed.check_alike(common(config) | {"data.path": fingerprint}, control)
    return Data(prepared, samples, RowSchedule(samples, schedule_spec(config, dist.get_world_size())), fingerprint)


def resolve_trained(config: Config, verifier: ResolvedVerifier, data: Data) -> ResolvedRun:
    """Resolves a run with its data set, and checks what the stream needs; raises ValueError."""
    token_bytes, longest = verifier.layouts.validation.bytes_per_token, int(data.samples.lengths.max())
    resolve(config, dist.get_world_size(), token_bytes=token_bytes, longest_sample=longest)
    tokenizer = None if config.stream.mode == "fake" else checked_tokenizer(config, verifier, data.prepared)
    run = resolve_run(config, verifier, tokenizer, data.prepared.train)
    if run.vocabulary is not None:
        share = 100 * run.vocabulary.coverage
        log.info("the drafter's %d tokens are %.2f %% of the answers", len(run.vocabulary.ids), share)
    return run


def checked_tokenizer(config: Config, verifier: ResolvedVerifier, prepared: Prepared) -> Any:
    """The verifier's tokenizer; refuses a data set of another one, and keys and a cache that the stream cannot use."""
    from dflash_scale.cache.folder import claim_folder
    from dflash_scale.transport.keys import receiver_keys

    tokenizer = check_tokenizer(prepared, verifier.model)
    if config.stream.keys is not None:
        receiver_keys(Path(config.stream.keys))  # the receiver reads them; what is wrong with them is said here
    if config.stream.cache is not None:
        origin = verifier.cache_origin(prepared.fingerprint)
        claim_folder(Path(config.stream.cache), origin, writable=config.stream.mode == "hybrid")
    return tokenizer


def make_head(run: ResolvedRun, device: torch.device) -> VerifierHead:
    """Of the verifier what the drafter needs: embedding, norm and LM head."""
    if run.config.stream.mode == "fake":
        return fake_head(run.verifier.shape, run.dtype, device)
    return load_verifier_head(run.verifier.model, run.dtype, device)


def anchor_spec(run: ResolvedRun) -> AnchorSpec:
    """Where blocks begin, and inside which vocabulary."""
    return AnchorSpec(
        block_size=run.config.drafter.block_size,
        per_document=run.config.data.anchors_per_document,
        seed=run.config.train.seed,
        inside=None if run.vocabulary is None else run.vocabulary.t2d,
    )


def make_drafter(run: ResolvedRun, *, resume: bool) -> Drafter:
    """The drafter, its weights random or those of `drafter.init_from`; a checkpoint's replace them all."""
    section, train = run.config.drafter, run.config.train
    recompute = train.activation_checkpointing
    drafter = Drafter(run.spec, section.attention_backend, section.pointwise, recompute=recompute)
    drafter.initialise(train.seed)
    if section.init_from is not None and not resume:
        drafter.load_state_dict(load_start(Path(section.init_from), run.spec))
    return drafter


def open_checkpoints(run: ResolvedRun, *, resume: bool) -> "Checkpoints":
    """The run's checkpoints; raises ValueError where there are some and nobody asked to continue from them."""
    from dflash_scale.training.checkpoint import Checkpoints

    output = Path(run.config.train.output_dir)
    checkpoints = Checkpoints(output / "checkpoints", run.config.train.keep_checkpoints, run)
    if not resume and checkpoints.latest() is not None:
        raise ValueError(f"{output} holds a run: give --resume to continue it, or another train.output_dir")
    if dist.get_rank() == 0:
        checkpoints.clean()
    return checkpoints


def first_position(run: ResolvedRun, data: Data) -> "Position":
    """Where a run begins; it is continued with the same schedule only."""
    from dflash_scale.training.checkpoint import Position

    return Position(
        step=0,
        best_acceptance_length=0.0,
        world_size=dist.get_world_size(),
        rows_per_step=run.config.train.rows_per_step,
        row_tokens=run.config.data.row_tokens,
        seed=run.config.train.seed,
        data=data.fingerprint,
    )


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
