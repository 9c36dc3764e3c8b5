"""The two stages, what they may and may not change, the tasks, and distill.py's command line."""

import io
import json
import math
import shlex
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import distill
import places
import tasks
import train_lm
from distill import LowRank, add_lora, merge_lora, mimicry_loss, model_with
from gpt import GPT
from hedgehog import (FEATURE_MAPS, GPTConfig, Hedgehog, LinearAttention, SoftmaxAttention,
                      attention_cross_entropy, attention_kl, entropy, monotonicity,
                      softmax_attention_weights)
from linear import linear_attention_weights
from tasks import glue, listops, listops_value, matthews

B, H, T, D = 2, 2, 9, 4
PADDING = {"right": (0, slice(6, T)), "left": (0, slice(5)), "a whole sequence": 0,
           "a block of queries": (slice(B), slice(4, 8)), "all": slice(B)}
TINY = ("--data text.txt --n-layer 2 --n-head 2 --n-embd 32 --block-size 32 --batch-size 10 "
        "--micro-batch 8 --eval-every 150 --sample-tokens 5 --position learned")
SHORT = "--data text.txt --teacher softmax --micro-batch 4 --distill-steps 3 --steps 3"


def config(**kwargs):
    return GPTConfig(**{**dict(vocab_size=40, block_size=16, n_layer=2, n_head=H, n_embd=H * D,
                               attention="softmax"), **kwargs})


def teacher(**kwargs):
    torch.manual_seed(0)
    model = GPT(config(**kwargs)).double()
    for p in model.blocks.parameters():                     # so that attention is not near uniform
        p.data += 0.5 * torch.randn_like(p)
    return model.eval()


def student(model, name="hedgehog"):
    return model_with(replace(model.config, attention=name), model).eval()


def qk(scale=2.0):
    torch.manual_seed(0)
    return scale * torch.randn(2, B, H, T, D, dtype=torch.float64)


def noisy_map(name="hedgehog", **kwargs):
    torch.manual_seed(1)
    m = FEATURE_MAPS[name](config(**kwargs)).double()
    for p in m.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return m


def padding(where):
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[PADDING[where]] = False
    return mask


# --- how spiky, how monotone, how alike -----------------------------------------------------------


def test_entropy():
    uniform = torch.full((1, 1, 3, 8), 1 / 8, dtype=torch.float64)
    assert entropy(uniform).item() == pytest.approx(math.log(8))
    assert entropy(torch.eye(5)[None, None]).item() == pytest.approx(0)
    causal = linear_attention_weights(torch.ones(1, 1, 4, 1), torch.ones(1, 1, 4, 1))
    assert entropy(causal).item() == pytest.approx(math.log(math.factorial(4)) / 4)


def test_kl():
    q, k = qk()
    a, b = softmax_attention_weights(q, k), softmax_attention_weights(0.5 * q, k)
    expected = torch.distributions.kl_divergence(*(torch.distributions.Categorical(x)
                                                   for x in (a[:, :, -1], b[:, :, -1]))).mean()
    assert attention_kl(a[:, :, -1:], b[:, :, -1:]).item() == pytest.approx(expected.item())
    assert attention_kl(a, a).item() == pytest.approx(0, abs=1e-12) and attention_kl(a, b) > 0.01


@pytest.mark.parametrize("causal", [True, False])
def test_monotonicity(causal):
    q, k = qk()
    softmax = softmax_attention_weights(q, k, causal)
    assert monotonicity(softmax, q, k, causal).item() == pytest.approx(1)
    falling = softmax_attention_weights(-q, k, causal)
    assert monotonicity(falling, q, k, causal).item() == pytest.approx(-1)
    assert monotonicity(torch.ones_like(softmax), q, k, causal).item() == 0
    # ranks of weights 2 1 3 against logits 1 2 3: Spearman's 1 - 6 (1 + 1) / (3 (9 - 1)) = 0.5
    weights = torch.tensor([[[[0.3, 0.1, 0.6]]]])
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([[[[1.0], [2.0], [3.0]]]])
    assert monotonicity(weights, q, k, causal=False).item() == pytest.approx(0.5)
    tied = torch.tensor([[[[0.2, 0.2, 0.6]]]])              # ranks 0.5 0.5 2
    assert monotonicity(tied, q, k, causal=False).item() == pytest.approx(1.5 / math.sqrt(3))


@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_no_figure(causal):
    q, k = qk()
    mask, m = padding("right"), noisy_map()
    weights = linear_attention_weights(*m(q, k, None), causal, mask)
    softmax = softmax_attention_weights(q, k, causal, mask)
    whole = [attention_kl(softmax, weights, mask), entropy(weights, mask),
             monotonicity(weights, q, k, causal, mask)]
    sums, count = [0, 0, 0], [0, 0, 0]
    for b, n in ((0, 6), (1, T)):                           # each sequence alone, without padding
        x, y = q[b:b + 1, :, :n], k[b:b + 1, :, :n]
        w = linear_attention_weights(*m(x, y, None), causal)
        a = softmax_attention_weights(x, y, causal)
        parts = attention_kl(a, w), entropy(w), monotonicity(w, x, y, causal)
        for i, (part, rows) in enumerate(zip(parts, (n, n, n - causal))):
            sums[i], count[i] = sums[i] + rows * part, count[i] + rows
    for x, total, n in zip(whole, sums, count):
        assert x.item() == pytest.approx((total / n).item())


# --- stage 1 --------------------------------------------------------------------------------------


def test_no_gradient_where_student_equals_teacher():
    q, k = qk()
    a = softmax_attention_weights(q, k)
    logits = a.log().clamp(min=-100).requires_grad_()
    (gradient,) = torch.autograd.grad(attention_cross_entropy(a, logits.softmax(-1)), logits)
    assert gradient.abs().max() < 1e-12
    other = (0.5 * logits.detach()).requires_grad_()
    (gradient,) = torch.autograd.grad(attention_cross_entropy(a, other.softmax(-1)), other)
    assert gradient.abs().max() > 1e-3
    m = noisy_map()                     # keys all alike: both attentions are uniform, whatever W
    loss = mimicry_loss(m, q, k[:, :, :1].expand_as(k), None)
    assert max(g.abs().max() for g in torch.autograd.grad(loss, m.parameters())) < 1e-12
    loss = mimicry_loss(m, q, k, None)
    assert min(g.abs().max() for g in torch.autograd.grad(loss, m.parameters())) > 1e-3


