"""The replays in plain Python: a deque of groups or of completions, searched and sorted by hand."""

from collections import deque
from dataclasses import dataclass, field
from statistics import variance


@dataclass
class Stored:
    name: int
    """Which group it is."""
    prompt: int
    step: int
    rewards: tuple
    uses: int = 0


@dataclass
class PlainReplay:
    capacity: int
    max_age: int
    max_uses: int
    min_age: int = 1
    share: float = 1.0
    order: str = "newest"
    tau: float = 2.0
    buffer: deque = field(default_factory=deque)

    def mix_batch(self, batch, step):
        """batch: list of Stored. Returns, per slot, the name of the group in it or None, and the names as stored."""
        effective = [len(set(group.rewards)) > 1 for group in batch]
        taken = {group.prompt for group, good in zip(batch, effective, strict=True) if good}
        able = [
            group
            for group in self.buffer
            if self.min_age <= step - group.step <= self.max_age and group.uses < self.max_uses
        ]
        able = list(reversed(able))  # newest first
        if self.order != "newest":
            able.sort(key=lambda group: -self._worth(group, step))
        slots = [group.name if good else None for group, good in zip(batch, effective, strict=True)]
        room = int(self.share * len(batch) + 1e-4)
        for place, good in enumerate(effective):
            if good or not room:
                continue
            found = next((group for group in able if group.prompt not in taken), None)
            if found is None:
                break
            slots[place] = found.name
            taken.add(found.prompt)
            found.uses += 1
            room -= 1
        fresh = [(variance(g.rewards), -i, g) for i, (g, good) in enumerate(zip(batch, effective, strict=True)) if good]
        for _, _, group in sorted(fresh, key=lambda entry: entry[:2]):
            self.buffer.append(group)
            if len(self.buffer) > self.capacity:
                self.buffer.popleft()
        return slots

    def _worth(self, group, step):
        spread = variance(group.rewards)
        return spread if self.order == "variance" else spread * 2.718281828459045 ** (-(step - group.step) / self.tau)


@dataclass
class PlainRollouts:
    """APER's buffer: a list of (name, step, advantage), the oldest first."""

    capacity: int
    max_age: int
    min_age: int = 1
    buffer: list = field(default_factory=list)

    def able(self, step):
        """Evict what is too old at a step; the completions that it may draw."""
        self.buffer = [entry for entry in self.buffer if step - entry[1] <= self.max_age]
        return {entry for entry in self.buffer if step - entry[1] >= self.min_age}

    def enter(self, batch):
        """batch: list of (name, step, advantage), which enter by ascending |advantage|; of equal ones the first of the
        batch enters last."""
        entering = [entry for entry in reversed(batch) if entry[2] != 0]
        self.buffer += sorted(entering, key=lambda entry: abs(entry[2]))
        self.buffer = self.buffer[-self.capacity :]
