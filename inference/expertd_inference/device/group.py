"""All devices of one worker: from settings to runners, and what they did together."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn

from expertd_inference.device.cache import SlotCache
from expertd_inference.device.calibration import Probe, calibrated, calibration
from expertd_inference.device.cost import TYPICAL, CostModel, Rates
from expertd_inference.device.device import Device
from expertd_inference.device.placement import cache_size, device_names, place_layers
from expertd_inference.device.recorder import GraphRecorder
from expertd_inference.device.runner import DeviceExpertsRunner, DeviceParts, FillSlots
from expertd_inference.device.stats import DeviceStats
from expertd_inference.device.transaction import StepTransaction
from expertd_inference.device.whole import WholeExperts
from expertd_inference.device.whole_choice import MIN_WHOLE_LINK, whole_experts
from expertd_inference.experts.call import ExpertsSeat, seat_of, take_seat
from expertd_inference.experts.cpu import experts_spec
from expertd_inference.experts.recovery import SESSION_ENDED, Recovery, say_on_stderr
from expertd_inference.experts.routers import find_routers
from expertd_inference.experts.source import HeldSource
from expertd_inference.kernels.cpu.reference import fill_slots
from expertd_inference.settings import DecodeGraphsMode, DeviceSettings, OnMiss
from expertstore.errors import InvalidInputError, PreconditionError
from expertstore.pack.manifest import Manifest


def _open_cuda(name: str, say: Callable[[str], None] | None) -> Device:
    # It looks for a driver, which the CPU's workers do without.
    from expertd_inference.device.cuda import CudaDevice

    return CudaDevice(name, say=say)


DEVICE_KINDS: dict[str, Callable[[str, Callable[[str], None] | None], Device]] = {
    "cuda": _open_cuda
}
"""How a device is opened, by what its name begins with; tests add a fake."""


def open_device(name: str, say: Callable[[str], None] | None = None) -> Device:
    """The device of that name: ``cuda``, ``cuda:1``.

    ``say`` is told what is degraded. Raises InvalidInputError for a name that no device has,
    DeviceError if there is no such one here.
    """
    kind, _, number = name.partition(":")
    if not number or number.isdecimal():
        opener = DEVICE_KINDS.get(kind)
        if opener is not None:
            return opener(name, say)
    raise InvalidInputError(f"There is no device {name!r}; give cpu, or such as cuda:0.")


def open_devices(
    manifest: Manifest, settings: DeviceSettings, say: Callable[[str], None] | None = None
) -> dict[int, Device]:
    """The device of each MoE layer; none at all for the CPU. Raises as :func:`open_device`."""
    names = device_names(settings)
    if not names:
        return {}
    placed = place_layers([layer.layer for layer in manifest.layers], names)
    with ExitStack() as undo:
        devices = {}
        for name in names:
            devices[name] = open_device(name, say)
            undo.callback(devices[name].close)
        undo.pop_all()
    return {layer: devices[name] for layer, name in placed.items()}


class DeviceGroup:
    """The runners of a model's layers, by device, and the steps that they share."""

    def __init__(
        self,
        manifest: Manifest,
        source: HeldSource,
        recovery: Recovery,
        settings: DeviceSettings,
        devices: Mapping[int, Device],
        *,
        kv_bytes: int = 0,
        rates: Rates | None = None,
        fill: FillSlots = fill_slots,
        exact: bool = False,
    ) -> None:
        """``devices`` are those of the MoE layers, opened, with their part of the trunk on them.

        ``kv_bytes`` are what the keys and values of all layers may come to: an automatic cache
        leaves room for them, on each device for its layers' share. ``rates`` are measured when it
        connects, unless they are given or nobody asks. With ``exact`` the bits of a row do not
        depend on the other rows. Allocates the devices' caches. Raises InvalidInputError,
        DeviceMemoryError.
        """
        self._stats = DeviceStats()
        self.devices = list({id(device): device for device in devices.values()}.values())
        self.transaction = StepTransaction(source, recovery, self.devices)
        self._runners: dict[int, DeviceExpertsRunner] = {}
        """By layer."""
        layouts = {layer.layer: manifest.layouts[layer.layout] for layer in manifest.layers}
        for device in self.devices:
            own = {
                layer.layer: layer.num_experts
                for layer in manifest.layers
                if devices[layer.layer] is device
            }
            size = cache_size(
                manifest,
                list(own),
                settings,
                free_bytes=device.free_bytes(),
                name=device.name,
                kv_bytes=kv_bytes * len(own) // len(manifest.layers),
            )
            parts = DeviceParts(
                device,
                SlotCache(size.num_slots, size.num_staging, own, settings.cache_policy),
                device.allocate(size.num_slots + size.num_staging, size.slot_bytes),
                {layer: layouts[layer].record_bytes for layer in own},
                CostModel(rates or TYPICAL),
                fill,
                exact,
            )
            runner = DeviceExpertsRunner(
                parts, source, self.transaction, settings, self._stats, source.hint
            )
            self._runners.update(dict.fromkeys(own, runner))
        self._settings = settings
        self._source = source
        self._measures = rates is None and (
            settings.on_miss is OnMiss.AUTO or settings.decode_graphs is DecodeGraphsMode.AUTO
        )
        self._manifest = manifest
        self._said: set[str] = set()
        self.steps = DecodeGraphsMode.OFF
        """How the last step of one row a sequence ran."""
        self.num_replays = 0
        """So many steps were recorded ones."""
        self._model: Any = None
        self._say: Callable[[str], None] = say_on_stderr
        self._experts: Mapping[int, nn.Module] = {}

    def __repr__(self) -> str:
        return f"<DeviceGroup {self.runners!r}>"

    @property
    def runners(self) -> list[DeviceExpertsRunner]:
        """One per device."""
        return list(dict.fromkeys(self._runners.values()))

    @property
    def stats(self) -> DeviceStats:
        """The counts until now, over all devices."""
        stats = self._stats.copy()
        stats.syncs = sum(device.num_syncs for device in self.devices)
        stats.prefetch_wasted = sum(runner.cache.num_wasted for runner in self.runners)
        modes = dict.fromkeys(runner.engine.mode for runner in self.runners)
        stats.arena = ", ".join(filter(None, modes))
        stats.steps = self.steps.value
        return stats

    def connect(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        experts: Mapping[int, nn.Module],
        manifest: Manifest,
        say: Callable[[str], None] = say_on_stderr,
    ) -> None:
        """Lets ``experts``, the modules of ``model`` by MoE layer, compute by these runners.

        ``say`` is told what of the settings is not possible.
        """
        self._model, self._experts = model, experts
        for layer in manifest.layers:
            module, runner = experts[layer.layer], self._runners[layer.layer]
            spec = experts_spec(module, manifest, layer.layout)
            take_seat(module, ExpertsSeat(runner, layer.layer, layer.num_experts, spec))
        if self._settings.layers_guessed:
            routers = find_routers(model, experts, manifest)
            for runner in self.runners:
                runner.speculate(routers, self._runners)
        if self._measures:
            self._calibrate(experts, manifest, model.dtype, say)
        self._say = say
        asked = self._settings.decode_graphs in (DecodeGraphsMode.SEGMENTS, DecodeGraphsMode.WHOLE)
        if asked and len(self.runners) > 1:
            say("steps over several devices are not recorded; --decode-graphs is for one.")

    @property
    def records(self) -> bool:
        """Whether steps are to be recorded."""
        return self._settings.decode_graphs is not DecodeGraphsMode.OFF and len(self.runners) == 1

    def forget_trials(self) -> None:
        """The steps until now do not count."""
        self.steps, self.num_replays = DecodeGraphsMode.OFF, 0

    def whole_experts(self, recorder: GraphRecorder) -> WholeExperts | None:
        """The experts of steps that ``recorder`` is to record each as one; None: in segments."""
        mode, (runner,) = self._settings.decode_graphs, self.runners
        link = runner.cost.rates.link_bytes_per_second
        if mode is DecodeGraphsMode.SEGMENTS:
            return None
        if mode is DecodeGraphsMode.AUTO and link < MIN_WHOLE_LINK:
            return None
        found = whole_experts(
            self._manifest, runner, self._source, self.transaction, self._stats, recorder
        )
        if isinstance(found, WholeExperts):
            return found
        if mode is DecodeGraphsMode.WHOLE and found not in self._said:
            self._said.add(found)
            self._say(f"the GPU cannot find experts by itself ({found}); the host brings them.")
        return None

    def _calibrate(
        self,
        experts: Mapping[int, nn.Module],
        manifest: Manifest,
        dtype: torch.dtype,
        say: Callable[[str], None],
    ) -> None:
        """What this host's link and kernels take, for each device's first layer."""
        remembered = calibration()
        for runner in self.runners:
            first = next(layer for layer in manifest.layers if self._runners[layer.layer] is runner)
            num = min(max(2, first.experts_per_token), runner.cache.num_slots, first.num_experts)
            probe = Probe(
                runner.device,
                runner.engine,
                self._source,
                first.layer,
                range(num),
                experts_spec(experts[first.layer], manifest, first.layout),
                runner.fill_slots,
                dtype,
            )
            # Who has lost the session here attaches again with the first step.
            with suppress(*SESSION_ENDED):
                runner.cost = CostModel(calibrated(probe, remembered))
        remembered.say_trouble(say)

    def close(self) -> None:
        """From now on the model refuses to be called; the devices have all their memory back.

        That of the trunk as well, wherever it lies: the model's tensors have shapes and no content
        afterwards. Whoever keeps the model or its modules keeps no more than that.
        """
        model, self._model = self._model, None
        if model is not None:
            model.forward = _refuse_call
            for layer, module in self._experts.items():
                seat_of(module).runner = self._runners[layer]
        for runner in self.runners:
            runner.close()
        if model is not None:
            nn.Module.to(model, "meta")
        self._experts = {}
        for device in self.devices:
            device.close()


def _refuse_call(*_: Any, **__: Any) -> Any:  # noqa: ANN401
    """A closed model's ``forward``. Raises PreconditionError."""
    raise PreconditionError("This model was closed; load it again.")
