"""parse_food.py from the command line, in the food set's folder as Kaggle's archive unpacks it."""

import functools
from pathlib import Path

import pytest

import helpers
import parse_food
import tiny
import train
from features.store import load_features

pytestmark = pytest.mark.usefixtures("one_thread")
error_line = functools.partial(helpers.error_line, parse_food.main)
CAPTIONS = "Index,Captions\n" + "".join(f'{number},"Dish {number}, with sauce."\n' for number in range(10))


@pytest.fixture
def food(workdir):
    """data/food/archive with ten captioned pictures 0.jpg … 9.jpg; small weights for ViT-B/32."""
    for number in range(10):
        tiny.save_picture(f"data/food/archive/dataset/{number}.jpg", number)
    write("data/food/archive/Captions.csv", CAPTIONS)
    tiny.save_clip("data/weights/ViT-B-32.pt", 512, "vit")
    return workdir


def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def texts(path="data/ViT-B_32_train.pkl"):
    """Feature file → {image_id: [captions]}."""
    found = {}
    for caption in load_features(path).captions:
        found.setdefault(caption["image_id"], []).append(caption["caption"])
    return found


def test_the_published_lines_write_the_published_files_and_train(food, capsys):
    tiny.save_clip("data/weights/RN50x4.pt", 640, "resnet")
    tiny.save_gpt2("data/weights/gpt2", width=16, layers=1, heads=2)
    short = ["--max_steps", "2", "--bs", "4", "--warmup_steps", "1", "--device", "cpu"]
    mapper = "--mapping_type transformer  --num_layers 8 --prefix_length 40 --prefix_length_clip 40".split()
    assert parse_food.main(["--clip_model_type", "ViT-B/32"]) == 0
    features = load_features("data/ViT-B_32_train.pkl")
    assert features.clip_embedding.shape == (10, 512)
    assert features.meta["split"] == "train"
    assert features.meta["source"] == "data/food"
    assert texts() == {str(number): [f"Dish {number}, with sauce."] for number in range(10)}
    assert not Path("data/ViT-B_32_val.pkl").exists()
    assert train.main(["--data", "./data/ViT-B_32_train.pkl", "--out_dir", "./coco_train/", *short]) == 0
    assert parse_food.main(["--clip_model_type", "RN50x4"]) == 0
    last = ["--only_prefix", "--data", "./data/RN50x4_train.pkl", "--out_dir", "./data_train/", *mapper, "--is_rn"]
    assert train.main([*last, *short]) == 0
    assert Path("coco_train/coco_prefix-000.pt").is_file()
    assert Path("data_train/coco_prefix-000.pt").is_file()


def test_train_size_is_a_share_of_the_images(food):
    write("data/food/archive/Captions.csv", CAPTIONS + CAPTIONS.removeprefix("Index,Captions\n"))
    assert parse_food.main(["--train_size", "0.3", "--data_path", "data/food/archive"]) == 0
    train_set, val_set = texts(), texts("data/ViT-B_32_val.pkl")
    assert (len(train_set), len(val_set)) == (3, 7)
    assert not set(train_set) & set(val_set)
    assert all(len(captions) == 2 for captions in (*train_set.values(), *val_set.values()))
    parse_food.main(["--train_size", "0.3", "--seed", "1"])
    assert set(texts()) != set(train_set)


def test_captions_of_the_limit_and_longer_are_left_out_and_counted(food, capsys):
    rows = [f"0,{'x' * 239}", f"1,{'y' * 240}", "2,short", f"2,{'z' * 500}"]
    write("data/food/archive/Captions.csv", "Index,Captions\n" + "\n".join(rows))
    assert parse_food.main([]) == 0
    assert texts() == {"0": ["x" * 239], "2": ["short"]}
    assert "2 captions of 240 characters or more left out" in capsys.readouterr().out
    assert parse_food.main(["--token_limit", "0"]) == 0
    assert len(texts()) == 3
    assert len(texts()["2"]) == 2


def test_an_index_is_a_number_or_a_name_with_or_without_a_suffix(food):
    for number, name in enumerate(("mr. cake.jpg", "pie.PNG", "soup.jpeg", "tea.jpg", "tea.png")):
        tiny.save_picture(f"data/food/archive/dataset/{name}", number)
    named = ("3", "4.jpg", "mr. cake", "pie", "soup.jpeg", "tea", "gone")
    write("data/food/archive/Captions.csv", "\ufeff,Index,Captions\n" + "".join(f"0,{name},一 {name}\n" for name in named))
    assert parse_food.main([]) == 0
    files = {caption["image_id"]: caption["file_name"] for caption in load_features("data/ViT-B_32_train.pkl").captions}
    assert list(files) == ["3", "4.jpg", "mr. cake", "pie", "soup.jpeg", "tea"]
    assert list(files.values()) == ["3.jpg", "4.jpg", "mr. cake.jpg", "pie.PNG", "soup.jpeg", "tea.jpg"]
    assert texts()["pie"] == ["一 pie"]
    assert "gone.jpg,no such file" in Path("data/ViT-B_32_train.pkl.skipped.csv").read_text()


def test_a_folder_with_metadata_serves_too(food):
    tiny.save_picture("mine/a.jpg", 1)
    write("mine/metadata.jsonl", '{"file_name": "a.jpg", "text": ["Soup.", "' + "long " * 60 + '"]}\n')
    assert parse_food.main(["--data_path", "mine", "--out", "mine.pkl"]) == 0
    assert texts("mine.pkl") == {"a.jpg": ["Soup."]}


def test_user_mistakes_end_in_one_line_and_leave_nothing(food, capsys):
    table = "data/food/archive/Captions.csv"
    for content, message in (
        ("Image,Captions\n1,x\n", "has no column Index; it has Image, Captions"),
        ("Index,Title\n1,x\n", "has no column caption or text; it has Title"),
        ("Index,Captions\n1,Rice, fried.\n", "Put captions with a comma between double quotes"),
        ("Index,Captions\n", "no image with a caption in this data set"),
        ("Index,Captions\n1," + "x" * 240, "no image with a caption in this data set"),
        ("Index,Captions\n" + "".join(f"no{n},x\n" for n in range(20)), "data/food/archive/dataset/no0.jpg, for example, is missing"),
    ):
        write(table, content)
        assert message in error_line(capsys, [])
    Path("data/food/archive/dataset").rename("data/food/elsewhere")
    assert "no folder data/food/archive/dataset beside" in error_line(capsys, [])
    Path(table).unlink()
    assert "data/food holds 10 pictures or sounds and no caption" in error_line(capsys, [])
    assert "no folder nowhere; expected archive/Captions.csv in it" in error_line(capsys, ["--data_path", "nowhere"])
    for size in ("0", "1.1", "many"):
        error_line(capsys, ["--train_size", size])
    assert not list(Path("data").glob("*.pkl*"))
