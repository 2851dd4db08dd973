"""The checkout as a cluster needs it: its recipes, and a package of its code (checkout -> jobs)."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from alignrec.configuration import nearest
from alignrec.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "launch" / "recipes"
PACKAGES = ("alignrec", "data_prep", "cluster", "launch")
_NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")


def recipe_path(name: str) -> Path:
    """Return the file of a recipe that is given by name or by path.

    Raises:
        UserError: there is no such file.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{name}: no such recipe file. Correct the path.")
        return path
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        close = nearest(name, known)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"There are {', '.join(known)}."
        raise UserError(
            f"{name} is no recipe of launch/recipes. {hint} Your own recipe is given as a path "
            f"that ends in .yaml."
        )
    return path


@contextlib.contextmanager
def packaged() -> Iterator[Path]:
    """Yield a temporary folder with the project's code alone, to be shipped to a cluster.

    It holds no data, runs or virtual environment, whatever lies in the checkout.
    """
    with tempfile.TemporaryDirectory(prefix="alignrec-job-") as name:
        folder = Path(name)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, folder / package, ignore=_NOT_SHIPPED)
        yield folder
