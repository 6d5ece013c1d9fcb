import numpy as np
import pytest

from expertd.residency.heat_map import HeatMap
from expertstore.v1 import expert_store_pb2 as pb


def answer(heat: list[int], resident: list[int], layers: dict[int, int]) -> HeatMap:
    bits = np.packbits(np.array(resident, np.uint8), bitorder="little").tobytes()
    rows = [pb.HeatLayer(layer=layer, num_experts=count) for layer, count in layers.items()]
    return HeatMap.of(pb.GetHeatResponse(layers=rows, heat=bytes(heat), resident=bits, max_heat=1))


def test_layers_of_unequal_size() -> None:
    heat = answer([0, 255, 51, 102, 0], [0, 1, 1, 0, 1], {1: 2, 4: 3})
    assert heat.layers == (1, 4)
    np.testing.assert_allclose(heat.heat, [[0, 1, np.nan], [0.2, 0.4, 0]])
    np.testing.assert_allclose(heat.resident, [[0, 1, np.nan], [1, 0, 1]])


def test_what_fits_is_shown_as_it_is() -> None:
    heat = answer([1, 2, 3, 4], [1, 0, 0, 1], {0: 2, 1: 2})
    shrunk = heat.shrink(10, 10)
    assert shrunk.layers == (0, 1)
    np.testing.assert_array_equal(shrunk.heat, heat.heat)
    np.testing.assert_array_equal(shrunk.resident, heat.resident)


def test_a_cell_has_the_hottest_heat_and_the_share_that_is_resident() -> None:
    heat = answer([0, 255, 0, 51] * 2, [1, 0, 0, 0, 1, 1, 0, 0], {0: 4, 7: 4})
    np.testing.assert_allclose(heat.shrink(2, 2).heat, [[1, 0.2], [1, 0.2]])
    np.testing.assert_allclose(heat.shrink(1, 2).resident, [[0.75, 0]])
    assert heat.shrink(1, 2).layers == (0,)
    np.testing.assert_allclose(heat.shrink(1, 1).resident, [[3 / 8]])


def test_cells_beyond_a_short_layer_are_nothing() -> None:
    heat = answer([255, 0, 0, 0, 0], [1, 0, 0, 0, 1], {0: 1, 1: 4})
    shrunk = heat.shrink(2, 2)
    np.testing.assert_allclose(shrunk.heat, [[1, np.nan], [0, 0]])
    np.testing.assert_allclose(shrunk.resident, [[1, np.nan], [0, 0.5]])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 50), (61, 256), (200, 7), (0, 0)])
def test_any_size(rows: int, columns: int) -> None:
    heat = answer([7] * (61 * 256), [1] * (61 * 256), dict.fromkeys(range(61), 256))
    shrunk = heat.shrink(rows, columns)
    assert shrunk.heat.shape == (min(61, max(1, rows)), min(256, max(1, columns)))
    assert (shrunk.resident == 1).all()


def test_no_layers() -> None:
    assert HeatMap.of(pb.GetHeatResponse()).heat.shape == (0, 0)
