# The decoder that pairs with mlm_pydocs_tiny: same shape, same tokens in the same order.
#   python pretrain_mlm.py configs/clm_pydocs_tiny.py
base = "mlm_pydocs_tiny.py"
out_dir = "out/clm_pydocs_tiny"
objective = "clm"
