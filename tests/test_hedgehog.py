"""What defines each feature map, and the GPT around it."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from gpt import GPT, cos_and_sin, linear_cross_entropy, replayed, rotate
from hedgehog import (FEATURE_MAPS, FeatureMap, GPTConfig, LinearAttention, Performer, entropy,
                      hedgehog_attention, monotonicity, softmax_attention,
                      softmax_attention_weights)
from linear import linear_attention_weights

B, H, T, D = 2, 3, 11, 8
MAPS = list(FEATURE_MAPS)
ATTENTIONS = ["softmax", *MAPS, "hedgehog,softmax"]


def config(attention="hedgehog", **kwargs):
    return GPTConfig(**{**dict(vocab_size=50, block_size=64, n_layer=2, n_head=H, n_embd=H * D,
                               attention=attention), **kwargs})


def qk(scale=1.0):
    torch.manual_seed(0)
    return scale * torch.randn(2, B, H, T, D, dtype=torch.float64)


def features(name, q, k, **kwargs):
    feature_map = FEATURE_MAPS[name](config(name, **kwargs)).double()
    for p in feature_map.parameters():                      # away from the identity
        p.data += 0.3 * torch.randn_like(p)
    phi_q, phi_k = feature_map(q, k, torch.arange(T))
    return feature_map, phi_q.detach(), phi_k.detach()


def model(attention="hedgehog", **kwargs):
    torch.manual_seed(1)
    gpt = GPT(config(attention, **kwargs)).double()
    for p in gpt.blocks.parameters():                       # so that nothing is near uniform
        p.data += 0.5 * torch.randn_like(p)
    return gpt


@pytest.mark.parametrize("name", MAPS)
def test_weights_are_not_negative(name):
    _, phi_q, phi_k = features(name, *qk())
    assert (phi_q @ phi_k.mT >= -1e-12).all()


@pytest.mark.parametrize("name", ["hedgehog", "hedgehog_decay"])
def test_features_in_fp16_do_not_vanish(name):
    """Large q and k: in fp16 features below 6e-8 would be 0, and with them whole weights."""
    q, k = (x.half() for x in qk(15.0))
    feature_map = FEATURE_MAPS[name](config(name)).half()
    exact = [x.detach() for x in feature_map.double()(q.double(), k.double(), torch.arange(T))]
    for phi, reference in zip(feature_map.half()(q, k, torch.arange(T)), exact):
        large = reference > 1e-30
        assert ((phi.double() / reference - 1).abs()[large] < 0.1).all()



def test_hedgehog_is_two_softmaxes_per_head():
    q, k = qk()
    m, phi_q, phi_k = features("hedgehog", q, k)
    for x, w, phi in ((q, m.w_q, phi_q), (k, m.w_k, phi_k)):
        for h in range(H):
            y = x[:, h] @ w[h]
            expected = torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)
            assert torch.allclose(phi[:, h], expected)
        assert torch.allclose(phi.sum(-1), torch.full_like(phi[..., 0], 2))
    joint = torch.cat([q @ m.w_q, -q @ m.w_q], dim=-1).softmax(-1)  # one softmax over both halves
    assert not torch.allclose(linear_attention_weights(joint, phi_k),
                              linear_attention_weights(phi_q, phi_k), rtol=1e-3)


def test_hedgehog_exp_is_exact_and_does_not_overflow():
    q, k = qk(3.0)
    m, phi_q, phi_k = features("hedgehog_exp", q, k)
    h = k @ m.w_k
    assert torch.allclose(phi_k, torch.cat([h, -h], dim=-1).exp())
    h = q @ m.w_q
    raw = linear_attention_weights(torch.cat([h, -h], dim=-1).exp(), phi_k)
    assert torch.allclose(linear_attention_weights(phi_q, phi_k), raw)
    q, k = qk(1e3)
    _, phi_q, phi_k = features("hedgehog_exp", q, k)
    assert linear_attention_weights(phi_q.float(), phi_k.float()).isfinite().all()


@pytest.mark.parametrize("name, f", [
    ("elu", lambda x: 1 + functional.elu(x)), ("relu", torch.relu),
    ("t2r", None), ("exp", torch.exp),
    ("exp2", lambda x: torch.exp(2 * x))])
def test_elementwise_maps(name, f):
    q, k = qk()
    m, phi_q, phi_k = features(name, q, k)
    if name == "t2r":
        assert torch.allclose(phi_q, torch.relu(q @ m.w_q + m.b_q))
        assert torch.allclose(phi_k, torch.relu(k @ m.w_k + m.b_k))
    else:
        assert torch.allclose(phi_k, f(k))
        assert torch.allclose(linear_attention_weights(phi_q, phi_k),
                              linear_attention_weights(f(q), f(k)))


def test_elu_does_not_cancel_in_bf16():
    x = torch.tensor([[-8.0]], dtype=torch.bfloat16)
    phi = FEATURE_MAPS["elu"](config("elu")).phi(x)
    assert abs(phi.item() / math.exp(-8) - 1) < 0.01


def test_performer_expectation():
    """E[phi(q).phi(k)] = exp(q.k / sqrt d): many draws give softmax's weights."""
    torch.manual_seed(0)
    q, k = 0.5 * torch.randn(2, 1, 1, 6, D, dtype=torch.float64)
    phi_q, phi_k = Performer(config("performer"), m=200_000).double()(q, k, None)
    a = linear_attention_weights(phi_q, phi_k)
    assert (a - softmax_attention_weights(q, k)).abs().max() < 0.01
    few = Performer(config("performer"), m=8).double()
    b = linear_attention_weights(*few(q, k, None))
    assert (b - softmax_attention_weights(q, k)).abs().max() > 0.01
    w = few.w / few.w.norm(dim=1, keepdim=True)
    assert torch.allclose(w @ w.T, torch.eye(8, dtype=torch.float64), atol=1e-6)


