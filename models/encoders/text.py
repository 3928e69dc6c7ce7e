"""Text towers: how well a text fits a stored embedding, where the encoder was trained together with one.

Letters: N texts or embeddings, D width of an embedding, J width of the space that pictures (or sounds) and texts share.

tower = load_text_tower("ViT-B/32")
cosines = tower.project(clip_embedding) @ tower.encode_text(captions).T          [N, N]
"""

import dataclasses

from common import UserError
from models.encoders import find_builder, pick_device
from models.encoders.clap import build_clap
from models.encoders.hugging_face import VISION_TOWERS_ONLY, build_hf, check_keys, expected_in, quiet
from models.encoders.open_clip import build_openclip, load_openclip, load_openclip_tokenizer
from models.encoders.openai import build_clip, load_clip
from models.weights import load_from_library

TEXTS_TOGETHER = 256  # texts encoded in one batch
TEXT_FILES = "config.json, model.safetensors, tokenizer.json and tokenizer_config.json"


@dataclasses.dataclass
class TextTower:
    """The text side of an encoder, float32 in eval mode."""

    name: str  # the encoder's, as given to load_text_tower
    device: object  # torch.device
    tokenize: object  # list of texts → tensors on the CPU, truncated to the context: a dict of them
    module: object  # the dict of tensors → [N, J]
    projection: object = None  # torch.nn.Linear from D to J, for encoders whose embeddings stand before it
    width: int = 0  # J

    def encode_text(self, texts):
        """List of texts → [N, J] float32, L2-normalised, on the tower's device. Longer texts than the context are truncated."""
        import torch

        texts, parts = list(texts), [torch.empty(0, self.width, device=self.device)]
        with torch.no_grad():
            for start in range(0, len(texts), TEXTS_TOGETHER):
                tokens = self.tokenize(texts[start : start + TEXTS_TOGETHER])
                given = self.module(**{key: value.to(self.device) for key, value in tokens.items()})
                parts.append(torch.nn.functional.normalize(given.float(), dim=-1))
        return torch.cat(parts)

    def project(self, clip_embedding):
        """Stored embeddings, [N, D] → the shared space, [N, J] float32, L2-normalised. Raises UserError for another width than D."""
        import torch

        expected = self.width if self.projection is None else self.projection.in_features
        if clip_embedding.dim() != 2 or clip_embedding.shape[1] != expected:
            raise UserError(f"embeddings of shape {tuple(clip_embedding.shape)}; those of {self.name} are [N, {expected}], pooled.")
        with torch.no_grad():
            shared = clip_embedding.to(self.device).float()
            shared = shared if self.projection is None else self.projection(shared)
            return torch.nn.functional.normalize(shared, dim=-1)


def load_text_tower(name, device="cpu"):
    """Encoder's name or path, as load_encoder takes → TextTower, or None where that encoder has none (tinyvit, timm:, DINO).

    Raises UserError as load_encoder does, and when the encoder had a text tower but these weights lack it.
    """
    import torch

    name = str(name)
    load = TEXT_TOWERS.get(find_builder(name))
    device = pick_device(device)
    found = load(name) if load else None
    if found is None:
        return None
    tokenize, module, projection = found
    module = module.float().eval().requires_grad_(False)
    tower = TextTower(name, torch.device("cpu"), tokenize, module, projection)
    try:
        tower.width = module(**tokenize(["a"])).shape[1]
    except IndexError as error:
        raise UserError(f"the tokenizer of {name} knows more tokens than its text tower: they do not belong together.") from error
    if projection is not None:
        projection.to(device)
    module.to(device)
    tower.device = device
    return tower


def _text_module(model, function):
    """A module that holds `model` and calls function(model, …)."""
    import torch

    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, **tokens):
            return function(model, **tokens)

    return Text()


def _load_clip_text(name):
    from clip import clip

    model = load_clip(name).float()
    model.visual = _dtype_holder()

    def tokenize(texts):
        return {"text": clip.tokenize(texts, context_length=model.context_length, truncate=True)}

    return tokenize, _text_module(model, lambda model, text: model.encode_text(text)), None


def _dtype_holder():
    """What is left of CLIP's vision tower: the weight whose dtype encode_text asks for."""
    import torch

    holder = torch.nn.Module()
    holder.conv1 = torch.nn.Linear(1, 1)
    return holder


def _load_openclip_text(name):
    model, source = load_openclip(name)
    tokenizer = load_openclip_tokenizer(source)
    model.visual = None

    def tokenize(texts):
        return {"text": tokenizer(texts)}

    return tokenize, _text_module(model, lambda model, text: model.encode_text(text)), None


def _load_hf_text(name):
    found = load_from_library(_load_pair, name.removeprefix("hf:").removeprefix("clap:"), "model with a text tower", TEXT_FILES)
    if found is None:
        return None
    model, tokenizer, longest = found
    padding = "max_length" if model.config.model_type.startswith("siglip") else True  # SigLIP was trained on padded texts alone
    projection = getattr(model, "visual_projection", None)

    def tokenize(texts):
        tokens = tokenizer(texts, padding=padding, max_length=longest, truncation=True, return_tensors="pt")
        return {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}

    def encode(model, **tokens):
        return model.get_text_features(**tokens).pooler_output

    return tokenize, _text_module(model, encode), projection


def _load_pair(source, local_files_only):
    """→ model of two towers, its tokenizer, the context in tokens; None where the model has no text side"""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    with quiet():
        config = AutoConfig.from_pretrained(source, local_files_only=local_files_only)
        if config.model_type in (*VISION_TOWERS_ONLY, "clap_audio_model"):
            raise UserError(f"{source} holds one tower alone ({config.model_type}), no text tower. Give the folder or repository of both.")
        text_config = getattr(config, "text_config", None)
        if text_config is None:
            return None
        model, info = AutoModel.from_pretrained(source, local_files_only=local_files_only, dtype=torch.float32, output_loading_info=True)
        check_keys(source, "text tower", info)
        if not hasattr(model, "get_text_features"):
            return None
        with expected_in(source, "tokenizer.json and tokenizer_config.json"):
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)
            if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
                raise ValueError("a tokenizer without words: what transformers builds for some models where there are no files")
    for other in ("vision_model", "audio_model"):
        if hasattr(model, other):
            setattr(model, other, None)
    longest = text_config.max_position_embeddings
    if config.model_type == "clap":
        longest -= text_config.pad_token_id + 1  # RoBERTa counts positions from there
    return model, tokenizer, longest


# Builder of the encoder → loader of its text tower: name → tokenize, module, projection or None.
TEXT_TOWERS = {build_clip: _load_clip_text, build_openclip: _load_openclip_text, build_hf: _load_hf_text, build_clap: _load_hf_text}
