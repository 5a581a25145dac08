"""Draws a finished run on one page that needs no network: report.html."""

import argparse
from pathlib import Path

from spkid.errors import run_command
from spkid.evaluation.report.write import write_report


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m spkid.evaluation.report", description=__doc__
    )
    parser.add_argument("output_folder", type=Path, help="of a finished run")
    page = write_report(parser.parse_args(arguments).output_folder)
    print(f"{page}: the run on one page")


if __name__ == "__main__":
    run_command(main)
