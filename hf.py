"""Models of Hugging Face's transformers with linear attention: GPT-2, Llama, BERT, ViT.

    model = hf.load("FOLDER, NAME or FILE.gguf")    a transformers model, its softmax in our hands
    model.convert("hedgehog")                       every layer gets linear attention with this map
    model.save("FOLDER"), hf.load("FOLDER")         a checkpoint of its family, maps beside it
    model.hf.generate(ids)                          from a state of constant size

Attention modules of transformers call a function that is registered under a name, with q and k to
which rotary positions have been applied, and where heads share keys with fewer k and v than q. Ours
hands them to the module's submodule `mix`, as in hedgehog.py, so that distill.py's stages, adapters
and tables do not know where a model comes from. `HuggingFace` gives a model GPT's interface.
"""

import inspect
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

from gpt import GPT, linear_cross_entropy
from hedgehog import GPTConfig, SoftmaxAttention, make_mix

try:
    import transformers
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.utils.import_utils import is_tracing
except ImportError as e:
    raise ValueError(f"models of Hugging Face need transformers ({e}): pip install "
                     "'transformers>=5.17,<5.25'")

FAMILIES = ("gpt2", "llama", "bert", "vit")


# --- the seam -------------------------------------------------------------------------------------


def attention(module, q, k, v, key_mask=None, scaling=None, is_causal=None, **_):
    """What an attention module of transformers calls: q (B, H, T, d), k and v with H or fewer
    heads, key_mask (B, tokens so far) -> y (B, T, H, d), None. There is no dropout of weights,
    which linear attention does not have."""
    if key_mask is not None and key_mask.dim() != 2:
        raise ValueError("only masks (batch, tokens) are understood, not 4D ones")
    if is_causal not in (None, module.is_causal):
        raise ValueError(f"is_causal={is_causal} is not supported here")
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))     # shared heads
    if scaling is not None:                                 # ours is 1 / sqrt(d)
        q = q * (scaling * math.sqrt(q.size(-1)))
    layer = module.mix_cache.layers[module.layer_idx] if module.mix_cache is not None else None
    if layer is not None and not isinstance(layer, StateLayer):
        if k.size(2) != q.size(2) or layer.get_seq_length() > q.size(2):
            raise ValueError("a cache of keys does not serve linear attention: pass use_cache=False"
                             ", or leave the cache to model.generate")
        layer = None                                        # the first call: what it keeps is idle
    start = 0 if layer is None else layer.seen - q.size(2)
    limit = getattr(getattr(module.mix, "feature_map", None), "M", math.inf)
    if start + q.size(2) > limit:
        raise ValueError(f"cosformer is for up to {limit} tokens here")
    positions = torch.arange(start, start + q.size(2), device=q.device)
    dtype = next((x.dtype for x in module.mix.state_dict().values() if x.is_floating_point()),
                 q.dtype)
    if not torch.is_autocast_enabled(q.device.type):        # fp32 maps in a bf16 model
        q, k = q.to(dtype), k.to(dtype)
    cache = None
    if layer is not None and layer.state is not None:
        cache = module.mix.reserve(layer.state, layer.seen)
    y, state = module.mix(q, k, v, positions, module.is_causal, key_mask, cache)
    if layer is not None:
        layer.state = state
    return y.to(v.dtype).transpose(1, 2), None


def padding_mask(attention_mask=None, mask_function=None, **_):
    """What reaches `attention` as key_mask: the padding alone. Causality is the module's."""
    name = getattr(mask_function, "__name__", "")
    # While a batch is compiled or a CUDA graph records it, transformers cannot look at the
    # positions and takes it for a packed one: one that really is passes unnoticed.
    plain = ("causal_mask_function", "bidirectional_mask_function")
    if name not in plain and not is_tracing():
        raise ValueError("sliding windows and packed sequences are not supported here")
    return attention_mask


transformers.AttentionInterface.register("mix", attention)
transformers.AttentionMaskInterface.register("mix", padding_mask)


