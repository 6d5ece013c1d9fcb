"""The epoch protocol: no reader sees reused bytes, and every fetch is granted.

Small worlds are explored completely, larger ones by random walks. Each rule of the protocol
is shown to be needed: without it, the exploration finds the violation.
"""

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from expertd.memory.extents import Extent
from expertd.memory.reclaim import Reclaimer
from tests.expert_store.epoch_parts import Nudge, Publish, Rules, Violation
from tests.expert_store.epoch_world import Action, World

# Two workers that want the same two experts in opposite order, and room for one.
CONTRARY = World((((0,), (1,)), ((1,), (0,))), num_entries=2, num_slots=1)
# Steps that hold two experts together, of three, and room for two.
PAIRS = World((((0, 1), (2,)), ((1, 2),)), num_entries=3, num_slots=2)
# Three workers and one slot: an eviction waits for two readers.
CROWD = World((((0,),), ((0,),), ((1,),)), num_entries=2, num_slots=1)
# One worker may be cut off at any moment at which the others wait for it.
CUTTING = World((((0,), (1,)), ((1,),)), num_entries=2, num_slots=1, max_cuts=1)
# A record may move at any moment, leased or not, and another is read to where it was.
MOVING = World((((0,), (1,)), ((1,), (0,))), num_entries=2, num_slots=2, max_moves=1)
# The daemon is killed once, wherever it stands, and the next takes its arena over.
KILLING = World((((0,), (1,)), ((1,),)), num_entries=2, num_slots=1, max_deaths=1)
# It is killed twice, and workers may sleep through both.
TWICE = World((((0,), (1,)), ((1,),)), num_entries=2, num_slots=1, max_deaths=2)
# Steps of three experts that are looked up as long as they hold, with room for two of them.
LOOKING_ON = World((((0, 1, 2),), ((2,), (0,))), num_entries=3, num_slots=2, looks_on=True)
# The same with little room, and who stands still is cut off.
LOOKING_CUT = World((((0, 1),), ((1,),)), num_entries=2, num_slots=1, looks_on=True, max_cuts=1)
LOOKING_KILLED = World(
    (((0, 1),), ((1,),)), num_entries=2, num_slots=1, looks_on=True, max_deaths=1
)
WORLDS = {
    "contrary": CONTRARY,
    "pairs": PAIRS,
    "crowd": CROWD,
    "cutting": CUTTING,
    "moving": MOVING,
    "killing": KILLING,
    "twice": TWICE,
    "looking on": LOOKING_ON,
    "looking on, cut": LOOKING_CUT,
    "looking on, killed": LOOKING_KILLED,
}

MAX_STATES = 300_000


class Explored(NamedTuple):
    """Every state that can be reached, by number, and what leads to it."""

    num_states: int
    finished: list[int]
    predecessors: list[list[int]]


def explore(world: World) -> Explored:
    """All interleavings, breadth first: a violation comes with a shortest way to it."""
    start = world.state()
    numbers: dict[tuple[Any, ...], int] = {start: 0}
    states, predecessors, finished = [start], [[]], []
    came_by: list[tuple[int, Action | None]] = [(0, None)]
    for number in itertools.takewhile(lambda number: number < len(states), itertools.count()):
        assert number < MAX_STATES, "the world is too large to explore"
        world.restore(states[number])
        if world.is_finished:
            finished.append(number)
        for action in world.actions():
            world.restore(states[number])
            try:
                world.do(action)
            except Violation as violation:
                violation.add_note(_way_to(came_by, number, action))
                raise
            state = world.state()
            if state not in numbers:
                numbers[state] = len(states)
                states.append(state)
                predecessors.append([])
                came_by.append((number, action))
            predecessors[numbers[state]].append(number)
        states[number] = ()  # not needed again, and there are many
    return Explored(len(states), finished, predecessors)


def stuck(explored: Explored) -> set[int]:
    """The states from which no continuation lets every worker finish.

    If there is none then, the world being finite, every fair continuation finishes: it
    cannot pass by a way out for ever. So each fetch that waits is granted in the end.
    """
    able = set(explored.finished)
    border = list(able)
    while border:
        for before in explored.predecessors[border.pop()]:
            if before not in able:
                able.add(before)
                border.append(before)
    return set(range(explored.num_states)) - able


