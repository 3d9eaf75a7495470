"""The demo's verifier: a small language model trained here, in minutes, on the sources of Python's standard library.

The demo must run without a download, and a drafter can only be judged against a verifier whose text has structure. So
this makes one: Qwen3's architecture (stock vLLM and Transformers load the folder), a byte-level BPE tokenizer of its
own, and a ChatML template. Everything it reads is a conversation: the user shows the head of a file, the assistant goes
on. Files are split once, by name, into held-in (training, and the drafter's prompts) and held-out (evaluation).

B sequences in a batch · N tokens in a sequence.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dflash_scale.files import new_folder

log = logging.getLogger(__name__)

RECIPE_VERSION = 3  # raised whenever the same arguments would make another verifier

STEPS = 720
VOCABULARY = 2048
END_OF_TEXT, TURN, END_OF_TURN, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
INSTRUCTION = "Continue this file:\n"
HELD_OUT_PERCENT = 8

# Tables, copies of other folders, tests and other people's packages: not the code that a reader knows as the library.
SKIPPED = {"test", "tests", "idlelib", "idle_test", "turtledemo", "encodings", "pydoc_data", "lib2to3", "ensurepip"}
SKIPPED |= {"site-packages", "dist-packages", "__pycache__", "__phello__", "msilib"}

# The generation marks tell Transformers which tokens are the assistant's (return_assistant_tokens_mask).
CHAT_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a verifier depends on, kept in its folder as recipe.json; another recipe means it is made again."""

    version: int
    steps: int
    seed: int
    python: str  # the version whose library is the text


@dataclass(frozen=True, slots=True)
class TrainSpec:
    """A number of steps, not of seconds: a verifier that a slow moment of the machine cuts short is another one."""

    steps: int
    seed: int
    batch: int = 4
    tokens: int = 256
    lr: float = 3e-3
    warmup: float = 0.04


