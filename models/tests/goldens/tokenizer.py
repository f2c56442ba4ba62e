"""Makes the folders below `tokenizers/`, small tokenizers in CLIP's file format, two Unigram ones as SigLIP and T5 have and one
as SigLIP 2 has, and `tokenizers/golden.json`, what transformers makes of a few hundred awkward texts with each.

    python tokenizer.py            (transformers 5.24, tokenizers 0.23; the BPE trainer breaks ties at random, so two runs
                                    give other merges, each with its golden)
    python tokenizer.py siglip2    that one alone; it is the same each time
"""
import json
import random
import shutil
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, Siglip2Tokenizer

OUT = Path(__file__).parent / "tokenizers"
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = """a photo of the cat dog kitchen knife on blue background street bottle wine glass of beer and an old painting
in the style of red green yellow large small picture with two three people holding isn't don't we're they'll I've it's
house car tree night sky water mountain bomb skull coffin syringe pill cigarette Düsseldorf café naïve München über
кошка собака нож 猫 犬 ナイフ 고양이""".split()

AWKWARD = [
    "", " ", "   ", "\t\n\r", "a", "A", "a ", " a", "a  b", "a\tb\nc\r\nd", "a\u00a0b", "a\u3000b", "a\u2028b\u2029c", "\u200b", "a\u200bb",
    "\ufeffa", "a\x00b", "\x01\x02", "\x7f", "\x85a\x85b", "a photo of a cat", "A PHOTO OF A CAT", "a photo, of: a (cat)!!! ...",
    "(cat:1.2), [dog:0.5], ((knife))", "cat|dog", "cat_dog-knife", "__init__", "e.g. i.e. etc.", "hello,world", "a.b.c", "...", "!", "!!", "?!?!",
    "don't", "DON'T", "don\u2019t", "isn't it's we're they'll I've I'm he'd", "'s 't 're 've 'm 'll 'd", "'S 'T 'RE 'VE 'M 'LL 'D", "rock'n'roll", "''s", "'",
    "cats' toys", "o'clock 'tis", "1", "12", "123456", "1.5", "3,000", "1st 2nd 3rd", "x2", "2x", "v1.5", "\u0661\u0662\u0663", "\u00b2\u00b3\u00b9", "\u00bd", "\u2167 \u2168", "\uff11\uff12",
    "caf\u00e9", "cafe\u0301", "CAF\u00c9", "CAFE\u0301", "na\u00efve", "\u00e9\u0301\u0302", "\u0301", "a\u0301\u0323", "D\u00fcsseldorf", "\u1e9e \u00df SS", "\u0130stanbul", "\u0131", "\u01c5 \u01c6 \u01c4", "\u039f\u0394\u039f\u03a3", "\u03a3",
    "\ufb01ne \ufb03", "\uff21\uff22\uff23", "\u212b \u00c5", "\u2126 \u03a9", "\uac00 \u1100\u1161", "\ud55c\uad6d\uc5b4 \uace0\uc591\uc774", "\u732b\u3068\u72ac", "\u30ca\u30a4\u30d5\uff76\uff9e", "\u4e2d\u6587\uff0c\u6807\u70b9\u3002", "\u043a\u043e\u0448\u043a\u0430 \u0438 \u041d\u041e\u0416",
    "\u0627\u0644\u0642\u0637\u0629 \u0633\u0643\u064a\u0646\u064c", "\u05d7\u05ea\u05d5\u05dc\u05b0", "\u0e41\u0e21\u0e27\u0e19\u0e49\u0e33", "\u092c\u093f\u0932\u094d\u0932\u0940", "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd", "\u1019\u103c\u1014\u103a\u1019\u102c",
    "\U0001f600", "\U0001f52a\U0001f37a", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "1\ufe0f\u20e3", "cat\U0001f431cat", "\U0001f3f4\U000e0067\U000e0062\U000e007f",
    "\U00010400 \U00010428", "\U0001d400\U0001d401", "\U00020000", "\ue000", "\U000f0000", "\ufffd", "\ufdd0", "\u0345", "\u0307i", "I\u0307",
    "<|startoftext|>", "<|endoftext|>", "a <|endoftext|> b", "a<|endoftext|>b", "<|ENDOFTEXT|>", "<|StartOfText|> cat", "<|endoftext|><|endoftext|>",
    "< |endoftext|>", "<|endoftext", "|endoftext|>", "<cat-toy>", "a <cat-toy> toy", "<CAT-TOY>", "x<cat-toy>y", "<cat-toy", "</w>", "a</w>", "cat</w> dog",
    "<html>&amp;&lt;</html>", "https://example.org/a?b=c&d=%20", "me@example.org", "C:\\path\\file", "\\n", "{\"a\": 1}", "#hashtag @user", "$5 \u20ac5 \u00a35",
    "\u2014 \u2013 \u2026 \u201cquoted\u201d \u00abso\u00bb", "50% off", "a/b", "a+b=c", "~`^*", "\u221a\u222b\u2211", "\u2190\u2192", "\u2588\u2591", "x" * 120, "xyz" * 50, "!" * 90, "1" * 40,
    "a " * 60, "\u00e9" * 40, "\U0001f600" * 12, " ".join(WORDS), "a photo of a cat, " * 120,
]


