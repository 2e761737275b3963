"""Tests of the scripts of the text-to-image quickstart, each on little data."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "quickstart_t2i"
CONCEPTS = 5


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """Make the scripts importable by bare name, as when they are run from their folder."""
    before = list(sys.path)
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path[:] = before


def script(name: str) -> ModuleType:
    return __import__(name)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """Package files in the layout of the published ones, with simple emoji in them.

    Every concept has a shape of its own, every style a colour.
    """
    pytest.importorskip("resvg_py")
    packages = script("packages")
    out = tmp_path_factory.mktemp("packages")
    concepts = script("emoji_captions").read_concepts(CONCEPTS)
    boxes = ((2, 2, 12, 12), (2, 2, 30, 8), (13, 2, 19, 30), (2, 2, 30, 30), (2, 16, 30, 30))
    shapes = [f"M{x} {y}H{right}V{bottom}H{x}Z" for x, y, right, bottom in boxes]
    colours = {packages.NOTO: "#f00", packages.FLUENT_FLAT: "#00f", packages.TWEMOJI: "#000"}
    for package, colour in colours.items():
        bodies = {
            concept.icon: {"body": f'<path fill="{colour}" d="{shape}"/>'}
            for concept, shape in zip(concepts, shapes, strict=True)
        }
        with tarfile.open(out / package.file, "w:gz") as tar:
            icons = {"width": 32, "height": 32, "icons": bodies}
            add(tar, "package/icons.json", json.dumps(icons).encode())
    with tarfile.open(out / packages.FLUENT_3D.file, "w:gz") as tar:
        for concept, box in zip(concepts, boxes, strict=True):
            image = Image.new("RGBA", (32, 32))
            image.paste((0, 160, 0, 255), box)
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", lossless=True)
            add(tar, f"package/assets/{concept.code}.webp", buffer.getvalue())
    return out


@pytest.fixture(scope="module")
def images(packages, tmp_path_factory) -> Path:
    emoji, captions = script("emoji_images"), script("emoji_captions")
    out = tmp_path_factory.mktemp("images")
    sprites = list(emoji.draw(packages, captions.read_concepts(CONCEPTS)))
    assert emoji.write(sprites, out) == {"train": 18 * 6, "heldout": 2 * 6}
    return out


class TestPackages:
    @pytest.fixture
    def package(self):
        packages = script("packages")
        digest = hashlib.sha256(b"content").hexdigest()
        return packages.Package("@some/icons", "1.2.3", "npm", "some-icons.tgz", digest, "MIT", 0.1)

    @pytest.fixture
    def npm(self, tmp_path, monkeypatch):
        """Put a client on the path that behaves as given."""

        def install(body: str) -> None:
            folder = tmp_path / "bin"
            folder.mkdir()
            (folder / "npm").write_text(f"#!/bin/bash\n{body}\n")
            (folder / "npm").chmod(0o755)
            monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

        return install

    def test_download_is_verified_and_happens_once(self, package, npm, tmp_path):
        # pack SPEC --silent --pack-destination FOLDER
        done = f'echo >>{tmp_path}/log && printf content >"$5/{package.file}"'
        npm(f"[[ $2 == @some/icons@1.2.3 ]] && {done}")
        for _ in range(2):
            path = script("packages").fetch(package, tmp_path / "out")
            assert path.read_bytes() == b"content"
        assert (tmp_path / "log").read_text() == "\n"
        assert [p.name for p in (tmp_path / "out").iterdir()] == [package.file]

    def test_other_content_is_refused(self, package, npm, tmp_path):
        packages = script("packages")
        npm(f'printf other >"$5/{package.file}"')
        with pytest.raises(packages.DownloadError, match=r"its SHA-256 is .*expected"):
            packages.fetch(package, tmp_path / "out")
        assert not (tmp_path / "out" / package.file).exists()

    def test_offline_error_says_which_file_goes_where(self, package, npm, tmp_path):
        packages = script("packages")
        npm("echo 'npm error code ENOTFOUND' >&2; exit 1")
        with pytest.raises(packages.DownloadError) as error:
            packages.fetch(package, tmp_path / "out")
        message = str(error.value)
        assert "ENOTFOUND" in message
        assert f"copy {package.file} of @some/icons 1.2.3 into" in message
        assert str(tmp_path / "out") in message

    def test_missing_client(self, package, tmp_path, monkeypatch):
        packages = script("packages")
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(packages.DownloadError, match="npm is not installed"):
            packages.fetch(package, tmp_path / "out")


class TestCaptions:
    def test_articles(self):
        captions = script("emoji_captions")
        text = captions.fill("a {style} {concept}, an {colour}", "owl", "elegant", "blue")
        assert text == "an elegant owl, a blue"

    def test_captions_name_all_attributes_and_start_with_the_plain_one(self):
        captions = script("emoji_captions")
        concept = captions.read_concepts(1)[0]
        made = captions.training_captions(concept, "3d", "pink", 16, np.random.default_rng(0))
        assert made[0] == "a 3D red apple on a pink background"
        assert len(set(made)) == 16
        for text in made:
            assert any(name in text for name in concept.names)
            assert any(name in text for name in captions.STYLES["3d"])
            assert any(name in text for name in captions.COLOURS["pink"])
        assert sum("red apple" in text for text in made) < 16

    def test_no_training_caption_has_an_unseen_structure(self):
        captions = script("emoji_captions")
        assert not set(captions.UNSEEN_TEMPLATES) & set(captions.TEMPLATES)
        words = ("owl", "flat", "blue")
        unseen = {captions.fill(template, *words) for template in captions.UNSEEN_TEMPLATES}
        assert not unseen & {captions.fill(template, *words) for template in captions.TEMPLATES}

    def test_concepts_have_different_names(self):
        concepts = script("emoji_captions").read_concepts()
        names = [name for concept in concepts for name in concept.names]
        assert len(concepts) == 50
        assert len(set(names)) == len(names)


class TestImages:
    def test_split_is_fixed_and_balanced(self):
        pairs = script("emoji_images").held_out_pairs(50)
        assert len(pairs) == 20
        assert len({concept for concept, _ in pairs}) == 20
        styles = [style for _, style in pairs]
        assert {styles.count(style) for style in set(styles)} == {5}
        # Constants, because a changed split would invalidate published numbers.
        assert sorted(pairs)[:2] == FIRST_PAIRS

    def test_rendering(self, images):
        emoji = script("emoji_images")
        sprites = emoji.read_sprites(images)
        concept, style = sprites.concepts, sprites.styles
        # The full square, in red: opaque inside, transparent at the margin.
        [row] = np.flatnonzero((concept == 3) & (style == 0))
        pixels = emoji.over(sprites.pixels[row], emoji.BACKGROUNDS["blue"])
        assert pixels.shape == (64, 64, 3)
        assert pixels[32, 32].tolist() == [255, 0, 0]
        assert pixels[0, 0].tolist() == [90, 150, 230]
        # Half-transparent white halves the distance to white.
        glass = emoji.premultiplied(Image.new("RGBA", (8, 8), (255, 255, 255, 128)))
        pixels = emoji.over(glass, emoji.BACKGROUNDS["black"])
        assert np.abs(pixels[32, 32] - np.array([145, 145, 148])).max() <= 1
        assert pixels[1, 1].tolist() == [35, 35, 40]

    def test_files_and_sprites_agree(self, images):
        emoji = script("emoji_images")
        sprites = emoji.read_sprites(images)
        assert sprites.held_out.sum() == 2
        for row in range(len(sprites.pixels)):
            name = sprites.concept_names[sprites.concepts[row]]
            style = list(script("emoji_captions").STYLES)[sprites.styles[row]]
            path = images / emoji.image_file(name, style, "pink", bool(sprites.held_out[row]))
            drawn = emoji.over(sprites.pixels[row], emoji.BACKGROUNDS["pink"]).astype(int)
            # Sprites are stored with 8 bits.
            assert np.abs(np.asarray(Image.open(path)) - drawn).max() <= 2

    def test_tar_is_indexed_with_all_captions(self, images, tmp_path):
        from rae_xla.data.captions import CaptionChoice
        from rae_xla.data.shards.captioned import index_captioned

        found = index_captioned(str(images / "tars"), str(tmp_path / "index"))
        assert len(found.index) == 18 * 6
        with tarfile.open(images / "tars" / "train.tar") as tar:
            names = [name for name in tar.getnames() if name.endswith(".txt")]
            texts = {"txt": tar.extractfile(names[0]).read().decode()}
        count = script("emoji_images").CAPTIONS_PER_IMAGE
        sources = tuple(f"txt.{i}" for i in range(count))
        choice = CaptionChoice(sources, (1.0,) * count, 0)
        chosen = {choice.choose(texts, (i + 0.5) / count) for i in range(count)}
        assert chosen == set(texts["txt"].split("\n"))
        assert not [name for name in names if "heldout" in name]

    def test_missing_images(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"emoji_images\.py"):
            script("emoji_images").read_sprites(tmp_path)


FIRST_PAIRS = [(1, "twemoji"), (2, "noto")]


class TestLanguageModel:
    @pytest.fixture
    def llama(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.3)
        return model

    def write_gguf(self, model, path: Path) -> None:
        """Write a Llama model as a GGUF file in the layout of llama.cpp's converter."""
        from gguf import GGUFWriter

        parts = {v: k for k, v in script("language_model").LAYER_PARTS.items()}
        tables = {v: k for k, v in script("language_model").TABLES.items()}
        config = model.config
        writer = GGUFWriter(path, "llama")
        writer.add_block_count(config.num_hidden_layers)
        writer.add_vocab_size(config.vocab_size)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(1e5)
        for name, tensor in model.state_dict().items():
            weight = tensor.numpy()
            for part, heads in (
                ("q", config.num_attention_heads),
                ("k", config.num_key_value_heads),
            ):
                if f"{part}_proj" in name:
                    rows, columns = weight.shape
                    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
                    weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))
            if name in tables:
                writer.add_tensor(tables[name], weight)
            elif name.startswith("model.layers."):
                _, _, number, rest = name.split(".", 3)
                writer.add_tensor(
                    f"blk.{number}.{parts[rest.removesuffix('.weight')]}.weight", weight
                )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def test_logits_are_those_of_the_llama_model(self, llama, tmp_path):
        pytest.importorskip("gguf")
        self.write_gguf(llama, tmp_path / "model.gguf")
        model = script("language_model").read_gguf(tmp_path / "model.gguf", None)
        ids = torch.arange(12)[None]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=1e-5, atol=1e-5)
            short = script("language_model").read_gguf(tmp_path / "model.gguf", 2)
            states = llama(ids, output_hidden_states=True).hidden_states[2]
            short.model.norm.weight.copy_(llama.model.norm.weight)
            found = short.model(ids).last_hidden_state
            torch.testing.assert_close(found, llama.model.norm(states), rtol=1e-5, atol=1e-5)

    def test_channels_get_unit_variance(self, llama):
        language_model = script("language_model")

        def tokenizer(text: str, return_tensors: str):
            assert text.startswith(language_model.FIRST_TOKEN)
            ids = torch.tensor([[0, *(ord(c) % 40 for c in text[len("<|im_start|>") :])]])
            return type("Tokens", (), {"input_ids": ids})

        texts = ["a red owl", "some flat key", "the blue boat"]
        language_model.equalise_channels(llama, tokenizer, texts)
        with torch.no_grad():
            states = torch.cat(
                [
                    llama.model(tokenizer(language_model.FIRST_TOKEN + text, "pt").input_ids)[0][
                        0, 1:
                    ]
                    for text in texts
                ]
            )
        torch.testing.assert_close(states.std(0), torch.ones(32), rtol=1e-3, atol=1e-3)


