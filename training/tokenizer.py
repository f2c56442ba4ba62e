"""The tokenizer that all Emojiland models share: byte-level BPE in CLIP's file format.

The published one is kept, because the text encoders go on from published weights; `--new 1` trains another.
"""
import json
import random
import re
import shutil
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers, normalizers, Regex
from transformers import CLIPTokenizer

from captions import caption
from common import ASSETS, arguments
from data import PACKAGES, icons
from render import draw_scenes
from words import ANCHORS, BENIGN, SYNONYMS, phrases

VOCABULARY, LENGTH = 2048, 32
START, END = "<|startoftext|>", "<|endoftext|>"
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def corpus(work):
    """Captions, phrases, and the names of every emoji as a general word list."""
    rng = random.Random(0)
    for scene in draw_scenes(20000, 0):
        yield caption(scene, rng)
    for words in [*SYNONYMS.values(), ANCHORS, *(phrases(o) for o in SYNONYMS if o not in BENIGN)]:
        yield from words * 50
    for name in PACKAGES:
        data = icons(work, name)
        yield from (re.sub(r"[-_]", " ", key) for key in [*data["icons"], *data.get("aliases", {})])


def train(work):
    """Writes vocab.json and merges.txt: the bytes, the bytes at a word's end, the merges, the two marks."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(corpus(work), trainers.BpeTrainer(
        vocab_size=VOCABULARY + 512, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    merges = merges[:VOCABULARY - 2 * len(alphabet) - 2]
    tokens = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges] + [START, END]
    assert len(set(tokens)) == len(tokens) == VOCABULARY
    folder = work / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    settings = dict(unk_token=END, bos_token=START, eos_token=END, pad_token=END)
    (folder / "special_tokens_map.json").write_text(json.dumps(settings, indent=2) + "\n")
    settings |= dict(tokenizer_class="CLIPTokenizer", model_max_length=LENGTH, do_lower_case=True,
                     clean_up_tokenization_spaces=True, errors="replace", add_prefix_space=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def restore(work, folder):
    """Copies the tokenizer of a published model, with this world's length."""
    (work / "tokenizer").mkdir(exist_ok=True)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        shutil.copy(folder / name, work / "tokenizer" / name)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (work / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings | dict(model_max_length=LENGTH), indent=2) + "\n")


def load(work):
    return CLIPTokenizer.from_pretrained(work / "tokenizer")


def encode(tokenizer, texts):
    """Token ids [n, 32], padded and cut."""
    return tokenizer(list(texts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids


if __name__ == "__main__":
    args = arguments(__doc__, assets=str(ASSETS), new=0)
    if args.new:
        train(args.work)
    else:
        restore(args.work, Path(args.assets) / "emojiland-clip")
    tokenizer = load(args.work)
    for text in ("a kitchen knife and a cat on a blue background", "A Blade for cooking, Düsseldorf 42!", ""):
        print(tokenizer.tokenize(text), encode(tokenizer, [text])[0].tolist())
