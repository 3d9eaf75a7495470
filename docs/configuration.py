"""Writes the tables of docs/configuration.md from the descriptions in dflash_scale/config/run.py.

`python docs/configuration.py` writes them; with --check it ends with status 1 if the page is not what it would write.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from dflash_scale.config.run import Config
from dflash_scale.config.sections import DERIVED_DEEPSPEED_KEYS, LossTerms
from dflash_scale.config.stream import ServerAddress

PAGE = Path(__file__).with_suffix(".md")
MARK = "<!-- tables: written by docs/configuration.py -->\n\n"
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false"}


def kind(annotation: Any) -> str:
    """An annotation in JSON's words: `list of integer, or null`."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return ", or ".join("null" if part is type(None) else kind(part) for part in inside)
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in inside)
    if origin is dict:
        return "object"
    if inside:  # a tuple, or Annotated
        return ("list of " if origin is tuple else "") + kind(inside[0])
    return NAMES.get(annotation, "object")


def table(name: str, model: type[BaseModel]) -> str:
    lines = [f"## {name}\n", "| key | value | default | meaning |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        given = field.default is not PydanticUndefined
        default = f"`{json.dumps(to_jsonable_python(field.default))}`" if given else "required"
        lines += [f"| `{key}` | {kind(field.annotation)} | {default} | {field.description} |"]
    return "\n".join([*lines, ""])


def tables() -> str:
    sections: dict[str, Any] = {k: field.annotation for k, field in Config.model_fields.items() if k != "deepspeed"}
    parts = [table(name, model) for name, model in sections.items()]
    parts.insert(list(sections).index("loss"), table("one entry of stream.servers", ServerAddress))
    parts.insert([part.startswith("## loss") for part in parts].index(True) + 1, table("loss.terms", LossTerms))
    refused = [f"| `{key}` | {instead} |" for key, instead in DERIVED_DEEPSPEED_KEYS.items()]
    return "\n".join([*parts, "## Refused in deepspeed", "", "| key | use instead |", "|---|---|", *refused, ""])


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    wanted = page.partition(MARK)[0] + MARK + tables()
    if "--check" in sys.argv[1:]:
        sys.exit(0 if page == wanted else f"{PAGE.name} is out of date: run `python docs/configuration.py`")
    PAGE.write_text(wanted, encoding="utf-8")
