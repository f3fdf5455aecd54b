"""The options of `score`; the command itself needs pyarrow, and is imported when it is given."""

import argparse
from pathlib import Path


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return number


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="a CSV or Parquet file, or a directory of them")
    add("--model", required=True, metavar="NAME", help="the model's name")
    add("--version", type=_count, metavar="N", help="its version; default: the highest one that proves itself")
    add("--models", help="model repository; default: models")
    add("--example", action="store_true", help="take a model that comes with Stepcast")
    add("--out", required=True, type=Path, metavar="FILE", help="the output: .csv, .parquet or .pq")
    columns = parser.add_argument_group("columns", "The table that a model was trained from needs none of these.")
    add = columns.add_argument
    add("--key", metavar="COLUMN", help="whose row it is: the session's id; default: all rows are of one session")
    add("--time", metavar="COLUMN", help="the row's moment: ISO 8601 (without an offset: UTC), or Unix seconds")
    add("--mask", metavar="COLUMN", help="1: present, 0: the session's state stays as it is")
    add("--column", action="append", default=[], metavar="FEATURE=COLUMN", help="the table calls a feature so")
    add("--known-in-row", action="store_true", help="what is known of the moment ahead stands in the row before it")
    add("--any-time", action="store_true", help="rows may lie off the grid of the model's steps")
    add("--session", default="all", metavar="ID", help="the session, if there is no key; default: all")
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--keep", action="append", default=[], metavar="COLUMN", help="a column of the table that the output has, too")
    add("--prefix", default="", metavar="TEXT", help="before the names of outputs")
    add("--skip-bad-rows", action="store_true", help="leave out rows that cannot be stepped, instead of ending there")
    add("--force", action="store_true", help="begin anew, and write over what is there")
    store = parser.add_argument_group("final states")
    add = store.add_argument
    add("--store", metavar="URL", help="put final states there, so that a server goes on from them")
    add("--continue", dest="goes_on", action="store_true", help="sessions that the store has go on from there")
    add("--namespace", default="default", help="whose sessions they are; default: default")
    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add("--device", choices=["auto", "cpu", "cuda"], help="where the model runs; default: auto")
    add("--threads", type=_count, metavar="N", help="onnxruntime's threads; default: one for each processor")
    add("--state-mb", type=float, default=1024.0, metavar="MB", help="memory for states; the rest lies on the disk")
    add("--chunk-rows", type=int, default=0, metavar="N", help="rows that are stepped together; default: by their size")
    add("--checkpoint-s", type=float, default=15.0, metavar="S", help="seconds between checkpoints; default: 15")