class TestEncoder:
    def test_saved_encoder_is_an_ordinary_model_folder(self, images, tmp_path):
        from transformers import Dinov2WithRegistersModel

        pretrain = script("pretrain_emoji_encoder")
        pixels, labels = pretrain.training_images(script("emoji_images").read_sprites(images))
        assert pixels.shape == (18 * 6, 3, 64, 64)
        assert {name: int(of.max()) for name, of in labels.items()} == {
            "concept": 4,
            "style": 3,
            "background": 5,
        }
        torch.manual_seed(0)
        encoder = pretrain.pretrain(pixels, labels, steps=2, batch_size=8, quiet=True)
        pretrain.save(encoder, tmp_path / "encoder")
        loaded = Dinov2WithRegistersModel.from_pretrained(tmp_path / "encoder").eval()
        with torch.no_grad():
            tokens = loaded(pixels[:2]).last_hidden_state
            torch.testing.assert_close(tokens, encoder(pixels[:2]).last_hidden_state)
        assert tokens.shape == (2, 1 + 4 + 16, 96)
        assert torch.equal(loaded.layernorm.weight, torch.ones(96))


class TestPrompts:
    def test_sets(self, images, tmp_path):
        prompts = script("emoji_prompts")
        assert prompts.write(images, tmp_path) == {"all": 18 + 6 + 15, "few": 9}
        made = prompts.read_prompts(tmp_path / "all.json")
        lines = (tmp_path / "all.txt").read_text().splitlines()
        assert lines == [prompt.text for prompt in made]
        sprites = script("emoji_images").read_sprites(images)
        styles = list(script("emoji_captions").STYLES)
        hidden = {
            (sprites.concept_names[c], styles[s])
            for c, s, held_out in zip(
                sprites.concepts, sprites.styles, sprites.held_out, strict=True
            )
            if held_out
        }
        for prompt in made:
            held_out = (prompt.concept, prompt.style) in hidden
            assert held_out == (prompt.set == prompts.HELD_OUT), prompt
        of_one = [p.background for p in made if p.set == prompts.TRAINED and p.concept == "banana"]
        assert len(set(of_one)) == len(of_one)


