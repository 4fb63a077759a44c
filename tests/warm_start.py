"""Runs scripts in processes forked from one that has imported the heavy libraries already.

Importing them takes six seconds, a bad flag a hundredth: forked, the tests that run the real scripts take minutes
less. Requests are lines of JSON on standard input: argv, cwd, env, stdin, stdout, stderr (empty: closed), terminal
(empty, or the one that it is to belong to), and the environment of each rank that runs the script; each is answered by
a line with the process ids at once, and one with the exit codes (negative: the signal) when the processes have ended.
To take apart what was imported would cost each of them 0.4 s more, at its very end: they leave as the interpreter
would, but for that.
"""

import atexit
import gc
import json
import os
import runpy
import sys
import threading
import traceback
from pathlib import Path

import datasets  # noqa: F401
import tensorboard.compat.proto.event_pb2  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from transformers import GenerationConfig, GPT2LMHeadModel, GPT2Tokenizer  # noqa: F401


def run(request: dict, rank: dict) -> None:
    if request["terminal"]:
        os.setsid()
        os.open(request["terminal"], os.O_RDWR)  # the first that a session opens is the one that it belongs to
    written = os.O_WRONLY | os.O_APPEND
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", written), (2, "stderr", written)):
        os.dup2(os.open(request[name] or os.devnull, flags), number)
        # New ones: the old stdin holds what was read of other requests, the others what this process's streams were.
        stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream if request[name] else None)  # as the interpreter does
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if not request[name]:
            os.close(number)
    if sys.stderr:
        sys.stderr.reconfigure(line_buffering=True)
    os.chdir(request["cwd"])
    os.environ.update({**request["env"], **rank})
    sys.argv = request["argv"]
    if sys.argv[0] == "-m":  # a command of the package
        del sys.argv[0]
        sys.path.insert(0, str(Path(__file__).parents[1]))
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


def exit_code(error: BaseException | None) -> int:
    """Return the exit code of a script that ended so, and print what the interpreter would print."""
    if error is None:
        return 0
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
        return 1
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def run_and_exit(request: dict, rank: dict) -> None:
    ended: BaseException | None = None
    try:
        run(request, rank)
    except BaseException as error:
        ended = error
    code = exit_code(ended)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        code = 120
    os._exit(code & 255)


gc.freeze()  # what is imported stays shared: a collection in a child would copy all of it, page by page
for line in sys.stdin:
    request = json.loads(line)
    children = []
    for rank in request["ranks"]:
        children.append(os.fork())
        if children[-1] == 0:
            run_and_exit(request, rank)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
