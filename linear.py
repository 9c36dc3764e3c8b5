"""Linear attention as functions of features: the definition, and the same numbers in less time.

    y_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j),    j <= i if causal, all j if not

phi maps a query or a key to F features with phi(q).phi(k) >= 0 (Hedgehog paper, arXiv 2402.04347,
section 3). Shapes are those of torch.nn.functional.scaled_dot_product_attention:

    phi_q, phi_k  (B, H, T, F)   features: batch, heads, time, feature dim
    v, y          (B, H, T, D)   values and outputs, D the head dim
    key_mask      (B, T)         False (or 0) where a key is padding
    S             (B, H, F, D)   the state: sum over the keys so far of phi(k) v^T (section 4 has
                                 what is left of it at the next token)
    z             (B, H, F)      and its normaliser: sum over the keys so far of phi(k)

`naive_linear_attention` is the definition, T x T, and what every other form is tested against.
`chunked_linear_attention` takes O(T) time and memory: the state sums up all earlier chunks.
`recurrent_step` takes one token at a time, in generation, `recurrent_linear_attention` a sequence
so. kernel.py has the chunked form and the step as Triton kernels. At the end, and not in the paper,
are features that fade with distance.
"""

import torch
from torch.nn.functional import pad

# Added to the denominator, so that a query that matches no key gets 0 and not 0/0 (ReLU features
# can all be zero). It makes weights smaller only where products of features are as small.
EPS = 1e-30


# --- 1. The definition ----------------------------------------------------------------------------


def linear_attention_weights(phi_q, phi_k, causal=True, key_mask=None, r=None):
    """The weights a_ij = phi(q_i).phi(k_j) / sum_n phi(q_i).phi(k_n), (B, H, T_q, T_k).

    With T_q < T_k the queries are the last T_q tokens. r: rates of decay (section 4) or None.
    """
    if r is None:
        A = phi_q @ phi_k.mT                                # (B, H, T_q, T_k)
    else:
        check_causal(causal)
        A = decayed_products(phi_q, phi_k, r)
    if causal:
        A = A.tril(A.size(-1) - A.size(-2))
    if key_mask is not None:
        A = A * key_mask[:, None, None, :]
    dtype = torch.promote_types(A.dtype, torch.float32)     # in fp16 EPS would be 0
    return (A / (A.sum(-1, keepdim=True, dtype=dtype) + EPS)).to(A.dtype)


def naive_linear_attention(phi_q, phi_k, v, causal=True, key_mask=None):
    """The definition, O(T^2): weights, then their mean of the values. Returns y (B, H, T, D)."""
    return linear_attention_weights(phi_q, phi_k, causal, key_mask) @ v


# --- 2. Chunks ------------------------------------------------------------------------------------


