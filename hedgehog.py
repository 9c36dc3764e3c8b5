"""Hedgehog: linear attention that learns to weigh like softmax, and a GPT to train it in.

Zhang, Bhatia, Kumbong, Ré, "The Hedgehog & the Porcupine: Expressive Linear Attentions with
Softmax Mimicry", arXiv 2402.04347. From top to bottom: the feature maps; softmax attention; how
spiky and how alike two attentions are; the two attentions as modules that take each other's place;
the GPT.

Glossary
    code            paper           shape               what
    B, T, H         -, n, -                             batch, time in tokens, heads
    d               d                                   head dim, n_embd / H; D in kernel.py
    m               d'                                  columns of w_q and w_k, d unless asked for
    F               2 d'                                features: 2 m for Hedgehog
    q, k, v         q, k, v         (B, H, T, d)        queries, keys, values
    w_q, w_k        W               (H, d, m)           a Hedgehog map's weights, one W a head
    phi_q, phi_k    phi(q), phi(k)  (B, H, T, F)        features
    S               -               (B, H, F, d)        linear attention's state: sum phi(k) v^T
    z               -               (B, H, F)           its normaliser: sum of phi(k)
    s               -                                   q.k / sqrt(d), softmax attention's logit
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kernel import fused_attention, kernels_take, linear_attention, linear_attention_weights


@dataclass
class GPTConfig:
    """Shape of a GPT; the defaults are GPT-2's 124M. A ValueError says what cannot be built."""
    vocab_size: int = 50257
    block_size: int = 1024          # longest training context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0            # on embeddings and on what each block adds; never on weights
    attention: str = "hedgehog"     # "softmax" or a feature map's name; "a,b" alternates by layer
    position: str = "learned"       # "learned" (GPT-2) or "rotary"
    feature_dim: int = 0            # m, columns of a learned map's W; 0: as many as the head dim
    causal: bool = True             # False: an encoder, every token sees all
    num_classes: int = 0            # above 0: classify sequences, not predict tokens

    def __post_init__(self):
        for name in self.attentions:
            if name != "softmax" and name not in FEATURE_MAPS:
                raise ValueError(f"attention {name!r} is not one of: softmax, "
                                 + ", ".join(FEATURE_MAPS))
        if self.position not in ("learned", "rotary"):
            raise ValueError(f"position {self.position!r} is neither learned nor rotary")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        if self.position == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head dim, not {self.head_dim}")

    @property
    def attentions(self):
        """The attention of each layer: the names in `attention`, over and over."""
        names = self.attention.split(",")
        return [names[i % len(names)] for i in range(max(self.n_layer, len(names)))]

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def max_length(self):
        """Longest sequence that the model is defined on, or None where there is no limit."""
        bounded = self.position == "learned" or "cosformer" in self.attentions
        return self.block_size if bounded else None


# --- feature maps ---------------------------------------------------------------------------------


def hedgehog_features(x, w):
    """Hedgehog's phi(x) = [softmax(x W), softmax(-x W)]: (B, H, T, d) -> (B, H, T, 2m).

    w (H, d, m) is one W a head; each softmax is over its own m features. Section 4 of the paper.
    """
    h = x @ w
    return torch.cat([h.softmax(-1), (-h).softmax(-1)], dim=-1)


class FeatureMap(nn.Module):
    """phi: called with q, k (B, H, T, d) and positions (T,), returns phi_q, phi_k (B, H, T, F).

    A new map is a subclass and a line in FEATURE_MAPS; attention calls nothing else. Features must
    give phi(q).phi(k) >= 0. A factor that all of one query's features share cancels in the
    normalised weights; a factor on one key's features does not.
    """

    def __init__(self, config):
        super().__init__()

    def forward(self, q, k, positions):
        return self.phi(q), self.phi(k)


