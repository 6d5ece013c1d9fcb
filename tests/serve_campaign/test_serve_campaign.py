"""The campaign against servers is not blind; ``make soak-serve`` runs it."""

import copy
from typing import Any

from tests.serve_campaign.asking import by_choice, differences, make_requests
from tests.serve_campaign.batch import lines_of


def event(index: int, text: str, **more: Any) -> dict[str, Any]:
    return {"id": text, "created": 1, "choices": [{"index": index, "text": text}], **more}


EVENTS = [
    event(0, "a"),
    event(1, "x"),
    event(0, "b"),
    {"choices": [], "usage": {"total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}}},
]


def test_only_what_a_client_reads_is_compared_and_all_of_that() -> None:
    expected = by_choice(EVENTS)
    other = copy.deepcopy([EVENTS[1], EVENTS[0], *EVENTS[2:]])
    other[0]["id"] = "another"
    other[3]["usage"]["prompt_tokens_details"]["cached_tokens"] = 0
    assert not [*differences(expected, by_choice(other))]
    assert [*differences(expected, by_choice([*EVENTS, event(1, "y")]))] == [
        "choice 1 has 2 parts in the place of 1"
    ]
    (wrong,) = differences(expected, by_choice([EVENTS[0], EVENTS[1], event(0, "c"), EVENTS[3]]))
    assert wrong.startswith("choice 0, part 1: {'index': 0, 'text': 'c'}")
    assert [*differences(expected, by_choice(EVENTS[:3]))]


def test_requests_are_of_every_kind() -> None:
    """The same for a seed, so that a run can be repeated."""
    requests = make_requests(1)
    assert requests == make_requests(1) != make_requests(2)
    given = {name for request in requests for name in request.body}
    assert given >= {"n", "stop", "logprobs", "response_format", "structured_outputs", "echo"}
    assert {request.body["stream"] for request in requests} == {True, False}
    numbers = [number for number, _ in lines_of(requests)]
    assert len({*numbers}) == len(numbers) > 30
