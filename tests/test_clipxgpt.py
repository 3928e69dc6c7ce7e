"""CLIPxGPT's weights: decoded as published, their vision tower inside the file, and their command line."""

import json

import pytest
import torch
from PIL import Image

import predict
import tiny
import train
import weight_files
from common import UserError
from models import checkpoints
from models.checkpoints import load_checkpoint
from models.decoding import generate
from models.encoders import load_encoder
from models.mappers.encoder import EncoderMapper

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """Folders with the tokenizer and a tiny GPT-2's config, by width, and the tokenizer."""
    folders, tokenizer = {}, tiny.train_tokenizer(tiny.CAPTIONS, vocab_size=262)
    for width, heads in ((32, 4), (64, 2)):
        folders[width] = tmp_path_factory.mktemp(f"gpt2_{width}")
        tiny.random_gpt2(len(tokenizer), width=width, heads=heads, layers=1).config.save_pretrained(folders[width])
        tokenizer.save_pretrained(folders[width])
    return folders, tokenizer


def write_weights(path, language, seed, **more):
    """A CLIPxGPT file of random weights, with a note of its heads beside it → state, facts."""
    state, facts = weight_files.random_file("clipxgpt", seed, len(language[1]), language[1].eos_token_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    told = {"n_head": facts.heads, "gpt2_type": str(language[0][facts.width]), **more}
    path.with_suffix(".json").write_text(json.dumps({"model": told}))
    return state, facts


def expected_caption(state, facts, embedding, tokenizer):
    """The published loop, from the file's own tensors → text, mean log-probability, tokens."""
    gpt = weight_files.PlainGPT2(weight_files.part(state, "td.model."), facts.heads)
    prefix = weight_files.map_prefix("encoder", weight_files.part(state, "mp."), embedding, facts)
    tokens, score = weight_files.clipxgpt_caption(gpt, prefix, tokenizer.bos_token_id, tokenizer.eos_token_id)
    text = tokenizer.decode(tokens[:-1]).strip()
    return text[:1].upper() + text[1:], score, tokens


@pytest.mark.parametrize("part", range(2))
def test_50_random_files_caption_as_the_published_loop(tmp_path, language, monkeypatch, part):
    _, tokenizer = language
    monkeypatch.setattr(checkpoints, "load_tokenizer", lambda name: tokenizer)
    lengths = []
    for seed in range(part * 25, part * 25 + 25):
        state, facts = write_weights(tmp_path / "model.pt", language, seed)
        model = load_checkpoint(tmp_path / "model.pt").double()
        embeddings = torch.randn(3, facts.clip_width, generator=torch.Generator().manual_seed(seed)).double()
        greedy = generate(model, embeddings, "greedy")
        assert seed % 10 or greedy == generate(model, embeddings)  # published weights know no other way
        for row, embedding in enumerate(embeddings):
            text, score, tokens = expected_caption(state, facts, embedding, tokenizer)
            assert greedy[row] == [(text, pytest.approx(score, abs=1e-5))], seed
            lengths.append(len(tokens))
    assert max(lengths) == 40
    assert min(lengths) < 10


def test_positions_count_twice_then_three_times(tmp_path, language):
    """Without the published positions the captions are others: the loop is no ordinary greedy search."""
    differing = 0
    for seed in range(6):
        _, facts = write_weights(tmp_path / "model.pt", language, seed)
        embedding = torch.randn(1, facts.clip_width, generator=torch.Generator().manual_seed(seed))
        published_way = generate(load_checkpoint(tmp_path / "model.pt"), embedding, "greedy", entry_length=12)
        write_weights(tmp_path / "model.pt", language, seed, decoding_style=None)
        differing += generate(load_checkpoint(tmp_path / "model.pt"), embedding, "greedy", entry_length=12) != published_way
    assert differing >= 4


def test_published_weights_give_one_greedy_caption_only(tmp_path, language):
    _, facts = write_weights(tmp_path / "model.pt", language, 1)
    model = load_checkpoint(tmp_path / "model.pt")
    for wrong in ({"decoding": "sample"}, {"num_captions": 2}):
        with pytest.raises(UserError, match="decode greedily"):
            generate(model, torch.randn(1, facts.clip_width), **wrong)


def test_the_vision_tower_in_the_file_is_transformers_own(tmp_path, language):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    state, _ = write_weights(tmp_path / "model.pt", language, 5)
    assert load_checkpoint(tmp_path / "model.pt").origin.encoder == f"clipxgpt:{tmp_path / 'model.pt'}"
    encoder = load_encoder(f"clipxgpt:{tmp_path / 'model.pt'}")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=24, patch_size=8)).eval()
    tensors = {name.removeprefix("ie.model."): tensor for name, tensor in state.items() if name.startswith("ie.")}
    del tensors["embeddings.position_ids"]
    prefix = "vision_model." if "vision_model.pre_layrnorm.weight" in tower.state_dict() else ""
    tower.load_state_dict({prefix + name: tensor for name, tensor in tensors.items()})
    pixels = encoder.preprocess(tiny.save_picture(tmp_path / "a.jpg", 1))[None]
    with torch.no_grad():
        expected = tower(pixel_values=pixels).pooler_output
    assert pixels.shape == (1, 3, 24, 24)
    assert torch.allclose(encoder.encode(pixels), expected, atol=1e-5)
    assert encoder.width == 64
    assert torch.isfinite(expected).all()


