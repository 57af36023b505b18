"""The configurations fit the shared memory of their row of the table. By compiling: the scans, which take most of it,
and in the small rows every kernel of a training pass with 16-bit operands."""

import os
import subprocess
import sys

import torch

ARCHITECTURES = {99: 80, 227: 90}  # kilobytes of shared memory -> compute capability to compile for


def main() -> None:
    """Print bytes needed and bytes there are, of the kernels of each row at its largest heads."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    from gdn2.ops.kernels import configs, launch, tables

    kinds = {
        torch.bfloat16: "*bf16",
        torch.float32: "*fp32",
        torch.int8: "*i8",
        torch.int32: "*i32",
        torch.int64: "*i64",
    }
    largest, training = 0, False

    def kind_of(x):
        if isinstance(x, TensorDescriptor):
            return f"tensordesc<{kinds[x.base.dtype][1:]}[{', '.join(map(str, x.block_shape))}]>"
        return "constexpr" if x is None else kinds[x.dtype] if isinstance(x, torch.Tensor) else "fp32"

    def compile_only(kernel, programs, args, constants, warps=4, stages=1):
        nonlocal largest
        if "scan" not in kernel.fn.__name__ and not (small and training):
            return
        given = [kind_of(x) for x in args]
        signature = dict(zip(kernel.arg_names, given + ["constexpr"] * len(constants), strict=True))
        values = {name: x for name, x in zip(kernel.arg_names, (*args, *constants)) if signature[name] == "constexpr"}
        attributes = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(args) if isinstance(x, torch.Tensor)}
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
        target = GPUTarget("cuda", ARCHITECTURES[shared // 1024], 32)
        compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
        largest = max(largest, compiled.metadata.shared)

    launch.run = compile_only
    for rows in tables.CONFIGS.values():
        for bound, shared, config in rows:
            dtype = torch.bfloat16 if rows is tables.CONFIGS[2] else torch.float32
            small, training = dtype == torch.bfloat16 and shared < 227 * 1024, False
            name, _ = configs.named_config(dtype, bound, bound)
            launch.descriptors = lambda device, shared=shared: ARCHITECTURES[shared // 1024] >= 90
            x = torch.zeros(64, 1, 1, bound, dtype=dtype)  # sequences enough for the wide tiles
            operands = (x, x, x, x.float(), x, x)
            with configs.using({name: config}):
                launch.forward(*operands, 1.0, None, None, True, False)
                launch.forward(*operands[:5], x.float(), 1.0, None, None, True, False)  # write gates in float32
                training = True
                o, _, kept = launch.forward(*operands, 1.0, None, None, True, True)
                launch.backward(o, None, *operands, 1.0, None, None, kept)
            print(largest, shared)
            largest = 0


def test_kernels_fit_the_shared_memory_of_their_row():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    assert len(rows) == 6
    assert all(0 < needed <= there for needed, there in rows), rows


if __name__ == "__main__":
    main()
