"""How good a reward model is on comparisons it never saw, and what trivial judges reach there."""

from collections.abc import Sequence

from annotate.records import Judgement
from annotate.statistics import Estimate, proportion


def accuracy(judgements: Sequence[Judgement], differences: Sequence[float]) -> Estimate:
    """Share of judgements whose preferred side has the higher score, with its interval clustered by prompt.

    `differences` are score(first) - score(second), one for each judgement; equal scores count half. Ties and
    judgements without a verdict have no preferred side and are left out.
    """
    decided = [(j, d) for j, d in zip(judgements, differences, strict=True) if j.preference]
    right = [0.5 if d == 0 else float((d > 0) == ((j.preference or 0) > 0)) for j, d in decided]
    return proportion(right, [j.id for j, _ in decided])


def longer_wins(judgements: Sequence[Judgement]) -> Estimate:
    """Accuracy of preferring the completion with more characters."""
    return accuracy(judgements, [float(len(j.completions[0]) - len(j.completions[1])) for j in judgements])


def bag_of_words(train: Sequence[Judgement], held_out: Sequence[Judgement]) -> Estimate:
    """Accuracy of a logistic regression on the difference of the two completions' word counts.

    What a judge reaches that sees which words occur and neither their order nor the prompt.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    decided = [j for j in train if j.preference]
    first_wins = [(j.preference or 0) > 0 for j in decided]
    if len(set(first_wins)) < 2:
        return accuracy(held_out, [0.0] * len(held_out))
    words = CountVectorizer(token_pattern=r"[^\s]+", binary=False)
    words.fit(dict.fromkeys(text for j in decided for text in j.completions))

    def features(judgements: Sequence[Judgement]) -> object:
        texts = dict.fromkeys(text for j in judgements for text in j.completions)  # most come several times
        counts, row = words.transform(texts), {text: i for i, text in enumerate(texts)}
        first, second = (counts[[row[j.completions[side]] for j in judgements]] for side in (0, 1))
        return first - second

    judge = LogisticRegression(max_iter=1000, fit_intercept=False).fit(features(decided), first_wins)
    return accuracy(held_out, list(judge.decision_function(features(held_out))))