def test_weights_and_figures_in_low_precision():
    """As exact as in fp32, under autocast too."""
    q, k = (x.float() for x in qk())
    exact = softmax_attention_weights(q, k)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(softmax_attention_weights(q, k), exact)
    assert entropy(exact.half()) == pytest.approx(entropy(exact).item(), abs=1e-2)
    assert entropy(torch.full((1, 1, 2, 2**14), 2.0**-14).half()).item() == pytest.approx(
        14 * math.log(2), abs=1e-3)


def test_fp32_maps_in_a_bf16_model():
    q, k = (x.bfloat16() for x in qk())
    w = torch.eye(q.size(-1)).expand(q.size(1), -1, -1)
    assert hedgehog_attention(q, k, k, w, w)[0].dtype == torch.bfloat16


def test_queries_that_continue_see_the_keys_before():
    """Three queries against the keys of eleven tokens: the last three rows of all."""
    q, k = (x[:, :, :11] for x in qk())
    whole = softmax_attention(q, k, k)
    assert torch.allclose(softmax_attention(q[:, :, 8:], k, k), whole[:, :, 8:])


def test_no_tokens():
    q, k = qk()
    mask = torch.ones(q.size(0), T)
    y, _ = LinearAttention(FEATURE_MAPS["hedgehog"](config()).double())(
        *(x[:, :, :0] for x in (q, k, k)), None, True, mask)
    assert y.numel() == 0
    assert monotonicity(torch.rand(*q.shape[:2], 0, T), q[:, :, :0], k, True, mask) == 0


@pytest.mark.parametrize("values, message", [
    (dict(n_head=0), "below"), (dict(feature_dim=-1), "below"),
    (dict(attention="hedgehog_decay,softmax", causal=False), "causal")])
def test_configs_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**values)


def test_cosformer_ends_where_its_weights_would_be_negative():
    q = torch.randn(1, 2, 65, 16)
    with pytest.raises(ValueError, match="up to 64 tokens"):
        FEATURE_MAPS["cosformer"](config("cosformer", position="rotary"))(q, q, torch.arange(65))


def test_cosformer_weighs_by_distance():
    q, k = qk()
    _, phi_q, phi_k = features("cosformer", q, k)
    i = torch.arange(T, dtype=torch.float64)
    distance = (math.pi / (2 * 64) * (i[:, None] - i)).cos()
    assert torch.allclose(phi_q @ phi_k.mT, q.relu() @ k.relu().mT * distance, atol=1e-6)


