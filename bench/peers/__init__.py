"""What is measured beside ours; each runs under an interpreter of its own that has it installed.

``SCRIPT.py run JSON`` makes itself ready, prints a JSON object, and answers each line of stdin with
another: ``clear 0`` forgets the context, ``prompt N`` and ``decode N`` answer with the seconds that
so many tokens took, at once or one after the other. ``offload.py``, ``freetoken.py`` have
ways of their own. docs/peers.md says how to set each up.
"""
