"""`train.py --published` takes the published steps: the losses and weights of a plain loop that pads and repeats the prefix."""

import copy
import json

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import tiny
from benchmarks import published
from interrupted import dies_at_save

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, BS, LR, WARMUP, SEED, CLIP_WIDTH = 20, 8, 1e-4, 5, 7, 512
KINDS = {
    "mlp": ["--mapping_type", "mlp", "--prefix_length", "6"],
    "transformer": ["--mapping_type", "transformer", "--num_layers", "2", "--prefix_length", "5", "--prefix_length_clip", "4"],
}
SIZES = {"mlp": dict(prefix_length=6), "transformer": dict(prefix_length=5, clip_length=4, num_layers=2)}


def captions_of_a_small_set():
    """150 captions of 40 pictures without "!": enough that 20 steps of 8 cross an epoch, and one far too long, which is cut."""
    texts = [caption for caption in tiny.CAPTIONS if "!" not in caption]
    captions = [[f"{texts[(row + number) % len(texts)][:12]}." for number in range(1 + row % 7)] for row in range(38)]
    return [*captions, [" ".join(texts)], ["A cat."]]


def start(gpt_folder, kind):
    """The published model with the folder's GPT-2, without dropout, and a fresh mapper."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(3)
    gpt = GPT2LMHeadModel.from_pretrained(gpt_folder, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    return published.PublishedClipCap(gpt, CLIP_WIDTH, **SIZES[kind])


def run_train(workdir, gpt_folder, kind, *extra):
    import train

    arguments = ["--data", "data/small.pkl", "--out_dir", "out", "--gpt2_type", str(gpt_folder), "--device", "cpu", "--seed", str(SEED)]
    arguments += ["--bs", str(BS), "--max_steps", str(STEPS), "--lr", str(LR), "--warmup_steps", str(WARMUP), "--gpt2_dropout", "0"]
    assert not train.main([*arguments, "--log_every", "1", *KINDS[kind], *extra])


def trained_weights(folder, run_name="coco_prefix"):
    """The state dict of the last numbered checkpoint."""
    return torch.load(sorted(folder.glob(f"{run_name}-[0-9][0-9][0-9].pt"))[-1], weights_only=True)


@pytest.mark.parametrize(("kind", "only_prefix"), [("mlp", False), ("transformer", False), ("mlp", True), ("transformer", True)])
def test_published_training_equals_the_plain_loop_step_by_step(workdir, tiny_gpt2, kind, only_prefix):
    from transformers import AutoTokenizer

    from features.packing import plan_epoch

    embeddings, texts, rows = tiny.save_published_features("data/small.pkl", captions_of_a_small_set(), CLIP_WIDTH)
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    captions = [tokenizer.encode(text) for text in texts]
    assert not any(published.PAD in caption for caption in captions)
    cut = published.published_length(list(map(len, captions)))
    assert cut < max(map(len, captions)), "no caption is long enough to be cut"

    model = start(tiny_gpt2, kind)
    torch.save(model.state_dict(), "start.pt")
    before = copy.deepcopy(model.state_dict())
    batches = []
    for epoch in range(10):
        batches += plan_epoch(rows, BS, "captions", seed=SEED, epoch=epoch, drop_last=True)
    per_epoch = len(texts) // BS
    assert per_epoch < STEPS < 2 * per_epoch
    assert any(len(captions[number]) > cut for batch in batches[:STEPS] for number in batch), "the long caption is in no batch"
    losses, rates = published.train_published(model, embeddings, captions, rows, batches[:STEPS], LR, WARMUP, only_prefix)
    expected = model.state_dict()

    run_train(workdir, tiny_gpt2, kind, "--published", "--init_from", "start.pt", *(["--only_prefix"] if only_prefix else []))
    lines = [json.loads(line) for line in (workdir / "out/coco_prefix_metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert len(lines) == STEPS
    assert [line["loss"] for line in lines] == pytest.approx(losses, abs=1e-4)
    assert [line["lr"] for line in lines] == pytest.approx(rates, rel=1e-6)
    found = trained_weights(workdir / "out")
    assert sorted(found) == sorted(expected), "--published saves the whole model under the published names"
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=lambda text: f"{name}: {text}")
        if only_prefix and name.startswith("gpt."):
            assert torch.equal(found[name], before[name]), f"{name} changed, though GPT-2 is frozen"
    # Twenty small steps move no weight far; so the distance that is left is held against the distance gone.
    gone = sum(float((expected[name] - before[name]).square().sum()) for name in expected) ** 0.5
    left = sum(float((expected[name] - found[name]).square().sum()) for name in expected) ** 0.5
    assert left < 0.01 * gone, f"the weights went {gone:.2g} and ended {left:.2g} apart"


class FormerAdamW(torch.optim.Optimizer):
    """AdamW as transformers had it, without weight decay: EPS is added to the root before the bias correction."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.averages, self.steps = {}, 0

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                mean, square = self.averages.setdefault(parameter, (torch.zeros_like(parameter), torch.zeros_like(parameter)))
                mean.mul_(0.9).add_(parameter.grad, alpha=0.1)
                square.mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
                size = group["lr"] * (1 - 0.999**self.steps) ** 0.5 / (1 - 0.9**self.steps)
                parameter.addcdiv_(mean, square.sqrt() + 1e-6, value=-size)


