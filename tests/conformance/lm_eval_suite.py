"""lm-eval against the server: the perplexity that a worker gives, and answers to chats."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2

from bench.heldout import Heldout, example_module, read_heldout
from expertd_testing.daemon import serving
from expertd_testing.server import Server
from tests.conformance.cases import Case, Outcome, Report
from tests.conformance.outside import MODEL, Outside

VERSION = "0.4.13"
_PACKAGES = [f"lm_eval[api]=={VERSION}", "transformers>=5.20,<5.25"]
CONTEXT = 1024
"""Of the example model: prompt and answer together."""
MAX_RATIO = 1.0005
"""Between perplexities of the same windows: batches of other sizes round otherwise."""
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
_PREDICTING = """\
task: heldout
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: bits_per_byte
"""
_CHATTING = """\
task: chats
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  until: ["</assistant>", "\\n\\n\\n"]
  max_gen_toks: 24
  temperature: 0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
_QUESTIONS = ("import os", "def add(a, b):", "class Stack:", "for line in")


def run(outside: Outside, _: Path | None) -> Report:
    """Raises SuiteError."""
    outside.python("lm-eval", _PACKAGES)
    folder = outside.folder / "lm-eval"
    folder.mkdir()
    # Two tokens less than the context: the token that follows a window is sent as well, and one
    # is generated, as the interface has it.
    halves = read_heldout(CONTEXT - 2)
    rolled = _rolled()
    with outside.served() as server:
        outside.say("predicting the held-out text: bench quality's windows")
        by_client = _by_client(outside, server, halves, folder)
        named = {}
        for backend in ("huggingface", "remote"):
            outside.say(f"predicting the held-out text: lm-eval's windows, tokenizer {backend}")
            named[backend] = _by_task(outside, server, backend, folder)
        outside.say("answering chats")
        chats = [*_chats(outside, server, folder)]
    outside.say("predicting the same by a worker")
    worker = _by_worker(
        outside, {"halves": halves, "rolled": rolled, "whole": read_heldout(CONTEXT)}
    )
    rows = [
        ("windows of `bench quality`, two tokens shorter", by_client, worker["halves"]),
        *(
            (f"`loglikelihood_rolling`, tokenizer `{name}`", value, worker["rolled"])
            for name, value in named.items()
        ),
    ]
    lines = ["| held-out text | lm-eval by the server | a worker | ratio |", "|---|---|---|---|"]
    lines += [f"| {name} | {by:.5f} | {own:.5f} | {by / own:.6f} |" for name, by, own in rows]
    lines += [f"| windows of `bench quality`, {CONTEXT} tokens | | {worker['whole']:.5f} | |"]
    cases = [compared(*row) for row in rows]
    return Report("lm-eval", VERSION, [*cases, *chats], ["\n".join(lines)])


def rolling(tokens: Sequence[int], prefix: int, most: int) -> Iterator[tuple[list[int], list[int]]]:
    """Windows as lm-eval has them: ids, and the next tokens of the last of them, each once."""
    stream, done = [prefix, *tokens], 0
    while done < len(tokens):
        end = min(done + most, len(tokens))
        yield stream[max(0, end - most) : end], stream[done + 1 : end + 1]
        done = end


def compared(name: str, by_server: float, by_worker: float) -> Case:
    """Passed if both perplexities are the same but for rounding."""
    ratio = max(by_server / by_worker, by_worker / by_server)
    good = ratio <= MAX_RATIO
    return Case(
        "lm_eval.perplexity",
        name,
        Outcome.PASSED if good else Outcome.FAILED,
        "" if good else f"{by_server:.5f} by the server, {by_worker:.5f} by a worker",
    )


def _rolled() -> Heldout:
    """The held-out files, each in lm-eval's windows."""
    import torch

    corpus, scoring = example_module("corpus"), example_module("scoring")
    tokenizer = corpus.load_tokenizer()
    windows = [
        scoring.Window(torch.tensor(ids), torch.tensor(targets))
        for text in corpus.read_heldout()
        for ids, targets in rolling(tokenizer.encode(text).ids, corpus.SEPARATOR_ID, CONTEXT - 2)
    ]
    num_tokens = sum(len(window.targets) for window in windows)
    return Heldout(windows, num_tokens, num_tokens)


