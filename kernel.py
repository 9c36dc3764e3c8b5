"""Causal linear attention as Triton kernels, with Hedgehog's feature map inside.

`fused_attention` is chunked_linear_attention of linear.py, and for one token recurrent_step, with
the symbols and shapes there. Hedgehog's features never reach memory: they are made from q, k and W
where they are used. Other maps' features are taken as they are. `kernels_take` says which GPUs,
types and sizes this is for; tests/test_triton.py checks them, tests/bench_kernel.py times them.
"""

import os
from types import SimpleNamespace

import torch

from linear import EPS

try:
    import triton
    import triton.language as tl
except ImportError:     # then the kernels below can be read, but not run
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=float)

# --- the kernels ----------------------------------------------------------------------------------
#
# Triton in short. A function under @triton.jit is compiled for the GPU. One called *_kernel is
# started as a grid of programs: here tl.program_id(0) is one of the B H heads, tl.program_id(1) a
# stretch of its tokens. Tensors arrive as a pointer to their first element and strides; tl.load
# reads a tile at a tile of addresses. tl.constexpr is known when the kernel is compiled.
#
# A program goes through its tokens chunk by chunk. LEARNED says that the features are made inside;
# otherwise q and k are features already. The comment at the end of a line is the shape of the tile
# on it. Names beside those of linear.py:
#
#     T, C         tokens of the sequence, and of a chunk; i, j, rows: positions in them
#     X            width of q and k: d, or F where the features are given
#     segment      tokens between two states that are summed up beforehand; N segments a sequence
#     part         tokens of one program of the two gradient kernels
#     P            how dots multiply: bf16, ieee for fp32, tf32 for fp16 as S would overflow there
#     state        (B, H, D + 1, F): S^T, and z as one more row, S^T's for a value that is always 1
#     S            in a kernel always S^T, [D, F]: so S += v^T phi(k) needs no transposed phi

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
def head(x, strides, bh, H):
    """The first token of head bh, of B*H, in a (B, H, T, ...) tensor."""
    return x + (bh // H).to(tl.int64) * strides[0] + (bh % H).to(tl.int64) * strides[1]


@triton.jit
def load(x, stride, rows, T, width: tl.constexpr):
    """Rows of x as a tile [rows, width], zeros from row T on. Addresses need 64 bits."""
    where = x + rows.to(tl.int64)[:, None] * stride + tl.arange(0, width)[None, :]
    return tl.load(where, mask=(rows < T)[:, None], other=0.0)


@triton.jit
def store(x, stride, rows, T, value, width: tl.constexpr):
    where = x + rows.to(tl.int64)[:, None] * stride + tl.arange(0, width)[None, :]
    tl.store(where, value.to(x.dtype.element_ty), mask=(rows < T)[:, None])


@triton.jit
def prefetch(x, stride, rows, T):
    """Asks for these rows of x, 128 bytes each, so that loading them later finds them in the L2
    cache. Triton has no name for this instruction, and wants a result: the 0 that nobody reads."""
    where = x + tl.minimum(rows, T - 1).to(tl.int64) * stride
    if not INTERPRETED:
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l",
                                  [where.to(tl.int64)], tl.int32, is_pure=False, pack=1)


@triton.jit
def load_map(w, bh, H, LEARNED: tl.constexpr, X: tl.constexpr):
    if LEARNED:
        return load(w + (bh % H) * X * X, X, tl.arange(0, X), X, X)         # [d, d]
    else:
        return tl.zeros((1, 1), tl.float32)     # Triton wants a tile on both branches


@triton.jit
def features(x, W, scale, LEARNED: tl.constexpr, P: tl.constexpr):
    """scale phi(x) of a chunk."""
    if LEARNED:
        # h = x W,  phi = [softmax(h), softmax(-h)];  e^h = 2^(h log2 e) is one instruction
        sign = 1 - 2 * tl.arange(0, 2)[None, :, None]                       # [1, 2, 1]: 1, -1
        h = dot(x, W, P) * LOG2E                                            # [C, d]
        h = tl.reshape(h, (x.shape[0], 1, x.shape[1])) * sign               # [C, 2, d]
        e = tl.exp2(h - tl.max(h, 2)[:, :, None])                           # [C, 2, d]
        phi = e * (scale[:, None] / tl.sum(e, 2))[:, :, None]               # [C, 2, d]
        return tl.reshape(phi, (x.shape[0], 2 * x.shape[1]))                # [C, F]
    else:
        return x.to(tl.float32) * scale[:, None]                            # [C, F]


