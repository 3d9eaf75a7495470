"""Layer ids: the paper's default and the bounds."""

from typing import Any

import pytest

from dflash_scale.transport.layout import MAX_LAYERS, Layout, WireError, layer_ids_problem
from dflash_scale.verifier.layers import aux_layers, default_layer_ids


def test_default_layer_ids_are_the_papers() -> None:
    assert default_layer_ids(36) == (2, 10, 18, 26, 34)
    assert default_layer_ids(8) == (2, 3, 4, 5, 6)
    assert default_layer_ids(6) == (2, 3, 4)
    assert [default_layer_ids(n) for n in (2, 3, 4)] == [(1,), (1,), (2,)]
    for layers in range(2, 130):
        ids = default_layer_ids(layers)
        assert list(ids) == sorted(set(ids)), layers
        assert 1 <= ids[0] <= ids[-1] < layers
    with pytest.raises(ValueError, match="at least 2"):
        default_layer_ids(1)


def test_aux_layers_stay_inside_the_verifier() -> None:
    assert aux_layers(None, 36)[0] == 2
    assert aux_layers((0, 35), 36) == (0, 35)
    with pytest.raises(ValueError, match=r"^verifier\.layer_ids: got \[1, 36\], wanted .* from 0 .* to 35;"):
        aux_layers((1, 36), 36)
    with pytest.raises(ValueError, match=r"^--layer-ids: got \[1, 8\], .*; the last layer, id 8, is sent in any case$"):
        aux_layers((1, 8), 8, "--layer-ids")


WRONG = [(), (2, 1), (1, 1), (-1, 2), (0, True), (1.0, 2), tuple(range(MAX_LAYERS + 1)), [1, 2], None]


@pytest.mark.parametrize("ids", WRONG)
def test_layer_ids_that_are_wrong_anywhere(ids: Any) -> None:
    problem = layer_ids_problem(ids)
    assert problem is not None and problem.startswith("got ") and len(problem) < 200
    assert "ascending order from 0 (embeddings) to" in problem
    with pytest.raises(WireError, match="layer_ids: got"):
        Layout(ids, 8, "float32")


def test_layer_ids_that_are_right() -> None:
    for ids in ((0,), (3,), (0, 1, 2, 3)):
        assert layer_ids_problem(ids, 3) is None
        assert (layer_ids_problem(ids, 2) is None) == (ids == (0,))
    assert layer_ids_problem(tuple(range(MAX_LAYERS))) is None
