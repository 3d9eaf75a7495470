"""Which of the verifier's layers are tapped. Id k is the residual stream after k decoder layers (0 = embedding output).

Imported by the server's launcher too, where torch may not be installed: standard library only.
"""


def default_layer_ids(layers: int, count: int = 5) -> tuple[int, ...]:
    """The paper's taps: `count` layers, uniformly from the 2nd to the 3rd last, fewer where there are fewer.

    Id k is the residual after k decoder layers: 36 layers give 2, 10, 18, 26, 34, which configurations that count
    layer outputs from 0 write as 1, 9, 17, 25, 33.
    """
    if layers < 2:
        raise ValueError(f"verifier: got {layers} decoder layer(s), wanted at least 2; nothing can be tapped before n")
    first, last = 2, layers - 2
    count = min(count, last - first + 1)
    if count < 2:
        return (layers // 2,)
    return tuple(round(first + i * (last - first) / (count - 1)) for i in range(count))


def tapped_layers(configured: tuple[int, ...] | None, layers: int) -> tuple[int, ...]:
    """The ids to tap: `configured`, checked against the verifier, or the default."""
    ids = default_layer_ids(layers) if configured is None else configured
    if ids[-1] >= layers:
        raise ValueError(
            f"verifier.layer_ids: got {ids[-1]}, wanted ids below {layers}, the verifier's number of layers (its last "
            "residual is streamed in any case); lower it"
        )
    return ids
