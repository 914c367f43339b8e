# Token retrieval in a module's whole documentation: which of it belongs to one function's summary?
#   python data/pydocs/prepare.py && python pretrain_mlm.py configs/clm_pydocs_tiny.py
#   python train_token_retrieval.py configs/token_retrieval_pydocs_tiny.py
# runs/acerag.sh puts stage 1, passage retrieval, before it.
out_dir = "out/token_retrieval_pydocs_tiny"
init_from = "out/clm_pydocs_tiny"  # its newest checkpoint; its tokenizer ends texts with [SEP]
rope_scaling = ("yarn", 4)  # it was trained for 512 positions, the passages have up to 5,460 tokens
max_seq_len = 2048

query_max_length = 64

data = "data/pydocs/spans_train.jsonl"
eval_data = "data/pydocs/spans_val.jsonl"
passage_max_length = 2048  # 1 module in 5 is longer, up to 5,353 tokens; evaluation cuts nothing

# 7,595 lines in 767 modules, in 1,285 runs of up to 8 lines of one module
# 32 queries/step = about 5 passages = 8,000 tokens/step; 1 epoch = 238 steps
queries_per_passage = 8
batch_size = 32
num_epochs = 1
temperature = 0.02

learning_rate = 5e-4
weight_decay = 0.01
schedule = "linear"
warmup_ratio = 0.1

device_batch_tokens = 8192
eval_interval = 100
save_interval = 500
