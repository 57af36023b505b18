"""`gdn2 train` as one rank: the arguments are the command's."""

import sys

import torch

from gdn2.cli import main

torch.set_num_threads(1)
main(["train", *sys.argv[1:]])
