"""`gdn2 train` as one rank, in which something may happen; the other arguments are the command's.

Rank 1 at its fifth batch: "dies", "hangs" for a while, or gets a signal. "full disk": rank 1 cannot flush a file of its
second checkpoint.
"""

import os
import signal
import sys
import time

import torch

from gdn2.cli import main
from gdn2.data import TokenBatches
from gdn2.training import sharded_checkpoint


def after(calls, function, action):
    """The function, which calls `action` first from the given call on."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:
            action()
        return function(*args, **kwargs)

    return wrapped


def full():
    raise OSError(28, "No space left on device")


EVENTS = {
    "dies": lambda: os._exit(9),
    "hangs": lambda: time.sleep(8),
    "signal": lambda: os.kill(os.getpid(), signal.SIGTERM),
}

torch.set_num_threads(1)
event, *arguments = sys.argv[1:]
if os.environ["RANK"] == "1":
    if event in EVENTS:
        TokenBatches.__next__ = after(5, TokenBatches.__next__, EVENTS[event])
    if event == "full disk":
        sharded_checkpoint.flush = after(2, sharded_checkpoint.flush, full)
main(["train", *arguments])
