# The echo data (data/echo/readme.md), for the configs that have this one as their base.
# One task a file, one file a batch. A line's "prompt" is its query's instruction; passages are
# bare, but for the symmetric tasks. The separator is that of the prompts (data/echo/prepare.py).
_sep = "; "
_both = {
    "allnli_split2": "Retrieve semantically similar text",
    "quora_duplicates_split1": "Given a question, retrieve questions that are semantically "
    "equivalent to the given question",
    "quora_duplicates_split2": "Find questions that have the same meaning as the input question",
}
_files = (
    "allnli_split1 allnli_split2 dureader eli5_question_answer fever hotpot_qa miracl mrtydi "
    "msmarco_passage msmarco_document nq quora_duplicates_split1 quora_duplicates_split2 squad "
    "t2ranking trivia_qa"
).split()
data = tuple(f"data/echo/{file}.jsonl" for file in _files)
passage_instruction = tuple(_both[file] + _sep if file in _both else "" for file in _files)
eval_data = "data/echo/val.jsonl"
sampling_alpha = 1.0  # in proportion to size
