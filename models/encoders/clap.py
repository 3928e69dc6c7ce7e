"""CLAP, a sound encoder of the Hugging Face hub: clap:REPO_OR_DIR."""

from common import UserError
from models.encoders.configs import check_folder
from models.encoders.encoder import Encoder, Family, call_module, no_tokens
from models.encoders.hugging_face import check_keys, expected_in, load_text, quiet, refuse_larger
from models.encoders.preprocess import Preprocess
from models.weights import load_from_library

AUDIO_FILES = "config.json, preprocessor_config.json and model.safetensors"


def build(name, pooling):
    """Build clap:REPO_OR_DIR: CLAP's projected audio embedding, not normalized.

    Its preprocess takes one window of a waveform. Weights are looked up as for hf: names.
    """
    import torch

    if pooling == "none":
        raise no_tokens(name)
    model, extractor = load_from_library(_load_audio, name.removeprefix("clap:"), "CLAP model", AUDIO_FILES)
    preprocessing = {
        "sample_rate": extractor.sampling_rate,
        "window_seconds": int(extractor.nb_max_samples) / extractor.sampling_rate,
        "mel_bins": extractor.feature_size,
        "hop_length": extractor.hop_length,
        "fft_window": extractor.fft_window_size,
        "frequencies": [extractor.frequency_min, extractor.frequency_max],
        "mel_filters": "htk" if extractor.truncation == "fusion" else "slaney",
        "short_windows": extractor.padding,
    }
    module, width = call_module(_encode, model), model.config.projection_dim
    return Encoder(name, width, torch.device("cpu"), WaveformTransform(extractor), preprocessing, module, modality="audio")


def _encode(model, batch):
    """Log-mel spectrograms [B, C, T, F] to [B, D]."""
    import torch

    # No window is longer than the model takes. transformers would mark one at random as longer, and fuse it with its own crops.
    longer = torch.zeros(len(batch), 1, dtype=torch.bool, device=batch.device)
    return model(input_features=batch, is_longer=longer).audio_embeds


class WaveformTransform(Preprocess):
    """A window of a mono waveform to a log-mel spectrogram; `transform` is transformers' feature extractor."""

    def __call__(self, waveform):
        """Preprocess one window.

        Args:
            waveform: [T] float32 at the extractor's rate.

        Returns:
            [C, T', F] float32.

        Raises:
            ValueError: what is not one channel, is empty or not finite, or is longer than CLAP takes (it would crop at random).
        """
        import numpy as np

        if not isinstance(waveform, (np.ndarray, list, tuple)):
            raise ValueError(f"a {type(waveform).__name__}, not a waveform: this encoder takes sounds, cut into windows")
        waveform = np.asarray(waveform, np.float32)
        rate, longest = self.transform.sampling_rate, int(self.transform.nb_max_samples)
        if waveform.ndim != 1 or not len(waveform):
            raise ValueError(f"a waveform of shape {waveform.shape}; expected one channel, [samples], at least one")
        if len(waveform) > longest:
            raise ValueError(f"a window of {len(waveform)} samples; CLAP takes {longest} at {rate} Hz: cut it")
        if not np.isfinite(waveform).all():
            raise ValueError("a waveform with NaN or infinity")
        return self.transform(waveform, sampling_rate=rate, return_tensors="pt")["input_features"][0].float()


def _load_audio(source, local_files_only):
    """Load transformers' ClapAudioModelWithProjection and its feature extractor."""
    import torch
    from transformers import AutoConfig, AutoFeatureExtractor, ClapAudioModelWithProjection

    with quiet():
        check_folder(source)
        config = AutoConfig.from_pretrained(source, local_files_only=local_files_only, trust_remote_code=False)
        if not config.model_type.startswith("clap"):
            raise UserError(f"{source} is a {config.model_type}, not a CLAP model. For images write hf:{source}.")
        if "audio_config" in config.sub_configs:
            config = config.audio_config
        refuse_larger(lambda: ClapAudioModelWithProjection(config), source)
        model, info = ClapAudioModelWithProjection.from_pretrained(
            source, config=config, local_files_only=local_files_only, dtype=torch.float32, output_loading_info=True
        )
        check_keys(source, "CLAP audio tower", info)
        with expected_in(source, "preprocessor_config.json"):
            extractor = AutoFeatureExtractor.from_pretrained(source, local_files_only=local_files_only, trust_remote_code=False)
    return model, extractor


FAMILY = Family(
    pattern="clap:REPO_OR_DIR",
    about="CLAP, for sounds; projected audio embedding of a window of at most 10 s",
    width="512",
    build=build,
    load_text=load_text,
    takes_folder=lambda config: str(config.get("model_type")).startswith("clap"),
    modality="audio",
)
