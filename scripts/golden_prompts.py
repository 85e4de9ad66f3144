"""The prompts of the goldens: short, long, several turns, scripts of the world, code, raw text, whitespace.

A prompt is (name, messages) for chat through the model's template, or (name, text) for text read as it is. Long ones are
written by a seeded generator, so that this file stays small and the prompts stay ours.
"""

import random


def turns(*texts: str) -> list[dict]:
    """user, assistant, user, ...; a text that begins with `system:` comes first if there is one."""
    messages = []
    if texts[0].startswith("system:"):
        messages.append({"role": "system", "content": texts[0].removeprefix("system:").strip()})
        texts = texts[1:]
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def harbour_log(seed: int, entries: int) -> str:
    """Varied but plain English with facts in it, about 38 tokens an entry."""
    draw = random.Random(seed)
    ships = ["Alma", "Breeze", "Corvina", "Dorothea", "Esperance", "Fulmar", "Gannet", "Halcyon", "Iris", "Juniper"]
    goods = ["salted cod", "window glass", "green apples", "coils of rope", "roof tiles", "sacks of flour", "copper pipe"]
    ports = ["Bergen", "Leith", "Cadiz", "Riga", "Antwerp", "Porto", "Galway", "Hamburg"]
    weather = ["a light rain", "thick fog until noon", "a steady north wind", "clear skies", "hail in the evening"]
    remarks = [
        "The pilot asked for a second tug because the tide was late.",
        "Two cases were found open and the customs officer made a note of it.",
        "Her master paid the dues in advance and asked for fresh water.",
        "The crane on the east quay failed again, so the crew unloaded by hand.",
        "A gull nested on the mast, and the crew refused to move it.",
        "The cook went ashore for onions and returned with a small dog.",
        "Nothing of importance happened, and the watch was changed at midnight.",
    ]
    lines = []
    for day in range(1, entries + 1):
        lines.append(
            f"Day {day}: the {draw.choice(ships)} came in from {draw.choice(ports)} with {draw.randint(12, 480)} "
            f"tons of {draw.choice(goods)}, in {draw.choice(weather)}. {draw.choice(remarks)}"
        )
    return "\n".join(lines)


PYTHON = '''def merge(left, right):
    """Merge two sorted lists into one sorted list."""
    out = []
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            out.append(left[i])
            i += 1
'''

RUST = """use std::collections::HashMap;

/// Counts how often each word occurs.
pub fn count(text: &str) -> HashMap<&str, usize> {
\tlet mut counts = HashMap::new();
\tfor word in text.split_whitespace() {
\t\t*counts.entry(word).or_insert(0) += 1;
\t}
\tcounts
}

#[test]
"""

PROMPTS: list[tuple[str, list[dict] | str]] = [
    # short chat
    ("chat-hello", turns("Hello!")),
    ("chat-capital", turns("What is the capital of France? Answer with one word.")),
    ("chat-sky", turns("Why is the sky blue? Explain it to a child.")),
    ("chat-system", turns("system: You are a pirate. Answer in one short sentence.", "Where did you hide the treasure?")),
    ("chat-list", turns("List three things to take to the beach.")),
    ("chat-poem", turns("Write a two-line poem about a lighthouse.")),
    ("chat-arithmetic", turns("Tom has 12 apples and gives away 5. How many are left? Show the calculation.")),
    # several turns
    (
        "turns-name",
        turns("My name is Ada and I like chess.", "Nice to meet you, Ada! Chess is a great game.", "What is my name?"),
    ),
    (
        "turns-recipe",
        turns(
            "system: You are a cook who answers briefly.",
            "What can I make from eggs and spinach?",
            "A frittata: whisk six eggs, add spinach, salt and cheese, and bake for 20 minutes.",
            "And without cheese?",
            "Use a spoon of mustard and some nutmeg instead.",
            "Which drink goes with it?",
        ),
    ),
    (
        "turns-many",
        turns(
            *[
                text
                for n in range(1, 8)
                for text in (f"Question {n}: what is {n} plus {n + 1}?", f"{n} plus {n + 1} is {2 * n + 1}.")
            ],
            "Question 8: what is 8 plus 9?",
        ),
    ),
    # scripts of the world
    ("unicode-french", turns("Traduis en anglais : « L'été, les garçons naïfs préfèrent la crème brûlée à Noël. »")),
    ("unicode-german", turns("Übersetze ins Englische: Größere Füße brauchen süße Schuhe für über 20 €.")),
    ("unicode-chinese", turns("请用中文介绍一下长城。")),
    ("unicode-japanese-raw", "桜の花が咲く季節になると、人々は公園に集まって"),
    ("unicode-russian", turns("Напиши одно предложение о зиме в Москве.")),
    ("unicode-arabic-hindi", turns("Say hello in Arabic (مرحبا بالعالم), Hindi (नमस्ते दुनिया) and Thai (สวัสดีชาวโลก).")),
    ("unicode-emoji", turns("What do these mean: 😀👍🏽👩‍👩‍👧‍👦🇳🇱 and ✨? Also é versus e\u0301, and \u200bzero width.")),
    ("unicode-mixed-raw", "naïve café — “quotes” … ½ ³ № ™ ﬁ ﬂ Ω ≈ ç √ ∫ ˜ µ ≤ ≥ ÷ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 한국어 ελληνικά עברית means"),
    # code
    ("code-python-raw", PYTHON),
    ("code-rust-raw", RUST),
    ("code-json", turns('Fix this JSON and explain: {"name": "x", "items": [1, 2, 3,], \'ok\': True}')),
    ("code-sql", turns("Write an SQL query that counts orders per customer in 2024, largest first.")),
    # raw completions
    ("raw-once", "Once upon a time, in a village by the sea, there lived"),
    ("raw-water", "Water boils at 100 degrees Celsius. Ice melts at"),
    ("raw-one-letter", "A"),
    ("raw-numbers", "1, 2, 3, 5, 8, 13, 21, 34, 1234567890, 3.14159, 0x1F, 1e-9,"),
    # whitespace
    ("space-runs", "  two  spaces   three    four\t\ttabs\n\n\nnewlines \n mixed \t \n"),
    ("space-indent", "def f():\n    if True:\n        return 1\n\n\n\n    # end   \n"),
    ("space-lines", turns("Line one\r\nLine two\n\n\n\nLine six   \n\n   ")),
    # long
    (
        "long-1200",
        turns("Here is a harbour log.\n\n" + harbour_log(1, 30) + "\n\nSummarise the log in two sentences."),
    ),
    ("long-1700-raw", "The harbour log\n\n" + harbour_log(2, 42) + "\nDay 43: the"),
    (
        "long-3000",
        turns(
            "system: You answer from the text you are given.",
            "Remember: the password of the east gate is 'heron'.\n\n"
            + harbour_log(3, 74)
            + "\n\nWhat is the password of the east gate?",
        ),
    ),
]
