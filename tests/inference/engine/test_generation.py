"""Text from a prompt: what transformers' own generate gives, counted and streamed."""

import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, TextIteratorStreamer

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import SCHEMES
from expertd_client import Client
from expertd_inference import GenerationSettings, Worker, generate, load_model
from expertd_inference.process import memory
from expertd_inference.process.attachment import attach
from expertd_testing.daemon import Daemon, serving
from expertd_testing.tiny_models import byte_tokenizer, make_model
from expertstore.errors import (
    InvalidInputError,
    NotFoundError,
    PackError,
    PreconditionError,
    PromptTooLongError,
)
from tests.inference.greedy import greedy, prompt_of

Make = Callable[..., Any]

PROMPT = "Once upon a time"
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack whose tokenizer has a chat template."""
    path = tmp_path_factory.mktemp("chatty")
    make_model("olmoe").save_pretrained(path / "checkpoint")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path / "checkpoint")
    pack(Request(path / "checkpoint", path / "pack", SCHEMES["bf16"]))
    return path / "pack"


@pytest.fixture(scope="module")
def daemon(packed: Make, chatty: Path) -> Iterator[Daemon]:
    models = {"example": packed("example"), "mixtral": packed("mixtral"), "chatty": chatty}
    with serving(models, ram=64 << 20) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def mixtral(daemon: Daemon) -> Iterator[Worker]:
    with Worker(attach("mixtral", daemon.socket)) as worker:
        yield worker


@pytest.fixture(scope="module")
def chat(daemon: Daemon) -> Iterator[Worker]:
    with Worker(attach("chatty", daemon.socket)) as worker:
        yield worker


def test_load_model_gives_a_transformers_model(daemon: Daemon, stock: Make) -> None:
    model = load_model("example", socket=daemon.socket)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    inputs = tokenizer("def main():", return_tensors="pt")
    ours = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    theirs = stock("example").generate(**inputs, max_new_tokens=12, do_sample=False)
    assert ours.tolist() == theirs.tolist()
    model.expertd.close()
    model.expertd.close()
    with pytest.raises(PreconditionError, match="was closed"):
        model.generate(**inputs, max_new_tokens=2)


def test_generate_counts(mixtral: Worker) -> None:
    pieces: list[str] = []
    done = generate(mixtral, PROMPT, GenerationSettings(max_new_tokens=16), on_text=pieces.append)
    result = done.result
    assert not done.interrupted
    assert result.prompt_tokens == len(PROMPT)
    assert result.new_tokens == len(result.tokens) == 16
    assert "".join(pieces) == result.text == mixtral.tokenizer.decode(result.tokens)
    assert result.ttft_seconds is not None
    assert 0 < result.ttft_seconds < 60
    assert result.tokens_per_second is not None
    assert result.tokens_per_second > 0
    # The prompt touches each of 8 experts of 3 layers once, each of 15 steps 2 of each.
    assert 15 * 2 * 3 < result.host_hits + result.nvme_misses <= (8 + 15 * 2) * 3
    assert result.peak_pss_bytes is None


def test_greedy_text_is_that_of_transformers(daemon: Daemon, stock: Make) -> None:
    settings = GenerationSettings(max_new_tokens=16)
    with Worker(attach("mixtral", daemon.socket), dtype=torch.float32) as worker:
        result = generate(worker, PROMPT, settings).result
        prompt = worker.encode(PROMPT)
    assert result.tokens == greedy(stock("mixtral", torch.float32), prompt, 16)
    assert result.executor != "turns", "ours computed it"


def test_greedy_text_in_16_bits_differs_by_rounding_alone(mixtral: Worker, stock: Make) -> None:
    """The seventh token's two best scores differ by less than transformers' own rounding."""
    ours = generate(mixtral, PROMPT, GenerationSettings(max_new_tokens=16)).result.tokens
    prompt = mixtral.encode(PROMPT)
    assert ours[:6] == greedy(stock("mixtral"), prompt, 16)[:6]
    ids = torch.tensor([[*prompt, *ours[:-1]]])
    with torch.no_grad():
        wide, narrow = (
            stock("mixtral", dtype)(ids).logits[0, len(prompt) - 1 :].float()
            for dtype in (torch.float32, torch.bfloat16)
        )
    behind = wide.amax(dim=1) - wide[range(16), ours]
    # Each of two scores may be off by as much as transformers' in the same type.
    assert (behind <= 2 * (narrow - wide).abs().amax(dim=1)).all(), behind
    assert (behind == 0).sum() >= 14


def test_memory_is_measured_for_whom_asks(mixtral: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(memory, "pss_bytes", lambda: asked.append("asked") or 5)
    settings = GenerationSettings(max_new_tokens=2)
    assert generate(mixtral, "x", settings).result.peak_pss_bytes is None
    assert not asked
    assert generate(mixtral, "x", settings, measure_memory=True).result.peak_pss_bytes == 5


def test_one_token_has_no_rate(mixtral: Worker) -> None:
    result = generate(mixtral, "x", GenerationSettings(max_new_tokens=1)).result
    assert result.new_tokens == 1
    assert result.tokens_per_second is None
    assert result.ttft_seconds is not None


def test_stops_at_the_end_of_text(mixtral: Worker) -> None:
    tokens = generate(mixtral, "abc", GenerationSettings(max_new_tokens=12)).result.tokens
    config = mixtral.model.generation_config
    before = config.eos_token_id
    try:
        # Declare the fourth token the end.
        config.eos_token_id = tokens[3]
        result = generate(mixtral, "abc", GenerationSettings(max_new_tokens=12)).result
    finally:
        config.eos_token_id = before
    assert result.tokens == tokens[: tokens.index(tokens[3]) + 1]


def test_the_end_of_text_is_not_text(mixtral: Worker) -> None:
    pieces: list[str] = []
    end = mixtral.tokenizer.eos_token_id
    settings = GenerationSettings(allowed_tokens=(end,))
    result = generate(mixtral, "abc", settings, on_text=pieces.append).result
    assert (result.tokens, result.text, result.finish_reason) == ([end], "", "stop")
    assert pieces == []


def test_sampling_is_repeatable_by_seed(mixtral: Worker) -> None:
    def sample(seed: int, temperature: float = 1.0) -> list[int]:
        settings = GenerationSettings(max_new_tokens=16, temperature=temperature, seed=seed)
        return generate(mixtral, "abc", settings).result.tokens

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    greedy_tokens = generate(mixtral, "abc", GenerationSettings(max_new_tokens=16)).result.tokens
    assert sample(1) != greedy_tokens
    assert sample(1, temperature=0.001) == greedy_tokens


def test_top_p(mixtral: Worker) -> None:
    # So little probability is held by the likeliest token alone.
    settings = GenerationSettings(max_new_tokens=16, temperature=1.0, top_p=1e-6, seed=1)
    greedy_tokens = generate(mixtral, "abc", GenerationSettings(max_new_tokens=16)).result.tokens
    assert generate(mixtral, "abc", settings).result.tokens == greedy_tokens


def test_settings_of_the_checkpoint_do_not_make_it_random(
    mixtral: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many checkpoints come with do_sample and a temperature in their generation config.
    expected = generate(mixtral, "abc", GenerationSettings(max_new_tokens=16)).result.tokens
    config = mixtral.model.generation_config
    for name, value in {"do_sample": True, "temperature": 5.0, "top_k": 50, "top_p": 0.5}.items():
        monkeypatch.setattr(config, name, value)
    assert generate(mixtral, "abc", GenerationSettings(max_new_tokens=16)).result.tokens == expected


def test_chat(chat: Worker) -> None:
    ids = chat.encode([{"role": "user", "content": "Hello"}])
    assert chat.tokenizer.decode(ids) == "[user] Hello\n[assistant] "
    done = generate(chat, "Hello", GenerationSettings(max_new_tokens=4), chat=True)
    assert done.result.prompt_tokens == len("[user] Hello\n[assistant] ")


def test_chat_without_a_template(mixtral: Worker) -> None:
    with pytest.raises(InvalidInputError, match="no chat template"):
        generate(mixtral, "Hello", chat=True)


def test_transformers_streamers_work(mixtral: Worker) -> None:
    ids = torch.tensor([mixtral.tokenizer("abc").input_ids])
    streamer = TextIteratorStreamer(mixtral.tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=mixtral.model.generate,
        args=(ids,),
        kwargs={
            "attention_mask": torch.ones_like(ids),
            "streamer": streamer,
            "max_new_tokens": 12,
            "do_sample": False,
            "pad_token_id": 0,
        },
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == generate(mixtral, "abc", GenerationSettings(max_new_tokens=12)).result.text


def test_two_threads_generate_with_one_model(mixtral: Worker) -> None:
    prompts = [prompt_of(20, seed=seed) for seed in range(2)]
    expected = [greedy(mixtral.model, prompt, 12) for prompt in prompts]
    results: dict[int, list[int]] = {}

    def run(index: int) -> None:
        results[index] = greedy(mixtral.model, prompts[index], 12)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[0], results[1]] == expected


def test_interrupt_keeps_what_there_is(mixtral: Worker) -> None:
    pieces: list[str] = []

    def on_text(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    settings = GenerationSettings(max_new_tokens=400, temperature=1.0, seed=3)
    done = generate(mixtral, "abc", settings, on_text=on_text)
    assert done.interrupted
    assert 2 < done.result.new_tokens < 400
    assert "".join(pieces) == done.result.text
    # And the worker is as good as before.
    assert generate(mixtral, "abc", GenerationSettings(max_new_tokens=4)).result.new_tokens == 4


def test_empty_prompt(mixtral: Worker) -> None:
    with pytest.raises(InvalidInputError, match="prompt is empty"):
        generate(mixtral, "")


def test_prompt_that_fills_the_context(mixtral: Worker) -> None:
    with pytest.raises(PromptTooLongError, match=r"512 tokens, which leaves no room.* 512"):
        generate(mixtral, "x" * 512)
    result = generate(mixtral, "x" * 508, GenerationSettings(max_new_tokens=100)).result
    assert result.new_tokens <= 4


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"seed": -1},
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(settings))):
        GenerationSettings(**settings)


def test_unknown_model_names_those_there_are(daemon: Daemon) -> None:
    with pytest.raises(NotFoundError, match=r"no model 'nope'.*chatty, example, mixtral"):
        attach("nope", daemon.socket)
    with pytest.raises(NotFoundError, match=r"several models.*chatty, example, mixtral"):
        attach(None, daemon.socket)


def test_the_only_model_needs_no_name(packed: Make) -> None:
    with serving({"only": packed("mixtral")}) as daemon, attach(None, daemon.socket) as attached:
        assert attached.session.model.name == "only"


def test_a_pack_without_tokenizer(packed: Make, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    make_model("mixtral").save_pretrained(checkpoint)
    pack(Request(checkpoint, tmp_path / "pack", SCHEMES["bf16"]))
    with (
        serving({"m": tmp_path / "pack"}) as daemon,
        Worker(attach("m", daemon.socket)) as worker,
        pytest.raises(PackError, match="no usable tokenizer"),
    ):
        generate(worker, "abc")


def test_a_pack_that_was_replaced(packed: Make, tmp_path: Path) -> None:
    path = tmp_path / "pack"
    shutil.copytree(packed("mixtral"), path)
    with serving({"m": path}) as daemon:
        (path / "pack.json").write_bytes((packed("olmoe") / "pack.json").read_bytes())
        with pytest.raises(PackError, match="no longer, the pack"):
            load_model("m", socket=daemon.socket)


def sessions(client: Client) -> list[Any]:
    found = client.stats()["sessions"]
    assert isinstance(found, list)
    return found


def test_session_ends_with_the_model(daemon: Daemon) -> None:
    with Client(daemon.socket) as client:
        before = sessions(client)
        model = load_model("mixtral", socket=daemon.socket)
        during = sessions(client)
        model.expertd.close()
        deadline = time.monotonic() + 5
        while len(sessions(client)) > len(before) and time.monotonic() < deadline:
            time.sleep(0.02)
        after = sessions(client)
    assert len(during) == len(before) + 1
    assert len(after) == len(before)


def test_the_example_of_many_sequences_runs(
    packed: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[3] / "docs/generating.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (example,) = (block for block in blocks if "engine.submit" in block)
    exec(example.replace('"./mixtral"', repr(str(packed("example")))), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    ends = [line[-1] for line in lines if line[-1] in ("length", "stop")]
    assert len(ends) == 2
    assert sum(line[-1] == "None" for line in lines) >= 2


SAMPLES = [
    sample
    for sample in re.findall(
        r"^```python\n(.*?)^```",
        (Path(__file__).parents[3] / "docs/generating.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    if "EmbeddedDaemon(" in sample
]


@pytest.mark.parametrize("sample", SAMPLES, ids=["generate", "engine"])
def test_samples_of_the_page_run(
    sample: str,
    packed: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mixtral").symlink_to(packed("example"))
    monkeypatch.chdir(tmp_path)
    exec(compile(sample.replace("24GiB", "16MiB"), "docs/generating.md", "exec"), {})
    assert len(capsys.readouterr().out) > 100
