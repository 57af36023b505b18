"""Each rank holds a model whole as well as split over the ranks, and compares; kernels are interpreted."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from gdn2 import LanguageModel, ModelConfig
from gdn2.ops import fused
from gdn2.ops.kernels import run
from gdn2.training.tensor_parallel import split_tensors

CONFIG = ModelConfig(
    vocab_size=11, d_model=16, num_layers=2, mlp_width=12, cell=("mixer", "attention"), num_heads=2, key_dim=4,
    value_dim=4, attention_heads=2, window=4,
)  # fmt: skip


def built():
    torch.manual_seed(0)
    return LanguageModel(CONFIG)


def main():
    assert run.INTERPRET
    fused.DEVICES = ("cpu",)
    dist.init_process_group("gloo")
    one, many = built(), built()
    split_tensors(many, init_device_mesh("cpu", (2,)))
    tokens = torch.randint(11, (1, 5))
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            expected, found = (model.loss(tokens, tokens.roll(-1, 1), reduction="none") for model in (one, many))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # sums in another order
    if dist.get_rank() == 0:
        print("checked", flush=True)
    dist.destroy_process_group()


main()
