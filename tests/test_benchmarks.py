"""The benchmark: both sides give equal results on tiny networks, and the table says what it should. Nothing is timed."""

import dataclasses
import json
import os
import time

import numpy
import pytest
import torch

from benchmarks import coco_run, demo_runs, memory, rows, run, scaling, sections, work
from benchmarks.ours import Training

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = work.Scale(
    gpt={"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300, "bos_token_id": 299, "eos_token_id": 299},
    clip=(32, 64, 1, 64, 32, 77, 64, 64, 1, 1),
    images=8, step_captions=20, pictures=4, published_pictures=2, decoded=4, published_beam=3, published_greedy=4, entry_length=6,
)  # fmt: skip


@pytest.fixture
def context(tmp_path):
    return sections.Context(TINY, "cpu", 1, {"fp32": 1e9, "bf16": 1e9}, tmp_path, tmp_path / "nothing")


@pytest.mark.parametrize("section", ["features", "train", "decode"])
def test_both_sides_give_equal_results(section, context):
    rows = list(sections.SECTIONS[section](context))
    compared = [row for row in rows if row["row"].endswith("fp32")]
    assert compared, rows
    assert all(row["equal"] for row in compared), rows
    assert {row["row"] for row in rows} >= {name for name in run.FLOORS if name.split()[0] == rows[0]["row"].split()[0]}
    assert all(row["ratio"] > 0 and row["share_of_matmul_rate"] > 0 for row in rows)


def test_a_gpu_is_measured_at_larger_steps_too(context):
    context.scale = dataclasses.replace(TINY, large_step=15)
    found = {row["row"]: row for row in sections.train_rows(context)}
    assert {f"train {variant} images bf16 15" for variant in work.VARIANTS} <= set(found)
    assert run.GPU_FLOORS[2][1] == f"train mlp images bf16 {work.GPU_SCALE.large_step}"
    assert run.GPU_FLOORS[3][1] == f"train transformer images bf16 {work.GPU_SCALE.large_step}"


@pytest.mark.parametrize("variant", work.VARIANTS)
@pytest.mark.parametrize("sampling", ["images", "captions"])
def test_both_sides_learn_the_same(variant, sampling):
    from features.packing import plan_epoch

    no_dropout = {"embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}
    captions = work.caption_set(TINY)
    model = work.build_captioner(variant, TINY.clip[0], **TINY.gpt, **no_dropout)
    theirs = work.published_training(work.build_published(model, **TINY.gpt, **no_dropout), variant)
    for module in (*model.modules(), *theirs.model.modules()):
        if isinstance(module, torch.nn.Dropout):  # of the adapters
            module.p = 0.0
    ours = Training(model, captions)
    for numbers in plan_epoch(captions.caption_rows, TINY.step_captions, sampling):
        loss = theirs.step(captions.embedding_of(numbers), captions.lists(numbers))
        assert abs(loss - ours.step(numbers)) < 1e-4
    for name, parameter in theirs.model.named_parameters():
        assert torch.allclose(parameter, model.state_dict()[name], atol=2e-5), name
    if variant == "lora":
        adapters = [parameter for parameter in theirs.trained if parameter.dim() == 2 and work.LORA["rank"] in parameter.shape]
        assert len(adapters) == 2 * 4 * TINY.gpt["n_layer"], "c_attn, c_fc, and a c_proj in attention and MLP"
    gradients = [parameter.grad for parameter in theirs.model.gpt.parameters()]
    assert all(gradient is not None for gradient in gradients) == (variant == "transformer"), "the published code keeps GPT-2's gradients"


def test_slow_rows_get_fewer_rounds_on_a_cpu_unless_told(context):
    assert context.rounds() == context.rounds(slow=True) == 1
    context.repeats = None
    assert (context.rounds(), context.rounds(slow=True)) == (3, 2)
    context.device = "cuda"
    assert context.rounds(slow=True) == 3


def test_lengths_are_those_of_coco():
    lengths = work.draw_lengths(20000)
    counts = json.loads(work.LENGTHS.read_text())
    assert sum(counts["counts"].values()) == counts["captions"]
    assert "COCO" in counts["source"]
    assert 11.8 < lengths.mean() < 12.2
    assert numpy.percentile(lengths, 99) <= 22
    assert work.corpus_length() == 39


def test_lengths_are_made_from_the_real_captions(shared_data):
    from transformers import GPT2TokenizerFast

    vocabulary = json.loads((shared_data / "gpt2/vocab.json").read_text())
    merges = [tuple(line.split()) for line in (shared_data / "gpt2/merges.txt").read_text().splitlines()[1:] if line]
    tokenizer = GPT2TokenizerFast(vocab=vocabulary, merges=merges)
    records = json.loads((shared_data / "coco_mini/captions_only_val2017.json").read_text())["annotations"]
    lengths = [len(ids) for ids in tokenizer([record["caption"] for record in records])["input_ids"]]
    counts = json.loads(work.LENGTHS.read_text())["counts"]
    assert {int(length): count for length, count in counts.items()} == {n: lengths.count(n) for n in set(lengths)}


def test_memory_of_a_step_is_measured_on_both_sides():
    for side in ("published", "ours"):
        found = memory.peak_of_step(side, "mlp", scale=TINY)
        assert isinstance(found["step"], int)
        assert found["model"] > 1e5
    before = memory.resident()
    with memory.Peak() as peak:
        held = torch.ones(2**26)  # 256 MiB, held for many of the watcher's looks
        time.sleep(0.5)
        del held
    assert peak.bytes > before + 2**27


@pytest.mark.parametrize("words_of", ["numbers", "gpt2"])
def test_coco_size_run_trains_on_captions_of_the_drawn_lengths(words_of, tmp_path, request):
    from features.store import load_features
    from models.weights import load_tokenizer

    data = tmp_path if words_of == "numbers" else request.getfixturevalue("shared_data")
    words = coco_run.save_language_model(tmp_path / "gpt2", data, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    coco_run.save_data(tmp_path / "train.pkl", words, images=10, captions=53)
    features = load_features(tmp_path / "train.pkl")
    assert features.clip_embedding.shape == (10, 512)
    assert numpy.bincount(features.caption_rows).tolist() == [6, 6, 6, 5, 5, 5, 5, 5, 5, 5]
    ids = load_tokenizer(str(tmp_path / "gpt2"))([caption["caption"] for caption in features.captions])["input_ids"]
    assert [len(each) for each in ids] == work.draw_lengths(53).tolist()


def test_rows_are_written_as_clip_retrieval_does_and_a_process_is_weighed(tmp_path):
    from features.store import load_features

    rows.save_directory(tmp_path / "ViT-B_32", 25, ["one", "two"], width=8, part_rows=10)
    features = load_features(tmp_path / "ViT-B_32")
    assert features.clip_embedding.shape == (25, 8)
    assert features.caption_rows.tolist() == list(range(25))
    assert [len(text.split()) for text in features.texts[:10]] == work.draw_lengths(10).tolist()
    held = torch.ones(2**26)
    assert rows.anonymous_memory(os.getpid()) > held.numel() * 4


def test_rate_of_a_run_leaves_the_warm_up_out():
    lines = [{"captions_per_s": rate} for rate in (1.0, 1.0, 10.0, 11.0, 12.0, 11.0, 11.0, 11.0)] + [{"val_loss": 3.0}]
    assert coco_run.steady_rate(lines) == (11.0, 10.0, 12.0)
    assert coco_run.describe(90) == "90 seconds"
    assert coco_run.describe(7200) == "2.0 hours"


def test_table_marks_what_is_below_its_floor():
    ours = {"unit": "captions", "published_per_s": 5.0, "ours_per_s": 20.0, "share_of_matmul_rate": 0.5, "equal": True, "compared": "loss"}
    rows = [
        {"row": "train mlp images fp32", "ratio": 3.0, "lowest": 2.9, "highest": 3.1, **ours},
        {"row": "beam fp32", "ratio": 10.0, "lowest": 9.0, "highest": 11.0, **ours, "equal": False},
        {"row": "memory transformer fp32", "ratio": 5.0, "unit": "MB", "published_mb": 5000, "ours_mb": 1000, "model_mb": 700},
    ]
    below, unequal, reached = run.table(rows)[1:]
    assert "below" in below
    assert "3.5×" in below
    assert "4.5×" in below
    assert "50%" in below
    assert "floor" in unequal
    assert "NOT EQUAL" in unequal
    assert "floor" in reached
    assert "5,000" in reached
    assert all("not measured here" in line for line in run.gpu_table(rows, "cpu"))
    assert "20 (floor" in "".join(run.gpu_table([{"row": "beam bf16", **ours}], "cuda"))


def test_result_file_is_named_after_the_machine():
    assert run.file_name("AMD EPYC, 2 cores") == "amd-epyc-2-cores"


def test_precisions_are_near_when_loss_and_true_captions_are():
    fp32 = {"loss": 0.5, "share_true": 0.95}
    for bf16, near in (((0.504, 0.94), True), ((0.506, 0.95), False), ((0.494, 0.95), False), ((0.5, 0.92), False)):
        assert demo_runs.compare_precisions({"fp32": fp32, "bf16": dict(zip(fp32, bf16))})["meets"] is near


def test_own_options_take_the_place_of_the_demos():
    assert demo_runs.options_of("--lr 3e-3 --tune head", "--bs 100 --lr 1e-3 --epochs 3") == "--bs 100 --epochs 3 --lr 3e-3 --tune head"
    assert demo_runs.options_of("--tune full", "--bs 100 --lr 1e-3") == "--bs 100 --lr 1e-3 --tune full"


def test_runs_on_the_demo_want_a_demo(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo_runs.main(["tuning", "--folder", str(tmp_path)])
    assert "Run make demo first" in capsys.readouterr().err


@pytest.mark.slow
def test_precisions_are_compared_on_a_demo(mini_demo, capfd):
    options = "--prefix_length 4 --bs 20 --epochs 4 --lr 2e-3 --warmup_steps 10 --sampling captions --device cpu"
    code = demo_runs.main(["precision", "--folder", str(mini_demo), "--train_options", options])
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert code == (0 if found["meets"] else 1)
    fp32, bf16 = (found["runs"][name]["loss"] for name in ("fp32", "bf16"))
    assert 0 < fp32 < 3 and 0 < bf16 < 3  # both learned; how far two runs of 400 steps end apart depends on the machine
    assert found["loss_apart"] == pytest.approx(abs(bf16 / fp32 - 1))


@pytest.mark.parametrize("words", [[], ["--features", "46.6", "--training", "35.3", "--decoding", "10.6"]])
def test_the_tables_of_scaling_are_computed(root, capsys, words):
    assert scaling.main(words) == 0
    table = capsys.readouterr().out
    assert table in (root / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert len(table.splitlines()) == 2 + len(scaling.DATA_SETS)


def test_hours_are_work_divided_by_rate_and_gpus():
    """3.3 million images at 1,000 a second on 8 GPUs: 412.5 s; 12 bytes an image besides a caption of 8: 66 MB."""
    row = scaling.make_table({"features": 1000, "training": 1000, "decoding": 1000}, width=3, caption_bytes=8, gpus=(8,))[3]
    assert row == "| CC3M | 0.1 GB | 6.9 min | 6.9 min | 6.9 min |"
