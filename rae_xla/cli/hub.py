"""``rae-xla hub``: list, download and upload models on the Hugging Face hub."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from rae_xla.cli.options import PathAction, check_out_folder
from rae_xla.config.paths import LOCAL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands and their options."""
    commands = parser.add_subparsers(dest="hub_command", metavar="COMMAND", required=True)
    commands.add_parser("list", help="list the published models")
    pull = commands.add_parser("pull", help="download the files of a model and verify them")
    pull.add_argument(
        "what", metavar="NAME|OWNER/REPO", help="a published model, or a hub repository"
    )
    pull.add_argument(
        "--to",
        action=PathAction,
        rule=LOCAL,
        metavar="DIR",
        help="local destination folder (default: the hub's cache)",
    )
    pull.add_argument(
        "--files",
        nargs="+",
        metavar="PATTERN",
        help="download only these files of a repository, such as '*.json'",
    )
    pull.add_argument("--revision", metavar="R", help="branch, tag or commit of a repository")
    push = commands.add_parser("push", help="upload a folder of weights as one commit")
    push.add_argument(
        "folder",
        action=PathAction,
        rule=LOCAL,
        metavar="FOLDER",
        help="local folder that save_pretrained wrote",
    )
    push.add_argument(
        "repository", metavar="OWNER/REPO", help="created as private if it does not exist"
    )
    push.add_argument(
        "--public", action="store_true", help="allow a public repository; create it as public"
    )
    push.add_argument("--dry-run", action="store_true", help="only list what would be uploaded")
    push.add_argument("--message", default="", metavar="TEXT", help="commit message")


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    return {"list": _list, "pull": _pull, "push": _push}[args.hub_command](args)


def _list(args: argparse.Namespace) -> int:
    from rae_xla.models.pretrained.published import (
        DIFFUSERS,
        GENERATORS,
        TEXT_TO_IMAGE,
        published_files,
        published_names,
    )

    rows = []
    for name in published_names():
        generator = GENERATORS.get(name) or TEXT_TO_IMAGE.get(name)
        about = generator.about if generator else ", ".join(published_files(name))
        rows.append((name, about))
    rows += [(repository, "in diffusers' layout") for repository in DIFFUSERS.values()]
    width = max(len(name) for name, _ in rows)
    for name, about in rows:
        print(f"{name:<{width}}  {about}")
    return 0


def _pull(args: argparse.Namespace) -> int:
    from rae_xla.models.pretrained.hub import pull
    from rae_xla.models.pretrained.published import COLLECTION, RAEV2_REPOSITORY

    if args.to is not None:
        check_out_folder(args.to, "--to")
    count = size = unverified = 0
    for repository, patterns in _files_to_pull(args).items():
        # Configurations name the collections' files by path, so these go to --to. They name an
        # encoder by its hub id, which is looked up in the cache.
        named_by_path = repository in (COLLECTION, RAEV2_REPOSITORY, args.what)
        to = Path(args.to) if args.to and named_by_path else None
        snapshot = pull(repository, patterns, to=to, revision=args.revision)
        print(f"{repository} at {snapshot.commit[:8]}, in {snapshot.folder}")
        for file in snapshot.files:
            kind = "sha256" if len(file.checksum) == 64 else "sha1"
            checksum = f"{kind} {file.checksum[:12]}" if file.checksum else "not verified"
            print(f"  {file.path}  {_format_bytes(file.size)}  {checksum}")
            unverified += not file.checksum
        count, size = count + len(snapshot.files), size + snapshot.size
    if unverified:
        verdict = f"{unverified} not verified, because the hub cannot be reached"
    else:
        verdict = "all checksums match the hub's"
    print(f"{count} files, {_format_bytes(size)}: {verdict}")
    return 0


def _files_to_pull(args: argparse.Namespace) -> Mapping[str, list[str] | None]:
    """Return repository -> patterns of its files; None: all files."""
    from rae_xla.errors import UserError
    from rae_xla.models.pretrained.published import DIFFUSERS, published_files, published_names

    if "/" in args.what:
        return {args.what: args.files}
    if args.files or args.revision:
        raise UserError("--files and --revision need a repository, owner/name")
    if args.what in DIFFUSERS and args.what not in published_names():
        return {DIFFUSERS[args.what]: None}
    return dict(published_files(args.what))


def _push(args: argparse.Namespace) -> int:
    from rae_xla.interop.hub_push import prepare_upload, push

    upload = prepare_upload(Path(args.folder))
    visibility = "public" if args.public else "private"
    print(f"{args.folder} to {args.repository} ({visibility}):")
    for name in upload.files:
        print(f"  {name}  {_format_bytes(upload.size(name))}")
    if upload.skipped:
        print(f"skipped: {', '.join(upload.skipped)}")
    total = _format_bytes(sum(map(upload.size, upload.files)))
    if args.dry_run:
        print(f"{len(upload.files)} files, {total}, would be uploaded")
        return 0
    url = push(upload, args.repository, public=args.public, message=args.message)
    print(f"{len(upload.files)} files, {total}, uploaded and verified: {url}")
    return 0


def _format_bytes(size: int) -> str:
    """Return a size such as 1.66 GB."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"
