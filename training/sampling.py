"""A fixed sample of validation images, captioned greedily at each validation: CIDEr, how many captions differ, how many end."""

import numpy as np

from training.compiling import uncompiled

SHOWN = 6  # sample captions in the table
BATCH = 50  # images decoded at once
TOKENISER = "plain tokeniser: set beside other validations, not beside published scores"


class CaptionSample:
    """Images drawn once, the same at every validation and in every run on the same data, with their references as words."""

    def __init__(self, data, count):
        """data: training.data.CaptionData; count: images, at most."""
        from evaluation.tokens import tokenize_plain

        captions, rows = data.features.captions, np.unique(data.caption_rows)
        if count < len(rows):
            rows = np.sort(np.random.default_rng(0).choice(rows, count, replace=False))
        numbers = np.flatnonzero(np.isin(data.caption_rows, rows))
        self.embeddings = data.features.clip_embedding[rows.tolist()]
        self.about, references = {}, {int(row): [] for row in rows}
        for number in numbers.tolist():
            caption, row = captions[number], int(data.caption_rows[number])
            self.about.setdefault(row, {name: caption[name] for name in ("image_id", "file_name") if name in caption})
            references[row].append(caption["caption"])
        self.texts = list(references.values())
        self.references = [tokenize_plain(several) for several in self.texts]

    def score(self, model):
        """Caption the sample → dict of figures, and rows of the table (step and epoch are the caller's to add).

        Figures: val_cider (CIDEr-D against these images' references), val_captions (how many), val_distinct and
        val_distinct_references (different captions, different first references), val_ended (share that ended by the stop token).
        Leaves the model in eval mode and may move the random generators.
        """
        from evaluation.metrics import score_cider
        from evaluation.tokens import tokenize_plain
        from models.decoding import generate

        decoded = []
        with uncompiled(model):
            for start in range(0, len(self.embeddings), BATCH):
                chunk = self.embeddings[start : start + BATCH].float()
                decoded += [several[0] for several in generate(model, chunk, "greedy", return_ended=True, seed=0)]
        texts = [text for text, _, _ in decoded]
        words = tokenize_plain(texts)
        cider = score_cider(words, self.references)
        figures = {
            "val_cider": float(cider.value),
            "val_captions": len(words),
            "val_distinct": len(set(words)),
            "val_distinct_references": len({several[0] for several in self.references}),
            "val_ended": sum(ended for _, _, ended in decoded) / len(decoded),
        }
        rows = [
            {**about, "reference": several[0], "caption": text, "cider": round(float(score), 4)}
            for about, several, text, score in zip(self.about.values(), self.texts, texts, cider.per_image)
        ]
        return figures, rows[:SHOWN]


def format_samples(rows, width=52):
    """The table of sample captions as lines of text: image_id, reference, caption."""

    def cut(text):
        text = " ".join(str(text).split()).encode("utf-8", "replace").decode()
        return text if len(text) <= width else text[: width - 1] + "…"

    lines = [f"  {'image_id':<14} {'reference':<{width}} caption"]
    return lines + [f"  {cut(row['image_id'])[-14:]:<14} {cut(row['reference']):<{width}} {cut(row['caption'])}" for row in rows]