@triton.jit
def map_gradient(x, W, phi, dphi, LEARNED: tl.constexpr, P: tl.constexpr):
    """From the gradient of a chunk's phi(x) to that of x, and what it adds to dW."""
    if LEARNED:
        # p = softmax(h), m = softmax(-h), h = x W:    dx = dh W^T,    dW = sum_i x_i^T dh_i,
        # dh = p (dp - sum_f p dp) - m (dm - sum_f m dm)
        sign = 1 - 2 * tl.arange(0, 2)[None, :, None]                       # [1, 2, 1]: 1, -1
        phi = tl.reshape(phi.to(tl.float32), (x.shape[0], 2, x.shape[1]))   # [C, 2, d]
        dphi = tl.reshape(dphi, (x.shape[0], 2, x.shape[1]))                # [C, 2, d]
        dh = phi * (dphi - tl.sum(phi * dphi, 2)[:, :, None])               # [C, 2, d]
        dh = operand(tl.sum(dh * sign, 1), P)                       # [C, d]
        return dot(dh, transposed(W, P), P), dot(transposed(x, P), dh, P)   # [C, d], [d, d]
    else:
        return dphi, tl.zeros((1, 1), tl.float32)                           # [C, F]


@triton.jit
def load_state(state, index, F: tl.constexpr, D: tl.constexpr):
    """S^T and z of one state; zeros if there is none. z is the first of 16 rows, the others 0: a
    dot needs 16 rows, and adds up features much faster than a tl.sum over rows."""
    if state is None:
        return tl.zeros((D, F), tl.float32), tl.zeros((16, F), tl.float32)
    else:
        state += index.to(tl.int64) * (D + 1) * F
        S = load(state, F, tl.arange(0, D), D, F)                           # [D, F]
        return S, load(state + D * F, F, tl.arange(0, 16), 1, F)            # [16, F]


@triton.jit
def store_state(state, index, S, z, F: tl.constexpr, D: tl.constexpr):
    state += index.to(tl.int64) * (D + 1) * F
    store(state, F, tl.arange(0, D), D, S, F)
    store(state + D * F, F, tl.arange(0, 16), 1, z, F)


@triton.jit
def forward_kernel(q, k, v, w_q, w_k, y, inv_den, state, state_end,
                   q_strides, k_strides, v_strides, y_strides, T, H, segment, EPS: tl.constexpr,
                   F: tl.constexpr, D: tl.constexpr, X: tl.constexpr, LEARNED: tl.constexpr,
                   P: tl.constexpr, C: tl.constexpr):
    """y of one segment, from the state before it; the last segment stores the state at the end."""
    bh, n, N = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    q, k = head(q, q_strides, bh, H), head(k, k_strides, bh, H)
    v, y = head(v, v_strides, bh, H), head(y, y_strides, bh, H)
    W_q, W_k = load_map(w_q, bh, H, LEARNED, X), load_map(w_k, bh, H, LEARNED, X)   # [d, d]
    i = tl.arange(0, C)
    causal = i[:, None] >= i[None, :]                                       # [C, C]
    first_row = (tl.arange(0, 16) == 0)[:, None]                            # [16, 1]
    S, z = load_state(state, bh * (N + 1) + n, F, D)                        # [D, F], [16, F]

    for start in range(n * segment, min((n + 1) * segment, T), C):
        rows = start + i
        real = tl.where(rows < T, 1.0, 0.0)     # past the end features are 0 and add to no sum
        k_c, q_c = load(k, k_strides[2], rows, T, X), load(q, q_strides[2], rows, T, X)  # [C, d]
        v_c = load(v, v_strides[2], rows, T, D)                             # [C, D]
        prefetch(k, k_strides[2], rows + C, T)      # with two stages Triton issues the next round's
        prefetch(q, q_strides[2], rows + C, T)      # loads only at the end of this one
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
        store(y, y_strides[2], rows, T, num * inv[:, None], D)
        tl.store(inv_den + bh.to(tl.int64) * T + rows, inv, mask=rows < T)

        # S += sum_j phi(k_j) v_j^T,  z += sum_j phi(k_j)
        S += dot(transposed(v_c, P), phi_k, P)                              # [D, F]
        z += dot(tl.where(first_row, real[None, :], 0.0), phi_k, P)         # [16, F]
    if n == N - 1:
        store_state(state_end, bh, S, z, F, D)


