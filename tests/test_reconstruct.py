"""train_reconstruct.py and sample.py --reconstruct: the loss against transformers called twice on
padded batches, isolation, and tiny runs of the script, whole, killed and resumed, on 1-3 ranks."""

import re
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import harness
import sample
import train_reconstruct as R
from data import open_pairs, read_pair
from embedder import Embedder
from formats.huggingface import from_pretrained, hf_module, save_pretrained
from harness import WORDS, assert_close, assert_equal_bits, configured, losses, raises, write_config
from pairs import pairs_of_step
from tokenizer import Template, load_tokenizer

SCRIPT = "train_reconstruct.py"
arguments, run = partial(harness.arguments, SCRIPT), partial(harness.run, SCRIPT)


def settings(**changes):
    """What the main block gives to the functions, for one rank on the CPU."""
    plain = dict(
        batch_size=6, device_batch_size=3, stop_step=30, seed=7, rank=0, world_size=1, group_size=1,
        consecutive=1, no_duplicates=False, crop=0.0, template=Template("tan ", " mos"),
        write_template=False, pool_instruction=False, ignore_prompts=False, pool_bos=True,
        query_max_length=9, passage_max_length=24,
        query_instruction=("ris: ",), passage_instruction=("",), w_d2q=0.8, w_q2d=0.2,
        eval_lines=1000, autocast=nullcontext, device="cpu")  # fmt: skip
    return SimpleNamespace(**(plain | changes))


@pytest.fixture(scope="module")
def decoders(folders, tmp_path_factory):
    """"untied": grouped heads, and a head of its own. "tied": windows, a dense head, whose matrix
    is the embedding's."""
    made = {}
    for name, family in (("untied", "llama"), ("tied", "modernbert-decoder")):
        made[name], model = str(tmp_path_factory.mktemp(name)), from_pretrained(folders[family])
        model.config.tied, model.config.out_dropout = name == "tied", 0.0
        if name == "untied":
            model.lm_head.weight = torch.nn.Parameter(model.embed.weight.detach().flip(0))
        save_pretrained(model, made[name])
        load_tokenizer(folders[family]).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def llama(decoders):
    return decoders["untied"]


@pytest.fixture(scope="module")
def pair_files(tmp_path_factory):
    """60 lines to train on and 17 others, with several positives, prompts and over-long texts."""
    rng, folder, out = np.random.default_rng(2), tmp_path_factory.mktemp("pairs"), []
    for name, n in (("train", 60), ("val", 17)):
        lines = []
        for i in range(n):
            query, *pos = (" ".join(rng.choice(WORDS, size))
                           for size in [1 + i % 6] + [2 + i % 20] * (1 + i % 2))  # fmt: skip
            line = {"query": query, "neg": ["unused"], "pos": pos}
            lines.append(line | ({"prompt": "kes: "} if i % 5 == 0 else {}))
        out.append(harness.write_jsonl(folder / f"{name}.jsonl", lines))
    return out


def micro_batches(pair_files, step, tokenizer, s):
    """-> what `encode` gives for the micro-batches of a step, and the same packed, for training."""
    files, choices, n = [open_pairs(pair_files[0])], np.zeros(30, int), s.device_batch_size
    pairs, which = pairs_of_step(files, step, choices, s)
    parts = [pairs[i : i + n] for i in range(0, len(pairs), n)]
    return ([R.encode(part, which, tokenizer, s) for part in parts],
            next(R.train_batches(files, step, choices, tokenizer, s)))  # fmt: skip


