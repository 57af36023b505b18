"""Small tasks that ask for one ability of a memory each, drawn endlessly on any device.

    mqar        recall of key-value pairs, as in Zoology
    overwrite   a key is written several times: the latest value counts
    sharing     keys of two parts, among distractors that share one part
    deletion    some keys are deleted again
    parity      the parity of the bits so far
    s5          the product of the permutations so far

`TASKS` holds each with its usual sizes. `task.draw(load, batch, generator)` gives `Questions`; the load is how much the
memory has to hold, keys or, for parity and s5, steps.
"""

from gdn2.data.synthetic.deletion import Deletion
from gdn2.data.synthetic.mqar import MQAR
from gdn2.data.synthetic.overwrite import Overwrite
from gdn2.data.synthetic.questions import Questions, SyntheticTask
from gdn2.data.synthetic.sharing import Sharing
from gdn2.data.synthetic.tracking import S5, Parity

TASKS: dict[str, SyntheticTask] = {
    "mqar": MQAR(),
    "overwrite": Overwrite(),
    "sharing": Sharing(),
    "deletion": Deletion(),
    "parity": Parity(),
    "s5": S5(),
}

__all__ = ["MQAR", "S5", "TASKS", "Deletion", "Overwrite", "Parity", "Questions", "Sharing", "SyntheticTask"]
