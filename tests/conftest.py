"""Without a GPU kernels run under Triton's interpreter: chosen before anything, transformers too, imports triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
