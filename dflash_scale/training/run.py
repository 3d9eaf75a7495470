"""What a run resolves to: made once from configuration and verifier, and kept in every checkpoint.

    run = resolve_run(config, resolve_verifier(config), tokenizer, prepared.train)
    run.save(folder);  ResolvedRun.load(folder)

    run.json       the configuration; the verifier's name, digest and shape and what is streamed of it; the drafter's
                   definition in the words of an exported config.json; the dtype of the weights
    d2t.npy        (N,) offsets of the drafter's vocabulary, where it is pruned (vocabulary.py)
    config.json    the configuration alone, as --config takes it

A checkpoint's weights mean what its own run.json says, whatever a later version or verifier would make of the same
configuration: export reads it, and `--resume` compares it with what the run resolves to then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from dflash_scale.cache.folder import CacheOrigin
from dflash_scale.config.run import Config, parse_config
from dflash_scale.data.dataset import PreparedSplit
from dflash_scale.drafter.model import DrafterSpec, drafter_spec
from dflash_scale.drafter.pretrained import definition_content, of_content
from dflash_scale.drafter.vocabulary import D2T, DraftVocabulary, choose_vocabulary
from dflash_scale.receiver.layouts import RowLayouts, run_layouts
from dflash_scale.verifier.identity import origin_of
from dflash_scale.verifier.shape import VerifierShape, mask_token_id, verifier_shape

CONFIG, RUN = "config.json", "run.json"
FORMAT: Final = 1  # of run.json
UNKNOWN_MASK: Final = -1  # of a dry run, where only a tokenizer that is not here could say


@dataclass(frozen=True, slots=True)
class ResolvedVerifier:
    """A run's verifier, and what the servers are asked for. `digest`: as `origin_of` says, empty where it cannot."""

    model: str
    digest: str
    shape: VerifierShape
    layouts: RowLayouts

    def cache_origin(self, data_fingerprint: str) -> CacheOrigin:
        """Of a cache with all the layers that this run's rows may want."""
        return CacheOrigin(self.layouts.validation, self.model, self.digest, data_fingerprint)


def resolve_verifier(config: Config, *, allow_network: bool = False) -> ResolvedVerifier:
    """The verifier's half of a run, for which neither tokenizer nor data set are needed.

    Raises:
        ValueError: no config.json could be found (on the hub only if `allow_network`), or it lacks what is asked.
    """
    model = config.verifier.model
    shape = verifier_shape(model, allow_network=allow_network)
    return ResolvedVerifier(model, origin_of(model).verifier, shape, run_layouts(config, shape))


