"""The command line. Nothing heavy is imported before it is needed: `--help` and `status` answer at once."""

import argparse
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from annotate.records import DataError
from stages.config import STAGES, Experiment, load
from stages.errors import SettingsError, UserError, suggest

HELP = """\
usage: prefloop COMMAND CONFIG [stage.field=value ...] [options]

CONFIG is an experiment file such as configs/quickstart.yaml. Overrides change its settings for this call.

commands
  run CONFIG       run every stage that is not complete, then print the result table
                     --seeds 0,1,2   everything that depends on the seed once for each
                     --only STAGE    this stage and no other
                     --force STAGE   make this stage anew, beside what is there
                     --publish       copy the report to results/<experiment>/
  status CONFIG    what is complete, what is not, and why (--seeds)
  clean CONFIG     remove runs that these settings no longer lead to; lists them, asks first (--yes; --seeds)
  annotate CONFIG  open the labelling page (--port 7860; --as NAME, else the page asks who you are)
                     --url https://label.example.org   others enter, by invitation, through a proxy there
                     --invite NAME   print the link by which NAME enters, and no more
                     --researcher    with --invite: NAME may also see how the round goes
                     --backup FILE   copy the labels there, and check the copy; people may be working
                     --check         look whether the label database is sound
                     --pause         hand out nothing for now; --resume goes on
                     --close         take no more labels; a run that waits for them goes on
  chat RUN         talk to a policy

  {stages}
                   run this one stage of the experiment; the stages before it must be complete.
                   `prefloop STAGE --help` explains the stage and its settings
"""


