"""Attention of every kind through one node: sizes, own code, own positions, masks and biases."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import ragged
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fastgen import CausalLM
from fastgen.errors import UnsupportedModel
from fastgen.export import export
from fastgen.export.torch_model import source
from fastgen.export.trace import attention, graph, hooks, sparse

NEW = 16
LENGTHS = (3, 11, 40)  # of rows: some window, chunk or prompt ends within them

_IDS = {"vocab_size": tiny.VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MLA = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 12, "num_key_value_heads": 4, "first_k_dense_replace": 2}  # fmt: skip
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
         "encoder_layers": 2, "max_position_embeddings": 128}  # fmt: skip

# What is particular of each, its type and its configuration.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "heads of 20": ("llama", {"head_dim": 20}),
    "MLA": ("deepseek_v3", _MLA),
    "MLA, complex rotation": ("deepseek_v2", _MLA),
    "_attn, rotation": ("gptj", {**_GPT, "rotary_dim": 4}),
    "_attn, heads in four parts": ("codegen", {**_GPT, "n_ctx": 128, "rotary_dim": 4}),
    "_attn, windows, no scale": ("gpt_neo", {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48,
        "attention_types": [[["global", "local"], 1]], "window_size": 8,
        "max_position_embeddings": 128}),
    "_attn, no cache": ("openai-gpt", _GPT),
    "torch's attention": ("falcon", {**_SMALL, "alibi": False}),
    "torch's attention, ALiBi": ("falcon", {**_SMALL, "alibi": True, "multi_query": False}),
    "ALiBi, 6 heads": ("bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "ALiBi from the end": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4,
                                   "max_seq_len": 256}),
    "heads as bert's": ("megatron-bert", {
        **_SMALL, "intermediate_size": 48, "is_decoder": True, "max_position_embeddings": 128}),
    "heads as bart's, positions that grow": ("xglm", {
        "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48,
        "max_position_embeddings": 128}),
    "positions from generate": ("roberta", {
        **_SMALL, "intermediate_size": 48, "is_decoder": True, "max_position_embeddings": 128}),
    "positions of its own": ("bart", _BART),
    "waves of its own": ("marian", _BART),
    "chunks": ("llama4_text", {"head_dim": 8, "num_local_experts": 1, "moe_layers": [],
                               "attention_chunk_size": 8, "intermediate_size_mlp": 48,
                               "no_rope_layers": [1, 0]}),
    "one write, two attentions": ("diffllama", {}),
    "keys that layers share": ("gemma4_text", {
        "head_dim": 16, "global_head_dim": 16, "sliding_window": 8, "num_kv_shared_layers": 1,
        "layer_types": ["full_attention"] * 2, "vocab_size_per_layer_input": tiny.VOCAB,
        "hidden_size_per_layer_input": 8}),
    "rotations for one row of positions": ("roformer", {
        **_SMALL, "intermediate_size": 48, "is_decoder": True, "max_position_embeddings": 128}),
}  # fmt: skip

# One for each mechanism; the others, which share them, with -m slow.
QUICK = (
    "heads of 20", "MLA", "_attn, windows, no scale", "torch's attention, ALiBi", "ALiBi, 6 heads",
    "heads as bert's", "positions of its own", "chunks", "one write, two attentions",
    "keys that layers share",
)  # fmt: skip


def build(case: str) -> PreTrainedModel:
    """A random model; settings that `tiny` shares are for types that share them."""
    kind, settings = KINDS[case]
    if kind in ("llama", "deepseek_v3", "deepseek_v2", "llama4_text", "diffllama", "gemma4_text"):
        return tiny.build(kind, **settings)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**_IDS, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.12 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    model.generation_config.pad_token_id = 0
    model.generation_config.forced_eos_token_id = None
    return model


def alone(model: PreTrainedModel, row: list[int], **settings: Any) -> Any:
    """transformers' logits of one row: nothing is padded."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **settings}
    ids = torch.tensor([row])
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=0,
        **settings,
        return_dict_in_generate=True,
        output_logits=True,
    )