class StateLayer(CacheLayerMixin):
    """A layer of a transformers Cache that holds what `mix` returns: (S, z), of constant size, or
    for softmax (k, v)."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.state, self.seen = None, 0

    def lazy_initialization(self, *args):
        pass

    def update(self, k, v, *args, **kwargs):                # comes before `attention`
        self.seen += k.size(2)
        return k, v

    def get_seq_length(self, *args):
        return self.seen

    def get_mask_sizes(self, query_length):
        return self.seen + query_length, 0

    def get_max_length(self):
        return -1

    def reset(self):
        self.state, self.seen = None, 0

    def select(self, indices):
        if self.state is not None:
            self.state = tuple(x[indices.to(x.device)] for x in self.state)

    reorder_cache = batch_select_indices = select           # beams

    def batch_repeat_interleave(self, repeats):
        if self.state is not None:
            self.state = tuple(x.repeat_interleave(repeats, dim=0) for x in self.state)


def remember_cache(module, args, kwargs):
    """A pre-hook of attention modules: `attention` is not told the cache, they are."""
    module.mix_cache = kwargs.get("cache", kwargs.get("past_key_values"))


def forget_cache(module, args, output):
    module.mix_cache = None


def count_from_padding(model, args, kwargs):
    """A pre-hook of causal models: without position_ids they would count padding on the left, too.
    Softmax of rotary positions does not mind that, maps of the rotated q and k do."""
    if args:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        args, kwargs = (), {**dict(zip(names, args)), **kwargs}
    mask, cache = kwargs.get("attention_mask"), kwargs.get("cache", kwargs.get("past_key_values"))
    if kwargs.get("position_ids") is None and mask is not None and mask.dim() == 2:
        tokens = kwargs.get("input_ids")
        new = (kwargs["inputs_embeds"] if tokens is None else tokens).size(1)
        if mask.size(1) < new + (0 if cache is None else cache.get_seq_length()):
            raise ValueError("attention_mask has to cover the tokens in the cache, too")
        kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
    return args, kwargs


def take_over(model):
    """Puts SoftmaxAttention into every attention module of a transformers model; returns these."""
    config = model.config
    if config.model_type not in FAMILIES or getattr(config, "add_cross_attention", False) or (
            config.model_type == "bert" and config.is_decoder):
        raise ValueError(f"{config.model_type} models (with cross attention, or BERT as a decoder) "
                         f"are not supported; these are: {', '.join(FAMILIES)}")
    modules = [m for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "scaling")]
    if any(hasattr(m, "mix") for m in modules):
        raise ValueError("this model is a HuggingFace already: its convert() changes the attention")
    for i, module in enumerate(modules):
        module.mix, module.mix_cache, module.layer_idx = SoftmaxAttention(), None, i
        module.register_forward_pre_hook(remember_cache, with_kwargs=True)
        module.register_forward_hook(forget_cache, always_call=True)
    if modules[0].is_causal:
        model.base_model.register_forward_pre_hook(count_from_padding, with_kwargs=True)
    model.set_attn_implementation("mix")

    def prepare_cache(generation_config, model_kwargs, *args, **kwargs):
        parameters = inspect.signature(type(model).forward).parameters
        name = "cache" if "cache" in parameters else "past_key_values"     # before 5.24
        if model_kwargs.get(name) is None and generation_config.use_cache is not False:
            model_kwargs[name] = Cache(layer_class_to_replicate=StateLayer)

    model._prepare_cache_for_generation = prepare_cache     # so that generate needs no argument
    return modules


class HuggingFace(nn.Module):
    """A transformers model with the interface of GPT (gpt.py), for distill.py."""

    def __init__(self, model, tokenizer=None):
        super().__init__()
        self.hf, self.tokenizer, modules = model, tokenizer, take_over(model)
        self.stage = ""                                     # what distill.py did last
        first, c = modules[0], model.config
        d = getattr(first, "head_dim", None) or first.attention_head_size
        heads = c.num_attention_heads
        self.config = GPTConfig(                            # of the maps; the model has its own
            vocab_size=getattr(c, "vocab_size", 0), n_layer=len(modules), n_head=heads,
            n_embd=heads * d, attention="softmax", causal=first.is_causal,
            position="rotary" if c.model_type == "llama" else "learned",
            block_size=getattr(c, "max_position_embeddings", 1024))

    @property
    def labels(self):
        """The names of a classifier's classes."""
        return [name for _, name in sorted(self.hf.config.id2label.items())]

    def attention_layers(self):
        return [m for m in self.hf.modules() if hasattr(m, "mix_cache")]

    def projections(self):
        """(module, matrices stacked in its weight) of queries, keys, values and outputs."""
        ends = ("q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value", ".attn.c_attn",
                ".attn.c_proj", "attention.output.dense")
        return [(module, 3 if name.endswith("c_attn") else 1)
                for name, module in self.hf.named_modules() if name.endswith(ends)]

    def convert(self, attention, feature_dim=0, stage=""):
        """Puts what `attention` names (GPTConfig.attention) into the layers, maps as they start."""
        self.stage = stage
        self.config = replace(self.config, attention=attention, feature_dim=feature_dim)
        device = next(self.hf.parameters()).device
        for layer, name in zip(self.attention_layers(), self.config.attentions):
            layer.mix = make_mix(name, self.config).to(device)
        self.describe()
        return self

    def describe(self):
        """Into transformers' config: load() finds here what save_pretrained leaves out, too."""
        self.hf.config.hedgehog = {"attention": self.config.attention,
                                   "feature_dim": self.config.feature_dim, "stage": self.stage}

    def inputs(self, idx, key_mask):
        if self.hf.main_input_name == "pixel_values":
            return {"pixel_values": idx}
        inputs = {"input_ids": idx, "attention_mask": key_mask}
        sep = getattr(self.tokenizer, "sep_token_id", None)
        if self.hf.config.model_type == "bert" and sep is not None:
            ends = (idx == sep).long()                      # which of two sentences a token is of
            inputs["token_type_ids"] = (ends.cumsum(-1) - ends).clamp(max=1)
        if self.config.causal:
            inputs["use_cache"] = False
        return inputs

    def hidden(self, idx, key_mask=None):
        return self.hf.base_model(**self.inputs(idx, key_mask))[0], []

    def forward(self, idx, targets=None, key_mask=None):
        """GPT.forward. With targets a causal model's padding has to be on the right."""
        if targets is not None and self.config.causal:
            key_mask = None             # no token sees what is on its right; kernels take no mask
            if self.training:
                weight = self.hf.get_output_embeddings().weight
                return None, linear_cross_entropy(self.hidden(idx)[0], weight, targets, len(weight))
        logits = self.hf(**self.inputs(idx, key_mask)).logits
        if targets is None:
            return logits, None
        return logits, functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten(),
                                                ignore_index=-1)

    def check_length(self, length):
        if length > self.config.block_size:
            raise ValueError(f"--block-size {length}: the model has positions up to "
                             f"{self.config.block_size}, give a smaller one")

    parameter_groups = GPT.parameter_groups

    def recompute_activations(self):
        self.hf.gradient_checkpointing_enable({"use_reentrant": False})

    def save(self, folder):
        """A checkpoint of the model's family, which transformers opens as the softmax model, and
        beside it hedgehog.safetensors with the maps. A folder of such a one is replaced as a whole,
        with all that is in it; one with other files is a ValueError."""
        from safetensors.torch import save_file

        folder = Path(folder).resolve()
        if folder.exists() and not (folder / "hedgehog.safetensors").exists() and (
                not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} holds something else: give another folder")
        part, old = (folder.with_name(f"{folder.name}.{x}-{os.getpid()}") for x in ("part", "old"))
        self.describe()
        maps = {f"{i}.{name}": x.contiguous() for i, layer in enumerate(self.attention_layers())
                for name, x in layer.mix.state_dict().items()}
        try:
            self.hf.save_pretrained(part, state_dict={
                name: x for name, x in self.hf.state_dict().items() if ".mix." not in name})
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(part)
            save_file(maps, part / "hedgehog.safetensors")
            if folder.exists():
                folder.rename(old)
            part.rename(folder)
        finally:
            if old.exists() and not folder.exists():        # between the two renames
                old.rename(folder)
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def load(name, kind="CausalLM", device="cpu", labels=(), **options):
    """A transformers model by name, folder or GGUF file as a HuggingFace; with the maps, if save()
    wrote them. kind: what follows AutoModelFor; labels: names of the classes that a classifier is
    to have; options: from_pretrained's. ValueErrors say what cannot be loaded."""
    path, auto = Path(name), getattr(transformers, f"AutoModelFor{kind}")
    if labels:                                              # a head of another size starts anew
        options |= {"id2label": dict(enumerate(labels)), "ignore_mismatched_sizes": True,
                    "label2id": {label: i for i, label in enumerate(labels)}}
    if not path.exists() and len(path.parts) > 2:           # no model has such a name
        raise ValueError(f"there is no folder or file {name}")
    try:
        if path.suffix == ".gguf":
            model, tokenizer, missing = load_gguf(path)
        else:
            model, info = auto.from_pretrained(name, output_loading_info=True,
                                               **{"dtype": torch.float32, **options})
            missing = info["missing_keys"]                  # these weights are random numbers
            if any(".mix." in key for key in info["unexpected_keys"]):
                raise ValueError("it was converted, but not saved by HuggingFace.save")
            processor = transformers.AutoImageProcessor if kind == "ImageClassification" else (
                transformers.AutoTokenizer)
            tokenizer = processor.from_pretrained(name)
    except Exception as e:                                  # transformers raises many kinds
        here = "" if path.exists() else "no folder or file here, and "
        raise ValueError(f"{name} is {here}not to be had as a model of transformers ("
                         f"{(str(e).strip() or repr(e)).splitlines()[0][:200]})")
    words = model.get_input_embeddings()
    if isinstance(words, nn.Embedding) and len(tokenizer) > words.num_embeddings:
        raise ValueError(f"{name}: the tokenizer has {len(tokenizer)} tokens, the model "
                         f"{words.num_embeddings}")
    model = HuggingFace(model, tokenizer).to(device)
    if kind == "CausalLM" and not model.config.causal:
        raise ValueError(f"{name} sees the tokens that it should predict: an encoder is for --task "
                         'or kind="SequenceClassification"')
    if kind == "CausalLM" and missing:
        raise ValueError(f"{name}: weights are missing: {', '.join(sorted(missing)[:3])}")
    settings = getattr(model.hf.config, "hedgehog", None)
    if settings:
        from safetensors.torch import load_file

        try:
            model.convert(**settings)
            learned = any(layer.mix.state_dict() for layer in model.attention_layers())
            maps = load_file(path / "hedgehog.safetensors") if learned else {}
            for i, layer in enumerate(model.attention_layers()):
                layer.mix.load_state_dict({key.split(".", 1)[1]: x for key, x in maps.items()
                                           if key.split(".", 1)[0] == str(i)})
        except Exception as e:                              # damaged, or of another model
            raise ValueError(f"{path / 'hedgehog.safetensors'} does not hold this model's maps "
                             f"({str(e).splitlines()[0][:200]})")
    return model.eval()


