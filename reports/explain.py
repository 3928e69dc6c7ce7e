"""What a captioner looks at: the prefix vectors that each word of a caption attends to, and the words that each prefix vector resembles.

P prefix_length, T tokens of the caption, E width of the language model, V vocabulary.
"""

LAST_LAYERS = 4  # attention is averaged over this many last layers
NEAREST = 3  # words named for each prefix vector


def explain_caption(model, clip_embedding, caption):
    """Measure what each token of a caption attends to.

    The attention is that of the position where the token is predicted, averaged over heads and the last layers, and limited to the
    prefix. The language model runs with eager attention meanwhile, because fused attention returns no weights.

    Args:
        model: a captioner with encode_prefix, gpt and tokenizer.
        clip_embedding: [1, D].
        caption: text of at least one token.

    Returns:
        dict with words (T str), attention (float32 array [T, P], each row sums to 1) and nearest (P lists of (word, cosine)).
    """
    import torch

    gpt, tokenizer = model.gpt, model.tokenizer
    table = gpt.get_input_embeddings().weight
    with torch.inference_mode():
        prefix = model.encode_prefix(clip_embedding.to(model.clip_device))  # [1, P, E]
        ids = tokenizer.encode(caption, add_special_tokens=False)
        embeds = torch.cat([prefix.to(table.dtype), table[ids][None]], dim=1)
        usual = gpt.config._attn_implementation
        gpt.set_attn_implementation("eager")
        try:
            layers = gpt(inputs_embeds=embeds[:, :-1], output_attentions=True, use_cache=False).attentions
        finally:
            gpt.set_attn_implementation(usual)
        length = prefix.shape[1]
        attention = torch.stack(layers[-LAST_LAYERS:]).float().mean((0, 1, 2))[length - 1 :, :length]  # [T, P]
        attention = attention / attention.sum(-1, keepdim=True)
        normalize = torch.nn.functional.normalize
        cosines = normalize(prefix[0].float(), dim=-1) @ normalize(table.float(), dim=-1).T  # [P, V]
        values, tokens = cosines.topk(NEAREST, dim=-1)
    nearest = [[(tokenizer.decode([token]).strip(), value) for token, value in zip(*row)] for row in zip(tokens.tolist(), values.tolist())]
    return {"words": [tokenizer.decode([token]).strip() for token in ids], "attention": attention.cpu().numpy(), "nearest": nearest}
