"""Language models of a few thousand parameters whose greedy texts differ, for tests."""

import torch

from gdn2.config import ModelConfig
from gdn2.model import LanguageModel

SMALL = {"vocab_size": 257, "d_model": 32, "mlp_width": 48, "num_layers": 2, "num_heads": 2, "key_dim": 8}
SMALL |= {"value_dim": 8, "attention_heads": 2}
HYBRID = {"cell": ("mixer", "attention"), "window": 16}
MODELS = {
    "gdn2": {},
    "window": HYBRID,
    "full": HYBRID | {"window": None},
    "mamba2": {"mixer": "mamba2"},
    "mamba3": {"mixer": "mamba3"},
    "mamba3-mimo": {"mixer": "mamba3", "mimo_rank": 2},
    "kda": {"mixer": "kda"},
}


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = LanguageModel(ModelConfig(**SMALL | changes)).eval()
    for weight in model.parameters():  # the initialisation's small logits would make every text the same
        if weight.dim() > 1:
            weight.data.mul_(3)
    return model


def prompt(n, seed=0):
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
