"""Doubles of what a test machine lacks or must not break: a GPU, its driver, systemd, a bad disk.

No module of the product imports them and no wheel contains them: tests, benches and drills do.
"""