# ---- the loss, against transformers called twice ----
@pytest.fixture
def doubled(monkeypatch):
    """In fp64, also what the code, ours and theirs, does in fp32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: F.rms_norm(
        x, self.weight.shape, self.weight, self.variance_epsilon))  # fmt: skip


def padded(side):
    """-> ids [B, L], mask [B, L] of encoded texts, padded on the right."""
    texts = [torch.tensor(ids) for ids, _ in side]
    mask = pad_sequence([torch.ones_like(ids) for ids in texts], batch_first=True)
    return pad_sequence(texts, batch_first=True, padding_value=2), mask


def plain_losses(theirs, encoded, anchors="right"):
    """[d2q, q2d] sums by two model calls a direction, padded, with masks written out."""
    n = len(encoded) // 2
    sides = [encoded[:n], encoded[n:]]

    def embed(side):
        ids, mask = padded(side)
        hidden = theirs.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden[torch.arange(n), mask.sum(1) - 1]

    out = []
    for side, other in (sides, sides[::-1]):
        vectors, (ids, mask) = embed(other), padded(side)
        vectors = {"right": vectors, "shuffled": vectors.roll(-1, 0), "none": 0 * vectors}[anchors]
        words = theirs.get_input_embeddings()(ids)
        inputs = torch.cat((vectors[:, None], words), dim=1)  # [B, 1 + L, C]
        mask = torch.cat((torch.ones(n, 1, dtype=mask.dtype), mask), dim=1)
        logits = theirs(inputs_embeds=inputs, attention_mask=mask).logits.log_softmax(-1)
        total = 0.0
        for b, (ids, (first, last)) in enumerate(side):
            for t in range(first, last):  # position t predicts token t: the anchor the first
                total = total - logits[b, t, ids[t]]
        out.append(total)
    return out


def only(encoded, pairs):
    """The same texts, of which these pairs alone have targets."""
    n = len(encoded) // 2
    return [(ids, span if i % n in pairs else (len(ids), len(ids)))
            for i, (ids, span) in enumerate(encoded)]  # fmt: skip


@pytest.mark.parametrize("write_template", [False, True])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_loss_and_gradients_equal_two_calls(name, write_template, pair_files, doubled, decoders):
    folder = decoders[name]
    s = settings(write_template=write_template, pool_instruction=write_template)
    ours, tokenizer = from_pretrained(folder).double(), load_tokenizer(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").double()
    parts, batches = micro_batches(pair_files, 6, tokenizer, s)
    assert len(parts) == 2
    whole = [x for part in parts for x in part[:3]] + [x for part in parts for x in part[3:]]
    spans = [last - first for _, (first, last) in whole]
    counts, lengths = [sum(spans[:6]), sum(spans[6:])], [len(ids) for ids, _ in whole]
    assert max(lengths[:6]) == 9 and max(lengths[6:]) == 24  # some are cut
    for ids, (first, last) in whole:
        front = tokenizer.decode(ids[:first])
        assert front == "" if write_template else front.startswith("[CLS]tan")
        assert last == len(ids) and ids[-1] == 1  # EOS is a target

    # ours: micro-batches, accumulated
    net, total = R.Reconstruction(ours), np.zeros(2)
    for batch in batches:
        out = net(batch)
        total += out[0].detach().numpy()
        (out[0, 0] * (0.8 / counts[0]) + out[0, 1] * (0.2 / counts[1])).backward()
    d2q, q2d = plain_losses(theirs, whole)
    (0.8 * d2q / counts[0] + 0.2 * q2d / counts[1]).backward()
    assert total == pytest.approx([d2q.item(), q2d.item()], rel=1e-6)
    assert np.sum([batch.n_targets for batch in batches], axis=0).tolist() == counts
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        module, _, leaf = name.rpartition(".")
        want = gradients[f"{hf_module(module, ours.config.family)}.{leaf}"].grad
        assert want.norm() > 1e-9 and (p.grad - want).norm() <= 1e-5 * want.norm(), name

    # wrong anchors; a pair more is encoded than decoded, as in evaluation
    with torch.no_grad():
        kinds = ("right", "shuffled", "none")
        got = net(R.pack_pairs(whole, 6), kinds)
        for row, kind in zip(got, kinds, strict=True):
            want = [x.item() for x in plain_losses(theirs, whole, kind)]
            assert row.tolist() == pytest.approx(want, rel=1e-6)
        assert min((got[1] - got[0]).abs().tolist() + (got[2] - got[1]).abs().tolist()) > 0.1
        fewer = net(R.pack_pairs(whole, 5), kinds)
        for k, kind in enumerate(kinds):
            want = [x.item() for x in plain_losses(theirs, only(whole, range(5)), kind)]
            assert fewer[k].tolist() == pytest.approx(want, rel=1e-6)


def test_pairs_do_not_see_each_other(llama, pair_files, doubled):
    """Loss and gradient of one pair among others, others changed, and alone: the same; with its own
    document changed: not."""
    model, tokenizer = from_pretrained(llama).double(), load_tokenizer(llama)
    (encoded, _), _ = micro_batches(pair_files, 0, tokenizer, settings())
    net = R.Reconstruction(model)

    def measure(encoded):
        model.zero_grad(set_to_none=True)
        out = net(R.pack_pairs(encoded, len(encoded) // 2))
        out.sum().backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return out[0].detach(), flat

    want, gradient = measure(only(encoded, [1]))
    assert gradient.norm() > 1
    other = [(ids[:1] + [i % 500 for i in ids[3:-1]] + [7, 9, 1], span) for ids, span in encoded]
    changed = [other[i] if i % 3 != 1 else encoded[i] for i in range(6)]
    for texts in (only(changed, [1]), [encoded[1], encoded[4]]):
        got, its = measure(texts)
        assert torch.allclose(got, want, rtol=1e-12)
        assert (its - gradient).norm() <= 1e-11 * gradient.norm()
    got, its = measure(only([*encoded[:4], (other[4][0], encoded[4][1]), encoded[5]], [1]))
    assert abs(got[0] - want[0]) > 1e-3  # its query is written from that document
    assert (its - gradient).norm() > 1e-3 * gradient.norm()


def test_evaluation_equals_plain_loops(llama, pair_files):
    s, tokenizer = settings(device_batch_size=4, eval_lines=0), load_tokenizer(llama)
    net, file = R.Reconstruction(from_pretrained(llama)), open_pairs(pair_files[1])
    theirs, found = AutoModelForCausalLM.from_pretrained(llama), R.evaluate(net, file, tokenizer, s)
    lines = [read_pair(file, i) for i in range(17)]
    encoded = R.encode([x | {"passages": x["pos"][:1]} for x in lines], 0, tokenizer, s)
    counts = R.pack_pairs(encoded, 17).n_targets
    names = {"right": "{}_loss", "shuffled": "{}_shuffled_loss", "none": "{}_none_loss"}
    with torch.no_grad():
        for kind, name in names.items():
            means = [x.item() / n for x, n in
                     zip(plain_losses(theirs, encoded, kind), counts, strict=True)]  # fmt: skip
            for side, mean in zip(("d2q", "q2d"), means, strict=True):
                assert found[name.format(side)] == pytest.approx(mean, rel=1e-4)
            if kind == "right":
                want = 0.8 * means[0] + 0.2 * means[1]
                assert found["loss"] == pytest.approx(want, rel=1e-4)
                assert found["d2q_ppl"] == pytest.approx(np.exp(means[0]), rel=1e-3)
    few = R.evaluate(net, file, tokenizer, settings(eval_lines=2))
    assert few["loss"] != found["loss"]


# ---- the order of pairs ----
def test_every_rank_takes_its_pairs_of_one_order(llama, pair_files):
    files, choices = [open_pairs(pair_files[0])], np.zeros(30, int)
    tokenizer = load_tokenizer(llama)

    def texts_of(rank, world_size):  # [step][pair] -> ids
        s = settings(rank=rank, world_size=world_size, device_batch_size=1)
        steps = R.train_batches(files, 0, choices, tokenizer, s)
        return [[batch.tokens.tolist() for batch in batches] for batches in steps]

    whole = texts_of(0, 1)
    for world in (2, 3):
        parts = [texts_of(rank, world) for rank in range(world)]
        assert [[parts[i % world][step][i // world] for i in range(6)]
                for step in range(30)] == whole  # fmt: skip
    steps = [pairs_of_step(files, step, choices, settings())[0] for step in range(30)]
    documents = [pair["passages"][0] for pairs in steps for pair in pairs]
    assert len(set(documents[:60])) == 60  # an epoch: every line once
    assert len(set(documents)) > 70  # later also other positives


# ---- whole runs ----
TINY = dict(
    prefix="tan ", suffix=" mos", query_instruction=("ris: ",), query_max_length=9,
    passage_max_length=24, batch_size=12, device_batch_size=2,  # divisible by 1, 2 and 3 ranks
    max_steps=6, warmup_steps=2, learning_rate=1e-3, schedule="constant", log_interval=1,
    eval_interval=3, save_interval=3, dtype="fp32",
    eval_lines=9,  # 5 batches: with 2 and 3 ranks not all have as many
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(llama, pair_files, tmp_path_factory):
    keys = TINY | dict(init_from=llama, data=(pair_files[0],), eval_data=pair_files[1])
    return write_config(tmp_path_factory.mktemp("config"), **keys)


def test_losses_and_weights_are_those_of_the_reference(unbroken, tiny, tmp_path, capsys):
    """0.8 and 0.2, each over its own count of targets: the logged norm is that of the gradient."""
    for step, loss in losses(unbroken).items():
        d2q, q2d = (losses(unbroken, f"{x}_loss")[step] for x in ("d2q", "q2d"))
        assert loss == pytest.approx(0.8 * d2q + 0.2 * q2d, rel=1e-12)
        assert losses(unbroken, "d2q_ppl")[step] == pytest.approx(np.exp(d2q))
    for column in ("eval_loss", "eval_q2d_ppl", "eval_d2q_shuffled_loss", "eval_q2d_none_loss"):
        assert list(losses(unbroken, column)) == [0, 3, 6]
    done = run(tiny, tmp_path, "--stop_step=1", "--learning_rate=0")
    harness.assert_compared(capsys.readouterr().out, tmp_path, 1, "loss", "q2d_shuffled_loss")
    batches = next(R.train_batches(done.files, 0, done.choices, done.tokenizer, done.s))
    counts = np.sum([batch.n_targets for batch in batches], axis=0)
    for batch in batches:
        d2q, q2d = done.module(batch)[0]
        (0.8 * d2q / counts[0] + 0.2 * q2d / counts[1]).backward()
    norm = torch.stack([p.grad.norm() for p in done.module.parameters()]).norm().item()
    assert counts[0] != counts[1] and losses(tmp_path, "gnorm")[1] == pytest.approx(norm, rel=1e-5)


def test_micro_batches_change_nothing(tiny, unbroken, tmp_path):
    run(tiny, tmp_path, "--device_batch_size=12", "--gradient_checkpointing=True")
    for column in ("loss", "gnorm", "eval_loss", "eval_d2q_shuffled_loss", "eval_q2d_none_loss"):
        assert losses(tmp_path, column) == pytest.approx(losses(unbroken, column), rel=2e-5), column


def test_what_is_saved_is_all_that_trained(llama, tiny, pair_files, tmp_path):
    """The untied head, the norms and the embedding; and stage II starts from it."""
    model = run(tiny, tmp_path).model
    folder = str(tmp_path / "step6")
    before, reloaded = from_pretrained(llama), from_pretrained(folder)
    assert not reloaded.config.tied
    for name, p in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], p), name
        assert not torch.equal(before.state_dict()[name], p), name
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)

    embedder = Embedder.load(folder, dtype="fp32")
    assert (embedder.pooling, embedder.template) == ("last", Template("tan ", " mos"))
    assert embedder.prompts == {"query": "ris: ", "document": ""}
    plain = write_config(
        tmp_path, data=(pair_files[0],), init_from=str(tmp_path), pooling="last", max_steps=2,
        attention="causal", batch_size=8, prefix="tan ", suffix=" mos", eval_data="")  # fmt: skip
    stage2 = harness.run("train_contrastive.py", plain, tmp_path / "two")
    assert stage2.embedder.tokenize(["ris tan"]) == embedder.tokenize(["ris tan"])
    assert max(losses(tmp_path / "two")) == 2


def test_killed_and_resumed_is_bit_equal(tiny, decoders, tmp_path):
    # a tied head here; the untied one resumes with the ranks
    more = ["--max_steps=30", f"--init_from={decoders['tied']}"]
    harness.assert_killed_and_resumed_is_bit_equal(SCRIPT, tiny, tmp_path, (4, 20), *more)


def test_lora_stopped_and_resumed_is_bit_equal_and_saved_whole(tiny, llama, tmp_path):
    keys = ["--lora_rank=4", "--train_also=embed,head", "--lora_dropout=0.2"]
    model = run(tiny, tmp_path / "whole", *keys).model.eval()
    harness.stopped_and_resumed(SCRIPT, tiny, tmp_path / "half", 4, *keys)
    assert_equal_bits(tmp_path / "half", tmp_path / "whole")
    merged = from_pretrained(str(tmp_path / "whole" / "step6"))
    assert torch.equal(merged.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(merged.lm_head.weight, from_pretrained(llama).lm_head.weight)
    net, batch = R.Reconstruction(merged), R.pack_pairs([([0, 9, 1], (0, 3))] * 4, 2)
    with torch.no_grad():
        assert torch.allclose(net(batch), R.Reconstruction(model)(batch), rtol=1e-5)


CLOSE = dict(loss=1e-5, gnorm=1e-4, eval_loss=1e-4, eval_q2d_none_loss=1e-4)


def test_two_ranks_equal_one(tiny, decoders, unbroken, tmp_path):
    """DDP and FSDP, full and LoRA, tied and untied; what FSDP has saved resumes bit by bit."""
    kinds = {"ddp": [],
             "fsdp": ["--fsdp=full", "--gradient_checkpointing=True"],
             "tied": ["--fsdp=full", f"--init_from={decoders['tied']}"],
             "lora": ["--fsdp=full", "--lora_rank=4", "--lora_dropout=0", "--train_also=head"]}
    argvs = [arguments(tiny, tmp_path / kind, *flags) for kind, flags in kinds.items()]
    half = arguments(tiny, tmp_path / "half", *kinds["fsdp"])
    harness.run_ranks(2, [*argvs, half + ["--max_steps=3"], half + ["--resume=True"]])
    for kind, flags in kinds.items():
        one = tmp_path / f"{kind}-one" if kind in ("tied", "lora") else unbroken
        if one != unbroken:
            run(tiny, one, *flags, "--fsdp=")
        assert_close(tmp_path / kind, one, "step6", **CLOSE)
    assert_equal_bits(tmp_path / "half", tmp_path / "fsdp")


def test_three_ranks_resumed_are_bit_equal(tiny, unbroken, tmp_path):
    half = arguments(tiny, tmp_path / "half")
    harness.run_ranks(3, [arguments(tiny, tmp_path / "three"), half + ["--max_steps=3"],
                          half + ["--resume=True"]])  # fmt: skip
    assert_close(tmp_path / "three", unbroken, "step6", **CLOSE)
    assert_equal_bits(tmp_path / "half", tmp_path / "three")


def test_show_batch_and_dry_run(tiny, unbroken, tmp_path):
    shown, dry = harness.shown_and_dry(SCRIPT, tiny, unbroken, tmp_path)
    assert "<document 0>[CLS]tan" in shown and "--- document 3:" in shown
    assert re.search(r"<query 1>\[CLS\]tan\x1b\[7m .* mos\[SEP\]\x1b\[0m", shown)
    assert re.search(r"(?s)s/step, .* ex/s, .* peak memory .* GB;.* [\d,]+ fits", dry)


def test_a_loss_that_is_not_finite_is_skipped_then_stops(tiny, tmp_path):
    keys = ["--learning_rate=1e30", "--warmup_steps=0", "--max_steps=20", "--eval_interval=0"]
    out = harness.printed_before_the_4th_bad_step(SCRIPT, tiny, tmp_path, *keys)
    assert out.count("gradient norm nan: skipped") == 4 and "train.jsonl" in out


@pytest.fixture(scope="module")
def odd(llama, folders, tmp_path_factory):
    """A folder of what cannot be used: models without a head and without an EOS, broken lines."""
    folder = tmp_path_factory.mktemp("odd")
    model, tokenizer = from_pretrained(llama), load_tokenizer(llama)
    save_pretrained(model, str(folder / "bare"))
    model.drop_head()
    save_pretrained(model, str(folder / "headless"))
    tokenizer.save_pretrained(folder / "headless")
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(folder / "bare")
    lines = [{"query": "a", "pos": ["b"]}] * 12 + [{"query": "a"}]
    harness.write_jsonl(folder / "broken.jsonl", lines)
    return partial(str.format, tmp=folder, encoder=folders["modernbert"])


@pytest.mark.parametrize(("more", "message"), [
    (["--device_batch_size=5"], "batch_size=12 must be k x device_batch_size=5"),
    (["--passage_max_length=256"], "one more of the model's 256 positions"),
    (["--suffix=", "--init_from={tmp}/bare"], "texts would end in 'a', with no EOS to learn"),
    (["--query_instruction=('a','b')"], "query_instruction: 2 texts for 1 data files"),
    (["--eval_lines=1"], "two lines or more"),
    (["--num_epochs=1"], "max_steps=6, num_epochs=1.0; expected one of"),
    (["--init_from={tmp}/headless"], "has no language modelling head"),
    (["--init_from={encoder}"], "is an encoder: expected a causal model"),
    (["--data={tmp}/broken.jsonl"], "broken.jsonl line 13: field 'pos' is missing"),
    (["--query_max_length=4"], "max_length 4 leaves no room for the text")])  # fmt: skip
def test_bad_settings_say_what_is_expected(tiny, odd, tmp_path, more, message):
    harness.assert_refused(message, SCRIPT, tiny, tmp_path / "out", *map(odd, more))


# ---- sample.py --reconstruct ----
def test_what_is_written_back_is_what_transformers_generates(llama, tmp_path, monkeypatch, capsys):
    model, tokenizer = from_pretrained(llama), load_tokenizer(llama)
    prompts = {"query": "ris: ", "document": "sus "}
    Embedder(model, tokenizer, "last", Template("tan ", " mos"), prompts).save(str(tmp_path), False)
    embedder = Embedder.load(str(tmp_path), dtype="fp32")
    theirs = AutoModelForCausalLM.from_pretrained(llama)
    heads = {"query": "tan ris: ", "document": "tan sus "}
    for side, other in (("query", "document"), ("document", "query")):
        new, eos_ids = sample.write_back(embedder, "molo kes", side, 12)
        ids = tokenizer(heads[side] + "molo kes mos")["input_ids"]
        given = tokenizer(heads[other].rstrip())["input_ids"][:-1]
        with torch.no_grad():
            hidden = theirs.model(torch.tensor([ids])).last_hidden_state
            words = theirs.get_input_embeddings()(torch.tensor([given]))
            inputs = torch.cat((hidden[:, -1:], words), dim=1)
            want = theirs.generate(
                inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2]), do_sample=False,
                max_new_tokens=12, eos_token_id=1, pad_token_id=2)  # fmt: skip
        assert new == want[0].tolist() and eos_ids == [1], side
    raises(SystemExit, "reconstruct_side='text'", sample.write_back, embedder, "a", "text", 4)
    embedder.model.drop_head()
    raises(SystemExit, "kept its head", sample.write_back, embedder, "a", "query", 4)


def test_learned_pairs_are_written_from_the_embedding_alone(tiny, tmp_path, monkeypatch, capsys):
    """After training the right anchor saves nearly all, and sample.py writes the pair's text."""
    pairs = {"tan": "ris molo", "kes": "sulo", "mon sus": "tama kelo", "rima": "mos"}
    lines = [{"query": q, "pos": [d]} for q, d in pairs.items()]
    few = harness.write_jsonl(tmp_path / "few.jsonl", lines)
    run(tiny, tmp_path / "out", f"--data={few}", f"--eval_data={few}", "--batch_size=4",
        "--w_d2q=0.5", "--w_q2d=0.5", "--learning_rate=5e-3", "--max_steps=120",
        "--eval_interval=120", "--save_interval=120")  # fmt: skip
    right, shuffled, none = (losses(tmp_path / "out", f"eval_d2q_{kind}loss")[120]
                             for kind in ("", "shuffled_", "none_"))  # fmt: skip
    assert right < 0.05 and shuffled > 1 and none > 0.3
    assert "the right anchor saves" in capsys.readouterr().out
    for q, d in pairs.items():
        for text, side, want in ((q, "query", d), (d, "document", q)):
            monkeypatch.setattr("sys.argv", ["sample.py", f"--model={tmp_path / 'out'}",
                                f"--reconstruct={text}", f"--reconstruct_side={side}"])  # fmt: skip
            harness.runpy.run_path(f"{harness.ROOT}/sample.py", run_name="__main__")
            out = capsys.readouterr().out
            assert out.strip().splitlines()[-1].strip() == f"{want} mos", out
            assert "ended by its EOS" in out


