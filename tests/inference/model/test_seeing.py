"""Models that see, beside stock transformers with the same weights and images."""

import threading
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_inference.engine.budget import EngineLimits
from expertd_inference.engine.channel import Channel
from expertd_inference.engine.chunks import span_of
from expertd_inference.engine.engine import Engine
from expertd_inference.engine.sequence import Origin, Sequence
from expertd_inference.engine.stream import TokenStream
from expertd_inference.engine.token import Token
from expertd_inference.execution.batch import Batch
from expertd_inference.execution.choose import choose_for
from expertd_inference.execution.executor import Executor
from expertd_inference.execution.room import Room
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.model.language import language_model_of
from expertd_inference.model.sight import Sight
from expertd_inference.settings import GenerationSettings
from expertd_testing.patience import HANG_SECONDS
from expertd_testing.tiny_models import byte_tokenizer
from expertd_testing.tiny_seeing import BEGIN, END, IMAGE, make_seeing_checkpoint, picture
from expertstore.pack.manifest import read_manifest
from expertstore.pack.seeing import SEEING, sees, why_blind
from tests.architectures.parity import load, logits
from tests.architectures.tiny_kimi import make_kimi_checkpoint
from tests.inference.greedy import prompt_of

ROOM = Room(num_blocks=24, num_sequences=4, num_rows=512)
ALL = GenerationSettings(prompt_logprobs=0)
"""Logits of all rows of a prompt."""
IMAGES = [picture(96, 130), picture(200, 60, seed=1, form="JPEG")]
PROMPT = [*prompt_of(11, seed=1), BEGIN, IMAGE, END, *prompt_of(70, seed=2), BEGIN, IMAGE, END, 65]


class Eyes(NamedTuple):
    """One architecture: what stock has of it, and what is ours."""

    stock: Any
    processor: Any
    ours: Any
    sight: Sight

    @torch.no_grad()
    def expected(self, tokens: list[int], images: list[bytes]) -> Tensor:
        """Stock's logits of tokens that have room for ``images``."""
        ids = torch.tensor([tokens])
        pictures = [Image.open(BytesIO(data)).convert("RGB") for data in images]
        given = dict(self.processor(images=pictures, return_tensors="pt")) if images else {}
        given.pop("num_soft_tokens_per_image", None)
        types = (ids == IMAGE).int()
        logits: Tensor = self.stock(input_ids=ids, mm_token_type_ids=types, **given).logits[0]
        return logits


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Eyes]:
    @cache
    def make(model_type: str) -> Eyes:
        source = make_seeing_checkpoint(model_type, tmp_path_factory.mktemp("c") / model_type)
        target = source.parent / "pack"
        pack(Request(source, target, choose_scheme("bf16")))
        kind: Any = getattr(transformers, SEEING[model_type])
        stock = kind.from_pretrained(source, dtype=torch.float32).eval()
        ours = load(target, torch.float32)
        processor = AutoImageProcessor.from_pretrained(source, backend="pil")
        return Eyes(stock, processor, ours, Sight(ours, target))

    return make


