"""A config.json as families read it: fields with transformers' defaults, and none overlooked.

A field that nobody asked for and that is not `HARMLESS` is refused: it may change the output of
the model. A field that is null says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

from fastgen.errors import UnsupportedModel
from fastgen.export.build.decoder import Rotary
from fastgen.export.build.rotary import turning
from fastgen.export.rewrite.node import FURTHEST

# Fields for training, the origin of a model, loading it, and other tasks.
HARMLESS = re.compile(
    r"architectures|model_type|(torch_)?dtype|transformers_version|use_cache|auto_map"
    r"|\w+_token_id|\w*dropout\w*|\w+_pdrop|layerdrop|initializer_range|init_std|_name_or_path"
    r"|_?model_name_or_path|_commit_hash|_attn_implementation\w*|attn_implementation|task"
    r"|return_dict|output_\w+|is_encoder_decoder|problem_type|id2label|label2id|num_labels"
    r"|chunk_size_feed_forward|gradient_checkpointing|pretraining_tp|tokenizer_class"
    r"|transformers\.js_config|task_specific_params|finetuning_task|unsloth_\w+|prefix"
    r"|is_llama_config|_sliding_window_pattern|_num_labels|cache_implementation|is_decoder"
    r"|router_(aux_loss_coef|jitter_noise)"
)
# Fields that only mean what transformers does anyway, at these values.
NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False, "tie_encoder_decoder": False, "torchscript": False,
    "pruned_heads": {}, "use_bidirectional_attention": False, "rope_interleaved": False,
    "use_mrope": False,
}  # fmt: skip
ANY = object()  # of a field that a family's model does not read, whatever it says
# The same in a family.
NEUTRAL_IN: dict[str, dict[str, Any]] = {
    "cohere": {
        "use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True,
        "use_parallel_embedding": ANY, "model_max_length": ANY, "position_embedding_type": ANY,
    },
    "gemma": {"hidden_activation": ANY},
    "gemma2": {"hidden_act": ANY},
    "gemma3_text": {"hidden_act": ANY},
    "gpt2": dict.fromkeys(
        ("reorder_and_upcast_attn", "n_ctx", "summary_activation", "summary_first_dropout",
         "summary_proj_to_labels", "summary_type", "summary_use_proj"), ANY
    ),
    "gpt_oss": {"experts_per_token": ANY, "initial_context_length": ANY},
    "hunyuan_v1_dense": {
        "use_qk_norm": True, "use_cla": False, "use_rotary_pos_emb": True, "norm_type": "rms",
        "add_classification_head": False, "position_embedding_xdrope": False,
    } | dict.fromkeys(
        ("attention_head_dim", "class_num", "cla_share_factor", "mask_init_id", "im_start_id",
         "im_end_id", "im_newline_id", "org_vocab_size", "pool_type", "text_start_id",
         "text_end_id", "dense_list"), ANY
    ),
    "mistral": {"layer_types": ANY},
    "phi3": {
        "attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1,
        "interpolate_factor": 1,
    },
    "qwen3_moe": {"max_window_layers": ANY},
    "smollm3": {"max_window_layers": ANY},
    "starcoder2": {"activation_function": ANY, "mlp_type": "default", "norm_type": "layer_norm"},
}  # fmt: skip
MOST_LAYERS = 1024


class Configuration:
    """A configuration, and the names of the fields that were asked for."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """A field; the default where it is not there at all."""
        self.asked.add(name)
        return self.config.get(name, default)

    def suppose(self, **usual: Any) -> None:
        """Take fields to say this where they are not there."""
        self.config = usual | self.config

    def number(self, name: str, default: int | None = None) -> int:
        """A field that is a positive number."""
        value = self.get(name, default)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise UnsupportedModel(f"its config.json has {name} = {value!r}, which is no size")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.get(name, default))

    def real(self, name: str, default: float) -> float:
        value = self.get(name, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise UnsupportedModel(f"its config.json has {name} = {value!r}, which is no number")
        return float(value)

    def check(self) -> None:
        """Refuse fields that nobody asked for.

        Raises:
            UnsupportedModel: naming the fields.
        """
        neutral = NEUTRAL | NEUTRAL_IN.get(str(self.config.get("model_type")), {})
        unknown = {
            name: value
            for name, value in self.config.items()
            if not (
                value is None
                or name in self.asked
                or (name in neutral and neutral[name] in (ANY, value))
                or (name not in neutral and HARMLESS.fullmatch(name))
            )
        }
        if unknown:
            fields = ", ".join(f"{name} = {str(value)[:40]}" for name, value in unknown.items())
            raise UnsupportedModel(
                f"its config.json says {fields}, which the builder does not know"
            )

    # Fields that many families share

    def heads(self) -> tuple[int, int, int]:
        """Query heads, key heads and their size."""
        heads = self.number("num_attention_heads")
        kv_heads = self.number("num_key_value_heads", heads)
        size = self.number("head_dim", self.number("hidden_size") // heads)
        if heads % kv_heads:
            raise UnsupportedModel(f"it has {heads} query heads over {kv_heads} key heads")
        return heads, kv_heads, size

    def layers(self, name: str = "num_hidden_layers", usual: int | None = None) -> range:
        count = self.number(name, usual)
        if count > MOST_LAYERS:
            raise UnsupportedModel(f"its config.json has {name} = {count}")
        return range(count)

    def rope(
        self,
        size: int,
        theta: float = 10_000.0,
        *,
        part: float | None = None,
        interleaved: bool = False,
        names: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
        adjust: Callable[[dict[str, Any]], dict[str, Any]] = lambda parameters: parameters,
    ) -> tuple[Rotary, tuple[int, bool]]:
        """The rotation; the number of positions, and whether that is a hard limit.

        Args:
            part: how much of a head turns where nothing is said; None where all of it must.
            names: of older fields for what `rope_parameters` say.
            adjust: what the family makes of these.
        """
        positions = self.number("max_position_embeddings")
        parameters = dict(self.get("rope_scaling") or {}) or dict(self.get("rope_parameters") or {})
        self.asked.add("rope_parameters")
        old_theta, old_part = self.get(names[0]), self.get(names[1])
        parameters.setdefault("rope_theta", theta if old_theta is None else old_theta)
        if part is not None or old_part is not None:
            parameters.setdefault("partial_rotary_factor", part if old_part is None else old_part)
        kind = parameters.setdefault("rope_type", parameters.get("type") or "default")
        trained = self.get("original_max_position_embeddings")
        if kind in ("llama3", "yarn", "longrope", "su"):
            if trained is not None:
                parameters["original_max_position_embeddings"] = trained
            parameters.setdefault("original_max_position_embeddings", positions)
        parameters = adjust(parameters)
        if part is None and parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise UnsupportedModel("only a part of its heads turns")
        turned = turning(parameters, size, positions, interleaved)
        if turned.limit is None:
            return turned.rotary, (positions, False)
        return turned.rotary, (min(turned.limit, positions), True)

    def windows(self, usual: Sequence[str], window: int | None) -> list[int | None]:
        """The window of each layer by `layer_types`, or as is usual; None for none."""
        kinds = self.get("layer_types") or list(usual)
        if len(kinds) != len(usual) or {*kinds} - {"sliding_attention", "full_attention"}:
            raise UnsupportedModel(f"its layers are of the types {sorted(map(str, {*kinds}))}")
        if window is None and "sliding_attention" in kinds:
            raise UnsupportedModel("its layers slide, and sliding_window says nothing")
        return [window_of(window) if kind == "sliding_attention" else None for kind in kinds]


def window_of(size: int | None) -> int | None:
    if size is not None and (type(size) is not int or size < 1):
        raise UnsupportedModel(f"its config.json has sliding_window = {size!r}")
    return size if size is not None and size < FURTHEST else None
