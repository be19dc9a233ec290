"""Run folders of configs, one run per file and seed, and write a report of each folder.

    python play-scripts/run_ablations.py configs/lr_sweep --overlay configs/hardware/h100.yaml --seeds 3
    python play-scripts/run_ablations.py configs/tiny --seeds 5 --jobs 2
    python play-scripts/run_ablations.py configs/lr_sweep --on modal --overlay configs/hardware/h100.yaml
    python play-scripts/run_ablations.py configs/tiny --redraw     from results/*/metrics.csv, with no run folder

A run goes to <runs>/<folder>/<its file>/seed_<n>, with its output in console.log; the report to <results>/<folder>.
Finished runs are skipped. Runs that were cut off or failed go on from their last checkpoint: at once if their process
was killed or their machine was lost (--retries), else with the same command. A run that fails does not stop the others.
The guard stops collapsed runs (guard.action=warn lets them go on). Runs of different folders that have the same config
are run once and copied. Ctrl-C ends the runs after the work at hand and a save; the same command goes on. --on says
where runs run: on this machine, on a Ray cluster or on Modal (docs/elsewhere.md). If a folder holds folders of configs,
all of those are run. Reports of your own folders are not listed in <results>/README.md, which is for the ablations of
this repository.

The folders in configs/tiny have five seeds if --seeds does not say otherwise. --more-seeds 8, which is theirs from five
seeds on, adds seeds up to 8 to both settings of a claim whose difference the first seeds leave between one and three
standard errors, or do not tell from 0. The first seeds alone decide on that, so that the same command goes on.

Exit status: 0 every run has ended, perhaps collapsed; 1 some have not; 2 a mistake in the command; 4 stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from types import FrameType

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from utils.ablations.estimate import estimate, used
from utils.ablations.jobs import ENDED, Job, check_place, copy, find_topics, finish, plan, progress_of, start
from utils.ablations.more_seeds import at_most, further
from utils.ablations.places import find_place
from utils.ablations.places.place import Place
from utils.ablations.report import command_of, write_report
from utils.ablations.top_page import write_top_page
from utils.plots.summary import format_time
from utils.run.ending import SignalHandler, Status

POLL_SECONDS = 0.1
FRAME = 7  # lines of the table that are no rows: borders, header, captions
TINY_SEEDS, TINY_MORE_SEEDS = 5, 8  # where only folders of configs/tiny are run
STYLES = {"failed": "red", "cut_off": "red", "collapsed": "yellow", "running": "dim"}


class Stop(SignalHandler):
    """Counts the signals that ask for an end, and asks the runs as often: once to save, twice to end at once."""

    def __init__(self) -> None:
        self.count = self.sent = 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def pass_on(self, running: Sequence[Job]) -> None:
        while self.sent < self.count:
            self.sent += 1
            for job in running:
                job.work.interrupt()


def run_all(jobs: Sequence[Job], place: Place, at_once: int, retries: int, stop: Stop, console: Console) -> None:
    """Run what is waiting, until all have ended, or a signal asked to stop and the running ones have saved."""
    live = Live(console=console, refresh_per_second=2) if console.is_terminal else contextlib.nullcontext()
    try:
        with live:
            unfinished = True
            while unfinished:
                unfinished = advance(jobs, place, at_once, retries, stop, console)
                if console.is_terminal:
                    live.update(table(jobs, at_once, stop, console.height - FRAME))
                time.sleep(POLL_SECONDS)
    finally:  # an error in this process leaves none of the others behind
        for job in jobs:
            if job.state == "running":
                job.work.interrupt()


def advance(jobs: Sequence[Job], place: Place, at_once: int, retries: int, stop: Stop, console: Console) -> bool:
    """Note what has ended, start what there is room for, pass signals on; False when nothing is left to wait for."""
    for job in jobs:
        if job.state == "running" and (ending := job.work.poll()) is not None:
            finish(job, ending, retries)
            announce(console, job)
            if job.state == "cut_off" and not stop.count:
                job.state = "waiting"
        elif job.state == "waiting" and job.same_as and job.same_as.state not in ("waiting", "running"):
            copy(job)
            announce(console, job)
    n_free = 0 if stop.count else at_once - sum(job.state == "running" for job in jobs)
    for job in [job for job in jobs if job.state == "waiting" and not job.same_as][:n_free]:
        start(job, place)
        announce(console, job)
    running = [job for job in jobs if job.state == "running"]
    stop.pass_on(running)
    return bool(running) or (not stop.count and any(job.state == "waiting" for job in jobs))


def announce(console: Console, job: Job) -> None:
    text = f"{job.state:11} {job}" + (f": {job.detail}" if job.detail else "")
    console.print(escape(text), style=STYLES.get(job.state, ""), soft_wrap=True)


def table(jobs: Sequence[Job], at_once: int, stop: Stop, n_rows: int) -> Table:
    """The runs that are running, then those that have ended, in at most `n_rows`; below, counts and the time left."""
    running = [(job, progress_of(job)) for job in jobs if job.state == "running"]
    ended = [job for job in jobs if job.state not in ("waiting", "running")]
    n_hidden = max(0, min(len(ended), len(running) + len(ended) - n_rows))
    shown = Table("run", "step", "reward", "state", "time left")
    for job, progress in running + [(job, progress_of(job)) for job in ended[n_hidden:]]:
        reward = "–" if progress.reward is None else f"{progress.reward:.3f}"
        is_running = job.state == "running"
        time_left = format_time(progress.seconds_left) if is_running else ""
        style = "" if is_running else STYLES.get(job.state, "")
        shown.add_row(str(job), f"{progress.step}/{progress.n_steps}", reward, job.state, time_left, style=style)
    counts = Counter(job.state for job in jobs if job.state != "running")
    captions = [", ".join(f"{n} {state}" for state, n in sorted(counts.items()))]
    captions += [f"{n_hidden} that ended not shown"] if n_hidden else []
    paces = [progress.pace for _, progress in running if progress.pace is not None]
    if stop.count:
        captions.append("stopping: the runs save; Ctrl-C once more ends them at once")
    elif paces:
        steps = sum(progress.n_steps - progress.step for _, progress in running)
        steps += sum(job.config.training.n_grpo_steps for job in jobs if job.state == "waiting" and not job.same_as)
        captions.append(f"about {format_time(steps * fmean(paces) / at_once)} left")
    shown.caption = "; ".join(caption for caption in captions if caption)
    return shown


def report(options: argparse.Namespace, topics: dict[str, Path], console: Console) -> None:
    """Write the page of every folder, and the top page. What is missing or damaged is named."""
    for topic, folder in topics.items():
        results = Path(options.results) / topic
        source, command = Path(options.runs) / topic, command_for(options, folder)
        if options.redraw:
            source, command = results / "metrics.csv", command_of(results / "README.md") or command
        try:
            complaints = write_report(source, results, topic, command)
        except ValueError as error:
            complaints = [f"{topic}: no report: {error}"]
        else:
            console.print(escape(f"wrote {results / 'README.md'}"), soft_wrap=True)
        for complaint in complaints:
            print(complaint, file=sys.stderr)
    try:
        complaints = write_top_page(Path(options.results))
    except ValueError as error:
        complaints = [str(error)]
    for complaint in complaints:
        print(complaint, file=sys.stderr)


def command_for(options: argparse.Namespace, folder: Path) -> str:
    """The command that runs one of the folders as it was run."""
    words = ["python", "play-scripts/run_ablations.py", os.path.relpath(folder), "--seeds", str(options.seeds)]
    words += ["--more-seeds", str(options.more_seeds)] if options.more_seeds > options.seeds else []
    for overlay in options.overlay:
        words += ["--overlay", overlay]
    words += ["--on", options.on] if options.on != "local" else []
    words += ["--jobs", str(options.jobs)] if options.jobs is not None else []
    return shlex.join([*words, *options.overrides])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("words", nargs="+", metavar="FOLDER", help="folder of configs, or of such folders; then section.field=value")
    add("--seeds", type=int, metavar="N", help="seeds per config, counted up from its own (1; of configs/tiny 5)")
    add("--more-seeds", type=int, metavar="N", help="seeds where a claim is unclear (configs/tiny: 8; else no more)")
    add("--overlay", action="append", default=[], metavar="FILE", help="YAML file that wins over the configs")
    add("--on", default="local", metavar="PLACE", help="local, ray, ray:ADDRESS or modal (local)")
    add("--jobs", type=int, metavar="N", help="runs at once (local 1; elsewhere as many as the place takes)")
    add("--retries", type=int, default=2, metavar="N", help="times that a run is resumed which was cut off (2)")
    add("--estimate", action="store_true", help="run nothing: print the hours and the cost that are to be expected")
    add("--runs", default="runs", metavar="FOLDER", help="where runs go (runs)")
    add("--results", default="results", metavar="FOLDER", help="where reports go (results)")
    add("--report-only", action="store_true", help="run nothing: write the reports of the runs so far")
    add("--redraw", action="store_true", help="run nothing: write the reports again from their metrics.csv")
    options = parser.parse_intermixed_args(arguments)
    options.folders = [word for word in options.words if "=" not in word]
    options.overrides = [word for word in options.words if "=" in word]
    if not options.folders:
        parser.error("no folder of configs given")
    for name, least in (("seeds", 1), ("more_seeds", 1), ("jobs", 1), ("retries", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: at least {least}")
    return options


def choose_seeds(options: argparse.Namespace, topics: Iterable[str]) -> None:
    """Fill in the seeds that the command leaves open. Raises ValueError if --more-seeds are fewer than --seeds."""
    is_tiny = all(topic.startswith("tiny/") for topic in topics)
    options.seeds = options.seeds or (TINY_SEEDS if is_tiny else 1)
    if options.more_seeds is None:
        more = is_tiny and TINY_SEEDS <= options.seeds < TINY_MORE_SEEDS
        options.more_seeds = TINY_MORE_SEEDS if more else options.seeds
    elif options.more_seeds < options.seeds:
        raise ValueError(f"--more-seeds {options.more_seeds}: at least --seeds, which is {options.seeds}")
    elif options.seeds < 2 and options.more_seeds > options.seeds:
        raise ValueError("--more-seeds: a difference has a standard error from two seeds on; give --seeds 2 or more")


def say_what_is_ahead(jobs: Sequence[Job], at_once: int, options: argparse.Namespace, console: Console) -> None:
    n_ended = sum(job.state in ENDED for job in jobs)
    ended = f"{n_ended} of {len(jobs)} runs have ended already" if n_ended else None
    for line in filter(None, (ended, estimate(jobs, at_once, Path(options.results)))):
        console.print(escape(line), soft_wrap=True)


def add_seeds(
    first: Sequence[Job],
    planned: Callable[..., list[Job]],
    place: Place,
    options: argparse.Namespace,
    stop: Stop,
    console: Console,
) -> list[Job]:
    """Run further seeds of the settings that the first seeds leave unclear; returns all jobs."""
    wanted, lines = further(first, options.more_seeds)
    for line in lines:
        console.print(escape(line), soft_wrap=True)
    jobs = planned(options.seeds, more=wanted, earlier=first)
    added = [job for job in jobs if job not in first]
    if lines:
        at_once = options.jobs or place.at_once([job.launch for job in added if job.state == "waiting"])
        say_what_is_ahead(added, at_once, options, console)
        run_all(added, place, at_once, options.retries, stop, console)
    return jobs


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console(highlight=False)
    with contextlib.ExitStack() as leaving:
        try:
            topics = find_topics(options.folders)
            choose_seeds(options, topics)
            if options.report_only or options.redraw:
                report(options, topics, console)
                return Status.FINISHED
            planned = partial(
                plan, topics, overlays=options.overlay, overrides=options.overrides, runs=Path(options.runs)
            )
            jobs = planned(options.seeds)
            place = leaving.enter_context(contextlib.closing(find_place(options.on)))
            at_once = options.jobs or place.at_once([job.launch for job in jobs if job.state == "waiting"])
            say_what_is_ahead(jobs, at_once, options, console)
            most = planned(options.more_seeds)
            if line := estimate(at_most(jobs, most), at_once, Path(options.results)):
                text = f"then {options.more_seeds} seeds of both settings of a claim that these leave unclear; for all"
                console.print(escape(f"{text}, {line}"), soft_wrap=True)
            if options.estimate:
                return Status.FINISHED
            check_place(most, place)
        except ValueError as mistake:
            print(f"error: {mistake}", file=sys.stderr)
            return Status.USER_MISTAKE
        with Stop() as stop:
            run_all(jobs, place, at_once, options.retries, stop, console)
            if options.more_seeds > options.seeds and not stop.count:
                jobs = add_seeds(jobs, planned, place, options, stop, console)
    if (spent := used(jobs)) is not None:
        console.print(spent, soft_wrap=True)
    if stop.count:
        console.print("stopped; the same command goes on from here")
        return Status.STOPPED_BY_SIGNAL
    report(options, topics, console)
    return Status.ERROR if any(job.state not in ENDED for job in jobs) else Status.FINISHED


if __name__ == "__main__":
    sys.exit(main())
