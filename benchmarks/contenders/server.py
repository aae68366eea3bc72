"""A server of a model in a process of its own, on this machine alone: started, asked, ended."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

from teq.spec import UserError

HOST = "127.0.0.1"
STARTING = 300.0  # seconds


def llama_cpp(model: Path, threads: int) -> list[str]:
    """Return the command of llama-cpp-python's server on a GGUF file."""
    given = ["--model", str(model), "--n_ctx", "512", "--logits_all", "true", "--host", HOST]
    given += ["--n_threads", str(threads), "--n_threads_batch", str(threads)]
    return [sys.executable, "-m", "llama_cpp.server", *given]


def transformers(model: Path, threads: int) -> list[str]:
    """Return the command of `transformers serve` on a folder; its threads are PyTorch's."""
    given = [str(model), "--device", "cpu", "--dtype", "float32", "--host", HOST]
    return [sys.executable, "-m", "transformers.cli.transformers", "serve", *given]


class Server:
    """Context manager: a server that answers. Raises UserError where it ends before that."""

    def __init__(self, command: list[str], threads: int) -> None:
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port = free.getsockname()[1]
        self.command = [*command, "--port", str(self.port)]
        self.variables = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}

    def __enter__(self) -> Self:
        """Start, and wait until the port is open."""
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            self.command, env=self.variables, stdout=self.log, stderr=subprocess.STDOUT
        )
        end = time.monotonic() + STARTING
        while time.monotonic() < end:
            with socket.socket() as asked:
                if asked.connect_ex((HOST, self.port)) == 0:
                    return self
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        self.__exit__()
        self.log.seek(0)
        last = (self.log.read().strip() or "it said nothing").splitlines()[-1]
        raise UserError(f"{' '.join(self.command[1:4])} does not answer: {last}")

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()

    def complete(self, model: Path, prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
        """Return the answer to a greedy completion of at most `tokens` tokens."""
        body = {"model": str(model), "prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}
        request = urllib.request.Request(
            f"http://{HOST}:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=STARTING) as answer:
            return json.load(answer)

    def resident(self) -> dict[str, int]:
        """Return the bytes that the process holds: anonymous memory, and pages of files such as weights."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}
