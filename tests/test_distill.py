"""The two stages, what they may and may not change, the tasks, and distill.py's command line."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import distill
import train_lm
from distill import (LowRank, add_lora, attention_layers, glue, listops, listops_value, matthews,
                     merge_lora, mimicry_loss, model_with, watching)
from hedgehog import (FEATURE_MAPS, GPT, GPTConfig, attention_cross_entropy, attention_kl, entropy,
                      monotonicity, softmax_attention_weights)
from kernel import linear_attention_weights

B, H, T, D = 2, 2, 9, 4
TINY = ("--n-layer 2 --n-head 2 --n-embd 32 --block-size 32 --batch-size 8 --micro-batch 8 "
        "--steps 150 --eval-every 150 --sample-tokens 5 --lr 3e-3").split()
SHORT = "--micro-batch 4 --distill-steps 3 --steps 3".split()


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


def padding():
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 6:] = False
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
    assert monotonicity(weights, torch.ones(1, 1, 1, 1), torch.tensor([[[[1.0], [2.0], [3.0]]]]),
                        causal=False).item() == pytest.approx(0.5)
    tied = torch.tensor([[[[0.2, 0.2, 0.6]]]])              # ranks 0.5 0.5 2
    assert monotonicity(tied, torch.ones(1, 1, 1, 1), torch.tensor([[[[1.0], [2.0], [3.0]]]]),
                        causal=False).item() == pytest.approx(1.5 / math.sqrt(1.5 * 2))


@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_no_figure(causal):
    q, k = qk()
    mask, m = padding(), noisy_map()
    weights = linear_attention_weights(*m(q, k, None), causal, mask)
    softmax = softmax_attention_weights(q, k, causal, mask)
    whole = [attention_kl(softmax, weights, mask), entropy(weights, mask),
             monotonicity(weights, q, k, causal, mask)]
    sums, count = [0, 0, 0], [0, 0, 0]
    for b, n in ((0, 6), (1, T)):                           # each sequence alone, without padding
        x, y = q[b:b + 1, :, :n], k[b:b + 1, :, :n]
        w, a = linear_attention_weights(*m(x, y, None), causal), softmax_attention_weights(x, y,
                                                                                           causal)
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


@pytest.mark.parametrize("causal, mask", [(True, None), (False, None), (False, padding())])
def test_loss_gradient(causal, mask):
    q, k = qk(1.0)
    m = noisy_map()

    def loss(w_q, w_k):
        return mimicry_loss(lambda q, k, positions: torch.func.functional_call(
            m, {"w_q": w_q, "w_k": w_k}, (q, k, positions)), q, k, None, causal, mask, block=4)

    assert torch.autograd.gradcheck(loss, [p.detach().clone().requires_grad_()
                                           for p in m.parameters()])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", [None, padding()])
def test_loss_is_the_kl_whatever_the_block(causal, mask):
    q, k = qk()
    m = noisy_map()
    expected = attention_kl(
        softmax_attention_weights(q, k, causal, mask),
        linear_attention_weights(*m(q, k, None), causal, mask), mask)
    for block in (1, 4, T, 100):
        assert torch.allclose(mimicry_loss(m, q, k, None, causal, mask, block), expected)


def test_gradients_of_exponentials_stay_finite():
    """The feature e^-100 of the query meets e^55 of the key: its gradient exceeds fp32."""
    m = FEATURE_MAPS["hedgehog_exp"](GPTConfig(n_embd=2, n_head=1))
    q, k = (torch.tensor([[[[x, 0.0]]]]) for x in (50, -55))
    for g in torch.autograd.grad(distill.mimicry_loss(m, q, k, None), list(m.parameters())):
        assert g.isfinite().all() and g.any()


def test_a_model_with_maps_standing_by_is_the_teacher():
    model = teacher()
    other = student(model)
    idx = torch.randint(0, 40, (2, 12))
    with watching(attention_layers(other), None, linear=False):
        assert torch.equal(other(idx)[0], model(idx)[0])
    assert not torch.allclose(other(idx)[0], model(idx)[0], atol=1e-3)


def run_distill(model, attentions=None, steps=5):
    torch.manual_seed(2)
    batches = [(torch.randint(0, 40, (4, 12)), None) for _ in range(steps)]
    with distill.tqdm(disable=True) as bar:
        return distill.distill(attentions or attention_layers(model), lambda b: model(*b),
                               lambda step: [(batches[step], 1.0)], steps, 1e-2, bar)[1]


def test_only_maps_move_and_the_loss_falls():
    model = student(teacher())
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = run_distill(model, steps=30)
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("feature_map" not in name), name
        assert p.grad is None or "feature_map" in name


def test_stage_1_runs_the_teacher():
    model = teacher()
    other, idx, seen = student(model), torch.randint(0, 40, (4, 12)), []

    def forward(batch):
        seen.append(other(batch)[0])

    with distill.tqdm(disable=True) as bar:
        distill.distill(attention_layers(other), forward, lambda step: [(idx, 1.0)], 3, 1e-2, bar)
    assert len(seen) == 3 and all(torch.allclose(logits, model(idx)[0]) for logits in seen)


def test_layers_learn_apart():
    """Another map in layer 2 and layer 1 learns the same to the last bit."""
    one, two = student(teacher()), student(teacher())
    two.blocks[1].attn.feature_map.w_q.data.mul_(3)
    run_distill(one)
    run_distill(two)
    a, b = (m.blocks[0].attn.feature_map for m in (one, two))
    assert torch.equal(a.w_q, b.w_q) and torch.equal(a.w_k, b.w_k)
    assert not torch.equal(one.blocks[1].attn.feature_map.w_q, two.blocks[1].attn.feature_map.w_q)


def test_micro_batches_are_one_batch():
    whole, parts = student(teacher()), student(teacher())
    torch.manual_seed(3)
    idx = torch.randint(0, 40, (4, 12))
    for model, batches in ((whole, [((idx, None), 1.0)]),
                           (parts, [((idx[:3], None), 0.75), ((idx[3:], None), 0.25)])):
        with distill.tqdm(disable=True) as bar:
            distill.distill(attention_layers(model), lambda b: model(*b), lambda step: batches, 3,
                            1e-2, bar)
    for a, b in zip(whole.parameters(), parts.parameters()):
        assert torch.allclose(a, b, atol=1e-9)


# --- stage 2 --------------------------------------------------------------------------------------


def test_lora_merged_is_lora():
    model = student(teacher())
    idx = torch.randint(0, 40, (2, 12))
    before = model(idx)[0]
    parameters = add_lora(attention_layers(model), rank=2, alpha=8)
    model.double()
    assert torch.allclose(model(idx)[0], before)            # B is zero at first
    for p in parameters:
        p.data += 0.1 * torch.randn_like(p)
    adapted = model(idx)[0]
    assert not torch.allclose(adapted, before, atol=1e-3)
    merge_lora(attention_layers(model))
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


def test_matthews():
    labels, guesses = [1, 1, 1, 0, 0, 1, 0, 0], [1, 0, 1, 0, 1, 1, 0, 0]
    tp, tn, fp, fn = 3, 3, 1, 1
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(labels, guesses) == pytest.approx(expected)
    assert matthews(labels, [1] * 8) == 0


def write_tsv(folder, train, dev):
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "train.tsv").write_text(train)
    Path(folder, "dev.tsv").write_text(dev)


def test_glue_layouts(tmp_path):
    write_tsv(tmp_path, "gj04\t1\t\tA b.\ngj04\t0\t*\tB a.\n", "gj04\t1\t\tC.\n")
    splits, figure = glue(tmp_path, lambda text: list(text.encode()), 3)
    assert figure == "matthews" and bytes(splits["train"][1][0].astype(np.uint8)) == b"B a"
    assert [label for _, label in splits["train"]] == [1, 0]
    write_tsv(tmp_path, "index\tsentence1\tsentence2\tlabel\n0\tx\ty\tno\n1\tz\tw\tyes\n",
              "index\tsentence1\tsentence2\tlabel\n0\tu\tv\tyes\n")
    splits, figure = glue(tmp_path, lambda text: list(text.encode()), 64)
    assert figure == "accuracy" and bytes(splits["valid"][0][0].astype(np.uint8)) == b"u\nv"
    assert splits["valid"][0][1] == 1


def classification(**args):
    """A task of three sequences and two classes, on a CPU."""
    examples = [(np.arange(n, dtype=np.uint8), label) for n, label in ((3, 0), (7, 1), (5, 0))]
    args = SimpleNamespace(**{**dict(batch_size=3, micro_batch=2, seed=0, lora=2, lora_alpha=8.0,
                                      compile=False),
                              **args})
    return distill.Classification("task", "bytes", 40, {"train": examples, "valid": examples}, args,
                                  train_lm.Machine("cpu", None))


def test_batches_say_what_is_padding():
    idx, labels, mask = classification().batch("train", [2, 0])
    assert mask.sum(1).tolist() == [5, 3] and labels.tolist() == [0, 0]
    assert idx.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]


def test_shares_of_a_step_sum_to_one():
    for size, pieces in ((3, [1.0]), (2, [2 / 3, 1 / 3]), (1, [1 / 3] * 3)):
        shares = [share for _, share in distill.micro_batches(classification(micro_batch=size), 0)]
        assert shares == pytest.approx(pieces)


def test_lora_trains_adapters_and_maps_only(tmp_path):
    task = classification(out=str(tmp_path))
    model = teacher(attention="hedgehog", causal=False, num_classes=2).float()
    before = {name: p.clone() for name, p in model.named_parameters()}
    distill.train("stage", task, model, 2, 1e-2, rank=2)
    for name, p in model.named_parameters():
        moved = "feature_map" in name or name.endswith(("qkv.weight", "proj.weight"))
        assert torch.equal(p, before[name]) != moved, name
        assert p.requires_grad and (p.grad is None or moved), name


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


# --- command line ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A text and two runs of train_lm.py on it: a softmax teacher and a linear model."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    words = [f"w{i} " for i in range(20)]
    (folder / "text.txt").write_text("".join(f"{words[i]}{words[(i * 7 + 3) % 20]}\n"
                                             for i in rng.integers(0, 20, 4000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for attention in ("softmax", "elu"):
            args = TINY if attention == "softmax" else [*TINY, "--steps", "1"]
            assert train_lm.main(["--data", "text.txt", "--attention", attention, "--out",
                                  attention, *args]) == 0
    return folder


@pytest.fixture
def here(runs, monkeypatch):
    monkeypatch.chdir(runs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(capsys, *args, main=None):
    capsys.readouterr()
    try:
        code = (main or distill.main)([str(a) for a in args])
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


def test_end_to_end(capsys, here):
    code, out, err = run(capsys, "--data", "text.txt", "--teacher", "softmax", "--out", "d",
                         "--distill-steps", 80, "--steps", 30, "--micro-batch", 8)
    assert code == 0, err
    assert all(f"{stage}: 100%" in err for stage in ("stage 1, hedgehog", "stage 2, hedgehog"))
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads(Path("d/result.json").read_text())
    rows = {r["name"]: r for r in result["rows"]}
    names = ["softmax, the teacher", "hedgehog, swapped", "hedgehog, stage 1", "hedgehog, stage 2",
             "softmax, finetuned"]
    assert list(rows) == names and all(name in out for name in names)
    assert rows["hedgehog, stage 1"]["kl"] < 0.5 * rows["hedgehog, swapped"]["kl"]
    assert rows["hedgehog, stage 2"]["perplexity"] < rows["hedgehog, swapped"]["perplexity"]
    assert rows["softmax, finetuned"]["perplexity"] < rows["softmax, the teacher"]["perplexity"]
    assert rows["softmax, the teacher"]["perplexity"] == pytest.approx(
        json.loads(Path("softmax/result.json").read_text())["valid"]["perplexity"])
    assert rows["softmax, the teacher"]["kl"] == pytest.approx(0, abs=1e-6)
    lines = [json.loads(line) for line in Path("d/log.jsonl").read_text().splitlines()]
    assert [line for line in lines if "name" in line] == result["rows"]
    assert [line["stage"] for line in lines if "stage" in line] == [
        "stage 1, hedgehog", "stage 2, hedgehog", "softmax, finetuned"]
    # train_lm.py samples from each checkpoint and goes on with it
    for stage in ("stage1", "stage2", "softmax"):
        code, out, _ = run(capsys, "--sample", "w3", "--out", f"d/{stage}", "--sample-tokens", 4,
                           main=train_lm.main)
        assert code == 0 and out.startswith("w3")
    code, out, err = run(capsys, "--data", "text.txt", "--out", "d/stage2", "--resume", *TINY,
                         "--steps", 32, "--lr", "1e-4", main=train_lm.main)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["valid"]["perplexity"] == pytest.approx(
        rows["hedgehog, stage 2"]["perplexity"], rel=0.05)
    machine = train_lm.Machine("cpu", None)                 # a checkpoint gives its row's figure
    model, state = train_lm.load_model(Path("d/stage1/checkpoint.pt"), machine)
    args = distill.parse_args(["--data", "text.txt", "--micro-batch", "8"])
    task = distill.text_task(args, machine, model, state)
    assert task.evaluate(model) == pytest.approx(rows["hedgehog, stage 1"]["perplexity"])
    code, out, err = run(capsys, "--data", "text.txt", "--analyze", "d/stage1", "--plot", "f",
                         "--micro-batch", 8)
    assert code == 0 and "layer 2" in out
    layers = json.loads(out.splitlines()[-1])["layers"]["hedgehog, trained"]
    assert np.mean(layers["kl"]) == pytest.approx(rows["hedgehog, stage 1"]["kl"], rel=1e-4)
    assert "wrote f/entropy.png" in out or "pip install matplotlib" in out
    code, out, err = run(capsys, "--data", "text.txt", "--transfer", "d/stage1", "d/stage2",
                         "softmax", "--lengths", 8, 32)
    kl = json.loads(out.splitlines()[-1])["kl"]
    assert kl["hedgehog, trained (d/stage1)"]["32"] < 0.6 * kl["hedgehog"]["32"]
    assert set(kl) == {*FEATURE_MAPS, *(f"hedgehog, trained (d/stage{i})" for i in (1, 2))}


def test_without_stage_1_and_with_lora(capsys, here):
    code, out, err = run(capsys, "--data", "text.txt", "--teacher", "softmax", "--out", "t2r",
                         "--feature-map", "t2r", "--no-distill", "--lora", 2, *SHORT)
    assert code == 0, err
    assert [r["name"] for r in json.loads(out.splitlines()[-1])["rows"]] == [
        "softmax, the teacher", "t2r-no-distill, swapped", "t2r-no-distill, stage 2",
        "softmax, finetuned"]
    moved = train_lm.load_checkpoint(Path("t2r/stage2/checkpoint.pt"))["model"]
    w_q = moved["blocks.0.attn.feature_map.w_q"]
    assert not torch.equal(w_q, torch.eye(16).expand_as(w_q))       # maps learn with the adapters
    was = train_lm.load_checkpoint(Path("softmax/checkpoint.pt"))["model"]
    assert {name for name in was if not torch.equal(moved[name], was[name])} == {
        f"blocks.{i}.attn.{linear}.weight" for i in (0, 1) for linear in ("qkv", "proj")}


def test_without_baseline(capsys, here):
    code, out, err = run(capsys, "--data", "text.txt", "--teacher", "softmax", "--out", "alone",
                         "--no-distill", "--no-baseline", *SHORT)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["rows"][-1]["name"] == "hedgehog-no-distill, stage 2"
    assert not Path("alone/softmax").exists()


def test_compare(capsys, here):
    code, out, err = run(capsys, "--data", "text.txt", "--teacher", "softmax", "--out", "all",
                         "--compare", "--feature-dim", 24, *SHORT)
    assert code == 0, err
    saved = train_lm.load_checkpoint(Path("all/hedgehog/stage2/checkpoint.pt"))["model"]
    assert saved["blocks.0.attn.feature_map.w_q"].shape[-1] == 24
    names = [r["name"] for r in json.loads(out.splitlines()[-1])["rows"]]
    for name in FEATURE_MAPS:
        assert {f"{name}, swapped", f"{name}, stage 2"} <= set(names)
        learned = name in ("hedgehog", "hedgehog_exp", "hedgehog_gate", "t2r")
        assert (f"{name}, stage 1" in names) == learned
    for name in ("t2r", "hedgehog"):
        assert f"{name}-no-distill, stage 2" in names
        assert f"{name}-no-distill, stage 1" not in names


def test_stage_2_is_compiled_for_text_on_a_gpu():
    def compiled(*args):
        return distill.parse_args(["--device", "cuda", *args]).compile

    assert compiled() and not compiled("--no-compile") and not compiled("--task", "listops")
    assert compiled("--task", "listops", "--compile")
    assert not distill.parse_args(["--device", "cpu"]).compile


def test_trains_its_own_teacher(capsys, here, monkeypatch):
    shape = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=8, micro_batch=8,
                 lr=3e-3, dropout=0.0, eval_every=10)
    monkeypatch.setitem(train_lm.PRESETS, "tiny", shape | {"epochs": 0.02})
    args = ["--data", "text.txt", "--out", "own", *SHORT]
    code, out, err = run(capsys, *args)
    assert code == 0, err
    assert Path("own/teacher/result.json").exists() and "train: 100%" in err
    first = Path("own/teacher/checkpoint.pt").read_bytes()
    assert run(capsys, *args)[0] == 2                       # a finished run is not replaced
    Path("own/result.json").unlink()                        # interrupted after the teacher
    code, out, err = run(capsys, *args)
    assert code == 0 and "train: 100%" not in err
    assert Path("own/teacher/checkpoint.pt").read_bytes() == first
    code, out, err = run(capsys, *args, "--overwrite", "--seed", 1)
    assert code == 0 and Path("own/teacher/checkpoint.pt").read_bytes() != first


def test_a_bad_argument_leaves_the_old_run_alone(capsys, here):
    Path("kept").mkdir()
    Path("kept/result.json").write_text("{}")
    code, _, _ = run(capsys, "--data", "text.txt", "--teacher", "elu", "--out", "kept",
                     "--overwrite")
    assert code == 2 and Path("kept/result.json").read_text() == "{}"


def test_listops(capsys, here):
    code, out, err = run(capsys, "--task", "listops", "--listops-examples", 40, "--out", "lo",
                         "--teacher-steps", 3, "--distill-steps", 3, "--steps", 3)
    assert code == 0, err
    names = [r["name"] for r in json.loads(out.splitlines()[-1])["rows"]]
    assert names == ["softmax, the teacher", "hedgehog, swapped", "hedgehog, stage 1",
                     "hedgehog, stage 2", "softmax, finetuned", "hedgehog, from scratch"]


def test_glue_from_a_language_model(capsys, here):
    lines = "".join(f"s\t{i % 2}\t\t{'good' if i % 2 else 'bad'} {i}\n" for i in range(40))
    write_tsv("CoLA", lines, lines)
    code, out, err = run(capsys, "--task", "CoLA", "--teacher", "softmax", "--out", "gl",
                         "--teacher-steps", 40, "--teacher-lr", "3e-3", *SHORT)
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert rows[0]["matthews"] == pytest.approx(100)        # the two words tell the classes apart
    code, _, err = run(capsys, "--sample", "x", "--out", "gl/stage2", main=train_lm.main)
    assert code == 2 and "classifier" in err


@pytest.mark.parametrize("args, words", [
    ("--data text.txt --teacher elu", "elu attention already"),
    ("--data text.txt --teacher nowhere", "nowhere/checkpoint.pt"),
    ("--data text.txt --teacher text.txt", "not a checkpoint"),
    ("--data other --teacher softmax", "trained on bytes of 256"),
    ("--data empty.txt --teacher softmax", "empty.txt"),
    ("--data text.txt --teacher softmax --out gone", "--overwrite"),
    ("--task nothing --teacher softmax", "no train.tsv"),
    ("--task bad --teacher softmax", "no columns"),
    ("--task bad", "--teacher RUN"),
    ("--plot f", "--analyze"),
    ("--feature-map softmax", "--feature-map"),
    ("--data text.txt --transfer softmax --lengths 64", "learned positions"),
    ("--listops-length 9 10", "LOW"),
    ("--task listops --listops-length 1 5 --listops-examples 9000", "too few expressions"),
    ("--task short --teacher softmax", "too few columns"),
    ("--task none --teacher softmax", "no examples"),
    ("--teacher softmax", "trained on text.txt"),
    ("--data recall", "no text"),
    ("--compare --no-distill", "--no-distill"),
    ("--analyze elu --task listops", "--task"),
    ("--data text.txt --teacher softmax --distill-steps 2 --steps 2 --lr 1e30 --out nan", "lower"),
])
def test_one_clear_line_and_exit_code_2(capsys, here, args, words):
    Path("empty.txt").write_text("")
    Path("other").mkdir(exist_ok=True)
    for split in ("train", "valid"):
        np.arange(100, dtype=np.uint16).tofile(f"other/{split}.bin")
    Path("other/meta.json").write_text('{"tokenizer": "gpt2", "vocab_size": 300}')
    write_tsv("bad", "a\tb\n1\t2\n", "a\tb\n1\t2\n")
    write_tsv("short", "sentence\tlabel\nx\n", "sentence\tlabel\nx\t1\n")
    write_tsv("none", "sentence\tlabel\nx\t1\n", "sentence\tlabel\n")
    Path("gone").mkdir(exist_ok=True)
    Path("gone/result.json").write_text("{}")
    code, _, err = run(capsys, *args.split())
    assert code == 2
    assert words in err.splitlines()[-1] and err.count("error: ") == 1 and "Traceback" not in err
