"""Work in processes of its own, so that a crash or an endless loop costs one piece of it and not the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from rewriter import debug
from rewriter.errors import OptionError, brief

Serve = Callable[..., Iterator[Any]]


def stream(serve: Serve, *arguments: Any) -> Iterator[Any]:
    """What `serve(*arguments)` yields in a new process: one without threads, from which it is safe to fork."""
    if "fork" not in multiprocessing.get_all_start_methods():
        raise OptionError("this measurement forks processes, which this system cannot")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, serve, arguments))
    process.start()
    theirs.close()
    ended = False
    try:
        while not ended:
            kind, value = ours.recv()
            ended = kind != "value"
            if kind == "error":
                raise value
            if kind == "value":
                yield value
    except EOFError:
        process.join()
        raise OptionError(f"the measuring process died (status {process.exitcode})") from None
    finally:
        ours.close()
        if not ended:
            process.terminate()
        process.join()


def _serve(connection: Connection, serve: Serve, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an orderly exit, which ends the children
    try:
        for value in serve(*arguments):
            connection.send(("value", value))
        connection.send(("end", None))
    except OptionError as error:
        connection.send(("error", error))


def in_child(function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
    """`function(*arguments)` in a forked child; the RuntimeError says how it ended where there is no value."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_call, args=(theirs, function, arguments), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            raise RuntimeError(f"not done after {timeout:.0f} s")
        ok, value = ours.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"the process died (status {child.exitcode})") from None
    finally:
        child.kill()
        child.join()
        ours.close()
    if not ok:
        raise RuntimeError(value)
    return value


def _call(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if debug.level() == 0:  # what models and libraries print
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
    try:
        connection.send((True, function(*arguments)))
    except Exception as error:
        connection.send((False, brief(error)))
