"""A split of which only the lengths matter."""

import numpy as np


class Lengths:
    """A split of which only the lengths are looked at."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = np.array(lengths, np.int32)

    def tokens(self, index: int) -> np.ndarray:
        raise AssertionError("asked for more than the lengths")

    loss_mask = tokens
