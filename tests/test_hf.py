"""Models of Hugging Face: the seam, both stages, adapters, generation, saving. Tiny random models
of the four families, saved and loaded by the real path; no network."""

import copy
import inspect
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

import distill
import gap
import hf
import tasks
from gpt import GPT
from hedgehog import FEATURE_MAPS, GPTConfig, SoftmaxAttention

SMALL = dict(vocab_size=270, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=64)
FAMILIES = {
    "gpt2": ("CausalLM", lambda: transformers.GPT2Config(   # our GPT has 1,152 rows of embeddings
        vocab_size=1100, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0)),
    "llama": ("CausalLM", lambda: transformers.LlamaConfig(
        **SMALL, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0,
        eos_token_id=0)),
    "bert": ("SequenceClassification", lambda: transformers.BertConfig(
        **SMALL, max_position_embeddings=64, num_labels=2, pad_token_id=0)),
    "vit": ("ImageClassification", lambda: transformers.ViTConfig(
        **{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=16, patch_size=4,
        num_labels=3)),
}
CAUSAL = ["gpt2", "llama"]


def tokenizer(folder, **special):
    """Bytes, and an end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    t = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    special = special or dict(eos_token="<eos>", pad_token="<eos>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=t, **special).save_pretrained(folder)


@pytest.fixture
def stock(tmp_path, monkeypatch):
    """make(family): a folder with a stock model, and that model."""
    monkeypatch.chdir(tmp_path)

    def make(family):
        kind, config = FAMILIES[family]
        torch.manual_seed(0)
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(config()).eval()
        with torch.no_grad():
            for p in model.parameters():                    # so that attention is not near uniform
                p += 0.1 * torch.randn_like(p)
        model.save_pretrained(family)
        if family == "vit":
            transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(family)
        else:
            tokenizer(family)
        return family, model
    return make


def batch(family, pad="right"):
    """Two inputs, the second padded, and a mask."""
    torch.manual_seed(1)
    if family == "vit":
        return torch.randn(2, 3, 16, 16), None
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 8:] = False
    return torch.randint(1, 257, (2, 12)), mask if pad == "right" else mask.flip(1)


def logits(model, idx, mask):
    with torch.no_grad():
        return model(idx, key_mask=mask)[0]


def load(family, folder=None):
    return hf.load(folder or family, FAMILIES[family][0]).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad", ["right", "left"])
def test_softmax_through_the_seam_is_the_stock_model(stock, family, pad):
    _, model = stock(family)
    idx, mask = batch(family, pad)
    if family == "vit":
        theirs = model(pixel_values=idx).logits
    elif family == "bert":
        theirs = model(input_ids=idx, attention_mask=mask).logits
    else:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        theirs = model(input_ids=idx, attention_mask=mask, position_ids=positions).logits
    ours = logits(load(family), idx, mask)
    if family in CAUSAL:
        ours, theirs = ours[mask], theirs[mask]             # padding itself has no right answer
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_training_loss_is_transformers_own(stock, family):
    _, stock_model = stock(family)
    idx, mask = batch(family)
    targets = idx.roll(-1, 1).masked_fill(~mask, -1)
    model = load(family)
    exact = model(idx, targets, mask)[1]
    gradients, runs = [], []
    for layer in model.attention_layers():
        layer.mix.register_forward_pre_hook(lambda *_: runs.append(recompute))
    for recompute in (False, True):
        if recompute:
            model.recompute_activations()
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        loss = model(idx, targets, mask)[1]
        loss.backward()
        assert torch.allclose(loss, exact, atol=1e-5)
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))
    assert runs.count(False) == 2 and runs.count(True) == 4     # in forward, and again in backward


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("training", [False, True])
def test_a_loss_is_made_without_the_mask_of_padding_on_the_right(stock, family, training):
    stock(family)
    idx, mask = batch(family)
    targets, masks = idx.roll(-1, 1).masked_fill(~mask, -1), []
    model = load(family).convert("hedgehog")
    exact = torch.nn.functional.cross_entropy(logits(model, idx, mask)[mask], targets[mask])
    for layer in model.attention_layers():
        layer.mix.register_forward_pre_hook(lambda module, args: masks.append(args[5]))
    for module in model.modules():
        module.training = training and not isinstance(module, torch.nn.Dropout)
    assert torch.allclose(model(idx, targets, mask)[1], exact, atol=1e-5)
    assert masks == [None] * len(model.attention_layers())


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_attention_with_softmaxs_weights_is_the_teacher(stock, family, monkeypatch):
    stock(family)
    idx, mask = batch(family)
    model = load(family)
    teacher = logits(model, idx, mask)
    model.convert("hedgehog")
    assert not torch.allclose(logits(model, idx, mask), teacher, atol=1e-3)
    softmax = SoftmaxAttention()
    for layer in model.attention_layers():
        monkeypatch.setattr(layer.mix, "forward", lambda q, k, v, positions, causal, mask, cache: (
            softmax.weights(q, k, positions, causal, mask) @ v, cache))
    same = logits(model, idx, mask)
    keep = mask if family in CAUSAL else slice(None)
    assert torch.allclose(same[keep], teacher[keep], atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("attention", ["hedgehog", "elu", "hedgehog,softmax"])
def test_padding_changes_nothing(stock, family, attention):
    stock(family)
    model = load(family).convert(attention)
    for pad, real in (("right", slice(0, 8)), ("left", slice(4, 12))):
        idx, mask = batch(family, pad)
        if family == "bert" and pad == "left":
            continue                                        # its positions count padding
        both = logits(model, idx, mask)[1]
        alone = logits(model, idx[1:, real], mask[1:, real])[0]
        assert torch.allclose(both[real] if family in CAUSAL else both, alone, atol=1e-5)
        if family in CAUSAL:                                # called as a model of transformers
            both = model.hf(input_ids=idx, attention_mask=mask).logits[1]
            assert torch.allclose(both[real], alone, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(stock, family):
    _, before = stock(family)
    idx, mask = batch(family)
    model = load(family).convert("hedgehog", feature_dim=12)
    for layer in model.attention_layers():
        for p in layer.mix.parameters():
            p.data += 0.3 * torch.randn_like(p)
    model.save("converted")
    again = load(family, "converted")
    assert torch.equal(logits(again, idx, mask), logits(model, idx, mask))
    assert again.config.attention == "hedgehog" and again.config.feature_dim == 12
    plain = getattr(transformers, f"AutoModelFor{FAMILIES[family][0]}").from_pretrained("converted")
    for (name, a), (_, b) in zip(plain.state_dict().items(), before.state_dict().items()):
        assert torch.equal(a, b), name                      # the softmax model, for all others


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_by_transformers(stock, family):
    """Which keeps the name of a map without parameters; one with parameters is an error below."""
    stock(family)
    idx, mask = batch(family)
    for attention in ("elu", "softmax", "softmax,elu"):
        model = load(family).convert(attention)
        model.hf.save_pretrained(family)
        again = load(family)
        assert again.config.attention == attention
        assert torch.equal(logits(again, idx, mask), logits(model, idx, mask))


@pytest.mark.parametrize("family", CAUSAL)
def test_calls_as_of_transformers(stock, family):
    """Padding on the left counts for no position, however the mask is handed over; what would be
    wrong without a word is an error."""
    stock(family)
    model = load(family).convert("hedgehog")
    idx, mask = batch(family, "left")
    base = model.hf.base_model
    if family == "llama":                                   # a GPT-2 takes its cache in between
        assert torch.equal(base(idx, mask)[0], base(idx, attention_mask=mask)[0])
    cache = hf.Cache(layer_class_to_replicate=hf.StateLayer)
    name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
    with torch.no_grad():
        whole = model.hf(idx, attention_mask=mask).logits
        model.hf(idx[:, :6], attention_mask=mask[:, :6], **{name: cache})
        with pytest.raises(ValueError, match="cover"):
            model.hf(idx[:, 6:], attention_mask=mask[:, 6:], **{name: cache})
        rest = model.hf(idx[:, 6:], attention_mask=mask, **{name: cache}).logits
    assert torch.allclose(rest, whole[:, 6:], atol=1e-5)
    with pytest.raises(ValueError, match="is_causal"):
        model.hf(idx, is_causal=False)


def test_a_failed_save_leaves_the_old_one(stock, monkeypatch):
    stock("llama")
    model = load("llama").convert("hedgehog")
    model.save("kept")
    before = {p.name: p.read_bytes() for p in Path("kept").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError):
        model.save("kept")
    assert {p.name: p.read_bytes() for p in Path("kept").iterdir()} == before
    assert [p.name for p in Path(".").iterdir() if p.name.startswith("kept")] == ["kept"]


def test_a_save_that_is_interrupted_last_leaves_the_old_one(stock, monkeypatch):
    stock("llama")
    model, rename = load("llama").convert("hedgehog"), Path.rename
    model.save("kept")

    def interrupted(self, target):
        if ".part" in self.name:
            raise KeyboardInterrupt
        rename(self, target)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save("kept")
    assert load("llama", "kept").config.attention == "hedgehog"
    assert [p.name for p in Path(".").iterdir() if p.name.startswith("kept")] == ["kept"]


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("attention", ["hedgehog", "hedgehog_decay", "softmax,hedgehog"])
def test_generate(stock, family, attention):
    """Greedy from the state is greedy by recomputation; left padding and beams, too."""
    stock(family)
    model = load(family).convert(attention)
    idx, mask = batch(family, "left")
    options = dict(max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
    fast = model.hf.generate(idx, attention_mask=mask.long(), **options)
    slow = model.hf.generate(idx, attention_mask=mask.long(), use_cache=False, **options)
    assert torch.equal(fast, slow)
    whole = idx[:1]
    for _ in range(10):
        whole = torch.cat([whole, logits(model, whole, None)[:, -1:].argmax(-1)], 1)
    assert torch.equal(fast[:1], whole)
    beams = [model.hf.generate(idx, attention_mask=mask.long(), num_beams=3, use_cache=cache,
                               **options) for cache in (True, False)]
    assert torch.equal(*beams)


def test_the_state_is_constant(stock):
    stock("llama")
    model = load("llama").convert("hedgehog")
    sizes = []
    for n in (5, 40):
        cache = hf.Cache(layer_class_to_replicate=hf.StateLayer)
        name = "cache" if "cache" in hf.inspect.signature(
            transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
        model.hf(input_ids=torch.ones(1, n, dtype=torch.long), use_cache=True, **{name: cache})
        sizes.append([x.numel() for layer in cache.layers for x in layer.state])
    assert sizes[0] == sizes[1] == [4 * 16 * 8, 4 * 16] * 2     # per query head


def test_scaling_and_fp32_maps_in_a_bf16_model(stock):
    torch.manual_seed(0)
    config = FAMILIES["gpt2"][1]()
    config.scale_attn_by_inverse_layer_idx = True
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    idx, _ = batch("gpt2")
    theirs = model(input_ids=idx).logits
    assert torch.allclose(logits(hf.HuggingFace(copy.deepcopy(model)), idx, None), theirs,
                          atol=1e-5)
    low = hf.HuggingFace(model).convert("hedgehog")
    with pytest.raises(ValueError, match="already"):
        hf.HuggingFace(model)
    exact = logits(low, idx, None)
    low.hf.bfloat16()
    for layer in low.attention_layers():
        layer.mix.float()
    assert ((logits(low, idx, None) - exact).norm() / exact.norm()) < 0.1
    assert torch.isfinite(logits(low.convert("performer"), idx, None)).all()    # w is a buffer
    low.tokenizer = load("gpt2", stock("gpt2")[0]).tokenizer
    low.save("low")
    assert {p.dtype for p in hf.load("low").hf.parameters()} == {torch.float32}


def test_a_map_with_integers(stock, monkeypatch):
    """q and k take the type of a map's weights, and that is none."""
    class Reversed(FEATURE_MAPS["relu"]):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("order", torch.arange(config.head_dim).flip(0))

        def phi(self, x):
            return super().phi(x[..., self.order])

    monkeypatch.setitem(FEATURE_MAPS, "reversed", Reversed)
    stock("llama")
    idx, mask = batch("llama")
    same, exact = (logits(load("llama").convert(name), idx, mask) for name in ("reversed", "relu"))
    assert torch.allclose(same, exact, atol=1e-5)


def test_an_odd_head_dim(stock):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=270, n_positions=64, n_embd=20, n_layer=1, n_head=4)).eval()
    idx, _ = batch("gpt2")
    theirs = model(input_ids=idx).logits
    assert torch.allclose(logits(hf.HuggingFace(model), idx, None), theirs, atol=1e-5)


