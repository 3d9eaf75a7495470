"""A model's files on this machine: a local folder, or one snapshot of the hub's cache.

Whatever is read of a model comes from the snapshot that its config.json is in, so that configuration, weights,
tokenizer and digests (identity.py) belong together even if the hub has a newer revision meanwhile. Also imported inside
the vLLM server and by its launcher: the hub's client and Transformers are imported when they are needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

CONFIG: Final = "config.json"
# config.json files of public verifiers, so that a run can be planned with no network.
SHIPPED: Final = Path(__file__).parents[2] / "configs" / "verifiers"


def model_folder(model: str, revision: str | None = None, *, allow_network: bool = False) -> Path | None:
    """The folder with the model's config.json: `model` itself, or the hub's snapshot of a revision (None: main).

    None where there is none; only `allow_network` downloads. Raises ValueError if the hub refuses.
    """
    if Path(model).is_dir():
        return Path(model)
    config = _hub_file(model, CONFIG, revision, allow_network)
    return None if config is None else config.parent


def model_file(model: str, name: str, *, allow_network: bool = False) -> Path | None:
    """One file of a model, of the snapshot that its config.json is in; else as `model_folder`."""
    folder = model_folder(model, allow_network=allow_network)
    if folder is None:
        return None
    if folder == Path(model):
        return folder / name if (folder / name).is_file() else None
    return _hub_file(model, name, folder.name, allow_network)


def shipped_config(model: str) -> Path | None:
    """The config.json that comes with this project for a public verifier, if there is one."""
    for path in sorted(SHIPPED.glob("*.json")):
        if json.loads(path.read_text(encoding="utf-8"))["_name_or_path"] == model:
            return path
    return None


def load_tokenizer(model: str, *, allow_network: bool = True) -> Any:
    """A model's tokenizer in Transformers; raises ValueError, in one sentence, where there is none to load."""
    from transformers import AutoTokenizer

    folder = model_folder(model)
    revision = "main" if folder is None or folder == Path(model) else folder.name
    try:
        return AutoTokenizer.from_pretrained(model, revision=revision, local_files_only=not allow_network)
    except (OSError, ValueError) as error:  # Transformers has no error of its own for "not here"
        if isinstance(error, OSError) and folder != Path(model):
            raise ValueError(_unreachable(model)) from error
        reason = " ".join(str(error).split())
        raise ValueError(f"model {model!r}: its tokenizer cannot be loaded: {reason:.300}") from error


def _hub_file(model: str, name: str, revision: str | None, allow_network: bool) -> Path | None:
    """A file of the hub's cache, downloaded if allowed. None: absent, or `model` is no hub id."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        found = try_to_load_from_cache(model, name, revision=revision)
        if isinstance(found, str):
            return Path(found)
        if found is not None or not allow_network:  # the cache also knows what a snapshot lacks
            return None
        return Path(hf_hub_download(model, name, revision=revision))
    except (EntryNotFoundError, HFValidationError):
        return None
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(_unreachable(model)) from error


def _unreachable(model: str) -> str:
    return (
        f"model {model!r}: it is no folder here, not in the hub's cache, and the hub does not give it; check the name, "
        f"download it with `hf download {model}`, and log in before with `hf auth login` if it is gated or private"
    )
