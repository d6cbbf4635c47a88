"""Raw files read by several processes; the records come out as if one process had read them.

A piece is a file or some of its lines. Each process reads one piece after another and stores it in
temporary files. The main process then reads the numbers from there, and copies the texts when it
writes. Broken lines are counted per piece and added up in order. So nothing depends on the number
of processes.
"""

import os
import shutil
import signal
import threading
import traceback
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

from tqdm import tqdm

from pagellm.data import text_store
from pagellm.data.raw import Raw
from pagellm.data.records import Tally
from pagellm.stage.config import PageLLMError

__all__ = ["store"]


PIECE = 32_000_000  # bytes of a large file that are one piece


def store(
    raw: Raw,
    tally: Tally,
    processes: int,
    folder: Path,
    min_text: int,
    max_text: int,
    spooled: bool = False,
) -> list[Path]:
    """Store every interaction of every file with text_store.store. Returns the stems, in order.

    processes  most processes at once; 0: one per core. A piece is read by one process: a packed,
               CSV or Parquet file, or all sequence files together
    spooled    store with text_store.spool instead, for a log that is larger than memory
    folder     for temporary files; if this process is killed, those that it started remove it
    Raises PageLLMError as a single process would, or if a process dies.
    """
    processes = processes or os.cpu_count() or 1
    pieces = raw.pieces(PIECE) if processes > 1 else [raw]
    stems = [folder / f"part-{number}" for number in range(len(pieces))]
    jobs = [
        (piece, stem, min_text, max_text, number if spooled else None)
        for number, (piece, stem) in enumerate(zip(pieces, stems, strict=True))
    ]
    if len(pieces) == 1:
        tally.add(read(*jobs[0]))
        return stems
    lines_before: dict[Path, int] = {}
    for piece, part in zip(
        pieces, in_processes(jobs, min(processes, len(jobs)), folder), strict=True
    ):
        path = piece.review_files[0].path
        before = lines_before.get(path, 0)
        tally.add(part, before)
        lines_before[path] = before + part.read
    return stems


def read(raw: Raw, stem: Path, min_text: int, max_text: int, number: int | None) -> Tally:
    tally = Tally()
    if number is None:
        text_store.store(raw.reviews(tally), stem, min_text, max_text)
    else:
        text_store.spool(raw.reviews(tally), stem, number, min_text, max_text)
    return tally


def in_processes(jobs: list[tuple], processes: int, folder: Path) -> list[Tally]:
    """What `read` returns for each job. Of several errors, that of the first job is raised."""
    # Started afresh, not forked: a fork would take over locks that other threads hold.
    context = get_context("spawn")
    workers: dict = {}  # our end of a pipe -> the process at the other end
    doing: dict = {}  # our end of a pipe -> the number of its job
    answers: dict[int, Tally | BaseException] = {}  # of the jobs that are done
    waiting = list(reversed(range(len(jobs))))
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            worker = context.Process(target=work, args=(theirs, folder), daemon=True)
            worker.start()
            theirs.close()
            workers[ours] = worker
        bar = tqdm(
            total=len(jobs), desc=f"  reading, {processes} processes", unit=" pieces", delay=1
        )
        idle = list(workers)
        while waiting or doing:
            while idle and waiting:
                pipe = idle.pop()
                doing[pipe] = waiting.pop()
                pipe.send(jobs[doing[pipe]])
            ready: list = connection.wait(list(doing))
            for pipe in ready:
                answer = answers[doing.pop(pipe)] = pipe.recv()
                if isinstance(answer, BaseException):
                    waiting.clear()  # of those before it all are done or being done
                idle.append(pipe)
                bar.update()
        bar.close()
    except (EOFError, ConnectionError):
        raise PageLLMError(
            "a process that read raw files died, perhaps of too little memory; "
            "try again with fewer: --processes 1"
        ) from None
    finally:
        for pipe, worker in workers.items():
            worker.terminate()
            worker.join()
            pipe.close()
    tallies = []
    for _, answer in sorted(answers.items()):
        if isinstance(answer, BaseException):
            raise answer
        tallies.append(answer)
    return tallies


def work(pipe, folder: Path) -> None:
    """Do jobs until there are no more: the life of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one stops it
    threading.Thread(target=outlive, args=(folder,), daemon=True).start()
    while True:
        try:
            answer: Tally | BaseException = read(*pipe.recv())
        except EOFError:
            return
        except BaseException as error:
            error.add_note(traceback.format_exc())
            answer = error
        pipe.send(answer)


def outlive(folder: Path) -> None:
    """Wait until the parent process has died, then remove the folder that it no longer can."""
    parent = parent_process()
    assert parent is not None  # in_processes started this process
    connection.wait([parent.sentinel])
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
