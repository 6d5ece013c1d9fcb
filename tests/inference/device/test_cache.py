"""The device cache's policy: leases, shares, guesses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd_inference.device.cache import Found, Placed, SlotCache
from expertd_inference.device.heat import Heat
from expertd_inference.settings import CachePolicy

POLICIES = list(CachePolicy)


def use(cache: SlotCache, layer: int, *experts: int) -> list[Found]:
    cache.begin_layer(layer)
    placed = cache.assign(layer, experts)
    cache.release()
    assert [place.expert for place in placed] == list(experts)
    assert len({place.slot for place in placed}) == len(experts)
    return [place.found for place in placed]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_used_is_there(policy: CachePolicy) -> None:
    cache = SlotCache(4, 0, {0: 8, 1: 8}, policy)
    assert use(cache, 0, 1, 2) == [Found.MISSED] * 2
    assert use(cache, 1, 1, 2) == [Found.MISSED] * 2
    assert use(cache, 0, 2, 1) == [Found.CACHED] * 2
    assert use(cache, 1, 1, 3) == [Found.CACHED, Found.MISSED]
    assert cache.split(1, [1, 2, 3]) == ([1, 3], [2])


@pytest.mark.parametrize("policy", POLICIES)
def test_what_the_layer_uses_is_not_evicted_for_it(policy: CachePolicy) -> None:
    """vllm #37190: 5 is the oldest, is found, and must outlive the misses before it."""
    cache = SlotCache(3, 0, {0: 8}, policy)
    use(cache, 0, 5)
    use(cache, 0, 6)
    use(cache, 0, 7)
    cache.begin_layer(0)
    placed = cache.assign(0, [0, 1, 5])
    assert [place.found for place in placed] == [Found.MISSED, Found.MISSED, Found.CACHED]
    assert len({place.slot for place in placed}) == 3
    with pytest.raises(ValueError, match="3 slots"):
        cache.assign(0, [2])
    cache.release()
    assert use(cache, 0, 2) == [Found.MISSED]


def test_layers_come_to_have_equal_shares() -> None:
    cache = SlotCache(6, 0, {0: 8, 1: 8, 2: 8})
    use(cache, 0, 0, 1, 2, 3, 4, 5)
    for _ in range(3):
        for layer in (1, 2, 0):
            use(cache, layer, 0, 1)
    assert [len(cache.slots_of(layer)) for layer in range(3)] == [2, 2, 2]
    # From now on each layer evicts its own, the least recently used.
    assert use(cache, 1, 0, 7) == [Found.CACHED, Found.MISSED]
    assert list(cache.slots_of(1)) == [0, 7]
    assert [len(cache.slots_of(layer)) for layer in range(3)] == [2, 2, 2]


def test_with_less_than_a_slot_per_layer_the_last_in_turn_gives_way() -> None:
    cache = SlotCache(2, 0, dict.fromkeys(range(4), 8))
    use(cache, 0, 0, 1)
    use(cache, 1, 0)
    assert (len(cache.slots_of(0)), len(cache.slots_of(1))) == (1, 1)
    use(cache, 2, 0)  # layer 1 comes after layer 0 again
    assert [len(cache.slots_of(layer)) for layer in range(4)] == [1, 0, 1, 0]


def test_aged_keeps_what_is_used_often() -> None:
    cache = SlotCache(2, 0, {0: 8}, CachePolicy.AGED)
    for _ in range(4):
        use(cache, 0, 1)
    for expert in (2, 3, 4):
        use(cache, 0, expert)
    assert list(cache.slots_of(0)) == [1, 4]
    for _ in range(40):  # five half-lives
        use(cache, 0, 4)
    use(cache, 0, 5)
    use(cache, 0, 6)
    assert 1 not in cache.slots_of(0)


