"""Which models there are, by name."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from expertd_client.aio import AsyncClient
from expertd_inference.engine.sequence import ORIGIN, Origin
from expertd_inference.engine.stream import TokenStream
from expertd_inference.server.accounts import Accounts
from expertd_inference.server.hosting.engine_child import EngineSpec
from expertd_inference.server.hosting.hosted_model import HostedModel
from expertd_inference.server.hosting.model_text import ModelText
from expertd_inference.server.metrics import ServerMetrics
from expertd_inference.server.variants import NO_VARIANT, Variant
from expertd_inference.settings import GenerationSettings
from expertstore.adapter_shelf import KnownAdapter, adapters_directory, list_adapters
from expertstore.errors import ConfigError, ExpertdError, NotFoundError

LIST_SECONDS = 1.0
"""For how long a list of the daemon's models is believed."""


@dataclass
class Entry:
    """A model that can be asked for. Its tokenizer is loaded when it is first used."""

    name: str
    pack: Path
    hosted: HostedModel
    scheme: str
    """How its experts are stored, in a word."""
    created: int = field(default_factory=lambda: int(time.time()))
    variant: Variant = NO_VARIANT
    """What counts where a request does not say."""
    root: "Entry | None" = None
    """The model that computes, if this is a variant of it, or an adapter over it."""
    adapter: str | None = None
    """The directory of the adapter."""
    _text: "asyncio.Task[ModelText] | None" = None

    def submit(
        self,
        tokens: Sequence[int],
        settings: GenerationSettings,
        origin: Origin = ORIGIN,
        images: tuple[bytes, ...] = (),
    ) -> TokenStream:
        """As :meth:`.HostedModel.submit`, with the adapter."""
        if self.adapter is not None:
            settings = replace(settings, adapter=self.adapter)
        return self.hosted.submit(tokens, settings, origin, images)

    async def text(
        self, template: str | None, chat_format: str | None = None, images: Path | None = None
    ) -> ModelText:
        """Raises PackError if the pack has no usable tokenizer."""
        if self._text is None or (self._text.done() and self._text.exception() is not None):
            self._text = asyncio.create_task(self._load(template, chat_format, images))
        return await asyncio.shield(self._text)

    async def _load(
        self, template: str | None, chat_format: str | None, images: Path | None
    ) -> ModelText:
        if self.root is None:
            return await asyncio.to_thread(
                ModelText, self.name, self.pack, template, chat_format, images
            )
        text = await self.root.text(template, chat_format, images)
        return text.in_format(self.variant.chat_template, self.variant.chat_format)


