"""The captioner whose captions a prompted captioner quotes: it describes the image first (as published for Instagram)."""

from models.decoding import generate

ENTRY_LENGTH = 67  # tokens, as published


class BaseCaptioner:
    """A captioner in eval mode that captions embeddings greedily.

    It is no nn.Module on purpose: as an attribute of a captioner it is neither trained nor counted nor saved with it.

    Args:
        model: ClipCaptionModel. It is switched to eval mode here.
    """

    def __init__(self, model):
        self.model = model.eval()

    def caption(self, clip_embedding, batch_size=64):
        """Caption embeddings, on the device where they are.

        Args:
            clip_embedding: [B, D], as the prompted captioner gets them; the base captioner normalises by its own config.
            batch_size: images decoded at once.

        Returns:
            list of B str, stripped.
        """
        self.model.to(clip_embedding.device)
        texts = []
        for start in range(0, len(clip_embedding), batch_size):
            captions = generate(self.model, clip_embedding[start : start + batch_size], "greedy", entry_length=ENTRY_LENGTH)
            texts += [of_image[0][0].strip() for of_image in captions]
        return texts
