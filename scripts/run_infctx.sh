#!/bin/sh
# Texts of any length: rows of ctx_len tokens go through the model in chunks of chunk_ctx, in the
# memory of one chunk.
# Edit the variables, or set them before the command:
#   load_model=model.pth data_file=data.jsonl sh scripts/run_infctx.sh
# Flags given behind the script's name are passed on.
load_model=${load_model:-model.pth}
proj_dir=${proj_dir:-out/infctx}
data_file=${data_file:-data.jsonl}

# 0: read from the model
n_layer=${n_layer:-0}
n_embd=${n_embd:-0}

micro_bsz=${micro_bsz:-1}
ctx_len=${ctx_len:-2048}
chunk_ctx=${chunk_ctx:-512}
# chunks over which a gradient goes back; all: exact gradients
bptt_chunks=${bptt_chunks:-1}
# micro-batches of an epoch; 0: all of the data
epoch_steps=${epoch_steps:-0}
epoch_count=${epoch_count:-1}
epoch_save=${epoch_save:-1}
lr_init=${lr_init:-2e-4}
lr_final=${lr_final:-2e-5}
QUANT=${QUANT:-none}
# pad trains every token; qa the answers of dialogues alone
loss_mask=${loss_mask:-pad}
peft_config=${peft_config:-'{"r":64,"lora_alpha":128,"lora_dropout":0.01}'}

"${PYTHON:-python3}" "$(dirname "$0")/../train.py" \
    --load_model "$load_model" --proj_dir "$proj_dir" --data_file "$data_file" \
    --n_layer "$n_layer" --n_embd "$n_embd" --ctx_len "$ctx_len" --micro_bsz "$micro_bsz" \
    --train_type infctx --chunk_ctx "$chunk_ctx" --bptt_chunks "$bptt_chunks" \
    --epoch_steps "$epoch_steps" --epoch_count "$epoch_count" --epoch_save "$epoch_save" \
    --lr_init "$lr_init" --lr_final "$lr_final" \
    --quant "$QUANT" --loss_mask "$loss_mask" --peft lora --peft_config "$peft_config" "$@"
