"""Serves the word experts with a part of them in RAM, and says what was hit.

Prompts are held-out modules, each followed by generated tokens; first without hints, then with
what the tokens tell ahead of time.


python examples/word-experts/serve.py /tmp/word-experts-pack --share 0.25
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from expertd_client import Client
from expertd_inference.process.attachment import attach
from expertd_inference.process.embedded import EmbeddedDaemon
from expertd_inference.settings import DeviceSettings, GenerationSettings
from expertd_inference.worker import Worker
from expertstore.pack.manifest import read_manifest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tiny-mixtral"))
import corpus

PROMPT_TOKENS, NEW_TOKENS = 192, 32


def run(pack: Path, ram: int, *, ahead: bool, num_prompts: int) -> dict[str, Any]:
    """What the daemon counted while it served the prompts, one after the other."""
    settings = DeviceSettings(speculate_layers=3 if ahead else 0)
    with EmbeddedDaemon(pack, ram=ram) as daemon, Client(daemon.socket) as client:
        worker = Worker(attach(daemon.name, daemon.socket), device=settings)
        began = time.monotonic()
        for text in corpus.read_heldout()[:num_prompts]:
            tokens = corpus.load_tokenizer().encode(text).ids[:PROMPT_TOKENS]
            worker.engine.generate([tokens], GenerationSettings(max_new_tokens=NEW_TOKENS))
        seconds = time.monotonic() - began
        worker.close()
        model = client.stats()["models"][0]
    accesses = model["host_hits"] + model["nvme_misses"]
    return {
        "tokens told ahead": ahead,
        "hits": round(model["host_hits"] / accesses, 4),
        "misses a token": round(
            model["nvme_misses"] / num_prompts / (PROMPT_TOKENS + NEW_TOKENS), 3
        ),
        "hints": model["prefetch"],
        "seconds": round(seconds, 2),
    }


def main() -> None:
    """Runs both ways."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pack", type=Path)
    parser.add_argument("--share", type=float, default=0.25, help="of the experts in RAM")
    parser.add_argument("--prompts", type=int, default=12)
    arguments = parser.parse_args()
    ram = int(arguments.share * read_manifest(arguments.pack).manifest.expert_bytes)
    for ahead in (False, True):
        report = run(arguments.pack, ram, ahead=ahead, num_prompts=arguments.prompts)
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
