"""What predict.py says and writes: captions on the screen, and as .csv, .json or .jsonl."""

from common import replace_file


def write_captions(path, ids, names, columns, captions):
    """Write captions by the suffix of `path`.

    ids, names: one an image; columns: the checkpoints; captions: [checkpoint][image] → list of (text, score).
    """
    import json

    rows = [
        {"image_id": image_id, "file": name, "checkpoint": column, "rank": rank, "caption": text, "score": round(score, 6)}
        for image, (image_id, name) in enumerate(zip(ids, names))
        for column, of_checkpoint in zip(columns, captions)
        for rank, (text, score) in enumerate(of_checkpoint[image], start=1)
    ]
    with replace_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        if path.endswith(".jsonl"):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif path.endswith(".json"):
            results = [{"image_id": row["image_id"], "caption": row["caption"]} for row in rows if row["rank"] == 1]
            json.dump(results, file, ensure_ascii=False)
        else:
            import csv

            writer = csv.writer(file)
            # One line an image and rank, one column a checkpoint.
            scores = [f"score {column}" if len(columns) > 1 else "score" for column in columns]
            texts = list(columns) if len(columns) > 1 else ["caption"]
            writer.writerow(["image_id", "file", "rank", *(heading for pair in zip(texts, scores) for heading in pair)])
            for image, (image_id, name) in enumerate(zip(ids, names)):
                for rank in range(len(captions[0][image])):
                    cells = [cell for of_checkpoint in captions for cell in of_checkpoint[image][rank]]
                    writer.writerow([image_id, name, rank + 1, *cells])


def print_captions(names, columns, captions, num_captions):
    """Show captions on the screen, with scores when there are several an image."""
    for image, name in enumerate(names):
        print(name)
        for column, of_checkpoint in zip(columns, captions):
            label = f"  {column}: " if len(columns) > 1 else "  "
            for text, score in of_checkpoint[image]:
                print(f"{label}{text}" + (f"  ({score:.3f})" if num_captions > 1 else ""))
