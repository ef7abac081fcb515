"""GGUF files of tiny transformers models, written as llama.cpp's converter lays them out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
from numpy.typing import NDArray
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import PreTrainedModel

# transformers' names of what llama.cpp calls otherwise.
NAMES = {
    "gemma3_text": "gemma3", "cohere": "command-r", "mistral": "llama", "mixtral": "llama",
    "gpt_neox": "gptneox", "gpt_oss": "gpt-oss", "hunyuan_v1_dense": "hunyuan-dense",
    "phi": "phi2", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
}  # fmt: skip
PERMUTED = ("llama", "granite", "granitemoe", "smollm3")
LOWERED = ("gemma", "gemma2", "gemma3")
FLAT = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")  # of GPT-2


def write(
    model: PreTrainedModel,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    tokenizer: Tokenizer | None = None,
    extra: dict[str, float | NDArray[np.float32]] | None = None,
) -> Path:
    """Write a model, its matrices in a type of ggml's.

    Args:
        extra: arrays become tensors, numbers values of the architecture.
    """
    config = model.config
    name = NAMES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, name)
    _describe(writer, config, name)
    if tokenizer is not None:
        vocabulary(writer, tokenizer)
    arch = next(key for key, said in gguf.MODEL_ARCH_NAMES.items() if said == name)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for full, parameter in model.state_dict().items():
        stem, _, suffix = full.rpartition(".")
        if tied and stem == "lm_head":
            continue
        held = _of_experts(full, parameter.numpy(), config.model_type)
        if held:
            for theirs, array in held.items():
                _add(writer, theirs, array, kind)
            continue
        stem = stem.replace("block_sparse_moe.router", "block_sparse_moe.router.layer")
        theirs = f"{known.get_name(stem)}.{suffix}"
        if suffix == "sinks":
            theirs = f"{known.get_name(full)}.weight"
        _add(writer, theirs, _laid_out(parameter.numpy(), theirs, name, config), kind)
    for theirs, value in (extra or {}).items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(theirs, value)
        elif isinstance(value, float):
            writer.add_float32(f"{name}.{theirs}", value)
        else:
            writer.add_uint32(f"{name}.{theirs}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _of_experts(
    name: str, array: NDArray[np.float32], model_type: str
) -> dict[str, NDArray[np.float32]]:
    """The tensors of all experts of a layer, which the model holds in fewer; none for others."""
    found = re.fullmatch(r"model\.layers\.(\d+)\..*experts\.(gate_up|down)_proj(_bias)?", name)
    if found is None:
        return {}
    layer, which, is_bias = f"blk.{found[1]}", found[2], found[3] is not None
    if model_type == "gpt_oss" and not is_bias:
        array = array.swapaxes(1, 2)
    suffix = "bias" if is_bias else "weight"
    if which == "down":
        return {f"{layer}.ffn_down_exps.{suffix}": np.ascontiguousarray(array)}
    if model_type == "gpt_oss":
        gate, up = array[:, ::2], array[:, 1::2]
    else:
        gate, up = np.split(array, 2, axis=1)
    return {
        f"{layer}.ffn_gate_exps.{suffix}": np.ascontiguousarray(gate),
        f"{layer}.ffn_up_exps.{suffix}": np.ascontiguousarray(up),
    }


def _laid_out(
    array: NDArray[np.float32], theirs: str, name: str, config: Any
) -> NDArray[np.float32]:
    role = theirs.split(".", 2)[-1]
    if name in PERMUTED and role in ("attn_q.weight", "attn_k.weight"):
        heads = config.num_attention_heads if "_q" in role else config.num_key_value_heads
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        array = halves.swapaxes(1, 2).reshape(array.shape)
    if name in LOWERED and theirs.endswith("_norm.weight"):
        array = array + 1
    if name == "gpt2" and role in FLAT:
        array = array.T
    if name == "gptneox" and "attn_qkv" in role:
        heads = array.reshape(config.num_attention_heads, 3, -1, *array.shape[1:])
        array = heads.swapaxes(0, 1).reshape(array.shape)
    if role == "ffn_gate_inp_shexp.weight":
        array = array[0]
    return np.ascontiguousarray(array)


def _add(
    writer: gguf.GGUFWriter,
    name: str,
    array: NDArray[np.float32],
    kind: gguf.GGMLQuantizationType,
) -> None:
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if array.ndim < 2 or array.shape[-1] % block or kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, array)
    else:
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)


def _describe(writer: gguf.GGUFWriter, config: Any, name: str) -> None:
    """Write the values of each architecture, as llama.cpp's converter does."""
    said = config.to_dict()
    rope = said.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(said.get("intermediate_size") or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if name not in ("gpt2", "gptneox"):
        writer.add_head_count_kv(config.num_key_value_heads)
    if name != "gpt2":
        size = said.get("head_dim") or config.hidden_size // config.num_attention_heads
        part = rope.get("partial_rotary_factor") or 1.0
        writer.add_rope_dimension_count(int(part * size))
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope.get("rope_type") == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if said.get("head_dim"):
            writer.add_key_length(size)
            writer.add_value_length(size)
    eps = next((said[n] for n in ("rms_norm_eps",) if n in said), None)
    if eps is not None:
        writer.add_layer_norm_rms_eps(eps)
    else:
        names = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
        writer.add_layer_norm_eps(next(said[n] for n in names if n in said))
    if name in ("gemma2", "gemma3", "phi3", "exaone4", "gpt-oss") and said.get("sliding_window"):
        writer.add_sliding_window(said["sliding_window"])
    if name == "gemma2":
        writer.add_attn_logit_softcapping(said["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(said["final_logit_softcapping"])
    if name in ("granite", "granitemoe"):
        writer.add_attention_scale(said["attention_multiplier"])
        writer.add_embedding_scale(said["embedding_multiplier"])
        writer.add_residual_scale(said["residual_multiplier"])
        writer.add_logit_scale(said["logits_scaling"])
    if name == "command-r":
        writer.add_logit_scale(said["logit_scale"])
    if name in ("stablelm", "gptneox"):
        writer.add_parallel_residual(said["use_parallel_residual"])
    if name == "exaone4" and said.get("sliding_window"):
        writer.add_sliding_window_pattern([k == "sliding_attention" for k in said["layer_types"]])
    experts = said.get("num_local_experts") or said.get("num_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if name in ("qwen2moe", "qwen3moe"):
        writer.add_expert_feed_forward_length(said["moe_intermediate_size"])
    if name == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(said["shared_expert_intermediate_size"])
    if name == "gpt-oss":
        writer.add_expert_feed_forward_length(said["intermediate_size"])


def vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer, pre: str = "gpt-2") -> None:
    """A byte-level BPE."""
    held = json.loads(tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = {one["content"] for one in held["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    merges = held["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def sentence_pieces(path: Path, prefixed: bool) -> tuple[Path, Any]:
    """A file with a vocabulary of SentencePiece's kind alone, and the library's processor of it."""
    words = ["▁the", "▁quick", "▁", "th", "he", "▁t", "qu", "ick", "ui", "▁q", "br", "own", "▁br"]
    words += ["ow", "n", "▁brown", "the", "▁a", "12", "▁▁", "ck", "ic"]
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [("[tag]", 0.0, 4)]
    pieces += [(word, -float(number), 1) for number, word in enumerate(words) if len(word) > 1]
    pieces += [(letter, -1000.0, 1) for letter in "▁abcdefghiklmnopqrstuvw123.é"]
    proto = sentencepiece_model_pb2.ModelProto()
    for text, score, kind in pieces:
        piece = proto.pieces.add()
        piece.piece, piece.score, piece.type = text, score, kind
    trainer, normal = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = 2, True, len(pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normal.name, normal.add_dummy_prefix = "identity", prefixed
    normal.remove_extra_whitespaces, normal.escape_whitespaces = False, True
    made = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(prefixed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path, made
