"""The example policy of docs/residency.md runs."""

import re
from pathlib import Path

import numpy as np

from expertd.residency import Policy

PAGE = Path(__file__).parents[3] / "docs/residency.md"


def test_the_example_is_a_policy() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, type[Policy]] = {}
    exec(code, names)
    policy = names["Lfu"]([4], [1])
    policy.touch(np.array([1, 1, 2]))
    assert policy.coldest(np.array([1, 2, 3])).tolist() == [3, 2, 1]
