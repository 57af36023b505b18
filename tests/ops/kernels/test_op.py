"""An op runs its function itself on plain tensors, with the results and gradients that the library's path has."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from gdn2.layers import RMSNorm
from gdn2.ops import fused
from gdn2.ops.kernels import configs, conv, cross_entropy, library, norm, op, rotary, run, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape):
    return torch.randn(*shape, device=DEVICE)


def calls():
    torch.manual_seed(0)
    x, weight, gate = normal(2, 5, 16), normal(16), normal(2, 5, 16)
    q, k, v, w = (normal(1, 20, 2, 16) for _ in range(4))
    rule = q, k, v, -w.abs(), w.sigmoid(), w.sigmoid(), normal(1, 2, 16, 16), None, None, None, 0.3, 1.0, 1.0, False
    targets = torch.tensor([0, 4, -1], device=DEVICE)
    return {
        "swiglu": (swiglu._swiglu, (x, gate)),
        "norm": (norm._norm, (x, weight, gate, 1e-5, 1 / 16, torch.float32)),
        "sum and norm": (norm._add_norm, (x, gate, weight, 1e-5, torch.float32)),
        "convolution": (conv._short_conv, (x, normal(16, 4), normal(2, 3, 16), None, True)),
        "rotation": (rotary._rotate, (normal(1, 3, 2, 4), torch.rand(1, 3, 2, device=DEVICE), False)),
        "loss": (cross_entropy._cross_entropy, (normal(3, 5), targets, -1)),
        "rule": (library.forward, (*rule, True, True)),
    }


def tensors(outputs):
    return [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(y, torch.Tensor)]


def results(call, inputs):
    leaves = [x.clone().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x for x in inputs]
    outputs = tensors(call(*leaves))
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    grown = [y for y in outputs if y.requires_grad]
    return [*outputs, *torch.autograd.grad(grown, wanted, [y.cos() for y in grown], allow_unused=True)]


@pytest.mark.parametrize("name", calls())
def test_both_paths_give_the_same_bits(name, monkeypatch):
    call, inputs = calls()[name]
    expected = results(call.library, inputs)

    def refuse(*_):
        raise AssertionError("the library was asked")

    back = swiglu._swiglu_backward, norm._norm_backward, norm._add_norm_backward, conv._short_conv_backward
    for other in (call, *back, cross_entropy._cross_entropy_backward, library.backward):
        monkeypatch.setattr(other, "library", refuse)
    found = results(call, inputs)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert (a is None and b is None) or torch.equal(a, b)
    with torch.no_grad():
        for a, b in zip(tensors(call(*inputs)), expected):
            assert torch.equal(a, b)


def test_modes_see_the_op():
    class Mode(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen += (str(function),)
            return function(*args, **kwargs or {})

    with Mode() as mode:
        swiglu.swiglu(normal(4), normal(4))
    assert "gdn2.swiglu.default" in mode.seen


def test_gradients_of_gradients_are_refused():
    x = normal(4).requires_grad_()
    (dx,) = torch.autograd.grad(swiglu.swiglu(x, normal(4)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # what torch.func.jvp imports
@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("gradients", [True, False])
def test_tangents_are_refused(name, gradients):
    """The library would drop them, and so would the function itself: a derivative of zero."""
    call, (x, *others) = calls()[name]
    with torch.set_grad_enabled(gradients):
        with pytest.raises(NotImplementedError, match="no forward-mode"):
            torch.func.jvp(lambda x: call(x, *others), (x,), (x.cos(),))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
            call(forward_ad.make_dual(x, x.cos()), *others)
        with forward_ad.dual_level():  # of something else
            call(x, *others)


def test_a_subclass_of_tensor_takes_the_library():
    class Own(torch.Tensor):
        pass

    assert op._plain((normal(2), torch.nn.Parameter(normal(2)), None, 3))
    assert not op._plain((normal(2), normal(2).as_subclass(Own)))


@pytest.mark.parametrize("name", calls())
def test_kernels_take_subclasses_that_have_memory(name):
    """Users' own tensors, and Parameters of other libraries."""

    class Own(torch.Tensor):
        pass

    class Weight(torch.nn.Parameter):
        pass

    call, inputs = calls()[name]
    for kind in (Own, Weight):
        others = [x.as_subclass(kind) if isinstance(x, torch.Tensor) else x for x in inputs]
        for a, b in zip(tensors(call(*others)), tensors(call(*inputs))):
            assert torch.equal(a, b)


def test_a_collective_under_way_is_waited_for(monkeypatch):
    """What a Linear split by inputs returns is no memory yet, and no pointer."""
    monkeypatch.setattr(fused, "DEVICES", ("cuda", "cpu"))
    norm, x, added = RMSNorm(16).to(DEVICE), normal(3, 16), normal(3, 16)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for a, b in zip(norm.of_sum(x, AsyncCollectiveTensor(added)), norm.of_sum(x, added)):
                assert type(a) is torch.Tensor
                assert torch.equal(a, b)


def test_a_kernel_takes_no_pointer_that_is_none():
    under_way = AsyncCollectiveTensor(normal(4, 16))
    with pytest.raises(TypeError, match="AsyncCollectiveTensor; expected a torch"):
        swiglu.swiglu_of_pair(under_way)
    with pytest.raises(TypeError, match="AsyncCollectiveTensor; expected a torch"):
        run._kind(TensorDescriptor(under_way, [4, 16], [16, 1], [4, 16]))


def test_a_negative_view_is_what_it_stands_for():
    x, gate = normal(4), normal(4)
    negative = torch._neg_view(x)
    assert negative.is_contiguous()
    assert negative.data_ptr() == x.data_ptr()
    with torch.no_grad():
        assert torch.equal(swiglu.swiglu(negative, gate), swiglu.swiglu(-x, gate))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_tracing_records_the_op():
    x, gate = normal(4), normal(4)
    traced = torch.jit.trace(swiglu.swiglu, (x, gate))
    assert "gdn2::swiglu" in str(traced.graph)
    assert torch.equal(traced(gate, x), swiglu.swiglu(gate, x))


FIRST_CALL = """
import sys, torch
from gdn2.layers import GatedDeltaNet2
from gdn2.ops import fused
fused.DEVICES = ("cpu", "cuda")
layer, x = (y.to(WHERE) for y in (GatedDeltaNet2(32, 2, key_dim=16, value_dim=16), torch.randn(1, 20, 32)))
layer(x)[0].sum().backward()
assert "gdn2.ops.kernels.conv" in sys.modules
assert "torch._dynamo" not in sys.modules
"""


def test_a_first_call_does_not_load_the_compiler():
    script = FIRST_CALL.replace("WHERE", repr(DEVICE))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_constant_is_what_torch_means():
    ours, theirs = configs.constant(lambda device: 0), torch.compiler.assume_constant_result(lambda device: 0)
    assert vars(ours) == vars(theirs) != {}
