# Parts of speech by Universal Dependencies (17 tags) from a frozen model, as LLM2Vec probes its own
# (arXiv 2404.05961, section 4.1).
#   python data/ud/prepare.py --input UD_English-EWT
#   python train_classifier.py configs/classifier_pos_ud.py --init_from=... --out_dir=...
# --label_position=next_token for models of train_mntp.py: they know a word one position before it.
# --attention=bidirectional reads a decoder as an encoder.
out_dir = "out/classifier_pos_ud"
task = "words"
init_from = "out/mlm_pydocs_tiny"

data = "data/ud/train.jsonl"
eval_data = "data/ud/val.jsonl"
max_length = 256  # all but 1 of English EWT's sentences, with the vocabulary of data/pydocs

freeze_backbone = True
dropout = 0.1
learning_rate = 5e-4
schedule = "linear"

# 8 sentences/step, about 130 words in 225 tokens; 12,544 sentences = 1,568 steps an epoch
batch_size = 8
device_batch_size = 8
max_steps = 1000  # LLM2Vec: 4,000 of the 17,552 of its schedule
eval_interval = 500
log_interval = 50
