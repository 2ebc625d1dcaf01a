"""Entry point of reports: `python -m pspo_jax.report RUN [RUN ...] [--out FILE]` writes one self-contained HTML page.

The page needs no server and no network, so it can be mailed or archived. A run that has not ended can be reported too;
the page then says so. `--prompts` writes a table of each run's prompts instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax

from pspo_jax.config.command_line import Parser, run
from pspo_jax.config.fields import ConfigError
from pspo_jax.reporting.page import write_report


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
    parser.add_argument("--step", default="latest", help="checkpoint for --prompts: a step, latest (default) or best")
    args = parser.parse_args(argv)
    # A training job may be running beside the report; its accelerators must not be touched.
    jax.config.update("jax_platforms", "cpu")
    if args.prompts:
        from pspo_jax.training.prompt_table import write_prompts

        if args.out is not None:
            raise ConfigError(f"--out {args.out}: --prompts writes to the run's folder; drop --out")
        for run_folder in args.runs:
            print(*write_prompts(run_folder, args.step), sep="\n")
        return 0
    print(write_report(args.runs, args.out or args.runs[0] / "report.html"))
    return 0


if __name__ == "__main__":
    run(main, "pspo_jax.report")