def options(tmp, **more):
    return distill.Options(**dict(dict(
        out=str(tmp), device="cpu", precision="fp32", compile=False, micro_batch=2, batch_size=4,
        distill_steps=30, steps=3, block_size=16), **more))


def text_task():
    rng = np.random.default_rng(0)
    splits = {s: rng.integers(1, 257, 400).astype(np.uint16) for s in ("train", "valid")}
    return tasks.Text("random", "", 270, splits, {}, 16)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "vit"])
def test_stage_1(stock, tmp_path, family):
    """KL is halved, and no weight of the model changes by a bit."""
    stock(family)
    o, model = options(tmp_path), load(family)
    if family == "vit":
        task = text_task()
        task.batch = lambda split, indices: (torch.randn(len(indices), 3, 16, 16),
                                             torch.zeros(len(indices), dtype=torch.long))
    elif family == "bert":
        examples = [(np.arange(1, n), n % 2) for n in range(4, 14)]
        task = tasks.Classification("c", "", {"train": examples, "valid": examples})
    else:
        task = text_task()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    student = distill.model_with(replace(model.config, attention="hedgehog"), model)
    assert model.config.attention == "softmax"              # the teacher stays as it is
    layers = student.attention_layers()
    linear = [layer.mix for layer in layers]
    distill.put([SoftmaxAttention() for _ in layers], layers)
    losses = distill.distill(student, linear, task, replace(o, distill_lr=3e-2))
    assert losses[-1] < losses[0] / 2
    after = student.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_lora(stock, family):
    stock(family)
    model, (idx, mask) = load(family).convert("hedgehog"), batch(family)
    plain, before = logits(model, idx, mask), copy.deepcopy(model.hf.state_dict())
    assert len(model.projections()) == (4 if family == "gpt2" else 8)
    for p in distill.add_lora(model, 2, 8.0):
        assert p.requires_grad
        p.data += 0.1 * torch.randn_like(p)
    adapted = logits(model, idx, mask)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    distill.merge_lora(model)
    assert torch.allclose(logits(model, idx, mask), adapted, atol=1e-5)
    after = model.hf.state_dict()
    changed = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert len(changed) == len(model.projections())
    for name in changed:
        assert any(part in name for part in ("attn", "attention")) and name.endswith("weight")


