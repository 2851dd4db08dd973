"""Options that several commands have in common (-> command line)."""

import argparse
from pathlib import Path


def add_recipe(command: argparse.ArgumentParser) -> None:
    """Add a recipe, and which part of it runs where and with which settings."""
    command.add_argument("recipe", help="a file in launch/recipes by name, or a path to YAML")
    command.add_argument("--from", dest="first", metavar="STAGE", help="run it and what follows")
    command.add_argument("--until", dest="last", metavar="STAGE", help="stop after it")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override a setting (repeatable)",
    )
    command.add_argument("--run-dir", type=Path, help="folder of the run (default: runs/RECIPE)")


def add_address(command: argparse.ArgumentParser) -> None:
    """Add the address of the cluster."""
    command.add_argument(
        "--address", help="http://HOST:8265 (default: the cluster that is up on this machine)"
    )


def add_json(command: argparse.ArgumentParser) -> None:
    """Add the form of the answer."""
    command.add_argument("--json", action="store_true", help="answer in one line for a program")