def test_heat_is_what_the_definition_says() -> None:
    heat, uses = Heat(), [(0, "a"), (0, "a"), (3, "b"), (9, "a"), (20, "c"), (21, "b")]
    keys = {"a": (0, 0), "b": (0, 1), "c": (0, 2)}
    sums = dict.fromkeys(keys, 0.0)
    for step in range(24):
        for at, name in uses:
            if at == step:
                heat.use(keys[name])
                sums[name] += 2 ** (at / 8)
        heat.pass_step()
    order = []
    left = set(keys.values())
    while left:
        coldest = heat.coldest(left.__contains__, ())
        order.append(next(name for name, key in keys.items() if key == coldest))
        left.remove(coldest)
    assert order == sorted(sums, key=lambda name: sums[name])
    with pytest.raises(LookupError):
        heat.coldest(lambda _: False, ())


def test_a_guess_evicts_nothing_but_an_older_guess() -> None:
    cache = SlotCache(2, 2, {0: 8, 1: 8})
    use(cache, 0, 0, 1)
    slots = [cache.stage(1, expert) for expert in (4, 5)]
    assert slots == [2, 3]
    assert cache.stage(1, 4) is None, "it is there"
    assert cache.stage(0, 0) is None, "it is there"
    assert cache.stage(1, 6) == 2
    assert cache.num_wasted == 1
    assert list(cache.slots_of(0)) == [0, 1]
    assert not cache.has(1, 4)


def test_a_guess_that_is_used_joins_the_cache_without_a_copy() -> None:
    cache = SlotCache(2, 1, {0: 8, 1: 8})
    use(cache, 0, 0, 1)
    cache.stage(1, 4)
    cache.begin_layer(1)
    assert cache.assign(1, [4]) == [Placed(4, 2, Found.STAGED)]
    cache.release()
    # The slot of what was evicted for it is the staging slot now.
    assert cache.stage(1, 5) == 0
    assert use(cache, 1, 4) == [Found.CACHED]
    assert cache.num_wasted == 0


def test_no_staging_slots_no_guesses() -> None:
    assert SlotCache(2, 0, {0: 8}).stage(0, 1) is None


def test_what_is_forgotten_is_copied_again() -> None:
    cache = SlotCache(2, 1, {0: 8})
    use(cache, 0, 0, 1)
    cache.stage(0, 2)
    for expert in (0, 2, 7):
        cache.forget(0, expert)
    assert use(cache, 0, 1, 0) == [Found.CACHED, Found.MISSED]
    assert cache.stage(0, 2) == 2


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(POLICIES),
    st.integers(3, 9),
    st.integers(0, 3),
    st.lists(
        st.tuples(
            st.sampled_from(["use", "stage", "forget"]),
            st.integers(0, 2),
            st.sets(st.integers(0, 5), min_size=1, max_size=3),
        ),
        max_size=40,
    ),
)
def test_no_slot_is_given_twice(
    policy: CachePolicy, num_slots: int, num_staging: int, script: list[tuple[str, int, set[int]]]
) -> None:
    cache = SlotCache(num_slots, num_staging, {0: 6, 1: 6, 2: 6}, policy)
    content: dict[int, tuple[int, int]] = {}
    for what, layer, experts in script:
        if what == "use":
            cache.begin_layer(layer)
            placed = cache.assign(layer, sorted(experts))
            for place in placed:
                if place.found is Found.MISSED:
                    content[place.slot] = (layer, place.expert)
                assert content[place.slot] == (layer, place.expert), place
            assert {(layer, p.expert) for p in placed} <= cache._leased
            cache.release()
            assert set(experts) <= set(cache.slots_of(layer))
        for expert in sorted(experts):
            if what == "stage" and (slot := cache.stage(layer, expert)) is not None:
                content[slot] = (layer, expert)
            if what == "forget":
                cache.forget(layer, expert)
        slots = [slot for each in cache._cached.values() for slot in each.values()]
        slots += [*cache._staged.values(), *cache._free, *cache._free_staging]
        assert sorted(slots) == list(range(num_slots + num_staging)), cache