def with_rules(world: World, **changes: Any) -> World:
    return replace(world, rules=replace(world.rules, **changes))


@pytest.mark.parametrize("name", WORLDS)
def test_every_interleaving_is_safe_and_finishes(name: str) -> None:
    explored = explore(replace(WORLDS[name]))
    assert explored.num_states > 1000
    assert explored.finished
    assert not stuck(explored)


@pytest.mark.parametrize(
    ("world", "broken"),
    [
        pytest.param(CONTRARY, {"check_epochs": False}, id="reuse without the epoch check"),
        pytest.param(CONTRARY, {"withdraw_first": False}, id="epoch advanced before withdrawal"),
        pytest.param(CONTRARY, {"publish": Publish.HOLDING}, id="publishing while holding"),
        pytest.param(CONTRARY, {"nudge": Nudge.CHECKS_FIRST}, id="nudge without the mutex"),
        pytest.param(CUTTING, {"revoke_first": False}, id="bytes reused before revoked is set"),
        pytest.param(MOVING, {"copy_first": False}, id="moved in name before its bytes are"),
        pytest.param(MOVING, {"show_first": False}, id="epoch advanced before the new word"),
        pytest.param(MOVING, {"retire_moved": False}, id="moved away and reused at once"),
        pytest.param(MOVING, {"check_epochs": False}, id="moved away without the epoch check"),
        pytest.param(KILLING, {"announce_first": False}, id="bytes reused before that is told"),
        pytest.param(KILLING, {"check_number": False}, id="a look at who reused bytes"),
        pytest.param(LOOKING_ON, {"check_epochs": False}, id="looked on without the epoch check"),
        pytest.param(LOOKING_ON, {"publish": Publish.HOLDING}, id="looked on, published, read"),
        pytest.param(LOOKING_CUT, {"revoke_first": False}, id="looked on without a warning"),
        pytest.param(TWICE, {"count_all": False}, id="a number for each adoption"),
    ],
)
def test_a_reader_sees_reused_bytes_without(world: World, broken: dict[str, Any]) -> None:
    with pytest.raises(Violation, match="reused"):
        explore(with_rules(world, **broken))


def test_a_granted_record_is_gone_without_leases() -> None:
    with pytest.raises(Violation, match="was granted"):
        explore(with_rules(CONTRARY, respect_leases=False))


def test_workers_deadlock_if_they_hold_while_they_wait() -> None:
    explored = explore(with_rules(PAIRS, release_first=False))
    assert stuck(explored)


def test_workers_deadlock_if_they_look_on_while_they_wait() -> None:
    assert stuck(explore(with_rules(LOOKING_ON, release_first=False)))


@pytest.mark.parametrize("name", ["contrary", "pairs", "cutting", "looking on, cut"])
def test_an_epoch_loaded_before_the_look_up_may_be_stored_at_any_time(name: str) -> None:
    # What was withdrawn before the load, the look-up finds absent; what was withdrawn after
    # it has a later epoch. An old epoch is only modest: it vouches for less.
    explored = explore(with_rules(WORLDS[name], publish=Publish.EARLY_LOAD))
    assert not stuck(explored)


def test_a_nudge_that_loads_the_epoch_first_needs_no_mutex() -> None:
    explored = explore(with_rules(CONTRARY, nudge=Nudge.LOADS_FIRST))
    assert not stuck(explored)


WHO = st.sampled_from(("work 0", "work 1", "nudge 0", "nudge 1", "daemon"))


def _whose(action: Action) -> str:
    name, *arguments = action
    return f"{name} {arguments[0]}" if name in ("work", "nudge") else "daemon"