@pytest.fixture(scope="module")
def network(images):
    judge = script("emoji_judge")
    torch.manual_seed(0)
    sprites = script("emoji_images").read_sprites(images)
    return judge.train(sprites, steps=50, batch_size=32, quiet=True)


class TestJudge:
    def test_real_wrong_and_mislabelled_images(self, images, network):
        judge, emoji = script("emoji_judge"), script("emoji_images")
        sprites = emoji.read_sprites(images)
        of = judge.Judge.open(network, sprites)
        assert of.judge_renderings(100).concept > 0.9
        asked = np.array(list(of.described))
        real = of.judge("real", of.training, asked)
        assert real.count == 108
        assert real.concept > 0.95
        assert real.style > 0.9
        assert real.background == 1
        assert real.copies == 1
        wrong = of.judge("wrong", of.training, (asked + 1) % np.array([5, 4, 6]))
        assert max(wrong.concept, wrong.style, wrong.background) < 0.2

    def test_held_out_pairs_have_no_training_image(self, images, network):
        judge = script("emoji_judge")
        sprites = script("emoji_images").read_sprites(images)
        of = judge.Judge.open(network, sprites)
        [row, *_] = np.flatnonzero(sprites.held_out)
        asked = np.array([[sprites.concepts[row], sprites.styles[row], 0]])
        assert of.judge("held-out", of.training[:1], asked).copies is None

    def test_saved_network(self, network, tmp_path):
        judge = script("emoji_judge")
        judge.save(network, tmp_path / "judge.pt")
        image = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
        for one, other in zip(
            judge.recognise(network, image),
            judge.recognise(judge.load(tmp_path / "judge.pt"), image),
            strict=True,
        ):
            assert (one == other).all()

    def test_background_is_read_from_the_border(self):
        judge = script("emoji_judge")
        images = np.zeros((2, 64, 64, 3), np.uint8)
        images[0] = (245, 165, 180)
        images[1] = (85, 150, 235)
        images[:, 8:56, 8:56] = 0
        names = list(script("emoji_images").BACKGROUNDS)
        assert [names[i] for i in judge.background_of(images)] == ["pink", "blue"]


