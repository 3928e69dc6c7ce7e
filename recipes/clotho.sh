#!/usr/bin/env bash
# Goal        captions of sounds, like ClipAudioCaption: mel spectrograms through CLIP, MLP mapper and tuned GPT-2.
#             Training starts from the Conceptual Captions weights.
# Hardware    one GPU of 8 GB or more, or a CPU (times in recipes/README.md).
# Data        Clotho, clips of 15 to 30 s with five captions each: 2,893 for training (version 1), 1,045 for
#             validation (version 2.1) and 1,045 for scoring. Zenodo records 3490684 and 4783391. Unpacking needs
#             p7zip or bsdtar:
#               python data/download.py clotho
#             The start weights are downloaded, or taken from data/weights/conceptual_weights.pt.
# Published   no scores. For comparison, SPIDEr on Clotho's evaluation part, x 100: about 25.5 for a prefix before a
#             frozen GPT-2, 29.8 for the DCASE 2024 baseline, 31.0 for CoNeTTE, 33.2 for SLAM-AAC.
# Ours        not run here; needs Clotho, the Conceptual Captions weights and a GPU.
# Otherwise   Windows cover the whole clip, in place of a wrapped picture of 2 s. All five captions are used, not only
#             the first. The warm-up is one epoch; the published one was 5,000 steps, and the run ended after 720. The
#             best epoch is chosen on the validation part.
#
#   bash recipes/clotho.sh          run it from the root of the repository; to resume, run it again
set -euo pipefail
METRICS=${METRICS:-bleu meteor rouge cider spice spider}
SMOKE=${RECIPE_SMOKE:+--max_steps 3 --log_every 1 --device cpu} # RECIPE_SMOKE=1: a trial of three steps
OUT=checkpoints/${RECIPE_SMOKE:+smoke_}clotho
FEATURES=data/clotho/oscar_split_ViT-B_32

[ -e ${FEATURES}_train.pkl ] || python parse_clotho.py --captions_path data/clotho_captions_development.csv --audio_path data/development
[ -e ${FEATURES}_val.pkl ] || python parse_clotho.py --captions_path data/clotho_captions_validation.csv --audio_path data/validation
[ -e ${FEATURES}_test.pkl ] || python parse_clotho.py --captions_path data/clotho_captions_evaluation.csv --audio_path data/evaluation
# --sample 0: CLIP cannot say whether a spectrogram looks like its caption. Stops at a problem, unless GO_ON=1.
python check.py --sample 0 ${FEATURES}_{train,val,test}.pkl || [ -n "${GO_ON:-}" ]

python train.py --data ${FEATURES}_train.pkl --val_data ${FEATURES}_val.pkl --out_dir $OUT --init_from conceptual \
  --epochs 10 --bs 40 --lr 2e-5 --warmup_steps 360 --resume $SMOKE

python evaluate.py --data ${FEATURES}_test.pkl --checkpoint $OUT/coco_prefix_best.pt --metrics $METRICS --out $OUT/test.json
