"""The density ratio of two clusters of prompts whose distribution is known."""

import numpy as np
import pytest

from alignax.batch import Example
from alignax.data import Examples, density_ratio

SHARE = {"kitchen": 0.8, "garden": 0.25}  # of desirable rows in each cluster


def make_rows(per_cluster=600):
    rng = np.random.default_rng(0)
    rows = []
    for cluster, share in SHARE.items():
        for i in range(per_cluster):
            words = rng.choice(["how", "why", "when", "where"], 3)
            prompt = f"{cluster} {' '.join(words)}"
            label = float(i < share * per_cluster)
            rows.append(Example(f"{cluster}:{i}", prompt, ("a",), (label,)))
    return Examples(rows)


ROWS = make_rows()


def labelled(*, split):
    del split
    return ROWS


def make(**hyper):
    source = {"name": f"{__name__}.labelled"}
    return density_ratio.examples(split="train", source=source, **hyper)


def test_the_ratio_of_two_clusters_is_that_of_their_densities():
    """p(c | +) / p(c | -) for 480 : 150 desirable and 120 : 450 undesirable rows."""
    rows = make(ridge=1e-3)
    for cluster, plus, minus in (("kitchen", 480, 120), ("garden", 150, 450)):
        want = (plus / 630) / (minus / 570)
        got = [r.columns["density_ratio"] for r in rows if r.id.startswith(cluster)]
        assert np.median(got) == pytest.approx(want, rel=0.1)


def test_the_fit_is_where_the_penalised_likelihood_is_flat():
    rng = np.random.default_rng(1)
    x, labels = rng.normal(size=(40, 3)), rng.random(40) < 0.4
    logit = density_ratio.fit(x, labels, 0.7)
    p = 1 / (1 + np.exp(-logit(x)))
    weights = logit(np.eye(3)) - logit(np.zeros((1, 3)))
    np.testing.assert_allclose(x.T @ (p - labels) + 0.7 * weights, 0, atol=1e-8)
    assert (p - labels).sum() == pytest.approx(0, abs=1e-6)


def test_labels_and_responses_stay_as_they_were():
    for before, after in zip(ROWS, make(), strict=True):
        assert after._replace(columns={}) == before._replace(columns={})


def test_one_label_alone_has_no_ratio(monkeypatch):
    monkeypatch.setattr(
        f"{__name__}.ROWS", Examples([Example("r:0", "p", ("a",), (1.0,))])
    )
    with pytest.raises(ValueError, match="needs rows of both labels"):
        make()
    monkeypatch.setattr(f"{__name__}.ROWS", Examples([Example("r:1", "p", ("a",))]))
    with pytest.raises(ValueError, match="r:1: density_ratio needs a label"):
        make()
    with pytest.raises(ValueError, match="ridge is 0"):
        make(ridge=0.0)