def chunked_linear_attention(phi_q, phi_k, v, causal=True, key_mask=None, state=None, chunk=128):
    """The same in O(T): all pairs only inside chunks, everything earlier through the state.

    `state` is the (S, z) that an earlier segment returned, or None. Sums are kept in fp32 (fp64 for
    an fp64 v), under autocast too. Differentiable in all inputs.
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
        C = max(1, min(chunk, T))
        N = max(1, -(-T // C))
        # N chunks of C tokens; the last is filled up with zero features. (B, H, N, C, F or D)
        if T < N * C:
            phi_q, phi_k, v = (pad(x, (0, 0, 0, N * C - T)) for x in (phi_q, phi_k, v))
        phi_q, phi_k, v = (x.unflatten(2, (N, C)) for x in (phi_q, phi_k, v))
        S, z = phi_k.mT @ v, phi_k.sum(-2)                  # what each chunk adds
        A = (phi_q @ phi_k.mT).tril()                       # (B, H, N, C, C): inside each chunk
        num, den = A @ v, A.sum(-1, keepdim=True)
        if state is not None or N > 1:                      # and from all that came before it
            if state is None:
                state = torch.zeros_like(S[:, :, 0]), torch.zeros_like(z[:, :, 0])
            S = torch.cat([state[0].unsqueeze(2), S], dim=2).cumsum(2)  # (B, H, N+1, F, D)
            z = torch.cat([state[1].unsqueeze(2), z], dim=2).cumsum(2)  # S_n: before chunk n
            num = num + phi_q @ S[:, :, :-1]
            den = den + phi_q @ z[:, :, :-1].unsqueeze(-1)
        y = (num / (den + EPS)).flatten(2, 3)[:, :, :T]     # (B, H, T, D)
        return y.to(dtype), (S[:, :, -1].clone(), z[:, :, -1].clone())  # a view keeps all alive


# --- 3. One token at a time -----------------------------------------------------------------------


def recurrent_step(phi_q, phi_k, v, state=None):
    """One token: phi_q, phi_k (B, H, F) and v (B, H, D) -> y (B, H, D) and the new (S, z).

    S_i = S_{i-1} + phi(k_i) v_i^T,  z_i = z_{i-1} + phi(k_i),  y_i = phi(q_i) S_i / phi(q_i).z_i;
    time and memory do not depend on how many tokens came before.
    """
    dtype, sum_dtype = v.dtype, torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(v.device.type, enabled=False):
        phi_q, phi_k, v = (x.to(sum_dtype) for x in (phi_q, phi_k, v))
        S, z = state or (phi_k.new_zeros(()), phi_k.new_zeros(()))
        S, z = torch.addcmul(S, phi_k.unsqueeze(-1), v.unsqueeze(-2)), z + phi_k    # in one pass
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


# --- 4. Decay -------------------------------------------------------------------------------------
#
# With rates r (H, 1, F) weights are sum_f phi_f(q_i) phi_f(k_j) exp(-r_f (i - j)), j <= i, and
# S_i = exp(-r) S_{i-1} + phi(k_i) v_i^T. Since exp(-r (i - j)) = exp(-r (i - c)) exp(r (j - c)) for
# any c, features of queries take the first factor, those of keys the second. Of a query long before
# c and of a key long after it these overflow: hence tokens are cut into segments, each with a c of
# its own, and r is at most FASTEST. Features themselves have to be about 1 or less.

SEGMENT = 128               # tokens
FASTEST = 120 / SEGMENT     # exponents are at most 60 (fp32 ends at 88); models keep r / FASTEST


def check_causal(causal):
    if not causal:
        raise ValueError("features that decay are for causal attention")


def decayed_products(phi_q, phi_k, r):
    """sum_f phi_f(q_i) phi_f(k_j) exp(-r_f (i - j)), (B, H, T_q, T_k); the queries are the last T_q
    tokens. For j > i it may be infinite, so that has to be cut off, not multiplied by 0."""
    T_q, T_k, rows = phi_q.size(2), phi_k.size(2), []
    for i in range(0, T_q, SEGMENT):
        q = phi_q[:, :, i:i + SEGMENT]
        end = T_k - T_q + i + q.size(2)                     # the first token after these queries
        x = torch.arange(end, device=q.device) - (end - q.size(2) / 2)
        x = r * x.unsqueeze(-1)                             # (H, end, F): r (j - c)
        A = (q * (-x[:, -q.size(2):]).exp()) @ (phi_k[:, :, :end] * x.exp()).mT
        rows.append(pad(A, (0, T_k - end)))
    return torch.cat(rows, dim=2) if rows else phi_q @ phi_k.mT


def decayed_linear_attention(attend, phi_q, phi_k, v, r, causal=True, key_mask=None, state=None):
    """Linear attention with decay in O(T), but for N log2(N) sums of the states of N segments.
    `attend` does the work: it is called as chunked_linear_attention, without decay, and with
    segments as heads. It has to cut off pairs with j > i, whose products may be infinite.

    Returns y (B, H, T, D) and exp(-r) (S, z), the state as the token after the last sees it.
    """
    check_causal(causal)
    dtype, T = torch.promote_types(v.dtype, torch.float32), v.size(2)
    r = r.to(dtype)                                         # in bf16 exp of a slow -r would be 1
    L = max(1, min(SEGMENT, T))
    N = max(1, -(-T // L))
    with torch.autocast(v.device.type, enabled=False):
        phi_q, phi_k = phi_q.to(dtype), phi_k.to(dtype)
        if key_mask is not None:
            phi_k = phi_k * key_mask[:, None, :, None]
        phi_q, phi_k, v = (pad(x, (0, 0, 0, N * L - T)).unflatten(2, (N, L))
                           for x in (phi_q, phi_k, v))      # (B, H, N, L, F or D)
        # c is the middle of a segment
        x = r.unsqueeze(1) * (torch.arange(L, device=v.device) - L / 2).unsqueeze(-1)
        phi_q, phi_k = phi_q * (-x).exp(), phi_k * x.exp()
        # [S, z], with z as one more column. added: by each segment, as seen from its c; start: by
        # all before it, as seen where it begins. So start_n is exp(-r L) start_{n-1} + to_c
        # added_{n-1}. It is summed by doubling: each start has its last `lag` terms, and takes as
        # many more from the one `lag` segments before.
        added = phi_k.mT @ pad(v.to(dtype), (0, 1), value=1.0)      # (B, H, N, F, D + 1)
        to_c = (-r * L / 2).exp().unsqueeze(-1)             # (H, 1, F, 1), from L / 2 before
        given = (torch.zeros_like(added[:, :, 0]) if state is None
                 else torch.cat([state[0], state[1].unsqueeze(-1)], dim=-1))
        start = torch.cat([given.unsqueeze(2), added[:, :, :-1] * to_c], dim=2)
        lag, fade = 1, to_c * to_c                          # fade: exp(-r L lag)
        while lag < N:
            start = start + pad(start[:, :, :-lag] * fade, (0, 0, 0, 0, lag, 0))
            lag, fade = 2 * lag, fade * fade
        before = start * to_c                               # as seen from c
        to_T = (-r * (T - (N - 1) * L - L / 2)).exp().mT    # (H, F, 1): from the last c to token T
        last = (before[:, :, -1] + added[:, :, -1]) * to_T
        before = before.flatten(1, 2)                       # (B, H N, F, D + 1)
        y, _ = attend(*(x.flatten(1, 2) for x in (phi_q, phi_k, v)),
                      state=(before[..., :-1], before[..., -1]))
        y = y.unflatten(1, (-1, N)).flatten(2, 3)[:, :, :T]
        if key_mask is not None:
            # A query that sees no key has y = 0 and a gradient of 1 / EPS, infinite after x.exp().
            blind = (key_mask.cumsum(1) == 0) & ~given[..., -1].flatten(1).any(1, keepdim=True)
            y = y.masked_fill(blind[:, None, :, None], 0)
        return y, (last[..., :-1], last[..., -1])