@dataclass(frozen=True, slots=True)
class ResolvedRun:
    """`vocabulary`: the drafter's own where it is pruned, None for the verifier's; `dtype`: of weights and export."""

    config: Config
    verifier: ResolvedVerifier
    spec: DrafterSpec
    vocabulary: DraftVocabulary | None
    dtype: torch.dtype

    def dump(self) -> str:
        """The text of run.json."""
        content = {
            "format": FORMAT,
            "config": self.config.model_dump(mode="json"),
            "verifier": asdict(self.verifier),
            "drafter": self._drafter(),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        return json.dumps(content, indent=2) + "\n"

    def _drafter(self) -> dict[str, Any]:
        size = None if self.vocabulary is None else len(self.vocabulary.ids)
        return {**definition_content(self.spec, size), "causal_block": self.spec.causal_block}

    def save(self, folder: Path) -> None:
        """Writes the files of the module's docstring into a folder that is made aside."""
        (folder / CONFIG).write_text(self.config.dump(), encoding="utf-8")
        (folder / RUN).write_text(self.dump(), encoding="utf-8")
        if self.vocabulary is not None:
            np.save(folder / D2T, self.vocabulary.d2t)

    @classmethod
    def load(cls, folder: Path) -> ResolvedRun:
        """What `save` wrote; nothing is derived again.

        Raises:
            ValueError: the folder is no checkpoint, is incomplete, or comes from a version that wrote another run.json.
        """
        if not (folder / CONFIG).is_file():
            raise ValueError(f"checkpoint {folder}: got no {CONFIG}, wanted the step folder of a run; check the path")
        if not (folder / RUN).is_file():
            raise ValueError(
                f"checkpoint {folder}: got no {RUN}, wanted what its run resolved to, which an older dflash_scale did "
                "not save; export or resume it with the version that wrote it"
            )
        content = json.loads((folder / RUN).read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise ValueError(
                f"checkpoint {folder}: got {RUN} of format {content.get('format')}, wanted {FORMAT}; export or resume "
                "it with the version that wrote it"
            )
        verifier, drafter = content["verifier"], content["drafter"]
        spec = of_content(drafter, causal_block=drafter["causal_block"]).spec()
        vocabulary = None
        if drafter["draft_vocab_size"] != spec.layers.vocab_size:
            if not (folder / D2T).is_file():
                raise ValueError(
                    f"checkpoint {folder}: got no {D2T}, wanted it for drafter.vocab_size; it is incomplete"
                )
            vocabulary = DraftVocabulary.of_offsets(np.load(folder / D2T), spec.layers.vocab_size)
        return cls(
            config=parse_config(content["config"], str(folder / RUN)),
            verifier=ResolvedVerifier(
                model=verifier["model"],
                digest=verifier["digest"],
                shape=VerifierShape(**verifier["shape"]),
                layouts=RowLayouts.from_params(verifier["layouts"]),
            ),
            spec=spec,
            vocabulary=vocabulary,
            dtype=getattr(torch, content["dtype"]),
        )

    def check_same(self, stored: ResolvedRun, folder: Path) -> None:
        """Raises ValueError, which names the first key, unless weights of `stored`, of `folder`, mean the same here."""
        known = self.verifier.digest and stored.verifier.digest  # else the name is all that tells
        mine, theirs = self._meaning(by_digest=bool(known)), stored._meaning(by_digest=bool(known))
        for key in mine | theirs:
            got, wanted = mine.get(key), theirs.get(key)
            if got != wanted:
                raise ValueError(
                    f"--resume: {key} is {got}, but {folder} was trained with {wanted}: it would not be the same run; "
                    "restore it or start a new train.output_dir"
                )

    def _meaning(self, *, by_digest: bool) -> dict[str, Any]:
        """What the weights mean, by dotted key: not how they are trained, nor in which form states are streamed."""
        identity = "digest" if by_digest else "model"
        shape, drafter = asdict(self.verifier.shape), self._drafter()
        meaning = {
            **_flat("verifier", {identity: getattr(self.verifier, identity), "shape": shape}),
            **_flat("drafter", drafter),
            "dtype": self.dtype,
        }
        if self.vocabulary is not None:
            meaning["drafter.d2t (digest)"] = sha256(self.vocabulary.ids.tobytes()).hexdigest()[:16]
        return meaning


def _flat(prefix: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"prefix.a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}.{name}"
        flat |= _flat(key, value) if isinstance(value, Mapping) else {key: value}
    return flat


def resolve_run(config: Config, verifier: ResolvedVerifier, tokenizer: Any, train: PreparedSplit | None) -> ResolvedRun:
    """Resolves the rest of a run.

    Args:
        config: the run's.
        verifier: `resolve_verifier` of it.
        tokenizer: the verifier's. None if it is not here, for a dry run: the mask token is then UNKNOWN_MASK unless it
            is configured, and a pruned vocabulary lacks the special tokens.
        train: the split whose answers choose a pruned vocabulary; None, for a dry run, before there is a data set.

    Raises:
        ValueError: the configuration does not fit the verifier or its tokenizer.
    """
    rows, section = verifier.shape.vocab_size, config.drafter
    known = tokenizer is not None or section.mask_token_id is not None
    mask = mask_token_id(tokenizer, rows, section.mask_token_id) if known else UNKNOWN_MASK
    vocabulary = None
    if train is not None and section.vocab_size is not None:
        special = tokenizer.all_special_ids if tokenizer is not None else []
        vocabulary = choose_vocabulary(train.token_counts(rows), special, section.vocab_size)
    return ResolvedRun(
        config=config,
        verifier=verifier,
        spec=drafter_spec(section, verifier.shape, verifier.layouts.aux_layer_ids, mask),
        vocabulary=vocabulary,
        dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
    )
