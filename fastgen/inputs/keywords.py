"""Keywords of transformers' `generate` that are no knobs here: inert, unsupported, or objects."""

from __future__ import annotations

# Knobs of transformers that change nothing here: accepted, so that scripts run unchanged.
INERT = {
    "use_cache": "keys and values are always kept; the tokens are the same",
    "cache_implementation": "there is one cache, in place",
    "cache_config": "there is one cache, in place",
    "max_cache_len": "the cache is as long as the call needs",
    "prefill_chunk_size": "prompts are always prefilled in chunks",
    "logits_to_keep": "only the logits that are needed are computed",
    "compile_config": "nothing is compiled",
    "disable_compile": "nothing is compiled",
    "return_dict": "about the model's own call",
    "decoder_start_token_id": "for encoder-decoder models",
    "assistant_lookbehind": "for an assistant with another tokenizer, which is not supported",
    "target_lookbehind": "for an assistant with another tokenizer, which is not supported",
    "synced_gpus": "for several GPUs",
    "transformers_version": "a note of the file's writer",
}

# Knobs of transformers that ask for something that is not done here.
UNSUPPORTED = {
    "output_attentions": "the graph does not compute attention weights apart",
    "output_hidden_states": "the graph returns logits alone",
    "penalty_alpha": "contrastive search has left transformers for remote code",
    "dola_layers": "DoLa has left transformers for remote code and needs hidden states",
    "constraints": "constrained beam search has left transformers for remote code",
    "force_words_ids": "constrained beam search has left transformers for remote code",
    "low_memory": "transformers no longer supports it; beams share their prompt here anyway",
    "use_mtp": "multi-token prediction heads are not exported",
    "speculation_type": "draft heads are not exported",
    "is_assistant": "set on a draft model by transformers itself",
    "assistant_early_exit": "the graph has one exit",
    "assistant_ensemble_weight": "it changes the distribution",
    "assistant_tokenizer": "an assistant must share the model's vocabulary",
    "continuous_batching_config": "deprecated in transformers",
    "inputs_embeds": "the graph takes token ids",
    "token_type_ids": "the graph takes no other ids than tokens",
    "position_ids": "positions follow from the attention_mask",
    "past_key_values": "the cache belongs to the call",
    "cache": "the cache belongs to the call",
    "encoder_outputs": "for encoder-decoder models",
    "decoder_input_ids": "for encoder-decoder models",
    "custom_generate": "remote code is not run",
    "trust_remote_code": "remote code is not run",
}

# What of it a model's own defaults can ask for. The rest changes no token there: outputs that no
# call asked for, and arguments that a generation config does not have.
BY_DEFAULT = {
    "penalty_alpha", "dola_layers", "constraints", "force_words_ids", "use_mtp", "is_assistant",
    "assistant_early_exit", "assistant_ensemble_weight",
}  # fmt: skip

# The arguments of `generate` that are objects rather than knobs (see generator).
ARGUMENTS = (
    "attention_mask",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "assistant_model",
    "tokenizer",
    "prefix_cache",
    "streamer",
)
