#!/usr/bin/env bash
# Goal        a captioner of real photographs from a thousand of them, on a CPU: EfficientNet-Lite2 features, a linear
#             mapper, and SmolLM2-135M with LoRA.
# Hardware    two CPU cores and 8 GB of memory, or PROCESSES=1 and 5 GB. 800 photographs took 25 minutes on two cores with bf16
#             (Intel, AMX), 39 with one process on one core with bf16 (AMD), and 56 with one process on two cores without (Intel);
#             all before samples joined the beams, which adds some 8.
# Data        Flickr8k, or any folder that parse_folder.py reads. Get Flickr8k with:
#               python data/download.py flickr8k
#             `make real PHOTOS=FOLDER` brings encoder and language model and runs this recipe. Where a hub is in reach,
#             ENCODER=ViT-B/32 LANGUAGE_MODEL=gpt2 needs nothing.
# Published   nothing; docs/small-captioner.md says what was tried.
# Ours        800 photographs of Flickr8k, three times another 100 held out: CIDEr 39.7, 44.9 (three seeds) and 45.4, with
#             samples beside the beams 46.2; copied captions 28.8, 30.2 and 25.9.
# Otherwise   TRAIN and VAL are folders of photographs, OUT is where everything goes. Without VAL one photograph in ten is
#             held out.
#
#   bash recipes/flickr8k_small.sh          run it from the root of the repository; to resume, run it again
set -euo pipefail
TRAIN=${TRAIN:-data/flickr8k/Flickr8k.token.txt} # annotations of Flickr, or a folder for parse_folder.py
VAL=${VAL:-}                                     # such a folder of held-out photographs
ENCODER=${ENCODER:-timm:data/weights/tf_efficientnet_lite2}
LANGUAGE_MODEL=${LANGUAGE_MODEL:-data/weights/smollm2-135m}
OUT=${OUT:-checkpoints/${RECIPE_SMOKE:+smoke_}flickr8k_small}
METRICS=${METRICS:-bleu meteor rouge cider}
SEED=${SEED:-0}
PROCESSES=${PROCESSES:-$(python -c 'import os, torch; print(torch.cuda.device_count() or min(2, os.cpu_count()))')} # train together
if [ "$PROCESSES" = 1 ]; then TRAINER=python; else TRAINER="python -m training.launch $PROCESSES"; fi
SMOKE=${RECIPE_SMOKE:+--max_steps 3 --log_every 1 --device cpu} # RECIPE_SMOKE=1: a trial of three steps
FEATURES=$OUT/features

mkdir -p "$OUT"
if [ -e ${FEATURES}_train.pkl ] && [ -e ${FEATURES}_val.pkl ]; then
  echo "features are there"
elif [ ! -d "$TRAIN" ]; then
  python parse_flickr.py --annotations "$TRAIN" --clip_model_type "$ENCODER" --val_share 0.1 --test_share 0 --out $FEATURES.pkl
elif [ -z "$VAL" ]; then
  python parse_folder.py "$TRAIN" --clip_model_type "$ENCODER" --out ${FEATURES}_train.pkl
else
  python parse_folder.py "$TRAIN" --clip_model_type "$ENCODER" --val_share 0 --out ${FEATURES}_train.pkl
  python parse_folder.py "$VAL" --split val --clip_model_type "$ENCODER" --out ${FEATURES}_val.pkl
fi
python check.py ${FEATURES}_{train,val}.pkl || [ -n "${GO_ON:-}" ] # stops at a problem, unless GO_ON=1

$TRAINER train.py --data ${FEATURES}_train.pkl --val_data ${FEATURES}_val.pkl --out_dir "$OUT" --language_model "$LANGUAGE_MODEL" \
  --mapping_type linear --tune lora --lora_dropout 0 --lr 3e-4 --mapper_lr 5e-4 --weight_decay 0.01 --epochs 5 \
  --best_by cider --seed "$SEED" --resume $SMOKE

CAPTIONER="$OUT"/coco_prefix_average.pt # of the last three epochs, so that no epoch is chosen on the photographs to be scored
python -m models.average "$OUT"/coco_prefix-[0-9]*.pt --last 3 --out "$CAPTIONER"
DECODING="--length_penalty 0 --beam_size 10 --rerank train --rerank_samples 20 --train_data ${FEATURES}_train.pkl"
python evaluate.py --data ${FEATURES}_val.pkl --checkpoint "$CAPTIONER" --metrics $METRICS $DECODING \
  --baseline nearest --out "$OUT"/val.json
python predict.py --data ${FEATURES}_val.pkl --checkpoint "$CAPTIONER" $DECODING --num_captions 5 \
  --out "$OUT"/captions.json
