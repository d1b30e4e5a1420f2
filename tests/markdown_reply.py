"""A reply of about 15 KB as a model writes it: headings, lists, tables, code, Chinese, emoji; its blocks are marked."""

from __future__ import annotations

import re

_SECTION = """## {n}. How **section {n}** reads its experts

When a layer asks for experts, the *router* has chosen them already, and `fetch(layer, ids)` only has to say where their
bytes are. M{n}a Most of them are held; the others are read from disk while the shared expert computes.

- **Hits** cost nothing but a lookup, see [the design](https://example.org/design#hits_{n}). M{n}b
- **Misses** cost a read of `4,096` aligned bytes:
  1. the slot is chosen, and whoever was in it is forgotten;
  2. the bytes arrive, in any order. M{n}c

"""
_TABLE = """| tier | bytes per second | what is there, M{n}t |
|:-----|-----------------:|:---------------------|
| VRAM | 3,350,000,000,000 | the experts that are used most |
| RAM | 92,000,000,000 | as many as fit |
| disk | 6,800,000,000 | **all** of them, `pack` or shards |

"""
_CODE = '''```python
def fetch(self, layer: int, ids: list[int]) -> ExpertBatch:
    """Bytes of these experts, valid until the batch is released. M{n}d

    Reads what is not held; waits for nothing else.
    """
    missing = [id for id in ids if (layer, id) not in self._slots]  # M{n}e
    for id in missing:
        self._read(layer, id, into=self._policy.victim({n}))
    return ExpertBatch([self._slots[layer, id] for id in ids])
```

'''
_CHINESE = """> 专家**缓存**的命中率取决于上下文，第{n}节说明了原因：同一个主题的词会选择同样的专家。M{n}f 🚀👩‍💻

---

"""
REPLY = "# Paging experts\n\n" + "".join(
    _SECTION.format(n=n)
    + (_TABLE.format(n=n) if n % 3 == 0 else "")
    + (_CODE.format(n=n) if n % 5 == 0 else "")
    + (_CHINESE.format(n=n) if n % 2 else "")
    for n in range(10, 30)
)
# In table cells they end in t.
MARKS = re.findall(r"M\d\d[a-ft]", REPLY)


def pieces(text: str, length: int = 4) -> list[str]:
    """The text as a model's tokens."""
    return [text[at : at + length] for at in range(0, len(text), length)]
