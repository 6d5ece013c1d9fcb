"""What is foreseen when, and what the counts mean."""

from expertd_inference.experts.hints import HintBook, HintStats, pays_for_prompts


def test_the_next_layers_are_foreseen_and_nothing_past_the_last() -> None:
    book = HintBook([1, 2, 5, 7], num_ahead=2)
    assert [tuple(book.ahead(layer)) for layer in (1, 2, 5, 7)] == [(2, 5), (5, 7), (7,), ()]


def test_useful_late_and_wasted() -> None:
    book = HintBook([0, 1], num_ahead=1)
    book.issue([(1, 4), (1, 5), (1, 6)])
    assert sorted(book.pending(1)) == [4, 5, 6]
    assert book.stats == HintStats(issued=3)
    book.arrive(1, needed={4, 5, 9}, absent={5, 9})
    assert book.stats == HintStats(issued=3, useful=1, late=1, wasted=1)
    assert not book.pending(1)
    book.arrive(1, needed={4}, absent=set())
    assert book.stats == HintStats(issued=3, useful=1, late=1, wasted=1), "each visit once"


def test_what_two_layers_foresee_for_the_same_visit_counts_once() -> None:
    book = HintBook([0, 1, 2], num_ahead=2)
    book.issue([(1, 0), (2, 3)])
    book.arrive(1, needed={0}, absent=set())
    book.issue([(2, 3), (2, 4)])
    book.arrive(2, needed={3}, absent=set())
    assert book.stats == HintStats(issued=3, useful=2, wasted=1)


def test_stats_since() -> None:
    before, after = HintStats(1, 1, 0, 0), HintStats(9, 4, 3, 2)
    assert after.since(before) == HintStats(8, 3, 3, 2)


def test_prompts_are_hinted_if_records_are_large_and_two_layers_have_room() -> None:
    assert pays_for_prompts(512 << 10, layer_experts=8, num_records=16)
    assert not pays_for_prompts((512 << 10) - 1, layer_experts=8, num_records=16)
    assert not pays_for_prompts(512 << 10, layer_experts=8, num_records=15)
