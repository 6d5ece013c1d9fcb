"""A worker: one process's model, attached to the daemon that serves its experts."""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from expertd_client import Session, TlsFiles
from expertd_client.table_rows import TableRows
from expertd_inference.device.group import DeviceGroup, open_devices
from expertd_inference.device.placement import CPU, device_names
from expertd_inference.device.stats import DeviceStats
from expertd_inference.engine.budget import EngineLimits
from expertd_inference.engine.engine import Engine
from expertd_inference.execution.choose import choose_executor
from expertd_inference.execution.crossover import measure_crossover
from expertd_inference.execution.executor import Executor
from expertd_inference.execution.on_device import device_executor
from expertd_inference.execution.room import Room
from expertd_inference.experts.ahead import RouterAhead
from expertd_inference.experts.by_token import TokenRouter, find_token_routers
from expertd_inference.experts.cpu import CpuExperts, connect
from expertd_inference.experts.hints import HintStats, pays_for_prompts
from expertd_inference.experts.recovery import Recovery, say_on_stderr
from expertd_inference.experts.routers import LayerRouter, find_routers
from expertd_inference.kernels.cpu.choice import ReferenceKernels, cpu_kernels
from expertd_inference.kernels.cpu.linear import linear_kernels
from expertd_inference.kv.size import CONTEXT_TOKENS, kv_bytes, kv_bytes_per_token
from expertd_inference.model.language import language_model_of
from expertd_inference.model.loading import TrunkModel, load_trunk
from expertd_inference.model.native_linear import use_native_linears
from expertd_inference.model.pack_config import context_tokens
from expertd_inference.model.prompts import encode
from expertd_inference.model.row_source import SessionRows
from expertd_inference.model.seen import Seen
from expertd_inference.model.sight import Sight
from expertd_inference.model.tokenizer import load_tokenizer
from expertd_inference.process.attachment import (
    DEFAULT_REATTACH_SECONDS,
    ModelAttachment,
    attach,
)
from expertd_inference.process.forks import refuse_in_forks
from expertd_inference.settings import DeviceSettings, KernelsName
from expertstore.closing import Closing
from expertstore.errors import ExpertdError, InvalidInputError, PackError
from expertstore.pack.manifest import Manifest, read_manifest
from expertstore.pack.seeing import sees, why_blind
from expertstore.shared.host_memory import memory_available