class Usage(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        message = message.replace(
            ", stage.field=value", ""
        )  # may be empty, which argparse does not know here
        raise SettingsError(f"{message} (`{self.prog} --help` explains)")


def launch(kind: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Entry of `python -m stages.<kind> CONFIG ...`, the same as `prefloop <kind> CONFIG ...`."""
    sys.exit(main([kind, *(sys.argv[1:] if argv is None else argv)]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. What the user can mend is one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _stoppable():
            return _dispatch(argv)
    except SettingsError as error:
        return _fail(str(error), 2)
    except (UserError, DataError) as error:
        return _fail(str(error), 1)
    except BrokenPipeError:  # whoever read our lines has gone, as in `prefloop status CONFIG | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (
        OSError
    ) as error:  # before or after a run: a folder that cannot be made, a file that cannot be written
        return _fail(f"{error.filename or 'writing'}: {error.strerror}", 1)
    except KeyboardInterrupt:
        return _fail(f"stopped; the same command continues: {_command(argv)}", 130)


def _dispatch(argv: list[str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("--help", "-h", "help"):
        print(HELP.format(stages=" ".join(STAGES)), end="")
        return 0
    if command == "chat":
        from stages.chat import main as chat

        return chat(rest)
    if command in COMMANDS and {"--help", "-h"} & set(rest):
        print(_help_of(command))
        return 0
    if command in COMMANDS:
        return COMMANDS[command](rest, _command(argv))
    if command in STAGES:
        return _stage(command, rest, _command(argv))
    raise SettingsError(f"no command {command}; {suggest(command, [*COMMANDS, 'chat', *STAGES])}")


def _help_of(command: str) -> str:
    """Of one command, what HELP says; argparse would list the options without a word on them."""
    usage, _, overrides, *lines = HELP.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"  {command} "))
    of_options = takewhile(lambda line: line.startswith(" " * 5), lines[first + 1 :])
    return "\n".join([usage.replace("COMMAND", command), "", overrides, "", lines[first], *of_options])


def _run(argv: list[str], command: str) -> int:
    parser = _parser("run", seeds=True)
    parser.add_argument("--only", action="append", default=[], metavar="STAGE")
    parser.add_argument("--force", action="append", default=[], metavar="STAGE")
    parser.add_argument("--publish", action="store_true")
    args = parser.parse_intermixed_args(argv)
    experiment = load(args.config, args.overrides)
    return _execute(experiment, args.seeds, args.only, args.force, args.publish, command)


def _stage(kind: str, argv: list[str], command: str) -> int:
    if {"--help", "-h"} & set(argv):
        from stages.explain import explain

        print(explain(kind))
        return 0
    parser = _parser(kind, seeds=True)
    parser.add_argument("--force", action="store_true")
    if kind == "report":
        parser.add_argument("--publish", action="store_true")
    args = parser.parse_intermixed_args(argv)
    experiment = load(args.config, args.overrides)
    if kind not in experiment.stages:
        own = [name for name, of in experiment.kinds.items() if of == kind]
        hint = f"; `prefloop run {args.config} --only {own[0]}` runs {own[0]}" if own else ""
        raise SettingsError(f"{args.config}: the experiment has no stage named {kind}{hint}")
    return _execute(
        experiment, args.seeds, [kind], [kind] * args.force, "publish" in args and args.publish, command
    )


def _execute(
    experiment: Experiment, seeds: list[int], only: list[str], force: list[str], publish: bool, command: str
) -> int:
    from stages.pipeline import run
    from stages.plan import Plan
    from stages.progress import screen
    from stages.run import is_writer

    plan = Plan(experiment, seeds)
    reports = [node for node in plan.nodes if experiment.kinds[node.stage] == "report"]
    if publish and not reports:
        raise SettingsError(f"{experiment.path}: no report stage, so there is nothing to publish")
    run(plan, screen(quiet=not is_writer()), only=only, force=force, command=command)
    for node in reports if is_writer() else []:
        if (not only or node.stage in only) and plan.state(node).status == "complete":
            from stages.report import publish as copy
            from stages.report import show

            show(plan.state(node).path)
            if publish:
                print(f"published in {copy(plan.state(node).path, experiment.name)}")
    return 0


def _status(argv: list[str], command: str) -> int:
    args = _parser("status", seeds=True).parse_intermixed_args(argv)
    from stages.overview import show
    from stages.plan import Plan

    show(Plan(load(args.config, args.overrides), args.seeds))
    return 0


def _clean(argv: list[str], command: str) -> int:
    parser = _parser("clean", seeds=True)
    parser.add_argument("--yes", action="store_true")
    args = parser.parse_intermixed_args(argv)
    from stages.overview import human, size, unreferenced

    found = unreferenced(load(args.config, args.overrides), tuple(args.seeds))
    for path, why in found.items():
        print(f"{human(size(path)):>9}  {path}" + (f"  stays: {why}" if why else ""))
    leaving = [path for path, why in found.items() if not why]
    if not leaving:
        print("nothing to remove")
        return 0
    total = f"{len(leaving)} folders, {human(sum(map(size, leaving)))}"
    if not args.yes:
        if not sys.stdin.isatty():
            raise SettingsError(f"would remove {total}; say --yes, since nobody can be asked here")
        if input(f"Remove {total}? [y/N] ").strip().lower() not in ("y", "yes"):
            return 0
    for path in leaving:
        shutil.rmtree(path)
    print(f"removed {total}")
    return 0


def _annotate(argv: list[str], command: str) -> int:
    parser = _parser("annotate")
    parser.add_argument("--port", type=int, default=7860)
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--as", dest="name", metavar="NAME")
    who.add_argument("--url", metavar="URL")
    parser.add_argument("--invite", metavar="NAME")
    parser.add_argument("--researcher", action="store_true")
    parser.add_argument("--backup", metavar="FILE", type=Path)
    parser.add_argument("--check", action="store_true")
    state = parser.add_mutually_exclusive_group()
    for option, to in (("--pause", "paused"), ("--resume", "open"), ("--close", "closed")):
        state.add_argument(option, dest="state", action="store_const", const=to)
    args = parser.parse_intermixed_args(argv)
    from stages.people import annotate, care_for, invite, set_round

    if args.state:
        print(set_round(args.config, args.overrides, args.state))
        return 0
    if args.backup or args.check:
        return care_for(args.config, args.overrides, args.backup)
    if args.researcher and args.invite is None:
        parser.error("--researcher goes with --invite NAME")
    if args.invite is not None:
        url = args.url or f"http://127.0.0.1:{args.port}"
        print(invite(args.config, args.overrides, args.invite, url, args.researcher))
    else:
        annotate(args.config, args.overrides, args.port, args.name, args.url)
    return 0


COMMANDS: dict[str, Callable[[list[str], str], int]] = {
    "run": _run,
    "status": _status,
    "clean": _clean,
    "annotate": _annotate,
}


def _parser(command: str, seeds: bool = False) -> Usage:
    parser = Usage(prog=f"prefloop {command}", allow_abbrev=False)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="experiment file")
    parser.add_argument("overrides", nargs="*", metavar="stage.field=value")
    if seeds:
        parser.add_argument("--seeds", type=_seeds, default=[], metavar="0,1,2")
    return parser


def _seeds(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,1,2") from None
    if min(found) < 0:
        raise argparse.ArgumentTypeError("seeds are whole numbers from 0 on")
    return list(dict.fromkeys(found))


def _command(argv: Sequence[str]) -> str:
    return shlex.join(["prefloop", *argv])


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM, as a scheduler or `docker stop` sends it, ends a run as cleanly as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