def difference(theirs: PreTrainedModel, ours: CausalLM, rows: list[list[int]]) -> float:
    """Of a logit, as a share of the largest; the greedy tokens must be the same."""
    found = ours.generate(
        rows,
        max_new_tokens=NEW,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    worst = 0.0
    for i, row in enumerate(rows):
        expected = alone(theirs, row)
        assert found.sequences[i][-NEW:] == expected.sequences[0, -NEW:].tolist()
        logits = np.concatenate([step.numpy() for step in expected.logits])
        mine = np.stack([step[i] for step in found.logits])
        worst = max(worst, float(np.abs(logits - mine).max() / np.abs(logits).max()))
    return worst


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`exported(case, precision, cache precision)`: a model and its export, loaded."""

    @functools.cache
    def make(case: str, precision: str = "fp32", cache: str = "fp32") -> Any:
        model, out = build(case), tmp_path_factory.mktemp("attention") / "model"
        export(
            model,
            out,
            tokenizer=tiny.tokenizer(),
            precision=precision,
            cache_precision=cache,
            progress=None,
            allow_mismatch=precision != "fp32",
        )  # noise has many near ties
        return model, CausalLM(out)

    return make


@pytest.mark.parametrize("case", tiny.some(KINDS, QUICK))
def test_each_kind_of_attention_says_what_transformers_says(exported, case):
    theirs, ours = exported(case)
    rows = ragged(1, LENGTHS)
    assert difference(theirs, ours, rows) <= 2e-5
    settings = {"num_beams": 3, "max_new_tokens": 8}
    expected = alone(theirs, rows[1], **settings).sequences.tolist()
    assert ours.generate([rows[1]], eos_token_id=None, **settings) == expected


def test_latents_are_stored_where_that_takes_less_memory(exported):
    """One head of keys of rank 32 and 8 rotated, for 4 heads of 24 and 12."""
    assert exported("MLA")[1].model.info.layers == ((1, 40), (1, 40))
    many = tiny.build("deepseek_v3", **{**_MLA, "kv_lora_rank": 96})
    assert [(one.kv_heads, one.head_dim) for one in graph.kept_by(many).layers] == [(4, 24)] * 2


def test_keys_and_values_of_unlike_sizes(tmp_path):
    """As they are where latents would take more: padded to one size."""
    model = tiny.build("deepseek_v3", **{**_MLA, "kv_lora_rank": 96}, num_hidden_layers=1)
    export(model, tmp_path / "out", precision="fp32", progress=None)
    assert difference(model, CausalLM(tmp_path / "out"), ragged(1, LENGTHS)) <= 2e-5


def test_a_table_of_positions_is_an_end(exported):
    for case, end in (("positions of its own", 128), ("ALiBi, 6 heads", None)):
        info = exported(case)[1].model.info
        assert (info.max_length, info.hard_limit) == (end, end is not None)


@pytest.mark.parametrize("case", ["ALiBi, 6 heads", "chunks"])
def test_a_prompt_in_chunks_has_the_biases_of_its_positions(exported, case):
    theirs, ours = exported(case)
    (row,) = ragged(2, (40,))
    expected = theirs(torch.tensor([row])).logits[0].detach().numpy()
    cache = ours.model.new_cache(1, 48)
    for part in (row[:17], row[17:18], row[18:]):
        at = len(part) - 1
        logits = ours.model.forward([np.array(part)], cache)[0, 0]
        done = int(cache.lengths[0]) - 1
        assert np.abs(logits - expected[done]).max() <= 2e-5 * np.abs(expected).max(), at


def test_alibi_is_rounded_where_the_model_rounds(exported):
    """Falcon keeps it in bfloat16, which has not all positions over 256."""
    theirs, ours = exported("torch's attention, ALiBi")
    assert difference(theirs, ours, ragged(3, (300,))) <= 2e-5


@pytest.mark.parametrize(
    ("case", "precision", "cache"),
    [
        ("MLA", "int8", "int8"),
        ("ALiBi, 6 heads", "int4", "int8"),
        pytest.param("heads of 20", "int8", "int8", marks=pytest.mark.slow),
    ],
)
def test_what_is_padded_or_biased_is_quantised_like_others(exported, case, precision, cache):
    """Channels that are padding hold zeros, whatever their scale: no division by zero."""
    theirs, ours = exported(case, precision, cache)
    (row,) = ragged(4, (30,))
    expected = theirs(torch.tensor([row])).logits[0, -1].detach().numpy()
    found = ours.model.forward([np.array(row)], ours.model.new_cache(1, 32))[0, 0]
    assert np.isfinite(found).all()
    assert np.corrcoef(expected, found)[0, 1] > 0.97


# --- what is refused ---------------------------------------------------------------------------


def test_keys_that_change_as_tokens_come_are_refused(monkeypatch):
    """A layer may change what it wrote, as long as it treats each token by itself."""
    model = build("MLA")
    kind = type(model.model.layers[0].self_attn)
    own = kind.expand_kv

    def mixed(self: Any, latent: torch.Tensor, turned: torch.Tensor) -> Any:
        return own(self, latent + latent.mean(dim=2, keepdim=True), turned)

    monkeypatch.setattr(kind, "expand_kv", mixed)
    with pytest.raises(UnsupportedModel, match="its keys are not what fastgen knows of latents"):
        graph.kept_by(model)
    monkeypatch.setattr(hooks, "_saves", lambda _: False)
    with pytest.raises(UnsupportedModel, match=r"deepseek_v3 .* changes as more tokens come"):
        graph.kept_by(model)


def test_keys_that_are_no_tokens_are_refused(monkeypatch):
    model = build("MLA")
    kind = type(model.model.layers[0].self_attn)
    own = kind.expand_kv

    def more(self: Any, *latent: torch.Tensor) -> Any:
        return tuple(torch.cat([one[:, :, :1], one], dim=2) for one in own(self, *latent))

    monkeypatch.setattr(kind, "expand_kv", more)
    monkeypatch.setattr(hooks, "_saves", lambda _: False)
    with pytest.raises(UnsupportedModel, match="keys and values besides those of the tokens"):
        graph.kept_by(model)


def test_code_that_is_not_what_it_was_is_refused(monkeypatch):
    """Each stand-in is compared with what it stands for, whenever a model is recorded."""
    model = build("_attn, windows, no scale")
    kind = type(model.transformer.h[0].attn.attention)
    own = kind._attn
    monkeypatch.setattr(kind, "_attn", lambda self, q, *rest: own(self, 2 * q, *rest))
    with pytest.raises(UnsupportedModel, match=r"gpt_neo cannot .* \(_attn\) is not what fastgen"):
        graph.kept_by(model)


def test_attention_by_blocks_is_taken_as_long_as_it_is_in_full():
    settings = {**_SMALL, "is_decoder": True, "intermediate_size": 48, "block_size": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("big_bird", **settings)).eval()
    loaded = source.of_object(model, None).model
    assert model.base_model.attention_type == "block_sparse"
    assert loaded.base_model.attention_type == "original_full"
    assert sparse.limit(loaded) == loaded.config.max_position_embeddings == (5 + 2 * 3) * 16
    assert len(graph.kept_by(loaded).layers) == 2


def test_a_mask_of_another_kind_is_refused_when_a_layer_uses_it(monkeypatch):
    """Decoders of bart's kind make masks for an encoder that is not there."""
    model = build("positions of its own")
    assert len(graph.kept_by(model).layers) == 2
    monkeypatch.setattr(attention, "window_of", lambda *_: _not_causal())
    with pytest.raises(UnsupportedModel, match="bart cannot be exported: its mask is not causal"):
        graph.kept_by(model)


def _not_causal() -> None:
    raise UnsupportedModel("its mask is not causal")


def test_a_model_is_left_as_it_was():
    for case in ("_attn, windows, no scale", "torch's attention", "positions of its own", "chunks"):
        model = build(case)
        before = [dict(vars(module)) for module in model.modules()]
        own = (model.config._attn_implementation, torch.nn.functional.scaled_dot_product_attention)
        graph.kept_by(model)
        assert own == (
            model.config._attn_implementation,
            torch.nn.functional.scaled_dot_product_attention,
        )
        after = [dict(vars(module)) for module in model.modules()]
        assert [set(one) for one in before] == [set(one) for one in after]
        with hooks.positions(model, torch.zeros(1, 1, dtype=torch.long)):
            pass
        assert [set(vars(module)) for module in model.modules()] == [set(one) for one in before]