class EpochMachine(RuleBasedStateMachine):
    """Random walks through worlds too large to explore."""

    rules_of_protocol = Rules()

    @initialize(
        scripts=st.lists(
            st.lists(st.sets(st.integers(0, 2), min_size=1, max_size=1), min_size=4, max_size=12),
            min_size=2,
            max_size=2,
        ),
        num_slots=st.integers(1, 3),
        max_cuts=st.integers(0, 1),
        max_deaths=st.integers(0, 2),
    )
    def begin(
        self, scripts: list[list[set[int]]], num_slots: int, max_cuts: int, max_deaths: int
    ) -> None:
        self.world = World(
            tuple(tuple(tuple(sorted(step)) for step in steps) for steps in scripts),
            num_entries=3,
            num_slots=num_slots,
            rules=self.rules_of_protocol,
            max_cuts=max_cuts,
            max_deaths=max_deaths,
        )

    @rule(turns=st.lists(st.tuples(WHO, st.integers(1, 16)), min_size=10, max_size=40))
    def let_them_work(self, turns: list[tuple[str, int]]) -> None:
        """One runs while the others stand still, wherever they are, and so on."""
        for who, times in turns:
            for time in range(times):
                actions = [action for action in self.world.actions() if _whose(action) == who]
                if actions:
                    self.world.do(actions[time * times % len(actions)])

    @rule(reader=st.integers(0, 1), times=st.integers(10, 60))
    def let_one_read_all_the_while(self, reader: int, times: int) -> None:
        """The worst that can happen to a reader: it stands still, and all others go on."""
        for time in range(times):
            reads = bool(self.world.workers[reader].refs)
            actions = self.world.actions()
            if reads:
                actions = [action for action in actions if action != ("work", reader)]
            if actions:
                self.world.do(actions[time % len(actions)])

    @rule(data=st.data())
    def let_the_daemon_move(self, data: st.DataObject) -> None:
        """Any record, to a free slot."""
        desk = self.world.desk
        resident = [entry for entry, at in enumerate(desk.resident) if at is not None]
        busy = desk.evicting or desk.loading or desk.moving
        if resident and not busy and self.world.extents.bytes_free:
            self.world.do(("move", data.draw(st.sampled_from(resident))))

    @rule(data=st.data())
    def let_the_daemon_evict(self, data: st.DataObject) -> None:
        """Whatever it likes: a hint may make it."""
        desk = self.world.desk
        kept = {entry for lease in desk.leases for entry in lease.entries}
        kept.update(entry for request in desk.queue[:1] for entry in request.entries)
        idle = [e for e, at in enumerate(desk.resident) if at is not None and e not in kept]
        if idle and desk.evicting is None and desk.moving is None:
            self.world.do(("evict", data.draw(st.sampled_from(idle))))
            self.world.do(("finish_eviction",))

    def teardown(self) -> None:
        """However it stands: if all take their turns now, every worker finishes."""
        if not hasattr(self, "world"):
            return
        self.world.max_cuts = 0
        self.world.desk.num_deaths = self.world.max_deaths
        for turn in range(10_000):
            actions = self.world.actions()
            if not actions:
                break
            self.world.do(actions[turn % len(actions)])
        assert self.world.is_finished, self.world


WALKS = settings(
    max_examples=100,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
# The same walks each time, enough to meet the violation; the shortest is not wanted.
HUNT = settings(
    WALKS,
    max_examples=2000,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    print_blob=False,
)


def test_random_walks_are_safe_and_finish() -> None:
    run_state_machine_as_test(EpochMachine, settings=WALKS)


def test_random_walks_find_a_missing_epoch_check() -> None:
    class Broken(EpochMachine):
        rules_of_protocol = Rules(check_epochs=False)

    with pytest.raises(Violation, match="reused"):
        run_state_machine_as_test(Broken, settings=HUNT)


def test_nobody_attached_means_nobody_to_wait_for() -> None:
    reclaimer = Reclaimer()
    reclaimer.retire(2, [Extent(0, 4096)])
    assert reclaimer.collect([1]) == []
    assert reclaimer.waits_for(1)
    assert not reclaimer.waits_for(2)
    assert reclaimer.collect([]) == [Extent(0, 4096)]
    assert reclaimer.bytes_retired == 0


def test_extents_come_free_in_the_order_of_their_epochs() -> None:
    reclaimer = Reclaimer()
    extents = [Extent(page * 4096, 4096) for page in range(3)]
    for epoch, extent in enumerate(extents, start=2):
        reclaimer.retire(epoch, [extent])
    assert reclaimer.collect([3, 9]) == extents[:2]
    assert reclaimer.collect([4]) == extents[2:]


def _way_to(came_by: list[tuple[int, Action | None]], number: int, last: Action) -> str:
    """The actions that led to a state, and the one after."""
    way = [last]
    while (action := came_by[number][1]) is not None:
        way.append(action)
        number = came_by[number][0]
    return "\\n".join(map(str, reversed(way)))
