"""transformers with a static cache, and each step compiled by torch."""

from __future__ import annotations

from pathlib import Path

from peers.engines import transformers_eager


class Adapter(transformers_eager.Adapter):
    title = "transformers compiled"
    environment = "transformers_eager"

    def load(self, directory: Path, precision: str, threads: int) -> None:
        from transformers import CompileConfig

        super().load(directory, precision, threads)
        settings = CompileConfig(mode="default", fullgraph=False)
        settings._compile_all_devices = True  # by itself it compiles on accelerators only
        self.model.generation_config.cache_implementation = "static"
        self.model.generation_config.compile_config = settings
