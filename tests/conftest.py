"""What several test files need, and which tests this machine can run."""

import pytest
import torch

pytest.register_assert_rewrite("tests.support")
HAS_CUDA = torch.cuda.is_available()
collect_ignore = [] if HAS_CUDA else ["gpu"]


def pytest_report_header() -> str | None:
    return None if HAS_CUDA else "tests/gpu is left out: torch sees no GPU here"
