"""accelerate's disk offload as a peer: all experts of a layer are read before it computes.

Run by :mod:`bench.ablation` in a process of its own; imports nothing of ours, and needs accelerate
and transformers::

    python bench/peers/offload.py '{"checkpoint": "examples/tiny-mixtral", "folder": "/tmp/o"}'
    python bench/peers/offload.py '{"config": {...}, "folder": "/tmp/o"}'

From a ``config.json`` as an object it makes a stock model of random weights. The experts go to
files in ``folder``, in bfloat16; everything else stays in memory. Each line of stdin is a number of
tokens to decode, one after the other; the answer has the seconds and the bytes read from disk for
each. Before each token the files are dropped from the page cache: what a limit on memory below
the model's size does to a program that reads all of it in the same order for every token.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import dispatch_model, init_empty_weights
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"
"""As transformers has called it since 5.24."""

_DTYPE = torch.bfloat16
_DEVIATION = 0.02
_POOL = (1 << 24) - 3  # drawn once and repeated
_CONTEXT = 4


def load(job: dict[str, Any]) -> Any:  # noqa: ANN401 - transformers is untyped
    """The model, its experts in files."""
    folder = Path(job["folder"])
    folder.mkdir(exist_ok=True)
    if "checkpoint" in job:
        model = transformers.AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=_DTYPE)
    else:
        values = dict(job["config"])
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        with init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=_DTYPE)
        _fill(model, folder)
    places = {
        name: "disk" if name.endswith(".experts") else "cpu"
        for name, module in model.named_modules()
        if ".experts." not in name
        and [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    }
    return dispatch_model(model.eval(), places, main_device="cpu", offload_dir=str(folder))


def _fill(model: Any, folder: Path) -> None:  # noqa: ANN401
    """Random weights: experts' to files as accelerate writes them, the others to memory."""
    noise = torch.randn(_POOL).mul_(_DEVIATION).to(_DTYPE)
    index = {}
    for name, parameter in list(model.named_parameters()):
        count = parameter.numel()
        if ".experts." in name:
            index[name] = {"dtype": "bfloat16", "shape": list(parameter.shape)}
            data = noise.view(torch.int16).numpy()
            with (folder / f"{name}.dat").open("wb") as file:
                for start in range(0, count, len(data)):
                    file.write(data[: count - start].data)
                os.fdatasync(file.fileno())
            continue
        values = noise.repeat(-(-count // len(noise)))[:count].view(parameter.shape)
        module_name, _, attribute = name.rpartition(".")
        if "norm" in name:
            values = torch.ones_like(values)
        setattr(model.get_submodule(module_name), attribute, torch.nn.Parameter(values))
    (folder / "index.json").write_text(json.dumps(index))


class Decoder:
    """Goes on with the same text."""

    @torch.no_grad()
    def __init__(self, model: Any, folder: Path) -> None:  # noqa: ANN401
        self._model, self._folder = model, folder
        self._output = model(torch.arange(3, 3 + _CONTEXT)[None], use_cache=True)

    @torch.no_grad()
    def decode(self, tokens: int) -> dict[str, list[float]]:
        """Seconds and bytes of each token."""
        seconds, num_bytes = [], []
        for _ in range(tokens):
            _drop(self._folder)
            token = self._output.logits[:, -1:].argmax(-1)
            keys = self._output[CACHE]
            before, began = _bytes_read(), time.perf_counter()
            self._output = self._model(token, **{CACHE: keys}, use_cache=True)
            self._output.logits.sum().item()
            seconds.append(time.perf_counter() - began)
            num_bytes.append(_bytes_read() - before)
        return {"seconds": seconds, "bytes": num_bytes}


def _drop(folder: Path) -> None:
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def main() -> None:
    """Loads, then answers."""
    job = json.loads(sys.argv[1])
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it says what is meant to be so
    folder = Path(job["folder"])
    decoder = Decoder(load(job), folder)
    print(json.dumps({"accelerate": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(decoder.decode(int(line))), flush=True)


if __name__ == "__main__":
    main()
