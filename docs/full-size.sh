#!/usr/bin/env bash
# The paper's tables at full size: bash docs/full-size.sh {kvasir|skin} {captions|table2|table3}; see full-size.md.
# DRY=1 prints the commands, SEEDS="42" takes one seed, MODEL and OUT choose another base model and another folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ ${1:-} =~ ^(kvasir|skin)$ && ${2:-} =~ ^(captions|table2|table3)$ ]] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
set_name=$1 table=$2 data=dataset/$1
model=${MODEL:-PixArt-alpha/PixArt-XL-2-512x512} out=${OUT:-results/full-size}/$1

run() {
  printf '%q ' "$@"; echo
  [[ ${DRY:-} ]] || "$@"
}

test_images() { # each prompt of the test split once; N while the set is not there
  [[ -f $data/test/raw.csv ]] || { echo N; return; }
  python -c 'import csv, sys; print(len(list(csv.DictReader(open(sys.argv[1], encoding="utf-8-sig")))))' "$data/test/raw.csv"
}

evaluate() { # FOLDER SEED: what lies in FOLDER/samples
  [[ -f $1/evaluation/report.json ]] && return
  samples=$(find "$1/samples" -mindepth 1 -maxdepth 1 -type d -name '[!.]*' 2>/dev/null | head -n 1 || true)
  run python evaluate.py --generated "${samples:-$1/samples}" --real "$data/test" --train "$data/train" \
    --extractor "$out/extractor.safetensors" --seed "$2" --out "$1/evaluation"
}

pixart() { # ROW COLUMN [medart.py's flags that make the row]
  row=$1 column=$2
  for seed in ${SEEDS:-42 43 44}; do
    folder=$out/$row/seed-$seed
    [[ -f $folder/run/finished.json ]] || run accelerate launch --mixed_precision=bf16 --num_processes=1 medart.py \
      --pretrained_model_name_or_path="$model" --dataset_name="$data/train" --caption_column="$column" \
      --resolution=512 --train_batch_size=1 --num_train_epochs=15 --rank=8 --use_8bit_adam \
      --checkpointing_steps=12800 --checkpoints_total_limit=2 --learning_rate=1e-4 --gradient_checkpointing \
      --M_times=20 --N_steps=500 --seed="$seed" --output_dir="$folder/run" "${@:3}"
    run python sample_ddp.py --lora "$folder/run" --metadata "$data/test" --caption-column "$column" \
      --num-fid-samples "$(test_images)" --global-seed "$seed" --sample-dir "$folder/samples"
    evaluate "$folder" "$seed"
  done
}

dit() {
  run torchrun --nproc_per_node=1 extract_features.py --data-path "$data/train" --features-path "$out/features-256"
  for seed in ${SEEDS:-42 43 44}; do
    folder=$out/dit/seed-$seed
    [[ -f $folder/run/000-DiT-XL-2/finished.json ]] || run accelerate launch --mixed_precision=bf16 train.py --model DiT-XL/2 --features-path "$out/features-256" \
      --global-batch-size 32 --max-steps 100000 --global-seed "$seed" --results-dir "$folder/run"
    run python sample_ddp.py --ckpt "$folder/run/000-DiT-XL-2/checkpoints/0100000.pt" --balanced \
      --num-fid-samples "$(test_images)" --global-seed "$seed" --sample-dir "$folder/samples"
    evaluate "$folder" "$seed"
  done
}

if [[ $table == captions ]]; then
  run python VSG.py --data-dir "$data" --model llava-hf/llama3-llava-next-8b-hf
  exit
fi
[[ -f $out/extractor.safetensors ]] || run python evaluate.py fit-extractor --train "$data/train" \
  --out "$out/extractor.safetensors"
pixart med-art text
pixart without-hldf text --no_hldf
if [[ $table == table2 ]]; then
  dit
else
  pixart empty-caption text --proportion_empty_prompts=1
  pixart simple-caption simple_text
  pixart without-t5-lora text --no_text_encoder_lora
  pixart with-dora text --use_dora
fi
