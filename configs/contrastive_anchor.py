# Anchor-Embedding, stage II: the baseline's recipe, from the model of stage I.
#   torchrun --standalone --nproc_per_node=8 train_reconstruct.py configs/reconstruct_anchor.py \
#       --init_from=meta-llama/Llama-3.2-3B-Instruct
#   torchrun --standalone --nproc_per_node=8 train_contrastive.py configs/contrastive_anchor.py \
#       --init_from=out/anchor-stage1/Llama-3.2-3B-Instruct
# A folder of the path must name the base: it decides the chat wrap, which has to be stage I's.
base = "contrastive_anchor_baseline.py"
init_from = f"out/anchor-stage1/{_name}"  # its newest checkpoint: step2000
out_dir = f"out/anchor/{_name}"
batch_size = 128 * 8  # 1B's, too
