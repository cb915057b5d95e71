"""Whether the texts give away who wrote them, asked before people judge them blind.

Names of policies never reach the browser, but a text may name its author, or end in a phrase that only one
policy has: whoever notices judges the author. If a classifier that counts words finds them, so may people.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from annotate.records import Item, draw
from annotate.statistics import Estimate, proportion

FEWEST = 20
"""Pairs of two policies below which nothing can be learned of them."""
FOLDS = 5


@dataclass(frozen=True)
class Giveaway:
    """How well word counts tell two policies apart."""

    policies: tuple[str, str]
    accuracy: Estimate
    """Share of pairs put in the right order, cross-validated; 0.5 is a guess."""
    words: list[str]
    """That tell most, the strongest first."""

    @property
    def serious(self) -> bool:
        """Surely above 3 in 4. Policies of different quality are always told apart to some degree."""
        return self.accuracy.low > 0.75

    def __str__(self) -> str:
        a = self.accuracy
        return (
            f"counting words tells {self.policies[0]} from {self.policies[1]} in {a.value:.0%} "
            f"[{a.low:.0%}, {a.high:.0%}] of {a.n} pairs, most by {', '.join(map(repr, self.words))}: "
            "annotators may notice too who wrote what"
        )


def giveaways(items: Iterable[Item]) -> list[Giveaway]:
    """One for every two policies that answered at least FEWEST prompts side by side."""
    found: dict[tuple[str, str], list[tuple[str, str, str]]] = defaultdict(list)
    for item in items:
        written = sorted(zip(item.policies, item.completions, strict=False))
        for (one, text), (other, text_of_other) in combinations(written, 2):
            if one != other:
                found[one, other].append((item.id, text, text_of_other))
    return [_told_apart(who, pairs) for who, pairs in sorted(found.items()) if len(pairs) >= FEWEST]


def _told_apart(who: tuple[str, str], pairs: list[tuple[str, str, str]]) -> Giveaway:
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict

    prompts, first, second = zip(*pairs, strict=True)
    counter = CountVectorizer(token_pattern=r"\S+", min_df=2).fit([*first, *second])
    turned = np.array([draw("blinding", prompt) < 0.5 for prompt in prompts])
    difference = counter.transform(first) - counter.transform(second)
    features = difference.multiply(np.where(turned, -1, 1)[:, None]).tocsr()
    judge = LogisticRegression(max_iter=1000, fit_intercept=False)
    guessed = cross_val_predict(judge, features, turned, groups=prompts, cv=GroupKFold(FOLDS))
    strength = np.abs(judge.fit(features, turned).coef_[0])
    words = counter.get_feature_names_out()[np.argsort(-strength)[:5]]
    return Giveaway(who, proportion(guessed == turned, prompts), [str(word) for word in words])
