"""`python -m gdn2` is the command `gdn2`."""

from gdn2.cli import main

main()