@pytest.mark.parametrize("attention", ["softmax", "hedgehog"])
def test_gpt2_is_our_gpt_and_back(stock, attention):
    stock("gpt2")
    idx, _ = batch("gpt2")
    theirs = load("gpt2").convert(attention)
    for p in (p for layer in theirs.attention_layers() for p in layer.mix.parameters()):
        p.data += 0.1 * torch.randn_like(p)
    theirs.save("theirs")
    own = GPT.from_pretrained("theirs").eval()
    assert torch.allclose(own(idx)[0], logits(theirs, idx, None), atol=1e-5)
    own.config.dropout = 0.2
    own.export("back")
    assert GPT.from_pretrained("back").config.dropout == 0.2
    assert torch.equal(logits(load("gpt2", "back"), idx, None), logits(theirs, idx, None))
    config = transformers.AutoConfig.from_pretrained("back")
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.2, 0.2, 0)
    own.export("back")                                      # a second time
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="something else"):
        own.export("mine")
    assert Path("mine/thesis.tex").exists()
    os.symlink("back", "link")
    own.export("link")
    assert Path("link").is_symlink() and GPT.from_pretrained("link").config.n_layer == 2
    own.config.causal = False
    with pytest.raises(ValueError, match="causal"):
        own.export("encoder")
    stock("llama")
    with pytest.raises(ValueError, match="is a llama"):
        GPT.from_pretrained("llama")