def write_results(folder: Path, images: Path, network) -> None:
    """Write a results folder that contains real emoji instead of generated ones."""
    emoji, judge, prompts = (script(f"emoji_{name}") for name in ("images", "judge", "prompts"))
    sprites = emoji.read_sprites(images)
    (folder / "images").symlink_to(images)
    (folder / "reconstructed").symlink_to(images / "png")
    judge.save(network, folder / "judge.pt")
    prompts.write(images, folder / "prompts")
    for scale, name, draws in ((1, "few", 2), (2, "all", 1), (3, "few", 2)):
        out = folder / "generated" / f"scale{scale}"
        out.mkdir(parents=True)
        entries = []
        for prompt in prompts.read_prompts(folder / "prompts" / f"{name}.json"):
            for _ in range(draws):
                entries.append({"file": f"{len(entries):03d}.png"})
                image = script("emoji_report").real_image(sprites, prompt)
                Image.fromarray(image).save(out / entries[-1]["file"])
        (out / "generated.json").write_text(json.dumps({"pictures": entries}))
    for task in ("stage1", "t2i"):
        (folder / task).mkdir()
        lines = [json.dumps({"step": s, "train/loss": 1 / (s + 1)}) for s in range(30)]
        (folder / task / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "encoder").mkdir()
    config = {"hidden_size": 96, "image_size": 64, "patch_size": 16}
    (folder / "encoder" / "config.json").write_text(json.dumps(config))
    (folder / "times.tsv").write_text("train stage 1\t61\ntrain the model\t120\n")


