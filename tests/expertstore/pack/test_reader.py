"""Records are found, read and verified; a damaged file costs only its own records."""

from pathlib import Path

import pytest

from expertd_testing.handmade import PAGE, record
from expertstore.errors import NotFoundError, PackError, RecordLostError
from expertstore.pack.reader import PackReader
from tests.expertstore.pack.conftest import EXPERTS, LAYERS, RECORD_BYTES

FILE = "experts-00000.safetensors"


def test_every_record_is_read(pack: Path) -> None:
    with PackReader(pack) as reader:
        assert not reader.damaged_files
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                assert reader.read_record(layer, expert) == record(layer, expert)


def test_places_come_in_the_order_of_the_directory(pack: Path) -> None:
    with PackReader(pack) as reader:
        places = list(reader.places())
        assert [(place.layer, place.expert) for place in places] == [
            (layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)
        ]
        for first, layer in zip(reader.manifest.first_entries, range(LAYERS), strict=True):
            assert places[first + 1] == reader.locate(layer, 1)


@pytest.mark.parametrize(("layer", "expert"), [(LAYERS, 0), (0, EXPERTS), (0, -1), (-1, 0)])
def test_experts_that_are_not_there(pack: Path, layer: int, expert: int) -> None:
    with PackReader(pack) as reader, pytest.raises(NotFoundError, match=f"no expert {expert}"):
        reader.read_record(layer, expert)


def test_a_flipped_bit_costs_one_record(pack: Path) -> None:
    with (pack / FILE).open("r+b") as file:
        file.seek(PAGE + 2 * RECORD_BYTES + 77)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    with PackReader(pack) as reader:
        with pytest.raises(RecordLostError, match=r"Expert 2 of layer 0 .*checksum") as caught:
            reader.read_record(0, 2)
        assert caught.value.experts == ((0, 2),)
        assert FILE in str(caught.value)
        assert reader.read_record(0, 1) == record(0, 1)


def test_a_truncated_file_costs_its_last_records(pack: Path) -> None:
    path = pack / FILE
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - RECORD_BYTES - 1)
    with PackReader(pack) as reader:
        assert [damage.path for damage in reader.damaged_files] == [path]
        assert f"{size - RECORD_BYTES - 1} of {size} bytes" in reader.damaged_files[0].reason
        assert "1 damaged" in repr(reader)
        for expert in (EXPERTS - 2, EXPERTS - 1):
            with pytest.raises(RecordLostError, match="the file ends before it"):
                reader.read_record(LAYERS - 1, expert)
        assert reader.read_record(0, 0) == record(0, 0)


def test_a_missing_file_costs_its_records(pack: Path) -> None:
    (pack / FILE).unlink()
    with PackReader(pack) as reader:
        assert len(reader.damaged_files) == 1
        with pytest.raises(RecordLostError, match="No such file"):
            reader.read_record(0, 0)


def test_no_pack(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="not a pack"):
        PackReader(tmp_path)


def test_closing_twice_is_harmless(pack: Path) -> None:
    reader = PackReader(pack)
    reader.close()
    reader.close()
    with pytest.raises(RecordLostError):
        reader.read_record(0, 0)
