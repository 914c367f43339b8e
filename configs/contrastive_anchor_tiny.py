# Anchor-Embedding, stage II, from reconstruct_pydocs_tiny.py; the baseline is the same from the
# decoder itself. runs/anchor.sh compares the two.
#   python train_contrastive.py configs/contrastive_anchor_tiny.py
#   python train_contrastive.py configs/contrastive_anchor_tiny.py \
#       --init_from=out/clm_pydocs_tiny --out_dir=out/contrastive_anchor_tiny_baseline
base = "contrastive_pydocs_tiny.py"
init_from = "out/reconstruct_pydocs_tiny"  # its newest checkpoint
out_dir = "out/contrastive_anchor_tiny"
attention = "causal"
pooling = "last"

# stage I's lengths: 64 pairs x (32 + 66) = 6,300 tokens/step
query_max_length = 48
passage_max_length = 96
batch_size = 64
