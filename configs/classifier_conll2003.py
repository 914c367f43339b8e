# LLM2Vec's word tasks (arXiv 2404.05961) on CoNLL-2003: parts of speech, chunks, names.
#   python data/conll2003/prepare.py
#   python train_classifier.py configs/classifier_conll2003.py --label_field=pos \
#       --init_from=princeton-nlp/Sheared-LLaMA-1.3B --attention=bidirectional \
#       --adapters="['McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp']" --label_position=next_token
#   python -m evals.classifier --model=out/classifier_conll2003_pos --label_field=pos \
#       --eval_data=data/conll2003/test.jsonl
# A causal model and an encoder are read where the word stands: same_token, the default.
label_field = "ner"  # pos: 47 labels, chunk: 23, ner: 9
out_dir = f"out/classifier_conll2003_{label_field}"
task = "words"
init_from = "princeton-nlp/Sheared-LLaMA-1.3B"

data = "data/conll2003/train.jsonl"
eval_data = "data/conll2003/val.jsonl"
max_length = 256
# the data set's own lists: val and test may have what train has not
_pos = "\" '' # $ ( ) , . : `` CC CD DT EX FW IN JJ JJR JJS LS MD NN NNP NNPS NNS NN|SYM PDT POS "
_pos += "PRP PRP$ RB RBR RBS RP SYM TO UH VB VBD VBG VBN VBP VBZ WDT WP WP$ WRB"
_chunk = "ADJP ADVP CONJP INTJ LST NP PP PRT SBAR UCP VP"
_ner = "PER ORG LOC MISC"


def _iob2(kinds):
    return ("O", *(f"{b}-{kind}" for kind in kinds.split() for b in "BI"))


label_names = {"pos": tuple(_pos.split()), "chunk": _iob2(_chunk), "ner": _iob2(_ner)}[label_field]

freeze_backbone = True
dropout = 0.1
merge_subwords = True
learning_rate = 5e-4
schedule = "linear"

# 8 sentences/step, about 116 words; 10 epochs of 14,041 sentences = 17,552 steps, the horizon of
# their schedule, which the run leaves at 77 % of the peak, after 2.3 epochs
batch_size = 8
device_batch_size = 8
num_epochs = 10
stop_step = 4000
eval_interval = 500
save_interval = 250