@pytest.mark.parametrize("causal, mask", [(True, None), (False, None),
                                          (False, padding("right"))])
def test_loss_gradient(causal, mask):
    q, k = qk(1.0)
    m = noisy_map()

    def loss(w_q, w_k):
        def feature_map(*args):
            return torch.func.functional_call(m, {"w_q": w_q, "w_k": w_k}, args)
        feature_map.rates = m.rates
        return mimicry_loss(feature_map, q, k, None, causal, mask, block=4)

    assert torch.autograd.gradcheck(loss, [p.detach().clone().requires_grad_()
                                           for p in m.parameters()])


@pytest.mark.parametrize("causal, name", [(True, "hedgehog"), (False, "hedgehog"),
                                          (True, "hedgehog_decay")])
@pytest.mark.parametrize("where", [None, *PADDING])
def test_loss_is_the_kl_whatever_the_block(causal, name, where):
    """And all is finite, even where a query sees no key or a block has no query."""
    q, k = qk()
    mask, m = where and padding(where), noisy_map(name)
    a = softmax_attention_weights(q, k, causal, mask)
    b = LinearAttention(m).weights(q, k, None, causal, mask)
    kl = attention_kl(a, b, mask)
    figures = kl, entropy(a, mask), entropy(b, mask), monotonicity(b, q, k, causal, mask)
    assert all(x.isfinite() for x in figures) and (kl > 0.01) == (where != "all")
    for block in (1, 2, 4, T, 100):
        loss = mimicry_loss(m, q, k, None, causal, mask, block)
        assert torch.allclose(loss, kl)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, m.parameters()))


def test_gradients_of_exponentials_stay_finite():
    """The feature e^-100 of the query meets e^55 of a key: its gradient exceeds fp32."""
    m = FEATURE_MAPS["hedgehog_exp"](GPTConfig(n_embd=2, n_head=1))
    q, k = (torch.tensor([[[[x, 0.0], [y, 0.0]]]]) for x, y in ((50, 50), (-55, -54)))
    for g in torch.autograd.grad(distill.mimicry_loss(m, q, k, None), list(m.parameters())):
        assert g.isfinite().all() and g.any()


def options(**more):
    return distill.Options(**dict(dict(device="cpu", precision="fp32", compile=False, batch_size=4,
                                       micro_batch=4, distill_steps=5, distill_lr=1e-2, lora=2,
                                       lora_alpha=8.0), **more))


def text(size=200):
    rng = np.random.default_rng(2)
    splits = {split: rng.integers(0, 40, size).astype(np.uint8) for split in ("train", "valid")}
    return tasks.Text("random", "bytes", 256, splits, {}, 12)


def run_distill(model, mixes=None, task=None, **more):
    """Stage 1 of a student whose layers run softmax; returns the losses."""
    layers = model.attention_layers()
    mixes = mixes or [layer.mix for layer in layers]
    distill.put([SoftmaxAttention() for _ in layers], layers)
    losses = distill.distill(model, mixes, task or text(), options(**more))
    distill.put(mixes, layers)
    return losses


def test_only_maps_move_and_the_loss_falls():
    model = student(teacher())
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = run_distill(model, distill_steps=30)
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("feature_map" not in name), name
        assert p.grad is None or "feature_map" in name


def test_stage_1_beside_maps_that_cannot_learn():
    model = student(teacher(), "hedgehog,elu")
    losses = run_distill(model, distill_steps=30)
    assert losses[-1] < losses[0]


def test_stage_1_has_no_weight_decay():
    """A parameter with a gradient of 0 stays as it is."""
    class Idle(Hedgehog):
        def __init__(self, config):
            super().__init__(config)
            self.idle = torch.nn.Parameter(torch.ones(3))

        def forward(self, q, k, positions):
            phi_q, phi_k = super().forward(q, k, positions)
            return phi_q + 0 * self.idle.sum(), phi_k

    model = teacher()
    mixes = [LinearAttention(Idle(model.config)) for _ in model.attention_layers()]
    distill.distill(model, mixes, text(), options(distill_steps=3))
    assert all(torch.equal(mix.feature_map.idle, torch.ones(3)) for mix in mixes)
    assert not any(torch.equal(mix.feature_map.w_q[0], torch.eye(8)) for mix in mixes)


def test_stage_1_runs_the_teacher(monkeypatch):
    model, idx, seen = teacher(), torch.randint(0, 40, (4, 12)), []
    monkeypatch.setattr(distill, "run_layers", lambda m, *batch: seen.append(m(idx)[0]))
    other = student(model)
    layers = other.attention_layers()
    mixes = [layer.mix for layer in layers]
    distill.put([SoftmaxAttention() for _ in layers], layers)
    distill.distill(other, mixes, text(), options(distill_steps=3))
    assert len(seen) == 3 and all(torch.allclose(logits, model(idx)[0]) for logits in seen)


def test_layers_learn_apart():
    """Another map in layer 2 and layer 1 learns the same to the last bit."""
    one, two = student(teacher()), student(teacher())
    two.blocks[1].attn.mix.feature_map.w_q.data.mul_(3)
    run_distill(one)
    run_distill(two)
    a, b = (m.blocks[0].attn.mix.feature_map for m in (one, two))
    assert torch.equal(a.w_q, b.w_q) and torch.equal(a.w_k, b.w_k)
    assert not torch.equal(one.blocks[1].attn.mix.feature_map.w_q,
                           two.blocks[1].attn.mix.feature_map.w_q)


@pytest.mark.parametrize("task", ["text", "classes"])
def test_micro_batches_are_one_batch(task):
    """Also where sequences are padded: shares are by tokens that are no padding."""
    results = []
    for micro_batch in (4, 3, 1):
        model = student(teacher())
        run_distill(model, task=text() if task == "text" else classification(),
                    micro_batch=micro_batch)
        results.append(list(model.parameters()))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.allclose(a, b, atol=1e-9)


def test_stage_1_adds_to_gradients_where_they_are(monkeypatch):
    """As its CUDA graph does, for which it hands over the work of a micro-batch."""
    model, places, given = student(teacher()), [], []
    maps = [p for name, p in model.named_parameters() if "feature_map" in name]
    monkeypatch.setattr(train_lm, "with_graph", lambda function, o: (
        lambda *batch: given.append(batch) or function(*batch)))
    rate = distill.set_rate
    monkeypatch.setattr(distill, "set_rate", lambda *args: (
        places.append([p.grad is not None and p.grad.data_ptr() for p in maps]), rate(*args)))
    run_distill(model, distill_steps=3, micro_batch=1)
    assert places[1] == places[2] and all(places[1]) and not any(places[0])
    assert len(given) > 3 and all(isinstance(x, torch.Tensor) for batch in given for x in batch)


