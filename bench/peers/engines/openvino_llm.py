"""OpenVINO GenAI, on what optimum-intel exports."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peers.engines import Engine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GROUP = "64"  # of 4-bit weights: the default, 128, does not divide SmolLM's 576 inputs


class Adapter(Engine):
    title = "OpenVINO GenAI"
    precisions: ClassVar = {"fp32": "fp32", "int8": "int8", "int4": "int4"}
    note = "its cache of keys and values is 8 bit, as by default, but for fp32"
    model: Any
    settings: dict[str, Any]
    graph: Path
    reader: Any = None

    @classmethod
    def converter(cls, shape: str) -> str:
        # Its exporter refuses Gemma 3 with transformers 5.
        return "openvino_llm-convert-4" if shape == "gemma3" else "openvino_llm-convert"

    @staticmethod
    def prepare(source: Path, target: Path, precision: str) -> None:
        more = [] if precision != "int4" else ["--group-size", GROUP]
        command = [
            *(sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"),
            *("--model", str(source), "--task", "text-generation-with-past"),
            *("--weight-format", precision, *more, str(target)),
        ]
        subprocess.run(command, check=True)

    def load(self, directory: Path, precision: str, threads: int) -> None:
        import openvino_genai

        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
        if precision == "fp32":
            settings |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        self.model = openvino_genai.LLMPipeline(directory, "CPU", **settings)

        self.settings, self.graph = settings, directory / "openvino_model.xml"

    def generate(self, prompts: list[list[int]], new: int, beams: int) -> list[list[int]]:
        import numpy as np
        import openvino
        import openvino_genai

        width = max(map(len, prompts))
        ids = np.zeros((len(prompts), width), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens = new
        settings.ignore_eos = True
        settings.num_beams = beams
        settings.apply_chat_template = False
        start = time.perf_counter()
        out = self.model.generate(
            openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(mask)), settings
        )
        self.first = start + out.perf_metrics.get_ttft().mean / 1e3
        return [list(row) for row in out.tokens]

    def logits(self, row: list[int]) -> NDArray[np.float32]:
        import numpy as np

        ids = np.array([row], np.int64)
        if self.reader is None:
            import openvino

            # The pipeline gives no logits: the same graph, with the same settings, does.
            compiled = openvino.Core().compile_model(self.graph, "CPU", self.settings)
            self.reader = compiled.create_infer_request()
        self.reader.reset_state()
        given = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(len(row), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        named = {name for one in self.reader.model_inputs for name in one.names}
        self.reader.infer({name: value for name, value in given.items() if name in named})
        return np.array(self.reader.get_tensor("logits").data[0])
