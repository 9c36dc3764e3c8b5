"""Hedgehog: linear attention that learns to weigh like softmax.

Zhang, Bhatia, Kumbong, Ré, "The Hedgehog & the Porcupine: Expressive Linear Attentions with
Softmax Mimicry", arXiv 2402.04347. From top to bottom: the feature maps; softmax attention; how
spiky and how alike two attentions are; the two attentions as modules that take each other's place.
gpt.py has the model around them.

Glossary
    code            paper           shape               what
    B, T, H         -, n, -                             batch, time in tokens, heads
    d               d                                   head dim, n_embd / H; of v: D
    m               d'                                  columns of w_q and w_k, d unless asked for
    F               2 d'                                features: 2 m for Hedgehog
    q, k, v         q, k, v         (B, H, T, d)        queries, keys, values
    w_q, w_k        W               (H, d, m)           a Hedgehog map's weights, one W a head
    phi_q, phi_k    phi(q), phi(k)  (B, H, T, F)        features
    S               -               (B, H, F, D)        linear attention's state: sum phi(k) v^T
    z               -               (B, H, F)           its normaliser: sum of phi(k)
    s               -                                   q.k / sqrt(d), softmax attention's logit
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from kernel import fused_attention, kernels_take
from linear import (FASTEST, chunked_linear_attention, decayed_linear_attention,
                    linear_attention_weights, recurrent_step)


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
        for name in self.attention.split(","):
            if name != "softmax" and name not in FEATURE_MAPS:
                raise ValueError(f"attention {name!r} is not one of: softmax, "
                                 + ", ".join(FEATURE_MAPS))
            if not self.causal and name != "softmax" and (
                    FEATURE_MAPS[name].rates is not FeatureMap.rates):
                raise ValueError(f"{name} is for causal models, not for encoders")
        if self.attention.count(",") >= self.n_layer:
            raise ValueError(f"attention {self.attention!r} is longer than n_layer {self.n_layer}")
        if self.position not in ("learned", "rotary"):
            raise ValueError(f"position {self.position!r} is neither learned nor rotary")
        if self.n_head < 1 or self.feature_dim < 0:
            raise ValueError(f"n_head {self.n_head} is below 1 or feature_dim {self.feature_dim} "
                             "below 0")
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
        return [names[i % len(names)] for i in range(self.n_layer)]

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
    dtype = torch.float32 if h.dtype == torch.float16 else h.dtype      # fp16 ends at 6e-8
    return torch.cat([h.softmax(-1, dtype), (-h).softmax(-1, dtype)], dim=-1)


class FeatureMap(nn.Module):
    """phi: called with q, k (B, H, T, d) and positions (T,), returns phi_q, phi_k (B, H, T, F).

    A new map is a subclass and a line in FEATURE_MAPS. Attention calls it and asks for rates(); of
    Hedgehog itself, and no subclass, it takes w_q and w_k, as kernels make these features inside.

    Features must give phi(q).phi(k) >= 0, and depend on a token and its position alone: generation
    hands over one token at a time. A factor that all of one query's features share cancels
    in the normalised weights; a factor on one key's features does not.
    """

    def __init__(self, config):
        super().__init__()

    def forward(self, q, k, positions):
        return self.phi(q), self.phi(k)

    def rates(self):
        """r (H, 1, F), at most FASTEST, if feature f is to fade by exp(-r_f) with each token. Such
        features are to be about 1 or less (linear.py, section 4)."""
        return None


def first_maps(config):
    """w_q and w_k (H, d, m), alike: each head starts with the identity (Appendix A) and, where m is
    above d, random orthogonal matrices beside it."""
    d, m = config.head_dim, config.feature_dim or config.head_dim
    blocks = [torch.eye(d).repeat(config.n_head, 1, 1)]
    blocks += [torch.linalg.qr(torch.randn_like(blocks[0]))[0] for _ in range((m - 1) // d)]
    W = torch.cat(blocks, dim=-1)[..., :m]
    return nn.Parameter(W.clone()), nn.Parameter(W.clone())


class Hedgehog(FeatureMap):
    """phi(x) = [softmax(x W), softmax(-x W)]; W per head, and one for q, another for k.

    The paper's section 4 with the softmax over features that its authors settled on (LoLCATs, arXiv
    2410.10254, Appendix D.1): features are bounded, and W learns to make the weights spiky and
    monotone in q.k. There is no bias (tutorial.md, section 4). README.md says which other maps have
    this name.
    """

    def __init__(self, config):
        super().__init__(config)
        self.w_q, self.w_k = first_maps(config)

    def forward(self, q, k, positions):
        return hedgehog_features(q, self.w_q), hedgehog_features(k, self.w_k)


def exp_features(q, k):
    """exp(q), exp(k), element by element, without overflow.

    A query's features are divided by the largest of them, a factor that cancels. A key's exponent
    stops at 60: below that its features are exact, and a sum over 2^20 tokens of them still fits
    into fp32 (e^88). Features below e^-60 are 0, without a gradient: where all products of a query
    are so small, that of the normalised weights would overflow.
    """
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    q = q - q.amax(-1, keepdim=True).detach()
    return tuple(torch.where(x < -60, 0.0, x.exp()) for x in (q, k.clamp(max=60)))


class HedgehogExp(Hedgehog):
    """phi(x) = [exp(x W), exp(-x W)]: the paper's equation in the main text, section 4."""

    def forward(self, q, k, positions):
        q, k = q @ self.w_q, k @ self.w_k
        return exp_features(torch.cat([q, -q], dim=-1), torch.cat([k, -k], dim=-1))


