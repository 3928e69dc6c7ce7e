"""Small random encoders of every family, written as their own libraries write them. Random weights, real formats."""

import json
from pathlib import Path

import torch

TEXTS = ["a red circle", "a blue square above a green circle", "two dogs"]
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=12)
OPEN_CLIP = "tiny-ViT-16"  # the name of the model config that add_open_clip_config adds
TIMM_VIT = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def word_tokenizer():
    """A fast tokenizer of the words in TEXTS: <pad> 0, <s> 1 before each text, </s> the last token after it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in TEXTS for word in text.split()})
    vocab = {word: number for number, word in enumerate(["<pad>", "<s>", "<unk>", *words, "</s>"])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 1), ("</s>", vocab["</s>"])]
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _scaled(model, seed, scale=4.0):
    """Draw the weights of `model` anew, larger than libraries do: at their scale all pictures look alike to a random tower."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def save_hf_clip(folder, seed=0):
    """Write a transformers CLIPModel (vision 32 wide, shared space 24), tokenizer and preprocessing (32 px) into `folder`."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    end = len(tokenizer) - 1
    text = {**TEXT, "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": end, "pad_token_id": 0}
    model = _scaled(CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)), seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return Path(folder)


def save_hf_siglip(folder, seed=0):
    """Write a transformers SiglipModel (32 wide on both sides), tokenizer and preprocessing into `folder`."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    text = {**TEXT, "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": len(tokenizer) - 1, "pad_token_id": 0}
    model = _scaled(SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)), seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return Path(folder)


def save_hf_siglip2(folder, seed=0):
    """Write a transformers Siglip2Model of the kind that keeps a picture's shape, and its preprocessing, into `folder`."""
    from transformers import Siglip2Config, Siglip2ImageProcessorPil, Siglip2Model

    torch.manual_seed(seed)
    vision = {key: value for key, value in VISION.items() if key != "image_size"} | {"num_patches": 16}
    text = {**TEXT, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = _scaled(Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)), seed)
    model.save_pretrained(folder)
    Siglip2ImageProcessorPil(max_num_patches=18).save_pretrained(folder)
    return Path(folder)


def save_hf_dinov2(folder, seed=0):
    """Write a transformers Dinov2Model, 32 wide, and its preprocessing (resize to 36, crop to 28) into `folder`."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    model = _scaled(Dinov2Model(config), seed)
    model.save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    size, crop = {"shortest_edge": 36}, {"height": 28, "width": 28}
    BitImageProcessorPil(size=size, crop_size=crop, image_mean=mean, image_std=std).save_pretrained(folder)
    return Path(folder)


def save_clap(folder, seed=0, fusion=False):
    """Write a transformers ClapModel (shared space 24; windows of 1 s at 8,000 Hz), tokenizer and preprocessing into `folder`."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    audio = dict(spec_size=32, num_mel_bins=8, patch_embeds_hidden_size=16, depths=[1, 1], num_attention_heads=[2, 2], hidden_size=32,
                 patch_size=4, patch_stride=[4, 4], window_size=4, num_classes=4, projection_hidden_size=32)  # fmt: skip
    if fusion:
        audio |= {"enable_fusion": True, "fusion_type": "aff_2d"}
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer),
                max_position_embeddings=13, projection_hidden_size=32, pad_token_id=0)  # fmt: skip
    model = _scaled(ClapModel(ClapConfig(audio_config=audio, text_config=text, projection_dim=24)), seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=8, sampling_rate=8000, hop_length=320, max_length_s=1, fft_window_size=256, frequency_max=4000,
        truncation="fusion" if fusion else "rand_trunc",
    ).save_pretrained(folder)  # fmt: skip
    return Path(folder)


def add_open_clip_config(folder):
    """Make open_clip know the architecture OPEN_CLIP: 24 wide, pictures of 32 px, its own text tower."""
    import open_clip

    path = Path(folder) / f"{OPEN_CLIP}.json"
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return config


def save_open_clip(path, arch=OPEN_CLIP, seed=0):
    """Write the state dict of a random open_clip model. → the model"""
    import open_clip

    torch.manual_seed(seed)
    model = open_clip.create_model(arch, pretrained_text=False).eval()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


def save_timm(folder, name=TIMM_VIT, seed=0):
    """Write a random timm model as timm saves it for the hub: model.safetensors (and config.json). → the model, with its classifier"""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False).eval()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    return model
