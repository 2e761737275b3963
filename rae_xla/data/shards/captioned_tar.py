"""Read the samples of a tar of images with captions or conversations.

The layouts of BLIP3o (``jpg``, ``txt``), img2dataset (``jpg``, ``txt``, ``json`` with ``caption``),
text-to-image-2M (``jpg``, ``json`` with ``prompt``) and Scale-RAE (``json`` with ``conversations``
and ``image_filename``) are all read: a sample is the text members of a key, and the images that
have the same key or that its JSON names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from rae_xla import storage
from rae_xla.data.image_decoding import IMAGE_EXTENSIONS, ROTATED, is_rotated
from rae_xla.data.image_finder import ImageNotes, LeftOut
from rae_xla.data.shards.index import Shard
from rae_xla.data.shards.sample_filter import (
    FoundSamples,
    ImageFacts,
    SampleFilter,
    image_facts,
    named_images,
    number_fault,
)
from rae_xla.data.shards.tar_faults import DamagedTarError, tar_fault
from rae_xla.data.shards.tar_samples import (
    HashingReader,
    OpenTar,
    key_and_extension,
    member_content,
    read_members,
    why_no_bytes,
)
from rae_xla.errors import UserError

TEXT_EXTENSIONS = ("txt", "text", "caption", "json")
_ELSEWHERE = (
    "a member is a link or sparse: write the tar with --dereference --hard-dereference, and "
    "without --sparse"
)


@dataclass
class ScannedTar:
    """What one pass over a tar found.

    Attributes:
        shard: the tar, with the number of images that its samples use.
        found: its samples.
        left_out: members that are not used.
        notes: images with an EXIF rotation.
        in_sidecar: number of samples with a line in the sidecar.
    """

    shard: Shard
    found: FoundSamples
    left_out: LeftOut
    notes: ImageNotes
    in_sidecar: int


def scan_captioned_tar(
    path: str, accept: SampleFilter, sidecar: Mapping[str, Any] | None = None
) -> ScannedTar:
    """Read a tar once, from its beginning to its end.

    Args:
        path: of the tar, local or ``gs://``.
        accept: which samples to take.
        sidecar: further texts by the key of a sample.

    Raises:
        UserError: the tar is damaged.
    """
    left_out = LeftOut()
    with storage.open_read(path) as raw:
        file = HashingReader(raw)
        members = _Members(accept.needs_sides)
        try:
            members.read(file, left_out)
            file.drain()
        except (DamagedTarError, OSError) as error:
            raise UserError(f"{path}: {tar_fault(error, len(members.samples))}") from None
    found = FoundSamples()
    name, in_sidecar = storage.split(path)[1], 0
    for sample in members.usable():
        if sidecar and sample.key in sidecar:
            sample.texts["sidecar"] = sidecar[sample.key]
            in_sidecar += 1
        reason = sample.fault or number_fault(len(sample.images), sample.texts)
        images = [members.images[name] for name in sample.images]
        reason = reason or accept.reason(images, sample.texts)
        if reason is not None:
            found.drop(reason, f"{name}: {sample.key}")
            continue
        found.add(json.dumps(sample.texts, ensure_ascii=False).encode(), images, sample.texts)
    sha256, md5 = file.sha256.hexdigest(), file.md5.hexdigest()
    shard = Shard(name, len(found.images), file.position, sha256, md5)
    notes = ImageNotes()
    for image in members.rotated:
        notes.add(ROTATED, f"{name}: {image}")
    return ScannedTar(shard, found, left_out, notes, in_sidecar)


def count_members(file: BinaryIO, left_out: LeftOut) -> None:
    """Account for all members and bytes of a tar, as ``scan_captioned_tar`` does.

    Args:
        file: the tar; it is read to its end.
        left_out: gets the members that are not used.

    Raises:
        DamagedTarError: the tar is damaged.
    """
    _Members(with_sides=False).read(HashingReader(file, checksums=False), left_out)


def holds_captions(path: str, members: int = 64) -> bool:
    """Return whether a tar has texts but no labels, by its first members.

    A tar that cannot be read has none; whoever reads it reports the fault.
    """
    extensions: set[str] = set()
    try:
        with storage.open_read(path) as raw:
            file = HashingReader(raw, checksums=False)
            tar = OpenTar(cast(BinaryIO, file), "r|", file.rest)
            for number, (_, member) in enumerate(read_members(tar, LeftOut())):
                extensions.add(key_and_extension(member.name)[1])
                if number == members:
                    break
    except (DamagedTarError, OSError):
        return False
    return "cls" not in extensions and not extensions.isdisjoint(TEXT_EXTENSIONS)


@dataclass
class _Sample:
    """The members with one key; ``images`` are the names of its images."""

    key: str
    extensions: set[str] = field(default_factory=set)
    images: list[str] = field(default_factory=list)
    texts: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None


class _Members:
    """The members of a tar that make samples: texts by their key, images by their name."""

    def __init__(self, with_sides: bool) -> None:
        self._with_sides = with_sides
        self._by_key: dict[str, _Sample] = {}
        self.images: dict[str, ImageFacts] = {}
        self.rotated: list[str] = []

    @property
    def samples(self) -> list[_Sample]:
        """The samples by the order of their first members; the others need not be adjacent."""
        return list(self._by_key.values())

    def read(self, file: HashingReader, left_out: LeftOut) -> None:
        for archive, member in read_members(
            OpenTar(cast(BinaryIO, file), "r|", file.rest), left_out
        ):
            key, extension = key_and_extension(member.name)
            if not key:
                left_out.add_file(member.name)
                continue
            sample = self._by_key.setdefault(key, _Sample(key))
            if extension not in TEXT_EXTENSIONS and extension not in IMAGE_EXTENSIONS:
                left_out.add_file(member.name)
            elif why_no_bytes(member) is not None:
                sample.fault = _ELSEWHERE
            elif extension in sample.extensions:
                sample.fault = "the key appears a second time"
            elif extension in IMAGE_EXTENSIONS:
                content = member_content(archive, member)
                self.images[member.name] = image_facts(
                    content, member.offset_data, with_sides=self._with_sides
                )
                sample.images.append(member.name)
                sample.extensions.add(extension)
                if is_rotated(content):
                    self.rotated.append(member.name)
            else:
                sample.extensions.add(extension)
                _add_text(sample, extension, member_content(archive, member))

    def usable(self) -> Iterator[_Sample]:
        """Yield the samples with the images that belong to them.

        An image without texts of its own that another sample names is no sample.
        """
        by_last_part = {name.rpartition("/")[2]: name for name in self.images}
        named: set[str] = set()
        for sample in self.samples:
            if sample.images or (names := named_images(sample.texts)) is None:
                continue
            known = [
                n if n in self.images else by_last_part.get(n.rpartition("/")[2]) for n in names
            ]
            sample.images = [name for name in known if name is not None]
            named.update(sample.images)
            if None in known:
                sample.fault = "an image that the JSON names is not in the tar"
        for sample in self.samples:
            if sample.texts or not named.issuperset(sample.images):
                yield sample


def _add_text(sample: _Sample, extension: str, content: bytes) -> None:
    try:
        text = content.decode("utf-8-sig")
        sample.texts[extension] = json.loads(text) if extension == "json" else text.strip()
    except ValueError:
        sample.fault = f"the .{extension} member is not valid"
