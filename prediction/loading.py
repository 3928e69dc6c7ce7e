"""Captioners and their encoders, loaded as the checkpoints say. predict.py, evaluate.py and the page share this."""

from pathlib import Path

from common import UserError
from prediction.datastores import attach_stores


def load_captioner(path, gpt2_type, device, mixed_precision):
    """Load a checkpoint, its language model in the precision that was asked for, and switch it to faster operators.

    Args:
        path: as models.checkpoints.load_checkpoint takes it, or a folder that `python -m models.hub export` wrote.
        gpt2_type: language model instead of the checkpoint's, or None. An exported folder holds its own.
        device: torch.device.
        mixed_precision: "no", "bf16" or "fp16".

    Returns:
        ClipCaptionModel.
    """
    import torch

    from models.checkpoints import load_checkpoint
    from models.hub import CONFIG, WEIGHTS, HubCaptionModel
    from models.operators import accelerate_model

    if (Path(path) / CONFIG).is_file() and (Path(path) / WEIGHTS).is_file():
        model = HubCaptionModel.from_pretrained(path).to(device)
    else:
        model = load_checkpoint(path, gpt2_type, device)
    if mixed_precision != "no":
        model.gpt.to({"bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision])
    if model.base_captioner is not None:
        accelerate_model(model.base_captioner.model)
    return accelerate_model(model)


def load_models(checkpoints, options, device, say):
    """Load every checkpoint and the texts it consults, and say what a published file was recognized as.

    Args:
        checkpoints: as load_captioner takes them.
        options: what prediction.captions.add_running_options and prediction.datastores.add_store_options read.
        device: torch.device.
        say: function that takes one line.

    Returns:
        List of ClipCaptionModel.
    """
    from models.published.recognise import OURS

    models = [load_captioner(path, options.gpt2_type, device, options.mixed_precision) for path in checkpoints]
    for model, checkpoint in zip(models, checkpoints):
        if model.origin.kind != OURS:
            say(f"{checkpoint}: recognized as {model.origin.kind}")
    attach_stores(models, checkpoints, options.datastore, options.memory)
    return models


def load_encoders(models, checkpoints, audio, encoder_names, device):
    """Load each model's encoder, once where several models share it.

    Args:
        models: list of ClipCaptionModel.
        checkpoints: what each is called in an error.
        audio: each model's sound settings, None for captioners of pictures.
        encoder_names: for each the encoder to use instead of its own, or None.
        device: torch.device.

    Returns:
        List of Encoder and SoundEncoder.

    Raises:
        UserError: a checkpoint names no encoder, or the encoder does not fit it.
    """
    from features.audio import sound_encoder
    from models.encoders import load_encoder
    from models.operators import accelerate_model

    loaded, encoders = {}, []
    for model, checkpoint, of_sounds, encoder_name in zip(models, checkpoints, audio, encoder_names):
        name = encoder_name or model.origin.encoder or model.config.encoder
        if name is None:
            raise UserError(f"{checkpoint} does not name its encoder. Give --clip_model_type, such as ViT-B/32.")
        spectrogram, pooling = of_sounds and of_sounds["spectrogram"], model.config.pooling
        key = (name, spectrogram, pooling)
        if key not in loaded:
            encoder = load_encoder(name, device, pooling="pooled" if spectrogram else pooling)
            accelerate_model(encoder.module)
            loaded[key] = sound_encoder(encoder, spectrogram, pooling) if spectrogram else encoder
        width, expected = loaded[key].width, model.config.clip_width
        if width != expected:
            needs = f"{checkpoint} needs {expected}-wide ones ({model.config.encoder or 'encoder unknown'})"
            raise UserError(f"{name} gives {width}-wide embeddings; {needs}. Give that encoder as --clip_model_type, or leave it out.")
        encoders.append(loaded[key])
    return encoders