def test_taylor_is_the_second_order_expansion():
    q, k = qk()
    _, phi_q, phi_k = features("taylor", q, k)
    s = q @ k.mT / math.sqrt(D)
    assert torch.allclose(phi_q @ phi_k.mT, 1 + s + s ** 2 / 2)
    assert phi_q.size(-1) == 1 + D + D * D


def test_softmax_attention_fast_path_is_the_definition():
    q, k = qk()
    v = torch.randn_like(q)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 6:] = False
    for causal in (True, False):
        for key_mask in (None, mask):
            a = softmax_attention_weights(q, k, causal, key_mask)
            assert torch.allclose(a.sum(-1), torch.ones_like(a[..., 0]))
            assert torch.allclose(softmax_attention(q, k, v, causal, key_mask), a @ v)
    one = softmax_attention(q[:, :, -1:], k, v)             # a query that stands last
    assert torch.allclose(one, softmax_attention(q, k, v)[:, :, -1:])


def test_rotary_depends_on_distance_only():
    q, k = qk()
    q, k = q[:, :, :1], k[:, :, :1]

    def dot(i, j):
        return (rotate(q, torch.tensor([i])) * rotate(k, torch.tensor([j]))).sum(-1)
    assert torch.allclose(dot(3, 1), dot(45, 43), atol=1e-5)
    assert not torch.allclose(dot(3, 1), dot(3, 2), atol=1e-3)


def test_the_compiler_does_not_see_into_rotarys_table():
    """Where it did, cosines took a fifth of the small model's step."""
    names = []

    def backend(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x, positions = torch.randn(2, 2, 5, 8), torch.arange(5)
    compiled = torch.compile(rotate, backend=backend, fullgraph=True)(x, positions)
    assert torch.equal(compiled, rotate(x, positions))
    assert "hedgehog.cos_and_sin.default" in names and not {"cos", "sin"} & set(names)
    torch.library.opcheck(cos_and_sin, (positions, 4))
    torch.compiler.reset()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_model_is_causal(attention, position):
    gpt = model(attention, position=position)
    idx = torch.randint(0, 50, (2, 40))
    other = idx.clone()
    other[:, 23] += 1
    other %= 50
    a, b = gpt(idx)[0], gpt(other)[0]
    assert a.shape == (2, 40, 50)
    assert torch.allclose(a[:, :23], b[:, :23], atol=1e-12)
    assert not torch.allclose(a[:, 23:], b[:, 23:], atol=1e-6)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_mix_gives_its_weights_times_the_values(attention, padded):
    mix = model(attention).blocks[0].attn.mix
    q, k, v = torch.randn(3, B, H, T, D, dtype=torch.float64)
    mask = None
    if padded:
        mask = torch.ones(B, T, dtype=torch.long)           # ints serve as well as bools
        mask[1, 6:] = 0
    a = mix.weights(q, k, torch.arange(T), True, mask)
    if attention not in ("relu", "t2r", "cosformer"):       # whose rows may be all zero
        assert torch.allclose(a.sum(-1), torch.ones_like(a[..., 0]))
    assert torch.allclose(mix(q, k, v, torch.arange(T), True, mask)[0], a @ v)


def test_a_query_without_a_key_has_weights_zero():
    q, k = qk()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :4] = False                                     # padding on the left
    a = softmax_attention_weights(q, k, True, mask)
    assert not a[0, :, :4].any() and a.isfinite().all()


def test_queries_without_weights_do_not_count_as_spiky():
    weights = torch.zeros(1, 1, 2, 4)
    weights[0, 0, 1] = 0.25
    assert abs(entropy(weights) - math.log(4)) < 1e-6


