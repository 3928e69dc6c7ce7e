"""CLAP, a sound encoder of the Hugging Face hub: clap:REPO_OR_DIR."""

from common import UserError
from models.encoders.encoder import Tower, no_tokens
from models.encoders.hugging_face import check_keys, expected_in, quiet
from models.weights import load_from_library

AUDIO_FILES = "config.json, preprocessor_config.json and model.safetensors"


def build_clap(name, pooling):
    """clap:REPO_OR_DIR → Tower, D wide: CLAP's projected audio embedding, not normalised; modality "audio".

    Its preprocess takes one window of a waveform. Looked up as hf: names are.
    """
    import torch

    if pooling == "none":
        raise no_tokens(name)
    model, extractor = load_from_library(_load_audio, name.removeprefix("clap:"), "CLAP model", AUDIO_FILES)

    class Audio(torch.nn.Module):
        """Log-mel pictures [B, C, T, F] → [B, D]."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            # No window is longer than the model takes. transformers would mark one at random as such, and fuse it with its own crops.
            longer = torch.zeros(len(batch), 1, dtype=torch.bool, device=batch.device)
            return model(input_features=batch, is_longer=longer).audio_embeds

    preprocess = WaveformTransform(extractor)
    preprocessing = {
        "sample_rate": preprocess.sample_rate,
        "window_seconds": preprocess.most_samples / preprocess.sample_rate,
        "mel_bins": extractor.feature_size,
        "hop_length": extractor.hop_length,
        "fft_window": extractor.fft_window_size,
        "frequencies": [extractor.frequency_min, extractor.frequency_max],
        "mel_filters": "htk" if extractor.truncation == "fusion" else "slaney",
        "short_windows": extractor.padding,
    }
    return Tower(Audio().float().eval(), preprocess, preprocessing, model.config.projection_dim, "audio")


class WaveformTransform:
    """A window of a mono waveform, [T] float32 at sample_rate → float32 [C, T', F] log-mel. Holds no weights."""

    def __init__(self, extractor):
        self.extractor = extractor
        self.sample_rate = extractor.sampling_rate
        self.most_samples = int(extractor.nb_max_samples)

    def __call__(self, waveform):
        """Raises ValueError for what is not one channel, empty or not finite, and for more than CLAP takes: it would crop at random."""
        import numpy as np

        if isinstance(waveform, (str, bytes)) or not hasattr(waveform, "__len__"):
            raise ValueError(f"a {type(waveform).__name__}, not a waveform: this encoder takes sounds, cut into windows")
        waveform = np.asarray(waveform, np.float32)
        if waveform.ndim != 1 or not len(waveform):
            raise ValueError(f"a waveform of shape {waveform.shape}; expected one channel, [samples], at least one")
        if len(waveform) > self.most_samples:
            raise ValueError(f"a window of {len(waveform)} samples; CLAP takes {self.most_samples} at {self.sample_rate} Hz: cut it")
        if not np.isfinite(waveform).all():
            raise ValueError("a waveform with NaN or infinity")
        given = self.extractor(waveform, sampling_rate=self.sample_rate, return_tensors="pt")
        return given["input_features"][0].float()


def _load_audio(source, local_files_only):
    """→ transformers' ClapAudioModelWithProjection, its feature extractor"""
    import torch
    from transformers import AutoConfig, AutoFeatureExtractor, ClapAudioModelWithProjection

    with quiet():
        config = AutoConfig.from_pretrained(source, local_files_only=local_files_only)
        if not config.model_type.startswith("clap"):
            raise UserError(f"{source} is a {config.model_type}, not a CLAP model. For pictures write hf:{source}.")
        model, info = ClapAudioModelWithProjection.from_pretrained(
            source, config=getattr(config, "audio_config", config), local_files_only=local_files_only,
            dtype=torch.float32, output_loading_info=True,
        )  # fmt: skip
        check_keys(source, "CLAP audio tower", info)
        with expected_in(source, "preprocessor_config.json"):
            extractor = AutoFeatureExtractor.from_pretrained(source, local_files_only=local_files_only)
    return model, extractor