def test_preprocessing_is_the_processor_s(tmp_path, language):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    write_weights(tmp_path / "model.pt", language, 5)
    encoder = load_encoder(f"clipxgpt:{tmp_path / 'model.pt'}")
    picture = tiny.save_picture(tmp_path / "a.jpg", 1)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    expected = torch.as_tensor(processor(Image.open(picture), return_tensors="np")["pixel_values"][0])
    assert (encoder.preprocess(picture) - expected).abs().max() < 0.02  # half a grey level


@pytest.mark.parametrize("change", ["removed", "added", "reshaped"])
def test_a_vision_tower_that_does_not_fit_is_refused(tmp_path, language, change):
    state, _ = write_weights(tmp_path / "model.pt", language, 5)
    key = "ie.model.encoder.layers.1.mlp.fc2.weight"
    if change == "removed":
        del state[key]
    else:
        state[key if change == "reshaped" else f"{key}_2"] = torch.ones(3, 3)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match=key):
        load_checkpoint(tmp_path / "model.pt")


# -- the command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(workdir, language):
    """weights/small/model.pt with a tower whose embeddings fit its mapper, and a picture."""
    state, facts = write_weights(workdir / "weights/small/model.pt", language, 5)
    mapper = weight_files.mapper_shapes("encoder", 64, facts.width, facts.length, layers=facts.layers)
    generator = torch.Generator().manual_seed(7)
    state = {name: tensor for name, tensor in state.items() if not name.startswith("mp.")}
    state |= weight_files.under("mp.", weight_files.draw_tensors(mapper, generator))
    torch.save({"epoch": 1, "model_state_dict": state}, workdir / "weights/small/model.pt")
    tiny.save_picture(workdir / "photo.jpg", 3)
    return state, facts


@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_picture_alone_means_the_published_weights(weights, language, workdir, capsys):
    state, facts = weights
    assert predict.main(["-I", "photo.jpg", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    encoder = load_encoder("clipxgpt:weights/small/model.pt")
    embedding = encoder.encode(encoder.preprocess("photo.jpg")[None])[0].double()
    text, _, _ = expected_caption(state, facts, embedding, language[1])
    assert out.startswith(f'Generated Caption: "{text}"\n')
    assert Image.open("data/result/prediction/photo-RS.jpg").size[0] > 300


@pytest.mark.filterwarnings("ignore:Glyph")
def test_its_options_work_by_both_their_names(weights, workdir, capsys):
    (workdir / "weights/small/model.pt").rename(workdir / "weights/small/mine.pt")
    (workdir / "weights/small/model.json").rename(workdir / "weights/small/mine.json")
    for words in (
        ["-I", "photo.jpg", "-S", "S", "-C", "mine.pt", "-R", "short", "-T", "0.7"],
        ["--img-path", "photo.jpg", "--size", "S", "--checkpoint-name", "mine", "--res-path", "long", "--temperature", "0.7"],
    ):
        assert predict.main([*words, "--device", "cpu"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Generated")]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert (workdir / "short/photo-RS.jpg").is_file()
    assert (workdir / "long/photo-RS.jpg").is_file()


@pytest.mark.parametrize("words, message", [
    ([], "id=1pSQruQyg8KJq6VmzhMLFbT_VaHJMdlWF and put it at data/weights/flickr_small_weights.pt"),
    (["-S", "L"], "id=1Gh32arzhW06C1ZJyzcJSSfdJDi3RgWoG and put it at data/weights/flickr_large_weights.pt"),
    (["-S", "L", "-C", "other.pt"], "no CLIPxGPT weights weights/large/other.pt"),
])  # fmt: skip
def test_missing_weights_say_what_to_fetch_and_where_to_put_it(workdir, capsys, words, message):
    tiny.save_picture(workdir / "photo.jpg", 3)
    with pytest.raises(SystemExit) as end:
        predict.main(["-I", "photo.jpg", *words])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]


# -- new trainings of that mapper ----------------------------------------------------------------------------------------


def test_images_do_not_attend_to_one_another():
    torch.manual_seed(0)
    mapper = EncoderMapper(32, 24, num_layers=2, heads=4, dropout=0.1).eval()
    embeddings = torch.randn(5, 32)
    together, alone = mapper(embeddings), torch.cat([mapper(one[None]) for one in embeddings])
    assert torch.allclose(together, alone, atol=1e-6)
    assert together.shape == (5, 24)


def test_a_new_training_of_the_mapper_predicts_by_the_ordinary_decoder(workdir, tiny_gpt2):
    tiny.save_published_features(workdir / "train.pkl", [[text] for text in tiny.CAPTIONS], width=48)
    words = ["--data", "train.pkl", "--out_dir", "out", "--gpt2_type", str(tiny_gpt2), "--device", "cpu", "--bs", "4", "--epochs", "1"]
    words += ["--warmup_steps", "1", "--lr", "1e-3", "--mapping_type", "encoder", "--num_layers", "2", "--prefix_length", "4"]
    assert train.main(words) == 0
    model = load_checkpoint("out/coco_prefix-000.pt")
    assert (model.config.mapper_heads, model.config.mapper_dropout, model.config.decoding_style) == (None, 0.1, None)
    names = [name for name in torch.load("out/coco_prefix-000.pt") if name.startswith("clip_project.")]
    assert {name.split(".")[1] for name in names} == {"transformer_encoder", "mapper"}
    assert len(generate(model, torch.randn(2, 48), entry_length=5, num_captions=2)[0]) == 2
