#!/usr/bin/env bash
# Goal        captions in the style of your own data, here pictures of food. Fine-tunes the COCO model (MLP mapper,
#             tuned GPT-2).
# Hardware    one GPU of 8 GB or more.
# Data        Kaggle's food pictures with captions, unpacked to data/food/archive/Captions.csv and
#             data/food/archive/dataset/{Index}.jpg (its page gives the size). Captions of 240 characters and more are
#             left out. For your own folder set FOOD=my_food; docs/your-own-data.md shows the layouts. The COCO
#             weights are downloaded, or taken from data/weights/coco_weights.pt.
# Published   no number.
# Ours        not run here; needs the food set, the COCO weights and a GPU.
# Otherwise   The published commands train on everything, starting from the plain GPT-2. Here one picture in ten is
#             held out. It chooses the epoch and is also scored on, because there is no third part. For a paper, keep
#             a third part.
#
#   bash recipes/food.sh          run it from the root of the repository; to resume, run it again
set -euo pipefail
METRICS=${METRICS:-bleu meteor rouge cider}
SMOKE=${RECIPE_SMOKE:+--max_steps 3 --log_every 1 --device cpu} # RECIPE_SMOKE=1: a trial of three steps
OUT=checkpoints/${RECIPE_SMOKE:+smoke_}food
FOOD=${FOOD:-data/food}
TRAIN=data/food_ViT-B_32_train.pkl
VAL=data/food_ViT-B_32_val.pkl

[ -e $TRAIN ] || python parse_food.py --clip_model_type ViT-B/32 --data_path "$FOOD" --train_size 0.9 --out $TRAIN
python check.py $TRAIN $VAL || [ -n "${GO_ON:-}" ] # stops at a problem, unless GO_ON=1

python train.py --data $TRAIN --val_data $VAL --out_dir $OUT --init_from coco \
  --epochs 10 --bs 40 --lr 2e-5 --warmup_ratio 0.1 --resume $SMOKE

python evaluate.py --data $VAL --checkpoint $OUT/coco_prefix_best.pt --metrics $METRICS --out $OUT/val.json
