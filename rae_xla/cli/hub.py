"""``rae-xla hub``: published models here, our own there."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from rae_xla.cli.options import check_out_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-commands and their options."""
    commands = parser.add_subparsers(dest="hub_command", metavar="COMMAND", required=True)
    commands.add_parser("list", help="the published models that have short names")
    fetch = commands.add_parser("pull", help="download a model's files and check them")
    fetch.add_argument(
        "what", metavar="NAME|OWNER/REPO", help="a published model, or a repository of the hub"
    )
    fetch.add_argument(
        "--to", type=Path, metavar="DIR", help="folder for the files (default: the hub's cache)"
    )
    fetch.add_argument(
        "--files", nargs="+", metavar="PATTERN", help="which of a repository, such as '*.json'"
    )
    fetch.add_argument("--revision", metavar="R", help="branch, tag or commit of a repository")
    send = commands.add_parser("push", help="send a folder of weights as one commit")
    send.add_argument("folder", type=Path, metavar="FOLDER", help="what save_pretrained wrote")
    send.add_argument("repository", metavar="OWNER/REPO", help="made, private, if there is none")
    send.add_argument("--public", action="store_true", help="for everyone to read")
    send.add_argument("--dry-run", action="store_true", help="only say what would be sent")
    send.add_argument("--message", default="", metavar="TEXT", help="of the commit")


def run(args: argparse.Namespace) -> int:
    """Do what the sub-command says."""
    return {"list": _list, "pull": _pull, "push": _push}[args.hub_command](args)


def _list(args: argparse.Namespace) -> int:
    from rae_xla.interop.published import DIFFUSERS, GENERATORS, files_of, names

    rows = []
    for name in names():
        generator = GENERATORS.get(name)
        about = generator.about if generator else ", ".join(files_of(name))
        rows.append((name, about))
    rows += [(repository, "in diffusers' layout") for repository in DIFFUSERS.values()]
    width = max(len(name) for name, _ in rows)
    for name, about in rows:
        print(f"{name:<{width}}  {about}")
    return 0


def _pull(args: argparse.Namespace) -> int:
    from rae_xla.interop.hub import pull
    from rae_xla.interop.published import COLLECTION

    if args.to is not None:
        check_out_folder(args.to, "--to")
    count = size = unknown = 0
    for repository, wanted in _wanted(args).items():
        # The collection's files are meant to lie in one folder, as configurations name them; an
        # encoder is named by its hub id, which the cache is asked for.
        to = args.to if repository in (COLLECTION, args.what) else None
        snapshot = pull(repository, wanted, to=to, revision=args.revision)
        print(f"{repository} at {snapshot.commit[:8]}, in {snapshot.folder}")
        for file in snapshot.files:
            kind = "sha256" if len(file.checksum) == 64 else "sha1"
            said = f"{kind} {file.checksum[:12]}" if file.checksum else "not checked"
            print(f"  {file.path}  {_bytes(file.size)}  {said}")
            unknown += not file.checksum
        count, size = count + len(snapshot.files), size + snapshot.size
    verdict = f"the hub could not be asked for the checksums of {unknown}"
    verdict = verdict if unknown else "every checksum is the hub's"
    print(f"{count} files, {_bytes(size)}: {verdict}")
    return 0


def _wanted(args: argparse.Namespace) -> Mapping[str, list[str] | None]:
    """Repository -> which of its files."""
    from rae_xla.errors import UserError
    from rae_xla.interop.published import DIFFUSERS, files_of, names

    if "/" in args.what:
        return {args.what: args.files}
    if args.files or args.revision:
        raise UserError("--files and --revision go with a repository, owner/name")
    if args.what in DIFFUSERS and args.what not in names():
        return {DIFFUSERS[args.what]: None}
    return dict(files_of(args.what))


def _push(args: argparse.Namespace) -> int:
    from rae_xla.interop.hub_push import pack, push

    parcel = pack(args.folder)
    who = "public" if args.public else "private"
    print(f"{args.folder} to {args.repository} ({who}):")
    for name in parcel.files:
        print(f"  {name}  {_bytes(parcel.size(name))}")
    if parcel.left_out:
        print(f"left out: {', '.join(parcel.left_out)}")
    total = _bytes(sum(map(parcel.size, parcel.files)))
    if args.dry_run:
        print(f"{len(parcel.files)} files, {total}, would be sent")
        return 0
    address = push(parcel, args.repository, public=args.public, message=args.message)
    print(f"{len(parcel.files)} files, {total}, arrived whole: {address}")
    return 0


def _bytes(size: int) -> str:
    """Such as 1.66 GB."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"
