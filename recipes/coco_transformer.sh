#!/usr/bin/env bash
# Goal        COCO captions with a transformer mapper and a frozen GPT-2: the paper's second variant
#             (arXiv:2111.09734), in the form of the released weights. RN50x4 features, normalized, P = K = 40, 8
#             layers, 57.5M trained parameters.
# Hardware    one GPU of 8 GB or more. A CPU takes days (recipes/README.md).
# Data        COCO 2014, 20 GB. 113,287 pictures with 566,747 captions to train on, and 5,000 pictures each for val
#             and test (Karpathy's splits). train and restval together are the published train_caption.json. Get them
#             with:
#               python data/download.py coco2014 karpathy
# Published   test, beam 5: BLEU-4 33.53, METEOR 27.45, CIDEr 113.08, SPICE 21.05. These are for 43M trained
#             parameters, which means P = K = 10 (LENGTH=10). Other people's runs of the same code: CIDEr 105.7, 91.6,
#             90.9, 66.3.
# Ours        not run here; needs COCO and a GPU.
# Otherwise   The published run had no validation and took the last epoch. This one takes the best epoch on val and
#             scores on test.
#
#   bash recipes/coco_transformer.sh          run it from the root of the repository; to resume, run it again
set -euo pipefail
METRICS=${METRICS:-bleu meteor rouge cider spice}
SMOKE=${RECIPE_SMOKE:+--max_steps 3 --log_every 1 --device cpu} # RECIPE_SMOKE=1: a trial of three steps
OUT=checkpoints/${RECIPE_SMOKE:+smoke_}coco_transformer
KARPATHY=data/coco/annotations/dataset_coco.json
FEATURES=data/coco/oscar_split_RN50x4
LENGTH=${LENGTH:-40}

[ -e ${FEATURES}_train.pkl ] || python parse_coco.py --clip_model_type RN50x4 --annotations $KARPATHY --split train restval
[ -e ${FEATURES}_val.pkl ] || python parse_coco.py --clip_model_type RN50x4 --annotations $KARPATHY --split val
[ -e ${FEATURES}_test.pkl ] || python parse_coco.py --clip_model_type RN50x4 --annotations $KARPATHY --split test
python check.py ${FEATURES}_{train,val,test}.pkl || [ -n "${GO_ON:-}" ] # stops at a problem, unless GO_ON=1

python train.py --data ${FEATURES}_train.pkl --val_data ${FEATURES}_val.pkl --out_dir $OUT --only_prefix --is_rn --normalize_prefix \
  --mapping_type transformer --num_layers 8 --prefix_length $LENGTH --prefix_length_clip $LENGTH \
  --epochs 10 --bs 40 --lr 2e-5 --warmup_steps 5000 --resume $SMOKE

python evaluate.py --data ${FEATURES}_test.pkl --checkpoint $OUT/coco_prefix_best.pt --metrics $METRICS --out $OUT/test.json