@pytest.mark.parametrize("key, value", [
    ("n_inner", 40), ("activation_function", "relu"), ("layer_norm_epsilon", 0.1),
    ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True),
    ("tie_word_embeddings", False)])
def test_other_gpt2s_are_not_our_gpt(stock, key, value):
    config = FAMILIES["gpt2"][1]()
    setattr(config, key, value)
    transformers.GPT2LMHeadModel(config).save_pretrained("other")
    tokenizer("other")
    with pytest.raises(ValueError, match="own settings"):
        GPT.from_pretrained("other")


def test_tokens_of_two_tokenizers_of_one_name_are_not_mixed_up(stock):
    """They are kept in the data folder for the next time. These have one vocabulary, too."""
    from tokenizers import normalizers

    stock("gpt2")
    Path("text.txt").write_text("SOME WORDS\n" * 100)
    o, found = SimpleNamespace(data="text.txt", data_dir="data", tokenizer="", block_size=8), []
    for normalizer in (None, normalizers.Lowercase()):
        t = hf.load("gpt2").tokenizer
        if normalizer:
            t.backend_tokenizer.normalizer = normalizer
        found.append(t.decode(tasks.load_data(o, hf.encoding(t)).splits["train"][:10].tolist()))
    assert found == ["SOME WORDS", "some words"]


def test_text_is_tokenised_without_special_tokens(stock):
    """Llama's tokenizer would start each piece with one."""
    from tokenizers import processors

    stock("llama")
    t = load("llama").tokenizer
    t.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 0)])
    a, b = t.convert_tokens_to_ids(["a", "b"])
    assert t("ab")["input_ids"] == [0, a, b]
    assert hf.encoding(t).encode_ordinary_batch(["ab", "b"]) == [[a, b], [b]]


def run(capsys, *args):
    capsys.readouterr()
    code = distill.main([str(a) for a in args])
    return code, *capsys.readouterr()


SHORT = "--distill-steps 30 --steps 3 --batch-size 4 --micro-batch 4 --block-size 16".split()


def test_a_language_model_from_the_command_line(stock, capsys, monkeypatch):
    stock("llama")
    Path("text.txt").write_text("".join(f"line {i} of {i * i % 97} words\n" for i in range(200)))
    code, out, err = run(capsys, "--teacher", "llama", "--data", "text.txt", "--out", "o", *SHORT,
                         "--lora", 2)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    config = load("llama").config                           # not the preset's
    assert all(result["options"][key] == getattr(config, key) for key in distill.SHAPE)
    assert config.position == "rotary"
    rows = {r["name"]: r for r in result["rows"]}
    assert rows["hedgehog, stage 1"]["kl"] < rows["hedgehog, swapped"]["kl"]
    again = hf.load("o/stage2")
    assert again.config.attention == "hedgehog"
    assert transformers.AutoModelForCausalLM.from_pretrained("o/softmax") is not None
    code, out, err = run(capsys, "--analyze", "o/stage1", "--data", "text.txt", *SHORT)
    assert code == 0, err
    layers = json.loads(out.splitlines()[-1])["layers"]["hedgehog, trained"]
    assert np.mean(layers["kl"]) == pytest.approx(rows["hedgehog, stage 1"]["kl"], rel=1e-3)
    monkeypatch.setattr(sys, "argv", "gap.py o/softmax o/stage2 --data text.txt --block-size 16"
                        .split())
    gap.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for key, name in (("softmax", "softmax, finetuned"), ("other", "hedgehog, stage 2")):
        assert math.exp(found[key]) == pytest.approx(rows[name]["perplexity"], rel=1e-4)