def test_converting_and_watching_a_layer():
    gpt, idx, seen = model("softmax"), torch.randint(0, 50, (2, 9)), []
    layer = gpt.attention_layers()[1]
    before = gpt(idx)[0]
    layer.mix = LinearAttention(FEATURE_MAPS["hedgehog"](config())).double()
    assert not torch.allclose(gpt(idx)[0], before, atol=1e-6)
    mask = torch.ones(2, 9, dtype=torch.bool)
    layer.mix.register_forward_pre_hook(lambda mix, args: seen.append(args))
    gpt(idx, key_mask=mask)
    (q, k, v, positions, causal, key_mask, cache), = seen
    assert q.shape == k.shape == v.shape == (2, H, 9, D) and positions.tolist() == list(range(9))
    assert causal and key_mask is mask and cache is None


def test_attention_by_layer():
    gpt = model("hedgehog,softmax", n_layer=5)
    kinds = [type(layer.mix).__name__ for layer in gpt.attention_layers()]
    assert kinds == ["LinearAttention", "SoftmaxAttention"] * 2 + ["LinearAttention"]
    assert config("elu,cosformer", position="rotary").max_length == 64
    assert config("elu,softmax", position="rotary").max_length is None
    with pytest.raises(ValueError, match="longer than n_layer 1"):      # else all would be elu
        config("elu,softmax", n_layer=1)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_generation_equals_running_the_whole_prefix(attention, position):
    gpt = model(attention, position=position)
    idx = torch.randint(0, 50, (2, 25))
    whole, _ = gpt.hidden(idx)
    x, caches = gpt.hidden(idx[:, :5], [None] * 2)          # the prompt at once, the rest by steps
    steps = [x]
    for t in range(5, 25):
        x, caches = gpt.hidden(idx[:, t:t + 1], caches, start=t)
        steps.append(x)
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-9)

    tokens = idx[:, :5]
    for _ in range(20):
        tokens = torch.cat([tokens, gpt(tokens)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(gpt.generate(idx[:, :5], 20, temperature=0), tokens)


def test_generation_past_the_training_length():
    prompt = torch.randint(0, 50, (1, 5))
    rotary = model(position="rotary")
    assert rotary.generate(prompt, 80, temperature=0).shape == (1, 85)
    for gpt in (model(), model("cosformer", position="rotary")):
        with pytest.raises(ValueError, match="rotary"):
            gpt.generate(prompt, 80)


def test_linear_state_is_constant_and_softmax_cache_grows():
    def sizes(attention):
        gpt, out = model(attention), []
        for n in (10, 20):
            _, caches = gpt.hidden(torch.zeros(1, n, dtype=torch.long), [None] * 2)
            out.append(sum(t.numel() for cache in caches for t in cache))
        return out
    assert sizes("hedgehog") == [2 * H * 2 * D * (D + 1)] * 2
    assert sizes("softmax") == [2 * 2 * H * D * n for n in (10, 20)]


def test_sampling():
    gpt = model()
    idx = torch.zeros(1, 1, dtype=torch.long)
    torch.manual_seed(0)
    many = gpt.generate(idx.repeat(500, 1), 1, top_k=3)[:, 1]
    likeliest = gpt(idx)[0][0, -1].topk(3).indices
    assert set(many.tolist()) == set(likeliest.tolist())


def test_rotary_is_its_definition():
    x, i = torch.randn(1, 1, 3, 6, dtype=torch.float64), torch.tensor([0, 1, 700])
    for pair, (a, b) in enumerate(((0, 3), (1, 4), (2, 5))):
        angle = i * 10000.0 ** (-2 * pair / 6)
        turned = torch.complex(angle.cos(), angle.sin()) * torch.complex(x[..., a], x[..., b])
        ours = rotate(x, i)
        assert torch.allclose(ours[..., a], turned.real, atol=1e-4)     # angles are fp32
        assert torch.allclose(ours[..., b], turned.imag, atol=1e-4)


def test_softmax_weights_are_made_in_fp32():
    q, k = (x.bfloat16() for x in qk(3.0))
    weights = softmax_attention_weights(q, k)
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.double(), softmax_attention_weights(q.double(), k.double()),
                          atol=1e-6)


def test_dropout_is_on_embeddings_and_both_branches():
    gpt, x = model(dropout=0.9), torch.randn(2, 9, 24, dtype=torch.float64)
    block, positions = gpt.blocks[0].train(), torch.arange(9)
    same = (block(x, positions)[0] == x).double().mean()    # what neither branch adds to
    assert 0.7 < same < 0.9
    assert (gpt.train().dropout(x) == 0).double().mean() > 0.8


def test_temperature():
    gpt, idx = model(), torch.randint(0, 50, (64, 3))
    cold = gpt.generate(idx, 1, temperature=1e-4)[:, -1]
    assert torch.equal(cold, gpt(idx)[0][:, -1].argmax(-1))
    probability = (gpt.eval()(idx[:1])[0][0, -1] / 2).softmax(-1)
    torch.manual_seed(0)
    drawn = gpt.generate(idx[:1].expand(4000, 3), 1, temperature=2.0)[:, -1]
    assert (drawn.bincount(minlength=50) / 4000 - probability).abs().max() < 0.03


def test_generation_is_without_dropout_and_leaves_the_mode():
    gpt, idx = model(dropout=0.5), torch.zeros(1, 1, dtype=torch.long)
    whole = gpt.eval().generate(idx, 12, temperature=0)
    assert torch.equal(gpt.train().generate(idx, 12, temperature=0), whole) and gpt.training


def test_initialisation():
    gpt = GPT(GPTConfig(vocab_size=1000, n_layer=8))
    for name, p in gpt.named_parameters():
        if "feature_map" in name:
            assert torch.equal(p, torch.eye(64).expand(12, 64, 64)), name
        elif p.dim() == 2:
            residual = name.endswith("attn.proj.weight") or name.endswith("mlp.2.weight")
            assert abs(p.std() / (0.02 / (4 if residual else 1)) - 1) < 0.02, name
    assert gpt.lm_head.weight is gpt.wte.weight
    loss = gpt(torch.randint(0, 1000, (1, 100)), torch.randint(0, 1000, (1, 100)))[1]
    assert abs(loss - math.log(1000)) < 0.5


def test_a_model_leaves_the_start_of_a_map_alone(monkeypatch):
    class Biased(FeatureMap):
        def __init__(self, config):
            super().__init__(config)
            self.linear = torch.nn.Linear(config.head_dim, config.head_dim)
            torch.nn.init.constant_(self.linear.bias, 0.5)

    monkeypatch.setitem(FEATURE_MAPS, "biased", Biased)
    for layer in GPT(config("biased")).attention_layers():
        assert (layer.mix.feature_map.linear.bias == 0.5).all()


def test_maps_with_rates_are_refused_for_encoders(monkeypatch):
    class Fading(FeatureMap):
        def rates(self):
            return torch.ones(H, 1, D)

    monkeypatch.setitem(FEATURE_MAPS, "fading", Fading)
    for name in ("fading", "hedgehog,hedgehog_decay"):
        config(name)
        with pytest.raises(ValueError, match="not for encoders"):
            config(name, causal=False)


@pytest.mark.parametrize("name", ["hedgehog", "hedgehog_exp", "t2r"])
def test_wide_maps(name):
    fresh = FEATURE_MAPS[name](config(name, feature_dim=12))
    assert torch.equal(fresh.w_q, fresh.w_k) and fresh.w_q is not fresh.w_k
    assert torch.equal(fresh.w_q[..., :D], torch.eye(D).expand(H, D, D))
    rest = fresh.w_q[..., D:]                               # columns of a rotation
    assert torch.allclose(rest.mT @ rest, torch.eye(12 - D), atol=1e-5)
    assert not torch.allclose(rest, torch.eye(D)[:, :12 - D].expand_as(rest), atol=0.1)
    _, phi_q, phi_k = features(name, *qk(), feature_dim=12)
    assert phi_q.size(-1) == phi_k.size(-1) == (12 if name == "t2r" else 24)
    gpt, idx = model(name, feature_dim=12), torch.randint(0, 50, (B, 20))
    new = gpt.generate(idx, 1, temperature=0)[:, -1]        # the state's shape follows
    assert torch.equal(new, gpt(idx)[0][:, -1].argmax(-1))


@pytest.mark.parametrize("vocab_size", [50, 1030])          # 1,030 is filled up to 1,088
def test_logits_are_the_product_with_the_embedding(vocab_size):
    gpt, idx = model(vocab_size=vocab_size), torch.randint(0, 50, (B, 9))
    logits = gpt(idx)[0]
    assert logits.shape == (B, 9, vocab_size)
    assert torch.allclose(logits, gpt.hidden(idx)[0] @ gpt.wte.weight[:vocab_size].T)


def test_gpt2_has_124m_parameters():
    with torch.device("meta"):
        gpt = GPT(GPTConfig(attention="softmax"))
    assert sum(p.numel() for p in gpt.parameters()) == 124_439_808 + 47 * 768
    assert gpt.lm_head.weight is gpt.wte.weight and gpt.wte.num_embeddings == 50304


@pytest.mark.parametrize("chunk", [4, 7, 100])
def test_the_loss_in_chunks_and_its_gradients(chunk):
    torch.manual_seed(0)
    x, w = torch.randn(3, 7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    x, w, y = x.requires_grad_(), w.requires_grad_(), torch.arange(21).view(3, 7) % 10 - 1
    loss = linear_cross_entropy(x, w, y, 9, chunk)          # the last 2 rows of w never come
    exact = functional.cross_entropy((x @ w[:9].T).flatten(0, 1), y.flatten(), ignore_index=-1)
    assert torch.allclose(loss, exact)
    for ours, theirs in zip(torch.autograd.grad(3 * loss, (x, w)),
                            torch.autograd.grad(3 * exact, (x, w))):
        assert torch.allclose(ours, theirs)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(linear_cross_entropy(x, w, y, 9, chunk), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_classifier_in_any_precision(dtype):
    gpt = model(num_classes=3, causal=False).to(dtype)
    idx, mask = torch.randint(0, 8, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    assert gpt(idx, key_mask=mask)[0].dtype == dtype


def test_a_bf16_model_has_one_loss_in_training_and_evaluation():
    gpt, (idx, y) = model().bfloat16(), torch.randint(0, 50, (2, B, 20))
    training, evaluation = gpt(idx, y)[1], gpt.eval()(idx, y)[1]
    assert evaluation.item() == pytest.approx(training.item(), rel=1e-4)


def test_a_replayed_function_takes_what_it_is_given(monkeypatch):
    """The graph here does again what was done while it recorded, as a GPU would."""
    launched, recording = [], []

    @contextlib.contextmanager
    def record(graph, stream):
        assert stream == torch.device("cpu")                # the tensors' own
        recording.append(graph)
        yield
        recording.clear()

    def double(x):
        y = torch.zeros_like(x)
        if recording:
            launched.append(lambda: y.copy_(2 * x))         # recorded, not done
        else:
            y.copy_(2 * x)
        return y

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(
        replay=lambda: [launch() for launch in launched]))
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    function, given = replayed(double), [torch.tensor(float(i)) for i in range(6)]
    results, other = [], torch.ones(3)
    for _ in range(2):
        assert function(other).tolist() == [2, 2, 2]
    for i, x in enumerate(given):
        results.append(function(x))
        assert len(launched) == (i >= 2)
    assert function(other).tolist() == [2, 2, 2] and len(launched) == 1
    assert results == [0, 2, 4, 6, 8, 10]
    assert given == [0, 1, 2, 3, 4, 5]                      # copies were written to


@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_in_chunks_compiles_into_the_models_graph(frozen):
    gpt, idx = model(vocab_size=1030), torch.randint(0, 1030, (2, 2, 64))
    gpt.wte.weight.requires_grad_(not frozen)               # frozen: as with adapters
    compiled, gradients = torch.compile(gpt, backend="aot_eager", fullgraph=True), []
    for forward in (gpt, compiled):
        forward(*idx)[1].backward()
        gradients.append([p.grad.clone() for p in gpt.parameters() if p.requires_grad])
        gpt.zero_grad()
    assert all(torch.allclose(a, b) for a, b in zip(*gradients))
    torch.compiler.reset()


def test_the_loss_when_no_target_counts():
    x, w = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = linear_cross_entropy(x, w, torch.tensor([-1, -1]), 5)
    loss.backward()
    assert loss == 0 and not x.grad.any() and not w.grad.any()


def test_tokens_that_fill_up_the_vocabulary_stay_zero():
    gpt = model(vocab_size=1030)
    optimizer = torch.optim.AdamW(gpt.parameter_groups(0.1), 1e-2)
    idx = torch.randint(0, 1030, (2, 2, 64))
    gpt(*idx)[1].backward()
    optimizer.step()
    assert gpt.wte.weight[:1030].any(1).all() and not gpt.wte.weight[1030:].any()


@pytest.mark.parametrize("attention", ["softmax", "hedgehog"])
def test_activations_made_again_give_the_same_gradients(attention):
    gpt, calls = model(attention), []
    gpt.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    idx, gradients = torch.randint(0, 50, (2, 2, 64)), []
    for times in (1, 3):
        gpt(*idx)[1].backward()
        gradients.append([p.grad.clone() for p in gpt.parameters()])
        assert len(calls) == times                          # once more in backward
        gpt.zero_grad()
        gpt.recompute_activations()
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_half_precision():
    q, k = (x.half() for x in qk(30.0))
    for name in ("exp", "hedgehog_exp", "relu"):
        phi_q, phi_k = FEATURE_MAPS[name](config(name)).half()(q, k, torch.arange(T))
        weights = linear_attention_weights(phi_q, phi_k)
        assert phi_k.isfinite().all() and weights.isfinite().all(), name
    none = linear_attention_weights(0 * phi_q, phi_k)
    assert not none.any()                                   # and not 0/0


def test_softmax_generates_in_memory_reserved_once():
    gpt, idx = model("softmax"), torch.randint(0, 50, (B, 5))
    caches = gpt.hidden(idx, [None] * 2)[1]
    step = gpt.eval().stepper(caches, 5, 9)
    whole, sizes = idx, []
    gpt.blocks[0].attn.mix.register_forward_hook(lambda mix, args, out: sizes.append(
        (out[1][0].shape[2], out[1][0].data_ptr())))
    for _ in range(4):
        token = torch.randint(0, 50, (B, 1))
        whole = torch.cat([whole, token], dim=1)
        assert torch.allclose(step(token).double(), gpt(whole)[0][:, -1], atol=1e-6)
    stepped = sizes[::2]                                    # the others are those of gpt(whole)
    assert stepped == [(9, stepped[0][1])] * 4


def test_weight_decay_is_for_matrices():
    gpt = model("t2r")
    decay, rest = ({id(p) for p in group["params"]} for group in gpt.parameter_groups(0.1))
    for name, p in gpt.named_parameters():
        matrix = p.dim() == 2 and "feature_map" not in name
        assert (id(p) in decay) == matrix and (id(p) in rest) != matrix, name


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_parameter_gets_a_gradient(attention):
    gpt = model(attention)
    gpt(torch.randint(0, 50, (2, 64)), torch.randint(0, 50, (2, 64)))[1].backward()
    for name, p in gpt.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_loss_counts_the_targets_that_are_not_masked():
    gpt = model()
    idx, targets = torch.randint(0, 50, (2, 2, 9))
    logits = gpt(idx)[0]
    exact = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    last = functional.cross_entropy(logits[:, -1], targets[:, -1])
    for mode in (True, False):
        gpt.train(mode)
        assert torch.allclose(gpt(idx, targets)[1], exact)
        assert torch.allclose(gpt(idx, targets.where(torch.arange(9) == 8, -1))[1], last)
    assert torch.equal(gpt(idx, targets)[0], logits)        # to judge by; none in training


@pytest.mark.parametrize("kwargs, words", [
    (dict(attention="soft"), "not one of"), (dict(attention="elu,soft"), "'soft' is not one of"),
    (dict(n_head=5), "not a multiple"),
    (dict(position="none"), "learned"), (dict(position="rotary", n_embd=9), "even")])
def test_impossible_configurations(kwargs, words):
    with pytest.raises(ValueError, match=words):
        config(**kwargs)
