"""`python -m pspo_jax.report RUN [RUN ...] [--out FILE]`: run folders -> one self-contained HTML page.

The page needs no server, no network and nothing installed where it is read, so it can be mailed or archived.
A run that is still going can be reported too; the page then says so. `--prompts` writes what a run has made of each
prompt instead.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from pspo_jax.config.command_line import Parser, run
from pspo_jax.config.schema import ConfigError
from pspo_jax.reporting.page import read_runs, render
from pspo_jax.system.storage import REFUSED, StorageError, write_whole


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the report on `runs` to `out`, whose folder is made if need be, and return `out`.

    Raises:
      ConfigError: a folder is no run folder, or `out` is no file that may be written.
      StorageError: `out` cannot be written now, as on a full disk.
    """
    page = render(read_runs(runs))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        write_whole(out, page.encode())
    except (OSError, StorageError) as error:
        reason = error if isinstance(error, OSError) else error.__cause__
        if isinstance(reason, OSError) and reason.errno in (*REFUSED, errno.EEXIST):
            raise ConfigError(f"--out {out}: {reason.strerror}; name a file that can be written") from error
        raise
    return out


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m pspo_jax.report",
        description="Write one self-contained HTML page that compares runs.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder, as run.dir of a training run")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: report.html in the first run's folder")
    parser.add_argument(
        "--prompts",
        action="store_true",
        help="write a table of each run's prompts to its prompts.parquet and prompts.html: visits, success, priority",
    )
    parser.add_argument("--step", default="latest", help="with --prompts: a step, latest (default) or best")
    args = parser.parse_args(argv)
    # A report is made beside a training job, whose accelerators are not to be touched.
    jax.config.update("jax_platforms", "cpu")
    if args.prompts:
        from pspo_jax.training.prompt_table import write_prompts

        if args.out is not None:
            raise ConfigError(f"--out {args.out}: --prompts writes to the run's folder; drop it")
        for run_folder in args.runs:
            print(*write_prompts(run_folder, args.step), sep="\n")
        return 0
    print(write_report(args.runs, args.out or args.runs[0] / "report.html"))
    return 0


if __name__ == "__main__":
    run(main, "pspo_jax.report")