def random_texts(count):
    """Texts of code points from every corner, surrogates aside."""
    rng = random.Random(0)
    ranges = [(0, 0x7f), (0x20, 0x7e), (0x80, 0x24f), (0x250, 0x52f), (0x590, 0x6ff), (0x900, 0x97f), (0xe00, 0xe7f), (0x1100, 0x11ff), (0x1e00, 0x20cf),
              (0x2100, 0x27bf), (0x3000, 0x30ff), (0x4e00, 0x4fff), (0xac00, 0xacff), (0xfb00, 0xfdff), (0xfe00, 0xffff), (0x1f300, 0x1faff)]
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 8)):
            if rng.random() < 0.4:
                parts.append(rng.choice(WORDS + AWKWARD[:60]))
            else:
                low, high = rng.choice(ranges)
                parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 4))))
        yield rng.choice(["", " "]).join(parts)


def files(folder, settings, specials=None):
    """A vocabulary as CLIP's: the bytes, the bytes at a word's end, the merges, the two marks."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    # CLIP's order of the bytes, in which "!" is 0.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) > 255, ord(c)))
    bpe.train_from_iterator(WORDS * 3, trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = list(dict.fromkeys(alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges] + [START, END]))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="CLIPTokenizer") | settings, indent=1) + "\n")
    if specials:
        (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=1) + "\n")


def unigram(folder, end, pad, length, lower):
    """A tokenizer.json whose windows end in `end` and are filled with `pad`."""
    tokenizer = Tokenizer(models.Unigram())
    if lower:
        tokenizer.normalizer = normalizers.Sequence([
            normalizers.Lowercase(), normalizers.Replace(Regex(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"), ""),
            normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = list(dict.fromkeys([pad, end, "<unk>"]))
    # Fixed scores: the trainer's depend on the order of a hash map.
    pieces = list(dict.fromkeys("".join(WORDS) + "abcdefghijklmnopqrstuvwxyz0123456789.,!?'()"))
    words = list(dict.fromkeys(["▁" + word for word in WORDS] + WORDS[::3]))
    vocabulary = [(s, 0.0) for s in specials] + [("▁", -3.0)] + [(w, -4.0 - 0.01 * i) for i, w in enumerate(words)]
    vocabulary += [(c, -6.0 - 0.01 * i) for i, c in enumerate(p for p in pieces if p not in words)]
    tokenizer.model = models.Unigram(vocabulary, unk_id=specials.index("<unk>"), byte_fallback=False)
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, specials.index(end))])
    shutil.rmtree(folder, ignore_errors=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=pad, unk_token="<unk>",
                            model_max_length=length).save_pretrained(folder)


def siglip2(folder):
    """As Google's SigLIP 2: Gemma's BPE, whose file does not lower-case; the class does. It pads on the right."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = list(dict.fromkeys("▁" + "".join(WORDS).lower() + "abcdefghijklmnopqrstuvwxyz0123456789.,!?'()ABC"))
    tokens = specials + [f"<0x{byte:02X}>" for byte in range(256)] + letters
    merges = []
    for word in WORDS:
        built = "▁"
        for letter in word.lower():
            if (built, letter) not in merges and letter in letters:
                merges.append((built, letter))
            built += letter
    tokens = list(dict.fromkeys(tokens + [a + b for a, b in merges]))
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, fuse_unk=True,
                                     unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="Siglip2Tokenizer", do_lower_case=True, padding_side="right", model_max_length=16, add_bos_token=False,
        add_eos_token=True, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"), indent=1) + "\n")


def added(content):
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def golden(folder, texts, kind=CLIPTokenizer):
    """Per text its ids without marks, and the padded and cut window that diffusers' pipelines use."""
    tokenizer = kind.from_pretrained(folder)
    length = tokenizer.model_max_length
    return [dict(text=text, ids=tokenizer(text, add_special_tokens=False).input_ids,
                 window=tokenizer(text, padding="max_length", truncation=True, max_length=length).input_ids) for text in texts]


def everything(texts):
    # As Stable Diffusion 1.5: marks as objects, padding with the end mark.
    files(OUT / "sd15", dict(
        bos_token=added(START), eos_token=added(END), unk_token=added(END), pad_token=END, model_max_length=77, do_lower_case=True,
        add_prefix_space=False, errors="replace"))
    # As Stable Diffusion 2.1: the map's padding with "!", whose id is 0, overrules the config's.
    files(OUT / "sd21", dict(model_max_length=16, do_lower_case=True, pad_token=END),
          dict(bos_token=START, eos_token=END, unk_token=END, pad_token="!"))
    # As transformers 5 saves it: tokenizer.json only, with a token of textual inversion added.
    tokenizer = CLIPTokenizer.from_pretrained(OUT / "sd15")
    tokenizer.add_tokens([AddedToken("<cat-toy>")])
    tokenizer.model_max_length = 20
    shutil.rmtree(OUT / "whole", ignore_errors=True)
    tokenizer.save_pretrained(OUT / "whole")
    result = {name: golden(OUT / name, texts) for name in ("sd15", "sd21", "whole")}
    unigram(OUT / "siglip", "</s>", "</s>", 12, lower=True)
    unigram(OUT / "t5", "</s>", "<pad>", 30, lower=False)
    result |= {name: golden(OUT / name, texts, PreTrainedTokenizerFast) for name in ("siglip", "t5")}
    return result


if __name__ == "__main__":
    texts = AWKWARD + list(random_texts(200))
    if sys.argv[1:] == ["siglip2"]:
        result = json.loads((OUT / "golden.json").read_text())
    else:
        result = everything(texts)
    siglip2(OUT / "siglip2")
    result["siglip2"] = golden(OUT / "siglip2", texts, Siglip2Tokenizer)
    (OUT / "golden.json").write_text(json.dumps(result, separators=(",", ":")) + "\n")
    for path in sorted(OUT.rglob("*")):
        print(path.relative_to(OUT), path.stat().st_size)
