"""Linear attention as functions of tensors: the definition, then the same numbers in less time.

    y_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j),    j <= i if causal, all j if not

where phi maps a query or a key to F non-negative features (Hedgehog paper, arXiv 2402.04347,
section 3). Shapes are those of torch.nn.functional.scaled_dot_product_attention:

    phi_q, phi_k  (B, H, T, F)   features: batch, heads, time, feature dim
    v, y          (B, H, T, D)   values and outputs, D the head dim
    key_mask      (B, T)         bool, False where a key is padding
    S             (B, H, F, D)   the state: sum over the keys so far of phi(k) v^T
    z             (B, H, F)      and its normaliser: sum over the keys so far of phi(k)

`naive_linear_attention` is the definition, T x T, and what every other function is tested against.
`chunked_linear_attention` costs O(T) in time and memory: a state carries what earlier chunks said.
`recurrent_linear_attention` goes one token at a time: chunks of length 1, for generation.
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
    """The same in O(T): T x T only inside chunks, everything earlier comes through the state.

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
# on num_warps * 32 threads, and its loads run num_stages loop rounds ahead.
#
# One program handles one head and one segment of its tokens, chunk after chunk. Where the features
# come from is a switch: LEARNED means Hedgehog's, computed inside from q, k and their matrices W,
#
#     h = x W,   phi(x) = [softmax(h), softmax(-h)]
#
# and otherwise q and k are the features already. Both come as two tiles, plus and minus, of `half`
# features each, so that nothing is ever concatenated. The names, beside those at the top:
#
#     T, C         tokens of the sequence, and of a chunk; i, j, rows: positions in them
#     N, segment   segments of a sequence and their length; n: which one
#     F, half      features and those of the plus half, (F + 1) // 2; d is half where LEARNED
#     BF, BD       half and D rounded up to a power of two, which all tiles have to be
#     P            what dots multiply: "bf16" for bf16 inputs, "ieee" for fp32, "tf32" for fp16,
#                  in which sums and 1 / den would overflow. All sums are fp32
#     state        (B, H, F, D + 1): S, and z as one more column, S's for a value that is always 1
#     S_plus, ..   in a kernel S is transposed, (D, F/2): so S += v^T phi(k) needs no transposed phi
#
# The comment at the end of a line is the shape of the tile on it.

LOG2E = tl.constexpr(1.4426950408889634)


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
def load_map(w, bh, H, half, LEARNED: tl.constexpr, BF: tl.constexpr):
    f = tl.arange(0, BF)
    if LEARNED:
        W = load(w + (bh % H) * half * half, half, f, f, half, half)        # [d, d]
    else:
        W = tl.zeros((1, 1), tl.float32)    # not used, but Triton wants a value on both branches
    return W


@triton.jit
def features(x, stride, rows, T, W, scale, half, F, LEARNED: tl.constexpr, P: tl.constexpr,
             BF: tl.constexpr):
    """The inputs at `rows` and scale phi(input), plus half and minus half, as operands."""
    f = tl.arange(0, BF)
    if LEARNED:
        # h = x W,  plus = softmax(h),  minus = softmax(-h);  e^h = 2^(h log2 e) is one instruction
        x = load(x, stride, rows, f, T, half)                               # [C, d]
        h = dot(x, W, P)                                                    # [C, d]
        high = h if half == BF else tl.where((f < half)[None, :], h, float("-inf"))
        low = h if half == BF else tl.where((f < half)[None, :], h, float("inf"))
        plus = tl.exp2(high * LOG2E - (tl.max(high, 1) * LOG2E)[:, None])   # [C, d]
        minus = tl.exp2((tl.min(low, 1) * LOG2E)[:, None] - low * LOG2E)    # [C, d]
        plus *= (scale / tl.sum(plus, 1))[:, None]
        minus *= (scale / tl.sum(minus, 1))[:, None]
    else:
        plus = load(x, stride, rows, f, T, half) * scale[:, None]           # [C, F/2]
        minus = load(x + half, stride, rows, f, T, F - half) * scale[:, None]
        x = plus                            # not used
    return x, operand(plus, P), operand(minus, P)


@triton.jit
def softmax_gradient(p, dp):
    """From the gradient of p = softmax(h) to that of h: p (dp - sum_f p dp)."""
    p = p.to(tl.float32)
    return p * (dp - tl.sum(p * dp, 1)[:, None])


