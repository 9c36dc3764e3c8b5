"""Linear attention as functions of tensors: the definition, then the same numbers in less time.

    y_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j),    j <= i if causal, all j if not

where phi maps a query or a key to F features, phi(q).phi(k) >= 0 (Hedgehog paper, arXiv 2402.04347,
section 3). Shapes are those of torch.nn.functional.scaled_dot_product_attention:

    phi_q, phi_k  (B, H, T, F)   features: batch, heads, time, feature dim
    v, y          (B, H, T, D)   values and outputs, D the head dim
    key_mask      (B, T)         bool, False where a key is padding
    S             (B, H, F, D)   the state: sum over the keys so far of phi(k) v^T
    z             (B, H, F)      and its normaliser: sum over the keys so far of phi(k)

`naive_linear_attention` is the definition, T x T, and what every other function is tested against.
`chunked_linear_attention` costs O(T) in time and memory: a state carries what earlier chunks said.
`recurrent_linear_attention` goes one token at a time, by `recurrent_step`, which generation uses.
`hedgehog_attention` has Hedgehog's map inside and is what the GPT calls, `linear_attention` takes
features: on a Hopper GPU both are fused Triton kernels, elsewhere the chunked form.
`python kernel.py` checks and times them.
"""

import argparse
import datetime
import os
import time
from types import SimpleNamespace

import torch
from torch.nn.functional import pad

try:
    import triton
    import triton.language as tl
except ImportError:     # then the kernels below are only there to be read
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=float)

# Added to the denominator: a query that matches no key at all (ReLU features can all be zero, and
# saturated softmax features nearly) gets the output 0 and not 0/0.
EPS = 1e-12


def hedgehog_features(x, w):
    """Hedgehog's phi(x) = [softmax(x W), softmax(-x W)]: (B, H, T, d) -> (B, H, T, 2d).

    w (H, d, d) is one W a head; each softmax is over its own d features.
    """
    h = x @ w
    return torch.cat([h.softmax(-1), (-h).softmax(-1)], dim=-1)


def linear_attention_weights(phi_q, phi_k, causal=True, key_mask=None):
    """The weights a_ij = phi(q_i).phi(k_j) / sum_m phi(q_i).phi(k_m), (B, H, T_q, T_k).

    With T_q < T_k the queries are the last T_q tokens.
    """
    A = phi_q @ phi_k.mT                                    # (B, H, T_q, T_k)
    if causal:
        A = A.tril(A.size(-1) - A.size(-2))
    if key_mask is not None:
        A = A * key_mask[:, None, None, :]
    return A / (A.sum(-1, keepdim=True) + EPS)


def naive_linear_attention(phi_q, phi_k, v, causal=True, key_mask=None):
    """The definition, O(T^2): weights, then their mean of the values. Returns y (B, H, T, D)."""
    return linear_attention_weights(phi_q, phi_k, causal, key_mask) @ v


def chunked_linear_attention(phi_q, phi_k, v, causal=True, key_mask=None, state=None, chunk=64):
    """The same in O(T): all pairs only inside chunks, what came before through the state.

    `state` is the (S, z) that an earlier segment returned, or None. Sums are kept in fp32 (fp64 for
    fp64 inputs), under autocast too. Differentiable in all inputs.
    Returns y (B, H, T, D) in v's dtype and the state (S, z) after the last token.
    """
    dtype, sum_dtype = v.dtype, torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(v.device.type, enabled=False):
        phi_q, phi_k, v = (x.to(sum_dtype) for x in (phi_q, phi_k, v))
        if key_mask is not None:
            phi_k = phi_k * key_mask[:, None, :, None]      # a zero feature adds to no sum
        if not causal:
            S, z = phi_k.mT @ v, phi_k.sum(2)               # (B, H, F, D), (B, H, F)
            if state is not None:
                S, z = S + state[0], z + state[1]
            y = phi_q @ S / (phi_q @ z.unsqueeze(-1) + EPS)
            return y.to(dtype), (S, z)

        T = v.size(2)
        C = min(chunk, T)
        # N chunks of C tokens; the last is filled up with zero features. (B, H, N, C, F or D)
        phi_q, phi_k, v = (pad(x, (0, 0, 0, -T % C)).unflatten(2, (-1, C))
                           for x in (phi_q, phi_k, v))
        S, z = phi_k.mT @ v, phi_k.sum(-2)                  # what each chunk adds
        A = (phi_q @ phi_k.mT).tril()                       # (B, H, N, C, C): inside each chunk
        num, den = A @ v, A.sum(-1, keepdim=True)
        if state is not None or S.size(2) > 1:              # and from all that came before it
            if state is None:
                state = torch.zeros_like(S[:, :, 0]), torch.zeros_like(z[:, :, 0])
            S = torch.cat([state[0].unsqueeze(2), S], dim=2).cumsum(2)  # (B, H, N+1, F, D)
            z = torch.cat([state[1].unsqueeze(2), z], dim=2).cumsum(2)  # n: all before chunk n
            num = num + phi_q @ S[:, :, :-1]
            den = den + phi_q @ z[:, :, :-1].unsqueeze(-1)
        y = (num / (den + EPS)).flatten(2, 3)[:, :, :T]     # (B, H, T, D)
        return y.to(dtype), (S[:, :, -1], z[:, :, -1])


def recurrent_step(phi_q, phi_k, v, state=None):
    """One token: phi_q, phi_k (B, H, F) and v (B, H, D) -> y (B, H, D) and the new (S, z).

    S_i = S_{i-1} + phi(k_i) v_i^T,  z_i = z_{i-1} + phi(k_i),  y_i = phi(q_i) S_i / phi(q_i).z_i;
    time and memory do not depend on how many tokens came before.
    """
    dtype, sum_dtype = v.dtype, torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(v.device.type, enabled=False):
        phi_q, phi_k, v = (x.to(sum_dtype) for x in (phi_q, phi_k, v))
        S = phi_k.unsqueeze(-1) * v.unsqueeze(-2)           # (B, H, F, D)
        z = phi_k                                           # (B, H, F)
        if state is not None:
            S, z = S + state[0], z + state[1]
        num = (phi_q.unsqueeze(-2) @ S).squeeze(-2)         # (B, H, D)
        den = (phi_q * z).sum(-1, keepdim=True)
        return (num / (den + EPS)).to(dtype), (S, z)


