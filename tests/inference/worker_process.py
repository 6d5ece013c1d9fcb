"""Workers in processes of their own that take requests, since starting one takes seconds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class WorkerProcess:
    """A process that attaches, generates greedily and detaches, once per request."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.inference.worker_process"],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(
        self, socket: Path, model: str, prompt: list[int], max_new_tokens: int, **options: Any
    ) -> None:
        """Sends a request; :meth:`tokens` is its answer."""
        assert self._process.stdin is not None
        request = {
            "socket": str(socket),
            "model": model,
            "prompt": prompt,
            "max_new_tokens": max_new_tokens,
            "options": options,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The request's answer: ``tokens``, ``said``, ``host_hits`` and ``nvme_misses``."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the worker ended with exit code {self._process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def signal(self, number: int) -> None:
        """Sends a signal."""
        self._process.send_signal(number)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def serve() -> None:
    """Answers requests from stdin until it ends."""
    from expertd_inference.process.environment import prepare_environment

    prepare_environment(device="cpu")
    import torch

    from expertd_inference.process.attachment import attach
    from expertd_inference.worker import Worker
    from expertstore.errors import ExpertdError
    from tests.inference.greedy import greedy

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        said: list[str] = []
        answer: dict[str, Any] = {"said": said}
        try:
            attachment = attach(request["model"], Path(request["socket"]))
            with Worker(attachment, say=said.append, **request["options"]) as worker:
                answer["tokens"] = greedy(
                    worker.model, request["prompt"], request["max_new_tokens"]
                )
                answer["host_hits"] = worker.session.host_hits
                answer["nvme_misses"] = worker.session.nvme_misses
        except ExpertdError as error:
            answer |= {"error": type(error).__name__, "message": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
