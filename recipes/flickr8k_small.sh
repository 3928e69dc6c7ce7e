#!/usr/bin/env bash
# Goal        a captioner of real photographs from a thousand of them, on two CPU cores: EfficientNet-Lite2 features, a
#             linear mapper, and SmolLM2-135M with LoRA, which also reads captions of similar photographs.
# Hardware    two CPU cores, 6 GB of memory. TIME
# Data        Flickr8k, or any folder that parse_folder.py reads. Get Flickr8k with:
#               python data/download.py flickr8k
#             `python -m demo.real --photos FOLDER` brings encoder and language model and runs this recipe. Where a hub is
#             in reach, ENCODER=ViT-B/32 LANGUAGE_MODEL=gpt2 needs nothing.
# Published   nothing; docs/small-captioner.md says which settings were tried.
# Ours        RESULT
# Otherwise   TRAIN and VAL are folders of photographs, OUT is where everything goes. Without VAL one photograph in ten is
#             held out.
#
#   bash recipes/flickr8k_small.sh          run it from the root of the repository; to resume, run it again
set -euo pipefail
TRAIN=${TRAIN:-data/flickr8k}
VAL=${VAL:-}
ENCODER=${ENCODER:-timm:data/weights/tf_efficientnet_lite2}
LANGUAGE_MODEL=${LANGUAGE_MODEL:-data/weights/smollm2-135m}
OUT=${OUT:-checkpoints/${RECIPE_SMOKE:+smoke_}flickr8k_small}
METRICS=${METRICS:-bleu meteor rouge cider}
SMOKE=${RECIPE_SMOKE:+--max_steps 3 --log_every 1 --device cpu} # RECIPE_SMOKE=1: a trial of three steps
