"""Training on texts alone (models/texts.py): the data is checked, the gap to pictures measured, pictures to validate on brought over."""

import dataclasses

from common import UserError


def describe_text_training(options, features, device="cpu"):
    """Settle how a run on texts is done; on pictures or sounds there is nothing to settle.

    Args:
        options: options of train.py.
        features: Features of the training data.
        device: where the encoder's projection runs, if it has one.

    Returns:
        Dict for config.text_training; None where the data is not of texts.

    Raises:
        UserError: options for texts without texts, texts that are not normalised, or pictures of another encoder.
    """
    from models.texts import NOISE_VARIANCE, unnormalized_row

    if not features.kind.are_texts:
        given = [f"--{name}" for name in ("noise_variance", "modality_offset") if getattr(options, name) is not None]
        if given:
            raise UserError(
                f"{given[0]} is for training on texts; {options.data[0]} holds no embeddings of texts. Make them with parse_text.py."
            )
        return None
    row = unnormalized_row(features.clip_embedding[:])
    if row is not None:
        raise UserError(f"{options.data[0]} holds a text embedding {row} that is not normalised. Make the file again with parse_text.py.")
    variance = NOISE_VARIANCE if options.noise_variance is None else options.noise_variance
    picture_width = features.meta.get("picture_width")
    offset = measure_offset(options.modality_offset, features, device) if options.modality_offset else None
    return {"noise_variance": variance, "modality_offset": offset, "picture_width": picture_width}


def measure_offset(path, texts, device="cpu"):
    """Measure the mean of normalised embeddings of pictures, less that of texts.

    Args:
        path: feature file or folder of pictures (or sounds) of the texts' encoder; their captions are not looked at.
        texts: Features of texts.
        device: where the encoder's projection runs, if it has one.

    Returns:
        List of J floats.

    Raises:
        UserError: the file cannot be read, or is of another encoder.
    """
    from torch.nn.functional import normalize

    from features.content import check_compatible
    from features.store import load_features
    from models.encoders.text import load_projection

    pictures = load_features(path)
    check_compatible(pictures.kind, texts.image_kind, path, "--data")
    shared = pictures.clip_embedding[:].float()
    if texts.meta.get("picture_width"):
        shared = load_projection(texts.meta["encoder"], device)(shared).cpu()
    offset = normalize(shared, dim=-1).mean(0) - normalize(texts.clip_embedding[:].float(), dim=-1).mean(0)  # [J]
    return offset.tolist()


def in_text_space(features, model):
    """Bring pictures to validate on into the space of the texts that a model is trained on; other features stay as they are.

    Args:
        features: Features.
        model: ClipCaptionModel.

    Returns:
        Features.
    """
    from models.texts import to_text_space

    if model.config.text_training is None or features.kind.are_texts:
        return features
    return dataclasses.replace(features, clip_embedding=to_text_space(model, features.clip_embedding[:]).cpu())