def test_a_hybrid_gets_maps_only_where_it_is_linear():
    model = teacher()
    other = model_with(replace(model.config, attention="softmax,hedgehog"), model).eval()
    losses = run_distill(other)
    assert losses[-1] < losses[0]
    assert [name for name, _ in other.named_parameters() if "feature_map" in name] == [
        "blocks.1.attn.mix.feature_map.w_q", "blocks.1.attn.mix.feature_map.w_k"]


def test_stage_1_makes_its_loss_in_fp32(monkeypatch):
    """Of a model that runs in bf16, too."""
    loss, found = distill.mimicry_loss, []
    monkeypatch.setattr(distill, "mimicry_loss", lambda m, q, k, *args, **kwargs: (
        found.append((q.dtype, k.dtype, torch.is_autocast_enabled("cpu"))),
        loss(m, q, k, *args, **kwargs))[1])
    run_distill(student(teacher().float()), precision="bf16", distill_steps=1)
    assert found == [(torch.float32, torch.float32, False)] * 2


def test_maps_start_by_the_seed():
    model = teacher()
    a, b, c = (model_with(replace(model.config, attention="performer"), model, seed).state_dict()
               for seed in (1, 1, 2))
    name = "blocks.0.attn.mix.feature_map.w"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])


def test_the_loss_is_the_mean_of_the_layers_that_have_maps():
    both, first, second = (run_distill(student(teacher(), name), distill_steps=1)[0] for name in (
        "hedgehog", "hedgehog,softmax", "softmax,hedgehog"))
    assert both == pytest.approx((first + second) / 2)


# --- stage 2 --------------------------------------------------------------------------------------


def test_lora_merged_is_lora():
    model = student(teacher())
    idx = torch.randint(0, 40, (2, 12))
    before = model(idx)[0]
    parameters = add_lora(model, rank=2, alpha=8)
    model.double()
    assert torch.allclose(model(idx)[0], before)            # B is zero at first
    for p in parameters:
        p.data += 0.1 * torch.randn_like(p)
    adapted = model(idx)[0]
    assert not torch.allclose(adapted, before, atol=1e-3)
    merge_lora(model)
    assert torch.allclose(model(idx)[0], adapted)
    assert model.state_dict().keys() == student(teacher()).state_dict().keys()


def test_lora_is_the_papers_equation():
    torch.manual_seed(0)
    W, x = torch.randn(6, 5), torch.randn(3, 5)
    lora = LowRank(W, rank=2, alpha=8, parts=3)
    lora.B.data.normal_()
    for i in range(3):                                      # q, k and v: a pair A, B each
        delta = 8 / 2 * lora.B[i] @ lora.A[i]
        assert torch.allclose(x @ lora(W)[2 * i:2 * i + 2].T, x @ (W[2 * i:2 * i + 2] + delta).T,
                              atol=1e-5)


def test_lora_alpha(tmp_path):
    """Adam's first step moves B alike whatever alpha, and W in proportion to it."""
    moved = []
    for alpha in (2.0, 6.0):
        model = teacher().float()
        W = model.blocks[0].attn.proj.weight.clone()
        o = options(out=str(tmp_path), lora_alpha=alpha)
        distill.train("stage", model, text(), o, 1, 1e-2, rank=2)
        moved.append(model.blocks[0].attn.proj.weight - W)
    assert moved[0].any() and torch.allclose(3 * moved[0], moved[1], atol=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_weight_decay_is_for_whole_models(tmp_path, rank):
    """Neither for adapters nor for the maps that learn beside them."""
    weights = []
    for decay in (0.0, 10.0):
        model = teacher(attention="hedgehog").float()
        distill.train("stage", model, text(), options(out=str(tmp_path), weight_decay=decay), 2,
                      1e-2, rank)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*weights) == (rank > 0)


def test_stages_are_compiled_if_asked(monkeypatch):
    model, compiled = student(teacher()).float(), []
    for module, name in ((distill, "compiled"), (torch, "compile")):
        monkeypatch.setattr(module, name, lambda x: compiled.append(x) or x)
    run_distill(model, compile=True, distill_steps=1)
    distill.finetune(model, text(), options(compile=True), "", 1, 1e-2)
    assert compiled == [distill.kl_of_queries] * 2 + [model]


def test_activations_are_made_again_if_asked():
    """Each layer runs twice a step then, and the losses are the same."""
    losses, runs = [], {False: 0, True: 0}
    for recompute in runs:
        model = teacher().float()
        model.blocks[0].mlp.register_forward_pre_hook(lambda *_: runs.update(
            {recompute: runs[recompute] + 1}))
        losses.append(distill.finetune(model, text(), options(recompute=recompute), "", 2, 1e-2)[1])
    assert losses[0] == losses[1] and runs == {False: 2, True: 4}


def test_dropout_is_for_stage_2_alone():
    """Not for stage 1, which mimics the teacher as it is used, nor for figures."""
    model, task, modes = teacher(causal=False, num_classes=2).float(), classification(), []
    task.figure = "matthews"
    model.dropout.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    mixes = [layer.mix for layer in student(model).attention_layers()]
    for part, dropout in (
            (lambda: distill.distill(model, mixes, task, options()), False),
            (lambda: distill.measure(model, mixes, task, options()), False),
            (lambda: distill.score(model, task, options()), False),
            (lambda: distill.finetune(model, task, options(), "", 2, 1e-2), True)):
        model.train(not dropout)
        part()
        assert set(modes) == {dropout}
        modes.clear()


# --- tasks ----------------------------------------------------------------------------------------


def ids(text):
    operators = {"MIN": 10, "MAX": 11, "MED": 12, "SM": 13, "]": 14}
    return [operators[w] if w in operators else int(w) for w in text.replace("[", "").split()]


@pytest.mark.parametrize("expression, value", [
    ("7", 7), ("[MIN 3 1 2 ]", 1), ("[MAX 3 9 2 ]", 9), ("[SM 8 7 ]", 5), ("[MED 1 4 8 ]", 4),
    ("[MED 1 4 ]", 2), ("[MAX 2 [MIN 8 [SM 9 9 9 ] ] 3 ]", 7),
    ("[SM [MED 5 1 9 ] [MAX 0 1 ] [MIN 6 7 ] ]", 2)])
