"""Under bfloat16 autocast the model's numbers are those of float32 to rounding, and each is cast and kept once."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from small import MODELS, SMALL
from torch import Tensor

from gdn2 import LanguageModel, ModelConfig
from gdn2.ops.fused import planning

SHAPE = (2, 40)


def fresh(name: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(**SMALL | MODELS[name]))


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(257, (SHAPE[0], SHAPE[1] + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def step(model: LanguageModel, autocast: bool) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.loss(*batch())
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_float32_to_rounding(name: str) -> None:
    model = fresh(name)
    loss, gradients = step(model, autocast=False)
    narrow_loss, narrow = step(model, autocast=True)
    # A bfloat16 number is off by 2^-9 (0.2 %) at most, and a path through two layers has some twenty roundings whose
    # errors add up as a random walk: a hundredth in relative L2, several times that where a gradient is a sum that
    # nearly cancels. Of the loss, near log(257), a hundredth of what the logits change is left.
    assert narrow_loss == pytest.approx(loss, rel=2e-4)
    assert narrow.keys() == gradients.keys()
    whole, error = (torch.cat([g.flatten() for g in some]) for some in (
        list(gradients.values()), [narrow[n] - g for n, g in gradients.items()],
    ))  # fmt: skip
    assert error.norm() < 0.05 * whole.norm()
    for parameter, gradient in gradients.items():
        assert narrow[parameter].dtype == torch.float32
        assert (narrow[parameter] - gradient).norm() < 0.15 * gradient.norm() + 1e-6 * whole.norm(), parameter


@pytest.mark.parametrize("name", MODELS)
def test_the_residual_stream_stays_float32_and_what_norms_give_is_cast_once(name: str) -> None:
    model = fresh(name)
    seen: list[tuple[str, torch.dtype]] = []
    for label, module in model.named_modules():
        if label.endswith("norm") and ("mixer_norm" in label or "mlp_norm" in label or label == "norm"):
            module.register_forward_hook(lambda _, args, y, label=label: seen.append((label, args[0].dtype)))
            module.register_forward_hook(lambda _, args, y, label=label: seen.append((label, y.dtype)))
    hidden, _ = model(batch()[0])
    assert {dtype for _, dtype in seen} == {torch.float32} == {hidden.dtype}  # nothing is cast without autocast
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(batch()[0])
    assert [dtype for _, dtype in seen] == [torch.float32, torch.bfloat16] * (len(seen) // 2)
    assert len(seen) == 2 * (2 * len(model.blocks) + 1)


@pytest.mark.parametrize("name", ["gdn2", "window", "kda"])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_several_layers_read_is_kept_once(name: str, on_gpu: bool) -> None:
    """Also on the path that a GPU takes, by fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if on_gpu:
        pytest.importorskip("triton")
    kept: Counter[torch.dtype] = Counter()
    storages: set[int] = set()
    alive = []

    def pack(x: Tensor) -> Tensor:
        alive.append(x)
        if x.untyped_storage()._cdata not in storages and x.numel() == SHAPE[0] * SHAPE[1] * 32 and x.shape[-1] == 32:
            storages.add(x.untyped_storage()._cdata)
            kept[x.dtype] += 1
        return x

    with FakeTensorMode(), planning() if on_gpu else nullcontext():
        block = fresh(name).blocks[-1]  # heads have 16 channels together, and the MLP 48: only d_model is 32
        x = torch.randn(*SHAPE, 32, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            block(x, None, None, False)
    assert kept[torch.bfloat16] == 2 + (name == "window")  # one input of the mixer, one of the MLP, attention's output
    if on_gpu:
        assert kept[torch.float32] == 2  # x, and the sum after the mixer