def first_maps(config):
    """w_q and w_k (H, d, m), alike: each head starts with the identity (Appendix A) and, where m is
    above d, random rotations beside it."""
    d, m = config.head_dim, config.feature_dim or config.head_dim
    blocks = [torch.eye(d).repeat(config.n_head, 1, 1)]
    blocks += [torch.linalg.qr(torch.randn_like(blocks[0]))[0] for _ in range((m - 1) // d)]
    W = torch.cat(blocks, dim=-1)[..., :m]
    return nn.Parameter(W.clone()), nn.Parameter(W.clone())


class Hedgehog(FeatureMap):
    """phi(x) = [softmax(x W), softmax(-x W)]; W per head, and one for q, another for k.

    The paper's section 4 with the softmax over features that its authors settled on (LoLCATs, arXiv
    2410.10254, Appendix D.1): features are bounded, and W learns to make the weights spiky and
    monotone in q.k. There is no bias: the 0.495 % of extra parameters that the paper gives for
    Llama-2-7B are 2 H d^2 a layer, no more. README.md says which other maps carry the name.
    """

    def __init__(self, config):
        super().__init__(config)
        self.w_q, self.w_k = first_maps(config)

    def forward(self, q, k, positions):
        return hedgehog_features(q, self.w_q), hedgehog_features(k, self.w_k)


def exp_features(q, k):
    """exp(q), exp(k), element by element, without overflow.

    Each query is divided by its largest feature, which cancels. A key's exponent stops at 60: below
    that its features are exact, and a sum over 2^20 tokens of them still fits into fp32 (e^88).
    Features below e^-60 are 0 and get no gradient, which grows like 1 / feature and can overflow.
    """
    q = q - q.amax(-1, keepdim=True).detach()
    return tuple(torch.where(x < -60, 0.0, x.exp()) for x in (q, k.clamp(max=60)))


class HedgehogExp(FeatureMap):
    """phi(x) = [exp(x W), exp(-x W)]: the paper's equation in the main text, section 4."""

    def __init__(self, config):
        super().__init__(config)
        self.w_q, self.w_k = first_maps(config)

    def forward(self, q, k, positions):
        q, k = q @ self.w_q, k @ self.w_k
        return exp_features(torch.cat([q, -q], dim=-1), torch.cat([k, -k], dim=-1))


class T2R(FeatureMap):
    """phi(x) = relu(x W + b): Transformer-to-RNN (Kasai et al., arXiv 2103.13076)."""

    def __init__(self, config):
        super().__init__(config)
        self.w_q, self.w_k = first_maps(config)
        self.b_q = nn.Parameter(torch.zeros_like(self.w_q[:, :1]))      # (H, 1, m)
        self.b_k = nn.Parameter(torch.zeros_like(self.w_k[:, :1]))

    def forward(self, q, k, positions):
        return (q @ self.w_q + self.b_q).relu(), (k @ self.w_k + self.b_k).relu()


class ELU(FeatureMap):
    """phi(x) = 1 + elu(x): the first linear attention (Katharopoulos et al., arXiv 2006.16236)."""

    def phi(self, x):
        # e^x where x < 0, and not (e^x - 1) + 1, which is 0 for x < -6 in bf16.
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


class ReLU(FeatureMap):
    """phi(x) = max(x, 0)."""

    def phi(self, x):
        return x.relu()


class Exp(FeatureMap):
    """phi(x) = exp(t x): spikier with t, not monotone in q.k; the paper's probe (section 3)."""
    t = 1.0

    def forward(self, q, k, positions):
        return exp_features(self.t * q, self.t * k)


class Exp2(Exp):
    """exp(2 x)."""
    t = 2.0


class Performer(FeatureMap):
    """phi(x) = exp(w_r.x' - |x'|^2 / 2) / sqrt(m), r = 1..m, x' = x / d^(1/4), w_r random.

    E[phi(q).phi(k)] = exp(s) (FAVOR+, Choromanski et al., arXiv 2009.14794). The w_r are orthogonal
    in blocks of d with the norms of Gaussian vectors, drawn once, the same for q and k. m = 2 d
    unless given: as many features as Hedgehog.
    """

    def __init__(self, config, m=None):
        super().__init__(config)
        d = config.head_dim
        m = m or 2 * d
        Q, R = torch.linalg.qr(torch.randn(math.ceil(m / d), d, d))
        Q = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)   # now uniform over rotations
        w = Q.flatten(0, 1)[:m] * torch.randn(m, d).norm(dim=1, keepdim=True)
        self.register_buffer("w", w)                        # (m, d)

    def forward(self, q, k, positions):
        d, m = q.size(-1), self.w.size(0)
        q, k = (x / d ** 0.25 for x in (q, k))
        q, k = (x @ self.w.T - x.square().sum(-1, keepdim=True) / 2 for x in (q, k))
        phi_q, phi_k = exp_features(q, k)
        return phi_q / math.sqrt(m), phi_k / math.sqrt(m)   # (B, H, T, m)


class CosFormer(FeatureMap):
    """phi(x_i) = relu(x_i) [cos(pi i / 2M), sin(pi i / 2M)], M = block_size.

    So phi(q_i).phi(k_j) = relu(q_i).relu(k_j) cos(pi (i - j) / 2M): nearer keys weigh more (Qin et
    al., arXiv 2202.08791). Negative for |i - j| > M, hence GPTConfig.max_length.
    """

    def __init__(self, config):
        super().__init__(config)
        self.M = config.block_size

    def forward(self, q, k, positions):
        angle = (math.pi / (2 * self.M) * positions).unsqueeze(-1)      # (T, 1)
        return tuple(torch.cat([x.relu() * angle.cos(), x.relu() * angle.sin()], dim=-1)
                     for x in (q, k))                       # (B, H, T, 2d)


class Taylor(FeatureMap):
    """phi(x) = [1, x', vec(x' x'^T) / sqrt 2], x' = x / d^(1/4): phi(q).phi(k) = 1 + s + s^2 / 2.

    Softmax's exp(s) to second order (section 3.2): as good, but 1 + d + d^2 features wide.
    """

    def phi(self, x):
        x = x / x.size(-1) ** 0.25
        x2 = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / math.sqrt(2)     # (B, H, T, d^2)
        return torch.cat([torch.ones_like(x[..., :1]), x, x2], dim=-1)


FEATURE_MAPS = {"hedgehog": Hedgehog, "hedgehog_exp": HedgehogExp, "t2r": T2R, "elu": ELU,
                "relu": ReLU, "exp": Exp, "exp2": Exp2, "performer": Performer,
                "cosformer": CosFormer, "taylor": Taylor}


# --- softmax attention, the definition and the fast path ------------------------------------------


def visible(q, k, causal=True, key_mask=None):
    """Which keys a query may see, bool, broadcastable to (B, H, T_q, T_k).

    `key_mask` (B, T_k) is False at padding. With T_q < T_k the queries are the last T_q tokens.
    """
    mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device)
    if causal:
        mask = mask.tril(k.size(2) - q.size(2))
    return mask if key_mask is None else mask & key_mask[:, None, None, :].bool()