# ---- configs ----
@pytest.mark.parametrize(("base", "batch"), [
    ("meta-llama/Llama-3.2-1B-Instruct", 512), ("meta-llama/Llama-3.2-3B-Instruct", 1024),
    ("meta-llama/Meta-Llama-3.1-8B-Instruct", 512), ("Qwen/Qwen2.5-1.5B-Instruct", 1024),
    ("Qwen/Qwen3-0.6B", 128)])  # fmt: skip
def test_stages_chain(base, batch):
    one = configured(SCRIPT, "reconstruct_anchor", f"--init_from={base}")
    assert one["batch_size"] == batch and batch % (one["device_batch_size"] * 8) == 0
    two = configured("train_contrastive.py", "contrastive_anchor", f"--init_from={one['out_dir']}")
    name = "contrastive_anchor_baseline"
    baseline = configured("train_contrastive.py", name, f"--init_from={base}")
    for key in ("prefix", "suffix", "data", "passage_instruction", "eval_data"):
        assert one[key] == two[key] == baseline[key], key
    assert two["init_from"] == one["out_dir"] and two["pooling"] == "last"
    differs = {key for key in two if two[key] != baseline[key]}
    # stage II's recipe is the baseline's, but for the batch of the smallest
    assert differs == {"init_from", "out_dir"} | ({"batch_size"} if "1B" in base else set())
    default = configured("train_contrastive.py", "contrastive_anchor")["init_from"]
    assert default == configured(SCRIPT, "reconstruct_anchor")["out_dir"]


def test_the_tiny_stages_chain():
    one = configured(SCRIPT, "reconstruct_pydocs_tiny")
    two = configured("train_contrastive.py", "contrastive_anchor_tiny")
    assert two["init_from"] == one["out_dir"]
    for key in ("query_max_length", "passage_max_length", "batch_size", "prefix", "suffix"):
        assert one[key] == two[key], key