class TestReport:
    def test_page_of_perfect_results(self, images, network, tmp_path, monkeypatch, capsys):
        judge, report = script("emoji_judge"), script("emoji_report")
        write_results(tmp_path, images, network)
        arguments = ["judge", "--results", str(tmp_path), "--out", str(tmp_path / "judge.json")]
        monkeypatch.setattr(sys, "argv", ["emoji_judge.py", *arguments])
        judge.main()
        text = capsys.readouterr().out
        assert (tmp_path / "judge.txt").read_text() == text
        assert [re.split("  +", line)[0] for line in text.splitlines()[2:]] == [
            "real, moved and blurred",
            "reconstructed, trained pairs",
            "reconstructed, held-out pairs",
            "trained, guidance 2",
            "held-out, guidance 2",
            "unseen template, guidance 2",
            "trained, guidance 1",
            "trained, guidance 3",
        ]
        page = report.write_report(tmp_path).read_text()
        assert "$" not in page
        assert "3:01 min" in page
        assert page.count("✓") == 7
        assert "The model has memorised its training images" in page
        assert "100% of the generated images are nearest" in page
        assert "a shaded red apple on a" in page

    def test_missed_goals_are_shown(self, images, network, tmp_path):
        judge, report = script("emoji_judge"), script("emoji_report")
        write_results(tmp_path, images, network)
        found = judge.judge_all(tmp_path)
        found["rows"] = [
            {**row, "concept": 0.5, "style": 0.5, "background": 0.5, "psnr": 20.0, "copies": 0.1}
            for row in found["rows"]
        ]
        (tmp_path / "judge.json").write_text(json.dumps(found))
        page = report.write_report(tmp_path).read_text()
        assert page.count("✗") == 6
        assert "most are not copies" in page


class TestConfigs:
    def test_both_trainings_use_the_same_autoencoder(self):
        from rae_xla import load_config

        folder = ROOT / "configs" / "quickstart_t2i"
        one, two = (
            load_config(str(folder / f"{n}.yaml")).stage_1.params for n in ("stage1", "t2i")
        )
        later = {"noise_tau", "pretrained_decoder_path", "normalization_stat_path"}
        assert {k: v for k, v in two.items() if k not in later} == {
            k: v for k, v in one.items() if k not in later
        }

    def test_captions_and_prompts_fit_the_data(self):
        from rae_xla import load_config

        config = load_config(str(ROOT / "configs" / "quickstart_t2i" / "t2i.yaml"))
        captions = config.text_to_image.captions
        count = script("emoji_images").CAPTIONS_PER_IMAGE
        assert captions.sources == tuple(f"txt.{i}" for i in range(count))
        assert len(captions.weights) == count
        assert captions.prompts == (script("language_model").FIRST_TOKEN + "{caption}",)
        assert config.text_to_image.prompt.dropped_tokens == 1
        assert config.data.image_size == script("emoji_images").IMAGE_SIZE

    def test_smoke_configs_stay_in_their_folder(self, tmp_path):
        """With SMOKE=1 nothing of a full run is read or replaced."""
        text = (ROOT / "scripts" / "quickstart_t2i.sh").read_text()
        [line] = [line.strip() for line in text.splitlines() if line.strip().startswith("sed ")]
        for name in ("stage1", "t2i"):
            shell = f"out=other configs={ROOT}/configs/quickstart_t2i name={name}\n"
            command = line.split(' >"')[0]
            done = subprocess.run(["bash", "-c", shell + command], capture_output=True, check=True)
            assert b"results/quickstart_t2i/" not in done.stdout
            assert b"other/encoder" in done.stdout