def softmax_attention_weights(q, k, causal=True, key_mask=None):
    """a_ij = exp(s_ij) / sum_n exp(s_in), s_ij = q_i.k_j / sqrt(d), (B, H, T_q, T_k), in fp32.

    A query that sees no key has weights 0.
    """
    dtype, seen = torch.promote_types(q.dtype, torch.float32), visible(q, k, causal, key_mask)
    s = q.to(dtype) @ k.to(dtype).mT / math.sqrt(q.size(-1))
    return s.masked_fill(~seen, torch.finfo(dtype).min).softmax(-1) * seen


def softmax_attention(q, k, v, causal=True, key_mask=None):
    """softmax_attention_weights(q, k) @ v; without a mask it never holds the weights."""
    T_q, T_k = q.size(2), k.size(2)
    if key_mask is None and T_q in (1, T_k):                # FlashAttention on a GPU; the last
        return functional.scaled_dot_product_attention(     # token alone sees all keys
            q, k, v, is_causal=causal and T_q > 1)
    return functional.scaled_dot_product_attention(q, k, v,
                                                   visible(q, k, causal, key_mask))


# --- how spiky, how monotone, how alike -----------------------------------------------------------
#
# Weights are (B, H, T_q, T_k). Each figure is a mean over batch, heads and all queries, the first
# ones of a causal sequence too, though they have few keys to choose from; `queries` (B, T_q) is
# False at those left out, padding.

SMALLEST = 1e-12        # weights below count as this in a logarithm: ReLU features give exact zeros