class Catalog:
    """The models of one daemon, under their names, ``aliases``, and as ``variants`` of them."""

    def __init__(
        self,
        specs: Sequence[EngineSpec],
        *,
        aliases: Mapping[str, str],
        variants: Mapping[str, Variant] | None = None,
        template: str | None,
        chat_format: str | None = None,
        images: Path | None = None,
        idle_seconds: float | None,
        accounts: Accounts,
        metrics: ServerMetrics,
        say: Callable[[str], None],
    ) -> None:
        """``specs`` are those of every model's engines but for its name.

        ``template`` and its format are every model's, too. Files of ``images`` may be asked about.
        """
        self._specs = specs
        self._aliases = aliases
        self._variants = variants or {}
        self._template = template
        self._chat_format = chat_format
        self._images = images
        self._idle_seconds = idle_seconds
        self._accounts = accounts
        self._metrics = metrics
        self._say = say
        self.client = AsyncClient(specs[0].socket, tls=specs[0].tls)
        """Of the daemon."""
        self._entries: dict[str, Entry] = {}
        self._made: dict[str, Entry] = {}
        """Variants and adapters that were asked for."""
        self._adapters: dict[str, KnownAdapter] = {}
        """Of this host, by name."""
        self._listed = 0.0
        self._listing: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def loaded(self) -> list[HostedModel]:
        """Those that were asked for."""
        return [entry.hosted for entry in self._entries.values()]

    async def entries(self) -> list[Entry]:
        """All that the daemon serves, in order of their names. Raises as an AsyncClient does."""
        await self._list()
        return [self._entries[name] for name in sorted(self._entries)]

    def waiting_names(self) -> dict[str, str]:
        """Aliases and variants of models that the daemon does not have, by those models' names."""
        names = {name: one.model or "" for name, one in self._variants.items()} | {**self._aliases}
        return {name: model for name, model in sorted(names.items()) if self._known(name) is None}

    async def find(self, name: str | None) -> Entry:
        """The model that a request names; without a name the only one there is.

        Raises NotFoundError if there is no such model, or several and no name.
        """
        entry = self._known(name)
        if entry is None or time.monotonic() - self._listed > LIST_SECONDS:
            try:
                # Of a model that is known a daemon that does not answer holds up nobody.
                await self._list(None if entry is None else LIST_SECONDS)
            except (ExpertdError, TimeoutError):
                if entry is None:
                    raise
                # The daemon is away for a moment; its models will be there again.
                return entry
            entry = self._known(name)
        if entry is None:
            known = {*self._entries, *self._aliases, *self._variants} - {*self.waiting_names()}
            known |= {name for name in self._adapters if self._known(name) is not None}
            names = ", ".join(sorted(known)) or "none"
            what = "Several models are served" if name is None else f"There is no model {name!r}"
            raise NotFoundError(f"{what}; name one of: {names}.")
        return entry

    async def text(self, entry: Entry) -> ModelText:
        """The tokenizer and chat template. Raises PackError if the pack has none to use."""
        return await entry.text(self._template, self._chat_format, self._images)

    def named(self, entry: Entry) -> dict[str, Entry]:
        """What is asked for by all names of a model: its own, those of its variants, aliases."""
        found = {entry.name: entry}
        for name in sorted(self._variants):
            if (variant := self._known(name)) is not None and variant.root is entry:
                found[name] = variant
        for name in self._adapters:
            if (adapter := self._known(name)) is not None and adapter.root is entry:
                found[name] = adapter
        for alias, name in sorted(self._aliases.items()):
            if name in found and alias not in found:
                found[alias] = found[name]
        return found

    async def close(self) -> None:
        """Ends all engines."""
        closing = (entry.hosted.close() for entry in self._entries.values())
        await asyncio.gather(*closing, *self._closing)
        await self.client.close()

    def _known(self, name: str | None) -> Entry | None:
        if name is None:
            return next(iter(self._entries.values())) if len(self._entries) == 1 else None
        name = self._aliases.get(name, name)
        if name in self._entries:
            return self._entries[name]
        if name in self._variants:
            variant, adapter = self._variants[name], None
            root = self._known(variant.model)
        elif name in self._adapters and self._adapters[name].directory.is_dir():
            variant, adapter = NO_VARIANT, str(self._adapters[name].directory)
            root = self._entries.get(self._adapters[name].model)
        else:
            return None
        if root is None or root.root is not None:
            return None
        made = self._made.get(name)
        if made is None or made.root is not root or made.adapter != adapter:
            made = replace(root, name=name, variant=variant, adapter=adapter, root=root, _text=None)
            self._made[name] = made
        return made

    async def _list(self, patience: float | None = None) -> None:
        """Asks the daemon, once for all who wait. Raises TimeoutError after ``patience``."""
        if self._listing is None:
            self._listing = asyncio.create_task(self._ask_daemon())
            self._listing.add_done_callback(self._listing_ended)
        async with asyncio.timeout(patience):
            await asyncio.shield(self._listing)

    def _listing_ended(self, listing: "asyncio.Task[None]") -> None:
        self._listing = None
        if not listing.cancelled():
            listing.exception()  # Whoever waits gets it; there may be nobody.

    async def _ask_daemon(self) -> None:
        summaries = {model.name: model for model in await self.client.list_models()}
        with suppress(ConfigError):  # of a user without a home, who has no adapters
            known = await asyncio.to_thread(list_adapters, adapters_directory())
            self._adapters = {each.name: each for each in known}
        self._listed = time.monotonic()
        for name in self._entries.keys() - summaries.keys():
            if not self._entries[name].hosted.num_sequences:
                gone = NotFoundError(f"There is no model {name!r} any more.")
                closing = asyncio.create_task(self._entries.pop(name).hosted.close(gone))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
        for name in summaries.keys() - self._entries.keys():
            hosted = HostedModel(
                [replace(spec, model=name) for spec in self._specs],
                accounts=self._accounts,
                metrics=self._metrics,
                idle_seconds=self._idle_seconds,
                say=self._say,
            )
            pack = self._specs[0].pack or summaries[name].pack_path
            self._entries[name] = Entry(name, pack, hosted, summaries[name].scheme)
