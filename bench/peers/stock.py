"""Stock transformers as a peer, in bf16 as the checkpoint is; imports nothing of ours.

With ``offload`` it is accelerate's disk offload: what does not fit in ``max_memory`` stays in
files, and is read for each forward pass, layer by layer. (For :mod:`bench.ablation`
``offload.py`` puts every expert there.)
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

FIRST_PROMPT = 16


def run(path: str, threads: int, offload: str = "", max_memory: int = 0) -> None:
    """Answers the lines of stdin until it ends."""
    (architecture,) = json.loads((Path(path) / "config.json").read_text())["architectures"]
    import torch
    import transformers
    from transformers.modeling_outputs import CausalLMOutputWithPast

    model_class = getattr(transformers, architecture)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    imported = time.monotonic()
    more: dict[str, Any] = {}
    if offload:
        import accelerate  # noqa: F401 - else transformers would say it in its own way

        more = {
            "device_map": "auto",
            "max_memory": {"cpu": max_memory},
            "offload_folder": offload,
        }
    model: Any = model_class.from_pretrained(path, dtype=torch.bfloat16, **more)
    loaded = time.monotonic()
    # As transformers has called it since 5.24.
    cached = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)

    def prompt(tokens: int, cache: Any = None) -> Any:  # noqa: ANN401 - transformers is untyped
        ids = torch.randint(10, vocab, (1, tokens), generator=generator)
        return model(ids, **{cached: cache}, use_cache=True, logits_to_keep=1)

    with torch.no_grad():
        prompt(FIRST_PROMPT)
        _say(imported=imported, loaded=loaded, first=time.monotonic())
        done = None
        for line in sys.stdin:
            what, count = line.split()
            began = time.monotonic()
            if what == "clear":
                done = None
            elif what == "prompt":
                done = prompt(int(count), done and done[cached])
            elif what == "decode":
                for _ in range(int(count)):
                    token = done.logits[:, -1:].argmax(-1)
                    done = model(token, **{cached: done[cached]}, use_cache=True)
            _say(seconds=time.monotonic() - began)


def _say(**values: Any) -> None:  # noqa: ANN401 - what JSON can hold
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    {"run": run}[sys.argv[1]](**json.loads(sys.argv[2]))
