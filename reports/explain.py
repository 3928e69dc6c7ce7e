"""What a captioner looks at: which prefix vector each word of a caption attends to, and which words each prefix vector resembles.

P prefix_length, T tokens of the caption, E language-model width, V vocabulary.
"""

LAST_LAYERS = 4  # attention is averaged over so many of the last layers
NEAREST = 3  # words named for each prefix vector


def explain_caption(model, clip_embedding, caption):
    """→ dict with words (T str), attention (float32 [T, P], rows add up to 1) and nearest (P lists of (word, cosine)).

    model: a captioner with encode_prefix, gpt and tokenizer; clip_embedding: [1, D]; caption: str of at least one token.
    A row is the attention of the position that the word is predicted at, mean over heads and the last layers, to the prefix alone.
    The language model computes with eager attention meanwhile, since the fused one gives no weights.
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
    nearest = [
        [(tokenizer.decode([token]).strip(), value) for token, value in zip(*row)] for row in zip(tokens.tolist(), values.tolist())
    ]
    return {"words": [tokenizer.decode([token]).strip() for token in ids], "attention": attention.cpu().numpy(), "nearest": nearest}
