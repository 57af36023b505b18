"""Without a GPU the kernels run under Triton's interpreter, which must be chosen before triton is imported."""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def silent_overflow():
    """As on a GPU: strong chunks overflow in the launch for ordinary ones, which leaves them to the other."""
    with np.errstate(all="ignore"):
        yield
