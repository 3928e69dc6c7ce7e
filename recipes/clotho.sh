#!/usr/bin/env bash
# Goal        captions of sounds, as ClipAudioCaption: mel spectrograms seen by CLIP, MLP mapper and tuned GPT-2, from the Conceptual
#             Captions weights.
# Hardware    one GPU of 8 GB or more, or a CPU (recipes/README.md).
# Data        Clotho: 2,893 clips of 15 to 30 s to train on (version 1), 1,045 for validation (version 2.1), 1,045 to score on, five
#             captions each, Zenodo records 3490684 and 4783391. Needs p7zip or bsdtar:
#               python data/download.py clotho
#             The weights it starts from come by themselves, or lie at data/weights/conceptual_weights.pt.
# Published   none with scores. For comparison, SPIDEr on Clotho's evaluation part, x 100: a prefix before a frozen GPT-2 about 25.5, the
#             DCASE 2024 baseline 29.8, CoNeTTE 31.0, SLAM-AAC 33.2.
# Ours        not run here: needs Clotho, the Conceptual Captions weights and a GPU
# Otherwise   windows over the whole clip in place of a wrapped picture of 2 s, all five captions in place of the first, warm-up of one
#             epoch in place of 5,000 steps, of which the published run saw 720; the best epoch on the validation part.
#
#   bash recipes/clotho.sh          from the repository's root; started again, it goes on where it stopped
set -euo pipefail
METRICS=${METRICS:-bleu meteor rouge cider spice spider}
SMOKE=${RECIPE_SMOKE:+--max_steps 3 --log_every 1 --device cpu} # RECIPE_SMOKE=1: three steps, to see that every line runs
OUT=checkpoints/${RECIPE_SMOKE:+smoke_}clotho
FEATURES=data/clotho/oscar_split_ViT-B_32

[ -e ${FEATURES}_train.pkl ] || python parse_clotho.py --captions_path data/clotho_captions_development.csv --audio_path data/development
[ -e ${FEATURES}_val.pkl ] || python parse_clotho.py --captions_path data/clotho_captions_validation.csv --audio_path data/validation
[ -e ${FEATURES}_test.pkl ] || python parse_clotho.py --captions_path data/clotho_captions_evaluation.csv --audio_path data/evaluation
# Without --sample 0 it would ask CLIP whether a spectrogram looks like its caption. It stops at a problem; GO_ON=1 goes on in spite of it.
python check.py --sample 0 ${FEATURES}_{train,val,test}.pkl || [ -n "${GO_ON:-}" ]

python train.py --data ${FEATURES}_train.pkl --val_data ${FEATURES}_val.pkl --out_dir $OUT --init_from conceptual \
  --epochs 10 --bs 40 --lr 2e-5 --warmup_steps 360 --resume $SMOKE

python evaluate.py --data ${FEATURES}_test.pkl --checkpoint $OUT/coco_prefix_best.pt --metrics $METRICS --out $OUT/test.json