class Worker(Closing):
    """A model whose experts are computed from the daemon's memory, until :meth:`close`.

    ``model`` is a transformers model like any other: ``generate``, streamers and caches
    work. It may be called from several threads; their MoE layers take turns. Closing twice
    is harmless; the model cannot be called afterwards.
    """

    def __init__(
        self,
        attachment: ModelAttachment,
        *,
        pack: str | Path | None = None,
        dtype: torch.dtype | None = None,
        kernels: KernelsName | str = KernelsName.AUTO,
        reattach_seconds: float = DEFAULT_REATTACH_SECONDS,
        device: DeviceSettings | None = None,
        say: Callable[[str], None] | None = None,
        exact: bool = False,
        activations: int = 16,
        limits: EngineLimits | None = None,
    ) -> None:
        """Loads the trunk of the attached model; the attachment is closed with the worker.

        If loading fails, the attachment and the devices are closed at once.

        ``pack`` is where this host has the pack, of which the experts' files may be left out;
        without it, where the daemon has it. ``dtype`` is the checkpoint's unless given;
        ``kernels`` are chosen by :func:`~expertd_inference.kernels.cpu.choice.cpu_kernels`. After
        the daemon's end the model waits for another for ``reattach_seconds``; ``say`` is told
        so, once per outage, and what else is not as it should be (without it, a line on
        stderr). ``device`` says where experts are computed, by default on the CPU. With ``exact``
        the bits of a result do not depend on what else is computed beside it; ``activations`` are
        the bits, 16 or 8, of what meets quantized weights where a step has several rows.
        ``limits`` are those of :attr:`engine`. Raises PackError if the pack cannot be loaded,
        InvalidInputError if the device's cache would be too small, or if ``kernels`` or ``device``
        ask for what is not exact, PreconditionError if no kernels are, DeviceError.
        """
        self._attachment = attachment
        self.session = session = attachment.session
        if pack is not None:
            session.pack_path = Path(pack)
        session.say = say or say_on_stderr
        self.pack = session.pack_path
        with ExitStack() as undo:
            undo.callback(attachment.close)
            self.manifest = _manifest_of(session, self.pack)
            settings = device or DeviceSettings()
            if exact and device_names(settings):
                settings = settings.for_exact()
            devices = open_devices(self.manifest, settings, say)
            for each in devices.values():
                undo.callback(each.close)
            self.kernels = cpu_kernels(
                kernels, self.manifest, say or say_on_stderr, exact=exact, activations=activations
            )
            if not devices:
                session.enter_pages()  # while the trunk is loaded
            # Of the reference every step would dequantize the trunk anew.
            native = not devices and not isinstance(self.kernels, ReferenceKernels)
            # A device whose tensors lie with the CPU's leaves the trunk there, too.
            placed = {
                layer: str(device.torch_device)
                for layer, device in devices.items()
                if device.torch_device.type != CPU
            }
            # On a GPU the linears choose kernels of their own.
            linear = self.kernels.linear if native or placed else None
            loaded = load_trunk(
                self.pack,
                self.manifest,
                dtype=dtype,
                linear=linear,
                placed=placed or None,
                say=say or say_on_stderr,
            )
            steps = linear_kernels(activations=activations, exact=exact) if native else None
            self.language = language_model_of(loaded.model)
            """What executors compute of the model: all, or what is no vision part."""
            if steps is not None:
                use_native_linears(self.language, steps)  # before anything holds its modules
                loaded.model.set_output_embeddings(self.language.get_output_embeddings())
            recovery = Recovery(session, reattach_seconds=reattach_seconds, say=say)
            self.tables = loaded.tables
            self.tables.connect(lambda name: SessionRows(TableRows(session, name), recovery))
            self._runner: CpuExperts | DeviceGroup
            self._ahead: RouterAhead | None = None
            self._by_token: Mapping[int, TokenRouter] = {}
            if devices:
                self._runner = DeviceGroup(
                    self.manifest,
                    session,
                    recovery,
                    settings,
                    devices,
                    kv_bytes=_kv_reserve(loaded.model, limits),
                    fill=self.kernels.fill_slots,
                    exact=exact,
                )
                undo.callback(self._runner.close)
                self._runner.connect(
                    loaded.model, loaded.experts, self.manifest, say or say_on_stderr
                )
            else:
                self._ahead = self._look_ahead(loaded, settings, say or say_on_stderr)
                self._runner = connect(
                    loaded.experts, self.manifest, session, recovery, self.kernels, self._ahead
                )
            self.model = loaded.model
            refuse_in_forks(self.model)
            undo.pop_all()
        self._tokenizer: Any = None
        self._sight: Sight | None = None
        self._sight_lock = threading.Lock()
        self.exact = exact
        self.native_rows: dict[str, int | None] = {}
        """Up to how many rows native kernels multiply each form of large matrix, before torch does.

        None: any number. Empty before an engine opens, on devices, and with ``exact``.
        """
        self._limits = limits
        self._engine: Engine | None = None
        self._engine_lock = threading.Lock()
        self._before_close: dict[object, Callable[[], None]] = {}

    @property
    def engine(self) -> Engine:
        """What computes this worker's sequences together: one, made when it is first used.

        Raises as :class:`Engine` does.
        """
        with self._engine_lock:
            if self._engine is None:
                self._engine = Engine(self, self._limits)
            return self._engine

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401 - transformers is untyped
        """The pack's tokenizer, with its chat template. Raises PackError if it has none."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.pack)
        return self._tokenizer

    @property
    def sees(self) -> bool:
        """Whether prompts may have images."""
        return sees(self.pack, self.manifest.model_type)

    def see(self, tokens: Sequence[int], images: Sequence[bytes]) -> tuple[list[int], Seen]:
        """A prompt's tokens with room for its images, and these: :meth:`.model.sight.Sight.see`.

        Raises InvalidInputError if the model does not see, and as that.
        """
        if not self.sees:
            why = why_blind(self.session.model.name, self.manifest.model_type)
            raise InvalidInputError(f"{why}; leave the images out, or ask a model that sees.")
        with self._sight_lock:
            if self._sight is None:
                self._sight = Sight(self.model, self.pack)
        return self._sight.see(tokens, images)

    @property
    def device_stats(self) -> DeviceStats | None:
        """What moved where since the worker began; None on the CPU."""
        return self._runner.stats if isinstance(self._runner, DeviceGroup) else None

    @property
    def hint_stats(self) -> HintStats | None:
        """What became of the hints to the daemon; None if this worker gives none."""
        return None if self._ahead is None else self._ahead.stats

    @property
    def generation_config(self) -> Any:  # noqa: ANN401 - transformers is untyped
        """What the pack wishes for every text: a transformers GenerationConfig."""
        return self.model.generation_config

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has embeddings for."""
        rows: int = self.model.get_input_embeddings().num_embeddings
        return rows

    @property
    def experts_per_token(self) -> list[int]:
        """How many experts the router of each MoE layer chooses for a token."""
        return [layer.experts_per_token for layer in self.manifest.layers]

    @property
    def context_tokens(self) -> int | None:
        """How long a sequence the model goes, prompt included; None if it does not say."""
        return context_tokens(self.model.config)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of the keys and values of all layers."""
        return kv_bytes_per_token(self.model.config, self.model.dtype.itemsize)

    @property
    def kv_bytes(self) -> int:
        """How much memory keys and values may take: a quarter of what is available.

        On a GPU it is what the cache of experts, if nobody says how large that is, leaves for
        them: room for as many tokens as the worker's ``limits`` say, or else for one sequence as
        long as the model goes, to 8192 tokens.
        """
        if isinstance(self._runner, DeviceGroup):
            return _kv_reserve(self.model, self._limits)
        return memory_available() // 4

    def encode(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a text, or of a chat's messages: :func:`.model.prompts.encode`."""
        return encode(self.model, self.tokenizer, prompt)

    def expect(self, tokens: Sequence[int]) -> None:
        """Hints at what a text of these tokens reads for certain.

        That is rows of tables, and experts of layers that choose them by token.
        """
        self.tables.expect(tokens)
        experts = [
            (layer, expert)
            for layer, router in self._by_token.items()
            for expert in router.of_text(tokens)
        ]
        with suppress(ExpertdError):  # whoever computes is told
            self.session.expect(experts[: self.session.max_wave])

    def open_executor(self, room: Room) -> Executor:
        """What computes this model's steps, with memory for as much as ``room``.

        Raises CapacityError if there is none.
        """
        say = self.session.say or say_on_stderr
        if isinstance(self._runner, DeviceGroup):
            longest = self.context_tokens or CONTEXT_TOKENS
            return device_executor(
                self.language, self._runner, room, longest, say, exact=self.exact
            )
        experts, linears = measure_crossover(self.language, self.kernels, say)
        executor = choose_executor(self, room)
        # A program multiplies any number of rows.
        self.native_rows = experts if executor.name == "program" else experts | linears
        return executor

    def before_close(self, call: Callable[[], None]) -> Callable[[], object]:
        """Has ``call`` called when the worker is about to be closed; the result forgets it."""
        key = object()
        self._before_close[key] = call
        return partial(self._before_close.pop, key, None)

    def close(self) -> None:
        """Ends its engines, and the session; its leases are free at once."""
        for call in [*self._before_close.values()]:
            call()
        self.tables.close()
        try:
            self._runner.close()
        finally:
            self._attachment.close()

    def _look_ahead(
        self, loaded: TrunkModel, settings: DeviceSettings, say: Callable[[str], None]
    ) -> RouterAhead | None:
        """What hints at the experts of the layers to come; None if nothing can or shall."""
        # Of copies nothing is read ahead: the daemon's disk is not what is waited for.
        if not any(settings.hint_choices) or not self.session.shares_memory:
            return None
        self._by_token = find_token_routers(loaded.model, loaded.experts)
        routers: dict[int, LayerRouter | TokenRouter] = {
            **find_routers(loaded.model, loaded.experts, self.manifest),
            **self._by_token,
        }
        layers = sorted(loaded.experts)
        if missing := [layer for layer in layers[1:] if layer not in routers]:
            say(
                f"{len(missing)} of {len(layers)} layers have a router that cannot be asked ahead "
                "of time; their experts are not hinted at"
            )
        return RouterAhead(
            layers,
            routers,
            self.session,
            choices=settings.hint_choices,
            num_experts=settings.speculate_experts,
            hints_prompts=pays_for_prompts(
                self.session.model.record_bytes,
                max(layer.num_experts for layer in self.manifest.layers),
                self.session.max_wave,
            ),
        )