@triton.jit
def load_state(state, index, half, F, D, GIVEN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr):
    """S^T and z of one state, in halves; zeros if none is given. z is the first of 16 rows, the
    others 0: a dot needs 16 rows, and adds up features much faster than a tl.sum over rows."""
    f, c, z_row = tl.arange(0, BF), tl.arange(0, BD), tl.arange(0, 16)
    if GIVEN:
        plus = state + index.to(tl.int64) * F * (D + 1)
        minus = plus + half * (D + 1)
        in_plus = (z_row == 0)[:, None] & (f < half)[None, :]
        in_minus = (z_row == 0)[:, None] & (f < F - half)[None, :]
        at = z_row[:, None] * 0 + f[None, :] * (D + 1) + D                  # [16, F/2]
        return (tl.trans(load(plus, D + 1, f, c, half, D)),                 # [D, F/2]
                tl.trans(load(minus, D + 1, f, c, F - half, D)),
                tl.load(plus + at, mask=in_plus, other=0.0),                # [16, F/2]
                tl.load(minus + at, mask=in_minus, other=0.0))
    else:
        return (tl.zeros((BD, BF), tl.float32), tl.zeros((BD, BF), tl.float32),
                tl.zeros((16, BF), tl.float32), tl.zeros((16, BF), tl.float32))


@triton.jit
def store_state(state, index, S_plus, S_minus, z_plus, z_minus, half, F, D,
                BF: tl.constexpr, BD: tl.constexpr):
    f, c = tl.arange(0, BF), tl.arange(0, BD)
    plus = state + index.to(tl.int64) * F * (D + 1)
    minus = plus + half * (D + 1)
    store(plus, D + 1, f, c, half, D, tl.trans(S_plus))
    store(minus, D + 1, f, c, F - half, D, tl.trans(S_minus))
    tl.store(plus + f * (D + 1) + D, tl.sum(z_plus, 0), mask=f < half)
    tl.store(minus + f * (D + 1) + D, tl.sum(z_minus, 0), mask=f < F - half)


