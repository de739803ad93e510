"""Several guides, one after another, such as a contrast on top of a controlled LM.

  z_0 = log p,  z_i = z_{i-1} tilted by guide i,  π*(v | s) ∝ exp z_n(v)

Guides whose tilt does not depend on the logits they are given add up, in any order:
π* ∝ p exp(g_1 + g_2 + ...). So do guides that score prefixes or blocks. Contrastive decoding
masks tokens that are unlikely under the logits before it, and nudging replaces these.

Source: several rewards at once, Mudgal et al. 2023, https://arxiv.org/abs/2310.17022
Differs from the paper: members are any guides, not only value functions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from alignax import plugin
from alignax.batch import LM
from alignax.sampling import guides as sampling_guides
from alignax.sampling.guides import Guide


def guide(lms: dict[str, LM], *, guides: Sequence[Mapping[str, Any]] = ()) -> Guide:
    """An *exact* guide of the kind of its members.

    Args:
      lms: has what the members name.
      guides: sections {'name': a decoder that is a guide, its hyper-parameters}, from the
        first to the last.

    Returns:
      A Guide whose state is the states of the members.

    Raises:
      ValueError: no member, members of different kinds, a search, or an error in a member,
        with its place.
    """
    if not guides:
        raise ValueError("decoder chain has no guides: ({'name': ...}, ...)")
    made = []
    for i, section in enumerate(guides):
        try:
            if not isinstance(section, Mapping) or "name" not in section:
                raise ValueError(f"{section!r} is no section {{'name': ..., ...}}")
            member = plugin.load_section("decoders", section)
            if member.role != "guide":
                raise ValueError(f"{member.name} is a {member.role}, expected a guide")
            made.append(member(lms))
        except ValueError as error:
            raise ValueError(f"decoder.guides[{i}]: {error}") from error
    return sampling_guides.chain(*made)