def recurrent_linear_attention(phi_q, phi_k, v, state=None):
    """`recurrent_step` over a whole sequence. Returns y (B, H, T, D) and the last state."""
    y = []
    for t in range(v.size(2)):
        y_t, state = recurrent_step(phi_q[:, :, t], phi_k[:, :, t], v[:, :, t], state)
        y.append(y_t)
    return torch.stack(y, dim=2), state


# From here on the same in Triton. A function under @triton.jit is compiled for the GPU; the ones
# called *_kernel are started as a grid of programs, each of which asks tl.program_id who it is.
# Tensors come in as a pointer to their first element and strides: tl.load reads the tile of
# elements at a tile of addresses, `mask` says which of them to touch, and what is tl.constexpr is
# known when the kernel is compiled. tl.dot multiplies two tiles on the matrix units. A program runs
# on num_warps * 32 threads, and its loads run num_stages - 1 rounds of its loop ahead.
#
# One program handles one head and a stretch of its tokens, chunk after chunk. Where the features
# come from is a switch: LEARNED means Hedgehog's, computed inside from q, k and their matrices W,
#
#     h = x W,   phi(x) = [softmax(h), softmax(-h)]
#
# and otherwise q and k are the features already. The names, beside those at the top:
#
#     T, C         tokens of the sequence, and of a chunk; i, j, rows: positions in them
#     N, segment   segments of a sequence and their length; n: which one
#     part         length of what one program of the gradients handles, a segment or less; there n
#                  and N count parts
#     X            width of q and k: d, or F where the features are given
#     BF, BD, BX   F, D and X rounded up to a power of two, which all tiles have to be
#     P            what dots multiply: "bf16" for bf16 inputs, "ieee" for fp32, "tf32" for fp16,
#                  in which S and phi / den would overflow. Sums are fp32; states that are only
#                  operands are kept as bf16 for bf16 inputs
#     state        (B, H, D + 1, F): S^T, and z as one more row, S^T's for a value that is always 1
#     S            in a kernel always S^T, [D, F]: so S += v^T phi(k) needs no transposed phi
#
# The comment at the end of a line is the shape of the tile on it.

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def operand(x, P: tl.constexpr):
    return x.to(tl.bfloat16 if P == "bf16" else tl.float32)


@triton.jit
def dot(a, b, P: tl.constexpr):
    return tl.dot(operand(a, P), operand(b, P), input_precision="ieee" if P == "bf16" else P)


@triton.jit
def transposed(x, P: tl.constexpr):
    """x^T as an operand: rounded first, which halves what has to be moved."""
    return tl.trans(operand(x, P))


@triton.jit
def addresses(x, stride, rows, cols, height, width):
    """Where x[rows, cols] is (64 bits: it can be far), and which of it is inside x."""
    inside = (rows < height)[:, None] & (cols < width)[None, :]
    return x + rows.to(tl.int64)[:, None] * stride + cols[None, :], inside


@triton.jit
def load(x, stride, rows, cols, height, width):
    where, inside = addresses(x, stride, rows, cols, height, width)
    return tl.load(where, mask=inside, other=0.0)