class Run:
    """Sequences that are computed by an executor, as the scheduler would have them computed."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._logits: dict[int, list[Tensor]] = {}
        self._num = 0

    def add(self, tokens: list[int], seen: Any = None) -> Sequence:
        sequence = Sequence(self._num, tokens, ALL, seen=seen)
        sequence.blocks = [*range(self._num, ROOM.num_blocks, 3)][::-1]
        sequence.state = self._num
        self._logits[self._num] = []
        self._num += 1
        return sequence

    def step(self, *rows: tuple[Sequence, int]) -> None:
        """So many more rows of each, in one batch if the executor takes one."""
        spans = [span_of(one, _end(one, num)) for one, num in rows]
        whole = Batch(tuple(spans))
        batches = [whole] if self._executor.fits(whole) else [Batch((span,)) for span in spans]
        for batch in batches:
            counts = [span.num_wanted for span in batch.spans]
            for span, part in zip(
                batch.spans, torch.split(self._executor.forward(batch), counts), strict=True
            ):
                self._logits[span.sequence].append(part.clone())
        for span, (one, _) in zip(spans, rows, strict=True):
            one.num_computed += span.num_rows

    def logits(self, sequence: Sequence) -> Tensor:
        return torch.cat(self._logits[sequence.id])


def _end(sequence: Sequence, num: int) -> int:
    """Where a chunk of about ``num`` rows ends."""
    begin = sequence.num_computed
    end = min(begin + num, len(sequence.tokens))
    return end if sequence.seen is None else sequence.seen.cut(begin, end)


def error_of(ours: Tensor, theirs: Tensor) -> float:
    """In the square mean."""
    return float((ours - theirs).norm() / theirs.norm())


needs_native = pytest.mark.skipif(
    native_library().library is None, reason="no native kernels: no compiler, or EXPERTD_NATIVE=0"
)


@needs_native
@pytest.mark.parametrize("kernels", [None, NativeKernels], ids=["modules", "program"])
@pytest.mark.parametrize("model_type", list(SEEING))
def test_images_in_chunks_beside_text(
    model_type: str, kernels: type[NativeKernels] | None, eyes: Callable[[str], Eyes]
) -> None:
    """Two images, one cut by a chunk's end; a text beside them, one more image; all go on."""
    one = eyes(model_type)
    executor = choose_for(
        language_model_of(one.ours), ROOM, print, kernels=None if kernels is None else kernels()
    )
    tokens, seen = one.sight.see(PROMPT, IMAGES)
    others, also_seen = one.sight.see(PROMPT[:20], IMAGES[:1])
    text, new = prompt_of(40, seed=3), prompt_of(3, seed=4)
    run = Run(executor)
    first, second, third = run.add(tokens, seen), run.add(text), run.add(others, also_seen)
    run.step((first, 20), (second, 30))
    run.step((second, 10), (first, first.num_missing - 1), (third, len(others)))
    run.step((first, 1))
    for token in new:
        for sequence in (first, second, third):
            sequence.append(token)
        run.step((third, 1), (first, 1), (second, 1))
    for sequence, images in ((first, IMAGES), (second, []), (third, IMAGES[:1])):
        assert error_of(run.logits(sequence), one.expected(sequence.tokens, images)) < 1e-4
    # And the images matter.
    blank = one.expected(first.tokens, [picture(96, 130, seed=2), IMAGES[1]])
    assert error_of(run.logits(first)[:20], blank[:20]) > 1e-3
    executor.close()


class SeeingWorker(NamedTuple):
    """What an engine needs of a model, without a daemon."""

    eyes: Eyes
    context_tokens: int | None = 1024
    experts_per_token: tuple[int, ...] = (2, 2, 2)
    vocabulary: int = 272
    kv_bytes_per_token: int = 1
    kv_bytes: int = 1 << 20

    @property
    def native_rows(self) -> dict[str, int | None]:
        return {}

    @property
    def tokenizer(self) -> Any:
        return byte_tokenizer()

    @property
    def generation_config(self) -> Any:
        return self.eyes.ours.generation_config

    def encode(self, prompt: Any) -> list[int]:
        raise AssertionError(prompt)

    def expect(self, tokens: Any) -> None:
        del tokens

    def see(self, tokens: Any, images: Any) -> Any:
        return self.eyes.sight.see(tokens, images)

    def open_executor(self, room: Room) -> Executor:
        kernels = NativeKernels() if native_library().library is not None else None
        return choose_for(language_model_of(self.eyes.ours), room, print, kernels=kernels)

    def before_close(self, call: Callable[[], None]) -> Callable[[], object]:
        del call
        return lambda: None


def wait_for(event: threading.Event) -> None:
    assert event.wait(HANG_SECONDS)


