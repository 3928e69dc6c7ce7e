#!/usr/bin/env bash
# Goal        captions in the manner of your own data, here pictures of food: the COCO model (MLP mapper, tuned GPT-2) tuned further.
# Hardware    one GPU of 8 GB or more.
# Data        Kaggle's food pictures with captions, unpacked to data/food/archive/Captions.csv and data/food/archive/dataset/{Index}.jpg
#             (its page gives the size); captions under 240 characters. Or your own folder: FOOD=my_food, see docs/your-own-data.md.
#             The weights it starts from come by themselves, or lie at data/weights/coco_weights.pt.
# Published   no number
# Ours        not run here: needs the food set, the COCO weights and a GPU
# Otherwise   the published lines train on everything, from GPT-2 as it comes; here one picture in ten is kept apart. It picks the epoch and
#             is scored on too, since there are no more parts: for a paper, keep a third one.
#
#   bash recipes/food.sh          from the repository's root; started again, it goes on where it stopped
set -euo pipefail
METRICS=${METRICS:-bleu meteor rouge cider}
SMOKE=${RECIPE_SMOKE:+--max_steps 3 --log_every 1 --device cpu} # RECIPE_SMOKE=1: three steps, to see that every line runs
OUT=checkpoints/${RECIPE_SMOKE:+smoke_}food
FOOD=${FOOD:-data/food}
TRAIN=data/food_ViT-B_32_train.pkl
VAL=data/food_ViT-B_32_val.pkl

[ -e $TRAIN ] || python parse_food.py --clip_model_type ViT-B/32 --data_path "$FOOD" --train_size 0.9 --out $TRAIN
python check.py $TRAIN $VAL || [ -n "${GO_ON:-}" ] # stops at a problem; GO_ON=1 goes on in spite of it

python train.py --data $TRAIN --val_data $VAL --out_dir $OUT --init_from coco \
  --epochs 10 --bs 40 --lr 2e-5 --warmup_ratio 0.1 --resume $SMOKE

python evaluate.py --data $VAL --checkpoint $OUT/coco_prefix_best.pt --metrics $METRICS --out $OUT/val.json
