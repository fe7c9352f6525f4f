"""Copy figures of the lab to where pages show them.

    python website/pictures.py

`docs/images/FOLDER.NAME.svg` is `docs/evidence/FOLDER/figures/NAME.svg`, which `batchnorm lab
report docs/evidence` makes. To show another one, make an empty file of its name, and run this.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def copies(evidence: Path = DOCS / "evidence") -> Iterator[tuple[Path, Path]]:
    """Every picture, and the figure that it is a copy of."""
    for picture in sorted((DOCS / "images").glob("*.*.svg")):
        folder, name, _ = picture.name.split(".")
        yield picture, evidence / folder / "figures" / f"{name}.svg"


def main() -> None:
    """Copy them all."""
    for picture, figure in copies():
        if not figure.exists():
            sys.exit(f"{figure}: expected a figure; make it by: batchnorm lab report docs/evidence")
        shutil.copyfile(figure, picture)


if __name__ == "__main__":
    main()
