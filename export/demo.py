"""Train the embedded demo model: a small Llama on the text of CPython's own documentation strings.

    python -m fastgen.export.demo OUT_DIR [--recipe RECIPE]

`OUT_DIR` becomes a plain transformers directory (`from_pretrained` reads it), with two files
besides: `held_out.txt`, the documents that training never saw, each followed by the end-of-text
token, and `training.json`, what was trained and how well it predicts those documents.

The data flows corpus -> split -> tokenizer -> windows -> training -> directory. Nothing is
downloaded, and everything random is drawn from `Recipe.seed`: the same interpreter, torch and
processor give the same weights. Another Python release has other docstrings, hence another
model; `training.json` has the corpus' digest for that reason.

The recipe `manual` reads the pages of Debian's python3-doc too, and the comments of the library's
sources, both without what repeats a held-out document (`manual.without`); what is held out is the
same. It starts from what the recipe `demo` made (`--grow DIR`), with twice its width. It takes
hours, so `OUT_DIR/checkpoint.pt` is written at every look at the held-out text, and the same
command goes on from there. A file `OUT_DIR/finish` lets the rate fall at once, in as many steps as
it says, or as the recipe does.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import inspect
import json
import math
import os
import platform
import random
import re
import sys
import sysconfig
import time
import tokenize
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy, dropout
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fastgen.export import manual

END = "<|endoftext|>"

# Not documentation of the library, though installed inside it; and two packages of a hundred
# modules that say one sentence each, nearly the same: a model that saw them answers every
# "The ... module" with that sentence.
SKIPPED_PACKAGES = frozenset({"test", "tests", "idlelib", "turtledemo", "encodings", "fixes"})

# Characters below which a class is a paragraph of its module, not a document of its own: with
# hundreds of one-line documents the model would end most texts after a line.
SHORT_CLASS = 600

# Where a reader meets what these modules define: nobody calls `posixpath.join`.
PUBLIC_NAMES = {
    "_codecs": "codecs",
    "_collections": "collections",
    "_collections_abc": "collections.abc",
    "_functools": "functools",
    "_io": "io",
    "_operator": "operator",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "_signal": "signal",
    "_strptime": "time",
    "_weakrefset": "weakref",
    "builtins": "",
    "genericpath": "os.path",
    "nt": "os",
    "posix": "os",
    "posixpath": "os.path",
}

# Modules in C that every interpreter has loaded before it reads a script: they have no source to
# parse, and looking at what is loaded runs nobody's code.
COMPILED_MODULES = (
    "_codecs",
    "_collections",
    "_functools",
    "_io",
    "_operator",
    "_signal",
    "_thread",
    "builtins",
    "itertools",
    "nt" if sys.platform == "win32" else "posix",
    "sys",
    "time",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every constant of the training, each with its reason."""

    kind: str = "llama"  # transformers' name of the architecture
    more: Mapping[str, Any] = field(default_factory=dict)  # of its configuration
    seed: int = 7  # of the initial weights, the dropout, the order of documents and the windows
    held_out_bytes: int = 60_000  # 3% of the corpus, and little enough to ship
    vocab_size: int = 2048  # 3.1 bytes a token, for a fifth of the weights
    context: int = 512  # a class with its methods, or a screenful of a topic
    hidden_size: int = 192  # with 4 layers and tied embeddings: 2.1 million weights, 8.5 MB in fp32
    layers: int = 4  # the middle way: 8 of 128 and 2 of 256 have about as many weights
    intermediate_size: int = 576  # three times the hidden size: what grouped keys save goes here
    heads: int = 6  # of 32 numbers each
    key_value_heads: int = 2  # grouped, so that the demo exercises what large models do
    rows: int = 4  # small batches: the time is fixed, and steps are worth more than smooth ones
    steps: int = 3200  # some 8 passes over the corpus, 25 minutes of one core with bfloat16
    warm_up: int = 150  # steps until the full rate: the first gradients are all alike
    rate: float = 3e-3  # small models bear high rates, and the steps are few
    final_rate: float = 3e-5  # of the end
    fall: int = 0  # steps in which the rate falls, in a line; 0: from the warm-up on, half a cosine
    weight_decay: float = 0.1  # the corpus is smaller than the model could learn by heart
    dropout: float = 0.1  # for the same reason; on embeddings and on what each block adds
    betas: tuple[float, float] = (0.9, 0.98)  # a longer memory of variance: the batches are noisy
    clip: float = 1.0  # largest norm of a gradient
    document_starts: float = 0.25  # share of windows that start as a prompt does: at a beginning
    evaluate_every: int = 200  # steps between looks at the held-out text
    manual: bool = False  # the manual's pages and the library's comments are read too
    docstrings: int = 1  # times that they are in the text: the manual is four times as long
    times: int = 1  # the width of a trained model that it starts from; widths are of that model
    bfloat16: bool = True  # products in bfloat16: 1.6 times faster where the processor has them


