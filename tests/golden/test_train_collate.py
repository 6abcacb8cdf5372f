"""Golden case 10: the published conversation formats, token by token, what of them is learnt, and the order of batches."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from mova_core.data import IMAGE_MARK, read_samples
from mova_core.processing import IGNORE, MoVAProcessor
from mova_core.samplers import length_groups, modality_groups

MARK = -200  # a picture in the published ids
RUNS = {  # chat format and records of each run
    "v1": ("vicuna_v1", "data"),
    "v1_short": ("vicuna_v1", "data"),
    "v1_legacy_false": ("vicuna_v1", "data"),
    "v1_mismatch": ("vicuna_v1", "mismatch"),
    "plain": ("plain", "plain"),
    "llama_2": ("llama_2", "data"),
    "mpt_llama3_tokenizer": ("mpt", "data"),
    "hypothetical_mova_llama3_via_preprocess_mpt": ("mova_llama3", "data"),
}
# The published code counts one token too few per round of these, or trips over its own separators inside a text, and
# then learns nothing of the sample. Here the answers are learnt.
UNLEARNT = ("v1_mismatch", "mpt_llama3_tokenizer", "hypothetical_mova_llama3_via_preprocess_mpt")


@pytest.fixture(scope="module")
def processors(golden):
    made = {}

    def processor(run):
        if run not in made:
            facts = golden("train_collate")[1]["runs"][run]
            llama = facts["tokenizer"] == "LlamaTokenizer"
            folder = golden.dir / ("shared_spm_llama_tokenizer" if llama else "shared_llama3_tokenizer")
            tokenizer = AutoTokenizer.from_pretrained(folder, **({"legacy": facts["legacy"]} if llama else {}))
            tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_MARK]})
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(facts["pad_token_id"])
            made[run] = MoVAProcessor(tokenizer, tokenizer, image_tokens=1, routing_tokens=1, chat_format=RUNS[run][0])
        return made[run]

    return processor


def samples(golden, tmp_path, run):
    records = golden("train_collate")[1]["data"][RUNS[run][1]]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return read_samples(tmp_path / "data.json", golden.dir / "images")


def published_ids(ids, processor):
    return ids.masked_fill(ids == processor.image_token_id, MARK)


@pytest.mark.parametrize("run", RUNS)
def test_samples(golden, processors, tmp_path, run):
    tensors, facts = golden("train_collate")
    processor, limit = processors(run), facts["runs"][run]["model_max_length"]
    for index, sample in enumerate(samples(golden, tmp_path, run)):
        ours = processor([sample.turns], [sample.image], labels=True, pixels=False, padding_side="right")
        ids, labels = published_ids(ours["input_ids"][0], processor), ours["labels"][0]
        cut = limit if sample.image is None else None  # a sample with a picture is cut in the batch
        wanted = tensors[f"{run}.{index}.input_ids"].long()
        if sample.id == "m1":  # an end mark and a space inside a question: transformers 4 put one more space there
            typed = wanted.tolist().index(processor.tokenizer.eos_token_id)
            wanted = torch.cat([wanted[: typed + 1], wanted[typed + 2 :]])
        assert torch.equal(ids[:cut], wanted), sample.id
        answers = [text for role, text in sample.turns if role == "assistant"]
        if run not in UNLEARNT:
            assert torch.equal(labels[:cut], tensors[f"{run}.{index}.labels"].long()), sample.id
        else:
            learnt = processor.tokenizer.decode(labels[labels != IGNORE])
            end = {"v1_mismatch": "</s>", "mpt_llama3_tokenizer": "<|im_end|>"}.get(run, "<|eot_id|>")
            assert learnt == "".join(f"{answer}{end}" for answer in answers)


@pytest.mark.parametrize("run", [run for run in RUNS if run not in UNLEARNT])
def test_batches(golden, processors, tmp_path, run):
    tensors, facts = golden("train_collate")
    processor = processors(run)
    batch = samples(golden, tmp_path, run)
    ours = processor(
        [sample.turns for sample in batch],
        [sample.image for sample in batch],
        labels=True,
        padding_side="right",
        max_length=facts["runs"][run]["model_max_length"],
        pixels=False,
    )
    for name in ("input_ids", "labels", "attention_mask"):
        wanted = tensors[f"{run}.batch.{name}"].long()  # the project's own copy holds them narrow
        found = published_ids(ours[name], processor) if name == "input_ids" else ours[name]
        if name == "attention_mask":  # the published one also hides every unknown token, whose id its padding has
            wanted[(tensors[f"{run}.batch.input_ids"] == processor.tokenizer.pad_token_id) & found.bool()] = 1
        assert torch.equal(found, wanted), name


def test_order_of_batches(golden):
    """The published sampler's order for the same seeds, and its even dealing."""
    facts = golden("train_collate")[1]["sampler"]
    lengths = facts["lengths"]
    plain = [abs(length) for length in lengths]
    outer = torch.Generator().manual_seed(1)
    assert length_groups(plain, 2, 2, outer).tolist() == facts["length_grouped(batch2,world2)"]
    torch.manual_seed(0)  # the published order within a modality comes from the global generator
    outer = torch.Generator().manual_seed(1)
    assert modality_groups(lengths, 2, 2, outer).tolist() == facts["modality_grouped(batch2,world2)"]


def test_sample_lengths(golden, tmp_path):
    published = golden("train_collate")[1]["runs"]["v1"]["modality_lengths"]
    ours = [sample.length for sample in samples(golden, tmp_path, "v1")]
    published[3] -= 2  # the published count takes in the opening turn that is not learnt
    assert ours == published
