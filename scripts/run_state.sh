#!/bin/sh
# State tuning: learns the state in which a text begins, and saves it alone.
# Edit the variables, or set them before the command:
#   load_model=model.pth data_file=data.jsonl sh scripts/run_state.sh
# Flags given behind the script's name are passed on.
load_model=${load_model:-model.pth}
proj_dir=${proj_dir:-out/state}
data_file=${data_file:-data.jsonl}

# 0: read from the model
n_layer=${n_layer:-0}
n_embd=${n_embd:-0}

micro_bsz=${micro_bsz:-8}
ctx_len=${ctx_len:-1024}
# micro-batches of an epoch; 0: all of the data
epoch_steps=${epoch_steps:-0}
epoch_count=${epoch_count:-1}
epoch_save=${epoch_save:-1}
lr_init=${lr_init:-1e-3}
lr_final=${lr_final:-1e-5}
QUANT=${QUANT:-none}
# pad trains every token; qa the answers of dialogues alone
loss_mask=${loss_mask:-pad}

"${PYTHON:-python3}" "$(dirname "$0")/../train.py" \
    --load_model "$load_model" --proj_dir "$proj_dir" --data_file "$data_file" \
    --n_layer "$n_layer" --n_embd "$n_embd" --ctx_len "$ctx_len" --micro_bsz "$micro_bsz" \
    --epoch_steps "$epoch_steps" --epoch_count "$epoch_count" --epoch_save "$epoch_save" \
    --lr_init "$lr_init" --lr_final "$lr_final" \
    --quant "$QUANT" --loss_mask "$loss_mask" --peft state "$@"