def test_responses(stock, capsys):
    stock("gpt2")
    lines = [json.dumps({"dialogue": f"A: {i}", "summary": f"{i}."}) for i in range(40)]
    Path("d.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")     # as of Windows
    task = tasks.Responses("d.jsonl", hf.load("gpt2").tokenizer, 64)
    x, y, mask = task.batch("train", [0, 11])
    for i, text in ((0, "0."), (1, "11.")):
        answer = y[i][y[i] >= 0].tolist()
        assert task.model_tokenizer.decode(answer[:-1]) == text and answer[-1] == 0
        assert (x[i, 1:][y[i, :-1] >= 0] == y[i, :-1][y[i, :-1] >= 0]).all()
    assert int((y >= 0).sum()) == task.num_targets("train", [0, 11])
    prompt = task.model_tokenizer.decode(x[0, :len(task.splits["train"][0][0])])
    assert prompt == "Summarize this dialog:\nA: 0\n---\nSummary:\n"
    assert len(task.splits["train"]) == 36 and len(task.splits["valid"]) == 4
    code, out, err = run(capsys, "--teacher", "gpt2", "--data", "d.jsonl", "--out", "o", *SHORT,
                         "--block-size", 64, "--rouge", 2)
    assert code == 0, err
    row = json.loads(out.splitlines()[-1])["rows"][-1]
    assert task.metrics("valid", math.log(7), 0.5)["perplexity"] == pytest.approx(7)
    assert math.isfinite(row["perplexity"]) and 0 <= row.get("rougeL", 0) <= 100
    tokenizer("gpt2", eos_token="<eos>")                    # no token to pad with: not needed
    again = json.loads(run(capsys, "--teacher", "gpt2", "--data", "d.jsonl", "--out", "p", *SHORT,
                           "--block-size", 64, "--rouge", 2)[1].splitlines()[-1])["rows"][-1]
    assert again == row


def test_rouge(stock):
    """Of a model that repeats its prompts; they are of different lengths."""
    def generate(idx, attention_mask, max_new_tokens, do_sample, pad_token_id, eos_token_id):
        assert torch.equal(attention_mask, (idx != pad_token_id).long())
        assert attention_mask[:, -1].all() and max_new_tokens == 64 - longest and not do_sample
        out = torch.full((len(idx), max_new_tokens), eos_token_id)
        for row, prompt, mask in zip(out, idx, attention_mask.bool()):
            row[:int(mask.sum())] = prompt[mask]
        return torch.cat([idx, out], 1)

    pytest.importorskip("rouge_score")
    stock("gpt2")
    lines = [{"prompt": prompt, "response": response} for prompt, response in (
        ("dogs bark", "dog barks"), ("b a", "a b"), ("one two three four", "one two"))]
    for name, rows in (("train", [{"prompt": "a", "response": "b"}]), ("valid", lines)):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = tasks.Responses("train.jsonl", hf.load("gpt2").tokenizer, 64)
    longest = max(len(prompt) for prompt, *_ in task.splits["valid"])
    model = SimpleNamespace(config=SimpleNamespace(block_size=64),
                            hf=SimpleNamespace(generate=generate))
    expected = dict(rouge1=(100 + 100 + 200 / 3) / 3, rouge2=50, rougeL=(100 + 50 + 200 / 3) / 3)
    for micro_batch in (1, 2, 3):
        o = SimpleNamespace(rouge=100, micro_batch=micro_batch, device="cpu")
        assert task.rouge(model, o, iter) == pytest.approx(expected)
    o.rouge, longest = 1, len(task.splits["valid"][0][0])   # the first one is repeated well
    assert task.rouge(model, o, iter) == dict.fromkeys(expected, 100)
    prompt = list(range(1, 61))                             # too long to leave half for a response
    task.splits["valid"], longest = [(prompt, [0], "x")], 32
    model.hf.generate = lambda idx, **rest: (seen.append(idx[0].tolist()), generate(idx, **rest))[1]
    seen = []
    task.rouge(model, o, iter)
    assert seen == [prompt[-32:]]