def _by_worker(outside: Outside, heldout: dict[str, Heldout]) -> dict[str, float]:
    from expertd_inference import load_model

    with serving({MODEL: outside.packed}, ram="64MiB", socket=outside.folder / "s") as daemon:
        model = load_model(MODEL, socket=daemon.socket)
        try:
            return {name: one.perplexity(one.nats(model)) for name, one in heldout.items()}
        finally:
            model.expertd.close()


def _by_client(outside: Outside, server: Server, heldout: Heldout, folder: Path) -> float:
    pairs = [
        ([*window.ids.tolist(), int(window.targets[-1])][: -len(window.targets)],
         window.targets.tolist())
        for window in heldout.windows
    ]  # fmt: skip
    requests = folder / "windows.json"
    requests.write_text(json.dumps(pairs))
    program = Path(__file__).with_name("lm_eval_client.py")
    url = f"{server.url}/v1/completions"
    python = outside.python("lm-eval", _PACKAGES)
    printed = outside.run(
        [python, program, requests, url, MODEL, outside.packed, str(CONTEXT)], environment=_OFFLINE
    )
    nats = -sum(json.loads(printed.splitlines()[-1]))
    return math.exp(nats / heldout.num_tokens)


def _by_task(outside: Outside, server: Server, backend: str, folder: Path) -> float:
    corpus = example_module("corpus")
    texts = corpus.read_heldout()
    rows = [{"text": text} for text in texts]
    more = f",tokenizer={outside.packed}" if backend == "huggingface" else ""
    out = _evaluated(
        outside,
        folder / backend,
        _PREDICTING,
        rows,
        "heldout",
        "local-completions",
        f"base_url={server.url}/v1/completions,tokenizer_backend={backend},"
        f"max_length={CONTEXT}{more}",
    )
    bits = json.loads(next(out.rglob("results_*.json")).read_text())
    bits_per_byte = bits["results"]["heldout"]["bits_per_byte,none"]
    num_bytes = sum(len(text.encode()) for text in texts)
    tokenizer = corpus.load_tokenizer()
    num_tokens = sum(len(tokenizer.encode(text).ids) for text in texts)
    return float(2 ** (bits_per_byte * num_bytes / num_tokens))


def _chats(outside: Outside, server: Server, folder: Path) -> Iterator[Case]:
    """Each answer is that of a client without lm-eval."""
    rows = [{"question": question, "answer": ""} for question in _QUESTIONS]
    url = f"{server.url}/v1/chat/completions"
    arguments = f"base_url={url},max_length={CONTEXT}"
    out = _evaluated(
        outside, folder / "chats", _CHATTING, rows, "chats", "local-chat-completions", arguments,
        "--apply_chat_template",
    )  # fmt: skip
    samples = next(out.rglob("samples_*.jsonl")).read_text().splitlines()
    for sample in sorted(map(json.loads, samples), key=lambda one: one["doc_id"]):
        question = sample["doc"]["question"]
        asked = {
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 24,
            "stop": ["</assistant>", "\n\n\n"],
            "seed": 1234,
        }
        answer: Any = httpx2.post(url, json=asked, timeout=60).json()
        wanted, got = answer["choices"][0]["message"]["content"], sample["resps"][0][0]
        good = bool(got) and got == wanted
        yield Case(
            "lm_eval.chats",
            question,
            Outcome.PASSED if good else Outcome.FAILED,
            "" if good else f"{got!r:.80} and not {wanted!r:.80}",
        )


def _evaluated(
    outside: Outside,
    folder: Path,
    task: str,
    rows: Sequence[dict[str, str]],
    name: str,
    model: str,
    arguments: str,
    *more: str,
) -> Path:
    """Where lm-eval has written what it found."""
    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(task.format(data=data))
    python = outside.python("lm-eval", _PACKAGES)
    command = [python.with_name("lm_eval"), "run", "--model", model, "--tasks", name]
    command += ["--include_path", folder, "--output_path", folder / "out", "--log_samples"]
    command += ["--model_args", f"model={MODEL},num_concurrent=4,{arguments}", *more]
    environment = {**_OFFLINE, "HF_HOME": str(folder / "hub")}
    outside.run(command, environment=environment)
    return folder / "out"
