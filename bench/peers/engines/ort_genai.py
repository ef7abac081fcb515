"""onnxruntime-genai: its builder's graphs, and for GPT-2, which that refuses, optimum's."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peers.engines import Engine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Adapter(Engine):
    title = "onnxruntime-genai"
    precisions: ClassVar = {"fp32": "fp32", "int8": "int8", "int4": "int4"}
    note = "GPT-2s are optimum's graphs with a config written by hand: the builder refuses them"
    model: Any

    @classmethod
    def converter(cls, shape: str) -> str:
        return "optimum_onnx" if shape in ("distilgpt2", "mgm") else "ort_genai-convert"

    @staticmethod
    def prepare(source: Path, target: Path, precision: str) -> None:
        config = json.loads((source / "config.json").read_text())
        if config["model_type"] == "gemma3_text":
            raise NotImplementedError(
                "its builder fails on Gemma 3's two rotations as transformers 5 writes them, and "
                "wants transformers 5"
            )
        if config["model_type"] != "gpt2":
            command = [
                *(sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu"),
                *("-m", str(source), "-o", str(target), "-p", precision),
                *("-c", str(target / "cache")),
            ]
            subprocess.run(command, check=True)
        elif precision == "int4":
            raise NotImplementedError("its builder refuses GPT-2, and optimum has no 4 bit")
        else:
            from peers.engines import optimum_onnx

            optimum_onnx.Adapter.prepare(source, target, precision)
            (graph,) = target.glob("*.onnx")
            settings = genai_config(config, graph.name)
            (target / "genai_config.json").write_text(json.dumps(settings, indent=1))

    def load(self, directory: Path, precision: str, threads: int) -> None:
        import onnxruntime_genai

        config = onnxruntime_genai.Config(str(directory))
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.model = onnxruntime_genai.Model(config)

    def generate(self, prompts: list[list[int]], new: int, beams: int) -> list[list[int]]:
        import numpy as np
        import onnxruntime_genai

        width = max(map(len, prompts))
        ids = np.zeros((len(prompts), width), np.int32)  # it wants padding on the right
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        settings = onnxruntime_genai.GeneratorParams(self.model)
        length = width + new
        settings.set_search_options(
            batch_size=len(prompts),
            num_beams=beams,
            do_sample=False,
            max_length=length,
            min_length=length,
        )
        generator = onnxruntime_genai.Generator(self.model, settings)
        generator.append_tokens(ids)
        for step in range(new):
            generator.generate_next_token()
            if step == 0:
                self.first = time.perf_counter()
        return [list(generator.get_sequence(row)[-new:]) for row in range(len(prompts))]

    def logits(self, row: list[int]) -> NDArray[np.float32]:
        import numpy as np
        import onnxruntime_genai

        settings = onnxruntime_genai.GeneratorParams(self.model)
        settings.set_search_options(batch_size=1, do_sample=False, max_length=len(row) + 1)
        generator = onnxruntime_genai.Generator(self.model, settings)
        generator.append_tokens(np.array([row], np.int32))
        return np.array(generator.get_output("logits")[0], np.float32)


def genai_config(config: dict[str, Any], graph: str) -> dict[str, Any]:
    """The settings that onnxruntime-genai needs for a GPT-2 with separate keys and values."""
    return {
        "model": {
            "type": "llama",  # "gpt2" expects a cache of keys and values in one tensor
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": config["eos_token_id"],
            "pad_token_id": 0,
            "context_length": config["n_positions"],
            "vocab_size": config["vocab_size"],
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": graph,
                "head_size": config["n_embd"] // config["n_head"],
                "hidden_size": config["n_embd"],
                "num_attention_heads": config["n_head"],
                "num_key_value_heads": config["n_head"],
                "num_hidden_layers": config["n_layer"],
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"past_present_share_buffer": False, "early_stopping": True},
    }
