#!/usr/bin/env bash
# P-Tuning v2 on conversations: each line has a question, an answer and the rounds before them.
set -euo pipefail
cd "$(dirname "$0")"
PRE_SEQ_LEN=128
LR=1e-2
NUM_GPUS=1

torchrun --standalone --nnodes=1 --nproc-per-node=$NUM_GPUS main.py \
    --do_train \
    --train_file "${CHAT_TRAIN_DATA:?set CHAT_TRAIN_DATA to a file of JSON lines}" \
    --preprocessing_num_workers 10 \
    --prompt_column prompt \
    --response_column response \
    --history_column history \
    --overwrite_cache \
    --model_name_or_path "${MODEL:-THUDM/chatglm2-6b}" \
    --output_dir "output/${CHECKPOINT_NAME:-chat-pt-$PRE_SEQ_LEN-$LR}" \
    --overwrite_output_dir \
    --max_source_length 256 \
    --max_target_length 256 \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 16 \
    --predict_with_generate \
    --max_steps 3000 \
    --logging_steps 10 \
    --save_steps 1000 \
    --learning_rate $LR \
    --pre_seq_len $PRE_SEQ_LEN \
    --quantization_bit 4 \
    "$@"