@triton.jit
def step_kernel(q, k, v, w_q, w_k, y, S, z, S_after, z_after, q_strides, k_strides, v_strides,
                y_strides, H, EPS: tl.constexpr, F: tl.constexpr, D: tl.constexpr, X: tl.constexpr,
                LEARNED: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """recurrent_step: y of one token, the state after it from the state before. S is (F, D) here.
    Tiles have 16 rows for the dots inside features; all but the first are 0."""
    bh, rows, f, c = tl.program_id(0), tl.arange(0, 16), tl.arange(0, F), tl.arange(0, D)
    q, k = head(q, q_strides, bh, H), head(k, k_strides, bh, H)
    v, y = head(v, v_strides, bh, H), head(y, y_strides, bh, H)
    real = tl.where(rows == 0, 1.0, 0.0)                                    # [16]
    W_q, W_k = load_map(w_q, bh, H, LEARNED, X), load_map(w_k, bh, H, LEARNED, X)   # [d, d]
    phi_q = tl.sum(features(load(q, q_strides[2], rows, 1, X), W_q, real, LEARNED, P), 0)   # [F]
    phi_k = tl.sum(features(load(k, k_strides[2], rows, 1, X), W_k, real, LEARNED, P), 0)   # [F]
    v_1 = tl.load(v + c).to(tl.float32)                                     # [D]
    row = bh.to(tl.int64) * F
    z_1 = tl.load(z + row + f) + phi_k                                      # [F]
    S_1 = load(S + row * D, D, f, F, D) + phi_k[:, None] * v_1[None, :]     # [F, D]
    tl.store(z_after + row + f, z_1)
    store(S_after + row * D, D, f, F, S_1, D)
    y_1 = tl.sum(phi_q[:, None] * S_1, 0) / (tl.sum(phi_q * z_1, 0) + EPS)  # [D]
    tl.store(y + c, y_1.to(y.dtype.element_ty))


# The backward pass, with r_i = phi(q_i) / den_i, delta_i = dy_i.y_i, and for j <= i
#
#     E_ij = dy_i.v_j - delta_i
#     dphi(q_i) = (sum_j E_ij phi(k_j)) / den_i               dS = sum over later i of r_i dy_i^T
#     dphi(k_j) =  sum_i E_ij r_i                             dz = sum over later i of -delta_i r_i
#     dv_j      =  sum_i (r_i.phi(k_j)) dy_i
#
# where tokens of other chunks come through states: sum_j E_ij phi(k_j) over all earlier chunks is
# S dy_i - delta_i z, the two sums over all later ones are dS v_j + dz and dS^T phi(k_j). dS and dz
# are a state that runs backwards in time, from r_i, dy_i and -delta_i instead of phi(k_j), v_j, 1.
# Saved are the inputs, y, 1 / den and the states before segments; all else is computed again. A
# sweep (states_kernel) leaves S, z before every chunk in memory, and backward_q_kernel makes dq and
# delta of all parts at once. A second sweep, from the end, takes delta and leaves dS, dz after each
# chunk, and backward_kv_kernel makes dk and dv. One kernel for all three would need more registers
# than there are.


@triton.jit
def states_kernel(x, u, w, inv_den, delta, state, chunk_states, sums, x_strides, u_strides,
                  T, H, segment, BACKWARD: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
                  X: tl.constexpr, LEARNED: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """Sums up S and z along one segment (x is k, u is v) or, BACKWARD, from its end dS and dz (x is
    q, u is dy). Stores the state at every chunk in chunk_states, and what segment n adds in slot
    n + 1 of sums, BACKWARD in slot N - n. Either can be None."""
    bh, n, N = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    x, u = head(x, x_strides, bh, H), head(u, u_strides, bh, H)
    W = load_map(w, bh, H, LEARNED, X)                                      # [d, d]
    i = tl.arange(0, C)
    first_row = (tl.arange(0, 16) == 0)[:, None]                            # [16, 1]
    S, z = load_state(state, bh * (N + 1) + n, F, D)                        # [D, F], [16, F]

    begin, end = n * segment, min((n + 1) * segment, T)
    if chunk_states is None and n == N - 1:
        end = begin         # nobody needs what the last segment adds
    last = begin + (end - begin - 1) // C * C
    for step in range(0, end - begin, C):
        start = last - step if BACKWARD else begin + step
        rows = start + i
        if chunk_states is not None:
            store_state(chunk_states, bh * tl.cdiv(T, C) + start // C, S, z, F, D)
        scale = tl.where(rows < T, 1.0, 0.0)                                # [C]
        weight = scale
        if BACKWARD:
            row = bh.to(tl.int64) * T + rows
            scale = tl.load(inv_den + row, mask=rows < T, other=0.0)
            weight = -tl.load(delta + row, mask=rows < T, other=0.0)
        x_c = load(x, x_strides[2], rows, T, X)                             # [C, d]
        u_c = load(u, u_strides[2], rows, T, D)                             # [C, D]
        phi = operand(features(x_c, W, scale, LEARNED, P), P)               # [C, F]

        # z's weights must be the left operand: as a right one [C, 16], made inside the loop, they
        # gave wrong numbers in Triton 3.6.
        S += dot(transposed(u_c, P), phi, P)                                # [D, F]
        z += dot(tl.where(first_row, weight[None, :], 0.0), phi, P)         # [16, F]
    if sums is not None:
        store_state(sums, bh * (N + 1) + 1 + (N - 1 - n if BACKWARD else n), S, z, F, D)


@triton.jit
def backward_q_kernel(q, k, v, w_q, w_k, y, dy, inv_den, delta, states, dq, dw,
                      q_strides, k_strides, v_strides, y_strides, dy_strides, dq_strides,
                      T, H, part, F: tl.constexpr, D: tl.constexpr, X: tl.constexpr,
                      LEARNED: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """dq and delta of one part, and what it adds to dW_q."""
    bh, n, N = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    q, k = head(q, q_strides, bh, H), head(k, k_strides, bh, H)
    v, y = head(v, v_strides, bh, H), head(y, y_strides, bh, H)
    dy, dq = head(dy, dy_strides, bh, H), head(dq, dq_strides, bh, H)
    W_q, W_k = load_map(w_q, bh, H, LEARNED, X), load_map(w_k, bh, H, LEARNED, X)   # [d, d]
    i, f = tl.arange(0, C), tl.arange(0, F)
    causal = i[:, None] >= i[None, :]                                       # [C, C]
    dW_q = tl.zeros((X, X) if LEARNED else (1, 1), tl.float32)              # [d, d]

    for start in range(n * part, min((n + 1) * part, T), C):
        rows = start + i
        row = bh.to(tl.int64) * T + rows
        S_at = states + (bh.to(tl.int64) * tl.cdiv(T, C) + start // C) * (D + 1) * F
        dy_c, v_c = load(dy, dy_strides[2], rows, T, D), load(v, v_strides[2], rows, T, D)  # [C, D]
        q_c, k_c = load(q, q_strides[2], rows, T, X), load(k, k_strides[2], rows, T, X)  # [C, d]
        S, z = load(S_at, F, tl.arange(0, D), D, F), tl.load(S_at + D * F + f)
        inv = tl.load(inv_den + row, mask=rows < T, other=0.0)              # [C]
        real = tl.where(rows < T, 1.0, 0.0)                                 # [C]
        phi_k = operand(features(k_c, W_k, real, LEARNED, P), P)            # [C, F]

        # delta_i = dy_i.y_i,  E_ij = dy_i.v_j - delta_i for j <= i
        y_c = load(y, y_strides[2], rows, T, D)                             # [C, D]
        delta_c = tl.sum(dy_c.to(tl.float32) * y_c.to(tl.float32), 1)       # [C]
        tl.store(delta + row, delta_c, mask=rows < T)
        E = dot(dy_c, transposed(v_c, P), P) - delta_c[:, None]             # [C, C]
        E = tl.where(causal, E, 0.0)

        # dphi(q_i) = (sum_j E_ij phi(k_j) + S dy_i - delta_i z) / den_i, then dq and dW_q
        phi_q = features(q_c, W_q, real, LEARNED, P)                        # [C, F]
        dphi = dot(E, phi_k, P) + dot(dy_c, S, P)                           # [C, F]
        dphi = (dphi - delta_c[:, None] * z.to(tl.float32)[None, :]) * inv[:, None]
        dq_c, dW = map_gradient(q_c, W_q, phi_q, dphi, LEARNED, P)
        store(dq, dq_strides[2], rows, T, dq_c, X)
        dW_q += dW                                                          # [d, d]
    if LEARNED:
        store(dw + (bh * N + n).to(tl.int64) * X * X, X, tl.arange(0, X), X, dW_q, X)


@triton.jit
def backward_kv_kernel(q, k, v, w_q, w_k, dy, inv_den, delta, dstates, later, dk, dv, dw,
                       q_strides, k_strides, v_strides, dy_strides, dk_strides, dv_strides,
                       segment, T, H, part, F: tl.constexpr, D: tl.constexpr, X: tl.constexpr,
                       LEARNED: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """dk and dv of one part, and what it adds to dW_k. Tiles of pairs are (j, i) here. dstates are
    sums inside the segment; `later`, if not None, has in slot c the gradient of the last state and
    what the last c segments add to it."""
    bh, n, N = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    q, k = head(q, q_strides, bh, H), head(k, k_strides, bh, H)
    v, dy = head(v, v_strides, bh, H), head(dy, dy_strides, bh, H)
    dk, dv = head(dk, dk_strides, bh, H), head(dv, dv_strides, bh, H)
    W_q, W_k = load_map(w_q, bh, H, LEARNED, X), load_map(w_k, bh, H, LEARNED, X)   # [d, d]
    i, c, f = tl.arange(0, C), tl.arange(0, D), tl.arange(0, F)
    causal = i[:, None] <= i[None, :]                                       # [C, C]
    dW_k = tl.zeros((X, X) if LEARNED else (1, 1), tl.float32)              # [d, d]

    for start in range(n * part, min((n + 1) * part, T), C):
        rows = start + i
        row = bh.to(tl.int64) * T + rows
        dS_at = dstates + (bh.to(tl.int64) * tl.cdiv(T, C) + start // C) * (D + 1) * F
        q_c, k_c = load(q, q_strides[2], rows, T, X), load(k, k_strides[2], rows, T, X)  # [C, d]
        v_c, dy_c = load(v, v_strides[2], rows, T, D), load(dy, dy_strides[2], rows, T, D)  # [C, D]
        dS, dz = load(dS_at, F, c, D, F), tl.load(dS_at + D * F + f)
        if later is not None:
            segments = tl.cdiv(T, segment)
            slot = bh * (segments + 1) + segments - 1 - start // segment
            at = later + slot.to(tl.int64) * (D + 1) * F
            dS += load(at, F, c, D, F)                                      # [D, F]
            dz += tl.load(at + D * F + f)                                   # [F]
        inv = tl.load(inv_den + row, mask=rows < T, other=0.0)              # [C]
        delta_c = tl.load(delta + row, mask=rows < T, other=0.0)            # [C]
        real = tl.where(rows < T, 1.0, 0.0)                                 # [C]
        phi_k = operand(features(k_c, W_k, real, LEARNED, P), P)            # [C, F]
        r = operand(features(q_c, W_q, inv, LEARNED, P), P)                 # [C, F]

        # dphi(k_j) = sum_i E_ij r_i + dS v_j + dz, then dk and dW_k
        E = dot(v_c, transposed(dy_c, P), P) - delta_c[None, :]             # [C, C]
        E = tl.where(causal, E, 0.0)
        dphi = dot(E, r, P) + dot(v_c, dS, P) + dz.to(tl.float32)[None, :]  # [C, F]
        dk_c, dW = map_gradient(k_c, W_k, phi_k, dphi, LEARNED, P)
        store(dk, dk_strides[2], rows, T, dk_c, X)
        dW_k += dW                                                          # [d, d]

        # dv_j = sum_i (phi(k_j).r_i) dy_i + dS^T phi(k_j)
        A = tl.where(causal, dot(phi_k, transposed(r, P), P), 0.0)          # [C, C]
        dv_c = dot(A, dy_c, P) + dot(phi_k, transposed(dS, P), P)           # [C, D]
        store(dv, dv_strides[2], rows, T, dv_c, D)
    if LEARNED:
        store(dw + (bh * N + n).to(tl.int64) * X * X, X, tl.arange(0, X), X, dW_k, X)


# --- launching them -------------------------------------------------------------------------------

SEGMENT = 256       # tokens of the shortest segment
PART = 1024         # tokens of one program of the gradient kernels
SMALL, LARGE = 99 * 1024, 227 * 1024    # shared memory: a GeForce since Ampere; H100, H200, B200


def kernels_take(q, v, w_q, causal=True, key_mask=None):
    """Whether fused_attention serves: the one condition by which kernels or PyTorch are chosen.
    Tiles have sides that are powers of two; the largest need a data-centre GPU since Hopper. The
    kernel for one token has no gradient."""
    X, D, dtype, shared = q.size(-1), v.size(-1), v.dtype, gpu()[0]
    if torch.is_autocast_enabled("cuda"):                   # what fused_attention will compute in
        dtype = torch.get_autocast_dtype("cuda")
    large = dtype == torch.bfloat16 and shared >= LARGE
    F_max, D_max = (256, 128) if large else (128, 64)
    return (v.is_cuda and hasattr(triton, "compile") and shared >= SMALL and v.numel() > 0
            and causal and key_mask is None and (v.size(2) > 1 or not torch.is_grad_enabled())
            and v.dtype in (torch.bfloat16, torch.float16, torch.float32)
            and X in (16, 32, 64, 128, 256) and D in (16, 32, 64, 128) and D <= D_max
            and (X <= F_max if w_q is None else 2 * X <= F_max and w_q.size(-1) == X)
            and (dtype != torch.float16 or q.dtype == dtype))           # exp's features overflow


@torch.compiler.assume_constant_result
def gpu():
    """Bytes of shared memory that a program can have, 0 on a GPU without bf16, and how many run at
    once, two on each multiprocessor; an H100's where there is no GPU."""
    if not torch.cuda.is_available():
        return LARGE, 264
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    return (getattr(card, "shared_memory_per_block_optin", 0) if card.major >= 8 else 0,
            2 * card.multi_processor_count)


def constants(kernel, q, v, w_q):
    """What is fixed when `kernel` is compiled for these tensors: sizes, precision, chunk length,
    warps (32 threads each) and pipeline stages, rounds of the loop whose loads are under way at
    once. The fastest on an H200, elsewhere what fits (tests/test_targets.py)."""
    X, D = q.size(-1), v.size(-1)
    F = X if w_q is None else 2 * X
    C, warps, stages = 64, 4, {forward_kernel: 2, states_kernel: 3}.get(kernel, 1)
    if v.dtype != torch.bfloat16:
        C, warps, stages = (32, 8, 1) if gpu()[0] >= LARGE else (16, 4, 1)
    elif F > 128 or D > 64:
        C, warps, stages = 64, 8, 1
    P = {torch.bfloat16: "bf16", torch.float16: "tf32"}.get(v.dtype, "ieee")
    if INTERPRETED.value:
        P = "ieee"          # Triton's interpreter would multiply the bits of bf16 as integers
    return dict(F=F, D=D, X=X, LEARNED=w_q is not None, P=P, C=C, num_warps=warps,
                num_stages=stages)


def segment_length(B, H, T):
    """Tokens of a segment, a multiple of every C: the whole sequence if heads alone fill more than
    half of the GPU. Else it is cut into as many segments as make one round of programs, or two
    rounds if one would leave over a tenth of the GPU idle."""
    heads, at_once = B * H, gpu()[1]
    N = 1 if 2 * heads > at_once else at_once // heads
    if N > 1 and N * heads < 0.9 * at_once:
        N = 2 * at_once // heads
    return max(SEGMENT, -(-T // (64 * N)) * 64)


# `forward` and `backward` launch the kernels. Each is an operator, one step for torch.compile and
# autograd. A tensor that does not exist is None as an input and has no elements as an output.
Tensor, Maybe = torch.Tensor, torch.Tensor | None


def forward_outputs(q, k, v, w_q, w_k, state):
    """Empty y, 1 / den, the last state, and the states before segments, if there are any."""
    (B, H, T, D), F = v.shape, q.size(-1) * (1 if w_q is None else 2)
    N = -(-T // segment_length(B, H, T))
    before = (0,) if N == 1 and state is None else (B, H, N + 1, D + 1, F)
    return [torch.empty_like(v), *(v.new_empty(x, dtype=torch.float32) for x in (
        (B, H, T), (B, H, D + 1, F), before))]


@torch.library.custom_op("hedgehog::attention", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, w_q: Maybe, w_k: Maybe, state: Maybe) -> list[Tensor]:
    (B, H, T, _), const = v.shape, constants(states_kernel, q, v, w_q)
    segment = segment_length(B, H, T)
    grid = B * H, -(-T // segment)
    y, inv_den, end, before = forward_outputs(q, k, v, w_q, w_k, state)
    with torch.cuda.device_of(v):
        before.zero_()
        if state is not None:
            before[:, :, 0] = state
        if grid[1] > 1:
            states_kernel[grid](k, v, w_k, None, None, None, None, before, k.stride(), v.stride(),
                                T, H, segment, BACKWARD=False, **const)
            before.cumsum_(2)
        forward_kernel[grid](q, k, v, w_q, w_k, y, inv_den, before if before.numel() else None, end,
                             q.stride(), k.stride(), v.stride(), y.stride(), T, H, segment, EPS=EPS,
                             **constants(forward_kernel, q, v, w_q))
    return [y, inv_den, end, before]


def backward_outputs(q, k, v, w_q, w_k, before, y, inv_den, dy, dstate):
    """Empty gradients of q, k, v, w_q, w_k and of the first state."""
    (B, H, _, D), F = v.shape, q.size(-1) * (1 if w_q is None else 2)
    return [*(v.new_empty(0) if x is None else torch.empty_like(x) for x in (q, k, v, w_q, w_k)),
            inv_den.new_empty((B, H, D + 1, F) if before.numel() else 0)]


@torch.library.custom_op("hedgehog::attention_backward", mutates_args=())
def backward(q: Tensor, k: Tensor, v: Tensor, w_q: Maybe, w_k: Maybe, before: Tensor, y: Tensor,
             inv_den: Tensor, dy: Tensor, dstate: Maybe) -> list[Tensor]:
    (B, H, T, D), X = v.shape, q.size(-1)
    dq, dk, dv, dw_q, dw_k, dfirst = outputs = backward_outputs(
        q, k, v, w_q, w_k, before, y, inv_den, dy, dstate)
    const = constants(states_kernel, q, v, w_q)
    segment, F = segment_length(B, H, T), const["F"]
    grid, parts = (B * H, -(-T // segment)), (B * H, -(-T // PART))
    # The state of every chunk, only an operand of dots and in their precision.
    states = v.new_empty(B, H, -(-T // const["C"]), D + 1, F, dtype=torch.bfloat16
                         if const["P"] == "bf16" else torch.float32)
    delta, later = torch.empty_like(inv_den), None
    if before.numel() or dstate is not None:
        later = inv_den.new_empty(B, H, grid[1] + 1, D + 1, F)
        later[:, :, 0] = 0 if dstate is None else dstate
    # What each program adds to the gradients of w_q and w_k, to be summed in a fixed order.
    dw_parts = (None, None) if w_q is None else inv_den.new_empty(2, B, H, parts[1], X, X)
    with torch.cuda.device_of(v):
        states_kernel[grid](k, v, w_k, None, None, before if before.numel() else None, states, None,
                            k.stride(), v.stride(), T, H, segment, BACKWARD=False, **const)
        backward_q_kernel[parts](q, k, v, w_q, w_k, y, dy, inv_den, delta, states, dq, dw_parts[0],
                                 q.stride(), k.stride(), v.stride(), y.stride(), dy.stride(),
                                 dq.stride(), T, H, PART, **constants(backward_q_kernel, q, v, w_q))
        # The same memory again, for dS inside each segment; those of later segments come on top.
        states_kernel[grid](q, dy, w_q, inv_den, delta, None, states, later, q.stride(),
                            dy.stride(), T, H, segment, BACKWARD=True, **const)
        later_sums = None if later is None else later.cumsum_(2).to(states.dtype)
        backward_kv_kernel[parts](q, k, v, w_q, w_k, dy, inv_den, delta, states, later_sums, dk, dv,
                                  dw_parts[1], q.stride(), k.stride(), v.stride(), dy.stride(),
                                  dk.stride(), dv.stride(), segment, T, H, PART,
                                  **constants(backward_kv_kernel, q, v, w_q))
        if before.numel():
            dfirst.copy_(later[:, :, -1])
        if w_q is not None:
            dw_q.copy_(dw_parts[0].sum((0, 2)))
            dw_k.copy_(dw_parts[1].sum((0, 2)))
    return outputs


def save_for_backward(ctx, inputs, output):
    q, k, v, w_q, w_k, _ = inputs
    y, inv_den, _, before = output
    ctx.save_for_backward(q, k, v, w_q, w_k, before, y, inv_den)
    ctx.set_materialize_grads(False)        # if nobody used the last state, None and not zeros


def gradients(ctx, grads):
    q, k, v, w_q, w_k, before, y, inv_den = ctx.saved_tensors
    dy, _, dstate, _ = grads
    dy = torch.zeros_like(y) if dy is None else rows_contiguous(dy)
    dq, dk, dv, dw_q, dw_k, dfirst = backward(q, k, v, w_q, w_k, before, y, inv_den, dy, dstate)
    return (dq, dk, dv, *((None, None) if w_q is None else (dw_q, dw_k)),
            dfirst if ctx.needs_input_grad[5] else None)


forward.register_fake(forward_outputs)
backward.register_fake(backward_outputs)
forward.register_autograd(gradients, setup_context=save_for_backward)


def rows_contiguous(x):
    """x with rows that lie whole and apart in memory, as those of empty_like(x) then do, too."""
    return x if x.stride(-1) == 1 and x.stride(-2) >= x.size(-1) else x.contiguous()


def fused_attention(q, k, v, w_q=None, w_k=None, state=None):
    """Causal linear attention by the kernels, for what kernels_take says.

    q, k (B, H, T, d) with any strides and Hedgehog's w_q, w_k (H, d, d), or without these features
    (B, H, T, F). Returns y and the state (S, z) after the last token; gradients flow to all inputs,
    through the states too, in reverse mode and once.
    """
    (B, H, T, D), X = v.shape, q.size(-1)
    S, z = state or (None, None)
    F = X if w_q is None else 2 * X
    for name, x, shape in (("q", q, (B, H, T, X)), ("k", k, (B, H, T, X)), ("w_q", w_q, (H, X, X)),
                           ("w_k", w_k, (H, X, X)), ("S", S, (B, H, F, D)), ("z", z, (B, H, F))):
        if x is not None and x.shape != shape:              # kernels would read past the end
            raise ValueError(f"{name} is {tuple(x.shape)} and not {shape}, as v is {(B, H, T, D)}")
    dtype = v.dtype                                         # fp32 maps work in a bf16 model
    if torch.is_autocast_enabled(v.device.type):
        dtype = torch.get_autocast_dtype(v.device.type)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if w_q is not None:
        w_q, w_k = w_q.to(dtype).contiguous(), w_k.to(dtype).contiguous()
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    if v.size(2) == 1 and state is not None and not torch.is_grad_enabled():
        S, z = (x.float().contiguous() for x in state)
        y, after = torch.empty_like(v), (torch.empty_like(S), torch.empty_like(z))
        with torch.cuda.device_of(v):
            step_kernel[(v.size(0) * v.size(1),)](
                q, k, v, w_q, w_k, y, S, z, *after, q.stride(), k.stride(), v.stride(), y.stride(),
                v.size(1), EPS=EPS, **constants(step_kernel, q, v, w_q))
        return y, after
    if state is not None:
        state = torch.cat([state[0].mT, state[1].unsqueeze(-2)], dim=-2).float()  # (B, H, D+1, F)
    y, _, end, _ = forward(q, k, v, w_q, w_k, state)
    return y, (end[..., :-1, :].mT, end[..., -1, :])

