"""A GPT around the attention of hedgehog.py: the model, its loss, generation.

GPT-2 with softmax or any feature map in each layer, learned or rotary positions, causal or not; as
a language model or, with num_classes, a classifier of sequences.
"""

import math

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hedgehog import make_mix


def rotate(x, positions):
    """Rotary positions (Su et al., arXiv 2104.09864), x (B, H, T, d): q.k depends on i - j only.

    So do softmax's weights, but not those of most feature maps: W, say, meets q and k turned.
    """
    half = x.size(-1) // 2
    cos, sin = cos_and_sin(positions, half).to(x.dtype)     # (T, d/2) each
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


# An operator, so that torch.compile does not see into it: it would fuse this with rotate, and take
# cosine and sine anew for every number of q and k. So there is one table for all layers.
@torch.library.custom_op("hedgehog::cos_and_sin", mutates_args=())
def cos_and_sin(positions: torch.Tensor, half: int) -> torch.Tensor:
    """cos and sin of the angle by which each position turns each pair of features: (2, T, half),
    fp32; positions (T)."""
    frequency = 10000 ** (-torch.arange(half, device=positions.device) / half)
    angle = positions.unsqueeze(-1) * frequency
    return torch.stack([angle.cos(), angle.sin()])


cos_and_sin.register_fake(lambda positions, half: positions.new_empty(
    2, positions.size(0), half, dtype=torch.float32))


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
    """The model of this file; `config` is a GPTConfig."""

    def __init__(self, config):
        super().__init__()
        self.config, self.recompute = config, False
        # GPT-2's odd 50,257 tokens are filled up to a multiple of 64 with tokens that never come,
        # as the matrix units of a GPU ask for. Small vocabularies are left: they cost little.
        rows = config.vocab_size + -config.vocab_size % (64 if config.vocab_size > 1024 else 1)
        self.wte = nn.Embedding(rows, config.n_embd)
        self.wpe = (nn.Embedding(config.block_size, config.n_embd)
                    if config.position == "learned" else None)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, name) for name in config.attentions)
        self.ln_f = nn.LayerNorm(config.n_embd)
        if config.num_classes:
            self.classifier = nn.Linear(config.n_embd, config.num_classes)
        else:
            self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
            self.lm_head.weight = self.wte.weight           # tied, as in GPT-2
        # GPT-2's initialisation, its 0.02 taken as 0.55 / sqrt(width) so that a narrow model starts
        # with activations of the same size. Feature maps start as they were made.
        std = 0.02 * math.sqrt(768 / config.n_embd)
        for name, module in self.named_modules():
            if "feature_map" in name:
                continue
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
        """Writes a folder that transformers opens as a GPT-2, the maps of linear attention beside
        it. It replaces what it wrote before; a folder with other files is a ValueError."""
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
        without it nothing is kept. `key_mask` (B, start + T) is False at padding, which is on the
        right. `start` can be a tensor (1), on the device, if the caches have room.
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
            logits = self.classifier((x * weight).sum(1).to(x.dtype))
        elif targets is not None and self.training:
            return None, linear_cross_entropy(x, self.lm_head.weight, targets,
                                              self.config.vocab_size)
        else:
            logits = self.lm_head(x)[..., :self.config.vocab_size]
        if targets is None:
            return logits, None
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, functional.cross_entropy(exact.flatten(0, -2), targets.flatten(),
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
                new = (logits / max(temperature, 1e-6)).softmax(-1).multinomial(1)
            idx = torch.cat([idx, new], dim=1)
        self.train(training)
        return idx

    def logits_after(self, x):
        """Hidden states (B, T, n_embd) -> logits of the token that follows, (B, vocab_size)."""
        return self.lm_head(x[:, -1])[:, :self.config.vocab_size].float()

    def stepper(self, caches, start, length):
        """A function from a token (B, 1) to the logits of the next, (B, vocab_size). Its first call
        takes the token at position `start`, each later call the one after, up to `length` tokens;
        `caches`, of the tokens before `start`, it may overwrite. On a GPU it is `replayed`.
        """
        caches = [block.attn.mix.reserve(cache, length)
                  for block, cache in zip(self.blocks, caches)]
        position = torch.tensor([start], device=caches[0][0].device)

        def step(token):
            x, new = self.hidden(token, caches, position)
            for cache, after in zip(caches, new):           # the same memory at each step
                for old, value in zip(cache, after):
                    if old is not value:
                        old.copy_(value)
            position.add_(1)
            return self.logits_after(x)

        return replayed(step, 1) if position.is_cuda else step

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


def replayed(function, plain=2):
    """`function` of tensors on a GPU as a CUDA graph: Python would take longer to launch the
    kernels of a small model than they take to run. `plain` calls in a row with tensors of the same
    shapes compile and set up libraries. The next one records what it launches, and from then on
    that is replayed for these shapes; calls with others run the function. It returns a tensor, and
    what else it changes, gradients say, it has to change where it is."""
    calls, shapes, graph, inputs, result = 0, None, torch.cuda.CUDAGraph(), None, None

    def call(*tensors):
        nonlocal calls, shapes, inputs, result
        now = [x.shape for x in tensors]
        if inputs is None:
            shapes, calls = now, calls + 1 if now == shapes else 1
        if now != shapes or calls <= plain:
            return function(*tensors)
        if inputs is None:
            inputs = [x.clone() for x in tensors]
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(tensors[0].device)):
                result = function(*inputs)
        for x, new in zip(inputs, tensors, strict=True):
            x.copy_(new)
        graph.replay()
        return result.clone()

    return call


# --- the loss in chunks ---------------------------------------------------------------------------


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


class LinearCrossEntropy(torch.autograd.Function):
    """linear_cross_entropy with x (N, C) and targets (N). Its gradients are made in the forward
    pass: nothing else needs the logits, and made once they need not be made again. It has no second
    derivatives."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, chunk):
        w, exact = weight.to(x.dtype), torch.promote_types(x.dtype, torch.float32)
        token, n = torch.arange(len(weight), device=x.device), (targets >= 0).sum().clamp(min=1)
        loss, dx, dweight = 0.0, [], torch.zeros_like(weight, dtype=exact)
        for x_c, y in zip(x.split(chunk), targets.split(chunk)):            # (chunk, C), (chunk)
            share = (y >= 0).to(exact).unsqueeze(1) / n                     # (chunk, 1)
            logits = (x_c @ w.T).to(exact).masked_fill(token >= vocab_size, -math.inf)
            log_p = logits.log_softmax(-1)                                  # (chunk, V)
            loss = loss - (log_p.gather(1, y.clamp(min=0).unsqueeze(1)) * share).sum()
            # d(-log p_y) / dlogits = p - (1 at y, 0 elsewhere)
            dlogits = ((log_p.exp() - (token == y.unsqueeze(1)).to(exact)) * share).to(x.dtype)
            dx.append(dlogits @ w)
            if ctx.needs_input_grad[1]:                     # not with adapters
                dweight += dlogits.T @ x_c
        ctx.save_for_backward(torch.cat(dx), dweight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, dloss):
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            raise RuntimeError("this loss has no second derivatives; that of model.eval() has")
        dx, dweight = ctx.saved_tensors
        exact = torch.promote_types(dx.dtype, torch.float32)
        dx = (dx.to(exact) * dloss).to(dx.dtype)            # dloss is not rounded to bf16
        return dx, dweight * dloss.to(dweight.dtype), None, None, None