def attention_cross_entropy(teacher, student, queries=None):
    """-sum_j a_ij log b_ij, a the teacher's weights and b the student's."""
    counted = teacher.sum(-1) > 0       # where ReLU features match no key, there are no weights
    if queries is not None:
        counted = counted & queries.unsqueeze(1).bool()     # (B, H, T_q)
    x = -(teacher * student.clamp(min=SMALLEST).log()).sum(-1)
    return (x * counted).sum() / counted.sum().clamp(min=1)


def entropy(weights, queries=None):
    """-sum_j a_ij log a_ij in nats: 0 on a single key, log n on n keys alike. Spiky is low."""
    return attention_cross_entropy(weights, weights, queries)


def attention_kl(teacher, student, queries=None):
    """KL(teacher || student) = sum_j a_ij log(a_ij / b_ij) in nats: 0 where they are the same."""
    return attention_cross_entropy(teacher, student, queries) - entropy(teacher, queries)


def monotonicity(weights, q, k, causal=True, key_mask=None):
    """Spearman's rank correlation of a_ij with q_i.k_j over the keys of each query that has two.

    1 if the weight always grows with q.k, as softmax's does; 0 for weights that are all alike.
    """
    seen = visible(q, k, causal, key_mask).expand(weights.shape)
    n = seen.sum(-1)                                        # keys of each query
    r, s = (ranks(x.masked_fill(~seen, math.inf)) - (n.unsqueeze(-1) - 1) / 2
            for x in (weights, q @ k.mT))                   # from -(n-1)/2 to (n-1)/2: mean 0
    r, s = r * seen, s * seen
    spread = (r.square().sum(-1) * s.square().sum(-1)).sqrt()           # 0 if all are alike, or
    correlation = (r * s).sum(-1) / spread.clamp(min=0.25)              # at least 0.5
    counted = n > 1
    if key_mask is not None:
        counted = counted & key_mask[:, None, -q.size(2):].bool()
    return (correlation * counted).sum() / counted.sum().clamp(min=1)


def ranks(x):
    """0, 1, ... in ascending order along the last axis; equal elements share their mean rank."""
    in_order = x.sort(-1).values
    return (torch.searchsorted(in_order, x) + torch.searchsorted(in_order, x, right=True) - 1) / 2


# --- attention as a module ------------------------------------------------------------------------
#
# An attention layer mixes values in its submodule `mix`. Two modules with one signature fit there,
#
#     mix(q, k, v, positions, causal, key_mask, cache) -> y (B, H, T, d), cache
#
# so to convert a layer from softmax to linear is `layer.mix = LinearAttention(feature_map)`, and to
# watch its q and k is PyTorch's register_forward_pre_hook. The cache is what later tokens need to
# know of these and earlier ones. `key_mask` (B, tokens so far) is False at padding.


class SoftmaxAttention(nn.Module):
    """Softmax attention. Its cache is (k, v) of all tokens so far, and perhaps room for more."""

    def weights(self, q, k, positions=None, causal=True, key_mask=None):
        return softmax_attention_weights(q, k, causal, key_mask)

    def forward(self, q, k, v, positions=None, causal=True, key_mask=None, cache=None):
        if cache is None:
            return softmax_attention(q, k, v, causal, key_mask), (k, v)
        for old, new in zip(cache, (k, v)):
            old.index_copy_(2, positions, new)
        room = cache[0].size(2)
        last = positions if causal else positions[-1:]
        seen = torch.arange(room, device=q.device) <= last.unsqueeze(-1)        # (T or 1, room)
        if key_mask is not None:
            key_mask = functional.pad(key_mask.bool(), (0, room - key_mask.size(1)))
            seen = seen & key_mask[:, None, None, :]
        return functional.scaled_dot_product_attention(q, *cache, seen), cache

    @staticmethod
    def reserve(cache, length):
        """The cache with room for `length` tokens, which are then written into it."""
        room = max(0, length - cache[0].size(2))
        return tuple(functional.pad(x, (0, 0, 0, room)) for x in cache) if room else cache


