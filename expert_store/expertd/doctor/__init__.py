"""``expertd doctor``: is this host fit to serve, and what to do where it is not.

::

    host    what was found, as plain values: the seam between looking and judging
    look    finds it: the kernel, memory, the disk, programs, the daemon
    gpu     the driver's answers, by ctypes
    checks  judges: plain values in, rows with advice out
"""
