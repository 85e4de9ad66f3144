#!/usr/bin/env python3
"""Writes what an independent implementation (the `tokenizers` package) makes of varied texts, for the tokenizer's tests.

    pip install tokenizers gguf numpy
    scripts/tokenizer_goldens.py [SmolLM2-135M-Instruct.Q4_1.gguf]

src/model/goldens/bpe.json, spm.json   two small tokenizers in tokenizer.json form, trained here on the texts below
src/model/goldens/tokens.json          {"texts": […], rule: [ids of each text]}: bpe.json under every pre-tokenizer
                                       rule, spm.json, and, if the file is given, the demo model's own tokenizer ("demo")
"""
import json
import pathlib
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

GOLDENS = pathlib.Path(__file__).resolve().parent.parent / "src/model/goldens"
CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = rf"{CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"


def llama3(digits: str) -> str:
    return rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"


def camel(tail: str, digits: str) -> str:
    head = r"[^\r\n\p{L}\p{N}]?"
    return rf"{head}{UPPER}*{LOWER}+{tail}|{head}{UPPER}+{LOWER}*{tail}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"


# Rule name in GGUF files: the published regular expressions, look-ahead included.
RULES = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [llama3(r"\p{N}{1,3}")],
    "qwen2": [llama3(r"\p{N}")],
    "tekken": [camel("", r"\p{N}")],
    "gpt-4o": [camel(f"(?i:{CONTRACTIONS})?", r"\p{N}{1,3}")],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + SPACES,
    ],
    "falcon": [r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"],
    "default": [r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}
WHOLE = {"llama-bpe", "tekken"}

TEXTS = [
    "Hello, world!",
    "hello",
    " hello",
    "  hello  world  ",
    "The quick brown fox jumps over the lazy dog. It's what they've said, isn't it? I'M SURE WE'LL SEE; he'd know.",
    "a",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    " \n \n  x",
    "tab\tand\t\ttabs\r\nand windows lines\r\n\r\nend",
    "trailing space ",
    "trailing newline\n",
    "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n\n\nprint(fib(10))  # 55\n",
    "fn main() {\n\tlet x: Vec<u32> = (0..10).map(|i| i * 2).collect();\n\tprintln!(\"{x:?}\");\n}",
    '{"key": [1, 2.5, -3e10, null, true], "nested": {"a": "b\\n"}}',
    "<html><body class=\"x\">&amp;</body></html>",
    "SELECT * FROM t WHERE a >= 10 AND b != 'x' -- comment",
    "0 1 12 123 1234 12345 1,234,567.89 3.14159 1e-5 0xDEADBEEF 2024-01-31",
    "½ ² ٣ ४ Ⅷ ①",
    "naïve café résumé Ångström façade",
    "Größe, Straße, ÄÖÜ äöü ß",
    "Привет, мир! Как дела?",
    "你好，世界！今天天气怎么样？",
    "こんにちは世界。カタカナとひらがな",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "😀 😃😄 👨‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️",
    "math: ∑ᵢ xᵢ² ≤ ∫₀^∞ e^{-x²} dx ≈ √π/2",
    "combining: e\u0301 o\u0308 and composed: é ö",
    "zero\u200bwidth\u200djoin\ufeffbom nbsp\u00a0here\u2003em\u3000ideographic",
    "CamelCaseWords and snake_case_words and SCREAMING_CASE and kebab-case",
    "HTTPServer2Go XMLHttpRequest iPhone15Pro",
    "----====____****####!!!!????....,,,,;;;;",
    "path/to/file.txt C:\\Users\\me\\file.exe https://example.org/a?b=c&d=e#f",
    "'s 't 're 've 'm 'll 'd 'S 'T ''s",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "control \x00\x01\x02\x07\x1b[0m chars \x7f",
    "\x04\x06 a\x04b\x13c",
    "line one\n\n\nline four\n    indented\n        more\n\t\ttabs",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|> <|im_end|><|im_end|>x<|im_start",
    "not special: <|im_ start|> < |im_end|> <|endoftext",
    "<|endoftext|>",
    "\u2581lower one eighth block\u2581\u2581",
    "mixed 中文 and English and 123数字456",
    "\U00010348 \U0001F9D1\u200D\U0001F680 \U000E0041 \U00020000",
]


def staged(patterns: list[str]):
    stages = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*stages, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def special(texts: list[str]) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False) for text in texts]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = staged(RULES["llama-bpe"])
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special(specials), show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def with_rule(tokenizer: Tokenizer, rule: str) -> Tokenizer:
    written = json.loads(tokenizer.to_str())
    written["model"]["ignore_merges"] = rule in WHOLE
    tokenizer = Tokenizer.from_str(json.dumps(written))
    tokenizer.pre_tokenizer = staged(RULES[rule])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Llama 2's kind: spaces as U+2581, one in front, bytes for what no token covers."""
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    learner.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581*[^\u2581]+|\u2581+"), "isolated")
    latin = [text for text in TEXTS if text.isascii() and "<|" not in text and "\x00" not in text and "\x04" not in text]
    learner.train_from_iterator(latin, trainers.BpeTrainer(vocab_size=640, special_tokens=specials, show_progress=False))
    model = json.loads(learner.to_str())["model"]
    vocab = model["vocab"]
    # SentencePiece merges any two neighbours that make a token, so every way to cut a token in two is a merge.
    ranked = list(dict.fromkeys("".join(pair) for pair in model["merges"]))
    merges = [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(special(["<unk>", "<s>", "</s>"]))
    return tokenizer


def demo(path: str) -> Tokenizer:
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.add_special_tokens(special([token for token, kind in zip(tokens, kinds) if kind == 3]))
    return tokenizer


def cases(tokenizer: Tokenizer) -> list:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]


def main() -> None:
    GOLDENS.mkdir(parents=True, exist_ok=True)
    out = GOLDENS / "tokens.json"
    # Without the demo model's file its ids stay as they are.
    written = json.loads(out.read_text()) if out.exists() else {}
    tokenizer = byte_level()
    tokenizers = {rule: with_rule(tokenizer, rule) for rule in RULES}
    tokenizers["spm"] = sentence_piece()
    for file, rule in (("bpe.json", "llama-bpe"), ("spm.json", "spm")):
        (GOLDENS / file).write_text(tokenizers[rule].to_str() + "\n")
    if len(sys.argv) > 1:
        tokenizers["demo"] = demo(sys.argv[1])
    written |= {"texts": TEXTS} | {rule: cases(tokenizer) for rule, tokenizer in tokenizers.items()}
    rows = ",\n".join(
        f"{json.dumps(rule)}: [\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in rows) + "\n]"
        for rule, rows in written.items()
    )
    out.write_text("{\n" + rows + "\n}\n")
    print(f"{out.name}: {len(TEXTS)} texts under {', '.join(tokenizers)}")


if __name__ == "__main__":
    main()
