#!/usr/bin/env bash
# Goal        captions as of Instagram posts: adapters of rank 16 (RANK=4, RANK=64 are the other published ones) on the COCO model's GPT-2,
#             its mapper tuned beside them.
# Hardware    one GPU; train.py says how much memory it will take before the first step.
# Data        kkcosmos/instagram-images-with-captions of the Hugging Face hub (its page gives the size), fetched by the first command; or a
#             copy of it: DATASET=folder. The weights it starts from come by themselves, or lie at data/weights/coco_weights.pt.
# Published   no number: captions side by side, rated by eye
# Ours        not run here: needs the data set, the COCO weights and a GPU
# Otherwise   starts from the COCO weights, and the adapters are saved and used; theirs stood on a random, frozen mapper and were dropped
#             when predicting. The rate is theirs; adapters usually want more (--lr 1e-4 --mapper_lr 1e-5). A twentieth of the
#             training part picks the epoch; theirs was picked on the test part.
#
#   bash recipes/instagram_lora.sh          from the repository's root; started again, it goes on where it stopped
set -euo pipefail
METRICS=${METRICS:-bleu meteor rouge cider}
SMOKE=${RECIPE_SMOKE:+--max_steps 3 --log_every 1 --device cpu} # RECIPE_SMOKE=1: three steps, to see that every line runs
OUT=checkpoints/${RECIPE_SMOKE:+smoke_}instagram_lora
DATASET=${DATASET:-kkcosmos/instagram-images-with-captions}
FEATURES=data/instagram/ViT-B_32

[ -e ${FEATURES}_train.pkl ] || python parse_huggingface.py "$DATASET" --val_share 0.05 --out ${FEATURES}_train.pkl # and …_val.pkl
[ -e ${FEATURES}_test.pkl ] || python parse_huggingface.py "$DATASET" --split test --out ${FEATURES}_test.pkl
python check.py ${FEATURES}_{train,val,test}.pkl || [ $? -eq 1 ] # goes on at a problem: posts are longer than captions are

python train.py --data ${FEATURES}_train.pkl --val_data ${FEATURES}_val.pkl --out_dir $OUT --init_from coco --tune lora \
  --lora_rank ${RANK:-16} --lora_alpha 16 --lora_dropout 0.1 --lora_targets c_attn,c_proj,c_fc \
  --epochs 1 --bs 40 --lr 1e-5 --warmup_ratio 0.1 --weight_decay 0.01 --resume $SMOKE

python evaluate.py --data ${FEATURES}_test.pkl --checkpoint $OUT/coco_prefix_best.pt --metrics $METRICS --out $OUT/test.json