@pytest.mark.parametrize(("model_type", "kv_tokens"), [("qwen3_vl_moe", 448), ("gemma4", 768)])
def test_an_engine_goes_on_as_stock_does(
    model_type: str, kv_tokens: int, eyes: Callable[[str], Eyes]
) -> None:
    """With prefixes found up to an image of other content, preempted, and in another engine."""
    one = eyes(model_type)
    worker = SeeingWorker(one)
    settings = GenerationSettings(max_new_tokens=60, ignore_eos=True)
    # Of one size: their prompts have the same tokens.
    images = [IMAGES, [IMAGES[0], picture(200, 60, seed=5)], [picture(96, 130, seed=6), IMAGES[1]]]
    limits = EngineLimits(max_sequences=3, kv_tokens=kv_tokens, chunk_rows=64)
    together = threading.Event()
    together.set()
    with Engine(worker, limits, lambda: wait_for(together)) as engine:
        first = [token.id for token in engine.submit(PROMPT, settings, images=IMAGES)]
        together.clear()
        streams = [engine.submit(PROMPT, settings, images=each) for each in images]
        together.set()
        texts = [[*stream] for stream in streams]
        assert engine.stats.num_preemptions
        cached = [text[0].opening.num_cached_tokens for text in texts if text[0].opening]
        num_prompt = streams[0].num_prompt_tokens
        assert cached[0] >= num_prompt // 64 * 64
        assert 14 <= cached[1] < num_prompt - 3
        assert cached[2] <= 16
        opening = texts[0][0].opening
        assert opening is not None
        assert opening.num_image_tokens == num_prompt - len(PROMPT)
        outlet: Channel[Token] = Channel()
        engine.relay(outlet, PROMPT, settings, Origin(generated=tuple(first[:5])), tuple(IMAGES))
        rest = [token.id for token in TokenStream(outlet, lambda: None, num_prompt_tokens=0)]
    assert rest == first[5:]
    assert first == [token.id for token in texts[0]]
    for each, text in zip(images, texts, strict=True):
        tokens, _ = one.sight.see(PROMPT, each)
        ids = [token.id for token in text]
        expected = one.expected([*tokens, *ids], each)[len(tokens) - 1 : -1].argmax(-1)
        assert ids == expected.tolist()


def test_the_vision_part_in_8_bits_or_left_out(eyes: Callable[[str], Eyes], tmp_path: Path) -> None:
    one = eyes("qwen3_vl_moe")
    source = Path(one.stock.name_or_path)
    said: list[str] = []
    scheme = choose_scheme("bf16", vision="8g64")
    pack(Request(source, tmp_path / "8", scheme), on_notice=said.append)
    assert "sees: its vision part is packed as well" in said[0]
    quantized = {tensor.name for tensor in read_manifest(tmp_path / "8").manifest.trunk_quantized}
    assert len(quantized) > 8
    assert all(name.startswith("model.visual.") for name in quantized)
    tokens, exact = one.sight.see(PROMPT, IMAGES)
    again, near = Sight(load(tmp_path / "8", torch.float32), tmp_path / "8").see(PROMPT, IMAGES)
    assert tokens == again
    assert 1e-5 < error_of(near.rows, exact.rows) < 0.05
    pack(Request(source, tmp_path / "t", choose_scheme("bf16"), text_only=True))
    assert not sees(tmp_path / "t", "qwen3_vl_moe")
    blind = load(tmp_path / "t", torch.float32)
    assert blind.model.visual is None
    text = prompt_of(20, seed=1)
    assert torch.equal(logits(blind, text)[0], one.expected(text, []))


def test_a_language_model_that_is_only_within_one_that_sees(tmp_path: Path) -> None:
    """Kimi K2.5, whose images transformers prepares by torchvision alone."""
    source = make_kimi_checkpoint(tmp_path / "c")
    said: list[str] = []
    pack(Request(source, tmp_path / "p", choose_scheme("bf16")), on_notice=said.append)
    assert "has no place for are left out" in said[0]
    kind = transformers.Kimi_K25ForConditionalGeneration
    model_type = read_manifest(tmp_path / "p").manifest.model_type
    assert why_blind("kimi", model_type) == (
        "kimi takes text only, since transformers prepares its images by torchvision alone"
    )
    stock = kind.from_pretrained(source, dtype=torch.bfloat16)
    prompt = prompt_of(30, seed=1)
    assert torch.equal(logits(load(tmp_path / "p"), prompt), logits(stock, prompt))
