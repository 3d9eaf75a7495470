"""Which verifier and which tokenizer a model's files are of: two short digests.

A server and a run compare these before the first sample, so both compute them here, each from its own copy. Equal
copies give equal digests however a copy was saved: in one shard or many, by an old or a new Transformers, quantised
between its ends or not. Used inside the vLLM server: beside files.py, standard library and xxhash only.
"""

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO, Final

import xxhash

from dflash_scale.transport.messages import Origin
from dflash_scale.verifier.files import CONFIG, model_folder

NUMBERS: Final = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size"),
)
EMBEDDINGS: Final = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
PIECES, PIECE_BYTES = 16, 4096  # of the embedding, that are read
MAX_HEADER_BYTES: Final = 64 << 20  # of a safetensors file


def origin_of(model: str, revision: str | None = None) -> Origin:
    """The digests of a folder, or of a hub id at a revision (None: main); empty where its files are absent or of a
    kind that is not read here."""
    folder = model_folder(model, revision)
    return Origin(_verifier(folder), _tokenizer(folder)) if folder is not None else Origin()


def _verifier(folder: Path) -> str:
    """Over the shape of the language model and pieces of its embedding, which tells fine-tuned models apart."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        text = config.get("text_config", config)
        digest = xxhash.xxh3_64(json.dumps([text.get(name) for name in NUMBERS]).encode())
        file, name = _embedding(folder)
        with file.open("rb") as stream:
            _update(digest, stream, name)
    except (OSError, ValueError, KeyError, struct.error):
        return ""
    return digest.hexdigest()


def _embedding(folder: Path) -> tuple[Path, str]:
    """The safetensors file that holds the embedding, and its name there; raises KeyError where there is none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
    else:
        with (folder / "model.safetensors").open("rb") as stream:
            places = dict.fromkeys(_header(stream)[0], "model.safetensors")
    # The shortest name: a multimodal model's other parts, if they embed tokens too, are deeper inside.
    name = min((name for name in places if name.endswith(EMBEDDINGS)), key=lambda name: (len(name), name), default="")
    return folder / places[name], name


def _header(stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """The tensors of a safetensors file, and where their bytes begin."""
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    return json.loads(stream.read(length)), 8 + length


def _update(digest: Any, stream: BinaryIO, name: str) -> None:
    tensors, start = _header(stream)
    first, stop = tensors[name]["data_offsets"]
    digest.update(json.dumps([tensors[name]["dtype"], tensors[name]["shape"]]).encode())
    for piece in range(PIECES):
        stream.seek(start + first + (stop - first) * piece // PIECES)
        digest.update(stream.read(min(PIECE_BYTES, (stop - first) // PIECES)))


def _tokenizer(folder: Path) -> str:
    """Over which text each token id means. How it is merged and split is left out: its form changes with the writer."""
    try:
        content = json.loads((folder / "tokenizer.json").read_bytes())
        added = sorted([token["id"], token["content"]] for token in content["added_tokens"])
        meaning = json.dumps([content["model"]["vocab"], added], sort_keys=True)
    except (OSError, ValueError, KeyError):
        return ""
    return xxhash.xxh3_64(meaning.encode()).hexdigest()