def test_listops_value(expression, value):
    assert listops_value(ids(expression)) == value


def test_listops_rules():
    splits = listops(4, 60, {"train": 400, "valid": 100})
    assert {split: len(x) for split, x in splits.items()} == {"train": 400, "valid": 100}
    texts = [bytes(x) for examples in splits.values() for x, _ in examples]
    assert len(set(texts)) == 500
    for text in texts:
        assert 4 < len(text) < 60
        arguments = []
        for token in text:
            if token >= 10 and token != 14:
                arguments.append(0)
            else:
                if token == 14:
                    assert 2 <= arguments.pop() <= 10
                if arguments:
                    arguments[-1] += 1
        assert not arguments
    again = listops(4, 60, {"train": 400, "valid": 100})
    assert all(bytes(a) == bytes(b) and x == y
               for (a, x), (b, y) in zip(splits["train"], again["train"]))


def test_listops_models_have_the_options(here, monkeypatch):
    configs, trained, real = [], {}, distill.GPT
    monkeypatch.setattr(distill, "model_with", lambda config, teacher, seed=0: (
        configs.append(config), real(config))[1])
    figures = dict.fromkeys("accuracy kl entropy_softmax entropy monotonicity".split(), 0.0)
    monkeypatch.setattr(distill, "row", lambda name, *rest: {"name": name, **figures})
    monkeypatch.setattr(distill, "train", lambda name, model, task, o, *rest: (
        configs.append(model.config), trained.update({name: rest})))
    result("--task listops --listops-examples 40 --listops-low 5 --listops-high 30 --out lm "
           "--n-embd 32 --distill-steps 1 --feature-dim 24 --position rotary --dropout 0.1 "
           "--teacher-steps 9 --teacher-lr 0.3 --steps 5 --lr 0.2 --lora 2")
    assert {(c.position, c.dropout) for c in configs} == {("rotary", 0.1)}
    assert configs[-1].feature_dim == 24 and configs[-1].attention == "hedgehog"    # from scratch
    assert trained == {"teacher": (9, 0.3), "stage2": (5, 0.2, 2), "softmax": (5, 0.2, 2),
                       "scratch": (14, 0.3)}


def test_a_quarter_of_listops_arguments_are_expressions():
    operators = arguments = 0
    for ids, _ in listops(3, 400, {"train": 400})["train"]:
        inner = (ids[1:] >= 10) & (ids[1:] < 14)            # all but the outermost
        operators += inner.sum()
        arguments += inner.sum() + (ids < 10).sum()
    assert 0.13 < operators / arguments < 0.19             # a quarter, less the long ones


def test_matthews():
    labels, guesses = [1, 1, 1, 0, 0, 1, 0, 0], [1, 0, 1, 0, 1, 1, 0, 0]
    tp, tn, fp, fn = 3, 3, 1, 1
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(labels, guesses) == pytest.approx(expected)
    assert matthews(labels, [1] * 8) == 0


def test_the_matthews_score_of_a_model():
    """One that takes sequences of more than 4 tokens for class 1."""
    class Longer(torch.nn.Module):
        def forward(self, idx, key_mask):
            return torch.stack([0 * key_mask.sum(1), key_mask.sum(1) - 4], 1), None

    task = classification()                                 # of 3, 7 and 5 tokens
    task.splits["train"], task.figure = task.splits["train"][:1], "matthews"
    for micro_batch in (1, 2, 3):
        score = distill.score(Longer(), task, options(micro_batch=micro_batch))
        assert score == pytest.approx(100 * matthews([0, 1, 0], [0, 1, 1]))


def write_tsv(folder, train, dev):
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "train.tsv").write_text(train)
    Path(folder, "dev.tsv").write_text(dev)


def test_glue_of_a_large_vocabulary(tmp_path):
    write_tsv(tmp_path, "s\t0\t\tx\ns\t1\t\ty\n", "s\t0\t\tx\n")
    splits, *_ = glue(tmp_path, lambda text: [119_547], 8)
    assert splits["valid"][0][0].tolist() == [119_547]
    assert glue(tmp_path, lambda text: [], 8)[0]["valid"][0][0].tolist() == [0]     # never empty


def test_glue_layouts(tmp_path, capsys):
    write_tsv(tmp_path, "gj04\t1\t\tA b.\ngj04\t0\t*\tB a.\n", "gj04\t1\t\tC.\n")
    splits, figure, labels = glue(tmp_path, lambda text: list(text.encode()), 3, ["no", "yes"])
    assert labels == ["0", "1"]
    assert figure == "matthews" and bytes(splits["train"][1][0].astype(np.uint8)) == b"B a"
    assert [label for _, label in splits["train"]] == [1, 0] and not capsys.readouterr().out
    write_tsv(tmp_path, "index\tsentence1\tsentence2\tlabel\n0\tx\ty\tno\n1\tz\tw\tyes\n",
              "index\tsentence1\tsentence2\tlabel\n0\tu\tv\tyes\n")
    splits, figure, labels = glue(tmp_path, lambda text: list(text.encode()), 64)
    assert figure == "accuracy" and bytes(splits["valid"][0][0].astype(np.uint8)) == b"u\nv"
    assert splits["valid"][0][1] == 1 and labels == ["no", "yes"]
    splits, _, labels = glue(tmp_path, lambda text: [0], 64, ["yes", "no"])     # a model's order
    assert splits["valid"][0][1] == 0 and labels == ["yes", "no"]
    write_tsv(tmp_path, "\ufeffsentence\tlabel\nx\t0\nx\ty\t1\nz\n", "sentence\tlabel\nx\t0\n")
    splits, *_ = glue(tmp_path, lambda text: list(text.encode()), 64)
    assert len(splits["train"]) == 1        # and lines with other columns are counted
    assert "train.tsv: 2 of 3 lines have not 2 columns" in capsys.readouterr().out


def classification():
    """A task of three sequences and two classes."""
    examples = [(np.arange(n, dtype=np.uint8), label) for n, label in ((3, 0), (7, 1), (5, 0))]
    return tasks.Classification("task", "bytes", {"train": examples, "valid": examples})


def test_batches_say_what_is_padding():
    idx, labels, mask = classification().batch("train", [2, 0])
    assert mask.sum(1).tolist() == [5, 3] and labels.tolist() == [0, 0]
    assert idx.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]


