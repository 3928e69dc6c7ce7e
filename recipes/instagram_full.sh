#!/usr/bin/env bash
# Goal        captions like those of Instagram posts. Fine-tunes all of the COCO model (MLP mapper, tuned GPT-2).
# Hardware    one GPU. train.py prints how much memory it will take before the first step.
# Data        kkcosmos/instagram-images-with-captions on the Hugging Face hub; its page gives the size. The first
#             command downloads it; for a local copy set DATASET=folder. The COCO weights are downloaded too, or taken
#             from data/weights/coco_weights.pt.
# Published   no number; captions were compared side by side and rated by eye.
# Ours        not run here; needs the data set, the COCO weights and a GPU.
# Otherwise   A twentieth of the training part chooses the epoch; the published run chose it on the test part.
#             Captions are kept whole, not cut to 77 tokens.
#
#   bash recipes/instagram_full.sh          run it from the root of the repository; to resume, run it again
set -euo pipefail
METRICS=${METRICS:-bleu meteor rouge cider}
SMOKE=${RECIPE_SMOKE:+--max_steps 3 --log_every 1 --device cpu} # RECIPE_SMOKE=1: a trial of three steps
OUT=checkpoints/${RECIPE_SMOKE:+smoke_}instagram_full
DATASET=${DATASET:-kkcosmos/instagram-images-with-captions}
FEATURES=data/instagram/ViT-B_32

[ -e ${FEATURES}_train.pkl ] || python parse_huggingface.py "$DATASET" --val_share 0.05 --out ${FEATURES}_train.pkl # and ..._val.pkl
[ -e ${FEATURES}_test.pkl ] || python parse_huggingface.py "$DATASET" --split test --out ${FEATURES}_test.pkl
python check.py ${FEATURES}_{train,val,test}.pkl || [ $? -eq 1 ] # continues: posts are longer than captions

python train.py --data ${FEATURES}_train.pkl --val_data ${FEATURES}_val.pkl --out_dir $OUT --init_from coco --tune full \
  --epochs 5 --bs 64 --lr 1e-5 --warmup_ratio 0.1 --weight_decay 0.01 --resume $SMOKE

python evaluate.py --data ${FEATURES}_test.pkl --checkpoint $OUT/coco_prefix_best.pt --metrics $METRICS --out $OUT/test.json