def test_lines_of_responses(stock):
    """Only a newline ends a line, empty ones are skipped, an empty prompt is the end token."""
    stock("gpt2")
    lines = [json.dumps(x, ensure_ascii=False) for x in (
        {"prompt": "a\u2028b", "response": "c\x85"}, {"prompt": "", "response": "d"})]
    Path("d.jsonl").write_text("\n\n".join(lines * 10) + "\n", encoding="utf-8")
    task = tasks.Responses("d.jsonl", hf.load("gpt2").tokenizer, 64)
    assert [pair[2] for pair in task.splits["train"][:2]] == ["c\x85", "d"]
    x, y, mask = task.batch("train", [0, 1])
    assert x[1, 0] == 0 and y[1, 0] >= 0 and mask[1].sum() == 2
    Path("d.jsonl").write_text(json.dumps({"prompt": "a" * 20, "response": "b" * 20}) + "\n"
                               + json.dumps({"prompt": "a", "response": "b"}))
    prompt, answer, _ = tasks.Responses("d.jsonl", hf.load("gpt2").tokenizer, 9).splits["train"][0]
    assert (len(prompt), len(answer)) == (5, 4)             # a response is at most half


@pytest.mark.parametrize("bos", [None, 1])
def test_a_long_prompt_keeps_its_end(tmp_path, bos):
    """And the token that starts a text, where the model has one (Llama)."""
    class Words:
        bos_token_id, eos_token_id = bos, 2

        def __len__(self):
            return 100

        def __call__(self, text, add_special_tokens=True):
            ids = [int(word) for word in text.split()]
            return {"input_ids": [bos] * (add_special_tokens and bos is not None) + ids}

    path = tmp_path / "d.jsonl"
    line = {"prompt": " ".join(map(str, range(50, 70))), "response": "9"}
    path.write_text("\n".join([json.dumps(line)] * 20))
    prompt, answer, _ = tasks.Responses(path, Words(), 8).splits["train"][0]
    assert prompt == ([64, 65, 66, 67, 68, 69] if bos is None else [1, 65, 66, 67, 68, 69])
    assert answer == [9, 2]
    assert len(tasks.Responses(path, Words(), 64).splits["train"][0][0]) == 20 + (bos is not None)


def test_bert_is_told_which_sentence_a_token_is_of(stock):
    _, theirs = stock("bert")
    model = load("bert")
    model.tokenizer.sep_token = "<eos>"                     # token 0
    idx = torch.tensor([[5, 6, 0, 7, 8, 9, 0], [5, 0, 7, 0, 1, 1, 1]])
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0]])
    exact = theirs(input_ids=idx, attention_mask=mask, token_type_ids=types).logits
    assert torch.allclose(logits(model, idx, mask), exact, atol=1e-5)
    other = theirs(input_ids=idx, attention_mask=mask).logits
    assert not torch.allclose(exact, other, atol=1e-4)


def test_a_compiled_model_is_one_graph(stock):
    stock("llama")
    model, (idx, mask) = load("llama").convert("hedgehog"), batch("llama")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for key_mask in (None, mask):
        torch.testing.assert_close(compiled(idx, key_mask=key_mask)[0],
                                   model(idx, key_mask=key_mask)[0])
    torch.compiler.reset()