def test_evaluation_honours_the_mask():
    """Sequences of other lengths in a batch, or each by itself, without padding."""
    model, task = teacher(causal=False, num_classes=2), classification()
    together, alone = (train_lm.evaluate(model, task, "valid", options(micro_batch=n))["loss"]
                       for n in (3, 1))
    assert together == pytest.approx(alone, rel=1e-6)
    assert task.metrics("valid", 0.5, 0.25) == {"loss": 0.5, "accuracy": 25.0}     # per cent


def test_figures_of_attention_do_not_depend_on_the_batches():
    model = teacher(causal=False, num_classes=2).float()
    mixes = [layer.mix for layer in student(model).attention_layers()]
    figures = [distill.measure(model, mixes, classification(), options(micro_batch=n))
               for n in (1, 2, 3)]                          # of sequences of 3, 7 and 5 tokens
    for key, means in figures[0].items():
        assert all(means == pytest.approx(other[key], abs=1e-6) for other in figures[1:])


def test_lora_trains_adapters_and_maps_only(tmp_path):
    model = teacher(attention="hedgehog", causal=False, num_classes=2).float()
    before = {name: p.clone() for name, p in model.named_parameters()}
    distill.train("stage", model, classification(), options(out=str(tmp_path), batch_size=3), 2,
                  1e-2, rank=2)
    for name, p in model.named_parameters():
        moved = "feature_map" in name or name.endswith(("qkv.weight", "proj.weight"))
        assert torch.equal(p, before[name]) != moved, name
        assert p.requires_grad and (p.grad is None or moved), name


def test_teacher_and_stages_draw_other_batches(monkeypatch, tmp_path):
    """And softmax's finetuning those of stage 2, with as many steps."""
    drawn, order = [], train_lm.example_order
    monkeypatch.setattr(train_lm, "example_order",
                        lambda *args: drawn.append(order(*args)) or drawn[-1])
    task = text()
    distill.convert(task, teacher().float(), options(steps=2, distill_steps=2, out=str(tmp_path)))
    stage1, stage2, softmax = drawn[:2], drawn[2:4], drawn[4:]
    first = [order(step, 4, task.num_examples("train"), 0) for step in range(2)]    # a teacher's
    assert stage2 == softmax and all(a != b for a, b in zip(first + stage1, stage1 + stage2))
    assert first != stage2


def test_without_learned_maps_there_is_no_stage_1(tmp_path):
    o = options(attention="elu", steps=1, baseline=False, out=str(tmp_path))
    rows = distill.convert(text(), teacher().float(), o)
    assert [r["name"] for r in rows] == ["softmax, the teacher", "elu, swapped", "elu, stage 2"]


def test_each_stage_has_its_own_options(monkeypatch, tmp_path):
    """Stage 1 steps, batch size and learning rate; stage 2 and softmax theirs."""
    o = options(distill_steps=4, distill_batch_size=3, distill_lr=0.05, steps=3, lr=2e-3,
                warmup=0.5, out=str(tmp_path))
    task, rates, sizes, step = text(), [], [], torch.optim.AdamW.step
    batch = task.batch
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (
        rates.append(self.param_groups[0]["lr"]), step(self)))
    monkeypatch.setattr(task, "batch", lambda split, indices: (
        sizes.append(len(indices)) if split == "train" else None, batch(split, indices))[1])
    distill.convert(task, teacher().float(), o)
    stage1, stage2 = ([train_lm.learning_rate(i, steps, peak, 0.5) for i in range(steps)]
                      for steps, peak in ((4, 0.05), (3, 2e-3)))
    assert rates == stage1 + stage2 + stage2 and sizes == [3] * 4 + [4] * 6


def test_classifier_ignores_padding():
    for attention in ("softmax", "hedgehog", "elu"):
        model = teacher(attention=attention, causal=False, num_classes=3)
        mask = torch.ones(2, 10, dtype=torch.bool)
        mask[0, 6:] = False
        idx = torch.randint(0, 40, (2, 10))
        logits = model(idx, key_mask=mask)[0]
        assert logits.shape == (2, 3)
        assert torch.allclose(logits[0], model(idx[:1, :6])[0][0])
        assert not torch.allclose(logits[0], model(idx[:1])[0][0], atol=1e-4)


def test_an_encoder_sees_all_and_does_not_generate():
    model = teacher(causal=False, num_classes=3)
    idx = torch.randint(0, 40, (1, 10))
    hidden = model.hidden(idx)[0]
    idx[0, -1] = (idx[0, -1] + 1) % 40
    assert not torch.allclose(hidden[0, 0], model.hidden(idx)[0][0, 0])
    with pytest.raises(ValueError):
        model.generate(idx, 1)


def test_the_table(capsys):
    """Softmax's entropy is not shown twice."""
    row = dict(name="x", perplexity=4.5, kl=0.0, entropy_softmax=1.25, entropy=2.0,
               monotonicity=0.5)
    distill.print_table([row, row | dict(kl=1.0, rouge1=40.0, rouge2=20.0, rougeL=30.0)],
                        "perplexity")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["x", "4.50", "0.000", "1.250", "-", "0.500"]
    assert lines[2] == ["x", "4.50", "1.000", "1.250", "2.000", "0.500"]
    assert lines[3] == ["x", "ROUGE-1,", "-2,", "-L", "40.0", "20.0", "30.0"]


# --- command line ---------------------------------------------------------------------------------


