"""A server's application over a model that recites: what it says is written beforehand."""

import json
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import httpx2
import uvicorn
from starlette.applications import Starlette
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from expertd_inference.engine.channel import Channel
from expertd_inference.engine.sequence import ORIGIN, Origin
from expertd_inference.engine.stops import TokenText
from expertd_inference.engine.stream import TokenStream
from expertd_inference.engine.token import Opening, Token
from expertd_inference.server.app import make_app
from expertd_inference.server.front import Front
from expertd_inference.server.hosting.catalog import Catalog, Entry
from expertd_inference.server.hosting.hosted_model import HostedModel
from expertd_inference.server.hosting.model_text import ModelText
from expertd_inference.server.metrics import ServerMetrics
from expertd_inference.server.serve import bound_socket
from expertd_inference.settings import GenerationSettings

END = "<|im_end|>"
NAME = "recited"


def make_tokenizer(directory: Path, *special: str) -> None:
    """The files of a tokenizer whose tokens are bytes, beside :data:`END` and ``special``."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({byte: at for at, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in (END, *special)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


class RecitedModel:
    """In place of a HostedModel: its answers are ``recitals``, one after the other."""

    def __init__(self, text: ModelText) -> None:
        self.text = text
        self.recitals: deque[str] = deque()
        self.prompts: list[str] = []
        """What was asked."""
        self.settings: list[GenerationSettings] = []
        """And how."""
        self.images: list[tuple[bytes, ...]] = []
        """And about what."""
        self.max_tokens = 4096
        self.endless = False
        """Whether answers get no end: their last token never comes."""

    async def ready(self) -> None:
        """It always is."""

    def submit(
        self,
        tokens: Sequence[int],
        settings: GenerationSettings,
        origin: Origin = ORIGIN,
        images: Sequence[bytes] = (),
    ) -> TokenStream:
        """The next one, up to as many tokens as are wanted."""
        del origin
        self.images.append(tuple(images))
        self.prompts.append(self.text.decode(tokens))
        self.settings.append(settings)
        channel: Channel[Token] = Channel()
        said = self._tokens(self.recitals.popleft(), settings)
        channel.send(said[:-1] if self.endless else said)
        if not self.endless:
            channel.end()
        return TokenStream(channel, lambda: None, num_prompt_tokens=len(tokens))

    def _tokens(self, recital: str, settings: GenerationSettings) -> list[Token]:
        tokenizer = self.text.tokenizer
        end = tokenizer.convert_tokens_to_ids(END)
        said = TokenText(tokenizer, settings, frozenset({end}), settings.max_new_tokens)
        found: list[Token] = []
        for id_ in [*self.text.encode(recital, special=False), end]:
            piece = said.feed(id_)
            opening = None if found else Opening(0, queued_seconds=0.0)
            found.append(Token(id_, piece.text, finish_reason=piece.finish_reason, opening=opening))
            if piece.finish_reason is not None:
                return found
        raise AssertionError(f"{recital!r} has no end")


class RecitedCatalog:
    """In place of a Catalog: one model."""

    def __init__(self, pack: Path, hosted: RecitedModel) -> None:
        self.hosted = hosted
        self._entry = Entry(NAME, pack, cast("HostedModel", hosted), "4bit")

    async def find(self, name: str | None) -> Entry:
        """It, by any name."""
        del name
        return self._entry

    async def text(self, entry: Entry) -> ModelText:
        """Its tokenizer."""
        del entry
        return self.hosted.text

    async def entries(self) -> list[Entry]:
        """It alone."""
        return [self._entry]

    def named(self, entry: Entry) -> dict[str, Entry]:
        """It alone."""
        return {entry.name: entry}


def reciting_client(pack: Path, model: RecitedModel) -> httpx2.AsyncClient:
    """Talks to the application in this process."""
    transport = httpx2.ASGITransport(app=_app(pack, model))
    return httpx2.AsyncClient(transport=transport, base_url="http://recital")


@contextmanager
def reciting_server(pack: Path, model: RecitedModel) -> Iterator[str]:
    """The same by HTTP, from a thread of this process; its URL."""
    settings = uvicorn.Config(_app(pack, model), log_level="warning", lifespan="off")
    server = uvicorn.Server(settings)
    with bound_socket("127.0.0.1", 0) as listening:
        listening.listen()
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def _app(pack: Path, model: RecitedModel) -> Starlette:
    catalog = cast("Catalog", RecitedCatalog(pack, model))
    return make_app(Front(catalog, ServerMetrics(), lambda _: None))
