"""The degrees of parallelism of a run, the rules they obey, and where a rank stands. No torch.

Every data-parallel rank holds distinct sequences. Experts are spread over `ep` consecutive ranks
and replicated over the remaining `expert_dp = dp / ep`; everything else is replicated over `dp`.
EP varies fastest, so that an expert group's ranks share a node wherever a node is large enough.
"""

from dataclasses import dataclass

from parallel.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism: `dp` data-parallel ranks, `ep` of them sharing one set of experts."""

    dp: int
    ep: int

    def __post_init__(self) -> None:
        for name in ("dp", "ep"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"`layout.{name}` must be at least 1, but is {value}: use 1 or more")
        if self.dp % self.ep:
            raise UserError(
                f"`layout.ep` must divide `layout.dp`, but {self.ep} does not divide {self.dp}: "
                f"use {alternatives(self.dp, self.ep)}"
            )

    @property
    def world_size(self) -> int:
        """Ranks of the whole run."""
        return self.dp

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same experts."""
        return self.dp // self.ep

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a global rank stands along each axis."""
        return {"dp": rank, "ep": rank % self.ep, "expert_dp": rank // self.ep}


def divisors(number: int) -> list[int]:
    """Every positive divisor of a positive number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def alternatives(number: int, wrong: int) -> str:
    """The three divisors of `number` nearest to `wrong`, as words: ``2, 4 or 6``."""
    near = sorted(sorted(divisors(number), key=lambda d: abs(d - wrong))[:3])
    words = [str(d) for d in near]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