RECIPES = {
    "demo": Recipe(),
    # Nearly eight million weights on five times the text, from the model of `demo` with twice its
    # width (`grown`). There is more text than is read thrice, hence no dropout: 83 minutes of
    # two cores. What is held out stopped to be told better at step 2,600, where the rate began to
    # fall. (The file `finish` ends it elsewhere.)
    "manual": Recipe(
        manual=True, docstrings=2, times=2, rows=8, steps=3647, warm_up=50, rate=1e-3, fall=1000,
        dropout=0.0, evaluate_every=100,
    ),
    # The others are for what quantising does to them. Eleven million weights: 40 minutes.
    "larger": Recipe(hidden_size=384, layers=6, intermediate_size=1152, steps=1400, rate=2e-3),
    # A mixture of experts, two of eight for each token: 10 minutes.
    "mixture": Recipe(
        kind="mixtral", hidden_size=128, intermediate_size=192, heads=4, steps=800,
        more={"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    # Three layers of recurrence (Mamba-2) and one of attention: 10 minutes.
    "hybrid": Recipe(
        kind="bamba", hidden_size=128, intermediate_size=384, heads=4, steps=800,
        more={
            "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 32,
            "mamba_chunk_size": 64, "attn_layer_indices": [2],
        },
    ),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Train the model and write its directory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="the directory to write")
    parser.add_argument("--steps", type=int, help="default: what the recipe says")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--recipe", choices=RECIPES, default="demo", help="default: %(default)s")
    parser.add_argument(
        "--manual",
        type=Path,
        default=manual.INSTALLED,
        metavar="DIR",
        help="the pages of python3-doc in reST; default: where the package puts them",
    )
    parser.add_argument(
        "--grow", type=Path, metavar="DIR", help="what the recipe 'demo' made, for 'manual'"
    )
    arguments = parser.parse_args(argv)
    recipe = RECIPES[arguments.recipe]
    recipe = replace(recipe, steps=arguments.steps or recipe.steps)
    if recipe.manual and not arguments.manual.is_dir():
        parser.error(
            f"--manual: {arguments.manual} is not a directory: {arguments.recipe!r} reads the "
            "manual's pages in reST (apt-get install python3.11-doc)"
        )
    if (recipe.times > 1) != (arguments.grow is not None):
        parser.error("--grow belongs to recipes of a model that starts from another: manual")
    build(arguments.out, recipe, arguments.threads, arguments.manual, arguments.grow)


def build(
    out: Path,
    recipe: Recipe,
    threads: int = 1,
    pages: Path = manual.INSTALLED,
    small: Path | None = None,
) -> None:
    """Make the demo model of `recipe` in the directory `out`, showing progress on stdout."""
    torch.set_num_threads(1)
    documents = corpus()
    training, held_out = split(documents, recipe.held_out_bytes)
    training *= recipe.docstrings
    if recipe.manual:
        more = manual.without(held_out, [*manual.pages(pages), *comments()])
        documents, training = documents + more, training + more
    random.Random(recipe.seed).shuffle(training)  # so that neighbours tell nothing of each other
    if small:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(small)
    else:
        tokenizer = train_tokenizer(training, recipe)
    training_ids = encode(tokenizer, training)
    held_out_ids = encode(tokenizer, held_out)
    torch.manual_seed(recipe.seed)
    model = make_model(recipe, tokenizer)
    if small:
        grow(AutoModelForCausalLM.from_pretrained(small), model, recipe.times)
    facts = {
        "corpus_sha256": hashlib.sha256(END.join(documents).encode()).hexdigest(),
        "corpus_documents": len(documents),
        "corpus_bytes": size(documents),
        "training_tokens": len(training_ids),
        "held_out_bytes": size(held_out),
        "held_out_tokens": len(held_out_ids),
        "parameters": model.num_parameters(),
    }
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n", flush=True)
    started = time.monotonic()
    best_step, recipe = train(
        model, training_ids, held_out_ids, recipe, threads, out if recipe.fall else None
    )
    facts |= {"seconds": round(time.monotonic() - started), "best_step": best_step}
    facts |= quality(held_out_loss(model, held_out_ids, recipe), facts)
    write(out, model, tokenizer, held_out, facts | versions() | {"recipe": asdict(recipe)})
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n", flush=True)


# ---------------------------------------------------------------------------------- the corpus


def corpus() -> list[str]:
    """The documents: pydoc's topics, then the modules and classes of the standard library.

    A document is a module with its functions and short classes, or a class with its methods,
    laid out as a manual would; a docstring that occurs twice is kept once.
    """
    seen: set[str] = set()
    documents = distinct_topics()
    for name, tree in sources():
        documents += source_documents(name, tree, seen)
    for name in COMPILED_MODULES:
        documents += compiled_documents(sys.modules[name], seen)
    return [document for document in dict.fromkeys(documents) if document]


def distinct_topics() -> list[str]:
    """pydoc's topics without those that are a section of a longer one, which is said twice.

    A section held out while its chapter is learnt would make the held-out loss a lie.
    """
    seen: set[str] = set()
    kept: list[str] = []
    for text in sorted(topics.values(), key=lambda text: (-len(text), text)):
        paragraphs = text.strip().split("\n\n")
        known = sum(len(each) for each in paragraphs if each in seen)
        seen.update(paragraphs)
        if known < len(text) / 2:
            kept.append(text.strip())
    return kept


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Each module of the standard library that has a source, by name and parsed, never imported."""
    for name, path in source_files():
        with warnings.catch_warnings():  # of escapes in the library's own strings
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        yield PUBLIC_NAMES.get(name, name), tree


def source_files() -> Iterator[tuple[str, Path]]:
    """Each module of the standard library that has a source: its name, and where that is."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        # A part that is no identifier cannot be imported: site-packages, lib-dynload.
        if SKIPPED_PACKAGES.isdisjoint(parts) and all(part.isidentifier() for part in parts):
            yield ".".join(part for part in parts if part != "__init__"), path


def comments() -> Iterator[str]:
    """The comments of two lines and more in each module's source, but for licences."""
    for name, path in source_files():
        with tokenize.open(path) as file:
            blocks = re.findall(r"(?:^[ \t]*#(?: .*)?\n){2,}", file.read(), re.MULTILINE)
        texts = [re.sub(r"^[ \t]*# ?", "", block, flags=re.MULTILINE).strip() for block in blocks]
        own = [text for text in texts if not re.search("[Cc]opyright|[Ll]icen[cs]e", text)]
        yield layout(f"# {name}", "", own)


def source_documents(name: str, tree: ast.Module, seen: set[str]) -> Iterator[str]:
    """The documents of one parsed module: its own, then one for each class of some length."""
    functions, classes = definitions(tree)
    text = doc(tree, seen)
    entries = [entry(f"{name}.{signature(node)}", doc(node, seen)) for node in functions]
    yield from arrange(name, text, entries, source_classes(name, classes, seen))


def source_classes(name: str, classes: list[ast.ClassDef], seen: set[str]) -> Iterator[str]:
    """The document of each class of the module `name`, and of the classes inside it."""
    classes = list(classes)
    while classes:
        node = classes.pop(0)
        functions, inner = definitions(node)
        classes += inner
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        title = f"class {name}.{node.name}({bases})" if bases else f"class {name}.{node.name}"
        own = doc(node, seen)
        methods = [entry(f"{node.name}.{signature(each)}", doc(each, seen)) for each in functions]
        yield layout(title, own, methods)


Function = ast.FunctionDef | ast.AsyncFunctionDef


def definitions(node: ast.AST) -> tuple[list[Function], list[ast.ClassDef]]:
    """The functions and classes of `node`'s body, also those under an `if` or a `try`."""
    functions: list[Function] = []
    classes: list[ast.ClassDef] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            functions.append(child)
        elif isinstance(child, ast.ClassDef):
            classes.append(child)
        elif isinstance(child, ast.stmt | ast.excepthandler):
            inner_functions, inner_classes = definitions(child)
            functions += inner_functions
            classes += inner_classes
    return functions, classes


def signature(node: Function) -> str:
    """`name(parameters)`, without annotations: the docstrings seldom speak of them."""
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"{node.name}({ast.unparse(node.args)})"


def doc(node: ast.Module | ast.ClassDef | Function, seen: set[str]) -> str:
    """The cleaned docstring of `node`, or nothing if there is none or it is in `seen` already."""
    return unseen(ast.get_docstring(node), seen)


def unseen(text: object, seen: set[str]) -> str:
    """`text` cleaned, and added to `seen`; nothing if it was there, or is no text."""
    cleaned = inspect.cleandoc(text).strip() if isinstance(text, str) else ""
    if cleaned in seen:
        return ""
    seen.add(cleaned)
    return cleaned


def compiled_documents(module: ModuleType, seen: set[str]) -> Iterator[str]:
    """As `source_documents`, of a module in C: from the strings its objects carry."""
    name = PUBLIC_NAMES.get(module.__name__, module.__name__)
    prefix = f"{name}." if name else ""
    public = [(key, value) for key, value in sorted(vars(module).items()) if key[0] != "_"]
    entries = [
        entry(prefix + key + compiled_signature(value), unseen(value.__doc__, seen))
        for key, value in public
        if inspect.isbuiltin(value)
    ]
    classes = compiled_classes(prefix, public, seen)
    yield from arrange(name or "builtins", unseen(module.__doc__, seen), entries, classes)


def compiled_classes(
    prefix: str, public: list[tuple[str, object]], seen: set[str]
) -> Iterator[str]:
    """The document of each class among a compiled module's `public` names and values."""
    for key, value in public:
        if isinstance(value, type):
            own = unseen(value.__doc__, seen)
            methods = [
                entry(f"{key}.{each}{compiled_signature(member)}", unseen(member.__doc__, seen))
                for each, member in sorted(vars(value).items())
                if each[0] != "_"
            ]
            yield layout(f"class {prefix}{key}", own, methods)


def compiled_signature(value: object) -> str:
    """The parameters that an object in C declares; nothing for an attribute."""
    text = getattr(value, "__text_signature__", None)
    if text is None:
        return "(...)" if callable(value) else ""
    return re.sub(r"\$\w+(, )?(/, |/)?", "", text).replace(", /)", ")")


def entry(header: str, text: str) -> str:
    """A function in a document: its header, and its docstring indented as pydoc does."""
    if not text:
        return ""
    indented = "\n".join(f"    {line}".rstrip() for line in text.splitlines())
    return f"{header}\n{indented}"


def arrange(name: str, text: str, entries: list[str], classes: Iterator[str]) -> Iterator[str]:
    """A module's document, with its short classes, then one for each longer class."""
    documents = [document for document in classes if document]
    short = [document for document in documents if len(document) < SHORT_CLASS]
    yield layout(f"The {name} module", text, entries + short)
    yield from (document for document in documents if len(document) >= SHORT_CLASS)


def layout(title: str, text: str, entries: list[str]) -> str:
    """A document of a title, a docstring and entries; nothing if there is nothing but a title."""
    parts = [part for part in (text, *entries) if part]
    return "\n\n".join((title, *parts)) if parts else ""


def split(documents: list[str], held_out_bytes: int) -> tuple[list[str], list[str]]:
    """Training and held-out documents: those of the smallest digests are held out.

    A digest depends on nothing but the document, so a changed corpus moves few others across.
    A document that would exceed `held_out_bytes` is passed over, as is one of more than a tenth
    of them: a loss measured on a handful of long documents would be theirs.
    """
    eligible = [document for document in documents if size([document]) <= held_out_bytes / 10]
    held_out: list[str] = []
    for document in sorted(eligible, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if size([*held_out, document]) <= held_out_bytes:
            held_out.append(document)
        elif size(held_out) > 0.95 * held_out_bytes:
            break
    kept_back = set(held_out)
    return [document for document in documents if document not in kept_back], held_out


def size(documents: list[str]) -> int:
    """Bytes of the documents, the end-of-text token after each not counted."""
    return sum(len(document.encode()) for document in documents)


# ------------------------------------------------------------------------ tokenizer and windows


def train_tokenizer(documents: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the documents: any text can be encoded, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=recipe.context,
        model_input_names=["input_ids", "attention_mask"],
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Token ids int64 `[tokens]` of an end-of-text token, then each document and another one."""
    ids = [tokenizer.eos_token_id]
    for encoding in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
        ids += [*encoding, tokenizer.eos_token_id]
    return torch.tensor(ids)


def windows(
    ids: torch.Tensor, end: int, recipe: Recipe, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Batches int64 `[rows, context + 1]` without end, from places that `generator` draws.

    A prompt is the beginning of a document that no end-of-text token precedes, unless it is
    empty and that token stands for it: some windows start at a document, half of those with it.
    """
    last = len(ids) - recipe.context - 1
    ends = (ids[:last] == end).nonzero().flatten()
    offsets = torch.arange(recipe.context + 1)
    while True:
        anywhere = torch.randint(last + 1, (recipe.rows,), generator=generator)
        document = ends[torch.randint(len(ends), (recipe.rows,), generator=generator)]
        document = document + torch.randint(2, (recipe.rows,), generator=generator)
        at_start = torch.rand(recipe.rows, generator=generator) < recipe.document_starts
        yield ids[torch.where(at_start, document, anywhere)[:, None] + offsets]


# ---------------------------------------------------------------------------------- the training


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The untrained model, with dropout, which transformers' Llama has for attention alone."""
    config = AutoConfig.for_model(
        recipe.kind,
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size * recipe.times,
        intermediate_size=recipe.intermediate_size * recipe.times,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads * recipe.times,
        num_key_value_heads=recipe.key_value_heads * recipe.times,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **recipe.more,
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    # A padding token's embedding has no gradient; here it is the end-of-text token's as well.
    model.get_input_embeddings().padding_idx = None

    def drop(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return dropout(output, recipe.dropout, module.training)

    model.get_input_embeddings().register_forward_hook(drop)
    for name, module in model.named_modules():
        if name.endswith((".o_proj", ".down_proj", ".out_proj", ".experts")):
            module.register_forward_hook(drop)
    return model


@torch.no_grad()
def grow(small: PreTrainedModel, model: PreTrainedModel, times: int) -> None:
    """Give `model`, a Llama of `times` the width, weights with which it says what `small` says.

    Everything is there several times, and who reads it divides (Chen and others, Net2Net, 2015,
    https://arxiv.org/abs/1511.05641): by shares that are drawn, or the copies would stay alike.
    """
    own = dict(model.named_parameters())
    for name, weight in small.named_parameters():
        if weight.ndim == 1:
            # The last norm divides what the tied embedding, which is not divided, reads.
            grown = weight.repeat(times) / (times if name == "model.norm.weight" else 1)
        elif "embed_tokens" in name:
            grown = weight.repeat(1, times)
        else:
            drawn = torch.randn(times, times * len(weight), weight.shape[1]) * weight.std() / 2
            shares = weight.repeat(times, 1) / times + drawn - drawn.mean(0)
            grown = torch.cat(list(shares), 1)
        own[name].copy_(grown)


def train(
    model: PreTrainedModel,
    ids: torch.Tensor,
    held_out: torch.Tensor,
    recipe: Recipe,
    threads: int = 1,
    state: Path | None = None,
) -> tuple[int, Recipe]:
    """Train `model` in place and leave it with the best held-out loss.

    Args:
        threads: how many parts of a batch are read side by side. (With dropout, which they draw
            from one generator, several do not give the same weights twice.)
        state: a directory of the checkpoint to go on from, and to write, and of the file `finish`.

    Returns:
        The step of the best held-out loss, and the recipe with the steps that were taken.
    """
    optimizer = make_optimizer(model, recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    batches = windows(ids, model.config.eos_token_id, recipe, generator)
    first, finishing = 1, False
    best_loss, best_step, best_weights = math.inf, 0, {}
    checkpoint = state / "checkpoint.pt" if state else None
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["windows"])
        torch.set_rng_state(saved["dropout"])
        best_loss, best_step, best_weights = saved["best"]
        first, finishing = saved["step"] + 1, saved["finishing"]
        if finishing:
            recipe = replace(recipe, steps=saved["steps"], fall=saved["fall"])
        print(f"goes on after step {saved['step']}", flush=True)
    share = Share(model, threads)
    recent, started, step = 0.0, time.monotonic(), first - 1
    since = step
    while step < recipe.steps:
        if state and not finishing and (state / "finish").exists():
            finishing = True
            fall = int((state / "finish").read_text().strip() or recipe.fall)
            recipe = replace(recipe, steps=min(recipe.steps, step + fall), fall=fall)
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = rate(step, recipe)
        recent += train_step(share, optimizer, next(batches), recipe)
        if step % recipe.evaluate_every == 0 or step == recipe.steps:
            loss = held_out_loss(model, held_out, recipe)
            seconds = time.monotonic() - started
            print(
                f"step {step}/{recipe.steps}"
                f"  loss {recent / (step - since):.3f}  held out {loss:.4f}"
                f"  {seconds:.0f} s"
                f"  {(step - first + 1) * recipe.rows * recipe.context / seconds:.0f} tokens/s",
                flush=True,
            )
            recent, since = 0.0, step
            if loss < best_loss:
                best_loss, best_step = loss, step
                best_weights = {key: each.clone() for key, each in model.state_dict().items()}
            if checkpoint:
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                written = checkpoint.with_suffix(".new")
                torch.save(
                    {
                        "weights": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "windows": generator.get_state(),
                        "dropout": torch.get_rng_state(),
                        "best": (best_loss, best_step, best_weights),
                        "step": step,
                        "finishing": finishing,
                        "steps": recipe.steps,
                        "fall": recipe.fall,
                    },
                    written,
                )
                os.replace(written, checkpoint)
    model.load_state_dict(best_weights)
    return best_step, recipe


class Share:
    """A model and its twins, one for each further thread: the same weights, gradients of their own.

    Threads of torch would wait for each other after every product; these do once a step.
    """

    def __init__(self, model: PreTrainedModel, threads: int) -> None:
        self.models = [model, *(copy.deepcopy(model) for _ in range(threads - 1))]
        for twin in self.models[1:]:
            for its, own in zip(twin.parameters(), model.parameters(), strict=True):
                its.data = own.data
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def backward(self, batch: torch.Tensor, recipe: Recipe) -> float:
        """Adds the gradients of the mean loss of `batch` to the model's; returns that loss."""
        parts = batch.chunk(len(self.models))

        def backward_part(model: PreTrainedModel, rows: torch.Tensor) -> float:
            model.train()
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                loss = losses(model, rows).mean() * (len(rows) / len(batch))
            loss.backward()
            return loss.item()

        total = sum(self.pool.map(backward_part, self.models, parts))
        for twin in self.models[1:]:
            for its, own in zip(twin.parameters(), self.models[0].parameters(), strict=True):
                own.grad += its.grad
                its.grad = None
        return total


def make_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW that decays matrices but not the scales of normalisation, which belong near one."""
    parameters = list(model.parameters())
    groups = [
        {"params": [each for each in parameters if each.ndim > 1]},
        {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )


def rate(step: int, recipe: Recipe) -> float:
    """The learning rate: a linear rise, then half a cosine down, or level and then a line down."""
    if step <= recipe.warm_up:
        return recipe.rate * step / recipe.warm_up
    if recipe.fall:
        left = min(1.0, (recipe.steps - step) / recipe.fall)
        return recipe.final_rate + (recipe.rate - recipe.final_rate) * left
    done = (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up)
    falling = (1 + math.cos(math.pi * done)) / 2
    return recipe.final_rate + (recipe.rate - recipe.final_rate) * falling


def train_step(
    share: Share, optimizer: torch.optim.Optimizer, batch: torch.Tensor, recipe: Recipe
) -> float:
    """One step on `batch` `[rows, context + 1]`, in place; returns its mean loss."""
    loss = share.backward(batch, recipe)
    torch.nn.utils.clip_grad_norm_(share.models[0].parameters(), recipe.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def losses(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Nats of each token of `batch` `[rows, length]` but the first of a row, flat."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none")


@torch.inference_mode()
def held_out_loss(model: PreTrainedModel, ids: torch.Tensor, recipe: Recipe) -> float:
    """Mean nats a token of `ids` in fp32, each predicted once, in windows of the context."""
    model.eval()
    starts = range(0, len(ids) - 1, recipe.context)
    parts = [losses(model, ids[None, start : start + recipe.context + 1]) for start in starts]
    return torch.cat(parts).mean().item()


# ---------------------------------------------------------------------------------- the directory


def quality(loss: float, facts: dict[str, Any]) -> dict[str, float]:
    """The held-out loss in its three usual units: nats a token, perplexity, bits a byte."""
    bits = loss / math.log(2) * (facts["held_out_tokens"] - 1)
    return {
        "held_out_loss": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 3),
        "held_out_bits_per_byte": round(bits / facts["held_out_bytes"], 4),
    }


def versions() -> dict[str, str]:
    """Versions that could explain a difference between two trainings of one recipe."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    held_out: list[str],
    facts: dict[str, Any],
) -> None:
    """Write the model's directory."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    text = "".join(document + END for document in held_out)
    (out / "held_out.txt").write_text(text, encoding="utf-8", newline="\n")
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