@triton.jit
def store(x, stride, rows, cols, height, width, value):
    where, inside = addresses(x, stride, rows, cols, height, width)
    tl.store(where, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def head(x, strides, bh, H):
    """The first token of head bh, of B*H, in a (B, H, T, ...) tensor."""
    return x + (bh // H).to(tl.int64) * strides[0] + (bh % H).to(tl.int64) * strides[1]


@triton.jit
def prefetch(x, stride, rows, height):
    """Asks for the first 128 bytes of each row, all of it for bf16 and a head dim of 64: when they
    are loaded later they come from the L2 cache. Triton has no name for this instruction and wants
    a result, hence the 0 that the second one writes and nobody reads."""
    where = x + tl.minimum(rows, height - 1).to(tl.int64) * stride
    if not INTERPRETED:
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l",
                                  [where.to(tl.int64)], tl.int32, is_pure=False, pack=1)


@triton.jit
def load_map(w, bh, H, LEARNED: tl.constexpr, BX: tl.constexpr):
    if LEARNED:
        f = tl.arange(0, BX)
        W = load(w + (bh % H) * BX * BX, BX, f, f, BX, BX)                  # [d, d]
    else:
        W = tl.zeros((1, 1), tl.float32)    # not used, but has to be something
    return W


@triton.jit
def plus_minus():
    return 1 - 2 * tl.arange(0, 2)[None, :, None]                           # [1, 2, 1]: 1, -1


@triton.jit
def features(x, W, scale, LEARNED: tl.constexpr, P: tl.constexpr):
    """scale phi(x) of a chunk."""
    if LEARNED:
        # h = x W,  phi = [softmax(h), softmax(-h)];  e^h = 2^(h log2 e) is one instruction
        h = dot(x, W, P) * LOG2E                                            # [C, d]
        h = tl.reshape(h, (x.shape[0], 1, x.shape[1])) * plus_minus()       # [C, 2, d]
        e = tl.exp2(h - tl.max(h, 2)[:, :, None])                           # [C, 2, d]
        phi = e * (scale[:, None] / tl.sum(e, 2))[:, :, None]               # [C, 2, d]
        phi = tl.reshape(phi, (x.shape[0], 2 * x.shape[1]))                 # [C, F]
    else:
        phi = x.to(tl.float32) * scale[:, None]                             # [C, F]
    return phi


@triton.jit
def map_gradient(x, W, phi, dphi, LEARNED: tl.constexpr, P: tl.constexpr):
    """From the gradient of a chunk's phi(x) to that of x, and what it adds to dW."""
    if LEARNED:
        # dh = p (dp - sum_f p dp) - m (dm - sum_f m dm),    dx = dh W^T,    dW = sum_i x_i^T dh_i
        phi = tl.reshape(phi.to(tl.float32), (x.shape[0], 2, x.shape[1]))   # [C, 2, d]
        dphi = tl.reshape(dphi, (x.shape[0], 2, x.shape[1]))                # [C, 2, d]
        dh = phi * (dphi - tl.sum(phi * dphi, 2)[:, :, None])               # [C, 2, d]
        dh = operand(tl.sum(dh * plus_minus(), 1), P)                       # [C, d]
        dx, dW = dot(dh, transposed(W, P), P), dot(transposed(x, P), dh, P)     # [C, d], [d, d]
    else:
        dx, dW = dphi, tl.zeros((1, 1), tl.float32)                         # [C, F]
    return dx, dW


@triton.jit
def load_state(state, index, F, D, BF: tl.constexpr, BD: tl.constexpr):
    """S^T and z of one state; zeros if there is none. z is the first of 16 rows, the others 0: a
    dot needs 16 rows, and adds up features much faster than a tl.sum over rows."""
    f, c, z_row = tl.arange(0, BF), tl.arange(0, BD), tl.arange(0, 16)
    if state is None:
        S, z = tl.zeros((BD, BF), tl.float32), tl.zeros((16, BF), tl.float32)
    else:
        state += index.to(tl.int64) * (D + 1) * F
        S = load(state, F, c, f, D, F)                                      # [D, F]
        z = load(state + D * F, F, z_row, f, 1, F)                          # [16, F]
    return S, z


@triton.jit
def store_state(state, index, S, z, F, D, BF: tl.constexpr, BD: tl.constexpr):
    f, c, z_row = tl.arange(0, BF), tl.arange(0, BD), tl.arange(0, 16)
    state += index.to(tl.int64) * (D + 1) * F
    store(state, F, c, f, D, F, S)
    store(state + D * F, F, z_row, f, 1, F, z)


@triton.jit
def forward_kernel(q, k, v, w_q, w_k, y, inv_den, state, state_end,
                   q_strides, k_strides, v_strides, y_strides, T, H, segment,
                   F: tl.constexpr, D: tl.constexpr, X: tl.constexpr, EPS: tl.constexpr,
                   LEARNED: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BF: tl.constexpr,
                   BD: tl.constexpr, BX: tl.constexpr):
    """y of one segment, from the state before it; the last segment stores the state at the end."""
    bh, n, N = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    q, k = head(q, q_strides, bh, H), head(k, k_strides, bh, H)
    v, y = head(v, v_strides, bh, H), head(y, y_strides, bh, H)
    W_q, W_k = load_map(w_q, bh, H, LEARNED, BX), load_map(w_k, bh, H, LEARNED, BX)     # [d, d]
    i, c, b = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BX)
    causal = i[:, None] >= i[None, :]                                       # [C, C]
    first_row = (tl.arange(0, 16) == 0)[:, None]                            # [16, 1]
    S, z = load_state(state, bh * N + n, F, D, BF, BD)                      # [D, F], [16, F]

    for start in range(n * segment, min((n + 1) * segment, T), C):
        rows = start + i
        real = tl.where(rows < T, 1.0, 0.0)     # past the end features are 0 and add to no sum
        k_c = load(k, k_strides[2], rows, b, T, X)                          # [C, d]
        q_c = load(q, q_strides[2], rows, b, T, X)                          # [C, d]
        v_c = load(v, v_strides[2], rows, c, T, D)                          # [C, D]

        # with two stages Triton issues the next round's loads only at the end of this one
        prefetch(k, k_strides[2], rows + C, T)
        prefetch(q, q_strides[2], rows + C, T)
        prefetch(v, v_strides[2], rows + C, T)
        phi_k = operand(features(k_c, W_k, real, LEARNED, P), P)            # [C, F]
        phi_q = operand(features(q_c, W_q, real, LEARNED, P), P)            # [C, F]

        # from this chunk: num_i = sum_j A_ij v_j,  den_i = sum_j A_ij,  A_ij = phi(q_i).phi(k_j)
        A = tl.where(causal, dot(phi_q, transposed(phi_k, P), P), 0.0)      # [C, C]
        num, den = dot(A, v_c, P), tl.sum(A, 1)                             # [C, D], [C]

        # from those before: num_i += S^T phi(q_i),  den_i += z.phi(q_i);  then y_i = num_i / den_i
        num += dot(phi_q, transposed(S, P), P)                              # [C, D]
        den += tl.sum(dot(phi_q, transposed(z, P), P), 1)                   # [C]
        inv = 1 / (den + EPS)                                               # [C]
        store(y, y_strides[2], rows, c, T, D, num * inv[:, None])
        tl.store(inv_den + bh.to(tl.int64) * T + rows, inv, mask=rows < T)

        # S += sum_j phi(k_j) v_j^T,  z += sum_j phi(k_j)
        S += dot(transposed(v_c, P), phi_k, P)                              # [D, F]
        z += dot(tl.where(first_row, real[None, :], 0.0), phi_k, P)         # [16, F]
    if n == N - 1:
        store_state(state_end, bh, S, z, F, D, BF, BD)


# The backward pass, with a_i = phi(q_i) / den_i, delta_i = dy_i.y_i, and for j <= i
#
#     B_ij = dy_i.v_j - delta_i
#     dphi(q_i) = (sum_j B_ij phi(k_j)) / den_i               dS = sum over later i of a_i dy_i^T
#     dphi(k_j) =  sum_i B_ij a_i                             dz = sum over later i of -delta_i a_i
#     dv_j      =  sum_i (a_i.phi(k_j)) dy_i
#
# where tokens of other chunks come through states: sum_j B_ij phi(k_j) over all earlier chunks is
# S dy_i - delta_i z, the two sums over all later ones are dS v_j + dz and dS^T phi(k_j). dS and dz
# are a state that runs backwards in time, from a_i, dy_i and -delta_i instead of phi(k_j), v_j, 1.
# Through the map, with p = softmax(h) and m = softmax(-h) where h = x W:
#
#     dh = p (dp - sum_f p dp) - m (dm - sum_f m dm),    dx = dh W^T,    dW = sum_i x_i^T dh_i
#
# Saved are q, k, v, y, 1 / den and the states before segments; all else is computed again. First a
# sweep leaves the state of every chunk in memory, then the gradients of all chunks are independent
# of each other. Tried on an H200 (bf16, 65,536 tokens, 12 heads of 64) and slower, each against the
# form of its day:
#   - one kernel for all gradients, which computes phi once: its tiles exceed the registers, it took
#     1.25 ms where the two below took 0.92; and 1.52 with chunks of 128 on 8 warps
#   - the states carried through the gradient kernels as through the forward one: 201 MiB less, but
#     registers spilled, and these two kernels took 1.54 ms instead of 1.24 with the sweeps
#   - at most 168 registers a thread, so that three programs run on an SM and not two: most spill;
#     states_kernel, with two stages instead of three, does not. It took 136 us and not 168 at
#     T = 2,048, where all its programs then run at once, but 160 and not 125 at T = 65,536
#   - tensor descriptors (TMA) for loads
#   - the next chunk prefetched in backward_kv_kernel too (489 us, not 478), or in backward_q_kernel
#     at the start of a round, where the stores to shared memory then wait for it (439, not 390)
#   - the softmaxes' maxima and sums saved once and loaded later: a fifth to three tenths fewer
#     instructions a round, but the gradients came no faster, and forward took 290 us, not 252
#   - programs in reverse order, to meet what the kernel before left in the L2 cache
#   - chunks of 32 (too small for the fast matrix instructions) and, where they fit, of 128 (more
#     work above the diagonal, one program at a time on an SM)
#   - z and dz as a tl.sum over rows instead of a dot: forward 0.40 ms instead of 0.32
# What bounds it, by the hardware's counters (before segments were cut as they are now): the
# registers of two programs, 8 warps, fill an SM; in 61 to 72 % of the cycles no warp is ready to
# issue; memory is 37 to 59 % busy.
# A trap: the weights that add up z, as a right operand [C, 16] made inside the loop, gave wrong
# numbers (Triton 3.6); that is why they are 16 rows and on the left.


