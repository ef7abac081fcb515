"""The driver's side of a worker: a process that has loaded one engine."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.cases import Case
from peers.engines import Engine, adapter
from peers.home import OFFLINE, WORKER, Home


class Failed(RuntimeError):
    """An engine gave an error or ended: its last words."""


@dataclass
class Worker:
    """An engine at a precision, on one shape. It starts when it is first asked something.

    Attributes:
        name: the engine's, of `engines.NAMES`.
        precision: fp32, int8 or int4.
        directory: the converted model.
        python: the interpreter of the engine's environment.
        threads: that the engine may use.
        log: where it writes what it has to say.
    """

    name: str
    precision: str
    directory: Path
    python: Path
    threads: int
    log: Path
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    @staticmethod
    def of(home: Home, shape: str, name: str, precision: str, threads: int) -> Worker:
        """One whose environment and model are ready; makes what is missing.

        Raises:
            Unavailable: that failed.
        """
        python = home.python(adapter(name).environment or name)
        directory = home.converted(shape, name, precision)
        log = home.log(f"run-{shape}-{name}-{precision}")
        return Worker(name, precision, directory, python, threads, log)

    @property
    def engine(self) -> type[Engine]:
        """The engine's abilities."""
        return adapter(self.name)

    def start(self) -> None:
        """Start the process and load the model."""
        env = os.environ | OFFLINE | {"OMP_NUM_THREADS": str(self.threads)}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [str(self.python), str(WORKER), "serve", self.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env,
            )
        self._ask(
            do="load",
            directory=str(self.directory),
            precision=self.precision,
            threads=self.threads,
        )

    def generate(self, case: Case, prompts: list[list[int]]) -> dict[str, Any]:
        """Run a case: its `seconds`, those to the `first` token if the engine can tell, the `ids`,
        and how long its threads `spun` afterwards.

        Raises:
            Failed: an error, the end of the process, or another number of tokens than asked for.
        """
        answer = self.ask(do="generate", prompts=prompts, new=case.new, beams=case.beams)
        found = [len(row) for row in answer["ids"]]
        if found != [case.new] * len(prompts):
            raise Failed(f"gave rows of {found} tokens for {len(prompts)} of {case.new}")
        return answer

    def cold(self, case: Case, prompts: list[list[int]]) -> float:
        """Seconds from the start of a new process to the end of that case."""
        self.stop()
        start = time.perf_counter()
        self.start()
        self._ask(do="generate", prompts=prompts, new=case.new, beams=case.beams, rest=False)
        return time.perf_counter() - start

    def ask(self, **request: Any) -> dict[str, Any]:
        """Ask the process, which is started if there is none."""
        if self.process is None:
            self.start()
        return self._ask(**request)

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process and self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            self.process = None
            raise Failed(f"ended with code {code}, see {self.log.name}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            with self.process as process:
                assert process.stdin
                process.stdin.close()
                process.wait()
            self.process = None