def load_gguf(path):
    """Model, its weights as fp32, and tokenizer of a GGUF file (Llama's architecture), and the
    names of the weights that it has not."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model,
                                   torch_dtype=torch.float32)["tensors"]
    missing = set(model.load_state_dict(weights, strict=False).missing_keys) - {"lm_head.weight"}
    return model, tokenizer, missing


def encoding(tokenizer):
    """The tokenizer as tasks.tokenise wants one."""
    if len(tokenizer) < 2:                                  # transformers' for a folder without one
        raise ValueError(f"{tokenizer.name_or_path} has no tokenizer: save one in that folder")
    return SimpleNamespace(
        name=Path(tokenizer.name_or_path or "tokenizer").name, n_vocab=len(tokenizer),
        fingerprint=(tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast
                     else sorted(tokenizer.get_vocab().items())),
        encode_ordinary_batch=lambda texts: tokenizer(  # verbose: no, they are not too long
            texts, add_special_tokens=False, verbose=False)["input_ids"])


# --- GPT-2 as the project's own GPT ---------------------------------------------------------------


def copy_gpt2(own, theirs, back=False):
    """Copies the weights of transformers' GPT2LMHeadModel into a GPT, or back."""
    pairs = {"wte": "wte", "wpe": "wpe", "ln_f": "ln_f"}
    for i in range(own.config.n_layer):
        for ours, name in (("ln_1", "ln_1"), ("ln_2", "ln_2"), ("attn.qkv", "attn.c_attn"),
                           ("attn.proj", "attn.c_proj"), ("mlp.0", "mlp.c_fc"),
                           ("mlp.2", "mlp.c_proj")):
            pairs[f"blocks.{i}.{ours}"] = f"h.{i}.{name}"
    for a, b in pairs.items():
        a, b = own.get_submodule(a), theirs.transformer.get_submodule(b)
        for name, x in a.named_parameters():
            y = getattr(b, name)
            y = y.T if "Conv1D" in type(b).__name__ and name == "weight" else y  # (in, out) there
            x = x[:len(y)]                                  # ours has more tokens, that never come
            with torch.no_grad():
                y.copy_(x) if back else x.copy_(y)


