"""A model's twin: the same layers, experts and routing, with matrices too narrow to take time.

What a token of the twin takes is what a token costs besides its matrices: the loop, the calls, the
routing, the look-ups in a real daemon's directory, the waking of threads. It is measured by
generating with it as ``expert-run generate`` does.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expertd.packing.shapes import shape_config
from expertd.packing.synthetic import make_pack
from expertd_inference.advice.models import find_model
from expertd_inference.advice.values import Need
from expertd_inference.engine.decoding import Decoding
from expertd_inference.process.embedded import EmbeddedDaemon
from expertd_inference.process.memory import pss_bytes
from expertd_inference.settings import DeviceSettings
from expertd_inference.worker import load_model

SCHEME = "4bit"
STAND_IN = "qwen3-30b-a3b"
"""Whose twin is taken where a model has none."""
MAX_LAYERS = 64
MAX_EXPERTS = 64
TOKENS = 24
_CONTEXT = 16
_CALLS = 20
_WIDTHS: dict[str, int] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_attention_heads": 4,
    "head_dim": 32,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Twin:
    """What was measured with it."""

    need: Need
    """Its own, whose kernels' time is part of ``token_seconds``."""
    token_seconds: float
    call_seconds: float
    """Of one call to the daemon, as a miss makes one."""
    worker_bytes: int
    """Of this process's memory, of which the twin itself has next to nothing."""
    layer_scale: float = 1.0
    """The model's layers by the twin's."""


def measure_twin(config: dict[str, Any], say: Callable[[str], None]) -> Twin:
    """Makes it, serves it, generates with it: seconds of work.

    ``say`` is told if the model has no twin, and another's is taken. Raises ExpertdError if
    there is nothing to serve or compute it with.
    """
    try:
        return _measure(config)
    except Exception as error:
        if config.get("model_type") == shape_config(STAND_IN)["model_type"]:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        say(
            f"what a token costs besides its matrices is {STAND_IN}'s with as many layers, for "
            f"this model with narrow ones cannot be run ({reason})."
        )
        stand_in = shape_config(STAND_IN)
        stand_in["num_hidden_layers"] = config.get("num_hidden_layers", 32)
        return _measure(stand_in)


def twin_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the twin."""
    narrow = {**config}
    narrow.pop("quantization_config", None)
    same_heads = config.get("num_key_value_heads") == config.get("num_attention_heads")
    narrow |= {
        name: min(width, config[name]) for name, width in _WIDTHS.items() if config.get(name)
    }
    narrow["head_dim"] = _WIDTHS["head_dim"]
    if "num_key_value_heads" in config:
        narrow["num_key_value_heads"] = 4 if same_heads else 2
    narrow["num_hidden_layers"] = min(MAX_LAYERS, config["num_hidden_layers"])
    if "layer_types" in narrow:
        narrow["layer_types"] = narrow["layer_types"][: narrow["num_hidden_layers"]]
    for name in _NUM_EXPERTS:
        if name in config:
            narrow[name] = min(MAX_EXPERTS, config[name])
    return narrow


def _measure(config: dict[str, Any]) -> Twin:
    with tempfile.TemporaryDirectory(prefix="expertd-") as folder:
        narrow = twin_config(config)
        pack = make_pack(Path(folder) / "twin", narrow, SCHEME, distinct_records=1)
        (need,) = find_model(str(pack)).needs
        with EmbeddedDaemon(pack, ram=2 * need.expert_bytes) as daemon:
            model = load_model(
                daemon.name, socket=daemon.socket, device=DeviceSettings(speculate_layers=0)
            )
            try:
                model.generation_config.eos_token_id = None
                session = model.expertd.session
                for layer in model.expertd.manifest.layers:
                    for lease in session.waves(layer.layer, range(layer.num_experts)):
                        lease.release()
                _decode(model, TOKENS // 2)
                return Twin(
                    need,
                    _decode(model, TOKENS),
                    _call_seconds(session),
                    pss_bytes(),
                    config["num_hidden_layers"] / narrow["num_hidden_layers"],
                )
            finally:
                model.expertd.close()


def _decode(model: Any, tokens: int) -> float:  # noqa: ANN401 - transformers is untyped
    """Seconds from one token to the next, in the median."""
    times = _Times()
    model.generate(
        torch.arange(3, 3 + _CONTEXT)[None],
        max_new_tokens=tokens + 1,
        do_sample=False,
        pad_token_id=0,
        streamer=times,
        custom_generate=Decoding(times),
    )
    # The first is the prompt, and the second took the prompt's time.
    gaps = [after - before for before, after in zip(times.at[1:], times.at[2:], strict=False)]
    return statistics.median(gaps)


class _Times:
    """A streamer that notes when tokens came."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        """The prompt first, then each token."""
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left."""


def _call_seconds(session: Any) -> float:  # noqa: ANN401 - of either kind
    """A call that has nothing to do: nothing is pinned."""
    layer = next(iter(session.model.layers))
    seconds = []
    for _ in range(_CALLS):
        began = time.perf_counter()
        session.unpin([(layer, 0)])
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
