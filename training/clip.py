"""The contrastive energy: a small CLIPModel. `energy.py` trains it."""
import math

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

import tokenizer as bpe
from common import ATTENTION, load_average

MEAN, STD = [0.70, 0.69, 0.68], [0.28, 0.28, 0.29]


def build(vocabulary=bpe.VOCABULARY):
    torch.manual_seed(11)
    marks = dict(bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1)
    text = dict(vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=2,
                num_attention_heads=4, hidden_act="gelu", max_position_embeddings=bpe.LENGTH, projection_dim=128, **marks)
    vision = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4, image_size=64, hidden_act="gelu",
                  patch_size=8, projection_dim=128)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)
    model = CLIPModel._from_config(config, attn_implementation=ATTENTION)
    model.logit_scale.data.fill_(math.log(15))
    return model


class Bias(torch.nn.Module):
    """The bias of the sigmoid loss, which a CLIPModel does not have."""

    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(-4.0))


class Tower:
    """What `energy.py` asks of a contrastive model."""

    def __init__(self, work):
        self.modules = {"clip": build(), "bias": Bias()}
        self.model, self.tokens = self.modules["clip"], bpe.load(work)

    def load(self, work):
        load_average(work / "clip.pt", **self.modules)
        return self

    def encode(self, texts):
        return bpe.encode(self.tokens, texts)

    def embed_images(self, images):
        """Unit embeddings of images in [-1, 1]."""
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
        states = self.model.vision_model(pixel_values=((images + 1) / 2 - mean) / std).pooler_output
        return F.normalize(self.model.visual_projection(states).float(), dim=-1)

    def embed_texts(self, ids):
        states = self.model.text_model(input_ids=ids).pooler_output
        return F.normalize(self.model.text_projection(states).float(), dim=-1)

    def logits(self, scores):
        return self.model.logit_scale.exp() * scores + self.modules["bias"].value