@triton.jit
def forward_kernel(q, k, v, w_q, w_k, y, inv_den, state, state_end,
                   q_strides, k_strides, v_strides, y_strides, T, H, segment,
                   half: tl.constexpr, F: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr,
                   LEARNED: tl.constexpr, GIVEN: tl.constexpr, P: tl.constexpr,
                   C: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr):
    """y of one segment, from the state before it; the last segment stores the state at the end."""
    bh, n, N = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    q, k = head(q, q_strides, bh, H), head(k, k_strides, bh, H)
    v, y = head(v, v_strides, bh, H), head(y, y_strides, bh, H)
    W_q = load_map(w_q, bh, H, half, LEARNED, BF)                           # [d, d]
    W_k = load_map(w_k, bh, H, half, LEARNED, BF)
    i, c, z_row = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, 16)
    causal = i[:, None] >= i[None, :]                                       # [C, C]
    ones = tl.where((z_row == 0)[:, None] & (i >= 0)[None, :], 1.0, 0.0)    # [16, C]
    S_plus, S_minus, z_plus, z_minus = load_state(state, bh * N + n, half, F, D, GIVEN, BF, BD)

    for start in range(n * segment, min((n + 1) * segment, T), C):
        rows = start + i
        real = tl.where(rows < T, 1.0, 0.0)     # past the end features are 0 and add to no sum
        # The order below keeps the fewest tiles alive at a time; others run out of registers
        _, k_plus, k_minus = features(k, k_strides[2], rows, T, W_k, real, half, F, LEARNED, P, BF)
        _, q_plus, q_minus = features(q, q_strides[2], rows, T, W_q, real, half, F, LEARNED, P, BF)
        v_c = load(v, v_strides[2], rows, c, T, D)                          # [C, D]

        # from this chunk: num_i = sum_j A_ij v_j,  den_i = sum_j A_ij,  A_ij = phi(q_i).phi(k_j)
        A = dot(q_plus, transposed(k_plus, P), P)                           # [C, C]
        A += dot(q_minus, transposed(k_minus, P), P)
        A = tl.where(causal, A, 0.0)
        num = dot(A, v_c, P)                                                # [C, D]
        den = tl.sum(A, 1)                                                  # [C]

        # from those before: num_i += S^T phi(q_i),  den_i += z.phi(q_i);  then y_i = num_i / den_i
        num += dot(q_plus, transposed(S_plus, P), P)
        num += dot(q_minus, transposed(S_minus, P), P)
        den_before = dot(q_plus, transposed(z_plus, P), P)                  # [C, 16]
        den_before += dot(q_minus, transposed(z_minus, P), P)
        inv = 1 / (den + tl.sum(den_before, 1) + EPS)                       # [C]
        store(y, y_strides[2], rows, c, T, D, num * inv[:, None])
        tl.store(inv_den + bh.to(tl.int64) * T + rows, inv, mask=rows < T)

        # S += sum_j phi(k_j) v_j^T,  z += sum_j phi(k_j)
        S_plus += dot(transposed(v_c, P), k_plus, P)                        # [D, F/2]
        S_minus += dot(transposed(v_c, P), k_minus, P)
        z_plus += dot(ones, k_plus, P)                                      # [16, F/2]
        z_minus += dot(ones, k_minus, P)
    if n == N - 1:
        store_state(state_end, bh, S_plus, S_minus, z_plus, z_minus, half, F, D, BF, BD)


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
#     dh = p (dp - sum_f p dp) - m (dm - sum_f m dm),    dx = W dh,    dW = sum_x x dh^T
#
# Saved are q, k, v, y, 1 / den and the states before segments; all else is computed again. First a
# sweep leaves the state of every chunk in memory, then the gradients of all chunks are independent
# of each other. Tried on an H200 (bf16, 65,536 tokens, 12 heads of 64) and slower:
#   - the states carried through the gradient kernels as through the forward one: 201 MiB less, but
#     registers spilled, and these two kernels took 1.54 ms instead of 1.24 with the sweeps
#   - chunks of 32 (too small for the fast matrix instructions) and, where they fit, of 128 (more
#     work above the diagonal, one program at a time on an SM)
#   - z and dz as a tl.sum over rows instead of a dot: forward 0.40 ms instead of 0.32
# Faster still would be both gradients in one kernel, which computes phi and B once, with S and the
# dW in shared memory. Triton decides by itself what is in registers, and there they do not fit.
# A trap: a 16-column right operand made inside the loop, [C, 16], gave wrong numbers (Triton 3.6);
# that is why the weights that add up z are 16 rows and on the left.


