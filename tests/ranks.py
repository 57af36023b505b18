"""Run a script in several processes that form a group, as torchrun would start them.

``python ranks.py SIZE SCRIPT ARGUMENTS`` imports torch once and forks: the imports would be most of such a test's time.
"""

import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

TESTS = Path(__file__).parent


def start(size, script, *arguments):
    """The Popen of a process that forks the ranks of ``python SCRIPT ARGUMENTS``."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), "PYTHONWARNINGS": "error::UserWarning"}
    command = [sys.executable, __file__, str(size), str(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def run(size, script, *arguments, timeout=200):
    """What the ranks print, once all have ended well; AssertionError with it otherwise."""
    process = start(size, script, *arguments)
    try:
        out, _ = process.communicate(timeout=timeout)
    finally:
        process.terminate()
    assert process.returncode == 0, out
    return out


def rank_main(script, arguments):
    """Run the script in a forked rank; returns its exit code."""
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(size, script, *arguments):

    import gdn2.training  # noqa: F401

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(int(size)):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        child = os.fork()
        if child == 0:
            os.environ |= {name: str(value) for name, value in world.items()}
            code = rank_main(script, arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    print("children", *children, flush=True)

    def end(*_):
        for child in children:
            os.kill(child, signal.SIGKILL)
        sys.exit(1)

    signal.signal(signal.SIGTERM, end)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print("exit codes", *codes, flush=True)
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main(*sys.argv[1:])
