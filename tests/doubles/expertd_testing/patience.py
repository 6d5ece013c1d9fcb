"""How long tests wait for what must come.

A bound on time tells a hang from an answer and nothing more: these machines are busy with other
things. What must be *quick* is compared with the same thing done just before, or is a bench.
"""

HANG_SECONDS = 20.0
"""Whatever comes at all has come by then. Less than the daemon's own patience with a worker
(``stall_seconds``, 30), so that a wake-up that was lost is not made good by a cut-off.
"""