def library_files() -> tuple[list[Path], list[Path]]:
    """The standard library's sources, (held in, held out), each sorted; the split depends on the names alone."""
    root = Path(os.__file__).parent
    held_in: list[Path] = []
    held_out: list[Path] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED & set(name.parts) or name.parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        if not 1_000 < path.stat().st_size < 400_000:
            continue
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        (held_out if digest[0] * 100 // 256 < HELD_OUT_PERCENT else held_in).append(path)
    if not held_in or not held_out:
        raise ValueError(f"got no Python sources in {root}, wanted the standard library; use a Python that ships them")
    return held_in, held_out


def read_sources(files: list[Path]) -> list[str]:
    """The texts of `files`; the few that are not UTF-8 are left out."""
    texts = []
    for path in files:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            log.info("%s is not UTF-8: left out", path)
    return texts


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `VOCABULARY` entries. A line end and the indentation after it are one piece, which makes
    code a third shorter than GPT-2's rule does."""
    tokenizer = Tokenizer(models.BPE())
    pieces = r"\n[ \t]*|[ \t]?[A-Za-z_]+|[ \t]?[0-9]|[ \t]?[^\sA-Za-z0-9_]+|[ \t]+|\s"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN, END_OF_TURN, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        mask_token=MASK,
        additional_special_tokens=[TURN],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def encode_files(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[npt.NDArray[np.int32]]:
    """One (n,) int32 array of token ids per text."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array(item.ids, np.int32) for item in encoded]


@dataclass(frozen=True, slots=True)
class Turns:
    """The tokens that the chat template puts around a prompt's code, and the end of a turn."""

    before: npt.NDArray[np.int32]
    after: npt.NDArray[np.int32]
    end: npt.NDArray[np.int32]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Turns:
        """Cut out of the template itself, so that the two cannot differ."""
        here = "\x00"
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": INSTRUCTION + here}], tokenize=False, add_generation_prompt=True
        )
        before, after = str(text).split(here)
        ids = (tokenizer.encode(part, add_special_tokens=False) for part in (before, after, f"{END_OF_TURN}\n"))
        return cls(*(np.array(part, np.int32) for part in ids))

    def prompt(self, code: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The prompt that asks for the continuation of `code`."""
        return np.concatenate([self.before, code, self.after])


def line_starts(tokenizer: PreTrainedTokenizerFast, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Positions in an encoded file at which an unindented line starts: there the tokens after a cut are those that
    the text alone would be given."""
    (newline,) = tokenizer.encode("\n", add_special_tokens=False)
    opens_line = tokenizer.convert_tokens_to_ids([t for t in tokenizer.get_vocab() if t.startswith("Ċ")])
    starts = np.flatnonzero(ids[:-1] == newline) + 1
    return np.concatenate([[0], starts[~np.isin(ids[starts], opens_line)]])


def conversations(
    files: list[npt.NDArray[np.int32]], starts: list[npt.NDArray[np.int64]], turns: Turns, seed: int, tokens: int
) -> Iterator[npt.NDArray[np.int32]]:
    """Endless training sequences of `tokens` + 1 ids: a prompt of 16 to 96 code tokens and what the file says next."""
    rng = np.random.default_rng(seed)
    sizes = np.array([len(file) for file in files], np.float64)
    shares = sizes / sizes.sum()
    while True:
        parts: list[npt.NDArray[np.int32]] = []
        room = tokens + 1
        while room > 0:  # a file that ends early leaves room for another conversation
            which = int(rng.choice(len(files), p=shares))
            start = int(rng.choice(starts[which]))
            cut = start + int(rng.integers(16, 97))
            answer = files[which][cut : cut + tokens]
            parts += [turns.prompt(files[which][start:cut]), answer]
            if cut + tokens >= len(files[which]):
                parts.append(turns.end)
            room = tokens + 1 - sum(map(len, parts))
        yield np.concatenate(parts)[: tokens + 1]


def verifier_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """5.5 M parameters in the Qwen3 architecture; head_dim 64 is one that every vLLM attention backend supports."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def initialise(model: Qwen3ForCausalLM) -> None:
    """Normal weights by fan-in, half as large where a residual is written. After 60 steps this is where Transformers'
    0.02, which is meant for wider models, is after 130."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("model.layers") and parameter.dim() == 2:
                written = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(std=(0.5 if written else 1.0) / math.sqrt(parameter.shape[1]))
        model.model.embed_tokens.weight.normal_(std=0.3)


def next_token_loss(model: Qwen3ForCausalLM, ids: Tensor, bf16: bool) -> Tensor:
    """Mean cross entropy of ids (B, N+1), in nats per token."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def has_bf16() -> bool:
    """Whether this CPU multiplies in bf16 (x86, then Arm): there it is twice as fast, elsewhere far slower."""
    return re.search(r"\b(avx512_bf16|bf16)\b", Path("/proc/cpuinfo").read_text(encoding="utf-8")) is not None


def train_model(model: Qwen3ForCausalLM, sequences: Iterator[npt.NDArray[np.int32]], spec: TrainSpec) -> float:
    """Trains: warm-up, then a cosine. Returns the mean loss of the last 20 steps, in nats per token."""
    decayed = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=spec.lr, betas=(0.9, 0.95), fused=True)

    def batch() -> Tensor:
        return torch.from_numpy(np.stack([next(sequences) for _ in range(spec.batch)])).long()

    losses, bf16 = list[float](), has_bf16()
    with tqdm(range(spec.steps), unit="step", desc="verifier") as bar:
        for step in bar:
            progress = step / spec.steps
            rate = min(1.0, (progress + 1e-3) / spec.warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = spec.lr * rate
            loss = next_token_loss(model, batch(), bf16)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {np.mean(losses[-20:]):.3f}")
    return float(np.mean(losses[-20:]))


@torch.no_grad()
def held_out_loss(model: Qwen3ForCausalLM, sequences: Iterator[npt.NDArray[np.int32]], count: int = 32) -> float:
    """Mean loss on `count` sequences of held-out files, in nats per token."""
    batches = [torch.from_numpy(np.stack([next(sequences) for _ in range(8)])).long() for _ in range(count // 8)]
    return float(np.mean([next_token_loss(model, ids, bf16=False).item() for ids in batches]))


def made_before(out_dir: Path, recipe: Recipe) -> bool:
    """Whether `out_dir` holds a complete verifier of this recipe (recipe.json is renamed into place with it)."""
    path = out_dir / "recipe.json"
    if not path.is_file():
        return False
    kept = json.loads(path.read_text(encoding="utf-8"))
    return {name: kept.get(name) for name in asdict(recipe)} == asdict(recipe)


def make_verifier(out_dir: Path, steps: int = STEPS, seed: int = 0, threads: int = 2) -> Path:
    """Makes the verifier in `out_dir`, or returns at once if the same recipe made the one that is there.

    Args:
        out_dir: folder with config.json, model.safetensors, the tokenizer and recipe.json (settings and losses).
        steps: of training, about 4 a second on two cores with bf16 instructions.
        seed: of the weights and of the order of the text.
        threads: CPU threads.

    Raises:
        ValueError: `out_dir` holds something that this function did not make.
    """
    recipe = Recipe(RECIPE_VERSION, steps, seed, platform.python_version())
    if made_before(out_dir, recipe):
        return out_dir
    if out_dir.exists() and not (out_dir / "recipe.json").is_file():
        raise ValueError(f"got {out_dir}, which is no verifier of the demo, wanted a new folder; name another one")
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    held_in, held_out = (read_sources(files) for files in library_files())
    tokenizer = train_tokenizer(held_in)
    turns = Turns.of(tokenizer)
    spec = TrainSpec(steps, seed)

    def sequences(texts: list[str]) -> Iterator[npt.NDArray[np.int32]]:
        files = [ids for ids in encode_files(tokenizer, texts) if len(ids) > 128]
        starts = [line_starts(tokenizer, ids[:-96]) for ids in files]
        return conversations(files, starts, turns, seed, spec.tokens)

    model = Qwen3ForCausalLM(verifier_config(tokenizer))
    initialise(model)
    loss = train_model(model, sequences(held_in), spec)
    results = {"loss": loss, "held_out_loss": held_out_loss(model.eval(), sequences(held_out))}
    log.info("verifier: %d steps, loss %.3f, validation %.3f", steps, loss, results["held_out_loss"])
    _save(out_dir, model, tokenizer, asdict(recipe) | results)
    return out_dir


def _save(
    out_dir: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, object]
) -> None:
    model.generation_config.do_sample = False
    with new_folder(out_dir, replace=True) as aside:  # of an older recipe
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / "recipe.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(aside / "recipe.json", aside / "model.safetensors")  # safetensors' are for their owner: 0600
