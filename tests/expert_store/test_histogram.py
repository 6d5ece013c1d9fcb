from expertd.histogram import BOUNDS_SECONDS, Histogram


def test_a_bound_belongs_to_the_bucket_below_it() -> None:
    histogram = Histogram()
    for seconds in (0.0, 0.001, 0.0011, 60.0, 61.0):
        histogram.observe(seconds)
    counted = dict(zip((*BOUNDS_SECONDS, None), histogram.cumulative(), strict=True))
    assert (counted[0.0001], counted[0.001], counted[0.0025], counted[60.0]) == (1, 2, 3, 4)
    assert counted[None] == histogram.count == 5
    assert histogram.sum_seconds == 0.001 + 0.0011 + 60.0 + 61.0