def own_gpt(name):
    """GPT.from_pretrained (gpt.py)."""
    model = load(name)
    c, defaults = model.hf.config, transformers.GPT2Config()
    if c.model_type != "gpt2" or c.n_inner not in (None, 4 * c.n_embd) or any(
            getattr(c, key) != getattr(defaults, key) for key in (
                "activation_function", "layer_norm_epsilon", "scale_attn_weights",
                "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")):
        raise ValueError(f"{name} is a {c.model_type}, but not one with GPT-2's own settings")
    own = GPT(GPTConfig(vocab_size=c.vocab_size, block_size=c.n_positions, n_layer=c.n_layer,
                        n_head=c.n_head, n_embd=c.n_embd, dropout=c.resid_pdrop,
                        attention=model.config.attention, feature_dim=model.config.feature_dim))
    copy_gpt2(own, model.hf)
    for block, layer in zip(own.blocks, model.attention_layers()):
        block.attn.mix.load_state_dict(layer.mix.state_dict())
    return own


def export(own, folder):
    """GPT.export (gpt.py)."""
    c = own.config
    if c.position != "learned" or c.num_classes or not c.causal:
        raise ValueError("only a causal language model with learned positions is a GPT-2")
    model = HuggingFace(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, embd_pdrop=c.dropout, resid_pdrop=c.dropout, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None)))
    copy_gpt2(own, model.hf, back=True)
    model.convert(c.attention, c.feature_dim)
    for block, layer in zip(own.blocks, model.attention_layers()):
        layer.mix.load_state_dict(block.attn.mix.state_dict())
    model.save(folder)
