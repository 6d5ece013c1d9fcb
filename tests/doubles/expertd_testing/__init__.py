"""What tests, benches and drills share: daemons, packs and models made for them, and doubles.

The doubles stand for what a test machine lacks or must not break: a GPU, its driver, systemd, a
disk. No module of the product imports this package and no wheel contains it.
"""
