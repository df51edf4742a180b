"""Speed and memory of reading data: `python benchmarks/data_prepare.py [--megabytes 1000]`.

Writes a jsonl file of that size from the bundled dialogues, then measures, each in a process of
its own: tokenising texts on one core with and without the accelerator, preparing the file for
training in one process, opening it again, and reading documents from the result. A figure is
printed only after tokens were decoded and compared with their texts.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from rwkv_peft.config import DataConfig
from rwkv_peft.data import tokenizer as tokenizer_module
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.data.tokenizer import Tokenizer

DIALOGUES = Path(tokenizer_module.__file__).parents[1] / "assets" / "dialogues.jsonl"
CHINESE = "你好。这是一段关于循环神经网络的说明文字，它把过去的信息保存在固定大小的状态里。\n\n"


def rows() -> list[dict[str, object]]:
    """A thousand rows of texts and dialogues, one in five Chinese."""
    texts = [json.loads(line)["text"] for line in DIALOGUES.read_text("utf-8").splitlines()]
    found: list[dict[str, object]] = []
    for i in range(1000):
        text = "\n\n".join(texts[(i + k) % len(texts)] for k in range(1 + i % 9))
        found.append({"text": CHINESE * (1 + i % 12) if i % 5 == 0 else text})
        if i % 5 == 1:
            messages = [{"role": "user", "content": texts[i % len(texts)]}]
            found[-1] = {"messages": [*messages, {"role": "assistant", "content": text}]}
    return found


def write(path: Path, megabytes: int) -> None:
    """A file of about that size, no row of which is like another."""
    given, size, number = rows(), 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            row = dict(given[number % len(given)])
            if "text" in row:
                row["text"] = f"{number} {row['text']}"
            else:
                row["messages"] = [{"role": "system", "content": str(number)}, *row["messages"]]
            line = json.dumps(row, ensure_ascii=False) + "\n"
            file.write(line)
            size, number = size + len(line.encode()), number + 1


def tokenise(path: Path, accelerated: bool) -> str:
    """Megabytes of text a second on one core."""
    if not accelerated:
        tokenizer_module._load_accelerator = lambda: None  # type: ignore[assignment]
    tokenizer = Tokenizer()
    texts = [str(row["text"]) for row in rows() if "text" in row] * (20 if accelerated else 5)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts[:800])
    started = time.perf_counter()
    for text in texts:
        tokenizer.encode(text)
    seconds = time.perf_counter() - started
    return f"{sum(len(text.encode()) for text in texts) / seconds / 1e6:.1f} MB/s of text"


def prepare(path: Path, mask: str, is_checked: bool) -> str:
    """Time and peak memory of preparing the file, or of finding it prepared."""
    started = time.perf_counter()
    config = DataConfig(data_file=str(path), loss_mask=mask, data_cache=str(path.parent / "cache"))
    documents = read_documents(config, Tokenizer(), is_checked=is_checked)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = path.stat().st_size / 1e6
    return (
        f"{seconds:.1f} s, {size / seconds:.1f} MB/s of file, {len(documents):,} documents, "
        f"{len(documents.tokens):,} tokens, peak memory {peak:.0f} MiB"
    )


def read(path: Path) -> str:
    """Tokens a second of reading documents in random order from prepared data."""
    config = DataConfig(data_file=str(path), data_cache=str(path.parent / "cache"))
    documents = read_documents(config, Tokenizer())
    order = np.random.default_rng(0).permutation(len(documents))[:200_000]
    started, count = time.perf_counter(), 0
    for i in order:
        count += len(documents.tokens[documents.starts[i] : documents.starts[i + 1]].astype("i8"))
    return f"{count / (time.perf_counter() - started) / 1e6:.1f} million tokens a second"


TASKS = {
    "tokenising, one core, with pyrwkv-tokenizer": lambda path: tokenise(path, True),
    "tokenising, one core, plain Python": lambda path: tokenise(path, False),
    "preparing, one process": lambda path: prepare(path, "auto", False),
    "finding it prepared": lambda path: prepare(path, "auto", False),
    "preparing, every document decoded and compared": lambda path: prepare(path, "none", True),
    "reading documents in random order": read,
}


def main() -> None:
    """Runs every task in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(TASKS[options.task](options.path))
        return
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        write(path, options.megabytes)
        print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB", flush=True)
        for task in TASKS:
            command = [sys.executable, __file__, "--task", task, "--path", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"{task}: {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
