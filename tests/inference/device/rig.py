"""A model on fake devices, over a source without a daemon."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from expertd_inference.device.cost import Rates
from expertd_inference.device.group import DeviceGroup
from expertd_inference.device.placement import place_layers
from expertd_inference.experts.recovery import Recovery
from expertd_inference.kernels.cpu.reference import fill_slots
from expertd_inference.model.loading import load_trunk
from expertd_inference.settings import DeviceSettings
from expertd_testing.fake_device import FakeDevice
from tests.inference.device.held_source import HeldPackSource

# A CPU that is worth a share of a layer's misses, but not all of them.
RATES = Rates(
    link_bytes_per_second=20e9,
    copy_seconds=1e-5,
    cpu_bytes_per_second=45e9,
    cpu_seconds=1e-5,
    device_bytes_per_second=1e12,
)


@dataclass
class Rig:
    """All that a test looks at."""

    source: HeldPackSource
    devices: Sequence[FakeDevice]
    group: DeviceGroup
    model: Any

    @property
    def device(self) -> FakeDevice:
        (device,) = self.devices
        return device

    @torch.no_grad()
    def logits(self, prompt: list[int]) -> torch.Tensor:
        result: torch.Tensor = self.model(torch.tensor([prompt])).logits
        return result


def slot_bytes(source: HeldPackSource) -> int:
    return max(layout.record_bytes for layout in source.manifest.layouts)


def make_rig(
    source: HeldPackSource,
    *devices: FakeDevice,
    num_slots: int | None = None,
    rates: Rates | None = RATES,
    dtype: torch.dtype = torch.bfloat16,
    reattach_seconds: float = 1.0,
    stepped: bool = True,
    exact: bool = False,
    say: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> Rig:
    """``num_slots`` are those of each device, with its staging slots.

    A call of the model is a step if it is to be ``stepped``; else each of its layers is one. What
    the group says when it connects goes to ``say``.
    """
    devices = devices or (FakeDevice(),)
    if num_slots is not None:
        settings["cache_bytes"] = num_slots * slot_bytes(source)
    trunk = load_trunk(source.pack, source.manifest, dtype=dtype)
    by_name = {device.name: device for device in devices}
    layers = [layer.layer for layer in source.manifest.layers]
    group = DeviceGroup(
        source.manifest,
        source,
        Recovery(source, reattach_seconds=reattach_seconds, say=lambda _: None),
        DeviceSettings(**settings),
        {layer: by_name[name] for layer, name in place_layers(layers, list(by_name)).items()},
        rates=rates,
        fill=fill_slots,
        exact=exact,
    )

    group.connect(trunk.model, trunk.experts, source.manifest, say)
    if stepped:
        forward = trunk.model.forward

        # The signature is what transformers looks at.
        @functools.wraps(forward)
        def step(*args: Any, **kwargs: Any) -> Any:
            with group.transaction.forward_pass():
                return forward(*args, **kwargs)

        trunk.model.forward = step
    return Rig(source, devices, group, trunk.model)