def run(*args, main=distill.main):
    """Runs main on a command line in pieces; returns exit code, standard output and error."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(shlex.split(" ".join(args)))
    return code, out.getvalue(), err.getvalue()


def result(*args, main=distill.main):
    """Runs main, which succeeds; returns what it prints last."""
    code, out, err = run(*args, main=main)
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two texts and two runs of train_lm.py on one: a softmax teacher and a linear model."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for name in ("text.txt", "other.txt"):
        words = rng.integers(0, 20, 4000)
        (folder / name).write_text("".join(f"w{i} w{(i * 7 + 3) % 20} \n" for i in words))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        result(TINY, "--attention softmax --out softmax --steps 150", main=train_lm.main)
        result(TINY, "--attention elu --out elu --steps 1", main=train_lm.main)
    return folder


@pytest.fixture
def here(runs, monkeypatch):
    monkeypatch.chdir(runs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)    # not a run's, for pytest


def weights(run):
    return train_lm.load_checkpoint(run)["model"]


def test_end_to_end(here):
    code, out, err = run(SHORT, "--out d --micro-batch 8 --distill-steps 80 --steps 30")
    assert code == 0, err
    whole, names = json.loads(out.splitlines()[-1]), [
        "softmax, the teacher", "hedgehog, swapped", "hedgehog, stage 1", "hedgehog, stage 2",
        "softmax, finetuned"]
    assert whole == json.loads(Path("d/result.json").read_text())
    assert [r["name"] for r in whole["rows"]] == names and all(name in out for name in names)
    teacher, swapped, stage1, stage2, finetuned = whole["rows"]
    assert stage1["kl"] < 0.5 * swapped["kl"]
    assert stage2["perplexity"] < swapped["perplexity"]
    assert finetuned["perplexity"] < teacher["perplexity"]
    assert teacher["perplexity"] == pytest.approx(
        json.loads(Path("softmax/result.json").read_text())["valid"]["perplexity"])
    assert teacher["kl"] == pytest.approx(0, abs=1e-6)
    lines = [json.loads(line) for line in Path("d/log.jsonl").read_text().splitlines()]
    assert [line for line in lines if "name" in line] == whole["rows"]
    assert [line["stage"] for line in lines if "stage" in line] == ["stage1", "stage2", "softmax"]
    # train_lm.py samples from each checkpoint and goes on with it
    for stage in ("stage1", "stage2", "softmax"):
        code, out, _ = run(f"--sample w3 --out d/{stage} --sample-tokens 4", main=train_lm.main)
        assert code == 0 and out.startswith("[w3]")
    r = result("--out d/stage2 --resume --steps 32 --lr 1e-4", main=train_lm.main)
    assert r["valid"]["perplexity"] == pytest.approx(stage2["perplexity"], rel=0.05)
    model, _ = train_lm.load_model("d/stage1", "cpu")       # a checkpoint gives its row's figure
    o = options(data="text.txt", block_size=32)
    assert distill.score(model, tasks.load_data(o), o) == pytest.approx(stage1["perplexity"])
    code, out, _ = run("--analyze d/stage1 --plot f --micro-batch 8")
    assert code == 0 and "layer 2" in out
    assert "wrote f/entropy.png" in out or "pip install matplotlib" in out
    layers = json.loads(out.splitlines()[-1])["layers"]["hedgehog, trained"]
    assert np.mean(layers["kl"]) == pytest.approx(stage1["kl"], rel=1e-4)
    r = result("--analyze d/stage1 --data other.txt --block-size 8")
    assert (r["data"], r["block_size"]) == ("other.txt", 8) and {"command", "date"} <= set(r)
    assert r["layers"]["hedgehog, trained"]["kl"] < r["layers"]["hedgehog"]["kl"]


def test_a_stage_is_evaluated_before_it_goes_on(here):
    rows = result(SHORT, "--out more --no-distill --no-baseline")["rows"]
    r = result("--out more/stage2 --resume", main=train_lm.main)
    assert r["valid"]["perplexity"] == pytest.approx(rows[-1]["perplexity"])


def test_without_stage_1_and_with_lora(here):
    rows = result(SHORT, "--out t2r --attention t2r --no-distill --lora 2")["rows"]
    assert [r["name"] for r in rows] == ["softmax, the teacher", "t2r-no-distill, swapped",
                                         "t2r-no-distill, stage 2", "softmax, finetuned"]
    was, moved = weights("softmax"), weights("t2r/stage2")
    w_q = moved["blocks.0.attn.mix.feature_map.w_q"]
    assert not torch.equal(w_q, torch.eye(16).expand_as(w_q))       # maps learn with the adapters
    for moved in (moved, weights("t2r/softmax")):           # softmax, too, is given adapters
        assert {name for name in was if not torch.equal(moved[name], was[name])} == {
            f"blocks.{i}.attn.{linear}.weight" for i in (0, 1) for linear in ("qkv", "proj")}
    result("--out t2r/stage2 --resume --steps 4", main=train_lm.main)


def test_what_an_interrupted_run_left_is_gone(here):
    """Only if there is its log: folders of these names may also be of others."""
    Path("left/stage1").mkdir(parents=True)
    Path("left/softmax").mkdir()
    short = SHORT, "--out left --no-distill --no-baseline --steps 1"
    assert "holds a run already" in run(*short)[2]
    Path("left/log.jsonl").touch()
    result(*short)
    assert {path.name for path in Path("left").iterdir() if path.is_dir()} == {"stage2"}
    assert "holds a run already" in run("--out left --steps 1", main=train_lm.main)[2]


def test_train_lm_goes_on_with_the_contexts_of_stage_2(here):
    """Also where those are shorter than the teacher's; distill.py does not replace the result."""
    short = SHORT, "--out half --no-distill --no-baseline --steps 1 --block-size 16"
    result(*short)
    r = result("--out half/stage2 --resume --steps 3", main=train_lm.main)
    state = train_lm.load_checkpoint("half/stage2")
    assert state["options"]["block_size"] == 16 and state["config"].block_size == 32
    assert r["tokens"] == 3 * 16 * state["options"]["batch_size"]
    Path("half/result.json").unlink()                       # as if it had been interrupted
    assert "holds a run already" in run(*short)[2]


def test_a_stage_that_is_trained_further_is_none(here):
    """Stage 1's maps are judged in the softmax model, those of a model that trained with them in
    this model."""
    result(SHORT, "--out stages --no-baseline --distill-steps 3 --steps 2")
    assert train_lm.load_checkpoint("stages/stage1")["progress"]["stage"] == "stage1"
    result("--out stages/stage1 --resume", main=train_lm.main)          # is stage 2
    progress = train_lm.load_checkpoint("stages/stage1")["progress"]
    assert progress["step"] == 2 and not progress.get("stage")
    weights = [train_lm.load_checkpoint(f"stages/{name}")["model"] for name in ("stage1", "stage2")]
    for name, x in weights[1].items():                      # the same stage 2
        assert torch.allclose(x, weights[0][name], atol=1e-6), name


def test_without_baseline(here):
    rows = result(SHORT, "--out alone --no-distill --no-baseline")["rows"]
    assert rows[-1]["name"] == "hedgehog-no-distill, stage 2" and not Path("alone/softmax").exists()


def test_a_wide_map_and_a_hybrid(here):
    result(SHORT, "--out hybrid --attention hedgehog,softmax --feature-dim 24")
    saved = weights("hybrid/stage2")
    assert saved["blocks.0.attn.mix.feature_map.w_q"].shape[-1] == 24
    assert "blocks.1.attn.mix.feature_map.w_q" not in saved
    layers = result("--analyze hybrid/stage1")["layers"]["hedgehog,softmax, trained"]
    assert layers["kl"][0] > 1e-4 and layers["kl"][1] == pytest.approx(0, abs=1e-6)