@triton.jit
def states_kernel(x, u, w, inv_den, delta, state, chunk_states, state_end, x_strides, u_strides,
                  T, H, segment, half: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
                  LEARNED: tl.constexpr, GIVEN: tl.constexpr, EVERY_CHUNK: tl.constexpr,
                  BACKWARD: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BF: tl.constexpr,
                  BD: tl.constexpr):
    """States along one segment: S and z from k and v or, BACKWARD, dS and dz from q and dy. Either
    what the segment adds, or (EVERY_CHUNK) the state at every chunk, S^T with z below it."""
    bh, n, N = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    x, u = head(x, x_strides, bh, H), head(u, u_strides, bh, H)
    W = load_map(w, bh, H, half, LEARNED, BF)                               # [d, d]
    i, c, f, z_row = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BF), tl.arange(0, 16)
    S_plus, S_minus, z_plus, z_minus = load_state(state, bh * N + n, half, F, D, GIVEN, BF, BD)

    begin, end = n * segment, min((n + 1) * segment, T)
    last = begin + (end - begin - 1) // C * C
    for step in range(0, end - begin, C):
        start = last - step if BACKWARD else begin + step
        rows = start + i
        if EVERY_CHUNK:
            at = chunk_states + (bh.to(tl.int64) * tl.cdiv(T, C) + start // C) * F * (D + 1)
            store(at, F, c, f, D, half, S_plus)
            store(at + half, F, c, f, D, F - half, S_minus)
            store(at + D * F, F, z_row, f, 1, half, z_plus)
            store(at + D * F + half, F, z_row, f, 1, F - half, z_minus)
        scale = tl.where(rows < T, 1.0, 0.0)                                # [C]
        weight = scale
        if BACKWARD:
            row = bh.to(tl.int64) * T + rows
            scale = tl.load(inv_den + row, mask=rows < T, other=0.0)
            weight = -tl.load(delta + row, mask=rows < T, other=0.0)
        _, plus, minus = features(x, x_strides[2], rows, T, W, scale, half, F, LEARNED, P, BF)
        u_c = load(u, u_strides[2], rows, c, T, D)                          # [C, D]
        S_plus += dot(transposed(u_c, P), plus, P)                          # [D, F/2]
        S_minus += dot(transposed(u_c, P), minus, P)
        weights = tl.where((z_row == 0)[:, None], weight[None, :], 0.0)     # [16, C]
        z_plus += dot(weights, plus, P)                                     # [16, F/2]
        z_minus += dot(weights, minus, P)
    if not EVERY_CHUNK:
        store_state(state_end, bh * N + n, S_plus, S_minus, z_plus, z_minus, half, F, D, BF, BD)
    elif n == (0 if BACKWARD else N - 1):
        store_state(state_end, bh, S_plus, S_minus, z_plus, z_minus, half, F, D, BF, BD)


@triton.jit
def prefix_kernel(own, before, initial, N, width, GIVEN: tl.constexpr, BACKWARD: tl.constexpr,
                  BN: tl.constexpr, BLOCK: tl.constexpr):
    """before[n] = initial + sum of own[m] over m < n; BACKWARD, m > n. Both (B*H, N, width)."""
    bh, n = tl.program_id(0).to(tl.int64), tl.arange(0, BN)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = n + 1 if BACKWARD else n - 1
    inside = ((m >= 0) & (m < N))[:, None] & (c < width)[None, :]
    x = tl.load(own + (bh * N + m[:, None]) * width + c[None, :], mask=inside, other=0.0)
    if GIVEN:
        first = tl.load(initial + bh * width + c, mask=c < width, other=0.0)
        x += tl.where((n == (N - 1 if BACKWARD else 0))[:, None], first[None, :], 0.0)
    store(before + bh * N * width, width, n, c, N, width, tl.cumsum(x, 0, reverse=BACKWARD))


@triton.jit
def load_chunk_state(states, at, half, F, D, BF: tl.constexpr, BD: tl.constexpr):
    f, c = tl.arange(0, BF), tl.arange(0, BD)
    plus = states + at * F * (D + 1)
    minus = plus + half
    return (load(plus, F, c, f, D, half), load(minus, F, c, f, D, F - half),
            tl.load(plus + D * F + f, mask=f < half, other=0.0).to(tl.float32),
            tl.load(minus + D * F + f, mask=f < F - half, other=0.0).to(tl.float32))


@triton.jit
def backward_q_kernel(q, k, v, w_q, w_k, y, dy, inv_den, delta, states, dq, dw_q,
                      q_strides, k_strides, v_strides, y_strides, dy_strides, dq_strides,
                      T, H, segment, half: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
                      LEARNED: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BF: tl.constexpr,
                      BD: tl.constexpr):
    """dq and delta of one segment, and what it adds to dW_q."""
    bh, n, N = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    q, k = head(q, q_strides, bh, H), head(k, k_strides, bh, H)
    v, y = head(v, v_strides, bh, H), head(y, y_strides, bh, H)
    dy, dq = head(dy, dy_strides, bh, H), head(dq, dq_strides, bh, H)
    W_q = load_map(w_q, bh, H, half, LEARNED, BF)                           # [d, d]
    W_k = load_map(w_k, bh, H, half, LEARNED, BF)
    i, c, f = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BF)
    causal = i[:, None] >= i[None, :]                                       # [C, C]
    dW = tl.zeros((BF, BF), tl.float32)                                     # [d, d]

    for start in range(n * segment, min((n + 1) * segment, T), C):
        rows = start + i
        row = bh.to(tl.int64) * T + rows
        real = tl.where(rows < T, 1.0, 0.0)                                 # [C]
        S_plus, S_minus, z_plus, z_minus = load_chunk_state(
            states, bh.to(tl.int64) * tl.cdiv(T, C) + start // C, half, F, D, BF, BD)
        _, k_plus, k_minus = features(k, k_strides[2], rows, T, W_k, real, half, F, LEARNED, P, BF)
        v_c = load(v, v_strides[2], rows, c, T, D)                          # [C, D]
        dy_c = load(dy, dy_strides[2], rows, c, T, D)                       # [C, D]
        y_c = load(y, y_strides[2], rows, c, T, D)                          # [C, D]

        # delta_i = dy_i.y_i,  B_ij = dy_i.v_j - delta_i for j <= i
        delta_c = tl.sum(dy_c.to(tl.float32) * y_c.to(tl.float32), 1)       # [C]
        tl.store(delta + row, delta_c, mask=rows < T)
        B = dot(dy_c, transposed(v_c, P), P) - delta_c[:, None]             # [C, C]
        B = tl.where(causal, B, 0.0)

        # dphi(q_i) = (sum_j B_ij phi(k_j) + S dy_i - delta_i z) / den_i, the plus half
        x, q_plus, q_minus = features(q, q_strides[2], rows, T, W_q, real, half, F, LEARNED, P, BF)
        inv = tl.load(inv_den + row, mask=rows < T, other=0.0)              # [C]
        dplus = dot(B, k_plus, P) + dot(dy_c, S_plus, P)                    # [C, F/2]
        dplus = (dplus - delta_c[:, None] * z_plus[None, :]) * inv[:, None]
        if LEARNED:
            dh = softmax_gradient(q_plus, dplus)                            # [C, d]
        else:
            store(dq, dq_strides[2], rows, f, T, half, dplus)

        # and the minus half, then dq = W dh and dW = sum q dh^T
        dminus = dot(B, k_minus, P) + dot(dy_c, S_minus, P)                 # [C, F/2]
        dminus = (dminus - delta_c[:, None] * z_minus[None, :]) * inv[:, None]
        if LEARNED:
            dh -= softmax_gradient(q_minus, dminus)
            store(dq, dq_strides[2], rows, f, T, half, dot(dh, transposed(W_q, P), P))
            dW += dot(transposed(x, P), dh, P)                              # [d, d]
        else:
            store(dq + half, dq_strides[2], rows, f, T, F - half, dminus)
    if LEARNED:
        store(dw_q + (bh * N + n).to(tl.int64) * half * half, half, f, f, half, half, dW)


@triton.jit
def backward_kv_kernel(q, k, v, w_q, w_k, dy, inv_den, delta, states, dk, dv, dw_k,
                       q_strides, k_strides, v_strides, dy_strides, dk_strides, dv_strides,
                       T, H, segment, half: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
                       LEARNED: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BF: tl.constexpr,
                       BD: tl.constexpr):
    """dk and dv of one segment, and what it adds to dW_k. Tiles of pairs are (j, i) here."""
    bh, n, N = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    q, k = head(q, q_strides, bh, H), head(k, k_strides, bh, H)
    v, dy = head(v, v_strides, bh, H), head(dy, dy_strides, bh, H)
    dk, dv = head(dk, dk_strides, bh, H), head(dv, dv_strides, bh, H)
    W_q = load_map(w_q, bh, H, half, LEARNED, BF)                           # [d, d]
    W_k = load_map(w_k, bh, H, half, LEARNED, BF)
    i, c, f = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BF)
    causal = i[:, None] <= i[None, :]                                       # [C, C]
    dW = tl.zeros((BF, BF), tl.float32)                                     # [d, d]

    for start in range(n * segment, min((n + 1) * segment, T), C):
        rows = start + i
        row = bh.to(tl.int64) * T + rows
        real = tl.where(rows < T, 1.0, 0.0)                                 # [C]
        inv = tl.load(inv_den + row, mask=rows < T, other=0.0)              # [C]
        delta_c = tl.load(delta + row, mask=rows < T, other=0.0)            # [C]
        dS_plus, dS_minus, dz_plus, dz_minus = load_chunk_state(
            states, bh.to(tl.int64) * tl.cdiv(T, C) + start // C, half, F, D, BF, BD)
        _, a_plus, a_minus = features(q, q_strides[2], rows, T, W_q, inv, half, F, LEARNED, P, BF)
        x, k_plus, k_minus = features(k, k_strides[2], rows, T, W_k, real, half, F, LEARNED, P, BF)
        v_c = load(v, v_strides[2], rows, c, T, D)                          # [C, D]
        dy_c = load(dy, dy_strides[2], rows, c, T, D)                       # [C, D]

        # dphi(k_j) = sum_i B_ij a_i + dS v_j + dz, the plus half
        B = dot(v_c, transposed(dy_c, P), P) - delta_c[None, :]             # [C, C]
        B = tl.where(causal, B, 0.0)
        dplus = dot(B, a_plus, P) + dot(v_c, dS_plus, P) + dz_plus[None, :]     # [C, F/2]
        if LEARNED:
            dh = softmax_gradient(k_plus, dplus)                            # [C, d]
        else:
            store(dk, dk_strides[2], rows, f, T, half, dplus)

        # and the minus half, then dk = W dh and dW = sum k dh^T
        dminus = dot(B, a_minus, P) + dot(v_c, dS_minus, P) + dz_minus[None, :]
        if LEARNED:
            dh -= softmax_gradient(k_minus, dminus)
            store(dk, dk_strides[2], rows, f, T, half, dot(dh, transposed(W_k, P), P))
            dW += dot(transposed(x, P), dh, P)                              # [d, d]
        else:
            store(dk + half, dk_strides[2], rows, f, T, F - half, dminus)

        # dv_j = sum_i (phi(k_j).a_i) dy_i + dS^T phi(k_j)
        A = dot(k_plus, transposed(a_plus, P), P)                           # [C, C]
        A += dot(k_minus, transposed(a_minus, P), P)
        dv_c = dot(tl.where(causal, A, 0.0), dy_c, P)                       # [C, D]
        dv_c += dot(k_plus, transposed(dS_plus, P), P)
        dv_c += dot(k_minus, transposed(dS_minus, P), P)
        store(dv, dv_strides[2], rows, c, T, D, dv_c)
    if LEARNED:
        store(dw_k + (bh * N + n).to(tl.int64) * half * half, half, f, f, half, half, dW)


# Chunk length, warps and pipeline stages by kernel, for bf16 and heads up to 64: the fastest of
# C in {32, 64, 128}, 4 or 8 warps and 1 to 3 stages on an H200 (the states are per chunk, so C is
# one for all). Wider heads and other dtypes: the largest tiles that fit into shared memory.
TILES = {forward_kernel: (64, 4, 2), states_kernel: (64, 4, 3), backward_q_kernel: (64, 4, 1),
         backward_kv_kernel: (64, 4, 1)}
OTHER_TILE = (32, 8, 1)
PROGRAMS = 768      # segments are cut so that about this many programs run, some for each SM


def power_of_two(n):
    """The next one, and 16 at least: no dot takes fewer."""
    return max(16, 1 << (n - 1).bit_length())


class Problem:
    """The sizes of one call, and how to launch a kernel on it."""

    def __init__(self, q, v, w_q, chunk, segment):
        self.B, self.H, self.T, self.D = v.shape
        self.F = q.shape[-1] if w_q is None else 2 * q.shape[-1]
        self.half = (self.F + 1) // 2
        self.v, self.learned, self.chunk = v, w_q is not None, chunk
        segments = max(1, PROGRAMS // (self.B * self.H))
        self.segment = segment or max(256, -(-self.T // (segments * 128)) * 128)
        self.N = -(-self.T // self.segment)
        assert self.segment % self.tile(forward_kernel)[0] == 0, "a segment is whole chunks"

    def tile(self, kernel):
        if self.v.dtype == torch.bfloat16 and max(self.half, self.D) <= 64:
            C, warps, stages = TILES[kernel]
        else:
            C, warps, stages = OTHER_TILE
        return self.chunk or C, warps, stages

    def state(self, *between, dtype=torch.float32):
        """An empty state, or one for each n in `between`: (B, H, *between, F, D + 1)."""
        return self.v.new_empty(self.B, self.H, *between, self.F, self.D + 1, dtype=dtype)

    def heads(self, dim):
        """Empty (B, H, T, dim), in memory (B, T, H, dim): what a projection reads as a view."""
        return self.v.new_empty(self.B, self.T, self.H, dim).transpose(1, 2)

    def launch(self, kernel, *args, **switches):
        C, num_warps, num_stages = self.tile(kernel)
        kernel[(self.B * self.H, self.N)](
            *args, self.T, self.H, self.segment, half=self.half, F=self.F, D=self.D,
            LEARNED=self.learned, C=C, num_warps=num_warps, num_stages=num_stages,
            P={torch.bfloat16: "bf16", torch.float16: "tf32"}.get(self.v.dtype, "ieee"),
            BF=power_of_two(self.half), BD=power_of_two(self.D), **switches)

    def segment_states(self, x, u, W, inv_den, delta, initial, backward):
        """The state at the beginning of every segment (BACKWARD: its gradient, at the end)."""
        own = self.state(self.N)
        self.launch(states_kernel, x, u, W, inv_den, delta, None, None, own, x.stride(),
                    u.stride(), GIVEN=False, EVERY_CHUNK=False, BACKWARD=backward)
        before, width = torch.empty_like(own), self.F * (self.D + 1)
        prefix_kernel[(self.B * self.H, -(-width // 64))](
            own, before, initial, self.N, width, GIVEN=initial is not None, BACKWARD=backward,
            BN=power_of_two(self.N), BLOCK=64)
        return before

    def chunk_states(self, x, u, W, inv_den, delta, state, backward):
        """The same for every chunk, in bf16 for bf16 inputs; and the one where the sweep ends."""
        chunks = -(-self.T // self.tile(states_kernel)[0])
        dtype = torch.bfloat16 if self.v.dtype == torch.bfloat16 else torch.float32
        states, end = self.state(chunks, dtype=dtype), self.state()
        self.launch(states_kernel, x, u, W, inv_den, delta, state, states, end, x.stride(),
                    u.stride(), GIVEN=state is not None, EVERY_CHUNK=True, BACKWARD=backward)
        return states, end


# Two operators that torch.compile, autograd and autocast see as one step each. An optional tensor
# that is not there is None on the way in and has no elements on the way out.
Tensor, Maybe = torch.Tensor, torch.Tensor | None


def row_contiguous(*tensors):
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


@torch.library.custom_op("hedgehog::linear_attention", mutates_args=())
def fused(q: Tensor, k: Tensor, v: Tensor, w_q: Maybe, w_k: Maybe, state: Maybe, chunk: int,
          segment: int) -> list[Tensor]:
    q, k, v = row_contiguous(q, k, v)
    problem = Problem(q, v, w_q, chunk, segment)
    y, inv_den, before, end = empty_forward(q, k, v, w_q, w_k, state, chunk, segment)
    with torch.cuda.device_of(v):
        if problem.N > 1:
            before = state = problem.segment_states(k, v, w_k, None, None, state, backward=False)
        problem.launch(forward_kernel, q, k, v, w_q, w_k, y, inv_den, state, end, q.stride(),
                       k.stride(), v.stride(), y.stride(), EPS=EPS, GIVEN=state is not None)
    return [y, inv_den, before, end]


@fused.register_fake
def empty_forward(q, k, v, w_q, w_k, state, chunk, segment):
    problem = Problem(q, v, w_q, chunk, segment)
    return [problem.heads(problem.D), v.new_empty(v.shape[:3], dtype=torch.float32),
            problem.state(problem.N) if problem.N > 1 else v.new_empty(0, dtype=torch.float32),
            problem.state()]


@torch.library.custom_op("hedgehog::linear_attention_backward", mutates_args=())
def fused_backward(q: Tensor, k: Tensor, v: Tensor, w_q: Maybe, w_k: Maybe, before: Maybe,
                   y: Tensor, inv_den: Tensor, dy: Tensor, dstate: Maybe, chunk: int,
                   segment: int) -> list[Tensor]:
    q, k, v, dy = row_contiguous(q, k, v, dy)
    problem = Problem(q, v, w_q, chunk, segment)
    dq, dk, dv, dw_q, dw_k, dstate_0 = empty_backward(q, k, v, w_q, w_k, before, y, inv_den, dy,
                                                     dstate, chunk, segment)
    delta = torch.empty_like(inv_den)
    parts = None if w_q is None else w_q.new_empty(
        problem.B, problem.H, problem.N, *w_q.shape[1:], dtype=torch.float32)
    with torch.cuda.device_of(v):
        states, _ = problem.chunk_states(k, v, w_k, None, None, before, backward=False)
        problem.launch(backward_q_kernel, q, k, v, w_q, w_k, y, dy, inv_den, delta, states, dq,
                       parts, q.stride(), k.stride(), v.stride(), y.stride(), dy.stride(),
                       dq.stride())
        del states
        if w_q is not None:     # the same sum in the same order every time: no atomics
            dw_q = parts.sum((0, 2)).to(w_q.dtype)
        if problem.N > 1:
            dstate = problem.segment_states(q, dy, w_q, inv_den, delta, dstate, backward=True)
        states, dstate_0 = problem.chunk_states(q, dy, w_q, inv_den, delta, dstate, backward=True)
        problem.launch(backward_kv_kernel, q, k, v, w_q, w_k, dy, inv_den, delta, states, dk, dv,
                       parts, q.stride(), k.stride(), v.stride(), dy.stride(), dk.stride(),
                       dv.stride())
        if w_q is not None:
            dw_k = parts.sum((0, 2)).to(w_k.dtype)
    return [dq, dk, dv, dw_q, dw_k, dstate_0]


@fused_backward.register_fake
def empty_backward(q, k, v, w_q, w_k, before, y, inv_den, dy, dstate, chunk, segment):
    problem = Problem(q, v, w_q, chunk, segment)
    return [problem.heads(q.shape[-1]), problem.heads(k.shape[-1]), problem.heads(problem.D),
            *(v.new_empty(0) if w is None else torch.empty_like(w) for w in (w_q, w_k)),
            problem.state()]


def save_for_backward(ctx, inputs, output):
    q, k, v, w_q, w_k, state, ctx.chunk, ctx.segment = inputs
    y, inv_den, before, _ = output
    ctx.given = state is not None
    ctx.save_for_backward(q, k, v, w_q, w_k, before if before.numel() else state, y, inv_den)
    ctx.set_materialize_grads(False)        # nobody used the last state: no zeros to read, None


def backward(ctx, grads):
    q, k, v, w_q, w_k, before, y, inv_den = ctx.saved_tensors
    dy, _, _, dstate = grads
    dy = torch.zeros_like(y) if dy is None else dy
    dstate = None if dstate is None else dstate.contiguous()
    dq, dk, dv, dw_q, dw_k, dstate = fused_backward(q, k, v, w_q, w_k, before, y, inv_den, dy,
                                                    dstate, ctx.chunk, ctx.segment)
    if w_q is None:
        dw_q = dw_k = None
    return dq, dk, dv, dw_q, dw_k, dstate if ctx.given else None, None, None


fused.register_autograd(backward, setup_context=save_for_backward)


@torch.compiler.assume_constant_result
def large_tiles_fit():
    """TILES need the shared memory of data-centre GPUs since Hopper, 227 KiB an SM."""
    return torch.cuda.get_device_capability()[0] in (9, 10)


def kernels_take(v, F, chunk):
    """The one place where the kernels or PyTorch are chosen. On a CPU only tests ask for kernels,
    by giving a chunk length, and Triton's interpreter runs them."""
    runs = large_tiles_fit() if v.is_cuda else (
        chunk is not None and os.environ.get("TRITON_INTERPRET") == "1")
    widest = {torch.bfloat16: (256, 128), torch.float16: (128, 64), torch.float32: (128, 64)}
    F_max, D_max = widest.get(v.dtype, (0, 0))
    return hasattr(triton, "compile") and runs and F <= F_max and v.shape[-1] <= D_max


def attend(q, k, v, w_q, w_k, state, chunk, segment):
    if torch.is_autocast_enabled(v.device.type):
        dtype = torch.get_autocast_dtype(v.device.type)
        q, k, v, w_q, w_k = (None if x is None else x.to(dtype) for x in (q, k, v, w_q, w_k))
    if not kernels_take(v, q.shape[-1] if w_q is None else 2 * q.shape[-1], chunk):
        if w_q is not None:
            q, k = hedgehog_features(q, w_q), hedgehog_features(k, w_k)
        return chunked_linear_attention(q, k, v, state=state)
    if state is not None:
        state = torch.cat([state[0], state[1].unsqueeze(-1)], dim=-1).float()   # (B, H, F, D + 1)
    if w_q is not None:
        w_q, w_k = w_q.contiguous(), w_k.contiguous()
    y, _, _, end = fused(q, k, v, w_q, w_k, state, chunk or 0, segment or 0)
    return y, (end[..., :-1], end[..., -1])


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
    """Medians, ms: forward, forward + backward. And the MiB these allocate at their peak, with
    the output and all gradients."""
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
    allocated = torch.cuda.memory_allocated()
    both()
    return forward, total, (torch.cuda.max_memory_allocated() - allocated) / 2**20


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
        for i, what in enumerate(("forward, ms", "forward + backward, ms", "memory, MiB")):
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
