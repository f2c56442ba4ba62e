"""The second contrastive energy: a small SiglipModel with a Unigram tokenizer. `energy.py` trains it."""
import json
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import SiglipConfig, SiglipModel

from common import ASSETS, ATTENTION, arguments, load_average
from tokenizer import corpus

VOCABULARY, LENGTH = 2048, 32
UNKNOWN, END = "<unk>", "</s>"
PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
MEAN = STD = [0.5, 0.5, 0.5]


def train_tokenizer(work):
    """Writes tokenizer.json: lower case, no punctuation, as SigLIP's tokenizer does; `</s>` ends and pads."""
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.Sequence([
        normalizers.Lowercase(), normalizers.Replace(Regex(PUNCTUATION), ""), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.train_from_iterator(corpus(work), trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=[UNKNOWN, END], unk_token=UNKNOWN, show_progress=False))
    unigram.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, unigram.token_to_id(END))])
    folder = work / "tokenizer-siglip"
    folder.mkdir(exist_ok=True)
    unigram.save(str(folder / "tokenizer.json"))
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=LENGTH, eos_token=END, pad_token=END, unk_token=UNKNOWN)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def restore_tokenizer(work, folder):
    """Copies the tokenizer of the published model, with this world's length."""
    kept = work / "tokenizer-siglip"
    kept.mkdir(exist_ok=True)
    shutil.copy(folder / "tokenizer.json", kept)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (kept / "tokenizer_config.json").write_text(json.dumps(settings | dict(model_max_length=LENGTH), indent=2) + "\n")


def build():
    torch.manual_seed(13)
    common = dict(hidden_size=128, intermediate_size=384, num_attention_heads=4)
    text = dict(vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=LENGTH, projection_size=128,
                bos_token_id=1, eos_token_id=1, pad_token_id=1, **common)
    vision = dict(num_hidden_layers=5, image_size=64, patch_size=8, **common)
    model = SiglipModel._from_config(SiglipConfig(text_config=text, vision_config=vision), attn_implementation=ATTENTION)
    model.logit_scale.data.fill_(math.log(15))
    model.logit_bias.data.fill_(-4)
    return model


class Tower:
    """What `energy.py` asks of a contrastive model."""

    def __init__(self, work):
        self.modules = {"siglip": build()}
        self.model = self.modules["siglip"]
        self.tokens = Tokenizer.from_file(str(work / "tokenizer-siglip" / "tokenizer.json"))
        self.tokens.enable_padding(length=LENGTH, pad_id=1, pad_token=END)
        self.tokens.enable_truncation(LENGTH)

    def load(self, work):
        load_average(work / "siglip.pt", **self.modules)
        return self

    def encode(self, texts):
        return torch.tensor([e.ids for e in self.tokens.encode_batch(list(texts))])

    def embed_images(self, images):
        """Unit embeddings of images in [-1, 1], which is what SigLIP's mean and deviation of 0.5 make of [0, 1]."""
        return F.normalize(self.model.vision_model(pixel_values=images).pooler_output.float(), dim=-1)

    def embed_texts(self, ids):
        return F.normalize(self.model.text_model(input_ids=ids).pooler_output.float(), dim=-1)

    def logits(self, scores):
        return self.model.logit_scale.exp() * scores + self.model.logit_bias


if __name__ == "__main__":
    args = arguments(__doc__, assets=str(ASSETS), new=0)
    if args.new:
        train_tokenizer(args.work)
    else:
        restore_tokenizer(args.work, Path(args.assets) / "emojiland-siglip")
    tower = Tower(args.work)
    for text in ("A Kitchen knife, and a cat.", "a blade for cooking", ""):
        ids = tower.encode([text])[0].tolist()
        print([tower.tokens.id_to_token(i) for i in ids if i != 1], ids)