@triton.jit
def states_kernel(x, u, w, inv_den, delta, state, chunk_states, state_end, x_strides, u_strides,
                  T, H, segment, F: tl.constexpr, D: tl.constexpr, X: tl.constexpr,
                  LEARNED: tl.constexpr, BACKWARD: tl.constexpr, P: tl.constexpr,
                  C: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, BX: tl.constexpr):
    """S and z along one segment, from x = k and u = v; BACKWARD, dS and dz from x = q and u = dy.
    Stores where that ends, the state at every chunk, or both."""
    bh, n, N = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    x, u = head(x, x_strides, bh, H), head(u, u_strides, bh, H)
    W = load_map(w, bh, H, LEARNED, BX)                                     # [d, d]
    i, c, b = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BX)
    first_row = (tl.arange(0, 16) == 0)[:, None]                            # [16, 1]
    S, z = load_state(state, bh * N + n, F, D, BF, BD)                      # [D, F], [16, F]

    begin, end = n * segment, min((n + 1) * segment, T)
    if chunk_states is None and n == N - 1:
        end = begin         # nobody needs what the last segment adds
    last = begin + (end - begin - 1) // C * C
    for step in range(0, end - begin, C):
        start = last - step if BACKWARD else begin + step
        rows = start + i
        if chunk_states is not None:
            store_state(chunk_states, bh * tl.cdiv(T, C) + start // C, S, z, F, D, BF, BD)
        scale = tl.where(rows < T, 1.0, 0.0)                                # [C]
        weight = scale
        if BACKWARD:
            row = bh.to(tl.int64) * T + rows
            scale = tl.load(inv_den + row, mask=rows < T, other=0.0)
            weight = -tl.load(delta + row, mask=rows < T, other=0.0)
        x_c = load(x, x_strides[2], rows, b, T, X)                          # [C, d]
        u_c = load(u, u_strides[2], rows, c, T, D)                          # [C, D]
        phi = operand(features(x_c, W, scale, LEARNED, P), P)               # [C, F]

        # S += sum_j phi(k_j) v_j^T,  z += sum_j phi(k_j)
        S += dot(transposed(u_c, P), phi, P)                                # [D, F]
        z += dot(tl.where(first_row, weight[None, :], 0.0), phi, P)         # [16, F]
    if state_end is not None:
        store_state(state_end, bh * N + n, S, z, F, D, BF, BD)


@triton.jit
def prefix_kernel(own, before, initial, N, width, BACKWARD: tl.constexpr, BN: tl.constexpr,
                  BLOCK: tl.constexpr):
    """before[n] = initial + sum of own[m] over m < n; BACKWARD, m > n. Both (B*H, N, width)."""
    bh, i = tl.program_id(0).to(tl.int64), tl.arange(0, BN)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = N - 1 - i if BACKWARD else i        # the segments in the order of the sum
    m = n + 1 if BACKWARD else n - 1
    x = tl.load(own + (bh * N + m[:, None]) * width + c[None, :],
                mask=(i > 0)[:, None] & (i < N)[:, None] & (c < width)[None, :], other=0.0)
    if initial is not None:
        first = tl.load(initial + bh * width + c, mask=c < width, other=0.0)
        x += tl.where((i == 0)[:, None], first[None, :], 0.0)
    tl.store(before + (bh * N + n[:, None]) * width + c[None, :],
             tl.cumsum(x, 0).to(before.dtype.element_ty),
             mask=(i < N)[:, None] & (c < width)[None, :])


@triton.jit
def backward_q_kernel(q, k, v, w_q, w_k, y, dy, inv_den, delta, states, dq, dw,
                      q_strides, k_strides, v_strides, y_strides, dy_strides, dq_strides,
                      T, H, part, F: tl.constexpr, D: tl.constexpr, X: tl.constexpr,
                      LEARNED: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BF: tl.constexpr,
                      BD: tl.constexpr, BX: tl.constexpr):
    """dq and delta of one part, and what it adds to dW_q."""
    bh, n, N = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    q, k = head(q, q_strides, bh, H), head(k, k_strides, bh, H)
    v, y = head(v, v_strides, bh, H), head(y, y_strides, bh, H)
    dy, dq = head(dy, dy_strides, bh, H), head(dq, dq_strides, bh, H)
    W_q, W_k = load_map(w_q, bh, H, LEARNED, BX), load_map(w_k, bh, H, LEARNED, BX)     # [d, d]
    i, c, f, b = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BF), tl.arange(0, BX)
    causal = i[:, None] >= i[None, :]                                       # [C, C]
    dW_q = tl.zeros((BX, BX) if LEARNED else (1, 1), tl.float32)            # [d, d]

    for start in range(n * part, min((n + 1) * part, T), C):
        rows = start + i
        row = bh.to(tl.int64) * T + rows
        S_at = states + (bh.to(tl.int64) * tl.cdiv(T, C) + start // C) * (D + 1) * F
        dy_c = load(dy, dy_strides[2], rows, c, T, D)                       # [C, D]
        q_c = load(q, q_strides[2], rows, b, T, X)                          # [C, d]
        k_c = load(k, k_strides[2], rows, b, T, X)                          # [C, d]
        v_c = load(v, v_strides[2], rows, c, T, D)                          # [C, D]
        S, z = load(S_at, F, c, f, D, F), tl.load(S_at + D * F + f, mask=f < F, other=0.0)
        inv = tl.load(inv_den + row, mask=rows < T, other=0.0)              # [C]
        real = tl.where(rows < T, 1.0, 0.0)                                 # [C]
        phi_k = operand(features(k_c, W_k, real, LEARNED, P), P)            # [C, F]

        # delta_i = dy_i.y_i,  B_ij = dy_i.v_j - delta_i for j <= i
        y_c = load(y, y_strides[2], rows, c, T, D)                          # [C, D]
        delta_c = tl.sum(dy_c.to(tl.float32) * y_c.to(tl.float32), 1)       # [C]
        tl.store(delta + row, delta_c, mask=rows < T)
        B = dot(dy_c, transposed(v_c, P), P) - delta_c[:, None]             # [C, C]
        B = tl.where(causal, B, 0.0)

        # dphi(q_i) = (sum_j B_ij phi(k_j) + S dy_i - delta_i z) / den_i, then dq and dW_q
        phi_q = features(q_c, W_q, real, LEARNED, P)                        # [C, F]
        dphi = dot(B, phi_k, P) + dot(dy_c, S, P)                           # [C, F]
        dphi = (dphi - delta_c[:, None] * z.to(tl.float32)[None, :]) * inv[:, None]
        # what follows is long and loads nothing: time to fetch the next chunk
        prefetch(k, k_strides[2], rows + C, T)
        prefetch(q, q_strides[2], rows + C, T)
        prefetch(v, v_strides[2], rows + C, T)
        prefetch(y, y_strides[2], rows + C, T)
        prefetch(dy, dy_strides[2], rows + C, T)
        dq_c, dW = map_gradient(q_c, W_q, phi_q, dphi, LEARNED, P)
        store(dq, dq_strides[2], rows, b, T, X, dq_c)
        dW_q += dW                                                          # [d, d]
    if LEARNED:
        store(dw + (bh * N + n).to(tl.int64) * X * X, X, b, b, X, X, dW_q)


@triton.jit
def backward_kv_kernel(q, k, v, w_q, w_k, dy, inv_den, delta, dstates, later, dk, dv, dw,
                       q_strides, k_strides, v_strides, dy_strides, dk_strides, dv_strides,
                       segment, T, H, part, F: tl.constexpr, D: tl.constexpr, X: tl.constexpr,
                       LEARNED: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BF: tl.constexpr,
                       BD: tl.constexpr, BX: tl.constexpr):
    """dk and dv of one part, and what it adds to dW_k. Tiles of pairs are (j, i) here. dstates are
    sums inside the segment; `later`, if not None, is what comes to it from those after it."""
    bh, n, N = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    q, k = head(q, q_strides, bh, H), head(k, k_strides, bh, H)
    v, dy = head(v, v_strides, bh, H), head(dy, dy_strides, bh, H)
    dk, dv = head(dk, dk_strides, bh, H), head(dv, dv_strides, bh, H)
    W_q, W_k = load_map(w_q, bh, H, LEARNED, BX), load_map(w_k, bh, H, LEARNED, BX)     # [d, d]
    i, c, f, b = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BF), tl.arange(0, BX)
    causal = i[:, None] <= i[None, :]                                       # [C, C]
    dW_k = tl.zeros((BX, BX) if LEARNED else (1, 1), tl.float32)            # [d, d]

    for start in range(n * part, min((n + 1) * part, T), C):
        rows = start + i
        row = bh.to(tl.int64) * T + rows
        dS_at = dstates + (bh.to(tl.int64) * tl.cdiv(T, C) + start // C) * (D + 1) * F
        q_c = load(q, q_strides[2], rows, b, T, X)                          # [C, d]
        k_c = load(k, k_strides[2], rows, b, T, X)                          # [C, d]
        v_c = load(v, v_strides[2], rows, c, T, D)                          # [C, D]
        dy_c = load(dy, dy_strides[2], rows, c, T, D)                       # [C, D]
        dS, dz = load(dS_at, F, c, f, D, F), tl.load(dS_at + D * F + f, mask=f < F, other=0.0)
        if later is not None:
            at = later + (bh * tl.cdiv(T, segment) + n * part // segment).to(tl.int64) * (D + 1) * F
            dS += load(at, F, c, f, D, F)                                   # [D, F]
            dz += tl.load(at + D * F + f, mask=f < F, other=0.0)            # [F]
        inv = tl.load(inv_den + row, mask=rows < T, other=0.0)              # [C]
        delta_c = tl.load(delta + row, mask=rows < T, other=0.0)            # [C]
        real = tl.where(rows < T, 1.0, 0.0)                                 # [C]
        phi_k = operand(features(k_c, W_k, real, LEARNED, P), P)            # [C, F]
        a = operand(features(q_c, W_q, inv, LEARNED, P), P)                 # [C, F]

        # dphi(k_j) = sum_i B_ij a_i + dS v_j + dz, then dk and dW_k
        B = dot(v_c, transposed(dy_c, P), P) - delta_c[None, :]             # [C, C]
        B = tl.where(causal, B, 0.0)
        dphi = dot(B, a, P) + dot(v_c, dS, P) + dz.to(tl.float32)[None, :]  # [C, F]
        dk_c, dW = map_gradient(k_c, W_k, phi_k, dphi, LEARNED, P)
        store(dk, dk_strides[2], rows, b, T, X, dk_c)
        dW_k += dW                                                          # [d, d]

        # dv_j = sum_i (phi(k_j).a_i) dy_i + dS^T phi(k_j)
        A = tl.where(causal, dot(phi_k, transposed(a, P), P), 0.0)          # [C, C]
        dv_c = dot(A, dy_c, P) + dot(phi_k, transposed(dS, P), P)           # [C, D]
        store(dv, dv_strides[2], rows, c, T, D, dv_c)
    if LEARNED:
        store(dw + (bh * N + n).to(tl.int64) * X * X, X, b, b, X, X, dW_k)


# Chunk length, warps and pipeline stages by kernel, for bf16 and heads up to 64: on an H200 the
# fastest of 4 or 8 warps and 1 to 3 stages, and on an earlier form of C in {32, 64, 128}, which is
# one for all, as states are per chunk. Wider heads and other dtypes: the largest that fit into the
# shared memory.
TILES = {forward_kernel: (64, 4, 2), states_kernel: (64, 4, 3), backward_q_kernel: (64, 4, 1),
         backward_kv_kernel: (64, 4, 1)}
WIDE_TILE, OTHER_TILE = (64, 8, 1), (32, 8, 1)

# Programs that run at once: two on each of the 132 SMs of an H100 or H200. Measured on an H200, in
# ms, forward and both: at T = 4,096, which is 192 heads, 0.30 and 1.49 with one segment each, 0.38
# and 1.58 with four; at T = 65,536, 12 heads, 0.36 and 1.50 with 22 segments, one full round, 0.44
# and 1.69 with 33, which need one and a half.
SLOTS = 264


def pieces(programs):
    """How many pieces to cut each program's work into: what fills the rounds of SLOTS best, up to
    four of them, and of choices that are alike to a tenth the fewest pieces."""
    def full(n):
        return round(n * programs / (-(-n * programs // SLOTS) * SLOTS), 1)

    return max((max(1, rounds * SLOTS // programs) for rounds in (1, 2, 3, 4)), key=full)


def power_of_two(n):
    """The next one, and 16 at least: no dot takes fewer."""
    return max(16, 1 << (n - 1).bit_length())


class Problem:
    """The sizes of one call, and how to launch a kernel on it."""

    def __init__(self, q, v, w_q, chunk, segment):
        self.B, self.H, self.T, self.D = v.shape
        self.v, self.X, self.learned, self.chunk = v, q.shape[-1], w_q is not None, chunk
        self.F = 2 * self.X if self.learned else self.X
        # of states that are only operands of dots
        self.operand = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
        # Segments cost a pass over k and v: none where half of the slots are filled without. The
        # gradients of chunks are independent: parts cost no more than one sum for dW each
        heads = self.B * self.H
        N, parts = (1, pieces(heads)) if 2 * heads > SLOTS else (pieces(heads), 1)
        self.part = segment or max(256, -(-self.T // (N * parts * 64)) * 64)
        self.segment = segment or self.part * parts
        self.N = -(-self.T // self.segment)
        assert self.segment % self.tile(forward_kernel)[0] == 0, "a segment is whole chunks"

    def tile(self, kernel):
        C, warps, stages = OTHER_TILE if self.v.dtype != torch.bfloat16 else \
            TILES[kernel] if self.F <= 128 and self.D <= 64 else WIDE_TILE
        return self.chunk or C, warps, stages

    def state(self, *between, dtype=torch.float32):
        """An empty state, or one for each n in `between`: (B, H, *between, D + 1, F)."""
        return self.v.new_empty(self.B, self.H, *between, self.D + 1, self.F, dtype=dtype)

    def heads(self, dim):
        """Empty (B, H, T, dim), in memory (B, T, H, dim): what a projection reads as a view."""
        return self.v.new_empty(self.B, self.T, self.H, dim).transpose(1, 2)

    def empty_forward(self):
        """y, 1 / den, the last state, and the states before segments if there are several."""
        inv_den = self.v.new_empty(self.v.shape[:3], dtype=torch.float32)
        return [self.heads(self.D), inv_den, self.state(),
                self.state(self.N) if self.N > 1 else self.v.new_empty(0, dtype=torch.float32)]

    def empty_backward(self, w, given):
        """The gradients of q, k, v, of both w, and of the first state."""
        return [self.heads(self.X), self.heads(self.X), self.heads(self.D),
                self.v.new_empty(0) if w is None else w.new_empty(2, *w.shape),
                self.state() if given else self.v.new_empty(0, dtype=torch.float32)]

    def launch(self, kernel, length, *args, **switches):
        """A program for each head and each `length` tokens. Pointers come first, then the strides
        of those that are (B, H, T, ..) tensors, then sizes."""
        C, num_warps, num_stages = self.tile(kernel)
        kernel[(self.B * self.H, -(-self.T // length))](
            *args, self.T, self.H, length, F=self.F, D=self.D, X=self.X,
            LEARNED=self.learned, C=C, num_warps=num_warps, num_stages=num_stages,
            P={torch.bfloat16: "bf16", torch.float16: "tf32"}.get(self.v.dtype, "ieee"),
            BF=power_of_two(self.F), BD=power_of_two(self.D), BX=power_of_two(self.X), **switches)

    def prefix(self, own, initial, dtype, backward):
        """The state at each segment, from what each adds; BACKWARD, from those after it."""
        before, width = self.state(self.N, dtype=dtype), self.F * (self.D + 1)
        BN = power_of_two(self.N)
        BLOCK = max(16, 4096 // BN)
        prefix_kernel[(self.B * self.H, -(-width // BLOCK))](
            own, before, initial, self.N, width, BACKWARD=backward, BN=BN, BLOCK=BLOCK)
        return before


# Two functions that launch the kernels, and an operator of each, which torch.compile, autograd and
# autocast see as one step. An optional tensor that is not there is None on the way in and has no
# elements on the way out.
Tensor, Maybe = torch.Tensor, torch.Tensor | None


def row_contiguous(*tensors):
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def run_forward(q: Tensor, k: Tensor, v: Tensor, w_q: Maybe, w_k: Maybe, state: Maybe, chunk: int,
                segment: int) -> list[Tensor]:
    q, k, v = row_contiguous(q, k, v)
    problem = Problem(q, v, w_q, chunk, segment)
    y, inv_den, end, before = problem.empty_forward()
    with torch.cuda.device_of(v):
        if problem.N > 1:
            own = problem.state(problem.N)
            problem.launch(states_kernel, problem.segment, k, v, w_k, None, None, None, None, own,
                           k.stride(), v.stride(), BACKWARD=False)
            before = state = problem.prefix(own, state, torch.float32, backward=False)
        problem.launch(forward_kernel, problem.segment, q, k, v, w_q, w_k, y, inv_den, state, end,
                       q.stride(), k.stride(), v.stride(), y.stride(), EPS=EPS)
    return [y, inv_den, end, before]


def run_backward(q: Tensor, k: Tensor, v: Tensor, w_q: Maybe, w_k: Maybe, before: Maybe, y: Tensor,
                 inv_den: Tensor, dy: Tensor, dstate: Maybe, given: bool, chunk: int,
                 segment: int) -> list[Tensor]:
    """`given`: there was a first state, and it gets a gradient."""
    q, k, v, dy = row_contiguous(q, k, v, dy)
    problem = Problem(q, v, w_q, chunk, segment)
    dq, dk, dv, dw, dstate_0 = problem.empty_backward(w_q, given)
    delta, X = torch.empty_like(inv_den), problem.X
    own = problem.state(problem.N) if given or problem.N > 1 else None
    dw_parts = None, None       # what each program adds to the gradients of w_q and w_k
    if w_q is not None:
        dw_parts = v.new_empty(2, problem.B, problem.H, -(-problem.T // problem.part), X, X,
                               dtype=torch.float32)
    with torch.cuda.device_of(v):
        states = problem.state(-(-problem.T // problem.tile(states_kernel)[0]),
                               dtype=problem.operand)
        problem.launch(states_kernel, problem.segment, k, v, w_k, None, None, before, states, None,
                       k.stride(), v.stride(), BACKWARD=False)
        problem.launch(backward_q_kernel, problem.part, q, k, v, w_q, w_k, y, dy, inv_den, delta,
                       states, dq, dw_parts[0], q.stride(), k.stride(), v.stride(), y.stride(),
                       dy.stride(), dq.stride())
        # the same memory again, for dS inside each segment; the segments after it are added later
        problem.launch(states_kernel, problem.segment, q, dy, w_q, inv_den, delta, None, states,
                       own, q.stride(), dy.stride(), BACKWARD=True)
        later = dstate
        if problem.N > 1:
            later = problem.prefix(own, dstate, problem.operand, backward=True)
        elif dstate is not None:
            later = dstate.to(problem.operand)
        problem.launch(backward_kv_kernel, problem.part, q, k, v, w_q, w_k, dy, inv_den, delta,
                       states, later, dk, dv, dw_parts[1], q.stride(), k.stride(), v.stride(),
                       dy.stride(), dk.stride(), dv.stride(), problem.segment)
        if given:
            dstate_0.copy_(own[:, :, 0])
            if later is not None:
                dstate_0 += later.view_as(own)[:, :, 0]
        if w_q is not None:     # the same sum in the same order every time: no atomics
            dw.copy_(dw_parts.sum((1, 3)))
    return [dq, dk, dv, dw, dstate_0]


fused = torch.library.custom_op("hedgehog::linear_attention", run_forward, mutates_args=())
fused_backward = torch.library.custom_op("hedgehog::linear_attention_backward", run_backward,
                                         mutates_args=())


@fused.register_fake
def _(q, k, v, w_q, w_k, state, chunk, segment):
    return Problem(q, v, w_q, chunk, segment).empty_forward()


@fused_backward.register_fake
def _(q, k, v, w_q, w_k, before, y, inv_den, dy, dstate, given, chunk, segment):
    return Problem(q, v, w_q, chunk, segment).empty_backward(w_q, given)


def save_for_backward(ctx, inputs, output):
    q, k, v, w_q, w_k, state, ctx.chunk, ctx.segment = inputs
    y, inv_den, _, before = output
    ctx.given = state is not None
    ctx.save_for_backward(q, k, v, w_q, w_k, before if before.numel() else state, y, inv_den)
    ctx.set_materialize_grads(False)        # if nobody used the last state, None and not zeros


def backward(ctx, grads, run=fused_backward):
    q, k, v, w_q, w_k, before, y, inv_den = ctx.saved_tensors
    dy, _, dstate, _ = grads
    dy = torch.zeros_like(y) if dy is None else dy
    dstate = None if dstate is None else dstate.contiguous()
    dq, dk, dv, dw, dstate_0 = run(q, k, v, w_q, w_k, before, y, inv_den, dy, dstate, ctx.given,
                                   ctx.chunk, ctx.segment)
    dw_q, dw_k = (None, None) if w_q is None else dw
    return dq, dk, dv, dw_q, dw_k, dstate_0 if ctx.given else None, None, None


fused.register_autograd(backward, setup_context=save_for_backward)


class Eager(torch.autograd.Function):
    """The operator without torch.library, whose bookkeeping doubles a forward call's CPU time."""

    @staticmethod
    def forward(ctx, *inputs):
        output = run_forward(*inputs)
        save_for_backward(ctx, inputs, output)
        return tuple(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return backward(ctx, grads, run_backward)


@torch.compiler.assume_constant_result
def large_tiles_fit():
    """TILES need the shared memory of data-centre GPUs since Hopper, 227 KiB an SM."""
    return torch.cuda.get_device_capability()[0] in (9, 10)


def kernels_take(q, v, w_q, chunk):
    """The one place where the kernels or PyTorch are chosen. On a CPU only tests and the tutorial
    ask for kernels, by giving a chunk length, and Triton's interpreter runs them."""
    runs = large_tiles_fit() if v.is_cuda else (
        chunk is not None and os.environ.get("TRITON_INTERPRET") == "1")
    d, D = q.shape[-1], v.shape[-1]
    F_max, D_max = {torch.bfloat16: (256, 128), torch.float16: (128, 64),
                    torch.float32: (128, 64)}.get(v.dtype, (0, 0))
    fits = D <= D_max and (d <= F_max if w_q is None else
                           2 * d <= F_max and d == power_of_two(d))   # a softmax has no padding
    return hasattr(triton, "compile") and runs and fits


def attend(q, k, v, w_q, w_k, state, chunk, segment):
    if torch.is_autocast_enabled(v.device.type):
        dtype = torch.get_autocast_dtype(v.device.type)
        q, k, v, w_q, w_k = (None if x is None else x.to(dtype) for x in (q, k, v, w_q, w_k))
    if not kernels_take(q, v, w_q, chunk):
        if w_q is not None:
            q, k = hedgehog_features(q, w_q), hedgehog_features(k, w_k)
        return chunked_linear_attention(q, k, v, state=state)
    if state is not None:
        state = torch.cat([state[0].mT, state[1].unsqueeze(-2)], dim=-2).float()  # (B, H, D+1, F)
    if w_q is not None:
        w_q, w_k = w_q.contiguous(), w_k.contiguous()
    run = fused if torch.compiler.is_compiling() else Eager.apply
    y, _, end, _ = run(q, k, v, w_q, w_k, state, chunk or 0, segment or 0)
    return y, (end[..., :-1, :].mT, end[..., -1, :])


def hedgehog_attention(q, k, v, w_q, w_k, state=None, chunk=None, segment=None):
    """Causal Hedgehog attention: map, product and denominator in one. q, k, v (B, H, T, d) with
    any strides, w_q, w_k (H, d, d). Returns y and the (S, z) after the last token; gradients flow
    to all inputs, also through the states. `chunk` and `segment` are for tests."""
    return attend(q, k, v, w_q, w_k, state, chunk, segment)


def linear_attention(phi_q, phi_k, v, state=None, chunk=None, segment=None):
    """The same for given features phi_q, phi_k (B, H, T, F)."""
    return attend(phi_q, phi_k, v, None, None, state, chunk, segment)


# What follows runs with `python kernel.py`: are the kernels right, and how fast are they?

def check(device, dtype):
    """Errors of y and the five gradients against the definition in float64, and next to each the
    error of the definition itself at this precision."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 333, 3, 64, device=device, dtype=dtype).transpose(1, 2)
              for _ in range(3)]
    inputs += [torch.randn(3, 64, 64, device=device).div(8).to(dtype) for _ in range(2)]
    dy = torch.randn(2, 3, 333, 64, device=device, dtype=dtype)

    def naive(q, k, v, w_q, w_k):
        return naive_linear_attention(hedgehog_features(q, w_q), hedgehog_features(k, w_k), v)

    def results(function, dtype):
        xs = [x.to(dtype).requires_grad_() for x in inputs]
        y = function(*xs)
        return [x.double() for x in (y.detach(), *torch.autograd.grad(y, xs, dy.to(dtype)))]

    print(f"relative error in {dtype} (that of the definition):", end="")
    for name, x, plain, exact in zip(("y", "dq", "dk", "dv", "dW_q", "dW_k"),
                                     results(lambda *xs: hedgehog_attention(*xs)[0], dtype),
                                     results(naive, dtype), results(naive, torch.float64)):
        ours, theirs = ((a - exact).norm() / exact.norm() for a in (x, plain))
        print(f"  {name} {ours:.1e} ({theirs:.1e})", end="")
        assert ours <= 3 * theirs + 1e-6, f"{name} is wrong"
    print()


def contenders():
    """What is compared: name -> function of q, k, v, w_q, w_k."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def softmax(backend, q, k, v):
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def chunked(q, k, v, w_q, w_k):
        return chunked_linear_attention(hedgehog_features(q, w_q), hedgehog_features(k, w_k), v)[0]

    functions = {
        "kernel": lambda *xs: hedgehog_attention(*xs)[0],
        "flash": lambda q, k, v, *_: softmax(SDPBackend.FLASH_ATTENTION, q, k, v),
        "cuDNN": lambda q, k, v, *_: softmax(SDPBackend.CUDNN_ATTENTION, q, k, v),
        "chunked": chunked,
    }
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError:
        print("flash-linear-attention is not installed: without it")
        return functions

    def fla(features, q, k, v, w_q, w_k):   # (B, T, H, ..) there; tunes itself for minutes at first
        q, k = (features(x, w).transpose(1, 2) for x, w in ((q, w_q), (k, w_k)))
        return chunk_linear_attn(q, k, v.transpose(1, 2), normalize=True)[0].transpose(1, 2)

    compiled = torch.compile(hedgehog_features, dynamic=True)
    return functions | {"fla": lambda *xs: fla(hedgehog_features, *xs),
                        "fla, map compiled": lambda *xs: fla(compiled, *xs)}


def measure(function, T, tokens, H, d, dtype):
    """Medians, ms: forward, forward + backward. And the MiB these allocate at their peak beyond
    the output and the gradients."""
    inputs = [torch.randn(max(1, tokens // T), T, H, d, device="cuda", dtype=dtype).transpose(1, 2)
              for _ in range(3)]
    inputs += [torch.randn(H, d, d, device="cuda").div(d**0.5).to(dtype) for _ in range(2)]
    inputs, dy = [x.requires_grad_() for x in inputs], torch.randn_like(inputs[0])

    def both():
        return torch.autograd.grad(function(*inputs), inputs, dy, allow_unused=True)

    with torch.no_grad():
        forward = triton.testing.do_bench(lambda: function(*inputs), return_mode="median")
    total = triton.testing.do_bench(both, return_mode="median")
    torch.cuda.reset_peak_memory_stats()
    results = torch.cuda.memory_allocated() + 4 * dy.nbytes
    both()
    return forward, total, (torch.cuda.max_memory_allocated() - results) / 2**20


def benchmark(lengths, tokens=65536, H=12, d=64, dtype=torch.bfloat16):
    """The same number of tokens as ever fewer and longer sequences; a column for each length."""
    x = torch.empty(2**30, device="cuda", dtype=dtype)
    bandwidth = 2 * x.nbytes / triton.testing.do_bench(lambda: x.clone(), return_mode="median")
    del x
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__},"
          f" {datetime.date.today()}; a copy moves {bandwidth / 1e9:.2f} TB/s\n"
          f"{tokens} tokens, {H} heads of {d}, {dtype}\n{'T':40}"
          + "".join(f"{T:9}" for T in lengths))

    def show(label, numbers, digits):
        print(f"{label:40}" + "".join(f"{x:9.{digits}f}" for x in numbers), flush=True)

    table = {}
    for name, function in contenders().items():
        table[name] = [measure(function, T, tokens, H, d, dtype) for T in lengths]
        for i, what in enumerate(("forward, ms", "forward + backward, ms", "extra memory, MiB")):
            show(f"{name}: {what}", [row[i] for row in table[name]], 0 if i == 2 else 3)
    # q, k, v in and y out; backward these in again and dy, and three gradients out: 4 + 8 tensors
    size = tokens * H * d * dtype.itemsize
    for i, (what, tensors) in enumerate((("forward", 4), ("forward + backward", 12))):
        softmax = [min(a[i], b[i]) for a, b in zip(table["flash"], table["cuDNN"])]
        ours = [row[i] for row in table["kernel"]]
        show(f"softmax / kernel: {what}", [a / b for a, b in zip(softmax, ours)], 2)
        show(f"share of bandwidth: {what}", [tensors * size / bandwidth / b for b in ours], 2)
    return table


def plot(table, lengths, path):
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print(f"{path} needs matplotlib: pip install matplotlib")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for i, (axis, title) in enumerate(zip(axes, ("forward", "forward + backward"))):
        for name, rows in table.items():
            axis.loglog(lengths, [row[i] for row in rows], "o-", label=name)
        axis.set(title=title, xlabel="sequence length", ylabel="ms")
        axis.grid(alpha=0.3)
    axes[0].legend()
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"wrote {path}")


def compare_on_cpu():
    print("no GPU: naive against chunked, ms forward, 1 sequence, 4 heads of 64, float32")
    for T in (512, 1024, 2048, 4096):
        phi_q, phi_k = torch.rand(2, 1, 4, T, 128).unbind()
        v, ms = torch.randn(1, 4, T, 64), []
        for function in (naive_linear_attention, chunked_linear_attention):
            function(phi_q, phi_k, v)
            start = time.perf_counter()
            for _ in range(3):
                function(phi_q, phi_k, v)
            ms.append((time.perf_counter() - start) / 3 * 1e3)
        print(f"  T = {T:4}: {ms[0]:7.1f} and {ms[1]:6.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="check the kernels, then time them")
    parser.add_argument("--plot", metavar="PATH", help="draw the table, e.g. figures/kernel.png")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(9, 17)])
    args = parser.parse_args()
    if torch.cuda.is_available():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            check("cuda", dtype)
        table = benchmark(args.lengths)
        if args.plot:
            plot(table, args.lengths, args.plot)
    else:
        check("cpu", torch.float32)
        compare_on_cpu()
