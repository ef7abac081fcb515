"""The training of the demo model: what it reads, and that it can be stopped and goes on."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgen.export import demo, manual

PAGE = """\
:mod:`shop` --- Buying things
=============================

.. module:: shop
   :synopsis: Buying things.

.. index:: single: buying

The :mod:`shop` module sells, see :func:`~shop.sell` and :ref:`elsewhere <place>`. Use ``shop``::

   >>> import shop

.. function:: sell(thing, *, price=1)
   :noindex:

   Sell *thing*; :exc:`ValueError` if :attr:`thing.price` is ``None``.

   .. versionchanged:: 3.8
      It was free (:issue:`12`).

.. class:: Shop(name, \\
                place)

   Where to :meth:`Shop.buy`.

   .. note::

      Mind the step.

.. An aside
   of two lines.

The end.
"""


def test_a_page_is_text_as_pydoc_shows_it(tmp_path):
    (tmp_path / "shop.rst.txt").write_text(PAGE)
    page, shop = manual.pages(tmp_path, short=10)
    assert page == (
        "The shop module\n\nBuying things\n\nThe shop module sells, see sell() and elsewhere. "
        'Use "shop":\n\n   >>> import shop\n\nsell(thing, *, price=1)\n\n'
        '   Sell *thing*; ValueError if thing.price is "None".\n\n'
        "   Changed in version 3.8\n      It was free (bpo-12).\n\nThe end."
    )
    assert shop == (
        "class shop.Shop(name, place)\n\nWhere to Shop.buy().\n\nNote:\n\n   Mind the step."
    )


def test_what_repeats_a_held_out_document_is_left_out():
    held_out = [
        "The shop module\n\nBuying good things\n\nA shop sells all that people want to buy."
    ]
    repeated = "In short: *A shop* sells all that\npeople want to sell."
    short, other = "Buying good things.", "A shop is where people buy what they want."
    documents = [f"{repeated}\n\n{other}\n\n{short}", repeated, f"{other}\n\nBuying more"]
    assert manual.without(held_out, documents) == [other, f"{other}\n\nBuying more"]


@pytest.fixture(scope="module")
def text() -> tuple[list[str], demo.Recipe]:
    numbers = [" ".join(str(n * k % 97) for k in range(40)) for n in range(60)]
    recipe = replace(
        demo.RECIPES["manual"],
        vocab_size=300,
        context=16,
        hidden_size=32,
        intermediate_size=32,
        layers=1,
        heads=2,
        times=1,
        rows=4,
        steps=100,
        warm_up=2,
        fall=3,
        evaluate_every=2,
    )
    return numbers, recipe


def trained(text, state: Path | None, threads: int = 1) -> tuple[list[torch.Tensor], demo.Recipe]:
    documents, recipe = text
    tokenizer = demo.train_tokenizer(documents, recipe)
    ids = demo.encode(tokenizer, documents)
    torch.manual_seed(recipe.seed)
    model = demo.make_model(recipe, tokenizer)
    _, recipe = demo.train(model, ids[100:], ids[:100], recipe, threads, state)
    return [each.detach().clone() for each in model.parameters()], recipe


def test_a_training_that_was_stopped_goes_on_as_if_it_was_not(text, tmp_path, monkeypatch):
    """And ends where a file asks for it, which the recipe then says."""
    documents, recipe = text
    whole, _ = trained((documents, replace(recipe, steps=9)), None)
    real = demo.windows
    for steps in (5, 3, 2):  # until it is killed: what was done after a look is done again
        left = itertools.chain(steps * [1], [None])
        monkeypatch.setattr(
            demo,
            "windows",
            lambda *given, left=left: (each if next(left) else None for each in real(*given)),
        )
        with pytest.raises(AttributeError):
            trained(text, tmp_path)
        if steps == 3:  # after the look at step 6
            (tmp_path / "finish").write_text("3\n")
    monkeypatch.undo()
    parts, taken = trained(text, tmp_path)
    assert (taken.steps, taken.fall) == (9, 3)
    for one, two in zip(whole, parts, strict=True):
        assert torch.equal(one, two)


def test_threads_share_a_batch(text):
    documents, recipe = text
    recipe = replace(recipe, steps=3, bfloat16=False)
    (one, _), (two, _) = (trained((documents, recipe), None, threads) for threads in (1, 2))
    for left, right in zip(one, two, strict=True):
        torch.testing.assert_close(left, right, atol=2e-3, rtol=0)


def test_a_model_that_grew_says_what_it_said_and_its_copies_part(text):
    documents, recipe = text
    recipe = replace(recipe, heads=4, bfloat16=False, times=2)
    tokenizer = demo.train_tokenizer(documents, recipe)
    small = demo.make_model(replace(recipe, times=1), tokenizer)
    model = demo.make_model(recipe, tokenizer)
    demo.grow(small, model, 2)
    ids = demo.encode(tokenizer, documents)[None, :17]
    with torch.no_grad():
        found, expected = model(ids).logits, small(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    demo.losses(model, ids).mean().backward()
    for name, weight in model.named_parameters():
        # What the last layer writes, the tied embedding reads: its halves part a step later.
        if "norm" not in name and "down_proj" not in name:
            halves = weight.grad.chunk(2, dim=int("embed" in name))
            assert (halves[0] - halves[1]).abs().max() > 1e-3 * halves[0].abs().max(), name


def test_the_manual_is_asked_for_by_name(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main([str(tmp_path), "--recipe", "manual", "--manual", str(tmp_path / "nowhere")])
    assert "nowhere is not a directory" in capsys.readouterr().err
