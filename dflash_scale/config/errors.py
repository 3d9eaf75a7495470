"""Turns pydantic's problems with a configuration into lines for people: what, got, wanted, what to do."""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

Location = tuple[int | str, ...]

IN_JSON = {"a valid array": "a JSON list such as [2,10,18]", "a valid dictionary": "a JSON object in braces"}


def explain(problem: ErrorDetails, root: type[BaseModel]) -> str:
    """One line for one problem found while validating `root`."""
    where = _dotted(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key; {_nearest(problem['loc'], root)}"
    field = _field(problem["loc"], root)
    meaning = f" ({field.description.rstrip('.')})" if field is not None and field.description else ""
    settable = ".".join(str(part) for part in problem["loc"][:2])
    remedy = f"in the file or with --set {settable}=VALUE"
    if problem["type"] == "missing":
        return f"{where}: missing, wanted a value{meaning}; give it {remedy}"
    message = problem["msg"]
    if problem["type"] == "value_error":
        message = str(problem.get("ctx", {}).get("error", message))
        if "got " in message:  # a check across fields: it already says everything
            return message
    # pydantic: "Input should be a valid integer, unable to parse ..." -> "a valid integer"
    wanted = message.removeprefix("Input should be ").split(", unable")[0].split(", got")[0]
    wanted = IN_JSON.get(wanted, wanted)
    got = json.dumps(problem["input"], default=str)
    return f"{where}: got {got[:80]}, wanted {wanted}{meaning}; correct it {remedy}"


def _dotted(loc: Location) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".") or "config"


def _model(annotation: object) -> type[BaseModel] | None:
    """The pydantic model an annotation stands for or holds: `Model`, `tuple[Model, ...]`, `Model | None`."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _owner(loc: Location, root: type[BaseModel]) -> type[BaseModel]:
    """The model whose key is the last part of `loc`."""
    owner = root
    for part in loc[:-1]:
        if isinstance(part, str):
            field = owner.model_fields.get(part)
            owner = (_model(field.annotation) if field is not None else None) or owner
    return owner


def _field(loc: Location, root: type[BaseModel]) -> FieldInfo | None:
    named = [part for part in loc if isinstance(part, str)]
    return _owner(tuple(named), root).model_fields.get(named[-1]) if named else None


def _nearest(loc: Location, root: type[BaseModel]) -> str:
    """Names the known key that an unknown one most likely means: in its own section, else in another."""
    key, known = str(loc[-1]), [*_owner(loc, root).model_fields]
    close = get_close_matches(key, known, n=1)
    if close:
        return f"did you mean {_dotted((*loc[:-1], close[0]))}?"
    for section, field in root.model_fields.items():
        model = _model(field.annotation)
        if model is not None and key in model.model_fields:
            return f"did you mean {section}.{key}?"
    return f"known keys here: {', '.join(sorted(known))}"
