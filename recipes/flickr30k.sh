#!/usr/bin/env bash
# Goal        Flickr30k captions, like CLIPxGPT S: Hugging Face's CLIP ViT-B/32 before its projection, and a mapper of
#             6 encoder layers (16 heads, P = 4). Of GPT-2 the embeddings, the first block, the last block and the
#             final norm are tuned.
# Hardware    one GPU. The published run took about 33 hours on a P100.
# Data        Flickr30k, 31,783 pictures with 158,915 captions. Ask for it at
#             https://shannon.cs.illinois.edu/DenotationGraph/, or get it from Kaggle:
#               kaggle datasets download -d hsankesara/flickr-image-dataset -p data/flickr30k --unzip
# Published   no score. Its loss could not fall below 9.82.
# Ours        not run here; needs Flickr30k and a GPU.
# Otherwise   The loss is taken on logits, positions are added once, each image is its own sequence, every token is
#             learned, and the 84 / 13 / 3 split is by image. The rate is the effective published one: 3e-3 was
#             multiplied with itself, which gave a peak of 9e-6 after a third of the epochs. It belonged to another
#             loss, so also try a higher one (--lr 1e-4, or --mapper_lr for the mapper alone).
#
#   bash recipes/flickr30k.sh          run it from the root of the repository; to resume, run it again
set -euo pipefail
METRICS=${METRICS:-bleu meteor rouge cider}
SMOKE=${RECIPE_SMOKE:+--max_steps 3 --log_every 1 --device cpu} # RECIPE_SMOKE=1: a trial of three steps
OUT=checkpoints/${RECIPE_SMOKE:+smoke_}flickr30k
ENCODER=hf:openai/clip-vit-base-patch32
FEATURES=data/flickr30k/oscar_split_hf_openai_clip-vit-base-patch32

[ -e ${FEATURES}_test.pkl ] || python parse_flickr.py --clip_model_type $ENCODER --val_share 0.13 --test_share 0.03
python check.py ${FEATURES}_{train,val,test}.pkl || [ -n "${GO_ON:-}" ] # stops at a problem, unless GO_ON=1

python train.py --data ${FEATURES}_train.pkl --val_data ${FEATURES}_val.pkl --out_dir $OUT --tune ends \
  --mapping_type encoder --num_layers 6 --prefix_length 4 \
  --epochs 150 --bs 64 --lr 9e-6 --warmup_ratio 0.33 --clip_grad 1.3 --keep_last 3 --resume $SMOKE

python evaluate.py --data ${FEATURES}_test.pkl --checkpoint $OUT/coco_prefix_best.pt --decoding greedy --entry_length 40 \
  --metrics $METRICS --out $OUT/test.json
