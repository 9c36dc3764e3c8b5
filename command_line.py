"""Options as a dataclass, errors as one line, a lock. Nothing here is about attention."""

import argparse
import contextlib
import math
import os
import sys
from dataclasses import field, fields
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:
    fcntl = None


def option(default, text, low=None, high=math.inf, choices=None):
    """A field of Options; numbers have to be in [low, high]."""
    return field(default=default, metadata=dict(help=text, low=low, high=high, choices=choices))


def parse(options, presets, preset_for, inherit, description, argv=None):
    """The command line as an `options`, a dataclass like Options; a ValueError says what is wrong.

    What is given wins over the preset's values, which win over the defaults. preset_for(given)
    names the preset if --preset does not; inherit(values, given) puts those of a checkpoint above
    the preset's.
    """
    rows = "\n".join(f"  {name:8}" + " ".join(f"{k}={v}" for k, v in row.items())
                     for name, row in presets.items())
    p = argparse.ArgumentParser(description=description, epilog=f"presets:\n{rows}",
                                argument_default=argparse.SUPPRESS, allow_abbrev=False,
                                exit_on_error=False, usage="%(prog)s [options]",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(options):
        name, meta = "--" + f.name.replace("_", "-"), f.metadata
        if f.type is bool:
            p.add_argument(name, action=argparse.BooleanOptionalAction, help=meta["help"])
        else:
            text = meta["help"] + f" ({f.default})" * (f.default not in ("", None))
            p.add_argument(name, type=checked(f.type, meta["low"], meta["high"]), help=text,
                           choices=meta["choices"], metavar=f.type.__name__)
    try:
        given, unknown = p.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise ValueError(f"{e} (see --help)")
    given = vars(given)
    preset = given.get("preset") or preset_for(given)
    if unknown:
        raise ValueError(f"unrecognized arguments: {' '.join(unknown)} (see --help)")
    if preset not in presets:
        raise ValueError(f"--preset {preset} is not one of: {', '.join(presets)}")
    values = inherit({**presets[preset], "preset": preset}, given)
    for key in [key for key in options.replaces if key in given]:
        if options.replaces[key].keys() & given.keys():
            names = " or ".join(f"--{name}" for name in (key, *options.replaces[key]))
            raise ValueError(f"{names.replace('_', '-')}: give one of these, not both")
        values |= options.replaces[key]
    return options(**values | given)


def checked(kind, low, high):
    """An argparse type: text as a `kind`, a number only if it is in [low, high]."""
    if kind is int and high == math.inf:
        high = 2**31 - 1                                    # more of anything cannot be had

    def convert(text):
        value = kind(text)
        if low is not None and not low <= value <= high:    # also for NaN
            raise ValueError
        return value

    convert.__name__ = kind.__name__ if low is None else f"{kind.__name__} in [{low}, {high}]"
    return convert


def one_line_errors(program, run):
    """run()'s exit code, or 2 and one line on what went wrong and what to do."""
    try:
        return run()
    except KeyboardInterrupt:                               # a second one, or before training
        print("stopped", file=sys.stderr)
        return 130
    except (torch.cuda.OutOfMemoryError, MemoryError):
        message = "out of memory: give a smaller --micro-batch"
    except OSError as e:
        message = f"{e.filename}: {e.strerror}" if e.filename else str(e)
    except ValueError as e:
        message = str(e)
    except RuntimeError as e:                               # what a lost connection raises
        if not dist.is_initialized() or not ("gloo" in str(e) or isinstance(e, dist.DistError)):
            raise
        message = "another process of this run has ended; --resume goes on from its checkpoint"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"{program}: error: {message}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def claimed(folder):
    """A lock on this folder while the block runs; one that a killed process held is gone."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if fcntl is not None:                               # Windows has no such locks
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is writing to {folder}: wait for it, or choose "
                                 "another --out")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):              # it is empty if the run did not begin
                Path(folder).rmdir()