def test_the_published_optimizer_is_the_former_adamw_also_after_a_resume(workdir, tiny_gpt2):
    """12 steps, one batch per epoch."""
    from transformers import AutoTokenizer

    texts = [caption.replace("!", ".") for caption in tiny.CAPTIONS]
    embeddings, _, rows = tiny.save_published_features("data/small.pkl", [[text] for text in texts], CLIP_WIDTH)
    captions = [AutoTokenizer.from_pretrained(tiny_gpt2).encode(text) for text in texts]
    model = start(tiny_gpt2, "mlp")
    torch.save(model.state_dict(), "start.pt")
    before = copy.deepcopy(model.state_dict())
    training = published.PublishedTraining(model, published.published_length([len(caption) for caption in captions]), False)
    training.optimizer = FormerAdamW(training.trained, LR)
    for step in range(12):
        training.optimizer.param_groups[0]["lr"] = published.learning_rate(step, LR, 2, 12)
        loss = training.step(embeddings[rows], captions)
    words = ["--published", "--init_from", "start.pt", "--max_steps", "12", "--epochs", "12", "--warmup_steps", "2", "--save_steps", "5"]
    with dies_at_save(6), pytest.raises(SystemExit):
        run_train(workdir, tiny_gpt2, "mlp", *words)
    run_train(workdir, tiny_gpt2, "mlp", *words, "--resume")
    found, expected = trained_weights(workdir / "out"), model.state_dict()
    assert json.loads((workdir / "out/coco_prefix_metrics.jsonl").read_text().splitlines()[-1])["loss"] == pytest.approx(loss, abs=1e-5)
    moved = max(float((expected[name] - before[name]).abs().max()) for name in expected)
    apart = max(float((expected[name] - found[name]).abs().max()) for name in expected)
    assert apart < 0.01 * moved, f"weights moved {moved:.2g} and ended {apart:.2g} apart"


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_a_frozen_gpt2_keeps_every_bit_and_has_no_gradient(workdir, tiny_gpt2, kind, monkeypatch):
    from transformers import GPT2LMHeadModel

    from models.captioner import ClipCaptionModel

    tiny.save_published_features("data/small.pkl", captions_of_a_small_set(), CLIP_WIDTH)
    models, seen, constants = [], [], set()
    build = ClipCaptionModel.__init__

    def remember(self, *arguments, **options):
        build(self, *arguments, **options)
        models.append(self)

    def look(optimizer, arguments, options):
        model = models[-1]
        for group in optimizer.param_groups:  # too few steps for a wrong weight decay to show in the weights
            constants.add((group["betas"], group["eps"], group["weight_decay"]))
        optimised = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        seen.append(
            all(parameter.grad is None and id(parameter) not in optimised for parameter in model.gpt.parameters())
            and all(parameter.grad is not None and id(parameter) in optimised for parameter in model.clip_project.parameters())
            and not any(module.training for module in model.gpt.modules())
        )

    monkeypatch.setattr(ClipCaptionModel, "__init__", remember)
    hook = register_optimizer_step_pre_hook(look)
    try:
        run_train(workdir, tiny_gpt2, kind, "--only_prefix", "--save_full")
    finally:
        hook.remove()
    assert len(seen) == STEPS
    assert all(seen)
    assert constants == {(published.BETAS, published.EPS, 0.0)}
    before = GPT2LMHeadModel.from_pretrained(tiny_gpt2).state_dict()
    after = {name.removeprefix("gpt."): tensor for name, tensor in trained_weights(workdir / "out").items() if name.startswith("gpt.")}
    assert sorted(after) == sorted(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_a_frozen_gpt2_is_left_out_of_the_checkpoint_unless_asked_for(workdir, tiny_gpt2):
    tiny.save_published_features("data/small.pkl", captions_of_a_small_set(), CLIP_WIDTH)
    run_train(workdir, tiny_gpt2, "mlp", "--only_prefix")
    assert {name.split(".")[0] for name in trained_weights(workdir / "out")} == {"clip_project"}


def test_a_frozen_gpt2_that_came_with_init_from_is_the_one_that_predicts(workdir, tiny_gpt2):
    """A mapper trained before somebody's tuned GPT-2 is worth nothing before the original one."""
    from models.checkpoints import load_checkpoint

    tiny.save_published_features("data/small.pkl", captions_of_a_small_set(), CLIP_WIDTH)
    tuned = start(tiny_gpt2, "mlp")
    with torch.no_grad():
        for parameter in tuned.gpt.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    torch.save(tuned.state_dict(), "tuned.pt")
    run_train(workdir, tiny_gpt2, "mlp", "--only_prefix", "--init_from", "tuned.pt")
    model = load_checkpoint(sorted((workdir / "out").glob("coco_prefix-[0-9][0-9][0-9].pt"))[-1])
    for name, tensor in tuned.gpt.state_dict().items():
        assert torch.equal(model.gpt.state_dict()[name], tensor), f"{name} is the original GPT-2's, not the one trained with"


def test_our_mappers_give_the_published_prefixes_under_the_published_names():
    from models.captioner import ClipCaptionModel
    from models.config import CaptionConfig

    gpt = tiny.random_gpt2(19, width=16, layers=1, heads=2)
    for kind, sizes in SIZES.items():
        plain = published.PublishedClipCap(copy.deepcopy(gpt), 6, **sizes)
        ours = ClipCaptionModel(CaptionConfig(encoder=None, clip_width=6, mapping_type=kind, **sizes), copy.deepcopy(gpt))
        ours.load_state_dict(plain.state_dict())
        pictures = torch.randn(3, 6)
        torch.testing.assert_close(ours.encode_prefix(pictures), plain.clip_project(pictures), rtol=0, atol=1e-5)


def test_normalising_divides_an_embedding_by_its_length_in_float32():
    from models.captioner import ClipCaptionModel
    from models.config import CaptionConfig

    gpt = tiny.random_gpt2(19, width=16, layers=1, heads=2)
    model = ClipCaptionModel(CaptionConfig(encoder=None, clip_width=6, prefix_length=2, normalize_prefix=True), gpt)
    half = (torch.randn(3, 6) * 1000).half()
    unit = half.float() / half.float().square().sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(model.encode_prefix(half), model.clip_project(unit).view(3, 2, 16), rtol=0, atol=1e-6)