def parse(args):
    return train_lm.parse(distill.Options, distill.PRESETS, distill.preset_for,
                          distill.from_teacher, "", args.split())


def test_options_and_presets(here):
    o = parse("--device cpu")
    assert (o.preset, o.steps, o.teacher_steps, o.out) == (
        "tiny", 400, 1300, "out/distill-stdlib-hedgehog")
    o = parse("--teacher softmax")                          # what has to fit is the teacher's
    assert (o.data, o.block_size, o.batch_size, o.steps) == ("text.txt", 32, 10, 400)
    saved = train_lm.load_checkpoint("softmax")["options"]
    for key in ("n_layer", "n_head", "n_embd", "position", "dropout"):
        assert getattr(o, key) == saved[key] == getattr(parse("--teacher softmax --task CoLA"), key)
    assert saved["n_layer"] != parse("").n_layer and saved["n_embd"] != parse("").n_embd
    assert parse("--teacher softmax --batch-size 3").batch_size == 3
    assert parse("--task listops").distill_steps == 500
    assert parse("--epochs 2").teacher_steps == 0
    assert parse("--device cuda --data text.txt").compile
    assert not parse("--device cuda --no-compile").compile
    assert parse("--device cuda").preset == "small"
    for name, row in distill.PRESETS.items():
        o = vars(parse(f"--preset {name} --n-head 7"))
        assert {key: o[key] for key in row} == row | ({"n_head": 7} if "n_head" in row else {})


def test_other_text_gets_the_tokens_of_the_run(here, monkeypatch):
    state = torch.load("softmax/checkpoint.pt")
    state["data"][1] = "gpt2"                               # by default, --data was wiki.*
    Path("wiki").mkdir()
    torch.save(state, "wiki/checkpoint.pt")
    assert parse("--analyze wiki --data other.txt").tokenizer == "gpt2"
    words = SimpleNamespace(encode_ordinary=lambda text: [len(word) for word in text.split()])
    monkeypatch.setattr(distill, "gpt2_encoding", lambda: words)
    write_tsv("words", "s\t0\t\tfour five\n", "s\t0\t\tsix\n")
    task = distill.load("wiki", parse("--teacher wiki --task words"))[0]
    assert task.splits["train"][0][0].tolist() == [4, 4]


OWN = "--data text.txt --micro-batch 4 --distill-steps 3 --steps 3"


@pytest.fixture
def tiny_preset(here, monkeypatch):
    monkeypatch.setitem(distill.PRESETS, "tiny", dict(
        n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=8, eval_every=10,
        teacher_steps=0, epochs=0.02))


def test_trains_its_own_teacher(tiny_preset):
    args = f"{OWN} --out own"
    code, _, err = run(args)
    assert code == 0 and Path("own/teacher/result.json").exists() and "train: 100%" in err
    saved = train_lm.load_checkpoint("own/teacher")["options"]
    assert (saved["attention"], saved["steps"], saved["lr"]) == ("softmax", 0, 3e-3)
    first = Path("own/teacher/checkpoint.pt").read_bytes()
    assert run(args)[0] == 2                                # a finished run is not replaced
    Path("own/result.json").unlink()                        # interrupted after the teacher
    code, _, err = run(args)
    assert code == 0 and "train: 100%" not in err
    assert Path("own/teacher/checkpoint.pt").read_bytes() == first
    Path("own/result.json").unlink()
    code, _, err = run(args, "--seed 1")                    # the teacher there is another one
    assert code == 2 and "own/teacher was trained with seed 0" in err
    with open("text.txt", "a") as f:                        # so is one of this text before
        f.write("more\n" * 100)
    code, _, err = run(args)
    assert code == 2 and "own/teacher was trained with text" in err
    Path("own/stage1/of the run before").write_text("")
    result(args, "--overwrite --seed 1")
    assert not Path("own/stage1/of the run before").exists()
    assert Path("own/teacher/checkpoint.pt").read_bytes() != first


def ctrl_c_in(monkeypatch, module, name):
    """Ctrl-C is pressed at the start of the second call of a function."""
    real, calls = getattr(module, name), []

    def spy(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **options)
    monkeypatch.setattr(module, name, spy)


def test_ctrl_c_in_the_teacher(tiny_preset, monkeypatch):
    """The same command goes on with it, and gets what an uninterrupted one gets."""
    ctrl_c_in(monkeypatch, train_lm, "take_step")
    code, out, _ = run(OWN, "--out cut")
    assert code == 130 and "the same command goes on" in out
    assert not Path("cut/teacher/result.json").exists()
    assert result(OWN, "--out cut")["rows"] == result(OWN, "--out uncut")["rows"]


@pytest.mark.parametrize("teacher", ["--teacher softmax", ""])
def test_ctrl_c_in_a_stage(tiny_preset, monkeypatch, teacher):
    ctrl_c_in(monkeypatch, distill, "mimicry_loss")
    code, out, _ = run(OWN, "--out", f"stop{len(teacher)}", teacher)
    assert code == 130
    assert f"the same command {'begins anew' if teacher else 'goes on, from its teacher'}" in out
    result(OWN, "--out", f"stop{len(teacher)}", teacher)


def test_a_stopped_teacher_is_train_lms(tiny_preset, monkeypatch):
    monkeypatch.setattr("sys.argv", ["distill.py"])
    ctrl_c_in(monkeypatch, train_lm, "take_step")
    assert "to go on: python train_lm.py --resume --out by/teacher\n" in run(OWN, "--out by")[1]


def test_a_bad_argument_leaves_the_old_run_alone(here):
    Path("kept").mkdir()
    Path("kept/result.json").write_text("{}")
    assert run("--data text.txt --teacher elu --out kept --overwrite")[0] == 2
    assert Path("kept/result.json").read_text() == "{}"


def test_listops(here):
    rows = result("--task listops --listops-examples 40 --listops-low 5 --listops-high 30 --out lo "
                  "--n-embd 32 --teacher-steps 3 --distill-steps 3 --steps 3")["rows"]
    assert [r["name"] for r in rows] == [
        "softmax, the teacher", "hedgehog, swapped", "hedgehog, stage 1", "hedgehog, stage 2",
        "softmax, finetuned", "hedgehog, from scratch"]


