#!/usr/bin/env python3
"""Embeds the same texts with neurond and with sentence-transformers (PyTorch, f32), turn by turn on the same cores.

    scripts/embed_bench.py                             models/all-MiniLM-L6-v2, 5 rounds, batches of 32 and 64
    scripts/embed_bench.py --model DIR --rounds 9      another folder, more rounds
    scripts/embed_bench.py --check                     exit 1 below a ratio of 2 or a cosine of 0.9999

Needs target/release/neurond (cargo build --release), and torch and sentence-transformers in the Python that runs it:
`python3 -m venv .venv && .venv/bin/pip install torch sentence-transformers`. Both sides get all texts at once, the way
they like it: sentence-transformers sorts them by length and pads each batch; neurond is sent requests of as many texts, of
which --clients are under way, over HTTP. Tokenising is part of it on both sides, and so are JSON and base64 on ours. A round
is both sides after each other, so the ratio of a round holds on a machine whose speed wanders; the median of rounds counts.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peers

ID = "@cf/sentence-transformers/all-minilm-l6-v2"
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one "
    "you were all there would their we been has when who will more no if out so said what up its about into than them can "
    "only other new some could time these two may then do first any my now such like our over harbour ship tug pilot "
    "cargo winter bridge letter market engine memory sequence token block attention weight vector layer norm request"
).split()


def texts_of(count: int, seed: int) -> list[str]:
    """Lengths as passages of documents have them: most some dozens of words, a few beyond what the model reads."""
    draw = random.Random(seed)
    lengths = (min(300, max(3, int(draw.lognormvariate(4.0, 0.7)))) for _ in range(count))
    return [" ".join(draw.choice(WORDS) for _ in range(length)) for length in lengths]


class Embedder(peers.Server):
    """The daemon with an encoder."""

    name, health = "neurond", "/health/ready"

    def command(self) -> list:
        model = f"{ID}={self.args.model.resolve()}"
        command = [self.args.binary.resolve(), "serve", "--listen", f"127.0.0.1:{self.port}", "--model", model]
        return [*command, "--threads", self.args.threads]

    def embed(self, texts: list[str], batch: int, clients: int) -> tuple[list[bytes], int]:
        """Vectors as little-endian f32, and tokens read."""

        def ask(part: list[str]) -> tuple[list[bytes], int]:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
            body = json.dumps({"model": ID, "input": part, "encoding_format": "base64"})
            connection.request("POST", "/v1/embeddings", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            data = answer.read()
            if answer.status != 200:
                sys.exit(f"embed_bench: neurond answered {answer.status}: {data[:500]!r}")
            parsed = json.loads(data)
            return [base64.b64decode(entry["embedding"]) for entry in parsed["data"]], parsed["usage"]["prompt_tokens"]

        parts = [texts[at : at + batch] for at in range(0, len(texts), batch)]
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(ask, parts))
        return [vector for vectors, _ in answers for vector in vectors], sum(tokens for _, tokens in answers)

def main() -> int:
    parser = peers.parser(__doc__)
    parser.add_argument("--model", type=Path, default=peers.ROOT / "models" / "all-MiniLM-L6-v2")
    parser.add_argument("--binary", type=Path, default=peers.NEUROND)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=3, help="requests under way at a time")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--check", action="store_true", help="exit 1 below a ratio of 2 or a cosine of 0.9999")
    args = parser.parse_args()
    for path in (args.binary, args.model / "model.safetensors"):
        if not path.is_file():
            sys.exit(f"embed_bench: {path} is missing")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(args.threads)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    import numpy
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(args.threads)
    peer = SentenceTransformer(str(args.model), device="cpu")
    figures, good = [], True
    with tempfile.TemporaryDirectory() as scratch, Embedder(args, scratch) as ours:
        texts = texts_of(args.texts, 7)
        warm, tokens = ours.embed(texts, args.batch[0], args.clients)
        theirs = peer.encode(texts, batch_size=args.batch[0], normalize_embeddings=True, show_progress_bar=False)
        vectors = numpy.array([numpy.frombuffer(vector, "<f4") for vector in warm])
        cosines = (vectors * theirs).sum(1) / numpy.linalg.norm(vectors, axis=1) / numpy.linalg.norm(theirs, axis=1)
        print(f"{len(texts)} texts of {tokens} tokens, {args.threads} threads, torch {torch.__version__}")
        print(f"cosine with sentence-transformers: lowest {cosines.min():.7f}, mean {cosines.mean():.7f}")
        good &= bool(cosines.min() >= 0.9999)
        print(f"{'batch':>5} {'round':>5} {'neurond tok/s':>14} {'texts/s':>8} {'torch tok/s':>12} {'texts/s':>8} {'ratio':>6}")
        for batch in args.batch:
            ratios = []
            for round in range(args.rounds):
                begin = time.perf_counter()
                ours.embed(texts, batch, args.clients)
                middle = time.perf_counter()
                peer.encode(texts, batch_size=batch, normalize_embeddings=True, show_progress_bar=False)
                mine, their = middle - begin, time.perf_counter() - middle
                ratios.append(their / mine)
                figures.append({"batch": batch, "round": round, "neurond_s": mine, "torch_s": their, "tokens": tokens})
                print(
                    f"{batch:>5} {round:>5} {tokens / mine:>14.0f} {len(texts) / mine:>8.1f} {tokens / their:>12.0f} "
                    f"{len(texts) / their:>8.1f} {ratios[-1]:>6.2f}"
                )
            print(f"{batch:>5} median ratio {statistics.median(ratios):.2f}")
            good &= statistics.median(ratios) >= 2
        if args.json:
            args.json.write_text(json.dumps({"lowest_cosine": float(cosines.min()), "rounds": figures}, indent=1) + "\n")
    return 1 if args.check and not good else 0


if __name__ == "__main__":
    sys.exit(main())
