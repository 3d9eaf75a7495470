"""Layer ids: the paper's default and the bounds."""

import pytest

from dflash_scale.taps import default_layer_ids, tapped_layers


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


def test_tapped_layers_stay_inside_the_verifier() -> None:
    assert tapped_layers(None, 36)[0] == 2
    assert tapped_layers((0, 35), 36) == (0, 35)
    with pytest.raises(ValueError, match=r"verifier\.layer_ids: got 36, wanted ids below 36"):
        tapped_layers((1, 36), 36)
