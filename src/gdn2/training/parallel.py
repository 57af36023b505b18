"""Makes a model that one process built the model of all ranks, in place; the model knows nothing of it."""

import torch

from gdn2.config import DELTA_RULES, RunConfig, require
from gdn2.model import LanguageModel
from gdn2.training.distributed import Ranks

# Mixers whose heads, and those whose tokens, can lie on several ranks.
TENSOR = (*DELTA_RULES, "linear")
CONTEXT = (*TENSOR, "mamba2")


def check_parallel(config: RunConfig, processes: int) -> None:
    """ConfigError for parallelism that this model or these settings do not allow."""
    parallel, model, optim = config.parallel, config.model, config.optim
    require(optim.name == "adamw" or processes == 1, "optim.name", optim.name, "adamw with several processes")
    require(parallel.tensor == 1 or parallel.context == 1, "parallel.context", parallel.context,
            f"1 with parallel.tensor {parallel.tensor}")  # fmt: skip
    for name, mixers in (("tensor", TENSOR), ("context", CONTEXT)):
        ranks = getattr(parallel, name)
        if ranks > 1:
            known = model.mixer in mixers or "mixer" not in model.cell
            require(known, f"parallel.{name}", ranks, f"1 with the mixer {model.mixer}")
            require(config.train.sample_every == 0, "train.sample_every", config.train.sample_every,
                    f"0 with parallel.{name} {ranks}")  # fmt: skip
            require(not config.train.compile, "train.compile", config.train.compile,
                    f"false with parallel.{name} {ranks}")  # fmt: skip
    split = {"mlp_width": model.mlp_width}
    split |= {"num_heads": model.num_heads} if "mixer" in model.cell else {}
    split |= {"attention_heads": model.attention_heads} if "attention" in model.cell else {}
    for name, number in sorted(split.items(), reverse=True):
        require(number % parallel.tensor == 0, f"model.{name}", number,
                f"a multiple of parallel.tensor, {parallel.tensor}")  # fmt: skip


def parallelize(model: LanguageModel, ranks: Ranks, device: torch.device, precision: str) -> None:
    """Split a model that every rank built alike, on the CPU, over the ranks, and move it to `device`."""
    if ranks.mesh is None:
        model.to(device)
        return
    from gdn2.training.context import Context, share_context
    from gdn2.training.sharding import shard

    if ranks.tensor > 1:
        from gdn2.training.tensor_parallel import split_tensors

        split_tensors(model, ranks.mesh["tensor"])
    if ranks.context > 1:
        assert ranks.context_group is not None
        ranks.parts = Context(ranks.context_group)
        share_context(model, ranks.parts)
    shard(model, ranks, device, precision)
