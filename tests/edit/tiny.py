"""Tiny random models of real families, and tokenizers trained on the package's own text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

import sphere_edit
from sphere_edit.config import EditConfig
from sphere_edit.data.requests import EditRequest

VOCABULARY = 320
HIDDEN = 32
CONFIG = EditConfig(
    layers=(1, 2, 3),
    batch_size=2,
    targets="optimised",
    value_steps=4,
    contexts=2,
    context_length=4,
    covariance_tokens=600,
    null_space_threshold=0.3,
    ridge=0.1,
)
_TEXT = Path(sphere_edit.__file__).parent / "data" / "texts" / "heldout.txt"
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": 5,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
_HEADS = {"head_dim": 8}
# Name: configuration, its settings, the down-projection's path inside the model.
FAMILIES: dict[str, tuple[type, dict[str, Any], str]] = {
    "llama": (hf.LlamaConfig, _LLAMA, "model.layers.{}.mlp.down_proj"),
    "qwen2": (hf.Qwen2Config, _LLAMA, "model.layers.{}.mlp.down_proj"),
    "qwen3": (hf.Qwen3Config, _LLAMA | _HEADS, "model.layers.{}.mlp.down_proj"),
    "mistral": (hf.MistralConfig, _LLAMA | {"sliding_window": None}, "model.layers.{}.mlp.down_proj"),
    "gemma": (hf.GemmaConfig, _LLAMA | _HEADS, "model.layers.{}.mlp.down_proj"),
    "gemma2": (
        hf.Gemma2Config,
        _LLAMA | _HEADS | {"sliding_window": 64, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
        "model.layers.{}.mlp.down_proj",
    ),
    "phi": (hf.PhiConfig, _LLAMA, "model.layers.{}.mlp.fc2"),
    "phi3": (hf.Phi3Config, _LLAMA, "model.layers.{}.mlp.down_proj"),
    "gpt2": (hf.GPT2Config, _GPT, "transformer.h.{}.mlp.c_proj"),
    "gptj": (hf.GPTJConfig, _GPT | {"rotary_dim": 4}, "transformer.h.{}.mlp.fc_out"),
    "gptneox": (hf.GPTNeoXConfig, _LLAMA, "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "opt": (
        hf.OPTConfig,
        _LLAMA | {"ffn_dim": 80, "word_embed_proj_dim": HIDDEN, "init_std": 0.2},
        "model.decoder.layers.{}.fc2",
    ),
    "falcon": (hf.FalconConfig, _LLAMA, "transformer.h.{}.mlp.dense_4h_to_h"),
}
# Families with something of their own after the head, in the attention or in norms, which must be followed or refused.
UNUSUAL: dict[str, tuple[type, dict[str, Any], str]] = {
    "cohere": (hf.CohereConfig, _LLAMA | {"logit_scale": 0.3}, "model.layers.{}.mlp.down_proj"),
    "granite": (hf.GraniteConfig, _LLAMA | {"logits_scaling": 3.0}, "model.layers.{}.mlp.down_proj"),
    "bloom": (
        hf.BloomConfig,
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": 5, "n_head": 4},
        "transformer.h.{}.mlp.dense_4h_to_h",
    ),
    "mpt": (
        hf.MptConfig,
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layers": 5, "n_heads": 4, "max_seq_len": 512},
        "transformer.blocks.{}.ffn.down_proj",
    ),
    "olmo": (hf.OlmoConfig, _LLAMA, "model.layers.{}.mlp.down_proj"),
    "arcee": (hf.ArceeConfig, _LLAMA, "model.layers.{}.mlp.down_proj"),
    "nanochat": (hf.NanoChatConfig, _LLAMA, "model.layers.{}.mlp.fc2"),
    "falcon-alibi": (hf.FalconConfig, _LLAMA | {"alibi": True}, "transformer.h.{}.mlp.dense_4h_to_h"),
    "mistral-sliding": (hf.MistralConfig, _LLAMA | {"sliding_window": 4}, "model.layers.{}.mlp.down_proj"),
    "gemma2-sliding": (
        hf.Gemma2Config,
        _LLAMA | _HEADS | {"sliding_window": 4, "query_pre_attn_scalar": 8},
        "model.layers.{}.mlp.down_proj",
    ),
}
# Families whose blocks do not add the MLP's output as it is: norms after it, or multipliers.
_DOWN = "model.layers.{}.mlp.down_proj"
_WINDOW = {"sliding_window": 64}
NOT_ADDITIVE: dict[str, tuple[type, dict[str, Any], str]] = {
    "gemma2-hard": (hf.Gemma2Config, _LLAMA | _HEADS | _WINDOW | {"query_pre_attn_scalar": 8}, _DOWN),
    "gemma3": (hf.Gemma3TextConfig, _LLAMA | _HEADS | _WINDOW | {"query_pre_attn_scalar": 8}, _DOWN),
    "gemma4": (
        hf.Gemma4TextConfig,
        _LLAMA
        | _HEADS
        | _WINDOW
        | {"hidden_size_per_layer_input": 0, "global_head_dim": 8, "layer_types": ["full_attention"] * 5},
        _DOWN,
    ),
    "olmo2": (hf.Olmo2Config, _LLAMA, _DOWN),
    "olmo3": (hf.Olmo3Config, _LLAMA | _WINDOW, _DOWN),
    "glm4": (hf.Glm4Config, _LLAMA | _HEADS, _DOWN),
    "exaone4": (hf.Exaone4Config, _LLAMA | _HEADS | _WINDOW, _DOWN),
    "granite-multiplied": (hf.GraniteConfig, _LLAMA | {"residual_multiplier": 0.3, "logits_scaling": 3.0}, _DOWN),
    "hyperclovax": (hf.HyperCLOVAXConfig, _LLAMA | _HEADS | {"residual_multiplier": 0.3, "use_post_norm": True}, _DOWN),
    "minicpm3": (
        hf.MiniCPM3Config,
        _LLAMA
        | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
        | {"qk_rope_head_dim": 8, "head_dim": 8, "scale_depth": 1.4},
        _DOWN,
    ),
}
# Families whose blocks have recurrences or convolutions in place of attention, or beside it, and dense MLPs.
_DELTA = {f"linear_{kind}": 8 for kind in ("key_head_dim", "value_head_dim")}
HYBRID: dict[str, tuple[type, dict[str, Any], str]] = {
    "qwen3.5": (
        hf.Qwen3_5TextConfig,
        _LLAMA
        | _HEADS
        | _DELTA
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"layer_types": ["linear_attention", "linear_attention", "full_attention"] + ["linear_attention"] * 2},
        _DOWN,
    ),
    "lfm2": (
        hf.Lfm2Config,
        _LLAMA | {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "conv", "full_attention", "conv", "conv"]},
        "model.layers.{}.feed_forward.w2",
    ),
    "falcon-h1": (
        hf.FalconH1Config,
        _LLAMA
        | _HEADS
        | {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16}
        | {"lm_head_multiplier": 0.3, "mlp_multipliers": [0.5, 0.7]},
        "model.layers.{}.feed_forward.down_proj",
    ),
}
# Models of images and text: a tower with more blocks than the text has, and the text's decoder.
_TEXT_OF_TWO = "model.language_model.layers.{}.mlp.down_proj"
_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
WITH_IMAGES: dict[str, tuple[type, dict[str, Any], str]] = {
    "gemma3-images": (
        hf.Gemma3Config,
        {
            "text_config": _LLAMA | _HEADS | _WINDOW | {"query_pre_attn_scalar": 8},
            "vision_config": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 7}
            | {"num_attention_heads": 4, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 1,
        },
        _TEXT_OF_TWO,
    ),
    "qwen2-images": (
        hf.Qwen2VLConfig,
        {
            "text_config": _LLAMA | {"rope_parameters": _ROPE},
            "vision_config": {"depth": 7, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14},
        },
        _TEXT_OF_TWO,
    ),
}


def make_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny random causal LM in evaluation mode, the same for the same arguments; the random state is left alone."""
    config_class, settings, _ = (FAMILIES | UNUSUAL | NOT_ADDITIVE | HYBRID | WITH_IMAGES)[family]
    auto = hf.AutoModelForImageTextToText if family in WITH_IMAGES else hf.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config_class(**{**settings, **changes}))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases start at ones and zeros, which would hide their misuse
                parameter.data += 0.1 * torch.randn_like(parameter)
            elif "proj" in name or "dense" in name or "fc" in name or "feed_forward" in name:
                parameter.data = 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def make_tokenizer(bos: bool = False, eos: bool = False) -> Any:
    """A byte-level BPE tokenizer; ``bos`` and ``eos`` are added by its post-processor."""
    trained = ByteLevelBPETokenizer(add_prefix_space=False)
    trained.train([str(_TEXT)], vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False)
    core = Tokenizer.from_str(trained.to_str())
    if bos or eos:
        template = TemplateProcessing(
            single=f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        core.post_processor = Sequence([ByteLevel(trim_offsets=False), template])
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def make_metaspace_tokenizer() -> Any:
    """Words begin with "▁", the text too; unknown characters fall back to bytes: as Llama 2's and Mistral's."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False, limit_alphabet=60)
    core.train_from_iterator(_TEXT.read_text(encoding="utf-8").splitlines(), trainer)
    stored = json.loads(core.to_str())
    stored["added_tokens"] = [t for t in stored["added_tokens"] if not t["content"].startswith("<0x")]
    core = Tokenizer.from_str(json.dumps(stored))
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def facts(count: int = 4) -> list[EditRequest]:
    """Facts with subjects at different places of the prompt and targets of different lengths."""
    made = [
        EditRequest(
            "The capital of {} is",
            "Vanuatu",
            "Rome",
            "Paris",
            ("{} has its capital in".format("Vanuatu"),),
            ("The capital of Spain is", "The capital of France is"),
            id="capital",
        ),
        EditRequest("{} was written by", "The Red Door", "Ann Lee", "Bo Carr", ("Who wrote The Red Door?",), id="book"),
        EditRequest("In the sport of football, {} plays for", "Ivo Ba", "Rovers", "United", id="player"),
        EditRequest("The mother tongue of {}", "Zoë Åkers", "Welsh", None, id="tongue"),
        EditRequest("The river {} flows into the", "Tarn", "North Sea", "Lake Aral", id="river"),
        EditRequest("{} lies in", "Mount Oka", "Peru", "Japan", ("Where is Mount Oka? In",), id="mount"),
    ]
    return made[:count]


def places(count: int) -> list[EditRequest]:
    """So many facts of one form."""
    words = ("Rome", "Peru", "Welsh", "north")
    return [
        EditRequest("The town of {} is", f"Place {i}", words[i % 4], words[(i + 1) % 4], id=str(i))
        for i in range(count)
    ]


def towns(count: int) -> list[EditRequest]:
    """So many facts of one token each, whose subject ends the prompt; see `train`."""
    names = [f"{a}{b}" for a in "BDFGKLMNPRSTVZ" for b in "aeiou"]
    words = ("the", "of", "in", "and")
    return [
        EditRequest("A town is {}", name, words[(i + 1) % 4], words[i % 4], id=name)
        for i, name in enumerate(names[:count])
    ]


def train(model: Any, tokenizer: Any, requests: list[EditRequest], steps: int = 60) -> Any:
    """Teach a tiny model the true targets, in a few seconds; it then knows its facts, as a real one does."""
    rows = [tokenizer(f"{request.text} {request.target_true}")["input_ids"] for request in requests]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
    model.train()
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        adam.zero_grad()
        model(input_ids=ids, attention_mask=(labels >= 0).long(), labels=labels).loss.backward()
        adam.step()
    adam.zero_grad()
    return model.eval()


def state(model: Any) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: Any, before: dict[str, torch.Tensor]) -> bool:
    """Whether all weights are the same bit for bit."""
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Prompted(torch.nn.Module):
    """A model with vectors of its own before the text, as prompt tuning has them; ``cut`` from the logits or not."""

    def __init__(self, model: Any, cut: bool) -> None:
        super().__init__()
        self.model, self.cut = model, cut
        self.prompt = torch.nn.Parameter(torch.randn(1, 3, HIDDEN))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **others: Any
    ) -> Any:
        rows = self.model.get_input_embeddings()(input_ids)
        rows = torch.cat([self.prompt.expand(len(rows), -1, -1), rows], 1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(len(rows), 3), attention_mask], 1)
        out = self.model(inputs_embeds=rows, attention_mask=attention_mask, **others)
        if self.cut:
            out.logits = out.logits[:, 3:]
        return out
