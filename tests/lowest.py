"""Prints the lowest versions that pyproject.toml allows, as constraints for pip."""

import re
import tomllib
from pathlib import Path


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(one for extra in extras for one in extra)]:
        if found := re.match(r"([\w.-]+)(?:\[.*?\])?>=([\w.]+),", requirement):
            print(f"{found[1]}=={found[2]}")


if __name__ == "__main__":
    main()
