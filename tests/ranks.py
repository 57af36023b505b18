"""Run a script in several processes that form a group, as torchrun would start them.

Imports would be most of such a test's time, so one process has done them and forks the ranks of every test.
"""

import atexit
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch

TESTS = Path(__file__).parent
TIMEOUT = 240  # seconds for a script; far above what any takes

_server = None


def run(size, script, *arguments):
    """(exit codes of the ranks of ``python SCRIPT ARGUMENTS``, all they print)."""
    global _server
    if _server is None:
        paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        env["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a process that has asked CUDA itself must not fork
        if torch.cuda.device_count() == 0:  # NCCL warns of what is meant
            env["PYTHONWARNINGS"] = "error::UserWarning"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        _server = subprocess.Popen([sys.executable, __file__], **pipes, env=env)
        atexit.register(stop)
    with tempfile.NamedTemporaryFile("r") as out:
        job = {"size": size, "script": str(script), "arguments": [str(a) for a in arguments], "out": out.name}
        print(json.dumps(job), file=_server.stdin, flush=True)
        codes = json.loads(_server.stdout.readline())
        return codes, out.read()


def run_well(size, script, *arguments):
    """What the ranks print; AssertionError with it where one does not end with 0."""
    codes, out = run(size, script, *arguments)
    assert codes == [0] * size, f"exit codes {codes}\n{out}"
    return out


def stop():
    """End the server: it does when it can read no more."""
    _server.stdin.close()
    _server.stdout.close()
    _server.wait()


def serve():

    import gdn2.cli
    import gdn2.training  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        children = [fork(rank, port, **job) for rank in range(job["size"])]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


def fork(rank, port, size, script, arguments, out):
    """The process id of a rank."""
    child = os.fork()
    if child:
        return child
    import faulthandler

    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    file = os.open(out, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in world.items()}
    sys.argv = [script, *arguments]
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
