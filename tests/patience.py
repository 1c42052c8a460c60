"""Waiting without a clock: for an event, with a limit that only a process that hangs can reach.

A machine that is busy is slower by any factor. A test that sleeps and hopes, or that ends a process after the seconds which it takes on an
idle machine, fails there for no reason. So tests wait for something to happen, and PATIENCE is there to turn a hang into a failure.
"""
import time

PATIENCE = 1200      # seconds; nothing that works needs them


def wait_for(event, *processes):
    "Until `event()` is true; AssertionError where a process that should bring it about has ended, or after PATIENCE."
    end = time.monotonic() + PATIENCE
    while not event():
        assert all(process.poll() is None for process in processes), "a process ended before its time"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