class LinearAttention(nn.Module):
    """Linear attention with a feature map. Its cache is the state (S, z), of constant size."""

    def __init__(self, feature_map):
        super().__init__()
        self.feature_map = feature_map

    def weights(self, q, k, positions, causal=True, key_mask=None):
        return linear_attention_weights(*self.feature_map(q, k, positions), causal, key_mask)

    def forward(self, q, k, v, positions, causal=True, key_mask=None, cache=None):
        if key_mask is not None:
            key_mask = key_mask[:, -k.size(2):]             # earlier tokens are in the state
        if type(self.feature_map) is Hedgehog:              # the kernels know no other map, nor
            w_q, w_k = self.feature_map.w_q, self.feature_map.w_k       # what a subclass does
            return hedgehog_attention(q, k, v, w_q, w_k, causal, key_mask, cache)
        return linear_attention(*self.feature_map(q, k, positions), v, causal, key_mask, cache)

    @staticmethod
    def reserve(cache, length):
        return cache


def hedgehog_attention(q, k, v, w_q, w_k, causal=True, key_mask=None, state=None):
    """Hedgehog attention as a function: q, k, v (B, H, T, d), w_q and w_k (H, d, m).

    Returns y (B, H, T, d) and the state (S, z) after the last token, to be handed over as `state`
    with the tokens that follow. On a GPU that takes them, the kernels make the features inside.
    """
    if kernels_take(q, v, w_q, causal, key_mask):
        return fused_attention(q, k, v, w_q, w_k, state)
    return linear_attention(hedgehog_features(q, w_q), hedgehog_features(k, w_k), v, causal,
                            key_mask, state)


def make_mix(name, config):
    """The module that a name in GPTConfig.attention stands for."""
    return SoftmaxAttention() if name == "softmax" else LinearAttention(FEATURE_MAPS[name](config))


# --- the model ------------------------------------------------------------------------------------


class LinearCrossEntropy(torch.autograd.Function):
    """linear_cross_entropy with x (N, C) and targets (N). Its gradients are made in the forward
    pass: nothing else needs the logits, and made once they need not be made again."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, chunk):
        x_c, w = x.split(chunk), weight.to(x.dtype)
        exact = torch.promote_types(x.dtype, torch.float32)
        loss, n = 0.0, (targets >= 0).sum().clamp(min=1)
        dx, dweight = [], torch.zeros_like(weight, dtype=exact)
        token = torch.arange(len(weight), device=x.device)
        for x, y in zip(x_c, targets.split(chunk)):
            share = (y >= 0).to(exact).unsqueeze(1) / n                     # (chunk, 1)
            logits = (x @ w.T).to(exact).masked_fill(token >= vocab_size, -math.inf)
            log_p = logits.log_softmax(-1)                                  # (chunk, V)
            loss = loss - (log_p.gather(1, y.clamp(min=0).unsqueeze(1)) * share).sum()
            dlogits = ((log_p.exp() - (token == y.unsqueeze(1)).to(exact)) * share).to(x.dtype)
            dx.append(dlogits @ w)
            dweight += dlogits.T @ x
        ctx.save_for_backward(torch.cat(dx), dweight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dx, dweight = ctx.saved_tensors
        return dx * dloss.to(dx.dtype), dweight * dloss.to(dweight.dtype), None, None, None


def linear_cross_entropy(x, weight, targets, vocab_size, chunk=2**13):
    """The mean of -log softmax(x W^T)[target] in nats over the targets that are not -1.

    x (..., C), W (V, C), of which vocab_size rows count, targets (...). `chunk` tokens at a time:
    the logits of all would take more memory than all else in a small model.
    """
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        return LinearCrossEntropy.apply(x.flatten(0, -2).to(dtype), weight, targets.flatten(),
                                        vocab_size, chunk)


def rotate(x, positions):
    """Rotary positions (Su et al., arXiv 2104.09864), x (B, H, T, d): q.k depends on i - j only."""
    half = x.size(-1) // 2
    frequency = 10000 ** (-torch.arange(half, device=x.device) / half)
    angle = positions.unsqueeze(-1) * frequency             # (T, d/2), fp32
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head attention around a `mix`."""

    def __init__(self, config, name):
        super().__init__()
        self.n_head, self.causal = config.n_head, config.causal
        self.rotary = config.position == "rotary"
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.mix = make_mix(name, config)

    def forward(self, x, positions, cache=None, key_mask=None):
        """x (B, T, n_embd) -> the same shape, and the cache after these tokens."""
        q, k, v = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                   for y in self.qkv(x).chunk(3, dim=-1))   # (B, H, T, d)
        if self.rotary:
            q, k = rotate(q, positions), rotate(k, positions)
        y, cache = self.mix(q, k, v, positions, self.causal, key_mask, cache)
        return self.proj(y.transpose(1, 2).flatten(2)), cache


