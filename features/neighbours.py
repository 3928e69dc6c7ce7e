"""The nearest images by cosine, exactly: over a GPU or a few rows with plain torch, over many rows on a CPU with faiss. D width."""

import numpy as np

from features.embeddings import BLOCK_BYTES

QUERIES = ROWS = 4096  # at most this many queries and rows are compared together by torch
FAISS_FROM = 100_000  # rows; its search keeps the best rows as it goes, and never writes the whole table of cosines
FAISS_ROWS = 65_536  # rows compared together by faiss


def find_nearest(queries, rows_of_queries, embeddings, rows, count, device="cpu"):
    """Find the nearest images by cosine, the nearest first. Files stay mapped: a block of each side is in memory at a time.

    Args:
        queries: [*, D] or [*, L, D] tensor or MappedEmbeddings. Of several embeddings per image the sum is compared.
        rows_of_queries: N ints, rows of `queries`.
        embeddings: the same of the images to find.
        rows: int64 [T], rows of `embeddings` that may be found.
        count: images to find for each query, at most T.
        device: where torch compares.

    Returns:
        int64 array [N, count] of places in `rows`.
    """
    import torch

    device = torch.device(device)
    with_faiss = device.type == "cpu" and len(rows) > FAISS_FROM
    find, most = (_find_with_faiss, FAISS_ROWS) if with_faiss else (_find_with_torch, ROWS)
    found = [np.empty((0, count), np.int64)]
    for wanted in _slices(rows_of_queries, queries, QUERIES):
        query = unit_vectors(queries, wanted).to(device)
        best = torch.empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64)  # cosines, places
        start = 0
        for block in _slices(rows, embeddings, most):
            cosines, places = find(query, unit_vectors(embeddings, block).to(device), min(count, len(block)))
            cosines, places = torch.cat([best[0], cosines.cpu()], 1), torch.cat([best[1], places.cpu() + start], 1)
            order = cosines.argsort(dim=1, descending=True, stable=True)[:, :count]
            best = cosines.gather(1, order), places.gather(1, order)
            start += len(block)
        found.append(best[1].numpy())
    return np.concatenate(found)


def _find_with_torch(query, vectors, count):
    """Find the `count` rows of vectors [n, D] with the highest products. Returns products and row numbers, [N, count] each."""
    return (query @ vectors.T).topk(count, dim=1)


def _find_with_faiss(query, vectors, count):
    """Do what _find_with_torch does, by faiss' exact search."""
    import faiss
    import torch

    products, places = faiss.knn(query.numpy(), vectors.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(products), torch.from_numpy(places)


def _slices(rows, embeddings, most):
    """Cut rows into arrays of at most `most`, whose embeddings are tens of megabytes."""
    size = min(most, max(1, BLOCK_BYTES // (4 * int(np.prod(embeddings.shape[1:])))))
    rows = np.asarray(rows, np.int64)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def unit_vectors(embeddings, rows):
    """Read rows as float32 [n, D] of norm 1; a vector of zeros stays as it is."""
    import torch

    vectors = embeddings[torch.from_numpy(rows)].float()
    vectors = vectors.sum(1) if vectors.ndim == 3 else vectors
    return torch.nn.functional.normalize(vectors / vectors.abs().amax(1, keepdim=True).clamp_min(1e-30), dim=1)
