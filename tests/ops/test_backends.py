"""The tables of backends and terms: the configuration and the documentation are held to their rows."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_args

import pytest

from dflash_scale.config.run import Config
from dflash_scale.config.sections import LossTerms
from dflash_scale.ops.attention import ATTENTION
from dflash_scale.ops.backends import Backend, Operator, dtype_name, sizes, versions
from dflash_scale.ops.pointwise import POINTWISE
from dflash_scale.ops.softmax_loss import LOSS, TERMS

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
OPERATORS: list[Operator[Any]] = [ATTENTION, LOSS, POINTWISE]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_the_configuration_takes_the_names_of_the_table(operator: Operator[Any]) -> None:
    section, key = operator.setting.split(".")
    field = Config.model_fields[section].annotation.model_fields[key]  # type: ignore[union-attr]
    assert get_args(field.annotation) == operator.names, f"make {operator.setting} take the names of its backends"


def test_the_configuration_has_a_weight_for_each_term() -> None:
    assert list(LossTerms.model_fields) == [term.name for term in TERMS], "make the fields of LossTerms those of TERMS"


def test_the_last_backend_takes_everything() -> None:
    for operator in OPERATORS:
        assert operator.backends[-1] == Backend(
            operator.names[-1], operator.backends[-1].run, slow=operator == ATTENTION
        )


def line(operator: Operator[Any], backend: Backend[Any]) -> str:
    device = " or ".join(filter(None, [backend.device, backend.also_on])) or "any"
    cells = [f"`{operator.setting}`", f"`{backend.name}`", device]
    cells.append(", ".join(map(dtype_name, backend.dtypes)) or "any")
    cells.append(sizes(backend.head_dims) if backend.head_dims else "any")
    cells.append(versions(*backend.capability) if backend.capability else "any")
    cells.append("no" if backend.needs_proof and backend.proof is None else "yes")
    return f"| {' | '.join([*cells, inspect.getdoc(backend.limits) or ''])} |"


def test_the_page_has_the_tables() -> None:
    lines = [
        "| setting | name | device | dtypes | head dims | compute capability | taken by `auto` | besides |",
        "|---|---|---|---|---|---|---|---|",
        *[line(operator, backend) for operator in OPERATORS for backend in operator.backends],
    ]
    wanted = "\n".join(lines)
    assert wanted in PAGE.read_text(), f"docs/{PAGE.name} has to hold this table:\n\n{wanted}"
