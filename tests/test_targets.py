"""The kernels compile for cards that are not here, and fit into the shared memory there.

    python tests/test_targets.py       all cards, dtypes and head dims, in minutes; tests: a part

Triton compiles for a named target without a GPU. Compiled kernels are not run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import kernel

# Compute capability: the shared memory of a program, in KiB (CUDA C++ Programming Guide).
CARDS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def arguments(dtype, d):
    """Kernel -> its arguments in two launches: dtypes for pointers, strides, numbers."""
    strides, sums = (65536 * 12 * d, d, 12 * d, 1), torch.float32
    operand = torch.bfloat16 if dtype == torch.bfloat16 else sums
    sizes = dict(T=65536, H=12, segment=1024, part=1024)
    tensors = {name: dtype for name in "q k v x u w w_q w_k y dy dq dk dv".split()}
    tensors |= {name: sums for name in
                "inv_den delta state state_end sums dw S z S_after z_after".split()}
    tensors |= {name: operand for name in "chunk_states states dstates later".split()}
    tensors |= {f"{name}_strides": strides for name in "q k v x u y dy dq dk dv".split()}
    return {kernel.forward_kernel: [dict(EPS=kernel.EPS)],
            kernel.step_kernel: [dict(EPS=kernel.EPS)],
            kernel.states_kernel: [dict(BACKWARD=False, inv_den=None, delta=None),
                                   dict(BACKWARD=True, state=None)],
            kernel.backward_q_kernel: [{}], kernel.backward_kv_kernel: [{}]}, tensors | sizes


def shared_bytes(function, values, constants, capability):
    """Shared memory of a kernel compiled for a card."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, fixed, attributes = {}, {}, {}

    def declare(value, place):
        if value is None or value == 1 or isinstance(value, (bool, float)):
            fixed[place] = value
            return "constexpr"
        if isinstance(value, torch.dtype) or value % 16 == 0:
            attributes[place] = [["tt.divisibility", 16]]
        return POINTERS[value] if isinstance(value, torch.dtype) else "i32"

    for i, name in enumerate(function.arg_names):
        value = (values | constants)[name]
        if name in constants:
            signature[name], fixed[(i,)] = "constexpr", value
        elif isinstance(value, tuple):
            signature[name] = tuple(declare(x, (i, j)) for j, x in enumerate(value))
        else:
            signature[name] = declare(value, (i,))
    source = ASTSource(function, signature, constexprs=fixed, attrs=attributes)
    options = {key: constants[key] for key in ("num_warps", "num_stages")}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32),
                          options=options).metadata.shared


def check(capability, dtype, d, only=None):
    """Prints the shared memory of each kernel, or of one; False if one has too much of it."""
    limit = CARDS[capability] * 1024
    kernel.gpu = lambda: (limit, 264)
    q, w, worst = torch.empty(1, 1, 2, d, dtype=DTYPES[dtype]), torch.empty(1, d, d), 0
    functions, values = arguments(DTYPES[dtype], d)
    for function, launches in functions.items():
        for more in launches if only in (None, function.__name__) else []:
            constants = kernel.constants(function, q, q, w) | {
                key: x for key, x in more.items() if key in ("EPS", "BACKWARD")}
            worst = max(worst, shared_bytes(function, values | more, constants, capability))
    print(f"{capability} {dtype} head dim {d}: {worst:,} of {limit:,} bytes", flush=True)
    return worst <= limit


@pytest.mark.parametrize("capability, dtype", [(86, "bf16"), (86, "fp16"), (120, "fp32")])
def test_the_largest_kernel_fits(capability, dtype):
    """In another process: in this one the kernels may be the interpreter's."""
    pytest.importorskip("triton")
    run = subprocess.run([sys.executable, __file__, str(capability), dtype, "64",
                          "backward_kv_kernel"], capture_output=True, text=True,
                         env=os.environ | {"TRITON_INTERPRET": "0"})
    assert run.returncode == 0, run.stdout + run.stderr


if __name__ == "__main__":
    if sys.argv[1:]:
        capability, dtype, d, only = sys.argv[1:]
        sys.exit(not check(int(capability), dtype, int(d), only))
    right = [check(capability, dtype, d) for capability in CARDS for dtype in DTYPES
             for d in (16, 32, 64, 128)
             if d < 128 or (dtype == "bf16" and CARDS[capability] * 1024 >= kernel.LARGE)]
    sys.exit(not all(right))