class Block(nn.Module):
    """A pre-norm Transformer block, GPT-2's."""

    def __init__(self, config, name):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, name)
        self.mlp = nn.Sequential(nn.Linear(config.n_embd, 4 * config.n_embd),
                                 nn.GELU(approximate="tanh"),       # GPT-2's form of GELU
                                 nn.Linear(4 * config.n_embd, config.n_embd))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, positions, cache=None, key_mask=None):
        y, cache = self.attn(self.ln_1(x), positions, cache, key_mask)
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.ln_2(x))), cache


class GPT(nn.Module):
    """GPT-2 with the attention that config names; with num_classes a classifier of sequences."""

    def __init__(self, config):
        super().__init__()
        self.config, self.recompute = config, False
        # GPT-2's odd 50,257 tokens are filled up to a multiple of 64 with tokens that never come,
        # as the matrix units of a GPU ask for.
        rows = config.vocab_size + -config.vocab_size % (64 if config.vocab_size > 1024 else 1)
        self.wte = nn.Embedding(rows, config.n_embd)
        self.wpe = (nn.Embedding(config.block_size, config.n_embd)
                    if config.position == "learned" else None)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, name)
                                    for name in config.attentions[:config.n_layer])
        self.ln_f = nn.LayerNorm(config.n_embd)
        if config.num_classes:
            self.classifier = nn.Linear(config.n_embd, config.num_classes)
        else:
            self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
            self.lm_head.weight = self.wte.weight           # tied, as in GPT-2
        # GPT-2's initialisation, its 0.02 taken as 0.55 / sqrt(width) so that a narrow model starts
        # with activations of the same size. It names Linear and Embedding only: the feature maps,
        # which hold bare parameters, keep their identity.
        std = 0.02 * math.sqrt(768 / config.n_embd)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for linear in (block.attn.proj, block.mlp[2]):
                # 2 n_layer of them add to the residual stream
                nn.init.normal_(linear.weight, std=std / math.sqrt(2 * config.n_layer))
        with torch.no_grad():
            self.wte.weight[config.vocab_size:] = 0         # and stays 0: no gradient comes here

    @classmethod
    def from_pretrained(cls, name):
        """OpenAI's GPT-2, or what export() wrote: a name or folder, read by transformers."""
        import hf               # only this and the next method need transformers
        return hf.own_gpt(name)

    def export(self, folder):
        """A folder that transformers opens as a GPT-2, the maps of linear attention beside it."""
        import hf
        hf.export(self, folder)

    def attention_layers(self):
        return [block.attn for block in self.blocks]

    def projections(self):
        """(module, matrices stacked in its weight) of queries, keys, values and outputs."""
        return [x for attn in self.attention_layers() for x in ((attn.qkv, 3), (attn.proj, 1))]

    def check_length(self, length):
        if self.config.max_length is not None and length > self.config.max_length:
            raise ValueError(f"{length} tokens are more than the {self.config.max_length} that "
                             "this model was built for; with position='rotary' there is no limit "
                             "(except for attention='cosformer')")

    def hidden(self, idx, caches=None, start=0, key_mask=None):
        """Token ids at positions start, start + 1, ... -> hidden states (B, T, n_embd), new caches.

        `caches` is a list with what each block returned for the tokens before start (None at 0);
        without it nothing is kept. `key_mask` (B, start + T) is False at padding. `start` can be a
        tensor (1), on the device, if the caches have room.
        """
        if not torch.is_tensor(start):
            end = start + idx.size(1)
            self.check_length(end)
            if start > 0 and caches is not None:
                caches = [block.attn.mix.reserve(cache, end)
                          for block, cache in zip(self.blocks, caches)]
        positions = start + torch.arange(idx.size(1), device=idx.device)
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        x, kept = self.dropout(x), []
        for i, block in enumerate(self.blocks):
            inputs = x, positions, None if caches is None else caches[i], key_mask
            if self.recompute and torch.is_grad_enabled():
                x, cache = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, cache = block(*inputs)
            if caches is not None:
                kept.append(cache)
        return self.ln_f(x), kept

    def forward(self, idx, targets=None, key_mask=None):
        """Logits, and the mean loss in nats over the targets that are not -1.

        idx (B, T); targets (B, T) and logits (B, T, vocab_size), or as a classifier, which averages
        the hidden states of all tokens but padding, (B) and (B, num_classes). While a language
        model is trained, logits are None.
        """
        x = self.hidden(idx, key_mask=key_mask)[0]
        if self.config.num_classes:
            weight = torch.ones_like(idx) if key_mask is None else key_mask
            weight = (weight / weight.sum(1, keepdim=True)).unsqueeze(-1)   # (B, T, 1)
            logits = self.classifier((x * weight).sum(1))
        elif targets is not None and self.training:
            return None, linear_cross_entropy(x, self.lm_head.weight, targets,
                                              self.config.vocab_size)
        else:
            logits = self.lm_head(x)[..., :self.config.vocab_size]
        if targets is None:
            return logits, None
        return logits, functional.cross_entropy(logits.flatten(0, -2), targets.flatten(),
                                                ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx (B, T) followed by max_new_tokens sampled ones; temperature 0 takes the likeliest.

        The prompt goes through in parallel, then a token at a time from the caches: constant
        memory and time a token with linear attention, both growing with softmax.
        """
        if self.config.num_classes or not self.config.causal:
            raise ValueError("only a causal model without num_classes generates")
        training, T = self.training, idx.size(1)
        self.check_length(T + max_new_tokens)
        self.eval()
        x, caches = self.hidden(idx, [None] * self.config.n_layer)
        logits, step = self.logits_after(x), self.stepper(caches, T, T + max_new_tokens)
        for i in range(max_new_tokens):
            if i > 0:
                logits = step(new)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                new = (logits / temperature).softmax(-1).multinomial(1)
            idx = torch.cat([idx, new], dim=1)
        self.train(training)
        return idx

    def logits_after(self, x):
        """Hidden states (B, T, n_embd) -> logits of the token that follows, (B, vocab_size)."""
        return self.lm_head(x[:, -1])[:, :self.config.vocab_size].float()

    def stepper(self, caches, start, length):
        """A function from the token at `start` (B, 1) to the logits of the next, then from this one
        on, up to `length` tokens; `caches` are those of the tokens before.

        On a GPU its second call records what a step launches, as a CUDA graph, and later ones
        replay that: Python would take longer to launch the kernels than they take to run.
        """
        caches = [block.attn.mix.reserve(cache, length)
                  for block, cache in zip(self.blocks, caches)]
        token = torch.zeros(caches[0][0].size(0), 1, dtype=torch.long, device=caches[0][0].device)
        position, calls, graph, logits = torch.full_like(token[0], start), 0, None, None

        def step():
            x, new = self.hidden(token, caches, position)
            for cache, after in zip(caches, new):           # the same memory at each step
                for old, value in zip(cache, after):
                    if old is not value:
                        old.copy_(value)
            position.add_(1)
            return self.logits_after(x)

        def call(new):
            nonlocal calls, graph, logits
            token.copy_(new)
            calls += 1
            if not token.is_cuda or calls == 1:             # the first one also sets up libraries
                return step()
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    logits = step()
            graph.replay()
            return logits

        return call

    def recompute_activations(self):
        """From now on backward makes each block's activations again: less memory, more time."""
        self.recompute = True

    def parameter_groups(self, weight_decay):
        """Optimizer groups: decay for matrices; none for norms, biases and feature maps."""
        decay = {True: [], False: []}
        for name, p in self.named_parameters():
            decay[p.dim() >= 2 and "feature_map" not in name].append(p)
        return [{"params": decay[True], "weight_decay": weight_decay},
                {"params": decay[False], "weight_decay": 0.0}]
