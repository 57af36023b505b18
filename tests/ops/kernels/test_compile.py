"""The kernels compile for an H100 in the tiles it would run, without one: the interpreter overlooks wrong types."""

import os
import subprocess
import sys

import torch

KERNELS = {
    "carry_tail", "convolve", "convolve_back", "find_likeliest", "fold_segments", "key_gradients",
    "locate_tokens", "map_segments", "map_segments_back", "mix_token", "multiply", "multiply_back", "normalize",
    "normalize_back", "prepare_chunks", "prepare_token", "project_rows", "recur_token", "scan_back",
    "scan_chunks", "score_row", "score_row_back", "tail_back", "turn", "value_gradients",
}  # fmt: skip


def main() -> None:
    """Call every operation, its kernels compiled instead of launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    from gdn2.ops.kernels import choose, conv, cross_entropy, decode, launch, mix, norm, project, rotary, swiglu

    kinds = {
        torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
        torch.int8: "*i8", int: "i32", float: "fp32", type(None): "constexpr",
    }  # fmt: skip
    done = set()

    def kind_of(x):
        if isinstance(x, TensorDescriptor):
            return f"tensordesc<{kinds[x.base.dtype][1:]}[{', '.join(map(str, x.block_shape))}]>"
        return kinds[x.dtype if isinstance(x, torch.Tensor) else type(x)]

    def compile_only(kernel, programs, args, constants, warps=4, stages=1, early=False):
        given = [kind_of(x) for x in args]
        signature = dict(zip(kernel.arg_names, given + ["constexpr"] * len(constants), strict=True))
        values = {name: x for name, x in zip(kernel.arg_names, (*args, *constants)) if signature[name] == "constexpr"}
        source = ASTSource(fn=kernel, signature=signature, constexprs=values)
        options = {"num_warps": warps, "num_stages": stages, "launch_pdl": early}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert early == ("griddepcontrol.wait" in compiled.asm["ptx"])
        done.add(kernel.fn.__name__)

    for module in (choose, conv, cross_entropy, decode, launch, mix, norm, project, rotary, swiglu):
        module.run = compile_only
    mix.begin_early = project.begin_early = choose.begin_early = lambda device: 1

    def leaf(*shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype).requires_grad_()

    def differentiate(outputs, *leaves):
        torch.autograd.grad([o.sum() for o in outputs], leaves)

    H, HV, K, V, T = 2, 4, 12, 100, 9
    keys, values = H * K, HV * V
    x, weight, tail = leaf(1, T, keys), leaf(keys, 4, dtype=torch.float32), leaf(2, 3, keys)
    differentiate(conv.short_conv(x, weight, tail, torch.tensor([0, 5, T]), True), x, weight, tail)
    differentiate(conv.short_conv(x, weight, None, None, False)[:1], x, weight)
    by_key, by_value = torch.zeros(1, T, H, K, dtype=torch.bfloat16), torch.zeros(1, T, HV, V, dtype=torch.bfloat16)
    operands = by_key, by_key, by_value, by_key, by_key, by_value
    activation = launch.Activation(torch.zeros(H), torch.zeros(keys), 1.0, 1.0)
    o, _, kept = launch.forward(*operands, 1.0, None, None, True, True, activation)
    launch.backward(o, None, *operands, 1.0, None, None, kept, activation, o)
    # Heads of whole tiles come through descriptors.
    launch.segment_length, launch.descriptors = lambda config, M, N, s: 1, lambda device: True
    by_key, by_value = torch.zeros(1, T, H, 64, dtype=torch.bfloat16), torch.zeros(1, T, HV, 128, dtype=torch.bfloat16)
    operands = by_key, by_key, by_value, by_key.float(), by_key, by_value
    o, _, kept = launch.forward(*operands, 1.0, None, None, True, True)
    launch.backward(o, None, *operands, 1.0, None, None, kept)
    o, gate, scale = leaf(T, V), leaf(T, V), leaf(V, dtype=torch.float32)
    differentiate([norm.rms_norm(o, scale, 1e-5, gate)], o, scale, gate)
    differentiate([norm.l2_norm(o, 1e-6)], o)
    stream = leaf(T, V, dtype=torch.float32)
    differentiate(norm.add_rms_norm(stream, o, scale, 1e-5, torch.bfloat16), stream, o, scale)
    differentiate([swiglu.swiglu(o, gate)], o, gate)
    differentiate([rotary.rotate(x.view(1, T, H, K), torch.zeros(1, T, K // 2))], x)
    differentiate([cross_entropy.cross_entropy(o, torch.zeros(T, dtype=torch.int64), -100)], o)
    widths = (keys, keys, values, keys, keys, values, values)
    token = decode.Token(*(torch.zeros(3, n, dtype=torch.bfloat16) for n in widths))
    taps = [torch.zeros(n, 4) for n in widths[:3]]
    weights = decode.Weights(*taps, torch.zeros(H), torch.zeros(keys), torch.zeros(V))
    tails = [torch.zeros(3, 3, n, dtype=torch.bfloat16) for n in widths[:3]]
    state = decode.State(*tails, torch.zeros(3, HV, K, V))
    options = {"scale": 1.0, "largest_erase": 1.0, "norm_eps": 1e-5}
    decode.decode(token, weights, state, **options)
    decode.decode_in_place(token, weights, state, torch.arange(3), **options)
    low = mix.LowRank(*(torch.zeros(n, 12, dtype=torch.bfloat16) for n in (keys, keys)), torch.zeros(keys))
    taps = [torch.zeros(keys, 4)] * 3
    weights = decode.Weights(*taps, torch.zeros(H), torch.zeros(keys), torch.zeros(K))
    state = decode.State(*(tails[0] for _ in range(3)), torch.zeros(3, H, K, K))
    mix.mix(torch.zeros(3, 5 * keys + 24, dtype=torch.bfloat16), low, weights, state, **options)
    x, weight = torch.zeros(2, 40, dtype=torch.bfloat16), torch.zeros(20, 40, dtype=torch.bfloat16)
    project.project(x, weight, norm=x[0], added=x[:, :20], dtype=torch.float32)
    project.project(x, weight, norm=x[0], swiglu=True)
    choose.likeliest(torch.zeros(2, 32_000))
    print(*done)


def test_every_kernel_compiles_for_an_h100():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) == KERNELS


if __name__ == "__main__":
    main()
