"""Names of others in a model card stay names."""

from __future__ import annotations

from coterie.hub.card import _plain


def test_H_a_recipe_name_is_no_markup() -> None:
    assert _plain("x](http://a) <b>\n# head | `c`") == (r"x\]\(http://a\) \<b\> \# head \| \`c\`")
    assert _plain(None) == "" and _plain("dit-moe") == "dit-moe"
