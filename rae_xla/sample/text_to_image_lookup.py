"""Lookup of text-to-image models: published names, saved folders and training runs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from rae_xla import storage
from rae_xla.checkpoint.manager import newest_checkpoint, read_checkpoint_manifest
from rae_xla.data.captions import open_tokenizer
from rae_xla.data.conversations import ConversationTokenizer, read_tokenizer
from rae_xla.data.prompts import PromptTokenizer
from rae_xla.errors import UserError
from rae_xla.interop.instantiate import instantiate
from rae_xla.interop.text_to_image import flow_of, is_published_folder, load_text_to_image
from rae_xla.models.hf_folder import is_hub_id, read_json
from rae_xla.models.pretrained.fingerprint import fingerprint, of_rae
from rae_xla.models.pretrained.hub import local_folder
from rae_xla.models.pretrained.published import suggest_name
from rae_xla.models.pretrained.published_text_to_image import (
    MODEL_FILES,
    TEXT_TO_IMAGE,
    fetch_text_to_image,
)
from rae_xla.models.rae import RAE
from rae_xla.models.text_to_image.scale_rae import MODEL_TYPE, time_shift, to_published
from rae_xla.sample.prompt_sampler import PromptSampler, RequestFormat
from rae_xla.transport.sized_flow import SizedFlow

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.models.text_to_image.model import TextToImageModel
    from rae_xla.models.text_to_image.settings import HeadSettings
    from rae_xla.runtime import Backend

RAE_FOLDER = "rae"
"""Subfolder of a saved model that may hold its autoencoder."""

# Longer than any prompt: generation has no row length of its own.
_ROW_LENGTH = 1 << 16


@dataclass(frozen=True)
class ResolvedTextToImage:
    """A text-to-image model that a user named, before its weights are downloaded and loaded.

    Attributes:
        name: as the user gave it.
        config: sampling settings; of a run, also its models.
        source: see ``interop.text_to_image.load_text_to_image``.
        tokenizer: folder of ``tokenizer.json``.
        rae: the autoencoder, a folder or hub id; None: that of the configuration.
        form: how a prompt becomes a request.
        question: that training asks about an image.
    """

    name: str
    config: RunConfig
    source: str
    tokenizer: str
    rae: str | None
    form: RequestFormat
    question: str = "Describe the image."

    def load(self, backend: Backend) -> LoadedTextToImage:
        """Build the models and place them on the devices.

        Raises:
            UserError: files are missing, or model and autoencoder have other latents.
        """
        loaded = load_text_to_image(self.source)
        model, settings = loaded.model, loaded.model.settings
        rae = self._autoencoder().eval()
        channels, height, width = rae.latent_size
        if (channels, height * width) != (settings.channels, settings.tokens):
            raise UserError(
                f"{self.name} generates {settings.tokens} tokens of {settings.channels} channels, "
                f"but the autoencoder has {height * width} of {channels}: choose the one it was "
                "trained with"
            )
        if loaded.config is None:
            shift = time_shift(read_json(self.source, "config.json") or {}, settings)
            flow = SizedFlow(shift)
        else:
            flow = flow_of(self.config)
        weights = {"text_to_image": fingerprint(to_published(model.state_dict())), **of_rae(rae)}
        for module in (rae, model):
            backend.place(module.requires_grad_(False))
        sampler = PromptSampler(
            self.config,
            backend,
            cast("TextToImageModel", model.eval()),
            rae,
            flow,
            self._open_tokenizer(settings),
            self.form,
        )
        return LoadedTextToImage(sampler, loaded.name, weights)

    def _open_tokenizer(self, settings: HeadSettings) -> ConversationTokenizer | PromptTokenizer:
        if settings.prompt is None:
            return open_tokenizer(self.tokenizer, settings.tokens, _ROW_LENGTH)
        tokenizer = read_tokenizer(self.tokenizer)
        return PromptTokenizer(tokenizer, settings.prompt.length, self.form.request)

    def _autoencoder(self) -> RAE:
        if self.rae is not None:
            return cast("RAE", RAE.from_pretrained(self.rae))
        if self.config.stage_1 is None:
            raise UserError(
                f"{self.name} has no autoencoder: give one that save_pretrained wrote with --rae "
                f"FOLDER, or in its subfolder {RAE_FOLDER}"
            )
        return cast("RAE", instantiate(self.config.stage_1))


@dataclass(frozen=True)
class LoadedTextToImage:
    """A loaded model.

    Attributes:
        sampler: generates images.
        name: where the weights are from.
        weights: SHA-256 of the weights of each part.
    """

    sampler: PromptSampler
    name: str
    weights: dict[str, str]


def is_text_to_image(model: str) -> bool:
    """Return whether a user's model generates images from prompts; False if there is none.

    Args:
        model: as for :func:`resolve_text_to_image`. Of a hub repository, only ``config.json`` is
            downloaded.
    """
    if not storage.exists(model):
        if model in TEXT_TO_IMAGE:
            return True
        if not is_hub_id(model) or model.endswith((".yaml", ".yml")):
            return False
    if is_published_folder(model):
        values = read_json(model, "config.json") or {}
        return values.get("model_type") == MODEL_TYPE or "diffusion_model_channels" in values
    try:
        return _run_section(model) is not None
    except UserError:
        return False


def resolve_text_to_image(
    model: str,
    overrides: Sequence[str] = (),
    *,
    rae: str | None = None,
    tokenizer: str | None = None,
    request: str | None = None,
    write_text: bool | None = None,
) -> ResolvedTextToImage:
    """Resolve what a user gave as the text-to-image model.

    Args:
        model: a name in ``TEXT_TO_IMAGE``; a results folder of ``rae-xla train t2i``, a folder of
            its checkpoints or one of them; or a folder or hub id in the layout of Scale-RAE.
        overrides: settings, ``key=value``.
        rae: the autoencoder, a folder or hub id of ``save_pretrained``; None: that of the run, or
            the subfolder ``rae``.
        tokenizer: folder of ``tokenizer.json``; None: that of the run or the model.
        request: form of a request with ``{caption}``; None: that of the run.
        write_text: whether the model writes text before the image; None: only if it is published.

    Raises:
        UserError: there is no such model, or it is of another kind.
    """
    if request is not None and "{caption}" not in request:
        raise UserError(
            f"--request {request!r} has no {{caption}}, which the prompt replaces: add it"
        )
    if not storage.exists(model) and model in TEXT_TO_IMAGE:
        published = TEXT_TO_IMAGE[model]
        tree = {
            "stage_1": published.stage_1(),
            "text_to_image": {"ckpt": published.repository},
        }
        config = _load_config(tree, overrides, f"the published {model}")
        form = RequestFormat(request or "{caption}", write_text=write_text is not False)
        return ResolvedTextToImage(
            model, config, published.repository, tokenizer or published.repository, rae, form
        )
    if is_published_folder(model):
        config = _load_config({"text_to_image": {"ckpt": str(model)}}, overrides, model)
        form = RequestFormat(request or "{caption}", write_text=bool(write_text))
        inside = storage.join(model, RAE_FOLDER)
        if rae is None and storage.exists(storage.join(inside, "config.json")):
            rae = inside
        return ResolvedTextToImage(model, config, model, tokenizer or model, rae, form)
    if not storage.exists(model):
        raise UserError(
            f"there is no text-to-image model {model}: give a published name, a results folder of "
            "`rae-xla train t2i`, or a folder in the layout of Scale-RAE; "
            f"{suggest_name(model, list(TEXT_TO_IMAGE))}"
        )
    values = _run_section(model)
    if values is None:
        raise UserError(
            f"{model} is not from `rae-xla train t2i`: its configuration has no text_to_image "
            "section"
        )
    config = _load_config(values, overrides, model)
    section = config.text_to_image
    assert section is not None
    captions = section.captions
    form = RequestFormat(request or captions.prompts[0], captions.answer, bool(write_text))
    folder = tokenizer or section.tokenizer or section.ckpt or section.language_model or model
    return ResolvedTextToImage(model, config, model, folder, rae, form, captions.question)


def download_text_to_image(model: ResolvedTextToImage) -> ResolvedTextToImage:
    """Download every file that a model needs and return the model with local paths.

    Raises:
        UserError: a file cannot be downloaded; names all that are needed.
    """
    if model.name in TEXT_TO_IMAGE and model.source == TEXT_TO_IMAGE[model.name].repository:
        folders = fetch_text_to_image(model.name)
        published = TEXT_TO_IMAGE[model.name]
        assert model.config.stage_1 is not None
        decoder, encoder = folders[published.decoder], str(folders[published.encoder])
        params = {
            **model.config.stage_1.params,
            "encoder_config_path": encoder,
            "encoder_params": {"model_name": encoder},
            "decoder_config_path": str(decoder),
            "pretrained_decoder_path": str(decoder / "model.pt"),
        }
        stage_1 = replace(model.config.stage_1, params=params)
        source = str(folders[published.repository])
        return _moved(replace(model, config=replace(model.config, stage_1=stage_1)), source)
    if is_hub_id(model.source) and not storage.exists(model.source):
        return _moved(model, str(local_folder(model.source, list(MODEL_FILES))))
    return model


def _moved(model: ResolvedTextToImage, source: str) -> ResolvedTextToImage:
    """Return a model whose source is at a local path, and its tokenizer if it was there too."""
    tokenizer = source if model.tokenizer == model.source else model.tokenizer
    return replace(model, source=source, tokenizer=tokenizer)


def _run_section(folder: str) -> Mapping[str, Any] | None:
    """Return the configuration of a text-to-image run, None if it is of another kind."""
    values: Any = read_checkpoint_manifest(newest_checkpoint(folder))["config"]
    return values if values.get("text_to_image") is not None else None


def _load_config(tree: Mapping[str, Any], overrides: Sequence[str], name: str) -> RunConfig:
    from rae_xla.config import load_config

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(dict(tree)), encoding="utf-8")
        try:
            return load_config(path, list(overrides))
        except UserError as error:  # the file is temporary
            raise UserError(str(error).replace(str(path), name)) from None
