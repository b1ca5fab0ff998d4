"""Every model type that transformers loads as a causal LM: built tiny, checked for editing, and edited.

Weights are random. The census edits two facts in the closed loop with SPHERE. Then whole forward passes, which share no
code with the loop, must agree with the editor, only the edited maps may have changed, and the revert must be exact.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import traceback
import warnings
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sphere_edit.config import EditConfig
from sphere_edit.data.requests import EditRequest
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.model.structure import StructureError, find_structure

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/edit"))
import plain  # noqa: E402  (from the tests: whole forward passes)
import tiny  # noqa: E402

SECONDS, PARAMETERS = 240, 5_000_000
FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# The edited token itself predicts a target of one token: random weights can learn this.
_FACTS = [
    EditRequest("The mother tongue of {}", "Zoë Åkers", "the", id="tongue"),
    EditRequest("All that is known of {}", "Vanuatu", "in", id="known"),
]
_CONFIG = EditConfig(
    layers=(1, 2, 3),
    batch_size=2,
    contexts=0,
    covariance_tokens=600,
    null_space_threshold=1e6,
    ridge=1e-5,
    loop_rounds=30,
    loop_step=10.0,
    loop_arithmetic="model",
)
_SIZES = {
    tiny.VOCABULARY: "vocab_size",
    tiny.HIDDEN: "hidden_size n_embd d_model dim embedding_size word_embed_proj_dim",
    5: "num_hidden_layers n_layer n_layers num_layers decoder_layers",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "n_routed_experts num_local_experts moe_num_experts num_global_key_value_heads",
    2: "num_key_value_heads num_experts_per_tok moe_topk moe_k top_k num_experts_per_token",
    8: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels global_head_dim swa_head_dim swa_v_head_dim "
    "linear_key_head_dim linear_value_head_dim index_head_dim mamba_head_dim",
    80: "intermediate_size ffn_dim n_inner d_ff dff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size",
    40: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size",
    512: "max_position_embeddings n_positions max_seq_len max_sequence_length",
    16: "q_lora_rank kv_lora_rank",
    1: "n_group topk_group n_groups",
    64: "sliding_window attention_window_size",
}
_SMALL: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()}
_SMALL |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_DERIVED = ("head_dim", "num_key_value_heads")  # None: derived from the other settings
_MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16}
# Further settings of some families, which must agree with the small sizes and with one another.
_OWN: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "mamba2": {"head_dim": 16},
    "reformer": {"is_decoder": True},
    "gemma4_text": {"hidden_size_per_layer_input": 0, "layer_types": ["full_attention"] * 5},
    "bamba": {"attn_layer_indices": [2], **_MAMBA, "mamba_expand": 2},
    "falcon_h1": _MAMBA,
    "gpt_neo": {"attention_types": [[["global"], 5]]},
    "granitemoehybrid": {"num_local_experts": 0, "shared_intermediate_size": 80, "mamba_n_heads": 4}
    | {"layer_types": ["full_attention"] * 5},
}


def small(family: str, kind: type | None = None) -> Any:
    """A family's settings with small sizes, also for the text model, if any."""
    kind = kind or CONFIG_MAPPING[family]
    default = kind()
    known = set(default.to_dict()) | set(getattr(kind, "attribute_map", {}))
    given = {name for name in known & _SMALL.keys() if _is_set(default, name) or name in _DERIVED}
    settings = {name: _SMALL[name] for name in given | {"bos_token_id", "eos_token_id", "pad_token_id"}}
    if "kv_lora_rank" in known:  # each head has its own keys
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    if getattr(default, "text_config", None) is not None:
        settings["text_config"] = small(family, type(default.text_config))
        return kind(**settings)
    return kind(**settings | _OWN.get(family, {}))


def _is_set(config: Any, name: str) -> bool:
    try:
        return getattr(config, name) is not None
    except RuntimeError:  # settings that differ from layer to layer
        return True


def build(family: str) -> Any:
    """A tiny random model of a family, with every norm and bias set.

    Raises:
        ValueError: the model has more than `PARAMETERS` parameters in spite of small sizes.
        Exception: any error of the family's own code, while it is built or reads five tokens.
    """
    config = small(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in hf.AutoModelForCausalLM.from_config(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size:,} parameters with small sizes, expected at most {PARAMETERS:,}")
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        scale = 0.1 if parameter.ndim == 1 else 0.2
        parameter.data = (parameter.data if parameter.ndim == 1 else 0) + scale * torch.randn_like(parameter)
    with torch.no_grad():
        model(input_ids=torch.arange(5, 10)[None])
    return model


def look(family: str) -> dict[str, Any]:
    """The outcome for one family: ``edited``, ``refused``, ``not built`` or ``failed``, and the reason."""
    try:
        model = build(family)
    except Exception as error:
        return {"family": family, "outcome": "not built", "why": _line(error)}
    row: dict[str, Any] = {"family": family, "class": type(model).__name__}
    try:
        structure = find_structure(model)
        row["map"] = structure.down[1].name.replace(".1.", ".{}.", 1)
        return row | {"outcome": "edited", **edit(model)}
    except StructureError as error:
        return row | {"outcome": "refused", "why": _line(error)}
    except Exception as error:
        traceback.print_exc()
        return row | {"outcome": "failed", "why": _line(error)}


def edit(model: Any) -> dict[str, Any]:
    """Edit two facts; returns the figures of the editor and of whole forward passes."""
    tokenizer, before = tiny.make_tokenizer(), tiny.state(model)
    with torch.no_grad():
        first = plain.target_nll(model, tokenizer, _FACTS)
    with tempfile.TemporaryDirectory() as cache:
        editor = SphereEditor(model, tokenizer, _CONFIG, cache=Path(cache))
        events = editor.edit(_FACTS).events
    told = next(event for event in events if event["event"] == "batch")
    with torch.no_grad():
        found = plain.target_nll(model, tokenizer, _FACTS)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    maps = {f"{editor.structure.down[layer].name}.weight" for layer in _CONFIG.layers}
    editor.revert()
    return {
        "nll_before": round(float(first.mean()), 4),
        "nll_told": round(told["nll"], 4),
        "nll_found": round(float(found.mean()), 4),
        "learned": told["learned"],
        "only_its_maps": changed == maps,
        "reverted": tiny.same(model, before),
    }


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, StructureError) else f"{type(error).__name__}: {text}"


def apart(family: str) -> dict[str, Any]:
    """`look` in a separate process, so that a crash or an endless loop ends nothing else."""
    context = get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(family, there))
    process.start()
    there.close()
    try:
        row: dict[str, Any] = here.recv()
    except EOFError:
        process.join()
        row = {"family": family, "outcome": "failed", "why": f"its process ended with {process.exitcode}"}
    process.join()
    return row


def _child(family: str, out: Connection) -> None:
    signal.alarm(SECONDS)
    warnings.filterwarnings("ignore")
    hf.logging.set_verbosity_error()
    out.send(look(family))
