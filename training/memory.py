"""How much memory a step will take, worked out before the first one."""

FLOAT32 = 4  # bytes; weights, gradients and AdamW's two averages are float32 whatever the precision


def estimate_memory(model, data, options, precision, device="cpu"):
    """Estimate the most memory a step holds at once → dict of bytes: peak, weights, gradients, optimiser, activations; None where
    the language model cannot be followed without computing.

    Activations are counted by running one batch of the run on tensors without content, which costs neither memory nor arithmetic.
    """
    weights = sum(parameter.numel() for parameter in model.parameters()) * FLOAT32
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    counted = count_activations(model, data, options, precision, device)
    if counted is None:
        return None
    activations, logits = counted
    gradients, optimiser = sum(trained) * FLOAT32, 2 * sum(trained) * FLOAT32
    # The backward pass begins with all activations, the logits' gradient and the largest weight's; it ends with all gradients. While
    # it runs, freed activations leave gaps that gradients fill in part only: half of them come on top, as measured with GPT-2.
    begins = activations + 2 * logits + max(trained) * FLOAT32 + gradients // 2
    ends = gradients + max(trained) * FLOAT32
    peak = weights + optimiser + max(begins, ends)
    return {"peak": peak, "weights": weights, "gradients": gradients, "optimiser": optimiser, "activations": activations}


def count_activations(model, data, options, precision, device="cpu"):
    """Bytes that the forward pass of one batch keeps for the backward pass, and bytes of its logits; None where it cannot be told."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from features.packing import plan_epoch
    from models.tuning import find_blocks

    numbers = plan_epoch(data.caption_rows, options.bs, options.sampling)[0]
    batch = data.pack(numbers[: -(-len(numbers) // options.accumulate)])
    kept = {}  # storage → its bytes and the tensor, which is held so that no other takes its place

    def count(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    was_training = model.training
    states = torch.get_rng_state()
    device = torch.device(device)
    autocast = torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16, enabled=precision != "no")

    def without_content(tensor):
        return mode.from_tensor(tensor.detach()).to(device).requires_grad_(tensor.requires_grad)

    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = type(batch)(**{name: without_content(t) if hasattr(t, "to") else t for name, t in vars(batch).items()})
            own = {name: without_content(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
            model.train()
            with autocast, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                torch.func.functional_call(model, own, (fake,))
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    finally:
        model.train(was_training)
        torch.set_rng_state(states)
    weights = {tensor.untyped_storage()._cdata for tensor in own.values()}
    activations = sum(size for storage, (size, _) in kept.items() if storage not in weights)
    if options.gradient_checkpointing:
        blocks = len(find_blocks(model.gpt)[1])
        width = model.gpt.get_input_embeddings().weight.shape[1]
        activations = activations // blocks + blocks * batch.input_ids.numel() * width * FLOAT32
    return activations, len(batch.labels) * model.gpt.get_output_embeddings().weight.shape[0] * FLOAT32
