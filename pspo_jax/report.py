"""Entry point of reports: `python -m pspo_jax.report RUN [RUN ...] [--out FILE]` writes one self-contained HTML page.

The page needs no server and no network, so it can be mailed or archived. A run that has not ended can be reported too;
the page then says so. `--prompts` writes a table of each run's prompts instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import jax

from pspo_jax.config.command_line import Parser, program, run_command
from pspo_jax.config.fields import ConfigError
from pspo_jax.reporting.page import write_report
from pspo_jax.runs.home import local_path, shown
from pspo_jax.runs.mirror import reading


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog=program("report"),
        description="Write one self-contained HTML page that compares runs.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder or gs:// URL, as run.dir of a training run")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: report.html in the first run's folder")
    parser.add_argument(
        "--prompts",
        action="store_true",
        help="write a table of each run's prompts to its prompts.parquet and prompts.html: visits, success, priority",
    )
    parser.add_argument("--step", default="latest", help="checkpoint for --prompts: a step, latest (default) or best")
    args = parser.parse_args(argv)
    # A training job may be running beside the report; its accelerators must not be touched.
    jax.config.update("jax_platforms", "cpu")
    local_path("--out", args.out)
    if args.prompts:
        from pspo_jax.training.prompt_table import write_prompts

        if args.out is not None:
            raise ConfigError(f"--out {args.out}: --prompts writes to the run's folder; drop --out")
        for name in args.runs:
            with reading(name, "RUN") as (folder, keep):
                paths = write_prompts(folder, args.step)
                keep()
                print(*(shown(path, folder) for path in paths), sep="\n")
        return 0
    with ExitStack() as held:
        runs = [held.enter_context(reading(name, "RUN")) for name in args.runs]
        first, keep = runs[0]
        out = write_report([folder for folder, _ in runs], args.out or first / "report.html")
        keep()
        print(shown(out, first))
    return 0


def command() -> None:
    """`pspo-report`, which is `python -m pspo_jax.report`."""
    run_command(main, "report")


if __name__ == "__main__":
    command()
