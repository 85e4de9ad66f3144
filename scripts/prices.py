#!/usr/bin/env python3
"""Writes configs/prices.toml from the public price table that LiteLLM maintains and ships with its package.

    pip install litellm
    python3 scripts/prices.py > configs/prices.toml

Only figures are taken, and of them what is counted here: tokens read, read from and written to a provider's cache, and made."""

import argparse
import importlib.metadata
import importlib.util
import json
import pathlib

# Our slug: its names there, and what stands before the model's name.
PROVIDERS = {
    "openai": (["openai", "text-completion-openai"], [""]),
    "anthropic": (["anthropic"], [""]),
    "google-ai-studio": (["gemini"], ["gemini/"]),
    "google-vertex-ai": (
        [
            "vertex_ai",
            "vertex_ai-language-models",
            "vertex_ai-anthropic_models",
            "vertex_ai-mistral_models",
            "vertex_ai-llama_models",
            "vertex_ai-embedding-models",
        ],
        ["vertex_ai/", ""],
    ),
    "aws-bedrock": (["bedrock", "bedrock_converse"], [""]),
    "azure-openai": (["azure"], ["azure/"]),
    "groq": (["groq"], ["groq/"]),
    "mistral": (["mistral"], ["mistral/"]),
    "deepseek": (["deepseek"], ["deepseek/", ""]),
    "openrouter": (["openrouter"], ["openrouter/"]),
    "cohere": (["cohere", "cohere_chat"], [""]),
    "perplexity-ai": (["perplexity"], ["perplexity/"]),
    "grok": (["xai"], ["xai/"]),
    "cerebras": (["cerebras"], ["cerebras/"]),
    "fireworks": (["fireworks_ai", "fireworks_ai-embedding-models"], ["fireworks_ai/"]),
    "baseten": (["baseten"], ["baseten/"]),
    "replicate": (["replicate"], ["replicate/"]),
}
# Ours, theirs: each in US dollars a token.
FIELDS = {
    "input": "input_cost_per_token",
    "cached": "cache_read_input_token_cost",
    "written": "cache_creation_input_token_cost",
    "output": "output_cost_per_token",
}
THRESHOLDS = {"128k": 128_000, "200k": 200_000, "256k": 256_000, "272k": 272_000, "512k": 512_000}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=pathlib.Path, help="the table; looked for in the installed package if left out")
    args = parser.parse_args()
    table = args.table or table_of_package()
    prices = json.loads(table.read_text())
    version = importlib.metadata.version("litellm") if not args.table else "of unknown version"
    print(HEADER.format(version=version).strip())
    for slug, (names, prefixes) in PROVIDERS.items():
        lines = {}
        for name, entry in prices.items():
            if entry.get("litellm_provider") not in names:
                continue
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            # Other names of a region or an order are longer paths that no caller sends.
            model = name[len(prefix) :] if prefix is not None else name
            row = fields(entry)
            if row and model and not model.startswith(("1024-x-", "us/", "eu/", "global/")):
                lines[model] = row
        print(f"\n[{slug}]")
        for model in sorted(lines):
            print(f"{json.dumps(model)} = {{ {lines[model]} }}")


def table_of_package():
    package = pathlib.Path(importlib.util.find_spec("litellm").origin).parent
    return package / "model_prices_and_context_window_backup.json"


def fields(entry):
    found = values(entry, "")
    if not any(found.values()):
        return None
    long = next((key for key in THRESHOLDS if f"input_cost_per_token_above_{key}_tokens" in entry), None)
    text = ", ".join(f"{name} = {usd(value)}" for name, value in found.items())
    if long:
        more = values(entry, f"_above_{long}_tokens")
        text += f", over = {THRESHOLDS[long]}, long = {{ " + ", ".join(f"{n} = {usd(v)}" for n, v in more.items()) + " }"
    return text


def values(entry, ending):
    found = {name: entry.get(theirs + ending) for name, theirs in FIELDS.items()}
    return {name: float(value) for name, value in found.items() if value is not None and float(value) >= 0}


def usd(a_token):
    """A million tokens, without the noise of floating point."""
    return f"{a_token * 1e6:.6f}".rstrip("0").rstrip(".") or "0"


HEADER = """
# What other providers' models cost, in US dollars per million tokens: read (input), read from the provider's cache (cached),
# written to it (written), made (output). Where `cached` or `written` is left out, such tokens cost as much as others. Prompts of
# more than `over` tokens cost `long` instead.
#
# Estimates: list prices as published, collected by LiteLLM {version} (its model_prices_and_context_window.json);
# scripts/prices.py makes this file. Compiled into the daemon. To change a price or add a model, write a file of the same form
# and name it in neurond.toml under [prices] path; `[custom-NAME]` holds those of a custom provider.
"""

if __name__ == "__main__":
    main()
