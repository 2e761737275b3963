"""Schema of the ``text_to_image`` section: language model, head, captions and their training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from rae_xla.config.paths import LOCAL, LOCAL_OR_HUB, PathRule
from rae_xla.config.ranges import FINITE, LARGEST_INTEGER, LOSS_WEIGHT, Range
from rae_xla.config.training_schema import OptimizerConfig, SchedulerConfig

_SIZE = Range(least=1, most=LARGEST_INTEGER)


@dataclass(frozen=True)
class HeadConfig:
    """The diffusion head; its latents are those of ``stage_1``."""

    condition_dim: Annotated[
        int,
        "channels of a condition vector; 0: those of the language model, without projector; "
        "only with `read: queries`",
        Range(least=0, most=LARGEST_INTEGER),
    ] = 2048
    hidden_size: Annotated[int, "width of the tokens", _SIZE] = 2048
    depth: Annotated[int, "number of blocks", _SIZE] = 32
    num_heads: Annotated[int, "attention heads of a block", _SIZE] = 32
    condition_dropout_prob: Annotated[
        float,
        "probability of the null condition in training: a learned one with `read: queries`, the "
        "empty prompt with `read: tokens`; with 0 there is no guidance",
        Range(least=0, below=1),
    ] = 0.1
    wide_hidden_size: Annotated[
        int, "`inject: in-context`: width of the last blocks, which are modulated", _SIZE
    ] = 2048
    wide_depth: Annotated[int, "`inject: in-context`: number of these blocks", _SIZE] = 2
    wide_num_heads: Annotated[int, "`inject: in-context`: their attention heads", _SIZE] = 16
    num_time_tokens: Annotated[
        int, "`inject: in-context`: time tokens that the other blocks attend to", _SIZE
    ] = 4
    base_model_depth: Annotated[
        int | None,
        "number of the block, from 1, that a base head reads, for internal guidance; not with "
        "`inject: per-token`",
        _SIZE,
    ] = None


@dataclass(frozen=True)
class PromptConfig:
    """Which hidden states of the prompt's tokens are read (`read: tokens`)."""

    layers: Annotated[
        tuple[int, ...],
        "layers of the language model: 0 is the embeddings, i the output of layer i, -1 the final "
        "states",
        Range(least=-1, most=LARGEST_INTEGER),
    ] = (-1,)
    average_layers: Annotated[
        bool, "average the states of several layers; otherwise they are stacked as channels"
    ] = False
    dropped_tokens: Annotated[
        int,
        "first tokens that are not read, such as those of a template before the caption",
        Range(least=0, most=LARGEST_INTEGER),
    ] = 0


@dataclass(frozen=True)
class CaptionsConfig:
    """Which text of a sample is its caption, and the conversation around it."""

    sources: Annotated[
        tuple[str, ...],
        "where captions are, in the order of preference: `txt`, `json.KEY`, `json.KEY.0`, "
        "`txt.0` (the first line), `sidecar.KEY`, or a list of turns such as `json.conversations`",
    ] = ("txt", "json.caption", "json.prompt", "json.conversations")
    weights: Annotated[
        tuple[float, ...],
        "how often each source is chosen, among those that a sample has; empty: the first one",
        LOSS_WEIGHT,
    ] = ()
    max_chars: Annotated[
        int, "longer captions are cut; 0: no limit", Range(least=0, most=LARGEST_INTEGER)
    ] = 0
    prompts: Annotated[
        tuple[str, ...], "requests for an image, with `{caption}`; chosen at random"
    ] = ("{caption}",)
    answer: Annotated[str, "text of the answer before the image"] = ""
    question: Annotated[
        str, "question of the rows in which the caption is the answer about the image"
    ] = "Describe the image."


@dataclass(frozen=True)
class TextToImageConfig:
    """The text-to-image model and its training (`rae-xla train t2i`).

    The image part, which is the queries, the connector and the head, is trained with
    ``training.optimizer`` and ``training.scheduler``.
    """

    language_model: Annotated[
        str | None,
        "folder of a causal model of transformers; with `read: tokens` also of an encoder",
        LOCAL_OR_HUB,
    ] = None
    language_model_config: Annotated[
        dict[str, Any] | None,
        "content of a `config.json`: train this model from random weights instead",
        FINITE,
    ] = None
    tokenizer: Annotated[
        str | None, "folder of `tokenizer.json`; default: `language_model`", LOCAL
    ] = None
    ckpt: Annotated[
        str | None,
        "start from this model: a folder that Scale-RAE published or that we wrote in its layout",
        PathRule(hub=True),
    ] = None
    read: Annotated[
        Literal["queries", "tokens"],
        "what the language model gives the head: its states at learned queries after the prompt "
        "(Scale-RAE), or at the tokens of the prompt (RAEv2)",
    ] = "queries"
    inject: Annotated[
        Literal["per-token", "in-context", "cross-attention"],
        "how these condition the head: each modulates one latent token (queries alone), or they "
        "are tokens that the head attends to, among its own or separately",
    ] = "per-token"
    prompt: PromptConfig = field(default_factory=PromptConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    train: Annotated[
        tuple[Literal["language_model", "connector", "head"], ...],
        "the parts that are trained; the connector is the queries and projectors",
    ] = ("language_model", "connector", "head")
    length: Annotated[
        int,
        "tokens of a row, those of the image included; with `read: tokens` those of the prompt",
        _SIZE,
    ] = 512
    images_per_row: Annotated[
        int, "most images of a row: those of a question and those to generate", _SIZE
    ] = 1
    answers_per_row: Annotated[
        int, "most images that a row generates; the head runs for as many of every row", _SIZE
    ] = 1
    times_per_image: Annotated[int, "diffusion times for each image of a step", _SIZE] = 1
    text_loss_weight: Annotated[float, "weight of the next-token loss", LOSS_WEIGHT] = 1.0
    image_loss_weight: Annotated[float, "weight of the flow-matching loss", LOSS_WEIGHT] = 1.0
    row_pattern: Annotated[
        tuple[int, int],
        "(period, count): the first count of every period rows generate their image, the others "
        "describe it and cost no pass of the head",
        _SIZE,
    ] = (1, 1)
    average_language_model: Annotated[
        bool, "whether the moving average covers the language model too"
    ] = False
    language_model_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=5.65e-5)
    )
    language_model_scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
