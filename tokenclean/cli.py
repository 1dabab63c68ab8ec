"""The command line: ``tokenclean VERB ...``. Nothing heavy is imported before a verb is known."""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
from typing import Any

from tokenclean import __version__, interrupts, runs, trust

#: Verb -> the module that has a function of that name, and what it does.
VERBS = {
    "fit": ("commands", "fine-tune a base model on a pool or a cleaned pool (LightningCLI)"),
    "score": ("commands", "write one model's per-token losses over a pool (LightningCLI)"),
    "select": ("commands", "two score tables and a rule -> cleaned pool; no model, no GPU"),
    "clean": ("commands", "the whole loop: warm up, score, select, train, for one or many arms"),
    "evaluate": ("evaluation.verb", "run benchmarks of lm-evaluation-harness on models and arms"),
    "report": ("report.verb", "what a run cleaned: one HTML file, its figures and numbers"),
    "show": ("report.show", "print samples of a run with their kept and dropped tokens"),
    "export": ("export.verb", "a run's cleaned pool or model for another trainer or tool"),
    "noise": ("noise_verb", "how much of a run's pool is informative, by arm and source"),
    "study": ("study.verb", "many runs of the loop: arms x seeds x settings, and their tables"),
    "results": ("study.verb", "print the tables of finished runs and studies again"),
}

#: Verbs that keep what they have finished.
RESUMED = ("fit", "score", "select", "clean", "evaluate", "study")
#: Verbs that several processes can share.
SHARED = ("fit", "score", "select", "clean")

#: What gloo and NCCL say when the other end of a connection is gone.
_GONE = re.compile(r"Connection (closed|reset)|Broken pipe|remote process exited")


def _help() -> str:
    verbs = "\n".join(f"  {name:8} {text}" for name, (_, text) in VERBS.items())
    return f"""usage: tokenclean [--help] [--version] VERB [-c CONFIG.yaml ...] [--option value ...]

Token-level cleaning of supervised fine-tuning data.

verbs:
{verbs}

Several -c files are laid over one another in order, options come last.
{trust.HELP}.
`tokenclean VERB --help` lists a verb's options. Each file under configs/ opens with its command.
"""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script and of ``python -m tokenclean``."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(_help(), end="")
        return
    if args[0] in ("-V", "--version"):
        print(f"tokenclean {__version__}")
        return
    verb = args[0]
    if verb not in VERBS:
        print(
            f"tokenclean: error: unknown verb {verb!r}; choose from {', '.join(VERBS)}",
            file=sys.stderr,
        )
        raise SystemExit(2)

    try:
        with interrupts.listening(), trust.trusting(args[1:]) as words:
            _run(verb, words)
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("TOKENCLEAN_TRACEBACK"):
            raise
        print(f"tokenclean {verb}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        if not _GONE.search(str(error)):
            raise
        print(
            f"tokenclean {verb}: error: another process of this run is gone; when all have ended, "
            "the same command goes on",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except interrupts.Stopped as stop:
        raise _stopped(verb, stop.exit_code) from None
    except KeyboardInterrupt:
        raise _stopped(verb, 130) from None
    except SystemExit as stop:
        # Lightning turns Ctrl-C inside a Trainer into a bare 1. Half a run must not look like a
        # whole one to whoever waits for it.
        if stop.code == 1:
            raise _stopped(verb, 130) from None
        raise


def _run(verb: str, args: list[str]) -> None:
    if verb not in SHARED and (os.environ.get("WORLD_SIZE", "1") != "1" or runs.process_rank()):
        raise ValueError(
            f"`{verb}` runs in one process; start it without torchrun (for {', '.join(SHARED)})"
        )
    started = time.perf_counter()
    module = importlib.import_module(f"tokenclean.{VERBS[verb][0]}")
    # What only reads a finished run does without Lightning, and starts sooner.
    commands: Any = sys.modules.get("tokenclean.commands")
    if commands is not None:
        commands.import_seconds = time.perf_counter() - started
    getattr(module, verb)(args)


def _stopped(verb: str, code: int) -> SystemExit:
    rest = "; the same command goes on where it stopped" if verb in RESUMED else ""
    print(f"tokenclean {verb}: stopped{rest}", file=sys.stderr)
    return SystemExit(code)
