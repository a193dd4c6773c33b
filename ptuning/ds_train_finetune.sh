#!/usr/bin/env bash
# Train all weights on several GPUs with DeepSpeed (pip install deepspeed).
set -euo pipefail
cd "$(dirname "$0")"
LR=1e-4
NUM_GPUS=4
MASTER_PORT=$(shuf -n 1 -i 10000-65535)

deepspeed --num_gpus=$NUM_GPUS --master_port "$MASTER_PORT" main.py \
    --deepspeed deepspeed.json \
    --do_train \
    --train_file AdvertiseGen/train.json \
    --test_file AdvertiseGen/dev.json \
    --preprocessing_num_workers 10 \
    --prompt_column content \
    --response_column summary \
    --overwrite_cache \
    --model_name_or_path "${MODEL:-THUDM/chatglm2-6b}" \
    --output_dir output/adgen-chatglm2-6b-ft-$LR \
    --overwrite_output_dir \
    --max_source_length 64 \
    --max_target_length 64 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 1 \
    --predict_with_generate \
    --max_steps 5000 \
    --logging_steps 10 \
    --save_steps 1000 \
    --learning_rate $LR \
    --fp16 \
    "$@"