class HedgehogDecay(Hedgehog):
    """Hedgehog with weights of sum_f phi_f(q_i) phi_f(k_j) exp(-r_f (i - j)), r_f learned.

    This is not in the paper. Section 9 of tutorial.md says what it is for.
    """

    def __init__(self, config):
        super().__init__(config)
        m = self.w_q.size(-1)
        # r from 0.002 to 0.47, in an order that has nothing to do with that of the columns of W
        logit = torch.linspace(-6, 0, m).repeat(2)[torch.randperm(2 * m)]
        self.rate_logit = nn.Parameter(logit.repeat(config.n_head, 1, 1))   # (H, 1, 2m)

    def rates(self):
        return FASTEST * self.rate_logit.sigmoid()


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
        Q = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)   # now uniform over these
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
    al., arXiv 2202.08791). Negative for |i - j| > M, hence GPTConfig.max_length, and an error for
    more than M tokens in one call; who hands over a state has to count the tokens before it, too.
    """

    def __init__(self, config):
        super().__init__(config)
        self.M = config.block_size

    def forward(self, q, k, positions):
        if len(positions) > self.M:
            raise ValueError(f"cosformer is for up to {self.M} tokens here, not {len(positions)}")
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


FEATURE_MAPS = {"hedgehog": Hedgehog, "hedgehog_exp": HedgehogExp, "hedgehog_decay": HedgehogDecay,
                "t2r": T2R, "elu": ELU, "relu": ReLU, "exp": Exp, "exp2": Exp2,
                "performer": Performer, "cosformer": CosFormer, "taylor": Taylor}


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
    """a_ij = exp(s_ij) / sum_n exp(s_in), s_ij = q_i.k_j / sqrt(d), (B, H, T_q, T_k).

    They are fp32, or fp64 if q is. A query that sees no key has weights 0.
    """
    dtype, seen = torch.promote_types(q.dtype, torch.float32), visible(q, k, causal, key_mask)
    with torch.autocast(q.device.type, enabled=False):
        s = q.to(dtype) @ k.to(dtype).mT / math.sqrt(q.size(-1))
    return s.masked_fill(~seen, torch.finfo(dtype).min).softmax(-1) * seen


def softmax_attention(q, k, v, causal=True, key_mask=None):
    """softmax_attention_weights(q, k) @ v; without a mask it never holds the weights."""
    if key_mask is None and q.size(2) in (1, k.size(2)):    # FlashAttention on a GPU; the last
        return functional.scaled_dot_product_attention(     # token alone sees all keys
            q, k, v, is_causal=causal and q.size(2) > 1)
    return functional.scaled_dot_product_attention(q, k, v, visible(q, k, causal, key_mask))


# --- how spiky, how monotone, how alike -----------------------------------------------------------
#
# Weights are (B, H, T_q, T_k). Each figure is a mean over batch, heads and queries, the first ones
# of a causal sequence too, though they have few keys to choose from. Left out are queries where
# `queries` (B, T_q) is False (padding), those without weights, and in monotonicity those with one
# key.

SMALLEST = 1e-12        # weights below count as this in a logarithm: ReLU features give exact zeros


def attention_cross_entropy(teacher, student, queries=None):
    """-sum_j a_ij log b_ij, a the teacher's weights and b the student's."""
    teacher, student = (x.to(torch.promote_types(x.dtype, torch.float32))
                        for x in (teacher, student))
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
    # The spread is 0 where all keys are alike, else at least 0.5.
    spread = (r.square().sum(-1) * s.square().sum(-1)).sqrt()
    correlation = (r * s).sum(-1) / spread.clamp(min=0.25)
    counted = n > 1
    if key_mask is not None:
        counted = counted & key_mask[:, None, key_mask.size(1) - q.size(2):].bool()
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
# know of these and earlier ones; before they come, mix.reserve(cache, length) makes room for them.
# `positions` (T) are the tokens' own, `key_mask` (B, tokens so far) is False at padding.


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
        return linear_attention_weights(*self.feature_map(q, k, positions), causal, key_mask,
                                        self.feature_map.rates())

    def forward(self, q, k, v, positions, causal=True, key_mask=None, cache=None):
        if key_mask is not None:
            key_mask = key_mask[:, key_mask.size(1) - k.size(2):]   # the state has earlier tokens
        # The kernels know no other map, nor what a subclass does.
        if type(self.feature_map) is Hedgehog:
            w_q, w_k = self.feature_map.w_q, self.feature_map.w_k
            return hedgehog_attention(q, k, v, w_q, w_k, causal, key_mask, cache)
        features, r = self.feature_map(q, k, positions), self.feature_map.rates()
        if r is not None:
            return decayed_linear_attention(linear_attention, *features, v, r, causal, key_mask,
                                            cache)
        return linear_attention(*features, v, causal, key_mask, cache)

    @staticmethod
    def reserve(cache, length):
        return cache


def hedgehog_attention(q, k, v, w_q, w_k, causal=True, key_mask=None, state=None):
    """Hedgehog attention as a function: q, k, v (B, H, T, d), w_q and w_k (H, d, m).

    If `causal`, token i sees keys up to i and those in the state, else all; `key_mask` (B, T) is
    False at padding. Returns y (B, H, T, d) and the state (S, z) after the last token, to be handed
    over as `state` with the tokens that follow. Where kernels serve they make the features inside.
    """
    if kernels_take(q, v, w_q, causal, key_mask):
        return fused_attention(q, k, v, w_q, w_k, state)
    phi_q, phi_k = (hedgehog_features(x, w.to(x.dtype)) for x, w in ((q, w_q), (k, w_k)))
    return linear_attention(phi_q, phi_k, v, causal, key_mask, state)


def linear_attention(phi_q, phi_k, v, causal=True, key_mask=None, state=None):
    """Linear attention with these features, by the form that is fastest here.

    Returns y (B, H, T, D) and the state (S, z) after the last token; gradients flow to all inputs,
    through the states too.
    """
    if kernels_take(phi_q, v, None, causal, key_mask):
        return fused_attention(phi_q, phi_k, v, None, None, state)
    if causal and v.size(2) == 1:                           # a step of generation
        if key_mask is not None:
            phi_k = phi_k * key_mask[:, None, :, None]
        y, state = recurrent_step(phi_q.squeeze(2), phi_k.squeeze(2), v.squeeze(2), state)
        return y.unsqueeze(2), state
    return chunked_linear_attention(phi_q, phi_k, v, causal, key_mask, state)


def make_mix(name, config):
    """The module that a name in GPTConfig.attention stands for."""
    return SoftmaxAttention() if name == "softmax" else LinearAttention(FEATURE_MAPS[name](config))