def test_bert_on_glue_and_vit_on_images(stock, capsys):
    stock("bert")
    stock("vit")
    rows = "".join(f"s\t{i % 2}\t\t{'good' if i % 2 else 'bad'} {i}\n" for i in range(20))
    Path("CoLA").mkdir()
    Path("CoLA/train.tsv").write_text(rows)
    Path("CoLA/dev.tsv").write_text(rows)
    code, out, err = run(capsys, "--teacher", "bert", "--task", "CoLA", "--out", "b", *SHORT,
                         "--teacher-steps", 3)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["figure"] == "matthews"
    assert hf.load("b/stage2", "SequenceClassification").labels == ["0", "1"]
    image = pytest.importorskip("PIL.Image")
    for name in ("a", "b", "c"):
        Path("images", name).mkdir(parents=True)
        for i in range(10):
            pixels = np.random.default_rng(i).integers(0, 255, (20, 20, 3)).astype(np.uint8)
            image.fromarray(pixels).save(f"images/{name}/{i}.png")
    code, out, err = run(capsys, "--teacher", "vit", "--task", "images", "--out", "v", *SHORT,
                         "--teacher-steps", 3)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["figure"] == "accuracy"
    for name in ("train/a", "train/b", "valid/a", "valid/z"):
        shutil.copytree("images/a", f"split/{name}")
    with pytest.raises(ValueError, match="valid has z"):
        tasks.Images("split", None)


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file(stock, monkeypatch, tied):
    """In llama.cpp's layout, where rows of q and k that rotate together are neighbours."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setitem(FAMILIES, "llama", ("CausalLM", lambda: transformers.LlamaConfig(
        **SMALL, num_key_value_heads=2, max_position_embeddings=64, rope_theta=100.0,
        rms_norm_eps=0.1, tie_word_embeddings=tied)))
    _, theirs = stock("llama")

    def write(path, parameters):
        c, file = theirs.config, gguf.GGUFWriter(path, "llama")
        file.add_vocab_size(c.vocab_size)
        file.add_context_length(c.max_position_embeddings)
        file.add_embedding_length(c.hidden_size)
        file.add_block_count(c.num_hidden_layers)
        file.add_feed_forward_length(c.intermediate_size)
        file.add_head_count(c.num_attention_heads)
        file.add_head_count_kv(c.num_key_value_heads)
        file.add_layer_norm_rms_eps(c.rms_norm_eps)
        file.add_rope_freq_base(100.0)
        vocab = load("llama").tokenizer.get_vocab()
        file.add_tokenizer_model("gpt2")
        file.add_token_list(["<|endoftext|>", *sorted(vocab, key=vocab.get)[1:], "ab", "cd"])
        file.add_token_merges(["a b", "c d"])
        file.add_bos_token_id(0)
        file.add_eos_token_id(0)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
        for name, x in parameters:
            for part, heads in (("q_proj", 4), ("k_proj", 2)):
                if part in name:
                    x = x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            file.add_tensor(names.get_name(name, (".weight",)), x.detach().numpy())
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()

    write("whole.gguf", theirs.named_parameters())
    model, (idx, mask) = load("llama", "whole.gguf"), batch("llama")
    assert torch.allclose(logits(model, idx, mask)[mask],
                          logits(load("llama"), idx, mask)[mask], atol=1e-5)
    assert model.config.block_size == 64 and model.tokenizer.eos_token_id == 0
    assert model.tokenizer("x")["input_ids"] == load("llama").tokenizer("x")["input_ids"]
    write("part.gguf", [(name, x) for name, x in theirs.named_parameters() if ".norm" not in name])
    with pytest.raises(ValueError, match="weights are missing: model.norm.weight"):
        load("llama", "part.gguf")


def test_pairs_of_sentences_are_as_berts_tokenizer_makes_them(stock):
    """Also where they are cut; and the head has the classes of the task."""
    from tokenizers import processors

    stock("bert")
    t = load("bert").tokenizer
    t.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", 0)])
    t.save_pretrained("bert")
    Path("MNLI").mkdir()
    rows = "".join(f"ab\t{text}\t{label}\n" for text in ("c", "d" * 20) for label in "xyz")
    for name in ("train", "dev"):
        Path(f"MNLI/{name}.tsv").write_text(f"sentence1\tsentence2\tlabel\n{rows}")
    o = distill.Options(task="MNLI", device="cpu", block_size=12)
    (task, model, _), (_, again, _) = distill.load("bert", o), distill.load("bert", o)
    a, b, c, d = (t.convert_tokens_to_ids(x) for x in "abcd")
    assert task.splits["train"][0][0].tolist() == [a, b, 0, c, 0]
    assert task.splits["train"][-1][0].tolist() == [a, b, 0, *[d] * 8, 0]
    assert logits(model, torch.ones(1, 4, dtype=torch.long), None).shape == (1, 3)
    assert torch.equal(model.hf.classifier.weight, again.hf.classifier.weight)


def test_images_for_vit(stock):
    """Of which every tenth is to judge by, or those in valid; grey ones, too."""
    image = pytest.importorskip("PIL.Image")
    stock("vit")
    for name in "abcd":
        for split, n in (("all", 10), ("split/train", 3), ("split/valid", 2)):
            Path(split, name).mkdir(parents=True)
            for i in range(n):
                image.new("L", (20, 20), 100 * i).save(f"{split}/{name}/{i}.png")
    Path("all/a/.hidden").write_text("")
    task, model, _ = distill.load("vit", distill.Options(task="all", device="cpu"))
    assert task.labels == model.labels == list("abcd")
    # A model that knows these classes keeps its own numbers for them, from valid or val.
    names = dict(enumerate("dbca"))
    hf.load("vit", "ImageClassification", id2label=names, label2id={x: i for i, x in names.items()},
            ignore_mismatched_sizes=True).save("knows")
    Path("split/valid").rename("split/val")
    known, model, _ = distill.load("knows", distill.Options(task="split", device="cpu"))
    assert known.labels == model.labels == list("dbca")
    assert {(file.parent.name, label) for file, label in known.splits["valid"]} == {
        (name, label) for label, name in names.items()}
    Path("split/val").rename("split/valid")
    assert [len(x) for x in task.splits.values()] == [36, 4]
    x, y = task.batch("valid", [2, 3])
    assert logits(model, x, None).shape == (2, 4) and y.tolist() == [2, 3]
    x, _ = task.batch("train", [0, 2])
    assert x.shape == (2, 3, 16, 16) and x[1].min() > x[0].max()
    assert [len(x) for x in tasks.Images("split", None).splits.values()] == [12, 8]


def test_one_clear_line(stock, capsys, monkeypatch):
    stock("llama")
    stock("bert")
    Path("empty.jsonl").write_text("")
    Path("bad.jsonl").write_text('{"x": 1}\n')
    Path("wrong.gguf").write_bytes(b"GGUF no")
    transformers.T5Config(d_model=16, num_layers=1, num_heads=2, d_ff=16, vocab_size=20
                          ).save_pretrained("t5")
    transformers.MistralConfig(**SMALL, num_key_value_heads=2).save_pretrained("mistral")
    transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained("mistral")).save_pretrained("mistral")
    tokenizer("mistral")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=270, n_embd=8, n_layer=1, n_head=1, add_cross_attention=True)
        ).save_pretrained("cross")
    tokenizer("cross")
    Path("d.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 20)
    Path("CoLA").mkdir()
    Path("CoLA/train.tsv").write_text("s\t1\t\tgood\n" * 20)
    Path("list.jsonl").write_text('{"prompt": ["a"], "response": "b"}\n')
    decoder = FAMILIES["bert"][1]()
    decoder.is_decoder = True
    transformers.BertLMHeadModel(decoder).save_pretrained("decoder")
    tokenizer("decoder")
    load("llama").hf.model.save_pretrained("base")
    tokenizer("base")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=100, n_embd=8, n_layer=1, n_head=1)).save_pretrained("small")
    tokenizer("small")
    converted = load("llama").convert("hedgehog")
    converted.hf.save_pretrained("half")
    tokenizer("half")
    converted.save("damaged")
    Path("damaged/hedgehog.safetensors").write_bytes(b"x" * 20)
    load("llama").hf.save_pretrained("endless")
    tokenizer("endless", bos_token="<eos>")
    GPT(GPTConfig(vocab_size=300, n_layer=1, n_head=1, n_embd=8, attention="softmax")
        ).export("bare")
    Path("text.txt").write_text("some text\n" * 100)
    Path("ids").mkdir()
    Path("ids/meta.json").write_text(json.dumps(dict(tokenizer="x", vocab_size=300)))
    for split in ("train", "valid"):
        np.arange(100, dtype=np.uint16).tofile(f"ids/{split}.bin")
    for args, words in (
            ("--teacher llama --data ids", "a vocabulary of 300, the model's has 257"),
            ("--teacher bare --data text.txt", "bare has no tokenizer"),
            ("--teacher nowhere --data empty.jsonl", "nowhere is no folder or file here, and"),
            ("--teacher llama/no/thing --data d.jsonl", "no folder or file llama/no/thing"),
            ("--teacher half --data d.jsonl", "not saved by HuggingFace.save"),
            ("--teacher t5 --data empty.jsonl", "t5 is not to be had"),
            ("--teacher mistral --data empty.jsonl", "mistral models"),
            ("--teacher cross --data empty.jsonl", "cross attention"),
            ("--teacher endless --data d.jsonl", "no token to end a response"),
            ("--teacher llama --data empty.jsonl", "too few examples"),
            ("--teacher llama --data bad.jsonl", "line 1"),
            ("--teacher llama --data list.jsonl", "line 1"),
            ("--teacher decoder --data d.jsonl", "BERT as a decoder"),
            ("--teacher base --data d.jsonl", "weights are missing: lm_head.weight"),
            ("--teacher small --data d.jsonl", "the tokenizer has 257 tokens, the model 100"),
            ("--teacher damaged --data d.jsonl", "does not hold this model's maps"),
            ("--teacher wrong.gguf --data bad.jsonl", "wrong.gguf is not"),
            ("--teacher bert --data d.jsonl", "an encoder is for --task"),
            ("--teacher bert --task Cola", "Cola: there is no such folder"),
            ("--teacher bert --task CoLA --block-size 65", "positions up to 64"),
            ("--teacher llama --data d.jsonl --block-size 1", "no room"),
            ("--teacher llama --data empty.jsonl --block-size 65", "positions up to 64")):
        code, _, err = run(capsys, "--block-size", 16, *args.split())
        assert code == 2 and words in err.splitlines()[-1] and "Traceback" not in err, (args, err)
    model = load("llama").convert("hedgehog")
    with pytest.raises(ValueError, match="4D"):
        model.hf(input_ids=torch.ones(1, 4, dtype=torch.long),
                 attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="packed"):
        model.hf(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False,
                 position_ids=torch.tensor([[0, 1, 0, 1]]))
    cache = transformers.DynamicCache()
    name = "cache" if "cache" in hf.inspect.signature(
        transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
    model.hf(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=True, **{name: cache})
    with pytest.raises(ValueError, match="use_cache"):
        model.hf(input_ids=torch.ones(1, 1, dtype=torch.long), use_cache=True, **{name: cache})
    for attention in ("softmax", "hedgehog"):               # keys with room for more from the start
        cache = transformers.StaticCache(config=model.hf.config, max_cache_len=16)
        with pytest.raises(ValueError, match="use_cache"):
            model.convert(attention).hf(input_ids=torch.ones(1, 4, dtype=torch.long),
                                        use_cache=True, **{name: cache})
    assert all(layer.mix_cache is None for layer in model.attention_layers())
    with pytest.raises(ValueError, match="up to 64 tokens"):
        model.convert("cosformer").hf.generate(torch.ones(1, 60, dtype=torch.long),
                                               max_new_tokens=9)
