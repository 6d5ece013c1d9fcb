"""``expert-run advise``: what to expect of a model on this host, from seconds of measuring.

::

    named         what the model that is meant is; without torch
    models        a shape, a checkpoint or a pack: what each scheme of it needs
    host          memory, disk, link and GPU, probed
    kernel_times  the real kernels, on the model's matrices
    twin          the model with narrow layers: what a token costs besides them
    prediction    tokens per second and RAM, from plain values
    choice        which scheme and budget, and why, in a sentence
    report        the table
"""