def load_model(
    name: str,
    *,
    socket: str | Path | None = None,
    tls: TlsFiles | None = None,
    cache_bytes: int | None = None,
    pack: str | Path | None = None,
    dtype: torch.dtype | None = None,
    kernels: KernelsName | str = KernelsName.AUTO,
    reattach_seconds: float = DEFAULT_REATTACH_SECONDS,
    device: str | DeviceSettings = CPU,
) -> Any:  # noqa: ANN401 - a transformers.PreTrainedModel, which is untyped
    """The transformers model ``name`` that the daemon in directory ``socket`` serves.

    Without ``socket`` it is the daemon in ``$XDG_RUNTIME_DIR/expertd`` or in ``/run/expertd``; for
    one on another host see :func:`~expertd_inference.process.attachment.attach`.

    Its ``name_or_path`` is the pack, which has the tokenizer; its ``expertd`` is the
    :class:`Worker`, whose ``close`` ends the session before the process does. For the
    other arguments see there. Raises UnavailableError if no daemon answers, NotFoundError
    if it serves no such model, PackError if the pack cannot be loaded.
    """
    attachment = attach(name, socket, tls=tls, cache_bytes=cache_bytes)
    worker = Worker(
        attachment,
        pack=pack,
        dtype=dtype,
        kernels=kernels,
        reattach_seconds=reattach_seconds,
        device=DeviceSettings(device=device) if isinstance(device, str) else device,
    )
    worker.model.expertd = worker
    return worker.model


def _kv_reserve(model: Any, limits: EngineLimits | None) -> int:  # noqa: ANN401 - transformers'
    """Bytes on a GPU that its cache of experts leaves for keys and values."""
    if limits is None or limits.kv_tokens is None:
        return kv_bytes(model.config, model.dtype.itemsize)
    return limits.kv_tokens * kv_bytes_per_token(model.config, model.dtype.itemsize)


def _manifest_of(session: Session, pack: Path) -> Manifest:
    if not session.shares_memory and not pack.exists():
        raise PackError(
            f"{pack} is not on this host: copy the daemon's {session.model.pack_path} here, its "
            "experts-*.safetensors left out, and say where it is (--pack DIR)."
        )
    found = read_manifest(pack)
    if found.fingerprint != session.model.fingerprint:
        raise PackError(
            f"{pack} is not, or no longer, the pack that the daemon loaded as "
            f"{session.model.name}; load it again."
        )
    return found.manifest
