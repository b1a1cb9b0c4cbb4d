"""Processes that start at once: forks of one process that has imported the libraries, which takes four seconds.

A fork is a process like any other. It has its own arguments, folder, environment, standard streams and exit code, is
a child of the tests, and runs its script from the first line; only the hash seed is the same for all forks.
Nothing of the project is imported before the fork.
"""

import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path

LIBRARIES = (
    "numpy", "pandas", "pyarrow.parquet", "PIL.Image", "scipy.sparse", "sklearn.datasets", "sklearn.model_selection",
    "tokenizers", "torch", "torch._dynamo", "torch.onnx", "torch.utils.flop_counter", "torch.utils.tensorboard",
    "torchmetrics.classification", "torchmetrics.regression", "tqdm", "tyro.constructors", "typeguard",
)  # fmt: skip
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: a fork whose parent has ended becomes a child of the tests


class Fork(subprocess.Popen):
    """As `subprocess.Popen([sys.executable, *args])`, but a fork. `args`: a script, or -c and code, and its flags."""

    _server = None

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        if not Fork._server:
            ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
            Fork._server, theirs = socket.socketpair()
            line = [sys.executable, __file__, str(theirs.fileno())]
            subprocess.Popen(line, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
            theirs.close()
        pipes = rest[3:9]  # each a reading and a writing end: input, output, errors
        streams = [own if given < 0 else given for own, given in enumerate((pipes[0], pipes[3], pipes[5]))]
        what = {"args": list(map(str, args)), "cwd": os.path.abspath(cwd or "."), "env": dict(env or os.environ)}
        request = json.dumps(what).encode()
        socket.send_fds(Fork._server, [len(request).to_bytes(8, "big")], streams)
        Fork._server.sendall(request)
        self.pid = int.from_bytes(Fork._server.recv(8), "big")
        self._child_created = True
        self._close_pipe_fds(*pipes)


class NoFork(subprocess.Popen):
    def __init__(self, args, **options):
        super().__init__([sys.executable, *map(str, args)], **options)


Popen = Fork if sys.platform == "linux" else NoFork


def serve(control: socket.socket) -> dict:
    """Fork for each request, and return the request in the fork. Ends when the tests end."""
    while True:
        size, streams, _, _ = socket.recv_fds(control, 8, 3)
        if not size:
            sys.exit()
        request = json.loads(control.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        reader, writer = os.pipe()
        if not (parent := os.fork()):
            if child := os.fork():
                os.write(writer, child.to_bytes(8, "big"))
                os._exit(0)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            for stream in (*streams, reader, writer):
                os.close(stream)
            control.close()
            return request
        os.waitpid(parent, 0)  # from here on the fork is a child of the tests
        control.sendall(os.read(reader, 8))
        for stream in (*streams, reader, writer):
            os.close(stream)


def main() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the commands do, before torch is imported
    for name in LIBRARIES:
        import_module(name)
    gc.freeze()  # what is imported is not looked through again in every fork
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    options = {"encoding": sys.stdout.encoding, "closefd": False}
    sys.stdin = sys.__stdin__ = open(0, **options)
    sys.stdout = sys.__stdout__ = open(1, "w", **options)
    sys.stderr = sys.__stderr__ = open(2, "w", errors="backslashreplace", buffering=1, **options)
    script, *flags = request["args"]
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    if script == "-c":
        code, *flags = flags
        sys.path[0] = ""
    else:
        code, sys.path[0], module.__file__ = Path(script).read_text(), os.path.dirname(os.path.abspath(script)), script
    sys.argv = [script, *flags]
    exec(compile(code, script, "exec"), vars(module))


if __name__ == "__main__":
    main()
