"""`gdn2 train` as one rank, in which something may happen; the other arguments are the command's.

Rank 1 at its fifth batch: "dies", "hangs" for a while, or gets a signal. "full disk": rank 1 cannot flush a file of its
second checkpoint. "SIGTERM in STAGE of RANK" (rank 0 when none is said): the signal comes when it begins that stage of
its start. "SIGTERM alone": while it waits for a second rank that does not exist. "refused": rank 1 finds no tokenizer;
"refused alone": rank 0 finds none, and a second rank does not exist.
"""

import importlib
import os
import signal
import sys
import time

import torch

import gdn2.config
from gdn2.cli import main
from gdn2.data import Shards, TokenBatches
from gdn2.data.lock import FolderLock
from gdn2.training import checkpoint, distributed, sharded_checkpoint
from gdn2.training.saver import Saver

train = importlib.import_module("gdn2.training.train")  # the package's name for it is the function


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


def refuse(path):
    raise ValueError(f"{path} holds no tokenizer")


EVENTS = {
    "dies": lambda: os._exit(9),
    "hangs": lambda: time.sleep(8),
    "signal": lambda: os.kill(os.getpid(), signal.SIGTERM),
}

STAGES = {
    "configuration": (gdn2.config, "load_run"),
    "lock": (FolderLock, "__enter__"),
    "data": (Shards, "verify"),
    "folder": (train, "open_run"),
    "checkpoint": (checkpoint, "verify"),
    "model": (train, "parallelize"),
    "optimizer": (train, "build_optimizer"),
    "load": (Saver, "load"),
    "writing": (train, "write_config"),
    "logs": (train, "open_logs"),
}


def signal_in(number, owner, name):
    setattr(owner, name, after(1, getattr(owner, name), lambda: signal.raise_signal(number)))


torch.set_num_threads(1)
event, *arguments = sys.argv[1:]
if os.environ["RANK"] == "1":
    if event in EVENTS:
        TokenBatches.__next__ = after(5, TokenBatches.__next__, EVENTS[event])
    if event == "full disk":
        sharded_checkpoint.flush = after(2, sharded_checkpoint.flush, full)
name, _, stage = event.partition(" in ")
stage, _, rank = stage.partition(" of ")
if stage and os.environ["RANK"] == (rank or "0"):
    signal_in(signal.Signals[name], *STAGES[stage])
if event == "SIGTERM alone":
    os.environ["WORLD_SIZE"] = "2"
    distributed.PATIENCE = 1.0
    signal_in(signal.SIGTERM, distributed, "meet")
if event == "refused alone":
    os.environ["WORLD_SIZE"] = "2"
    distributed.PATIENCE = 1.0
if event == "refused alone" or (event == "refused" and os.environ["RANK"] == "1"):
    train.load_tokenizer = refuse
main(["train", *arguments])
