"""Messages as plain values."""

import json

from expertstore.plain import to_plain
from expertstore.v1 import expert_store_pb2 as pb


def test_nested_repeated_and_large() -> None:
    stats = pb.Stats(
        incarnation="i",
        arena=pb.ArenaStats(bytes_total=2**63),
        models=[pb.ModelStats(name="a", prefetch=pb.PrefetchStats(late=3)), pb.ModelStats()],
        warnings=["w", "x"],
    )
    plain = to_plain(stats)
    assert plain["arena"]["bytes_total"] == 2**63
    assert [model["name"] for model in plain["models"]] == ["a", ""]
    assert plain["models"][0]["prefetch"]["late"] == 3
    assert plain["warnings"] == ["w", "x"]
    assert plain["sessions"] == []
    assert json.loads(json.dumps(plain)) == plain


def test_every_field_is_there_though_unset() -> None:
    plain = to_plain(pb.Stats())
    assert set(plain) == {field.name for field in pb.Stats.DESCRIPTOR.fields}
    assert set(plain["arena"]) == {field.name for field in pb.ArenaStats.DESCRIPTOR.fields}