def test_glue_from_a_language_model(here):
    lines = "".join(f"s\t{i % 2}\t\t{'good' if i % 2 else 'bad'} {i}\n" for i in range(40))
    write_tsv("CoLA", lines, lines)
    Path("gl/teacher").mkdir(parents=True)
    Path("gl/teacher/config.json").write_text("{}")         # of an earlier model of transformers
    rows = result(SHORT.replace("--data text.txt", ""),
                  "--task CoLA --out gl --teacher-steps 40 --teacher-lr 3e-3 --overwrite")["rows"]
    assert not Path("gl/teacher/config.json").exists()
    assert rows[0]["matthews"] == pytest.approx(100)        # the two words tell the classes apart
    code, _, err = run("--sample x --out gl/stage2", main=train_lm.main)
    assert code == 2 and "classifier" in err


@pytest.mark.parametrize("args, words", [
    ("--data text.txt --teacher elu", "elu attention already"),
    ("--data text.txt --teacher text.txt", "not a checkpoint"),
    ("--data other --teacher softmax", "other holds tokens of gpt2, not bytes"),
    ("--data more --teacher softmax", "the model has bytes tokens of 256"),
    ("--data empty.txt --teacher softmax", "empty.txt"),
    ("--data text.txt --teacher softmax --out gone", "--overwrite"),
    ("--task nothing --teacher softmax", "nothing"),
    ("--task bad --teacher softmax", "no columns"),
    ("--task bad", "give --teacher"),
    ("--task listops --epochs 1", "--teacher-steps"),
    ("--task listops --data text.txt", "--data: listops has its own"),
    ("--task listops --block-size 64", "--block-size: listops has its own"),
    ("--data text.txt --attention elu --feature-dim 8", "not for elu"),
    ("--teacher gpt2 --data text.txt --tokenizer bytes", "--tokenizer: gpt2 has its own"),
    ("--teacher softmax --data text.txt --n-layer 1", "--n-layer: softmax has its own"),
    ("--teacher softmax --data text.txt --epochs 1", "--epochs: softmax has its own"),
    ("--task listops --teacher softmax", "leave --teacher out"),
    ("--task listops --attention hedgehog_decay --listops-examples 9 --teacher-steps 9", "causal"),
    ("--analyze softmax --teacher elu", "leave --teacher out"),
    ("--epochs 1 --teacher-steps 3 --data text.txt", "--epochs or --teacher-steps"),
    ("--attention hedhegog --data nowhere", "'hedhegog' is not one of"),
    ("--data d.jsonl --teacher softmax", "prompts and responses"),
    ("--plot f", "--analyze"),
    ("--attention linear --data text.txt --teacher softmax", "'linear' is not one of"),
    ("--analyze softmax --block-size 64", "more than the 32"),
    ("--task listops --listops-low 1 --listops-high 5 --listops-examples 9000", "too few express"),
    ("--task short --teacher softmax", "no examples"),
    ("--task none --teacher softmax", "no examples"),
    ("--data text.txt --teacher gone/softmax --out gone --overwrite", "overwrite its own teacher"),
    ("--data text.txt --teacher softmax --out softmax --overwrite", "overwrite its own teacher"),
    ("--data text.txt --teacher softmax/checkpoint.pt --out softmax", "overwrite its own teacher"),
    ("--task short --teacher softmax --block-size 64", "more than the 32"),
    ("--task listops --out gone2", "gone2 holds a run already"),
    ("--data recall", "recall is for train_lm.py"),
    ("--resume", "train_lm.py's"), ("--sample x", "train_lm.py's"),
    ("--analyze softmax --task listops", "--task"), ("--distill-lr nan", "--distill-lr"),
])
def test_one_clear_line_and_exit_code_2(here, args, words):
    Path("empty.txt").write_text("")
    for name, tokenizer in (("other", "gpt2"), ("more", "bytes")):
        Path(name).mkdir(exist_ok=True)
        for split in ("train", "valid"):
            np.arange(100, dtype=np.uint16).tofile(f"{name}/{split}.bin")
        Path(name, "meta.json").write_text(json.dumps({"tokenizer": tokenizer, "vocab_size": 300}))
    write_tsv("bad", "a\tb\n1\t2\n", "a\tb\n1\t2\n")
    write_tsv("short", "sentence\tlabel\nx\n", "sentence\tlabel\nx\t1\n")
    write_tsv("none", "sentence\tlabel\nx\t1\n", "sentence\tlabel\n")
    Path("gone").mkdir(exist_ok=True)
    Path("gone/result.json").write_text("{}")
    Path("gone2/teacher").mkdir(parents=True, exist_ok=True)
    if not Path("gone/softmax").exists():
        shutil.copytree("softmax", "gone/softmax")
    code, _, err = run(args)
    assert code == 2 and words in err.splitlines()[-1] and err.count("error: ") == 1
    assert "it/s" not in err                                # before anything is trained


def test_how_much_places_matter(here, capsys, monkeypatch):
    """Softmax of rotary positions gives the same at all of them, Hedgehog does not."""
    monkeypatch.setattr("sys.argv", ["places.py"])
    for attention in ("softmax", "hedgehog"):
        train_lm.main("--data text.txt --n-layer 1 --n-embd 16 --block-size 16 --position rotary "
                      f"--steps 3 --attention {attention} --out turned-{attention}".split())
        places.main(f"turned-{attention}")
        at_0, *others = json.loads(capsys.readouterr().out.splitlines()[-1])["places"]
        for x in others:
            same = x["loss"] == pytest.approx(at_0["loss"], rel=1e-5) and abs(x["moved"]) < 1e-6
            assert same == (attention == "softmax") and at_0["moved"] == 0


def test_text_in_tokens_of_its_own(here):
    Path("own-tokens").mkdir()
    for split in ("train", "valid"):
        (np.arange(3000, dtype=np.uint16) % 7).tofile(f"own-tokens/{split}.bin")
    Path("own-tokens/meta.json").write_text(json.dumps({"tokenizer": "mine", "vocab_size": 7}))
    rows = result("--data own-tokens --n-layer 1 --n-embd 16 --block-size 16 --teacher-steps 2 "
                  "--steps 2 --distill-steps 2 --out from-own")["rows"]
    assert [row["name"].split(", ")[1] for row in rows][:3] == ["the teacher", "swapped", "stage 1"]


def test_a_loss_that_is_no_number_ends_a_stage():
    with pytest.raises(ValueError, match="lower"):
        distill.show_loss(None, [torch.tensor(math.nan)], "stage 2", 9)
