"""Hidden states as the bytes that travel, and back: as they are, rounded to bfloat16, or in fp8 with scales.

In fp8 (e4m3) every token and layer has a scale of its own, its largest magnitude over 448, the largest that e4m3 holds:
an element is off by at most 1/16 of itself, or by 2**-10 scales if it is small. Imported inside the vLLM server: torch.

T tokens · L layers sent · H hidden size.
"""

from typing import Final

import torch
from torch import Tensor

from dflash_scale.transport.layout import FP8, FP8_SCALE_BYTES, Layout

LARGEST: Final = 448.0


def encode(states: Tensor, dtype: str) -> Tensor:
    """(T, L, H) -> (T, bytes of a token) uint8 on the same device; in fp8 the L scales stand before the values."""
    if dtype != FP8:
        return states.to(getattr(torch, dtype)).contiguous().view(torch.uint8).flatten(1)
    states = states.float()
    scales = states.abs().amax(2) / LARGEST
    values = (states / torch.where(scales > 0, scales, 1.0)[..., None]).to(torch.float8_e4m3fn)
    return torch.cat([scales.contiguous().view(torch.uint8), values.view(torch.uint8).flatten(1)], 1)


def decode(raw: Tensor, layout: Layout) -> Tensor:
    """(T, bytes of a token) uint8 -> (T, L, H): of the layout's dtype a view, of fp8 a bfloat16 copy."""
    shape = (len(raw), len(layout.layer_ids), layout.hidden_size)
    if layout.dtype != FP8:
        return raw.view(getattr(torch, layout.dtype)).view(shape)
    split = shape[1] * FP8_SCALE_BYTES
    scales = raw[:, :split].flatten().clone().view(torch.float32)  # a copy: four bytes may lie anywhere in a row
    values = raw[:, split:].view(torch.float8_e4m3fn).reshape(shape)
    return (values.to(torch.bfloat16) * scales.view(shape[:2])[..., None]).to(torch.bfloat16)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor on a CPU, as bytes; the view keeps the tensor alive."""
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1).data
